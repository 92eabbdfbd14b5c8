"""Measure what a device can do, and keep it in a file that its client reports.

For each depth the time of a training step and the most memory that it takes are
measured on synthetic batches: what counts is the shape. The server plans with one speed
per device, since its cost model knows how costs grow with depth; the measured curve is
in the file for whoever wants to compare.
"""

from __future__ import annotations

import json
import math
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lola_flwr.deployment.host import describe_host
from lola_flwr.errors import UserError, quoted
from lola_flwr.machine.files import replacing
from lola_flwr.machine.memory import available_memory_bytes
from lola_flwr.machine.power import measured_energy
from lola_flwr.system.devices import DeviceProfile

if TYPE_CHECKING:
    import torch
    from torch import nn

    from lola_flwr.model.blocks import BlockPartition

VERSION = 1
# What the system and other programs keep of the memory that is free now.
_USABLE_MEMORY = 0.8
_REPEATS = 3


@dataclass(frozen=True)
class DepthMeasurement:
    """One training step at one depth.

    Parameters
    ----------
    depth
        Layers that back-propagation passes: 1 is the last layer.
    compute_s
        Seconds of the step, median.
    peak_memory_bytes
        Most memory beyond that of the loaded model.
    flops
        Floating-point operations of the step, by the cost model.
    """

    depth: int
    compute_s: float
    peak_memory_bytes: int
    flops: float


@dataclass(frozen=True, kw_only=True)
class DeviceMeasurement:
    """What was measured on a device.

    Parameters
    ----------
    name
        Name of the device.
    model, batch_size, sequence_length
        What was trained.
    torch_device
        Where: ``"cpu"``, ``"cuda"``.
    memory_bytes
        Memory that fine-tuning may use.
    uplink_bps
        Rate of the uplink, bit/s; None if it is not known.
    depths
        Step by depth.
    host
        What identifies the device.
    compute_power_w
        What it drew meanwhile, watts, mean; None where no sensor tells.
    """

    name: str
    model: str
    batch_size: int
    sequence_length: int
    torch_device: str
    memory_bytes: float
    uplink_bps: float | None
    depths: tuple[DepthMeasurement, ...]
    host: Mapping[str, Any]
    compute_power_w: float | None = None

    @property
    def flops_per_s(self) -> float:
        """Sustained training speed: what the cost model's operations took, median."""
        return statistics.median(step.flops / step.compute_s for step in self.depths)

    @property
    def profile(self) -> DeviceProfile:
        """What the device reports to the server."""
        return DeviceProfile(
            name=self.name,
            flops_per_s=self.flops_per_s,
            memory_bytes=self.memory_bytes,
            uplink_bps=self.uplink_bps,
            compute_power_w=self.compute_power_w,
        )

    def to_json(self) -> str:
        """Return the file's text: the profile's keys, and what they come from."""
        profile = self.profile.to_properties()
        if self.uplink_bps is not None:
            del profile["snr-db"]
        return json.dumps(
            {
                "lola-flwr-profile": VERSION,
                **profile,
                "measured": {
                    "model": self.model,
                    "batch-size": self.batch_size,
                    "sequence-length": self.sequence_length,
                    "torch-device": self.torch_device,
                    "depths": [asdict(step) for step in self.depths],
                    "host": dict(self.host),
                },
            },
            indent=2,
        )


def read_profile(path: Path) -> dict[str, Any]:
    """Return the properties of a profile file.

    Raises
    ------
    UserError
        There is no such file, or it is none that ``lola-flwr profile`` wrote.
    """
    advice = "`lola-flwr profile --out device.json` writes one."
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UserError(f"profile={str(path)!r}: {reason}; {advice}") from None
    except ValueError as error:
        raise UserError(f"profile={str(path)!r} is no JSON ({error}).") from None
    version = values.get("lola-flwr-profile") if isinstance(values, dict) else None
    if version != VERSION:
        raise UserError(
            f"profile={str(path)!r} is no profile of version {VERSION} "
            f"(lola-flwr-profile={quoted(version)}); {advice}"
        )
    return {
        key: value
        for key, value in values.items()
        if key not in ("lola-flwr-profile", "measured")
    }


def measure_device(
    model_name: str,
    *,
    name: str | None = None,
    batch_size: int = 16,
    sequence_length: int = 64,
    torch_device: str | None = None,
    uplink_bps: float | None = None,
    budget_s: float = 90.0,
    progress: Callable[[str, int, int], object] = lambda step, done, total: None,
) -> DeviceMeasurement:
    """Train a few steps at each depth, and look at the clock and the memory.

    Parameters
    ----------
    model_name
        As for ``load_classifier``.
    name
        Name of the device (default: the host's).
    batch_size, sequence_length
        Shape of the batches.
    torch_device
        Where to train (default: on a GPU if there is one).
    uplink_bps
        Rate of the uplink, bit/s, where it is known.
    budget_s
        Time for the steps. Where all depths take longer, some are left out, never the
        first and the last.
    progress
        Called before each depth, and at the end, with what is done and of how many.

    Raises
    ------
    UserError
        The model cannot be loaded, or takes no texts of this length, or there is no
        such device here.
    """
    import torch

    from lola_flwr.costs.of_model import model_costs
    from lola_flwr.model.adapter_blocks import model_partition
    from lola_flwr.model.example import token_ids
    from lola_flwr.model.inputs import check_sequence_length
    from lola_flwr.model.loading import load_classifier

    if torch_device is None:
        torch_device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(torch_device)
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"torch-device={torch_device!r}: {reason}.") from None
    progress(f"loading {model_name}", 0, 1)
    memory_bytes = _USABLE_MEMORY * _free_bytes(place)
    # What its classes mean takes no time.
    model, _ = load_classifier(model_name, num_labels=2, class_names=("0", "1"))
    check_sequence_length(model, sequence_length, model_name)
    model.to(place).train()
    partition = model_partition(model)
    costs = model_costs(
        model, partition, batch_size=batch_size, sequence_length=sequence_length
    )
    shape = (batch_size, sequence_length)
    batch = {
        "input_ids": token_ids(model, sequence_length).to(place).expand(shape),
        "attention_mask": torch.ones(shape, dtype=torch.long, device=place),
        "labels": torch.zeros(batch_size, dtype=torch.long, device=place),
    }
    num_blocks = partition.num_blocks
    deepest_s, _ = _step(model, partition, 0, batch)  # loads kernels, fills caches
    deepest_s, _ = _step(model, partition, 0, batch)
    depths = chosen_depths(num_blocks, deepest_s * _REPEATS, budget_s)
    steps = []
    with measured_energy() as energy:
        for done, depth in enumerate(depths):
            progress(f"depth {depth}", done, len(depths))
            block = num_blocks - depth
            timed = [_step(model, partition, block, batch) for _ in range(_REPEATS)]
            steps.append(
                DepthMeasurement(
                    depth=depth,
                    compute_s=statistics.median(seconds for seconds, _ in timed),
                    peak_memory_bytes=max(peak for _, peak in timed),
                    flops=float(costs.flops[block]),
                )
            )
    progress("done", len(depths), len(depths))
    return DeviceMeasurement(
        name=name or socket.gethostname(),
        model=model_name,
        batch_size=batch_size,
        sequence_length=sequence_length,
        torch_device=torch_device,
        memory_bytes=memory_bytes,
        uplink_bps=uplink_bps,
        depths=tuple(steps),
        compute_power_w=energy.mean_w,
        host={
            **describe_host(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **(
                {"gpu": torch.cuda.get_device_name(place)}
                if place.type == "cuda"
                else {}
            ),
        },
    )


def chosen_depths(num_blocks: int, depth_s: float, budget_s: float) -> Sequence[int]:
    """Return which depths to measure in the time there is, shallowest first.

    Parameters
    ----------
    num_blocks
        Depths there are.
    depth_s
        Seconds that one of them takes at most.
    budget_s
        Seconds for all.
    """
    count = max(2, min(num_blocks, math.floor(budget_s / depth_s)))
    if count >= num_blocks:
        return range(1, num_blocks + 1)
    gaps = (num_blocks - 1) / (count - 1)
    return sorted({1 + round(index * gaps) for index in range(count)})


def write_profile(measurement: DeviceMeasurement, path: Path) -> None:
    """Write a profile file, in one go; raise `UserError` where that fails."""
    with replacing(path, shared=True) as unfinished:
        unfinished.write_text(f"{measurement.to_json()}\n", encoding="utf-8")


def _step(
    model: nn.Module,
    partition: BlockPartition,
    block_index: int,
    batch: Mapping[str, torch.Tensor],
) -> tuple[float, int]:
    """Train one step; return its seconds and its peak of memory, bytes."""
    import torch

    from lola_flwr.device.memory import measured_peak
    from lola_flwr.model.backprop import block_gradient

    place = next(iter(batch.values())).device
    on_gpu = place.type == "cuda"
    with measured_peak(place) as peak:
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        block_gradient(model, partition, block_index, batch)
        if on_gpu:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    return seconds, peak.peak_bytes


def _free_bytes(place: torch.device) -> float:
    """Return the memory to train in: a Jetson's GPU has the host's, and no own."""
    import torch

    free = available_memory_bytes()
    if place.type == "cuda":
        free = min(free, torch.cuda.mem_get_info(place)[0])
    if math.isinf(free):
        raise UserError(
            "This system does not tell how much memory is free: pip install psutil, or "
            "state memory-bytes in the SuperNode's --node-config."
        )
    return free
