"""A training step as one graph: the loss, and back from it to a block, and no further.

The model's own code is traced twice: forward, which leaves tensors and operators of
PyTorch, and then forward and backward together, as autograd runs it. What is trained
goes in with every run, blocks that others train included, since they change from round
to round; what is frozen is in the graph, under the names that the model has for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from lola_flwr.errors import UserError, reason_of
from lola_flwr.model.backprop import Batch, LossFunction, model_loss
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.recording import require_gradients
from lola_flwr.model.stored_base import evaluation_mode

FROZEN = "frozen"
"""The module of a step that holds what is frozen: before each of its names."""


class LossModule(nn.Module):
    """A model and its loss, as one module with the arguments of a batch.

    Parameters
    ----------
    model
        The model.
    loss_function
        Maps model and batch to a scalar mean loss.
    """

    def __init__(self, model: nn.Module, loss_function: LossFunction) -> None:
        super().__init__()
        self.model = model
        self._loss_function = loss_function

    def forward(self, **batch: Tensor) -> Tensor:
        """Return the mean loss of a batch."""
        return self._loss_function(self.model, batch)


def traced_loss(
    model: nn.Module, batch: Batch, loss_function: LossFunction = model_loss
) -> nn.Module:
    """Trace a model's loss, without dropout; once for all of its blocks.

    Parameters
    ----------
    model
        The model; its mode is restored.
    batch
        Arguments of the model, of the shapes that it is traced for.
    loss_function
        Maps model and batch to a scalar mean loss (default: the model's own).

    Raises
    ------
    UserError
        The model's code cannot be traced.
    """
    modes = evaluation_mode(model)
    try:
        with torch.no_grad():
            return torch.export.export(
                LossModule(model, loss_function), (), kwargs=dict(batch)
            ).module(check_guards=False)
    # What tracing raises at a model's code is of all types.
    except Exception as error:
        raise UserError(
            f"{type(model).__name__} cannot be traced for a device without Python "
            f"({reason_of(error)}); use a model whose code does not depend on values."
        ) from error
    finally:
        for module, training in modes.items():
            module.training = training


def block_step(
    loss: nn.Module, partition: BlockPartition, block: int, batch: Batch
) -> ExportedProgram:
    """Make the step that trains one block.

    Parameters
    ----------
    loss
        The model's ``traced_loss``.
    partition
        The model's blocks.
    block
        The block, 0 nearest the input.
    batch
        A batch as for ``traced_loss``.

    Returns
    -------
    A program whose inputs are the values of ``partition.trainable``, in this order, and
    the tensors of the batch, and whose outputs are the loss and the gradients of
    ``partition.update_names(block)``. Its buffers are what is frozen.

    Raises
    ------
    UserError
        The block has no gradient, or the backward pass cannot be traced.
    """
    held = {
        name.removeprefix("model."): values.detach()
        for name, values in [*loss.named_parameters(), *loss.named_buffers()]
    }
    values = [held[name] for name in partition.trainable]
    frozen = {n: v for n, v in held.items() if n not in set(partition.trainable)}
    inputs = (*values, *batch.values())
    try:
        graph = make_fx(
            _step_function(loss, partition, block, list(batch), list(frozen)),
            tracing_mode="real",
            decomposition_table=_decompositions(),
        )(*inputs, *frozen.values())
        _hold(graph, frozen, first=len(inputs))
        return torch.export.export(graph, inputs)
    except UserError:
        raise
    # As for the forward pass.
    except Exception as error:
        raise UserError(
            f"The step of block {block} cannot be traced for a device without Python "
            f"({reason_of(error)})."
        ) from error


def _step_function(
    loss: nn.Module,
    partition: BlockPartition,
    block: int,
    batch_names: Sequence[str],
    frozen_names: Sequence[str],
) -> Callable[..., tuple[Tensor, ...]]:
    wanted = partition.update_names(block)
    num_values, num_inputs = len(partition.trainable), len(batch_names)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        values, others = tensors[:num_values], tensors[num_values:]
        batch, frozen = others[:num_inputs], others[num_inputs:]
        given = dict(zip(partition.trainable, values, strict=True))
        leaves = {n: given[n].detach().requires_grad_(True) for n in wanted}
        held = {**given, **leaves, **dict(zip(frozen_names, frozen, strict=True))}
        # The other implementations of attention have backward passes of their own,
        # which no runtime but PyTorch's has.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            mean_loss = functional_call(
                loss,
                {f"model.{name}": each for name, each in held.items()},
                kwargs=dict(zip(batch_names, batch, strict=True)),
            )
            found = torch.autograd.grad(
                mean_loss, list(leaves.values()), allow_unused=True
            )
        gradients = dict(zip(wanted, found, strict=True))
        missing = [name for name, each in gradients.items() if each is None]
        require_gradients(f"block {block}", partition.blocks[block], missing)
        return (
            mean_loss.detach(),
            *(
                torch.zeros_like(leaves[name]) if each is None else each.detach()
                for name, each in gradients.items()
            ),
        )

    return step


def _decompositions() -> dict[Any, Callable[..., Any]]:
    """Return into what operators are taken apart: those that runtimes have."""
    # Products alone are left to faster kernels; ExecuTorch's own of addmm takes some
    # thirty times as long as its mm.
    return {**core_aten_decompositions(), torch.ops.aten.addmm.default: _added_product}


def _added_product(
    added: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    product = torch.mm(left, right)
    product = product if alpha == 1 else alpha * product
    return product + (added if beta == 1 else beta * added)


def _hold(
    graph: torch.fx.GraphModule, frozen: Mapping[str, Tensor], *, first: int
) -> None:
    """Let a graph hold its frozen inputs, from the given one on, under their names."""
    graph.add_module(FROZEN, _nested(frozen))
    given = [node for node in graph.graph.nodes if node.op == "placeholder"][first:]
    for name, node in zip(frozen, given, strict=True):
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(graph.graph.get_attr(f"{FROZEN}.{name}"))
        graph.graph.erase_node(node)
    graph.recompile()


def _nested(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Put tensors into modules so that their names are these."""
    root = nn.Module()
    for name, values in tensors.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.register_buffer(last, values)
    return root
