"""A model whose weights stay on disk: layers below the block run one after another.

Files are mapped into memory, so the weights of the block and of what is above it take
memory once they are used. A layer below the block is mapped when it runs and unmapped
after, and so is an embedding, of which a batch touches a few rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from lola_flwr.device.prefix.cache import ActivationCache
from lola_flwr.device.prefix.layers import block_modules
from lola_flwr.device.prefix.reuse import reused_prefix
from lola_flwr.device.prefix.samples import digest
from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing, writing
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import check_values
from lola_flwr.model.stored_base import in_full, quantised_modules

# Rows of a large tensor are hashed in pieces of this size.
_PIECE_BYTES = 1 << 24


def skeleton_of(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model without weights: its parameters have shapes and no values.

    Parameters
    ----------
    build
        Makes the model, with whatever weights; buffers, as of rotary positions, are
        kept.
    """
    from accelerate import init_empty_weights
    from transformers import PreTrainedModel

    with init_empty_weights(include_buffers=False):
        model = build()
    if isinstance(model, PreTrainedModel):
        model.tie_weights()
    return model.eval()


def save_base(model: nn.Module, directory: Path) -> None:
    """Write a model's parameters under their names, as ``LayeredWeights`` reads them.

    ``save_pretrained`` writes some models under the names that they had in the past.
    """
    values = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    with replacing(directory / "model.safetensors") as unfinished:
        save_file(values, unfinished)


class LayeredWeights:
    """A base checkpoint on disk, and above it the values that changed since.

    Parameters
    ----------
    base
        A directory by ``save_base``, or in Hugging Face format: ``model.safetensors``,
        or several files with ``model.safetensors.index.json``. It is only read.
    changed
        A directory for what changed; what an earlier process wrote there counts.

    Raises
    ------
    UserError
        ``base`` holds no safetensors, or a file is damaged.
    """

    def __init__(self, base: Path, changed: Path) -> None:
        self._changed = changed
        with writing(changed):
            changed.mkdir(parents=True, exist_ok=True)
        index = base / "model.safetensors.index.json"
        files = [base / "model.safetensors"]
        if index.exists():
            shards = json.loads(index.read_text())["weight_map"].values()
            files = [base / name for name in sorted(set(shards))]
        self._file_of: dict[str, Path] = {}
        for path in (*files, *sorted(changed.glob("*.safetensors"))):
            self._take_in(path)

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Map tensors into memory; they are unmapped when the last of them is gone."""
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        tensors = {}
        for path, inside in by_file.items():
            with _opened(path) as file:
                tensors.update({name: file.get_tensor(name) for name in inside})
        return tensors

    def write(self, group: str, tensors: Mapping[str, Tensor]) -> None:
        """Replace what changed of one group of tensors.

        Who has mapped earlier values keeps seeing those.
        """
        path = self._changed / f"{group}.safetensors"
        with replacing(path) as unfinished:
            save_file({**tensors}, unfinished)
        self._take_in(path)

    def _take_in(self, path: Path) -> None:
        with _opened(path) as file:
            self._file_of.update(dict.fromkeys(file.keys(), path))


class StreamedModel:
    """A model of which a device holds in memory what it needs for its block.

    Parameters
    ----------
    model
        A model without weights, by ``skeleton_of``.
    partition
        Its blocks.
    weights
        Its weights.
    device
        Where it computes.

    Raises
    ------
    UserError
        ``weights`` lacks a frozen parameter, or a frozen buffer has no values.
    """

    streams = True
    held_bytes = 0  # between two steps

    def __init__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        weights: LayeredWeights,
        device: torch.device | str = "cpu",
    ) -> None:
        if quantised := [*quantised_modules(model)]:
            raise UserError(
                f"{quantised[0]} is quantised, and quantised weights cannot be "
                "streamed from a disk; hold the model in memory, or use base='bf16'."
            )
        self._buffers = _frozen_buffers(model, partition)
        self.model = model
        self.partition = partition
        self._device = torch.device(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        self._weights = weights
        self._empty = dict(model.named_parameters())
        # A tied parameter has several places.
        self._places: dict[str, list[tuple[nn.Module, str]]] = {}
        names = {id(parameter): name for name, parameter in self._empty.items()}
        for module in model.modules():
            for attribute, parameter in module._parameters.items():
                if parameter is not None:
                    places = self._places.setdefault(names[id(parameter)], [])
                    places.append((module, attribute))
        # Of each layer all weights, frozen ones too.
        own = {id(parameter): name for name, parameter in self._empty.items()}
        self._layer_names = [
            [own[id(parameter)] for parameter in layer.parameters()]
            for layer in block_modules(model, partition)
        ]
        # A checkpoint of the bare model does not name it.
        bare = f"{getattr(model, 'base_model_prefix', '')}."
        self._stored = {
            name: name if name in weights else name.removeprefix(bare)
            for name in self._empty
        }
        weighed = [name for name in partition.frozen if name not in self._buffers]
        missing = [name for name in weighed if self._stored[name] not in weights]
        if missing:
            raise UserError(
                f"The base checkpoint lacks {missing[0]}: it is of another model, or "
                "under other names; write it with lola_flwr.device.prefix.save_base."
            )
        self._fingerprint: str | None = None

    def fingerprint(self) -> str:
        """Return the digest of the frozen weights, as `model.loading` does."""
        if self._fingerprint is None:
            total = hashlib.sha256()
            for name in self.partition.frozen:
                is_first = True
                for piece in map(in_full, self._pieces(name)):
                    if is_first:
                        shape = tuple((self._empty | self._buffers)[name].shape)
                        total.update(f"{name} {shape} {piece.dtype}".encode())
                    is_first = False
                    total.update(piece.cpu().reshape(-1).view(torch.uint8).numpy().data)
            self._fingerprint = total.hexdigest()
        return self._fingerprint

    def shapes(self, names: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of some parameters, by name."""
        return {name: tuple(self._empty[name].shape) for name in names}

    def load(
        self, names: Sequence[str], arrays: Sequence[npt.NDArray[np.floating]]
    ) -> None:
        """Take in values that the server sent; the others stay as they are.

        Raises
        ------
        UserError
            They are those of another model; nothing is taken in.
        """
        check_values(self._empty, names, arrays)
        values = dict(zip(names, arrays, strict=True))
        blocks = {f"block-{n:04d}": b for n, b in enumerate(self.partition.blocks)}
        for group, names in {**blocks, "head": self.partition.head}.items():
            received = {name: values[name] for name in names if name in values}
            if received:
                kept = self._read([name for name in names if name not in received])
                tensors = {n: torch.from_numpy(array) for n, array in received.items()}
                self._weights.write(group, {**kept, **tensors})
                self._stored.update({name: name for name in names})

    @contextmanager
    def at_block(
        self,
        block_index: int,
        cache: ActivationCache | None = None,
        *,
        stream: bool = True,
    ) -> Iterator[nn.Module]:
        """Give the model, fit for training one block, for a ``with``.

        Parameters
        ----------
        block_index
            The block. It and what is above it is in memory.
        cache
            Where the outputs of the layers below are kept (default: nowhere).
        stream
            Whether the layers below are in memory one at a time, or all.
        """
        partition = self.partition
        layers = self._layer_names[:block_index] if stream else []
        below = {name for layer in layers for name in layer}
        in_memory = [name for name in self._empty if name not in below]
        with ExitStack() as stack:
            stack.enter_context(self._mapped(in_memory))
            if stream:
                for name, places in self._places.items():
                    module, _ = places[0]
                    if name in partition.frozen and isinstance(module, nn.Embedding):
                        stack.enter_context(self._mapped_on_call(module, name))
            if stream or cache is not None:
                stack.enter_context(
                    reused_prefix(
                        self.model,
                        partition,
                        block_index,
                        cache,
                        version=None if cache is None else self._version(block_index),
                        layer_in_memory=(
                            (lambda index: self._mapped(layers[index]))
                            if stream
                            else None
                        ),
                    )
                )
            yield self.model

    def _version(self, block_index: int) -> str:
        below = (
            (name, tensor)
            for layer in self._layer_names[:block_index]
            for name, tensor in self._read(layer).items()
        )
        about = f"{type(self.model)} {self.fingerprint()} {block_index}"
        return f"{about} {digest(below)}"

    def _read(self, names: Iterable[str]) -> dict[str, Tensor]:
        names = list(names)
        missing = [name for name in names if self._stored[name] not in self._weights]
        if missing:
            raise UserError(
                f"{missing[0]} is neither in the base checkpoint nor was it received."
            )
        tensors = self._weights.read(self._stored[name] for name in names)
        return {
            name: tensors[self._stored[name]].to(self._device, self._empty[name].dtype)
            for name in names
        }

    def _pieces(self, name: str) -> Iterator[Tensor]:
        """Give a tensor's rows as they are stored, a few in memory at a time."""
        if name in self._buffers:
            yield self._buffers[name].contiguous()
            return
        shape = self._empty[name].shape
        if not shape:
            yield self._stored_tensor(name)
            return
        row_bytes = max(1, self._empty[name][0].nbytes)
        step = max(1, _PIECE_BYTES // row_bytes)
        for start in range(0, shape[0], step):
            yield self._stored_tensor(name)[start : start + step].contiguous()

    def _stored_tensor(self, name: str) -> Tensor:
        return self._weights.read([self._stored[name]])[self._stored[name]]

    @contextmanager
    def _mapped(self, names: Iterable[str]) -> Iterator[None]:
        """Let parameters have their values for a ``with``."""
        before = {}
        for name, tensor in self._read(names).items():
            module, attribute = self._places[name][0]
            before[name] = module._parameters[attribute]
            self._place(name, nn.Parameter(tensor, requires_grad=False))
        try:
            yield
        finally:
            for name, parameter in before.items():
                self._place(name, parameter)

    @contextmanager
    def _mapped_on_call(self, module: nn.Module, name: str) -> Iterator[None]:
        """Let an embedding read its rows from a mapping of its own."""
        forward = module.forward

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._mapped([name]):
                return forward(*args, **kwargs)

        module.forward = run
        try:
            yield
        finally:
            del module.forward

    def _place(self, name: str, parameter: nn.Parameter | None) -> None:
        for module, attribute in self._places[name]:
            module._parameters[attribute] = parameter


def _frozen_buffers(model: nn.Module, partition: BlockPartition) -> dict[str, Tensor]:
    """Return what came with adapters and is no parameter, by name."""
    frozen = set(partition.frozen)
    buffers = {n: buffer for n, buffer in model.named_buffers() if n in frozen}
    for name, buffer in buffers.items():
        if buffer.is_meta:
            raise UserError(
                f"{name} is computed from base weights, which a model that is streamed "
                "from a disk does not have at hand; hold it in memory, or choose "
                "another tuning."
            )
    return buffers


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"{path} cannot be read ({reason}); it must be a safetensors file, as "
            "save_pretrained writes it."
        ) from None
