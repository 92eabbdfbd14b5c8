"""One model a method: what it knows, what it refuses, and what all of them say."""

from __future__ import annotations

import json
import re

import pytest

from lola_flwr.app.batches import GIVEN_BATCH, GIVEN_CODEC
from lola_flwr.app.interface import interface_of
from lola_flwr.errors import UserError
from lola_flwr.system.channel import Channel
from lola_flwr.system.mobility import Mobility
from lola_glue.config import (
    D2ftConfig,
    FedAvgFullConfig,
    GlueConfig,
    LolaDeftConfig,
)
from simulations.figures.learning import app_config
from tests.reliability.app_run import run_app

MODELS = {
    "lola-deft": LolaDeftConfig,
    "fedavg-full": FedAvgFullConfig,
    "d2ft": D2ftConfig,
}
DEFAULTS = app_config()
# As they are where rounds do not choose.
GIVEN = {**DEFAULTS, "batch-size": GIVEN_BATCH, "codec": GIVEN_CODEC}
FOREIGN = [
    (method, key) for method, model in MODELS.items() for key in model.keys_of_others()
]


def config(**changes):
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return GlueConfig.from_run_config({**DEFAULTS, **changes})


def refusal(**changes):
    with pytest.raises(UserError) as raised:
        config(**changes)
    message = str(raised.value)
    assert "\n" not in message
    return message


def another(value):
    """Return another value of the same type."""
    if isinstance(value, bool):
        return not value
    return value + "x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("method", MODELS)
def test_a_configuration_has_the_keys_of_its_method_alone(method):
    found = config(method=method)
    assert type(found) is MODELS[method]
    known = found.to_run_config().keys()
    others = found.keys_of_others()
    assert known | others.keys() == DEFAULTS.keys()
    assert not known & others.keys()
    assert not any(hasattr(found, key.replace("-", "_")) for key in others)


def test_which_keys_are_whose():
    assert LolaDeftConfig.keys_of_others().keys() == {"d2ft-options"}
    of_blocks = FedAvgFullConfig.keys_of_others().keys() - {"d2ft-options"}
    assert {"selector", "participation", "rotation-eps"} < of_blocks
    of_updates = D2ftConfig.keys_of_others().keys() - of_blocks
    assert {"allocator", "codec", "micro-batch-size"} < of_updates


@pytest.mark.parametrize("model", MODELS.values())
def test_the_defaults_of_models_are_those_of_the_app(model):
    for name, field in model.model_fields.items():
        if not field.is_required():
            there = GIVEN[field.alias]
            assert (type(field.default), field.default) == (type(there), there), name


@pytest.mark.parametrize(("method", "key"), FOREIGN)
def test_keys_of_other_methods_keep_their_defaults(method, key):
    value = another(DEFAULTS[key])
    message = refusal(method=method, **{key: value})
    assert f'{key}={json.dumps(value)} means nothing with method="{method}"' in message
    advised = re.search(r"set it to (.*)\.$", message)[1]
    assert json.loads(advised) == GIVEN[key]


def test_what_is_refused_is_said_as_it_was():
    assert refusal(method="fedavg-full", rotation_eps=0.2) == (
        'Run configuration: rotation-eps=0.2 means nothing with method="fedavg-full", '
        "where every device trains the one block; set it to 0."
    )


def test_all_faults_are_said_at_once():
    message = refusal(method="fedavg-full", rounds=0, backups=1, codec="zip", tsk="x")
    for part in ("rounds=0", "backups=1 means nothing", "codec", "Did you mean 'task'"):
        assert part in message
    message = refusal(method="d2ft", backups=1, snr_min_db=30.0)
    for part in ("backups=1 means nothing", "snr-min-db=30"):
        assert part in message
    message = refusal(method="d2ft", backups=1, interface="legacy", rounds=0)
    for part in ("backups=1 means nothing", "needs interface=", "rounds=0"):
        assert part in message
    message = refusal(
        method="fedavg", rotation_eps=-1.0, codec="zip", interface="legacy"
    )
    for part in ("method='fedavg'", "'fedavg-full'", "rotation-eps", "codec"):
        assert part in message
    assert "means nothing" not in message
    assert "interface" not in message


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (
            {"channel": "links.csv", "uplink_mbps": "8"},
            "channel='links.csv' and uplink-mbps='8' both say what links carry",
        ),
        (
            {"channel": "links.csv", "fading": "none"},
            "fading='none' is for links whose rate follows from their SNR, and chan",
        ),
        (
            {"uplink_mbps": "8", "uplink": "power-limited"},
            "uplink='power-limited' is for links whose rate follows from their SNR",
        ),
        (
            {"uplink_mbps": "8", "mobility": "cell_m=800"},
            "and uplink-mbps='8' says what they carry; drop one of the two",
        ),
        (
            {"uplink": "power-limited", "allocator": "jbba"},
            "allocator='jbba' takes devices to send with uniform power per sub-carrier",
        ),
        *[
            (
                {"uplink": "tdma", key: value},
                f"{key.replace('_', '-')}={value!r} is for devices that share the band",
            )
            for key, value in [
                ("allocator", "crunch"),
                ("codec", "auto"),
                ("downlink_channel", "broadcast"),
                ("latency_target_s", 3.0),
                ("rotation_eps", 0.1),
                ("sharing_eps", 0.1),
            ]
        ],
        (
            {"uplink": "tdma", "uplink_mbps": "8"},
            "uplink='tdma' is for links whose rate follows from their SNR",
        ),
        ({"mobility": "cell_m=1"}, "cell_m=1 of the mobility must be a number from 40"),
        ({"mobility": "fast"}, "mobility='fast': Write options as"),
        ({"coherence_s": 0.0}, "coherence-s=0.0"),
        ({"uplink": "cdma"}, "uplink='cdma'"),
    ],
)
def test_channels_that_do_not_go_together_are_refused(keys, said):
    assert said in refusal(**keys)


def test_a_channel_is_what_its_keys_say():
    keys = {"fading": "gauss-markov", "coherence_s": 3.0, "mobility": "cell_m=800"}
    found = config(uplink="power-limited", **keys).shared_channel(2e6)
    assert found == Channel(
        bandwidth_hz=2e6,
        uplink="power-limited",
        fading="gauss-markov",
        coherence_s=3.0,
        mobility=Mobility(cell_m=800),
    )
    assert config().shared_channel(20e6) == Channel()
    # On links whose rate they are told devices may take turns.
    config(uplink="tdma", channel="links.csv", allocator="my.module:function")


def test_a_method_has_to_be_named():
    with pytest.raises(UserError, match="method is missing"):
        GlueConfig.from_run_config(
            {key: value for key, value in DEFAULTS.items() if key != "method"}
        )


@pytest.mark.parametrize(
    ("method", "default"),
    [("lola-deft", "legacy"), ("fedavg-full", "legacy"), ("d2ft", "message")],
)
def test_the_interface_is_what_the_method_needs(method, default):
    assert DEFAULTS["interface"] == ""
    assert config(method=method).interface == default
    # Device and server have to go by the same.
    assert interface_of({**DEFAULTS, "method": method}) == default
    assert config(method=method, interface="message").interface == "message"


def test_d2ft_refuses_the_legacy_interface():
    message = refusal(method="d2ft", interface="legacy")
    assert 'interface=\'legacy\': method="d2ft" needs interface="message"' in message
    assert config(method="fedavg-full", interface="legacy").interface == "legacy"


@pytest.mark.slow
def test_d2ft_runs_by_the_interface_that_nobody_named(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    tiny = {"model": "random:roberta-tiny", "batch_size": 2, "max_length": 16}
    (record,) = run_app(
        tmp_path / "out",
        **{"method": "d2ft", "interface": "", "num_devices": 2, "rounds": 1, **tiny},
    )
    assert record["server_round"] == 1
    assert not record["skipped"]
    described = json.loads((tmp_path / "out" / "run.json").read_text())["config"]
    assert described["interface"] == "message"
    assert not {"codec", "allocator"} & described.keys()


@pytest.mark.parametrize("method", MODELS)
def test_a_run_is_resumed_with_the_keys_of_all_methods(method):
    """As checkpoints hold them that were made when one model knew all keys."""
    given = {"method": method, "batch_size": GIVEN_BATCH, "codec": GIVEN_CODEC}
    here = {"output_dir": "x", "keep_checkpoints": 9, "interface": "message"}
    depends = config(**given).results_depend_on()
    assert config(**given, **here).results_depend_on() == depends
    assert config(**given, rounds=7).results_depend_on() == depends
    linear = config(**given, rounds=7, schedule="linear").results_depend_on()
    assert linear["rounds"] == 7
    assert {**GIVEN, "method": method, **depends} == {**GIVEN, "method": method}
    assert {"codec", "d2ft-options", "rotation-eps"} < depends.keys()


def test_batches_may_be_chosen_by_rounds():
    assert config(batch_size=16).batch_sizes == ()
    assert config(batch_size=16).largest_batch == 16
    found = config(batch_size="auto")
    assert found.largest_batch == max(found.batch_sizes)
    assert "batch-size='many'" in refusal(batch_size="many")
    assert "batch-size" in refusal(batch_size="auto", method="d2ft")
