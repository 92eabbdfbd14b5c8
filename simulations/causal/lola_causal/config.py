"""The app's run configuration, checked once and completely."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field

from lola_flwr.app import config as app
from lola_flwr.app.interface import Interface

Method = Literal["lola-deft", "fedavg-full", "d2ft"]


class CausalConfig(app.AppConfig):
    """What every method is told; the keys are those of ``[tool.flwr.app.config]``."""

    data: str
    eval_data: str
    packing: bool
    method: Method

    @classmethod
    def by_method(cls) -> tuple[type[app.AppConfig], ...]:
        """Return the app's models, one a method; the last has all keys there are."""
        return (LolaDeftConfig, FedAvgFullConfig, D2ftConfig, _AnyMethod)


class LolaDeftConfig(CausalConfig, app.LolaDeftConfig):
    """LoLa-DEFT: each device trains one block."""

    method: Literal["lola-deft"]
    # With few lines a block that one device always trains knows its lines alone.
    rotation_eps: float = Field(0.5, ge=0, allow_inf_nan=False)


class FedAvgFullConfig(CausalConfig, app.FedAvgFullConfig):
    """The baseline: every device trains the whole stack, which is the one block."""

    method: Literal["fedavg-full"]


class D2ftConfig(app.D2ftConfig, CausalConfig):
    """D2FT: the model is spread over the devices."""

    method: Literal["d2ft"]

    def _contradictions(self) -> Iterator[str]:
        if self.packing:
            yield (
                'packing=true does not go with method="d2ft", whose devices are told '
                "which tokens there are, and not which line each is of; use "
                "packing=false"
            )
        yield from super()._contradictions()


class _AnyMethod(LolaDeftConfig, FedAvgFullConfig, D2ftConfig):
    """All keys there are. It checks what names no method, and so never holds."""

    method: Method  # type: ignore[assignment]
    interface: Interface
