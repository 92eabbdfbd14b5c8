"""An app in this process: its server, its simulated devices, a Grid between them.

All of the app is real: task, model, strategy, coordinator, devices that train. What is
not there is Flower's SuperLink and Ray, so that hundreds of rounds take minutes.
"""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import torch
from flwr.app import Context, RecordDict
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

import lola_causal.client_app
import lola_causal.server_app
import lola_glue.client_app
import lola_glue.server_app
from lola_flwr.simulation.grid import ProcessGrid

APPS = Path(__file__).parent.parent.parent / "simulations"
PACKAGES = {"glue": lola_glue, "causal": lola_causal}


def app_config(name="glue", **overrides):
    with (APPS / name / "pyproject.toml").open("rb") as file:
        config = tomllib.load(file)["tool"]["flwr"]["app"]["config"]
    overrides = {key.replace("_", "-"): value for key, value in overrides.items()}
    assert overrides.keys() <= config.keys()
    return {**config, **overrides}


class AppGrid(ProcessGrid):
    """Nodes that run the app's ClientApp, each with its part of the data."""

    def __init__(self, config, package=lola_glue):
        count = config["num-devices"]
        nodes = range(100, 100 + count)
        places = {
            node: {"partition-id": node - 100, "num-partitions": count}
            for node in nodes
        }
        apps = dict.fromkeys(nodes, package.client_app.app)
        super().__init__(apps, places, Run.create_empty(1), config)
        self.config = config


def run_app(output_dir, *, app="glue", make_grid=None, **overrides):
    """Run an app; return its round log, records as dicts.

    What its devices keep goes under FLWR_HOME.
    """
    for name in ("_run_id", "_task_id", "_node_id"):
        setattr(TaskIdentity, name, 1)
    torch.set_num_threads(1)
    options = {"interface": "message", "keep_checkpoints": 1, **overrides}
    config = app_config(app, output_dir=str(output_dir), **options)
    package = PACKAGES[app]
    grid = make_grid(config) if make_grid else AppGrid(config, package)
    package.server_app.fine_tune(grid, Context(1, 1, {}, RecordDict(), config))
    lines = (Path(output_dir) / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
