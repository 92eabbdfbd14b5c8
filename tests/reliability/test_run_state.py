"""A checkpoint holds every field of a run's state, whatever fields there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from itertools import count
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import numpy as np
import pytest

from lola_flwr.errors import UserError
from lola_flwr.run.values import from_values, to_values
from lola_flwr.server.selection.history import BlockHistory
from lola_flwr.server.spread.plan import SpreadState
from lola_flwr.server.state import RunState, restored
from lola_flwr.system.devices import DeviceProfile
from lola_flwr.wire.held_versions import HeldVersions
from tests.recordings.runs import STOPPED


def sample(hint, numbers):
    """Return a value of a type that no default is, and no other field has."""
    origin, arguments = get_origin(hint), get_args(hint)
    if is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{f.name: sample(hints[f.name], numbers) for f in fields(hint)})
    if origin is UnionType:
        return sample(arguments[0], numbers)
    if origin is np.ndarray:
        (element,) = get_args(arguments[1])
        values = [next(numbers), next(numbers)]
        whole = np.issubdtype(element, np.integer)
        return np.array(values if whole else np.divide(values, 3), element)
    if origin is tuple:
        return tuple(sample(arguments[0], numbers) for _ in range(2))
    if origin is not None and issubclass(origin, Mapping):
        key, item = arguments
        return {sample(key, numbers): sample(item, numbers) for _ in range(2)}
    number = next(numbers)
    return {
        int: number,
        # The profile's bounds hold from 1e5 on for one field and to 80 for another.
        float: 79.0 + 1 / number,
        str: f"ü{number}",
        bool: True,
    }[hint]


def plain(value):
    """Compare arrays and dataclasses by what they hold."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tolist()
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value


def leaves(value):
    if isinstance(value, Mapping):
        return [leaf for item in value.values() for leaf in leaves(item)]
    if isinstance(value, (list, tuple)):
        return [leaf for item in value for leaf in leaves(item)]
    return [value]


@pytest.fixture(autouse=True)
def wide_bounds(monkeypatch):
    """Let a sample be a profile, whatever its numbers are."""
    bounds = "lola_flwr.system.devices._BOUNDS"
    monkeypatch.setattr(bounds, dict.fromkeys(("snr_db",), (0.0, 1e3)))


@pytest.mark.parametrize("kind", [RunState, SpreadState])
def test_every_field_of_every_part_comes_back_through_json(kind):
    state = sample(kind, count(1))
    empty = {RunState: {"history": BlockHistory.of(2)}}.get(kind, {})
    for field in fields(kind):
        default = plain(getattr(kind(**empty), field.name))
        assert plain(getattr(state, field.name)) != default
    values = json.loads(json.dumps(to_values(state)))
    again = from_values(kind, values)
    assert plain(again) == plain(state)
    # All that is in it is in the values, and nothing is twice but what is true.
    told = [leaf for leaf in leaves(values) if leaf is not True]
    assert len(told) == len(set(map(repr, told))) > 10


def test_what_is_not_finite_comes_back():
    history = BlockHistory.of(2)
    state = replace(RunState(history=history), wireless_s=0.1 + 0.2)
    again = RunState.from_values(json.loads(json.dumps(state.to_values())))
    assert plain(again) == plain(state)
    assert np.isinf(again.history.relative_move).all()


def test_what_devices_hold_is_forgotten_by_a_run_that_goes_on():
    """Its id is another one, and devices keep their copies by run."""
    state = replace(
        RunState(history=BlockHistory.of(2)), held=HeldVersions({"a": ("digest",)})
    )
    assert RunState.from_values(state.to_values()).held == HeldVersions()


@pytest.mark.parametrize("change", ["more", "less", "nothing"])
@pytest.mark.parametrize("part", [(), ("fleet", "absences")])
def test_another_versions_state_is_refused_in_one_line(change, part):
    values = RunState(history=BlockHistory.of(2)).to_values()
    inner = values
    for name in part:
        inner = inner[name]
    if change == "more":
        inner["later_idea"] = 1
    elif change == "less":
        inner.pop(next(iter(inner)))
    else:
        inner.clear()
    with pytest.raises(UserError, match="another version of lola-flwr") as raised:
        RunState.from_values(values)
    assert len(str(raised.value).splitlines()) == 1


def test_a_state_of_d2ft_s_first_layout_is_refused():
    with pytest.raises(UserError, match="SpreadState: fleet, server_round"):
        restored(SpreadState, {})


def test_the_first_layout_of_a_coordinators_state_is_read():
    from lola_flwr.run.checkpoint import read

    (path,) = (STOPPED / "checkpoints").iterdir()
    then = read(path).values["state"]
    state = RunState.from_values(then)
    assert state.server_round == then["server_round"] == 2
    assert state.wireless_s == then["wireless_s"] > 0
    # Devices could not say then what they can since.
    said = {"name", "flops_per_s", "memory_bytes"}
    unsaid = {f.name: f.default for f in fields(DeviceProfile) if f.name not in said}
    assert {d: to_values(p) for d, p in state.fleet.profiles.items()} == {
        d: {**unsaid, **p} for d, p in then["profiles"].items()
    }
    met = [
        [name, block, times]
        for name, counts in state.meetings.items()
        for block, times in enumerate(counts)
        if times
    ]
    assert sorted(met) == sorted(then["meetings"]) != []
    assert state.estimate.device_log_factor == then["device_log_factor"] != {}
    assert [*state.estimate.block_log_factor.items()] == [
        tuple(pair) for pair in then["block_log_factor"]
    ]
    assert state.history.last_round.tolist() == then["last_round"]
    assert [[n, [*norms]] for n, norms in state.norms.of_block.items()] == then["norms"]
