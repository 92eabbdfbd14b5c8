"""A model whose weights are all in memory, under the same methods as a streamed one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from lola_flwr.device.prefix.cache import ActivationCache
from lola_flwr.device.prefix.reuse import reused_prefix
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint, load_values


class LoadedModel:
    """A model in memory.

    Parameters
    ----------
    model
        The model.
    partition
        Its blocks.
    device
        Where it is moved to, to compute there.
    """

    streams = False

    def __init__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        device: torch.device | str = "cpu",
    ) -> None:
        self.model = model.to(device)
        self.partition = partition

    @property
    def held_bytes(self) -> int:
        """Bytes that the weights take all the time."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        """Return the digest of the frozen weights."""
        return fingerprint(self.model, self.partition.frozen)

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of some parameters, by name."""
        parameters = dict(self.model.named_parameters())
        return {name: tuple(parameters[name].shape) for name in names}

    def load(
        self, names: Sequence[str], values: Sequence[NDArray[np.floating]]
    ) -> None:
        """Take in values that the server sent, as ``load_values`` does."""
        load_values(self.model, names, values)

    @contextmanager
    def at_block(
        self,
        block_index: int,
        cache: ActivationCache | None = None,
        *,
        stream: bool = False,
    ) -> Iterator[nn.Module]:
        """Give the model, fit for training one block, for a ``with``.

        Parameters
        ----------
        block_index
            The block.
        cache
            Where the outputs of the layers below are kept; None: these run as ever,
            with the model's dropout.
        stream
            Not possible here.
        """
        if stream:
            raise UserError("A model in memory cannot be streamed; use StreamedModel.")
        if cache is None:
            yield self.model
            return
        with reused_prefix(self.model, self.partition, block_index, cache):
            yield self.model
