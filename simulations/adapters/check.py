"""What is checked of one case before another process reads it back."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lola_flwr.costs.of_model import model_costs
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.saved_adapters import is_saved_merged, merge, save_model
from simulations.adapters.cases import Case, base_model, example

GRADIENT_TOLERANCE = 1e-5  # relative to a gradient's largest value
LOGIT_TOLERANCE = 1e-6  # absolute
# Relative to the largest: merged weights are rounded anew.
MERGED_TOLERANCE = 1e-4
_MOVE = 0.05


@dataclass(frozen=True)
class Outcome:
    """What came of a case.

    Parameters
    ----------
    verdict
        ``"right"``, ``"refused"`` or ``"wrong"``.
    line
        Why, if it is not right.
    saved, merged
        Whether it can be saved as adapters, and merged into the base.
    lines
        Those with which saving or merging was refused.
    """

    verdict: str
    line: str = ""
    saved: bool = False
    merged: bool = False
    lines: tuple[str, ...] = ()


class Wrong(Exception):
    """A check failed."""


def try_case(case: Case, directory: Path) -> Outcome:
    """Adapt, divide, compare gradients, save and merge; leave files to read back.

    Parameters
    ----------
    case
        The case.
    directory
        Where the saved model and its logits go.
    """
    try:
        return _tried(case, directory)
    except UserError as error:
        line = str(error)
        return Outcome("wrong" if "\n" in line else "refused", line)
    except Wrong as error:
        return Outcome("wrong", str(error))
    # Whatever ends without a line for the user is a fault.
    except Exception as error:
        return Outcome("wrong", f"{type(error).__name__}: {error}")


def _tried(case: Case, directory: Path) -> Outcome:
    model = adapt(base_model(case.family), case.tuning, case.options)
    partition = model_partition(model)
    digest = fingerprint(model, (*partition.trainable, *partition.frozen))
    inputs = example(case.family)
    check_costs(model, partition)
    refusals = {
        "adapter": _refusal(
            lambda: check_saving(model, lambda: base_model(case.family), inputs)
        ),
        "merged": _refusal(lambda: check_merging(model, inputs)),
    }
    if all(refusals.values()):
        raise UserError(refusals["adapter"])
    if fingerprint(model, (*partition.trainable, *partition.frozen)) != digest:
        raise Wrong("the trial of saving left the model changed")
    move(model, partition)
    check_gradients(model, partition, inputs)
    logits = {}
    trained = model(**inputs).logits.detach()
    if not refusals["adapter"] and not is_saved_merged(model):
        logits["adapter"] = trained
        save_model(model, directory / "adapter")
    if not refusals["merged"]:
        plain = merge(model)
        logits["merged"] = plain.eval()(**inputs).logits.detach()
        plain.save_pretrained(directory / "merged")
        difference = relative_difference(logits["merged"], trained)
        if not difference <= MERGED_TOLERANCE:
            raise Wrong(f"merged, the logits differ by {difference:.0e}")
    save_file(logits, directory / "logits.safetensors")
    told = {**asdict(case), "fingerprint": digest}
    (directory / "case.json").write_text(json.dumps(told), encoding="utf-8")
    return Outcome(
        "right",
        saved="adapter" in logits,
        merged="merged" in logits,
        lines=tuple(filter(None, refusals.values())),
    )


def _refusal(trial: Callable[[], None]) -> str:
    try:
        trial()
    except UserError as error:
        return str(error)
    return ""


def check_costs(model: Any, partition: BlockPartition) -> None:
    """Check that costs can be told, and are larger the deeper a block stands."""
    costs = model_costs(model, partition, batch_size=4, sequence_length=10)
    if not (costs.flops[:-1] > costs.flops[1:]).all():
        raise Wrong(f"operations of the blocks are {costs.flops.tolist()}")


def check_gradients(
    model: Any, partition: BlockPartition, inputs: dict[str, Tensor]
) -> None:
    """Compare every block's gradient with that part of full back-propagation."""
    parameters = [model.get_parameter(name) for name in partition.trainable]
    loss = model(**inputs).loss
    full = torch.autograd.grad(loss, parameters, allow_unused=True)
    expected = dict(zip(partition.trainable, full, strict=True))
    unused = [name for name, gradient in expected.items() if gradient is None]
    if unused:
        raise Wrong(f"{unused[0]} has no gradient")
    for index in range(partition.num_blocks):
        result = block_gradient(model, partition, index, inputs)
        for name, gradient in result.gradients.items():
            difference = relative_difference(gradient, expected[name])
            if not difference <= GRADIENT_TOLERANCE:
                raise Wrong(f"the gradient of {name} differs by {difference:.0e}")


def move(model: Any, partition: BlockPartition) -> None:
    """Move the trained values to where every one of them matters."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name in partition.trainable:
            values = model.get_parameter(name)
            values.add_(_MOVE * torch.randn(values.shape, generator=generator))


def relative_difference(values: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest value."""
    largest = float(expected.abs().max())
    difference = float((values - expected).abs().max())
    return difference / largest if largest else difference
