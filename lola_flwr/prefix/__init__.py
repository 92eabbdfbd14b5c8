"""The frozen layers below a block: run once per sample, or one after the other."""

from lola_flwr.prefix.cache import ActivationCache
from lola_flwr.prefix.reuse import reused_prefix

__all__ = ["ActivationCache", "reused_prefix"]
