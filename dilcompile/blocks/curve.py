"""The tokens of a grid along a curve: the positions that blocks count."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Literal, get_args

import numpy as np

from dilcompile.blocks.orders import ORDERS
from dilcompile.progression import Positions

OrderName = Literal["none", "row", "hilbert", "morton"]
ORDER_NAMES: tuple[OrderName, ...] = get_args(OrderName)


@dataclass(frozen=True)
class Curve:
    """Where each token of a sequence stands: tokens in front of a grid, then those of the grid in row order.

    On a curve the grid comes first and the tokens in front of it last, so that blocks are cut from the grid's first token on:
    one token more in front and each block would lie in two of the curve's squares.

        order hilbert, grid [2, 2], lead 1      tokens      0 | 1 2
                                                              | 3 4
        tokens along the curve                  1 2 4 3 0
        positions, the inverse                  4 0 1 3 2

    Args:
        order: one of ``ORDERS``; ``none``: every token stands where it is.
        grid: two or three sizes, the last axis fastest.
        lead: tokens in front of the grid.
    """

    order: OrderName
    grid: tuple[int, ...]
    lead: int = 0

    def __len__(self) -> int:
        return prod(self.grid) + self.lead

    @property
    def moves(self) -> bool:
        """Whether any token stands elsewhere than in the sequence."""
        return self.order in ("hilbert", "morton") or (self.order == "row" and self.lead > 0)

    @property
    def first(self) -> int:
        """The position of the grid's first token: ``lead`` where these stand in front."""
        return self.lead if self.order == "none" else 0

    @property
    def tokens(self) -> Positions:
        """The token at each position, int64 [len]; not to be written."""
        return _tokens(self)

    @property
    def positions(self) -> Positions:
        """The position of each token, int64 [len], the inverse of ``tokens``; not to be written."""
        return _positions(self)

    @property
    def places(self) -> Positions:
        """Where in the grid the tokens from position ``first`` on are, int64 [tokens of the grid, axes]; not to be written."""
        return _places(self)


# A pair of arrays of 8 bytes a token each; a model has one or two curves.
@lru_cache(maxsize=16)
def _tokens(curve: Curve) -> Positions:
    if curve.order == "none":
        return _fixed(np.arange(len(curve), dtype=np.int64))
    return _fixed(np.append(ORDERS[curve.order](curve.grid) + curve.lead, np.arange(curve.lead, dtype=np.int64)))


@lru_cache(maxsize=16)
def _positions(curve: Curve) -> Positions:
    found = np.empty(len(curve), dtype=np.int64)
    found[curve.tokens] = np.arange(len(curve), dtype=np.int64)
    return _fixed(found)


@lru_cache(maxsize=16)
def _places(curve: Curve) -> Positions:
    inside = curve.tokens[curve.first : curve.first + prod(curve.grid)] - curve.lead
    return _fixed(np.stack(np.unravel_index(inside, curve.grid), axis=1).astype(np.int64))


def _fixed(x: Positions) -> Positions:
    x.flags.writeable = False
    return x
