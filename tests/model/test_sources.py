"""Where models come from: what is missing is said before anything is loaded."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from lola_flwr.model import sources
from lola_flwr.model.sources import ModelNotFound, check_source


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of which nothing is kept here, and that does not answer."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:gpt", "random:roberta-base, random:roberta-wide"),
        ("nowhere/my/model", "there is no such directory"),
        ("./nowhere", "there is no such directory"),
        ("~/nowhere-at-all", "there is no such directory"),
        ("empty", "the directory has no config.json"),
        ("unfinished", "no weights"),
        ("pickled", "convert it to safetensors"),
        ("org/absent", "127.0.0.1 cannot be reached, ConnectionRefusedError"),
        ("no id", "Repo id must use alphanumeric chars"),
    ],
)
def test_models_that_there_are_not(hub, tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file in ("empty/x", "unfinished/config.json", "pickled/config.json"):
        (tmp_path / file).parent.mkdir()
        (tmp_path / file).touch()
    (tmp_path / "pickled/pytorch_model.bin").touch()
    with pytest.raises(ModelNotFound, match=message) as raised:
        check_source(name)
    assert "\n" not in str(raised.value)


def test_models_that_there_are(hub, tmp_path, monkeypatch):
    for name in sources.RANDOM_SHAPES:
        check_source(name)
    check_source("minilm-l6")
    (tmp_path / "config.json").touch()
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    check_source(str(tmp_path))
    # One of the hub's that was fetched before.
    kept = tmp_path / "models--org--kept"
    (kept / "snapshots" / "abc").mkdir(parents=True)
    (kept / "snapshots" / "abc" / "config.json").touch()
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("abc")
    monkeypatch.setattr(
        "huggingface_hub.file_download.constants.HF_HUB_CACHE", str(tmp_path)
    )
    check_source("org/kept")


def test_a_proxy_may_reach_what_this_machine_does_not(hub, monkeypatch):
    from lola_flwr.machine.hub import why_no_hub

    assert why_no_hub() is not None
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "")
    assert why_no_hub() is None


def test_nothing_heavy_is_imported_for_it():
    program = (
        "import sys; from lola_flwr.model.sources import check_source\n"
        "check_source('minilm-l6')\n"
        "sys.exit(', '.join({'torch', 'transformers'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
