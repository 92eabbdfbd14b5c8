"""The client."""

import time

from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp

from own_strategy.task import Net, load_data
from own_strategy.task import test as test_fn
from own_strategy.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data; remember how often, and how long it took."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])

    start = time.time()
    train_loss = train_fn(
        model, dataset, context.run_config["local-epochs"], msg.content["config"]["lr"]
    )
    if "history" not in context.state:
        context.state["history"] = ConfigRecord({"losses": []})
    context.state["history"]["losses"] += [train_loss]

    metrics = {
        "train_loss": train_loss,
        "num-examples": len(dataset),
        "rounds": len(context.state["history"]["losses"]),
    }
    train_time = ConfigRecord({"train_time": time.time() - start})
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord(metrics),
            "train_metadata": train_time,
        }
    )
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])
    loss, accuracy = test_fn(model, dataset)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
