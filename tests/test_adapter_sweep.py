"""The sweep of peft's tuners over families (simulations/adapters)."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import load_file, save_file

from simulations.adapters.__main__ import main
from simulations.adapters.cases import Case, cases, tunings
from simulations.adapters.check import Outcome, try_case
from simulations.adapters.read_back import fault
from simulations.adapters.table import document

PAGE = Path(__file__).parents[1] / "docs" / "adapters.md"

pytestmark = pytest.mark.filterwarnings("ignore")


def test_a_case_that_is_right_and_what_reading_back_would_find(tmp_path):
    case = Case("roberta", "ia3", "SEQ_CLS")
    assert try_case(case, tmp_path) == Outcome("right", saved=True, merged=True)
    assert fault(tmp_path) == ""
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    values = load_file(weights)
    head = next(name for name in values if name.endswith("classifier.dense.bias"))
    save_file({**values, head: values[head] + 0.01}, weights, {"format": "pt"})
    assert fault(tmp_path).startswith("read back, the logits of adapter differ by ")


def test_a_case_that_is_refused(tmp_path):
    outcome = try_case(Case("bert", "vblora"), tmp_path)
    assert outcome.verdict == "refused"
    assert "one parameter of several layers" in outcome.line
    assert not list(tmp_path.iterdir())


def test_the_tuners_are_those_of_peft():
    assert len(tunings()) == len(PEFT_TYPE_TO_CONFIG_MAPPING)
    assert {"lora", "ln_tuning", "prompt_tuning"} <= set(tunings())
    assert [case.task_type for case in cases("lora", "bert")] == [None, "SEQ_CLS"]


def test_the_table():
    outcomes = {
        Case("bert", "lora"): Outcome("right", saved=True, merged=True),
        Case("bert", "lora", "SEQ_CLS"): Outcome("wrong", "x.y differs"),
        Case("bert", "lily"): Outcome("right", saved=True, lines=("cannot be",)),
        Case("vit", "lily"): Outcome("refused", "bert.x is one parameter"),
        Case("vit", "lora"): Outcome("refused", "no"),
    }
    text = document(outcomes).splitlines()
    assert text[0].startswith(
        "5 cases tried: 2 right (2 saved as adapters, 1 merged), 2 refused in one line"
    )
    assert "| `lora` | right / wrong | refused |" in text
    assert "| `lily` | right, not merged | refused |" in text
    assert "- `bert-lora-SEQ_CLS`: x.y differs" in text


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_tuner_is_wrong_on_any_family_and_the_page_says_so(tmp_path):
    assert main(["--out", str(tmp_path)]) == 0
    sums, table, *_ = (tmp_path / "adapters.md").read_text("utf-8").split("\n\n")
    page = PAGE.read_text("utf-8")
    assert sums in page
    assert table in page
