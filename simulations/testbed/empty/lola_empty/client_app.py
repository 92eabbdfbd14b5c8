"""A client that answers at once, with as much as it was sent."""

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with other values: Flower moves no object twice."""
    content = RecordDict()
    for name, record in message.content.array_records.items():
        content[name] = ArrayRecord(
            {key: Array(~array.numpy()) for key, array in record.items()}
        )
    return Message(content, reply_to=message)
