"""How the positions of a sequence are held by ranks: contiguous, zigzag or striped shards of one size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dilcompile.progression import Positions, Progression

Order = Literal["contiguous", "zigzag", "striped"]
ORDERS: tuple[Order, ...] = get_args(Order)


@dataclass(frozen=True)
class Run:
    """Neighbouring places of a rank's memory: place ``place + i`` holds the i-th of ``positions``."""

    place: int
    positions: Progression


@dataclass(frozen=True)
class Shards:
    """The positions ``0 .. length`` over ``ranks`` ranks.

    Every rank has equally many places (``places``); those that are left over hold no token.

    - ``contiguous``: rank j holds the j-th of ``ranks`` pieces.
    - ``zigzag``: rank j holds the pieces j and ``2 * ranks - 1 - j`` of ``2 * ranks``, so that a causal mask gives all ranks the
      same work (Llama 3, arXiv 2407.21783, section 3.3.2).
    - ``striped``: rank j holds the positions j, j + ranks, ... (striped attention, arXiv 2311.09431). A branch whose rate is a
      multiple of ``ranks`` then lies on one rank.

    Args:
        length: tokens of the sequence, S.
        ranks: P.
        parts: each rank's places are cut in so many equal slices, held by as many ranks of another mesh axis.
    """

    length: int
    ranks: int
    order: Order = "contiguous"
    parts: int = 1

    def __post_init__(self) -> None:
        if self.ranks == 1:
            # All positions in their order, without the places that the pieces of a zigzag would leave over.
            object.__setattr__(self, "order", "contiguous")

    @property
    def places(self) -> int:
        """Places of one rank, n; a multiple of ``parts``."""
        pieces = 2 if self.order == "zigzag" else 1
        # Slices of a rank's places are equal too.
        unit = self.parts * pieces
        return -(-self.length // (self.ranks * unit)) * unit

    @property
    def piece(self) -> int:
        """Neighbouring positions that a rank holds together."""
        return 1 if self.order == "striped" else self.places // (2 if self.order == "zigzag" else 1)

    def holder(self, number: int) -> int:
        """The rank that holds the ``number``-th piece."""
        if self.order == "zigzag":
            return min(number, 2 * self.ranks - 1 - number)
        return number % self.ranks

    def holders(self, positions: Positions) -> Positions:
        """The ranks that hold these positions, int64 both."""
        number = positions // max(1, self.piece)
        found: Positions = np.minimum(number, 2 * self.ranks - 1 - number) if self.order == "zigzag" else number % self.ranks
        return found

    def runs(self, rank: int) -> tuple[Run, ...]:
        """What the places of a rank hold, in the order of memory; only positions that exist."""
        places = self.places
        if self.order == "contiguous":
            return self._existing([Run(0, Progression(rank * places, (rank + 1) * places))])
        if self.order == "striped":
            return self._existing([Run(0, Progression(rank, rank + places * self.ranks, self.ranks))])
        piece = places // 2
        pieces = (rank, 2 * self.ranks - 1 - rank)
        return self._existing([Run(n * piece, Progression(p * piece, (p + 1) * piece)) for n, p in enumerate(pieces)])

    def _existing(self, runs: list[Run]) -> tuple[Run, ...]:
        found = []
        for run in runs:
            held = run.positions
            clipped = Progression(held.start, min(held.stop, self.length), held.step)
            if len(clipped):
                found.append(Run(run.place, clipped))
        return tuple(found)

    def owner(self, position: int) -> tuple[int, int]:
        """(rank, place) that holds a position."""
        places = self.places
        if self.order == "contiguous":
            return position // places, position % places
        if self.order == "striped":
            return position % self.ranks, position // self.ranks
        piece = places // 2
        number, inside = divmod(position, piece)
        first = number < self.ranks
        return (number, inside) if first else (2 * self.ranks - 1 - number, piece + inside)
