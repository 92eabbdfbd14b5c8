"""A device that trains blocks, as a Flower ClientApp (Message API)."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from lola_flwr.clients.profiles import report_profile
from lola_flwr.clients.received import assignment_in, task_in
from lola_flwr.device.contract import Device, OutOfMemory
from lola_flwr.wire.records import PART_ACTION, REPORT_KEY


class LoLaClient(ClientApp):
    """Trains the block that the server assigns; further functions can be added.

    Of a model that is spread over devices it computes its part.

    Parameters
    ----------
    device_fn
        Gives the device that a context belongs to.
    """

    def __init__(self, device_fn: Callable[[Context], Device]) -> None:
        super().__init__()
        report_profile(self, lambda context: device_fn(context).profile)

        @self.train()
        def train(message: Message, context: Context) -> Message:
            assignment = assignment_in(message.content)
            ((key, record),) = message.content.array_records.items()
            values = {name: array.numpy() for name, array in record.items()}
            arrays: dict[str, Array] = {}
            num_examples = 0
            try:
                update = device_fn(context).train(assignment, values)
            except OutOfMemory as failure:
                report = failure.to_record()
            else:
                arrays = {name: Array(values) for name, values in update.arrays.items()}
                num_examples = update.num_examples
                report = update.report.to_record()
            content = RecordDict(
                {
                    "metrics": MetricRecord({"num-examples": num_examples}),
                    REPORT_KEY: ConfigRecord({**report}),
                }
            )
            if arrays:
                content[key] = ArrayRecord(arrays)
            return Message(content, reply_to=message)

        @self.train(PART_ACTION)
        def compute_part(message: Message, context: Context) -> Message:
            ((key, record),) = message.content.array_records.items()
            values = {name: array.numpy() for name, array in record.items()}
            device = device_fn(context)
            report, arrays = device.compute_part(task_in(message.content), values)
            return Message(
                RecordDict(
                    {
                        key: ArrayRecord({n: Array(a) for n, a in arrays.items()}),
                        REPORT_KEY: ConfigRecord({**report.to_record()}),
                    }
                ),
                reply_to=message,
            )
