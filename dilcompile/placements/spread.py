"""Which ranks hold the positions of many progressions, and how many: all of them at once, as arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd

import numpy as np
import numpy.typing as npt

from dilcompile.placements.shards import Shards
from dilcompile.progression import Positions, Progression

_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Spread:
    """N progressions, none of them empty: ``start``, ``size`` and ``step``, int64 [N] each."""

    start: Positions
    size: Positions
    step: Positions

    @staticmethod
    def of(parts: Iterable[Progression]) -> Spread:
        """The progressions as arrays."""
        found = np.array([(part.start, len(part), part.step) for part in parts], dtype=np.int64).reshape(-1, 3)
        return Spread(*found.T)

    @property
    def last(self) -> Positions:
        """The last positions, int64 [N]."""
        return self.start + (self.size - 1) * self.step

    def held_by(self, rank: int, shards: Shards) -> Positions:
        """How many positions of each progression a rank holds, int64 [N]."""
        if shards.order != "striped":
            pieces = [rank, 2 * shards.ranks - 1 - rank] if shards.order == "zigzag" else [rank]
            return sum((self._within(piece * shards.piece, shards.piece) for piece in pieces), np.zeros_like(self.size))
        found = np.zeros_like(self.size)
        for step in np.unique(self.step).tolist():
            divisor = gcd(step, shards.ranks)
            cycle = shards.ranks // divisor
            of_step = self.step == step
            gap, size = rank - self.start[of_step], self.size[of_step]
            # Which one is the first that the rank holds (Chinese remainder theorem); then each ``cycle``-th.
            first = gap // divisor * (pow(step // divisor, -1, cycle) if cycle > 1 else 0) % cycle
            found[of_step] = np.where(gap % divisor == 0, np.maximum(0, (size - first + cycle - 1) // cycle), 0)
        return found

    def stretches(self, rank: int, shards: Shards) -> int:
        """In how many stretches the positions come to a rank that holds some of them: those that follow one another in a
        progression come as one, but for striped shards, where those of each rank are apart."""
        if shards.order == "striped":
            ranks = np.minimum(shards.ranks // np.gcd(self.step, shards.ranks), self.size)
            return int(ranks.sum() - np.count_nonzero(self.held_by(rank, shards)))
        pieces = [rank, 2 * shards.ranks - 1 - rank] if shards.order == "zigzag" else [rank]
        lows = [0, *((piece + 1) * shards.piece for piece in pieces)]
        highs = [*(piece * shards.piece for piece in pieces), shards.ranks * shards.places]
        between = (self._within(low, high - low) for low, high in zip(lows, highs, strict=True))
        return sum(int(np.count_nonzero(held)) for held in between)

    def by_rank(self, weights: Positions, shards: Shards) -> Positions:
        """How many positions each rank holds, those of a progression ``weights[i]`` times, int64 [ranks]."""
        if shards.order == "striped":
            cycle = shards.ranks // np.gcd(self.step, shards.ranks)
            found = np.zeros(shards.ranks, dtype=np.int64)
            for which, number in _counted(np.minimum(cycle, self.size)):
                held = (self.start[which] + number * self.step[which]) % shards.ranks
                np.add.at(found, held, weights[which] * ((self.size[which] - number + cycle[which] - 1) // cycle[which]))
            return found
        pieces = self._by_piece(weights, shards.piece, shards.ranks * (2 if shards.order == "zigzag" else 1))
        found = np.zeros(shards.ranks, dtype=np.int64)
        np.add.at(found, shards.holders(np.arange(len(pieces), dtype=np.int64) * shards.piece), pieces)
        return found

    def holders(self, shards: Shards) -> npt.NDArray[np.bool_]:
        """Which ranks hold any of the positions, bool [ranks]."""
        found = np.zeros(shards.ranks, dtype=np.bool_)
        if shards.order == "striped":
            for which, number in _counted(np.minimum(shards.ranks, self.size)):
                found[(self.start[which] + number * self.step[which]) % shards.ranks] = True
            return found
        # A step no longer than a piece leaves none out.
        near = self.step <= shards.piece
        ends = np.zeros(shards.ranks * (2 if shards.order == "zigzag" else 1) + 1, dtype=np.int64)
        np.add.at(ends, self.start[near] // shards.piece, 1)
        np.add.at(ends, self.last[near] // shards.piece + 1, -1)
        found[shards.holders(np.flatnonzero(np.cumsum(ends)) * shards.piece)] = True
        far = np.flatnonzero(~near)
        for which, number in _counted(self.size[far]):
            found[shards.holders(self.start[far[which]] + number * self.step[far[which]])] = True
        return found

    def _within(self, low: int | Positions, width: int) -> Positions:
        """How many of the positions are in ``[low, low + width)``, int64 [N]."""
        before, upto = (np.clip(-((self.start - end) // self.step), 0, self.size) for end in (low, low + width))
        found: Positions = upto - before
        return found

    def _chosen(self, which: Positions | npt.NDArray[np.bool_]) -> Spread:
        return Spread(self.start[which], self.size[which], self.step[which])

    def _by_piece(self, weights: Positions, piece: int, number: int) -> Positions:
        """How many positions each of ``number`` pieces holds, those of a progression ``weights[i]`` times, int64 [number]."""
        found, ends = np.zeros(number, dtype=np.int64), np.zeros(number + 1, dtype=np.int64)
        first, last = self.start // piece, self.last // piece
        # Of these all pieces between the first and the last hold equally many.
        is_even = piece % self.step == 0
        for at in (first, last):
            there = is_even & ((at != first) | (at is first))
            np.add.at(found, at[there], weights[there] * self._chosen(there)._within(at[there] * piece, piece))
        between = is_even & (last > first)
        inside = weights[between] * (piece // self.step[between])
        np.add.at(ends, first[between] + 1, inside)
        np.add.at(ends, last[between], -inside)
        others = np.flatnonzero(~is_even)
        for which, offset in _counted((last - first + 1)[others]):
            of = others[which]
            at = first[of] + offset
            np.add.at(found, at, weights[of] * self._chosen(of)._within(at * piece, piece))
        found += np.cumsum(ends)[:-1]
        return found


def _counted(sizes: Positions) -> Iterator[tuple[Positions, Positions]]:
    """For each i the pairs (i, 0), (i, 1), ... below ``sizes[i]``, as two arrays, so many at once as memory has room for."""
    start, stops = 0, np.cumsum(sizes)
    while start < len(sizes):
        done = int(stops[start - 1]) if start else 0
        stop = max(start + 1, int(np.searchsorted(stops, done + _AT_ONCE, "right")))
        which = np.repeat(np.arange(start, stop, dtype=np.int64), sizes[start:stop])
        yield (
            which,
            np.arange(len(which), dtype=np.int64) - np.repeat(stops[start:stop] - sizes[start:stop] - done, sizes[start:stop]),
        )
        start = stop
