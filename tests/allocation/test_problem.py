import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

from lola_flwr.allocation import (
    AllocationProblem,
    PowerLimitedUplink,
    RoundMode,
)

ONES = np.ones((3, 2))


class TestAllocationProblem:
    def test_copies_and_freezes_its_arrays(self):
        compute_s = ONES.copy()
        problem = AllocationProblem(compute_s, [[1, 2]] * 3)
        compute_s[0, 0] = 99
        assert problem.compute_s[0, 0] == 1
        assert problem.full_band_upload_s.dtype == np.float64
        with pytest.raises(ValueError, match="read-only"):
            problem.compute_s[0, 0] = 2

    def test_derived_problems_share_the_frozen_arrays(self):
        problem = AllocationProblem(ONES, ONES)
        changed = replace(problem, mode=RoundMode(blocks=[1]))
        assert changed.compute_s is problem.compute_s

    def test_a_view_of_writable_memory_is_copied(self):
        base = ONES.copy()
        view = base[:]
        view.setflags(write=False)
        problem = AllocationProblem(view, ONES)
        base[0, 0] = 99
        assert problem.compute_s[0, 0] == 1

    def test_impossible_pairs_are_stored_as_infeasible(self):
        compute_s, upload_s = ONES.copy(), ONES.copy()
        compute_s[0, 0], upload_s[1, 1] = np.inf, 1e200
        problem = AllocationProblem(
            compute_s, upload_s, power_limited=PowerLimitedUplink([1.0, 1.0, 0.0])
        )
        assert problem.feasible.tolist() == [[0, 1], [1, 0], [0, 0]]

    def test_pairs_at_the_border_are_impossible_those_below_it_are_not(self):
        nearly = np.nextafter(1e100, 0)
        problem = AllocationProblem(
            [[1e100, nearly], [1, 0]], [[1, 1], [1e100, nearly]], constant_s=nearly
        )
        assert problem.feasible.tolist() == [[False, True], [False, True]]
        with pytest.raises(ValueError, match="read-only"):
            problem.feasible[0, 0] = True

    def test_what_explains_infeasibility_is_kept(self):
        memory_bytes, required = np.array([1, 2, 3]), [4, 0.0]
        problem = AllocationProblem(
            ONES,
            ONES,
            memory_bytes=memory_bytes,
            required_memory_bytes=required,
            device_names=["a", "b", "c"],
        )
        memory_bytes[:] = 9
        assert problem.memory_bytes.tolist() == [1.0, 2.0, 3.0]
        assert problem.required_memory_bytes.tolist() == [4.0, 0.0]
        assert [problem.name_of(device) for device in (0, 2)] == ["a", "c"]
        assert AllocationProblem(ONES, ONES).name_of(2) == "2"
        with pytest.raises(ValueError, match="read-only"):
            problem.memory_bytes[0] = 9

    def test_devices_have_an_snr_where_their_power_is_limited(self):
        problem = AllocationProblem(
            ONES, ONES, power_limited=PowerLimitedUplink([1.0, 5.0, 3.0])
        )
        assert problem.snr_of(np.array([2, 0])).tolist() == [3.0, 1.0]
        assert AllocationProblem(ONES, ONES).snr_of(np.array([2, 0])) is None

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (([1.0, 2.0], ONES), r"compute_s must be \(K devices, N blocks\)"),
            ((np.ones((0, 2)), np.ones((0, 2))), "at least one of each"),
            ((ONES, np.ones((2, 3))), r"full_band_upload_s is \(2, 3\)"),
            ((ONES, ONES, np.ones((2, 2), bool)), r"feasible is \(2, 2\)"),
            ((ONES, ONES, np.ones((3, 2))), "feasible must be boolean"),
            (([[1.0, np.nan]], [[1.0, 1.0]]), r"compute_s\[0, 1\]=nan"),
            (([[1.0, 1.0]], [[-2.0, 1.0]]), r"full_band_upload_s\[0, 0\]=-2.0"),
            (([[0.0, 0.5], [0.0, -1e-300]], ONES[:2]), r"s\[1, 1\]=-1e-300"),
        ],
    )
    def test_bad_arrays_are_named(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AllocationProblem(*arguments)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"memory_bytes": [1.0]}, r"memory_bytes is \(1,\) but must be \(3,\) "),
            ({"device_names": ["a", "b"]}, "2 device_names for 3 devices"),
            ({"required_memory_bytes": [1.0, -1.0]}, r"required_memory_bytes\[1\]"),
            ({"constant_s": -1.0}, "constant_s"),
            ({"constant_s": float("nan")}, "constant_s"),
            ({"constant_s": 1e100}, "constant_s"),
            ({"power_limited": PowerLimitedUplink([1.0])}, "mismatch: power_limited.s"),
            ({"mode": RoundMode(blocks=[2])}, "blocks names 2"),
            ({"mode": RoundMode(devices_per_block=[1, 1, 1])}, "has 3 counts"),
            (
                {"mode": RoundMode(blocks=[0], devices_per_block=[0, 1])},
                "Nothing to train",
            ),
        ],
    )
    def test_bad_fields_are_named(self, fields, message):
        with pytest.raises(ValueError, match=message):
            AllocationProblem(ONES, ONES, **fields)

    def test_importing_pulls_in_no_framework(self):
        code = (
            "import sys, lola_flwr.allocation; "
            "print([m for m in sys.modules if m in "
            "('torch', 'flwr', 'transformers', 'scipy.optimize', 'scipy.sparse')])"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"


class TestRoundMode:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"blocks": []}, "at least one block"),
            ({"blocks": [1, 1]}, "none twice"),
            ({"devices_per_block": 0}, "devices_per_block"),
            ({"devices_per_block": [1, -1]}, "devices_per_block"),
            ({"devices_per_block": [0, 0]}, "devices_per_block"),
            ({"devices_per_block": []}, "devices_per_block must be counts"),
            ({"participation": "some"}, "'some'; use one of needed, all"),
            ({"backups": -1}, "backups"),
            ({"backups": 1, "participation": "all"}, "there are none"),
        ],
    )
    def test_bad_fields_are_named(self, fields, message):
        with pytest.raises(ValueError, match=message):
            RoundMode(**fields)

    def test_demand(self):
        def demand(**fields):
            return AllocationProblem(ONES, ONES, mode=RoundMode(**fields)).demand

        assert demand().tolist() == [1, 1]
        assert demand().dtype == np.int64
        assert demand(blocks=np.array([1])).tolist() == [0, 1]
        assert demand(devices_per_block=3).tolist() == [3, 3]
        assert demand(blocks=[0], devices_per_block=(2, 1)).tolist() == [2, 0]

    def test_sequences_become_tuples_of_int(self):
        mode = RoundMode(np.array([2, 0]), np.array([0, 1, 3]))
        assert mode == RoundMode((2, 0), (0, 1, 3))
        assert hash(mode) == hash(RoundMode((2, 0), (0, 1, 3)))
        assert RoundMode([1]).blocks == (1,)

    def test_backups_or_everybody(self):
        assert RoundMode(backups=2).backups == 2
        assert RoundMode(participation="all").participation == "all"
