from __future__ import annotations

import copy
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from torch import nn

from lola_flwr.clients import BlockDevice
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.d2ft.first_token import last_layer_for_first_token
from lola_flwr.d2ft.subnetworks import LayerNotUnderstood
from lola_flwr.device.tokens import ALL_TOKENS, Trial, tokens_for
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import (
    block_gradient,
    evenly,
    model_loss,
    num_examples_of,
)
from lola_flwr.model.loading import fingerprint
from lola_flwr.system.devices import simulated_device
from lola_flwr.wire.packing import GRADIENTS, pack
from lola_flwr.wire.records import Assignment
from tests.conftest import SMALL

# Mostly short, so that much is padding: more than passes count for in tiny models.
LENGTHS = [36, 30, *[5, 4, 6, 3, 5, 4, 7, 5] * 14]
IGNORED = -100


def texts(lengths=LENGTHS, *, learned=False):
    """Make a padded batch; a token each to be learned, or a class each."""
    drawn = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 60, (len(lengths), max(lengths)), generator=drawn)
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    ids[~mask] = 1
    batch = {"input_ids": ids, "attention_mask": mask.long()}
    if learned:
        labels = ids.masked_fill(~mask, IGNORED)
        labels[:, :2] = IGNORED
        return {**batch, "labels": labels}
    return {**batch, "labels": (torch.arange(len(lengths)) % 4 == 0).long()}


def num_learned(batch):
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def trial_of(model, loss_function=model_loss, batch_weight=num_examples_of):
    return Trial(
        model=model,
        partition=model_partition(model),
        loss_function=loss_function,
        batch_weight=batch_weight,
    )


def computed(trial, batch, block, tokens):
    """Return the gradient, and how many tokens it took."""
    seen = []

    def loss_function(model, part):
        seen.append(part["input_ids"].numel())
        return trial.loss_function(model, part)

    with tokens.first_alone():
        found = block_gradient(
            trial.model,
            trial.partition,
            block,
            batch,
            loss_function=loss_function,
            batch_weight=trial.batch_weight,
            split=tokens.split,
        )
    return found, sum(seen)


def assert_equal_gradients(trial, batch, tokens):
    for block in range(trial.partition.num_blocks):
        whole, padded = computed(trial, batch, block, ALL_TOKENS)
        found, without = computed(trial, batch, block, tokens)
        assert without < 0.5 * padded
        assert found.num_examples == whole.num_examples
        assert found.loss == pytest.approx(whole.loss, rel=1e-6)
        largest = max(g.abs().max() for g in whole.gradients.values())
        for name, gradient in found.gradients.items():
            apart = (gradient - whole.gradients[name]).abs().max()
            assert apart <= 3e-6 * largest, name


def llama():
    config = transformers.LlamaConfig(**SMALL, max_position_embeddings=40)
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_an_encoder_computes_little_padding_and_the_last_layer_for_what_is_read(
    roberta,
):
    trial, batch = trial_of(roberta), texts()
    tokens = tokens_for(trial, batch)
    assert tokens.split is not evenly
    assert tokens.first_alone is not ALL_TOKENS.first_alone
    assert_equal_gradients(trial, batch, tokens)
    assert not roberta.training
    assert all("forward" not in vars(module) for module in roberta.modules())


def test_a_decoder_weighs_by_the_tokens_that_are_learned():
    trial = trial_of(llama(), batch_weight=num_learned)
    batch = texts(learned=True)
    tokens = tokens_for(trial, batch)
    assert tokens.first_alone is ALL_TOKENS.first_alone
    assert_equal_gradients(trial, batch, tokens)


@pytest.mark.slow
def test_adapters_have_the_same_gradients(roberta):
    options = {"r": 2, "target_modules": ["query", "value"]}
    model = adapt(roberta, "lora", options)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    trial, batch = trial_of(model.eval()), texts()
    tokens = tokens_for(trial, batch)
    assert tokens.first_alone is not ALL_TOKENS.first_alone
    assert_equal_gradients(trial, batch, tokens)


def of_probabilities(model, batch):
    logits = model(batch["input_ids"], batch["attention_mask"]).logits
    return logits, batch["labels"]


def weighing_classes(model, batch):
    return nn.functional.cross_entropy(
        *of_probabilities(model, batch), weight=torch.tensor([1.0, 3.0])
    )


def contrastive(model, batch):
    logits, _ = of_probabilities(model, batch)
    return -torch.log_softmax(logits @ logits.T, dim=1).diagonal().mean()


def adding_up(model, batch):
    return nn.functional.cross_entropy(*of_probabilities(model, batch), reduction="sum")


def reading_padding(model, batch):
    hidden = model.roberta(batch["input_ids"], batch["attention_mask"])[0]
    logits = model.classifier(hidden.mean(dim=1, keepdim=True))
    return nn.functional.cross_entropy(logits, batch["labels"])


@pytest.mark.parametrize(
    "loss_function", [weighing_classes, contrastive, adding_up, reading_padding]
)
def test_what_depends_on_padding_or_on_other_examples_is_computed_as_it_is(
    roberta, caplog, loss_function
):
    trial, batch = trial_of(roberta, loss_function), texts()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert tokens_for(trial, batch).split is evenly
    (line,) = caplog.messages  # once
    assert "RobertaForSequenceClassification has a" in line


def test_means_over_tokens_that_are_weighed_by_examples_are_computed_as_they_are():
    assert tokens_for(trial_of(llama()), texts(learned=True)).split is evenly


def test_what_was_not_tried_is_tried_where_it_matters(roberta):
    """A loss that weighs classes shows it where there are several."""
    trial, batch = trial_of(roberta, weighing_classes), texts()
    alike = {**batch, "labels": torch.zeros_like(batch["labels"])}
    assert tokens_for(trial, alike).split is not evenly
    assert tokens_for(trial, batch).split is evenly
    assert tokens_for(trial, alike).split is evenly


@pytest.mark.slow
def test_another_loss_of_the_same_model_is_tried_anew(roberta):
    batch = texts()
    assert tokens_for(trial_of(roberta), batch).split is not evenly
    assert tokens_for(trial_of(roberta, contrastive), batch).split is evenly
    assert tokens_for(trial_of(roberta), batch).split is not evenly


def test_a_model_that_short_inputs_change_stays_as_it_is(roberta):
    class Turning(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = roberta
            self.kind = nn.Identity()

        def forward(self, input_ids, attention_mask, labels):
            if input_ids.shape[1] < 20:
                self.kind = nn.Dropout(0.0)
            return self.inner(input_ids, attention_mask, labels=labels)

    model = Turning()
    trial = replace(trial_of(roberta), model=model)
    partition = model_partition(roberta)
    blocks = tuple(tuple(f"inner.{n}" for n in block) for block in partition.blocks)
    head = tuple(f"inner.{n}" for n in partition.head)
    trial = replace(trial, partition=replace(partition, blocks=blocks, head=head))
    assert tokens_for(trial, texts()) == ALL_TOKENS
    assert type(model.kind) is nn.Identity


def test_images_and_small_batches_are_computed_as_ever(roberta, batch):
    def never(model, part):
        raise AssertionError

    trial = trial_of(roberta, never)
    assert tokens_for(trial, batch) == ALL_TOKENS
    assert tokens_for(trial, {"pixel_values": torch.ones(60, 3, 8, 8)}) == ALL_TOKENS


def test_a_head_that_reads_other_tokens_keeps_the_last_layer(roberta):
    def reading_words(model, part):
        mask = part["attention_mask"][..., None]
        hidden = model.roberta(part["input_ids"], part["attention_mask"])[0]
        mean = (hidden * mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True)
        return nn.functional.cross_entropy(model.classifier(mean), part["labels"])

    trial, batch = trial_of(roberta, reading_words), texts()
    tokens = tokens_for(trial, batch)
    assert tokens.first_alone is ALL_TOKENS.first_alone
    assert_equal_gradients(trial, batch, tokens)


def test_only_layers_of_berts_kind_are_shortened(roberta):
    with pytest.raises(LayerNotUnderstood, match="LlamaDecoderLayer"):
        last_layer_for_first_token(llama(), model_partition(llama()))
    hidden = []
    last = roberta.roberta.encoder.layer[-1]
    last.register_forward_hook(lambda *call: hidden.append(call[-1]))
    inputs = {name: values[:4] for name, values in texts().items()}
    with torch.no_grad():
        plain = roberta(**inputs).logits
        with last_layer_for_first_token(roberta, model_partition(roberta)):
            alone = roberta(**inputs).logits
    torch.testing.assert_close(alone, plain)
    torch.testing.assert_close(hidden[-1][:, 0], hidden[0][:, 0])
    assert hidden[-1][:, 1:].isnan().all()


def device_for(model, batch, **changes):
    partition = model_partition(model)
    return BlockDevice(
        profile=simulated_device(0, seed=0),
        load_model=lambda: (model, partition),
        batch_source=lambda server_round, batch_size: batch,
        simulated_compute_s=lambda assignment: 1.0,
        **changes,
    )


def trained(device, model, **changes):
    partition = model_partition(model)
    parameters = dict(model.named_parameters())
    sent = {n: parameters[n].numpy(force=True) for n in partition.trainable}
    fields = {"server_round": 1, "block_index": 1, "share": 0.5, "codec": "fp32"}
    assignment = Assignment(
        batch_size=len(LENGTHS),
        base_fingerprint=fingerprint(model, partition.frozen),
        **{**fields, **changes},
    )
    return device.train(assignment, {"values": pack(sent)})


class Widths:
    """The loss of a model, which notes the tokens that it is computed of."""

    def __init__(self):
        self.seen = []

    def __call__(self, model, batch):
        self.seen.append(batch["input_ids"].numel())
        return model_loss(model, batch)


def without_dropout(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def test_a_device_computes_what_its_gradient_depends_on(roberta):
    model, batch = without_dropout(roberta), texts()
    loss = Widths()
    update = trained(device_for(model, batch, loss_function=loss), model)
    tried, loss.seen = loss.seen, []
    again = trained(device_for(model, batch, loss_function=loss), model)
    assert sum(loss.seen) < 0.4 * batch["input_ids"].numel()
    # A look at few examples comes first, and once.
    assert len(tried) > len(loss.seen)
    gradients = update.arrays[GRADIENTS]
    np.testing.assert_array_equal(gradients, again.arrays[GRADIENTS])

    partition = model_partition(model)
    plain = block_gradient(model.train(), partition, 1, batch)
    flat = [gradient.flatten() for _, gradient in sorted(plain.gradients.items())]
    expected = torch.cat(flat).numpy()
    assert update.num_examples == len(LENGTHS)
    assert update.report.loss == pytest.approx(plain.loss, rel=1e-6)
    assert np.abs(gradients - expected).max() <= 3e-6 * np.abs(expected).max()


def test_a_device_without_memory_for_a_sum_of_gradients_computes_the_batch_whole(
    roberta,
):
    batch, loss = texts(), Widths()
    shapes = {name: tuple(p.shape) for name, p in roberta.named_parameters()}
    costs = estimate_costs(
        shapes, model_partition(roberta), batch_size=len(LENGTHS), sequence_length=36
    )
    large = replace(costs.step, array_bytes=costs.step.array_bytes + 1e12)
    costs = replace(costs, step=large)
    device = device_for(roberta, batch, loss_function=loss, costs=lambda: costs)
    trained(device, roberta)
    assert loss.seen[-1] == batch["input_ids"].numel()


def test_a_simulated_device_takes_as_long_as_what_it_computes(roberta):
    batch, loss = texts(), Widths()
    width = batch["input_ids"].shape[1]

    def compute_s(model, **changes):
        device = device_for(model, batch, **{"loss_function": loss, **changes})
        return trained(device, model).report.compute_s

    assert compute_s(roberta) == 1.0
    loss.seen = []  # what it was tried on
    took_s = compute_s(roberta, sequence_length=2 * width)
    computed = sum(loss.seen)
    full = 2 * width * len(LENGTHS)
    # And for the passes that the cut takes more.
    assert computed / full < took_s < 0.5 * batch["input_ids"].numel() / full
    assert compute_s(roberta, sequence_length=1) == 1.0
    # What reads padding computes it, and takes as long.
    changes = {"loss_function": reading_padding, "sequence_length": 2 * width}
    assert compute_s(roberta, **changes) == 0.5


@pytest.mark.slow
def test_forward_passes_alone_leave_padding_out_too(roberta):
    batch, loss = texts(), Widths()
    asked = {
        "direction_seed": 3,
        "num_directions": 2,
        "perturbation": 1e-2,
        "smallest_share": 1.0,
    }
    device = device_for(roberta, batch, loss_function=loss)
    found = trained(device, roberta, **asked)
    loss.seen.clear()
    assert trained(device, roberta, **asked).report == found.report
    assert sum(loss.seen) < 0.4 * 4 * batch["input_ids"].numel()

    def apart(model, part):  # whatever is tried of it
        return model_loss(model, part) if len(part["labels"]) > 50 else torch.rand(())

    padded = trained(device_for(roberta, batch, loss_function=apart), roberta, **asked)
    assert found.report.loss == pytest.approx(padded.report.loss, rel=1e-5)
    ours, theirs = (
        np.frombuffer(each.report.projections, np.float32) for each in (found, padded)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-2, atol=1e-4)
