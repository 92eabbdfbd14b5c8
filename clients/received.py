"""Read what the strategy's messages hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ConfigRecord, RecordDict

from lola_flwr.errors import UserError
from lola_flwr.wire.npy import read_npy
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


def values_of(array: Array) -> npt.NDArray[Any]:
    """Return an array's values, to be read only: a view where its bytes hold them so.

    ``Array.numpy`` copies them, and parses their header as a Python literal.
    """
    try:
        return read_npy(array.data, shape=array.shape, dtype=np.dtype(array.dtype))
    # Arrays of the legacy interface say nothing of their shapes and types.
    except (ValueError, TypeError):
        return array.numpy()


def _only_config(content: RecordDict) -> ConfigRecord:
    if SECAGG_KEY in content.config_records:
        raise UserError(SECAGG_REFUSAL)
    records = list(content.config_records.values())
    if len(records) != 1:
        raise MalformedRecord(f"{len(records)} ConfigRecords received instead of one.")
    return records[0]
