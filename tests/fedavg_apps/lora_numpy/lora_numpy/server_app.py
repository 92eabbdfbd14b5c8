"""The server."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from generated import HELD_OUT

from lora_numpy.models import get_model, get_parameters, set_parameters
from lora_numpy.task import load_data, test


def get_evaluate_fn(model):
    """Return what evaluates the adapters on held-out data."""
    batches = load_data(HELD_OUT, count=128)

    def evaluate(server_round, parameters, config):
        set_parameters(model, parameters)
        loss = test(model, batches)
        print(f"round {server_round}: loss {loss:.4f}")
        return loss, {}

    return evaluate


def fit_weighted_average(metrics):
    """Average the nodes' losses by examples."""
    losses = [num_examples * m["train_loss"] for num_examples, m in metrics]
    examples = [num_examples for num_examples, _ in metrics]
    return {"train_loss": sum(losses) / sum(examples)}


def server_fn(context: Context):
    """Put strategy and configuration together."""
    torch.manual_seed(context.run_config["seed"])
    init_model = get_model()
    init_model_parameters = ndarrays_to_parameters(get_parameters(init_model))

    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=0.0,
        on_fit_config_fn=lambda server_round: {"current_round": server_round},
        fit_metrics_aggregation_fn=fit_weighted_average,
        initial_parameters=init_model_parameters,
        evaluate_fn=get_evaluate_fn(init_model),
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
