"""A client that answers at once, with as many bytes as it was sent, in one array."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer with other values: Flower moves no object twice."""
    content = RecordDict()
    for name, record in message.content.array_records.items():
        values = np.concatenate([array.numpy() for array in record.values()])
        content[name] = ArrayRecord({"all": Array(~values)})
    return Message(content, reply_to=message)
