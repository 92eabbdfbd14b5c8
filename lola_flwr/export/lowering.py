"""A step's graph as a program of ExecuTorch, with the frozen weights beside it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch._decomp import core_aten_decompositions
from torch.export import ExportedProgram
from torch.fx import Node

from lola_flwr.errors import UserError, reason_of
from lola_flwr.export.graph import FROZEN

# How messages of ExecuTorch and PyTorch write operators.
_OPERATOR = re.compile(r"\baten(?:\.|::)[a-z_0-9]\w*(?:\.\w+)?")


@dataclass(frozen=True, eq=False)
class StepProgram:
    """A program, as bytes.

    Parameters
    ----------
    code
        The program.
    frozen
        Its frozen weights, under their names in the model.
    arena_bytes
        What it sets aside for all that it computes.
    """

    code: bytes
    frozen: bytes
    arena_bytes: int


def runtime_version() -> str:
    """Return what programs are made with."""
    return f"executorch {version('executorch')}"


def lowered(step: ExportedProgram, *, what: str) -> StepProgram:
    """Turn a step into a program.

    Parameters
    ----------
    step
        The step, as `lola_flwr.export.graph.block_step` gives it.
    what
        What messages call it: ``"block 2 of 'minilm-l6'"``.

    Raises
    ------
    UserError
        ExecuTorch has no kernel for an operator of the step, which is named.
    """
    from executorch.exir import (
        EdgeCompileConfig,
        ExecutorchBackendConfig,
        to_edge_transform_and_lower,
    )
    from executorch.exir.passes import MemoryPlanningPass

    config = ExecutorchBackendConfig(
        external_constants=_place,
        # Inputs stay where the device has them: no second copy of the values.
        memory_planning_pass=MemoryPlanningPass(alloc_graph_input=False),
    )
    with _named_operators(step, what), warnings.catch_warnings():
        # Of ExecuTorch's own use of PyTorch.
        warnings.simplefilter("ignore", FutureWarning)
        edge = to_edge_transform_and_lower(
            step,
            partitioner=[_matrix_products()],
            compile_config=EdgeCompileConfig(_check_ir_validity=False),
        )
        made = edge.to_executorch(config)
    (plan,) = made.executorch_program.execution_plan
    refuse_operators(
        (".".join(filter(None, (o.name, o.overload))) for o in plan.operators), what
    )
    (frozen,) = made._tensor_data.values()
    return StepProgram(
        code=bytes(made.buffer),
        frozen=bytes(frozen),
        arena_bytes=sum(plan.non_const_buffer_sizes),
    )


def _matrix_products() -> Any:
    """Leave matrix products to XNNPACK, whose kernels take a third of the time.

    Other operators would gain little, and their results would be kept for longer.
    """
    from executorch.backends.xnnpack.partition.config.gemm_configs import MMConfig
    from executorch.backends.xnnpack.partition.config.generic_node_configs import (
        BMMConfig,
    )
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import (
        XnnpackPartitioner,
    )

    return XnnpackPartitioner(
        configs=[MMConfig, BMMConfig],
        # What is trained goes in with every run, and packed weights would be a copy.
        force_non_static_weights_for_f32_linear=True,
    )


def refuse_operators(operators: Iterable[str], what: str) -> None:
    """Refuse operators for which the runtime has no kernel.

    Parameters
    ----------
    operators
        Names as ``"aten::add.out"``.
    what
        What they are of.

    Raises
    ------
    UserError
        One of them has none.
    """
    known = _kernels()
    for operator in operators:
        if operator not in known:
            raise _no_kernel(operator, what)


def _place(node: Node) -> str | None:
    """Put what the model calls frozen into a file of its own; other constants stay."""
    return FROZEN if node.name.startswith(f"b_{FROZEN}_") else None


def _kernels() -> Collection[str]:
    """Return the operators that the runtime has kernels for."""
    from executorch.runtime import Runtime

    names: Collection[str] = Runtime.get().operator_registry.operator_names
    return names


def _foreign(step: ExportedProgram) -> Iterator[str]:
    """Give the operators of a step that no kernel has the name of."""
    known = {name.partition(".")[0] for name in _kernels()}
    taken_apart = core_aten_decompositions()
    for node in step.graph.nodes:
        target = node.target
        # Views are copies in a runtime; what returns nothing, as checks, is left out.
        if (
            isinstance(target, torch._ops.OpOverload)
            and target not in taken_apart
            and target._schema.returns
            and known.isdisjoint({target._schema.name, f"{target._schema.name}_copy"})
        ):
            yield target._schema.name


@contextmanager
def _named_operators(step: ExportedProgram, what: str) -> Iterator[None]:
    """Turn what ExecuTorch raises into a line that names the operator."""
    try:
        yield
    # Its passes raise errors of all types.
    except Exception as error:
        said = _OPERATOR.search(str(error))
        operator = next(_foreign(step), None) if said is None else said[0]
        if operator is None:
            raise UserError(
                f"{what} cannot be made a program of ExecuTorch ({reason_of(error)})."
            ) from error
        raise _no_kernel(operator, what) from error


def _no_kernel(operator: str, what: str) -> UserError:
    return UserError(
        f"{what} uses {operator}, for which ExecuTorch has no kernel; use a model "
        "without it."
    )
