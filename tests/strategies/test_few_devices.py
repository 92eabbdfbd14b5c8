"""Fewer devices than blocks, under both interfaces, with devices in this process."""

from __future__ import annotations

import time

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.errors import UserError
from lola_flwr.strategies.presence import wait_for_devices
from tests.marks import rest_slow
from tests.strategies.test_traffic import Federation


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture(params=rest_slow(["message", "legacy"]))
def federation(request, roberta, batch, tmp_path):
    """Return a function that makes a federation, whose devices share a disk."""

    def make(**options):
        return Federation(request.param, roberta, batch, tmp_path, **options)

    return make


def blocks_of(record):
    return sorted(block for part in record.blocks for block in part.blocks)


@pytest.mark.parametrize(
    ("num_devices", "options"),
    rest_slow(
        [
            (2, {"codec": "int8", "downlink": "changed"}),
            (1, {}),
            (2, {"codec": "auto", "head": "rotating"}),
            (2, {"rotation_eps": 0.5, "allocator": "jbba"}),
        ]
    ),
)
def test_every_round_trains_every_block(federation, num_devices, options):
    federated = federation(num_devices=num_devices, **options)
    values = federated.coordinator.values()
    before = {name: values[name].copy() for name in values}
    records = federated.run(2)
    for record in records:
        assert blocks_of(record) == [0, 1, 2]
        assert {part.status for part in record.blocks} == {"accepted"}
        assert len(record.blocks) == num_devices
        for part in record.blocks:
            assert part.received_bytes <= part.payload_bytes < part.received_bytes + 2e3
    values = federated.coordinator.values()
    for name in federated.partition.trainable:
        assert not np.array_equal(values[name], before[name]), name


@pytest.mark.slow
def test_learns_as_with_a_device_for_every_block(federation):
    few, all_ = (
        [record.train_loss for record in federation(num_devices=n).run(6)]
        for n in (2, 3)
    )
    # All devices have the same mini-batch here, and so the same gradient.
    np.testing.assert_allclose(few, all_, rtol=0.2)


@pytest.mark.slow
def test_one_that_fails_rests_and_the_other_does_it_all(federation):
    federated = federation(num_devices=2, codec="int8")
    # Without a directory it refuses the codec.
    federated.before_round = lambda server_round: federated.stores.update(
        {1: None if server_round == 2 else federated.stores[0]}
    )
    records = federated.run(4)
    said = [[part.status == "accepted" for part in r.blocks] for r in records]
    assert sorted(said[1]) == [False, True]
    assert [blocks_of(record) for record in records] == [[0, 1, 2]] * 4
    assert [len(record.blocks) for record in records] == [2, 2, 1, 2]
    assert said[2:] == [[True], [True, True]]


class TestWaiting:
    """Who comes is waited for, and a little longer."""

    @staticmethod
    def coming(*counts):
        """Return what tells, call by call, how many are there; then it stays."""
        left = [*counts]
        return lambda: range(left.pop(0) if len(left) > 1 else left[0])

    def test_goes_on_at_once_with_as_many_as_blocks(self):
        start = time.monotonic()
        there = wait_for_devices(
            self.coming(3), needed=1, wanted=3, wait_s=60, settle_s=60
        )
        assert len(there) == 3
        assert time.monotonic() - start < 30

    def test_waits_for_those_who_come(self):
        there = wait_for_devices(
            self.coming(0, 1, 2, 2), needed=1, wanted=3, wait_s=60, settle_s=0.2
        )
        assert len(there) == 2

    def test_nobody_is_too_few(self):
        with pytest.raises(UserError, match=r"0 devices are connected .* 1 are needed"):
            wait_for_devices(
                self.coming(0), needed=1, wanted=3, wait_s=0.2, settle_s=0.1
            )
