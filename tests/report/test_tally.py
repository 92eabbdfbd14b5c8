"""Which rounds of many a page shows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lola_flwr.report.tally import extremes

VALUES = st.one_of(st.none(), st.floats(0, 1e6))


@settings(max_examples=25)
@given(st.data(), st.integers(1, 60), st.integers(1, 3), st.integers(8, 40))
def test_no_peak_and_no_trough_is_lost(data, num_rounds, num_lines, most):
    line = st.lists(VALUES, min_size=num_rounds, max_size=num_rounds)
    lines = data.draw(st.lists(line, min_size=num_lines, max_size=num_lines))
    chosen = extremes(lines, num_rounds, most)
    assert len(chosen) <= max(most, 2)
    assert chosen == sorted(set(chosen))
    assert {0, num_rounds - 1} <= set(chosen) <= set(range(num_rounds))
    for values in lines:
        known = [value for value in values if value is not None]
        shown = [values[n] for n in chosen if values[n] is not None]
        assert not known or (min(known), max(known)) == (min(shown), max(shown))


def test_each_span_has_its_own():
    values = [float(n % 10) for n in range(100)]
    chosen = extremes([values], 100, 22)
    assert {values[n] for n in chosen} == {0.0, 9.0}
    assert all(set(range(n, n + 10)) & set(chosen) for n in range(0, 100, 10))


@pytest.mark.parametrize("most", [5, 6])
def test_few_rounds_are_all_shown(most):
    assert extremes([[3.0, 1.0, None, 2.0, 5.0]], 5, most) == [0, 1, 2, 3, 4]
