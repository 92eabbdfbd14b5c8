"""How long a node waits before it looks for a message again.

A SuperLink answers a node's question at once, message or not, so a node has to ask
again and again. Flower's asks every 3 s. This one asks often where a message is likely
and seldom where none is: a fixed part of the time that it has waited already, so that
a message is never noticed later than by that part, and a finer one around the moment at
which it usually comes. In a silence the number of questions grows with the logarithm of
its length, until they come every ``LONGEST_S``. A SuperLink that has many nodes answers
late, and is asked less: a node spends a part of its time on questions, and no more.
"""

from __future__ import annotations

from dataclasses import dataclass

SHORTEST_S, LONGEST_S = 0.02, 10.0
# Of the time waited so far, and of the distance to the usual moment.
_OF_WAITED, _OF_DISTANCE = 0.1, 0.25
# Of the time that a question took, and at most.
_OF_QUESTION, _LONGEST_BUSY_S = 4.0, 60.0
# Weight of the last silence in what is usual.
_WEIGHT = 0.5


def wait_s(
    silent_s: float, usual_s: float | None = None, question_s: float = 0.0
) -> float:
    """Return for how long to wait before the next question.

    Parameters
    ----------
    silent_s
        Seconds since the node's last answer was sent.
    usual_s
        Seconds after which a message usually comes; None if that is not known.
    question_s
        Seconds that questions take: the quicker one of the last two, since the one
        during which the network was gone tells nothing of the SuperLink.
    """
    wait = _OF_WAITED * silent_s
    if usual_s is not None:
        wait = min(wait, _OF_DISTANCE * abs(usual_s - silent_s))
    busy_s = min(_OF_QUESTION * question_s, _LONGEST_BUSY_S)
    return max(min(max(wait, SHORTEST_S), LONGEST_S), busy_s)


@dataclass(frozen=True)
class Silences:
    """What is known of the silences between a run's messages.

    Parameters
    ----------
    usual_s
        Seconds that they last, recent ones before others; None before the first.
    """

    usual_s: float | None = None

    def after(self, silent_s: float) -> Silences:
        """Return what is known after one more silence of so many seconds."""
        if self.usual_s is None:
            return Silences(silent_s)
        return Silences(self.usual_s + _WEIGHT * (silent_s - self.usual_s))
