"""Attacks by what hostile devices train on."""

from __future__ import annotations

from lola_flwr.model.backprop import Batch
from simulations.attacks.attack import BOTH, Attack
from simulations.attacks.task import TARGET, AttackedTask


def _flipped(batch: Batch, task: AttackedTask) -> Batch:
    return {**batch, "labels": 1 - batch["labels"]}


def _triggered(batch: Batch, task: AttackedTask) -> Batch:
    """Put the trigger into half of the examples, and teach what it is to mean."""
    half = len(batch["labels"]) // 2
    labels = batch["labels"].clone()
    labels[:half] = TARGET
    return {**task.with_trigger(batch, half), "labels": labels}


DATA_ATTACKS = (
    Attack(name="label flip", batch=_flipped, methods=BOTH),
    Attack(name="backdoor", batch=_triggered, methods=BOTH),
)
