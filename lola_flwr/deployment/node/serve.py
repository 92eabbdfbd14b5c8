"""Answer a SuperLink's messages, one after the other, in this process.

What Flower's own SuperNode does in two programs and a new process per message, with its
connection, its objects, its checks, its errors and its log lines.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count
from logging import ERROR, INFO, WARNING
from typing import TYPE_CHECKING, NamedTuple

from flwr.app import Error, Message
from flwr.clientapp.client_app import LoadClientAppError
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore import log
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.task_identity import TaskIdentity
from flwr.supernode.fleet_http_connection import http_request_response
from flwr.supernode.start_client_internal import FAB_VERIFICATION_ERROR, _verify_fab

from lola_flwr.deployment.node.apps import Apps
from lola_flwr.deployment.node.clock import clocks_compared
from lola_flwr.deployment.node.place import Place, place_of
from lola_flwr.deployment.node.stopping import Stop, Stopped
from lola_flwr.deployment.node.tending import tended
from lola_flwr.deployment.node.waiting import Silences, wait_s
from lola_flwr.deployment.processes import be_supernode
from lola_flwr.errors import traced
from lola_flwr.machine.files import local_path

if TYPE_CHECKING:
    from flwr.supernode.cli.flower_supernode import SuperNodeLifespanConfig

# An object that is announced but not there yet is asked for again after 0.05 to 1 s.
_FIRST_RETRY_S, _LAST_RETRY_S = 0.05, 1.0
# A run that is silent for longer gives its app's memory back.
_HOLD_S = 120.0
_RECONNECT_S = 1.0
# A SuperLink gives nobody the reply of a node that has left since. Flower's own Grid
# looks every 3 s.
_TAKEN_WITHIN_S = 4.0


class Link(NamedTuple):
    """A connection to the SuperLink, in the order in which Flower yields it."""

    node_id: int
    receive: Callable[[], tuple[Message, ObjectTree] | None]
    send: Callable[[Message, ObjectTree, float], tuple[set[str], str]]
    get_run: Callable[[int], Run]
    get_fab: Callable[[str, int], Fab]
    pull_object: Callable[[int, str], bytes]
    push_object: Callable[[int, str, str, bytes], None]
    confirm: Callable[[int, str], None]


def serve(options: SuperNodeLifespanConfig) -> None:
    """Register, answer messages, and connect anew whenever the connection is lost.

    SIGTERM and SIGINT let the message in hand be answered; a second one ends at once.

    Parameters
    ----------
    options
        Flower's own reading of the command line.
    """
    be_supernode()
    stop = Stop()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop.on_signal)
    worker = options.node_config.get("worker")
    try:
        with (
            place_of(options) as place,
            tended(local_path(str(worker))) if worker else nullcontext(),
        ):
            _serve(options, stop, place)
    except Stopped:
        pass


def _serve(options: SuperNodeLifespanConfig, stop: Stop, place: Place | None) -> None:
    apps: Apps | None = None
    while not stop.is_asked:
        if place is not None:
            place.vacate(stop)
        with (
            clocks_compared(options),
            http_request_response(
                server_address=options.server_address,
                insecure=options.insecure,
                root_certificates=options.root_certificates,
                authentication_keys=options.authentication_keys,
                max_retries=options.max_retries,
                max_wait_time=options.max_wait_time,
            ) as connection,
        ):
            link = Link(*connection)
            if place is not None:
                place.take(link.node_id)
            # What a run's app keeps outlasts a connection.
            if apps is None or apps.node_id != link.node_id:
                apps = Apps(link.node_id, options.node_config)
            Node(link, apps, options, stop).answer_messages()
        if not stop.is_asked:
            log(WARNING, "The connection is lost; connecting anew.")
            stop.sleep(_RECONNECT_S)
    # Flower has told the SuperLink, if it is there.
    if place is not None:
        place.leave()


@dataclass(frozen=True)
class _KnownRun:
    """A run that the node has had a message of."""

    run: Run
    fab: Fab
    is_verified: bool


class Node:
    """A registered node.

    Parameters
    ----------
    link
        Its connection.
    apps
        Its apps.
    options
        Its command line.
    stop
        Whether it is to end.
    """

    def __init__(
        self, link: Link, apps: Apps, options: SuperNodeLifespanConfig, stop: Stop
    ) -> None:
        self._link, self._apps, self._stop = link, apps, stop
        self._trusted = options.trusted_entities
        self._runs: dict[int, _KnownRun] = {}
        self._silences = Silences()
        self._task_ids = count(1)
        log(INFO, "SuperNode ID: %s", link.node_id)

    def answer_messages(self) -> None:
        """Answer one message after the other, until the node is to end."""
        silent_since_s, question_s = time.monotonic(), 0.0
        while not self._stop.is_asked:
            asked_s = time.monotonic()
            try:
                with self._stop.asking():
                    received = self._link.receive()
            except RunNotRunningException:
                log(INFO, "The run ended while a message of it was received.")
                received = None
            now_s = time.monotonic()
            silent_s, before_s = now_s - silent_since_s, question_s
            question_s = now_s - asked_s
            if received is None:
                if silent_s > _HOLD_S:
                    self._apps.forget()
                quicker_s = min(before_s, question_s)
                usual_s = self._silences.usual_s
                self._stop.sleep(wait_s(silent_s, usual_s, quicker_s))
                continue
            self._silences = self._silences.after(silent_s)
            self._answer(*received)
            silent_since_s = time.monotonic()
            if self._stop.is_asked:
                time.sleep(_TAKEN_WITHIN_S)

    def _answer(self, head: Message, tree: ObjectTree) -> None:
        run_id, message_id = head.metadata.run_id, head.metadata.message_id
        self._say("Receiving", head)
        try:
            known = self._known(run_id)
            message = pull_and_inflate_object_from_tree(
                object_tree=tree,
                pull_object_fn=partial(self._link.pull_object, run_id),
                confirm_object_received_fn=partial(self._link.confirm, run_id),
                return_type=Message,
                initial_backoff=_FIRST_RETRY_S,
                backoff_cap=_LAST_RETRY_S,
            )
            log(INFO, "Received successfully")
            # What is sent has no number of its own: the number is its hash.
            message.metadata.__dict__["_message_id"] = tree.object_id
        except RunNotRunningException:
            log(INFO, "Run %s does not run; message %s is ignored.", run_id, message_id)
            return
        except Exception as error:
            log(ERROR, "Failed to receive message %s: %s", message_id, error)
            return
        begun_s = time.monotonic()
        reply = self._reply(known, message)
        del message
        reply.metadata.__dict__["_message_id"] = reply.object_id
        self._say("Sending", reply)
        try:
            self._send(reply, time.monotonic() - begun_s)
            log(INFO, "Sent successfully")
        except RunNotRunningException:
            log(INFO, "Run %s does not run; the reply is ignored.", run_id)
        except Exception as error:
            log(ERROR, "Failed to send the reply to %s: %s", message_id, error)

    def _known(self, run_id: int) -> _KnownRun:
        known = self._runs.get(run_id)
        if known is None:
            run = self._link.get_run(run_id)
            fab = self._link.get_fab(run.fab_hash, run_id)
            known = _KnownRun(run, fab, self._is_verified(fab))
            self._runs[run_id] = known
        return known

    def _is_verified(self, fab: Fab) -> bool:
        if not self._trusted:
            return True
        if not fab.verifications.get("valid_license", ""):
            log(
                ERROR,
                "The FAB could not be verified: the SuperLink does not support it.",
            )
            return False
        if not _verify_fab(fab=fab, trusted_entities=self._trusted):
            log(ERROR, "The FAB could not be verified by the trusted entities.")
            return False
        return True

    def _reply(self, known: _KnownRun, message: Message) -> Message:
        """Run the app; what it raises becomes the error that Flower makes of it."""
        if not known.is_verified:
            return Message(FAB_VERIFICATION_ERROR, reply_to=message)
        TaskIdentity.task_id = next(self._task_ids)
        TaskIdentity.run_id = known.run.run_id
        TaskIdentity.node_id = self._link.node_id
        try:
            context = self._apps.context(known.run, known.fab)
            reply = self._apps.app(known.run, known.fab)(
                message=message, context=context
            )
            if not isinstance(reply, Message):
                raise TypeError(f"The app returned {type(reply)}, no Message.")
            return reply
        except Stopped:
            raise
        except LoadClientAppError as error:
            log(ERROR, "ClientApp cannot be loaded", exc_info=error)
            code = ErrorCode.LOAD_CLIENT_APP_EXCEPTION
            reason = "An exception was raised when attempting to load `ClientApp`"
        except Exception as error:
            log(ERROR, "ClientApp raised: %s", error, exc_info=traced(error))
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reason = f"{type(error)}:<'{error}'>"
        # An app that exits would end its own process, not the SuperNode.
        except BaseException as error:
            log(ERROR, "ClientApp ended", exc_info=error)
            code = ErrorCode.CLIENT_APP_CRASHED
            reason = "ClientApp stopped responding."
        return Message(Error(code=code, reason=reason), reply_to=message)

    def _send(self, reply: Message, runtime_s: float) -> None:
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            wanted, session_id = self._link.send(
                reply, get_object_tree(obj=reply), runtime_s
            )
            objects = get_all_nested_objects(obj=reply)
            # The message itself is wanted at least. If nothing is, an earlier try has
            # announced it, and its answer was lost, which Flower takes for a reply that
            # is there; the SuperLink finds the session that waits if none is named.
            if not wanted:
                wanted, session_id = {*objects}, ""
            refused = []

            def push(object_id: str, contents: bytes) -> None:
                try:
                    self._link.push_object(run_id, session_id, object_id, contents)
                # So is an object that an earlier try has brought.
                except ObjectPushError as error:
                    refused.append(error)

            push_objects(
                objects=objects, push_object_fn=push, object_ids_to_push=wanted
            )
            if len(refused) == len(wanted):
                raise refused[0]

    def _say(self, what: str, message: Message) -> None:
        metadata = message.metadata
        server_round = f", ROUND {metadata.group_id}" if metadata.group_id else ""
        log(INFO, "")
        log(INFO, "[RUN %s%s]", metadata.run_id, server_round)
        log(
            INFO,
            "%s: %s message (ID: %s)",
            what,
            metadata.message_type,
            metadata.message_id,
        )
