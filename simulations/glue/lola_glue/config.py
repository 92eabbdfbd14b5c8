"""The app's run configuration, checked once and completely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from lola_flwr.app import config as app
from lola_flwr.app.interface import Interface
from lola_flwr.device.sampler_options import History, Rule, sampler_named
from lola_flwr.errors import UserError
from lola_flwr.run.config import keyword_arguments
from lola_glue.tasks import TASKS, find_task

Method = Literal["lola-deft", "fedavg-full", "d2ft"]


def _known_task(name: str) -> str:
    find_task(name)
    return name


# Not all that is allowed; what is shown and completed.
Task = Annotated[str, AfterValidator(_known_task), Field(examples=[*TASKS])]


class GlueConfig(app.AppConfig):
    """What every method is told; the keys are those of ``[tool.flwr.app.config]``.

    A key that not all methods know stands in the model of those that do, with its
    default.
    """

    task: Task
    data_dir: str
    method: Method
    partitioning: Literal["iid", "dirichlet"]
    dirichlet_alpha: float = Field(gt=0)

    @classmethod
    def by_method(cls) -> tuple[type[app.AppConfig], ...]:
        """Return the app's models, one a method; the last has all keys there are."""
        return (LolaDeftConfig, FedAvgFullConfig, D2ftConfig, _AnyMethod)


class SampledConfig(GlueConfig, app.UpdatesConfig):
    """What is told where devices choose the examples that they train on."""

    sampler: Literal["random", "entropy", "coreset", "history"] = "random"
    sampler_options: app.Options = ""

    @property
    def chosen_by(self) -> Rule | History | None:
        """How devices choose; None: they draw at random."""
        return sampler_named(self.sampler, keyword_arguments(self.sampler_options))

    def _contradictions(self) -> Iterator[str]:
        try:
            _ = self.chosen_by
        except UserError as error:
            yield f"sampler-options: {error}".removesuffix(".")
        if self.sampler != "random" and find_task(self.task).is_regression:
            yield (
                f"sampler={self.sampler!r} needs classes, but task={self.task!r} "
                'has scores; use sampler="random"'
            )
        yield from super()._contradictions()


class LolaDeftConfig(SampledConfig, app.LolaDeftConfig):
    """LoLa-DEFT: each device trains one block."""

    method: Literal["lola-deft"]

    def _contradictions(self) -> Iterator[str]:
        if self.sampler != "random" and self.zeroth_order != "off":
            yield (
                f"sampler={self.sampler!r} does not go with zeroth-order="
                f"{self.zeroth_order!r}; drop one of the two"
            )
        yield from super()._contradictions()


class FedAvgFullConfig(SampledConfig, app.FedAvgFullConfig):
    """The baseline: every device trains the whole stack, which is the one block."""

    method: Literal["fedavg-full"]


class D2ftConfig(app.D2ftConfig, GlueConfig):
    """D2FT: the model is spread over the devices."""

    method: Literal["d2ft"]


class _AnyMethod(LolaDeftConfig, FedAvgFullConfig, D2ftConfig):
    """All keys there are. It checks what names no method, and so never holds."""

    method: Method  # type: ignore[assignment]
    interface: Interface
