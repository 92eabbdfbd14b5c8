from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.costs.memory import Affine, Levers, Recomputation, StepMemory
from lola_flwr.system.devices import DeviceProfile


def step_memory(batch_size=8):
    return StepMemory(
        batch_size=batch_size,
        micro_batch_size=batch_size,
        sequence_length=16,
        layer_bytes=np.array([1e6, 1e6, 2e6]),
        rest_bytes=3e6,
        head_bytes=1e5,
        update_bytes=np.array([1.1e6, 1.1e6, 2.1e6]),
        array_bytes=np.array([3e5, 3e5, 6e5]),
        whole_bytes=np.array([1.1e6, 1.1e6, 2.1e6])
        + batch_size * np.array([7e5, 5e5, 3e5]),
        pass_bytes=Affine(np.zeros(3), np.array([7e5, 5e5, 3e5])),
        working_bytes=Affine(0.0, 1e5),
        recomputation=lambda: Recomputation(
            further_flops=np.array([3e9, 2e9, 1e9]),
            whole_bytes=np.array([1.1e6, 1.1e6, 2.1e6]) + batch_size * 2.5e5,
            pass_bytes=Affine(np.zeros(3), np.full(3, 2.5e5)),
        ),
    )


def profile(memory_bytes, splits=False, streams=False, recomputes=False):
    return DeviceProfile(
        name="a",
        flops_per_s=1e9,
        memory_bytes=memory_bytes,
        splits_batch=splits,
        streams_prefix=streams,
        recomputes_suffix=recomputes,
    )


def test_parts_add_up():
    step = step_memory()
    weights = 7.1e6
    np.testing.assert_allclose(
        step.peak_bytes(Levers(8)),
        [weights + 1.1e6 + 8 * 7e5, weights + 1.1e6 + 8 * 5e5, weights + 2.1e6 + 24e5],
    )
    # Of several micro-batches the largest array is there twice while it is added up.
    np.testing.assert_allclose(step.peak_bytes(Levers(2))[0], weights + 1.4e6 + 2 * 7e5)
    # Above the block, and the step itself or what comes before it: the sum of gradients
    # so far, if any, a layer and the rows of embeddings.
    streamed = step.peak_bytes(Levers(8, stream_prefix=True))
    rows = 3e6 * (1 - np.exp(-8 * 16 * 65536 / 3e6))
    np.testing.assert_allclose(
        streamed[:2], [4.1e6 + 6.7e6, 3.1e6 + 2e6 + rows + 8 * 1e5]
    )
    touched = 3e6 * (1 - np.exp(-16 * 65536 / 3e6))
    np.testing.assert_allclose(
        step.peak_bytes(Levers(1, stream_prefix=True))[2],
        2.1e6 + 2.1e6 + 2e6 + touched + 1e5,
    )


def test_the_fastest_that_fits_is_chosen():
    step = step_memory()
    assert step.choose(profile(20e6, True, True)) == [Levers(8)] * 3
    assert step.choose(profile(11e6, True, True))[0] == Levers(8, stream_prefix=True)
    assert step.choose(profile(9e6, True, True))[0] == Levers(2, stream_prefix=True)
    assert step.choose(profile(10e6, splits=True))[0] == Levers(2)
    assert step.choose(profile(10.8e6, streams=True))[0] == Levers(8, True)
    # Without a way to fit it does what needs least.
    assert step.choose(profile(1e5, True, True))[0] == Levers(1, True)
    assert step.choose(profile(1e5)) == [Levers(8)] * 3


def test_a_batch_is_cut_by_length_where_half_of_it_fits_beside_the_sum():
    step = step_memory(batch_size=2)
    # The whole batch takes 9.8 MB, half of it and the sum of gradients 10.1 MB.
    tight, roomy = profile(9.9e6), profile(10.2e6)
    assert not step.holds_parts(Levers(2), tight, 2)
    assert step.holds_parts(Levers(2), roomy, 2)
    assert step.holds_parts(Levers(2), tight, 0)  # where half takes less
    assert step.holds_parts(Levers(1), profile(1e6), 2)  # it is cut anyway


def test_noise_is_told_where_two_sums_of_gradients_fit_beside_a_quarter():
    step = step_memory()
    quarter = step.peak_bytes(Levers(2)) + step.update_bytes
    whole = step.peak_bytes(Levers(8))
    assert (quarter < whole).any()
    for block in range(3):
        least = max(quarter[block], 1.0)
        assert step.holds_groups(Levers(8), profile(least), block)
        tight = profile(least - 1)
        assert step.holds_groups(Levers(8), tight, block) == (quarter <= whole)[block]
        # Where it computes less than a quarter at a time, that is what takes memory.
        one = step.peak_bytes(Levers(1))[block] + step.update_bytes[block]
        assert step.holds_groups(Levers(1), profile(one), block)
        assert not step.holds_groups(Levers(1), profile(one - 1), block)


def test_layers_run_twice_where_nothing_else_helps():
    step = step_memory()
    twice = Levers(8, recompute_suffix=True)
    np.testing.assert_allclose(step.peak_bytes(twice)[0], 7.1e6 + 1.1e6 + 8 * 2.5e5)
    devices = [
        profile(20e6, recomputes=True),
        profile(10.5e6, recomputes=True),
        profile(10.5e6, splits=True, recomputes=True),
        profile(8.8e6, splits=True, recomputes=True),
    ]
    # Several micro-batches have the largest array twice.
    assert [step.choose(device)[0] for device in devices] == [
        Levers(8),
        twice,
        Levers(2),
        Levers(1, recompute_suffix=True),
    ]
    further = step.further_flops(devices)
    np.testing.assert_array_equal(further[:, 0], [0, 3e9, 0, 3e9])
    # Block 1 keeps less.
    np.testing.assert_array_equal(further[:, 1], [0, 2e9, 0, 2e9])


def test_what_running_twice_takes_is_counted_only_where_that_is_needed():
    def unasked():
        raise AssertionError("counted")

    step = replace(step_memory(), recomputation=unasked)
    for device in (profile(20e6, recomputes=True), profile(1e5, True, True)):
        step.choose(device)
        assert not step.further_flops([device]).any()
    # A model whose layers cannot run twice.
    step = replace(step, recomputation=lambda: None)
    assert step.choose(profile(1e5, recomputes=True)) == [Levers(8)] * 3
    assert not step.further_flops([profile(1e5, recomputes=True)]).any()


@given(
    st.lists(
        st.tuples(st.floats(1e5, 2e7), *(st.booleans() for _ in range(3))),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 9),
)
def test_the_server_expects_what_the_devices_choose(fleet, batch_size):
    step = step_memory(batch_size)
    profiles = [profile(*device) for device in fleet]
    required = step.required_bytes(profiles)
    further = step.further_flops(profiles)
    for row, device, flops in zip(required, profiles, further, strict=True):
        for block, levers in enumerate(step.choose(device)):
            assert row[block] == step.peak_bytes(levers)[block]
            assert (flops[block] > 0) == levers.recompute_suffix
            # By brute force: if anything fits, what is chosen does.
            sizes = range(1, batch_size + 1) if device.splits_batch else [batch_size]
            ways = (False, True) if device.streams_prefix else (False,)
            once = [step.peak_bytes(Levers(s, w))[block] for s in sizes for w in ways]
            twice = [
                step.peak_bytes(Levers(s, w, recompute_suffix=True))[block]
                for s in sizes
                for w in ways
                if device.recomputes_suffix
            ]
            peak = min(once + twice)
            assert row[block] <= device.memory_bytes or row[block] == peak
            # And nothing is computed twice that need not be.
            assert not flops[block] or min(once) > device.memory_bytes


@given(st.lists(st.tuples(st.floats(0, 1e9), st.floats(0, 1e9)), min_size=1), st.data())
def test_a_peak_is_at_most_what_lies_between_its_ends(lines, data):
    """Each moment's bytes are affine in the sequences; the peak is their maximum."""
    most = data.draw(st.integers(1, 64))

    def peak(size):
        return max(fixed + size * each for fixed, each in lines)

    between = Affine.through(peak(1), peak(most), most)
    assert between.of(1) == pytest.approx(peak(1))
    assert between.of(most) == pytest.approx(peak(most))
    size = data.draw(st.integers(1, most))
    assert between.of(size) >= peak(size) * (1 - 1e-9) - 1e-6
