"""What holds a device's upload to its share of the uplink."""

from __future__ import annotations

from typing import Protocol


class UplinkLimit(Protocol):
    """Something that can limit how fast this device sends."""

    def hold_to(self, limit_bps: float | None, upload_bytes: int) -> str | None:
        """Limit the next upload.

        Parameters
        ----------
        limit_bps
            Its rate, bit/s; None: as fast as the link goes.
        upload_bytes
            How much will be sent.

        Returns
        -------
        What holds the limit, for the report; None if nothing does.
        """

    def describe(self) -> str:
        """Return one line for a person."""

    def counters(self) -> dict[str, int]:
        """Return the bytes that went up and came down, if they are counted."""

    def close(self) -> None:
        """Take the limit away."""


class NoLimit:
    """Nothing holds the upload to its share, which is advice then."""

    def hold_to(self, limit_bps: float | None, upload_bytes: int) -> None:
        """Do nothing."""

    def describe(self) -> str:
        """Return one line for a person."""
        return "none: the share of the uplink is advice"

    def counters(self) -> dict[str, int]:
        """Return nothing."""
        return {}

    def close(self) -> None:
        """Do nothing."""
