"""Read what the strategy's messages hold."""

from __future__ import annotations

from flwr.app import ConfigRecord, RecordDict

from lola_flwr.errors import UserError
from lola_flwr.wire.records import (
    SECAGG_KEY,
    SECAGG_REFUSAL,
    Assignment,
    MalformedRecord,
    PartTask,
)


def assignment_in(content: RecordDict) -> Assignment:
    """Return the assignment that a message of the strategy holds.

    Raises
    ------
    MalformedRecord
        There is none.
    UserError
        The message belongs to a secure aggregation.
    """
    return Assignment.from_record(_only_config(content))


def task_in(content: RecordDict) -> PartTask:
    """Return the part of a step that a message of the strategy asks for.

    Raises
    ------
    MalformedRecord
        There is none.
    UserError
        The message belongs to a secure aggregation.
    """
    return PartTask.from_record(_only_config(content))


def _only_config(content: RecordDict) -> ConfigRecord:
    if SECAGG_KEY in content.config_records:
        raise UserError(SECAGG_REFUSAL)
    records = list(content.config_records.values())
    if len(records) != 1:
        raise MalformedRecord(f"{len(records)} ConfigRecords received instead of one.")
    return records[0]
