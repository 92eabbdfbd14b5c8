"""The server."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg
from generated import HELD_OUT

from tabular.task import IncomeClassifier, evaluate, get_weights, load_data, set_weights


def mean_of(name):
    """Return what averages a metric of the nodes by examples."""

    def mean(metrics):
        total = sum(examples for examples, _ in metrics)
        return {name: sum(n * m[name] for n, m in metrics) / total}

    return mean


def server_fn(context: Context):
    """Put strategy and configuration together."""
    torch.manual_seed(context.run_config["seed"])
    net = IncomeClassifier()
    testset = load_data(HELD_OUT, count=2000)

    def evaluate_fn(server_round, parameters, config):
        set_weights(net, parameters)
        loss, accuracy = evaluate(net, testset)
        print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
        return loss, {"accuracy": accuracy}

    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters(get_weights(net)),
        min_fit_clients=2,
        accept_failures=False,
        evaluate_fn=evaluate_fn,
        fit_metrics_aggregation_fn=mean_of("train_loss"),
        evaluate_metrics_aggregation_fn=mean_of("accuracy"),
    )
    num_rounds = context.run_config["num-server-rounds"]
    config = ServerConfig(num_rounds=num_rounds)
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
