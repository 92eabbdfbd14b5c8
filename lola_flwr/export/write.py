"""Write a model's training steps: programs, frozen weights, and a manifest."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lola_flwr.errors import UserError
from lola_flwr.export.describe import (
    ExportedModel,
    described,
    example_batch,
    program_spec,
    trained_shapes,
)
from lola_flwr.export.graph import block_step, traced_loss
from lola_flwr.export.lowering import lowered, runtime_version
from lola_flwr.export.manifest import ExportManifest, file_spec, write_manifest
from lola_flwr.machine.files import writing

FROZEN_FILE = "frozen.ptd"


def export_steps(
    exported: ExportedModel,
    directory: Path,
    *,
    blocks: Sequence[int] | None = None,
) -> ExportManifest:
    """Write the steps of some blocks, and the manifest that describes them.

    Parameters
    ----------
    exported
        The model.
    directory
        Where to; it is made, and must not be there.
    blocks
        The blocks (default: all).

    Returns
    -------
    The manifest.

    Raises
    ------
    UserError
        The directory is there, there is no such block, what is trained is not float32,
        or the model cannot be a program.
    """
    partition = exported.partition
    chosen = range(partition.num_blocks) if blocks is None else blocks
    for block in chosen:
        if not 0 <= block < partition.num_blocks:
            raise UserError(
                f"blocks: {exported.name!r} has blocks 0 to {partition.num_blocks - 1},"
                f" no {block}."
            )
    trained_shapes(exported)
    batch = example_batch(exported)
    loss = traced_loss(exported.model, batch, exported.loss_function)
    with _new_directory(directory) as unfinished:
        frozen: bytes | None = None
        programs = []
        for block in chosen:
            what = f"Block {block} of {exported.name!r}"
            step = block_step(loss, partition, block, batch)
            made = lowered(step, what=what)
            if frozen is None:
                (unfinished / FROZEN_FILE).write_bytes(made.frozen)
                frozen = made.frozen
            if made.frozen != frozen:
                raise UserError(
                    f"{what} uses other frozen weights than block {chosen[0]}, so that "
                    "they cannot share a file; export it by itself, with --blocks."
                )
            path = unfinished / f"block-{block}.pte"
            path.write_bytes(made.code)
            programs.append(
                program_spec(
                    exported, block, file_spec(path), arena_bytes=made.arena_bytes
                )
            )
        manifest = described(
            exported,
            batch,
            runtime=runtime_version(),
            frozen=file_spec(unfinished / FROZEN_FILE),
            programs=programs,
        )
        write_manifest(unfinished, manifest)
    return manifest


@contextmanager
def _new_directory(directory: Path) -> Iterator[Path]:
    """Give a directory to write into, which is there under its name only when whole."""
    if directory.exists():
        raise UserError(
            f"{directory} is there; export overwrites nothing: name another directory."
        )
    unfinished = directory.with_name(f"{directory.name}.part")
    with writing(directory):
        unfinished.mkdir(parents=True)
        try:
            yield unfinished
            unfinished.rename(directory)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            raise
