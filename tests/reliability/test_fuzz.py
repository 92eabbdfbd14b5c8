"""Everything that reads bytes or records of a device, under malformed input.

A reader may raise what it documents, and nothing else; and it may take no more memory
than is known beforehand, from the message that was received and the arrays that were
asked for. The fast tests spend 25 inputs on each reader, the slow ones 10,000.
"""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lola_flwr.run.checkpoint import CheckpointDamaged, Checkpoints, Snapshot, read
from lola_flwr.server.replies import DeviceReply, UpdateReader, UpdateRefused
from lola_flwr.strategies import message
from lola_flwr.strategies.deadline_grid import _is_readable
from lola_flwr.system.devices import DeviceProfile, InvalidProfile, simulated_device
from lola_flwr.wire.codec import CODECS, codec_named
from lola_flwr.wire.npy import MalformedArray, read_npy
from lola_flwr.wire.packing import GRADIENTS, pack
from lola_flwr.wire.records import Assignment, MalformedRecord, UpdateReport
from tests.server.coordinators import (
    PARTITION,
    SHAPES,
    honest_reply,
    make_coordinator,
    npy,
)

# What a parser may take beyond the arrays' own size: headers, messages, small objects.
# (Python's own takes 133 KiB for a header of 128 bytes that is all parentheses.)
OVERHEAD_BYTES = 160 * 1024

texts = st.text(max_size=30) | st.sampled_from(["nan", "1e400", "x" * 100_000, "\n"])
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([2**63, -(2**63) - 1, 10**400])
    | st.floats()
    | texts
    | st.binary(max_size=30)
    | st.just(b"\x00" * 100_000)
)
values = scalars | st.lists(scalars, max_size=3)


def records(valid):
    """Records that are nearly right, or not at all."""
    keys = st.sampled_from([*valid, "failure", "detail"]) | st.text(max_size=8)
    changes = st.dictionaries(keys, values, max_size=4)
    missing = st.sets(st.sampled_from(list(valid)), max_size=2)

    def changed(changes, missing):
        return {k: v for k, v in {**valid, **changes}.items() if k not in missing}

    return st.builds(changed, changes, missing) | changes


@st.composite
def damaged(draw, whole):
    """Bytes that were cut, changed, or put together anew."""
    data = bytearray(whole)
    for _ in range(draw(st.integers(0, 3))):
        start = draw(st.integers(0, len(data)))
        kind = draw(st.sampled_from(["cut", "insert", "overwrite", "repeat"]))
        some = draw(st.binary(max_size=40))
        if kind == "cut":
            del data[start:]
        elif kind == "insert":
            data[start:start] = some
        elif kind == "overwrite":
            data[start : start + len(some)] = some
        else:
            data *= 2
    return bytes(data)


# Headers are Python literals: deep nesting, huge numbers, other types, other keys.
literals = st.recursive(
    st.sampled_from(
        ["1", "-1", "9" * 4000, "'<f4'", "'|O'", "None", "True", "1e99", "b''"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda items: f"({', '.join(items)},)")
        | st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]")
        | st.tuples(inner, inner).map(lambda pair: f"{{{pair[0]}: {pair[1]}}}")
    ),
    max_leaves=6,
) | st.integers(1, 9000).map(lambda depth: "(" * depth)


@st.composite
def npy_like(draw, array):
    """Bytes in .npy format, more or less like those of an array."""
    kind = draw(st.sampled_from(["damaged", "other values", "other header"]))
    if kind == "damaged":
        return draw(damaged(npy(array)))
    if kind == "other values":
        body = draw(st.binary(min_size=array.nbytes, max_size=array.nbytes))
        return npy(np.frombuffer(body, array.dtype).reshape(array.shape))
    shapes = [str(array.shape), "(4000000000, 4000000000)", "(-1,)"]
    fields = {
        "'descr'": draw(st.sampled_from([f"'{array.dtype.str}'", "'|O'"]) | literals),
        "'fortran_order'": draw(st.sampled_from(["False", "True"]) | literals),
        "'shape'": draw(st.sampled_from(shapes) | literals),
    }
    text = "{" + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}"
    header = text.encode() + b" " * draw(st.integers(0, 100)) + b"\n"
    length = draw(st.sampled_from([len(header), 0, 65535, 7]))
    version = draw(st.sampled_from([b"\x01\x00", b"\x02\x00", b"\xff\xff"]))
    body = draw(st.binary(max_size=80))
    return b"\x93NUMPY" + version + length.to_bytes(2, "little") + header + body


SQUARE = np.ones((4, 4), np.float32)


def named(names, arrays):
    return dict(zip(names, arrays, strict=True))


@dataclass(frozen=True)
class Reader:
    """One reader: what it is fed, and what it may raise."""

    inputs: st.SearchStrategy[Any]
    call: Callable[[Any], object]
    raises: tuple[type[Exception], ...] = ()


def update_readers():
    """The reader of whole replies, under every codec and for both kinds of update."""
    block = 1
    names = PARTITION.update_names(block)
    state = {name: np.ones(SHAPES[name], np.float32) for name in PARTITION.trainable}
    for codec_name in CODECS:
        assignment = Assignment(
            server_round=3,
            block_index=block,
            share=0.5,
            batch_size=8,
            codec=codec_name,
            base_fingerprint="base",
        )
        codec = codec_named(codec_name)
        for kind in ("gradient", "weights"):
            sent, wire = names, [state[name] for name in names]
            if kind == "gradient":
                sent = (GRADIENTS,)
                wire = [pack({name: codec.encode(state[name]) for name in names})]
            report = UpdateReport(3, block, kind, 0.5, 0.1, "measured").to_record()
            arrays = st.one_of([npy_like(array) for array in wire])
            good = [npy(array) for array in wire]
            mixed = st.tuples(*[st.just(g) | arrays for g in good])
            tensors = (
                mixed.map(list)
                | mixed.map(partial(named, sent))
                | st.lists(arrays, max_size=9)
                | st.dictionaries(st.sampled_from([*sent, "x"]), arrays)
            )
            replies = st.builds(
                DeviceReply,
                device_id=st.just("id-0"),
                tensors=tensors,
                num_examples=st.just(8) | values,
                report=st.just(report) | records(report),
            )
            reader = UpdateReader(PARTITION, tuple(state), 10.0)
            read_reply = partial(reader.read, assignment=assignment, sent=state)
            name = f"reply {codec_name} {kind}"
            yield name, Reader(replies, read_reply, (UpdateRefused,))


def round_of(replies):
    """A whole round: nothing may be raised, whatever arrives."""
    coordinator = make_coordinator()
    ids = ["id-0", "id-1", "id-2", "id-3"]
    plan = coordinator.plan_round(1, ids)
    for reply in replies:
        reply.report.setdefault("server-round", 1)
    coordinator.complete_round(plan, replies).to_json()
    assert all(np.isfinite(v).all() for v in coordinator.values().values())
    coordinator.plan_round(2, ids)


def add_device(properties):
    coordinator = make_coordinator()
    coordinator.add_device("new", properties)
    coordinator.plan_round(1, ["id-0", "id-1", "id-2", "id-3", "new"])


def contents():
    """Contents of Flower messages that have little to do with what was asked for."""
    integers = st.integers(-(2**63), 2**63 - 1)
    numbers = st.floats() | integers | st.lists(integers) | st.lists(st.floats())
    metric = st.builds(MetricRecord, st.dictionaries(st.text(max_size=5), numbers))
    legal = st.booleans() | st.floats() | st.text(max_size=9) | st.binary(max_size=9)
    config = st.builds(ConfigRecord, st.dictionaries(st.text(max_size=12), legal))
    array = st.builds(
        Array,
        st.sampled_from(["float32", "odd", ""]),
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from(["numpy.ndarray", "pickle", ""]),
        npy_like(SQUARE),
    )
    arrays = st.dictionaries(st.sampled_from([*SHAPES, "x"]), array, max_size=4)
    record = metric | config | st.builds(ArrayRecord, arrays)
    ours = ["arrays", "metrics", "lola-report", "lola-profile", "x"]
    legacy = [f"fitres.{part}" for part in ("parameters", "metrics", "num_examples")]
    keys = st.sampled_from([*ours, *legacy, "fitres.status"])
    return st.dictionaries(keys, record, max_size=5).map(RecordDict)


def reply_message(content, message_type="train", node=1):
    ask = Message(RecordDict(), dst_node_id=node, message_type=message_type)
    ask.metadata.__dict__["_message_id"] = "1"
    return Message(content, reply_to=ask)


def strategy_round(contents):
    """The Message API strategy's training and evaluation with such replies."""
    coordinator = make_coordinator(num_devices=0)
    ids = [str(index) for index in range(1, 5)]
    for index, device in enumerate(ids):
        coordinator.add_device(device, simulated_device(index, seed=1).to_properties())
    strategy = message.LoLaDeft(coordinator, fraction_evaluate=1.0)
    strategy._rounds.plan(1, connected=lambda: ids, ask_profiles=lambda _: {})
    replies = [reply_message(c, node=1 + i % 4) for i, c in enumerate(contents)]
    strategy.aggregate_train(1, replies)
    strategy.aggregate_evaluate(1, replies)


def checkpoint_bytes(tmp_path):
    snapshot = Snapshot({"a": np.ones((2, 3), np.float32)}, {"round": 1})
    return Checkpoints(tmp_path).save(1, snapshot).read_bytes()


def read_checkpoint(path, data):
    path.write_bytes(data)
    read(path)


PROFILE = simulated_device(9, seed=1).to_properties()
REPORT = UpdateReport(1, 0, "gradient", 0.5, 0.1, "measured").to_record()
PLAN = make_coordinator().plan_round(1, ["id-0", "id-1", "id-2", "id-3"])
READERS = {
    "npy": Reader(
        npy_like(SQUARE),
        lambda data: read_npy(data, shape=(4, 4), dtype=np.dtype("f4")),
        (MalformedArray,),
    ),
    "report": Reader(records(REPORT), UpdateReport.from_record, (MalformedRecord,)),
    "assignment": Reader(
        records(next(iter(PLAN.assignments.values())).to_record()),
        Assignment.from_record,
        (MalformedRecord,),
    ),
    "profile": Reader(
        records(PROFILE), DeviceProfile.from_properties, (InvalidProfile,)
    ),
    "device": Reader(records(PROFILE), add_device, (InvalidProfile,)),
    "round": Reader(
        st.lists(
            st.builds(
                honest_reply,
                st.just(PLAN),
                st.sampled_from(list(PLAN.assignments)),
                num_examples=st.just(8) | values,
                report=records(REPORT),
            ),
            max_size=5,
        ),
        round_of,
    ),
    "legacy message": Reader(contents(), lambda c: _is_readable(reply_message(c))),
    "strategy": Reader(st.lists(contents(), max_size=4), strategy_round),
    **dict(update_readers()),
}


def traced(reader, value):
    """Return whether a reader takes a value, and the memory it takes, bytes."""
    # Traced is the call alone: to trace the drawing of inputs takes ages.
    tracemalloc.start()
    try:
        reader.call(value)
    except reader.raises as error:
        assert len(str(error)) < 2000, "a device's words go into the log"
        assert "\n" not in str(error)
        outcome = "refused"
    else:
        outcome = "read"
    finally:
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return outcome, peak_bytes


def fuzz(reader, budget):
    outcomes = {"read": 0, "refused": 0}

    @settings(
        max_examples=budget,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(reader.inputs)
    def one(value):
        outcome, peak_bytes = traced(reader, value)
        if peak_bytes >= OVERHEAD_BYTES:
            # What a process loads once, a module or a cache, is no input's doing.
            outcome, peak_bytes = traced(reader, value)
        outcomes[outcome] += 1
        # The arrays that these tests ask for have a few hundred bytes.
        assert peak_bytes < OVERHEAD_BYTES

    one()
    return outcomes


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


SLOW = [pytest.mark.slow, pytest.mark.timeout(3600)]
BUDGETS = [25, pytest.param(10_000, marks=SLOW)]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("name", READERS)
def test_malformed_input_is_refused_in_bounded_memory(name, budget):
    outcomes = fuzz(READERS[name], budget)
    assert outcomes["read"] > 0
    assert outcomes["refused"] > 0 or not READERS[name].raises


@pytest.mark.parametrize("budget", BUDGETS)
def test_damaged_checkpoints_are_refused_in_bounded_memory(tmp_path, budget):
    path = tmp_path / "damaged"
    reader = Reader(
        damaged(checkpoint_bytes(tmp_path)),
        lambda data: read_checkpoint(path, data),
        (CheckpointDamaged,),
    )
    outcomes = fuzz(reader, budget)
    assert min(outcomes.values()) > 0
