"""The client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from quickstart.task import Net, load_data
from quickstart.task import test as test_fn
from quickstart.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])
    epochs = context.run_config["local-epochs"]
    train_loss = train_fn(model, dataset, epochs, msg.content["config"]["lr"])
    metrics = {"train_loss": train_loss, "num-examples": len(dataset)}
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)}
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])
    loss, accuracy = test_fn(model, dataset)
    metrics = {"loss": loss, "accuracy": accuracy, "num-examples": len(dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
