"""The client."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from quickstart_numpy.task import Net, get_weights, load_data, set_weights, test, train


class FlowerClient(NumPyClient):
    """Trains and evaluates on local data."""

    def __init__(self, net, trainset, valset, local_epochs):
        self.net = net
        self.trainset = trainset
        self.valset = valset
        self.local_epochs = local_epochs

    def fit(self, parameters, config):
        """Train the model."""
        set_weights(self.net, parameters)
        train_loss = train(self.net, self.trainset, self.local_epochs, config["lr"])
        examples = sum(len(y) for _, y in self.trainset)
        return get_weights(self.net), examples, {"train_loss": train_loss}

    def evaluate(self, parameters, config):
        """Evaluate the model."""
        set_weights(self.net, parameters)
        loss, accuracy = test(self.net, self.valset)
        return loss, len(self.valset[1]), {"accuracy": accuracy}


def client_fn(context: Context):
    """Make the client of a node."""
    trainset, valset = load_data(context.node_config["partition-id"])
    local_epochs = context.run_config["local-epochs"]
    return FlowerClient(Net(), trainset, valset, local_epochs).to_client()


app = ClientApp(client_fn)
