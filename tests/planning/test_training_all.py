from __future__ import annotations

import numpy as np
import pytest
import transformers as hf
from torch import nn

from lola_flwr.build import DeviceOptions, RoundSettings, coordinator_for_weights
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.system.devices import DeviceProfile

BATCH_SIZE = 4


def net():
    layers = [nn.Sequential(nn.Linear(96, 96), nn.Tanh()) for _ in range(3)]
    return nn.Sequential(nn.Sequential(*layers), nn.Linear(96, 1))


@pytest.mark.parametrize("train_all", [True, False])
def test_who_has_the_memory_trains_all_and_others_their_block(train_all):
    model = net()
    settings = RoundSettings(devices=DeviceOptions(train_all=train_all))
    stack = {"stack": "0"}
    coordinator = coordinator_for_weights(
        model, batch_size=BATCH_SIZE, settings=settings, **stack
    )
    partition = partition_parameters([n for n, _ in model.named_parameters()], **stack)
    alone = model_costs(model, partition, batch_size=BATCH_SIZE)
    whole = alone.joined([range(3)])
    # The second device has just not enough for all blocks, and for each alone.
    memory_bytes = np.array([whole.memory_bytes[0], whole.memory_bytes[0] - 1, 1e9])
    assert alone.memory_bytes.max() <= memory_bytes.min()
    for index, memory in enumerate(memory_bytes):
        profile = DeviceProfile(str(index), 1e6, float(memory), 10.0)
        coordinator.add_device(str(index), profile.to_properties())
    plan = coordinator.plan_round(1, ["0", "1", "2"])
    told = [plan.assignments[str(n)] for n in range(3)]
    assert [a.trains_all for a in told] == [train_all, False, train_all]
    assert {a.block_index for a in told} == {0, 1, 2}
    for row, assignment in enumerate(told):
        costs = whole if assignment.trains_all else alone
        block = 0 if assignment.trains_all else assignment.block_index
        planned_s = plan.solved.problem.compute_s[row, assignment.block_index]
        assert planned_s == pytest.approx(costs.flops[block] / 1e6)
        assert assignment.memory_bytes == pytest.approx(costs.memory_bytes[block])


@pytest.mark.parametrize("train_all", [True, False])
def test_whoever_trains_all_trains_embeddings_but_not_under_two_names(train_all):
    sizes = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = hf.GPT2LMHeadModel(hf.GPT2Config(**sizes))
    model.transformer.h[1].ln_1.requires_grad_(False)
    settings = RoundSettings(devices=DeviceOptions(train_all=train_all))
    partition = coordinator_for_weights(model, settings=settings).partition
    # The other embedding is the output layer's, too.
    positions = "transformer.wpe.weight"
    assert (positions in partition.blocks[0]) is train_all
    assert (positions in partition.frozen) is not train_all
    assert "transformer.wte.weight" in partition.frozen
    assert "transformer.h.1.ln_1.weight" not in partition.trainable
