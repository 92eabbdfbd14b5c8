"""Prompts with their completions: out of JSONL files, from the hub, or made in code.

A line is ``{"prompt": "...", "completion": "..."}`` or ``{"messages": [{"role": "user",
"content": "..."}, ..., {"role": "assistant", "content": "..."}]}``; other keys mean
nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lola_causal.embedded import facts
from lola_flwr.errors import UserError, brief, reason_of
from lola_flwr.machine.files import local_path
from lola_flwr.machine.hub import why_no_hub
from lola_flwr.machine.installation import require_extra

_HUB = "hub:"
# Of data without a held-out file, so many are held out: one in ten, and no more than
# this.
_HELD_OUT_SHARE, _MOST_HELD_OUT = 0.1, 500

Message = tuple[str, str]


@dataclass(frozen=True)
class Record:
    """A prompt and what is to follow it.

    Parameters
    ----------
    where
        File and line that it stands in, for messages.
    prompt, completion
        As texts; of a dialogue the completion is its last message.
    messages
        The dialogue before that, role and text each; none of plain texts.
    """

    where: str
    prompt: str
    completion: str
    messages: tuple[Message, ...] = ()


def load_records(
    data: str, eval_data: str, *, seed: int = 0
) -> tuple[list[Record], list[Record]]:
    """Load what is trained on, and what is held out.

    Parameters
    ----------
    data
        A JSONL file, ``hub:owner/name`` (its split "train"), or "": made in code.
    eval_data
        The same for what is held out; "": a part of ``data``, or its own of what is
        made in code.
    seed
        Seed of what is made in code, and of which part is held out.

    Raises
    ------
    UserError
        Something cannot be read; the line names file and line.
    """
    if not data:
        if eval_data:
            raise UserError(
                f"eval-data={eval_data!r} belongs to data of your own; give data, too."
            )
        made = facts(seed)
        train, held_out = (
            [Record(f"{part} {n}", *pair) for n, pair in enumerate(pairs, 1)]
            for part, pairs in zip(("made", "held out"), made, strict=True)
        )
        return train, held_out
    records = _read(data, "data")
    if eval_data:
        return records, _read(eval_data, "eval-data")
    count = min(_MOST_HELD_OUT, max(1, int(_HELD_OUT_SHARE * len(records))))
    if len(records) < 2:
        raise UserError(
            f"data={data!r} holds {len(records)} line, of which none can be held out; "
            "give eval-data, or more lines."
        )
    order = np.random.default_rng(seed).permutation(len(records))
    return [records[i] for i in order[count:]], [records[i] for i in order[:count]]


def _read(source: str, key: str) -> list[Record]:
    if source.startswith(_HUB):
        return read_hub(source.removeprefix(_HUB))
    return read_jsonl(local_path(source), key)


def read_jsonl(path: Path, key: str = "data") -> list[Record]:
    """Read a JSONL file; lines of white space are passed over.

    Raises
    ------
    UserError
        It cannot be read, or a line is none; the message names file and line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{key}={str(path)!r} cannot be read ({reason_of(error)}); give a JSONL "
            "file of lines with prompt and completion, or with messages."
        ) from None

    def rows() -> Iterator[tuple[str, object]]:
        # Not splitlines, which also ends lines inside of JSON's strings.
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{where}: this is no JSON ({error.msg} at column {error.colno}); "
                    "write one object a line."
                ) from None

    return _records(rows(), str(path))


def read_hub(name: str) -> list[Record]:
    """Read the split "train" of a data set on the Hugging Face hub.

    Raises
    ------
    UserError
        There is no network or no such data set, or its rows are none.
    """
    require_extra("glue", "datasets", f"data='{_HUB}{name}'")
    # Importing it takes seconds.
    import datasets

    try:
        reason = None if datasets.config.HF_HUB_OFFLINE else why_no_hub()
        if reason is not None:
            raise ConnectionError(reason)
        rows = datasets.load_dataset(name, split="train")
    # No such id, no right to it, no network: each has an error of its own.
    except Exception as error:
        raise UserError(
            f"data='{_HUB}{name}' cannot be loaded ({reason_of(error)}); without a "
            "network give a JSONL file, or leave data out."
        ) from error
    places = ((f"{_HUB}{name}:{n}", row) for n, row in enumerate(rows, start=1))
    return _records(places, f"{_HUB}{name}")


def _records(rows: Iterable[tuple[str, object]], source: str) -> list[Record]:
    records = [_record(where, row) for where, row in rows]
    if not records:
        raise UserError(
            f"{source} holds no line; write lines with prompt and completion."
        )
    return records


def _record(where: str, row: object) -> Record:
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: {brief(row)} is no object with keys and values.")
    if "messages" in row:
        if "prompt" in row or "completion" in row:
            raise UserError(
                f"{where}: has messages beside a prompt or a completion; keep one of "
                "the two forms."
            )
        return _dialogue(where, row["messages"])
    return Record(where, _text(where, row, "prompt"), _text(where, row, "completion"))


def _dialogue(where: str, messages: object) -> Record:
    if not isinstance(messages, list) or len(messages) < 2:
        raise UserError(
            f"{where}: messages must be a list of two or more, the last of them the "
            "assistant's."
        )
    spoken = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: {brief(message)} is no message.")
        role = _text(where, message, "role")
        # The prompt may be empty, and so may a system's message.
        spoken.append((role, _text(where, message, "content")))
    (role, completion) = spoken[-1]
    if role != "assistant" or not completion:
        raise UserError(
            f"{where}: the last message is the {role}'s and says {brief(completion)}; "
            "what is to be learned is the assistant's answer, which comes last."
        )
    return Record(where, "", completion, tuple(spoken[:-1]))


def _text(where: str, row: Mapping[Any, object], key: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        said = f"is {brief(value)}" if key in row else "is missing"
        raise UserError(f"{where}: {key} {said}; it must be a text.")
    if key == "completion" and not value:
        raise UserError(f"{where}: completion is empty, so there is nothing to learn.")
    return value
