"""A toy app, and a worker that serves it."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest

from lola_flwr.deployment import worker as worker_module
from lola_flwr.deployment.worker import Worker
from lola_flwr.deployment.worker_link import token_path
from tests.deployment.workers import Limit


@pytest.fixture
def toy_app(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("app")
    (root / "toy_app").mkdir()
    (root / "toy_app" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("toy_device.py"), root / "toy_app/device.py")
    monkeypatch.syspath_prepend(root)
    # On a busy machine a client may be long between two lines.
    monkeypatch.setattr(worker_module, "_HELLO_S", 60.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "private" / "worker.sock"


@pytest.fixture
def served(path):
    limit = Limit()
    worker = Worker(path, uplink=limit, hold_s=60)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    yield limit
    worker.stop()
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert limit.held[-1] == "closed"
    assert not path.exists()
    assert not token_path(path).exists()
