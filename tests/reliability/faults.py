"""Devices and networks that fail and lie, between the app's server and real devices."""

from __future__ import annotations

import gc
from collections import Counter

import numpy as np
import psutil
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message

from lola_flwr.randomness import rng_for
from lola_flwr.wire.records import PROFILE_KEY, REPORT_KEY
from tests.reliability.app_run import AppGrid


def change_first(change):
    """Change the first array of a reply."""

    def fault(content):
        name = next(iter(content["arrays"]))
        content["arrays"][name] = change(content["arrays"][name])

    return fault


def change_values(change):
    return change_first(lambda array: Array(change(array.numpy())))


def change_all(factor):
    def fault(content):
        for name, array in content["arrays"].items():
            content["arrays"][name] = Array((factor * array.numpy()).astype("f4"))

    return fault


def change_report(**changes):
    def fault(content):
        record = content[REPORT_KEY]
        for key, change in changes.items():
            key = key.replace("_", "-")
            record[key] = change(record[key])

    return fault


def no_longer_an_update(report):
    def fault(content):
        content["arrays"] = ArrayRecord()
        content[REPORT_KEY] = ConfigRecord(report)

    return fault


def with_examples(value):
    def fault(content):
        content["metrics"]["num-examples"] = value

    return fault


# What a device may send in place of its update, and how that is to be counted.
LIES = {
    "non-finite": (change_values(lambda a: np.full_like(a, np.nan)), "non-finite"),
    "wrong shape": (change_values(lambda a: a[..., :-1]), "wrong-array"),
    "wrong type": (change_values(lambda a: a.astype("f8")), "wrong-array"),
    "longer than announced": (
        change_values(lambda a: np.concatenate([a, a, a])),
        "wrong-array",
    ),
    "no array at all": (
        change_first(lambda a: Array("float32", (1,), "numpy.ndarray", b"\x93NUMPY")),
        "wrong-array",
    ),
    "arrays missing": (lambda c: c["arrays"].popitem(), "wrong-count"),
    "another block": (change_report(block_index=lambda b: b + 1), "wrong-block"),
    "another round": (change_report(server_round=lambda r: r - 1), "late"),
    "another kind": (change_report(update_kind=lambda _: "wish"), "wrong-kind"),
    "odd report": (change_report(server_round=lambda r: [r]), "malformed-report"),
    "impossible time": (change_report(compute_s=lambda _: 1e300), "implausible"),
    "too many examples": (with_examples(10**9), "wrong-examples"),
    "out of memory": (
        no_longer_an_update({"failure": "out-of-memory", "detail": "4 GiB"}),
        "out-of-memory",
    ),
    "zero": (change_all(0.0), "all-zero"),
    # These are accepted: all that can be done is to bound what they do.
    "huge": (change_all(1e20), None),
    "sign-flipped and scaled": (change_all(-100.0), None),
}
# What can happen on the way.
ACCIDENTS = ("silence", "error", "wrong base", "late", "duplicate", "leaves")
# Of the lies: what is scaled down, or refused for its size.
TOO_LARGE = ("huge", "sign-flipped and scaled")
PROFILE_LIES = [
    {"flops-per-s": float("inf")},
    {"memory-bytes": -1.0},
    {"snr-db": float("nan")},
    {"snr-db": -60.0},
    {"flops-per-s": 1e16, "snr-db": 80.0},
    {"name": "x\ny"},
]


class FaultyGrid(AppGrid):
    """Lets a part of all messages to devices come to harm.

    ``rate`` of all updates, drawn from a seed, meet with one fault each, of those above
    in equal parts. Now and then everybody is gone for a moment, and a device that comes
    back has another id. ``counts`` counts the faults by kind; ``expected`` the refusals
    that must follow; ``rss_bytes`` is this process's memory after each round.
    """

    def __init__(self, config, rate):
        super().__init__(config)
        self.rate = rate
        self.counts = Counter()
        self.expected = Counter()
        self.rss_bytes = []
        self._partition = {node: node - 100 for node in self.apps}
        self._next_id = 10_000
        self._away = {}  # partition -> rounds that it stays away
        self._late = []
        self._polls_without_anybody = 0
        self._draws = 0

    def get_node_ids(self):
        if self._polls_without_anybody:
            self._polls_without_anybody -= 1
            return []
        return list(self.apps)

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = []
        if messages and messages[0].metadata.message_type == "train":
            replies, self._late = self._late, []
            known = set(self.apps)
            for reply in replies:
                asked = {m.metadata.dst_node_id for m in messages} & known
                late = reply.metadata.src_node_id in asked
                self.expected["late" if late else "not-asked"] += 1
            # Flower's records are cycles: what they held is freed some time later.
            gc.collect()
            self.rss_bytes.append(psutil.Process().memory_info().rss)
        for message in messages:
            replies += self._answers(message)
        if messages and messages[0].metadata.message_type == "train":
            self._come_and_go()
        return replies

    def _answers(self, message):
        self._draws += 1
        rng = rng_for(1, "fault", self._draws)
        deliver = self._deliver
        if rng.random() >= self.rate:
            return [deliver(message)]
        if message.metadata.message_type != "train":
            # A run does not begin before enough devices have said who they are.
            begun = bool(self.rss_bytes)
            return self._lying_profile(message, rng) if begun else [deliver(message)]
        kind = str(rng.choice([*LIES, *ACCIDENTS]))
        self.counts[kind] += 1
        if kind in LIES:
            reply = self._deliver(message)
            spoil, reason = LIES[kind]
            spoil(reply.content)
            self.expected[reason] += 1
            return [reply]
        if kind == "silence":
            return []
        if kind == "error":
            return [Message(Error(code=0, reason="broken\nx" * 99), reply_to=message)]
        if kind == "wrong base":
            message.content["config"]["base-fingerprint"] = "another"
        elif kind == "late":
            self._late.append(self._deliver(message))
            return []
        elif kind == "leaves":
            node = message.metadata.dst_node_id
            self._away[self._partition.pop(node)] = int(rng.integers(1, 4))
            del self.apps[node]
            return []
        reply = self._deliver(message)
        if kind == "duplicate":
            self.expected["duplicate"] += 1
            return [reply, reply]
        return [reply]

    def _lying_profile(self, message, rng):
        lie = PROFILE_LIES[rng.integers(len(PROFILE_LIES))]
        self.counts["lying profile"] += 1
        reply = self._deliver(message)
        honest = reply.content[PROFILE_KEY]
        reply.content[PROFILE_KEY] = ConfigRecord({**honest, **lie})
        return [reply]

    def _come_and_go(self):
        app = next(iter(self.apps.values()), None) or self._app
        self._app = app
        for partition in list(self._away):
            self._away[partition] -= 1
            if self._away[partition] == 0:
                del self._away[partition]
                self._partition[self._next_id] = partition
                # As the device of that part of the data had when the run began.
                self.node_configs[self._next_id] = self.node_configs[100 + partition]
                self.apps[self._next_id] = app
                self._next_id += 1
        if rng_for(2, "all gone", self._draws).random() < 0.02:
            self.counts["all gone"] += 1
            self._polls_without_anybody = 3


class HostileGrid(AppGrid):
    """Some devices send their gradients with the sign flipped, a hundred times."""

    def __init__(self, config, share):
        super().__init__(config)
        drawn = rng_for(3, "hostile").permutation(sorted(self.apps))
        self.hostile = set(drawn[: round(share * len(drawn))].tolist())
        self.spoiled = 0

    def _deliver(self, message):
        reply = super()._deliver(message)
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "train" and node in self.hostile:
            change_all(-100.0)(reply.content)
            self.spoiled += 1
        return reply


def rss_slope_bytes_per_round(rss_bytes):
    """Slope of a line through the memory of the last two thirds of the rounds."""
    tail = rss_bytes[len(rss_bytes) // 3 :]
    return float(np.polyfit(np.arange(len(tail)), tail, 1)[0])
