"""The sweep over transformers' model classes (simulations/families)."""

from __future__ import annotations

import json
import re
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as hf

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import partition_parameters
from simulations.families.__main__ import main
from simulations.families.check import (
    Wrong,
    check_gradients,
    check_partition,
    check_prefix_cache,
    check_saving,
)
from simulations.families.classes import ModelClass, build, loss_of, model_classes
from simulations.families.processes import try_all
from simulations.families.table import page, summary
from simulations.families.trial import Trial, tried
from tests.marks import rest_slow

CLASSES = {kind.name: kind for kind in model_classes()}

# Sections of the page that list the classes of an outcome.
SECTIONS = ["Right when told", "Refused", "Not tried"]

pytestmark = pytest.mark.filterwarnings("ignore")

# One class of each kind that names, or layers, or padding mislead in: what comes out.
FAMILIES = {
    "BertForSequenceClassification": ("right", "", ""),
    "XLMRobertaForSequenceClassification": ("right", "", ""),
    "BartForSequenceClassification": (
        *("told", "model.encoder.layers, model.decoder.layers", ""),
    ),
    "T5ForSequenceClassification": (
        *("told", "transformer.encoder.block, transformer.decoder.block"),
        "each maps hidden states to hidden states",
    ),
    "OPTForSequenceClassification": ("right", "", ""),
    "ConvBertForQuestionAnswering": ("right", "", ""),
    "ModernBertForTokenClassification": ("right", "", ""),
    "LlamaForCausalLM": ("right", "", ""),
    "XLNetForSequenceClassification": ("right", "", "not one row for each"),
    "ViTForImageClassification": ("right", "", ""),
    "SwinForImageClassification": (
        *("told", "swin.encoder.layers", "each maps hidden states to hidden states"),
    ),
    "Wav2Vec2ForSequenceClassification": ("right", "", ""),
    "AlbertForSequenceClassification": (
        *("told", r"blocks=albert\.encoder\.albert_layer_groups\.0", ""),
    ),
}


@pytest.mark.parametrize("name", rest_slow(FAMILIES, 5))
def test_a_family(name):
    outcome, reason, prefix_cache = FAMILIES[name]
    trial = tried(CLASSES[name])
    assert trial.outcome == outcome, trial.reason
    assert reason in trial.reason
    assert prefix_cache in trial.prefix_cache
    assert bool(prefix_cache) == bool(trial.prefix_cache)


def test_the_classes_are_those_of_transformers():
    assert len(CLASSES) > 600
    assert all(isinstance(getattr(hf, name), type) for name in list(CLASSES)[::50])
    assert {kind.task for kind in CLASSES.values()} >= {
        "sequence classification",
        "image classification",
        "speech, CTC",
    }


class TestChecks:
    """Each check fails on what it is for."""

    @pytest.fixture
    def bert(self):
        model, batch = build(CLASSES["BertForSequenceClassification"])
        return model, batch, model_partition(model)

    def test_blocks_and_head(self, bert):
        model, batch, right = bert
        embeddings = [n for n in right.frozen if n.startswith("bert.embeddings")]
        head = right.head
        frozen = (*right.frozen, *head)
        with pytest.raises(Wrong, match="runs behind the blocks, but is frozen"):
            check_partition(model, replace(right, head=(), frozen=frozen), batch)
        below = replace(right, head=(*head, *embeddings), frozen=())
        with pytest.raises(Wrong, match="is in the head, but feeds the blocks"):
            check_partition(model, below, batch)
        turned = replace(right, blocks=right.blocks[::-1])
        with pytest.raises(Wrong, match=r"block 0 feeds blocks \[0\]"):
            check_partition(model, turned, batch)

    def test_gradients(self, bert):
        model, batch, partition = bert
        calls = []

        def changing(model, batch):
            calls.append(0)
            return loss_of(model, batch) * len(calls)

        with pytest.raises(Wrong, match="training, block 0: gradient of"):
            check_gradients(model, partition, batch, changing)

    def test_prefix_cache_and_the_head_of_an_order_of_names(self):
        # What the cache makes of a head that runs below: refused, not wrong.
        model, batch = build(CLASSES["BartForSequenceClassification"])
        names = [name for name, _ in model.named_parameters()]
        by_order = partition_parameters(names, stack="model.decoder.layers")
        assert "model.decoder.layernorm_embedding.weight" in by_order.head
        refusal = check_prefix_cache(model, by_order, batch, loss_of)
        assert "layernorm_embedding.weight belongs to the head" in refusal

    def test_saving(self, bert, monkeypatch):
        model, batch, _ = bert
        weight = model.classifier.weight
        original = type(model).from_pretrained

        def damaged(directory):
            loaded = original(directory)
            with torch.no_grad():
                loaded.classifier.weight.add_(1e-3)
            return loaded

        check_saving(model, batch)
        monkeypatch.setattr(type(model), "from_pretrained", damaged)
        with pytest.raises(Wrong, match="outputs differ by"):
            check_saving(model, batch)
        assert weight is model.classifier.weight


def test_a_class_that_takes_too_long_is_left_out():
    kinds = [CLASSES["BertForSequenceClassification"], ModelClass("NoSuch", "causal")]
    slow, missing = try_all(kinds, seconds=0.01)
    assert (slow.outcome, slow.reason) == ("not tried", "takes more than 0.01 s")
    assert missing.outcome == "not tried"


def test_the_page_counts_and_says_why():
    trials = [
        Trial("A", "text", "right"),
        Trial("B", "text", "told", "b.layers"),
        Trial("C", "image", "refused", "No stack."),
        Trial("D", "image", "refused", "No stack."),
        Trial("E", "image", "right", prefix_cache="Not one row."),
    ]
    assert summary(trials).splitlines()[2:] == [
        "| text | 2 | 1 | 1 | 0 | 0 | 0 |",
        "| image | 3 | 1 | 0 | 2 | 0 | 0 |",
        "| all | 5 | 2 | 1 | 2 | 0 | 0 |",
    ]
    text = page(trials)
    assert "- `C`, `D`: No stack." in text
    assert "- `B`: `b.layers`" in text
    assert "## Wrong" not in text
    assert "- `F`: off" in page([*trials, Trial("F", "text", "wrong", "off")])


class TestASweepThatWasStopped:
    @pytest.fixture
    def sweep(self, tmp_path, monkeypatch):
        """Run a sweep that finds every class right; return which it tried."""

        def run(*arguments, stopped_after=None):
            tried = []

            def all_right(kinds, *, seconds):
                for kind in kinds:
                    if len(tried) == stopped_after:
                        raise KeyboardInterrupt
                    tried.append(kind.name)
                    yield Trial(kind.name, kind.task, "right")

            monkeypatch.setattr("simulations.families.__main__.try_all", all_right)
            with suppress(KeyboardInterrupt):
                assert main(["--out", str(tmp_path), *arguments]) == 0
            return tried

        return run

    def test_it_goes_on_where_it_was(self, sweep, tmp_path):
        assert sweep("--only", "XLNet", stopped_after=2) == [
            "XLNetForSequenceClassification",
            "XLNetForTokenClassification",
        ]
        every = sweep("--page", str(tmp_path / "page.md"))
        assert len(every) == len(CLASSES) - 2
        assert f"{len(CLASSES)} of {len(CLASSES)}" in (tmp_path / "page.md").read_text()
        assert sweep() == []
        again = sweep("--again", "--only", "XLNetForM")
        assert again == ["XLNetForMultipleChoice"]
        lines = (tmp_path / "families.jsonl").read_text().splitlines()
        assert len(lines) == len(CLASSES)

    def test_results_of_another_transformers_are_none(self, sweep, tmp_path):
        (name,) = sweep("--only", "XLNetForMultipleChoice")
        file = tmp_path / "families.jsonl"
        file.write_text(file.read_text().replace(hf.__version__, "4.0.0"))
        assert sweep("--only", name) == [name]

    def test_a_page_is_of_all_classes(self, sweep, tmp_path, capsys):
        with pytest.raises(SystemExit):
            sweep("--only", "XLNet", "--page", str(tmp_path / "page.md"))
        assert "--page lists all" in capsys.readouterr().err


def test_the_page_of_the_documentation_is_complete():
    text = Path("docs/families.md").read_text(encoding="utf-8")
    if f"transformers {hf.__version__} " not in text:
        pytest.skip(f"The page is of another transformers than {hf.__version__}.")
    rows = re.findall(r"^\| ([\w, ]+) \| ([\d |]+) \|$", text, flags=re.MULTILINE)
    counts = {task: [int(n) for n in cells.split(" | ")] for task, cells in rows}
    tasks = Counter(kind.task for kind in CLASSES.values())
    assert {n: row[0] + row[-1] for n, row in counts.items()} == {
        **tasks,
        "all": len(CLASSES),
    }
    for number, *outcomes, _ in counts.values():
        assert number == sum(outcomes)
    assert [sum(column) for column in zip(*counts.values(), strict=True)] == [
        2 * total for total in counts["all"]
    ]
    # Each section lists as many classes as the table counts, all of them known.
    listed = {
        title: re.findall(r"`(\w+)`(?=, `|: )", section)
        for title, section in re.findall(r"^## (.+)\n\n((?:- .+\n)+)", text, re.M)
    }
    _, _, told, refused, wrong, untried = counts["all"]
    assert wrong == 0
    assert [len(listed[title]) for title in SECTIONS] == [told, refused, untried]
    assert {name for names in listed.values() for name in names} <= CLASSES.keys()


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_every_class_is_right_or_refused(tmp_path):
    assert main(["--out", str(tmp_path), "--page", str(tmp_path / "page.md")]) == 0
    lines = (tmp_path / "families.jsonl").read_text().splitlines()
    assert {json.loads(line)["name"] for line in lines} == CLASSES.keys()
