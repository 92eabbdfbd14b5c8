"""A device's step on texts, beside one that computes all of its padding.

Run with ``pytest simulations/benchmarks/bench_tokens.py -s``; with ``GLUE=DIR`` in the
environment on SST-2's sentences, otherwise on random tokens in sentences of SST-2's
lengths. Batches of 32, dropout on; both sides in turn, one thread, CPU seconds.
Gradients are compared with dropout off.
"""

from __future__ import annotations

import copy
import os
import time
from statistics import median

import numpy as np
import pytest
import torch
from torch import nn

from lola_flwr.device.tokens import ALL_TOKENS, Trial, tokens_for
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import (
    block_gradient,
    model_loss,
    num_examples_of,
    train_mode,
)
from lola_flwr.model.loading import load_classifier

BATCH_SIZE, NUM_BATCHES = 32, 6
# At most so much of the padded step's time: of the last, the middle, the first block.
LIMITS = (0.50, 0.55, 0.60)

# Tokens of SST-2's training sentences, as BERT's vocabulary has them: of 20,000 the
# shortest, every twentieth part, and the longest.
QUANTILES = (3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 11, 13, 14, 16, 18, 20, 23, 27, 33, 65)


def made_batches():
    rng = np.random.default_rng(0)
    for _ in range(NUM_BATCHES):
        places = rng.uniform(0, len(QUANTILES) - 1, BATCH_SIZE)
        drawn = np.interp(places, range(len(QUANTILES)), QUANTILES).astype(int)
        lengths = torch.from_numpy(drawn)
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.from_numpy(rng.integers(1000, 30_000, mask.shape))
        labels = torch.from_numpy(rng.integers(2, size=BATCH_SIZE))
        yield {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}


def read_batches(directory):
    from lola_glue.tasks import load_task
    from lola_glue.text import make_batch

    _, train, _ = load_task("sst-2", directory)
    _, tokenizer = load_classifier("minilm-l6", num_labels=2)
    rng = np.random.default_rng(0)
    for _ in range(NUM_BATCHES):
        chosen = rng.choice(len(train.labels), BATCH_SIZE, replace=False)
        batch = dict(make_batch(train, chosen, tokenizer, max_length=64))
        batch.pop("token_type_ids", None)
        yield batch


def without_dropout(model):
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def gradient(trial, block, batch, tokens):
    with tokens.first_alone():
        return block_gradient(
            trial.model, trial.partition, block, batch, split=tokens.split
        )


def timed(step):
    start = time.process_time()
    step()
    return time.process_time() - start


def flat(found):
    return torch.cat([values.flatten() for values in found.gradients.values()])


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", ["minilm-l6", "random:roberta-base"])
def test_step_time(name, capsys):
    torch.set_num_threads(1)
    glue = os.environ.get("GLUE")
    batches = [*(read_batches(glue) if glue else made_batches())]
    model, _ = load_classifier(name, num_labels=2)
    partition = model_partition(model)
    trial, still = (
        Trial(
            model=each,
            partition=partition,
            loss_function=model_loss,
            batch_weight=num_examples_of,
        )
        for each in (model, without_dropout(model))
    )
    for each in (trial, still):
        train_mode(each.model)
    last = partition.num_blocks - 1
    for block, limit in zip((last, last // 2, 0), LIMITS, strict=True):
        times, apart = [], []
        for number, batch in enumerate(batches):
            tokens = tokens_for(trial, batch)
            fewer = timed(lambda: gradient(trial, block, batch, tokens))  # noqa: B023
            plain = timed(lambda: gradient(trial, block, batch, ALL_TOKENS))  # noqa: B023
            times += [(fewer, plain)] * (number > 0)  # the first one fills caches
            if number < 2:
                ways = (tokens_for(still, batch), ALL_TOKENS)
                ours, plain = (flat(gradient(still, block, batch, w)) for w in ways)
                apart.append(float((ours - plain).norm() / plain.norm()))
        ours, theirs = map(median, zip(*times, strict=True))
        ratio = ours / theirs
        with capsys.disabled():
            print(
                f"\n{name} block {block}: {ours:.3f} s, padded {theirs:.3f} s, "
                f"{ratio:.2f} of it; gradients apart by {max(apart):.1e}",
                end="",
            )
        assert ratio <= limit
        assert max(apart) <= 3e-6
