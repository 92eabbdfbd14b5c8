"""The client."""

import warnings

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from transformers import logging

from sentiment.task import get_model, load_data
from sentiment.task import test as test_fn
from sentiment.task import train as train_fn

warnings.filterwarnings("ignore", category=FutureWarning)
logging.set_verbosity_error()

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = get_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
    batches = load_data(context.node_config["partition-id"])
    lr = context.run_config["learning-rate"]
    train_loss = train_fn(model, batches, context.run_config["local-epochs"], lr)
    metrics = {
        "train_loss": train_loss,
        "num-examples": sum(len(batch["labels"]) for batch in batches),
    }
    model_record = ArrayRecord(model.state_dict())
    metric_record = MetricRecord(metrics)
    content = RecordDict({"arrays": model_record, "metrics": metric_record})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context):
    """Evaluate the model on local data."""
    model = get_model()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict(), strict=True)
    batches = load_data(context.node_config["partition-id"])
    loss, accuracy = test_fn(model, batches)
    metrics = {
        "val_loss": loss,
        "val_accuracy": accuracy,
        "num-examples": sum(len(batch["labels"]) for batch in batches),
    }
    content = RecordDict({"metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)
