"""The Linux kit installed by its script, and two rounds with that device."""

from __future__ import annotations

import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from lola_flwr.model.loading import load_classifier
from simulations.testbed.federation import Federation, Options
from simulations.testbed.network import SERVER_ADDRESS, network
from simulations.testbed.network import why_unavailable as why_no_network
from simulations.testbed.programs import TestbedError, program
from tests.arm64.debian import call, debian, lay_out, why_unavailable
from tests.installing import build_wheel
from tests.testbed.test_federation import rounds_of

pytestmark = [pytest.mark.arm64, pytest.mark.timeout(3 * 3600)]

ROOT = Path(__file__).parents[2]
APP = ROOT / "simulations" / "glue"
NAME = "device-0000"
RUN = (
    *("batch-size=4", "max-length=16", "rounds=2", "eval-every=1"),
    *('interface="message"', "num-devices=1", "correct-profiles=false"),
    *('uplink-mbps="40"', "round-timeout-s=1800"),
)
EXTRAS = "glue,adapters,offline"
EXTRA_OPTIONS = [f"--extra={extra}" for extra in EXTRAS.split(",")]
# Of other processors' order of adding up, after two rounds.
TOLERANCE = 1e-5
LEFT = ("/etc/lola-flwr", "/var/lib/lola-flwr", "/run/lola-flwr", "/mnt/given")
START_S = 900


@pytest.fixture(scope="module")
def board():
    """The Debian, with this checkout and its wheel in /mnt."""
    reason = why_unavailable() or why_no_network()
    if reason:
        pytest.skip(reason)
    with debian() as made:
        checkout = made.path("/mnt/lola-flwr")
        shutil.rmtree(checkout, ignore_errors=True)
        listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
        for name in filter(None, listed.split("\0")):
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            # Links stay links: the package is one tree.
            shutil.copy(ROOT / name, checkout / name, follow_symlinks=False)
        yield made


class ArmFederation(Federation):
    """A testbed with one device, which is an arm64 Debian.

    Parameters
    ----------
    board
        The Debian.
    prepare
        Installs a kit in it, given the directory of the keys and the SuperLink.
    """

    def __init__(self, network, directory, board, prepare):
        super().__init__(network, directory, Options())
        self.board = board
        self.prepare = prepare

    def start_device(self, index):
        self.prepare(self.directory / "keys", f"{SERVER_ADDRESS}:8000")
        super().start_device(index)

    def start_worker(self, index):
        self._start_unit("worker", index)
        socket = self.board.path("/run/lola-flwr/worker.sock")
        wait_for(socket.exists, self.directory / f"worker-{index}.log")

    def start_supernode(self, index):
        self._start_unit("supernode", index)

    def _start_unit(self, kind, index):
        """Start what a unit says, as the user and with the environment that it says."""
        unit = unit_of(self.board.path(f"/etc/systemd/system/lola-{kind}.service"))
        owner = ("-o", unit["User"][0], "-g", unit["Group"][0])
        places = {"RuntimeDirectory": "/run", "StateDirectory": "/var/lib"}
        for key in places.keys() & unit.keys():
            mode = unit.get(f"{key}Mode", ["755"])[0]
            for name in unit[key]:
                place = f"{places[key]}/{name}"
                self.board.run("install", "-d", *owner, "-m", mode, place)
        environment = dict(word.split("=", 1) for word in unit["Environment"])
        command = self.board.command(
            unit["ExecStart"], user=unit["User"][0], **environment
        )
        device, home = self.network.devices[index], self._home(index)
        self._start(f"{kind}-{index}", device, command, home)


def unit_of(path):
    """Return the words of each key of a unit."""
    lines = path.read_text().splitlines()
    pairs = [line.split("=", 1) for line in lines if "=" in line and line[0] != "#"]
    return {key: words.split() for key, words in pairs}


def wait_for(ready, log):
    deadline = time.monotonic() + START_S
    while not ready():
        if time.monotonic() > deadline:
            raise TestbedError(log.read_text()[-4000:])
        time.sleep(1)


@pytest.fixture(scope="module")
def model(board, tmp_path_factory):
    """A small model at the same place here and in the Debian.

    From files: from one seed PyTorch draws other normal numbers on other processors,
    which the device refuses as another model. Without dropout nothing else is drawn.
    """
    drawn, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
    drawn.config.hidden_dropout_prob = drawn.config.attention_probs_dropout_prob = 0.0
    place = tmp_path_factory.mktemp("model") / "tiny"
    drawn.save_pretrained(place)
    tokenizer.save_pretrained(place)
    there = board.path(str(place))
    shutil.copytree(place, there)
    board.run("chmod", "-R", "a+rX", place)
    yield f'model="{place}"'
    shutil.rmtree(there)


@pytest.fixture(scope="module")
def simulated(model, tmp_path_factory):
    """What the run comes to on this machine's own processor."""
    directory = tmp_path_factory.mktemp("simulated")
    options = ("--devices", "1", "--engine", "process", "--plain")
    out = ("--out", directory / "run", "--home", directory / "home")
    words = ("simulate", APP, model, *RUN, *options, *out)
    call([program("lola-flwr"), *map(str, words)])
    return directory / "run"


def install(board, keys, superlink):
    """Install the Linux kit with this checkout's wheel, as its page says."""
    for left in LEFT:
        shutil.rmtree(board.path(left), ignore_errors=True)
    given = board.path("/mnt/given")
    given.mkdir()
    shutil.copy(keys / "ca.crt", given)
    # The kit takes the device's name from its key's.
    shutil.copy(keys / "nodes" / "node-0", given / NAME)
    wheel = build_wheel(ROOT, given)
    board.run(
        *("sh", "/mnt/lola-flwr/clients/linux/install.sh", superlink),
        *("/mnt/given/ca.crt", f"/mnt/given/{NAME}"),
        f"/mnt/given/{wheel.name}[{EXTRAS}]",
    )


def state_part(board):
    """State the device's part of the data, as the kit asks for."""
    path = board.path("/etc/lola-flwr/device.env")
    asked = "\nLOLA_NODE_CONFIG=\n"
    assert asked in path.read_text()
    part = "\nLOLA_NODE_CONFIG='partition-id=0 num-partitions=1'\n"
    path.write_text(path.read_text().replace(asked, part))


def measure(board):
    """Measure the device, as install.sh says."""
    board.run(
        *("/opt/lola-flwr/bin/python", "-m", "lola_flwr.cli.profile", "--name", NAME),
        *("--model", "random:roberta-tiny", "--batch-size", 4, "--max-length", 16),
        *("--uplink-mbps", 40, "--budget-s", 10, "--out", "/etc/lola-flwr/device.json"),
    )


def assert_same_run(there, here):
    """Compare the files of a run with an arm64 device with those of one without."""
    arm64, own = rounds_of(there), rounds_of(here)
    assert len(arm64) == len(own) == 2
    for arm, expected in zip(arm64, own, strict=True):
        assert arm["skipped"] is None
        assert arm["train_loss"] == pytest.approx(expected["train_loss"], rel=TOLERANCE)
        assert arm["metrics"] == pytest.approx(expected["metrics"], rel=TOLERANCE)
        for block in arm["blocks"]:
            assert block["status"] == "accepted"
            # The kit's relay held it, and its worker answered.
            assert block["uplink_limit"] == "pacing"
            assert block["measured_upload_s"] > 0
    # A new model's loss says little: the gradients, by their mean over the rounds.
    off = np.linalg.norm(gradients(there) - gradients(here))
    assert off <= TOLERANCE * np.linalg.norm(gradients(here))


def gradients(directory):
    """Return the optimizer's mean of the gradients in the last checkpoint."""
    stored = load_file(directory / "checkpoints" / "round-000002.safetensors")
    names = sorted(name for name in stored if name.endswith("/exp_avg"))
    assert names
    return np.concatenate([stored[name].ravel() for name in names])


def run_with(board, model, directory, prepare):
    """Run the app with the board as its only device; return where its files are."""
    with network([40e6]) as links:
        there = ArmFederation(links, directory, board, prepare)
        try:
            there.start()
            ended = there.run(APP, [model, *RUN, f'output-dir="{directory / "run"}"'])
        finally:
            there.stop()
    assert ended["status"] == "finished:completed", ended
    return directory / "run"


def test_the_linux_kit(board, model, simulated, tmp_path):
    def prepare(keys, superlink):
        lay_out(board, "/opt/lola-flwr", "-r", ROOT / "pyproject.toml", *EXTRA_OPTIONS)
        install(board, keys, superlink)
        code = "import platform; print(platform.machine())"
        assert board.run("/opt/lola-flwr/bin/python", "-c", code) == "aarch64\n"
        state_part(board)
        measure(board)

    run = run_with(board, model, tmp_path, prepare)
    assert_same_run(run, simulated)
