"""What a run's rounds come to, counted in one pass; and which of them a page shows."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import NamedTuple

from lola_flwr.run.records import BlockRecord, Record, RoundRecord, StepRecord
from lola_flwr.run.target import Spent

# Bytes up as the allocation counted on them, as received, and bytes down.
COUNTS = ("payload_bytes", "received_bytes", "sent_bytes")
# A plan has no replies yet: what it holds counts as used.
_USED = ("accepted", "planned")


class Memory(NamedTuple):
    """The most that a device needed in a run, and its measured peak.

    Parameters
    ----------
    needed_bytes
        By the cost model; None if the log does not tell.
    offered_bytes, numbers
        What the device offered then, and the blocks that it was for.
    peak_bytes
        The highest that it measured in any round; None if it measured none.
    """

    needed_bytes: float | None = None
    offered_bytes: float | None = None
    numbers: str = ""
    peak_bytes: float | None = None


@dataclass(frozen=True)
class Tally:
    """A run's rounds without their devices' parts, and what these come to.

    Parameters
    ----------
    rounds
        The rounds, without blocks.
    num_parts
        How many devices were active in each.
    statuses
        What became of any part.
    num_blocks
        Blocks of the model, as far as any round knows.
    bytes
        Each round's bytes, by the name of the count; None where it is not known.
    meetings
        How often an update of a device for a block was used.
    memory
        Of each device that was ever active.
    """

    rounds: Sequence[Record]
    num_parts: Sequence[int]
    statuses: frozenset[str]
    num_blocks: int
    bytes: Mapping[str, Sequence[float | None]]
    meetings: Mapping[tuple[str, int], int]
    memory: Mapping[str, Memory]

    @classmethod
    def of(cls, rounds: Iterable[Record]) -> Tally:
        """Count rounds, each of which need not be there but once."""
        heads: list[Record] = []
        num_parts: list[int] = []
        counts: dict[str, list[float | None]] = {name: [] for name in COUNTS}
        statuses: set[str] = set()
        num_blocks = 0
        meetings: Counter[tuple[str, int]] = Counter()
        memory: dict[str, Memory] = {}
        for record in rounds:
            parts = parts_of(record)
            heads.append(_without_parts(record))
            num_parts.append(len(parts))
            # A model that is spread over devices has no blocks of theirs.
            counted = [record] if isinstance(record, StepRecord) else parts
            for name, values in counts.items():
                known = [count for part in counted if (count := count_of(part, name))]
                values.append(sum(known) if known else None)
            for part in parts:
                statuses.add(part.status)
                num_blocks = max(num_blocks, part.block_index + part.depth)
                if part.status in _USED:
                    meetings[part.device, part.block_index] += 1
                    for block in part.further_blocks:
                        meetings[part.device, block] += 1
                known_of = memory.get(part.device)
                if known_of is None or _is_more(part, known_of):
                    memory[part.device] = _more(part, known_of or Memory())
        return cls(
            rounds=heads,
            num_parts=num_parts,
            statuses=frozenset(statuses),
            num_blocks=num_blocks,
            bytes=counts,
            meetings=meetings,
            memory=memory,
        )

    def course(self, metric: str) -> list[Spent]:
        """Return what was spent until each evaluation of a metric.

        The model that the run started from is the first, where it was evaluated.
        """
        up_bytes, down_bytes = (
            _sums(self.bytes[name]) for name in ("received_bytes", "sent_bytes")
        )
        start = self.rounds[0].start_metrics if self.rounds else {}
        points = []
        if metric in start:
            known = None if self.rounds[0].joules is None else 0.0
            points.append(Spent(0, start[metric], 0.0, 0, 0, known))
        for record, up, down in zip(self.rounds, up_bytes, down_bytes, strict=True):
            if metric in record.metrics:
                spent = (record.wireless_s, up, down, record.joules)
                value = record.metrics[metric]
                points.append(Spent(record.server_round, value, *spent))
        return points


def _sums(counts: Sequence[float | None]) -> Sequence[float | None]:
    """Return sums up to each count; None everywhere where no count is known."""
    if all(count is None for count in counts):
        return counts
    return [*accumulate(count or 0 for count in counts)]


def parts_of(record: Record) -> Sequence[BlockRecord]:
    """Return the active devices' parts in a round."""
    return record.blocks if isinstance(record, RoundRecord) else ()


def _without_parts(record: Record) -> Record:
    return replace(record, blocks=()) if isinstance(record, RoundRecord) else record


def count_of(part: BlockRecord | StepRecord, name: str) -> float | None:
    """Return a count of bytes; None where the record holds none."""
    return getattr(part, name, 0) or None


def extremes(
    lines: Iterable[Sequence[float | None]], num_rounds: int, most: int
) -> list[int]:
    """Choose rounds of which no line through all of them misses a peak or a trough.

    The rounds are cut into spans of equal length; of each, those with the least and
    the greatest value of every line are chosen, and the first and last of all.

    Parameters
    ----------
    lines
        Values by round; None where there is none.
    num_rounds
        How many rounds there are.
    most
        How many are chosen at most (two at least); all where there are no more.
    """
    if num_rounds <= most:
        return list(range(num_rounds))
    lines = [line for line in lines if any(v is not None for v in line)]
    num_spans = max((most - 2) // max(2 * len(lines), 1), 1)
    ends = [num_rounds * n // num_spans for n in range(num_spans + 1)]
    chosen = {0, num_rounds - 1}
    for line in lines:
        for start, end in pairwise(ends):
            known = [
                (value, n)
                for n, value in enumerate(line[start:end], start)
                if value is not None and math.isfinite(value)
            ]
            if known:
                chosen |= {min(known)[1], max(known)[1]}
    return sorted(chosen)


def _is_more(part: BlockRecord, known: Memory) -> bool:
    needed, peak = part.required_memory_bytes, part.peak_memory_bytes
    return (needed is not None and needed > (known.needed_bytes or -1)) or (
        peak is not None and peak > (known.peak_bytes or -1)
    )


def _more(part: BlockRecord, known: Memory) -> Memory:
    """Return what is known of a device's memory with one more part of it."""
    needed, offered = part.required_memory_bytes, part.memory_bytes
    peak = part.peak_memory_bytes
    if peak is not None:
        known = known._replace(peak_bytes=max(peak, known.peak_bytes or 0))
    if needed is None or offered is None or needed <= (known.needed_bytes or -1):
        return known
    return known._replace(
        needed_bytes=needed, offered_bytes=offered, numbers=part.numbers
    )
