"""What the layers below a block gave for each sample, bounded in bytes."""

from __future__ import annotations

import contextlib
import os
from collections import OrderedDict
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lola_flwr.errors import UserError
from lola_flwr.machine.files import replacing, writing

_TENSOR = "hidden_states"


class ActivationCache:
    """Tensors by key; those that were not used for longest give way.

    The keys name the content: whoever asks with the key of other weights or of another
    sample finds nothing. So nothing in the cache can become stale.

    Parameters
    ----------
    max_bytes
        Bytes that it may hold.
    directory
        Where to hold them, one safetensors file each; it outlives the process, and
        processes can share it. None: in memory.

    Raises
    ------
    UserError
        ``max_bytes`` is not positive.
    """

    def __init__(self, max_bytes: int, directory: Path | None = None) -> None:
        if max_bytes <= 0:
            raise UserError(f"max_bytes={max_bytes} of a cache must be positive.")
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        self._directory = directory
        # Key -> bytes, and in memory the tensor; least recently used first.
        self._entries: OrderedDict[str, tuple[int, Tensor | None]] = OrderedDict()
        if directory is not None:
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
            files = [(p.stat(), p) for p in directory.glob("*.safetensors")]
            for status, path in sorted(files, key=lambda file: file[0].st_mtime):
                self._entries[path.stem] = (status.st_size, None)
                self.num_bytes += status.st_size
            self._evict()

    @property
    def in_memory(self) -> bool:
        """Whether it takes memory, and not room on a disk."""
        return self._directory is None

    def get(self, key: str) -> Tensor | None:
        """Return what is kept under a key; None if nothing is."""
        tensor = self._load(key)
        if tensor is None:
            self.misses += 1
        else:
            self.hits += 1
            self._entries.move_to_end(key)
        return tensor

    def put(self, key: str, tensor: Tensor) -> None:
        """Keep a tensor, unless it alone is larger than the cache."""
        self._drop(key)
        # A view would keep the whole batch alive.
        tensor = tensor.detach().to("cpu", copy=True).contiguous()
        num_bytes = tensor.nbytes
        if num_bytes > self.max_bytes:
            return
        if self._directory is not None:
            path = self._path(key)
            with replacing(path, shared=True) as unfinished:
                save_file({_TENSOR: tensor}, unfinished)
                num_bytes = unfinished.stat().st_size
        self._entries[key] = (num_bytes, tensor if self._directory is None else None)
        self.num_bytes += num_bytes
        self._evict()

    def _load(self, key: str) -> Tensor | None:
        if self._directory is None:
            return self._entries[key][1] if key in self._entries else None
        path = self._path(key)
        try:
            tensor = load_file(path)[_TENSOR]
            os.utime(path)
        # Not there, removed by another process, or damaged: to be computed anew.
        except (OSError, SafetensorError, KeyError):
            self._drop(key)
            return None
        if key not in self._entries:
            self._entries[key] = (path.stat().st_size, None)
            self.num_bytes += self._entries[key][0]
        return tensor

    def _evict(self) -> None:
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._entries)))

    def _drop(self, key: str) -> None:
        num_bytes, _ = self._entries.pop(key, (0, None))
        self.num_bytes -= num_bytes
        if self._directory is not None:
            with contextlib.suppress(FileNotFoundError):
                self._path(key).unlink()

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}.safetensors"
