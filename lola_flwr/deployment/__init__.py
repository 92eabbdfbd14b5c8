"""Devices in the field: a resident worker, limits on the uplink, measured profiles."""
