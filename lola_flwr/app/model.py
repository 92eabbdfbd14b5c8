"""The configured model with its blocks and costs, for server and devices alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from lola_flwr.app.config import (
    AppConfig,
    FedAvgFullConfig,
    UpdatesConfig,
)
from lola_flwr.costs import of_model
from lola_flwr.costs.estimated import BlockCosts
from lola_flwr.d2ft.cuts import Cut, cuts_of
from lola_flwr.d2ft.pruned import prune
from lola_flwr.d2ft.recovery import check_recoverable, recovered
from lola_flwr.machine.files import local_path
from lola_flwr.model.adapter_blocks import model_partition
from lola_flwr.model.adapters import adapt
from lola_flwr.model.blocks import BlockPartition
from lola_flwr.model.loading import load_values
from lola_flwr.model.lora_start import begin_from
from lola_flwr.model.trace import Example
from lola_flwr.run.config import keyword_arguments


def adapted(config: AppConfig, model: nn.Module) -> Any:
    """Return a model with adapters, if they are what is tuned, on its stored base.

    The base is pruned before, if it is to be: this is the model that is trained.
    """
    cuts = _cuts_of(config, model)
    if cuts:
        prune(model, model_layers(config, model), cuts)
    made = _with_adapters(config, model)
    check_recoverable(made, cuts, keyword_arguments(config.tuning_options))
    return made


@dataclass(frozen=True, eq=False)
class WholeModel:
    """What a run evaluates and saves: the trained model, with all of its base.

    Parameters
    ----------
    model
        The model.
    cuts
        What devices hold of it, where its base is pruned; then it is another model
        than the one that is trained.
    """

    model: Any
    cuts: Mapping[str, Cut]

    def load(
        self, partition: BlockPartition, values: Mapping[str, npt.NDArray[np.floating]]
    ) -> None:
        """Overwrite what is trained by values of the trained model.

        Parameters
        ----------
        partition
            The trained model's blocks.
        values
            Its trained parameters, by their names, which are those of the whole one.
        """
        names = partition.trainable
        load_values(
            self.model, names, [recovered(n, values[n], self.cuts) for n in names]
        )


def whole_model(
    config: AppConfig, model: Any, load_base: Callable[[], nn.Module]
) -> WholeModel:
    """Return the model that a run evaluates and saves.

    Parameters
    ----------
    config
        Run configuration.
    model
        The model that is trained, by `adapted`.
    load_base
        Gives it anew as it was before: called where a part of it was pruned, and then
        there are two models in memory.
    """
    if config.pruned is None:
        return WholeModel(model, {})
    base = load_base()
    cuts = _cuts_of(config, base)
    return WholeModel(_with_adapters(config, base), cuts)


def _cuts_of(config: AppConfig, model: nn.Module) -> dict[str, Cut]:
    pruned = config.pruned
    if pruned is None:
        return {}
    return cuts_of(model, model_layers(config, model), pruned, seed=config.seed)


def _with_adapters(config: AppConfig, model: nn.Module) -> Any:
    options = keyword_arguments(config.tuning_options)
    return adapt(model, config.tuning, options, base=config.base, seed=config.seed)


def begin(config: AppConfig, model: nn.Module) -> str:
    """Let the server's model begin where the run is told to, if that is no usual start.

    Devices need not know: they are sent its values.

    Parameters
    ----------
    config
        Run configuration.
    model
        The model, with its adapters; changed in place.

    Returns
    -------
    What to tell the user; "" of the usual start.
    """
    if not config.start_from:
        return ""
    return begin_from(model, local_path(config.start_from))


def model_blocks(config: AppConfig, model: nn.Module) -> BlockPartition:
    """Divide the model: layer by layer, or all of it as one block."""
    layers = model_layers(config, model)
    return layers.merged() if isinstance(config, FedAvgFullConfig) else layers


def model_layers(config: AppConfig, model: nn.Module) -> BlockPartition:
    """Divide the model layer by layer, whatever the method."""
    return model_partition(
        model, stack=config.stack or None, blocks=config.blocks or None
    )


def model_costs(
    config: UpdatesConfig, model: nn.Module, example: Example | None = None
) -> BlockCosts:
    """Count each block's costs under the run's batch and length.

    What was counted last is kept: a simulation checks, serves and trains in one
    process.

    Parameters
    ----------
    config
        Run configuration.
    model
        The model.
    example
        As for `lola_flwr.costs.of_model.model_costs`.
    """
    layers = model_layers(config, model)
    # A configuration says how its model is made; what its name stands for may change.
    made = tuple(
        (name, p.shape, p.dtype, p.requires_grad, p.is_meta)
        for name, p in model.named_parameters()
    )
    asked = (config, str(model), made, layers, _content(example))
    if asked not in _counted:
        _counted.clear()
        _counted[asked] = _count(config, model, layers, example)
    return _counted[asked]


# What was counted last, by what it was counted on.
_counted: dict[Hashable, BlockCosts] = {}


def _content(example: Example | None) -> Hashable:
    named = {"": example} if isinstance(example, Tensor) else example or {}
    return tuple(
        (name, value.shape, value.dtype, value.numpy(force=True).tobytes())
        if isinstance(value, Tensor)
        else (name, value)
        for name, value in named.items()
    )


def _count(
    config: UpdatesConfig,
    model: nn.Module,
    layers: BlockPartition,
    example: Example | None,
) -> BlockCosts:
    return of_model.model_costs(
        model,
        layers,
        batch_size=config.largest_batch,
        sequence_length=config.max_length,
        merged=isinstance(config, FedAvgFullConfig),
        micro_batch_size=config.micro_batch_size,
        example=example,
        activations=config.activations,
    )
