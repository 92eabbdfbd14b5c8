from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lola_flwr.clients import BlockClient, BlockDevice
from lola_flwr.costs.estimated import estimate_costs
from lola_flwr.costs.memory import Levers
from lola_flwr.device.prefix import (
    ActivationCache,
    LayeredWeights,
    StreamedModel,
    save_base,
    skeleton_of,
)
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import model_loss
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import fingerprint
from lola_flwr.system.devices import DeviceProfile, InvalidProfile, simulated_device
from lola_flwr.wire.codec import CODECS
from lola_flwr.wire.packing import GRADIENTS, pack, unpack
from lola_flwr.wire.records import Assignment, MalformedRecord, UpdateReport


@pytest.fixture
def client(roberta, batch):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    return BlockClient(
        BlockDevice(
            profile=simulated_device(3, seed=0),
            load_model=lambda: (roberta, partition),
            batch_source=lambda server_round, batch_size: {
                name: values[:batch_size] for name, values in batch.items()
            },
        )
    )


def assignment_for(model, **changes):
    partition = partition_parameters(n for n, _ in model.named_parameters())
    fields = {
        "server_round": 2,
        "block_index": 1,
        "share": 0.5,
        "batch_size": 4,
        "codec": "fp32",
        "base_fingerprint": fingerprint(model, partition.frozen),
    }
    return Assignment(**{**fields, **changes}).to_record()


def trainable_values(model):
    partition = partition_parameters(n for n, _ in model.named_parameters())
    parameters = dict(model.named_parameters())
    return {name: parameters[name].numpy(force=True) for name in partition.trainable}


def sent(model):
    return [pack(trainable_values(model))]


def test_profile(client):
    properties = client.get_properties({})
    assert DeviceProfile.from_properties(properties) == simulated_device(3, seed=0)


def test_fit_returns_the_gradient_at_the_received_values(client, roberta, batch):
    roberta.config.hidden_dropout_prob = 0
    for module in roberta.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):
            module.dropout_prob = 0.0
    roberta.set_attn_implementation("eager")
    values = {n: array + 0.01 for n, array in trainable_values(roberta).items()}
    update, num_examples, metrics = client.fit([pack(values)], assignment_for(roberta))

    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    for name, expected in values.items():
        np.testing.assert_array_equal(roberta.state_dict()[name], expected)
    roberta.requires_grad_(True).train()
    roberta(**{name: tensor[:4] for name, tensor in batch.items()}).loss.backward()
    parameters = dict(roberta.named_parameters())
    (gradients,) = update
    shapes = {name: parameters[name].shape for name in partition.update_names(1)}
    assert gradients.size == sum(map(math.prod, shapes.values()))
    for name, gradient in unpack(gradients, CODECS["fp32"], shapes).items():
        np.testing.assert_allclose(
            gradient, parameters[name].grad.numpy(), rtol=1e-4, atol=1e-6
        )
    assert num_examples == 4
    report = UpdateReport.from_record(metrics)
    assert (report.server_round, report.block_index) == (2, 1)
    assert report.update_kind == "gradient"
    assert report.compute_s > 0
    assert report.compute_clock == "measured"


def test_dropout_is_a_function_of_seed_round_and_device(client, roberta):
    values = sent(roberta)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    first, _, _ = client.fit(values, assignment_for(roberta))
    assert torch.equal(torch.get_rng_state(), before), "the device's own state is kept"
    torch.manual_seed(456)
    again, _, _ = client.fit(values, assignment_for(roberta))
    later, _, _ = client.fit(values, assignment_for(roberta, server_round=3))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert any(not np.array_equal(a, b) for a, b in zip(first, later, strict=True))


def test_codec_is_the_one_asked_for(client, roberta):
    values = sent(roberta)
    (exact,), _, _ = client.fit(values, assignment_for(roberta))
    (wire,), _, _ = client.fit(values, assignment_for(roberta, codec="bf16"))
    assert wire.dtype == np.uint16
    np.testing.assert_allclose(
        CODECS["bf16"].decode(wire, exact.shape), exact, rtol=2**-8, atol=1e-30
    )


def test_another_base_is_noticed(client, roberta):
    assignment = assignment_for(roberta, base_fingerprint="other")
    with pytest.raises(UserError, match=r"frozen base weights .* differ"):
        client.fit(sent(roberta), assignment)


def test_another_model_is_noticed(client, roberta, batch):
    (values,) = sent(roberta)
    for wrong, described in (
        (values[:-1], f"{values.size - 1} values of type float32"),
        (values.astype("f8"), f"{values.size} values of type float64"),
    ):
        with pytest.raises(UserError, match=f"{described} received; this model has"):
            client.fit([wrong], assignment_for(roberta))
    named = trainable_values(roberta)
    first = next(iter(named))
    named[first] = named[first][:, :-1]
    assignment = Assignment.from_record(assignment_for(roberta))
    with pytest.raises(UserError, match=r"has shape \(16, 16\) here but \(16, 15\)"):
        device_for(roberta, batch).train(assignment, named)
    del named[first]
    with pytest.raises(UserError, match="arrays received"):
        device_for(roberta, batch).train(assignment, named)


def test_arrays_of_a_server_that_wants_weights_are_refused(client, roberta):
    with pytest.raises(UserError, match=r"52 arrays received .* return weights"):
        client.fit([*trainable_values(roberta).values()], assignment_for(roberta))


def test_config_without_an_assignment(client):
    with pytest.raises(MalformedRecord, match="server-round=None"):
        client.fit([], {})


def device_for(roberta, batch, **options):
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    options = {"profile": simulated_device(3, seed=0), **options}
    return BlockDevice(
        load_model=lambda: (roberta, partition),
        batch_source=lambda server_round, batch_size: {
            name: values[:batch_size] for name, values in batch.items()
        },
        **options,
    )


def train(device, roberta, **changes):
    assignment = Assignment.from_record(assignment_for(roberta, **changes))
    return device.train(assignment, trainable_values(roberta))


def without_dropout(roberta):
    for module in roberta.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    roberta.set_attn_implementation("eager")


def assert_same(update, expected, rtol=1e-4, atol=1e-6):
    assert list(update.arrays) == list(expected.arrays)
    for name, gradient in expected.arrays.items():
        np.testing.assert_allclose(update.arrays[name], gradient, rtol=rtol, atol=atol)


def costs_of(roberta):
    shapes = {name: tuple(p.shape) for name, p in roberta.named_parameters()}
    return estimate_costs(
        shapes, partition_parameters(shapes), batch_size=6, sequence_length=10
    )


def test_a_device_short_of_memory_does_what_the_server_expects(
    roberta, batch, tmp_path
):
    without_dropout(roberta)
    costs = costs_of(roberta)
    expected = train(device_for(roberta, batch), roberta, batch_size=6)
    save_base(roberta, tmp_path / "base")
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    sizes = []

    def loss_function(model, batch):
        resident = {n for n, p in model.named_parameters() if not p.is_meta}
        sizes.append((len(batch["labels"]), set(partition.blocks[0]) <= resident))
        return model_loss(model, batch)

    chosen = []
    for memory_bytes in (1e9, costs.memory_bytes[1] - 1, 1e5):
        profile = DeviceProfile(
            name="a",
            flops_per_s=1e9,
            memory_bytes=memory_bytes,
            splits_batch=True,
            streams_prefix=True,
        )
        weights = LayeredWeights(tmp_path / "base", tmp_path / "changed")
        held = StreamedModel(
            skeleton_of(lambda: type(roberta)(roberta.config)), partition, weights
        )
        device = BlockDevice(
            profile=profile,
            load_model=lambda held=held: held,
            batch_source=lambda *_: batch,
            loss_function=loss_function,
            costs=lambda: costs,
        )
        sizes.clear()
        for module in held.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        update = train(device, roberta, batch_size=6)
        assert_same(update, expected)
        levers = costs.step.choose(profile)[1]
        size = levers.micro_batch_size
        assert sizes == [(size, not levers.stream_prefix)] * (6 // size)
        chosen.append(levers)
        assert update.report.peak_memory_bytes is not None
    assert chosen[0] == Levers(6)
    assert chosen[1] == Levers(6, stream_prefix=True)
    assert chosen[2].micro_batch_size < 6


def test_a_device_runs_layers_twice_where_its_memory_asks_for_it(roberta, batch):
    costs = costs_of(roberta)
    inside = roberta.roberta.encoder.layer[2].intermediate.dense
    runs = []
    inside.register_forward_hook(lambda *_: runs.append(None))

    def update(memory_bytes):
        profile = DeviceProfile(
            name="a",
            flops_per_s=1e9,
            memory_bytes=memory_bytes,
            recomputes_suffix=True,
        )
        device = device_for(roberta, batch, profile=profile, costs=lambda: costs)
        return train(device, roberta, batch_size=6)

    # The same dropout.
    expected = update(1e9)
    assert len(runs) == 1
    assert_same(update(1e5), expected)
    assert len(runs) == 3


def test_peak_memory_counts_the_weights(roberta, batch):
    update = train(device_for(roberta, batch), roberta)
    weights = sum(p.nbytes for p in roberta.parameters())
    assert update.report.peak_memory_bytes >= weights
    simulated = device_for(roberta, batch, simulated_compute_s=lambda _: 1.0)
    assert train(simulated, roberta).report.peak_memory_bytes is None


def test_outputs_below_the_block_are_kept_over_rounds(roberta, batch):
    without_dropout(roberta)
    expected = train(device_for(roberta, batch), roberta)
    cache = ActivationCache(10**6)
    device = device_for(roberta, batch, prefix_cache=cache)
    offered = simulated_device(3, seed=0).memory_bytes
    assert device.profile.memory_bytes == offered - 10**6
    for server_round in (2, 3):
        assert_same(train(device, roberta, server_round=server_round), expected)
    assert (cache.hits, cache.misses) == (4, 4)
    with pytest.raises(InvalidProfile, match="memory_bytes=-"):
        device_for(roberta, batch, prefix_cache=ActivationCache(10**13))


def test_lower_precision(roberta, batch):
    without_dropout(roberta)
    exact = train(device_for(roberta, batch), roberta)
    rounded = train(device_for(roberta, batch, precision="bf16"), roberta)
    assert rounded.arrays[GRADIENTS].dtype == np.float32
    partition = partition_parameters(n for n, _ in roberta.named_parameters())
    names = partition.update_names(1)
    shapes = {name: roberta.get_parameter(name).shape for name in names}
    ours, theirs = (
        unpack(update.arrays[GRADIENTS], CODECS["fp32"], shapes)
        for update in (rounded, exact)
    )
    name = next(name for name in names if name.endswith("output.dense.weight"))
    error = np.abs(ours[name] - theirs[name]).max()
    assert 0 < error < 0.05 * np.abs(theirs[name]).max()
