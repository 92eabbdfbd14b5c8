"""What an app's run trains is exported as its own devices have it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from lola_flwr.app.batches import GIVEN_BATCH
from lola_flwr.cli.main import main
from lola_flwr.errors import UserError
from lola_flwr.export.batches import fitted
from lola_flwr.simulation.flower_app import importable, named, read_app
from lola_flwr.wire.packing import VALUES, pack
from lola_flwr.wire.records import Assignment
from tests.export.small import scratch, written
from tests.tree import ROOT

APPS = {
    "glue": {"model": "random:roberta-tiny", "num-devices": 1},
    "causal": {"num-devices": 1},
}


def loaded(name, **changes):
    """Return an app's configuration, what it exports, and what makes its devices."""
    directory = ROOT / "simulations" / name
    app = read_app(directory)
    config = {**app.config, "batch-size": 4, "max-length": 16, **APPS[name], **changes}
    with importable(directory):
        device_fn = named(app, "prepare", app.prepare.replace("prepare", "device_fn"))
        return config, named(app, "export", app.export), device_fn


@pytest.mark.slow
@pytest.mark.parametrize("name", APPS)
def test_a_device_of_the_run_takes_the_export_for_its_own(name):
    config, export, device_fn = loaded(name)
    of = export(config)
    manifest = written(of, scratch() / "steps")
    node = {"partition-id": 0, "num-partitions": 1}
    context = SimpleNamespace(node_id=1, run_id=1, node_config=node, run_config=config)
    device = device_fn(context)
    # Its batches are what the programs take, filled up.
    batch = {n: t.numpy() for n, t in device.batch_source(1, 4).items()}
    assert len(fitted(batch, manifest)) == len(manifest.batch)
    # And it takes values and frozen weights of the export for its model's.
    parameters = dict(of.model.named_parameters())
    values = {n: parameters[n].numpy(force=True) for n in of.partition.trainable}
    asked = Assignment(1, 0, 1.0, 4, "fp32", manifest.base_fingerprint)
    update = device.train(asked, {VALUES: pack(values)})
    assert update.report.update_kind == "gradient"


@pytest.mark.slow
def test_an_export_has_one_batch_size_where_the_run_chooses():
    config, export, _ = loaded("glue", **{"batch-size": "", "codec": ""})
    assert export(config).batch_size == GIVEN_BATCH


@pytest.mark.parametrize(
    ("name", "changes", "said"),
    [
        ("glue", {"method": "d2ft"}, "method='d2ft': exported programs train blocks"),
        ("glue", {"precision": "bf16"}, "precision='bf16': exported programs compute"),
        ("glue", {"batch-size": "auto"}, "an exported program has one batch size"),
        ("glue", {"zeroth-order": "always"}, "exported programs back-propagate"),
        ("causal", {"packing": True}, "rows of several sequences have no program"),
    ],
)
def test_runs_without_programs_are_refused(name, changes, said):
    config, export, _ = loaded(name, **changes)
    with pytest.raises(UserError, match=said):
        export(config)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Name what to export: --model minilm-l6, or --app"),
        (["--model", "minilm-l6", "rounds=1"], "Name what to export"),
        (["--app", "simulations/glue", "--seed", "1"], "--seed and --app: the app's"),
        (["--app", "simulations/glue", "task=no"], "task"),
        (["--app", "simulations/quickstart"], "names no 'export' in [tool.lola-flwr]"),
    ],
)
def test_mistakes_are_one_line(capsys, monkeypatch, tmp_path, words, said):
    pytest.importorskip("executorch", reason="needs the extra [export]")
    monkeypatch.chdir(ROOT)
    assert main(["export", "--out", str(tmp_path / "out"), *words]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
