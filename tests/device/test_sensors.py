"""What a device's sensors measure goes into its report."""

from dataclasses import replace

from lola_flwr.device import sensors
from lola_flwr.device.contract import LocalUpdate
from lola_flwr.device.sensors import reports_energy
from lola_flwr.machine.power import measured_energy
from lola_flwr.wire.records import UpdateReport
from tests.device.test_tokens import device_for, texts, trained
from tests.machine.test_power import ORIN_NANO, module_supplies, monitor

REPORT = UpdateReport(1, 0, "gradient", 0.5, 2.0, "measured")


class Device:
    simulated_compute_s = None
    report = REPORT

    @reports_energy
    def train(self, assignment, values):
        return LocalUpdate({}, 1, self.report)


def on_a_board(monkeypatch, tmp_path):
    monitor(tmp_path / "drivers", "1-0040", ORIN_NANO)
    supplies = module_supplies(tmp_path / "drivers")
    monkeypatch.setattr(sensors, "measured_energy", lambda: measured_energy(supplies))


def test_a_report_says_what_training_took(monkeypatch, tmp_path):
    on_a_board(monkeypatch, tmp_path)
    report = Device().train(None, {}).report
    assert report.compute_j > 0
    assert replace(report, compute_j=None) == REPORT
    assert UpdateReport.from_record(report.to_record()) == report


def test_nor_what_a_simulated_device_or_one_that_did_not_train_took(
    monkeypatch, tmp_path
):
    on_a_board(monkeypatch, tmp_path)
    device = Device()
    device.report = replace(REPORT, compute_s=None)
    assert device.train(None, {}).report.compute_j is None
    device.report, device.simulated_compute_s = REPORT, lambda _: 2.0
    assert device.train(None, {}).report.compute_j is None


def test_nothing_without_sensors():
    assert Device().train(None, {}).report.compute_j is None


def test_a_device_with_pytorch_says_it(monkeypatch, tmp_path, roberta):
    on_a_board(monkeypatch, tmp_path)
    device = replace(device_for(roberta, texts()), simulated_compute_s=None)
    assert trained(device, roberta).report.compute_j > 0
