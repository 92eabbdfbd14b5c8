"""``lola-flwr profile``: measure this device for the server's planning."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from lola_flwr.cli.console import console, print_json, table
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError, si


def profile(
    model: Annotated[
        str, typer.Option(help="minilm-l6, random:roberta-base, or a directory.")
    ] = "random:roberta-base",
    out: Annotated[
        Path, typer.Option(click_type=LOCAL_PATH, help="File to write.")
    ] = Path("device.json"),
    name: Annotated[
        str | None, typer.Option(help="Name of the device; the host's if not given.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples of a batch.")] = 16,
    max_length: Annotated[int, typer.Option(min=1, help="Tokens an example.")] = 64,
    torch_device: Annotated[
        str | None, typer.Option(help="cpu or cuda; a GPU if there is one.")
    ] = None,
    uplink_mbps: Annotated[
        float | None,
        typer.Option(min=0.001, help="Rate of the uplink, Mbit/s, where it is known."),
    ] = None,
    budget_s: Annotated[
        float, typer.Option(min=1, help="Seconds for the measurements.")
    ] = 90.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure this device: training speed by depth, memory; write a profile.

    Its SuperNode reports the file: `flower-supernode --node-config
    'profile="device.json"' ...`

    Example: `lola-flwr profile --model minilm-l6 --uplink-mbps 8 --out device.json`
    """
    from rich.progress import Progress

    from lola_flwr.deployment.measurement import measure_device, write_profile

    # Known before minutes are spent on measuring.
    if out.is_dir() or not os.access(out.absolute().parent, os.W_OK):
        raise UserError(
            f"--out {out}: nothing can be written there; name another file."
        )
    with Progress(console=console(), transient=True, disable=as_json) as bar:
        task = bar.add_task("measuring", total=None)
        measured = measure_device(
            model,
            name=name,
            batch_size=batch_size,
            sequence_length=max_length,
            torch_device=torch_device,
            uplink_bps=None if uplink_mbps is None else 1e6 * uplink_mbps,
            budget_s=budget_s,
            progress=lambda step, done, total: bar.update(
                task, description=step, completed=done, total=total
            ),
        )
    write_profile(measured, out)
    if as_json:
        import json

        print_json(json.loads(measured.to_json()))
        return
    rows = table(
        f"{measured.name}: {model}, batch {batch_size} x {max_length} tokens on "
        f"{measured.torch_device}",
        "depth",
        "step",
        "peak memory",
        "speed",
        left=0,
    )
    for step in measured.depths:
        rows.add_row(
            str(step.depth),
            f"{step.compute_s:.3f} s",
            si(step.peak_memory_bytes, "B"),
            si(step.flops / step.compute_s, "flop/s"),
        )
    console().print(rows)
    for line in (f"{key}: {value}" for key, value in measured.host.items()):
        console().print(line)
    if measured.compute_power_w is not None:
        console().print(f"power {measured.compute_power_w:.2f} W while it trained")
    console().print(
        f"speed {si(measured.flops_per_s, 'flop/s')}, memory "
        f"{si(measured.memory_bytes, 'B')} to use; written to {out}"
    )


if __name__ == "__main__":
    # Where a worker's Python has no Flower, and so no `lola-flwr`.
    typer.run(profile)
