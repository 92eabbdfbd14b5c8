"""What devices offer by the run configuration; needs neither Flower nor PyTorch."""

from __future__ import annotations

from dataclasses import replace

from lola_flwr.app.config import AppConfig, UpdatesConfig
from lola_flwr.app.link_rates import link_rates_bps
from lola_flwr.errors import UserError
from lola_flwr.system.devices import DeviceProfile, FleetRanges, simulated_device
from lola_flwr.system.fleet_file import read_fleet


def simulated_profile(config: AppConfig, index: int) -> DeviceProfile:
    """Return what a simulated device offers: as its fleet file says, or drawn by seed.

    Raises
    ------
    UserError
        The fleet file cannot be used, or has fewer devices.
    """
    if not config.fleet:
        ranges = FleetRanges(snr_db=(config.snr_min_db, config.snr_max_db))
        return simulated_device(index, seed=config.seed, ranges=ranges)
    fleet = read_fleet(config.fleet)
    if index >= len(fleet):
        raise UserError(
            f"fleet={config.fleet!r} has {len(fleet)} devices, but more are "
            f"simulated; pass num-supernodes={len(fleet)}."
        )
    return fleet[index]


def configured(profile: DeviceProfile, config: AppConfig, index: int) -> DeviceProfile:
    """Return a device's profile with what the run configuration says of all devices."""
    rates_bps = link_rates_bps(config.uplink_mbps)
    if rates_bps:
        profile = replace(profile, uplink_bps=rates_bps[index % len(rates_bps)])
    if isinstance(config, UpdatesConfig) and config.fit_memory:
        profile = replace(profile, splits_batch=True, recomputes_suffix=True)
    return profile
