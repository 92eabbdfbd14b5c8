"""What would end a run in its first round, said before anything has started.

`lola-flwr simulate` calls `check`; a plain `flwr run` comes upon the same by itself.
What takes no PyTorch is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lola_flwr.app.check import check_model, check_shapes, fleet_of, plan_first_round
from lola_flwr.costs.shapes import KNOWN_MODELS, ModelShapes, model_shapes
from lola_flwr.model.sources import OFFLINE_MODEL, RANDOM_SHAPES
from lola_flwr.system.devices import DeviceProfile
from lola_glue.config import D2ftConfig, GlueConfig, SampledConfig
from lola_glue.tasks import check_data, find_task


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
        Data, model or an extra is missing; or the devices cannot train the model.
    """
    config = GlueConfig.from_run_config(run_config)
    check_data(config.task, config.data_dir)
    check_model(config)
    profiles = fleet_of(config, num_devices)
    shapes = _known_shapes(config.model)
    if shapes is not None:
        check_shapes(config, shapes, profiles)
    return partial(check_on_the_model, config, profiles)


def check_on_the_model(config: GlueConfig, profiles: Sequence[DeviceProfile]) -> None:
    """Load the model, count what it costs, and plan the first round."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_flwr.app.d2ft import make_trainer
    from lola_flwr.app.model import begin
    from lola_glue.costs import load_model, model_blocks, model_costs

    model, _ = load_model(config, find_task(config.task))
    begin(config, model)
    partition = model_blocks(config, model)
    if isinstance(config, D2ftConfig):
        make_trainer(config, model, partition)
    elif isinstance(config, SampledConfig):
        costs = model_costs(config, model)
        plan_first_round(config, model, partition, costs, profiles)


def _known_shapes(model: str) -> ModelShapes | None:
    """Return the shapes of a model that is on no hub, and so just what its name says.

    None where only the model itself tells.
    """
    name = model.removeprefix("random:")
    is_own = model == OFFLINE_MODEL or model in RANDOM_SHAPES
    return model_shapes(name) if is_own and name in KNOWN_MODELS else None
