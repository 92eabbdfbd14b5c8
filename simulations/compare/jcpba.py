"""JCPBA: all devices train a pruned model, each at a rate of its own, and share a band.

Source: Pang et al., "Low-latency Federated LLM Fine-tuning Over Wireless Networks",
arXiv:2602.01024: pruning rates of each client and its bandwidth are chosen together,
for the least latency of fine-tuning, by block coordinate descent. Read were its
abstract and the first lines of its introduction. Not known to us, and chosen as plainly
as we could: what a rate prunes (the least rows of every matrix of the layers, by their
norm; of LoRA the rows of ``B`` with them); what limits the rates (their mean, weighted
by examples, and the highest one; `simulations.compare.pruning_rates` says why); what is
minimised (a round's time: computing, and uploading what is not pruned); and the mean
(of each row over the devices that trained it). A device finds the rows by the values
that the server sent, so that none are named in a message. Downloads are free to all
methods here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lola_flwr.arrays import Float32Arrays, Float64Array
from lola_flwr.d2ft.pruning import num_pruned
from lola_flwr.errors import UserError, with_options
from simulations.compare.contender import Contender, Fleet, Part, Update, in_fp32
from simulations.compare.pruned_model import prunable, pruned
from simulations.compare.pruning_rates import (
    PruningPlan,
    PruningProblem,
    by_descent,
    jointly,
)

_SOLVERS: dict[str, Callable[[PruningProblem], PruningPlan]] = {
    "descent": by_descent,
    "joint": jointly,
}
_TUNINGS = ("full", "lora")


@dataclass(frozen=True)
class PruningOptions:
    """How much is pruned.

    Parameters
    ----------
    mean_rate, max_rate
        The highest mean of the devices' rates, and the highest rate of one.
    solver
        "descent": block coordinate descent; "joint": the least time of all.
    """

    mean_rate: float = 0.3
    max_rate: float = 0.6
    solver: str = "descent"

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PruningOptions:
        """Read the options of a method.

        Raises
        ------
        UserError
            One is unknown, or out of its range.
        """
        read = with_options(cls, options, "pruning")
        if read.solver not in _SOLVERS:
            raise UserError(
                f"solver={read.solver!r} of pruning must be one of "
                f"{', '.join(_SOLVERS)}."
            )
        if not 0 <= read.mean_rate <= read.max_rate < 1 or not read.max_rate:
            raise UserError(
                f"mean_rate={read.mean_rate} of pruning must be at least 0, max_rate="
                f"{read.max_rate} no less and above 0, and both below 1."
            )
        return read


def jcpba(fleet: Fleet) -> Contender:
    """Return rounds in which all devices train, each a model pruned for it.

    Raises
    ------
    UserError
        An option is wrong, or the model or its adapters cannot be pruned.
    """
    in_fp32(fleet.method)
    if fleet.method.tuning not in _TUNINGS:
        raise UserError(
            f'kind="jcpba" prunes under tuning = {" or ".join(_TUNINGS)}; got '
            f"{fleet.method.tuning!r}."
        )
    options = PruningOptions.of(fleet.method.pruning)
    sizes = PrunedSizes.of(fleet, options.max_rate)

    def parts(server_round: int, rates_bps: Float64Array) -> dict[int, Part]:
        plan = _SOLVERS[options.solver](problem(fleet, sizes, options, rates_bps))
        return {k: sizes.part(rate) for k, rate in enumerate(plan.rates.tolist())}

    return Contender(parts=parts, merged=mean_of_rows)


@dataclass(frozen=True, eq=False)
class PrunedSizes:
    """What a device trains at each rate, and what that takes.

    Parameters
    ----------
    whole, least
        The part without pruning, and at the highest rate; counted on the model.
    elements
        Rows of each map, and what a row of it holds, trained or not.
    trained
        The same of what is trained of them.
    """

    whole: Part
    least: Part
    elements: tuple[tuple[int, int], ...]
    trained: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, fleet: Fleet, max_rate: float) -> PrunedSizes:
        """Count what pruning takes off a fleet's model."""
        maps = prunable(fleet.model, fleet.partition)
        modules, whole = dict(fleet.model.named_modules()), fleet.part_from(0)
        parameters = {
            f"{name}.{key}": value
            for name in maps
            for key, value in modules[name].named_parameters(recurse=False)
        }
        sizes = {n: (len(p), p[0].numel()) for n, p in parameters.items()}
        trained = tuple(size for n, size in sizes.items() if n in whole.names)
        with pruned(fleet.model, maps, max_rate):
            step_flops = float(fleet.counted().flops[0])
        least = replace(
            whole,
            step_flops=step_flops,
            sent_bytes=whole.sent_bytes - 4 * _left_out(trained, max_rate),
            pruning_rate=max_rate,
        )
        return cls(whole, least, (*sizes.values(),), trained)

    def part(self, rate: float) -> Part:
        """Return the part at a rate.

        Bytes are those of the rows; operations lie on the line between what is counted,
        by the elements that are left out.
        """
        if not rate:
            return self.whole
        most = _left_out(self.elements, self.least.pruning_rate)
        done = _left_out(self.elements, rate) / most if most else 0.0
        saved = self.whole.step_flops - self.least.step_flops
        return replace(
            self.whole,
            step_flops=self.whole.step_flops - done * saved,
            sent_bytes=self.whole.sent_bytes - 4 * _left_out(self.trained, rate),
            pruning_rate=rate,
        )


def _left_out(sizes: tuple[tuple[int, int], ...], rate: float) -> int:
    return sum(num_pruned(rows, rate) * width for rows, width in sizes)


def problem(
    fleet: Fleet, sizes: PrunedSizes, options: PruningOptions, rates_bps: Float64Array
) -> PruningProblem:
    """Return what is to be solved for a round with these full-band rates, shape [K]."""
    whole, least = sizes.whole, sizes.least
    speeds = np.array([profile.flops_per_s for profile in fleet.profiles])
    seconds_a_flop = fleet.method.local_steps / speeds
    per_rate = 1 / options.max_rate
    return PruningProblem(
        compute_s=whole.step_flops * seconds_a_flop,
        upload_s=whole.payload_bits / rates_bps,
        compute_saved_s=(whole.step_flops - least.step_flops)
        * per_rate
        * seconds_a_flop,
        upload_saved_s=(whole.payload_bits - least.payload_bits) * per_rate / rates_bps,
        weights=np.array(fleet.num_examples, np.float64),
        mean_rate=options.mean_rate,
        max_rate=options.max_rate,
    )


def mean_of_rows(values: Float32Arrays, updates: Mapping[int, Update]) -> Float32Arrays:
    """Return each row's mean over the devices that trained it, by their examples.

    A row that nobody trained stays.
    """
    merged = dict(values)
    for name, value in values.items():
        total, sums = np.zeros(len(value)), np.zeros(value.shape)
        for update in updates.values():
            rows = update.rows.get(name, np.arange(len(value)))
            total[rows] += update.num_examples
            sums[rows] += update.num_examples * update.values[name].astype(np.float64)
        trained = total > 0
        mean = value.copy()
        broad = total[trained].reshape(-1, *[1] * (value.ndim - 1))
        mean[trained] = (sums[trained] / broad).astype(value.dtype)
        merged[name] = mean
    return merged
