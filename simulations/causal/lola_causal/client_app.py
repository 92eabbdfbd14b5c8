"""The app's device side: loaded for every message, without model and PyTorch."""

from lola_flwr.app.client import TrainingClient
from lola_flwr.deployment.shim import resident

app = TrainingClient(resident("lola_causal.device:device_fn"))
