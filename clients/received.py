"""Read what the strategy's messages hold."""

from __future__ import annotations

from flwr.app import RecordDict

from lola_flwr.errors import UserError
from lola_flwr.protocol import (
    SECAGG_KEY,
    SECAGG_REFUSAL,
    Assignment,
    MalformedRecord,
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
    if SECAGG_KEY in content.config_records:
        raise UserError(SECAGG_REFUSAL)
    records = list(content.config_records.values())
    if len(records) != 1:
        raise MalformedRecord(f"{len(records)} ConfigRecords received instead of one.")
    return Assignment.from_record(records[0])
