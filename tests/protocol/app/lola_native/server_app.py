"""The server: rounds with whoever is there."""

import json
from pathlib import Path

from flwr.serverapp import ServerApp

from lola_flwr.strategies.message import LoLaDeft
from lola_native.task import DEVICES, make_coordinator

app = ServerApp()


@app.main()
def main(grid, context):
    """Train for some rounds; write down, as they end, what became of them."""
    config, file = context.run_config, Path(context.run_config["losses"])

    def on_round(record):
        blocks = {block.device: block.status for block in record.blocks}
        with file.open("a") as lines:
            lines.write(json.dumps([record.train_loss, blocks]) + "\n")

    strategy = LoLaDeft(
        make_coordinator(config["model"]),
        min_available_nodes=DEVICES,
        on_round=on_round,
    )
    strategy.start(
        grid,
        strategy.initial_arrays(),
        num_rounds=config["rounds"],
        timeout=config["round-timeout-s"],
    )
