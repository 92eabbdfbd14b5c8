"""Look at something again and again while something else runs."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Sampler(threading.Thread):
    """Takes samples now and then: at once, while it runs, and when it is stopped.

    Parameters
    ----------
    sample
        Takes one, and tells whether there is any use in another.
    interval_s
        Time between two, seconds.
    """

    def __init__(self, sample: Callable[[], bool], interval_s: float) -> None:
        super().__init__(daemon=True)
        self._sample = sample
        self._interval_s = interval_s
        self._stopped = threading.Event()
        self._goes_on = sample()

    def run(self) -> None:
        """Sample until it is stopped, or there is no use in more."""
        while self._goes_on and not self._stopped.wait(self._interval_s):
            self._goes_on = self._sample()

    def stop(self) -> None:
        """Take the last sample."""
        self._stopped.set()
        self.join()
        if self._goes_on:
            self._sample()
