from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.errors import UserError
from lola_flwr.planning import AllocationOptions
from lola_flwr.planning.candidates import WINDOW
from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.influence import Influence

DEVICES = ["a", "b", "c"]
ROUNDS = st.lists(
    st.lists(st.tuples(st.integers(0, 2), st.sampled_from(DEVICES)), max_size=4),
    max_size=40,
)


@given(ROUNDS)
def test_the_latest_updates_of_each_block_are_counted(rounds):
    influence = Influence()
    for given_in_round in rounds:
        influence = influence.after(given_in_round)
    every = [pair for one in rounds for pair in one]
    counts = influence.given([*DEVICES, "another"], 4)
    for row, device in enumerate([*DEVICES, "another"]):
        for block in range(4):
            latest = [name for b, name in every if b == block][-WINDOW:]
            assert counts[row, block] == latest.count(device)
    kept = json.loads(json.dumps(to_values(influence)))
    again = from_values(Influence, kept)
    assert np.array_equal(again.given(DEVICES, 4), influence.given(DEVICES, 4))


def test_less_than_the_even_part_is_nobodys():
    with pytest.raises(UserError, match=r"influence_factor=0.5 must be at least 1"):
        AllocationOptions(influence_factor=0.5)
