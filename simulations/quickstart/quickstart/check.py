"""What would end a run in its first round, said before anything has started.

No app needs one.
"""

from collections.abc import Callable
from functools import partial

from lola_flwr.errors import UserError
from lola_flwr.machine.files import local_path
from lola_flwr.machine.installation import require_extra
from lola_flwr.model.sources import check_source
from lola_flwr.system.devices import simulated_device


def check(config: dict, num_devices: int) -> Callable[[], None]:
    """Look for model and data; return what plans the first round."""
    check_source(config["model"])
    if config["data"] and not local_path(config["data"]).is_file():
        raise UserError(
            f"data={config['data']!r} is no file; give one with the columns text and "
            "label, or leave it out for sentences that are generated."
        )
    require_extra("adapters", "peft", "LoRA")
    require_extra("glue", "datasets", "the quickstart")
    return partial(check_on_the_model, config, num_devices)


def check_on_the_model(config: dict, num_devices: int) -> None:
    """Plan the first round."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_flwr.build import check_first_round
    from quickstart.server_app import make_coordinator

    fleet = [simulated_device(index, seed=0) for index in range(num_devices)]
    check_first_round(make_coordinator(config), fleet)
