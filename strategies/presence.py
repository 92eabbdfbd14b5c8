"""Which devices are there, and what they say of themselves."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from logging import WARNING

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.common import GetPropertiesIns
from flwr.common.logger import log
from flwr.server.client_proxy import ClientProxy
from flwr.serverapp import Grid

from lola_flwr.errors import UserError, quoted
from lola_flwr.server.method import Register
from lola_flwr.system.devices import InvalidProfile
from lola_flwr.wire.records import PROFILE_ACTION, PROFILE_KEY

# Asking a device for its profile costs it no computation; more threads than this would
# only queue up at the server.
_MAX_PROFILE_REQUESTS = 256

# Asks devices for their profiles: device ids -> what those said that answered in time;
# nothing, where the answer was an error.
AskProfiles = Callable[[Sequence[str]], Mapping[str, Mapping[str, object]]]


def wait_for_devices(
    connected: Callable[[], Collection[str]],
    *,
    needed: int,
    wait_s: float,
    wanted: int = 0,
    settle_s: float = 0.0,
    why: str = "",
) -> Collection[str]:
    """Wait until so many devices are connected; return their ids.

    Parameters
    ----------
    connected
        Gives the ids of the devices that are there now.
    needed
        How many are needed.
    wait_s
        How long to wait.
    wanted
        How many are better, if they come: no longer than ``settle_s`` after the last.
    settle_s
        How long to wait for another one.
    why
        Why so many are needed, for the error.

    Raises
    ------
    UserError
        There are fewer in the end.
    """
    # Flower's own helpers wait without end, or sleep through their 5 s updates.
    deadline = time.monotonic() + wait_s
    count, settled = 0, 0.0
    while len(devices := connected()) < max(needed, wanted):
        now = time.monotonic()
        if len(devices) != count:
            count, settled = len(devices), now + settle_s
        if count >= needed and now >= min(settled, deadline):
            break
        if now > deadline:
            raise UserError(
                f"{len(devices)} devices are connected after {wait_s:g} s; {needed} "
                f"are needed{why}. Start more SuperNodes, or in a simulation pass "
                f"--federation-config 'num-supernodes={needed}'."
            )
        time.sleep(0.1)
    return devices


def meet(
    register: Register,
    devices: Collection[str],
    ask: AskProfiles,
    *,
    server_round: int,
) -> None:
    """Ask the devices that are new for their profiles, and take these in.

    Parameters
    ----------
    register
        Keeps the profiles.
    devices
        Ids of the devices that are there.
    ask
        Asks some for their profiles.
    server_round
        Round, from 1.
    """
    asked = register.meet_devices(server_round, devices)
    if not asked:
        return
    answers = ask(asked)
    assumed = 0
    for device in asked:
        try:
            # Without an answer the device stays unknown, unless a profile is assumed
            # for such devices.
            register.add_device(device, answers.get(device, {}))
            assumed += not answers.get(device)
        except InvalidProfile as error:
            # Its words alone: who keeps log records must not keep the frames that an
            # exception knows, and with them this round's model.
            log(WARNING, "device %s is left out: %s", device, str(error))
    if assumed:
        log(
            WARNING,
            "%s of %s new devices state no profile, and one is assumed; what they "
            "report corrects it. State it with --node-config 'flops-per-s=2e11 "
            "memory-bytes=4e9 snr-db=12.0'",
            assumed,
            len(asked),
        )
    register.note_answers(server_round, asked, answers.keys())


def ask_profiles(
    grid: Grid, devices: Sequence[str], server_round: int, wait_s: float
) -> dict[str, ConfigRecord]:
    """Ask devices for their profiles (Message API), all at once."""
    messages = [
        Message(
            RecordDict(),
            message_type=f"{MessageType.QUERY}.{PROFILE_ACTION}",
            dst_node_id=int(device),
            group_id=str(server_round),
        )
        for device in devices
    ]
    replies = list(grid.send_and_receive(messages, timeout=wait_s))
    answers = {str(reply.metadata.src_node_id): ConfigRecord() for reply in replies}
    for reply in without_errors(replies, server_round):
        if PROFILE_KEY in reply.content.config_records:
            profile = reply.content.config_records[PROFILE_KEY]
            answers[str(reply.metadata.src_node_id)] = profile
    return answers


def ask_clients(
    clients: Mapping[str, ClientProxy],
    devices: Sequence[str],
    server_round: int,
    wait_s: float,
) -> dict[str, Mapping[str, object]]:
    """Ask devices for their profiles (legacy interface), all at once."""

    def ask(device: str) -> Mapping[str, object]:
        answer = clients[device].get_properties(
            GetPropertiesIns({}), timeout=wait_s, group_id=server_round
        )
        return answer.properties

    pool = ThreadPoolExecutor(min(len(devices), _MAX_PROFILE_REQUESTS))
    asked = {device: pool.submit(ask, device) for device in devices}
    wait(asked.values(), timeout=wait_s)
    # The message itself has expired by now: what is still on its way ends soon.
    pool.shutdown(wait=False, cancel_futures=True)
    answers: dict[str, Mapping[str, object]] = {}
    for device, future in asked.items():
        # Flower raises whatever went wrong on the device or on the way.
        try:
            answers[device] = future.result(timeout=0)
        except Exception as error:
            if future.done():
                answers[device] = {}
            reason = quoted(error) if str(error) else f"none after {wait_s:g} s"
            log(WARNING, "no profile from device %s: %s", device, reason)
    return answers


def without_errors(replies: Iterable[Message], server_round: int) -> list[Message]:
    """Leave out, and log, replies that are errors."""
    good = []
    for reply in replies:
        if reply.has_error():
            node, reason = reply.metadata.src_node_id, quoted(reply.error.reason)
            log(WARNING, "round %s: node %s failed: %s", server_round, node, reason)
        else:
            good.append(reply)
    return good
