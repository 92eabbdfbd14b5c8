"""A fifth of the devices is hostile: a small model, and a task that it soon learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lola_flwr.allocation import RoundMode
from lola_flwr.model.loading import load_values
from tests.reliability.faults import change_all
from tests.reliability.tiny_run import make_device, run, tiny_model
from tests.strategies.in_process import InProcessGrid

NO_DEFENCE = {"norm_factor": np.inf, "max_gradient_norm": 1e9, "reputation": False}
DEFENCE = {"norm_factor": 2.0}


class Hostile(InProcessGrid):
    """Two of ten devices send their gradients with the sign flipped, 100 times."""

    def _deliver(self, message):
        reply = super()._deliver(message)
        node = message.metadata.dst_node_id
        if message.metadata.message_type == "train" and node in (102, 107):
            change_all(-100.0)(reply.content)
        return reply


def accuracy(tmp_path, make_grid, defence):
    options = {
        "mode": RoundMode(devices_per_block=3),
        "rotation_eps": 0.5,
        "batch_size": 16,
        "lr": 1e-2,
        **defence,
    }
    coordinator = run(
        tmp_path,
        num_rounds=120,
        num_devices=10,
        make_grid=make_grid,
        options=options,
    )
    model = tiny_model().eval()
    state = coordinator.values()
    names = coordinator.partition.trainable
    load_values(model, names, [state[name] for name in names])
    # Data that no device has.
    device = make_device(99, model, coordinator.partition)
    batch = device.batch_source(0, 4000)
    with torch.inference_mode():
        said = model(**batch).logits.argmax(dim=1)
    return float((said == batch["labels"]).float().mean())


@pytest.mark.slow
def test_limits_of_norms_withstand_what_ruins_a_run_without_them(tmp_path):
    clean = accuracy(tmp_path / "clean", InProcessGrid, NO_DEFENCE)
    ruined = accuracy(tmp_path / "ruined", Hostile, NO_DEFENCE)
    defended = accuracy(tmp_path / "defended", Hostile, DEFENCE)
    # With 4,000 examples one standard error is half a point.
    assert clean > 0.8
    assert ruined < 0.55
    assert defended > clean - 0.05
