"""A project's own training code, sent only what has changed."""

from __future__ import annotations

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from threading import Barrier

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp
from flwr.common import FitIns, ndarrays_to_parameters, parameters_to_ndarrays
from flwr.compat.common import recorddict_compat as compat

from lola_flwr.allocation import RoundMode
from lola_flwr.build import (
    AllocationOptions,
    RoundSettings,
    Transfer,
    coordinator_for_weights,
)
from lola_flwr.clients import AssignedBlock, block_mod, held_mod, profile_mod
from lola_flwr.clients.held_copies import complete_arrays
from lola_flwr.machine.files import replacing
from lola_flwr.server.replies import DeviceReply
from lola_flwr.wire.versions import Manifest, Piece, Versions
from tests.clients.own_project import (
    Net,
    federate,
    fit,
    make_app,
    plain_train,
    prepared_train,
)

APPS = {
    "prepared": lambda held: make_app(prepared_train, [held]),
    "mod": lambda held: make_app(plain_train, [held, block_mod]),
}


def nbytes(model, names):
    state = model.state_dict()
    return sum(state[name].numpy().nbytes for name in names)


@pytest.mark.parametrize("kind", APPS)
def test_what_never_changes_is_sent_once(model, kind, tmp_path):
    run = partial(federate, model, mode=RoundMode(blocks=(2,)), rounds=5)
    records, result, _ = run(
        APPS[kind](partial(held_mod, directory=tmp_path)), downlink="changed"
    )
    assert [record.refused for record in records] == [{}] * 5
    everything = nbytes(model, model.state_dict())
    changing = [
        name
        for name in model.state_dict()
        if name.startswith(("layers.2", "head")) or "running" in name
    ] + [n for n in model.state_dict() if n.endswith("2.norm.num_batches_tracked")]
    seen = set()
    for record in records:
        (block,) = record.blocks
        if block.device in seen:
            # Counters of batches are int64, and change with the other statistics.
            assert nbytes(model, changing) <= block.sent_bytes < 0.75 * everything
        else:
            assert block.sent_bytes == everything
        seen.add(block.device)
    _, expected, _ = run(APPS[kind](partial(held_mod, directory=tmp_path)))
    for name, array in expected.arrays.items():
        np.testing.assert_array_equal(result.arrays[name].numpy(), array.numpy())


def test_without_the_mod_everything_is_sent(model):
    records, _, _ = federate(
        model, make_app(prepared_train), rounds=3, downlink="changed"
    )
    everything = nbytes(model, model.state_dict())
    assert {b.sent_bytes for r in records for b in r.blocks} == {everything}
    assert {b.status for r in records for b in r.blocks} == {"accepted"}


@pytest.mark.parametrize("lost", ["*", "names.json", "piece-*"])
def test_a_lost_copy_costs_one_round(model, lost, tmp_path):
    directory = tmp_path / "disk"
    rounds = []

    def losing(message, context, call_next):
        if message.metadata.message_type == "train":
            rounds.append(message.content["config"]["server-round"])
            if rounds[-1] == 3:
                for path in directory.glob(lost):
                    path.unlink()
        return held_mod(message, context, call_next, directory=directory)

    records, _, _ = federate(
        model,
        make_app(prepared_train, [losing]),
        rounds=8,
        mode=RoundMode(blocks=(2,), devices_per_block=4),
        downlink="changed",
    )
    # Four devices on one disk; each loses its round, and none a second one.
    assert [sum(record.refused.values()) for record in records] == [
        *(0, 0, 4),
        *[0] * 5,
    ]
    assert set(records[2].refused) == {"lost-copy"}


class LegacyClient(NumPyClient):
    def fit(self, parameters, config):
        net = Net()
        state = dict(zip(net.state_dict(), map(torch.tensor, parameters), strict=True))
        net.load_state_dict(state)
        block = AssignedBlock(net, config)
        loss = fit(net, config)
        return block.fit_result(16, loss=loss)


def test_the_legacy_interface_too(model, tmp_path):
    """Rounds by hand, through the records in which Flower carries FitIns and FitRes."""
    coordinator = coordinator_for_weights(
        model,
        batch_size=16,
        settings=RoundSettings(
            allocation=AllocationOptions(mode=RoundMode(blocks=(1,))),
            transfer=Transfer(downlink="changed"),
        ),
    )
    app = ClientApp(
        lambda context: LegacyClient().to_client(),
        mods=[partial(held_mod, directory=tmp_path / "disk"), profile_mod],
    )
    profile = {"name": "a", "flops-per-s": 1e9, "memory-bytes": 1e9, "snr-db": 10.0}
    coordinator.add_device("1", profile)
    statuses, sent_counts = [], []
    for server_round in range(1, 6):
        if server_round == 4:
            shutil.rmtree(tmp_path / "disk")
        plan = coordinator.plan_round(server_round, ["1"])
        arrays = coordinator.arrays()
        sent = [arrays[name] for name in plan.sent_names("1", [*arrays])]
        sent_counts.append(len(sent))
        instruction = FitIns(
            ndarrays_to_parameters(sent), plan.assignments["1"].to_record()
        )
        content = compat.fitins_to_recorddict(instruction, keep_input=True)
        message = Message(content, dst_node_id=1, message_type="train")
        message.metadata.__dict__["_message_id"] = "1"
        reply = app(message, Context(1, 1, {}, RecordDict(), {}))
        result = compat.recorddict_to_fitres(reply.content, keep_input=True)
        record = coordinator.complete_round(
            plan,
            [
                DeviceReply(
                    "1",
                    result.parameters.tensors,
                    result.num_examples,
                    result.metrics,
                )
            ],
        )
        statuses.append(record.blocks[0].status.partition(":")[0])
        assert len(parameters_to_ndarrays(result.parameters)) in (0, 2 + 2 + 2 + 9)
    assert statuses == ["accepted"] * 3 + ["lost-copy", "accepted"]
    whole = len(model.state_dict())
    assert sent_counts[0] == sent_counts[4] == whole
    assert sent_counts[1] == sent_counts[2] == sent_counts[3] < whole


def test_what_is_there_is_not_written_again(tmp_path):
    values = {name: np.full((2, 3), i, np.float32) for i, name in enumerate("ab")}
    sent = {name: Array(array) for name, array in values.items()}
    version = Versions([(0,), (1,)]).of([*values.values()])
    whole = Manifest(tuple(Piece(d, (i,), True) for i, d in enumerate(version.digests)))

    def completed(manifest, names):
        record = ArrayRecord()
        for name in names:
            record[name] = sent[name]
        content = RecordDict({"arrays": record})
        complete_arrays(content, manifest, tmp_path)
        assert [*content["arrays"]] == ["a", "b"]
        return content["arrays"]

    def files():
        return {path.name: path.stat().st_ino for path in tmp_path.iterdir()}

    # What was sent is handed on as it is, neither read nor written.
    assert all(completed(whole, "ab")[name] is sent[name] for name in "ab")
    written = files()
    assert len(written) == 3
    completed(whole, "ab")
    assert files() == written
    part = Manifest((whole.pieces[0], replace(whole.pieces[1], sent=False)))
    again = completed(part, "a")
    assert again["a"] is sent["a"]
    np.testing.assert_array_equal(again["b"].numpy(), values["b"])
    assert files() == written


def test_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "names.json"

    def write(text):
        with replacing(path, shared=True) as unfinished:
            unfinished.write_text(text)
            both.wait(10)

    both = Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["a", "b"]))
    assert path.read_text() in ("a", "b")
    assert [*tmp_path.iterdir()] == [path]
