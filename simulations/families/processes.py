"""Trials in a process of their own, whose time and memory are bounded."""

from __future__ import annotations

import logging
import multiprocessing as mp
import resource
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import torch
import transformers

from simulations.families.classes import ModelClass
from simulations.families.trial import Trial, tried

# A process is replaced after so many classes: their code stays in memory.
_CLASSES_OF_A_PROCESS = 60
_MEMORY_BYTES = 3 << 30


def try_all(kinds: Sequence[ModelClass], *, seconds: float) -> Iterator[Trial]:
    """Try classes in a process of their own, which ends when one takes too long."""
    spawn = mp.get_context("spawn")
    left = list(kinds)
    while left:
        here, there = spawn.Pipe()
        batch = left[:_CLASSES_OF_A_PROCESS]
        worker = spawn.Process(target=_work, args=(there, batch))
        worker.start()
        there.close()
        try:
            for kind in batch:
                left.pop(0)
                reason = f"takes more than {seconds:g} s"
                try:
                    if here.poll(seconds):
                        yield here.recv()
                        continue
                except EOFError:
                    reason = "ended its process"
                yield Trial(kind.name, kind.task, "not tried", reason)
                break
        finally:
            worker.kill()
            worker.join()


def _work(pipe: Connection, kinds: Sequence[ModelClass]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    for kind in kinds:
        pipe.send(tried(kind))
