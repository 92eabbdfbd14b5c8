"""The apps' batches and codec where nobody names them: chosen, and where not, why."""

from __future__ import annotations

import json

import pytest

from lola_causal.config import CausalConfig
from lola_flwr.app.batches import GIVEN_BATCH, GIVEN_CODEC, batches_told
from lola_flwr.errors import UserError
from lola_flwr.planning import BATCH_SIZES
from lola_glue.config import GlueConfig
from tests.reliability.app_run import app_config, run_app

APPS = {"glue": GlueConfig, "causal": CausalConfig}
# With which rounds cannot choose batches.
AGAINST = [
    {"method": "d2ft"},
    {"uplink": "tdma", "rotation-eps": 0.0},
    {"allocator": "energy", "rotation-eps": 0.0},
    {"allocator": "energy-worst", "method": "fedavg-full"},
    {"zeroth-order": "always"},
    {"zeroth-order": "fallback"},
]


def config(app="glue", **keys):
    return APPS[app].from_run_config({**app_config(app), **keys})


def refusal(app="glue", **keys):
    with pytest.raises(UserError) as raised:
        config(app, **keys)
    message = str(raised.value)
    assert "\n" not in message
    return message


def found(app="glue", **keys):
    made = config(app, **keys)
    return made.batch_size, getattr(made, "codec", None)


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("method", ["lola-deft", "fedavg-full"])
def test_rounds_choose_what_nobody_names(app, method):
    defaults = app_config(app)
    assert (defaults["batch-size"], defaults["codec"]) == ("", "")
    run = {"app": app, "method": method}
    # On a command line numbers are text where a key's default is.
    for keys, expected in [
        ({}, ("auto", "auto")),
        ({"batch-size": "auto"}, ("auto", "auto")),
        ({"batch-size": "16"}, (16, "fp32")),
        ({"batch-size": 16, "codec": "auto"}, (16, "auto")),
        ({"codec": "bf16"}, ("auto", "bf16")),
    ]:
        assert found(**run, **keys) == expected


@pytest.mark.parametrize(
    ("app", "keys"),
    [
        *((app, keys) for app in APPS for keys in AGAINST),
        ("causal", {"packing": True}),
    ],
)
def test_where_rounds_cannot_choose_there_is_one_batch(app, keys):
    made = config(app, **keys)
    assert made.batch_size == GIVEN_BATCH
    assert getattr(made, "codec", GIVEN_CODEC) == GIVEN_CODEC
    told = batches_told(made.to_run_config())
    assert told.startswith("batch-size=32")
    said = refusal(app, **keys, **{"batch-size": "auto"})
    assert "batch-size=" in said
    assert "codec" not in said  # which nobody named
    if made.method != "d2ft":  # a number is all that its key takes
        assert said.removesuffix("; give a batch-size.").endswith(
            told.partition("cannot choose with ")[2]
        )
    assert next(iter(keys)) in told


def test_what_is_told_of_batches():
    assert batches_told(config().to_run_config()) == "batch-size=auto codec=auto"
    given = config(**{"batch-size": 8}).to_run_config()
    assert batches_told(given) == "batch-size=8 codec=fp32"
    assert batches_told(config(method="d2ft").to_run_config()) == (
        'batch-size=32: rounds cannot choose with method="d2ft", whose micro-batches '
        "are all of one size"
    )


def some_values(default, rule):
    """Return values of a key: all of its words, its examples, and another number."""
    yield from rule.get("enum", ())
    yield from rule.get("examples", ())
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, int | float):
        yield from {default + 1, rule.get("minimum", default)}


@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("method", ["lola-deft", "fedavg-full", "d2ft"])
def test_nothing_is_refused_for_what_nobody_named(app, method):
    """What goes with a batch size and a codec goes without, too."""
    defaults, rules = app_config(app), APPS[app].rules()
    given = {"method": method, "batch-size": 8, "codec": "fp32"}
    tried = 0
    for key in defaults.keys() - {"batch-size", "codec", "method"}:
        for value in some_values(defaults[key], rules[key]):
            try:
                config(app, **given, **{key: value})
            except UserError:
                continue
            config(app, method=method, **{key: value})
            tried += 1
    assert tried > 30


TINY = {
    "glue": {"model": "random:roberta-tiny", "max_length": 16},
    "causal": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("app", APPS)
@pytest.mark.parametrize("method", ["lola-deft", "fedavg-full", "d2ft"])
def test_every_method_runs_with_the_batches_that_nobody_named(
    app, method, tmp_path, monkeypatch
):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    records = run_app(
        tmp_path / "out",
        app=app,
        **{"method": method, "num_devices": 3, "rounds": 2, **TINY[app]},
    )
    assert not any(record["skipped"] for record in records)
    described = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    if method == "d2ft":
        assert described["batch-size"] == GIVEN_BATCH
        return
    assert (described["batch-size"], described["codec"]) == ("auto", "auto")
    blocks = [block for record in records for block in record["blocks"]]
    assert {block["status"] for block in blocks} == {"accepted"}
    sizes = {block["batch_size"] for block in blocks}
    assert sizes != {GIVEN_BATCH}
    assert all(1 <= size <= max(BATCH_SIZES) for size in sizes)
    codecs = {block["codec"] for block in blocks}
    assert codecs <= {"int2", "int4", "int8", "bf16", "fp32"}
