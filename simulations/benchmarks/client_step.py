"""One device's training steps in a process of its own; prints one line of JSON.

Run with ``python -m simulations.benchmarks.client_step KIND``, as bench_client does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
import transformers

from lola_flwr.device.memory import measured_peak
from lola_flwr.device.prefix import (
    LayeredWeights,
    LoadedModel,
    StreamedModel,
    save_base,
    skeleton_of,
)
from lola_flwr.machine.files import local_path
from lola_flwr.machine.heap import keep_no_freed_memory
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import FULL, adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.loading import load_classifier

MODEL = "random:roberta-base"
BATCH_SIZE, SEQUENCE_LENGTH = 16, 64


def make_batch(batch_size=BATCH_SIZE):
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, SEQUENCE_LENGTH)
    input_ids = torch.randint(5, 30_000, shape, generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.zeros(batch_size, dtype=torch.long),
    }


def load(name=MODEL, tuning=FULL):
    return adapt(load_classifier(name, num_labels=2)[0], tuning)


def skeleton(config):
    make = transformers.AutoModelForSequenceClassification.from_config
    return skeleton_of(lambda: make(config))


def partition_of(model):
    return model_partition(model)


def timed(step):
    start = time.perf_counter()
    step()
    return time.perf_counter() - start


def write_base(args):
    """Write the base checkpoint and its configuration."""
    model = load()
    save_base(model, args.base)
    model.config.save_pretrained(args.base)
    return []


def block_steps(args):
    """Compute a block's gradient, as a device does."""
    stream = args.kind == "streamed"
    if stream:
        model = skeleton(transformers.AutoConfig.from_pretrained(args.base))
        changed = Path(tempfile.mkdtemp())
        weights = LayeredWeights(args.base, changed)
        held = StreamedModel(model, partition_of(model), weights)
    else:
        model = load(tuning="ladder" if args.kind == "ladder" else FULL)
        held = LoadedModel(model, partition_of(model))
    index = held.partition.num_blocks - args.depth
    batch = make_batch()

    def step():
        with held.at_block(index, stream=stream) as ready:
            ready.train()
            size = args.micro_batch_size
            block_gradient(ready, held.partition, index, batch, micro_batch_size=size)

    return [timed(step) for _ in range(args.steps)]


def inference_steps(args):
    """Run the model forward and keep nothing."""
    model, batch = load(), make_batch()

    def step():
        with torch.inference_mode():
            model(**batch)

    return [timed(step) for _ in range(args.steps)]


class StepTimes(transformers.TrainerCallback):
    """Notes the seconds of each step."""

    def __init__(self):
        self.seconds = []

    def on_step_begin(self, *_, **__):
        """Start the clock."""
        self._start = time.perf_counter()

    def on_step_end(self, *_, **__):
        """Stop the clock."""
        self.seconds.append(time.perf_counter() - self._start)


def trainer_steps(args):
    """Fine-tune with ``transformers.Trainer``: the model, or an adapter by ``peft``."""
    model = load()
    if args.kind == "lora":
        import peft

        # Of attention's queries and values, as peft chooses for RoBERTa by itself.
        config = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16)
        model = peft.get_peft_model(model, config)
    batch = make_batch()
    rows = [
        dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
    ]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as directory:
        options = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=args.steps,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model, options, train_dataset=rows * args.steps, callbacks=[times]
        )
        trainer.train()
    return times.seconds


KINDS = {
    "base": write_base,
    "block": block_steps,
    "ladder": block_steps,
    "inference": inference_steps,
    "streamed": block_steps,
    "trainer": trainer_steps,
    "lora": trainer_steps,
}


def warm_up():
    """Load what a process loads in its first step."""
    model = load("random:roberta-tiny").train()
    block_gradient(model, partition_of(model), 0, make_batch(2))
    skeleton(model.config)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--base", type=local_path)
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # As devices do; the peers' peaks are lower by it, too.
    keep_no_freed_memory()
    warm_up()
    with measured_peak() as peak:
        seconds = KINDS[args.kind](args)
    print(json.dumps({"peak_bytes": peak.peak_bytes, "seconds": seconds}))


if __name__ == "__main__":
    main()
