"""What would end a run in its first round, said before anything has started."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from lola_flwr.system.devices import simulated_device
from lola_vision.config import VisionConfig


def check(run_config: Mapping[str, object], num_devices: int) -> Callable[[], None]:
    """Check that a run can start; return what looks at the model itself.

    Parameters
    ----------
    run_config
        Its configuration.
    num_devices
        Devices that are simulated.

    Raises
    ------
    UserError
        There are no such images, or the devices cannot train the model.
    """
    config = VisionConfig.from_run_config(run_config)
    return partial(check_on_the_model, config, num_devices)


def check_on_the_model(config: VisionConfig, num_devices: int) -> None:
    """Load images and model, and plan the first round."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_flwr.build import check_first_round
    from lola_vision.model import make_coordinator

    profiles = [simulated_device(i, seed=config.seed) for i in range(num_devices)]
    check_first_round(make_coordinator(config), profiles)
