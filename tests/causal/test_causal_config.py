"""The keys of the causal app."""

from __future__ import annotations

import pytest

from lola_causal.config import (
    CausalConfig,
    D2ftConfig,
    FedAvgFullConfig,
    LolaDeftConfig,
)
from lola_flwr.app.batches import GIVEN_CODEC
from lola_flwr.errors import UserError
from tests.reliability.app_run import app_config

DEFAULTS = app_config("causal")


@pytest.mark.parametrize("model", [LolaDeftConfig, FedAvgFullConfig, D2ftConfig])
def test_every_key_has_its_default_in_the_app(model):
    config = CausalConfig.from_run_config({**DEFAULTS, "method": model.own_method()})
    assert type(config) is model
    assert config.to_run_config().keys() | model.keys_of_others() == DEFAULTS.keys()
    for field in model.model_fields.values():
        if not field.is_required():
            given = {**DEFAULTS, "codec": GIVEN_CODEC}
            assert field.default == given[field.alias]


def test_what_does_not_go_together():
    with pytest.raises(UserError, match="trains the base itself") as raised:
        CausalConfig.from_run_config({**DEFAULTS, "base": "nf4"})
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="'lola-deft', 'fedavg-full' or 'd2ft'"):
        CausalConfig.from_run_config({**DEFAULTS, "method": "fedprox"})
    with pytest.raises(UserError, match='packing=true does not go with method="d2ft"'):
        CausalConfig.from_run_config({**DEFAULTS, "method": "d2ft", "packing": True})
    lora = {**DEFAULTS, "base": "nf4", "tuning": "lora"}
    assert CausalConfig.from_run_config(lora).base == "nf4"
