"""Projects as FedAvg runs them, their devices in this process."""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import torch
import transformers as hf
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.client import ClientApp as LegacyClientApp
from flwr.client import NumPyClient
from flwr.clientapp import ClientApp as FlowerClientApp
from flwr.common import ndarrays_to_parameters, parameters_to_ndarrays
from flwr.server import Server, SimpleClientManager
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.server.strategy import FedAvg as LegacyFedAvg
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lola_flwr.clients import AssignedBlock, ClientApp
from lola_flwr.model.adapters import adapt
from lola_flwr.strategies import LoLaDeft as LegacyLoLaDeft
from lola_flwr.strategies.message import LoLaDeft
from tests.strategies.in_process import InProcessGrid, array_bytes


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


def adapted(dtype=torch.float32, width=16):
    torch.manual_seed(3)
    config = hf.LlamaConfig(
        hidden_size=width,
        intermediate_size=width,
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


class Whole:
    """Exchanges the whole state dict."""

    @staticmethod
    def get(model):
        return dict(model.state_dict())

    @staticmethod
    def set(model, state):
        model.load_state_dict(state)


class Adapters:
    """Exchanges the adapters, as peft names them."""

    @staticmethod
    def get(model):
        return get_peft_model_state_dict(model)

    @staticmethod
    def set(model, state):
        set_peft_model_state_dict(model, state)


class Some:
    """Exchanges the part of the state dict whose names have some text in them, or not.

    What a device keeps is known by nobody else.
    """

    def __init__(self, text, *, has):
        self.text, self.has = text, has

    def get(self, model):
        state = model.state_dict()
        return {n: v for n, v in state.items() if (self.text in n) is self.has}

    def set(self, model, state):
        model.load_state_dict(state, strict=False)


class Head:
    """Exchanges the state dict of one module in the model."""

    @staticmethod
    def get(model):
        return dict(model.head.state_dict())

    @staticmethod
    def set(model, state):
        model.head.load_state_dict(state)


def train(model, steps=2):
    """Train what wants gradients; return the loss."""
    torch.manual_seed(1)
    wanting = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanting, lr=0.05)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        optimizer.step()
    return loss.item()


def loss_of(model):
    if hasattr(model, "config"):
        tokens = torch.arange(24).reshape(4, 6) % model.config.vocab_size
        return model(input_ids=tokens, labels=tokens).loss
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(16, 3, generator=generator)
    return nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))


class Project:
    """A project's server and client code, by its model and what it exchanges.

    ``blocks``: its client is migrated. ``seen`` has the models that devices trained.
    """

    def __init__(self, make, exchange, *, blocks=True, prepares=True, mods=()):
        self.make, self.exchange = make, exchange
        self.blocks, self.prepares, self.mods = blocks, prepares, list(mods)
        self.seen, self.received, self.configs, self.metrics = [], [], [], {}

    def arrays(self, model):
        return [v.detach().cpu().numpy() for v in self.exchange.get(model).values()]

    def load(self, model, arrays):
        names = self.exchange.get(model)
        self.exchange.set(
            model,
            {n: torch.tensor(a) for n, a in zip(names, arrays, strict=True)},
        )

    def trained(self, model, received):
        self.seen.append(model)
        self.received.append(copy.deepcopy(model.state_dict()))
        if self.blocks and self.prepares:
            AssignedBlock(model, received)
        return train(model)

    def app(self):
        app = (ClientApp if self.blocks else FlowerClientApp)(mods=self.mods)

        @app.train()
        def train_function(message, context):
            model = self.make()
            state = message.content["arrays"].to_torch_state_dict()
            self.exchange.set(model, state)
            loss = self.trained(model, message)
            metrics = {
                "num-examples": 8 * (context.node_id - 99),
                "train_loss": loss,
                "mine": float(context.node_id),
            }
            self.configs.append(dict(message.content["config"]))
            arrays = ArrayRecord(self.exchange.get(model))
            content = RecordDict({"arrays": arrays, "metrics": MetricRecord(metrics)})
            return Message(content, reply_to=message)

        @app.evaluate()
        def evaluate_function(message, context):
            model = self.make()
            self.exchange.set(model, message.content["arrays"].to_torch_state_dict())
            metrics = {"num-examples": 8, "eval_loss": loss_of(model).item()}
            return Message(
                RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message
            )

        return app

    def legacy_app(self):
        project = self

        class Client(NumPyClient):
            def __init__(self, node_id):
                self.model, self.node_id = project.make(), node_id

            def get_parameters(self, config):
                return project.arrays(self.model)

            def fit(self, parameters, config):
                project.load(self.model, parameters)
                loss = project.trained(self.model, config)
                metrics = {"train_loss": loss, "mine": float(self.node_id)}
                metrics |= project.metrics
                project.configs.append(config)
                examples = 8 * (self.node_id - 99)
                return project.arrays(self.model), examples, metrics

            def evaluate(self, parameters, config):
                project.load(self.model, parameters)
                return loss_of(self.model).item(), 8, {"mine": 1.0}

        made = ClientApp if self.blocks else LegacyClientApp
        return made(lambda context: Client(context.node_id).to_client(), mods=self.mods)


def grid_of(app, nodes):
    ids = [100 + n for n in range(nodes)]
    configs = {i: {"partition-id": i - 100, "num-partitions": nodes} for i in ids}
    return InProcessGrid(dict.fromkeys(ids, app), configs)


def note(grid):
    """Let a grid keep its replies, and the bytes of their arrays."""
    grid.replies, grid.received_bytes = [], Counter()

    def noted(reply):
        is_query = reply.metadata.message_type.startswith("query")
        assert is_query or not reply.has_error(), reply.error
        grid.replies.append(reply)
        grid.received_bytes[reply.metadata.message_type] += array_bytes(reply)
        return reply

    grid.alter = noted


def run_message(project, strategy, *, rounds=2, nodes=3, **options):
    """Run a project under the Message API; return the result and the grid."""
    grid = grid_of(project.app(), nodes)
    arrays = ArrayRecord(copy.deepcopy(project.exchange.get(project.make())))
    note(grid)
    result = strategy.start(grid, arrays, num_rounds=rounds, **options)
    return result, grid


def run_legacy(project, strategy, *, rounds=2, nodes=3):
    """Run a project under the legacy interface; return history, server and grid."""
    grid = grid_of(project.legacy_app(), nodes)
    note(grid)
    manager = SimpleClientManager()
    for node in grid.apps:
        manager.register(GridClientProxy(node, grid, 1))
    server = Server(client_manager=manager, strategy=strategy)
    history, _ = server.fit(rounds, None)
    return history, server, grid


def initial(project):
    return ndarrays_to_parameters(project.arrays(project.make()))


def moved(before, after):
    """Names of those of some arrays that differ."""
    return {n for n in before if not np.array_equal(before[n], after[n])}


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
    return {name: value.numpy(force=True) for name, value in state.items()}
