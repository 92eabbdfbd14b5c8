"""What devices say of their training and evaluation: usable, or left out."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TypeVar

from flwr.app import MetricRecord, RecordDict
from flwr.common import Scalar

from lola_flwr.wire.records import OURS, UpdateReport

Said = TypeVar("Said")

# A device's largest weight, in median ones.
_LARGEST_WEIGHT = 10
# Under the legacy interface a report travels among the project's metrics.
_REPORT_KEYS = {field.name.replace("_", "-") for field in fields(UpdateReport)}


def capped_weights(claims: Sequence[float]) -> list[float]:
    """Return what devices may weigh, that claim to have seen so many examples.

    None weighs more than ten times the (lower) median, so that no claim decides alone.
    """
    limit = _LARGEST_WEIGHT * statistics.median_low(claims) if claims else 0
    return [min(claim, limit) for claim in claims]


def usable_contents(
    contents: Iterable[RecordDict], weighted_by: str
) -> list[RecordDict]:
    """Return the contents of replies whose metrics can be aggregated.

    These are the largest group whose metrics have the same names and lengths, are
    finite, and count examples. Larger counts than a device may have are lowered.

    Parameters
    ----------
    contents
        Contents of replies.
    weighted_by
        Metric that counts examples.
    """
    said = ((content, only_metrics(content)) for content in contents)
    countable = [pair for pair in said if _is_countable(pair[1], weighted_by)]
    usable = _largest_group(countable, lambda pair: _form(pair[1]))
    claims = [metrics[weighted_by] for _, metrics in usable]
    for (_, metrics), weight in zip(usable, capped_weights(claims), strict=True):  # type: ignore[arg-type]
        metrics[weighted_by] = weight
    return [content for content, _ in usable]


def usable_metrics(
    said: Iterable[tuple[int, Mapping[str, Scalar]]],
) -> list[tuple[int, dict[str, Scalar]]]:
    """Return the project's own metrics of a legacy round, as far as they are usable.

    Parameters
    ----------
    said
        Examples and metrics of each device. Reports of updates are not the project's.
    """
    own = [
        (examples, _own(metrics))
        for examples, metrics in said
        if type(examples) is int and examples > 0
    ]
    finite = [pair for pair in own if all(map(_is_finite, pair[1].values()))]
    usable = _largest_group(finite, lambda pair: tuple(sorted(pair[1])))
    weights = capped_weights([examples for examples, _ in usable])
    return [(int(w), pair[1]) for w, pair in zip(weights, usable, strict=True)]


def only_arrays(content: RecordDict) -> dict[str, bytes]:
    """Return a reply's arrays as bytes; none unless there is just one ArrayRecord."""
    records = list(content.array_records.values())
    if len(records) != 1:
        return {}
    return {name: array.data for name, array in records[0].items()}


def only_metrics(content: RecordDict) -> MetricRecord:
    """Return a reply's metrics; none unless there is just one MetricRecord."""
    records = list(content.metric_records.values())
    return records[0] if len(records) == 1 else MetricRecord()


def _is_countable(metrics: MetricRecord, weighted_by: str) -> bool:
    examples = metrics.get(weighted_by)
    return (
        isinstance(examples, (int, float))
        and examples > 0
        and all(
            math.isfinite(number)
            for value in metrics.values()
            for number in (value if isinstance(value, list) else [value])
        )
    )


def _own(metrics: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return a legacy device's metrics without its report."""
    own = {n: v for n, v in metrics.items() if not n.startswith(OURS)}
    if len(own) == len(metrics):
        own = {n: v for n, v in own.items() if n not in _REPORT_KEYS}
    return own


def _form(metrics: MetricRecord) -> Hashable:
    """Return the names of a reply's metrics, and how long those are that are lists."""
    return tuple(
        sorted(
            (name, len(value) if isinstance(value, list) else -1)
            for name, value in metrics.items()
        )
    )


def _is_finite(value: Scalar) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _largest_group(
    said: Sequence[Said], form: Callable[[Said], Hashable]
) -> list[Said]:
    """Return the largest group of the same form."""
    forms = [form(one) for one in said]
    largest = Counter(forms).most_common(1)
    return [s for s, f in zip(said, forms, strict=True) if f == largest[0][0]]
