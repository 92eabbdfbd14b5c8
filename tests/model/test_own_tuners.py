"""Tunings that peft lacks; what is PEQA's own is in test_peqa."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from lola_flwr.costs.of_model import model_costs
from lola_flwr.device.prefix.streaming import (
    LayeredWeights,
    StreamedModel,
    save_base,
    skeleton_of,
)
from lola_flwr.errors import UserError
from lola_flwr.export.graph import block_step, traced_loss
from lola_flwr.model.adapter_blocks import base_name, model_partition
from lola_flwr.model.adapter_trial import check_merging, check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.own_tuners import OWN_TUNERS, register_own_tuners
from lola_flwr.model.saved_adapters import keep_class_names, merge, save_model
from lola_flwr.model.stored_base import evaluation_mode
from tests.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")

EXACT = {"paca": {"r": 3}, "svfit": {"k": 4}, "lamda": {"r": 3}}
OPTIONS = {**EXACT, "peqa": {}}
# With all singular values the matrix itself has no part in it.
VARIANTS = [*EXACT.items(), ("svfit", {}), ("lamda", {"r": 5})]
LINEAR_MAPS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)
TOKENS = torch.arange(3, 15).reshape(2, 6)
BATCH = {"input_ids": TOKENS, "labels": torch.tensor([0, 1])}


def roberta(seed=0, **sizes):
    torch.manual_seed(seed)
    config = hf.RobertaConfig(**{**SMALL, "max_position_embeddings": 40, **sizes})
    return hf.RobertaForSequenceClassification(config).eval()


def adapted(tuning, options=None, *, seed=0, base="fp32"):
    options = OPTIONS[tuning] if options is None else options
    return adapt(roberta(), tuning, options, seed=seed, base=base)


def moved(model):
    """Move the trained values off their initial ones."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.1 * noise.to(parameter))
    return model


def logits(model):
    evaluation_mode(model)
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def one_map(tuning, options, linear):
    """Put an adapter into a map, in float64, and move what it trains."""
    register_own_tuners()
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

    kind = tuning.upper()
    layer = PEFT_TYPE_TO_TUNER_MAPPING[kind].tuner_layer_cls(linear.double())
    layer.begin("default", PEFT_TYPE_TO_CONFIG_MAPPING[kind](**options))
    linear.requires_grad_(False)
    return layer


def reparametrised(tuning, layer, values):
    """Return the weight [out, in] by its definition, with all of it recorded."""
    matrix = layer.matrix
    if tuning == "paca":
        return matrix.index_copy(1, layer.chosen, values)
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    core = values.diag() if tuning == "svfit" else values
    count = len(values)
    first = left[:, :count] @ (core - sizes[:count].diag()) @ right[:count]
    return matrix + first


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (5, 5)])
@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize(("tuning", "options"), VARIANTS)
def test_outputs_and_gradients_are_those_of_the_reparametrised_weight(
    tuning, options, kind, shape
):
    torch.manual_seed(1)
    features, outputs = shape
    made = Conv1D(outputs, features) if kind == "conv1d" else None
    linear = made or nn.Linear(features, outputs, bias=kind == "linear")
    layer = one_map(tuning, options, linear)
    before = linear.weight.clone()
    with torch.no_grad():
        layer.trained.add_(torch.randn(layer.trained.shape))
    inputs = torch.randn(2, 3, features, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 3, outputs, dtype=torch.float64)

    def gradients(output, values):
        return torch.autograd.grad((weights * output.tanh()).sum(), [inputs, values])

    found = layer(inputs)
    values = layer.trained.detach().clone().requires_grad_()
    matrix = reparametrised(tuning, layer, values)
    bias = getattr(linear, "bias", None)
    expected = functional.linear(inputs, matrix, bias)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for own, plain in zip(
        gradients(found, layer.trained), gradients(expected, values), strict=True
    ):
        torch.testing.assert_close(own, plain, rtol=1e-11, atol=1e-11)
    assert torch.equal(linear.weight, before)
    layer.merge()
    torch.testing.assert_close(layer(inputs), expected, rtol=1e-12, atol=1e-12)
    layer.unmerge()
    assert torch.equal(linear.weight, before)
    torch.testing.assert_close(layer(inputs), found)


def test_a_bias_that_is_trained_has_its_gradient():
    layer = one_map("paca", {"r": 2}, nn.Linear(5, 4))
    layer.base_layer.bias.requires_grad_()
    layer(torch.randn(3, 5, dtype=torch.float64)).sum().backward()
    torch.testing.assert_close(
        layer.base_layer.bias.grad, torch.full((4,), 3.0, dtype=torch.float64)
    )


def kept_shapes(run):
    """Return the shapes of what autograd keeps, and the output."""
    shapes = []

    def note(tensor):
        shapes.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = run()
    return shapes, output


def test_paca_keeps_the_chosen_features_and_above_the_block_nothing():
    layer = one_map("paca", {"r": 2}, nn.Linear(5, 4))
    inputs = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    constants = {(4, 5), (4, 2), (2,)}  # the matrix, its columns, and which
    shapes, _ = kept_shapes(lambda: layer(inputs))
    assert set(shapes) == constants | {(3, 2)}
    layer.trained.requires_grad_(False)
    shapes, output = kept_shapes(lambda: layer(inputs))
    assert set(shapes) <= constants
    output.sum().backward()
    assert layer.trained.grad is None
    torch.testing.assert_close(
        inputs.grad, layer.adapted_matrix().detach().sum(0).expand(3, 5)
    )


def test_svfit_keeps_one_feature_a_singular_value():
    layer = one_map("svfit", {"k": 2}, nn.Linear(5, 4))
    inputs = torch.randn(3, 5, dtype=torch.float64)
    shapes, _ = kept_shapes(lambda: layer(inputs))
    assert (3, 2) in shapes
    assert (3, 5) not in shapes


def test_autocast_computes_in_half_and_leaves_gradients_in_full():
    layer = one_map("paca", {"r": 2}, nn.Linear(64, 64)).float()
    inputs = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    assert output.dtype == torch.bfloat16
    output.float().square().sum().backward()
    expected = 2 * layer(inputs.detach()).T @ inputs.detach()[:, layer.chosen]
    assert layer.trained.grad.dtype == inputs.grad.dtype == torch.float32
    torch.testing.assert_close(layer.trained.grad, expected, rtol=0.1, atol=0.3)


class TestBlocks:
    @pytest.mark.parametrize("tuning", OWN_TUNERS)
    def test_a_block_is_what_is_trained_of_every_linear_map(self, tuning):
        model = adapted(tuning)
        partition = model_partition(model)
        for index, block in enumerate(partition.blocks):
            layer = f"base_model.model.roberta.encoder.layer.{index}."
            assert [name.partition(f".{tuning}_")[0] for name in block] == [
                layer + path for path in LINEAR_MAPS
            ]
        assert {base_name(n).split(".")[0] for n in partition.head} == {"classifier"}
        held = {n: p for n, p in model.named_parameters() if not p.requires_grad}
        assert set(held) <= set(partition.frozen)

    @pytest.mark.parametrize(("tuning", "options"), [*VARIANTS, ("peqa", {})])
    def test_a_blocks_gradient_is_that_of_back_propagation(self, tuning, options):
        model = moved(adapted(tuning, options))
        partition = model_partition(model)
        parameters = [model.get_parameter(name) for name in partition.trainable]
        full = torch.autograd.grad(model(**BATCH).loss, parameters)
        expected = dict(zip(partition.trainable, full, strict=True))
        for index in range(partition.num_blocks):
            found = block_gradient(model, partition, index, BATCH).gradients
            for name, gradient in found.items():
                torch.testing.assert_close(gradient, expected[name])

    @pytest.mark.parametrize("tuning", EXACT)
    def test_the_model_begins_as_it_was(self, tuning):
        torch.testing.assert_close(logits(adapted(tuning)), logits(roberta()))

    def test_a_blocks_upload_at_robertas_size(self):
        with torch.device("meta"):
            model = hf.RobertaForSequenceClassification(
                hf.RobertaConfig(vocab_size=100, num_hidden_layers=2)
            )
        model = adapt(model, "svfit", {"k": 768})
        partition = model_partition(model)
        costs = model_costs(model, partition, batch_size=2, sequence_length=8)
        sizes = {n: p.nbytes for n, p in model.named_parameters()}
        assert [sum(map(sizes.get, b)) for b in partition.blocks] == [4 * 768 * 6] * 2
        # RoBERTa's head is a matrix, too, and a hundred times as much.
        head = 4 * (768 * 768 + 768 + 2 * 768 + 2)
        np.testing.assert_array_equal(costs.gradient_bytes, [4 * 768 * 6 + head] * 2)

    def test_the_seed_chooses_the_columns(self):
        first, again, other = (
            adapted("paca", seed=seed).get_submodule(
                "base_model.model.roberta.encoder.layer.0.output.dense"
            )
            for seed in (0, 0, 1)
        )
        assert torch.equal(first.chosen, again.chosen)
        assert not torch.equal(first.chosen, other.chosen)
        assert sorted(set(first.chosen.tolist())) == first.chosen.tolist()
        assert torch.equal(first.trained, first.matrix[:, first.chosen])


class TestFingerprint:
    @pytest.mark.parametrize("tuning", OWN_TUNERS)
    def test_is_of_all_that_is_frozen_and_of_nothing_else(self, tuning):
        model = adapted(tuning)
        frozen = model_partition(model).frozen
        digest = fingerprint(model, frozen)
        assert fingerprint(adapted(tuning), frozen) == digest
        moved(model)
        block_gradient(model, model_partition(model), 0, BATCH)
        # Not the one that is remembered.
        assert fingerprint(copy.deepcopy(model), frozen) == digest
        path = "base_model.model.roberta.encoder.layer.1.output.dense"
        layer = model.get_submodule(path)
        with torch.no_grad():
            weight = layer.base_layer.weight
            weight[2, 1] += 1e-3 if weight.is_floating_point() else 1
        assert fingerprint(model, frozen) != digest

    def test_other_columns_are_another_model(self):
        first, other = (adapted("paca", seed=seed) for seed in (0, 1))
        frozen = model_partition(first).frozen
        assert fingerprint(first, frozen) != fingerprint(other, frozen)


class TestSaved:
    @pytest.mark.parametrize("base", ["fp32", "bf16"])
    @pytest.mark.parametrize("tuning", OWN_TUNERS)
    def test_as_a_plain_model_that_others_load(self, tuning, base, tmp_path):
        model = moved(adapted(tuning, base=base))
        before = {n: p.detach().clone() for n, p in model.named_parameters()}
        check_saving(model, roberta, {"input_ids": TOKENS})
        check_merging(model, {"input_ids": TOKENS})
        save_model(model, tmp_path / "model")
        assert keep_class_names(model, tmp_path / "model") == ""
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]), name
        loaded = hf.AutoModelForSequenceClassification.from_pretrained(
            tmp_path / "model"
        )
        assert not (tmp_path / "model" / "adapter_config.json").exists()
        tolerance = {"fp32": 1e-5, "bf16": 2e-2}[base]
        torch.testing.assert_close(
            logits(loaded), logits(model).float(), rtol=0, atol=tolerance
        )
        merged = merge(model)
        torch.testing.assert_close(logits(merged), logits(loaded))

    def test_a_model_that_is_none_of_transformers(self, tmp_path):
        model = adapt(
            nn.Sequential(*(nn.Sequential(nn.Linear(8, 8)) for _ in range(3))),
            "paca",
            {"r": 2, "target_modules": "all-linear"},
        )
        with pytest.raises(UserError, match=r"Sequential has no save_pretrained; save"):
            save_model(model, tmp_path / "model")
        with pytest.raises(UserError, match="has no save_pretrained"):
            check_saving(model, roberta, {"input": torch.zeros(1, 8)})


@pytest.mark.slow
@pytest.mark.parametrize("tuning", OWN_TUNERS)
def test_an_exported_step_is_the_same(tuning):
    model = moved(adapted(tuning))
    partition = model_partition(model)
    loss = traced_loss(model, BATCH)
    values = [model.get_parameter(n).detach() for n in partition.trainable]
    step = block_step(loss, partition, 1, BATCH)
    found_loss, *found = step.module()(*values, *BATCH.values())
    expected = block_gradient(model, partition, 1, BATCH)
    assert float(found_loss) == pytest.approx(expected.loss)
    for gradient, name in zip(found, partition.update_names(1), strict=True):
        torch.testing.assert_close(gradient, expected.gradients[name])


class TestStreamed:
    def test_paca(self, tmp_path):
        whole = moved(adapted("paca"))
        partition = model_partition(whole)
        save_base(adapted("paca"), tmp_path / "base")
        skeleton = skeleton_of(lambda: adapted("paca"))
        weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
        streamed = StreamedModel(skeleton, partition, weights)
        digest = streamed.fingerprint()
        assert digest == fingerprint(whole, partition.frozen)
        parameters = dict(whole.named_parameters())
        values = [parameters[n].detach().numpy() for n in partition.trainable]
        streamed.load(partition.trainable, values)
        expected = block_gradient(whole, partition, 2, BATCH).gradients
        with streamed.at_block(2) as model:
            found = block_gradient(model, partition, 2, BATCH).gradients
        for name, gradient in found.items():
            torch.testing.assert_close(gradient, expected[name])
        again = LayeredWeights(tmp_path / "base", tmp_path / "changed")
        other = StreamedModel(skeleton, partition, again)
        assert other.fingerprint() == digest

    def test_without_weights_there_are_no_singular_vectors(self, tmp_path):
        whole = adapted("svfit")
        save_base(whole, tmp_path / "base")
        skeleton = skeleton_of(lambda: adapted("svfit"))
        weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
        with pytest.raises(UserError, match="computed from base weights") as raised:
            StreamedModel(skeleton, model_partition(whole), weights)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("tuning", "options", "message"),
    [
        ("paca", {"r": 0}, "r=0 is to be a whole number, 1 to 16, the columns of the"),
        ("paca", {"r": 17}, "r=17 is to be a whole number, 1 to 16"),
        ("paca", {"r": "8"}, "r='8' is to be a whole number"),
        ("paca", {"k": 3}, "keyword argument 'k'"),
        ("svfit", {"k": 17}, "k=17 is to be .*1 to 16, the singular values of the"),
        ("svfit", {"k": 0}, "k=0 is to be a whole number, 1 to 16"),
        ("lamda", {"r": 99}, "r=99 is to be a whole number, 1 to 16"),
        (
            "paca",
            {"target_modules": ["word_embeddings"]},
            "of type Embedding, which is",
        ),
    ],
)
def test_what_is_refused(tuning, options, message):
    with pytest.raises(UserError, match=message) as raised:
        adapt(roberta(), tuning, options)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("tuning", OWN_TUNERS)
def test_quantised_weights_are_refused(tuning):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=f"tuning='{tuning}' works on the weights them"):
        adapt(roberta(), tuning, base="nf4")


def test_a_second_adapter_is_refused():
    model = adapted("paca")
    with pytest.raises(ValueError, match="one adapter of this kind"):
        model.add_adapter("second", model.peft_config["default"])
