"""A run's figures in trackers: what was written is read back with their own tools."""

from __future__ import annotations

import math
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec

import pytest

from lola_flwr.errors import UserError
from lola_flwr.run.records import RoundRecord, StepRecord
from lola_flwr.run.tracking import TRACKERS, figures, tracking

CONFIG = {"task": "cola", "rounds": 2}
RECORDS = [
    RoundRecord(
        server_round=number,
        num_devices=4,
        wireless_s=2.0 * number,
        round_s=2.0,
        observed_s=2.5,
        train_loss=1.0 / number,
        metrics={"accuracy": 0.25 * number} if number == 2 else {},
        start_metrics={"accuracy": 0.125} if number == 1 else {},
        refused={"late": 1},
    )
    for number in (1, 2)
]


def test_what_is_not_known_is_left_out():
    values = figures(RECORDS[0])
    assert values["train_loss"] == 1.0
    assert values["updates/refused"] == 1
    assert not {"latency/bound_s", "accuracy"} & set(values)
    skipped = RoundRecord(3, 4, 4.0, skipped="nobody", metrics={"loss": math.nan})
    assert set(figures(skipped)) == {
        *("wireless_s", "devices", "updates/asked", "updates/refused"),
    }


def test_a_spread_model_has_exchanges():
    record = StepRecord(
        *(1, 4, 2.0, 2.0, 2.5, 1.0), exchanges=26, sent_bytes=7, received_bytes=5
    )
    of_blocks = {"updates/asked", "updates/refused", "latency/bound_s"}
    shared = {k: v for k, v in figures(RECORDS[0]).items() if k not in of_blocks}
    assert figures(record) == {
        **shared,
        **{"exchanges": 26, "bytes/sent": 7, "bytes/received": 5},
    }


def test_none_is_fine(tmp_path):
    with tracking([], tmp_path, CONFIG) as track:
        track(RECORDS[0])
    assert list(tmp_path.iterdir()) == []


def test_unknown_tracker(tmp_path):
    with (
        pytest.raises(UserError, match="Did you mean 'tensorboard'"),
        tracking(["tensorbord"], tmp_path, CONFIG),
    ):
        pass


@contextmanager
def broken_tracker(directory, config):
    if config.get("offline"):
        raise ConnectionError("nobody answers\nthere")
    yield lambda server_round, values: None
    raise ConnectionError("the connection is gone")


def test_a_tracker_that_ends_badly_takes_no_errors_place(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(TRACKERS, "broken", broken_tracker)
    with tracking(["broken"], tmp_path, CONFIG):
        pass
    with (
        pytest.raises(UserError, match="the run's own mistake"),
        tracking(["broken"], tmp_path, CONFIG),
    ):
        raise UserError("the run's own mistake")
    assert caplog.messages == ["tracker broken: the connection is gone"]


def test_a_tracker_that_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setitem(TRACKERS, "broken", broken_tracker)
    with (
        pytest.raises(UserError, match=r"'broken' does not start: .*nobody answers\\n"),
        tracking(["broken"], tmp_path, {"offline": True}),
    ):
        pass


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
@pytest.mark.skipif(
    any(find_spec(name) for name in ("mlflow", "wandb")), reason="they are installed"
)
def test_missing_package(name, tmp_path):
    with (
        pytest.raises(UserError, match=f"pip install {name}"),
        tracking([name], tmp_path, CONFIG),
    ):
        pass


def test_tensorboard(tmp_path):
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with tracking(["tensorboard"], tmp_path, CONFIG) as track:
        for record in RECORDS:
            track(record)
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert loss == [(1, 1.0), (2, 0.5)]
    accuracy = [(event.step, event.value) for event in events.Scalars("accuracy")]
    assert accuracy == [(0, 0.125), (2, 0.5)]
    (text,) = events.Tensors("config/text_summary")
    assert "| task | cola |" in text.tensor_proto.string_val[0].decode()


def test_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    with tracking(["mlflow"], tmp_path / "my-run", CONFIG) as track:
        for record in RECORDS:
            track(record)
    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.run_name == "my-run"
    assert run.data.params["task"] == "cola"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "train_loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with tracking(["wandb"], tmp_path, CONFIG) as track:
        for record in RECORDS:
            track(record)
        assert wandb.run.config["task"] == "cola"
        assert wandb.run.step == 2  # whose summary is there once the next one begins
        assert wandb.run.summary["train_loss"] == 1.0
    assert wandb.run is None
    assert list(tmp_path.rglob("*.wandb"))


def test_a_tracker_that_fails_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    seen = []

    def fail(server_round, values):
        seen.append(server_round)
        raise ConnectionError("out of reach")

    monkeypatch.setitem(TRACKERS, "mlflow", lambda *_: nullcontext(fail))
    with tracking(["mlflow"], tmp_path, CONFIG) as track:
        for record in RECORDS:
            track(record)
    assert seen == [0, 1, 2]
    assert "tracker mlflow: out of reach" in caplog.text
