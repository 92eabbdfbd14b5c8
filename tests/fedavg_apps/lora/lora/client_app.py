"""The client."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict

from lora.models import cosine_annealing, get_model
from lora.task import load_data
from lora.task import train as train_fn

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    """Train the adapters on local data."""
    num_rounds = context.run_config["num-server-rounds"]
    batches = load_data(context.node_config["partition-id"])

    model = get_model(context.run_config["base"])
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())

    new_lr = cosine_annealing(
        msg.content["config"]["server-round"] - 1,
        num_rounds,
        context.run_config["learning-rate"],
        1e-4,
    )
    train_loss = train_fn(model, batches, context.run_config["local-epochs"], new_lr)

    model_record = ArrayRecord(get_peft_model_state_dict(model))
    metrics = {"train_loss": train_loss, "num-examples": sum(map(len, batches))}
    content = RecordDict({"arrays": model_record, "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=msg)
