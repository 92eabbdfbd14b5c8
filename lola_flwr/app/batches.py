"""Which batches and which codec a run has that is told neither: a function of its keys.

They are decided together: rounds that choose batches choose the codec, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lola_flwr.allocation import ENERGY_ALLOCATORS
from lola_flwr.wire.codec import AUTO

# Where rounds do not choose: examples of a mini-batch, and how gradients travel.
GIVEN_BATCH = 32
GIVEN_CODEC = "fp32"


def against_choosing(run_config: Mapping[str, object]) -> Iterator[str]:
    """Say with which keys rounds cannot choose batches, and why.

    Parameters
    ----------
    run_config
        Run configuration, which nobody need have checked.
    """
    if run_config.get("method") == "d2ft":
        yield 'method="d2ft", whose micro-batches are all of one size'
    if run_config.get("uplink") == "tdma":
        yield "uplink='tdma', under which devices send in turn and share no band"
    allocator = run_config.get("allocator")
    if allocator in ENERGY_ALLOCATORS:
        yield f"allocator={allocator!r}, which is for energy, and they for time"
    zeroth_order = run_config.get("zeroth-order", "off")
    if zeroth_order != "off":
        yield f"zeroth-order={zeroth_order!r}, whose noise is another"
    if run_config.get("packing"):
        yield "packing=true, where a device has other rows in every round"


def batches_and_codec(
    run_config: Mapping[str, object], *, one_batch: bool = False
) -> dict[str, object]:
    """Return what `batch-size=""` and `codec=""` stand for; what is given stays.

    Parameters
    ----------
    run_config
        Run configuration; a key that it lacks is not in what is returned.
    one_batch
        Whether batches are to be of one size, whatever the keys say.
    """
    one_batch = one_batch or any(against_choosing(run_config))
    batch_size, codec = run_config.get("batch-size"), run_config.get("codec")
    if batch_size == "":
        batch_size = GIVEN_BATCH if one_batch else AUTO
    if codec == "":
        # Whoever asks for what cannot be is told of that alone.
        codec = AUTO if batch_size == AUTO and not one_batch else GIVEN_CODEC
    decided = {"batch-size": batch_size, "codec": codec}
    return {key: value for key, value in decided.items() if key in run_config}


def batches_told(run_config: Mapping[str, object]) -> str:
    """Return in one line what batches and codec a run has, and why rounds choose none.

    Parameters
    ----------
    run_config
        Run configuration in which both are decided.
    """
    told = " ".join(
        f"{key}={run_config[key]}"
        for key in ("batch-size", "codec")
        if key in run_config
    )
    against = next(against_choosing(run_config), None)
    return told if against is None else f"{told}: rounds cannot choose with {against}"
