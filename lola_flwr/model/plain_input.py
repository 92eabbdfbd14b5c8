"""What a model reads that is none of transformers: found by trying, if it can be.

The first module with weights says what its input is made of: a linear layer how wide it
is, a convolution how many channels it has. How large images are shows only where the
model takes no others, as one that flattens them into a linear layer: sizes are tried,
on tensors without values.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves

# Tells whether a model takes examples of such a shape and type.
Takes = Callable[[Sequence[int], torch.dtype], bool]

# What a module reads: sizes in front, how many dimensions of one unknown size (0 to 2),
# sizes behind, and the type, where it is not that of the weights.
Wanted = tuple[tuple[int, ...], int, tuple[int, ...], torch.dtype | None]

# Of the sizes that differ by what pooling rounds off, the one that images have.
_SIDES = (8, 16, 28, 32, 48, 64, 84, 96, 128, 224, 256, 299, 384, 512)
_LARGEST_SIDE = 256
_LARGEST_LENGTH = 1024
# What is shown where any size would do.
_USUAL_SIDE = 224
_USUAL_LENGTH = 1000
_USUAL_TOKENS = (128, 64, 32, 16, 8, 4, 2, 1)

# A prime, of which no other size of a model is a multiple: examples stay apart.
_NUM_EXAMPLES = 4099


@dataclass(frozen=True, eq=False)
class PlainInput:
    """What a plain module reads.

    Parameters
    ----------
    example
        Its input for one example; None where none was found that it takes.
    known
        Whether the model takes no other size, or none that costs anything else.
    """

    example: Tensor | None
    known: bool


def is_plain(model: nn.Module) -> bool:
    """Tell whether a model neither is one of transformers, nor has one in it."""
    return not any(
        hasattr(module, "main_input_name") or hasattr(module, "peft_config")
        for module in model.modules()
    )


def required_arguments(model: nn.Module) -> list[str]:
    """Return the arguments that a model does not run without."""
    return [
        name
        for name, argument in inspect.signature(model.forward).parameters.items()
        if argument.default is inspect.Parameter.empty
        and argument.kind
        not in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    ]


def plain_input(model: nn.Module, sequence_length: int = 1) -> PlainInput:
    """Find what a model reads that takes one tensor.

    Parameters
    ----------
    model
        The model; it stays as it is.
    sequence_length
        Tokens of an example; 1 where examples are no sequences.
    """
    tried: set[Wanted] = set()
    types = [p.dtype for p in model.parameters() if p.is_floating_point()]
    own = types[0] if types else torch.float32
    if len(required_arguments(model)) == 1:
        with _trial(model) as takes:
            for module in model.modules():
                wanted = _wanted(module, sequence_length)
                if wanted is None or wanted in tried:
                    continue
                tried.add(wanted)
                found = _found(takes, wanted, own)
                if found is not None:
                    return found
    return PlainInput(None, known=False)


def _wanted(module: nn.Module, sequence_length: int) -> Wanted | None:
    """Return what a module wants to read, if it is one that models begin with."""
    tokens = (sequence_length,) if sequence_length > 1 else ()
    if isinstance(module, nn.Linear):
        return tokens, 0, (module.in_features,), None
    if isinstance(module, nn.BatchNorm1d):
        return (), 0, (module.num_features,), None
    if isinstance(module, nn.LayerNorm):
        return tokens, 0, tuple(module.normalized_shape), None
    if isinstance(module, nn.RNNBase):
        return tokens, 0 if tokens else 1, (module.input_size,), None
    if isinstance(module, nn.Embedding):
        return tokens, 0 if tokens else 1, (), torch.long
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        dimensions = 1 if isinstance(module, nn.Conv1d) else 2
        return (module.in_channels,), dimensions, (), None
    if isinstance(module, nn.BatchNorm2d):
        return (module.num_features,), 2, (), None
    return None


def _found(takes: Takes, wanted: Wanted, own: torch.dtype) -> PlainInput | None:
    """Return the input of the only size that the model takes, or one of several."""
    before, dimensions, behind, dtype = wanted
    dtype = own if dtype is None else dtype

    def shape(size: int) -> tuple[int, ...]:
        return (*before, *(size,) * dimensions, *behind)

    def fits(sizes: Iterable[int]) -> list[int]:
        """Return the sizes that the model takes, two at most."""
        return list(islice((s for s in sizes if takes(shape(s), dtype)), 2))

    if not dimensions:
        sizes, known = fits([0]), True
    elif not before:
        sizes, known = fits(_USUAL_TOKENS), False
    elif dimensions == 2:
        sizes = fits(_SIDES)
        # What pooling rounds off is little; more, and it takes more than one size.
        known = len(sizes) == 1 and not fits([5 * sizes[0] // 4, 2 * sizes[0]])
        if not known:
            sizes = fits([_USUAL_SIDE]) or sizes or fits(range(1, _LARGEST_SIDE + 1))
            known = len(sizes) == 1 and sizes[0] not in _SIDES
    else:
        sizes = fits(range(1, _LARGEST_LENGTH + 1))
        known = len(sizes) == 1
        sizes = sizes if known else fits([_USUAL_LENGTH]) or sizes
    if not sizes:
        return None
    return PlainInput(
        torch.zeros(1, *shape(sizes[0]), dtype=dtype, device="cpu"), known=known
    )


@contextmanager
def _trial(model: nn.Module) -> Iterator[Takes]:
    """Give a way to try inputs on a model, in evaluation mode and without values."""
    training = [module for module in model.modules() if module.training]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    bare = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in tensors.items()
    }

    def takes(shape: Sequence[int], dtype: torch.dtype) -> bool:
        values = torch.empty(_NUM_EXAMPLES, *shape, dtype=dtype)
        try:
            # Untied, a module of two names would not get its own tensors back
            # (PyTorch's issue 164759).
            output = functional_call(model, bare, (values,), tie_weights=False)
        # A model may raise anything on an input that it is not made for.
        except Exception:
            return False
        outputs = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        # What is flattened with -1 takes anything, and takes examples apart.
        return all(_NUM_EXAMPLES in leaf.shape[:2] for leaf in outputs if leaf.dim())

    model.eval()
    try:
        with torch.device("meta"), torch.no_grad():
            yield takes
    finally:
        for module in training:
            module.training = True
