"""How well the blocks of an order fit the neighbourhoods of a grid's tokens: counted, without a look at each pair."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np

from dilcompile.blocks.curve import Curve
from dilcompile.blocks.grid import Flags
from dilcompile.blocks.neighbourhood import extents, near
from dilcompile.progression import Positions


@dataclass(frozen=True)
class Fullness:
    """The blocks that hold pairs of a neighbourhood: tokens at most a radius apart along every axis of their grid.

    Args:
        blocks: how many; these are computed.
        full: of these, how many hold nothing but such pairs, so that no mask is needed in them.
        partial: the others.
        density: the pairs in all of these blocks over all pairs of tokens.
        pairs: the pairs of the neighbourhood themselves over all pairs: what no order can go below.
    """

    blocks: int
    full: int
    partial: int
    density: float
    pairs: float

    @property
    def full_share(self) -> float:
        """Full blocks over all that are computed."""
        return self.full / max(1, self.blocks)


def fullness(curve: Curve, radius: int | tuple[int, ...], q_block: int, k_block: int | None = None) -> Fullness:
    """Count the blocks of a neighbourhood, in time and memory of those blocks (see ``neighbourhood.near``).

    Args:
        curve: the grid and the order of its tokens; those in front of the grid are near to all.
        radius: how far apart tokens may be, along every axis or along each.
        q_block, k_block: positions in a block; k_block: as many as q_block if it isn't given.
    """
    k_block = q_block if k_block is None else k_block
    reach = radius if isinstance(radius, tuple) else (radius,) * len(curve.grid)
    length = len(curve)
    rows, columns = np.divmod(near(curve, reach, q_block, k_block), -(-length // k_block))
    full = _full(curve, reach, rows, columns, q_block, k_block)
    computed = (_held(rows, q_block, length) * _held(columns, k_block, length)).sum()
    return Fullness(
        blocks=len(rows),
        full=int(full.sum()),
        partial=int((~full).sum()),
        density=int(computed) / length**2,
        pairs=_pairs(curve, reach) / length**2,
    )


def _held(blocks: Positions, size: int, length: int) -> Positions:
    """How many tokens are in each block."""
    return np.minimum((blocks + 1) * size, length) - blocks * size


def _full(curve: Curve, radius: tuple[int, ...], rows: Positions, columns: Positions, q_block: int, k_block: int) -> Flags:
    """Whether each pair of tokens in the block is near. The farthest two along an axis are at the ends of the extents."""
    (low, high), (others_low, others_high) = _ends(curve, q_block), _ends(curve, k_block)
    farthest = np.maximum(high[rows] - others_low[columns], others_high[columns] - low[rows])
    found: Flags = (farthest <= np.array(radius)).all(1)
    return found


def _ends(curve: Curve, size: int) -> tuple[Positions, Positions]:
    """The extents of each block of positions; blocks without a token of the grid are near to everything."""
    around, count = extents(curve, size), -(-len(curve) // size)
    low = np.full((count, len(curve.grid)), max(curve.grid), dtype=np.int64)
    high = np.full((count, len(curve.grid)), -max(curve.grid), dtype=np.int64)
    low[around.block], high[around.block] = around.low, around.high
    return low, high


def _pairs(curve: Curve, radius: tuple[int, ...]) -> int:
    """How many pairs of tokens are near: along each axis so many are, and those in front of the grid see all and are seen."""
    inside = 1
    for size, reach in zip(curve.grid, radius, strict=True):
        place = np.arange(size)
        inside *= int((np.minimum(place + reach, size - 1) - np.maximum(place - reach, 0) + 1).sum())
    return inside + len(curve) ** 2 - prod(curve.grid) ** 2
