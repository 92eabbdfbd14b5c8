"""One seed gives one run: simulated, through Flower's SuperNode, and through ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lola_flwr.model.loading import load_classifier
from lola_flwr.simulation import run_app
from tests.deployment.node.links import Link, free_port

GLUE = Path(__file__).parents[3] / "simulations" / "glue"
DEVICES = 2
SETTINGS = (
    'model="random:roberta-tiny"',
    f"num-devices={DEVICES}",
    "batch-size=8",
    "max-length=16",
    "rounds=4",
    "eval-every=2",
    "lr=1e-2",
    "seed=5",
    'interface="message"',
    'uplink-mbps="4 1"',
    # Only a deployment sees how long its uploads take.
    "correct-profiles=false",
)
# What is the machine's, or the transport's alone.
OWN = ("measured_", "server_s", "uplink_limit", "peak_memory_bytes", "unexplained_s")


def stated(out):
    """Return a run's rounds without what belongs to where it ran."""

    def own(values):
        return {
            name: value
            for name, value in values.items()
            if not any(name.startswith(word) for word in (*OWN, "observed", "wireless"))
        }

    lines = (out / "rounds.jsonl").read_text().splitlines()
    rounds = [own(json.loads(line)) for line in lines]
    return [{**r, "blocks": [own(block) for block in r["blocks"]]} for r in rounds]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_losses_are_the_same_to_the_last_bit(tmp_path, monkeypatch):
    # Ray gives its actors one thread; more of them sum in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    model, _ = load_classifier("random:roberta-tiny", num_labels=2)
    assert model.config.hidden_dropout_prob > 0
    simulated = run_app(
        GLUE,
        num_devices=DEVICES,
        run_config=[*SETTINGS, f'output-dir="{tmp_path / "simulated"}"'],
        home=tmp_path / "home",
    )
    assert simulated.completed, simulated.output
    expected = stated(tmp_path / "simulated")
    assert len({round_["train_loss"] for round_ in expected}) == len(expected) == 4
    for program in (["flower-supernode"], ["lola-flwr", "node"]):
        directory = tmp_path / program[0]
        directory.mkdir()
        link = Link(directory)
        try:
            for index in range(DEVICES):
                port = ("--port", str(free_port()))
                link.node(program, *port, partition=(index, DEVICES))
            link.run(GLUE, *SETTINGS, f'output-dir="{directory / "out"}"')
        finally:
            link.stop()
        assert stated(directory / "out") == expected, program
