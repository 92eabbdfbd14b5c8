from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import (
    Allocation,
    AllocationProblem,
    PowerLimitedUplink,
    RoundMode,
    allocate,
)

ONES = np.ones((3, 2))


def allocation(block_of_device, share, **fields):
    return Allocation(
        **{
            "block_of_device": block_of_device,
            "share": share,
            "num_blocks": 2,
            "round_s": 3.0,
            **fields,
        }
    )


class TestArrays:
    def test_they_are_copied_and_frozen(self):
        blocks, share = np.array([1, -1], np.int32), np.array([0.5, 0.0], np.float32)
        made = Allocation(block_of_device=blocks, share=share, num_blocks=2, round_s=1)
        blocks[:], share[:] = 0, 9
        assert made.block_of_device.tolist() == [1, -1]
        assert made.share.tolist() == [0.5, 0.0]
        assert made.block_of_device.dtype == np.int64
        assert made.share.dtype == np.float64
        for array in (made.block_of_device, made.share):
            with pytest.raises(ValueError, match="read-only"):
                array[0] = 0

    def test_an_array_of_the_caller_stays_the_caller_s(self):
        share = np.array([1.0])
        made = Allocation(block_of_device=[0], share=share, num_blocks=1, round_s=1)
        share[0] = 9
        assert made.share.tolist() == [1.0]

    def test_frozen_ones_are_shared(self):
        made = replace(TestAllocation.good, round_s=4.0)
        assert np.shares_memory(made.share, TestAllocation.good.share)

    def test_the_defaults_promise_nothing(self):
        good = TestAllocation.good
        assert np.isnan(good.bound_s)
        assert (good.iterations, good.stop_reason) == (0, "heuristic")


class TestAllocation:
    # Device 0 on block 1 and device 2 on block 0, half of the band each: 1 + 1 / 0.5 s.
    good = allocation([1, -1, 0], [0.5, 0.0, 0.5])

    def test_device_of_block_is_the_lowest_device(self):
        assert self.good.device_of_block.tolist() == [2, 0]
        assert allocation([1, 1, 1], [0.3] * 3).device_of_block.tolist() == [-1, 0]

    def test_gap(self):
        assert replace(self.good, bound_s=2.0).gap == pytest.approx(0.5)
        assert replace(self.good, bound_s=3.0).gap == 0.0
        assert replace(self.good, bound_s=0.0).gap == np.inf
        assert np.isnan(self.good.gap)

    def test_upload_time_is_zero_when_idle(self):
        problem = AllocationProblem(ONES, ONES)
        assert self.good.upload_s(problem).tolist() == [2.0, 0.0, 2.0]

    def test_a_good_one_passes(self):
        self.good.check(AllocationProblem(ONES, ONES))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"block_of_device": [1, 0]}, "Shape mismatch"),
            ({"num_blocks": 3}, "Shape mismatch"),
            ({"block_of_device": [1, -1, 2]}, "device 2 has block 2"),
            ({"block_of_device": [1, -1, -2]}, "device 2 has block -2"),
            ({"block_of_device": [1, -1, 1]}, "Block 0 has 0 devices but needs 1"),
            ({"block_of_device": [0, -1, 0]}, "Block 1 has 0 devices but needs 1"),
            ({"block_of_device": [1, 0, 0]}, "1 devices more than the blocks need"),
            ({"share": [0.5, 0.0, 0.6]}, "sum to at most 1"),
            ({"share": [1.5, 0.0, -0.5]}, "sum to at most 1"),
            ({"share": [np.nan, 0.0, 0.5]}, "sum to at most 1"),
            ({"share": [0.4, 0.1, 0.5]}, r"share\[1\]=0.1"),
            ({"share": [0.4, 0.0, 0.5]}, "device 0 on block 1 ends the round at 3.5"),
            ({"round_s": 2.9}, "Latency is wrong"),
            ({"bound_s": 3.1}, "Bound is wrong"),
        ],
    )
    def test_every_violation_is_named(self, changes, message):
        with pytest.raises(ValueError, match=message):
            replace(self.good, **changes).check(AllocationProblem(ONES, ONES))

    def test_memory_violation_is_named(self):
        feasible = np.array([[True, True], [True, True], [False, True]])
        with pytest.raises(ValueError, match="Device 2 cannot compute block 0"):
            self.good.check(AllocationProblem(ONES, ONES, feasible))

    def test_idle_device_is_named_when_all_take_part(self):
        mode = RoundMode(participation="all")
        with pytest.raises(ValueError, match="Device 1 is idle"):
            self.good.check(AllocationProblem(ONES, ONES, mode=mode))

    def test_block_left_out_must_stay_out(self):
        problem = AllocationProblem(ONES, ONES, mode=RoundMode(blocks=[1]))
        with pytest.raises(ValueError, match="Block 0 has 1 devices but needs 0"):
            self.good.check(problem)
        allocate(problem).check(problem)

    @pytest.mark.parametrize(
        ("changes", "small", "large"),
        [
            # Relative tolerance of 1e-9: a little less and a little more than it.
            ("round_s", 3.0 * (1 + 9e-10), 3.0 * (1 + 1.1e-9)),
            ("round_s", 3.0 * (1 - 9e-10), 3.0 * (1 - 1.1e-9)),
            ("bound_s", 3.0 * (1 + 9e-10), 3.0 * (1 + 1.1e-9)),
        ],
    )
    def test_rounding_is_tolerated_and_no_more(self, changes, small, large):
        problem = AllocationProblem(ONES, ONES)
        replace(self.good, **{changes: small}).check(problem)
        wrong = replace(self.good, **{changes: large})
        with pytest.raises(ValueError, match="is wrong"):
            wrong.check(problem)
        wrong.check(problem, rel_tol=2e-9)

    def test_shares_may_exceed_the_band_by_rounding(self):
        problem = AllocationProblem(ONES, ONES)
        for excess, fits in ((9e-10, True), (1.1e-9, False)):
            share = 0.5 * (1 + excess)
            made = allocation([1, -1, 0], [share, 0.0, share], round_s=1 + 1 / share)
            if fits:
                made.check(problem)
            else:
                with pytest.raises(ValueError, match="sum to at most 1"):
                    made.check(problem)

    def test_without_tolerance_what_is_exact_passes(self):
        problem = AllocationProblem(ONES, ONES)
        replace(self.good, bound_s=3.0).check(problem, rel_tol=0.0)

    def test_the_first_offender_is_named(self):
        problem = AllocationProblem(np.ones((5, 2)), np.ones((5, 2)))
        for blocks, message in (
            ([-3, 0, 7, 1, -1], "device 0 has block -3 of 2"),
            ([1, 0, 7, 2, -1], "device 2 has block 7 of 2"),
        ):
            made = allocation(blocks, [0.2] * 5)
            with pytest.raises(ValueError, match=message):
                made.check(problem)
        feasible = np.ones((5, 2), dtype=bool)
        feasible[3, 1] = feasible[4, 0] = False
        impossible = AllocationProblem(np.ones((5, 2)), np.ones((5, 2)), feasible)
        with pytest.raises(ValueError, match="Device 3 cannot compute block 1"):
            allocation([-1, -1, -1, 1, 0], [0, 0, 0, 0.5, 0.5]).check(impossible)
        with pytest.raises(ValueError, match=r"share\[2\]=0.1"):
            allocation([0, 1, -1, -1, -1], [0.4, 0.4, 0.1, 0.1, 0]).check(problem)

    def test_as_many_devices_as_are_needed_and_as_backups_allow(self):
        ones = np.ones((5, 2))
        for mode, blocks, message in (
            (RoundMode(devices_per_block=[2, 1]), [0, 0, 1, -1, -1], None),
            (RoundMode(devices_per_block=[2, 1]), [0, 1, -1, -1, -1], "Block 0 has 1"),
            (RoundMode(backups=1), [0, 0, 1, -1, -1], None),
            (RoundMode(backups=2), [0, 0, 1, 0, -1], None),
            (RoundMode(backups=1), [0, 0, 1, 1, -1], "2 devices more .* backups=1"),
            (RoundMode(), [0, 0, 1, -1, -1], "1 devices more .* backups=0"),
            (RoundMode(participation="all"), [0, 0, 1, 1, 1], None),
            (RoundMode(participation="all"), [0, 0, 1, 1, -1], "Device 4 is idle"),
            (RoundMode(participation="all"), [0, -1, 1, -1, 1], "Device 1 is idle"),
            (RoundMode(blocks=[0]), [0, -1, -1, -1, 1], "Block 1 has 1 .* needs 0"),
        ):
            active = np.array(blocks) >= 0
            share = active / active.sum()
            made = allocation(blocks, share, round_s=1.0 + active.sum())
            problem = AllocationProblem(ones, ones, mode=mode)
            if message is None:
                made.check(problem)
            else:
                with pytest.raises(ValueError, match=message):
                    made.check(problem)

    def test_upload_times_are_those_of_power_limited_devices_too(self):
        snr = np.array([3.0, 1.0, 8.0])
        problem = AllocationProblem(
            ONES, 2 * ONES, power_limited=PowerLimitedUplink(snr), constant_s=0.5
        )
        # Half of the band at twice the SNR.
        rate = 0.5 * np.log(1 + 2 * snr) / np.log(1 + snr)
        expected = 2 / rate
        expected[1] = 0.0
        assert self.good.upload_s(problem) == pytest.approx(expected)
        replace(self.good, round_s=0.5 + 1 + expected.max()).check(problem)
