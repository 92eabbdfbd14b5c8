"""The server."""

import torch
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

from plain_app.client_app import get_weights, set_weights
from plain_app.task import Net, load_data, test


def server_fn(context: Context) -> ServerAppComponents:
    """Put strategy and configuration together."""
    torch.manual_seed(0)
    model = Net()

    def evaluate(server_round, arrays, config):
        set_weights(model, arrays)
        loss, accuracy = test(model, load_data(part=1000))
        print(f"held-out loss {loss:.4f}")
        return loss, {"accuracy": accuracy}

    initial = ndarrays_to_parameters(get_weights(model))
    strategy = FedAvg(initial_parameters=initial, evaluate_fn=evaluate)
    config = ServerConfig(num_rounds=context.run_config["num-server-rounds"])
    return ServerAppComponents(strategy=strategy, config=config)


app = ServerApp(server_fn=server_fn)
