from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.packing import GRADIENTS, pack, packed_type
from lola_flwr.wire.payload import (
    UpdateSizes,
    head_senders,
    payload_bits,
    projections_bytes,
    update_bytes,
)
from lola_flwr.wire.records import REPORT_KEY, UpdateReport
from lola_flwr.zeroth_order.directions import MAX_DIRECTIONS
from tests.strategies.in_process import message_bytes

LAYER = "roberta.encoder.layer"
# A layer of RoBERTa-base: modules of outputs x inputs, and two normalisations.
LINEAR = {
    "attention.self.query": (768, 768),
    "attention.self.key": (768, 768),
    "attention.self.value": (768, 768),
    "attention.output.dense": (768, 768),
    "intermediate.dense": (3072, 768),
    "output.dense": (768, 3072),
}
HEAD = {
    "classifier.dense.weight": (768, 768),
    "classifier.dense.bias": (768,),
    "classifier.out_proj.weight": (2, 768),
    "classifier.out_proj.bias": (2,),
}


def full_layers():
    shapes = {}
    for layer in range(12):
        for module, (outputs, inputs) in LINEAR.items():
            shapes[f"{LAYER}.{layer}.{module}.weight"] = (outputs, inputs)
            shapes[f"{LAYER}.{layer}.{module}.bias"] = (outputs,)
        for module in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"{LAYER}.{layer}.{module}.weight"] = (768,)
            shapes[f"{LAYER}.{layer}.{module}.bias"] = (768,)
    return shapes | HEAD


def lora_adapters(rank=8):
    """The adapters of peft's default targets for RoBERTa: queries and values."""
    shapes = {}
    for layer in range(12):
        for module in ("query", "value"):
            prefix = f"{LAYER}.{layer}.attention.self.{module}"
            shapes[f"{prefix}.lora_A.default.weight"] = (rank, 768)
            shapes[f"{prefix}.lora_B.default.weight"] = (768, rank)
    return shapes | HEAD


ADAPTERS = lora_adapters()


REPORT = UpdateReport(
    server_round=7,
    block_index=3,
    update_kind="gradient",
    loss=0.6931,
    compute_s=1.234,
    compute_clock="measured",
    held="0123456789abcdef" * 2,
)


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


def serialised_bytes(arrays, interface, **changes):
    """Bytes of a reply as Flower puts it on the wire, object by object."""
    report = replace(REPORT, **changes).to_record()
    if interface == "message":
        content = {"metrics": MetricRecord({"num-examples": 32})}
        content[REPORT_KEY] = ConfigRecord({**report})
        if arrays:
            content["arrays"] = ArrayRecord(
                {name: Array(values) for name, values in arrays.items()}
            )
        content = RecordDict(content)
    else:
        parameters = ndarrays_to_parameters([*arrays.values()])
        result = FitRes(Status(Code.OK, ""), parameters, 32, report)
        content = fitres_to_recorddict(result, keep_input=True)
    ask = Message(RecordDict(), dst_node_id=2**62, message_type="train", group_id="7")
    ask.metadata.__dict__["_message_id"] = "f" * 64
    return message_bytes(Message(content, reply_to=ask))


@pytest.mark.parametrize("head", ["every", "shallowest", "rotating"])
@pytest.mark.parametrize("by_name", [True, False])
def test_several_blocks_are_one_message(head, by_name):
    partition = partition_parameters(ADAPTERS)
    sizes = UpdateSizes(partition, ADAPTERS, "fp32", head, by_name=by_name)
    trained = np.ones(12, bool)
    alone = sizes.payloads(5, trained)
    together = sizes.payloads(5, trained, [(0, 1, 2), (3, 4, 5, 6), (7, 8, 9, 10, 11)])
    # As many heads as before with "every", else one, in the span with that block.
    heads = {"every": [0, 3, 7], "shallowest": [7], "rotating": [3]}[head]
    assert [n for n in (0, 3, 7) if together.sends_head[n]] == heads
    for first, last in ((0, 2), (3, 6), (7, 11)):
        names = partition.update_names(
            *range(first, last + 1), head=bool(together.sends_head[first])
        )
        assert together.bits[0, first] == 8 * update_bytes(
            names, ADAPTERS, codec_named("fp32"), by_name=by_name
        )
    others = [n for n in range(12) if n not in (0, 3, 7)]
    np.testing.assert_array_equal(together.bits[:, others], alone.bits[:, others])


@pytest.mark.parametrize("codec_name", ["fp32", "bf16", "int8", "topk:0.01"])
@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("interface", ["message", "legacy"])
@pytest.mark.parametrize("shapes", [full_layers(), ADAPTERS], ids=["full", "lora"])
def test_what_is_counted_is_what_is_sent(codec_name, head, interface, shapes, rng):
    partition = partition_parameters(shapes)
    codec = codec_named(codec_name)
    names = partition.update_names(3, head=head)
    packed = pack(
        {
            name: codec.encode(rng.standard_normal(shapes[name], dtype=np.float32))
            for name in names
        }
    )
    counted = payload_bits(partition, shapes, codec, np.full(12, head))[3] / 8
    sent = serialised_bytes({GRADIENTS: packed}, interface)
    if codec_name == "topk:0.01" and shapes is ADAPTERS and not head:
        # The message is smaller than what Flower adds to it, which varies.
        assert counted == pytest.approx(sent, abs=250)
    else:
        assert counted == pytest.approx(sent, rel=0.01)


@pytest.mark.parametrize(
    ("codec_name", "bits"),
    [("fp32", 32), ("bf16", 16), ("fp16", 16), ("int8", 8), ("topk:0.01", 0.48)],
)
def test_what_is_sent_is_the_block_s_values_within_1_percent(codec_name, bits, rng):
    shapes = full_layers()
    partition = partition_parameters(shapes)
    codec = codec_named(codec_name)
    names = partition.update_names(3)
    packed = pack(
        {
            name: codec.encode(rng.standard_normal(shapes[name], dtype=np.float32))
            for name in names
        }
    )
    values = sum(math.prod(shapes[name]) for name in names)
    for interface in ("message", "legacy"):
        sent = serialised_bytes({GRADIENTS: packed}, interface)
        assert sent == pytest.approx(bits / 8 * values, rel=0.01)


@pytest.mark.parametrize("num_directions", [1, 16, MAX_DIRECTIONS])
def test_projections_are_counted_as_sent_and_below_1_kb(num_directions):
    counted = projections_bytes(num_directions)
    sent = serialised_bytes(
        {},
        "message",
        # The longest report that there is.
        server_round=2**31,
        block_index=2**31,
        update_kind="zeroth-order",
        compute_clock="simulated",
        uplink_limit="pacing",
        peak_memory_bytes=1e9,
        direction_seed=2**62,
        projections=bytes(4 * num_directions),
    )
    assert counted == pytest.approx(sent, abs=50)
    assert sent < 1000


def test_weights_are_counted_by_name(rng):
    """As devices send them that train by themselves: an array for each parameter."""
    partition = partition_parameters(ADAPTERS)
    names = partition.update_names(3, head=False)
    arrays = {name: rng.random(ADAPTERS[name]).astype("f4") for name in names}
    counted = payload_bits(
        partition, ADAPTERS, codec_named("fp32"), np.zeros(12, bool), by_name=True
    )
    sent = serialised_bytes(arrays, "message")
    assert counted[3] / 8 == pytest.approx(sent, rel=0.01)


def test_lora_of_rank_8_is_under_600_kb_for_all_blocks_together():
    shapes = lora_adapters()
    partition = partition_parameters(shapes)
    bf16 = codec_named("bf16")
    arrays_bytes = sum(
        packed_type(bf16, [shapes[name] for name in block]).nbytes + 128
        for block in partition.blocks
    )
    assert arrays_bytes == 591_360
    # With Flower's records around them: 12 messages.
    bits = payload_bits(partition, shapes, bf16, np.zeros(12, bool))
    assert bits.sum() / 8 < 607_000
    with_head = payload_bits(partition, shapes, bf16)
    assert with_head.sum() > 20 * bits.sum(), "the head costs more than all blocks"


TRAINED = np.array([False, True, True, False, True, False])


@pytest.mark.parametrize(
    ("policy", "senders"),
    [
        ("every", [[1, 2, 4]] * 4),
        ("shallowest", [[4]] * 4),
        ("rotating", [[1], [2], [4], [1]]),
    ],
)
def test_who_sends_the_head(policy, senders):
    for server_round in range(1, 5):
        sends = head_senders(policy, server_round, TRAINED)
        assert np.flatnonzero(sends).tolist() == senders[server_round - 1]


def test_a_round_s_payloads_differ_by_the_head_and_by_codec():
    shapes = full_layers()
    sizes = UpdateSizes(partition_parameters(shapes), shapes, "auto", "shallowest")
    payloads = sizes.payloads(1, np.ones(12, bool))
    assert payloads.codecs == ("int8", "bf16", "fp32")
    assert (np.diff(payloads.bits, axis=0) > 0).all(), "from coarse to fine"
    head = 768 * 768 + 768 + 2 * 768 + 2
    assert payloads.bits[2, 11] - payloads.bits[2, 0] == pytest.approx(
        32 * head, rel=1e-3
    )
    assert payloads.sends_head.tolist() == [False] * 11 + [True]


@pytest.mark.parametrize(
    ("codec", "head", "message"),
    [("zip", "every", "codec='zip' is unknown"), ("fp32", "none", "head='none' is")],
)
def test_unknown_names(codec, head, message):
    shapes = full_layers()
    with pytest.raises(UserError, match=message):
        UpdateSizes(partition_parameters(shapes), shapes, codec, head)
