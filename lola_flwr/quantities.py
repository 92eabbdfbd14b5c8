"""Quantities as people read them."""


def si(value: float, unit: str) -> str:
    """Write a quantity with three digits and an SI prefix: ``2.5 GB``."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor * 0.9995:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"
