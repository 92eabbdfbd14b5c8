"""One step on an adapted model in a process of its own; prints one line of JSON.

Run with ``python -m simulations.benchmarks.adapter_step KIND``, as
bench_adapter_memory does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from contextlib import nullcontext

import torch
import transformers

from lola_flwr.machine.heap import give_back_freed_memory, keep_no_freed_memory
from lola_flwr.machine.memory import (
    peak_memory_bytes,
    reset_peak_memory,
    resident_memory_bytes,
)
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.recompute import recomputed_suffix
from simulations.benchmarks.client_step import StepTimes, partition_of, timed

BATCH_SIZE, TOKENS = 32, 128


def adapted(**sizes):
    """Make a model of RoBERTa-base's shape, but for the sizes that are given."""
    config = transformers.RobertaConfig(
        vocab_size=50_265, max_position_embeddings=514, type_vocab_size=1, **sizes
    )
    model = transformers.RobertaForSequenceClassification(config)
    return adapt(model, "lora", {"r": 8, "lora_alpha": 16}, base="nf4")


def make_batch(batch_size):
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(5, 30_000, (batch_size, TOKENS), generator=generator)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.zeros(batch_size, dtype=torch.long),
    }


def gradient(model, args, *, recompute):
    """Compute a block's gradient, as a device does; the same dropout every time."""
    partition = partition_of(model)
    index = args.block % partition.num_blocks
    torch.manual_seed(0)
    with recomputed_suffix(model, partition, index) if recompute else nullcontext():
        return block_gradient(
            model.train(),
            partition,
            index,
            make_batch(args.batch_size),
            micro_batch_size=args.micro_batch_size,
        )


def device_step(model, args):
    return [timed(lambda: gradient(model, args, recompute=args.recompute))]


def both_ways(model, args):
    """Return by how much the two ways differ, of the gradient's largest value."""
    once, twice = (
        gradient(model, args, recompute=recompute).gradients
        for recompute in (False, True)
    )
    largest = max(float(values.abs().max()) for values in once.values())
    off = max(float((once[name] - twice[name]).abs().max()) for name in once)
    return [off / largest]


def trainer_steps(model, args):
    """Take a step of ``transformers.Trainer`` on all adapters, as a device does on one.

    What its optimizer keeps, 2.4 MB, comes after the peak.
    """
    size = args.micro_batch_size or args.batch_size
    batch = make_batch(args.batch_size)
    rows = [
        dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)
    ]
    times = StepTimes()
    with tempfile.TemporaryDirectory() as directory:
        options = transformers.TrainingArguments(
            directory,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=args.batch_size // size,
            gradient_checkpointing=args.recompute,
            gradient_checkpointing_kwargs={"use_reentrant": False},
            max_steps=1,
            use_cpu=True,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        transformers.Trainer(
            model, options, train_dataset=rows, callbacks=[times]
        ).train()
    return times.seconds


KINDS = {"trainer": trainer_steps, "device": device_step, "both": both_ways}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    parser.add_argument("--micro-batch-size", type=int, default=0)
    parser.add_argument("--recompute", action="store_true")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    # As devices do; the peer's peak is lower by it, too.
    keep_no_freed_memory()
    # What a process loads in its first step is no part of what a step takes.
    small = argparse.Namespace(
        block=0, batch_size=2, micro_batch_size=0, recompute=False
    )
    tiny = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    gradient(adapted(**tiny), small, recompute=True)
    trainer_steps(adapted(**tiny), small)
    give_back_freed_memory()
    before = resident_memory_bytes()
    model = adapted()
    give_back_freed_memory()
    model_bytes = resident_memory_bytes() - before
    if not reset_peak_memory():
        raise SystemExit("The peak of a process can be measured on Linux alone.")
    values = KINDS[args.kind](model, args)
    peak_bytes = peak_memory_bytes() - before
    print(
        json.dumps(
            {"peak_bytes": peak_bytes, "model_bytes": model_bytes, "values": values}
        )
    )


if __name__ == "__main__":
    main()
