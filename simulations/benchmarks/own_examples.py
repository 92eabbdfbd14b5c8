"""What the server's own examples cost it in a round of MiniLM-L6, in CPU seconds.

``python -m simulations.benchmarks.own_examples`` prints, as JSON, what a round takes
with 64 sentences of the demo's task: whole gradients one after the other, as autograd
gives them; rows of all gradients, many at once; and rows of those that a round computes
anew, as the server does it. What is made of them for the judgement is in all three.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import numpy as np
import torch

from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.backprop import block_gradient
from lola_flwr.model.example_gradients import example_gradients
from lola_flwr.model.loading import load_classifier
from lola_flwr.server.directions import projection
from lola_flwr.server.own_examples import (
    ExampleMean,
    Pulls,
    agreements_among,
    pulls_after,
)
from lola_flwr.server.reputation import HEAD

EXAMPLES, KEY, REPEATS = 64, 7, 5


def main() -> None:
    """Measure all three, in turn."""
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parents[1] / "glue"))
    from lola_glue.tasks import load_task
    from lola_glue.text import make_batch

    model, tokenizer = load_classifier("minilm-l6", num_labels=2)
    partition = model_partition(model)
    parameters = dict(model.named_parameters())
    values = {name: parameters[name].numpy(force=True) for name in partition.trainable}
    values = {name: array.copy() for name, array in values.items()}
    parts = {HEAD: partition.head, **dict(enumerate(partition.blocks))}
    _, examples, _ = load_task("acceptability", "", seed=0)

    def batch_of(chosen):
        return make_batch(examples, chosen, tokenizer, max_length=64)

    gradients = example_gradients(model, partition, batch_of, EXAMPLES)
    known = pulls_after({}, gradients, values, parts, server_round=1, key=KEY)

    def one_by_one() -> None:
        model.eval()
        for number in range(EXAMPLES):
            batch = batch_of(np.array([number]))
            found = block_gradient(model, partition, range(6), batch).gradients
            arrays = {name: g.numpy(force=True) for name, g in found.items()}
            for names in parts.values():
                projection(arrays, names, KEY)
        _made_use_of(known)

    def rows_of_all() -> None:
        found = pulls_after({}, gradients, values, parts, server_round=1, key=KEY)
        _made_use_of(found)

    def in_a_round() -> None:
        found = pulls_after(known, gradients, values, parts, server_round=2, key=KEY)
        _made_use_of(found)

    ways = {f.__name__: f for f in (one_by_one, rows_of_all, in_a_round)}
    taken = [{name: _cpu_s(way) for name, way in ways.items()} for _ in range(REPEATS)]
    tokens = batch_of(np.arange(EXAMPLES))["attention_mask"].sum(dim=1)
    print(
        json.dumps(
            {
                "mean_tokens": round(float(tokens.float().mean()), 1),
                **{
                    f"{name}_cpu_s": round(median(one[name] for one in taken), 3)
                    for name in ways
                },
            }
        )
    )


def _made_use_of(pulls: Mapping[int, Pulls]) -> None:
    for one in pulls.values():
        ExampleMean.of(one.projections)
        agreements_among(one.projections, 32)


def _cpu_s(way: Callable[[], None]) -> float:
    begun = time.process_time()
    way()
    return time.process_time() - begun


if __name__ == "__main__":
    main()
