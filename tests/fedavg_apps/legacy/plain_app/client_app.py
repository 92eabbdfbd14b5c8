"""The client."""

import torch
from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from plain_app.task import Net, load_data, test, train


def get_weights(net):
    """Return the model's arrays."""
    return [value.cpu().numpy() for value in net.state_dict().values()]


def set_weights(net, arrays):
    """Load the model's arrays."""
    names = net.state_dict().keys()
    state = {n: torch.tensor(a) for n, a in zip(names, arrays, strict=True)}
    net.load_state_dict(state)


class FlowerClient(NumPyClient):
    """Trains and evaluates on local data."""

    def __init__(self, net, data, epochs, lr):
        self.net = net
        self.data = data
        self.epochs = epochs
        self.lr = lr

    def fit(self, parameters, config):
        """Train the model."""
        set_weights(self.net, parameters)
        train_loss = train(self.net, self.data, self.epochs, self.lr)
        return get_weights(self.net), len(self.data[1]), {"train_loss": train_loss}

    def evaluate(self, parameters, config):
        """Evaluate the model."""
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.data)
        return loss, len(self.data[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    """Make the client of a node."""
    data = load_data(context.node_config["partition-id"])
    run_config = context.run_config
    client = FlowerClient(Net(), data, run_config["local-epochs"], run_config["lr"])
    return client.to_client()


app = ClientApp(client_fn)
