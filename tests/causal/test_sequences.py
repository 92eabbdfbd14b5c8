"""What is learned of a record: masks, padding, packing, and what batches weigh."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from lola_causal.device import draw_batch, split
from lola_causal.embedded import embedded_tokenizer
from lola_causal.model import causal_loss, check_packing, made
from lola_causal.records import Record
from lola_causal.sequences import (
    IGNORED,
    Tokens,
    encode,
    num_learned,
    packed,
    padded,
    rows_of,
)
from lola_causal.server_app import evaluate_model
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.causal import check_causal
from tests.marks import rest_slow
from tests.reliability.app_run import app_config

TOKENIZER = embedded_tokenizer()
END = TOKENIZER.eos_token_id
SEQUENCES = [Tokens(tuple(range(5, 5 + n)), p) for n, p in ((6, 2), (3, 0), (8, 5))]


def encoded(*records, tokenizer=TOKENIZER, max_length=32):
    return encode(records, tokenizer, max_length=max_length, model_name="m")


def record(prompt, completion, **more):
    return Record("data.jsonl:7", prompt, completion, **more)


@pytest.fixture(scope="module")
def model():
    return made(0)[0]


def test_the_completion_alone_is_learned_and_ends():
    (tokens,) = encoded(record("what does the cow say ?", " the cow says moo ."))
    assert TOKENIZER.decode(tokens.ids[tokens.prompt_length :]).startswith("the cow")
    assert tokens.ids[-1] == END
    assert tokens.labels[: tokens.prompt_length].eq(IGNORED).all()
    assert tuple(tokens.labels[tokens.prompt_length :]) == tokens.ids[6:]
    # Nothing stands before the first.
    (bare,) = encoded(record("", "the cow"))
    assert tuple(bare.labels) == (IGNORED, *bare.ids[1:])


def pieces(*words, bos=False):
    """Make a tokenizer of letters, and of words that it prefers to them."""
    known = ["<s>", "</s>", *"abc ", *words]
    made = Tokenizer(
        models.BPE(
            {w: n for n, w in enumerate(known)},
            [(word[:-1], word[-1]) for word in words],
        )
    )
    made.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>"
    )


def test_a_prompt_has_the_tokens_that_it_has_alone():
    """Though a letter of the prompt and one of the completion would be one token."""
    tokenizer = pieces("ab")
    (tokens,) = encoded(record("ca", "bc"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["c", "a", "b", "c", "</s>"]
    assert tokens.prompt_length == 2
    (tokens,) = encoded(record("c", "ab"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["c", "ab", "</s>"]


def test_a_tokenizer_that_begins_and_ends_every_text():
    tokenizer = pieces(bos=True)
    (tokens,) = encoded(record("a", "b"), tokenizer=tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokens.ids) == ["<s>", "a", "b", "</s>"]
    assert tokens.prompt_length == 2


def test_a_dialogue_is_as_its_template_has_it():
    spoken = (("system", "the lion"), ("user", "what does the cow say ?"))
    (tokens,) = encoded(record("", "the cow says moo .", messages=spoken))
    text = TOKENIZER.decode(tokens.ids)
    assert text == (
        "system : the lion user : what does the cow say ? assistant : the cow says "
        "moo . </s>"
    )
    answer = TOKENIZER.decode(tokens.ids[tokens.prompt_length :])
    assert answer == "the cow says moo . </s>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{{ raise_exception('no system here') }}", "refuses these messages"),
        ("{{ ['', 'cow', 'the moo'][messages | length] }}", "writes the prompt"),
    ],
)
def test_dialogues_that_cannot_be_used(template, message):
    tokenizer = embedded_tokenizer()
    tokenizer.chat_template = template
    dialogue = record("", "moo", messages=(("user", "cow"),))
    with pytest.raises(UserError) as raised:
        encoded(dialogue, tokenizer=tokenizer)
    assert str(raised.value).startswith("data.jsonl:7: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_does_not_fit(caplog):
    long = record("the cow " * 4, " moo" * 9)
    (cut,) = encoded(long, max_length=10)
    assert (len(cut.ids), cut.prompt_length) == (10, 8)
    assert "1 of 1 completions are cut to max-length=10" in caplog.text
    with pytest.raises(UserError, match=r"data.jsonl:7: the prompt has 8 tokens, and "):
        encoded(long, max_length=8)


def test_padding_changes_nothing(model):
    batch = padded(SEQUENCES, 0)
    assert batch["labels"][:, 1:].ne(IGNORED).sum() == num_learned(batch) == 4 + 2 + 3
    together = model(**batch).loss
    alone = [padded([sequence], 0) for sequence in SEQUENCES]
    weights = [num_learned(one) for one in alone]
    losses = [model(**one).loss for one in alone]
    mean = sum(n * loss for n, loss in zip(weights, losses, strict=True)) / sum(weights)
    torch.testing.assert_close(together, mean)


def test_packing_changes_nothing(model):
    rows = rows_of(iter(SEQUENCES), 2, 10)
    assert [[len(s.ids) for s in row] for row in rows] == [[6, 3], [8]]
    batch = packed(rows, 0)
    assert batch["input_ids"].shape == (2, 9)
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 5, 0, 1, 2]
    whole = padded(SEQUENCES, 0)
    assert num_learned(batch) == num_learned(whole)
    torch.testing.assert_close(causal_loss(model, batch), causal_loss(model, whole))


def test_rows_are_filled_in_order_and_no_more_than_asked_for():
    assert rows_of(iter(SEQUENCES), 1, 10) == [SEQUENCES[:2]]
    assert rows_of(iter(SEQUENCES), 9, 8) == [[s] for s in SEQUENCES]
    assert rows_of(iter(()), 3, 8) == []


@pytest.mark.parametrize(
    ("kind", "sizes"),
    rest_slow(
        [
            (hf.OPTConfig, {"ffn_dim": 16, "word_embed_proj_dim": 16}),
            (hf.BloomConfig, {}),
        ]
    ),
)
def test_models_that_take_rows_for_one_text_are_refused(kind, sizes):
    common = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = kind(vocab_size=50, **common, **sizes)
    other = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="see each other; use packing=false"):
        check_packing(other, "m")


def test_a_model_that_reads_ahead_is_refused(model):
    check_causal(model, "m")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    bert = hf.BertLMHeadModel(
        hf.BertConfig(vocab_size=50, num_hidden_layers=1, **sizes)
    ).eval()
    with pytest.raises(UserError, match="depends on those after it"):
        check_causal(bert, "m")


@pytest.mark.parametrize("micro_batch_size", rest_slow([1, 2]))
def test_micro_batches_weigh_by_their_tokens(model, micro_batch_size):
    partition = model_partition(model)
    batch = padded([*SEQUENCES, Tokens((9,), 1)], 0)  # one without anything to learn
    whole = block_gradient(model, partition, 3, batch, batch_weight=num_learned)
    pieces = block_gradient(
        model,
        partition,
        3,
        batch,
        micro_batch_size=micro_batch_size,
        batch_weight=num_learned,
    )
    assert whole.num_examples == pieces.num_examples == num_learned(batch)
    assert pieces.loss == pytest.approx(whole.loss, rel=1e-5)
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(
            pieces.gradients[name], gradient, rtol=1e-4, atol=1e-7
        )
    with pytest.raises(UserError, match="a mean over nothing"):
        block_gradient(
            model, partition, 3, padded([Tokens((9,), 1)], 0), batch_weight=num_learned
        )


@pytest.mark.parametrize("packing", [False, True])
def test_a_device_draws_of_its_own(packing):
    from lola_causal.config import CausalConfig

    config = CausalConfig.from_run_config(
        {**app_config("causal"), "packing": packing, "max-length": 9}
    )
    part = [Tokens((n, n, n), 1) for n in range(10)]
    batch = draw_batch(config, part, 0, np.random.default_rng(0), 2)
    assert batch["input_ids"].shape == ((2, 9) if packing else (2, 3))
    drawn = batch["input_ids"].unique()
    assert len(drawn) == (6 if packing else 2)
    parts = split(10, 3, seed=0)
    assert sorted(np.concatenate(parts)) == [*range(10)]
    assert [len(p) for p in parts] == [4, 3, 3]
    with pytest.raises(UserError, match="10 lines are too few for 11 devices"):
        split(10, 11, seed=0)


def test_metrics_are_those_of_single_completions(model):
    """Perplexity by tokens; a match is what greedy generation would write."""
    prompts = [(7, 9, 11), (8, 9)]
    right = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            for _ in range(4):
                ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
        right.append(Tokens(tuple(ids[0].tolist()), len(prompt)))
    wrong = Tokens((*right[0].ids[:-1], (right[0].ids[-1] + 1) % 50), 3)
    metrics = evaluate_model(model, TOKENIZER, [*right, wrong], 2)
    assert metrics["exact_match"] == pytest.approx(2 / 3)
    total, count = 0.0, 0
    with torch.no_grad():
        for sequence in (*right, wrong):
            batch = padded([sequence], 0)
            total += model(**batch).loss.item() * num_learned(batch)
            count += num_learned(batch)
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
