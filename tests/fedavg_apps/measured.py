"""The bench's ServerApp: it runs a project's own for several seeds, and counts bytes.

The bench puts it into a copy of a project, beside the project's package, as it is put
around FedAvg and around what FedAvg became.
"""

import sys
import time
from importlib import import_module

from flwr.app import Context, MessageType
from flwr.serverapp import Grid, ServerApp

from lola_flwr.strategies.arrival_grid import ArrivalGrid

app = ServerApp()


class CountingGrid(ArrivalGrid):
    """Counts the bytes of arrays that training messages hold, both ways."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.down = self.up = 0

    def push_messages(self, messages):
        messages = list(messages)
        self.down += array_bytes(messages)
        return super().push_messages(messages)

    def pull_messages(self, message_ids):
        replies = list(super().pull_messages(message_ids))
        self.up += array_bytes(replies)
        return replies

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.down += array_bytes(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.up += array_bytes(replies)
        return replies


def array_bytes(messages):
    return sum(
        len(array.data)
        for message in messages
        if message.has_content() and message.metadata.message_type == MessageType.TRAIN
        for record in message.content.array_records.values()
        for array in record.values()
    )


@app.main()
def main(grid: Grid, context: Context) -> None:
    project = context.run_config["project"]
    # The engine loads the client in another thread now: of what both import at once,
    # one of them can get half.
    while not hasattr(sys.modules.get(f"{project}.client_app"), "app"):
        time.sleep(0.1)
    server_app = import_module(f"{project}.server_app").app
    for seed in range(context.run_config["seeds"]):
        context.run_config["seed"] = seed
        counting = CountingGrid(grid)
        server_app(counting, context)
        print(f"seed {seed}: {counting.down} bytes down, {counting.up} bytes up")
