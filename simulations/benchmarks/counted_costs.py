"""What the library counts, beside what PyTorch does when it runs: a table.

``python -m simulations.benchmarks.counted_costs [NAME ...]``. Each model is counted and
then run, with weights drawn at random, for its first and its last block: operations by
PyTorch's ``FlopCounterMode``, bytes by what the CPU's allocator gives out at the peak
of the step (``torch.profiler``), on top of the model's own. Where a cell of the table
has two figures they are those of the first and of the last block.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from lola_flwr.costs.examples import training_example
from lola_flwr.costs.memory import Levers
from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.activations import Activations, kept_suffix
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, train_mode
from simulations.benchmarks.cost_cases import CASES, TOKENS, Case

BATCH = 4


@dataclass(frozen=True)
class Row:
    """Counted over executed, for one block."""

    block_index: int
    flops: float  # executed
    step_bytes: float  # executed, weights apart
    held_bytes: float  # the model's own
    flops_ratio: float
    step_ratio: float
    memory_ratio: float


def compare(
    case: Case, *, recompute: bool = False, activations: Activations = "exact"
) -> list[Row]:
    """Count the first and the last block of a model, run them, and compare.

    If ``recompute``, with the layers from the block on run twice to save memory; else
    with ``activations`` kept as they are, or in 8 bits.

    Raises
    ------
    UserError
        The model's costs cannot be counted, or its layers not run twice.
    """
    torch.manual_seed(0)
    model = case.make().to(case.dtype)
    model = adapt(model, case.tuning, dict(case.options))
    train_mode(model)
    partition = model_partition(model, example=case.example, **case.blocks)
    example = training_example(model, TOKENS) if case.example is None else case.example
    costs = model_costs(
        model,
        partition,
        batch_size=BATCH,
        sequence_length=TOKENS,
        example=case.example,
        activations=activations,
    )
    assert costs.step is not None
    counted_flops, step = costs.flops, costs.step
    if recompute:
        twice = step.recomputation()
        if twice is None:
            raise UserError("The layers cannot run twice.")
        counted_flops = counted_flops + twice.further_flops
        step = replace(step, whole_bytes=twice.whole_bytes)
    memory_bytes = step.peak_bytes(Levers(BATCH))
    batch = _batch(example)
    inputs = sum(v.nbytes for v in batch.values() if isinstance(v, Tensor))
    rows = []
    for index in sorted({0, partition.num_blocks - 1}):

        def run(index: int = index) -> None:
            with kept_suffix(model, partition, index, activations, recompute):
                block_gradient(model, partition, index, batch, loss_function=_loss)

        run()
        step_bytes = inputs + allocated_at_peak(run)
        held = _held_bytes(model)
        flops = _executed_flops(run)
        rows.append(
            Row(
                block_index=index,
                flops=flops,
                step_bytes=step_bytes,
                held_bytes=held,
                flops_ratio=float(counted_flops[index]) / flops if flops else 0.0,
                step_ratio=float(step.whole_bytes[index]) / step_bytes,
                memory_ratio=float(memory_bytes[index]) / (held + step_bytes),
            )
        )
    return rows


def _loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    if "plain" in batch:
        output: Tensor = model(batch["plain"])
        return output.sum()
    output = model(**batch)
    loss: Tensor = output.loss
    return loss


def _batch(example: Mapping[str, Any] | Tensor) -> dict[str, Any]:
    """Fill an input with values, for a whole batch; some tokens are padding."""
    if isinstance(example, Tensor):
        example = {"plain": example}

    def filled(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        shape = (BATCH, *value.shape[1:])
        if name == "input_ids" and value.any():
            return value[torch.arange(BATCH) % len(value)]
        if name == "attention_mask":
            mask = torch.ones(shape, dtype=value.dtype)
            mask[0, ..., -TOKENS // 4 :] = 0
            return mask
        if value.is_floating_point():
            return torch.randn(shape)
        if name in ("labels", "start_positions", "end_positions"):
            return torch.ones(shape, dtype=value.dtype)
        return torch.randint(5, 30, shape)

    return {name: filled(name, value) for name, value in example.items()}


def _executed_flops(run: Callable[[], None]) -> int:
    """Count by PyTorch's counter, which is told what it lacks.

    These are CPUs' fused attention, with its own formulas for GPUs', and products with
    weights of 4 bits, with one matrix for each part and with sparse matrices.
    """
    aten, mapping = torch.ops.aten, {}
    mapping[aten.mm] = mapping[aten._sparse_addmm] = _product_flops
    if "bitsandbytes" in sys.modules:
        mapping[torch.ops.bitsandbytes.gemm_4bit] = lambda a, _, weight, *__, **___: (
            2 * a.numel() * weight[0]
        )
    if hasattr(aten, "_grouped_mm"):  # since PyTorch 2.9
        mapping[aten._grouped_mm] = lambda a, _, *__, out_shape, **___: (
            2 * a.numel() * out_shape[-1]
        )
    mapping[aten._scaled_dot_product_flash_attention_for_cpu] = (
        lambda q, k, v, *_, **__: sdpa_flop_count(q, (*q[:2], *k[2:]), (*q[:2], *v[2:]))
    )
    mapping[aten._scaled_dot_product_flash_attention_for_cpu_backward] = (
        lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(
            g, q, (*q[:2], *k[2:]), (*q[:2], *v[2:])
        )
    )
    counter = FlopCounterMode(display=False, custom_mapping=mapping)
    with counter:
        run()
    return int(counter.get_total_flops())


def _product_flops(*factors: object, **_: object) -> int:
    """Count a product of the last two matrices; of a sparse one what it stores."""
    left, right = [f for f in factors if isinstance(f, torch.Tensor)][-2:]
    return 2 * (left._nnz() if left.is_sparse else left.numel()) * right.shape[-1]


# The counter passes on the tensors themselves, not their shapes alone.
_product_flops._get_raw = True  # type: ignore[attr-defined]


def allocated_at_peak(run: Callable[[], object]) -> int:
    """Return by how much a run raises what PyTorch's allocator has given out."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    alive = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        alive += change
        peak = max(peak, alive)
    return peak


def _held_bytes(model: nn.Module) -> int:
    tensors = [*model.state_dict().values(), *model.buffers(), *model.parameters()]
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if isinstance(t, Tensor)
    }
    return sum(storages.values())


def main() -> None:
    """Print the table of the models that are named, or of all."""
    warnings.simplefilter("ignore")
    hf.logging.set_verbosity_error()
    print("| model | GFLOP | operations | step, MB | step | model, MB | memory |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in sys.argv[1:] or CASES:
        try:
            rows = compare(CASES[name])
        except UserError as refusal:
            print(f"| {name} | refused: {refusal} ||||||", flush=True)
            continue
        columns = (
            [f"{row.flops / 1e9:.2f}" for row in rows],
            [f"{row.flops_ratio:.3f}" for row in rows],
            [f"{row.step_bytes / 1e6:.1f}" for row in rows],
            [f"{row.step_ratio:.3f}" for row in rows],
            [f"{rows[0].held_bytes / 1e6:.1f}"],
            [f"{row.memory_ratio:.3f}" for row in rows],
        )
        cells = [", ".join(dict.fromkeys(column)) for column in columns]
        print(f"| {' | '.join((name, *cells))} |", flush=True)


if __name__ == "__main__":
    main()
