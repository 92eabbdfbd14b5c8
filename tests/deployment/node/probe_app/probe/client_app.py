"""A client that counts, and fails in every way that it is asked for."""

import os
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()
calls = 0
ANSWER = 1


@app.train()
def train(message: Message, context: Context) -> Message:
    """Do what the message asks for."""
    global calls
    calls += 1
    kind = message.content["config"]["kind"]
    if kind == "raise":
        raise ValueError("as asked")
    if kind == "exit":
        sys.exit(3)
    if kind == "nothing":
        return None
    if kind == "wait":
        time.sleep(3)
    kept = context.state.get("kept", ConfigRecord({"count": 0}))
    context.state["kept"] = ConfigRecord({"count": kept["count"] + 1})
    said = {
        "count": kept["count"] + 1,
        "calls": calls,
        "answer": ANSWER,
        "pid": os.getpid(),
        "partition": context.node_config["partition-id"],
        "asks": context.run_config["asks"],
    }
    values = message.content["arrays"]["values"].numpy()
    return Message(
        RecordDict(
            {
                "said": ConfigRecord(said),
                "arrays": ArrayRecord({"values": Array(np.float32(values + 1))}),
            }
        ),
        reply_to=message,
    )
