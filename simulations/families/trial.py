"""One model class, tried from its configuration to the saved model."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import Batch
from lola_flwr.model.blocks import BlockPartition, BlocksNotFound
from simulations.families.check import (
    NotDifferentiable,
    Wrong,
    check_gradients,
    check_partition,
    check_prefix_cache,
    check_saving,
    one_line,
)
from simulations.families.classes import ModelClass, build, loss_of

# "right" by itself; "told": right with a stack that the refusal names; "refused", with
# a reason; "wrong"; or not "tried", since this environment or configuration cannot.
Outcome = Literal["right", "told", "refused", "wrong", "not tried"]


@dataclass(frozen=True)
class Trial:
    """What came out for one class.

    Parameters
    ----------
    name, task
        The class.
    outcome
        What came out.
    reason
        What the library, or the class, says to it; or the stacks that it was told.
    prefix_cache
        What the library says to running the layers below a block apart, in the first
        stack where it refuses; "" if that gives the same gradient.
    """

    name: str
    task: str
    outcome: Outcome
    reason: str = ""
    prefix_cache: str = ""


def tried(kind: ModelClass) -> Trial:
    """Build, divide, differentiate, save and load a model of a class."""

    def ended(outcome: Outcome, reason: str = "", prefix_cache: str = "") -> Trial:
        return Trial(kind.name, kind.task, outcome, reason, prefix_cache)

    try:
        model, batch = build(kind)
    except UserError as error:
        return ended("refused", one_line(error))
    # What a class has against a made-up configuration and input is of all types.
    except Exception as error:
        return ended("not tried", f"{type(error).__name__}: {one_line(error)}")
    told: list[str] = []
    refusals: list[str] = []
    caches: list[str] = []
    try:
        for what, partition in _partitions(model, batch, refusals):
            check_partition(model, partition, batch)
            check_gradients(model, partition, batch, loss_of)
            caches.append(check_prefix_cache(model, partition, batch, loss_of))
            told.append(what)
        check_saving(model, batch)
    except NotDifferentiable as error:
        return ended("not tried", f"cannot be trained: {error}")
    except UserError as error:
        return ended("refused", one_line(error))
    except Wrong as error:
        return ended("wrong", one_line(error))
    # The library has to refuse in a line of its own.
    except Exception as error:
        return ended("wrong", f"{type(error).__name__}: {one_line(error)}")
    if not told:
        return ended("refused", " ".join(refusals))
    refused = next(filter(None, caches), "")
    outcome: Outcome = "told" if any(told) else "right"
    return ended(outcome, ", ".join(filter(None, told)), refused)


def _partitions(
    model: Any, batch: Batch, refusals: list[str]
) -> Iterator[tuple[str, BlockPartition]]:
    """Yield the model's division; where it is refused, those that are advised.

    With each comes what the library was told: an example, what the blocks are, both,
    or nothing.
    """
    pending: list[tuple[str, dict[str, Any]]] = [("", {})]
    for what, told in pending:
        try:
            yield what, model_partition(model, **told)
        except UserError as error:
            refusals.append(f"{f'With `{what}`: ' if what else ''}{one_line(error)}")
            if isinstance(error, BlocksNotFound) and told.keys() <= {"example"}:
                advised = [(stack, {"stack": stack}) for stack in error.stacks]
                if error.blocks:
                    advised.append((f"blocks={error.blocks}", {"blocks": error.blocks}))
                pending += [(f"{what} {a}".strip(), told | more) for a, more in advised]
            elif "pass example=" in str(error) and not told:
                example = {name: values[:1] for name, values in batch.items()}
                pending.append(("example=", {"example": example}))
