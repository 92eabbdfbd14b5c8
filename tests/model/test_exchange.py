"""Which arrays of a model a list of arrays is."""

from __future__ import annotations

from itertools import combinations

from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.model.exchange import _only_part

ITEMS = st.lists(st.sampled_from("ab"), max_size=6)


@given(received=ITEMS, known=ITEMS)
def test_a_part_is_found_where_there_is_only_one(received, known):
    ways = [
        [*places]
        for places in combinations(range(len(known)), len(received))
        if [known[place] for place in places] == received
    ]
    assert _only_part(received, known) == (ways[0] if len(ways) == 1 else None)


def test_ways_are_not_tried_one_by_one():
    """There are more than 10^28 of them; and none, where the last item is missing."""
    known = ["a"] * 100
    assert _only_part(["a"] * 50, known) is None
    assert _only_part(["a"] * 50 + ["b"], known) is None
    assert _only_part(["a"] * 100, known) == [*range(100)]
