"""GLUE tasks by name: their data, and which metrics they have.

One list, `TASKS`, says everything about a task that the rest of the app needs: its
labels, its metrics, its folder and columns in GLUE's TSV files, and its columns on
the hub.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lola_flwr.machine.files import local_path
from lola_glue.acceptability import MinimalPair, minimal_pairs
from lola_glue.readers import (
    Examples,
    LabelCodec,
    TaskError,
    TsvFormat,
    read_hub,
    read_tsv,
)
from lola_glue.vocabulary import DEV_VOCABULARY, TRAIN_VOCABULARY

__all__ = [
    "HUB",
    "TASKS",
    "Examples",
    "Task",
    "TaskError",
    "find_task",
    "load_task",
]

HUB = "hub"
"""The ``data_dir`` that stands for GLUE on the Hugging Face hub."""


@dataclass(frozen=True)
class GlueSource:
    """Where a GLUE task's data are.

    Parameters
    ----------
    folder
        Its folder in a GLUE directory.
    layout
        Format of its TSV files.
    hub_config
        Its name in the hub's ``nyu-mll/glue``.
    hub_columns
        Its sentence columns there.
    dev_suffix
        What GLUE adds to the name of the dev split.
    """

    folder: str
    layout: TsvFormat
    hub_config: str
    hub_columns: tuple[str, ...]
    dev_suffix: str = ""


@dataclass(frozen=True)
class Task:
    """A task: its labels, its metrics and the source of its data.

    Parameters
    ----------
    name
        Canonical name, in lower case.
    class_names
        What class 0, 1, ... means; empty for a regression.
    is_pair
        Whether an example is two sentences.
    metrics
        Names of the metrics; the first is the primary one.
    source
        Where its data are; None if they are generated.
    """

    name: str
    class_names: tuple[str, ...]
    is_pair: bool
    metrics: tuple[str, ...]
    source: GlueSource | None = None

    @property
    def num_labels(self) -> int:
        """Number of classes; 1 for a regression."""
        return len(self.class_names) or 1

    @property
    def is_regression(self) -> bool:
        """Whether the label is a score rather than a class."""
        return not self.class_names

    @property
    def primary_metric(self) -> str:
        """Give the metric that the task is judged by."""
        return self.metrics[0]


_MATTHEWS = ("matthews_correlation",)
_ACCURACY = ("accuracy",)
_ACCURACY_F1 = ("accuracy", "f1")
_CORRELATIONS = ("pearson", "spearman")

_PAIR = ("sentence1", "sentence2")

_ACCEPTABILITY = ("unacceptable", "acceptable")
_INFERENCE = ("entailment", "neutral", "contradiction")
_ENTAILMENT = ("entailment", "not_entailment")

# Class numbers and names, metrics and hub columns: https://huggingface.co/datasets/nyu-mll/glue
_ALL_TASKS = (
    Task("acceptability", _ACCEPTABILITY, False, _ACCURACY),
    Task(
        "cola",
        _ACCEPTABILITY,
        False,
        _MATTHEWS,
        GlueSource(
            "CoLA",
            TsvFormat(
                ("sentence", "label"), header=("source", "label", "note", "sentence")
            ),
            "cola",
            ("sentence",),
        ),
    ),
    Task(
        "sst-2",
        ("negative", "positive"),
        False,
        _ACCURACY,
        GlueSource("SST-2", TsvFormat(("sentence", "label")), "sst2", ("sentence",)),
    ),
    Task(
        "mrpc",
        ("not_equivalent", "equivalent"),
        True,
        _ACCURACY_F1,
        GlueSource(
            "MRPC", TsvFormat(("#1 String", "#2 String", "Quality")), "mrpc", _PAIR
        ),
    ),
    Task(
        "qqp",
        ("not_duplicate", "duplicate"),
        True,
        _ACCURACY_F1,
        GlueSource(
            "QQP",
            TsvFormat(("question1", "question2", "is_duplicate"), max_bad_rows=10),
            "qqp",
            ("question1", "question2"),
        ),
    ),
    Task(
        "sts-b",
        (),
        True,
        _CORRELATIONS,
        GlueSource(
            "STS-B", TsvFormat((*_PAIR, "score"), LabelCodec(())), "stsb", _PAIR
        ),
    ),
    Task(
        "mnli",
        _INFERENCE,
        True,
        _ACCURACY,
        GlueSource(
            "MNLI",
            TsvFormat(
                (*_PAIR, "gold_label"),
                LabelCodec(_INFERENCE),
            ),
            "mnli",
            ("premise", "hypothesis"),
            dev_suffix="_matched",
        ),
    ),
    Task(
        "qnli",
        _ENTAILMENT,
        True,
        _ACCURACY,
        GlueSource(
            "QNLI",
            TsvFormat(("question", "sentence", "label"), LabelCodec(_ENTAILMENT)),
            "qnli",
            ("question", "sentence"),
        ),
    ),
    Task(
        "rte",
        _ENTAILMENT,
        True,
        _ACCURACY,
        GlueSource(
            "RTE", TsvFormat((*_PAIR, "label"), LabelCodec(_ENTAILMENT)), "rte", _PAIR
        ),
    ),
    Task(
        "wnli",
        ("not_entailment", "entailment"),
        True,
        _ACCURACY,
        GlueSource("WNLI", TsvFormat((*_PAIR, "label")), "wnli", _PAIR),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _ALL_TASKS}
"""Every task by its canonical name."""


def _spelling_key(name: str) -> str:
    """Drop what spellings of one task differ in: SST-2, sst2 and sst_2 are one."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


def find_task(name: str) -> Task:
    """Find a task by its name, in any case, with or without hyphen.

    Parameters
    ----------
    name
        Canonical name, or GLUE's or the hub's spelling.

    Returns
    -------
    The task.

    Raises
    ------
    TaskError
        If there is no such task; names the nearest one.
    """
    by_key = {_spelling_key(task): task for task in TASKS}
    key = _spelling_key(name)
    if key in by_key:
        return TASKS[by_key[key]]
    nearest = difflib.get_close_matches(key, by_key, n=1)
    hint = f'Did you mean "{by_key[nearest[0]]}"? ' if nearest else ""
    raise TaskError(
        f"Unknown task: task={name!r}. {hint}Use one of {', '.join(TASKS)}."
    )


def _pair_examples(pairs: tuple[MinimalPair, ...], seed: int) -> Examples:
    """Both members of each pair as separate examples, in random order."""
    rows = [
        (sentence, label, pair.phenomenon)
        for pair in pairs
        for sentence, label in ((pair.acceptable, 1), (pair.unacceptable, 0))
    ]
    order = np.random.default_rng(seed).permutation(len(rows))
    return Examples(
        sentences=tuple((rows[i][0], None) for i in order),
        labels=np.asarray([rows[i][1] for i in order], dtype=np.int64),
        groups=tuple(rows[i][2] for i in order),
    )


def _generate(num_examples: int, field: str, seed: int) -> Examples:
    """Generate one split of the acceptability task."""
    if num_examples < 2 or num_examples % 2:
        raise TaskError(
            f"Uneven split: {field}={num_examples} examples, must be even and "
            "positive (each pair gives one of either label). Change it by one."
        )
    is_train = field == "num_train"
    vocabulary = TRAIN_VOCABULARY if is_train else DEV_VOCABULARY
    try:
        # The vocabularies do not overlap, so one seed for both splits is safe.
        pairs = minimal_pairs(vocabulary, num_examples // 2, seed)
    except ValueError as error:
        raise TaskError(f"{field}={num_examples}: {error}") from error
    return _pair_examples(pairs, seed)


def load_task(
    name: str,
    data_dir: str | Path | None = None,
    *,
    num_train: int = 4000,
    num_dev: int = 600,
    seed: int = 0,
) -> tuple[Task, Examples, Examples]:
    """Load a task with its training and dev examples.

    Parameters
    ----------
    name
        Name of the task, as `find_task` takes it.
    data_dir
        A GLUE directory in the standard layout, or "hub"; None (or "") only for
        "acceptability", which has no use for it.
    num_train, num_dev
        Sizes of the generated splits of "acceptability"; other tasks are read whole.
    seed
        Seed of the generated sentences.

    Returns
    -------
    The task, its training examples, its dev examples.

    Raises
    ------
    TaskError
        If the task is unknown or its data cannot be read.
    """
    task = find_task(name)
    source = task.source
    if source is None:
        train = _generate(num_train, "num_train", seed)
        return task, train, _generate(num_dev, "num_dev", seed)
    if str(data_dir) == HUB:
        codec = source.layout.labels
        train, dev = (
            read_hub(
                source.hub_config, source.hub_columns, split, codec, task.class_names
            )
            for split in ("train", f"validation{source.dev_suffix}")
        )
        return task, train, dev
    train, dev = (
        read_tsv(path, source.layout) for path in _task_files(task, source, data_dir)
    )
    return task, train, dev


def check_data(name: str, data_dir: str | Path | None = None) -> None:
    """Check that a task's data are there, and read the dev examples, which are few.

    Parameters
    ----------
    name, data_dir
        As for `load_task`.

    Raises
    ------
    TaskError
        The task is unknown, a file is missing, or the dev examples cannot be read.
    """
    task = find_task(name)
    source = task.source
    if source is None or str(data_dir) == HUB:
        return
    train, dev = _task_files(task, source, data_dir)
    read_tsv(dev, source.layout)
    if not train.is_file():
        raise TaskError(
            f"File missing: {train} is not there, but {dev.name} beside it is. Put the "
            "task's training examples there."
        )


def _task_files(
    task: Task, source: GlueSource, data_dir: str | Path | None
) -> tuple[Path, Path]:
    """Return where a task's training and dev examples are to be."""
    if not data_dir:
        raise TaskError(
            f"No data: task={task.name!r} needs data-dir. Give a GLUE directory with "
            f'data-dir="...", or data-dir="{HUB}" to download it, or use '
            'task="acceptability", which needs no data.'
        )
    folder = _task_folder(local_path(data_dir), source.folder)
    return folder / "train.tsv", folder / f"dev{source.dev_suffix}.tsv"


def _task_folder(data_dir: Path, folder: str) -> Path:
    """Find the task's folder in a GLUE directory, in any case."""
    if not data_dir.is_dir():
        raise TaskError(
            f"Directory missing: data-dir={str(data_dir)!r} is not a directory. Give "
            f'the GLUE directory that holds {folder}, or task="acceptability".'
        )
    try:
        entries = sorted(data_dir.iterdir())
    except OSError as error:
        raise TaskError(
            f"Directory cannot be read: data-dir={str(data_dir)!r} "
            f"({error.strerror}). Check its permissions."
        ) from error
    for entry in entries:
        if entry.name.lower() == folder.lower():
            return entry
    raise TaskError(
        f"Directory missing: data-dir={str(data_dir)!r} holds no {folder}. Put "
        f"{folder}'s TSV files there, or choose another task."
    )
