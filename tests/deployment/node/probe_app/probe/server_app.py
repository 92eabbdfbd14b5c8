"""A server that asks a node for one thing after the other, and writes the answers."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from lola_flwr.strategies.arrival_grid import ArrivalGrid

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Ask, and write the answers."""
    while not list(grid.get_node_ids()):
        time.sleep(0.1)
    (node,) = grid.get_node_ids()
    answers = []
    for number, kind in enumerate(context.run_config["asks"].split()):
        values = np.full(1000, number, np.float32)
        content = RecordDict(
            {
                "config": ConfigRecord({"kind": kind}),
                "arrays": ArrayRecord({"values": Array(values)}),
            }
        )
        asked = Message(content, dst_node_id=node, message_type="train")
        begun = time.monotonic()
        replies = list(ArrivalGrid(grid).send_and_receive([asked], timeout=120))
        answer = {"kind": kind, "seconds": time.monotonic() - begun}
        for reply in replies:
            if reply.has_error():
                answer["error"] = [reply.error.code, reply.error.reason]
            else:
                answer |= dict(reply.content["said"])
                answer["first"] = float(reply.content["arrays"]["values"].numpy()[0])
        answers.append(answer)
        Path(context.run_config["out"]).write_text(json.dumps(answers))
