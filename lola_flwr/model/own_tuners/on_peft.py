"""What tuners of our own share: their sides of peft's configuration, layer and tuner.

peft registers tuners by a closed list of types. Its mappings take any string, and so
does all that looks a type up, as long as it has a ``value``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from peft import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class _OwnType(str):
    """The type of a tuner of ours, which passes for a member of peft's enumeration."""

    __slots__ = ()

    @property
    def value(self) -> str:
        """What peft writes into files."""
        return str(self)


@dataclass
class OwnConfig(PeftConfig):
    """Options that all tuners of our own have.

    Parameters
    ----------
    target_modules
        As for any tuner of peft: names or ends of names, a regular expression, or
        ``"all-linear"`` (default: the linear maps of the layers).
    modules_to_save
        What is trained in full.
    """

    # `register` sets it.
    type_of_tuner: ClassVar[Any]

    target_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[no-untyped-call]
        self.peft_type = self.type_of_tuner


class OwnLayer(nn.Module, BaseTunerLayer):
    """A linear map that one adapter is trained in.

    Sub-classes name their trained values in ``adapter_layer_names``, a dictionary of
    one array, and define the three abstract methods.

    Parameters
    ----------
    base_layer
        The linear map: ``nn.Linear``, or GPT-2's ``Conv1D``.

    Raises
    ------
    TypeError
        It is of another type, whose own forward code might do more.
    """

    base_layer: Any

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        if type(base_layer) not in (nn.Linear, Conv1D):
            raise TypeError(
                f"target_modules names a module of type {type(base_layer).__name__}, "
                "which is no plain linear map; name nn.Linear modules alone"
            )
        self.base_layer = base_layer
        self.out_features, self.in_features = self.matrix.shape
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._unmerged: Tensor | None = None

    @abstractmethod
    def begin(self, name: str, config: Any) -> None:
        """Make the trained values and what is kept beside them.

        Parameters
        ----------
        name
            What peft calls the adapter.
        config
            The tuner's configuration.

        Raises
        ------
        ValueError
            An option does not fit this map.
        """

    @abstractmethod
    def adapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` to outputs ``[..., out]``."""

    @abstractmethod
    def adapted_matrix(self) -> Tensor:
        """Return the matrix ``[out, in]`` that `adapted` amounts to."""

    @property
    def matrix(self) -> Tensor:
        """The base's weight as ``[out, in]``, on the storage that it has."""
        weight: Tensor = self.base_layer.weight
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    @property
    def trained(self) -> Tensor:
        """What is trained: a parameter, or what stands for it in forward mode."""
        (values,) = getattr(self, self.adapter_layer_names[0]).values()
        assert isinstance(values, Tensor)
        return values

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` to outputs ``[..., out]``."""
        if self.merged:
            output: Tensor = self.base_layer(inputs)
            return output
        return self.unadapted(inputs) if self.disable_adapters else self.adapted(inputs)

    def unadapted(self, inputs: Tensor) -> Tensor:
        """Map inputs ``[..., in]`` as the base does."""
        output: Tensor = self.base_layer(inputs)
        return output

    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> None:
        """Put the effect of the adapter into the base's weight."""
        names = check_adapters_to_merge(self, adapter_names)
        if not names:
            return
        weight: nn.Parameter = self.base_layer.weight
        with torch.no_grad():
            merged = self.adapted_matrix()
        if weight.is_floating_point():
            merged = merged.to(weight.dtype)
        if safe_merge and not merged.isfinite().all():
            raise ValueError("the trained weight is not finite")
        self._unmerged = weight.data
        is_turned = isinstance(self.base_layer, Conv1D)
        weight.data = merged.T.contiguous() if is_turned else merged
        self.merged_adapters += names

    def unmerge(self) -> None:
        """Put the base's weight back as it was."""
        if self._unmerged is not None:
            self.base_layer.weight.data = self._unmerged
            self._unmerged = None
            self.merged_adapters.clear()


class OwnTuner(BaseTuner):
    """Puts layers of one kind around the linear maps of a model."""

    tuner_layer_cls: type[Any]
    # Where `target_modules` is left open, the linear maps of the layers are found.
    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, BaseTunerLayer):
            raise ValueError("a model has one adapter of this kind, and no second")
        weight = getattr(target, "weight", None)
        every = self.model.named_parameters(remove_duplicate=False)
        users = [name for name, parameter in every if parameter is weight]
        if len(users) > 1:
            raise ValueError(
                f"{' and '.join(users)} are one matrix, and adapting one of them would "
                "change the other, too; let target_modules name neither"
            )
        layer = self.tuner_layer_cls(target)
        try:
            layer.begin(adapter_name, peft_config)
        except ValueError as error:
            raise ValueError(f"{error} ({current_key})") from error
        layer.set_adapter(adapter_name, inference_mode=peft_config.inference_mode)
        self._replace_module(parent, target_name, layer, target)


def check_count(option: str, count: object, most: int, what: str) -> None:
    """Check an option that counts something of a matrix.

    Raises
    ------
    ValueError
        It is no whole number, less than 1, or more than there are.
    """
    if type(count) is not int or not 0 < count <= most:
        raise ValueError(
            f"{option}={count!r} is to be a whole number, 1 to {most}, the {what} of "
            "the matrix"
        )


def register(name: str, config: type[OwnConfig], layer: type[OwnLayer]) -> None:
    """Make peft know a tuner.

    Parameters
    ----------
    name
        Its name, in lower case.
    config, layer
        What it consists of. The names of a layer's trained values begin with the
        tuner's.
    """
    kind: Any = _OwnType(name.upper())
    prefix = f"{name}_"
    config.type_of_tuner = kind
    PEFT_TYPE_TO_CONFIG_MAPPING[kind] = config
    PEFT_TYPE_TO_PREFIX_MAPPING[kind] = prefix
    PEFT_TYPE_TO_TUNER_MAPPING[kind] = type(
        f"{name.capitalize()}Tuner",
        (OwnTuner,),
        {"prefix": prefix, "tuner_layer_cls": layer},
    )
