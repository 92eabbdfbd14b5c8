"""Reading labelled sentences from GLUE's TSV files and from the hub.

GLUE's files are tab-separated without quoting: a quote is an ordinary character, and
some sentences hold an unbalanced one. Source of the formats: the files themselves,
https://gluebenchmark.com/tasks. Files that a CSV writer made of them, such as pandas'
``to_csv``, have quotes around some fields and double those inside; they are told by
that.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lola_flwr.errors import UserError

logger = logging.getLogger(__name__)

Labels = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Sentences = tuple[str, str | None]


class TaskError(UserError):
    """The task or its data cannot be used; the message says what to do."""


@dataclass(frozen=True)
class Examples:
    """Labelled sentences, or pairs of sentences.

    Parameters
    ----------
    sentences
        First and second sentence of each example, length M; the second is None in a
        task on single sentences.
    labels
        Class index (int64) or score (float64) of each example, shape [M].
    groups
        Name of the group that each example belongs to, length M, or empty.
    """

    sentences: tuple[Sentences, ...]
    labels: Labels
    groups: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse parts that do not match."""
        num_examples = len(self.sentences)
        if self.labels.shape != (num_examples,):
            raise ValueError(
                f"Shape mismatch: labels is {list(self.labels.shape)} but there are "
                f"{num_examples} sentences; give one label per example."
            )
        if self.groups and len(self.groups) != num_examples:
            raise ValueError(
                f"Length mismatch: groups={len(self.groups)} names but there are "
                f"{num_examples} sentences; give one name per example, or none."
            )

    def __len__(self) -> int:
        """Count the examples."""
        return len(self.sentences)

    def rows(self) -> Iterator[tuple[Sentences, int | float]]:
        """Give each example's sentences and its label."""
        return zip(self.sentences, self.labels.tolist(), strict=True)

    def at(self, indices: npt.NDArray[np.integer]) -> Examples:
        """Return some of the examples, without their groups."""
        sentences = tuple(self.sentences[int(index)] for index in indices)
        return Examples(sentences, self.labels[indices])


@dataclass(frozen=True)
class LabelCodec:
    """The labels of a task as they are written in its files.

    Parameters
    ----------
    names
        Spelling of class 0, 1, ...; empty for a regression.
    bounds
        Lowest and highest score of a regression.
    """

    names: tuple[str, ...] = ("0", "1")
    bounds: tuple[float, float] = (0.0, 5.0)

    def decode(self, text: str) -> int | float | None:
        """Give the label, or None if the text is not one."""
        if self.names:
            return self.names.index(text) if text in self.names else None
        try:
            value = float(text)
        except ValueError:
            return None
        low, high = self.bounds
        return value if low <= value <= high else None

    def describe(self) -> str:
        """Say what a label looks like."""
        if self.names:
            return " or ".join(self.names)
        return f"a number from {self.bounds[0]:g} to {self.bounds[1]:g}"

    def array(self, labels: list[int | float]) -> Labels:
        """Make the labels an array of the right kind, [M]."""
        if self.names:
            return np.asarray(labels, dtype=np.int64)
        return np.asarray(labels, dtype=np.float64)


@dataclass(frozen=True)
class TsvFormat:
    """Where a task's files keep the sentences and the label.

    Parameters
    ----------
    columns
        Names of the sentence columns, then of the label column.
    labels
        Spelling of the labels.
    header
        The columns of a file without a header line, in order; empty where the file's
        first line names them.
    max_bad_rows
        Rows with a missing field or sentence that are left out with a warning; one
        more is an error. Only QQP's official files have such rows (a handful, which
        the hub's copy of GLUE leaves out as well).
    """

    columns: tuple[str, ...]
    labels: LabelCodec = LabelCodec()
    header: tuple[str, ...] = ()
    max_bad_rows: int = 0


# A whole field in quotes with doubled ones in it, as CSV writers make it of a sentence
# with a quote; and a first field in quotes, where GLUE has a column's name or a source.
_DOUBLED = re.compile(
    r'(?:^|(?<=[\t\r\n]))"(?=[^"\t\r\n]*"")(?:[^"\t\r\n]++|"")*+"(?=[\t\r\n]|\Z)'
)
_QUOTED_START = re.compile(r'"(?:[^"\t\r\n]++|"")*+"(?=[\t\r\n])')
# What a CSV writer can have written: no quote but around fields, and doubled in these.
_FIELD = r'(?:"(?:[^"]++|"")*+"|[^"\t\r\n]*+)'
_WRITTEN_AS_CSV = re.compile(rf"(?:{_FIELD}(?:\t|\r\n?|\n))*+{_FIELD}")


def _is_csv(path: Path, text: str) -> bool:
    """Tell whether a CSV writer has put quotes around fields of a file."""
    doubled = _DOUBLED.search(text)
    if not (doubled or _QUOTED_START.match(text)):
        return False
    if _WRITTEN_AS_CSV.fullmatch(text):
        logger.info("%s: read as CSV, without the quotes around fields", path)
        return True
    if doubled:
        line = len(re.findall(r"\r\n?|\n", text[: doubled.start()])) + 1
        logger.warning(
            "%s, line %d: a field has doubled quotes, as CSV writers make them, but "
            "others of this file have plain ones: all are read as they stand",
            path,
            line,
        )
    return False


def _shorten(text: str, width: int = 40) -> str:
    """Quote a value for a one-line message."""
    return repr(text if len(text) <= width else f"{text[:width]}...")


def _column_positions(
    path: Path, header: list[str], columns: tuple[str, ...]
) -> tuple[int, ...]:
    """Find the columns by name."""
    missing = [name for name in columns if name not in header]
    if missing:
        found = ", ".join(_shorten(name) for name in header[:12])
        raise TaskError(
            f"Column missing: {path}, line 1: expected {missing[0]!r} in the header, "
            f"found {found}. Use the task's own TSV file, with its header line."
        )
    return tuple(header.index(name) for name in columns)


def _parse_rows(
    path: Path, rows: Iterable[tuple[int, list[str]]], layout: TsvFormat
) -> Examples:
    """Turn numbered rows into examples."""
    rows = iter(rows)
    header = list(layout.header) or next(rows, (1, []))[1]
    if not header:
        raise TaskError(
            f"Empty file: {path} has no line. Put the task's TSV file there."
        )
    positions = _column_positions(path, header, layout.columns)
    sentences: list[Sentences] = []
    labels: list[int | float] = []
    bad_lines: list[int] = []
    for line, row in rows:
        problem = None
        if len(row) != len(header):
            problem = (
                f"expected {len(header)} tab-separated fields "
                f"({', '.join(header)}), found {len(row)}"
            )
        else:
            *texts, label_text = (row[position] for position in positions)
            empty = [
                name
                for name, text in zip(layout.columns, texts, strict=False)
                if not text.strip()
            ]
            if empty:
                problem = f"expected a sentence in {empty[0]!r}, found nothing"
        if problem is not None:
            bad_lines.append(line)
            if len(bad_lines) > layout.max_bad_rows:
                raise TaskError(
                    f"Malformed row: {path}, line {line}: {problem}. "
                    "Correct or remove that line."
                )
            continue
        label = layout.labels.decode(label_text)
        if label is None:
            raise TaskError(
                f"Bad label: {path}, line {line}: expected "
                f"{layout.labels.describe()}, found {_shorten(label_text)}. "
                "Correct or remove that line."
            )
        sentences.append((texts[0], texts[1] if len(texts) > 1 else None))
        labels.append(label)
    if bad_lines:
        logger.warning("%s: left out malformed lines %s", path, bad_lines)
    if not sentences:
        raise TaskError(
            f"Empty file: {path} holds no example. Put the task's TSV file there."
        )
    return Examples(tuple(sentences), layout.labels.array(labels))


def read_tsv(path: Path, layout: TsvFormat) -> Examples:
    r"""Read one TSV file of a GLUE task.

    Lines end at ``\n``, ``\r\n`` or ``\r``; other characters that Unicode calls line
    breaks (U+0085, U+2028) are part of the sentence. A byte-order mark at the start
    and blank lines are skipped. Quotes are ordinary characters, unless a CSV writer has
    written the file.

    Parameters
    ----------
    path
        The file, in UTF-8.
    layout
        Its columns and labels.

    Returns
    -------
    The examples, in the file's order.

    Raises
    ------
    TaskError
        If the file is missing, empty or not UTF-8, lacks a column, or has a malformed
        row or label; names the file and the line.
    """
    try:
        # newline="" leaves line ends to the csv reader, as its documentation asks;
        # utf-8-sig drops the byte-order mark of MRPC.
        with path.open(encoding="utf-8-sig", newline="") as file:
            text = file.read()
        reader = csv.reader(
            io.StringIO(text, newline=""),
            delimiter="\t",
            quoting=csv.QUOTE_MINIMAL if _is_csv(path, text) else csv.QUOTE_NONE,
        )
        numbered = ((reader.line_num, row) for row in reader if row)
        return _parse_rows(path, numbered, layout)
    except OSError as error:
        raise TaskError(
            f"File cannot be read: {path} ({error.strerror}). data-dir must be a GLUE "
            "directory: one folder per task, each with its train and dev TSV files."
        ) from error
    except UnicodeDecodeError as error:
        raise TaskError(
            f"File is not UTF-8: {path}, byte 0x{error.object[error.start]:02x} "
            f"({error.reason}). Convert it to UTF-8."
        ) from error
    except csv.Error as error:
        raise TaskError(
            f"Malformed row: {path}, line {reader.line_num}: {error}. "
            "Correct or remove that line."
        ) from error


def read_hub(
    config: str,
    columns: tuple[str, ...],
    split: str,
    labels: LabelCodec,
    class_names: tuple[str, ...] = (),
) -> Examples:
    """Read one split of GLUE from the Hugging Face hub.

    Parameters
    ----------
    config
        Name of the task in ``nyu-mll/glue``.
    columns
        Its sentence columns there.
    split
        Name of the split there.
    labels
        The task's labels.
    class_names
        What class 0, 1, ... means; the hub must number them alike.

    Returns
    -------
    The examples, in the hub's order.

    Raises
    ------
    TaskError
        If the hub cannot be reached, or numbers the classes otherwise; names the
        options that need no network.
    """
    # It takes longer to import than all else that a configuration is checked with.
    import datasets

    try:
        rows = datasets.load_dataset("nyu-mll/glue", config, split=split)
    # What "no network" raises depends on how far the download got (datasets,
    # huggingface_hub and its HTTP library each have their own), so all are caught.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise TaskError(
            f"Hub unreachable: task={config!r}, data-dir='hub': "
            f"{type(error).__name__}: {_shorten(reason, 160)}. Offline, give a GLUE "
            'directory with data-dir="...", or use task="acceptability", which '
            "needs no data."
        ) from error
    names = tuple(getattr(rows.features["label"], "names", None) or class_names)
    if names != class_names:
        raise TaskError(
            f"Other classes: the hub's {config!r} numbers them {', '.join(names)}, "
            f"expected {', '.join(class_names) or 'scores'}. Give a GLUE directory "
            'with data-dir="...".'
        )
    return _hub_examples(rows, columns, labels)


def _hub_examples(
    rows: Iterable[Mapping[str, str | int | float]],
    columns: tuple[str, ...],
    labels: LabelCodec,
) -> Examples:
    """Turn the hub's rows into examples."""
    sentences: list[Sentences] = []
    values: list[int | float] = []
    for row in rows:
        texts = [str(row[column]) for column in columns]
        sentences.append((texts[0], texts[1] if len(texts) > 1 else None))
        label = row["label"]
        values.append(float(label) if not labels.names else int(label))
    return Examples(tuple(sentences), labels.array(values))
