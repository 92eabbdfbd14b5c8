"""The profile that a node's configuration states; without Flower, for the worker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from lola_flwr.deployment.measurement import read_profile
from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from lola_flwr.system.devices import DeviceProfile, simulated_device


class NodeContext(Protocol):
    """What Flower's Context and the worker's have in common."""

    @property
    def node_id(self) -> int:
        """Number of the node."""

    @property
    def node_config(self) -> Mapping[str, Any]:
        """Configuration of the SuperNode."""

    @property
    def run_config(self) -> Mapping[str, Any]:
        """Configuration of the run."""


def node_partition(context: NodeContext) -> tuple[int, int]:
    """Return which part of the data is a node's, and how many parts there are.

    A simulation tells its nodes; a SuperNode is started with ``--node-config
    'partition-id=0 num-partitions=6'``.

    Raises
    ------
    UserError
        The node's configuration does not say, or names no such part.
    """
    stated = context.node_config
    try:
        index, count = int(stated["partition-id"]), int(stated["num-partitions"])
    except (KeyError, ValueError):
        index, count = -1, 0
    if not 0 <= index < count:
        given = {key: stated.get(key) for key in ("partition-id", "num-partitions")}
        raise UserError(
            f"This node's configuration has {given}; start its SuperNode with "
            "--node-config 'partition-id=0 num-partitions=6', of which the first says "
            "which of the parts of the data is its own."
        )
    return index, count


def states_profile(node_config: Mapping[str, Any]) -> bool:
    """Tell whether a node's configuration states what the device offers."""
    return "profile" in node_config or "flops-per-s" in node_config


def known_properties(context: NodeContext) -> Mapping[str, str | float]:
    """Return the properties that a node states, or draws in a simulation; else none."""
    stated = context.node_config
    if not states_profile(stated) and "partition-id" not in stated:
        return {}
    return node_profile(context).to_properties()


def node_profile(context: NodeContext) -> DeviceProfile:
    """Return the profile that a node's configuration states; in a simulation, draw one.

    A SuperNode is started with the file that ``lola-flwr profile`` wrote, or with the
    figures themselves, which go before the file's: ``flower-supernode --node-config
    'profile="device.json"'``, or ``'name="phone-7" flops-per-s=2e11 memory-bytes=4e9
    snr-db=12.0'``.

    Raises
    ------
    UserError
        The node's configuration states no profile, and this is no simulation; or its
        file is none.
    InvalidProfile
        It states an impossible one.
    """
    stated = context.node_config
    if states_profile(stated):
        file = stated.get("profile")
        measured = read_profile(local_path(str(file))) if file else {}
        return DeviceProfile.from_properties(
            {"name": f"node {context.node_id}", **measured, **stated}
        )
    if "partition-id" in stated:
        seed = int(context.run_config.get("seed", 0))
        return simulated_device(int(stated["partition-id"]), seed=seed)
    raise UserError(
        "This node states no profile; measure it with `lola-flwr profile --out "
        "device.json`, and start its SuperNode with --node-config "
        "'profile=\"device.json\"'."
    )
