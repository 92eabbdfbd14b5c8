from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import Allocation, AllocationProblem, RoundMode, allocate

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
