"""How memory and open files of a testbed's programs grow over the rounds of a run."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

from lola_flwr.arrays import Float64Array
from simulations.testbed.federation import Federation

_SAMPLE_S = 1.0
# Of a program's memory the first rounds tell nothing: it has yet to see every path.
_FIRST_ROUNDS, _FEWEST_ROUNDS = 20, 40

# A round's number, bytes of memory, open files.
Sample = tuple[int, float, int]


@dataclass(frozen=True)
class Growth:
    """How much more of everything a program has with time, and with what befalls it.

    Parameters
    ----------
    bytes_a_round, files_a_round
        Median slope of all pairs of samples between which nothing befell it.
    bytes_by_faults
        What it has grown by, in all, from before to after what befell it.
    num_rounds
        Rounds that the slopes are of.
    """

    bytes_a_round: float
    files_a_round: float
    bytes_by_faults: float
    num_rounds: int


def growth(samples: Sequence[Sample], faults: Sequence[range] = ()) -> Growth | None:
    """Tell a program's growth with time from its growth by what befell it.

    A node that is killed has its worker load the model anew, which takes more memory
    once. That is no slope, however often it happens in a short time; but who would
    grow at every load shows in ``bytes_by_faults``.

    Parameters
    ----------
    samples
        Of one process, by time.
    faults
        Rounds of each fault that struck it, until all is as it was.

    Returns
    -------
    None where less than 40 rounds are left to judge by.
    """
    rounds, memory, files = np.array(samples, dtype=float).reshape(-1, 3).T
    counts = rounds >= rounds[:1].sum() + _FIRST_ROUNDS
    for fault in faults:
        counts &= (rounds < fault.start) | (rounds >= fault.stop)
    rounds, memory, files = rounds[counts], memory[counts], files[counts]
    begins = np.sort([fault.start for fault in faults])
    stretch = np.searchsorted(begins, rounds, side="right")  # faults before each
    last = np.flatnonzero(np.diff(stretch))  # of each stretch but the last one
    between = float((rounds[last + 1] - rounds[last]).sum())
    num_rounds = int(np.ptp(rounds) - between) if rounds.size else 0
    if num_rounds < _FEWEST_ROUNDS:
        return None
    return Growth(
        _median_slope(rounds, memory, stretch),
        _median_slope(rounds, files, stretch),
        float((memory[last + 1] - memory[last]).sum()),
        num_rounds,
    )


def _median_slope(
    x: Float64Array, y: Float64Array, stretch: Sequence[int] | Float64Array
) -> float:
    """Return the median slope of all pairs of one stretch: a single step is none."""
    slopes = []
    for each in np.unique(stretch):
        mine = stretch == each
        i, j = np.triu_indices(int(np.count_nonzero(mine)), 1)
        dx, dy = x[mine][j] - x[mine][i], y[mine][j] - y[mine][i]
        slopes.append(dy[dx > 0] / dx[dx > 0])
    return float(np.median(np.concatenate(slopes)))


@dataclass
class Watch:
    """Own memory and open files of a federation's programs, by name and process.

    Parameters
    ----------
    running
        The federation.
    log
        Where a run's rounds are.
    """

    running: Federation
    log: Path
    samples: dict[tuple[str, int], list[Sample]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def round(self) -> int:
        """Return the number of rounds that are over."""
        return self.log.read_bytes().count(b"\n") if self.log.exists() else 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Sample until the end of the ``with``."""
        done = threading.Event()

        def sample() -> None:
            while not done.wait(_SAMPLE_S):
                for name, process in _processes(self.running):
                    with suppress(psutil.Error):
                        # What is shared counts more for one when another ends.
                        memory = process.memory_full_info().uss
                        taken = (self.round(), memory, process.num_fds())
                        self.samples[name, process.pid].append(taken)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _processes(running: Federation) -> Iterator[tuple[str, psutil.Process]]:
    """Return all processes that run, by the program that started each."""
    for name, pid in running.programs().items():
        with suppress(psutil.Error):
            started = psutil.Process(pid)
            yield name, started
            for each in started.children(recursive=True):
                yield f"{name}: {_called(each)}", each


def _called(process: psutil.Process) -> str:
    """Return the word of a process's command that says what it is."""
    words = [Path(word).name for word in process.cmdline() if not word.startswith("-")]
    return next((w for w in words if not w.startswith("python")), process.name())
