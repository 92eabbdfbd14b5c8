"""The client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from vit.task import VisionTransformer, cosine_annealing, load_data
from vit.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the model on local data."""
    model = VisionTransformer()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    dataset = load_data(context.node_config["partition-id"])
    config, num_rounds = msg.content["config"], context.run_config["num-server-rounds"]
    lr = cosine_annealing(config["server-round"], num_rounds, config["lr"])
    train_loss = train_fn(model, dataset, context.run_config["local-epochs"], lr)
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(dataset)})
    content = RecordDict(
        {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
    )
    return Message(content=content, reply_to=msg)
