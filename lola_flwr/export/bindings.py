"""Run programs with the Python bindings of ExecuTorch, which need PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch

from lola_flwr.export.manifest import ExportManifest
from lola_flwr.machine.installation import require_extra


class BindingsRunner:
    """Runs the programs of a directory in this process.

    Parameters
    ----------
    directory
        The directory.
    manifest
        Its manifest, checked.
    """

    def __init__(self, directory: Path, manifest: ExportManifest) -> None:
        require_extra("export", "executorch", "Running a program in Python")
        self._directory = directory
        self._manifest = manifest

    @property
    def peak_memory_bytes(self) -> float | None:
        """Not known: the memory is this process's, with all that it does besides."""
        return None

    def run(
        self, block: int, inputs: Sequence[npt.NDArray[Any]]
    ) -> list[npt.NDArray[Any]]:
        """Run a block's program.

        Parameters
        ----------
        block
            The block.
        inputs
            What the manifest lists as inputs, in order.

        Returns
        -------
        The loss and the gradients, in the order of the manifest.
        """
        from executorch.runtime import Runtime

        program = Runtime.get().load_program(
            self._directory / self._manifest.program(block).file.name,
            data_path=self._directory / self._manifest.frozen.name,
        )
        method = program.load_method("forward")
        found = method.execute([torch.from_numpy(array) for array in inputs])
        return [tensor.numpy() for tensor in found]
