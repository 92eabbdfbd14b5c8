"""What a FedAvg project set, exchanges and measures, under the strategy."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from flwr.common import parameters_to_ndarrays
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

from lola_flwr.model.adapters import adapt
from lola_flwr.strategies import LoLaDeft as LegacyLoLaDeft
from lola_flwr.strategies.message import LoLaDeft
from tests.marks import rest_slow
from tests.strategies.projects import (
    Adapters,
    Head,
    Project,
    Some,
    Whole,
    initial,
    moved,
    run_legacy,
    run_message,
)


@pytest.fixture(autouse=True)
def task(monkeypatch, tmp_path):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x):
        return x + torch.tanh(self.linear(self.norm(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 4)
        self.layers = nn.ModuleList(Layer() for _ in range(3))
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def net():
    torch.manual_seed(3)
    return Net()


def adapted(dtype=torch.float32):
    torch.manual_seed(3)
    config = hf.LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_hidden_layers=3,
        vocab_size=20,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    model = hf.LlamaForCausalLM(config).to(dtype)
    model.requires_grad_(False)
    options = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    return adapt(model, "lora", {"r": 2, **options})


EXCHANGES = {
    "whole": (net, Whole()),
    "own norms": (net, Some("norm", has=False)),
    "head's": (net, Head()),
    "adapters": (adapted, Adapters()),
    "bfloat16 base": (lambda: adapted(torch.bfloat16), Adapters()),
    "adapters in full names": (adapted, Some("lora", has=True)),
}


def run(project, *, legacy, plain=False, **options):
    """Run a project; return its grid, the records and the last arrays by name."""
    records, made = [], project.make()
    sizes = {name: options.pop(name) for name in ("rounds", "nodes") if name in options}
    if legacy:
        options.setdefault("initial_parameters", initial(project))
        strategy = (
            LegacyFedAvg(**options)
            if plain
            else LegacyLoLaDeft(made, on_round=records.append, **options)
        )
        history, server, grid = run_legacy(project, strategy, **sizes)
        arrays = parameters_to_ndarrays(server.parameters)
        names = project.exchange.get(made)
        grid.result = history
        return grid, records, dict(zip(names, arrays, strict=True))
    strategy = (
        FedAvg(**options)
        if plain
        else LoLaDeft(made, on_round=records.append, **options)
    )
    result, grid = run_message(project, strategy, **sizes)
    grid.result = result
    return grid, records, {n: a.numpy() for n, a in result.arrays.items()}


def exchanged(project):
    state = project.exchange.get(project.make())
    return {name: value.float().numpy() for name, value in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", rest_slow(EXCHANGES, fast=1))
def test_what_a_project_exchanges_is_exchanged(kind, legacy):
    make, exchange = EXCHANGES[kind]
    project = Project(make, exchange)
    grid, records, arrays = run(project, legacy=legacy)
    assert [record.refused for record in records] == [{}, {}]
    assert {b.status for record in records for b in record.blocks} == {"accepted"}
    assert not any(b.ignored_arrays for record in records for b in record.blocks)
    start = exchanged(project)
    assert [*arrays] == [*start]
    untrained = {n for n in start if n.startswith("embed")}
    assert moved(start, arrays) == {*start} - untrained
    plain = Project(make, exchange, blocks=False)
    fedavg, _, _ = run(plain, legacy=legacy, plain=True)
    for kind in ("train", "evaluate"):
        assert 0 < grid.sent_bytes[kind] <= fedavg.sent_bytes[kind]
    assert 0 < grid.received_bytes["train"] <= fedavg.received_bytes["train"]
