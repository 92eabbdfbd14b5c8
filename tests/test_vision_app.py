"""The vision app: its pieces, and a run through a real SuperLink."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from flwr.app import Context, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from lola_flwr.build import ServerStep, coordinator_for
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import block_gradient
from lola_flwr.run.records import RoundRecord
from lola_flwr.simulation import run_app
from lola_flwr.system.devices import simulated_device
from tests.strategies.in_process import InProcessGrid

APP = Path(__file__).parent.parent / "simulations" / "vision"
sys.path.append(str(APP))  # Flower puts the app's directory there, too

from lola_vision.client_app import app, device_fn  # noqa: E402
from lola_vision.config import VisionConfig  # noqa: E402
from lola_vision.images import TEXTURES, draw_textures, load_images  # noqa: E402
from lola_vision.model import build  # noqa: E402
from lola_vision.server_app import train  # noqa: E402

RUN_CONFIG = {
    "interface": "legacy",
    "data-dir": "",
    "image-size": 16,
    "patch-size": 4,
    "layers": 3,
    "hidden-size": 8,
    "rounds": 2,
    "batch-size": 4,
    "lr": 1e-3,
    "bandwidth-hz": 1e6,
    "seed": 0,
    "output-dir": "",
}


def config(**changes):
    changes = {name.replace("_", "-"): value for name, value in changes.items()}
    return VisionConfig.from_run_config({**RUN_CONFIG, **changes})


def test_textures_follow_from_the_seed_and_can_be_told_apart():
    first = draw_textures(40, 16, np.random.default_rng(3))
    again = draw_textures(40, 16, np.random.default_rng(3))
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert (first.pixels.shape, first.pixels.dtype) == ((40, 3, 16, 16), np.float32)
    assert set(first.labels) == {0, 1, 2, 3}
    # Rows change from top to bottom, columns from left to right; the rest is noise.
    down, across = (
        np.abs(np.diff(first.pixels, axis=a)).mean((1, 2, 3)) for a in (2, 3)
    )
    assert (down > across)[first.labels == 0].all()
    assert (down < across)[first.labels == 1].all()


def test_held_out_textures_are_others():
    train, held_out = load_images("", 8, seed=0)
    assert not (held_out.pixels[:, None] == train.pixels[:50]).all((2, 3, 4)).any()


def test_images_of_a_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, color in (("cat", 255), ("dog", 0)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for index in range(5):
            image = PIL.Image.new("L", (20, 30), color)
            image.save(tmp_path / "data" / name / f"{index}.png")
    train, held_out = load_images(str(tmp_path / "data"), 8, seed=0)
    assert (len(train.labels), len(held_out.labels)) == (8, 2)
    assert train.classes == ("cat", "dog")
    assert train.pixels.shape == (8, 3, 8, 8)
    # Cats are white, dogs black.
    assert (train.pixels[:, 0, 0, 0] == np.where(train.labels == 0, 1, -1)).all()


def test_a_folder_without_images_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(UserError, match="sub-folder of images for each"):
            load_images(str(folder), 8, seed=0)


def test_a_folder_of_one_class_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data" / "cat").mkdir(parents=True)
    for index in range(5):
        image = PIL.Image.new("L", (8, 8), index)
        image.save(tmp_path / "data" / "cat" / f"{index}.png")
    with pytest.raises(UserError, match=r"images of one class\); .* of two classes"):
        load_images(str(tmp_path / "data"), 8, seed=0)


def test_an_unknown_interface_is_refused():
    with pytest.raises(UserError, match="interface='rest'"):
        config(interface="rest")


def test_the_layers_of_the_model_are_its_blocks():
    model, partition, costs = build(config())
    assert partition.num_blocks == len(costs.flops) == 3
    assert {name.partition(".")[0] for name in partition.head} == {"vit", "classifier"}
    batch = load_images("", 16, seed=0)[0].batch(np.arange(4))
    result = block_gradient(model, partition, 1, batch)
    assert list(result.gradients) == list(partition.update_names(1))
    assert all(values.abs().sum() > 0 for values in result.gradients.values())


def test_the_model_names_its_classes():
    own = build(config())[0].config
    assert own.id2label == dict(enumerate(TEXTURES))
    assert own.label2id == {name: index for index, name in enumerate(TEXTURES)}
    assert own.problem_type == "single_label_classification"


def test_the_coordinator_starts_from_the_models_values():
    model, partition, costs = build(config())
    coordinator = coordinator_for(
        model, partition, costs=costs, step=ServerStep(optimizer="SGD", lr=0.1)
    )
    state, parameters = coordinator.values(), dict(model.named_parameters())
    assert list(state) == list(partition.trainable)
    for name, values in state.items():
        np.testing.assert_array_equal(values, parameters[name].numpy(force=True))
        assert not np.shares_memory(values, parameters[name].numpy(force=True))


def test_the_final_line():
    record = RoundRecord(
        server_round=7,
        num_devices=4,
        wireless_s=1.5,
        metrics={"loss": 0.25, "accuracy": 0.5},
    )
    assert record.final_line() == (
        "final: accuracy=0.5000 rounds=7 wireless_s=1.500 loss=0.2500"
    )


def test_a_patch_size_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match="image-size=16 is no multiple of patch-size=5"):
        build(config(patch_size=5))


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError, match=r"layers=1: .*; lr=0"):
        config(layers=1, lr=0)


def test_rounds_under_the_message_api(monkeypatch, caplog, tmp_path):
    for name in ("_run_id", "_task_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, name, 1)
    changes = {"interface": "message", "output-dir": str(tmp_path)}
    run_config = RUN_CONFIG | changes

    def answer(message, context):
        node_id, node_config = context.node_id, context.node_config
        return app(message, Context(1, node_id, node_config, RecordDict(), run_config))

    nodes = range(100, 104)
    grid = InProcessGrid(
        dict.fromkeys(nodes, answer),
        {node: {"partition-id": node - 100, "num-partitions": 4} for node in nodes},
    )
    with caplog.at_level("INFO", logger="flwr"):
        train(grid, Context(1, 0, {}, RecordDict(), run_config))
    assert grid.batches[1]["train"] == 3
    assert re.search(r"final: accuracy=[\d.]+ rounds=2 wireless_s=", caplog.text)


def test_a_device_that_states_its_profile_is_no_simulated_one():
    part = {"partition-id": 0, "num-partitions": 4}
    stated = {"flops-per-s": 2e11, "memory-bytes": 4e9, "snr-db": 12.0, "name": "board"}
    simulated, real = (
        device_fn(Context(1, 7, node_config, RecordDict(), RUN_CONFIG))
        for node_config in (part, part | stated)
    )
    assert simulated.profile == simulated_device(0, seed=RUN_CONFIG["seed"])
    assert simulated.simulated_compute_s is not None
    assert (real.profile.name, real.profile.flops_per_s) == ("board", 2e11)
    assert real.simulated_compute_s is None, "its times are measured"


@pytest.mark.slow
def test_runs_learn_the_textures_alike_under_both_interfaces(tmp_path):
    finals = []
    for interface in ("legacy", "message"):
        finished = run_app(
            APP,
            num_devices=4,
            run_config=["rounds=15", f'interface="{interface}"'],
            home=tmp_path,
        )
        assert finished.completed, finished.output
        finals.append(finished.final)
    accuracy = re.search(r"accuracy=([\d.]+) rounds=15 wireless_s=", finals[0])
    assert accuracy is not None
    # Four classes: chance is 0.25.
    assert float(accuracy[1]) > 0.6
    assert finals[0] == finals[1]
