"""The keys that say what adapters stand on, and where they begin."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import AfterValidator

from lola_flwr.d2ft.pruning import Pruning
from lola_flwr.model.bases import Base
from lola_flwr.run.config import RunConfig, keyword_arguments


def _known_pruning(text: str) -> str:
    Pruning.of(keyword_arguments(text))
    return text


class BaseKeys(RunConfig):
    """Keys of the frozen base under adapters."""

    base: Base = "fp32"
    pruning: Annotated[str, AfterValidator(_known_pruning)] = ""
    start_from: str = ""

    @property
    def pruned(self) -> Pruning | None:
        """What is left out of the base; None: nothing."""
        return Pruning.of(keyword_arguments(self.pruning))

    def _base_faults(self, tuning: str) -> Iterator[str]:
        """Say what does not go with a tuning, or with each other."""
        if self.base != "fp32" and tuning == "full":
            yield (
                f'base={self.base!r} is for adapters, and tuning="full" trains the '
                'base itself; use tuning="lora", or base="fp32"'
            )
        if self.pruned is None:
            return
        if tuning != "lora":
            yield (
                f"pruning={self.pruning!r} is of a base under LoRA, and tuning="
                f"{tuning!r} is not recovered on the whole one; use "
                'tuning="lora", or pruning=""'
            )
        if self.start_from:
            yield (
                f"start-from={self.start_from!r} is a change of the whole base, of "
                f"which pruning={self.pruning!r} leaves a part; drop one of the two"
            )
