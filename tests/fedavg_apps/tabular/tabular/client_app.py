"""The client."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from tabular.task import (
    IncomeClassifier,
    evaluate,
    get_weights,
    load_data,
    set_weights,
    train,
)


class FlowerClient(NumPyClient):
    """Trains and evaluates on local rows."""

    def __init__(self, dataset, epochs, lr):
        self.net = IncomeClassifier()
        self.dataset = dataset
        self.epochs = epochs
        self.lr = lr

    def fit(self, parameters, config):
        """Train the model."""
        set_weights(self.net, parameters)
        loss = train(self.net, self.dataset, self.epochs, self.lr)
        return get_weights(self.net), len(self.dataset), {"train_loss": loss}

    def evaluate(self, parameters, config):
        """Evaluate the model."""
        set_weights(self.net, parameters)
        loss, accuracy = evaluate(self.net, self.dataset)
        return loss, len(self.dataset), {"accuracy": accuracy}


def client_fn(context: Context):
    """Make the client of a node."""
    dataset = load_data(context.node_config["partition-id"])
    run_config = context.run_config
    client = FlowerClient(
        dataset, run_config["local-epochs"], run_config["learning-rate"]
    )
    return client.to_client()


app = ClientApp(client_fn=client_fn)
