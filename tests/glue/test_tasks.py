"""GLUE's tasks: by name, from the hub, their classes and labels."""

import os

import datasets
import numpy as np
import pytest

from lola_flwr.run.digest import data_digest
from lola_glue.readers import LabelCodec
from lola_glue.tasks import TASKS, Examples, TaskError, find_task, load_task
from tests.glue.refusals import refused


class TestFindTask:
    @pytest.mark.parametrize("name", TASKS)
    def test_canonical_name(self, name):
        assert find_task(name).name == name

    @pytest.mark.parametrize(
        ("spelling", "name"),
        [
            ("CoLA", "cola"),
            ("SST-2", "sst-2"),
            ("sst2", "sst-2"),
            ("STS-B", "sts-b"),
            ("stsb", "sts-b"),
            ("MNLI", "mnli"),
            ("Acceptability", "acceptability"),
        ],
    )
    def test_other_spellings(self, spelling, name):
        assert find_task(spelling).name == name

    def test_unknown_task_names_the_nearest(self):
        with pytest.raises(TaskError, match=r"task='colla'.*\"cola\""):
            find_task("colla")

    @pytest.mark.parametrize("name", ["zzz", "", "--", "\n"])
    def test_unknown_task_lists_all(self, name):
        with pytest.raises(TaskError, match="acceptability, cola, sst-2") as caught:
            find_task(name)
        assert "\n" not in str(caught.value)

    def test_facts_of_the_tasks(self):
        # Table 1 of https://arxiv.org/abs/1804.07461 (GLUE).
        assert TASKS["cola"].primary_metric == "matthews_correlation"
        assert TASKS["sts-b"].metrics == ("pearson", "spearman")
        assert TASKS["sts-b"].is_regression
        assert TASKS["mnli"].num_labels == 3
        for name in ("mrpc", "qqp"):
            assert TASKS[name].metrics == ("accuracy", "f1")
        single = {name for name, task in TASKS.items() if not task.is_pair}
        assert single == {"acceptability", "cola", "sst-2"}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_classes_have_names(task):
    assert task.num_labels == (len(task.class_names) or 1)
    assert task.is_regression == (task.name == "sts-b")
    assert len(set(task.class_names)) == len(task.class_names)
    if task.source is not None and "0" not in task.source.layout.labels.names:
        assert task.source.layout.labels.names == task.class_names


class TestHub:
    def test_asks_for_the_hubs_names(self, monkeypatch):
        calls = []

        def load_dataset(*arguments, **options):
            calls.append((*arguments, options["split"]))
            rows = {"premise": ["A."], "hypothesis": ["B."], "label": [2]}
            return datasets.Dataset.from_dict(rows)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        _, train, _ = load_task("mnli", "hub")
        assert calls == [
            ("nyu-mll/glue", "mnli", "train"),
            ("nyu-mll/glue", "mnli", "validation_matched"),
        ]
        assert train.sentences == (("A.", "B."),)
        assert train.labels.tolist() == [2]

    def test_labels_keep_their_kind(self, monkeypatch):
        rows = {"sentence1": ["A."], "sentence2": ["B."], "label": [1]}
        monkeypatch.setattr(
            datasets,
            "load_dataset",
            lambda *_, **__: datasets.Dataset.from_dict(rows),
        )
        assert load_task("rte", "hub")[1].labels.dtype == np.int64
        assert load_task("sts-b", "hub")[1].labels.dtype == np.float64

    @pytest.mark.parametrize("name", ["mnli", "wnli"])
    def test_classes_are_numbered_alike(self, name, monkeypatch):
        names = TASKS[name].class_names
        columns = TASKS[name].source.hub_columns

        def dataset(names):
            rows = {name: ["A."] for name in columns} | {"label": [1]}
            kinds = dict.fromkeys(columns, datasets.Value("string"))
            kinds["label"] = datasets.ClassLabel(names=list(names))
            return datasets.Dataset.from_dict(rows, datasets.Features(kinds))

        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: dataset(names))
        assert load_task(name, "hub")[1].labels.tolist() == [1]
        other = dataset(names[::-1])
        monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: other)
        refused(
            name, "hub", match=f"Other classes: .*{names[-1]}, .*expected {names[0]}"
        )

    def test_unreachable_names_the_offline_options(self, monkeypatch):
        def load_dataset(*_, **__):
            raise ConnectionError("Couldn't reach\nthe Hub")

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        message = refused("rte", "hub", match="Hub unreachable: task='rte'")
        assert 'data-dir="' in message
        assert 'task="acceptability"' in message


class TestExamples:
    def test_parts_must_match(self):
        with pytest.raises(ValueError, match=r"labels is \[2\]"):
            Examples((("a", None),), np.array([0, 1]))
        with pytest.raises(ValueError, match="groups=2"):
            Examples((("a", None),), np.array([0]), ("x", "y"))


class TestLabelCodec:
    def test_every_name_decodes_to_its_class(self):
        codec = LabelCodec(("no", "yes"))
        assert [codec.decode(text) for text in ("no", "yes", "No")] == [0, 1, None]

    def test_regression_bounds_are_inclusive(self):
        codec = LabelCodec(())
        assert [codec.decode(text) for text in ("0", "5", "5.01")] == [0.0, 5.0, None]


@pytest.mark.skipif("LOLA_GLUE_DIR" not in os.environ, reason="LOLA_GLUE_DIR is unset")
class TestRealFiles:
    @pytest.mark.parametrize(
        ("name", "num_train", "num_dev"),
        # Sizes of nyu-mll/glue. Copies of MRPC differ (each user builds the files from
        # Microsoft's download): one in use has 3667 training rows.
        [("cola", 8551, 1043), ("sst-2", 67349, 872), ("mrpc", 3668, 408)],
    )
    def test_sizes(self, name, num_train, num_dev):
        _, train, dev = load_task(name, os.environ["LOLA_GLUE_DIR"])
        assert num_train - 5 <= len(train) <= num_train
        assert len(dev) == num_dev


def test_rows_tell_swapped_labels():
    _, examples, _ = load_task("acceptability", seed=0)
    some = examples.at(np.arange(4))
    swapped = Examples(some.sentences, some.labels[::-1])
    assert [*some.rows()] == [
        (some.sentences[n], some.labels[n].item()) for n in range(4)
    ]
    assert data_digest(some.rows()) == data_digest(examples.at(np.arange(4)).rows())
    assert (some.labels != swapped.labels).any()
    assert data_digest(some.rows()) != data_digest(swapped.rows())
