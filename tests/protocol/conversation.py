"""Conversations as files: requests and responses of Flower's Fleet API, in order.

An exchange is three strings of bytes, each behind its length as 4 bytes, most
significant first: the path, the body of the request, the body of the response.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

from flwr.app import Message
from flwr.common.serde import message_from_proto
from flwr.proto.fleet_pb2 import PullMessagesResponse, PushMessagesRequest
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents

HERE = Path(__file__).parent
PULL, PUSH = "/v1/fleet/pull-messages", "/v1/fleet/push-messages"
PULL_OBJECT, PUSH_OBJECT = "/v1/fleet/pull-object", "/v1/fleet/push-object"


@dataclass(frozen=True)
class Exchange:
    """One request, and its response."""

    path: str
    request: bytes
    response: bytes


@dataclass
class Objects:
    """What a side sent, object by object, and the message that they belong to."""

    message: Message
    contents: dict[str, bytes] = field(default_factory=dict)

    def inflated(self):
        """Return the message with its content."""
        if self.message.has_error():
            return self.message
        return inflate_object_from_contents(
            self.message.metadata.message_id, dict(self.contents)
        )


def names():
    """Return the names of all recorded conversations."""
    return sorted(path.stem for path in HERE.glob("*.bin"))


def read(name):
    """Return the exchanges of a conversation."""
    data, place, parts = (HERE / f"{name}.bin").read_bytes(), 0, []
    while place < len(data):
        (length,) = struct.unpack_from(">I", data, place)
        parts.append(data[place + 4 : place + 4 + length])
        place += 4 + length
    triples = zip(parts[::3], parts[1::3], parts[2::3], strict=True)
    return [Exchange(path.decode(), *bodies) for path, *bodies in triples]


def write(name, exchanges):
    """Write a conversation."""
    parts = [p for e in exchanges for p in (e.path.encode(), e.request, e.response)]
    data = b"".join(struct.pack(">I", len(part)) + part for part in parts)
    (HERE / f"{name}.bin").write_bytes(data)


def asked(exchanges):
    """Return the message that the device is sent; None where it is sent none."""
    for each in exchanges:
        pulled = PullMessagesResponse.FromString(each.response)
        if each.path == PULL and pulled.messages_list:
            contents = {
                PullObjectRequest.FromString(e.request).object_id: (
                    PullObjectResponse.FromString(e.response).object_content
                )
                for e in exchanges
                if e.path == PULL_OBJECT
            }
            message = message_from_proto(pulled.messages_list[0])
            found = Objects(message, contents).inflated()
            # An object says nothing of its message's id.
            found.metadata.__dict__["_message_id"] = message.metadata.message_id
            return found
    return None


def answered(exchanges):
    """Return what the device sent back."""
    (pushed,) = [
        PushMessagesRequest.FromString(e.request) for e in exchanges if e.path == PUSH
    ]
    objects = [
        PushObjectRequest.FromString(e.request)
        for e in exchanges
        if e.path == PUSH_OBJECT
    ]
    return Objects(
        message_from_proto(pushed.messages_list[0]),
        {each.object_id: each.object_content for each in objects},
    )
