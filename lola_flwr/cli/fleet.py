"""``lola-flwr fleet``: make, show and check device files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lola_flwr.cli.console import console, print_json, table
from lola_flwr.cli.paths import LOCAL_PATH
from lola_flwr.errors import UserError, si
from lola_flwr.machine.files import writing

if TYPE_CHECKING:
    from lola_flwr.system.fleet_file import Fleet

app = typer.Typer(
    name="fleet",
    help="Generate, show and validate device files (TOML); devices people own.",
    no_args_is_help=True,
)

FleetFile = Annotated[
    Path,
    typer.Argument(
        click_type=LOCAL_PATH, help="Fleet file in TOML, or presets: jetson-nano:4."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]


@app.command()
def generate(
    devices: Annotated[int, typer.Argument(help="How many devices.")],
    out: Annotated[
        Path | None,
        typer.Option(
            click_type=LOCAL_PATH, help="File to write (default: standard output)."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the fleet.")] = 0,
    power: Annotated[
        bool, typer.Option("--power", help="Say what each draws, by published figures.")
    ] = False,
) -> None:
    """Draw a heterogeneous fleet, from single-board computers to small accelerators.

    Example: `lola-flwr fleet generate 20 --seed 1 --out fleet.toml`
    """
    from lola_flwr.system.devices import FleetRanges
    from lola_flwr.system.fleet_file import fleet_toml, generate_fleet

    ranges = FleetRanges().with_powers() if power else None
    text = fleet_toml(generate_fleet(devices, seed=seed, ranges=ranges))
    if out is None:
        print(text, end="")
        return
    with writing(out):
        try:
            file = out.open("x", encoding="utf-8")
        except FileExistsError:
            raise UserError(f"{out} exists already; give another --out.") from None
        try:
            with file:
                file.write(text)
        except OSError:
            # Half a fleet is none, and would be in the way of the next try.
            out.unlink()
            raise
    print(f"{devices} devices written to {out}")


@app.command()
def show(
    path: FleetFile,
    as_json: AsJson = False,
    as_toml: Annotated[
        bool, typer.Option("--toml", help="Print a fleet file, to be completed.")
    ] = False,
) -> None:
    """Show a fleet as a table.

    Example: `lola-flwr fleet show fleet.toml`

    Presets as a file: `lola-flwr fleet show raspberry-pi-5:8 --toml > fleet.toml`
    """
    from lola_flwr.system.fleet_file import fleet_toml, read_fleet

    fleet = read_fleet(path)
    if as_toml:
        print(fleet_toml(fleet), end="")
        return
    if as_json:
        print_json([device.to_properties() for device in fleet])
        return
    rows = table(f"{path}: {len(fleet)} devices", "device", "speed", "memory", "uplink")
    powers = [(d.compute_power_w, d.transmit_power_w) for d in fleet]
    tells_power = set(powers) != {(None, None)}
    if tells_power:
        rows.add_column("computes at", justify="right")
        rows.add_column("sends at", justify="right")
    for device, stated in zip(fleet, powers, strict=True):
        rows.add_row(
            device.name,
            si(device.flops_per_s, "FLOP/s"),
            si(device.memory_bytes, "B"),
            f"{device.snr_db:.1f} dB"
            if device.uplink_bps is None
            else si(device.uplink_bps, "bit/s"),
            *[_watts(power) for power in stated] * tells_power,
        )
    console().print(rows)


@app.command()
def validate(path: FleetFile) -> None:
    """Check a fleet file; the exit code says whether it holds.

    Example: `lola-flwr fleet validate fleet.toml`
    """
    from lola_flwr.system.fleet_file import read_fleet

    print(f"{path}: {len(read_fleet(path))} devices, all of them complete")


@app.command()
def presets(as_json: AsJson = False) -> None:
    """Show devices that people own, by published figures, and where these are from.

    Example: `lola-flwr fleet presets`

    They stand wherever a fleet file does: `lola-flwr plan --fleet raspberry-pi-5:8`
    """
    from dataclasses import asdict

    from lola_flwr.system.presets import presets as all_presets

    known = all_presets().values()
    if as_json:
        print_json([asdict(preset) for preset in known])
        return
    rows = table(
        "Datasheet figures, not measured: `lola-flwr profile` measures a device.",
        *("preset", "peak", "speed", "installed", "memory", "uplink", "power"),
    )
    for preset in known:
        rows.add_row(
            preset.name,
            si(preset.peak_flops_per_s, "FLOP/s"),
            si(preset.flops_per_s, "FLOP/s"),
            si(preset.installed_bytes, "B"),
            si(preset.memory_bytes, "B"),
            si(preset.uplink_bps, "bit/s"),
            _watts(preset.compute_power_w),
        )
    out = console()
    out.print(rows)
    out.print(
        "\nspeed: what training is assumed to sustain of the peak; memory: what it is "
        "assumed to have of the installed; uplink: as stated below, and often slower; "
        "power: of the module while it computes, where that is published."
    )
    for preset in known:
        out.print(f"\n{preset.name}: {preset.what}")
        out.print(f"  peak: {preset.speed_source}")
        out.print(f"  installed: {preset.memory_source}")
        out.print(f"  uplink: {preset.uplink_source}")
        if preset.power_source:
            out.print(f"  power: {preset.power_source}")
        if preset.note:
            out.print(f"  note: {preset.note}")


def _watts(power: float | None) -> str:
    return "–" if power is None else si(power, "W")


def fleet_of(path: Path | None, num_devices: int, seed: int) -> Fleet:
    """Return the fleet of a file, or one drawn where no file is given."""
    from lola_flwr.system.fleet_file import generate_fleet, read_fleet

    return generate_fleet(num_devices, seed=seed) if path is None else read_fleet(path)
