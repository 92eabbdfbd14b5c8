"""What a worker answers: profiles, updates and faults of its app."""

from __future__ import annotations

import importlib
import socket
import sys
import threading
import weakref

import numpy as np
import pytest

from lola_flwr.deployment.app_code import forget_app, put_on_path
from lola_flwr.deployment.shim import WorkerDevice, WorkerFailed
from lola_flwr.deployment.worker import Worker, ask_worker
from lola_flwr.deployment.worker_link import Frame, connect, send_frame, token_path
from lola_flwr.device.contract import OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.wire.records import PartTask
from tests.deployment.workers import TOY, assignment, context, wait_until

pytestmark = pytest.mark.usefixtures("toy_app")


def test_profile_and_update_come_from_the_worker(served, path):
    device = WorkerDevice(TOY, context(), path)
    assert device.profile.uplink_bps == 4e6
    values = {"b": np.ones(3, "f4"), "a": np.zeros((2, 2), "f4")}
    update = device.train(assignment(), values)
    assert list(update.arrays) == ["b", "a"]
    np.testing.assert_array_equal(update.arrays["b"], np.full(3, 2, "f4"))
    assert update.report.server_round == 3
    assert update.report.uplink_limit == "pacing"
    assert served.held == [(1e6, 28)]
    assert ask_worker(path, "status")["sent_bytes"] == 7
    # One device for the run, however many messages.
    assert device.train(assignment(), {}).report.loss == update.report.loss


def test_projections_and_parts_come_from_the_worker(served, path):
    device = WorkerDevice(TOY, context(), path)
    update = device.train(assignment(direction_seed=3), {})
    assert update.report.projections == b"\x00\x01\xff"
    assert served.held == [(1e6, 3)]
    task = PartTask(
        kind="loss", step=4, base_fingerprint="", seed=1, num_groups=2, sizes="1x2"
    )
    report, arrays = device.compute_part(task, {"hidden": np.ones(2, "f4")})
    assert (report.kind, report.step, report.losses) == ("loss", 4, b"\xff\x00")
    np.testing.assert_array_equal(arrays["hidden"], np.full(2, 2, "f4"))
    assert ask_worker(path, "status")["messages"] == 2


def test_socket_and_token_are_the_owners_alone(served, path):
    assert path.stat().st_mode & 0o777 == 0o600
    assert token_path(path).stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700


def test_without_the_token_nothing_is_answered(served, path):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        send_frame(connection, Frame("hello", {"token": "guess"}))
        connection.settimeout(60)
        assert connection.recv(1) == b""


def test_a_second_run_is_refused_with_the_reason(served, path):
    WorkerDevice(TOY, context(run_id=1), path).train(assignment(), {})
    with pytest.raises(UserError, match="serves run 1; run 2 can have it once"):
        WorkerDevice(TOY, context(run_id=2), path).train(assignment(), {})
    # And the first one goes on.
    WorkerDevice(TOY, context(run_id=1), path).train(assignment(), {})


def test_a_run_that_is_silent_makes_way(path):
    worker = Worker(path, hold_s=0)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    try:
        for run_id in (1, 2):
            WorkerDevice(TOY, context(run_id=run_id), path).train(assignment(), {})
            assert ask_worker(path, "status")["run_id"] == run_id
    finally:
        ask_worker(path, "stop")
        thread.join(timeout=60)
    assert not thread.is_alive()


@pytest.mark.parametrize(
    ("kind", "error", "text"),
    [
        ("user", UserError, "The toy is broken."),
        ("memory", OutOfMemory, "4 GiB"),
        ("app", WorkerFailed, "KeyError"),
    ],
)
def test_errors_of_the_app_come_back(served, path, kind, error, text):
    device = WorkerDevice(TOY, context(fail=kind), path)
    with pytest.raises(error, match=text):
        device.train(assignment(), {})
    assert device.profile.name == "toy"


def test_an_app_that_fails_at_first_use_is_read_anew(served, path, tmp_path):
    package = tmp_path / "mended"
    package.mkdir()
    (package / "__init__.py").write_text("def device_fn(context): raise KeyError('x')")
    sys.path.insert(0, str(tmp_path))
    try:
        device = WorkerDevice("mended:device_fn", context(), path)
    finally:
        sys.path.remove(str(tmp_path))
    with pytest.raises(WorkerFailed, match="KeyError"):
        device.train(assignment(), {})
    assert str(tmp_path) not in sys.path
    (package / "__init__.py").write_text("from toy_app.device import device_fn")
    device.train(assignment(), {})


def test_only_a_path_that_was_added_is_taken_away(tmp_path):
    assert put_on_path(tmp_path)
    assert not put_on_path(tmp_path)
    forget_app(TOY, None)
    assert str(tmp_path) in sys.path
    forget_app(TOY, tmp_path)
    assert str(tmp_path) not in sys.path


def test_nothing_of_a_forgotten_app_is_kept(tmp_path, monkeypatch):
    """An app that is loaded whenever its node is killed took 1.3 MB more each time."""
    (tmp_path / "validating.py").write_text(
        "from typing import Annotated\n"
        "from pydantic import AfterValidator, BaseModel\n"
        "def known(name): return name\n"
        "class Config(BaseModel):\n"
        "    task: Annotated[str, AfterValidator(known)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    config = weakref.ref(importlib.import_module("validating").Config)
    assert config().__name__ == "Config"
    forget_app("validating:device_fn", None)
    assert config() is None


def test_a_client_that_is_killed_costs_its_message_only(served, path, tmp_path):
    end = tmp_path / "end"
    device = WorkerDevice(TOY, context(**{"train-until": str(end)}), path)
    with connect(path) as connection:
        header = {**device._header, "assignment": assignment().to_record()}
        send_frame(connection, Frame("train", header))
        wait_until(lambda: ask_worker(path, "status")["training"])
    # Gone in the middle of it; the next message of the run waits for its end.
    threading.Timer(0.5, end.touch).start()
    assert device.train(assignment(server_round=4), {}).report.server_round == 4


@pytest.mark.parametrize("reference", ["no_colon", "nowhere.module:f", "os:1f"])
def test_a_bad_reference_is_named(reference, path):
    with pytest.raises(UserError, match=reference):
        WorkerDevice(reference, context(), path)
