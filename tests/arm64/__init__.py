"""The device kits on a Debian for 64-bit ARM, which this machine's CPU emulates."""
