from __future__ import annotations

import math

import numpy as np

from lola_flwr.server.absences import Absences


def rests(absences, device, rounds):
    return [r for r in rounds if absences.memory_limit(r, device) < math.inf]


def test_rests_grow_exponentially_and_end():
    absences, lengths, server_round = Absences(), [], 1
    for _ in range(8):
        absences = absences.after(server_round, {"d": 0.0})
        resting = rests(absences, "d", range(server_round + 1, server_round + 100))
        assert resting == list(range(server_round + 1, server_round + 1 + len(resting)))
        lengths.append(len(resting))
        server_round += len(resting) + 1
    assert lengths == [1, 2, 4, 8, 16, 32, 32, 32]


def test_who_is_not_trusted_rests_longer_from_the_first_time_on():
    absences, lengths, server_round = Absences(), [], 1
    for _ in range(4):
        absences = absences.after(server_round, {"d": 0.0, "e": 0.0}, {"d"})
        resting = rests(absences, "d", range(server_round + 1, server_round + 100))
        lengths.append(len(resting))
        server_round += len(resting) + 1
    assert lengths == [2, 8, 32, 32]
    assert absences.failures("e") == 4


def test_a_useful_update_halves_what_is_held_against_a_device():
    absences = Absences()
    for server_round in (1, 10, 20, 30):
        absences = absences.after(server_round, {"d": 0.0, "other": None})
    assert absences.failures("d") == 4
    # It was called back early: that says nothing yet.
    assert absences.after(31, {"d": None}).failures("d") == 4
    for server_round, left in ((50, 2), (51, 1), (52, 0)):
        absences = absences.after(server_round, {"d": None})
        assert absences.failures("d") == left
    assert absences == Absences()


def test_out_of_memory_bars_blocks_of_that_size_only():
    absences = Absences().after(3, {"d": 5e8})
    assert absences.memory_limit(4, "d") == 5e8
    assert absences.memory_limit(5, "d") == math.inf
    # A smaller block that went well does not shorten the next time.
    absences = absences.after(4, {"d": None}).after(5, {"d": 5e8})
    assert rests(absences, "d", range(6, 20)) == [6, 7]


def test_nothing_changes_for_devices_that_were_not_asked():
    absences = Absences().after(1, {"d": 0.0})
    assert absences.after(2, {"e": None}) == absences
    assert np.isinf(absences.memory_limit(2, "e"))
