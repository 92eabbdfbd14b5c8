"""Forward passes of a model with a side network."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers

from lola_flwr.costs.counter import saved_bytes
from lola_flwr.errors import UserError
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.backprop import block_gradient, model_loss, train_mode
from lola_flwr.model.recompute import recomputed_suffix
from tests.model.ladders import SIZES, examples, moved, with_ladder


def sized(**sizes):
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**SIZES, **sizes})
    return transformers.RobertaForSequenceClassification(config).eval()


class TestForwardPass:
    def test_the_frozen_model_has_no_dropout_and_keeps_nothing(self):
        model = with_ladder()
        train_mode(model)
        partition, batch = model_partition(model), examples(model, 8, 24)
        seen = []
        model.roberta.encoder.layer[2].attention.register_forward_hook(
            lambda *given: seen.append(given[2][0])
        )
        for _ in range(2):
            block_gradient(model, partition, 0, batch)
        assert torch.equal(*seen)
        assert not any(part.training for part in model.roberta.modules())
        assert all(part.training for part in model.ladder.modules())
        assert model.classifier.dropout.training

        def step(of, blocks):
            def run():
                for name, parameter in of.named_parameters():
                    parameter.requires_grad_(name in blocks.update_names(0))
                model_loss(of, batch)

            return saved_bytes(of, run)

        # Of 3 narrow layers side layers keep much; that the model's keep nothing shows
        # where they are wider and the side network is not.
        wide = adapt(sized(hidden_size=64, intermediate_size=128), "ladder", {"r": 8})
        more = model_partition(wide)
        read = 8 * 24 * 4 * (64 - 32)  # the first block's projection keeps two states
        kept = step(wide.train(), more) - step(model, partition)
        assert kept < 3 * read

    def test_a_copy_has_a_side_network_of_its_own(self):
        model = moved(with_ladder())
        batch = examples(model)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            before = model(**batch).logits
            twin.ladder.up.weight.zero_()
            assert torch.equal(model(**batch).logits, before)
            assert not torch.equal(twin(**batch).logits, before)

    def test_a_pass_that_failed_is_forgotten(self):
        model = moved(with_ladder())
        batch = examples(model)
        with torch.no_grad():
            before = model(**batch).logits

            def fail(*_):
                raise MemoryError

            handle = model.roberta.encoder.layer[1].register_forward_pre_hook(fail)
            with pytest.raises(MemoryError):
                model(**batch)
            handle.remove()
            copy.deepcopy(model)
            assert torch.equal(model(**batch).logits, before)

    def test_side_layers_may_run_twice(self):
        model = moved(with_ladder()).train()
        partition, batch = model_partition(model), examples(model)
        torch.manual_seed(3)
        once = block_gradient(model, partition, 0, batch)
        torch.manual_seed(3)
        with recomputed_suffix(model, partition, 0):
            twice = block_gradient(model, partition, 0, batch)
        for name, gradient in once.gradients.items():
            torch.testing.assert_close(twice.gradients[name], gradient)

    def test_generation_goes_without_keys_and_values(self):
        model = moved(with_ladder("llama"))
        ids = examples(model, 1)["input_ids"]
        options = {"max_new_tokens": 4, "do_sample": False}
        found = model.generate(ids, use_cache=False, **options)
        expected = ids
        for _ in range(4):
            with torch.no_grad():
                following = model(expected).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, following], dim=1)
            if following.item() == model.config.eos_token_id:
                break
        assert torch.equal(found, expected)
        with pytest.raises(UserError, match="use_cache=False"):
            model.generate(ids, use_cache=True, **options)

    def test_a_checkpointed_model_has_the_same_gradient(self):
        model = moved(with_ladder()).train()
        partition, batch = model_partition(model), examples(model)
        torch.manual_seed(3)
        expected = block_gradient(model, partition, 0, batch)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(3)
        found = block_gradient(model, partition, 0, batch)
        for name, gradient in expected.gradients.items():
            torch.testing.assert_close(found.gradients[name], gradient)
