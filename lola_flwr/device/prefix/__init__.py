"""The frozen layers below a block: run once per sample, or one after the other."""

from lola_flwr.device.prefix.cache import ActivationCache
from lola_flwr.device.prefix.loaded import LoadedModel
from lola_flwr.device.prefix.reuse import reused_prefix
from lola_flwr.device.prefix.streaming import (
    LayeredWeights,
    StreamedModel,
    save_base,
    skeleton_of,
)

__all__ = [
    "ActivationCache",
    "LayeredWeights",
    "LoadedModel",
    "StreamedModel",
    "reused_prefix",
    "save_base",
    "skeleton_of",
]
