from __future__ import annotations

import pytest
from flwr.app import Context, RecordDict

from lola_flwr.clients import node_partition, node_profile
from lola_flwr.errors import UserError
from lola_flwr.system.devices import InvalidProfile, simulated_device


def context_of(node_config):
    return Context(1, 77, node_config, RecordDict(), {"seed": 5})


def test_profile_of_a_node():
    stated = {"flops-per-s": 2e11, "memory-bytes": 4_000_000_000, "snr-db": 12.0}
    assert node_profile(context_of(stated)).name == "node 77"
    assert node_profile(context_of({**stated, "name": "phone"})).name == "phone"
    simulated = node_profile(context_of({"partition-id": 3, "num-partitions": 8}))
    assert simulated == simulated_device(3, seed=5)
    with pytest.raises(UserError, match="--node-config"):
        node_profile(context_of({}))


def test_part_of_the_data_of_a_node():
    part = {"partition-id": 3, "num-partitions": 8}
    assert node_partition(context_of(part)) == (3, 8)
    for wrong in ({}, {"partition-id": 3}, part | {"partition-id": 8}):
        with pytest.raises(
            UserError, match=r"configuration has .* 'partition-id=0 num-"
        ):
            node_partition(context_of(wrong))


def test_a_profile_has_to_be_complete():
    with pytest.raises(InvalidProfile, match="snr-db"):
        node_profile(context_of({"flops-per-s": 1e9, "memory-bytes": 1e9}))
