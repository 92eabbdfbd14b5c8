"""Saving and merging adapters, tried on the untrained model before a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.adapter_blocks import base_name, base_weights, is_adapted
from lola_flwr.model.ladder import is_ladder
from lola_flwr.model.saved_adapters import (
    SAVED_BASE,
    changes_base,
    is_saved_merged,
    merge,
    require_save_pretrained,
    save_model,
    tuner_name,
    unstored_copy,
)
from lola_flwr.model.saved_ladder import load_ladder
from lola_flwr.model.stored_base import (
    evaluation_mode,
    let_trained_take_half,
    store_base,
    stored_as,
)

# How far outputs that are to be equal may differ, relative to the largest: where the
# same operations give them, where last bits differ, and where other operations do.
_SAME, _NEARLY, _ROUNDED = 1e-5, 1e-4, 1e-3
# Trained values are moved by so much, off their initial ones.
_STEP = 0.05
_LAST_BITS = 2.0**-21  # of float32
# Which factors of a decomposition hold its vectors, and along which axis.
_VECTOR_AXES: dict[Callable[..., Any], dict[int, int]] = {
    torch.linalg.eigh: {1: -1},
    torch.linalg.qr: {0: -1, 1: -2},
    torch.linalg.svd: {0: -1, 2: -2},
    torch.svd: {0: -1, 2: -1},
}


def check_saving(
    model: Any, load_base: Callable[[], nn.Module], example: Mapping[str, Tensor]
) -> None:
    """Try at the start of a run what ``save_model`` will do at its end.

    What is saved is read back; once as another machine might, on which the last bits of
    the base weights are others, and the signs of singular vectors: some tuners do not
    save what they have taken out of the base, but take it out anew as they are read.

    Parameters
    ----------
    model
        The model. Its trained values are moved for the trial, and put back.
    load_base
        Gives the model anew as it was before ``adapt``. For as long as the trial takes
        there are two of them in memory.
    example
        The model's input for an example or more.

    Raises
    ------
    UserError
        What is saved would not be read back as it was trained.
    """
    if is_ladder(model):
        _check_saved_ladder(model, load_base, example)
        return
    if not is_adapted(model):
        return
    if is_saved_merged(model):
        require_save_pretrained(model)
        check_merging(model, example)
        return
    kind = tuner_name(model)
    converted = changes_base(model)
    with (
        _moved_values(model),
        # Reading back draws initial values that are then overwritten.
        torch.random.fork_rng(devices=[]),
        TemporaryDirectory() as directory,
    ):
        expected = _outputs(model, example)
        save_model(model, Path(directory))
        base = _base_for(model, load_base, directory)
        with _refused_in_one_line(kind):
            loaded = _read_back(base, directory)
            difference = _difference(_outputs(loaded, example), expected)
        lost = [] if converted else _lost(model, loaded)
        _round_otherwise(loaded)
        expected = _outputs(loaded, example)
        del base, loaded
        base = _round_otherwise(_base_for(model, load_base, directory))
        with _refused_in_one_line(kind):
            with _OtherSigns():
                elsewhere = _read_back(base, directory)
            off = _difference(_outputs(elsewhere, example), expected)
    fault = ""
    if lost:
        fault = f"without {lost[0]}"
    elif not difference <= (_ROUNDED if converted else _SAME):
        fault = f"outputs differ by {difference:.0e}"
    elif not off <= _NEARLY:
        fault = (
            f"outputs differ by {off:.0e} on a machine that decomposes the base with "
            "other signs and last bits"
        )
    if fault:
        raise UserError(
            f"What peft saves of tuning={kind!r} with these options is read back as "
            f"another model ({fault}); save it merged, or choose other options or "
            "another tuner."
        )


def check_merging(model: Any, example: Mapping[str, Tensor]) -> None:
    """Try at the start of a run what ``merge`` will do at its end, on a copy.

    Parameters
    ----------
    model
        The model. Its trained values are moved for the trial, and put back.
    example
        The model's input for an example or more.

    Raises
    ------
    UserError
        The tuner cannot be merged, or not without another outcome.
    """
    if is_ladder(model):
        merge(model)  # says why not
    if not is_adapted(model):
        return
    with _moved_values(model):
        copied = unstored_copy(model)
        expected = _outputs(copied, example)
        difference = _difference(_outputs(merge(copied), example), expected)
    if not difference <= _ROUNDED:
        raise UserError(
            f"Adapters of tuning={tuner_name(model)!r} with these options become "
            "another model when they are merged into the base (outputs differ by "
            f"{difference:.0e}); save them as adapters."
        )


def _check_saved_ladder(
    model: Any, load_base: Callable[[], nn.Module], example: Mapping[str, Tensor]
) -> None:
    """Save a side network and put it beside the model anew."""
    with _moved_values(model), TemporaryDirectory() as directory:
        expected = _outputs(model, example)
        save_model(model, Path(directory))
        loaded = load_ladder(load_base(), Path(directory), base=stored_as(model))
        difference = _difference(_outputs(loaded, example), expected)
    if not difference <= _SAME:
        raise UserError(
            "What is saved of tuning='ladder' is read back as another model (outputs "
            f"differ by {difference:.0e}); leave save-model at false."
        )


class _OtherSigns(TorchFunctionMode):
    """Let decompositions return vectors of other signs, as other libraries do."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of PyTorch."""
        result = func(*args, **(kwargs or {}))
        axes = _VECTOR_AXES.get(func)
        if axes is None:
            return result
        factors = list(result)
        count = min(factors[index].shape[axis] for index, axis in axes.items())
        # Every other vector, so that products of two change, too.
        signs = 2.0 * (torch.arange(count) % 2) - 1
        for index, axis in axes.items():
            factors[index] = factors[index].clone()
            vectors = factors[index].narrow(axis, 0, count)
            vectors *= signs.to(vectors).reshape(-1, *(1,) * (-1 - axis))
        return type(result)(factors)


@contextmanager
def _moved_values(model: nn.Module) -> Iterator[None]:
    """Move the trained values to where a lost one shows; put them back at the end."""
    trained = [p for p in model.parameters() if p.requires_grad]
    kept = [parameter.detach().clone() for parameter in trained]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_((_STEP * noise).to(parameter))
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in zip(trained, kept, strict=True):
                parameter.copy_(values)


def _round_otherwise(model: nn.Module) -> nn.Module:
    """Change the last bits of the base weights, the same with and without adapters."""
    parameters = dict(model.named_parameters())
    in_base = base_weights(parameters) if is_adapted(model) else list(parameters)
    generator = torch.Generator()
    with torch.no_grad():
        for name in in_base:
            values = parameters[name]
            # Coarser types are decomposed in this one.
            if values.dtype is torch.float32:
                generator.manual_seed(0)
                up = torch.rand(values.shape, generator=generator) < 0.5
                values.mul_(1 + _LAST_BITS * (2 * up.to(values) - 1))
    return model


def _base_for(
    model: Any, load_base: Callable[[], nn.Module], directory: str
) -> nn.Module:
    """Return the base that saved adapters are for, stored as the model's is."""
    base = load_base()
    beside = Path(directory) / SAVED_BASE
    if beside.is_dir():
        kind: Any = type(base)
        base = kind.from_pretrained(beside).eval()
    names = base_weights(name for name, _ in model.named_parameters())
    base.requires_grad_(False)
    store_base(base, stored_as(model), map(base_name, names))
    return base


def _read_back(base: nn.Module, directory: str) -> Any:
    from peft import PeftModel

    # Trainable, as what was saved is: by that a head in full precision is found.
    loaded = PeftModel.from_pretrained(base, directory, is_trainable=True).eval()
    if stored_as(base) != "fp32":
        let_trained_take_half(loaded)
    return loaded


@contextmanager
def _refused_in_one_line(kind: str) -> Iterator[None]:
    """Refuse what is saved where it cannot be loaded, or does not run as it is."""
    try:
        yield
    # What peft and torch raise where values do not fit is of all types.
    except Exception as error:
        raise UserError(
            f"What peft saves of tuning={kind!r} with these options cannot be read "
            f"back ({reason_of(error)}); save it merged, or choose other options."
        ) from error


def _lost(model: nn.Module, loaded: nn.Module) -> list[str]:
    """Name the trained parameters that were not read back as they were."""
    read = dict(loaded.named_parameters())
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        and (name not in read or not torch.equal(read[name], parameter))
    ]


def _outputs(model: nn.Module, example: Mapping[str, Tensor]) -> Tensor:
    modes = evaluation_mode(model)
    try:
        with torch.no_grad():
            output = model(**example)
    finally:
        for module, training in modes.items():
            module.training = training
    values = getattr(output, "logits", output)
    return values if isinstance(values, Tensor) else values[0]


def _difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    return float((values - expected).abs().max() / expected.abs().max())
