"""Spans of blocks: against brute force over all cuts and all matchings."""

import itertools

import numpy as np
import pytest
from allocation_oracle import least_share

from lola_flwr.allocation import spans
from lola_flwr.allocation.spans import SpanProblem, solve_spans


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
        ("seed", "count"), [(0, 20), pytest.param(1, 300, marks=pytest.mark.slow)]
    )
    def test_fewer_devices_than_blocks(self, seed, count):
        rng = np.random.default_rng(seed)
        outcomes = []
        for _ in range(count):
            num_blocks = int(rng.integers(2, 6))
            num_devices = int(rng.integers(1, min(num_blocks, 4)))
            possible = rng.choice([0.15, 0.6, 1.0])
            power = bool(rng.random() < 0.2)
            outcomes.append(
                check(
                    random_problem(
                        rng, num_devices, num_blocks, possible=possible, power=power
                    )
                )
            )
        some, whole = map(sum, zip(*outcomes, strict=True))
        assert count >= some > whole >= count / 3


@pytest.mark.parametrize("possible", [1.0, 0.8])
def test_prices_find_what_subsets_find_and_bound_it(possible, monkeypatch):
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
        assert (
            best.deadline_s * (1 - 1e-9) <= found.deadline_s <= 1.02 * best.deadline_s
        )
        assert 0.9 * best.deadline_s < found.bound_s <= best.deadline_s * (1 + 1e-9)


def test_prices_leave_out_what_nobody_can_hold(monkeypatch):
    monkeypatch.setattr(spans, "_MOST_EXACT", 0)
    problem = random_problem(np.random.default_rng(1), 3, 6, possible=1.0)
    problem.feasible[:, 2, :] = False
    problem.feasible[:, :3, 2:] = False
    problem = SpanProblem(
        compute_s=problem.compute_s,
        full_band_upload_s=problem.full_band_upload_s,
        feasible=problem.feasible,
        worth=problem.worth,
    )
    found = solve_spans(problem)
    assert [n for span in found.spans for n in span.blocks] == [0, 1, 3, 4, 5]
    assert not found.is_whole
    assert found.bound_s == 0.0  # nothing is proven


def test_nobody_can_do_anything():
    problem = random_problem(np.random.default_rng(0), 2, 3, possible=0.0)
    assert solve_spans(problem) is None
