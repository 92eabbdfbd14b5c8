"""What is read of an export, and what is refused before anything runs."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from lola_flwr.errors import UserError
from lola_flwr.export.manifest import (
    MANIFEST_FILE,
    VERSION,
    manifest_schema,
    parse_manifest,
    read_manifest,
    value_specs,
)
from lola_flwr.wire.packing import pack
from tests.export.small import copied
from tests.tree import ROOT

SCHEMA = ROOT / "clients" / "native" / "manifest.schema.json"


@pytest.fixture
def directory(tmp_path):
    copied(tmp_path / "steps")
    return tmp_path / "steps"


def changed(directory, change):
    """Change the manifest's values in place."""
    path = directory / MANIFEST_FILE
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def refusal(directory, **options):
    with pytest.raises(UserError) as refused:
        read_manifest(directory, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_what_is_written_is_read(directory):
    manifest = read_manifest(directory)
    assert manifest == parse_manifest(manifest.to_json(), where="here")
    assert manifest.takes_fewer_examples and manifest.takes_fewer_tokens
    fills = {spec.name: spec.fill for spec in manifest.batch}
    assert fills == {"input_ids": 1, "attention_mask": 0, "labels": None}
    assert read_manifest(directory, fingerprint=manifest.base_fingerprint) == manifest


def test_values_are_where_the_message_has_them(rng):
    shapes = {"b.weight": (2, 3), "a": (4,), "b.bias": ()}
    arrays = {n: rng.standard_normal(s).astype("<f4") for n, s in shapes.items()}
    packed = pack(arrays).tobytes()
    for spec in value_specs(shapes):
        there = packed[spec.offset_bytes : spec.offset_bytes + spec.nbytes]
        assert there == arrays[spec.name].tobytes()


@pytest.mark.parametrize("name", ["frozen.ptd", "block-1.pte"])
def test_a_damaged_file_is_refused(directory, name):
    path = directory / name
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert f"{name} is not the file that was exported" in refusal(directory)
    path.unlink()
    assert "No such file" in refusal(directory)


def test_another_model_is_refused(directory):
    assert "other frozen weights" in refusal(directory, fingerprint="0" * 64)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("version", VERSION + 1, f"version {VERSION + 1}, and this program reads"),
        ("version", "1", "version '1'"),
        ("format", "other", "no manifest of lola-flwr export"),
        ("dropout", "on", "damaged at dropout"),
        ("batch_size", "6", "damaged at batch_size"),
        ("speed", 1, "damaged at speed"),
        ("head", [], "values are not those of its blocks and head"),
    ],
)
def test_what_no_export_wrote_is_refused(directory, key, value, said):
    changed(directory, lambda values: values.update({key: value}))
    assert said in refusal(directory)


def test_contradictions_are_refused(directory):
    original = (directory / MANIFEST_FILE).read_text()

    def offset(values):
        values["values"][0]["offset_bytes"] += 4

    def block(values):
        values["programs"][0]["block"] = 3

    def gradient(values):
        values["programs"][0]["gradients"].pop()

    def elsewhere(values):
        values["frozen"]["name"] = "../steps/frozen.ptd"

    for change, said in [
        (offset, "values are not where"),
        (block, "no block 3"),
        (gradient, "gradients of block 0"),
        (elsewhere, "no name of a file beside it"),
    ]:
        (directory / MANIFEST_FILE).write_text(original)
        changed(directory, change)
        assert said in refusal(directory)


def test_what_is_no_manifest_is_refused(directory):
    (directory / MANIFEST_FILE).write_text("{")
    assert "no JSON" in refusal(directory)
    assert "cannot be read" in refusal(directory / "nowhere")


def test_a_block_without_a_program_is_named(directory):
    manifest = read_manifest(directory)
    assert manifest.program(2).block == 2
    two = replace(manifest, programs=manifest.programs[:2])
    with pytest.raises(UserError, match=r"block 2 of 'small'; there are .* 0, 1"):
        two.program(2)


def test_the_schema_beside_the_native_runner_is_that_of_manifests():
    """``python -m tests.export.test_manifest`` writes it."""
    assert json.loads(SCHEMA.read_text()) == manifest_schema()


if __name__ == "__main__":
    SCHEMA.write_text(json.dumps(manifest_schema(), indent=1) + "\n")
