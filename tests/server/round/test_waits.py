"""Who keeps a round waiting."""

import pytest

from lola_flwr.server.round.waits import unexplained_waits


def waits(**seconds):
    """Of devices that answered after so long, of which so much is explained."""
    answered_s = {device: answered for device, (answered, _) in seconds.items()}
    explained_s = {device: explained for device, (_, explained) in seconds.items()}
    return unexplained_waits(answered_s, explained_s)


def test_whom_nothing_explains():
    honest = {"a": (2.0, 1.5), "b": (2.2, 1.6), "c": (2.0, 1.6)}
    assert waits(**honest) == {}
    # Slow, but for a reason; and neither.
    assert waits(**honest, slow=(60.0, 59.0)) == {}
    assert waits(**honest, late=(60.0, 1.5)) == {"late": pytest.approx(58.5 - 0.5)}


def test_what_all_wait_for_explains_it():
    # Programs that start for five seconds.
    assert waits(a=(7.0, 2.0), b=(7.5, 2.0), c=(7.0, 1.0)) == {}


def test_the_border_is_half_of_what_most_need():
    # Usual: 0.5 s unexplained of 3 s; 3 / 2 + 0.5 more are chance.
    honest = {"a": (3.0, 2.5), "b": (3.0, 2.5), "c": (3.0, 2.5)}
    assert waits(**honest, late=(5.0, 2.5)) == {}
    assert waits(**honest, late=(5.125, 2.5)) == {"late": 2.125}


def test_few():
    assert unexplained_waits({}, {}) == {}
    assert waits(alone=(60.0, 1.0)) == {}
    assert waits(a=(2.0, 1.0), b=(60.0, 1.0)) == {"b": 58.0}
