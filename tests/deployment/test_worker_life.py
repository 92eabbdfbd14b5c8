"""How a worker begins and ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest

from lola_flwr.cli.main import main
from lola_flwr.deployment import shim
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
from lola_flwr.errors import UserError
from tests.deployment.workers import TOY, Limit, assignment, context, wait_until

pytestmark = pytest.mark.usefixtures("toy_app")


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
