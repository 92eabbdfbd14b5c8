"""A server that asks every node, round for round, and notes how long each took."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from lola_flwr.strategies.arrival_grid import ArrivalGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask all nodes, and wait for all."""
    arrivals = ArrivalGrid(grid)
    shape = (
        int(context.run_config["num-arrays"]),
        int(context.run_config["array-bytes"]),
    )
    seconds = []
    for server_round in range(int(context.run_config["rounds"])):
        rng = np.random.default_rng(server_round)
        values = rng.integers(0, 256, shape, np.uint8)
        arrays = ArrayRecord({str(n): Array(row) for n, row in enumerate(values)})
        content = RecordDict({"arrays": arrays} if arrays else {})
        asked = [
            Message(content, dst_node_id=node, message_type=MessageType.TRAIN)
            for node in grid.get_node_ids()
        ]
        begun_s = time.perf_counter()
        answered = list(arrivals.send_and_receive(asked, timeout=120))
        if len(answered) < len(asked) or any(reply.has_error() for reply in answered):
            raise RuntimeError("A node did not answer.")
        seconds.append(time.perf_counter() - begun_s)
    if context.run_config["seconds-file"]:
        Path(str(context.run_config["seconds-file"])).write_text(json.dumps(seconds))
