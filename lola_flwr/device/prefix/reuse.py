"""Run the layers below a block apart from the rest of the model, once per sample.

Below its block a device trains nothing: what the layers there give for a sample is a
function of their weights and of the sample. It is computed in evaluation mode, without
dropout, and can be kept.

The model runs its own forward code in both parts, so any model will do whose blocks
are layers of equal shape. The lower part ends, by an exception, where the block is
called. In the upper part the layers below the block hand NaN through, which the block
finds replaced by what the lower part gave: whatever else depends on those layers turns
the output into NaN, and the model is refused. So is one with trained weights below, and
one that notes in evaluation what it computes with later (NLLB-MoE's capacity).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lola_flwr.device.prefix.cache import ActivationCache
from lola_flwr.device.prefix.layers import block_modules, weights_below
from lola_flwr.device.prefix.samples import (
    WITHOUT_REUSE,
    Arguments,
    digest,
    padding_mask,
    rows_of,
    sample_keys,
)
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import only_trainable
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.stored_base import evaluation_mode

if TYPE_CHECKING:
    # A worker may live in Python 3.10, whose typing lacks it.
    from typing import Self

# Between a sample's states computed alone and in a batch, of the largest.
_ROUNDING = 1e-5


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
        self._below = weights_below(model, partition, block_index)
        self._head = partition.head
        self._digest: tuple[object, str] | None = None
        self._layer_in_memory = layer_in_memory or (lambda index: nullcontext())
        self._handles: list[Any] = []
        # Whether the lower part runs, and otherwise what it gave for this call.
        self._below_runs = False
        self._hidden: Tensor | None = None
        # What the layers below hand through in the upper part.
        self._handed = torch.nan
        # Whether states do not depend on padding behind them; None: not known yet.
        self._padding_is_neutral: bool | None = None
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
                self._model.register_forward_hook(
                    self._after_model, with_kwargs=True, always_call=True
                ),
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

    def _after_model(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        try:
            if _has_nan(output):
                self._handed = 0.0
                with torch.no_grad():
                    if not _has_nan(self._model.forward(*args, **kwargs)):
                        raise UserError(
                            "The model's output depends on the layers below the block "
                            f"by another way than through it. {WITHOUT_REUSE}"
                        )
        finally:
            self._handed = torch.nan
            self._hidden = None

    def _given(self) -> Tensor:
        """Return what the lower part gave for the call of the model that runs."""
        if self._hidden is None:
            raise UserError(
                "The model's layers were called apart from the model itself; call the "
                f"model. {WITHOUT_REUSE}"
            )
        return self._hidden

    def _stand_in(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            hidden = _first_hidden(args, kwargs)
            if not self._below_runs:
                self._given()
                handed = hidden.new_full((), self._handed).expand_as(hidden)
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
                    f"else; here {_shape(hidden)} became {returned}. {WITHOUT_REUSE}"
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

        def run_below(samples: Sequence[int]) -> Tensor:
            return self._run_below(
                {k: rows_of(v, samples, num_samples) for k, v in arguments.items()}
            )

        prefix = f"{self._version or self._present_version()} {self._autocast()}"
        mask = padding_mask(batch)
        keys = sample_keys(prefix, arguments, num_samples, mask)
        length = None if mask is None else mask.shape[1]
        found: dict[int, Tensor] = {}
        for sample, known in enumerate(keys):
            for key in known:
                states = self._cache.get(key)
                if states is not None and self._serves(
                    states, length, partial(run_below, [sample])
                ):
                    found[sample] = states[:length]
                    break
        missing = [sample for sample in range(num_samples) if sample not in found]
        if not self._beside_hidden and not missing:
            missing = [0]  # to see what a layer returns
        if missing:
            hidden = run_below(missing)
            _check_rows(hidden, missing, run_below)
            if length not in (None, hidden.shape[1]):
                raise UserError(
                    f"An attention mask of {length} positions does not fit hidden "
                    f"states of {hidden.shape[1]}. {WITHOUT_REUSE}"
                )
            for sample, states in zip(missing, hidden, strict=True):
                found[sample] = states
                self._cache.put(keys[sample][0], states)
            if len(missing) == num_samples:
                return hidden
        device = next(iter(batch.values())).device
        return torch.stack([found[n].to(device) for n in range(num_samples)])

    def _serves(
        self,
        states: Tensor,
        length: int | None,
        run_below: Callable[[], Tensor],
    ) -> bool:
        """Tell whether a sample's states, with other padding perhaps, will do.

        Those of a longer padding do where none of them depends on what is cut off:
        this is tried once, since convolutions and averages over positions do depend.
        """
        if length is None or len(states) == length:
            return True
        if len(states) > length and self._padding_is_neutral is None:
            (expected,) = run_below()
            difference = (states[:length].to(expected.device) - expected).abs().max()
            self._padding_is_neutral = bool(
                difference <= _ROUNDING * expected.abs().max()
            )
        return len(states) > length and bool(self._padding_is_neutral)

    def _run_below(self, arguments: Arguments) -> Tensor:
        """Run the model up to the block, in evaluation mode."""
        args = [value for key, value in arguments.items() if isinstance(key, int)]
        kwargs = {k: value for k, value in arguments.items() if isinstance(k, str)}
        modes = evaluation_mode(self._model)
        self._below_runs = True
        before = _notes(self._model)
        try:
            with only_trainable(self._model, self._head), torch.enable_grad():
                # Not the module's call, whose hook led here.
                self._model.forward(*args, **kwargs)
        except _BlockReached as reached:
            self._refuse_notes(before)
            self._refuse_trained_below(reached.hidden)
            return reached.hidden.detach()
        finally:
            self._below_runs = False
            for module, training in modes.items():
                module.training = training
        raise UserError(
            f"The model's forward pass never called block {self._block_index}. "
            f"{WITHOUT_REUSE}"
        )

    def _refuse_notes(self, before: Mapping[str, float]) -> None:
        for name, value in _notes(self._model).items():
            earlier = before.get(name, value)
            if value is not earlier and value != earlier:
                raise UserError(
                    f"{name} was {earlier} and is {value} after the layers below "
                    "the block have run: how often they run would change what the "
                    f"model computes. {WITHOUT_REUSE}"
                ) from None

    def _refuse_trained_below(self, hidden: Tensor) -> None:
        if not hidden.requires_grad or not self._head:
            return
        parameters = dict(self._model.named_parameters())
        trained = [parameters[name] for name in self._head]
        found = torch.autograd.grad(hidden.sum(), trained, allow_unused=True)
        for name, gradient in zip(self._head, found, strict=True):
            if gradient is not None:
                raise UserError(
                    f"{name} belongs to the head, but runs before the block: divide "
                    "the model with model_partition, which sees what runs when."
                ) from None

    def _present_version(self) -> str:
        """Return the digest of the weights below the block, as they are now."""
        tensors = self._below
        stamp = tuple((t.data_ptr(), t._version) for _, t in tensors)
        # Within one `with`, a change in place is seen by the tensor's version.
        if self._digest is None or self._digest[0] != stamp:
            config = dict(vars(getattr(self._model, "config", object)))
            # A model that is given labels notes here what kind they are.
            config.pop("problem_type", None)
            about = f"{type(self._model)} {config} {self._block_index}"
            self._digest = (stamp, f"{about} {digest(tensors)}")
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


def _notes(model: nn.Module) -> dict[str, float]:
    """Return the numbers that modules keep beside weights; flags are none."""
    return {
        f"{path}.{name}": value
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if type(value) in (int, float)
    }


def _first_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    hidden = args[0] if args else kwargs.get("hidden_states")
    if not isinstance(hidden, Tensor):
        raise UserError(
            f"The layers of this model do not take hidden states first. {WITHOUT_REUSE}"
        )
    return hidden


def _check_rows(
    hidden: Tensor,
    samples: Sequence[int],
    run_below: Callable[[Sequence[int]], Tensor],
) -> None:
    """Refuse hidden states that are not one row for each sample."""
    rows = len(hidden)
    if rows == len(samples) > 1 and rows == hidden.shape[1]:
        # As many samples as positions: a single sample tells which comes first.
        rows *= len(run_below(samples[:1]))
    if rows != len(samples):
        raise UserError(
            f"Hidden states of shape {_shape(hidden)} are not one row for each of "
            f"{len(samples)} samples. {WITHOUT_REUSE}"
        )


def _has_nan(output: Any) -> bool:
    """Tell whether a model's loss, or else its first output, is not a number."""
    loss = getattr(output, "loss", None)
    first = loss if isinstance(loss, Tensor) else output
    while isinstance(first, Mapping | Sequence):
        first = next(iter(first.values() if isinstance(first, Mapping) else first))
    return isinstance(first, Tensor) and bool(first.isnan().any())


def _shape(value: object) -> str:
    if isinstance(value, Tensor):
        return str(tuple(value.shape))
    return "None" if value is None else type(value).__name__
