"""The server."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from generated import HELD_OUT

from wide_resnet.strategy import SaveModelStrategy
from wide_resnet.task import WideResNet, get_weights, load_data, set_weights, test


def gen_evaluate_fn(net):
    """Return what evaluates the model on held-out data."""
    testset = load_data(HELD_OUT, count=2000)

    def evaluate(server_round, parameters, config):
        set_weights(net, parameters)
        loss, accuracy = test(net, testset)
        print(f"round {server_round}: loss {loss:.4f} accuracy {accuracy:.4f}")
        return loss, {"accuracy": accuracy}

    return evaluate


def server_fn(context: Context):
    """Put strategy and configuration together."""
    lr = context.run_config["learning-rate"]
    torch.manual_seed(context.run_config["seed"])
    net = WideResNet()
    strategy = SaveModelStrategy(
        fraction_evaluate=0.0,
        inplace=True,
        initial_parameters=ndarrays_to_parameters(get_weights(net)),
        evaluate_fn=gen_evaluate_fn(net),
        on_fit_config_fn=lambda server_round: {"learning_rate": lr},
    )
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
