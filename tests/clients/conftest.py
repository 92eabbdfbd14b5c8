"""Flower's task around messages, and a project's model."""

from __future__ import annotations

import pytest
import torch
from flwr.supercore.task_identity import TaskIdentity

from tests.clients.own_project import Net


@pytest.fixture(autouse=True)
def task(monkeypatch):
    """Flower makes messages only within a task."""
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)


@pytest.fixture
def model():
    torch.manual_seed(3)
    net = Net()
    net.embed.requires_grad_(False)  # on the server: devices' code need not know
    return net
