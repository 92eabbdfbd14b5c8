"""Splitting the training examples over the devices."""

import math
import warnings

import numpy as np
import numpy.typing as npt

from lola_flwr.arrays import IntArray
from lola_flwr.errors import UserError

PARTITIONINGS = ("iid", "dirichlet")
"""The ways to split."""


class PartitionError(UserError):
    """The examples cannot be split as asked; the message says what to change."""


def partition_examples(
    labels: npt.ArrayLike,
    num_partitions: int,
    *,
    partitioning: str = "iid",
    alpha: float = 0.5,
    min_examples: int = 1,
    seed: int = 0,
) -> list[IntArray]:
    """Split the examples over the devices.

    A pure function of its arguments: every process that calls it with the same ones
    gets the same parts, so each device can work out its own.

    Parameters
    ----------
    labels
        Labels of the M examples, shape [M]; only "dirichlet" looks at their values.
    num_partitions
        Number of devices.
    partitioning
        "iid": equal shares at random. "dirichlet": the share of each class that a
        device gets is drawn from a symmetric Dirichlet distribution [1]_.
    alpha
        Concentration of "dirichlet"; the smaller, the fewer classes a device sees.
    min_examples
        Fewest examples a device may have.
    seed
        Seed of the split.

    Returns
    -------
    The indices of each device's examples; together each index from 0 to M - 1 once.

    Raises
    ------
    PartitionError
        If an argument is out of range, labels are scores and the split is by class,
        or a device would have fewer than ``min_examples`` examples.

    References
    ----------
    .. [1] Hsu, Qi and Brown, "Measuring the Effects of Non-Identical Data
       Distribution for Federated Visual Classification", 2019.
       https://arxiv.org/abs/1909.06335
    """
    values = np.asarray(labels)
    _check_arguments(values, num_partitions, partitioning, alpha, min_examples)
    order = np.random.default_rng(seed).permutation(len(values))
    if partitioning == "iid":
        return np.array_split(order, num_partitions)
    # They take a second, and a hundred MB, in every process of a run.
    import datasets
    from flwr_datasets.partitioner import DirichletPartitioner

    # The index travels as a column, so that a part says which examples it holds.
    rows = datasets.Dataset.from_dict({"index": order, "label": values[order]})
    partitioner = DirichletPartitioner(
        num_partitions,
        partition_by="label",
        alpha=float(alpha),
        min_partition_size=min_examples,
        seed=seed,
    )
    partitioner.dataset = rows
    try:
        with warnings.catch_warnings():
            # One warning for each try that gives a device too little: it says to do
            # what the error below says, ten times.
            warnings.simplefilter("ignore")
            parts = [partitioner.load_partition(k) for k in range(num_partitions)]
    except ValueError as error:
        raise PartitionError(
            f"Too few examples on a device: partitioning='dirichlet' with "
            f"alpha={alpha} found no split of {len(values)} examples over "
            f"{num_partitions} devices with at least min_examples={min_examples} each "
            f"by seed={seed}. Try another seed, raise alpha, or use fewer devices."
        ) from error
    return [np.asarray(part["index"][:], dtype=np.int64) for part in parts]


def _check_arguments(
    labels: npt.NDArray[np.generic],
    num_partitions: int,
    partitioning: str,
    alpha: float,
    min_examples: int,
) -> None:
    """Refuse what no partitioner could do."""
    if partitioning not in PARTITIONINGS:
        raise PartitionError(
            f"Unknown split: partitioning={partitioning!r}. "
            f"Use one of {', '.join(PARTITIONINGS)}."
        )
    if labels.ndim != 1:
        raise PartitionError(
            f"Shape mismatch: labels is {list(labels.shape)}, must be [M]."
        )
    if num_partitions < 1:
        raise PartitionError(
            f"No device: num_partitions={num_partitions}, must be at least 1."
        )
    if min_examples < 1:
        raise PartitionError(
            f"A device would have no data: min_examples={min_examples}, must be at "
            "least 1."
        )
    if len(labels) // num_partitions < min_examples:
        raise PartitionError(
            f"Too few examples: {len(labels)} examples over {num_partitions} devices "
            f"are {len(labels) // num_partitions} each, min_examples={min_examples}. "
            "Use fewer devices or more data."
        )
    if partitioning == "dirichlet":
        if not (alpha > 0 and math.isfinite(alpha)):
            raise PartitionError(
                f"Bad concentration: alpha={alpha}, must be positive and finite."
            )
        if np.issubdtype(labels.dtype, np.floating):
            raise PartitionError(
                "No classes: partitioning='dirichlet' splits by class, but the labels "
                "are scores (a regression). Use partitioning='iid'."
            )
