"""A run's figures in the experiment trackers that a user has.

::

    with tracking(["tensorboard"], directory, config) as track:
        strategy = LoLaDeft(coordinator, on_round=track)
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from types import TracebackType
from typing import Any

from lola_flwr.errors import UserError, nearest, quoted, without_directories
from lola_flwr.run.records import Record, RoundRecord, StepRecord

_logger = logging.getLogger(__name__)

# Takes the number of a round and its figures.
LogRound = Callable[[int, Mapping[str, float]], None]
Config = Mapping[str, Any]

# What writes for a tracker, where that is a package of another name.
_WRITERS = {"tensorboard": "tensorboardX"}


@contextmanager
def tracking(
    names: Sequence[str], directory: Path, config: Config
) -> Iterator[Callable[[Record], None]]:
    """Give a function that hands each round's figures to some trackers.

    Parameters
    ----------
    names
        Trackers, out of `TRACKERS`; none is fine.
    directory
        The run's directory: what a tracker keeps in files goes there, and the run has
        its name.
    config
        The run's configuration, which trackers show beside the figures; of a path its
        last part alone.

    Raises
    ------
    UserError
        Unknown tracker, its package is not installed, or it does not start.
    """
    check_trackers(names)
    config = {key: without_directories(value) for key, value in config.items()}
    with ExitStack() as stack:
        started = []
        for name in names:
            tracker = TRACKERS[name](directory, config)
            try:
                started.append((name, tracker.__enter__()))
            except ImportError as error:
                raise UserError(
                    f"The tracker {name!r} needs a package that is missing "
                    f"({error.name}); pip install {_WRITERS.get(name, name)}."
                ) from None
            # Trackers raise whatever their clients raise.
            except Exception as error:
                raise UserError(
                    f"The tracker {name!r} does not start: {type(error).__name__}: "
                    f"{quoted(error)}; leave it out, or see what it needs."
                ) from error
            stack.push(partial(_close, name, tracker))

        def track(record: Record) -> None:
            rounds = [(record.server_round, figures(record))]
            if start := _known(record.start_metrics):
                rounds.insert(0, (0, start))
            for (name, log_round), (number, values) in product(started, rounds):
                # A run is worth more than its curves: a tracker out of reach is said,
                # and the rounds go on.
                try:
                    log_round(number, values)
                except Exception as error:
                    _logger.warning("tracker %s: %s", name, str(error))

        yield track


def _close(
    name: str,
    tracker: AbstractContextManager[LogRound],
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    """End a tracker; what goes wrong in that must not take the run's error's place."""
    try:
        tracker.__exit__(kind, error, traceback)
    except Exception as own:
        if own is not error:
            _logger.warning("tracker %s: %s", name, str(own))


def check_trackers(names: Sequence[str]) -> None:
    """Raise a `UserError` for a name that is no tracker's."""
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"Unknown tracker {name!r}; use {', '.join(TRACKERS)}."
                f"{nearest(name, TRACKERS)}"
            )


def figures(record: Record) -> dict[str, float]:
    """Return a round's figures by name; what is not known is left out."""
    values: dict[str, float | None] = {
        "wireless_s": record.wireless_s,
        "joules": record.joules,
        "devices": record.num_devices,
        "train_loss": record.train_loss,
        **record.metrics,
    }
    if record.skipped is None:
        values |= {
            "latency/planned_s": record.round_s,
            "latency/observed_s": record.observed_s,
        }
    if isinstance(record, RoundRecord):
        values |= {
            "updates/asked": len(record.blocks),
            "updates/refused": sum(record.refused.values()),
            "latency/bound_s": None if record.skipped else record.bound_s,
        }
    if isinstance(record, StepRecord):
        values |= {
            "exchanges": record.exchanges,
            "bytes/sent": record.sent_bytes,
            "bytes/received": record.received_bytes,
        }
    return _known(values)


def _known(values: Mapping[str, float | None]) -> dict[str, float]:
    return {
        k: float(v) for k, v in values.items() if v is not None and math.isfinite(v)
    }


@contextmanager
def _tensorboard(directory: Path, config: Config) -> Iterator[LogRound]:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(directory / "tensorboard"))
    rows = "\n".join(f"| {key} | {value} |" for key, value in config.items())
    writer.add_text("config", f"| key | value |\n|---|---|\n{rows}")

    def log_round(server_round: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, server_round)
        writer.flush()

    try:
        yield log_round
    finally:
        writer.close()


@contextmanager
def _mlflow(directory: Path, config: Config) -> Iterator[LogRound]:
    import mlflow

    # Where to is MLflow's own configuration: MLFLOW_TRACKING_URI and so on.
    with mlflow.start_run(run_name=directory.name):
        mlflow.log_params(dict(config))
        yield lambda server_round, values: mlflow.log_metrics(
            dict(values), step=server_round
        )


@contextmanager
def _wandb(directory: Path, config: Config) -> Iterator[LogRound]:
    import wandb

    # Project, account and mode can be set by WANDB_PROJECT and so on.
    with wandb.init(
        name=directory.name, config=dict(config), dir=str(directory)
    ) as run:
        yield lambda server_round, values: run.log(dict(values), step=server_round)


TRACKERS: Mapping[str, Callable[[Path, Config], AbstractContextManager[LogRound]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}
