"""Large numbers as people read them."""

from __future__ import annotations


def count(number: int) -> str:
    """Three digits and a decimal prefix: ``1.23 M``."""
    return _scaled(number, 1000, ("", " k", " M", " G", " T", " P", " E"))


def size(number: int) -> str:
    """Bytes with a binary prefix: ``1.5 MiB``."""
    return _scaled(number, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB", " EiB"))


def percent(share: float) -> str:
    """A share as per cent, with three digits below 1."""
    held = 100 * share
    if held == 0 or held >= 99.95:
        return f"{held:.0f} %"
    return f"{held:.1f} %" if held >= 1 else f"{held:.3g} %"


def _scaled(number: int, base: int, prefixes: tuple[str, ...]) -> str:
    held, step = float(number), 0
    # 999.6 is written 1000: that belongs to the next prefix.
    while held >= base - 0.5 and step < len(prefixes) - 1:
        held, step = held / base, step + 1
    digits = 0 if step == 0 or held >= 100 else 1 if held >= 10 else 2
    return f"{held:.{digits}f}{prefixes[step]}"
