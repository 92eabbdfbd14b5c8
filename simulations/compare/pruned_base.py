"""What a pruned base saves devices, and what training on it costs: three tables.

``python -m simulations.compare.pruned_base [RUN ...]``, on MiniLM and the embedded
task. Sizes and operations are counted on the model; gradients are those of a run's
start, of the pruned model and of the whole one, over the same mini-batches; and of
every directory of a run with ``save-model=true`` the trained model is evaluated as it
was trained, and as it is saved.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from lola_flwr.app.model import WholeModel, adapted, model_costs, whole_model
from lola_flwr.d2ft.recovery import recovered
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch, block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.randomness import rng_for
from lola_flwr.simulation.flower_app import read_app
from lola_glue.config import GlueConfig, SampledConfig
from lola_glue.costs import load_base
from lola_glue.server_app import evaluate_model
from lola_glue.tasks import Examples, Task, load_task
from lola_glue.text import make_batch
from tests.tree import ROOT

LORA: Mapping[str, object] = {
    "tuning": "lora",
    "tuning-options": "r=8, target_modules='all-linear'",
    "batch-size": 32,
    "codec": "fp32",
}
PRUNINGS = (
    "",
    "heads=0.25, neurons=0.25",
    "heads=0.5",
    "neurons=0.5",
    "heads=0.5, neurons=0.5",
    "heads=0.5, neurons=0.5, criterion='random'",
)
BATCH, BATCHES, BLOCKS = 32, 16, (0, 2, 5)


@dataclass(frozen=True, eq=False)
class Trained:
    """A model that is trained, on a base that is pruned perhaps, and the whole one."""

    config: SampledConfig
    task: Task
    tokenizer: Any
    model: Any
    partition: BlockPartition
    whole: WholeModel

    @classmethod
    def of(cls, keys: Mapping[str, object]) -> Trained:
        """Make both as a run's server does."""
        defaults = read_app(ROOT / "simulations" / "glue").config
        config = GlueConfig.from_run_config({**defaults, **keys})
        assert isinstance(config, SampledConfig)
        task, *_ = load_task(config.task, config.data_dir, seed=config.seed)
        base, tokenizer = load_base(config, task)
        model = adapted(config, base)
        whole = whole_model(config, model, lambda: load_base(config, task)[0])
        return cls(config, task, tokenizer, model, model_partition(model), whole)

    def is_kept(self, name: str) -> Tensor:
        """Tell which of the whole model's values of a parameter are trained."""
        shape = self.model.get_parameter(name).shape
        return torch.from_numpy(recovered(name, np.ones(shape), self.whole.cuts)) > 0

    def batch(self, examples: Examples, rows: Any) -> Batch:
        """Return a mini-batch."""
        length = self.config.max_length
        return make_batch(examples, rows, self.tokenizer, max_length=length)


def print_costs() -> None:
    """Print what devices hold, compute and send."""
    print("| pruning | base MB | GFLOP of a step | MB in all | payload kB |")
    print("|---|---:|---:|---:|---:|")
    for pruning in PRUNINGS:
        made = Trained.of({**LORA, "pruning": pruning})
        costs = model_costs(made.config, made.model)
        base = sum(made.model.get_parameter(n).nbytes for n in made.partition.frozen)
        payload = [
            4 * sum(made.model.get_parameter(n).numel() for n in block)
            for block in made.partition.blocks
        ]
        cells = [f"{base / 1e6:.1f}"]
        for column, unit in ((costs.flops, 1e9), (costs.memory_bytes, 1e6)):
            cells.append(f"{column[0] / unit:.1f}, {column[-1] / unit:.1f}")
        cells.append(f"{payload[0] / 1e3:.1f}")
        print(f"| `{pruning}` | {' | '.join(cells)} |", flush=True)


def gradients(made: Trained, block: int, batches: list[Batch]) -> tuple[Tensor, Tensor]:
    """Return a block's gradients of both models, [batches, weights].

    Of the whole model only those of what is trained of the pruned one.
    """
    names = made.partition.blocks[block]
    found: dict[int, list[Tensor]] = {0: [], 1: []}
    for which, model in enumerate((made.model, made.whole.model)):
        evaluation_mode(model)
        for batch in batches:
            of = block_gradient(model, made.partition, block, batch).gradients
            parts = [of[n][made.is_kept(n)] if which else of[n] for n in names]
            found[which].append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found[0]).double(), torch.stack(found[1]).double()


def print_bias() -> None:
    """Print how far gradients are from those of the whole model, at the start."""
    print("| pruning | logits | block | a gradient | the mean of all | its cosine |")
    print("|---|---:|---:|---:|---:|---:|")
    for pruning in PRUNINGS[1:]:
        made = Trained.of({**LORA, "pruning": pruning})
        values = made.model.state_dict()
        made.whole.load(
            made.partition, {n: values[n].numpy() for n in made.partition.trainable}
        )
        _, examples, _ = load_task(made.config.task, "", seed=0)
        rng = rng_for(0, "batches of a benchmark")
        drawn = [rng.choice(len(examples), BATCH, False) for _ in range(BATCHES)]
        batches = [made.batch(examples, rows) for rows in drawn]
        off = _logits_off(made, batches)
        for block in BLOCKS:
            pruned, whole = gradients(made, block, batches)
            errors = (pruned - whole).norm(dim=1) / whole.norm(dim=1)
            means = pruned.mean(0), whole.mean(0)
            bias = (means[0] - means[1]).norm() / means[1].norm()
            cosine = torch.cosine_similarity(*means, 0)
            print(
                f"| `{pruning}` | {off:.2f} | {block} | {errors.mean():.2f} | "
                f"{bias:.2f} | {cosine:.2f} |",
                flush=True,
            )


def _logits_off(made: Trained, batches: list[Batch]) -> float:
    """Return how far logits are from the whole model's, of their spread."""
    with torch.no_grad():
        of = [
            torch.cat([model(**batch).logits for batch in batches])
            for model in (made.model.eval(), made.whole.model.eval())
        ]
    return float((of[0] - of[1]).norm() / (of[1] - of[1].mean(0)).norm())


def print_runs(directories: list[Path]) -> None:
    """Print what runs took, and what their models are worth."""
    print(
        "| run | pruning | accuracy trained | saved | loss trained | saved | s | MB |"
    )
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for directory in directories:
        run = json.loads((directory / "run.json").read_text())["config"]
        made = Trained.of(run)
        saved = load_file(directory / "model" / "adapter_model.safetensors")
        set_peft_model_state_dict(made.whole.model, saved)
        with torch.no_grad():
            for name in made.partition.trainable:
                own = made.model.get_parameter(name)
                values = made.whole.model.get_parameter(name)
                own.copy_(values[made.is_kept(name)].reshape(own.shape))
        _, _, held_out = load_task(made.config.task, run["data-dir"], seed=run["seed"])
        metrics = [
            evaluate_model(
                model, made.tokenizer, made.task, held_out, made.config.max_length
            )
            for model in (made.model, made.whole.model)
        ]
        lines = (directory / "rounds.jsonl").read_text().splitlines()
        records = [json.loads(line) for line in lines]
        sent = sum(block["payload_bytes"] for r in records for block in r["blocks"])
        cells = [f"{m[key]:.4f}" for key in ("accuracy", "loss") for m in metrics]
        cells += [f"{records[-1]['wireless_s']:.1f}", f"{sent / 1e6:.1f}"]
        print(
            f"| {directory.name} | `{run['pruning']}` | {' | '.join(cells)} |",
            flush=True,
        )


def main() -> None:
    """Print the tables; of runs, where directories of such are given."""
    torch.set_num_threads(1)
    if sys.argv[1:]:
        print_runs([Path(name) for name in sys.argv[1:]])
        return
    print_costs()
    print()
    print_bias()


if __name__ == "__main__":
    main()
