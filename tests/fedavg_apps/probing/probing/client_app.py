"""The client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from probing.task import Net, load_data
from probing.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = Net()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])
    train_loss = train_fn(
        model, dataset, context.run_config["local-epochs"], msg.content["config"]["lr"]
    )
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(dataset)})
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    )
    return Message(content=content, reply_to=msg)
