"""A Grid whose nodes are ClientApps in this process, and which tells what went by."""

from __future__ import annotations

from collections import Counter

from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.run import Run

from lola_flwr.simulation.grid import ProcessGrid


def message_bytes(message):
    """Bytes of a message as Flower puts it on the wire, object by object."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def array_bytes(message):
    """Bytes of the arrays in a message."""
    if message.has_error():
        return 0
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


class InProcessGrid(ProcessGrid):
    """Delivers messages to ClientApps; an exception of theirs is an error reply.

    ``apps`` maps node ids to ClientApps, ``configs`` to their node configurations. What
    was sent is kept in ``sent``, which clients may change, and counted by kind in
    ``sent_bytes``; ``alter`` may change any reply.
    """

    def __init__(self, apps, configs=None):
        super().__init__(apps, configs or {}, Run.create_empty(1), {})
        self.sent = []
        self.sent_bytes = Counter()
        self.batches = []
        self.alter = lambda reply: reply

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.batches.append(Counter(m.metadata.message_type for m in messages))
        self.sent += messages
        for message in messages:
            self.sent_bytes[message.metadata.message_type] += array_bytes(message)
        replies = super().send_and_receive(messages, timeout=timeout)
        return [self.alter(reply) for reply in replies]
