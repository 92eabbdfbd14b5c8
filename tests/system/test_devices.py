from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lola_flwr.system.devices import (
    DeviceProfile,
    FleetRanges,
    InvalidProfile,
    simulated_device,
)

PROPERTIES = {
    "name": "jetson-1",
    "flops-per-s": 1e11,
    "memory-bytes": 4_000_000_000,
    "snr-db": 12.5,
}


ABILITIES = {
    "splits-batch": True,
    "streams-prefix": True,
    "recomputes-suffix": True,
    "trains-one-block": True,
}


@pytest.mark.parametrize("more", [{}, ABILITIES])
def test_round_trip(more):
    properties = {**PROPERTIES, **more}
    profile = DeviceProfile.from_properties({**properties, "other": "ignored"})
    abilities = [getattr(profile, name.replace("-", "_")) for name in ABILITIES]
    assert abilities == [bool(more)] * 4
    assert profile.to_properties() == properties


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"flops-per-s": math.inf},
            r"flops_per_s=inf of device 'jetson-1' must be a num",
        ),
        ({"flops-per-s": 0.0}, "from 100000 to 1e"),
        ({"memory-bytes": -1}, "memory_bytes=-1"),
        (
            {"batch-size": 0},
            "batch_size=0 of device 'jetson-1' must be",
        ),
        ({"compute-power-w": -1.0}, "compute_power_w=-1.0"),
        ({"transmit-power-w": "3"}, "transmit_power_w='3'"),
        ({"snr-db": math.nan}, "snr_db=nan"),
        ({"snr-db": "12"}, "snr_db='12'"),
        ({"snr-db": True}, "snr_db=True"),
        ({"name": ""}, "1 to 64 printable characters"),
        ({"name": "d\nfinal: accuracy=1"}, "1 to 64 printable characters"),
        ({"snr-db": "x" * 10**6}, r"snr_db='x+\.\.\.x+' of"),
        ({"memory-bytes": 10**400}, "memory_bytes=1000"),
        ({"name": 3}, "name=3"),
        ({"splits-batch": 1}, "splits_batch=1 of device 'jetson-1' must be true"),
        ({"streams-prefix": "yes"}, "streams_prefix='yes'"),
        ({"recomputes-suffix": 0}, "recomputes_suffix=0 of device 'jetson-1' must be"),
        ({"trains-one-block": "no"}, "trains_one_block='no' of device 'jetson-1'"),
    ],
)
def test_claims_that_cannot_be_believed(change, message):
    with pytest.raises(InvalidProfile, match=message):
        DeviceProfile.from_properties({**PROPERTIES, **change})


def test_missing_property_is_named():
    with pytest.raises(InvalidProfile, match="lacks memory-bytes; it must report name"):
        DeviceProfile.from_properties(
            {k: v for k, v in PROPERTIES.items() if k != "memory-bytes"}
        )


@given(
    st.dictionaries(
        st.sampled_from(sorted(PROPERTIES)),
        st.one_of(st.floats(), st.integers(), st.text(), st.binary(), st.booleans()),
    )
)
def test_any_properties_give_a_profile_or_the_one_error(properties):
    try:
        profile = DeviceProfile.from_properties({**PROPERTIES, **properties})
    except InvalidProfile:
        return
    assert 0 < profile.flops_per_s < math.inf


def test_fleet_is_a_function_of_the_seed():
    ranges = FleetRanges(
        flops_per_s=(1e9, 1e10), memory_bytes=(1e9, 2e9), snr_db=(5, 6)
    )
    fleet = [simulated_device(i, seed=4, ranges=ranges) for i in range(50)]
    assert fleet == [simulated_device(i, seed=4, ranges=ranges) for i in range(50)]
    assert fleet[0] != simulated_device(0, seed=5, ranges=ranges)
    assert len({device.flops_per_s for device in fleet}) == 50
    for device in fleet:
        assert 1e9 <= device.flops_per_s <= 1e10
        assert 1e9 <= device.memory_bytes <= 2e9
        assert 5 <= device.snr_db <= 6
    assert [d.name for d in fleet] == sorted(d.name for d in fleet)
