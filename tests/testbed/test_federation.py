"""Real SuperNodes with TLS and keys, on links of their own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from lola_flwr.deployment.worker import ask_worker
from lola_flwr.simulation import run_app
from simulations.testbed.federation import federation
from simulations.testbed.network import SERVER_ADDRESS, inside, network, why_unavailable
from simulations.testbed.options import Options
from simulations.testbed.programs import make_keys

pytestmark = [pytest.mark.testbed, pytest.mark.timeout(600)]

APP = Path(__file__).parents[2] / "simulations" / "glue"
DEVICES = 4
TINY = (
    'model="random:roberta-tiny"',
    "batch-size=4",
    "max-length=16",
    'interface="message"',
    f"num-devices={DEVICES}",
)
# Rates so far apart that the plan does not hang on a percent of one of them.
RATES = 'uplink-mbps="40 20 10 5"'


@pytest.fixture(scope="module")
def testbed(tmp_path_factory):
    reason = why_unavailable()
    if reason:
        pytest.skip(reason)
    directory = tmp_path_factory.mktemp("testbed")
    with (
        network([40e6, 20e6, 10e6, 5e6]) as links,
        federation(links, directory, Options()) as running,
    ):
        yield running


def run(testbed, out, *overrides):
    ended = testbed.run(APP, [*TINY, RATES, f'output-dir="{out}"', *overrides])
    assert ended["status"] == "finished:completed", ended
    return ended, rounds_of(out)


def rounds_of(directory):
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def who_did_what(records):
    return [
        {(b["device"], b["block_index"], b["status"]) for b in record["blocks"]}
        for record in records
    ]


def deployed_and_simulated(testbed, tmp_path, *options):
    """Return the rounds of one configuration in both worlds."""
    _, deployed = run(testbed, tmp_path / "deployed", *options)
    simulated = run_app(
        APP,
        num_devices=DEVICES,
        run_config=[*TINY, RATES, *options, f'output-dir="{tmp_path / "simulated"}"'],
        home=tmp_path / "home",
    )
    assert simulated.completed, simulated.output
    expected = rounds_of(tmp_path / "simulated")
    for here, there in zip(deployed, expected, strict=True):
        assert here["skipped"] is None
        assert here["train_loss"] == pytest.approx(there["train_loss"], rel=1e-5)
        assert here["metrics"] == pytest.approx(there["metrics"], rel=1e-4)
        assert here["round_s"] == there["round_s"]
    return deployed, expected


def test_the_same_app_comes_to_the_same_metrics_as_in_simulation(testbed, tmp_path):
    deployed, expected = deployed_and_simulated(
        testbed, tmp_path, "rounds=3", "eval-every=1", "correct-profiles=false"
    )
    assert who_did_what(deployed) == who_did_what(expected)
    # And what only a deployment knows.
    for record in deployed:
        for block in record["blocks"]:
            assert block["uplink_limit"] == "pacing"
            assert block["measured_upload_s"] > 0


def test_d2ft_takes_the_steps_that_it_takes_in_simulation(testbed, tmp_path):
    deployed, expected = deployed_and_simulated(
        testbed,
        tmp_path,
        'method="d2ft"',
        'd2ft-options="traffic=0.5, micro_batches=4, audit_seed=1"',
        *("rounds=2", "eval-every=1"),
    )
    for here, there in zip(deployed, expected, strict=True):
        for key in ("exchanges", "sent_bytes", "received_bytes"):
            assert here[key] == there[key], key


def test_the_devices_byte_counters_agree_with_flowers(testbed, tmp_path):
    def sent_bytes():
        return sum(
            ask_worker(testbed.directory / f"device-{index}" / "worker.sock", "status")[
                "sent_bytes"
            ]
            for index in range(DEVICES)
        )

    before = sent_bytes()
    ended, _ = run(
        testbed,
        tmp_path / "out",
        'model="random:roberta-wide"',
        "rounds=2",
        "eval-every=9",
    )
    counted = ended["network-traffic"]["inbound-bytes"]
    assert counted > 2 * DEVICES * 12e6
    assert sent_bytes() - before == pytest.approx(counted, rel=0.02)


def test_a_supernode_that_dies_loses_its_update_of_that_round_only(testbed, tmp_path):
    out = tmp_path / "out"
    log = testbed.directory / "supernode-1.log"

    def kill_in_round_2():
        seen = log.stat().st_size
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if b"ROUND 2]" in log.read_bytes()[seen:]:
                testbed.kill("supernode-1")
                testbed.restart_supernode(1)
                return
            time.sleep(0.05)

    killer = threading.Thread(target=kill_in_round_2)
    killer.start()
    # Flower tells the server of the death after 60 s at most, before this time is up.
    _, records = run(testbed, out, "rounds=6", "eval-every=9", "round-timeout-s=150")
    killer.join()
    lost = [
        (record["server_round"], block["device"])
        for record in records
        for block in record["blocks"]
        if block["status"] != "accepted"
    ]
    assert lost == [(2, "device-0001")]
    # The others go on in every round, and it is back before the end.
    others = {"device-0000", "device-0002", "device-0003"}
    assert all({b["device"] for b in record["blocks"]} >= others for record in records)
    assert "device-0001" in {b["device"] for b in records[-1]["blocks"]}


def connect(testbed, directory, *, key, authority):
    """Start a SuperNode that gives up soon; return how it ended and what it said."""
    command = [
        str(Path(sys.executable).with_name("flower-supernode")),
        *("--superlink", f"{SERVER_ADDRESS}:8000", "--port", "9199"),
        *("--root-certificates", str(authority), "--max-retries", "1"),
        *("--max-wait-time", "10"),
    ]
    if key is not None:
        command += ["--auth-supernode-private-key", str(key)]
    # A file, no pipe: the SuperExec that it starts outlives it, and holds a pipe open.
    log = directory / "refused.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            inside(testbed.network.devices[0], command),
            env=testbed.environment(directory),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return code, log.read_text(errors="replace")


def test_a_node_without_a_registered_key_is_refused(testbed, tmp_path):
    make_keys(tmp_path / "keys", ["stranger"])
    ours = testbed.directory / "keys" / "ca.crt"
    for key in (tmp_path / "keys" / "nodes" / "stranger", None):
        code, said = connect(testbed, tmp_path, key=key, authority=ours)
        assert code != 0
        assert "Failed to initialize the connection" in said


def test_a_superlink_of_another_authority_is_refused(testbed, tmp_path):
    make_keys(tmp_path / "keys", ["stranger"])
    key = testbed.directory / "keys" / "nodes" / "node-0"
    authority = tmp_path / "keys" / "ca.crt"
    code, said = connect(testbed, tmp_path, key=key, authority=authority)
    assert code != 0
    assert "CERTIFICATE_VERIFY_FAILED" in said
