"""A way to spend a round, what the runs of a comparison share, and what they report."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lola_flwr.allocation import Participation
from lola_flwr.model.activations import Activations
from lola_flwr.run.target import Target


@dataclass(frozen=True)
class Method:
    """A way to spend a round.

    Parameters
    ----------
    kind
        "lola": LoLa-DEFT's rounds; "fedavg-full": the same with the whole stack as the
        one block, which every device trains; "d2ft": the model is spread over the
        devices, and runs under D2FT's schedule; or one of local training
        (`simulations.compare.local_rounds.CONTENDERS`), whose devices take steps of
        their own and upload values.
    tuning, tuning_options
        What is trained, as the apps have it: "full", or a tuner of peft.
    lr
        Learning rate (default: the task's).
    participation
        Whether all devices take part, or those that a round needs, as `RoundMode` has
        it.
    selector, selector_options
        Which blocks a round trains.
    latency_target
        Time that a round may take, in terms of the median round of all blocks.
    zeroth_order
        Options of `ZerothOrder`; empty: all devices back-propagate.
    sampler, sampler_options
        How devices pick their mini-batches, as the GLUE app has it.
    low_rank
        Rank and period of a `LowRankProjection`; empty: gradients travel whole.
    rank
        How many components of LoRA adapters devices send, or "auto" (default: all).
    codec
        Codec of the gradients; of local training, of what values have changed by.
    batch_size
        Examples of a device's mini-batch (default: the comparison's).
    chooses_batches
        Whether rounds choose their batches instead.
    local_steps, ranks, overlaps, pruning
        Of local training: steps of a device in a round; ranks that FlexLoRA's devices
        have; whether devices that train a block each upload a round's values during the
        next; options of JCPBA's pruning (`simulations.compare.jcpba.PruningOptions`).
    activations
        As `BlockDevice` has it.
    compute, traffic, shared_budgets, same_micro_batches, backward_weight, solver,
    num_groups, micro_batches, refresh
        Of D2FT: budgets as shares of the full cost; whether a device's sub-networks
        share one, and compete by their scores, or each has its own; whether all are to
        run the same micro-batches; worth of a backward pass in forward passes; solver,
        head groups of a layer, micro-batches of a step, steps between scorings.
    """

    kind: str = "lola"
    tuning: str = "full"
    tuning_options: Mapping[str, Any] = field(default_factory=dict)
    lr: float | None = None
    participation: Participation = "needed"
    selector: str = "all"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    latency_target: float = math.inf
    zeroth_order: Mapping[str, Any] = field(default_factory=dict)
    sampler: str = "random"
    sampler_options: Mapping[str, Any] = field(default_factory=dict)
    low_rank: Mapping[str, int] = field(default_factory=dict)
    rank: int | Literal["auto"] | None = None
    codec: str = "fp32"
    batch_size: int | None = None
    chooses_batches: bool = False
    local_steps: int = 5
    ranks: Sequence[int] = (8, 4, 2)
    overlaps: bool = False
    pruning: Mapping[str, Any] = field(default_factory=dict)
    activations: Activations = "exact"
    compute: float = 1.0
    traffic: float = 1.0
    shared_budgets: bool = False
    same_micro_batches: bool = False
    backward_weight: float = 3.0
    solver: str = "knapsack"
    num_groups: int | None = None
    micro_batches: int = 5
    refresh: int = 25


@dataclass(frozen=True)
class RunSettings:
    """What all runs of a comparison have in common.

    Parameters
    ----------
    rounds, eval_every
        Rounds of a run, and after how many of them the model is evaluated.
    num_devices
        Devices K.
    batch_size
        Examples of a device's mini-batch. D2FT, whose devices share one model, takes as
        many examples a step as all of LoLa-DEFT's devices together.
    bandwidth_hz
        Uplink.
    seed
        Seed of fleet, channel, split, batches and head.
    decay
        Whether the learning rate falls linearly, to zero at the end of the run.
    until
        A target whose first evaluation ends a run, as `Target.parse` reads it; "": none
        does.
    """

    rounds: int = 30
    eval_every: int = 5
    num_devices: int = 6
    batch_size: int = 32
    bandwidth_hz: float = 20e6
    seed: int = 0
    decay: bool = False
    until: str = ""

    @property
    def linear_decay_steps(self) -> int | None:
        """Steps in which the learning rate falls to zero; None: it stays."""
        return self.rounds if self.decay else None

    def is_evaluated(self, server_round: int) -> bool:
        """Whether the model is evaluated after a round."""
        return server_round % self.eval_every == 0 or server_round == self.rounds

    def is_reached(self, metrics: Mapping[str, float]) -> bool:
        """Whether an evaluation ends the run."""
        return bool(self.until) and Target.parse(self.until).holds(metrics)


@dataclass(frozen=True)
class Point:
    """Where a run is after some rounds; all but the metrics are sums since its start.

    ``memory_bytes`` is the most that one device has used beyond the weights, for its
    first mini-batch of a block; under D2FT, that all together have, in the first step.
    ``joules`` is None where it is not known what devices' parts take of batteries.
    """

    server_round: int
    metrics: Mapping[str, float]
    wireless_s: float
    flops: int
    payload_bytes: int
    memory_bytes: int
    joules: float | None = None


Report = Callable[[Point], object]
