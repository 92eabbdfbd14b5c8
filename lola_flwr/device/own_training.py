"""A model that is trained by a project's own code: what of it goes back."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Self
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
from torch import nn

from lola_flwr.device.base_model import check_base
from lola_flwr.errors import UserError
from lola_flwr.model.backprop import only_trainable
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.recording import noted_calls
from lola_flwr.model.statistics import statistics_names
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.records import Assignment, UpdateReport

# What clients hand on and need no PyTorch for.
Model = nn.Module

# Names of the parameters of a model that wanted a gradient before it was prepared: that
# others do not is the project's wish, and no trace of an earlier preparation.
_made: ContextVar[list[PreparedBlock] | None] = ContextVar("blocks", default=None)
_trainable: WeakKeyDictionary[nn.Module, set[str]] = WeakKeyDictionary()


class PreparedBlock:
    """Prepares a model for its assigned block, until it is left as a context manager.

    Parameters
    ----------
    model
        The model to train, with the values that were received.
    assignment
        What the server asks for.
    received
        Block and head as they were received, by name; of others, those that the model
        holds now are.

    Raises
    ------
    UserError
        The model is not the server's or has frozen what the server asks for, or the
        server expects gradients.
    """

    def __init__(
        self,
        model: Model,
        assignment: Assignment,
        received: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self.assignment = assignment
        sent_names, frozen_names = asked_names(assignment)
        update_names = lines_of(assignment.own_names) or sent_names
        self._local = set(lines_of(assignment.local_names))
        parameters = dict(model.named_parameters())
        known = {*parameters, *dict(model.named_buffers())}
        unknown = [n for n in (*update_names, *frozen_names) if n not in known]
        if unknown:
            raise UserError(
                f"The server asks for {unknown[0]}, which this model lacks; use the "
                "same model on both."
            )
        _refuse_frozen(model, update_names)
        # Seen from here there is one block: what this device trains.
        partition = BlockPartition(blocks=(update_names,), head=(), frozen=frozen_names)
        check_base(model, partition, assignment)
        self._model = model
        self._names = dict(zip(update_names, sent_names, strict=True))
        # What is the device's own is trained as the project does.
        others = (
            {*parameters} - {*frozen_names} if assignment.trains_all else self._local
        )
        own = [n for n in parameters if n in others & _trainable[model]]
        self._start = time.perf_counter()
        self._prepared = only_trainable(model, {*update_names, *own})
        prepared = self._prepared.__enter__()
        self._parameters = {name: prepared[name] for name in update_names}
        self._received: dict[str, npt.NDArray[Any]] = {}
        if assignment.codec != "fp32":
            self._received = {
                self._names[name]: parameter.float().numpy(force=True).copy()
                for name, parameter in self._parameters.items()
            } | {**(received or {})}
        self._calls = noted_calls(model, update_names).__enter__()
        self._frozen_since: list[str] | None = None
        made = _made.get()
        if made is not None:
            made.append(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end_of_training()
        self._prepared.__exit__(kind, error, traceback)

    def _end_of_training(self) -> None:
        """Look at what became of the parameters, before their flags are restored."""
        if self._frozen_since is None:
            self._calls.__exit__(None, None, None)
            parameters = self._parameters.items()
            self._frozen_since = [n for n, p in parameters if not p.requires_grad]

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the present weights of block and head, and statistics, by name.

        Raises
        ------
        NoGradient
            One of them was used, but could not be trained: by re-entrant gradient
            checkpointing it gets no gradient.
        UserError
            The project's own code has frozen one of them.
        """
        self.check()
        state = self._model.state_dict()
        own, sent = next(iter(self._names.items()))
        inside = own.removesuffix(sent)
        return {
            **{
                self._names[name]: parameter.float().numpy(force=True)
                for name, parameter in self._parameters.items()
            },
            **{
                n.removeprefix(inside): state[n].numpy(force=True)
                for n in statistics_names(state)
                if n not in self._local
            },
        }

    def update(self) -> dict[str, npt.NDArray[Any]]:
        """Return what goes to the server: the arrays, or their encoded moves."""
        return encoded_moves(self.assignment, self._received, self.arrays())

    def check(self) -> None:
        """Make sure that block and head could be trained, or raise as `arrays`."""
        self._end_of_training()
        if self._frozen_since:
            raise _frozen(self._frozen_since[0])
        self._calls.check(self._parameters)

    def report(self, loss: float | None = None) -> UpdateReport:
        """Return what goes with the weights.

        Parameters
        ----------
        loss
            Mean training loss, for the server's log.
        """
        return weights_report(self.assignment, self._start, loss)


class noted_blocks:
    """Note which blocks are prepared within a ``with``; entering gives the list.

    The one that wraps a project's training function cannot see the model in it.
    """

    def __enter__(self) -> list[PreparedBlock]:
        blocks: list[PreparedBlock] = []
        self._token = _made.set(blocks)
        return blocks

    def __exit__(self, *_: object) -> None:
        _made.reset(self._token)


def _refuse_frozen(model: nn.Module, names: Iterable[str]) -> None:
    """Refuse to train what the project has frozen."""
    trainable = _trainable.setdefault(model, set())
    trainable |= {name for name, p in model.named_parameters() if p.requires_grad}
    for name in names:
        if name not in trainable:
            raise _frozen(name)


def _frozen(name: str) -> UserError:
    return UserError(
        f"The server asks for {name}, which this device's code has frozen "
        "(requires_grad=False): freeze it in the server's model, too, before "
        "coordinator_for_weights, which then leaves it out."
    )


def asked_names(assignment: Assignment) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of block and head, and of the frozen parameters.

    Raises
    ------
    UserError
        The assignment has none: the server expects gradients.
    """
    if assignment.update_names is None or assignment.frozen_names is None:
        raise UserError(
            "The server expects gradients, and this device trains a model of its own; "
            "make the server's coordinator with coordinator_for_weights."
        )
    update, frozen = assignment.update_names, assignment.frozen_names
    return lines_of(update), lines_of(frozen)


def lines_of(text: str | None) -> tuple[str, ...]:
    """Return the names that an assignment has one a line."""
    return tuple((text or "").splitlines())


def encoded_moves(
    assignment: Assignment,
    sent: Mapping[str, npt.NDArray[Any]],
    trained: Mapping[str, npt.NDArray[Any]],
) -> dict[str, npt.NDArray[Any]]:
    """Return what travels of trained arrays: how far they moved, encoded.

    Of weights a codec would round most of the move away.

    Parameters
    ----------
    assignment
        What the server asked for; in ``"fp32"`` the arrays themselves travel.
    sent
        Those of block and head as they were received.
    trained
        They and others, as running statistics, as they are now.
    """
    if assignment.codec == "fp32":
        return {**trained}
    codec, moves = codec_named(assignment.codec), {}
    for name, values in trained.items():
        if name in sent:
            wide = np.result_type(sent[name], np.float32)
            move = np.subtract(sent[name], values, dtype=wide)
            values = codec.encode(np.asarray(move, np.float32))
        moves[name] = values
    return moves


def weights_report(
    assignment: Assignment, start: float, loss: float | None
) -> UpdateReport:
    """Return what goes with weights that a project's own code has trained.

    Parameters
    ----------
    assignment
        What the server asked for.
    start
        What ``time.perf_counter`` said before the training.
    loss
        Mean training loss, where the project tells it.
    """
    return UpdateReport(
        server_round=assignment.server_round,
        block_index=assignment.block_index,
        update_kind="weights" if assignment.codec == "fp32" else "moves",
        loss=None if loss is None else float(loss),
        compute_s=time.perf_counter() - start,
        compute_clock="measured",
    )
