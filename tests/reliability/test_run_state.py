from __future__ import annotations

import json
from collections import Counter
from dataclasses import fields

import numpy as np

from lola_flwr.server.absences import Absence, Absences
from lola_flwr.server.norm_limits import NormHistory
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.state import RunState
from lola_flwr.system.devices import simulated_device
from lola_flwr.system.estimation import ComputeEstimate, RateEstimate

STATE = RunState(
    server_round=7,
    wireless_s=0.1 + 0.2,
    profiles={f"id-{n}": simulated_device(n, seed=1) for n in range(2)},
    estimate=ComputeEstimate({"device-0000": 0.3, "ü": -1e-300}, {0: 0.1, 11: -0.2}),
    rates=RateEstimate({"device-0001": -0.7}),
    meetings=Counter({("device-0000", 3): 2, ("device-0001", 0): 1}),
    history=BlockHistory(
        last_round=np.array([3, 0]),
        relative_move=np.array([0.25, np.inf]),
        importance=np.array([0.0, -1.5]),
    ),
    absences=Absences({"device-0001": Absence(2, 9, 5e8)}),
    norms=NormHistory({0: (1.5, 2.5), 3: (0.1,)}),
)


def plain(value):
    """Compare arrays and dataclasses by what they hold."""
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.tolist()
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return value


def test_every_field_of_every_part_comes_back_through_json():
    again = RunState.from_values(json.loads(json.dumps(STATE.to_values())))
    assert plain(again) == plain(STATE)
    # Nothing was left at a default that the way back would also give.
    for part in (STATE.estimate, STATE.rates, STATE.absences, STATE.norms):
        for field in fields(part):
            assert getattr(part, field.name), f"give {field.name} a value above"
