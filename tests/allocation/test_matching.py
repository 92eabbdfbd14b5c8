from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from lola_flwr.allocation import matching


@pytest.fixture
def costs(rng):
    return rng.uniform(size=(9, 5))


@pytest.mark.parametrize("found", [True, False])
def test_the_solver_is_scipys_own(costs, monkeypatch, found):
    """Alone, and where SciPy keeps it elsewhere."""
    if found:
        monkeypatch.delitem(sys.modules, "scipy.optimize")
    else:
        monkeypatch.setattr(matching.PathFinder, "find_spec", lambda *_: None)
    solver = matching._solver.__wrapped__()
    assert (solver is linear_sum_assignment) == (not found)
    for own, expected in zip(solver(costs), linear_sum_assignment(costs), strict=True):
        np.testing.assert_array_equal(own, expected)
    with pytest.raises(ValueError, match="infeasible"):
        solver(np.full((2, 2), np.inf))


def test_an_allocation_loads_little_of_scipy():
    program = (
        "import sys, numpy as np\n"
        "from lola_flwr.allocation import AllocationProblem, allocate\n"
        "problem = AllocationProblem(np.ones((3, 2)), np.ones((3, 2)))\n"
        "assert allocate(problem).round_s > 1\n"
        "sys.exit('scipy.optimize' in sys.modules or 'scipy.sparse' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
