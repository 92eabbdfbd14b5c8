"""Runs that end at their target, under every interface and method."""

from __future__ import annotations

import threading
import time

import pytest

from lola_flwr.errors import UserError
from tests.reliability.app_run import run_app

TINY = {
    "model": "random:roberta-tiny",
    "num_devices": 4,
    "batch_size": 4,
    "rounds": 4,
    "eval_every": 2,
    "max_length": 8,
}
KINDS = ({"interface": "message"}, {"interface": "legacy"}, {"method": "d2ft"})


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))


def checkpoints(directory):
    return sorted(path.stem[-1] for path in (directory / "checkpoints").iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_ends_when_an_evaluation_is_there(tmp_path, caplog, kind):
    whole = run_app(tmp_path / "whole", **TINY, **kind)
    caplog.clear()
    losses = [r["metrics"].get("loss") for r in whole]
    start = whole[0]["start_metrics"]["loss"]
    # Whether it learns is not the question: what the second evaluation comes to.
    assert losses[1] != start
    sign = "<=" if losses[1] < start else ">="
    target = f"loss{sign}{losses[1]!r}"
    out = tmp_path / "out"
    with caplog.at_level("INFO", logger="flwr"):
        records = run_app(
            out, **TINY, **kind, target=target, checkpoint_every=100, keep_checkpoints=2
        )
    assert [r["server_round"] for r in records] == [1, 2]
    assert [r["metrics"].get("loss") for r in records] == losses[:2]
    (final,) = (m for m in caplog.messages if m.startswith("final: "))
    assert f" target_round=2 target_s={records[-1]['wireless_s']:.3f} " in final
    # It can be gone on with, for another target.
    assert checkpoints(out) == ["0", "2"]
    caplog.clear()
    with caplog.at_level("INFO", logger="flwr"):
        again = run_app(out, **TINY, **kind, target=target)
        assert [r["server_round"] for r in again] == [1, 2]
        assert any("was reached before" in message for message in caplog.messages)
        further = run_app(out, **TINY, **kind, target="accuracy>=2")
    assert [r["server_round"] for r in further] == [1, 2, 3, 4]
    assert " target_round=none" in caplog.messages[-1]


@pytest.mark.slow
def test_rounds_that_end_by_an_exception_leave_no_thread(tmp_path):
    """Flower's own would ask for nodes for ever."""

    def asking():
        names = [thread.name for thread in threading.enumerate()]
        return [name for name in names if "_update_client_manager" in name]

    with pytest.raises(UserError, match="holds before the first round"):
        run_app(tmp_path, **TINY, interface="legacy", target="loss>=0.6")
    for _ in range(60):
        if not asking():
            return
        time.sleep(1)
    pytest.fail(f"still there: {asking()}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("f1>=0.5", r"has no 'f1'; it has loss, accuracy\."),
        ("loss<=5", r"holds before the first round: loss is"),
    ],
)
def test_a_target_for_no_run_is_refused_before_any_round(tmp_path, target, said):
    with pytest.raises(UserError, match=said):
        run_app(tmp_path / "out", **TINY, target=target)
    assert not (tmp_path / "out" / "rounds.jsonl").read_text()
