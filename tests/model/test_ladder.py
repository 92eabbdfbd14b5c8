"""Side networks, over tiny models of several families with random weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from lola_flwr.build import coordinator_for
from lola_flwr.clients import BlockDevice
from lola_flwr.costs.of_model import model_costs
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapter_trial import check_saving
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, model_loss, train_mode
from lola_flwr.model.loading import fingerprint
from lola_flwr.model.saved_adapters import save_model
from lola_flwr.model.saved_ladder import load_ladder
from lola_flwr.server.replies import DeviceReply
from lola_flwr.system.devices import simulated_device
from tests.marks import rest_slow
from tests.model.ladders import FAMILIES, SIZES, examples, moved, plain, with_ladder
from tests.server.coordinators import npy

each_family = pytest.mark.parametrize("family", rest_slow(FAMILIES, fast=2))


def by_autograd(model, partition, batch):
    """Return the gradient of all that is trained, by one backward pass."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in partition.trainable)
    model.zero_grad()
    model_loss(model, batch).backward()
    found = {n: model.get_parameter(n).grad.clone() for n in partition.trainable}
    model.zero_grad()
    return found


@each_family
class TestFamilies:
    def test_blocks_are_side_layers(self, family):
        model, base = with_ladder(family), plain(family)
        partition = model_partition(model)
        assert partition.num_blocks == 3
        for index, block in enumerate(partition.blocks):
            inside = f"ladder.layers.{index}."
            assert all(name.startswith(inside) for name in block)
            assert {f"{inside}gate", f"{inside}down.weight"} <= {*block}
        assert partition.head[:2] == ("ladder.up.weight", "ladder.up.bias")
        own = {name for name, _ in base.named_parameters()}
        assert {*partition.frozen, *partition.head[2:]} == own
        assert set(partition.frozen_head) < own
        for name, values in base.named_parameters():
            assert torch.equal(values, model.get_parameter(name))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            *partition.trainable
        }

    def test_every_blocks_gradient_is_that_of_autograd(self, family):
        model = moved(with_ladder(family))
        partition, batch = model_partition(model), examples(model)
        for training in (False, True):
            model.train(training)
            torch.manual_seed(3)
            expected = by_autograd(model, partition, batch)
            for index in range(partition.num_blocks):
                torch.manual_seed(3)
                found = block_gradient(model, partition, index, batch)
                assert [*found.gradients] == [*partition.update_names(index)]
                for name, gradient in found.gradients.items():
                    assert torch.equal(gradient, expected[name]), name
        assert all(values.abs().max() > 0 for values in expected.values())

    def test_it_computes_what_the_source_says(self, family):
        """Against the formula, on hidden states as transformers returns them."""
        model = moved(with_ladder(family))
        base, ladder = plain(family), model.ladder
        batch = {k: v for k, v in examples(model).items() if k != "labels"}
        base.load_state_dict(model.state_dict(), strict=False)
        heard = []
        layers = [base.get_submodule(path) for path in layer_paths(base)]
        for layer in layers:
            layer.register_forward_hook(
                lambda _, args, kwargs, output: heard.append(
                    (args, kwargs, output[0] if isinstance(output, tuple) else output)
                ),
                with_kwargs=True,
            )
        with torch.no_grad():
            base(**batch)
            side = ladder.layers[0].down(heard[0][0][0])
            for own, (args, kwargs, hidden) in zip(ladder.layers, heard, strict=True):
                mu = 1 / (1 + np.exp(-own.gate.item() / 0.1))
                mixed = mu * own.down(hidden) + (1 - mu) * side
                kwargs = {**kwargs}
                if "position_embeddings" in kwargs:
                    kwargs["position_embeddings"] = [
                        part[..., ladder.reduction.offset :: 4]
                        for part in kwargs["position_embeddings"]
                    ]
                kwargs.pop("use_cache", None)
                kwargs.pop("cache", None)
                kwargs.pop("past_key_values", None)
                others = [
                    None if isinstance(value, transformers.Cache) else value
                    for value in args[1:]
                ]
                side = own.layer(mixed, *others, **kwargs)
            expected = heard[-1][2] + ladder.up(side)
            layers[-1].register_forward_hook(lambda *_: expected)
            wanted, found = base(**batch).logits, model(**batch).logits
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        with torch.no_grad():
            assert (found - plain_outputs(base, layers[-1], batch)).abs().max() > 1e-3

    def test_costs_are_what_pytorch_counts(self, family):
        base = plain(family)
        # Of attention in evaluation PyTorch counts nothing where it is one operation.
        base.set_attn_implementation("eager")
        model = adapt(base, "ladder", {"r": 4})
        train_mode(model)
        partition = model_partition(model)
        batch = examples(model, 16, 32)
        costs = model_costs(
            model, partition, batch_size=16, sequence_length=32, example=batch
        )
        for index in range(partition.num_blocks):
            with FlopCounterMode(display=False) as counter:
                block_gradient(model, partition, index, batch)
            assert costs.flops[index] == counter.get_total_flops()

    def test_it_is_saved_and_stands_beside_the_same_model_again(self, family, tmp_path):
        model = moved(with_ladder(family, seed=2))
        batch = examples(model)
        save_model(model, tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {
            "ladder.json",
            "ladder.safetensors",
        }
        again = load_ladder(plain(family), tmp_path)
        assert model_partition(again) == model_partition(model)
        with torch.no_grad():
            assert torch.equal(again(**batch).logits, model(**batch).logits)
        if "input_ids" in batch:
            check_saving(model, lambda: plain(family), batch)


def layer_paths(model):
    blocks = model_partition(model).blocks
    return [block[0][: block[0].index(f".{n}.") + 2] for n, block in enumerate(blocks)]


def plain_outputs(model, last, batch):
    last._forward_hooks.clear()
    last._forward_hooks_with_kwargs.clear()
    return model(**batch).logits


class TestBeginning:
    def test_it_is_a_part_of_the_model(self):
        model = with_ladder(seed=1)
        kept = model.ladder.reduction.kept
        assert (kept.step, 0 <= kept.start < 4) == (4, True)
        own, side = model.roberta.encoder.layer[1], model.ladder.layers[1].layer
        for name, values in own.named_parameters():
            part = values[(kept,) * values.dim()] * (2 if values.dim() > 1 else 1)
            assert torch.equal(side.get_parameter(name), part)
        hidden = torch.randn(2, 5, 32)
        assert torch.equal(model.ladder.layers[0].down(hidden), hidden[..., kept])

    def test_it_is_a_function_of_model_and_seed(self):
        first, second, *others = (
            with_ladder(seed=seed) for seed in (7, 7, 0, 1, 2, 3, 4, 5)
        )
        names = model_partition(first).trainable
        assert fingerprint(first, names) == fingerprint(second, names)
        digests = {fingerprint(other, names) for other in others}
        assert len(digests) > 1
        base = plain()
        state = torch.random.get_rng_state()
        adapt(base, "ladder", {"r": 4})
        assert torch.equal(torch.random.get_rng_state(), state)

    def test_it_starts_near_the_model_with_gradients_everywhere(self):
        model = with_ladder("llama")
        batch = examples(model)
        with torch.no_grad():
            with_side, alone = model(**batch).loss, plain("llama")(**batch).loss
        assert abs(with_side - alone) < 0.05 * alone
        found = by_autograd(model, model_partition(model), batch)
        assert all(values.abs().max() > 0 for values in found.values())


@pytest.mark.parametrize("base", ["bf16", *rest_slow(["nf4", "int8"], fast=0)])
@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_a_base_in_fewer_bits(family, base, tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    kind, config, own = FAMILIES[family]

    def large():
        torch.manual_seed(0)
        made = getattr(transformers, config)(**{**own, **sizes})
        return getattr(transformers, kind)(made).eval()

    model = moved(adapt(large(), "ladder", {"r": 4}, base=base))
    whole = moved(adapt(large(), "ladder", {"r": 4}))
    partition, batch = model_partition(model), examples(model)
    assert partition.blocks == model_partition(whole).blocks
    assert partition.head == model_partition(whole).head
    assert fingerprint(model, partition.frozen) == fingerprint(whole, partition.frozen)
    assert {model.get_parameter(n).dtype for n in partition.trainable} == {
        torch.float32
    }
    expected = by_autograd(model, partition, batch)
    assert all(values.isfinite().all() for values in expected.values())
    for index in range(3):
        for name, gradient in block_gradient(
            model, partition, index, batch
        ).gradients.items():
            torch.testing.assert_close(gradient, expected[name])
    check_saving(model, large, {k: v for k, v in batch.items() if k != "labels"})
    costs = model_costs(model, partition, batch_size=4, sequence_length=7)
    assert np.all(np.diff(costs.flops) < 0)


class TestCosts:
    @pytest.mark.slow
    def test_depth_costs_side_layers_alone(self):
        sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
        config = transformers.RobertaConfig(**{**SIZES, **sizes})
        with torch.device("meta"):
            made = transformers.RobertaForSequenceClassification(config)
            also = transformers.RobertaForSequenceClassification(config)
        options = {"batch_size": 16, "sequence_length": 32}
        ladder = adapt(made, "ladder", {"r": 8})
        lora = adapt(also, "lora", {"target_modules": ["query", "value"]})
        side, layers = (
            model_costs(model, model_partition(model), **options)
            for model in (ladder, lora)
        )
        depth_flops = side.flops[0] - side.flops[-1]
        assert 0 < depth_flops < 0.04 * (layers.flops[0] - layers.flops[-1])
        depth_bytes = side.memory_bytes[0] - side.memory_bytes[-1]
        assert (
            0 < depth_bytes < 0.3 * (layers.memory_bytes[0] - layers.memory_bytes[-1])
        )
        assert np.all(np.diff(side.flops) < 0)

    @pytest.mark.slow
    def test_roberta_base_takes_little_more_than_inference(self):
        with torch.device("meta"):
            config = transformers.RobertaConfig(max_position_embeddings=514)
            made = transformers.RobertaForSequenceClassification(config)
        model = adapt(made, "ladder")
        partition = model_partition(model)
        costs = model_costs(model, partition, batch_size=16, sequence_length=64)
        below = costs.step.working_bytes.of(16)
        weights = sum(p.nbytes for p in model.parameters())
        assert costs.memory_bytes[0] < 1.3 * (weights + below)


def test_a_round_steps_the_side_network(batch):
    def load_model():
        model = with_ladder()
        return model, model_partition(model)

    model, partition = load_model()
    costs = model_costs(model, partition, batch_size=6, sequence_length=10)
    coordinator = coordinator_for(model, partition, costs=costs, batch_size=6)
    initial = {name: values.copy() for name, values in coordinator.values().items()}
    devices = {}
    for index in range(3):
        profile = simulated_device(index, seed=0)
        coordinator.add_device(str(index), profile.to_properties())
        devices[str(index)] = BlockDevice(
            profile=profile,
            load_model=load_model,
            batch_source=lambda server_round, batch_size: batch,
        )
    plan = coordinator.plan_round(1, devices)
    updates = {
        device_id: devices[device_id].train(assignment, coordinator.values())
        for device_id, assignment in plan.assignments.items()
    }
    record = coordinator.complete_round(
        plan,
        [
            DeviceReply(
                device_id=device_id,
                tensors=[npy(array) for array in update.arrays.values()],
                num_examples=update.num_examples,
                report=update.report.to_record(),
            )
            for device_id, update in updates.items()
        ],
    )
    assert [block.status for block in record.blocks] == ["accepted"] * 3
    for name, values in coordinator.values().items():
        assert not np.array_equal(values, initial[name]), name
