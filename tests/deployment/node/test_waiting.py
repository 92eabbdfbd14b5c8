"""How often a node looks for messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.deployment.node.waiting import LONGEST_S, SHORTEST_S, Silences, wait_s

seconds = st.floats(0, 1e5)


def looks(until_s, usual_s=None):
    """Return the moments at which a node looks in a silence."""
    now, found = 0.0, []
    while now <= until_s:
        found.append(now)
        now += wait_s(now, usual_s)
    return found


@given(seconds, st.none() | seconds)
def test_a_message_waits_for_a_tenth_of_the_silence_at_most(silent_s, usual_s):
    wait = wait_s(silent_s, usual_s)
    assert SHORTEST_S <= wait <= max(SHORTEST_S, min(0.1 * silent_s, LONGEST_S))


@given(seconds, st.none() | seconds, st.floats(0, 60))
def test_a_busy_superlink_is_asked_less(silent_s, usual_s, question_s):
    wait = wait_s(silent_s, usual_s, question_s)
    busy_s = min(4 * question_s, 60.0)
    assert wait == pytest.approx(max(wait_s(silent_s, usual_s), busy_s))


def test_a_message_that_comes_as_usual_waits_less():
    (last, before), (plain, plain_before) = (
        looks(8.0, usual_s)[:-3:-1] for usual_s in (8.0, None)
    )
    assert last - before < (plain - plain_before) / 4


def test_a_long_silence_costs_few_questions():
    """A thousand idle nodes ask the SuperLink at most a hundred times a second."""
    hour = looks(3600)
    last_minutes = [moment for moment in hour if moment > 3000]
    assert 1000 * len(last_minutes) / 600 <= 101
    assert len(looks(60, 60)) < 130


def test_recent_silences_count_more():
    silences = Silences()
    assert silences.usual_s is None
    for silent_s in (100.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0):
        silences = silences.after(silent_s)
    assert silences.usual_s == pytest.approx(2, abs=1)
