"""A client that answers at once, with nothing."""

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Answer."""
    return Message(RecordDict(), reply_to=message)
