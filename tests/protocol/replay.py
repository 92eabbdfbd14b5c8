"""A server that speaks one recorded conversation with a device that joins it."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from flwr.proto.fleet_pb2 import (
    ActivateNodeResponse,
    PullMessagesResponse,
    PushMessagesRequest,
    PushMessagesResponse,
    RegisterNodeFleetResponse,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatResponse
from flwr.proto.message_pb2 import (
    PullObjectRequest,
    PullObjectResponse,
    PushObjectRequest,
    PushObjectResponse,
)

from tests.protocol.conversation import PULL, PULL_OBJECT, Exchange
from tests.protocol.recorded import NODE

MEDIA_TYPE = "application/protobuf"


class Replay:
    """Answers requests as recorded; what the device says itself is kept.

    Parameters
    ----------
    exchanges
        The conversation.
    """

    def __init__(self, exchanges):
        self._objects = {
            PullObjectRequest.FromString(e.request).object_id: e.response
            for e in exchanges
            if e.path == PULL_OBJECT
        }
        self._messages = [e.response for e in exchanges if e.path == PULL]
        self.heard = []
        self.headers = []
        self.pushed = threading.Event()
        self._wanted = set()

    def answer(self, path, body):
        """Return status and body of a response."""
        self.heard.append(Exchange(path, body, b""))
        name = path.rpartition("/")[2].replace("-", "_")
        return getattr(self, name)(body)

    def register_node(self, _):
        return RegisterNodeFleetResponse(node_id=NODE)

    def activate_node(self, _):
        return ActivateNodeResponse(node_id=NODE)

    def send_node_heartbeat(self, _):
        return SendNodeHeartbeatResponse(success=True)

    def pull_messages(self, _):
        message = self._messages.pop(0) if self._messages else b""
        return PullMessagesResponse.FromString(message)

    def pull_object(self, body):
        return PullObjectResponse.FromString(
            self._objects.get(PullObjectRequest.FromString(body).object_id, b"")
        )

    def confirm_message_received(self, _):
        return PullMessagesResponse()

    def push_messages(self, body):
        request = PushMessagesRequest.FromString(body)
        self._wanted = set(ids_in(request.message_object_trees[0]))
        return PushMessagesResponse(objects_to_push=self._wanted, session_id="session")

    def push_object(self, body):
        request = PushObjectRequest.FromString(body)
        assert request.session_id == "session"
        self._wanted.discard(request.object_id)
        if not self._wanted:
            self.pushed.set()
        return PushObjectResponse(stored=True)

    def deactivate_node(self, _):
        return PullMessagesResponse()

    def unregister_node(self, _):
        return PullMessagesResponse()


def ids_in(tree):
    """Give the ids of a tree's objects."""
    yield tree.object_id
    for child in tree.children:
        yield from ids_in(child)


@contextmanager
def serving(replay, port=0):
    """Serve a conversation on the loopback; give the address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = self.rfile.read(int(self.headers["content-length"]))
            replay.headers.append(dict(self.headers.items()))
            found = replay.answer(self.path, body)
            status, found = found if isinstance(found, tuple) else (200, found)
            body = found if isinstance(found, bytes) else found.SerializeToString()
            self.send_response(status)
            self.send_header("content-type", MEDIA_TYPE)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_):
            """Say nothing of connections that ended."""

    server = Server(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
