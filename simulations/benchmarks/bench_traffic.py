"""Bytes and seconds of what travels: codecs, downlink by version, the head's share.

Everything at RoBERTa-base's shape, as Flower serialises it. Run with
``pytest simulations/benchmarks/bench_traffic.py -s``.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.costs.shapes import model_shapes
from lola_flwr.device.store import complete
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.wire.codec import codec_named, encode_with_feedback
from lola_flwr.wire.held_versions import HeldVersions
from lola_flwr.wire.packing import GRADIENTS, pack, unpack
from lola_flwr.wire.payload import payload_bits
from lola_flwr.wire.versions import model_pieces

BLOCK = 3


def roberta_base() -> tuple[dict[str, tuple[int, ...]], BlockPartition]:
    shapes = {n: tuple(s) for n, s in model_shapes("roberta-base").shapes.items()}
    return shapes, partition_parameters(shapes)


def seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.mark.parametrize("name", ["fp32", "bf16", "fp16", "int8", "topk:0.01"])
def test_bytes_up(name):
    """A block and the head: what is sent, counted and ideal; seconds of the codec."""
    shapes, partition = roberta_base()
    codec = codec_named(name)
    rng = np.random.default_rng(0)
    names = partition.update_names(BLOCK)
    gradients = {n: rng.standard_normal(shapes[n], dtype=np.float32) for n in names}
    packed: list = []

    def encode():
        packed.append(
            pack({n: encode_with_feedback(codec, gradients[n])[0] for n in names})
        )

    def decode():
        wire = unpack(packed[0], codec, {n: shapes[n] for n in names})
        for n, values in wire.items():
            codec.decode(values, shapes[n])

    encode_s, decode_s = seconds(encode), seconds(decode)
    arrays = ArrayRecord({GRADIENTS: Array(packed[0])})
    content = RecordDict({"arrays": arrays, "metrics": MetricRecord({"loss": 0.7})})
    reply = Message(content, dst_node_id=1, message_type="train")
    sent = sum(len(part.deflate()) for part in get_all_nested_objects(reply).values())
    counted = payload_bits(partition, shapes, codec)[BLOCK] / 8
    bits = {"fp32": 32, "bf16": 16, "fp16": 16, "int8": 8, "topk:0.01": 0.01 * 48}
    ideal = bits[name] / 8 * sum(values.size for values in gradients.values())
    print(
        f"\n{name}: sent {sent / 1e6:.3f} MB, counted {counted / sent:.4f} of it, "
        f"values alone {ideal / sent:.4f}; encode {encode_s:.3f} s, decode "
        f"{decode_s:.3f} s"
    )
    assert counted == pytest.approx(sent, rel=0.01)
    assert ideal == pytest.approx(sent, rel=0.01)


@pytest.mark.parametrize("num_changed", [0, 1, 12])
def test_bytes_down(num_changed, tmp_path):
    """What is sent in the second round after so many blocks, and the head, changed."""
    shapes, partition = roberta_base()
    rng = np.random.default_rng(0)
    names = partition.trainable
    arrays = {n: rng.standard_normal(shapes[n], dtype=np.float32) for n in names}
    versions = HeldVersions(model_pieces(partition, names))
    first = versions.manifests(["a"], [*arrays.values()])["a"]
    write_s = seconds(lambda: complete([*arrays.values()], first, tmp_path))
    versions.acknowledge("a", first, first.version)
    changed = [n for block in partition.blocks[:num_changed] for n in block]
    changed += partition.head if num_changed else ()
    for name in changed:
        arrays[name] = arrays[name] + np.float32(1)
    values = [*arrays.values()]
    manifests: dict = {}
    digest_s = seconds(lambda: manifests.update(versions.manifests(["a"], values)))
    sent = [values[i] for i in manifests["a"].sent_positions]
    read_s = seconds(lambda: complete(sent, manifests["a"], Path(tmp_path)))
    sent_bytes = sum(array.nbytes for array in sent)
    all_bytes = sum(array.nbytes for array in values)
    print(
        f"\n{num_changed} blocks changed: {sent_bytes / 1e6:.2f} MB of "
        f"{all_bytes / 1e6:.2f} MB sent ({sent_bytes / all_bytes:.3f}); digests on the "
        f"server {digest_s:.2f} s; on the device {write_s:.2f} s in round 1, "
        f"{read_s:.2f} s in round 2"
    )
    assert sent_bytes == sum(arrays[name].nbytes for name in changed)


def test_share_of_the_head():
    """Bytes up of all blocks together, by who sends the head."""
    shapes, partition = roberta_base()
    lowest, *_ = np.eye(partition.num_blocks, dtype=bool)
    for name in ("fp32", "bf16", "int8"):
        every, one, none = (
            payload_bits(partition, shapes, codec_named(name), head).sum() / 8e6
            for head in (None, lowest, np.zeros_like(lowest))
        )
        print(
            f"\n{name}: every device {every:.2f} MB, one device {one:.2f} MB "
            f"({one / every:.3f}), nobody {none:.2f} MB"
        )
        assert none < one < every
