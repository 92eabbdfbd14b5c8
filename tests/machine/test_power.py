"""Power monitors, as a directory tree like that of Linux."""

import threading

import pytest

from lola_flwr.machine import power
from lola_flwr.machine.power import energy_j, measured_energy, module_supplies


def monitor(drivers, address, supplies, driver="ina3221"):
    """Make one monitor: label, millivolts and milliamperes of each of its channels."""
    # As on a board, a link that leads elsewhere.
    device = drivers.parent / "devices" / address / "hwmon" / "hwmon3"
    device.mkdir(parents=True)
    for number, (label, millivolts, milliamperes) in enumerate(supplies, 1):
        (device / f"in{number}_label").write_text(f"{label}\n")
        (device / f"in{number}_input").write_text(f"{millivolts}\n")
        (device / f"curr{number}_input").write_text(f"{milliamperes}\n")
    (drivers / driver).mkdir(parents=True, exist_ok=True)
    (drivers / driver / address).symlink_to(device.parent.parent)
    return device


ORIN_NANO = [
    ("VDD_IN", 5000, 1600),
    ("VDD_CPU_GPU_CV", 5000, 400),
    ("VDD_SOC", 5000, 300),
]
AGX_ORIN = (
    [
        ("VDD_GPU_SOC", 20000, 500),
        ("VDD_CPU_CV", 20000, 250),
        ("VIN_SYS_5V0", 5000, 800),
    ],
    [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 5000, 200), ("NC", 0, 0)],
)


def watts(supplies):
    return sum(supply.watts() for supply in supplies)


def test_the_whole_module_is_one_supply(tmp_path):
    monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    found = module_supplies(tmp_path / "drivers")
    assert [supply.label for supply in found] == ["VDD_IN"]
    assert watts(found) == pytest.approx(8.0)


def test_or_several_of_which_none_is_a_part_of_another(tmp_path):
    for address, supplies in zip(("1-0040", "1-0041"), AGX_ORIN, strict=True):
        monitor(tmp_path / "drivers", address, supplies)
    found = module_supplies(tmp_path / "drivers")
    assert watts(found) == pytest.approx(10 + 5 + 4)


@pytest.mark.parametrize(
    "supplies",
    [
        [],
        [("VDD_GPU", 5000, 100), ("VDD_CPU", 5000, 100)],
        AGX_ORIN[0][:2],
        [("VDD_IN", 5000, 100), ("VDD_IN", 5000, 200)],
    ],
    ids=["no monitor", "unknown board", "a part is missing", "one label twice"],
)
def test_of_what_is_not_known_nothing_is_claimed(tmp_path, supplies):
    monitor(tmp_path / "drivers", "1-0040", supplies)
    assert module_supplies(tmp_path / "drivers") == ()


def test_a_channel_without_a_current_is_none(tmp_path):
    device = monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    (device / "curr1_input").unlink()
    assert module_supplies(tmp_path / "drivers") == ()


def test_energy_is_power_over_time(monkeypatch, tmp_path):
    device = monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    times = iter([10.0, 12.0])
    monkeypatch.setattr(power.time, "perf_counter", lambda: next(times))
    monkeypatch.setattr(power, "_SAMPLE_INTERVAL_S", 3600)
    with measured_energy(module_supplies(tmp_path / "drivers")) as measured:
        (device / "curr1_input").write_text("2400")  # 12 W at the end, 8 W before
    assert measured.joules == pytest.approx(2 * 10)
    assert measured.mean_w == pytest.approx(10)


def test_it_is_sampled_meanwhile(monkeypatch, tmp_path):
    monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    monkeypatch.setattr(power, "_SAMPLE_INTERVAL_S", 0.001)
    supplies = module_supplies(tmp_path / "drivers")
    later = tmp_path / "later"
    later.write_text("16000")  # 80 W
    read = threading.Semaphore(0)
    monkeypatch.setattr(power.Supply, "watts", counted(power.Supply.watts, read))
    with measured_energy(supplies) as measured:
        later.replace(supplies[0].milliamperes)
        for _ in range(5):
            assert read.acquire(timeout=60)
    # All but the first.
    assert 8.0 < measured.mean_w <= 80.0


def counted(function, semaphore):
    def counting(*arguments):
        result = function(*arguments)
        semaphore.release()
        return result

    return counting


def test_a_monitor_that_falls_silent_is_not_believed(tmp_path):
    device = monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    with measured_energy(module_supplies(tmp_path / "drivers")) as measured:
        (device / "in1_input").unlink()
    assert measured.joules is None
    assert measured.mean_w is None


def test_without_a_monitor_nothing_is_measured():
    with measured_energy(()) as measured:
        pass
    assert measured.joules is None


def test_energy_between_samples_is_on_a_line():
    assert energy_j([(0.0, 1.0), (2.0, 3.0), (3.0, 3.0)]) == pytest.approx(4.0 + 3.0)
    assert energy_j([(0.0, 5.0)]) == 0.0
