"""The device's side of a round, as a Flower NumPyClient."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar
from torch import nn

from lola_flwr.blocks import BlockPartition
from lola_flwr.codec import codec_named
from lola_flwr.errors import UserError
from lola_flwr.models import fingerprint, load_values
from lola_flwr.protocol import Assignment, UpdateReport
from lola_flwr.randomness import rng_for
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.truncated_backprop import (
    Batch,
    LossFunction,
    block_gradient,
    model_loss,
)

# Gives the mini-batch of a round: (server_round, batch_size) -> arguments of the model.
BatchSource = Callable[[int, int], Batch]


class BlockClient(NumPyClient):
    """Trains the block that the server assigns, on the device's own data.

    Parameters
    ----------
    profile
        What this device offers.
    load_model
        Gives the device's model and its blocks; called when there is something to
        train, and not to report the profile. Every round overwrites the model's
        trainable values, so the virtual clients of one simulation worker can share it.
    batch_source
        Draws the round's mini-batch from the device's data.
    loss_function
        Maps model and batch to a mean loss (default: the model's own).
    seed
        Seed of the run; dropout follows from it, the round and the device's name.
    simulated_compute_s
        For a simulated device: the seconds that it would need for an assignment. They
        are reported, as simulated, in place of the measured ones.
    """

    def __init__(
        self,
        *,
        profile: DeviceProfile,
        load_model: Callable[[], tuple[nn.Module, BlockPartition]],
        batch_source: BatchSource,
        loss_function: LossFunction = model_loss,
        seed: int = 0,
        simulated_compute_s: Callable[[Assignment], float] | None = None,
    ) -> None:
        self._profile = profile
        self._load_model = load_model
        self._batch_source = batch_source
        self._loss_function = loss_function
        self._seed = seed
        self._simulated_compute_s = simulated_compute_s

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        """Report the device's profile."""
        return dict(self._profile.to_properties())

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Compute the mean gradient of the assigned block on one mini-batch.

        Parameters
        ----------
        parameters
            The model's trainable values, in the order of ``partition.trainable``.
        config
            The ``Assignment`` as a flat record.

        Returns
        -------
        Encoded gradients of block and head, the number of examples, and the
        ``UpdateReport`` as a flat record.

        Raises
        ------
        MalformedRecord
            ``config`` is no assignment.
        UserError
            Server and device do not hold the same model.
        """
        start = time.perf_counter()
        assignment = Assignment.from_record(config)
        model, partition = self._load_model()
        if fingerprint(model, partition.frozen) != assignment.base_fingerprint:
            raise UserError(
                "The frozen base weights of this device differ from the server's; use "
                "the same model, revision and seed on both."
            )
        load_values(model, partition.trainable, parameters)
        batch = self._batch_source(assignment.server_round, assignment.batch_size)
        rng = rng_for(
            self._seed, "dropout", assignment.server_round, self._profile.name
        )
        model.train()
        # The device's own random state is left as it was.
        with torch.random.fork_rng():
            torch.manual_seed(int(rng.integers(2**63)))
            result = block_gradient(
                model,
                partition,
                assignment.block_index,
                batch,
                loss_function=self._loss_function,
            )
        codec = codec_named(assignment.codec)
        encoded = [
            codec.encode(np.ascontiguousarray(gradient.numpy(force=True)))
            for gradient in result.gradients.values()
        ]
        report = UpdateReport(
            server_round=assignment.server_round,
            block_index=assignment.block_index,
            update_kind="gradient",
            loss=result.loss,
            compute_s=(
                time.perf_counter() - start
                if self._simulated_compute_s is None
                else self._simulated_compute_s(assignment)
            ),
            compute_clock=(
                "measured" if self._simulated_compute_s is None else "simulated"
            ),
        )
        return encoded, result.num_examples, report.to_record()
