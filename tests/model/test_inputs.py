"""What a model takes, and its tokenizer gives: seen when they are loaded."""

from __future__ import annotations

import pytest
import torch
import transformers

from lola_flwr.errors import UserError
from lola_flwr.model.example import examples_of, token_ids
from lola_flwr.model.inputs import check_sequence_length
from lola_flwr.model.loading import load_classifier
from tests.model.text_families import FAMILIES, save_tiny, tiny_model, tiny_tokenizer

PAIRS = (["a cat sleeps", "every dog"], ["no cat sees", "a bird sings a cat"])

# The most tokens of a model with 34 positions, the padding's being 0; None: any number.
POSITIONS = {
    "Bert": 34,
    "Roberta": 33,
    "Camembert": 33,
    "Electra": 34,
    "Albert": 34,
    "DebertaV2": 34,
    "MPNet": 32,
    "DistilBert": 34,
    "XLNet": None,
    "GPT2": 32,
    "Llama": None,
}


def longformer():
    config = transformers.LongformerConfig(
        **FAMILIES["Roberta"], attention_window=[8, 8]
    )
    return transformers.LongformerForSequenceClassification(config).eval()


class TestSequenceLength:
    @pytest.mark.parametrize("family", FAMILIES)
    def test_the_limit_is_where_the_model_ends(self, family):
        model, limit = tiny_model(family), POSITIONS[family]
        if limit is None:
            for length in (1, 34, 10_000_000):
                check_sequence_length(model, length, family)
            return
        ids = torch.full((1, limit), 5)
        with torch.no_grad():
            assert model(input_ids=ids).logits.isfinite().all()
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=torch.full((1, limit + 1), 5))
        for length in (1, limit):
            check_sequence_length(model, length, family)
        for length in (limit + 1, 2 * limit, 10_000_000):
            with pytest.raises(UserError) as refusal:
                check_sequence_length(model, length, family)
            assert str(refusal.value) == (
                f"max-length={length} exceeds the {limit} positions of "
                f"model='{family}'; lower it."
            )

    def test_what_a_model_pads_by_itself_needs_positions_too(self):
        model = longformer()
        check_sequence_length(model, 33, "longformer")
        with pytest.raises(UserError, match="exceeds the 33 positions"):
            check_sequence_length(model, 34, "longformer")

    def test_a_model_that_does_not_run_is_no_matter_of_length(self):
        model = tiny_model("Bert")
        model.classifier = torch.nn.Linear(3, 2)
        with pytest.raises(
            UserError, match=r"does not run on 8 tokens \(.*mat1 and mat2 shapes"
        ):
            check_sequence_length(model, 8, "broken")

    def test_padding_is_no_token_of_the_example(self):
        model = tiny_model("MPNet")  # whose positions leave out number 1, whatever pads
        assert model.mpnet.embeddings.position_embeddings.padding_idx == 1
        assert not set(token_ids(model, 30)[0].tolist()) & {0, 1}

    def test_an_encoder_with_a_decoder_is_given_its_end(self):
        config = transformers.BartConfig(
            **{"vocab_size": 20, "d_model": 16, "max_position_embeddings": 30},
            **{"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2},
            **{"decoder_ffn_dim": 16, "num_labels": 2},
        )
        model = transformers.BartForSequenceClassification(config).eval()
        check_sequence_length(model, 30, "bart")
        with pytest.raises(UserError, match="exceeds the 30 positions"):
            check_sequence_length(model, 31, "bart")
        assert len(next(examples_of(model))["input_ids"][0]) == 7


class TestTokenizer:
    def test_larger_than_the_embeddings(self, tmp_path):
        save_tiny(tmp_path, "Bert")
        tokenizer = tiny_tokenizer()
        tokenizer.add_tokens(["<url>"])
        tokenizer.save_pretrained(tmp_path)
        with pytest.raises(UserError) as refusal:
            load_classifier(str(tmp_path), num_labels=2)
        said = str(refusal.value)
        assert "15 tokens, but its embeddings have 14 rows, none for '<url>'" in said
        assert "model.resize_token_embeddings(15)" in said
        assert "\n" not in said
        # The way out leads out.
        model = tiny_model("Bert")
        model.resize_token_embeddings(15)
        model.save_pretrained(tmp_path)
        load_classifier(str(tmp_path), num_labels=2)

    def test_smaller_than_the_embeddings(self, tmp_path):
        save_tiny(tmp_path, "Bert", vocab_size=32)
        load_classifier(str(tmp_path), num_labels=2)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_what_is_saved_gives_what_was_trained_with(self, family, tmp_path):
        name = save_tiny(tmp_path, family)
        model, tokenizer = load_classifier(name, num_labels=2)
        encoded = tokenizer(*PAIRS, padding=True, return_tensors="pt")
        with torch.no_grad():
            model(**encoded)
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        again = saved(*PAIRS, padding=True, return_tensors="pt")
        assert again.keys() == encoded.keys()
        assert all(torch.equal(again[key], encoded[key]) for key in encoded)
        tells_apart = family not in ("Roberta", "Camembert")
        assert ("token_type_ids" in encoded) == tells_apart

    def test_a_tokenizer_of_another_family(self, tmp_path):
        """Of BERT's class, which numbers sentences without being told to."""
        _, tokenizer = load_classifier("random:roberta-tiny", num_labels=2)
        tokenizer.save_pretrained(tmp_path)
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert type(saved).__name__ == "BertTokenizer"
        assert saved("a", "b") == tokenizer("a", "b")
        assert "token_type_ids" not in saved("a", "b")

    def test_one_that_wants_more_than_sentences(self, tmp_path, monkeypatch):
        save_tiny(tmp_path, "Bert")

        def call(*_, **__):
            raise ValueError("You must provide corresponding bounding boxes")

        monkeypatch.setattr(transformers.PreTrainedTokenizerFast, "__call__", call)
        with pytest.raises(UserError, match=r"pair of sentences \(You must provide"):
            load_classifier(str(tmp_path), num_labels=2)

    def test_a_model_that_does_not_run_on_it(self, tmp_path):
        # Positions for five tokens: not even for a short pair.
        save_tiny(tmp_path, "Bert", max_position_embeddings=5)
        with pytest.raises(UserError, match="does not run on what its tokenizer makes"):
            load_classifier(str(tmp_path), num_labels=2)

    def test_a_model_that_a_short_input_changes(self, tmp_path):
        save_tiny(tmp_path, "BigBird")
        with pytest.raises(
            UserError, match=r"BigBirdBlockSparseAttention into BigBird"
        ):
            load_classifier(str(tmp_path), num_labels=2)
        save_tiny(tmp_path, "BigBird", attention_type="original_full")
        load_classifier(str(tmp_path), num_labels=2)


def alone_and_beside(model, tokenizer):
    """Logits of a sentence alone, and beside a longer one."""
    with torch.no_grad():
        return [
            model(**tokenizer(texts, padding=True, return_tensors="pt")).logits[0]
            for texts in (["a cat"], ["a cat", "a bird sings a cat sleeps"])
        ]


class TestPadding:
    @pytest.mark.parametrize("family", ["GPT2", "Llama"])
    def test_a_model_that_looks_for_the_last_token_is_told_what_pads(
        self, family, tmp_path
    ):
        """Its configuration says another number than its tokenizer does."""
        name = save_tiny(tmp_path, family, pad_token_id=1)
        model, tokenizer = load_classifier(name, num_labels=2)
        assert model.config.pad_token_id == tokenizer.pad_token_id == 0
        alone, beside = alone_and_beside(model, tokenizer)
        torch.testing.assert_close(alone, beside)

    def test_where_it_makes_no_difference_the_model_stays(self, tmp_path):
        # Loaded again, a RoBERTa of another padding has its positions moved.
        name = save_tiny(tmp_path, "Roberta", pad_token_id=1)
        model, tokenizer = load_classifier(name, num_labels=2)
        assert (model.config.pad_token_id, tokenizer.pad_token_id) == (1, 0)

    def test_one_that_takes_the_last_place_has_its_padding_before(
        self, tmp_path, caplog
    ):
        name = save_tiny(tmp_path, "XLNet")
        model, tokenizer = load_classifier(name, num_labels=2)
        torch.testing.assert_close(*alone_and_beside(model, tokenizer))
        tokenizer.save_pretrained(tmp_path / "saved")
        saved = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
        assert saved.padding_side == tokenizer.padding_side == "left"
        assert not caplog.records

    def test_one_that_sees_it_always_is_told_of(self, tmp_path, caplog):
        # Fourier transforms know no mask.
        name = save_tiny(tmp_path, "FNet")
        load_classifier(name, num_labels=2)
        (record,) = caplog.records
        assert "depends on the padding beside it" in record.getMessage()
