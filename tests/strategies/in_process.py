"""A Grid whose nodes are ClientApps in this process."""

from __future__ import annotations

from collections import Counter

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects


def message_bytes(message):
    """Bytes of a message as Flower puts it on the wire, object by object."""
    return sum(len(part.deflate()) for part in get_all_nested_objects(message).values())


def array_bytes(message):
    """Bytes of the arrays in a message."""
    if message.has_error():
        return 0
    records = message.content.array_records.values()
    return sum(len(array.data) for record in records for array in record.values())


class InProcessGrid(Grid):
    """Delivers messages to ClientApps; an exception of theirs is an error reply.

    ``apps`` maps node ids to ClientApps, ``configs`` to their node configurations. What
    was sent is kept in ``sent``, which clients may change, and counted by kind in
    ``sent_bytes``; ``alter`` may change any reply.
    """

    def __init__(self, apps, configs=None):
        self.apps = apps
        self.configs = configs or {}
        self.sent = []
        self.sent_bytes = Counter()
        self.batches = []
        self.alter = lambda reply: reply

    def get_node_ids(self):
        return list(self.apps)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.batches.append(Counter(m.metadata.message_type for m in messages))
        self.sent += messages
        for message in messages:
            self.sent_bytes[message.metadata.message_type] += array_bytes(message)
        return [self.alter(self._deliver(message)) for message in messages]

    def _deliver(self, message):
        node = message.metadata.dst_node_id
        # The SuperLink gives messages their ids.
        message.metadata.__dict__["_message_id"] = str(len(self.sent))
        context = Context(1, node, self.configs.get(node, {}), RecordDict(), {})
        try:
            return self.apps[node](message, context)
        except Exception as error:
            return Message(Error(code=0, reason=repr(error)), reply_to=message)

    set_run = run = create_message = None
    push_messages = pull_messages = None
