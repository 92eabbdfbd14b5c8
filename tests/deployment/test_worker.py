from __future__ import annotations

import ast
import importlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from lola_flwr.cli.main import main
from lola_flwr.deployment import shim
from lola_flwr.deployment import worker as worker_module
from lola_flwr.deployment.app_code import forget_app, put_on_path
from lola_flwr.deployment.processes import ProcessId, _stat, this_process
from lola_flwr.deployment.serve_worker import start_worker
from lola_flwr.deployment.shim import WorkerDevice, WorkerFailed, resident
from lola_flwr.deployment.worker import Worker, ask_worker
from lola_flwr.deployment.worker_link import (
    Frame,
    ask,
    connect,
    receive_frame,
    send_frame,
    token_path,
)
from lola_flwr.device.contract import OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.wire.records import Assignment, PartTask

ROOT = Path(__file__).parents[2]
TOY = "toy_app.device:device_fn"


@pytest.fixture(autouse=True)
def toy_app(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.mktemp("app")
    (root / "toy_app").mkdir()
    (root / "toy_app" / "__init__.py").touch()
    shutil.copy(Path(__file__).with_name("toy_device.py"), root / "toy_app/device.py")
    monkeypatch.syspath_prepend(root)
    # On a busy machine a client may be long between two lines.
    monkeypatch.setattr(worker_module, "_HELLO_S", 60.0)


def context(run_id=1, **run_config):
    return SimpleNamespace(
        run_id=run_id, node_id=7, node_config={}, run_config=run_config
    )


def assignment(**changes):
    fields = {
        "server_round": 3,
        "block_index": 1,
        "share": 0.25,
        "batch_size": 4,
        "codec": "fp32",
        "base_fingerprint": "",
        "uplink_bps": 1e6,
    }
    return Assignment(**{**fields, **changes})


class Limit:
    def __init__(self):
        self.held = []

    def hold_to(self, limit_bps, upload_bytes):
        self.held.append((limit_bps, upload_bytes))
        return "pacing"

    def describe(self):
        return "toy"

    def counters(self):
        return {"sent_bytes": 7}

    def close(self):
        self.held.append("closed")


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


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


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


def test_a_worker_that_is_stopped_computes_nothing_until_it_ends(path):
    """As a socket that is shut down does in accept, on which Python waits for it."""
    worker = Worker(path, hold_s=60)
    accepted = []
    listening = worker._socket

    class Counted(socket.socket):
        def accept(self):
            accepted.append(worker._stopping.is_set())
            return super().accept()

    worker._socket = Counted(fileno=listening.detach())
    thread = threading.Thread(target=worker.serve)
    thread.start()
    ask_worker(path, "status")
    worker.stop()
    thread.join(timeout=60)
    # For the one who asked, and not to wait for others.
    assert accepted == [False]
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


def test_a_second_worker_of_a_device_is_refused(served, path):
    limit = Limit()
    with pytest.raises(UserError, match="Another worker answers"):
        start_worker(path, limit, hold_s=1, exit_with_supernode=False)
    assert limit.held == ["closed"]


def test_a_worker_takes_away_what_it_bound_itself(path):
    old = Worker(path, uplink=Limit(), hold_s=60)
    path.unlink()  # as when its directory is cleaned
    new = Worker(path, uplink=Limit(), hold_s=60)
    threads = [threading.Thread(target=worker.serve) for worker in (old, new)]
    for thread in threads:
        thread.start()
    old.stop()
    threads[0].join(timeout=60)
    assert ask_worker(path, "status")["messages"] == 0
    new.stop()
    threads[1].join(timeout=60)
    assert not path.exists()
    assert not token_path(path).exists()


def test_a_socket_that_cannot_be_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"--socket .*xxx: AF_UNIX path too long; name"):
        start_worker(tmp_path / ("x" * 200), Limit(), hold_s=1, exit_with_supernode=0)


def test_memory_is_freed_when_the_supernode_is_gone(served, path):
    supernode = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    device = WorkerDevice(TOY, context(), path)
    started = ProcessId(supernode.pid, _stat(supernode.pid)[1])
    device._header["supernode"] = started.to_header()
    device.train(assignment(), {})
    assert ask_worker(path, "status")["run_id"] == 1
    supernode.kill()
    supernode.wait()
    wait_until(lambda: ask_worker(path, "status")["run_id"] is None)
    wait_until(lambda: served.held[-1] == (None, 0))
    assert not started.is_alive()


def test_a_worker_whose_first_message_failed_ends_with_its_supernode(path):
    worker = Worker(path, exit_with_supernode=True)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as supernode:
        device = WorkerDevice(TOY, context(), path)
        device._header["reference"] = "toy_app.device:nothing"
        started = ProcessId(supernode.pid, _stat(supernode.pid)[1])
        device._header["supernode"] = started.to_header()
        with pytest.raises(UserError, match="no function nothing"):
            device.train(assignment(), {})
        assert thread.is_alive()
    thread.join(timeout=60)
    if thread.is_alive():
        worker.stop()
        pytest.fail("the worker outlived its SuperNode")


def test_the_command_asks_and_stops_a_worker(path, capsys):
    worker = Worker(path)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    assert main(["worker", "--socket", str(path), "--status"]) == 0
    assert f"pid: {os.getpid()}" in capsys.readouterr().out
    assert main(["worker", "--socket", str(path)]) == 1
    assert "Another worker answers" in capsys.readouterr().err
    assert main(["worker", "--socket", str(path), "--stop"]) == 0
    thread.join(timeout=60)
    assert not thread.is_alive()
    assert main(["worker", "--socket", str(path), "--status"]) == 1
    assert "No worker runs" in capsys.readouterr().err


def test_this_process_is_alive_under_its_start_only():
    me = this_process()
    assert me.is_alive()
    assert not ProcessId(me.pid, me.started + 1).is_alive()


def test_without_a_worker_in_the_node_config_the_app_runs_here():
    update = resident(TOY)(context()).train(assignment(), {})
    assert update.num_examples == os.getpid()
    assert update.report.uplink_limit is None


def test_first_use_starts_a_worker_and_sigterm_ends_it(path):
    node_config = {"worker": str(path), "worker-python": sys.executable}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    update = resident(TOY)(flower).train(assignment(), {})
    pid = update.num_examples
    assert pid != os.getpid()
    assert ask_worker(path, "status")["pid"] == pid
    os.kill(pid, signal.SIGTERM)
    wait_until(lambda: not path.exists())


def test_a_worker_that_hangs_is_ended_and_its_successor_waited_for(path, monkeypatch):
    node_config = {"worker": str(path), "worker-python": sys.executable}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    device = resident(TOY)
    pid = device(flower).train(assignment(), {}).num_examples
    os.kill(pid, signal.SIGSTOP)
    with monkeypatch.context() as patch:
        patch.setattr(shim, "ask", partial(ask, hangs_s=0.2))
        with pytest.raises(WorkerFailed, match="hangs and was ended"):
            device(flower).train(assignment(), {})
    wait_until(lambda: not _stat(pid)[1])
    workers = []

    def follow():
        workers.append(Worker(path))
        workers[0].serve()

    following = threading.Timer(0.5, follow)
    following.start()
    # One that the client started would be another process.
    assert device(flower).train(assignment(), {}).num_examples == os.getpid()
    workers[0].stop()
    following.join()


def test_sigterm_lets_a_large_answer_be_read(path):
    node_config = {"worker": str(path), "worker-python": sys.executable}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    pid = resident(TOY)(flower).train(assignment(), {}).num_examples
    header = {
        **WorkerDevice(TOY, context(), path)._header,
        "assignment": assignment().to_record(),
        "named": True,
    }
    with connect(path) as connection:
        send_frame(connection, Frame("train", header, {"w": np.zeros(60 << 20, "u1")}))
        wait_until(lambda: ask_worker(path, "status")["messages"] == 2)
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not path.exists())
        time.sleep(0.2)  # in which a worker that does not wait would end
        assert receive_frame(connection).arrays["w"].nbytes == 60 << 20


def test_a_message_that_waits_when_the_worker_stops_is_told_so(path, tmp_path):
    worker = Worker(path)
    thread = threading.Thread(target=worker.serve)
    thread.start()
    end = tmp_path / "end"
    device = WorkerDevice(TOY, context(**{"train-until": str(end)}), path)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(device.train, assignment(), {})
        wait_until(lambda: ask_worker(path, "status")["training"])
        wait_until(lambda: len(worker._in_hand) == 1)
        second = pool.submit(device.train, assignment(), {})
        wait_until(lambda: len(worker._in_hand) == 2)
        worker.stop()
        end.touch()
        assert first.result().report.server_round == 3
        with pytest.raises(UserError, match="is stopping"):
            second.result()
    thread.join(timeout=60)
    assert not thread.is_alive()


def test_a_worker_that_cannot_start_leaves_the_work_to_the_client(path):
    node_config = {"worker": str(path), "worker-python": "/bin/false"}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    assert resident(TOY)(flower).train(assignment(), {}).num_examples == os.getpid()


@pytest.mark.parametrize("reference", ["no_colon", "nowhere.module:f", "os:1f"])
def test_a_bad_reference_is_named(reference, path):
    with pytest.raises(UserError, match=reference):
        WorkerDevice(reference, context(), path)


def test_worker_needs_no_flower_and_the_client_no_torch():
    program = (
        "import sys\n"
        "import {module}\n"
        "wrong = {unwanted} & set(sys.modules)\n"
        "sys.exit(', '.join(wrong) or 0)"
    )
    for module, unwanted in (
        ("lola_flwr.deployment.serve_worker", "{'flwr', 'torch', 'scipy'}"),
        ("lola_glue.client_app", "{'torch', 'transformers', 'scipy', 'datasets'}"),
    ):
        code = program.format(module=module, unwanted=unwanted)
        result = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )
        assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_python_310_has_all_that_a_device_imports():
    """As a Jetson's; the types of the standard library tell what came later."""
    code = (
        "import sys, lola_glue.device, lola_flwr.cli.profile\n"
        "import lola_flwr.deployment.serve_worker\n"
        "ours = [m for n, m in sys.modules.items() if n.startswith('lola_')]\n"
        "print(*(m.__file__ for m in ours))"
    )
    program = [sys.executable, "-c", code]
    files = subprocess.check_output(
        program, cwd=ROOT / "simulations" / "glue", text=True
    ).split()
    assert len(files) > 50
    mypy = [sys.executable, "-m", "mypy", "--python-version=3.10"]
    checked = subprocess.run(
        [*mypy, "--follow-imports=silent", "--cache-dir=/dev/null", *files],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "checked" in checked.stdout, checked.stdout
    lacking = ("[attr-defined]", "[name-defined]", "[import-not-found]")
    missing = [x for x in checked.stdout.splitlines() if x.endswith(lacking)]
    # Only those who check types import this one.
    assert [line for line in missing if '"Self"' not in line] == []
    for file in files:
        for statement in ast.parse(Path(file).read_text()).body:
            if isinstance(statement, ast.ImportFrom) and statement.module == "typing":
                assert "Self" not in {name.name for name in statement.names}, file


@pytest.mark.slow
def test_the_worker_runs_in_python_310(tmp_path, path):
    """As on a Jetson, whose PyTorch is for the Python of its system."""
    candidates = [
        shutil.which("python3.10") or "",
        *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10")),
    ]
    python = next(filter(_is_python_310, candidates), None)
    if python is None:
        pytest.skip("there is no Python 3.10 here")
    if subprocess.run([python, "-m", "venv", tmp_path / "venv"]).returncode:
        pytest.skip("this Python 3.10 makes no environments")
    python = str(tmp_path / "venv" / "bin" / "python")
    installed = subprocess.run([python, "-m", "pip", "install", "-q", "numpy<3"])
    if installed.returncode:
        pytest.skip("numpy cannot be installed here")
    # The package as it is installed, without what it depends on.
    packages = tmp_path / "packages"
    shutil.copytree(ROOT / "lola_flwr", packages / "lola_flwr")
    wrapper = tmp_path / "python"
    wrapper.write_text(f'#!/bin/sh\nPYTHONPATH={packages} exec {python} "$@"\n')
    wrapper.chmod(0o700)
    node_config = {"worker": str(path), "worker-python": str(wrapper)}
    flower = SimpleNamespace(
        run_id=1, node_id=7, node_config=node_config, run_config={}
    )
    values = {"w": np.ones(3, "f4")}
    update = resident(TOY)(flower).train(assignment(), values)
    np.testing.assert_array_equal(update.arrays["w"], np.full(3, 2, "f4"))
    exe = Path(f"/proc/{update.num_examples}/exe").resolve()
    assert "3.10" in exe.name
    ask_worker(path, "stop")
    wait_until(lambda: not path.exists())


def _is_python_310(python):
    # pyenv's own `python3.10` is there without such a Python.
    return python and not subprocess.run([python, "-c", ""]).returncode
