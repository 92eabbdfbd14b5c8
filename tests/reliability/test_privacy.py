"""What the server can read out of a gradient: measured, for docs/security.md."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.blocks import partition_parameters
from lola_flwr.model.loading import load_classifier
from lola_glue.tasks import load_task
from lola_glue.text import make_batch


@pytest.fixture(scope="module")
def bert():
    task, train, _ = load_task("acceptability", "", seed=0)
    model, tokenizer = load_classifier("minilm-l6", num_labels=task.num_labels, seed=0)
    return model.eval(), tokenizer, train


def gradient_of(bert, block_index, batch_size):
    model, tokenizer, train = bert
    rng = np.random.default_rng(0)
    drawn = rng.choice(len(train.labels), batch_size, replace=False)
    batch = make_batch(train, drawn, tokenizer, max_length=64)
    partition = partition_parameters(name for name, _ in model.named_parameters())
    return batch, block_gradient(model, partition, block_index, batch).gradients


def tokens_in(gradients, model, num_positions):
    """Return the tokens that a gradient gives away, as (token, position) pairs.

    The gradient of a linear map is a sum of outer products with its inputs, one for
    each position of each sentence. So the inputs lie in the span of its rows, and what
    the first layer's inputs may be is known: one vector for each token and position.
    (Petrov et al., "DAGER: Exact Gradient Inversion for Large Language Models", 2024.)
    """
    maps = ("query.weight", "key.weight", "value.weight")
    rows = torch.cat(
        [g.double() for name, g in gradients.items() if name.endswith(maps)]
    )
    _, sizes, directions = torch.linalg.svd(rows, full_matrices=False)
    span = directions[sizes > 1e-6 * sizes[0]]
    embeddings = model.bert.embeddings
    found = set()
    for position in range(num_positions):
        candidates = embeddings.LayerNorm(
            embeddings.word_embeddings.weight
            + embeddings.position_embeddings.weight[position]
            + embeddings.token_type_embeddings.weight[0]
        ).double()
        left = candidates - (candidates @ span.T) @ span
        is_in = left.norm(dim=1) < 1e-3 * candidates.norm(dim=1)
        found |= {(int(token), position) for token in is_in.nonzero()}
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("block", "share"), [(0, 1.0), (1, 0.0), (5, 0.0)])
@torch.no_grad()
def test_the_first_blocks_gradient_names_the_tokens_of_a_batch(bert, block, share):
    with torch.enable_grad():
        batch, gradients = gradient_of(bert, block, batch_size=4)
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    real = {
        (int(ids[row, position]), int(position)) for row, position in mask.nonzero()
    }
    found = tokens_in(gradients, bert[0], ids.shape[1])
    assert len(found & real) == share * len(real)
    # Few others: what is found is the batch's vocabulary.
    assert len(found) <= 3 * len(real)


@pytest.mark.slow
def test_the_heads_gradient_tells_the_share_of_labels(bert):
    batch, gradients = gradient_of(bert, 5, batch_size=32)
    # The bias' gradient is the mean of softmax - label; an untrained head says 1/2.
    share = 0.5 - float(gradients["classifier.bias"][1])
    assert share == pytest.approx(float(batch["labels"].float().mean()), abs=0.02)
