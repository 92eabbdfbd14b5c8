"""Mini-batches by what training has shown: what is kept, and what is drawn by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from lola_flwr.device.loss_history import HistoryBatches, SeenLosses, draw_chances
from lola_flwr.device.sampler_options import History
from lola_flwr.errors import UserError
from lola_flwr.model.example_losses import EXAMPLE_ROWS, EXAMPLE_WEIGHTS
from lola_flwr.wire.packing import GRADIENTS
from tests.device.test_tokens import (
    LENGTHS,
    device_for,
    texts,
    trained,
    without_dropout,
)


def source_of(batch, store, **changes):
    settings = {
        "num_examples": len(batch["labels"]),
        "examples": lambda rows: {n: t[rows] for n, t in batch.items()},
        "store": store,
        "device": "a/b",
        "rule": History(),
    }
    return HistoryBatches(**{**settings, **changes})


def test_what_is_seen_is_mean_and_deviation(rng):
    looks = [(rng.permutation(5)[:3], rng.exponential(size=3)) for _ in range(9)]
    seen = SeenLosses.none_of(6)
    by_row = {row: [] for row in range(6)}
    for rows, losses in looks:
        seen = seen.also(rows, losses)
        for row, loss in zip(rows, losses, strict=True):
            by_row[row].append(loss)
    known = [row for row, losses in by_row.items() if losses]
    worth = seen.worth("loss")
    np.testing.assert_allclose(worth[known], [np.mean(by_row[r]) for r in known])
    assert worth[5] == pytest.approx(worth[known].mean()), "never seen"
    known = [row for row, losses in by_row.items() if len(losses) > 1]
    worth = seen.worth("variability")
    deviations = [np.std(np.exp(-np.array(by_row[row]))) for row in known]
    np.testing.assert_allclose(worth[known], deviations)


def test_one_that_was_drawn_twice_counts_twice():
    seen = SeenLosses.none_of(3).also(np.array([1, 1]), np.array([0.5, 1.5]))
    assert seen.sums[0].tolist() == [0, 2, 0]
    assert seen.worth("loss")[1] == 1.0


@pytest.mark.parametrize("measure", ["variability", "loss"])
def test_where_nothing_is_known_all_are_alike(measure):
    rule = History(measure=measure)
    assert (draw_chances(SeenLosses.none_of(8), rule) == 1 / 8).all()


def test_ambiguous_examples_are_drawn_more_often_and_none_never():
    seen = SeenLosses.none_of(4)
    for losses in ([0.1, 3.0, 0.1, 1.0], [2.5, 3.0, 0.1, 1.5]):
        seen = seen.also(np.arange(4), np.array(losses))
    chances = draw_chances(seen, History(uniform=0.2))
    assert chances.sum() == pytest.approx(1)
    assert chances.argmax() == 0
    assert chances.min() == pytest.approx(0.2 / 4), "learned, or never learned"
    by_loss = draw_chances(seen, History(measure="loss", uniform=0.2))
    assert by_loss.argmax() == 1
    assert (draw_chances(seen, History(uniform=1.0)) == 0.25).all()


def test_weights_leave_the_mean_where_it_is(tmp_path, rng):
    """Over all that may be drawn, weight times chance is that of a uniform draw."""
    batch = {"labels": torch.arange(40)}
    source = source_of(batch, tmp_path, rule=History(measure="loss", weighted=True))
    values = rng.normal(size=40)
    source._keep(SeenLosses.none_of(40).also(np.arange(40), rng.exponential(size=40)))
    chances = draw_chances(source.seen(), source.rule)
    assert chances.max() > 2 * chances.min()
    sums = []
    for number in range(400):
        drawn = source(number, 20)
        rows, weights = drawn[EXAMPLE_ROWS].numpy(), drawn[EXAMPLE_WEIGHTS].numpy()
        np.testing.assert_allclose(weights * chances[rows], 1 / 40, rtol=1e-5)
        sums.append((weights * values[rows]).mean())
    error = np.std(sums) / np.sqrt(len(sums))
    assert abs(np.mean(sums) - values.mean()) < 4 * error


def test_without_weights_no_example_is_drawn_twice(tmp_path):
    batch = {"labels": torch.arange(9)}
    drawn = source_of(batch, tmp_path)(1, 20)
    assert sorted(drawn["labels"].tolist()) == list(range(9))
    assert drawn[EXAMPLE_WEIGHTS].tolist() == [1.0] * 9
    assert drawn["labels"].tolist() == drawn[EXAMPLE_ROWS].tolist()


def test_a_device_trains_as_ever_and_keeps_what_it_sees(roberta, tmp_path):
    model = without_dropout(roberta)
    batch = texts()
    plain = trained(device_for(model, batch), model)
    followed = source_of(batch, tmp_path).on(device_for(model, batch))
    update = trained(followed, model)
    assert update.num_examples == len(LENGTHS)
    # All examples, in another order: the gradient is the same.
    difference = abs(update.arrays[GRADIENTS] - plain.arrays[GRADIENTS])
    assert difference.max() <= 1e-4 * abs(plain.arrays[GRADIENTS]).max()
    # Another process finds it. The trials of a step are no part of it.
    seen = source_of(batch, tmp_path).seen()
    assert (seen.sums[0] == 1).all()
    assert seen.sums[1].mean() == pytest.approx(update.report.loss, rel=1e-5)
    others = source_of(batch, tmp_path, device="another")
    assert not others.seen().sums.any()


def test_what_does_not_fit_is_refused_and_damage_forgotten(roberta, tmp_path):
    batch = texts()
    source = source_of(batch, tmp_path)
    device = device_for(roberta, batch)
    with pytest.raises(UserError, match="leave loss_function out"):
        source.on(replace(device, loss_function=lambda model, batch: model(**batch)[0]))
    with pytest.raises(UserError, match="leave batch_weight out"):
        source.on(replace(device, batch_weight=lambda batch: 7))
    source._keep(SeenLosses.none_of(len(LENGTHS)).also(np.array([0]), np.ones(1)))
    with pytest.raises(UserError, match=r"of \d+ examples, but a/b has 3; remove it"):
        source_of(batch, tmp_path, num_examples=3).seen()
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"half a file")
    assert not source.seen().sums.any()
