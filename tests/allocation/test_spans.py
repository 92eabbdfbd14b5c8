"""Spans of blocks: against brute force over all cuts and all matchings."""

import itertools
from dataclasses import fields

import numpy as np
import pytest
from allocation_oracle import least_share
from scipy.optimize import linprog

from lola_flwr.allocation import spans
from lola_flwr.allocation.problem import IMPOSSIBLE_S
from lola_flwr.allocation.span_program import least_band
from lola_flwr.allocation.spans import SpanProblem, solve_spans
from tests.marks import rest_slow


def random_problem(rng, num_devices, num_blocks, *, possible=0.75, power=False):
    """Depth costs as a model's are, with uneven blocks and devices."""
    speed = rng.uniform(0.2, 3.0, num_devices)
    rate = rng.uniform(0.1, 2.0, num_devices)
    trained, passed = rng.uniform(0.1, 1.0, (2, num_blocks))
    payload = rng.uniform(0.0, 2.0, num_blocks) * (rng.random(num_blocks) > 0.1)
    shape = (num_devices, num_blocks, num_blocks)
    compute_s, upload_s = np.zeros(shape), np.zeros(shape)
    for a, b in itertools.combinations_with_replacement(range(num_blocks), 2):
        compute_s[:, a, b] = (2 + passed[a:].sum() + trained[a : b + 1].sum()) * speed
        upload_s[:, a, b] = (0.3 + payload[a : b + 1].sum()) * rate
    return SpanProblem(
        compute_s=compute_s,
        full_band_upload_s=upload_s,
        feasible=rng.random(shape) < possible,
        worth=rng.integers(1, 4, num_blocks).astype(float),
        snr=rng.uniform(0.01, 30.0, num_devices) if power else None,
    )


def deadline_s(problem, chosen):
    """When all are done, by bisection."""
    k, a, b = np.array(chosen).T
    c, tau = problem.compute_s[k, a, b], problem.full_band_upload_s[k, a, b]
    snr = None if problem.snr is None else problem.snr[k]
    low, high = (c + tau).max(), c.max() + tau.sum()
    for _ in range(60):
        middle = 0.5 * (low + high)
        fits = least_share(tau, middle - c, snr).sum() <= 1.0
        low, high = (low, middle) if fits else (middle, high)
    return high


def covers(problem):
    """All sets of (device, first, last) of different devices and disjoint spans."""
    num_devices, num_blocks = problem.feasible.shape[:2]

    def behind(start, devices):
        yield []
        for a, b in itertools.combinations_with_replacement(
            range(start, num_blocks), 2
        ):
            for k in devices:
                if problem.feasible[k, a, b]:
                    for others in behind(b + 1, devices - {k}):
                        yield [(k, a, b), *others]

    return (cover for cover in behind(0, frozenset(range(num_devices))) if cover)


def brute_force(problem):
    """Worth covered, devices, and the earliest deadline of those that have most."""
    ranks = {}
    for cover in covers(problem):
        worth = sum(problem.worth[a : b + 1].sum() for _, a, b in cover)
        ranks.setdefault((worth, len(cover)), []).append(cover)
    if not ranks:
        return None
    most = max(ranks)
    return *most, min(deadline_s(problem, cover) for cover in ranks[most])


def check(problem):
    """Compare with brute force; return whether there is a cover, and a whole one."""
    best = brute_force(problem)
    found = solve_spans(problem)
    if best is None:
        assert found is None
        return False, False
    worth, devices, best_s = best
    covered = [n for span in found.spans for n in span.blocks]
    assert covered == sorted(set(covered))
    assert all(problem.feasible[span] for span in found.spans)
    assert len({span.device for span in found.spans}) == len(found.spans) == devices
    assert problem.worth[covered].sum() == worth
    assert found.is_whole == (len(covered) == len(problem.worth))
    assert found.deadline_s == pytest.approx(best_s, rel=1e-9)
    assert found.bound_s == found.deadline_s
    return True, found.is_whole


class TestEqualsBruteForce:
    @pytest.mark.parametrize(
        ("seed", "count"), [(0, 120), pytest.param(1, 300, marks=pytest.mark.slow)]
    )
    def test_fewer_devices_than_blocks(self, seed, count):
        rng = np.random.default_rng(seed)
        outcomes = []
        for _ in range(count):
            num_blocks = int(rng.integers(2, 6))
            num_devices = int(rng.integers(1, min(num_blocks, 4)))
            possible = rng.choice([0.15, 0.3, 0.6, 1.0])
            power = bool(rng.random() < 0.5)
            outcomes.append(
                check(
                    random_problem(
                        rng, num_devices, num_blocks, possible=possible, power=power
                    )
                )
            )
        some, whole = map(sum, zip(*outcomes, strict=True))
        assert count >= some > whole >= count / 3


def with_changed(problem, **changed):
    """Return a problem with some of its arrays replaced."""
    given = {f.name: getattr(problem, f.name) for f in fields(problem) if f.init}
    return SpanProblem(**given | changed)


def counted(monkeypatch, name):
    """Count the calls of one of the module's functions."""
    calls, called = [], getattr(spans, name)

    def counting(*args):
        calls.append(args)
        return called(*args)

    monkeypatch.setattr(spans, name, counting)
    return calls


def test_a_span_of_endless_seconds_is_impossible():
    problem = random_problem(np.random.default_rng(0), 1, 2, possible=1.0)
    compute_s = problem.compute_s.copy()
    compute_s[0, 0, 1] = IMPOSSIBLE_S
    assert solve_spans(problem).is_whole
    assert not solve_spans(with_changed(problem, compute_s=compute_s)).is_whole


@pytest.mark.parametrize(("most", "name"), [(10, "_Table"), (0, "_matched")])
def test_counts_the_covers_it_looks_for(most, name, monkeypatch):
    monkeypatch.setattr(spans, "_MOST_EXACT", most)
    calls = counted(monkeypatch, name)
    rng = np.random.default_rng(2)
    numbers = []
    for _ in range(8):
        calls.clear()
        found = solve_spans(random_problem(rng, 3, 6, possible=1.0))
        numbers.append(found.iterations)
        assert found.iterations == len(calls)
    assert 2 <= min(numbers) < max(numbers)


class TestPrices:
    @pytest.mark.parametrize("possible", [1.0, 0.8])
    def test_find_what_subsets_find_and_bound_it(self, possible, monkeypatch):
        rng = np.random.default_rng(5)
        problems = [random_problem(rng, 7, n, possible=possible) for n in (8, 9, 12)]
        exact = [solve_spans(problem) for problem in problems]
        monkeypatch.setattr(spans, "_MOST_EXACT", 0)
        for problem, best in zip(problems, exact, strict=True):
            found = solve_spans(problem)
            assert len({span.device for span in found.spans}) == 7
            assert [n for span in found.spans for n in span.blocks] == [
                *range(len(problem.worth))
            ]
            within = best.deadline_s * (1 - 1e-9), 1.02 * best.deadline_s
            assert within[0] <= found.deadline_s <= within[1]
            assert 0.9 * best.deadline_s < found.bound_s
            assert found.bound_s <= best.deadline_s * (1 + 1e-9)

    def test_are_near_the_best_where_devices_differ_much(self, monkeypatch):
        rng = np.random.default_rng(11)
        problems = [
            random_problem(rng, 9, 12, possible=0.7, power=bool(seed % 2))
            for seed in range(4)
        ]
        exact = [solve_spans(problem) for problem in problems]
        monkeypatch.setattr(spans, "_MOST_EXACT", 0)
        near = [solve_spans(problem) for problem in problems]
        excess = [
            found.deadline_s / best.deadline_s - 1
            for found, best in zip(near, exact, strict=True)
        ]
        # What is proven of the worst, the mean; and how soon that is so.
        tight = [found.bound_s / found.deadline_s for found in near]
        assert np.abs(excess).max() < 1e-9
        assert min(tight) > 0.9
        assert np.mean(tight) > 0.97
        assert sum(found.iterations for found in near) < 800

    def test_leave_out_what_nobody_can_hold(self, monkeypatch):
        monkeypatch.setattr(spans, "_MOST_EXACT", 0)
        problem = random_problem(np.random.default_rng(1), 3, 6, possible=1.0)
        feasible = problem.feasible.copy()
        feasible[:, 2, :] = False
        feasible[:, :3, 2:] = False
        found = solve_spans(with_changed(problem, feasible=feasible))
        assert [n for span in found.spans for n in span.blocks] == [0, 1, 3, 4, 5]
        assert not found.is_whole
        assert found.bound_s == found.deadline_s

    @pytest.mark.parametrize("seed", rest_slow(range(20), fast=3))
    def test_are_none_where_much_is_left_out_and_a_program_is_as_good_as_subsets(
        self, seed, monkeypatch
    ):
        """Few train several blocks, and not all: most covers leave some out."""
        rng = np.random.default_rng(seed)
        num_devices, num_blocks = int(rng.integers(4, 8)), int(rng.integers(9, 14))
        problem = random_problem(rng, num_devices, num_blocks, possible=1.0)
        longest = rng.choice([1, 1, 1, 2, 3], num_devices)
        first, last = np.indices((num_blocks, num_blocks))
        short = last - first < longest[:, None, None]
        problem = with_changed(problem, feasible=problem.feasible & short)
        best = solve_spans(problem)
        monkeypatch.setattr(spans, "_MOST_EXACT", 0)
        found = solve_spans(problem)
        assert problem.rank(found.spans) == pytest.approx(problem.rank(best.spans))
        if not found.is_whole:
            assert found.bound_s == found.deadline_s

    def test_keep_what_they_found_where_the_program_has_no_time(self, monkeypatch):
        monkeypatch.setattr(spans, "_MOST_EXACT", 0)
        monkeypatch.setattr(spans, "_TIME_LIMIT_S", 0.0)
        problem = random_problem(np.random.default_rng(1), 12, 24, possible=1.0)
        single = np.eye(24, dtype=bool)[None]
        found = solve_spans(with_changed(problem, feasible=problem.feasible & single))
        assert len(found.spans) == 12 and found.bound_s == 0.0


class TestLeastBand:
    def test_is_that_of_the_program_that_covers_each_block_once(self):
        rng = np.random.default_rng(3)
        fractional = infeasible = 0
        for _ in range(40):
            cost = rng.uniform(0.0, 0.5, (3, 5, 5))
            cost[rng.random(cost.shape) < rng.choice([0.5, 0.8])] = 1.0
            cost = np.where(np.triu(np.ones((5, 5), bool)), cost, np.inf)
            found = least_band(cost)
            device, first, last = np.nonzero(cost < 1.0)
            block = np.arange(5)[:, None]
            program = linprog(
                cost[device, first, last],
                A_eq=np.vstack(
                    [
                        (first <= block) & (block <= last),
                        np.arange(3)[:, None] == device,
                    ]
                ),
                b_eq=np.ones(8),
            )
            assert found == pytest.approx(min(program.fun or 1.0, 1.0), abs=1e-9)
            fractional += program.x is not None and bool(((program.x % 1) > 0.1).any())
            infeasible += program.x is None
        assert fractional > 3
        assert 3 < infeasible < 30

    @pytest.mark.parametrize("dear", [np.s_[1], np.s_[:, :, -1], np.s_[:, 0]])
    def test_is_all_of_it_where_a_device_or_a_block_has_no_cheaper_span(self, dear):
        cost = np.full((2, 2, 2), 0.1)
        assert least_band(cost) == pytest.approx(0.2)
        cost[dear] = 1.0
        assert least_band(cost) == 1.0

    def test_is_never_more_than_the_band(self):
        for each in (0.9, 1.0):
            assert least_band(np.full((2, 2, 2), each)) == 1.0


def all_paths(num_blocks, num_spans):
    """All ordered disjoint spans, so many of them."""
    each = itertools.combinations_with_replacement(range(num_blocks), 2)
    for path in itertools.combinations([*each], num_spans):
        if all(one[1] < two[0] for one, two in itertools.pairwise(path)):
            yield path


def test_cheapest_path_is_that_of_brute_force():
    rng = np.random.default_rng(4)
    short = left_out = 0
    for _ in range(60):
        cost = rng.normal(0.0, 1.0, (5, 5))
        cost[np.tril_indices(5, -1)] = np.inf
        cost[rng.random((5, 5)) < rng.choice([0.0, 0.4, 0.8])] = np.inf
        if not np.isfinite(cost).any():
            continue
        worth = rng.integers(1, 4, 5).astype(float)
        path, total = spans._cheapest_path(cost, worth, 3)
        ranks = {
            (
                len(p),
                sum(worth[a : b + 1].sum() for a, b in p),
                -sum(cost[a, b] for a, b in p),
            ): p
            for count in (1, 2, 3)
            for p in all_paths(5, count)
            if all(np.isfinite(cost[a, b]) for a, b in p)
        }
        assert path == [*ranks[max(ranks)]]
        covered = sum(worth[a : b + 1].sum() for a, b in path)
        if covered == worth.sum():
            assert total == pytest.approx(sum(cost[a, b] for a, b in path))
        short += len(path) < 3
        left_out += covered < worth.sum()
    assert min(short, left_out) > 3


def test_spans_go_to_the_devices_that_need_least_for_most():
    rng = np.random.default_rng(6)
    unmatched = 0
    for _ in range(60):
        problem = with_changed(
            random_problem(rng, 2, 6), worth=rng.integers(1, 10, 6).astype(float)
        )
        path = [(0, 1), (2, 2), (3, 5)][: rng.integers(1, 4)]
        cost = rng.uniform(0.0, 1.0, (2, 6, 6))
        cost[rng.random(cost.shape) < rng.choice([0.0, 0.5, 0.8])] = np.inf
        found = spans._matched(problem, cost, path)
        assert [(span.first, span.last) for span in found] == sorted(
            (span.first, span.last) for span in found
        )
        ranks = []
        for devices in itertools.permutations([0, 1, None, None, None], len(path)):
            given = [
                (k, a, b)
                for k, (a, b) in zip(devices, path, strict=True)
                if k is not None and cost[k, a, b] < np.inf
            ]
            worth = sum(problem.worth[a : b + 1].sum() for _, a, b in given)
            ranks.append((worth, -sum(cost[span] for span in given)))
        worth = sum(problem.worth[a : b + 1].sum() for _, a, b in found)
        paid = -sum(cost[span] for span in found)
        assert (worth, paid) == pytest.approx(max(ranks))
        unmatched += len(found) < len(path)
    assert unmatched > 10


@pytest.mark.parametrize("snr", [None, np.array([2.0, 3.0])])
@pytest.mark.parametrize("most", [10, 0])
def test_what_is_impossible_may_be_infinite_and_the_rest_take_no_time(
    most, snr, monkeypatch
):
    monkeypatch.setattr(spans, "_MOST_EXACT", most)
    seconds = np.where(np.eye(2, dtype=bool)[None], 0.0, [[[np.inf]]] * 2)
    problem = SpanProblem(
        compute_s=seconds,
        full_band_upload_s=seconds,
        feasible=np.ones((2, 2, 2), bool),
        worth=np.ones(2),
        snr=snr,
    )
    with np.errstate(invalid="raise"):
        found = solve_spans(problem)
    assert [span[1:] for span in found.spans] == [(0, 0), (1, 1)]
    assert found.deadline_s == 0.0


def test_nobody_can_do_anything():
    problem = random_problem(np.random.default_rng(0), 2, 3, possible=0.0)
    assert solve_spans(problem) is None
