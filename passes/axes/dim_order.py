"""Orders of dims in letters: batch (any number of dims, written ``b``), ``h`` heads, ``s`` rows, ``d`` features."""

from __future__ import annotations


def dims_of(order: str, rank: int) -> str:
    """A letter a dim: the order with as many batch dims as there are; with too few dims there are no heads.

    ``dims_of("bhsd", 5)`` is ``bbhsd``, ``dims_of("bhsd", 3)`` is ``bsd``.
    """
    missing = rank - len(order)
    if missing >= 0:
        return order.replace("b", "b" * (missing + 1)) if missing else order
    return order.replace("h", "").replace("b", "b" * (missing + 2))
