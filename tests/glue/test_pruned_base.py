"""Adapters on a pruned base through the whole app: planned, trained, stopped, saved."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file

from lola_flwr.app.check import check_shapes
from lola_flwr.costs.shapes import model_shapes
from lola_flwr.d2ft.cuts import cuts_of
from lola_flwr.d2ft.pruning import Pruning
from lola_flwr.errors import UserError
from lola_flwr.export.describe import example_batch
from lola_flwr.export.graph import block_step, traced_loss
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.loading import load_classifier
from lola_flwr.model.stored_base import evaluation_mode
from lola_flwr.system.devices import FleetRanges, simulated_device
from lola_glue.costs import load_model, model_costs
from lola_glue.exports import exported
from lola_glue.tasks import find_task, load_task
from simulations.compare.pruned_base import Trained, gradients
from tests.glue.test_methods import config
from tests.glue.test_own_tunings import run_app

KEYS = {
    "tuning": "lora",
    "tuning-options": "r=4, target_modules=['query', 'value', 'dense']",
    "pruning": "heads=0.5, neurons=0.25",
}


def saved(directory):
    """Return a run's records, without times of this machine, and its adapters."""
    lines = (directory / "rounds.jsonl").read_text().splitlines()
    records = [
        {k: v for k, v in json.loads(line).items() if not k.startswith("measured")}
        for line in lines
    ]
    return records, load_file(directory / "model" / "adapter_model.safetensors")


def bits(arrays):
    return {name: values.numpy().tobytes() for name, values in arrays.items()}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_run_goes_on_to_the_same_bits_and_saves_the_whole_model(tmp_path):
    keys = [f"{key}={value}" for key, value in KEYS.items()]
    # Gradients of a random model on few examples are hardly alike.
    keys += ["save-model=true", "save-merged=true", "lr=1e-2", "reputation=false"]

    def run(name, *overrides):
        return run_app(tmp_path / name, *keys, *overrides)

    records, adapters = saved(run("whole", "rounds=4", "interface=message"))
    for record in records:
        assert {block["status"] for block in record["blocks"]} == {"accepted"}
        assert len(record["blocks"]) == 4
    run("parts", "rounds=2", "interface=message")
    again, same = saved(run("parts", "rounds=4", "interface=legacy"))
    assert again == records
    assert bits(same) == bits(adapters)
    # Plain transformers and peft load it; what was pruned has nothing added.
    base, _ = load_classifier("random:roberta-tiny", num_labels=2)
    cuts = cuts_of(base, model_partition(base), Pruning(heads=0.5, neurons=0.25))
    for name, values in adapters.items():
        path = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if path not in cuts or ("lora_A" in name) != (cuts[path].side == "inputs"):
            continue
        across = values if "lora_B" in name else values.T
        is_zero = ~across.any(dim=1).numpy()
        assert is_zero.sum() == cuts[path].width - len(cuts[path].kept)
        assert not is_zero[cuts[path].kept].any()
    model = peft.PeftModel.from_pretrained(base, tmp_path / "whole" / "out" / "model")
    merged = hf.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "whole" / "out" / "merged"
    )
    plain = dict(model.merge_and_unload().named_parameters())
    for name, values in merged.named_parameters():
        assert (values - plain[name]).abs().max() < 1e-5


@pytest.mark.slow
def test_what_devices_hold_compute_and_send_is_less():
    task = find_task("acceptability")
    costs = {}
    for pruning in ("", KEYS["pruning"]):
        made = config(**{**KEYS, "pruning": pruning})
        model, _ = load_model(made, task)
        costs[pruning] = model_costs(made, model)
    whole, pruned = costs.values()
    assert (pruned.flops < whole.flops).all()
    assert (pruned.memory_bytes < whole.memory_bytes).all()
    assert (pruned.gradient_bytes < whole.gradient_bytes).all()


@pytest.mark.slow
def test_the_step_that_is_exported_is_that_of_what_is_left():
    keys = {**KEYS, "max-length": 16, "batch-size": 4}
    made = exported(config(**keys).to_run_config())
    batch = example_batch(made)
    step = block_step(traced_loss(made.model, batch), made.partition, 2, batch)
    values = [made.model.get_parameter(n) for n in made.partition.trainable]
    _, *found = step.module()(*values, *batch.values())
    evaluation_mode(made.model)
    expected = block_gradient(made.model, made.partition, 2, batch).gradients
    names = made.partition.update_names(2)
    for name, gradient in zip(names, found, strict=True):
        torch.testing.assert_close(gradient, expected[name])
    whole = config(**{**keys, "pruning": ""})
    task = find_task("acceptability")
    plain, _ = load_model(whole, task)
    for name, values in made.model.named_parameters():
        if name in made.partition.frozen and "intermediate" in name:
            assert values.numel() == 0.75 * plain.get_parameter(name).numel()


@pytest.mark.parametrize("pruning", ["", KEYS["pruning"]])
def test_a_bias_is_that_of_pruning(pruning):
    """The benchmark compares the same weights: of one model with itself nothing."""
    tiny = {"model": "random:roberta-tiny", "max-length": 16}
    made = Trained.of({**KEYS, **tiny, "pruning": pruning})
    values = made.model.state_dict()
    trained = {n: values[n].numpy() for n in made.partition.trainable}
    made.whole.load(made.partition, trained)
    _, examples, _ = load_task("acceptability", "", seed=0)
    batch = made.batch(examples, np.arange(4))
    pruned, whole = gradients(made, 1, [batch])
    assert pruned.shape == whole.shape
    assert pruned.any()
    off = float((pruned - whole).norm() / whole.norm())
    assert off > 0.01 if pruning else off == 0


def test_devices_with_room_for_what_is_left_are_not_refused():
    """The shapes of the whole model say no more then; the model itself does."""
    shapes = model_shapes("minilm-l6")
    needed = 4 * sum(map(math.prod, shapes.shapes.values()))
    device = simulated_device(0, seed=0, ranges=FleetRanges())
    small = [replace(device, memory_bytes=0.9 * needed)]
    with pytest.raises(UserError, match="No device can hold the model"):
        check_shapes(config(**{**KEYS, "pruning": ""}), shapes, small)
    check_shapes(config(**KEYS), shapes, small)
