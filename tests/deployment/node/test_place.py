"""A killed node's place is its successor's, and no living one's."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from lola_flwr.deployment.node.place import place_of
from lola_flwr.deployment.node.stopping import Stop


@pytest.fixture
def options(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    key = ec.generate_private_key(ec.SECP384R1())
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
    return SimpleNamespace(
        authentication_keys=(key, key.public_key()),
        server_address=address,
        insecure=True,
        root_certificates=None,
    )


def notes(tmp_path):
    return [path.read_text() for path in (tmp_path / "lola-flwr" / "nodes").iterdir()]


def test_without_a_key_there_is_none(options, tmp_path):
    options.authentication_keys = None
    with place_of(options) as place:
        assert place is None
    assert not (tmp_path / "lola-flwr").exists()


def test_it_is_noted_who_has_it_and_that_nobody_has(options, tmp_path):
    with place_of(options) as place:
        place.vacate(Stop())
        place.take(12345678901234567890)
        place.take(7)
        assert notes(tmp_path) == ["7"]
        place.leave()
        assert notes(tmp_path) == [""]


def test_only_one_living_process_has_it(options):
    with place_of(options) as first, place_of(options) as second:
        assert first is not None and second is None
    with place_of(options) as again:
        assert again is not None


def test_a_killed_ones_is_given_up_if_there_is_somebody_to_tell(
    options, tmp_path, caplog
):
    """Nothing is asked of a SuperLink otherwise, and none is waited for in the end."""
    (note,) = _killed_with(options, tmp_path)
    assert note.read_text() == "7"
    stop = Stop()
    stop.is_asked = True
    with place_of(options) as place:
        place.vacate(stop)
    assert "does not answer" in caplog.text


def _killed_with(options, tmp_path):
    with place_of(options) as place:
        place.take(7)
    # As if it had not left: what is noted stays.
    return [*(tmp_path / "lola-flwr" / "nodes").iterdir()]
