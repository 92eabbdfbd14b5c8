"""Entry point of ``lola-flwr``: gathers the commands, and turns mistakes into a line.

To add a command, write a module with its function beside this one, and name it in
`_add_commands`. A command's module imports at its top only what every command may wait
for; torch, Flower and the solvers are imported where they are used.
"""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import click
import typer

from lola_flwr.cli import (
    doctor,
    export,
    fleet,
    keys,
    node,
    plan,
    profile,
    report,
    serve,
    simulate,
    worker,
)
from lola_flwr.errors import UserError

# Exit codes besides 0: the run failed, the command was not understood, Ctrl-C.
FAILED, MISUSED, INTERRUPTED = 1, 2, 130
# Distributions whose versions tell what this is.
_VERSIONS = ("lola-flwr", "flwr", "torch")


def _add_commands(app: typer.Typer) -> None:
    app.command()(plan.plan)
    app.command()(profile.profile)
    app.command()(simulate.simulate)
    app.command()(keys.keys)
    app.command()(export.export)
    app.command()(report.report)
    app.command()(doctor.doctor)
    app.command()(serve.serve)
    app.command()(worker.worker)
    app.command(context_settings=node.SETTINGS)(node.node)
    app.add_typer(fleet.app)


app = typer.Typer(
    name="lola-flwr",
    help="Plan, simulate and look into low-latency cooperative fine-tuning.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_add_commands(app)


def _show_versions(wanted: bool) -> None:
    if wanted:
        print(", ".join(f"{name} {_version(name)}" for name in _VERSIONS))
        raise typer.Exit()


@app.callback()
def _of_all_commands(
    _: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_show_versions,
            is_eager=True,
            help="Show the versions of lola-flwr, Flower and PyTorch.",
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code.

    Parameters
    ----------
    arguments
        The words after ``lola-flwr`` (default: those of this process).
    """
    if arguments is None:
        # The process ends with the command: what it holds needs not be gone through
        # once more, which takes a second with PyTorch and transformers.
        atexit.register(gc.freeze)
    command = typer.main.get_command(app)
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = command.main(words, prog_name="lola-flwr", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        # Not a mistake: whoever asks for nothing is shown what there is.
        print(error.format_message())
        return MISUSED
    except click.ClickException as error:
        from lola_flwr.cli.hints import what_was_wrong

        return _say(what_was_wrong(error, words), MISUSED)
    except UserError as error:
        return _say(str(error), FAILED)
    except (click.Abort, KeyboardInterrupt):
        return _say("stopped", INTERRUPTED)
    if code == INTERRUPTED:  # typer's own answer to Ctrl-C
        return _say("stopped", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return "is not installed"


def _say(message: str, code: int) -> int:
    line = " ".join(message.split())
    print(line if code == INTERRUPTED else f"error: {line}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
