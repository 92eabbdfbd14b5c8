"""The modelled world: devices, the wireless uplink, and what training a block costs."""
