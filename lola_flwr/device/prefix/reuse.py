"""Run the layers below a block apart from the rest of the model, once per sample.

Below its block a device trains nothing: what the layers there give for a sample is a
function of their weights and of the sample. It is computed in evaluation mode, without
dropout, and can be kept.

The model runs its own forward code in both parts, so any model will do whose blocks
are layers of equal shape. The lower part ends, by an exception, where the block is
called. In the upper part the layers below the block hand NaN through, which the block
finds replaced by what the lower part gave: whatever else depended on those layers would
turn the loss into NaN, and not go wrong unseen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import xxhash
from torch import Tensor, nn

from lola_flwr.device.prefix.cache import ActivationCache
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import BlockPartition

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

Arguments = dict[int | str, Any]

_TURN_OFF = "Turn the reuse of the layers below the block off."


class reused_prefix:
    """Take what the layers below a block give from a cache, for a ``with``.

    Inside it the model is called as ever, any number of times; only what is trained
    from the block upward may change. With ``block_index=0`` there is nothing below.

    Parameters
    ----------
    model
        The model; its blocks are layers that map hidden states to hidden states of the
        same shape.
    partition
        Its blocks.
    block_index
        The block.
    cache
        Where outputs are kept; None: nowhere, every call runs the layers.
    version
        What distinguishes the weights below the block from others (default: their
        digest).
    layer_in_memory
        Gives the context that layer ``index`` runs in (default: none), which may load
        its weights and drop them.

    Raises
    ------
    UserError
        The model is not of that kind, or is called in a way that is not understood.
    """

    def __init__(
        self,
        model: nn.Module,
        partition: BlockPartition,
        block_index: int,
        cache: ActivationCache | None = None,
        *,
        version: str | None = None,
        layer_in_memory: Callable[[int], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._model = model
        self._block_index = block_index
        self._layers = block_modules(model, partition)[: block_index + 1]
        self._cache = cache
        self._version = version
        self._below = _below(model, partition, block_index)
        self._digest: tuple[object, str] | None = None
        self._layer_in_memory = layer_in_memory or (lambda index: nullcontext())
        self._handles: list[Any] = []
        # Whether the lower part runs, and otherwise what it gave for this call.
        self._below_runs = False
        self._hidden: Tensor | None = None
        # The tuple that a layer returns, as those of some models do, without its hidden
        # states; of other layers None. Empty: not known yet.
        self._beside_hidden: list[tuple[None, ...] | None] = []

    def __enter__(self) -> Self:
        if self._block_index:
            *below, block = self._layers
            for index, layer in enumerate(below):
                layer.forward = self._stand_in(index, layer.forward)
            self._handles = [
                self._model.register_forward_pre_hook(
                    self._before_model, with_kwargs=True
                ),
                block.register_forward_pre_hook(self._before_block, with_kwargs=True),
                self._model.register_forward_hook(self._after_model, always_call=True),
            ]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._block_index:
            for layer in self._layers[:-1]:
                del layer.forward
        for handle in self._handles:
            handle.remove()

    # --- what runs in place of the model's own parts ---------------------------------

    def _before_model(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self._hidden = self._hidden_states(dict([*enumerate(args), *kwargs.items()]))

    def _before_block(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if self._below_runs:
            raise _BlockReached(_first_hidden(args, kwargs))
        if args:
            return (self._given(), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._given()}

    def _after_model(self, *_: object) -> None:
        self._hidden = None

    def _given(self) -> Tensor:
        """Return what the lower part gave for the call of the model that runs."""
        if self._hidden is None:
            raise UserError(
                "The model's layers were called apart from the model itself; call the "
                f"model. {_TURN_OFF}"
            )
        return self._hidden

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = _first_hidden(args, kwargs)
            if not self._below_runs:
                self._given()
                handed = hidden.new_full((), torch.nan).expand_as(hidden)
                nones = self._beside_hidden[0]
                return handed if nones is None else (handed, *nones)
            with self._layer_in_memory(index):
                output = forward(*args, **kwargs)
            first, *beside = output if isinstance(output, tuple) else (output,)
            if (
                not isinstance(first, Tensor)
                or first.shape != hidden.shape
                or any(value is not None for value in beside)
            ):
                returned = ", ".join(map(_shape, (first, *beside)))
                raise UserError(
                    "The layers below the block can be run apart only where each maps "
                    "hidden states to hidden states of the same shape, and to nothing "
                    f"else; here {_shape(hidden)} became {returned}. {_TURN_OFF}"
                )
            is_tuple = isinstance(output, tuple)
            self._beside_hidden = [(None,) * len(beside) if is_tuple else None]
            return output

        return run

    # --- the lower part --------------------------------------------------------------

    def _hidden_states(self, arguments: Arguments) -> Tensor:
        """Return what the block is given, of all samples of a call."""
        batch = {k: v for k, v in arguments.items() if isinstance(v, Tensor)}
        if not batch:
            raise UserError("The model was called without a tensor of samples.")
        num_samples = len(next(iter(batch.values())))
        if self._cache is None:
            return self._run_below(arguments)
        prefix = f"{self._version or self._present_version()} {self._autocast()}"
        mask = batch.get("attention_mask")
        # What a mask leaves out is padding, if there is one entry for each token.
        mask = None if mask is None or mask.ndim != 2 else mask.bool()
        keys = _sample_keys(prefix, arguments, num_samples, mask)
        kept = {sample: self._cache.get(key) for sample, key in enumerate(keys)}
        found = {sample: rows for sample, rows in kept.items() if rows is not None}
        missing = [sample for sample in kept if sample not in found]
        if not self._beside_hidden and not missing:
            missing = [0]  # to see what a layer returns
        if missing:
            hidden = self._run_below(
                {k: _rows(v, missing, num_samples) for k, v in arguments.items()}
            )
            if mask is not None and hidden.shape[1] != mask.shape[1]:
                raise UserError(
                    f"An attention mask of {mask.shape[1]} positions does not fit "
                    f"hidden states of {hidden.shape[1]}. {_TURN_OFF}"
                )
            for sample, states in zip(missing, hidden, strict=True):
                found[sample] = states if mask is None else states[mask[sample]]
                self._cache.put(keys[sample], found[sample])
            if len(missing) == num_samples:
                return hidden
        rows = [found[sample] for sample in range(num_samples)]
        device = next(iter(batch.values())).device
        return (torch.stack(rows) if mask is None else _padded(rows, mask)).to(device)

    def _run_below(self, arguments: Arguments) -> Tensor:
        """Run the model up to the block, in evaluation mode."""
        args = [value for key, value in arguments.items() if isinstance(key, int)]
        kwargs = {k: value for k, value in arguments.items() if isinstance(k, str)}
        training = [module for module in self._model.modules() if module.training]
        self._model.eval()
        self._below_runs = True
        try:
            with torch.no_grad():
                # Not the module's call, whose hook led here.
                self._model.forward(*args, **kwargs)
        except _BlockReached as reached:
            return reached.hidden
        finally:
            self._below_runs = False
            for module in training:
                module.training = True
        raise UserError(
            f"The model's forward pass never called block {self._block_index}. "
            f"{_TURN_OFF}"
        )

    def _present_version(self) -> str:
        """Return the digest of the weights below the block, as they are now."""
        tensors = dict(self._below)
        stamp = tuple((t.data_ptr(), t._version) for t in tensors.values())
        # Within one `with`, a change in place is seen by the tensor's version.
        if self._digest is None or self._digest[0] != stamp:
            config = dict(vars(getattr(self._model, "config", object)))
            # A model that is given labels notes here what kind they are.
            config.pop("problem_type", None)
            about = f"{type(self._model)} {config} {self._block_index}"
            self._digest = (stamp, f"{about} {digest(tensors.items())}")
        return self._digest[1]

    def _autocast(self) -> str:
        kind = next(self._model.parameters()).device.type
        if not torch.is_autocast_enabled(kind):
            return ""
        return str(torch.get_autocast_dtype(kind))


class _BlockReached(Exception):
    """Ends the lower part: the block was called."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden


def block_modules(model: nn.Module, partition: BlockPartition) -> list[nn.Module]:
    """Return the module that each block is, or is a part of.

    Raises
    ------
    UserError
        The blocks are not one module each.
    """
    paths = [[name.split(".") for name in block] for block in partition.blocks]
    if len(paths) == 1:
        return [model]
    every = [path for block in paths for path in block]
    depth = 0
    while len({tuple(path[: depth + 1]) for path in every}) == 1:
        depth += 1
    modules = [{".".join(path[: depth + 1]) for path in block} for block in paths]
    names = [name for block in modules for name in block]
    if len(names) != len(paths) or len(set(names)) != len(paths):
        raise UserError(
            "The layers below a block can be run apart only where every block is one "
            f"module; these are {', '.join(sorted(set(names))[:4])}, .... {_TURN_OFF}"
        )
    return [model.get_submodule(name) for name in names]


def digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of named tensors; fast, for content that nobody forges."""
    total = xxhash.xxh3_128()
    for name, tensor in tensors:
        total.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        total.update(_bytes(tensor.detach().cpu()))
    return total.hexdigest()


def _below(
    model: nn.Module, partition: BlockPartition, block_index: int
) -> list[tuple[str, Tensor]]:
    """Return what the lower part computes with, and perhaps some more."""
    above = {
        id(tensor)
        for module in block_modules(model, partition)[block_index:]
        for tensor in (*module.parameters(), *module.buffers())
    }
    head = set(partition.head)
    return [
        (name, tensor)
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if id(tensor) not in above and name not in head
    ]


def _first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UserError(
            f"The layers of this model do not take hidden states first. {_TURN_OFF}"
        )
    return hidden


def _rows(value: Any, samples: Sequence[int], num_samples: int) -> Any:
    """Select the samples of an argument that holds one entry for each."""
    if isinstance(value, Tensor) and value.ndim and len(value) == num_samples:
        return value[list(samples)]
    return value


def _sample_keys(
    prefix: str, arguments: Arguments, num_samples: int, mask: Tensor | None
) -> list[str]:
    """Return the keys of a call's samples, which do not depend on their padding."""
    keys = [
        hashlib.blake2b(prefix.encode(), digest_size=20) for _ in range(num_samples)
    ]
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            samples = value.detach().cpu()
            per_sample = samples.ndim > 0 and len(samples) == num_samples
            per_token = mask is not None and samples.shape[:2] == mask.shape
            for sample, key in enumerate(keys):
                part = samples[sample] if per_sample else samples
                if mask is not None and per_token:
                    part = part[mask[sample].cpu()]
                key.update(f"{name} {tuple(part.shape)} {part.dtype}".encode())
                key.update(_bytes(part))
        elif value is None or isinstance(value, bool | int | float | str):
            for key in keys:
                key.update(f"{name}={value!r}".encode())
        else:
            raise UserError(
                f"The model was called with {name}={type(value).__name__}, by which "
                f"samples cannot be told apart. {_TURN_OFF}"
            )
    if mask is not None:
        # Where a sample stands among its padding.
        for row, key in zip(mask.cpu(), keys, strict=True):
            key.update(_bytes(row.nonzero()))
    return [key.hexdigest() for key in keys]


def _padded(rows: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Put samples into a batch again; padding, which nothing attends to, is zero."""
    batch = rows[0].new_zeros(*mask.shape, *rows[0].shape[1:])
    for sample, kept in enumerate(rows):
        batch[sample, mask[sample].to(kept.device)] = kept.to(batch.device)
    return batch


def _bytes(tensor: Tensor) -> memoryview:
    # Only a tensor with a dimension can be seen as bytes.
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _shape(value: object) -> str:
    return str(tuple(value.shape)) if isinstance(value, Tensor) else repr(value)
