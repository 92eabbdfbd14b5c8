"""What would end a run in its first round, said before anything has started.

`lola-flwr simulate` calls `check`; a plain `flwr run` comes upon the same by itself.
What takes no PyTorch is looked at first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from lola_causal.config import CausalConfig, D2ftConfig
from lola_causal.embedded import EMBEDDED, WITHOUT_NETWORK
from lola_causal.records import Record, load_records
from lola_flwr.app.check import check_model, fleet_of, plan_first_round
from lola_flwr.app.config import UpdatesConfig
from lola_flwr.system.devices import DeviceProfile


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
        Data, model or an extra is missing, or lines cannot be used; or the devices
        cannot train the model.
    """
    config = CausalConfig.from_run_config(run_config)
    records = load_records(config.data, config.eval_data, seed=config.seed)
    check_model(config, (EMBEDDED,), WITHOUT_NETWORK)
    profiles = fleet_of(config, num_devices)
    return partial(check_on_the_model, config, records, profiles)


def check_on_the_model(
    config: CausalConfig,
    records: Sequence[Sequence[Record]],
    profiles: Sequence[DeviceProfile],
) -> None:
    """Load the model, encode the lines, and plan the first round."""
    # PyTorch takes seconds; what is above is said before that.
    from lola_causal.device import split
    from lola_causal.model import causal_costs, load_model
    from lola_causal.sequences import encode
    from lola_flwr.app.d2ft import make_trainer
    from lola_flwr.app.model import begin, model_blocks

    model, tokenizer = load_model(config)
    begin(config, model)
    for part in records:
        encode(part, tokenizer, max_length=config.max_length, model_name=config.model)
    split(len(records[0]), len(profiles), config.seed)
    partition = model_blocks(config, model)
    if isinstance(config, D2ftConfig):
        make_trainer(config, model, partition)
    elif isinstance(config, UpdatesConfig):
        costs = causal_costs(config, model)
        plan_first_round(config, model, partition, costs, profiles)
