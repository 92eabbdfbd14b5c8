"""The client."""

from flwr.client import ClientApp, NumPyClient
from flwr.common import Context

from lora_numpy.models import get_model, get_parameters, set_parameters
from lora_numpy.task import Trainer, load_data


class FlowerClient(NumPyClient):
    """Trains the adapters on local data."""

    def __init__(self, trainset, learning_rate, epochs):
        self.model = get_model()
        self.trainset = trainset
        self.learning_rate = learning_rate
        self.epochs = epochs

    def fit(self, parameters, config):
        """Train the adapters."""
        set_parameters(self.model, parameters)
        trainer = Trainer(
            model=self.model,
            train_dataset=self.trainset,
            learning_rate=self.learning_rate,
            num_train_epochs=self.epochs,
        )
        train_loss = trainer.train()
        examples = sum(map(len, self.trainset))
        return get_parameters(self.model), examples, {"train_loss": train_loss}


def client_fn(context: Context):
    """Make the client of a node."""
    trainset = load_data(context.node_config["partition-id"])
    client = FlowerClient(
        trainset,
        context.run_config["learning-rate"],
        context.run_config["local-epochs"],
    )
    return client.to_client()


app = ClientApp(client_fn)
