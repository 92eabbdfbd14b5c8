"""What of Flower's inside the node uses is what it says, and what is installed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import flwr.supercore.address
import flwr.supercore.inflatable.inflatable_utils
import flwr.supernode.fleet_http_connection
import pytest

import lola_flwr.deployment.node
from lola_flwr.deployment.node import command
from lola_flwr.deployment.node.inner import INNER, what_differs

# What Flower's documentation shows.
DOCUMENTED = {"flwr.app", "flwr.clientapp"}
# Names that are there for type checkers alone.
TYPES = {"SuperNodeLifespanConfig"}


def imported():
    """Return what the node's modules import from Flower's inside: (module, name)."""
    (package,) = lola_flwr.deployment.node.__path__
    for path in Path(package).glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("flwr"):
                yield from ((node.module, alias.name) for alias in node.names)
            elif isinstance(node, ast.Import):
                assert not any(a.name.startswith("flwr") for a in node.names)


def test_everything_is_listed_and_nothing_else():
    used = {(m, n) for m, n in imported() if m not in DOCUMENTED and n not in TYPES}
    assert used == {(module, name) for module, names in INNER.items() for name in names}


def test_the_installed_flower_has_it():
    assert what_differs() is None


def test_a_name_that_is_gone(monkeypatch):
    monkeypatch.delattr(flwr.supercore.address, "parse_address")
    assert what_differs() == "flwr.supercore.address has no parse_address"


def test_other_parameters(monkeypatch):
    module = flwr.supercore.inflatable.inflatable_utils
    monkeypatch.setattr(module, "push_objects", lambda objects, push_object_fn: None)
    assert what_differs().startswith(f"{module.__name__}.push_objects does not take")
    # One more that it must be given, but not one more that it may be given.
    monkeypatch.setattr(
        module, "push_objects", lambda objects, push_object_fn, object_ids_to_push, a: a
    )
    assert what_differs() is not None
    monkeypatch.setattr(
        module,
        "push_objects",
        lambda objects, push_object_fn, object_ids_to_push, a=1: a,
    )
    assert what_differs() is None


def test_another_connection(monkeypatch):
    module = flwr.supernode.fleet_http_connection
    connect = module.http_request_response

    def other(*, server_address, insecure, root_certificates, authentication_keys,
              max_retries, max_wait_time):  # fmt: skip
        return connect

    monkeypatch.setattr(module, "http_request_response", other)
    assert (
        what_differs()
        == f"{module.__name__}.http_request_response yields other functions"
    )


def test_flowers_own_program_runs_where_something_differs(monkeypatch, capsys):
    monkeypatch.delattr(flwr.supercore.address, "parse_address")
    started = []

    class Replaced(BaseException):
        pass

    def replace(program, words):
        started.append((program, words))
        raise Replaced

    monkeypatch.setattr(command.os, "execvp", replace)
    with pytest.raises(Replaced):
        command.run(["--insecure", "--superlink", "a:1"])
    assert started == [
        ("flower-supernode", ["flower-supernode", "--insecure", "--superlink", "a:1"])
    ]
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        "has no parse_address" in line and "flower-supernode runs in its place" in line
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--isolation", "process"], "own process; start flower-supernode"),
        (["--allow-runtime-dependency-installation"], "in its own environment"),
        (["--superlink", "nowhere"], "--superlink nowhere: write host:port"),
    ],
)
def test_what_only_flowers_own_does_is_refused(monkeypatch, words, said):
    from lola_flwr.errors import UserError

    monkeypatch.setattr(sys, "argv", [])
    with pytest.raises(UserError, match=said):
        command.run(["--insecure", *words])
