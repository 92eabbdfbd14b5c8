"""Subnetworks that run, run forward only or are skipped."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.d2ft.execution import scheduled
from lola_flwr.d2ft.maps import adapters_of, base_of
from lola_flwr.d2ft.scores import score_subnetworks
from lola_flwr.d2ft.subnetworks import parameter_slices
from lola_flwr.d2ft.training import scheduled_gradient, split_batch
from lola_flwr.errors import UserError
from tests.d2ft.cases import FORWARD, FULL, SKIP, exact_gradient
from tests.model.test_backprop import saved_bytes


def test_micro_batches_average_to_the_batch(case):
    expected = exact_gradient(case)
    result = case.run(case.table(FULL), num_parts=4)  # of 2, 2, 1 and 1 examples
    assert result.num_examples == expected.num_examples
    assert result.loss == pytest.approx(expected.loss)
    for name, gradient in expected.gradients.items():
        torch.testing.assert_close(
            result.gradients[name], gradient, rtol=1e-3, atol=1e-6
        )


def test_a_skipped_subnetwork_does_as_its_zeroed_weights_would(case):
    operations = case.table(FULL)
    operations[1][2] = SKIP
    skipped = case.run(operations)
    state = {n: p.detach().clone() for n, p in case.model.named_parameters()}
    gone = 1 * 4 + 2
    parts = case.subnetworks.slices[gone]
    layer = case.subnetworks.layers[1]
    names = {id(p): n for n, p in case.model.named_parameters()}
    out = {names[id(base_of(m).weight)] for m in (layer.project, layer.down)}
    for linear in (layer.project, layer.down):
        out |= {names[id(a.weight)] for a, *_ in adapters_of(linear)}
    back = [s for s in parts if s.name in out]  # what leads out of it
    assert back
    with torch.no_grad():
        named = dict(case.model.named_parameters())
        for part in back:
            part.of(named[part.name]).zero_()
    zeroed = case.run(case.table(FULL))
    with torch.no_grad():
        for name, parameter in case.model.named_parameters():
            parameter.copy_(state[name])
    assert skipped.loss == pytest.approx(zeroed.loss, rel=1e-5)
    # And it has no gradient of its own, while its neighbours have theirs.
    own = parameter_slices(case.subnetworks, skipped.gradients)
    assert all(not part.any() for part in own[gone])
    assert any(part.any() for part in own[gone + 1])


def test_forward_only_keeps_the_loss_and_has_no_gradient(case):
    operations = case.table(FULL)
    operations[2][0] = operations[2][1] = FORWARD
    result = case.run(operations)
    assert result.loss == pytest.approx(exact_gradient(case).loss, rel=1e-5)
    own = parameter_slices(case.subnetworks, result.gradients)
    for forward_only, full in ((8, 10), (9, 11)):
        assert all(not part.any() for part in own[forward_only])
        assert any(part.any() for part in own[full])


def flops(case, operations):
    """Count all but fused attention, which PyTorch counts on CPUs since 2.15."""
    with FlopCounterMode(display=False) as counter:
        case.run(operations)
    counts = counter.get_flop_counts()["Global"]
    return sum(n for packet, n in counts.items() if "attention" not in str(packet))


def test_what_is_skipped_is_not_computed(case):
    full, forward, skip = (
        flops(case, case.table(operation)) for operation in (FULL, FORWARD, SKIP)
    )
    # What is left when all layers are skipped is the head, and a ViT's patches.
    passes = (full - skip) / (forward - skip)
    # Weights and activations back: 3 forward passes, less the gradient that nobody
    # wants below the first layer. Of adapters: 2, and their own products.
    adapters = hasattr(case.model, "peft_config")
    low, high = (1.6, 2.7) if adapters else (2.6, 3.0)
    assert low < passes <= high
    halves = flops(case, [[FULL, FULL, SKIP, SKIP]] * 3)
    # One factor of an adapter is common to all groups of a layer.
    assert halves - skip == pytest.approx((full - skip) / 2, rel=0.08)


def kept(case, operations):
    return saved_bytes(case.model, lambda: case.run(operations))


def test_forward_only_stores_no_activations(case):
    full, forward = (kept(case, case.table(op)) for op in (FULL, FORWARD))
    nothing = kept(case, case.table(SKIP))
    # What the head keeps: the layers' own share is nothing.
    assert forward <= nothing
    upper = kept(case, [[FORWARD] * 4, [FORWARD] * 4, [FULL] * 4])
    assert nothing < upper < 0.55 * full
    half = kept(case, [[FULL, FULL, FORWARD, FORWARD]] * 3)
    assert half < 0.85 * full


def test_flags_and_forwards_are_restored(case):
    flags = [p.requires_grad for p in case.model.parameters()]
    with pytest.raises(UserError, match=r"operations has 2 layers"):
        scheduled(case.subnetworks, case.table(FULL)[:2])
    case.run(case.table(SKIP))
    with pytest.raises(RuntimeError):
        scheduled_gradient(
            case.model,
            case.subnetworks,
            case.trainable,
            [case.batch],
            np.zeros((12, 1), np.int64),
            loss_function=lambda *_: (_ for _ in ()).throw(RuntimeError("boom")),
        )
    assert [p.requires_grad for p in case.model.parameters()] == flags
    for parts in case.subnetworks.layers:
        assert "forward" not in vars(parts.layer)


def test_scores_are_sums_over_slices(case):
    parts = split_batch(case.batch, 2)
    scores = score_subnetworks(case.model, case.subnetworks, case.trainable, parts)
    assert scores.fisher.shape == scores.gradient.shape == (12, 2)
    trained = set(case.trainable)
    parameters = dict(case.model.named_parameters())
    gradients = scheduled_gradient(
        case.model,
        case.subnetworks,
        case.trainable,
        parts[:1],
        np.full((12, 1), FULL),
    ).gradients
    for number, slices in enumerate(case.subnetworks.slices):
        own = [s for s in slices if s.name in trained]
        fisher = sum(float(s.of(gradients[s.name]).square().sum()) for s in own)
        size = sum(s.of(parameters[s.name]).abs().sum().item() for s in own)
        assert scores.fisher[number, 0] == pytest.approx(fisher, rel=1e-3)
        assert scores.magnitude[number] == pytest.approx(size, rel=1e-5)
