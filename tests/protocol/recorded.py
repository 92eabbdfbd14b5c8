"""Record the conversations anew: ``python -m tests.protocol.recorded``.

Server and device are those of this project, messages are Flower's own; nodes, runs and
times are fixed, and the model's weights are numpy's, so that a recording is the same on
every machine but for the last bits of what was computed.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, RecordDict
from flwr.app.message import array as flower_array
from flwr.app.message import make_message, remove_content_from_message
from flwr.app.metadata import Metadata
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_to_proto
from flwr.proto import fleet_pb2, heartbeat_pb2, message_pb2
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
)

from lola_flwr.clients import LoLaClient
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.export.data import ArrayFiles
from lola_flwr.model.loading import fingerprint
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.held_versions import HeldVersions
from lola_flwr.wire.packing import VALUES, pack
from lola_flwr.wire.records import Assignment
from lola_flwr.wire.versions import Versions, model_pieces
from tests.export.small import CLASSIFIER, classifier, exported
from tests.protocol.conversation import Exchange, write

NODE, SUPERLINK, RUN, TASK = 4_711, 1, 815, 42
CREATED, ANSWERED = 1_800_000_000.0, 1_800_000_002.5
PROFILE = DeviceProfile("device-0", 2e10, 4e9, snr_db=12.5)
# What devices say of themselves, with PyTorch and with programs.
PROFILES = {
    "profile": PROFILE,
    "profile-programs": replace(
        PROFILE, trains_one_block=True, num_examples=9, batch_size=6
    ),
}
SEED = 3
# Small, so that the values are several chunks.
CHUNK_BYTES = 8192
CODECS = ("fp32", "bf16")


def model():
    """Return the small classifier, with weights that are the same everywhere."""
    made = classifier()
    with torch.no_grad():
        for index, (_, parameter) in enumerate(sorted(made.named_parameters())):
            drawn = np.random.default_rng(index).standard_normal(parameter.shape)
            parameter.copy_(torch.from_numpy(0.2 * drawn))
    return made


def what_is_exported():
    """Return the small classifier as it is exported."""
    return exported(model(), CLASSIFIER, name="recorded")


def examples():
    """Return the device's examples: more than a batch, some of them shorter."""
    rng = np.random.default_rng(5)
    ids = rng.integers(5, 60, (9, 10))
    mask = np.ones_like(ids)
    ids[6:, 7:], mask[6:, 7:] = 1, 0
    labels = rng.integers(0, 2, 9)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def values_of(of):
    """Return what the device is sent: the trainable values, by name."""
    parameters = dict(of.model.named_parameters())
    return {n: parameters[n].numpy(force=True) for n in of.partition.trainable}


def device(of, profile=PROFILE):
    """Return the device that answers, with PyTorch."""
    draw = ArrayFiles(arrays=examples(), seed=SEED)
    return BlockDevice(
        profile=profile,
        load_model=lambda: (of.model, of.partition),
        batch_source=lambda *given: {
            name: torch.from_numpy(array) for name, array in draw(*given).items()
        },
        simulated_compute_s=lambda _: 1.5,
    )


def message(kind, content):
    """Return a message to the device, as its SuperLink keeps it."""
    metadata = Metadata(
        run_id=RUN,
        message_id="",
        src_node_id=SUPERLINK,
        dst_node_id=NODE,
        reply_to_message_id="",
        group_id="1",
        created_at=CREATED,
        ttl=43_200.0,
        message_type=kind,
        src_task_id=TASK,
    )
    made = make_message(metadata, content=RecordDict(content))
    metadata.__dict__["_message_id"] = made.object_id
    return made


def training(of, arrays=None, **options):
    """Return a message of training."""
    given = {
        "server_round": 1,
        "block_index": 1,
        "share": 0.5,
        "batch_size": of.batch_size,
        "codec": "fp32",
        "base_fingerprint": fingerprint(of.model, of.partition.frozen),
        **options,
    }
    arrays = {VALUES: pack(values_of(of))} if arrays is None else arrays
    record = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    config = ConfigRecord({**Assignment(**given).to_record()})
    return message("train", {"arrays": record, "config": config})


def versions(of):
    """Return what the server says of a whole model, and of one that leaves out all."""
    values = values_of(of)
    pieces = model_pieces(of.partition, [*values])
    version = Versions(pieces).of([*values.values()])
    whole = HeldVersions().manifest("d", version)
    held = HeldVersions().acknowledged("d", whole, whole.version)
    return whole.to_text(), held.manifest("d", version).to_text()


def questions(of):
    """Return what the device is asked, by the conversation's name."""
    whole, nothing = versions(of)
    return {
        **{name: message("query.lola_profile", {}) for name in PROFILES},
        **{f"train-{codec}": training(of, codec=codec) for codec in CODECS},
        "train-block": training(of, block_index=2, sends_head=False, batch_size=4),
        "train-version": training(of, manifest=whole),
        "held": training(of, arrays={}, manifest=nothing),
        "refused-model": training(of, base_fingerprint="0" * 64),
        "refused-codec": training(of, codec="int4"),
        "refused-method": training(of, direction_seed=3),
        "evaluate": message(
            "evaluate",
            {
                "arrays": ArrayRecord({VALUES: Array(pack(values_of(of)))}),
                "config": ConfigRecord({"server-round": 1}),
            },
        ),
    }


def reply_of(answers, question):
    """Return a device's reply at a fixed time, as its node sends it."""
    context = Context(RUN, NODE, {}, RecordDict(), {})
    try:
        reply = LoLaClient(lambda _: answers)(question, context)
        content, error = reply.content, None
    except Exception as failure:
        content = None
        error = Error(
            ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"{type(failure)}:<'{failure}'>"
        )
    asked = question.metadata
    metadata = Metadata(
        run_id=asked.run_id,
        message_id="",
        src_node_id=asked.dst_node_id,
        dst_node_id=asked.src_node_id,
        reply_to_message_id=asked.message_id,
        group_id=asked.group_id,
        created_at=ANSWERED,
        ttl=asked.created_at + asked.ttl - ANSWERED,
        message_type=asked.message_type,
        src_task_id=asked.dst_task_id,
        dst_task_id=asked.src_task_id,
    )
    made = make_message(metadata, content=content, error=error)
    metadata.__dict__["_message_id"] = made.object_id
    return made


def exchange(name, request, response):
    """Return an exchange as it goes over HTTP."""
    return Exchange(
        f"/v1/fleet/{name}",
        request.SerializeToString(deterministic=True),
        response.SerializeToString(deterministic=True),
    )


def conversation(question, reply):
    """Return all exchanges by which a question is fetched and answered."""
    node = Node(node_id=NODE)
    stripped, sent = (remove_content_from_message(m) for m in (question, reply))
    parts = {
        name: {i: o.deflate() for i, o in get_all_nested_objects(m).items()}
        for name, m in (("asked", question), ("sent", reply))
    }
    of_run = {"node": node, "run_id": RUN}
    return [
        exchange(
            "pull-messages",
            fleet_pb2.PullMessagesRequest(node=node),
            fleet_pb2.PullMessagesResponse(
                messages_list=[message_to_proto(stripped)],
                message_object_trees=[get_object_tree(question)],
            ),
        ),
        *(
            exchange(
                "pull-object",
                message_pb2.PullObjectRequest(object_id=i, **of_run),
                message_pb2.PullObjectResponse(
                    object_found=True, object_available=True, object_content=content
                ),
            )
            for i, content in parts["asked"].items()
        ),
        exchange(
            "confirm-message-received",
            message_pb2.ConfirmMessageReceivedRequest(
                message_object_id=question.metadata.message_id, **of_run
            ),
            message_pb2.ConfirmMessageReceivedResponse(),
        ),
        exchange(
            "push-messages",
            fleet_pb2.PushMessagesRequest(
                node=node,
                messages_list=[message_to_proto(sent)],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[1.5],
            ),
            fleet_pb2.PushMessagesResponse(
                reconnect=fleet_pb2.Reconnect(reconnect=5),
                results={reply.metadata.message_id: 0},
                objects_to_push=[*parts["sent"]],
                session_id="session",
            ),
        ),
        *(
            exchange(
                "push-object",
                message_pb2.PushObjectRequest(
                    object_id=i, object_content=content, session_id="session", **of_run
                ),
                message_pb2.PushObjectResponse(stored=True),
            )
            for i, content in parts["sent"].items()
        ),
    ]


def joining():
    """Return how a device joins, says that it is there, and leaves."""
    node, key = Node(node_id=NODE), b"-----BEGIN PUBLIC KEY-----\n"
    return [
        exchange(
            "register-node",
            fleet_pb2.RegisterNodeFleetRequest(public_key=key),
            fleet_pb2.RegisterNodeFleetResponse(node_id=NODE),
        ),
        exchange(
            "activate-node",
            fleet_pb2.ActivateNodeRequest(public_key=key, heartbeat_interval=30),
            fleet_pb2.ActivateNodeResponse(node_id=NODE),
        ),
        exchange(
            "send-node-heartbeat",
            heartbeat_pb2.SendNodeHeartbeatRequest(node=node, heartbeat_interval=30),
            heartbeat_pb2.SendNodeHeartbeatResponse(success=True),
        ),
        exchange(
            "pull-messages",
            fleet_pb2.PullMessagesRequest(node=node),
            fleet_pb2.PullMessagesResponse(),
        ),
        exchange(
            "deactivate-node",
            fleet_pb2.DeactivateNodeRequest(node_id=NODE),
            fleet_pb2.DeactivateNodeResponse(),
        ),
        exchange(
            "unregister-node",
            fleet_pb2.UnregisterNodeFleetRequest(node_id=NODE),
            fleet_pb2.UnregisterNodeFleetResponse(),
        ),
    ]


def main():
    """Write all conversations."""
    of = what_is_exported()
    asked = questions(of)
    for question in asked.values():
        slice_small(question)
    write("join", joining())
    for name, question in asked.items():
        answers = device(of, PROFILES.get(name, PROFILE))
        write(name, conversation(question, reply_of(answers, question)))


def slice_small(question):
    """Cut a message's arrays into small chunks, which Flower keeps."""
    usual = flower_array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE
    flower_array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = CHUNK_BYTES
    try:
        for record in question.content.array_records.values():
            for array in record.values():
                array.__dict__.pop("_chunks", None)
                array.is_dirty = True
                array.slice_array()
    finally:
        flower_array.FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE = usual
    question.metadata.__dict__["_message_id"] = question.object_id


if __name__ == "__main__":
    main()
