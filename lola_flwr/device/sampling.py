"""Mini-batches of chosen examples: a device looks at more than it trains on.

A pool of examples, some times as large as the mini-batch, goes through the model
forward only; the mini-batch is what a rule picks out of it. Both rules bias the
gradient on purpose. The forward pass over the pool costs the device time, which a
simulated clock has to count by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lola_flwr.device.block_device import BatchSource
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import Batch
from lola_flwr.model.stored_base import evaluation_mode

Rule = Literal["entropy", "coreset"]

# Size of a pool, in mini-batches.
POOL_FACTOR = 2


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenBatches:
    """A source of mini-batches that are chosen from larger ones.

    Parameters
    ----------
    source
        Draws the pools.
    load_model
        Gives the device's model, a classifier, with the values of the round.
    rule
        "entropy": the examples that the model is least sure of (`most_uncertain`);
        "coreset": those whose errors are most like those of all (`coreset`).
    pool_factor
        Size of the pool, in mini-batches.

    Raises
    ------
    UserError
        The pool is no larger than the mini-batch, or the rule is unknown.
    """

    source: BatchSource
    load_model: Callable[[], nn.Module]
    rule: Rule = "entropy"
    pool_factor: int = POOL_FACTOR

    def __post_init__(self) -> None:
        if self.pool_factor < 2:
            raise UserError(f"pool_factor={self.pool_factor} must be at least 2.")
        if self.rule not in _RULES:
            raise UserError(
                f"rule={self.rule!r} is unknown; choose from {', '.join(_RULES)}."
            )

    def __call__(self, server_round: int, batch_size: int) -> Batch:
        """Draw the mini-batch of a round."""
        pool = self.source(server_round, self.pool_factor * batch_size)
        model: Any = self.load_model()
        evaluation_mode(model)
        device = next(model.parameters()).device
        # A mini-batch at a time is what the device has the memory for.
        parts = {name: torch.split(tensor, batch_size) for name, tensor in pool.items()}
        with torch.no_grad():
            logits = torch.cat(
                [
                    model(**{n: t.to(device) for n, t in zip(parts, part, strict=True)})
                    .logits.float()
                    .cpu()
                    for part in zip(*parts.values(), strict=True)
                ]
            )
        # A device with few examples has a small pool.
        count = min(batch_size, len(logits))
        chosen = _RULES[self.rule](logits, pool["labels"], count)
        return {name: tensor[chosen] for name, tensor in pool.items()}


def most_uncertain(logits: Tensor, count: int, *, temperature: float = 1.0) -> Tensor:
    """Return the examples of the largest predictive entropy.

    Source: the entropy-based data selection of FedFT-EDS (federated fine-tuning of part
    of a model on the samples of the highest entropy), which sharpens or flattens the
    predictions by a temperature first.

    Parameters
    ----------
    logits
        Predictions, shape [M, C].
    count
        Examples to choose.
    temperature
        The logits are divided by it: below 1 for sharper predictions.

    Returns
    -------
    Indices, shape [count], the most uncertain first.
    """
    log_chance = torch.log_softmax(logits / temperature, dim=1)
    entropy = -(log_chance.exp() * log_chance).sum(dim=1)
    return entropy.argsort(descending=True, stable=True)[:count]


def coreset(logits: Tensor, labels: Tensor, count: int) -> Tensor:
    """Return the examples whose gradients stand best for those of all.

    Source: coresets by facility location over gradients, as in Mirzasoleiman, Bilmes,
    Leskovec, "Coresets for Data-efficient Training of Machine Learning Models" (CRAIG),
    arXiv:1906.01827, and, for mini-batches, Nguyen et al., "Mini-batch Coresets for
    Memory-efficient Language Model Training on Data Mixtures" (CoLM), arXiv:2407.19580.
    The gradient of the loss with respect to the logits, the error ``p - y``, stands for
    the gradient itself; examples are not weighted by how many they stand for.

    Parameters
    ----------
    logits
        Predictions, shape [M, C].
    labels
        Class of each example, shape [M].
    count
        Examples to choose.

    Returns
    -------
    Indices, shape [count], in the order of a greedy choice: each is the one that brings
    the others' nearest representatives closest.
    """
    error = torch.softmax(logits, dim=1)
    error = error - nn.functional.one_hot(labels, logits.shape[1])
    distance = torch.cdist(error, error)  # [M, M]
    # So far every example is represented at the largest distance that there is.
    nearest = distance.max().expand(len(error)).clone()
    chosen: list[int] = []
    for _ in range(count):
        gain = (nearest[:, None] - distance).clamp(min=0).sum(dim=0)
        gain[chosen] = -1
        best = int(gain.argmax())
        chosen.append(best)
        nearest = torch.minimum(nearest, distance[best])
    return torch.tensor(chosen)


_RULES: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "entropy": lambda logits, _, count: most_uncertain(logits, count),
    "coreset": coreset,
}
