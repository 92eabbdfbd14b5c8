"""What is run, and what came of it, whatever the method."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from lola_flwr.errors import UserError
from lola_flwr.randomness import rng_for
from simulations.attacks.embedded import MINILM
from simulations.attacks.small import SMALL, SPREAD_SMALL
from simulations.attacks.task import TaskModel

# The models that can be attacked, by method.
MODELS = {
    "lola": {"small": SMALL, "minilm": MINILM},
    "d2ft": {"small": SPREAD_SMALL},
}
# The model is evaluated so often, every so many rounds, the last time after the last.
_EVALUATIONS, _EVERY = 5, 5
# Fields that scenarios did not have at first.
_LATER = ("model", "method")


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """What is run.

    Parameters
    ----------
    share
        Part of the devices that is hostile.
    alpha
        Of the Dirichlet shares of the classes; None: all devices have the same.
    codec
        What gradients travel in.
    seed
        Seed of the run, of its task, and of who is hostile.
    num_devices, rounds, batch_size, lr
        As in any run; the rate falls to nothing, lest accuracy go up and down.
    own_examples
        Examples that the server has to judge devices by; as many as the apps have.
    model, method
        As in `MODELS`.
    """

    share: float = 0.0
    alpha: float | None = None
    codec: str = "fp32"
    seed: int = 0
    num_devices: int = 12
    rounds: int = SMALL.recipe.rounds
    batch_size: int = SMALL.recipe.batch_size
    lr: float = SMALL.recipe.lr
    own_examples: int = 64
    model: str = "small"
    method: str = "lola"

    @property
    def hostile(self) -> frozenset[int]:
        """Numbers of the hostile devices."""
        drawn = rng_for(self.seed, "hostile").permutation(self.num_devices)
        return frozenset(drawn[: round(self.share * self.num_devices)].tolist())

    @property
    def task_model(self) -> TaskModel:
        """The model and its task."""
        return model_of(self.method, self.model)

    def is_evaluated(self, server_round: int) -> bool:
        """Tell whether the model is evaluated after a round."""
        left = self.rounds - server_round
        return left % _EVERY == 0 and left < _EVERY * _EVALUATIONS

    def key(self, attack: str) -> str:
        """Return what a run of an attack is known by among those that are finished.

        Fields that came later are left out where a run is as it was without them.
        """
        fields = asdict(self)
        for name in _LATER:
            if fields[name] == getattr(Scenario, name):
                del fields[name]
        return json.dumps([attack, fields])


def model_of(method: str, model: str) -> TaskModel:
    """Return a model and its task, or raise `UserError` if a method has it not."""
    known = MODELS[method]
    if model not in known:
        raise UserError(
            f"--model {model}: not with --method {method}; choose from: "
            f"{', '.join(known)}."
        )
    return known[model]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of a run.

    Parameters
    ----------
    accuracy
        On data that no device has: the mean over evaluations in the last rounds, since
        steps are large and accuracy goes up and down.
    backdoor
        Part of the examples of the other class that the trigger turns, likewise.
    honest_refused
        Updates of honest devices that were not used, as a part of all of theirs; with
        D2FT their parts of steps, which are lost where a step is skipped.
    honest_distrusted
        Honest devices that were trusted less than half, or rested, in the end.
    found
        Hostile devices that were refused and rested in the end, or were trusted less
        than half, as a part of them.
    found_after
        Rounds until the median one of those was for the first time; None of none.
    """

    accuracy: float
    backdoor: float
    honest_refused: float
    honest_distrusted: int
    found: float
    found_after: int | None

    @classmethod
    def of(
        cls,
        *,
        accuracies: Sequence[float],
        backdoors: Sequence[float],
        honest_refused: float,
        distrusted: Sequence[set[str]],
        hostile: set[str],
    ) -> Outcome:
        """Sum a run up.

        Parameters
        ----------
        accuracies, backdoors
            Of the evaluations; NaN: a backdoor had nothing to turn.
        honest_refused
            As it is in an outcome.
        distrusted
            After each round, the names of who was refused or not trusted.
        hostile
            Names of the hostile devices.
        """
        found = hostile & distrusted[-1]
        first = [
            next(n for n, names in enumerate(distrusted, 1) if device in names)
            for device in found
        ]
        known = [value for value in backdoors if not math.isnan(value)]
        return cls(
            accuracy=float(np.mean(accuracies)),
            backdoor=float(np.mean(known)) if known else math.nan,
            honest_refused=honest_refused,
            honest_distrusted=len(distrusted[-1] - hostile),
            found=len(found) / len(hostile) if hostile else 0.0,
            found_after=int(np.median(first)) if first else None,
        )
