"""Who ran a run, and from where, stays in run.json: no secrets, no user's paths."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path

import pytest

from lola_flwr.errors import UserError, quoted
from lola_flwr.model.loading import load_classifier
from lola_flwr.report import Report, Run
from lola_flwr.run.directory import RunDirectory, describe_run
from lola_flwr.run.records import RoundRecord
from lola_flwr.system.devices import simulated_device
from lola_flwr.system.fleet_file import fleet_toml
from tests.deployment.node.links import BIN, Link, free_port
from tests.reliability.test_resume import Rounds

GLUE = Path(__file__).parents[2] / "simulations" / "glue"
MAKE_KEYS = Path(__file__).parents[2] / "clients" / "linux" / "make-keys.sh"
USER = "ada-lovelace-1815"
SECRET = "SECRET-4711-DIFFERENCE-ENGINE"
# What is to hold paths: the run's own description, which is its owner's alone.
DESCRIPTION = "run.json"


def telling(directory, *words):
    """Return the files below a directory that have a word in them."""
    encoded = [word.encode() for word in words]
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and any(word in path.read_bytes() for word in encoded)
    )


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("no file /home/ada/my/data.tsv", "no file …/data.tsv"),
        ("'~/my/data.tsv' is none, use /srv/x/y", "'…/data.tsv' is none, use …/y"),
        (
            "ask https://host:9092/v1/fleet/x, a/b",
            "ask https://host:9092/v1/fleet/x, a/b",
        ),
        ("/data 3/4 bytes/s", "/data 3/4 bytes/s"),
        ("a=/home/ada/x:/home/ada/y", "a=…/x:…/y"),
    ],
)
def test_what_a_device_said_goes_into_logs_without_directories(said, shown):
    assert quoted(said) == repr(shown)


def test_a_run_names_its_user_in_its_description_alone(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    home = tmp_path / USER
    given = home / "my data" / "tasks"
    configuration = {"data-dir": str(given), "model": f"random:{given}", "lr": 0.1}
    out, rounds = home / "runs" / "out", Rounds()
    for rounds.server_round in (1, 2):
        describe_run(out, app="tiny", config=configuration)
        # It goes on with the same paths, and with no others.
        with RunDirectory(out, rounds, configuration=configuration) as files:
            files.on_round(RoundRecord(rounds.server_round, 1, 0.0))
    elsewhere = {**configuration, "data-dir": str(home / "other" / "tasks")}
    with pytest.raises(UserError, match=r"data-dir='…/tasks .*' instead of '…/tasks"):
        RunDirectory(out, rounds, configuration=elsewhere)
    Report([Run.read(out)]).save(out / "report.html")
    assert {"rounds.jsonl", "report.html"} <= {path.name for path in out.iterdir()}
    assert telling(out, USER) == [DESCRIPTION]
    assert "rounds are in …/out/rounds.jsonl" in caplog.text
    assert "going on after round 2 in …/out" in caplog.text
    assert USER not in caplog.text


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Return a user's home, with an app, a fleet, a model and secrets in it."""
    home = tmp_path / "homes" / USER
    home.mkdir(parents=True)
    shutil.copytree(GLUE, home / "app", ignore=shutil.ignore_patterns("__pycache__"))
    fleet = [simulated_device(index, seed=1) for index in range(2)]
    (home / "fleet.toml").write_text(fleet_toml(fleet))
    for part in load_classifier("random:roberta-tiny", num_labels=2):
        part.save_pretrained(home / "model")
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, SECRET)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return home


def settings(home, out):
    """Return a run's configuration, with paths wherever there can be one."""
    given = {
        "model": home / "model",
        "fleet": home / "fleet.toml",
        "output-dir": out,
        **{"num-devices": 2, "batch-size": 4, "max-length": 16, "rounds": 2},
        **{"eval-every": 1, "save-model": True, "trackers": "tensorboard"},
    }
    # TOML, as `flwr run` takes it, and `lola-flwr simulate`, too.
    return [f"{key}={json.dumps(value, default=str)}" for key, value in given.items()]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("engine", ["process", "ray"])
def test_a_simulation_says_nothing_of_its_user_but_on_its_own_terminal(home, engine):
    out, flower = home / "out", home / "flower"
    words = ["simulate", home / "app", "--engine", engine, "--plain", "--home", flower]
    done = subprocess.run(
        [BIN / "lola-flwr", *words, *settings(home, out)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert telling(out, USER, SECRET) == [DESCRIPTION]
    assert (out / "report.html").is_file() and (out / "tensorboard").is_dir()
    said = done.stdout + done.stderr
    assert SECRET not in said
    own = ("files: ", "rounds: ", "model: ", "report: ")
    telling_lines = [
        line
        for line in said.splitlines()
        # Flower's own: where it unpacks an app.
        if USER in line and not line.startswith((*own, "Successfully installed"))
    ]
    assert telling_lines == []
    for log in flower.rglob("*.log"):
        assert SECRET not in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="needs ssh-keygen")
def test_a_federation_with_keys_says_nothing_of_them(home, tmp_path):
    keys = home / "keys"
    for words in (("server", "127.0.0.1"), ("node", "one", "two")):
        subprocess.run([MAKE_KEYS, keys, *words], check=True, capture_output=True)
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
    private = [
        line
        for key in (keys / "server.key", keys / "nodes" / "one", keys / "nodes" / "two")
        for line in key.read_text().splitlines()[1:-1]
    ]
    out = home / "out"
    try:
        for index, name in enumerate(("one", "two")):
            key = str(keys / "nodes" / name)
            words = [BIN / "flwr", "supernode", "register", f"{key}.pub", "here"]
            subprocess.run(words, env=link.environment, check=True, timeout=60)
            words = ["--superlink", f"127.0.0.1:{link.port}"]
            words += ["--root-certificates", str(keys / "ca.crt")]
            words += ["--auth-supernode-private-key", key, "--port", str(free_port())]
            words += ["--node-config", f"partition-id={index} num-partitions=2"]
            link.start(["lola-flwr", "node", *words], tmp_path / name)
        words = [BIN / "flwr", "run", home / "app", "here", "--stream"]
        for setting in settings(home, out):
            words += ["--run-config", setting]
        done = subprocess.run(
            words, env=link.environment, capture_output=True, text=True, timeout=300
        )
    finally:
        link.stop()
    assert telling(out, USER, SECRET, *private) == [DESCRIPTION]
    assert "final: " in done.stdout
    said = done.stdout + done.stderr
    said += "".join(log.read_text() for log in tmp_path.glob("*.log"))
    for word in (USER, SECRET, *private):
        assert word not in said
