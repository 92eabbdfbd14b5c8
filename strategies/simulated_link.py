"""Send messages through the link of Flower's simulation, a few at a time.

That link hands messages out in passes, 0.1 s apart: for each device it looks through
all messages that it holds, those that are answered and not yet taken included. With
500 messages for 500 devices a pass takes 0.5 s of the interpreter that everything else
in this process needs, too, from the server's step to what hands tasks to Ray.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Sequence

from flwr.app import Message
from flwr.serverapp import Grid

# Messages times devices that a pass may look at: then it takes half of its pause.
_LOOKED_AT = 25_000
# Messages that a core is to have: those that it answers between two passes.
_PER_CORE = 32
# Replies are looked for after a part of the time that they have been waited for.
_POLL_PART, _SHORTEST_POLL_S, _LONGEST_POLL_S = 0.1, 0.01, 0.1


def few_at_a_time(
    grid: Grid, messages: Sequence[Message], longest_s: float
) -> list[Message]:
    """Send messages; return the replies that come in time, in the order sent.

    Parameters
    ----------
    grid
        The Grid of a simulation.
    messages
        The messages. What is not sent when the time is up is not sent any more.
    longest_s
        How long to wait for the replies.
    """
    begun_s = time.monotonic()
    most = _most_at_a_time(len([*grid.get_node_ids()]))
    left = deque(messages)
    sent: list[str] = []
    missing: set[str] = set()
    replies: dict[str, Message] = {}
    while left or missing:
        count = min(most - len(missing), len(left))
        pushed = [*grid.push_messages([left.popleft() for _ in range(count)])]
        sent += pushed
        missing |= {*pushed}
        waited_s = time.monotonic() - begun_s
        if waited_s >= longest_s:
            break
        poll_s = min(max(_POLL_PART * waited_s, _SHORTEST_POLL_S), _LONGEST_POLL_S)
        time.sleep(min(poll_s, longest_s - waited_s))
        # Flower changes the set that it is given.
        for reply in grid.pull_messages({*missing}):
            replies[reply.metadata.reply_to_message_id] = reply
            missing.discard(reply.metadata.reply_to_message_id)
    return [replies[name] for name in sent if name in replies]


def _most_at_a_time(num_nodes: int) -> int:
    """Return how many messages the link is to hold."""
    cores = os.cpu_count() or 1
    return max(math.ceil(_LOOKED_AT / max(num_nodes, 1)), _PER_CORE * cores)
