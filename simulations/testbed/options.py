"""What a testbed's devices do."""

from __future__ import annotations

from dataclasses import dataclass, field

# A SuperNode as Flower has it, and one that stays from message to message.
FLOWERS_NODE, RESIDENT_NODE = ("flower-supernode",), ("lola-flwr", "node")


@dataclass(frozen=True)
class Options:
    """What a testbed's devices do.

    Parameters
    ----------
    limit
        What holds uploads to their shares: ``"pacing"``, ``"tc"`` or ``"none"``.
    worker
        Whether a resident worker trains, or the process that runs the client.
    measured
        Whether nodes state a profile, and devices tell how long they compute here;
        otherwise both are simulated.
    node
        The program that is a SuperNode, and the words that make it one.
    keeps_state
        Whether the SuperLink keeps what it knows in a file, which the next one reads.
    environment
        Further environment of all programs.
    """

    limit: str = "pacing"
    worker: bool = True
    measured: bool = False
    node: tuple[str, ...] = FLOWERS_NODE
    keeps_state: bool = False
    environment: dict[str, str] = field(default_factory=dict)
