"""A device that trains blocks, as a Flower NumPyClient."""

from __future__ import annotations

from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar

from lola_flwr.device.contract import Device, OutOfMemory
from lola_flwr.errors import UserError
from lola_flwr.wire.packing import MOVES, VALUES
from lola_flwr.wire.records import Assignment
from lola_flwr.wire.versions import Manifest


class BlockClient(NumPyClient):
    """Trains the block that the server assigns.

    Parameters
    ----------
    device
        Model, data and profile of the device.
    """

    def __init__(self, device: Device) -> None:
        self._device = device

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        """Report the device's profile."""
        return dict(self._device.profile.to_properties())

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        """Compute the mean gradient of the assigned block on one mini-batch.

        Parameters
        ----------
        parameters
            The model's trainable values that were sent, packed in one array, and
            changes of values in another; nothing, if the device holds them all.
        config
            The ``Assignment`` as a flat record.

        Returns
        -------
        The encoded gradients of block and head in one array, the number of examples,
        and the ``UpdateReport`` as a flat record. Without the memory for it: no array,
        and a record that says so.

        Raises
        ------
        MalformedRecord
            ``config`` is no assignment.
        UserError
            Server and device do not hold the same model, or the server's devices are
            to return weights.
        """
        assignment = Assignment.from_record(config)
        names = _names_of(assignment)
        if len(parameters) > len(names):
            raise UserError(
                f"{len(parameters)} arrays received instead of {len(names)}: the "
                "server's coordinator is for devices that return weights, and this "
                "client returns gradients. Make it with Coordinator, or wrap your own "
                "training code with AssignedBlock."
            )
        values = dict(zip(names, parameters, strict=False))
        try:
            update = self._device.train(assignment, values)
        except OutOfMemory as failure:
            return [], 0, failure.to_record()
        return [*update.arrays.values()], update.num_examples, update.report.to_record()


def _names_of(assignment: Assignment) -> tuple[str, ...]:
    """Return what the arrays of a message are, which has no names for them."""
    if assignment.manifest is None:
        return (VALUES,)
    manifest = Manifest.from_text(assignment.manifest)
    kinds = ((VALUES, manifest.sent_positions), (MOVES, manifest.moved_positions))
    return tuple(name for name, positions in kinds if positions)
