"""What a device says of the noise of its gradient, where it is asked and can."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.lengths import pass_tokens
from lola_flwr.wire.packing import GRADIENTS
from lola_flwr.wire.records import SQUARES_TYPE
from tests.device.test_tokens import (
    LENGTHS,
    Widths,
    device_for,
    texts,
    trained,
    without_dropout,
)


def test_a_device_that_is_asked_says_two_squares(roberta):
    model = without_dropout(roberta)
    device = device_for(model, texts())
    usual, told = trained(device, model), trained(device, model, measures_noise=True)
    assert usual.report.few_examples is None
    report = told.report
    assert report.few_examples == math.ceil(len(LENGTHS) / 4)
    assert report.all_examples == len(LENGTHS)
    assert report.few_square > 0
    assert report.all_square > 0
    # The gradient is the same.
    usual, told = usual.arrays[GRADIENTS], told.arrays[GRADIENTS]
    assert abs(told - usual).max() <= 1e-5 * abs(usual).max()


def test_of_several_blocks_it_says_those_of_each(roberta):
    model = without_dropout(roberta)
    device = device_for(model, texts())
    both = {"block_index": 0, "further_blocks": "1"}
    several = trained(device, model, measures_noise=True, **both).report
    alone = trained(device, model, measures_noise=True).report
    further = np.frombuffer(several.further_squares, SQUARES_TYPE)
    # The groups are drawn alike.
    assert further == pytest.approx([alone.few_square, alone.all_square], rel=1e-3)
    assert alone.further_squares is None


def test_a_device_without_memory_for_two_sums_of_gradients_says_none(roberta):
    shapes = {name: tuple(p.shape) for name, p in roberta.named_parameters()}
    costs = estimate_costs(
        shapes, model_partition(roberta), batch_size=len(LENGTHS), sequence_length=36
    )
    large = replace(costs.step, update_bytes=costs.step.update_bytes + 1e12)
    costs = replace(costs, step=large)
    device = device_for(roberta, texts(), costs=lambda: costs)
    report = trained(device, roberta, measures_noise=True).report
    assert report.few_examples is None
    assert report.all_square is None


def test_what_groups_compute_more_is_counted(roberta):
    model, loss = without_dropout(roberta), Widths()
    width = max(LENGTHS)
    device = device_for(model, texts(), loss_function=loss, sequence_length=2 * width)
    trained(device, model)  # tries padding
    taken = {}
    for asked in (False, True):
        loss.seen = []
        update = trained(device, model, measures_noise=asked or None)
        computed = sum(loss.seen) / (2 * width * len(LENGTHS))
        taken[asked] = update.report.compute_s, computed, len(loss.seen)
    a_pass = pass_tokens(model, model_partition(model)) / (2 * width * len(LENGTHS))
    for compute_s, computed, passes in taken.values():
        assert compute_s == pytest.approx(computed + (passes - 1) * a_pass)
    # Not tokens, which differ little: passes.
    assert taken[True][2] > taken[False][2]
    assert taken[True][0] > taken[False][0]


@pytest.mark.slow
def test_forward_passes_alone_say_nothing_of_noise(roberta):
    asked = {
        "direction_seed": 3,
        "num_directions": 2,
        "perturbation": 1e-2,
        "smallest_share": 1.0,
    }
    device = device_for(roberta, texts())
    report = trained(device, roberta, measures_noise=True, **asked).report
    assert report.few_examples is None
