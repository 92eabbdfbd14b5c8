"""The client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from autoencoder.task import LitAutoEncoder, Trainer, load_data

app = ClientApp()


@app.train()
def train(msg: Message, context: Context) -> Message:
    """Train the module on local data."""
    model = LitAutoEncoder(context.run_config["learning-rate"])
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    batches = load_data(context.node_config["partition-id"])
    trainer = Trainer(max_epochs=context.run_config["local-epochs"])
    train_loss = trainer.fit(model, batches)
    num_examples = sum(map(len, batches))
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": num_examples})
    arrays = ArrayRecord(model.state_dict())
    content = RecordDict({"arrays": arrays, "metrics": metrics})
    return Message(content=content, reply_to=msg)


@app.evaluate()
def evaluate(msg: Message, context: Context) -> Message:
    """Evaluate the module on local data."""
    model = LitAutoEncoder()
    model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    batches = load_data(context.node_config["partition-id"])
    loss = Trainer().test(model, batches)
    metrics = MetricRecord({"loss": loss, "num-examples": sum(map(len, batches))})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=msg)
