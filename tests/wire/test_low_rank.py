from __future__ import annotations

import math

import numpy as np
import pytest

from lola_flwr.build import (
    Channel,
    RoundSettings,
    ServerStep,
    Transfer,
    coordinator_for,
)
from lola_flwr.costs.of_model import model_costs
from lola_flwr.device.block_device import BlockDevice
from lola_flwr.device.encoding import encode_update
from lola_flwr.device.store import Residuals
from lola_flwr.errors import UserError
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.optimizer import ServerOptimizer
from lola_flwr.run.checkpoint import Snapshot
from lola_flwr.server.low_rank_optimizer import LowRankOptimizer
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.low_rank import LowRankProjection
from lola_flwr.wire.packing import GRADIENTS
from lola_flwr.wire.records import Assignment
from tests.marks import rest_slow
from tests.server.coordinators import npy

P = LowRankProjection(rank=4, period=5, seed=3)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_projection_and_back_is_an_orthogonal_projection(rng, shape):
    gradient = rng.normal(size=shape).astype(np.float32)
    low = P.project(2, "w", gradient)
    assert low.shape == P.shape(shape) == (4, 30)
    back = P.lift(2, "w", low, shape)
    assert back.shape == shape
    # What was projected comes back as it is; what is lost is orthogonal to it.
    np.testing.assert_allclose(P.project(2, "w", back), low, atol=1e-5)
    assert abs(float(((gradient - back) * back).sum())) < 1e-3


def test_a_projection_holds_for_its_period_and_is_renewed(rng):
    gradient = rng.normal(size=(12, 30)).astype(np.float32)
    first = P.project(1, "w", gradient)
    np.testing.assert_array_equal(first, P.project(5, "w", gradient))
    assert not np.allclose(first, P.project(6, "w", gradient))
    assert not np.allclose(first, P.project(1, "v", gradient))


def test_over_many_periods_nothing_is_lost(rng):
    gradient = rng.normal(size=(12, 30)).astype(np.float32)
    every = LowRankProjection(rank=4, period=1)
    mean = np.mean(
        [
            every.lift(r, "w", every.project(r, "w", gradient), (12, 30))
            for r in range(1, 1501)
        ],
        axis=0,
    )
    # The expectation of P P^T is rank / side times the identity.
    np.testing.assert_allclose(mean, gradient * 4 / 12, atol=0.12)


@pytest.mark.parametrize("shape", [(7,), (3, 50), (50, 4), (2, 3, 4), ()])
def test_what_is_small_or_no_matrix_stays_as_it_is(rng, shape):
    values = rng.normal(size=shape).astype(np.float32)
    assert P.project(1, "w", values) is values
    assert P.lift(1, "w", values, shape) is values


def test_the_optimizer_steps_in_the_projected_space(rng):
    start = {"w": rng.normal(size=(12, 30)).astype("f4"), "b": np.ones(3, "f4")}
    gradient = {"w": rng.normal(size=(12, 30)).astype("f4"), "b": np.ones(3, "f4")}
    low = LowRankOptimizer(start, P, optimizer="SGD", lr=0.1)
    plain = ServerOptimizer(start, optimizer="SGD", lr=0.1)
    low.step(gradient, 7)
    seen = P.lift(7, "w", P.project(7, "w", gradient["w"]), (12, 30))
    plain.step({"w": seen, "b": gradient["b"]})
    for name in start:
        np.testing.assert_allclose(low.state()[name], plain.state()[name], atol=1e-6)


def test_moments_are_as_small_as_the_projection(rng):
    start = {"w": rng.normal(size=(12, 30)).astype("f4")}
    low = LowRankOptimizer(start, P, optimizer="AdamW", lr=0.1)
    low.step({"w": np.ones((12, 30), "f4")}, 1)
    (state,) = low._inner._optimizer.state.values()
    assert state["exp_avg"].shape == state["exp_avg_sq"].shape == (4, 30)


def test_values_are_loaded_and_shifted():
    low = LowRankOptimizer({"w": np.zeros((9, 9), "f4")}, P)
    low.load({"w": np.full((9, 9), 2.0)})
    low.shift({"w": np.ones((9, 9), "f4")})
    assert (low.state()["w"] == 3).all()


@pytest.mark.parametrize("field", ["rank", "period"])
def test_nonsense_is_refused(field):
    with pytest.raises(UserError, match=rf"{field}=0 must be at least 1"):
        LowRankProjection(**{"rank": 2, field: 0})


@pytest.mark.parametrize("codec", rest_slow(["fp32", "bf16"]))
def test_devices_upload_less_and_the_model_learns(roberta, batch, codec):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    projection = LowRankProjection(rank=4, period=3)
    coordinator = coordinator_for(
        roberta,
        partition,
        costs=model_costs(roberta, partition, batch_size=6, sequence_length=10),
        batch_size=6,
        step=ServerStep(lr=1e-2),
        settings=RoundSettings(
            channel=Channel(bandwidth_hz=1e6),
            transfer=Transfer(low_rank=projection, codec=codec),
        ),
    )
    devices = {
        f"id-{index}": BlockDevice(
            profile=simulated_device(index, seed=1),
            load_model=lambda: (roberta, partition),
            batch_source=lambda *_: batch,
        )
        for index in range(3)
    }
    for name, device in devices.items():
        coordinator.add_device(name, device.profile.to_properties())
    losses = []
    for server_round in range(1, 13):
        plan = coordinator.plan_round(server_round, devices)
        replies = []
        for name, assignment in plan.assignments.items():
            update = devices[name].train(assignment, coordinator.values())
            assert update.arrays[GRADIENTS].size == sum(
                math.prod(projection.shape(roberta.get_parameter(name).shape))
                for name in partition.update_names(assignment.block_index)
            )
            replies.append(
                DeviceReply(
                    name,
                    {n: npy(array) for n, array in update.arrays.items()},
                    update.num_examples,
                    update.report.to_record(),
                )
            )
        record = coordinator.complete_round(plan, replies)
        assert record.refused == {}
        losses.append(record.train_loss)
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 0.02


def test_what_a_codec_left_out_stays_within_its_basis(rng, tmp_path):
    partition = partition_parameters(["layers.0.w", "layers.1.w", "head.w"])
    gradients = {n: rng.normal(size=(4, 30)).astype("f4") for n in partition.trainable}
    projection = LowRankProjection(rank=4, period=3)

    def encoded(server_round, residuals):
        assignment = Assignment(
            server_round=server_round,
            block_index=0,
            share=1.0,
            batch_size=1,
            codec="topk:0.1",
            base_fingerprint="",
            **projection.assignment_fields(),
        )
        return encode_update(gradients, partition, assignment, residuals)

    kept = Residuals(tmp_path / "kept", "phone")
    for server_round in range(1, 7):
        fresh = Residuals(tmp_path / f"fresh-{server_round}", "phone")
        wire, alone = encoded(server_round, kept), encoded(server_round, fresh)
        assert np.array_equal(wire, alone) == (server_round in (1, 4)), (
            "the first rounds of a basis"
        )


def test_a_snapshot_holds_values_and_moments(rng):
    start = {"w": rng.normal(size=(12, 30)).astype("f4"), "b": np.ones(3, "f4")}
    gradients = [
        {name: rng.normal(size=v.shape).astype("f4") for name, v in start.items()}
        for _ in range(4)
    ]
    unbroken, other = (LowRankOptimizer(start, P, lr=0.1) for _ in range(2))
    for server_round, gradient in enumerate(gradients[:2], start=1):
        unbroken.step(gradient, server_round)
    held = unbroken.snapshot()
    other.restore(Snapshot({n: a.copy() for n, a in held.arrays.items()}, held.values))
    for server_round, gradient in enumerate(gradients[2:], start=3):
        unbroken.step(gradient, server_round)
        other.step(gradient, server_round)
    for name, values in unbroken.state().items():
        np.testing.assert_array_equal(values, other.state()[name])
    with pytest.raises(UserError, match=r"without low-rank projection"):
        other.restore(ServerOptimizer(start, lr=0.1).snapshot())
