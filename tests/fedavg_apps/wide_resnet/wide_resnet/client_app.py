"""The client."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from wide_resnet.task import (
    WideResNet,
    get_weights,
    load_data,
    set_weights,
    test,
    train,
)


class FlowerClient(NumPyClient):
    """Trains and evaluates on local data."""

    def __init__(self, net, batches, epochs):
        self.net = net
        self.batches = batches
        self.epochs = epochs
        self.num_examples = sum(len(y) for _, y in batches)

    def fit(self, parameters, config):
        """Train the model."""
        set_weights(self.net, parameters)
        loss = train(self.net, self.batches, self.epochs, config["learning_rate"])
        return get_weights(self.net), self.num_examples, {"train_loss": loss}

    def evaluate(self, parameters, config):
        """Evaluate the model."""
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.batches)
        return loss, self.num_examples, {"accuracy": accuracy}


def client_fn(context: Context):
    """Make the client of a node."""
    batches = load_data(context.node_config["partition-id"])
    epochs = context.run_config["local-epochs"]
    return FlowerClient(WideResNet(), batches, epochs).to_client()


app = ClientApp(client_fn)
