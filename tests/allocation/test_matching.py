"""Matchings against brute force over all of them."""

import itertools

import numpy as np
import pytest
from allocation_oracle import any_argpartition
from scipy.optimize import linear_sum_assignment

from lola_flwr.allocation import matching, transport
from lola_flwr.allocation.matching import any_matching, cheapest_matching, slots_of
from tests.marks import rest_slow


def all_matchings(num_rows, demand, everyone):
    """Rows and columns of every matching, whether its edges exist or not."""
    if everyone:
        rows = range(num_rows)
        for columns in itertools.product(range(len(demand)), repeat=num_rows):
            if np.all(np.bincount(columns, minlength=len(demand)) >= demand):
                yield [*rows], [*columns]
    else:
        columns = [column for column, count in enumerate(demand) for _ in range(count)]
        for rows in itertools.permutations(range(num_rows), len(columns)):
            yield [*rows], columns


def tables(seed, count):
    """Costs, few of them alike, some infinite and some negative, and demands."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        num_rows, num_columns = rng.integers(1, 6), rng.integers(1, 4)
        cost = rng.normal(size=(num_rows, num_columns)).round(1)
        cost[rng.random(cost.shape) < 0.25] = np.inf
        yield cost, rng.integers(1, 3, size=num_columns)


def check_against_brute_force(cost, demand, everyone):
    """Compare; return whether there is a matching."""
    totals = [cost[m].sum() for m in all_matchings(len(cost), demand, everyone)]
    found = cheapest_matching(cost, demand, all_devices=everyone)
    if min(totals, default=np.inf) == np.inf:
        assert found is None
        return False
    (rows, columns), total = found
    assert total == pytest.approx(min(totals), abs=1e-12)
    assert total == pytest.approx(cost[rows, columns].sum(), abs=1e-12)
    assert len(set(rows.tolist())) == rows.size
    count = np.bincount(columns, minlength=demand.size)
    if everyone:
        assert rows.tolist() == [*range(len(cost))]
        assert np.all(count >= demand)
    else:
        assert count.tolist() == demand.tolist()
    return True


@pytest.mark.parametrize("everyone", [False, True])
@pytest.mark.parametrize("rows_per_slot", [0, 64])
@pytest.mark.parametrize("many_slots", [0, 128])
def test_the_cheapest_matching_is_the_cheapest(
    everyone, rows_per_slot, many_slots, monkeypatch
):
    # With 0 rows a slot every table is pruned first.
    monkeypatch.setattr(matching, "_ROWS_PER_SLOT", rows_per_slot)
    # With 0 slots they are all many: those of one block are not told apart.
    monkeypatch.setattr(matching, "_MANY_SLOTS", many_slots)
    seen = [check_against_brute_force(*t, everyone) for t in tables(81, 300)]
    assert 50 < sum(seen) < 250


def test_a_table_of_no_more_rows_than_slots_is_not_pruned_below_them(monkeypatch):
    monkeypatch.setattr(matching, "_ROWS_PER_SLOT", 0)
    cost = np.array([[1.0, 2.0], [2.0, 1.0]])
    (rows, columns), total = cheapest_matching(cost, np.ones(2, int), all_devices=False)
    assert (dict(zip(rows, columns, strict=True)), total) == ({0: 0, 1: 1}, 2.0)


@pytest.mark.parametrize("everyone", [False, True])
def test_pruning_keeps_the_cheapest_total(everyone, monkeypatch):
    monkeypatch.setattr(np, "argpartition", any_argpartition)
    rng = np.random.default_rng(83)
    for _ in range(30):
        # Dear in one column is dear in all: the columns compete for the same rows.
        cost = rng.random((40, 1)) + 1e-6 * rng.random((40, 3))
        demand = np.array([2, 1, 2])
        totals = []
        for rows_per_slot in (0, 10**9):
            monkeypatch.setattr(matching, "_ROWS_PER_SLOT", rows_per_slot)
            _, total = cheapest_matching(cost, demand, all_devices=everyone)
            totals.append(total)
        assert totals[0] == pytest.approx(totals[1], rel=1e-12)


def test_a_device_with_no_block_at_all_leaves_no_matching_of_everybody():
    cost = np.array([[1.0], [np.inf]])
    assert cheapest_matching(cost, np.ones(1, int), all_devices=True) is None
    assert cheapest_matching(cost, np.ones(1, int), all_devices=False) is not None


def test_slots_are_copies_of_a_column():
    assert slots_of(np.array([2, 0, 1, 3])).tolist() == [0, 0, 2, 3, 3, 3]


def most_filled(edges, slots, taken=frozenset()):
    """Return how many slots different devices can fill: each choice is tried."""
    if not slots:
        return 0
    column, *others = slots
    return max(
        most_filled(edges, others, taken),
        *(
            1 + most_filled(edges, others, taken | {row})
            for row in np.flatnonzero(edges[:, column])
            if row not in taken
        ),
        0,
    )


def test_the_largest_matching_is_the_largest():
    rng = np.random.default_rng(82)
    full = 0
    for _ in range(300):
        edges = rng.random((rng.integers(1, 6), rng.integers(1, 4))) < 0.4
        demand = rng.integers(1, 3, size=edges.shape[1])
        device_of_slot = any_matching(edges, demand)
        slots = slots_of(demand)
        filled = np.flatnonzero(device_of_slot >= 0)
        assert device_of_slot.shape == slots.shape
        assert device_of_slot.dtype == np.int64
        assert edges[device_of_slot[filled], slots[filled]].all()
        assert len(set(device_of_slot[filled].tolist())) == filled.size
        assert filled.size == most_filled(edges, slots.tolist())
        full += filled.size == slots.size
    assert 20 < full < 280


@pytest.mark.parametrize("at_once", rest_slow([8, 1, 96]))
@pytest.mark.parametrize("kind", ["any", "ties", "impossible", "alike", "one scale"])
def test_blocks_that_need_many_are_filled_at_the_least_cost(kind, at_once, monkeypatch):
    monkeypatch.setattr(transport, "_AT_ONCE", at_once)
    rng = np.random.default_rng(84)
    found = 0
    for _ in range(6):
        demand = rng.integers(1, 9, size=int(rng.integers(1, 7)))
        num_rows = int(demand.sum() + rng.integers(0, 20))
        cost = rng.random((num_rows, demand.size))
        if kind == "ties":
            cost = np.round(3 * cost)
        elif kind == "impossible":
            cost[rng.random(cost.shape) < 0.6] = np.inf
        elif kind == "alike":
            cost = 1e-3 + 1e-9 * cost
        elif kind == "one scale":
            cost = 1e-6 * rng.exponential(size=(num_rows, 1)) * cost**4
        slots = slots_of(demand)
        blocks = transport.cheapest_blocks(cost, demand)
        try:
            rows, filled = linear_sum_assignment(cost[:, slots])
        except ValueError:
            assert blocks is None
            continue
        count = np.bincount(blocks, minlength=demand.size + 1)
        assert count[:-1].tolist() == demand.tolist()
        taking = np.flatnonzero(blocks < demand.size)
        assert cost[taking, blocks[taking]].sum() == pytest.approx(
            cost[rows, slots[filled]].sum(), rel=1e-12
        )
        found += 1
    assert found > 2
