"""Settings by the names of their fields alone: tests change one or two of them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace

from lola_flwr.build import RoundSettings, ServerStep
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.server.coordinator import Coordinator
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.model import ServedModel

# What two groups call the same, and what says too little by itself.
_OTHER_NAMES = {"max_gradient_norm": "max_norm", "norm_factor": "factor"}


def with_fields(value, options):
    """Return a dataclass with those of some options that it has; take them out."""
    names = {_OTHER_NAMES.get(name, name): name for name in options}
    own = [f.name for f in fields(value) if f.name in names]
    return replace(value, **{name: options.pop(names[name]) for name in own})


def grouped(options, step=None):
    """Return arguments as `coordinator_for` takes them.

    ``codec="int8", seed=3, lr=0.1`` becomes ``settings=..., step=...``; what is no
    field of these stays as it is.
    """
    options = dict(options)
    settings = with_fields(RoundSettings(), options)
    groups = {
        f.name: with_fields(getattr(settings, f.name), options)
        for f in fields(settings)
        if is_dataclass(getattr(settings, f.name))
    }
    inner = dict(options.pop("optimizer_options", None) or {})
    step = with_fields(ServerStep() if step is None else step, options)
    step = with_fields(step, inner)
    return {
        "settings": replace(settings, **groups),
        "step": replace(step, options=inner),
        **options,
    }


def coordinator_of(partition, values, costs, *, state_dict=None, **options):
    """Put a coordinator together around values without a model."""
    arguments = grouped(options)
    step, settings = arguments.pop("step"), arguments.pop("settings")
    fingerprint = arguments.pop("base_fingerprint", "base")
    low_rank = settings.transfer.low_rank
    model = ServedModel(
        partition,
        ServerOptimizer(values, **step.arguments())
        if low_rank is None
        else LowRankOptimizer(values, low_rank, **step.arguments()),
        base_fingerprint=fingerprint,
        state_dict=state_dict,
        block_mean=step.block_mean,
    )
    return Coordinator(model, costs, settings=settings, **arguments)
