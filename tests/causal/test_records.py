"""Reading prompts and completions; each mistake is one line with file and number."""

from __future__ import annotations

import json

import pytest

from lola_causal.embedded import embedded_tokenizer, facts
from lola_causal.records import Record, load_records, read_jsonl
from lola_flwr.errors import UserError

DIALOGUE = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


@pytest.fixture
def write(tmp_path):
    def to(*lines):
        path = tmp_path / "data.jsonl"
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        path.write_text("\n".join(texts), encoding="utf-8")
        return path

    return to


def test_both_forms_of_lines(write):
    # U+2028 ends no line of JSON, though Python's splitlines takes it to.
    path = write(
        {"prompt": "a\u2028", "completion": "b", "id": 3},
        "  ",
        {"messages": DIALOGUE},
        json.dumps({"prompt": "", "completion": "\u2028"}, ensure_ascii=False),
    )
    first, second, third = read_jsonl(path)
    assert first == Record(f"{path}:1", "a\u2028", "b")
    assert second == Record(f"{path}:3", "", "b", (("system", ""), ("user", "a")))
    assert (third.where, third.completion) == (f"{path}:4", "\u2028")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "this is no JSON"),
        ("[1]", "is no object"),
        ({"prompt": "a"}, "completion is missing"),
        ({"completion": "a"}, "prompt is missing"),
        ({"prompt": 3, "completion": "a"}, "prompt is 3"),
        ({"prompt": "a", "completion": ""}, "completion is empty"),
        ({"messages": DIALOGUE, "prompt": "a"}, "messages beside"),
        ({"messages": DIALOGUE[:1]}, "a list of two or more"),
        ({"messages": "hello"}, "a list of two or more"),
        ({"messages": ["a", "b"]}, "'a' is no message"),
        ({"messages": [*DIALOGUE, {"role": "user"}]}, "content is missing"),
        ({"messages": DIALOGUE[:2]}, "the last message is the user's"),
        ({"messages": [*DIALOGUE[:2], {**DIALOGUE[2], "content": ""}]}, "says ''"),
    ],
)
def test_a_line_that_cannot_be_used(write, line, message):
    path = write({"prompt": "a", "completion": "b"}, "", line)
    with pytest.raises(UserError) as raised:
        read_jsonl(path)
    assert str(raised.value).startswith(f"{path}:3: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_files_that_cannot_be_used(write, tmp_path):
    with pytest.raises(UserError, match="holds no line"):
        read_jsonl(write(" "))
    with pytest.raises(UserError, match=r"data='.*' cannot be read"):
        read_jsonl(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="eval-data='x' belongs to data of your own"):
        load_records("", "x")
    with pytest.raises(UserError, match="none can be held out"):
        load_records(str(write({"prompt": "a", "completion": "b"})), "")


def test_a_tenth_is_held_out_where_nothing_else_is(write):
    path = write(*({"prompt": str(n), "completion": "x"} for n in range(25)))
    train, held_out = load_records(str(path), "", seed=3)
    assert (len(train), len(held_out)) == (23, 2)
    assert {r.prompt for r in train} | {r.prompt for r in held_out} == {
        str(n) for n in range(25)
    }
    assert load_records(str(path), "", seed=3) == (train, held_out)
    train, held_out = load_records(str(path), str(path))
    assert len(train) == len(held_out) == 25


@pytest.mark.slow
def test_the_hub_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="without a network give a JSONL") as raised:
        load_records("hub:no/such-data", "")
    assert "\n" not in str(raised.value)


def test_the_embedded_facts_are_held_out_in_one_way_to_ask():
    train, held_out = facts(1)
    assert facts(1) == (train, held_out) != facts(2)
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}
    assert {answer for _, answer in train} == {answer for _, answer in held_out}
    assert len({answer for _, answer in held_out}) == len(held_out)
    tokenizer = embedded_tokenizer()
    for pair in (*train, *held_out):
        ids = tokenizer("".join(pair))["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == "".join(pair)
