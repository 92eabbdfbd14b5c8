"""What cannot be written ends a run in one line, and harms nothing that was there.

A limit on the size of a file stands for a full disk: the system refuses the write in
the same places, to root, too.
"""

from __future__ import annotations

import errno
import os
import resource
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import transformers
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models

from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.machine.files import filling, replacing, writing
from lola_flwr.model.saved_adapters import save_model
from lola_flwr.report import Report, Run
from lola_flwr.run import directory as run_directory
from lola_flwr.run.checkpoint import Checkpoints, Snapshot
from lola_flwr.run.directory import RunDirectory, describe_run
from lola_flwr.run.records import RoundRecord
from lola_flwr.run.round_log import RoundLog
from tests.marks import rest_slow
from tests.reliability.test_resume import assert_same_end, records
from tests.reliability.tiny_run import run

SNAPSHOT = Snapshot({"a": np.arange(5000, dtype=np.float32)}, {"round": 1})
RECORD = RoundRecord(1, 2, 3.0)


@contextmanager
def full_disk(largest_bytes):
    """Let no file become larger than this."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_checkpoint(directory):
    Checkpoints(directory).save(1, SNAPSHOT)


def write_description(directory):
    describe_run(directory, app="x" * 5000, config={})


def write_round(directory):
    RoundLog(directory / "rounds.jsonl").append(
        RoundRecord(1, 2, 3.0, skipped="x" * 5000)
    )


def write_report(directory):
    Report([Run("run", [RECORD])]).save(directory / "report.html")


def write_tensors(directory):
    with replacing(directory / "tensors", shared=True) as unfinished:
        save_file(dict(SNAPSHOT.arrays), unfinished)


WRITERS = [
    *(write_checkpoint, write_description, write_round, write_report, write_tensors)
]


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_one_line_with_the_file_and_what_to_do(tmp_path, write):
    with (
        full_disk(4096),
        pytest.raises(UserError, match=r"cannot be written: .*; make room") as raised,
    ):
        write(tmp_path)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/") and "\n" not in message
    assert os.strerror(errno.EFBIG) in message
    # Nothing is left that takes room, but for the rounds, of which there may be more.
    assert {path.name for path in tmp_path.iterdir()} <= {"rounds.jsonl"}
    write(tmp_path / "again")


@pytest.mark.parametrize("write", WRITERS)
def test_a_file_in_the_place_of_a_directory(tmp_path, write):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"cannot be written: .*; move away"):
        write(tmp_path / "out" / "run")
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_that_takes_nothing(tmp_path, write):
    # Where even root may write nothing.
    with pytest.raises(UserError, match=r"^/proc/.* cannot be written: "):
        write(Path("/proc/lola"))


def test_a_model_that_cannot_be_saved(tmp_path, roberta):
    words = {"[UNK]": 0, **{f"word-{number}": number + 1 for number in range(5000)}}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    )
    for saved in (roberta, tokenizer):
        with (
            pytest.raises(UserError, match=r"model cannot be written: .*; make room"),
            full_disk(10_000),
            filling(tmp_path / "model") as directory,
        ):
            saved.save_pretrained(directory)
    path = tmp_path / "file"
    path.write_text("mine")
    with pytest.raises(UserError, match=r"file cannot be written: .*; move away"):
        save_model(roberta, path)
    assert path.read_text() == "mine"


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    with pytest.raises(UserError), full_disk(10), replacing(path) as unfinished:
        unfinished.write_text("x" * 100)
    assert path.read_text() == "old"
    # Neither does another error leave anything.
    with pytest.raises(KeyError), replacing(path) as unfinished:
        unfinished.write_text("half")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(path.name, "old")]


def test_half_a_fleet_is_not_left(tmp_path, capsys):
    out = tmp_path / "fleet.toml"
    with full_disk(100):
        assert main(["fleet", "generate", "9", "--out", str(out)]) == 1
    assert (
        f"{out} cannot be written: File too large; make room" in capsys.readouterr().err
    )
    assert not out.exists()
    out.write_text("mine")
    assert main(["fleet", "generate", "9", "--out", str(out)]) == 1
    assert out.read_text() == "mine"


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(KeyError), writing(tmp_path):
        raise KeyError("a")


@pytest.mark.parametrize("interface", rest_slow(["message", "legacy"]))
def test_a_run_whose_disk_fills_is_gone_on_with(tmp_path, interface):
    whole = run(tmp_path / "whole", num_rounds=3)
    path = tmp_path / "run"
    limit = [full_disk(20_000)]

    def on_plan(server_round):
        if server_round == 2:
            # That of the round before is written meanwhile.
            while not (path / "checkpoints" / "round-000001.safetensors").exists():
                time.sleep(0.01)
            limit[0].__enter__()

    with pytest.raises(
        UserError, match=r"round-000002\.safetensors cannot be written: File too large"
    ):
        try:
            run(path, num_rounds=3, interface=interface, on_plan=on_plan)
        finally:
            limit[0].__exit__(None, None, None)
    names = sorted(file.name for file in (path / "checkpoints").iterdir())
    assert names == ["round-000000.safetensors", "round-000001.safetensors"]
    again = run(path, num_rounds=3, interface=interface)
    assert_same_end(again, whole)
    assert records(path) == records(tmp_path / "whole")


class Idle:
    """Nothing to train."""

    server_round = 0

    def snapshot(self):
        return SNAPSHOT

    def restore(self, snapshot):
        pass


def test_an_output_directory_that_is_a_file(tmp_path):
    path = tmp_path / "out"
    path.write_text("")
    with pytest.raises(UserError, match=rf"^{path} cannot be written: File exists"):
        RunDirectory(path, Idle(), configuration={})


@pytest.mark.parametrize("name", ["lock", "rounds.jsonl"])
def test_a_directory_in_the_place_of_a_file(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=rf"{name} cannot be written: Is a directory"):
        RunDirectory(tmp_path, Idle(), configuration={})


def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog):
    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(run_directory.fcntl, "flock", flock)
    with (
        caplog.at_level("WARNING", logger="flwr"),
        RunDirectory(tmp_path, Idle(), configuration={}) as files,
    ):
        files.on_round(RECORD)
    (line,) = caplog.messages
    assert f"…/{tmp_path.name} has no locks (No locks available)" in line


def test_a_lock_that_is_held_is_still_refused(tmp_path):
    with (
        RunDirectory(tmp_path, Idle(), configuration={}),
        pytest.raises(UserError, match="Another process runs in"),
    ):
        RunDirectory(tmp_path, Idle(), configuration={})
