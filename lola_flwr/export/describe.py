"""What is exported, and its manifest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.errors import UserError
from lola_flwr.export.batches import IGNORED, LABELS, fitted
from lola_flwr.export.manifest import (
    FORMAT,
    VERSION,
    ArraySpec,
    BatchSpec,
    ExportManifest,
    FileSpec,
    ProgramSpec,
    value_specs,
)
from lola_flwr.model.backprop import (
    Batch,
    BlockGradient,
    LossFunction,
    block_gradient,
    model_loss,
)
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.example import token_ids
from lola_flwr.model.ladder import is_ladder
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.stored_base import evaluation_mode

# What stands in columns behind the end of a sequence, beside the token that pads; and
# zero for all others.
_FILL = {LABELS: IGNORED}
# Of the largest entry of a gradient, and of a loss: rounding.
_SAME = 1e-5


@dataclass(frozen=True, kw_only=True, eq=False)
class ExportedModel:
    """What is exported.

    Parameters
    ----------
    name
        What it is called.
    model
        The model, on the CPU.
    partition
        Its blocks.
    example
        Its input and labels for one example; the values do not matter.
    batch_size, sequence_length
        Examples of a mini-batch, and tokens of each.
    costs
        What its blocks cost, for such a batch.
    loss_function
        Maps model and batch to a scalar mean loss.
    """

    name: str
    model: nn.Module
    partition: BlockPartition
    example: Mapping[str, Tensor]
    batch_size: int
    sequence_length: int
    costs: BlockCosts
    loss_function: LossFunction = model_loss

    def __post_init__(self) -> None:
        if is_ladder(self.model):
            raise UserError(
                f"{self.name}: the steps of a side network (tuning='ladder') are not "
                "exported; use tuning='lora', or 'full'."
            )


def described(
    exported: ExportedModel,
    batch: Batch,
    *,
    runtime: str,
    frozen: FileSpec,
    programs: Sequence[ProgramSpec],
) -> ExportManifest:
    """Describe an export, and try whether its batches may be filled up.

    Parameters
    ----------
    exported
        What was exported.
    batch
        What it was traced on, as ``example_batch`` gives it.
    runtime
        What the programs were made with.
    frozen, programs
        The files.
    """
    batch_size, sequence_length = exported.batch_size, exported.sequence_length
    partition = exported.partition
    manifest = ExportManifest(
        format=FORMAT,
        version=VERSION,
        runtime=runtime,
        model=exported.name,
        base_fingerprint=fingerprint(exported.model, partition.frozen),
        dropout="off",
        batch_size=batch_size,
        sequence_length=sequence_length,
        takes_fewer_examples=True,
        takes_fewer_tokens=True,
        blocks=partition.blocks,
        head=partition.head,
        values=value_specs(trained_shapes(exported)),
        batch=tuple(_batch_specs(exported.model, batch, sequence_length)),
        frozen=frozen,
        programs=tuple(programs),
    )
    return replace(
        manifest,
        takes_fewer_examples=batch_size > 1
        and _is_same(exported, manifest, batch, rows=batch_size - 1),
        takes_fewer_tokens=sequence_length > 1
        and _is_same(exported, manifest, batch, columns=-(-sequence_length // 2)),
    )


def program_spec(
    exported: ExportedModel, block: int, file: FileSpec, *, arena_bytes: int
) -> ProgramSpec:
    """Describe the program of a block.

    Parameters
    ----------
    exported
        What is exported.
    block
        The block.
    file, arena_bytes
        As of `ProgramSpec`.
    """
    shapes = trained_shapes(exported)
    return ProgramSpec(
        block=block,
        file=file,
        gradients=tuple(
            ArraySpec(name, shapes[name], "<f4")
            for name in exported.partition.update_names(block)
        ),
        operations=float(exported.costs.flops[block]),
        memory_bytes=float(exported.costs.memory_bytes[block]),
        arena_bytes=arena_bytes,
    )


def _is_same(
    exported: ExportedModel,
    manifest: ExportManifest,
    batch: Batch,
    *,
    rows: int | None = None,
    columns: int | None = None,
) -> bool:
    """Tell whether a smaller batch has the same gradient once it is filled up."""
    small = {}
    for spec in manifest.batch:
        part = batch[spec.name][:rows]
        small[spec.name] = part if spec.fill is None else part[:, :columns]
    whole = fitted({n: t.numpy() for n, t in small.items()}, manifest)
    filled = {
        spec.name: torch.from_numpy(array)
        for spec, array in zip(manifest.batch, whole, strict=True)
    }
    first = _gradient(exported, small)
    try:
        second = _gradient(exported, filled)
    # A loss that knows no ignored label raises whatever it raises at a wrong one.
    except Exception:
        return False
    largest = max(float(each.abs().max()) for each in first.gradients.values())
    return abs(first.loss - second.loss) <= _SAME * abs(first.loss) and all(
        float((first.gradients[name] - second.gradients[name]).abs().max())
        <= _SAME * largest
        for name in first.gradients
    )


def _gradient(exported: ExportedModel, batch: Batch) -> BlockGradient:
    """Return the gradient of the last block, without dropout."""
    modes = evaluation_mode(exported.model)
    try:
        return block_gradient(
            exported.model,
            exported.partition,
            exported.partition.num_blocks - 1,
            batch,
            loss_function=exported.loss_function,
        )
    finally:
        for module, training in modes.items():
            module.training = training


def trained_shapes(exported: ExportedModel) -> dict[str, tuple[int, ...]]:
    """Return the shapes of what is trained, by name, in order.

    Raises
    ------
    UserError
        What is trained is not float32.
    """
    parameters = dict(exported.model.named_parameters())
    for name in exported.partition.trainable:
        if parameters[name].dtype != torch.float32:
            raise UserError(
                f"{name} is {parameters[name].dtype}, and values travel as float32; "
                "load the model with float32 weights."
            )
    return {n: tuple(parameters[n].shape) for n in exported.partition.trainable}


def example_batch(exported: ExportedModel) -> dict[str, Tensor]:
    """Return a batch of different examples, of the shapes that are exported."""
    batch_size, sequence_length = exported.batch_size, exported.sequence_length
    batch = {
        name: tensor[:1].repeat(batch_size, *[1] * (tensor.dim() - 1))
        for name, tensor in exported.example.items()
    }
    if "input_ids" in batch:
        ids = token_ids(exported.model, sequence_length, batch_size)
        batch["input_ids"] = ids.clone()
        if _tokens_in(batch.get(LABELS), sequence_length):
            batch[LABELS] = ids.clone()
    return batch


def _batch_specs(
    model: nn.Module, batch: Batch, sequence_length: int
) -> Iterator[BatchSpec]:
    pad_id = getattr(getattr(model, "config", None), "pad_token_id", None)
    fill: dict[str, int] = {**_FILL, "input_ids": pad_id or 0}
    for name, tensor in batch.items():
        yield BatchSpec(
            name,
            tuple(tensor.shape),
            np.dtype(tensor.numpy().dtype).str,
            fill.get(name, 0) if _tokens_in(tensor, sequence_length) else None,
        )


def _tokens_in(tensor: Tensor | None, sequence_length: int) -> bool:
    """Tell whether a tensor has a column a token."""
    return tensor is not None and (
        tensor.dim() > 1 and tensor.shape[1] == sequence_length
    )
