"""What the blocks of a model cost, counted on the model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from lola_flwr.arrays import Float64Array
from lola_flwr.costs.counted import counted, parameter_bytes
from lola_flwr.costs.counter import at_batch
from lola_flwr.costs.estimated import BlockCosts, TogetherCosts
from lola_flwr.costs.examples import training_example
from lola_flwr.costs.memory import Affine, Levers, Recomputation, StepMemory
from lola_flwr.costs.runnable import Counts
from lola_flwr.costs.shapes import config_file
from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.activations import Activations
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.ladder import is_ladder
from lola_flwr.model.trace import Example
from lola_flwr.wire.codec import codec_named
from lola_flwr.wire.payload import payload_bits, projections_bytes


def model_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int = 1,
    codec: str = "fp32",
    merged: bool = False,
    micro_batch_size: int = 0,
    example: Example | None = None,
    activations: Activations = "exact",
) -> BlockCosts:
    """Count what training each block costs a device.

    Parameters
    ----------
    model
        The model; it stays as it is. It may be without weights (on ``"meta"``).
    partition
        Its layers as blocks, also if ``merged``.
    batch_size
        Examples of a device's mini-batch.
    sequence_length
        Tokens of an example, where the model reads tokens and no example is given.
    codec
        Name of the codec that gradients travel in.
    merged
        Whether one device trains the whole stack, as in ``partition.merged()``, rather
        than one block of it.
    micro_batch_size
        Examples that are computed at a time; 0: all of the mini-batch.
    example
        The model's input for one example or more, such as a batch that a device trains
        on (default: made from the model itself). Its values matter only where
        what the model does depends on them.
    activations
        How devices keep what the layers from a block on save for the backward pass
        (`lola_flwr.model.activations`): as it is, "exact", or as "int8".

    Returns
    -------
    BlockCosts
        One entry per block; a single one if ``merged``.

    Raises
    ------
    UserError
        The model's input is not known without an example, the model does not run on
        it, or what it computes depends on values.
    """
    example = training_example(model, sequence_length) if example is None else example
    partition = partition.merged() if merged else partition
    size = min(micro_batch_size or batch_size, batch_size)
    batch = _Batch(batch_size, size)
    counts, held_bytes, count_together, count_twice, count_together_twice = counted(
        model,
        example,
        lambda m: (
            m.count(partition, size, activations=activations),
            m.held_bytes(),
            m.later(
                lambda: m.count(partition, size, together=True, activations=activations)
            ),
            m.later(lambda: m.count_twice(partition, size)),
            m.later(lambda: m.count_twice(partition, size, together=True)),
        ),
    )
    sizes = parameter_bytes(model)

    def total(names: Iterable[str]) -> float:
        return float(sum(sizes.get(name, 0) for name in set(names)))

    parameters = dict(model.named_parameters())
    updates = [
        [parameters[name].nbytes for name in partition.update_names(index)]
        for index in range(partition.num_blocks)
    ]
    update_bytes = np.array([sum(update) for update in updates], np.float64)
    layers = partition.layers or ((),) * partition.num_blocks
    layer_bytes = np.array(
        [total({*b, *layer}) for b, layer in zip(partition.blocks, layers, strict=True)]
    )
    head_bytes = total((*partition.head, *partition.frozen_head))
    if is_ladder(model):
        # All of it runs for every block: no weights can stay on a disk meanwhile.
        layer_bytes, head_bytes = np.zeros(partition.num_blocks), float(held_bytes)
    step = StepMemory(
        batch_size=batch_size,
        micro_batch_size=size,
        sequence_length=_tokens(example, sequence_length),
        layer_bytes=layer_bytes,
        rest_bytes=held_bytes - layer_bytes.sum() - head_bytes,
        head_bytes=head_bytes,
        update_bytes=update_bytes,
        array_bytes=np.array([max(update) for update in updates], np.float64),
        whole_bytes=counts.whole_bytes,
        pass_bytes=batch.pass_bytes(counts),
        working_bytes=Affine.through(counts.below_one_bytes, counts.below_bytes, size),
        recomputation=cache(lambda: batch.recomputation(counts, count_twice())),
    )
    shapes = {n: tuple(p.shape) for n, p in parameters.items()}
    block_bytes = np.array(
        [sum(parameters[name].nbytes for name in block) for block in partition.blocks]
    )
    all_bits = payload_bits(partition.merged(), shapes, codec_named(codec))

    @cache
    def together() -> TogetherCosts:
        counts = count_together()
        return TogetherCosts(
            flops=batch.flops(counts),
            whole_bytes=counts.whole_bytes,
            pass_bytes=batch.pass_bytes(counts),
            block_bytes=block_bytes,
            payload_bits=float(all_bits[0]),
            recomputation=cache(
                lambda: batch.recomputation(counts, count_together_twice())
            ),
            example_flops=batch.example_flops(counts),
        )

    return BlockCosts(
        flops=batch.flops(counts),
        memory_bytes=step.peak_bytes(Levers(size)),
        payload_bits=payload_bits(partition, shapes, codec_named(codec)),
        gradient_bytes=update_bytes,
        step=step,
        together=together,
        example_flops=batch.example_flops(counts),
    )


@dataclass(frozen=True)
class _Batch:
    """A mini-batch, and how much of it is computed at a time."""

    examples: int
    at_a_time: int

    def flops(self, counts: Counts) -> Float64Array:
        passes = -(-self.examples // self.at_a_time)
        return passes * at_batch(counts.flops, self.examples / passes)

    def example_flops(self, counts: Counts) -> Float64Array:
        """Return what each example adds: what a loss that compares them takes counts.

        Between one example and all it is a straight line, which operations, convex in
        the examples, are nowhere above.
        """
        if self.examples == 1:
            return self.flops(counts)
        fewer = at_batch(counts.flops, 1)
        return np.asarray((self.flops(counts) - fewer) / (self.examples - 1))

    def pass_bytes(self, counts: Counts) -> Affine:
        return Affine.through(counts.one_bytes, counts.pass_bytes, self.at_a_time)

    def recomputation(
        self, counts: Counts, twice: Counts | None
    ) -> Recomputation | None:
        """Compare steps with those whose layers run twice, if they can."""
        if twice is None:
            return None
        further_flops = self.flops(twice) - self.flops(counts)
        return Recomputation(further_flops, twice.whole_bytes, self.pass_bytes(twice))


def configured_model_costs(
    model: str,
    *,
    batch_size: int,
    sequence_length: int,
    codec: str = "fp32",
    stack: str | None = None,
) -> BlockCosts:
    """Count what the blocks of a model cost, from its configuration alone.

    Parameters
    ----------
    model
        A directory with a ``config.json``, or such a file. The model is of the class
        that it names, with float32 weights. An encoder that predicts masked words, or
        of no class, is taken for a classifier of sequences, as it is fine-tuned.
    batch_size, sequence_length, codec
        As for `model_costs`.
    stack
        As for `model_partition`.

    Raises
    ------
    UserError
        Not a model of transformers, or one whose costs cannot be counted so.
    """
    import transformers

    path = config_file(model)
    if path is None or not path.is_file():
        # transformers would look for a model of that name on the hub.
        raise UserError(f"model={model!r} has no config.json.")
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(path), trust_remote_code=False
        )
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("its weights are quantised: load it, and use model_costs")
        named = (getattr(config, "architectures", None) or [""])[0]
        build = getattr(transformers, named, None)
        if build is None or named.endswith(("ForMaskedLM", "ForPreTraining", "Model")):
            build = transformers.AutoModelForSequenceClassification.from_config
        with torch.device("meta"):
            built = build(config)
    # What transformers raises on a configuration is of all types.
    except Exception as error:
        raise UserError(
            f"model={model!r} cannot be counted: {reason_of(error)}."
        ) from error
    return model_costs(
        built,
        model_partition(built, stack=stack),
        batch_size=batch_size,
        sequence_length=sequence_length,
        codec=codec,
    )


def zeroth_order_costs(
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    num_directions: int,
    example: Example | None = None,
) -> BlockCosts:
    """Count what each block costs a device that trains by forward passes alone.

    Parameters
    ----------
    model, partition, batch_size, sequence_length, example
        As for `model_costs`.
    num_directions
        Directions of a mini-batch, two forward passes each.

    Returns
    -------
    Costs that hardly depend on the block: two forward passes a direction; the weights,
    a copy of block and head, and what a forward pass takes; a number a direction.
    """
    example = training_example(model, sequence_length) if example is None else example
    forward, held_bytes = counted(
        model, example, lambda m: (m.run(partition, None), m.held_bytes())
    )
    parameters = dict(model.named_parameters())
    moved = [
        sum(parameters[name].nbytes for name in partition.update_names(index))
        for index in range(partition.num_blocks)
    ]
    flops = 2 * num_directions * at_batch(forward.flops, batch_size)
    return BlockCosts(
        flops=np.full(partition.num_blocks, float(flops)),
        memory_bytes=held_bytes + forward.peak_bytes(batch_size) + np.array(moved),
        payload_bits=np.full(
            partition.num_blocks, 8.0 * projections_bytes(num_directions)
        ),
        gradient_bytes=np.zeros(partition.num_blocks),
    )


def with_pool(
    costs: BlockCosts,
    model: nn.Module,
    partition: BlockPartition,
    *,
    batch_size: int,
    sequence_length: int,
    pool_factor: int,
) -> BlockCosts:
    """Return costs to which the forward pass over a sampler's pool is added.

    Parameters
    ----------
    costs
        Costs of the blocks without it.
    model, partition, batch_size, sequence_length
        As for `model_costs`.
    pool_factor
        Size of a pool, in mini-batches.
    """
    # A direction takes two forward passes over a mini-batch.
    one = zeroth_order_costs(
        model,
        partition,
        batch_size=batch_size,
        sequence_length=sequence_length,
        num_directions=1,
    )
    flops = pool_factor * one.flops[0] / 2
    example_flops = costs.example_flops
    if example_flops is not None:
        example_flops = example_flops + flops / batch_size
    return replace(costs, flops=costs.flops + flops, example_flops=example_flops)


def _tokens(example: Example, sequence_length: int) -> int:
    """Return how many tokens of an example the embeddings look up."""
    ids = None if isinstance(example, Tensor) else example.get("input_ids")
    return ids[0].numel() if isinstance(ids, Tensor) else sequence_length
