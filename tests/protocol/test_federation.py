"""Native devices join a real SuperLink, beside one with PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.clients import LoLaClient
from lola_flwr.strategies.message import LoLaDeft
from lola_flwr.system.devices import DeviceProfile
from tests.deployment.node.links import BIN, Link, free_port, wait_until
from tests.protocol import recorded
from tests.protocol.device_files import device_files, running
from tests.strategies.in_process import InProcessGrid

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
pytest.importorskip("executorch", reason="needs the extra [export]")

APP = Path(__file__).parent / "app"
MAKE_KEYS = Path(__file__).parents[2] / "clients" / "linux" / "make-keys.sh"
ROUNDS, DEVICES, TORCH = 3, 3, 2


def profile(index):
    return DeviceProfile(f"device-{index}", 2e10, 4e9, snr_db=12.0)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Write the model, and for each device its examples and its profile."""
    directory = tmp_path_factory.mktemp("files")
    recorded.model().save_pretrained(directory / "model")
    for index in range(DEVICES):
        rng, own = np.random.default_rng(index), directory / f"device-{index}"
        own.mkdir()
        ids = rng.integers(5, 60, (20, 10))
        for name, array in {
            "input_ids": ids,
            "attention_mask": np.ones_like(ids),
            "labels": (ids[:, 1] > 30).astype(np.int64),
        }.items():
            np.save(own / f"{name}.npy", array)
        (directory / f"device-{index}.json").write_text(
            json.dumps({"lola-flwr-profile": 1, **profile(index).to_properties()})
        )
    return directory


@pytest.fixture
def alone(files, monkeypatch):
    """Run the same rounds with devices with PyTorch alone; return the losses."""
    monkeypatch.syspath_prepend(APP)
    from lola_native.task import make_coordinator, make_device

    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    model = str(files / "model")
    apps = {
        100 + i: LoLaClient(lambda _, i=i: make_device(profile(i), i, model, files))
        for i in range(DEVICES)
    }
    records = []
    strategy = LoLaDeft(
        make_coordinator(model), min_available_nodes=DEVICES, on_round=records.append
    )
    strategy.start(InProcessGrid(apps), strategy.initial_arrays(), ROUNDS)
    return [record.train_loss for record in records]


def native(link, files, index):
    """Start a native device."""
    return running(
        f"127.0.0.1:{link.port}",
        *("--profile", files / f"device-{index}.json", "--seed", str(index)),
        data=files / f"device-{index}",
    )


def torch_node(link):
    """Start the node of the device with PyTorch, which stays from message to message.

    What a node's configuration states goes before what a simulation would draw.
    """
    address, index = f"127.0.0.1:{link.port}", TORCH
    stated = [f'name="device-{index}"', "flops-per-s=2e10", "memory-bytes=4e9"]
    words = ["--insecure", "--superlink", address, "--port", str(free_port())]
    partition = f"partition-id={index} num-partitions={DEVICES}"
    config = " ".join([partition, *stated, "snr-db=12.0"])
    words += ["--node-config", config]
    return link.start(["lola-flwr", "node", *words], link.directory / "torch")


def rounds_in(file):
    """Return each round's loss, and what became of the devices' updates."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_rounds_with_native_devices_reach_the_same_losses(files, alone, tmp_path):
    device_files()  # exported before anybody waits
    link = Link(tmp_path)
    with ExitStack() as devices:
        try:
            torch_node(link)
            processes = [
                devices.enter_context(native(link, files, index))
                for index in range(DEVICES - 1)
            ]
            settings = f'model="{files / "model"}" data="{files}"'
            losses = tmp_path / "losses"
            link.run(APP, f'{settings} losses="{losses}" rounds={ROUNDS}')
            assert all(process.poll() is None for process in processes)
            devices.close()
        finally:
            link.stop()
    assert [process.returncode for process in processes] == [0, 0]
    found = rounds_in(losses)
    assert len(set(alone)) == len(alone) == ROUNDS
    np.testing.assert_allclose([loss for loss, _ in found], alone, rtol=1e-4)
    names = [f"device-{index}" for index in range(DEVICES)]
    for _, blocks in found:
        assert blocks == dict.fromkeys(names, "accepted")


def test_a_native_device_that_is_killed_costs_its_update_only(files, tmp_path):
    device_files()
    link = Link(tmp_path)
    losses = tmp_path / "losses"
    losses.touch()
    with ExitStack() as devices:
        try:
            torch_node(link)
            first, _ = (
                devices.enter_context(native(link, files, index))
                for index in range(DEVICES - 1)
            )
            settings = f'model="{files / "model"}" data="{files}" losses="{losses}"'
            run = link.run(APP, f"{settings} rounds=4 round-timeout-s=30", wait=False)
            wait_until(lambda: len(rounds_in(losses)) >= 1, 300)
            first.kill()
            assert run.wait(timeout=600) == 0
            devices.close()
        finally:
            link.stop()
    statuses = [blocks for _, blocks in rounds_in(losses)]
    assert len(statuses) == 4
    assert set(statuses[0].values()) == {"accepted"}
    for blocks in statuses:
        others = {name: s for name, s in blocks.items() if name != "device-0"}
        assert set(others.values()) == {"accepted"}
    lost = [s for b in statuses for n, s in b.items() if s != "accepted"]
    assert 1 <= len(lost) <= 3


@pytest.fixture
def guarded(tmp_path):
    """Start a SuperLink with TLS, which knows its nodes by their keys."""
    keys = tmp_path / "keys"
    for words in (("server", "127.0.0.1"), ("node", "known", "stranger")):
        subprocess.run([MAKE_KEYS, keys, *words], check=True, capture_output=True)
    for name in ("known", "stranger"):
        # The native device reads PEM, not OpenSSH's own format.
        copy = shutil.copy(keys / "nodes" / name, tmp_path / name)
        words = ["ssh-keygen", "-p", "-m", "pkcs8", "-N", "", "-f", copy]
        subprocess.run(words, check=True, capture_output=True)
    link = Link(
        tmp_path,
        *("--ssl-ca-certfile", keys / "ca.crt", "--ssl-certfile", keys / "server.crt"),
        *("--ssl-keyfile", keys / "server.key", "--enable-supernode-auth"),
        is_secure=True,
    )
    (link.home / "config.toml").write_text(
        '[superlink]\ndefault = "here"\n[superlink.here]\n'
        f'address = "127.0.0.1:{link.port}"\nroot-certificates = "{keys / "ca.crt"}"\n'
    )
    public = f"{keys / 'nodes' / 'known'}.pub"
    register = [BIN / "flwr", "supernode", "register", public, "here"]
    try:
        subprocess.run(register, env=link.environment, check=True, timeout=60)
        yield link, keys
    finally:
        link.stop()


@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_superlink_with_tls_knows_it_by_its_key(guarded, tmp_path):
    link, keys = guarded
    device_files()
    address = f"127.0.0.1:{link.port}"

    def joined(key, said, authority):
        options = ["--auth-supernode-private-key", tmp_path / key]
        options += ["--root-certificates", authority]
        with running(address, *options, insecure=False) as process:
            words = ""
            while said not in words:
                words += process.stderr.readline()
                assert process.poll() is None, words
        return process.returncode

    assert joined("known", "is there.", keys / "ca.crt") == 0
    assert joined("stranger", "joining anew", keys / "ca.crt") == 0
    other = tmp_path / "other"
    subprocess.run(
        [MAKE_KEYS, other, "server", "127.0.0.1"], check=True, capture_output=True
    )
    with running(
        address, "--root-certificates", other / "ca.crt", insecure=False
    ) as process:
        process.wait(60)
    assert process.returncode == 1
    assert "cannot be used" in process.said and process.said.count("\n") == 1
