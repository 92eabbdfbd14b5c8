"""``lola-flwr export``: training steps as programs for devices without PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lola_flwr.cli.console import console, print_json, table
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError, si

if TYPE_CHECKING:
    from lola_flwr.export.describe import ExportedModel
    from lola_flwr.export.manifest import ExportManifest


# What an app's own configuration says of its run.
_OF_A_MODEL = ("task", "num_labels", "tuning", "tuning_options", "stack", "seed")
_OF_A_RUN = (*_OF_A_MODEL, "batch_size", "max_length")


def export(
    context: typer.Context,
    out: Annotated[
        Path, typer.Option(click_type=LOCAL_PATH, help="Directory to make.")
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Overrides of the app's configuration: key=value."),
    ] = None,
    app: Annotated[
        Path | None,
        typer.Option(click_type=LOCAL_PATH, help="The app whose run it is for."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="minilm-l6, random:roberta-base, or a directory."),
    ] = None,
    task: Annotated[str, typer.Option(help="classification or causal.")] = (
        "classification"
    ),
    num_labels: Annotated[
        int, typer.Option(min=1, help="Classes; 1 makes a regression.")
    ] = 2,
    tuning: Annotated[
        str, typer.Option(help="full, or a tuner of peft: lora, ...")
    ] = "full",
    tuning_options: Annotated[
        str, typer.Option(help="The tuner's options, as in 'r=8'.")
    ] = "",
    stack: Annotated[
        str | None, typer.Option(help="Layers that are the blocks: encoder.block, ...")
    ] = None,
    blocks: Annotated[
        str, typer.Option(help="Blocks, 0 nearest the input: 4,5; or all.")
    ] = "all",
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a batch.")] = 32,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens an example.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of new weights.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model's training steps as programs, one a block.

    A program runs forward through the model and back to its block, without dropout; it
    needs ExecuTorch, and neither PyTorch nor Python. The frozen weights are one file
    that all programs share, and a manifest describes it all.

    Of an app's run, its configuration says all: the model, its blocks and batches, so
    that devices with these programs can take part in it.

    Example: `lola-flwr export --model minilm-l6 --blocks 5 --out steps`
    Example: `lola-flwr export --app simulations/glue --out steps batch-size=16`
    """
    from lola_flwr.machine.installation import require_extra

    if task not in ("classification", "causal"):
        raise UserError(f"--task={task} must be classification or causal.")
    chosen = _chosen(blocks)
    if out.exists():
        raise UserError(
            f"--out {out} is there, and export overwrites nothing; name another."
        )
    require_extra("export", "executorch", "lola-flwr export")

    from lola_flwr.export.models import NamedModel, load_exported
    from lola_flwr.export.write import export_steps
    from lola_flwr.run.config import keyword_arguments

    if app is not None:
        _refuse_options(context, ("model", *_OF_A_RUN), "the app's configuration says")
        exported = _of_app(app, overrides or [])
    else:
        if model is None or overrides:
            raise UserError(
                "Name what to export: --model minilm-l6, or --app and its directory, "
                "with overrides of its configuration as key=value."
            )
        named = NamedModel(
            model=model,
            task="causal" if task == "causal" else "classification",
            num_labels=num_labels,
            tuning=tuning,
            tuning_options=keyword_arguments(tuning_options),
            stack=stack,
            seed=seed,
        )
        exported = load_exported(
            named, batch_size=batch_size, sequence_length=max_length
        )
    manifest = export_steps(exported, out, blocks=chosen)
    if as_json:
        print_json(_as_json(manifest, out))
    else:
        _print(manifest, out)


def _refuse_options(context: typer.Context, names: Sequence[str], why: str) -> None:
    for name in names:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            raise UserError(
                f"{option} and --app: {why} that; leave {option} out, and override the "
                "app's key as key=value."
            )


def _of_app(directory: Path, overrides: Sequence[str]) -> ExportedModel:
    """Return what an app's run trains."""
    from lola_flwr.cli.app_config import read_overrides
    from lola_flwr.simulation.flower_app import (
        check_config,
        importable,
        named,
        read_app,
    )

    app = read_app(directory)
    config = {**app.config, **read_overrides(app, overrides)}
    check_config(app, config)
    function = named(app, "export", app.export)
    if function is None:
        raise UserError(
            f"{directory} names no 'export' in [tool.lola-flwr] of its pyproject.toml; "
            "name a function of the run configuration that returns an ExportedModel, "
            "or export a model: --model."
        )
    with importable(directory):
        exported: ExportedModel = function(config)
    return exported


def _chosen(blocks: str) -> list[int] | None:
    if blocks == "all":
        return None
    words = blocks.split(",")
    if not all(word.strip().isdecimal() for word in words):
        raise UserError(f"--blocks={blocks} must be 'all', or numbers such as 4,5.")
    return sorted({int(word) for word in words})


def _as_json(manifest: ExportManifest, out: Path) -> dict[str, object]:
    return {
        "directory": str(out),
        "base_fingerprint": manifest.base_fingerprint,
        "frozen_bytes": manifest.frozen.num_bytes,
        "takes_fewer_examples": manifest.takes_fewer_examples,
        "takes_fewer_tokens": manifest.takes_fewer_tokens,
        "programs": [
            {
                "block": program.block,
                "file": program.file.name,
                "program_bytes": program.file.num_bytes,
                "arena_bytes": program.arena_bytes,
                "operations": program.operations,
            }
            for program in manifest.programs
        ],
    }


def _print(manifest: ExportManifest, out: Path) -> None:
    rows = table(
        f"{manifest.model}: {len(manifest.programs)} of {len(manifest.blocks)} blocks, "
        f"batch {manifest.batch_size} x {manifest.sequence_length} tokens, in {out}",
        *("program", "block", "size", "memory", "operations"),
    )
    for program in manifest.programs:
        rows.add_row(
            program.file.name,
            str(program.block),
            si(program.file.num_bytes, "B"),
            si(program.arena_bytes, "B"),
            si(program.operations, "flop"),
        )
    out_console = console()
    out_console.print(rows)
    shared = si(manifest.frozen.num_bytes, "B")
    out_console.print(f"{manifest.frozen.name}: {shared} of frozen weights, for all")
