"""Orders of the tokens of a grid: for each, the tokens (numbers in row order) along its curve, for any sizes."""

from __future__ import annotations

from collections.abc import Callable

from dilcompile.blocks.orders import hilbert, morton, row
from dilcompile.progression import Positions

# The token at each place of the curve, from the grid's two or three sizes; ``Curve`` has the inverse.
ORDERS: dict[str, Callable[[tuple[int, ...]], Positions]] = {
    "row": row.tokens,
    "hilbert": hilbert.tokens,
    "morton": morton.tokens,
}
