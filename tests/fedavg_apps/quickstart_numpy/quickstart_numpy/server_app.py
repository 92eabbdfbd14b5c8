"""The server."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from generated import HELD_OUT, images

from quickstart_numpy.task import Net, get_weights, set_weights, test


def evaluate(server_round, parameters, config):
    """Evaluate the model on held-out data."""
    net = Net()
    set_weights(net, parameters)
    loss, accuracy = test(net, images(HELD_OUT, count=2000))
    print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
    return loss, {"accuracy": accuracy}


def weighted_average(metrics):
    """Average the nodes' accuracies by examples."""
    total = sum(examples for examples, _ in metrics)
    return {"accuracy": sum(n * m["accuracy"] for n, m in metrics) / total}


def server_fn(context: Context):
    """Put strategy and configuration together."""
    lr = context.run_config["learning-rate"]
    torch.manual_seed(context.run_config["seed"])
    net = Net()
    strategy = FedAvg(
        fraction_fit=1.0,
        fraction_evaluate=1.0,
        min_available_clients=2,
        initial_parameters=ndarrays_to_parameters(get_weights(net)),
        on_fit_config_fn=lambda server_round: {"lr": lr},
        evaluate_fn=evaluate,
        evaluate_metrics_aggregation_fn=weighted_average,
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
