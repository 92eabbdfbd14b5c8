"""Ladder side tuning: a small network beside a frozen model reads what its layers give.

Sung, Cho, Bansal, "LST: Ladder Side-Tuning for Parameter and Memory Efficient Transfer
Learning", arXiv:2206.06522. Side layer i runs as soon as layer i of the model has: on

    mu_i down_i(h_i) + (1 - mu_i) side_{i-1},    mu_i = sigmoid(gate_i / T)

where h_i is what the layer gives, detached, and side_{-1} is down_0 of what the first
layer reads. What the last side layer gives is projected up and added to what the last
layer gives; norm and head of the model follow as ever. Back-propagation passes head and
side layers alone, so that whatever block a device has, the model itself runs forward
only, keeps nothing, and has no dropout.

A block is a side layer with its gate and its projection down. The projection up runs
behind all of them, and belongs to the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lola_flwr.errors import UserError
from lola_flwr.model.bases import LADDER
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.running import divide, trace_of
from lola_flwr.model.stored_base import is_quantised
from lola_flwr.model.trace import Example

_PREFIX = f"{LADDER}."

# T in the gates, as LST has it.
_TEMPERATURE = 0.1

# What layers of transformers are given by this name has an entry per feature of a head.
_PER_FEATURE = "position_embeddings"


@dataclass(frozen=True)
class Reduction:
    """Which features a side network has of those of a model: every ``factor``-th.

    Parameters
    ----------
    factor
        Of so many features one is kept.
    offset
        The first of them.
    """

    factor: int
    offset: int

    @property
    def kept(self) -> slice:
        """The features of an axis that are kept."""
        return slice(self.offset, None, self.factor)


class SideLayer(nn.Module):
    """A layer of the side network.

    Parameters
    ----------
    down
        Projects hidden states to the width of the side network.
    layer
        A layer as the model's, of that width.
    reduction
        Which of the model's features it has.
    """

    def __init__(self, down: nn.Linear, layer: nn.Module, reduction: Reduction) -> None:
        super().__init__()
        self.down = down
        self.gate = nn.Parameter(torch.zeros(1, device=down.weight.device))
        self.layer = layer
        self.reduction = reduction

    def forward(self, before: Tensor, hidden: Tensor, *args: Any, **kw: Any) -> Tensor:
        """Mix what two layers give, and run on that.

        Parameters
        ----------
        before
            What the side layer before gives, [batch, tokens, features kept].
        hidden
            What the model's layer gives, [batch, tokens, features].
        args, kw
            What else the model's layer was called with.
        """
        # Keys and values of tokens before are the model's own.
        args, kw = tree_map(self._fitted, (args, kw), is_leaf=_is_cache)
        if "use_cache" in kw:
            kw["use_cache"] = False
        if kw.get(_PER_FEATURE) is not None:
            kept = self.reduction.kept
            kw[_PER_FEATURE] = tuple(part[..., kept] for part in kw[_PER_FEATURE])
        share = torch.sigmoid(self.gate / _TEMPERATURE)
        mixed = share * self.down(hidden) + (1 - share) * before
        output = self.layer(mixed, *args, **kw)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def _fitted(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(self.down.weight.dtype)  # masks, on a base of half types
        return None if _is_cache(value) else value


class _Pass:
    """How far a forward pass has come.

    Attributes
    ----------
    index
        The side layer that comes next.
    before
        What the one before gave.
    """

    def __init__(self) -> None:
        self.index = 0
        self.before: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pass:
        return _Pass()


class Ladder(nn.Module):
    """A side network.

    Parameters
    ----------
    layers
        Its layers.
    up
        Projects what the last gives to the model's width.
    stack
        The stack of layers that it stands beside, where that was named.
    head
        Names of the model's own parameters that are trained beside it.
    """

    def __init__(
        self,
        layers: Sequence[SideLayer],
        up: nn.Linear,
        stack: str | None,
        head: Sequence[str],
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.up = up
        self.stack = stack
        self.head = tuple(head)
        self._pass = _Pass()

    @property
    def reduction(self) -> Reduction:
        """Which of the model's features it has."""
        first = self.layers[0]
        assert isinstance(first, SideLayer)
        return first.reduction

    def begin(self) -> None:
        """Forget a pass that has ended before its time."""
        self._pass = _Pass()

    def step(
        self, index: int, entered: Tensor, hidden: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | None:
        """Run the side layer beside a layer; return what is to be added to its output.

        Parameters
        ----------
        index
            The layer.
        entered, hidden
            What it read and gave.
        args, kwargs
            What else it was called with.
        """
        done = self._pass
        if index != done.index:
            raise UserError(
                f"Layer {index} ran where layer {done.index} was to: a ladder stands "
                "beside layers that run once each, one after the other."
            )
        side: Any = self.layers[index]
        place = side.down.weight
        if not index:
            done.before = side.down(entered.detach().to(place))
        before = side(done.before, hidden.detach().to(place), *args, **kwargs)
        if index + 1 < len(self.layers):
            self._pass.index, self._pass.before = index + 1, before
            return None
        self.begin()
        added: Tensor = self.up(before)
        return added


def is_ladder(model: nn.Module) -> bool:
    """Tell whether a model has a side network."""
    return isinstance(getattr(model, LADDER, None), Ladder)


def ladder_of(model: nn.Module) -> Ladder:
    """Return a model's side network."""
    found = getattr(model, LADDER)
    assert isinstance(found, Ladder)
    return found


def stand_beside(model: nn.Module, ladder: Ladder, layers: Sequence[nn.Module]) -> None:
    """Let a model run with a side network from now on; nothing else of it is trained.

    Parameters
    ----------
    model
        The model; changed in place.
    ladder
        The side network.
    layers
        The layers that it stands beside.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ladder.head)
    trained = {id(model.get_parameter(name)) for name in ladder.head}
    # A dropout before the classifier is the head's; one in the base runs before blocks.
    frozen = [
        child
        for child in model.children()
        if (own := {id(p) for p in child.parameters()}) and own.isdisjoint(trained)
    ]
    model.add_module(LADDER, ladder)
    model.register_forward_pre_hook(_Beginning(ladder, frozen), with_kwargs=True)
    for index, layer in enumerate(layers):
        layer.register_forward_hook(_Rung(ladder, index), with_kwargs=True)


@dataclass(frozen=True, eq=False)
class _Beginning:
    """Is called before a model runs: its frozen modules run as in evaluation."""

    ladder: Ladder
    frozen: Sequence[nn.Module]

    def __call__(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.ladder.begin()
        for value in (*args, *kwargs.values()):
            if _is_cache(value) and value.get_seq_length():
                raise UserError(
                    "A model with a ladder keeps no keys and values of its side "
                    "network for later tokens; generate with use_cache=False."
                )
        for child in self.frozen:
            if child.training or any(part.training for part in child.modules()):
                child.eval()
                for part in child.modules():
                    # Of 8 bits: in evaluation they round what goes into them, too.
                    part.training = is_quantised(part)


@dataclass(frozen=True, eq=False)
class _Rung:
    """Is called behind a layer: the side layer beside it runs."""

    ladder: Ladder
    index: int

    def __call__(
        self,
        layer: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> Any:
        named = {**kwargs}
        entered, *others = args or (named.pop("hidden_states"),)
        hidden = output[0] if isinstance(output, tuple) else output
        added = self.ladder.step(self.index, entered, hidden, *others, **named)
        if added is None:
            return output
        result = hidden + added.to(hidden)
        return (result, *output[1:]) if isinstance(output, tuple) else result


def _is_cache(value: Any) -> bool:
    from transformers import Cache

    return isinstance(value, Cache)


def ladder_partition(
    model: nn.Module,
    *,
    stack: str | None = None,
    blocks: str | Sequence[str] | None = None,
    example: Example | None = None,
) -> BlockPartition:
    """Divide a model with a side network: each of its layers is a block.

    Parameters
    ----------
    model
        The model.
    stack, blocks
        Not to be given, but as the side network was told.
    example
        The model's input for an example (default: made up).

    Returns
    -------
    BlockPartition
        The head is the projection up, and what is trained of the model's own head. All
        else is frozen.

    Raises
    ------
    UserError
        A stack or blocks are named that the side network does not stand beside; what
        is trained of the model runs before or in its layers; or the model does not run.
    """
    ladder = ladder_of(model)
    if blocks is not None or stack not in (None, ladder.stack):
        named = f"blocks={blocks!r}" if blocks is not None else f"stack={stack!r}"
        raise UserError(
            f"{named}: under tuning={LADDER!r} blocks are the side network's layers; "
            "name the stack that it stands beside in its options, as 'stack=...'."
        )
    names = [name for name, _ in model.named_parameters()]
    base = [name for name in names if not name.startswith(_PREFIX)]
    behind = divide(base, trace_of(model, example), stack=ladder.stack).head
    misplaced = [name for name in ladder.head if name not in behind]
    if misplaced:
        raise UserError(
            f"{misplaced[0]} would be trained, but does not run behind the layers that "
            f"tuning={LADDER!r} stands beside; use another tuning, as 'lora'."
        )
    return BlockPartition(
        blocks=tuple(
            tuple(name for name in names if name.startswith(f"{_PREFIX}layers.{n}."))
            for n in range(len(ladder.layers))
        ),
        head=(
            *(name for name in names if name.startswith(f"{_PREFIX}up.")),
            *ladder.head,
        ),
        frozen=tuple(name for name in base if name not in ladder.head),
        frozen_head=tuple(name for name in behind if name not in ladder.head),
    )
