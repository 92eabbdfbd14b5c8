"""What travels in a round, up and down, under both of Flower's interfaces."""

from __future__ import annotations

import copy
import shutil
from collections import defaultdict

import numpy as np
import pytest
from flwr.common import Code, FitRes, Status, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.client_proxy import ClientProxy
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr import strategies
from lola_flwr.allocation import RoundMode
from lola_flwr.build import coordinator_for
from lola_flwr.clients import BlockClient, BlockDevice, LoLaClient
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.strategies import message
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.codec import codec_ladder
from tests.flat_settings import grouped
from tests.marks import rest_slow
from tests.strategies.in_process import InProcessGrid


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


class Federation:
    """Devices in this process, and the strategy under one of the two interfaces.

    ``sent`` holds the values of each message to a device: (round, device) -> arrays.
    """

    def __init__(self, interface, roberta, batch, directory, num_devices=4, **options):
        model = copy.deepcopy(roberta)
        self.partition = partition_parameters(n for n, _ in model.named_parameters())
        self.records = []
        self.sent = defaultdict(list)
        self.before_round = lambda server_round: None
        self.stores = dict.fromkeys(range(num_devices), directory)
        self.coordinator = coordinator_for(
            model,
            self.partition,
            costs=model_costs(model, self.partition, batch_size=6, sequence_length=10),
            batch_size=6,
            **grouped({"bandwidth_hz": 1e6, "lr": 1e-2, **options}),
        )

        def device(index):
            # Threads: each device has a model of its own.
            own = models[index]
            return BlockDevice(
                profile=simulated_device(index, seed=2),
                load_model=lambda: (own, self.partition),
                batch_source=lambda _, size: {k: v[:size] for k, v in batch.items()},
                store=self.stores[index],
            )

        models = [copy.deepcopy(model) for _ in range(num_devices)]
        self._run = getattr(self, f"_{interface}")(device, num_devices)

    def run(self, num_rounds):
        self._run(num_rounds)
        assert len(self.records) == num_rounds
        assert all(len(arrays) <= 1 for arrays in self.sent.values()), "in one array"
        return self.records

    def _on_round(self, record):
        self.records.append(record)
        self.before_round(record.server_round + 1)

    def _message(self, device, num_devices):
        app = LoLaClient(lambda context: device(context.node_id))
        grid = InProcessGrid(dict.fromkeys(range(num_devices), app))
        deliver = grid._deliver

        def noting(message):
            for record in message.content.array_records.values():
                key = int(message.metadata.group_id), message.metadata.dst_node_id
                self.sent[key] = [array.numpy() for array in record.values()]
            return deliver(message)

        grid._deliver = noting
        strategy = message.LoLaDeft(
            self.coordinator, min_available_nodes=num_devices, on_round=self._on_round
        )
        return lambda rounds: strategy.start(grid, strategy.initial_arrays(), rounds)

    def _legacy(self, device, num_devices):
        strategy = strategies.LoLaDeft(
            self.coordinator, min_available_clients=num_devices, on_round=self._on_round
        )
        server = Server(client_manager=SimpleClientManager(), strategy=strategy)
        server.disconnect_all_clients = lambda timeout: None
        federation = self

        class Device(ClientProxy):
            def fit(self, ins, timeout, group_id):
                key = ins.config["server-round"], int(self.cid)
                federation.sent[key] = parameters_to_ndarrays(ins.parameters)
                try:
                    return self.client().fit(ins)
                except Exception as error:
                    status = Status(Code.FIT_NOT_IMPLEMENTED, repr(error))
                    return FitRes(status, ins.parameters, 0, {})

            def get_properties(self, ins, timeout, group_id):
                return self.client().get_properties(ins)

            def client(self):
                return BlockClient(device(int(self.cid))).to_client()

            evaluate = reconnect = get_parameters = None

        for index in range(num_devices):
            server.client_manager().register(Device(str(index)))
        return lambda rounds: server.fit(num_rounds=rounds, timeout=None)

    def sent_bytes(self, server_round):
        """Bytes of the values sent to each device that took part in a round."""
        return {
            device: sum(values.nbytes for values in arrays)
            for (r, device), arrays in self.sent.items()
            if r == server_round
        }


@pytest.fixture(params=rest_slow(["message", "legacy"]))
def federation(request, roberta, batch, tmp_path):
    """Return a function that makes a federation, whose devices share a disk."""

    def make(**options):
        directory = options.pop("directory", tmp_path)
        return Federation(request.param, roberta, batch, directory, **options)

    return make


def nbytes(federation, names):
    state = federation.coordinator.values()
    return sum(state[name].nbytes for name in names)


def test_after_the_first_time_only_what_changed_is_sent(federation):
    one_block = {"mode": RoundMode(blocks=(1,)), "num_devices": 3}
    thrifty = federation(downlink="changed", **one_block)
    records = thrifty.run(8)
    changed = nbytes(thrifty, thrifty.partition.update_names(1))
    everything = nbytes(thrifty, thrifty.partition.trainable)
    seen = set()
    for record in records:
        (sent,) = thrifty.sent_bytes(record.server_round).items()
        assert sent[1] == (changed if sent[0] in seen else everything)
        seen.add(sent[0])
        (block,) = record.blocks
        assert block.status == "accepted"
        assert block.sent_bytes == sent[1]
    lavish = federation(downlink="all", **one_block)
    assert {b.sent_bytes for r in lavish.run(8) for b in r.blocks} == {everything}
    for name, values in thrifty.coordinator.values().items():
        np.testing.assert_array_equal(values, lavish.coordinator.values()[name])


def test_a_device_that_lost_its_copy_says_so_and_is_sent_everything(
    federation, tmp_path
):
    federated = federation(
        downlink="changed",
        mode=RoundMode(blocks=(1,)),
        num_devices=1,
        directory=tmp_path / "disk",
    )

    absences = []

    def lose_copy(server_round):
        absences.append(federated.coordinator.state.fleet.absences.of_device)
        if server_round == 3:
            shutil.rmtree(tmp_path / "disk")

    federated.before_round = lose_copy
    records = federated.run(5)
    statuses = [record.blocks[0].status.partition(":")[0] for record in records]
    assert statuses == ["accepted", "accepted", "lost-copy", "accepted", "accepted"]
    assert records[2].refused == {"lost-copy": 1}
    # It has not failed: it must not rest when all of it is sent.
    assert absences == [{}] * 5
    changed = nbytes(federated, federated.partition.update_names(1))
    everything = nbytes(federated, federated.partition.trainable)
    # Nothing was trained in round 3, and round 4 sends all of it.
    sent = [federated.sent_bytes(n)[0] for n in range(1, 6)]
    assert sent == [everything, changed, changed, everything, changed]


def test_devices_that_keep_nothing_are_always_sent_everything(federation):
    federated = federation(
        downlink="changed", mode=RoundMode(blocks=(1,)), num_devices=3, directory=None
    )
    records = federated.run(4)
    everything = nbytes(federated, federated.partition.trainable)
    assert {b.sent_bytes for r in records for b in r.blocks} == {everything}
    assert {b.status for r in records for b in r.blocks} == {"accepted"}


@pytest.mark.parametrize("codec", rest_slow(["topk:0.1", "int8"]))
def test_codecs_that_leave_something_out_learn(federation, codec):
    federated = federation(codec=codec)
    records = federated.run(12)
    losses = [record.train_loss for record in records]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.05
    assert {b.status for r in records for b in r.blocks} == {"accepted"}
    assert {b.codec for r in records for b in r.blocks} == {codec}


def test_a_device_without_a_directory_refuses_such_a_codec(federation):
    (record,) = federation(codec="int8", directory=None).run(1)
    assert [block.status for block in record.blocks] == ["no reply"] * 3


def test_auto_gives_fast_uplinks_finer_codecs(federation):
    options = {"codec": "auto", "codec_slack": 1.0, "bandwidth_hz": 1e5}
    records = federation(**options, num_devices=6).run(6)
    chosen = set()
    for record in records:
        assert {block.status for block in record.blocks} == {"accepted"}
        # All blocks are alike, and computing takes next to no time.
        by_rate = sorted(
            record.blocks, key=lambda b: b.payload_bytes / (b.upload_s * b.share)
        )
        levels = [codec_ladder("auto").index(block.codec) for block in by_rate]
        assert levels == sorted(levels)
        chosen.update(levels)
    assert len(chosen) > 1


@pytest.mark.parametrize(
    ("head", "senders"),
    rest_slow(
        [
            ("rotating", [{0}, {1}, {2}, {0}]),
            ("every", [{0, 1, 2}] * 4),
            ("shallowest", [{2}] * 4),
        ]
    ),
)
def test_the_head_comes_from_whom_the_policy_says(federation, head, senders):
    federated = federation(head=head)
    head_bytes = nbytes(federated, federated.partition.head)
    before = {k: v.copy() for k, v in federated.coordinator.values().items()}
    records = federated.run(4)
    for record, sending in zip(records, senders, strict=True):
        for block in record.blocks:
            assert block.status == "accepted"
            names = federated.partition.blocks[block.block_index]
            # The array has a header of 128 bytes.
            received = nbytes(federated, names) + 128
            counted = block.payload_bytes - received
            if block.block_index in sending:
                received += head_bytes
                assert counted > head_bytes
            assert block.received_bytes == received
    after = federated.coordinator.values()
    for name in federated.partition.trainable:
        assert not np.array_equal(before[name], after[name]), name
