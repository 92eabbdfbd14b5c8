"""Attacks by what hostile devices train on."""

from __future__ import annotations

from lola_flwr.model.backprop import Batch
from simulations.attacks.attack import Attack
from simulations.attacks.small import TARGET, with_trigger


def _flipped(batch: Batch) -> Batch:
    return {**batch, "labels": 1 - batch["labels"]}


def _triggered(batch: Batch) -> Batch:
    """Put the trigger into half of the examples, and teach what it is to mean."""
    changed = with_trigger(batch)
    half = len(batch["labels"]) // 2
    labels, input_ids = batch["labels"].clone(), batch["input_ids"].clone()
    labels[:half] = TARGET
    input_ids[:half] = changed["input_ids"][:half]
    return {**batch, "labels": labels, "input_ids": input_ids}


DATA_ATTACKS = (
    Attack(name="label flip", batch=_flipped),
    Attack(name="backdoor", batch=_triggered),
)
