"""Mini-batches of chosen examples: a device looks at more than it trains on.

A pool of examples, some times as large as the mini-batch, goes through the model
forward only; the mini-batch is what a rule picks out of it. Both rules bias the
gradient on purpose, a weighted coreset by less. The forward pass over the pool costs
the device time, which a simulated clock has to count by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lola_flwr.device.block_device import BatchSource
from lola_flwr.device.sampler_options import Entropy, Rule
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import Batch
from lola_flwr.model.example_losses import EXAMPLE_WEIGHTS
from lola_flwr.model.stored_base import evaluation_mode


@dataclass(frozen=True, kw_only=True, eq=False)
class ChosenBatches:
    """A source of mini-batches that are chosen from larger ones.

    A weighted coreset says in ``example_weights`` what its examples weigh, on average
    1. The model's own loss (`lola_flwr.model.backprop.model_loss`) goes by that; a loss
    function of yours has to.

    Parameters
    ----------
    source
        Draws the pools.
    load_model
        Gives the device's model, a classifier, with the values of the round.
    rule
        `Entropy`: the examples that the model is least sure of (`most_uncertain`);
        `Coreset`: those whose errors are most like those of all (`coreset`).

    Raises
    ------
    UserError
        The rule is none.
    """

    source: BatchSource
    load_model: Callable[[], nn.Module]
    rule: Rule = field(default_factory=Entropy)

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise UserError(f"rule={self.rule!r} must be an Entropy() or a Coreset().")

    def __call__(self, server_round: int, batch_size: int) -> Batch:
        """Draw the mini-batch of a round."""
        pool = self.source(server_round, self.rule.pool_factor * batch_size)
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
        if isinstance(self.rule, Entropy):
            chosen = most_uncertain(logits, count, temperature=self.rule.temperature)
            return _rows(pool, chosen)
        chosen, stands_for = coreset(logits, pool["labels"], count)
        batch = _rows(pool, chosen)
        if self.rule.weighted:
            # The mean over the mini-batch is then that over the pool.
            batch[EXAMPLE_WEIGHTS] = stands_for.float() * (count / len(logits))
        return batch


def _rows(pool: Batch, chosen: Tensor) -> dict[str, Tensor]:
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
    # Hardened chances differ by little from 1: double precision tells them apart.
    log_chance = torch.log_softmax(logits.double() / temperature, dim=1)
    entropy = -(log_chance.exp() * log_chance).sum(dim=1)
    return entropy.argsort(descending=True, stable=True)[:count]


def coreset(logits: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the examples whose gradients stand best for those of all.

    Source: coresets by facility location over gradients, as in Mirzasoleiman, Bilmes,
    Leskovec, "Coresets for Data-efficient Training of Machine Learning Models" (CRAIG),
    arXiv:1906.01827, and, for mini-batches, Nguyen et al., "Mini-batch Coresets for
    Memory-efficient Language Model Training on Data Mixtures" (CoLM), arXiv:2407.19580.
    The gradient of the loss with respect to the logits, the error ``p - y``, stands for
    the gradient itself.

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
    the others' nearest representatives closest. And how many examples each stands for,
    itself among them, shape [count]: those to which none of the others is nearer; they
    sum to M.
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
    found = torch.tensor(chosen)
    nearest_of = distance[:, found].argmin(dim=1)  # [M]
    # One of several alike stands for itself, whichever of them the others count to.
    nearest_of[found] = torch.arange(count)
    return found, torch.bincount(nearest_of, minlength=count)
