"""No gradient and a gradient of zero are two things."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from torch import nn
from torch.utils.checkpoint import checkpoint

from lola_flwr.clients import BlockDevice
from lola_flwr.costs.of_model import model_costs
from lola_flwr.d2ft.scores import score_subnetworks
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import BlockPartition, partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.recording import NoGradient, noted_calls
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.records import Assignment
from tests.conftest import SMALL
from tests.d2ft.cases import FULL, make
from tests.server.spread import test_remote
from tests.server.spread.test_remote import DRAWS, Devices, spread, spread_gradient

NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@pytest.fixture
def roberta():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(
        **SMALL, **NO_DROPOUT, max_position_embeddings=40
    )
    return transformers.RobertaForSequenceClassification(config).train()


def checkpointed(model, *, reentrant):
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"use_reentrant": reentrant}
    )
    return model


def blocks_of(model):
    return partition_parameters(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("block_index", [0, 1, 2])
def test_checkpointing_changes_no_gradient(roberta, batch, block_index):
    partition = blocks_of(roberta)
    expected = block_gradient(roberta, partition, block_index, batch).gradients
    checkpointed(roberta, reentrant=False)
    found = block_gradient(roberta, partition, block_index, batch).gradients
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("block_index", [0, 1, 2])
@pytest.mark.parametrize("inputs_want_gradients", [False, True])
def test_reentrant_checkpointing_is_refused(
    roberta, batch, block_index, inputs_want_gradients
):
    checkpointed(roberta, reentrant=True)
    if inputs_want_gradients:
        roberta.enable_input_require_grads()
    with pytest.raises(NoGradient, match="pass use_reentrant=False") as raised:
        block_gradient(roberta, blocks_of(roberta), block_index, batch)
    assert f"layer.{block_index}." in str(raised.value)
    assert "\n" not in str(raised.value)
    # Nothing is left on the model.
    assert not any(module._forward_pre_hooks for module in roberta.modules())
    assert all(p.requires_grad and p.grad is None for p in roberta.parameters())
    # Outside of training these models do not checkpoint.
    block_gradient(roberta.eval(), blocks_of(roberta), block_index, batch)


def test_a_device_sends_nothing_then(roberta, batch):
    device = BlockDevice(
        profile=simulated_device(0, seed=0),
        load_model=lambda: (checkpointed(roberta, reentrant=True), blocks_of(roberta)),
        batch_source=lambda *_: batch,
        simulated_compute_s=lambda _: 1.0,
    )
    assignment = Assignment(
        server_round=1,
        block_index=1,
        share=1.0,
        batch_size=6,
        codec="fp32",
        base_fingerprint=fingerprint(roberta, blocks_of(roberta).frozen),
    )
    values = {n: p.detach().numpy() for n, p in roberta.named_parameters()}
    with pytest.raises(UserError, match="re-entrant"):
        device.train(assignment, values)


class Net(nn.Module):
    """Blocks of two modules, of which how they run can be changed."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 4)
        self.layers = nn.ModuleList(
            nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
            for _ in range(3)
        )
        self.pooler = nn.Linear(4, 4)
        self.head = nn.Linear(4, 1)
        self.run = {}

    def forward(self, x):
        hidden = self.first(x)
        for index, layer in enumerate(self.layers):
            for name, part in layer.items():
                run = self.run.get((index, name), lambda part, x: part(x))
                hidden = run(part, torch.tanh(hidden))
        self.pooler(hidden)
        return self.head(hidden)


def reentrant(part, x):
    return checkpoint(part, x, use_reentrant=True)


def without_recording(part, x):
    with torch.no_grad():
        return part(x)


def loss_of(model, batch):
    return model(batch["x"]).square().mean()


def gradient(model, block_index, *, loss=loss_of, **options):
    return block_gradient(
        model,
        blocks_of(model),
        block_index,
        {"x": torch.ones(4, 4)},
        loss_function=loss,
        **options,
    ).gradients


@pytest.fixture
def net():
    return Net().train()


@pytest.mark.parametrize("run", [reentrant, without_recording])
def test_a_part_of_a_block_that_is_not_recorded(net, run):
    net.run[1, "a"] = run
    with pytest.raises(NoGradient, match=r"layers\.1\.a\.weight .* not one of zero"):
        gradient(net, 1)
    # Below, nothing is trained.
    gradient(net, 2)


def test_a_part_behind_the_block_that_is_not_recorded(net):
    net.run[2, "b"] = without_recording
    with pytest.raises(NoGradient, match=r"block 1 \(layers\.1\.a\.weight, \.\.\.\)"):
        gradient(net, 1)
    net.run[2, "b"] = reentrant
    with pytest.raises(NoGradient, match="all parameters or none"):
        gradient(net, 1)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model, batch: (model(batch["x"]).detach() * model.head.bias).sum(),
        lambda model, batch: model(batch["x"]).detach().sum(),
        lambda model, batch: model.head(batch["x"]).sum(),
    ],
)
def test_a_loss_that_does_not_depend_on_the_block(net, loss):
    with pytest.raises(NoGradient, match=r"No parameter of block 1 .* has a gradient"):
        gradient(net, 1, loss=loss)


def test_a_parameter_that_is_not_used_has_a_gradient_of_zero(net):
    found = gradient(net, 1)
    assert found["pooler.weight"].eq(0).all()
    assert found["layers.1.a.weight"].ne(0).any()
    # Nor does the block have to be used in full,
    net.run[1, "b"] = lambda part, x: x
    found = gradient(net, 1)
    assert found["layers.1.b.weight"].eq(0).all()
    assert found["layers.1.a.weight"].ne(0).any()
    # or in every micro-batch.
    calls = []

    def sometimes(part, x):
        calls.append(len(x))
        return part(x) if len(calls) > 2 else x

    net.run = {(1, "a"): sometimes, (1, "b"): sometimes}
    found = gradient(net, 1, micro_batch_size=2)
    assert found["layers.1.a.weight"].ne(0).any()


def test_a_module_that_is_called_in_both_ways_is_recorded(net):
    net.run[1, "a"] = lambda part, x: part(x) + 0 * without_recording(part, x)
    expected = gradient(Net(), 1)
    for name, found in gradient(net, 1).items():
        torch.testing.assert_close(found, expected[name])


def test_an_evaluation_on_the_way_does_not_count(net):
    with noted_calls(net, ["pooler.weight"]) as calls:
        net.eval()
        with torch.no_grad():
            net(torch.ones(1, 4))
        calls.check(["pooler.weight"])
        net.train()
        with torch.no_grad():
            copy.deepcopy(net)(torch.ones(1, 4))  # with hooks of its own
        calls.check(["pooler.weight"])
        with torch.no_grad():
            net(torch.ones(1, 4))
        with pytest.raises(NoGradient):
            calls.check(["pooler.weight"])


def test_costs_are_not_counted_of_what_is_not_recorded(net):
    net.run[1, "a"] = net.run[1, "b"] = without_recording
    with pytest.raises(NoGradient, match="No parameter of block 0"):
        model_costs(net, blocks_of(net), example=torch.ones(2, 4), batch_size=2)


@pytest.mark.parametrize("family", ["roberta", "vit", "roberta-lora"])
def test_under_a_schedule_and_for_its_scores(family):
    case = make(family)
    case.run([FULL] * 12)
    checkpointed(case.model, reentrant=True).train()
    with pytest.raises(NoGradient, match=r"No parameter of layer 0"):
        case.run([FULL] * 12)
    with pytest.raises(NoGradient, match=r"No parameter of layer 0"):
        score_subnetworks(case.model, case.subnetworks, case.trainable, [case.batch])
    checkpointed(case.model, reentrant=False)
    case.run([FULL] * 12)


def spread_gradients(*, reentrant):
    case = make("roberta")
    devices = Devices(case, training=True)
    for model in devices.models.values():
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if reentrant:
            checkpointed(model, reentrant=True)
    operations = np.full((12, 4), FULL)
    return spread_gradient(spread(case, devices), DRAWS, 6, operations).gradients


def test_where_the_model_is_spread_over_devices(monkeypatch):
    """Layers are not run as such there, and checkpointing changes nothing."""
    try:
        found = spread_gradients(reentrant=True)
    except RuntimeError as error:  # older PyTorch refuses it itself
        assert "use_reentrant" in str(error)
        return
    for name, gradient in spread_gradients(reentrant=False).items():
        torch.testing.assert_close(found[name], gradient)

    def loss(model, batch):
        head = model.classifier.out_proj.bias.sum()
        return model(**batch).logits.detach().sum() * head

    monkeypatch.setattr(test_remote, "model_loss", loss)
    with pytest.raises(NoGradient, match="what the last layer gives"):
        spread_gradients(reentrant=False)


def test_a_partition_without_a_block_is_no_block_without_a_gradient(net):
    names = [name for name, _ in net.named_parameters()]
    empty = BlockPartition(blocks=((),), head=tuple(names), frozen=())
    block_gradient(net, empty, 0, {"x": torch.ones(4, 4)}, loss_function=loss_of)
