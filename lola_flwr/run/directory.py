"""A run's directory: what describes it, its rounds and checkpoints, and going on."""

from __future__ import annotations

import copy
import errno
import fcntl
import json
import logging
import os
import platform
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any, Protocol, Self

import numpy as np

from lola_flwr.errors import UserError, without_directories
from lola_flwr.machine.files import filling, local_path, replacing, writing
from lola_flwr.run.checkpoint import Checkpoints, Snapshot
from lola_flwr.run.digest import data_digest
from lola_flwr.run.records import Record
from lola_flwr.run.round_log import RoundLog

# Flower's, which goes into the run's output.
_logger = logging.getLogger("flwr")
_PACKAGES = ("lola-flwr", "flwr", "torch", "transformers", "numpy")

# A run's records name devices, with what their data led to.
_OWNER_ALONE = 0o700

Scalar = bool | float | int | str


class Resumable(Protocol):
    """What holds all that the rounds to come depend on."""

    @property
    def server_round(self) -> int:
        """Last complete round."""

    def snapshot(self) -> Snapshot:
        """Return it."""

    def restore(self, snapshot: Snapshot) -> None:
        """Go on from what was returned."""


class RunDirectory:
    """Keeps a run's records and checkpoints; a run started in it again goes on.

    Where there is a checkpoint, the coordinator is set to it, and the run does the
    rounds that are left. A checkpoint is written while the next round runs, from a
    copy: a crash costs the round that it strikes, and the one before where that was not
    yet written. The run ends with the values, bit for bit, of one that was never
    stopped, where seed and devices are the same, their compute times simulated, and the
    codec keeps nothing on a device (a measured time never comes twice, and what "int8"
    and "topk" left out is lost with the round that was cut off)::

        with RunDirectory(path, coordinator, configuration=config) as files:
            strategy = LoLaDeft(coordinator, on_round=files.on_round)
            ...

    Parameters
    ----------
    path
        The directory; it is made. One process at a time can run in it.
    resumable
        The run's coordinator, or D2FT's trainer, before its first round.
    configuration
        What the run's results depend on. A run is only resumed with the same.
    data
        Digest of its data, as of `lola_flwr.run.digest.data_digest`; "" if it is not
        known. A run is only resumed on the same, unless ``other_data`` allows it.
    other_data
        Whether the run may go on with other data.
    keep
        Checkpoints to keep, at least 1; older ones are removed.
    every
        Rounds from one checkpoint to the next: as many are repeated after a crash.
    last
        The run's last round, after which there is one as well.

    Raises
    ------
    UserError
        The directory holds a run of another configuration or data, is in use, holds
        no checkpoint that can be read, or cannot be written; or `every` is below 1.
    """

    def __init__(
        self,
        path: Path,
        resumable: Resumable,
        *,
        configuration: Mapping[str, Scalar],
        data: str = "",
        other_data: bool = False,
        keep: int = 3,
        every: int = 1,
        last: int | None = None,
    ) -> None:
        if every < 1:
            raise UserError(f"every={every} must be at least 1.")
        with filling(path, mode=_OWNER_ALONE), writing(path / "lock"):
            self._lock = (path / "lock").open("a")
        _lock(self._lock, path)
        self._resumable = resumable
        self._configuration, self._data = _without_paths(configuration), data
        self._every, self._last = every, last
        self._checkpoints = Checkpoints(path / "checkpoints", keep)
        self._writer = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[Path] | None = None
        found, damaged = self._checkpoints.latest()
        for line in damaged:
            _logger.warning("checkpoint passed over: %s", line)
        if found is None:
            if damaged:
                raise UserError(
                    f"None of the {len(damaged)} checkpoints in {path} can be read; "
                    "give this run another output directory to start anew."
                )
            self.log = RoundLog(path / "rounds.jsonl")
            self._save(0)
            self._settle()
            return
        self._require_same_configuration(path, found, configuration)
        if not other_data:
            self._require_same_data(path, found)
        resumable.restore(found)
        self.log = RoundLog(path / "rounds.jsonl", found.values["log_bytes"])
        _logger.info(
            "going on after round %s in %s", resumable.server_round, told(path)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self._settle()
        except UserError as error:
            # What ended the run is the news.
            if kind is None:
                raise
            _logger.warning("%s", error)
        finally:
            self._writer.shutdown()
            self._lock.close()
            say_where(self.log.path)

    def on_round(self, record: Record, *, is_last: bool = False) -> None:
        """Write a round's record, and begin a checkpoint if it is time for one.

        Parameters
        ----------
        record
            The record.
        is_last
            Whether the run ends here, before its last round.

        Raises
        ------
        UserError
            The record, or the checkpoint before, cannot be written, as on a full disk.
            The run can be gone on with from the last that was.
        """
        log_bytes = self.log.append(record)
        done = record.server_round
        if is_last or done % self._every == 0 or done == self._last:
            self._save(log_bytes)

    def _save(self, log_bytes: int) -> None:
        snapshot = self._resumable.snapshot()
        values = {
            "configuration": self._configuration,
            "data": self._data,
            "log_bytes": log_bytes,
            **snapshot.values,
        }
        self._settle()
        # The next round steps the values while these are written. Most of a copy's time
        # the system takes to find memory for it, for each thread by itself.
        with ThreadPoolExecutor() as copying:
            copies = copying.map(np.array, snapshot.arrays.values())
            arrays = dict(zip(snapshot.arrays, copies, strict=True))
        self._written = self._writer.submit(
            self._checkpoints.save,
            self._resumable.server_round,
            Snapshot(arrays, copy.deepcopy(values)),
        )

    def _settle(self) -> None:
        """Wait until the last checkpoint is on the disk, or say why it cannot be."""
        written, self._written = self._written, None
        if written is not None:
            written.result()

    def _require_same_configuration(
        self, path: Path, found: Snapshot, whole: Mapping[str, Scalar]
    ) -> None:
        then, now = found.values["configuration"], self._configuration
        different = [
            f"{key}={now.get(key)!r} instead of {then.get(key)!r}"
            for key in sorted(then.keys() | now.keys())
            # Earlier versions kept whole paths.
            if then.get(key) not in (now.get(key), whole.get(key))
        ]
        if different:
            raise UserError(
                f"{path} holds a run with another configuration: "
                f"{'; '.join(different)}. Give it the same to go on with it, or give "
                "this run another output directory."
            )

    def _require_same_data(self, path: Path, found: Snapshot) -> None:
        # Earlier versions did not keep it.
        then, now = found.values.get("data", ""), self._data
        if then and now and then != now:
            raise UserError(
                f"{path} holds a run on other data, of digest {then}, not {now}. Give "
                "it the same to go on with it, or other-data=true to go on with these."
            )


def _lock(file: IO[str], path: Path) -> None:
    """Take a run directory for this process, or warn where that cannot be done."""
    try:
        # The system gives it back when the process ends, however it ends.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # EACCES: where flock is made of fcntl's locks.
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise UserError(
                f"Another process runs in {path}; wait for it, or give this run "
                "another output directory."
            ) from None
        # NFS without lockd, Lustre without -o flock, some FUSE file systems.
        _logger.warning(
            "the file system of %s has no locks (%s): see that no other run uses it",
            told(path),
            error.strerror,
        )


def say_where(rounds: Path) -> None:
    """Log where a run's rounds are, if there are any, and how to get its report.

    Parameters
    ----------
    rounds
        The file of them.
    """
    # A run that fails in its first round leaves an empty file.
    if rounds.is_file() and rounds.stat().st_size:
        where = told(rounds.parent)
        _logger.info(
            "rounds are in %s/%s; for their report: lola-flwr report %s",
            where,
            rounds.name,
            where,
        )


def told(directory: Path) -> str:
    """Return what a run's log may say of its directory: others read it, too.

    That is its name alone, which a user has given; or where it is in Flower's home, as
    a shell on the same host understands it.
    """
    home = os.environ.get("FLWR_HOME")
    if directory.is_relative_to(_flower_home()):
        within = directory.relative_to(_flower_home())
        return f"{'~/.flwr' if home is None else '$FLWR_HOME'}/{within}"
    return f"…/{directory.name}"


def _without_paths(configuration: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return what a checkpoint keeps of a configuration: of a path a digest."""
    kept = {key: without_directories(value) for key, value in configuration.items()}
    return {
        key: value if kept[key] == value else f"{kept[key]} ({data_digest([value])})"
        for key, value in configuration.items()
    }


def _flower_home() -> Path:
    return local_path(os.environ.get("FLWR_HOME", "~/.flwr"))


def run_directory(output_dir: str, run_id: int) -> Path:
    """Return where a run's files go.

    Parameters
    ----------
    output_dir
        What the run configuration says; "" for ``lola-flwr/<run id>`` under FLWR_HOME.
    run_id
        Flower's number of the run.
    """
    if output_dir:
        return local_path(output_dir).absolute()
    return _flower_home() / "lola-flwr" / str(run_id)


def describe_run(
    directory: Path, *, app: str, config: Mapping[str, Any], server_round: int = 0
) -> None:
    """Write ``run.json``: what was run, how it was configured, and with what versions.

    A run that goes on keeps the time that it began. Where versions have changed since,
    ``earlier_versions`` has those before, each with the rounds that were complete.

    Parameters
    ----------
    directory
        The run's directory; it is made.
    app
        Name of the app.
    config
        Its run configuration.
    server_round
        Rounds that are complete.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    path = directory / "run.json"
    before = _described(path)
    versions = {
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }
    earlier = [*before.get("earlier_versions", ())]
    then = before.get("versions", versions)
    if server_round and then != versions:
        earlier.append({"through_round": server_round, **then})
        changed = (f"{n} {then.get(n)}" for n in versions if then.get(n) != versions[n])
        _logger.warning(
            "rounds up to %s were run with %s: those from here on may differ from what "
            "they would have been",
            server_round,
            ", ".join(changed),
        )
    description = {
        "app": app,
        "config": dict(config),
        "started": before.get("started") or datetime.now(UTC).isoformat("T", "seconds"),
        "versions": versions,
        **({"earlier_versions": earlier} if earlier else {}),
    }
    text = json.dumps(description, indent=2) + "\n"
    with (
        filling(directory, mode=_OWNER_ALONE),
        replacing(directory / "run.json") as unfinished,
    ):
        unfinished.write_text(text, encoding="utf-8")


def _described(path: Path) -> dict[str, Any]:
    """Return what describes a run; empty if nothing does."""
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return description if isinstance(description, dict) else {}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
