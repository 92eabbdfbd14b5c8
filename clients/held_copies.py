"""Let a project's own training code be sent what has changed, and no more."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp.typing import ClientAppCallable
from flwr.common import Code, FitRes, Parameters, Status
from flwr.compat.common.recorddict_compat import (
    EMPTY_TENSOR_KEY,
    fitres_to_recorddict,
)

from lola_flwr.clients.received import assignment_in, values_of
from lola_flwr.device.contract import nothing_report
from lola_flwr.device.store import LostCopy, complete, run_store
from lola_flwr.machine.files import replacing
from lola_flwr.wire.records import OURS, REPORT_KEY, Assignment
from lola_flwr.wire.versions import Manifest

_NAMES_FILE = "names.json"
# Where Flower's legacy interface puts what FitIns and FitRes hold.
LEGACY_METRICS = "fitres.metrics"
# Their arrays are numbered, in each message from 0.
_LEGACY_ARRAYS = ("fitins.parameters", "evaluateins.parameters")


def held_mod(
    message: Message,
    context: Context,
    call_next: ClientAppCallable,
    *,
    directory: Path | None = None,
) -> Message:
    """Complete a message from the device's own copies before it is handed on.

    For projects that are sent the whole state dict, whose larger part never changes,
    from a coordinator with ``downlink="changed"``. The first of the mods:
    ``@app.train(mods=[held_mod, block_mod])``, or ``ClientApp(client_fn,
    mods=[held_mod, profile_mod])`` around a client that uses ``AssignedBlock``. Without
    either of these the reply has no report to say in what the device holds, and
    everything is sent in each round, as it is without this mod.

    Parameters
    ----------
    message, context, call_next
        As Flower hands them to a mod.
    directory
        Where the device keeps its copies (default: a directory of this run under
        FLWR_HOME, which a simulation's devices share); give it with
        ``functools.partial``.

    Raises
    ------
    MalformedManifest
        The arrays are not those that the server sent.
    """
    if message.metadata.message_type.partition(".")[0] != MessageType.TRAIN:
        return call_next(message, context)
    assignment = assignment_in(message.content)
    if assignment.manifest is None:
        return call_next(message, context)
    manifest = Manifest.from_text(assignment.manifest)
    directory = run_store(context.run_id) if directory is None else directory
    (key,) = message.content.array_records
    is_legacy = key in _LEGACY_ARRAYS
    try:
        complete_arrays(message.content, manifest, directory)
    except LostCopy:
        content = _nothing(assignment, key, is_legacy=is_legacy)
        return Message(content, reply_to=message)
    reply = call_next(message, context)
    if not reply.has_error():
        report = LEGACY_METRICS if is_legacy else REPORT_KEY
        if report in reply.content.config_records:
            told = reply.content.config_records[report]
            mark = OURS if f"{OURS}update-kind" in told else ""
            told[f"{mark}held"] = manifest.version
    return reply


def complete_arrays(content: RecordDict, manifest: Manifest, directory: Path) -> None:
    """Complete the arrays of a message from the device's own copies, in place.

    Parameters
    ----------
    content
        Content of the message, with one ArrayRecord.
    manifest
        What it leaves out.
    directory
        Where the device keeps its copies.

    Raises
    ------
    LostCopy
        The device lacks what was left out.
    MalformedManifest
        The arrays are not those that the server sent.
    """
    ((key, record),) = content.array_records.items()
    received = [array for name, array in record.items() if name != EMPTY_TENSOR_KEY]
    arrays = complete([*map(values_of, received)], manifest, directory)
    names = (
        [str(number) for number in range(len(arrays))]
        if key in _LEGACY_ARRAYS
        else _all_names(list(record), manifest, directory / _NAMES_FILE)
    )
    as_sent = dict(zip(manifest.sent_positions, received, strict=True))
    completed = ArrayRecord()
    for position, (name, values) in enumerate(zip(names, arrays, strict=True)):
        completed[name] = as_sent[position] if position in as_sent else Array(values)
    content[key] = completed


def _all_names(received: list[str], manifest: Manifest, path: Path) -> list[str]:
    """Return the names of all arrays, which a message that holds all of them told."""
    names: list[str] = []
    with suppress(FileNotFoundError, ValueError):
        names = json.loads(path.read_text(encoding="utf-8"))
    if len(received) == manifest.num_arrays:
        # A file that takes another's place is on the disk first: that takes its time.
        if names != received:
            with replacing(path, shared=True) as unfinished:
                unfinished.write_text(json.dumps(received), encoding="utf-8")
        return received
    if [names[i] for i in manifest.sent_positions if i < len(names)] != received:
        raise LostCopy(f"{path} does not hold this model's names.")
    return names


def _nothing(assignment: Assignment, key: str, *, is_legacy: bool) -> RecordDict:
    report = nothing_report(assignment).to_record()
    if is_legacy:
        empty = Parameters(tensors=[], tensor_type="numpy.ndarray")
        result = FitRes(Status(Code.OK, ""), empty, 0, report)
        return fitres_to_recorddict(result, keep_input=False)
    return RecordDict(
        {
            key: ArrayRecord({}),
            "metrics": MetricRecord({"num-examples": 0}),
            REPORT_KEY: ConfigRecord({**report}),
        }
    )
