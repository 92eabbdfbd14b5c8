"""Clipping, noise and secure aggregation around a project's own training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from lola_flwr.clients import AssignedBlock, block_mod, profile_mod
from lola_flwr.errors import UserError
from lola_flwr.wire.records import SECAGG_KEY
from tests.clients.own_project import (
    federate,
    federate_config,
    make_app,
    message_to,
    moved,
    plain_train,
    prepared_train,
)


def test_clipping_on_the_device(model):
    def clipped(clipping_norm):
        app = make_app(plain_train, [block_mod, fixedclipping_mod])
        records, _, replies = federate(
            model,
            app,
            wrap=lambda strategy: DifferentialPrivacyClientSideFixedClipping(
                strategy, 0.0, clipping_norm, num_sampled_clients=3
            ),
        )
        assert [record.refused for record in records] == [{}]
        before = model.state_dict()
        return max(
            np.sqrt(
                sum(
                    np.square(array.numpy() - before[name].numpy()).sum()
                    for name, array in reply.content["arrays"].items()
                    if "running" not in name and "batches" not in name
                )
            )
            for reply in replies
        )

    assert clipped(1e-3) <= 1e-3 * 1.01
    assert clipped(1e3) > 0.05


def test_noise_goes_to_what_is_trained_only(model):
    def wrap(strategy):
        return DifferentialPrivacyClientSideFixedClipping(
            strategy, 0.1, 1.0, num_sampled_clients=3
        )

    torch.manual_seed(3)
    app = make_app(prepared_train)
    records, noisy, replies = federate(model, app, rounds=2, wrap=wrap)
    assert [record.refused for record in records] == [{}, {}]
    assert not any(name.startswith("embed") for name in moved(model, noisy))
    assert {len(reply.content["arrays"]) for reply in replies} == {6 + 9}


@pytest.mark.parametrize(
    "wrapper",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyServerSideAdaptiveClipping,
    ],
)
def test_clipping_on_the_server_is_refused(model, wrapper):
    def wrap(strategy):
        options = {"noise_multiplier": 0.1, "num_sampled_clients": 3}
        if wrapper is DifferentialPrivacyServerSideFixedClipping:
            options["clipping_norm"] = 1.0
        return wrapper(strategy, **options)

    with pytest.raises(UserError, match="in the ClientSide class of that name"):
        federate(model, make_app(prepared_train), wrap=wrap)


def test_secure_aggregation_is_refused(model):
    config = ConfigRecord(federate_config(model, block_index=0))
    message = message_to(model, {"config": config, SECAGG_KEY: ConfigRecord()})
    with pytest.raises(UserError, match="a block comes from one device"):
        AssignedBlock(model, message)
    with pytest.raises(UserError, match="a block comes from one device"):
        block_mod(message, None, plain_train)
    # Of a legacy app's own client nothing shows which messages brought its config.
    with pytest.raises(UserError, match="a block comes from one device"):
        profile_mod(message, None, plain_train)
