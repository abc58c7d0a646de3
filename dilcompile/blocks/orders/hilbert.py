"""Hilbert's curve for grids of any sizes: every token is a neighbour of the one before.

D. Hilbert, Ueber die stetige Abbildung einer Linie auf ein Flaechenstueck, 1891. A box is walked from its first corner to the
corner at the end of its first axis, in two, three or five smaller boxes that are walked the same way, as in J. Cerveny's
generalised curve (gilbert). There the boxes are always about halves, and odd sizes make diagonal steps.

Note [parity]: neighbours differ in colour, as on a chess board, so such a walk exists only where the box has an odd number of
cells or its first axis an even one. The cut is the one nearest to the middle that leaves only boxes for which this holds. For
every box that has a walk at all one was found; a grid has one along any even axis, or along each of three odd ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np

from dilcompile.progression import Positions

Triple = tuple[int, int, int]


def tokens(grid: tuple[int, ...]) -> Positions:
    """The token at each place of the curve, int64 [product of the grid].

        grid [4, 4]         along the curve                         the curve
        0  1  2  3          0 4 5 1  2 3 7 6                        0  3  4  5
        4  5  6  7          10 11 15 14  13 9 8 12                  1  2  7  6
        8  9  10 11                                                 14 13 8  9
        12 13 14 15         inverse: the picture on the right       15 12 11 10
    """
    sizes = (*grid, 1)[:3]
    # The first axis of the walk: see Note [parity].
    order = sorted(range(3), key=lambda axis: (sizes[axis] % 2, -sizes[axis]))
    walked = _walk((sizes[order[0]], sizes[order[1]], sizes[order[2]]))
    strides = (sizes[1] * sizes[2], sizes[2], 1)
    found: Positions = walked @ np.array([strides[axis] for axis in order], dtype=np.int64)
    return found


class _Part(NamedTuple):
    """A smaller box of a walk: its own sizes, the corner it starts at, and the axis and sign that each of its axes runs along."""

    sizes: Triple
    corner: Triple
    axes: Triple
    signs: Triple


@lru_cache(maxsize=4096)
def _walk(sizes: Triple) -> Positions:
    """The cells of a box along the curve, int64 [cells, 3], from (0, 0, 0) to (sizes[0] - 1, 0, 0)."""
    if sizes[1] == sizes[2] == 1:
        return np.outer(np.arange(sizes[0], dtype=np.int64), np.array([1, 0, 0]))
    parts = _cut(sizes)
    assert parts is not None, f"no walk through a box of {sizes}"
    found: Positions = np.concatenate([_placed(part) for part in parts])
    return found


def _placed(part: _Part) -> Positions:
    cells = _walk(part.sizes)
    found = np.empty_like(cells)
    for own, (axis, sign) in enumerate(zip(part.axes, part.signs, strict=True)):
        found[:, axis] = sign * cells[:, own]
    found += np.array(part.corner)
    return found


@lru_cache(maxsize=65536)
def _cut(sizes: Triple) -> tuple[_Part, ...] | None:
    """The first cut of a box that leaves boxes with walks; None: there is none."""
    for parts in _cuts(sizes):
        if all(_has_walk(part.sizes) for part in parts):
            return parts
    return None


def _has_walk(sizes: Triple) -> bool:
    length, height, depth = sizes
    if height == depth == 1:
        return True
    even = length % 2 == 0 or (height % 2 == 1 and depth % 2 == 1)
    return length > 1 and even and _cut(sizes) is not None


def _cuts(sizes: Triple) -> Iterator[tuple[_Part, ...]]:
    """Cuts of a box, the best first: long boxes across, flat ones in three, others in five."""
    length, height, depth = sizes
    kinds = {
        "two": lambda: (_in_two(sizes, cut) for cut in _middles(length)),
        "three": lambda: (_in_three(sizes, *cut) for cut in product(_middles(height), _middles(length))),
        "deep": lambda: (_turned(_in_three((length, depth, height), *cut)) for cut in product(_middles(depth), _middles(length))),
        "five": lambda: (_in_five(sizes, *cut) for cut in product(_middles(height), _middles(depth), _middles(length))),
    }
    if 2 * length > 3 * max(height, depth):
        ranked = ("two", "three", "deep", "five")
    elif 3 * height > 4 * depth:
        ranked = ("three", "five", "two", "deep")
    elif 3 * depth > 4 * height:
        ranked = ("deep", "five", "two", "three")
    else:
        ranked = ("five", "three", "deep", "two")
    for kind in ranked:
        yield from kinds[kind]()


def _middles(size: int) -> list[int]:
    """Where an axis may be cut, from its middle outwards, even places first."""
    half = size // 2
    near = [half, half + 1, half - 1, half + 2] if half % 2 == 0 or size < 4 else [half + 1, half, half - 1, half + 2]
    return [place for place in near if 0 < place < size]


def _in_two(sizes: Triple, cut: int) -> tuple[_Part, ...]:
    """One half of the length after the other."""
    length, height, depth = sizes
    along = ((0, 1, 2), (1, 1, 1))
    return _Part((cut, height, depth), (0, 0, 0), *along), _Part((length - cut, height, depth), (cut, 0, 0), *along)


def _in_three(sizes: Triple, up: int, cut: int) -> tuple[_Part, ...]:
    """Up, along the whole length, and down again."""
    length, height, depth = sizes
    return (
        _Part((up, depth, cut), (0, 0, 0), (1, 2, 0), (1, 1, 1)),
        _Part((length, height - up, depth), (0, up, 0), (0, 1, 2), (1, 1, 1)),
        _Part((up, depth, length - cut), (length - 1, up - 1, 0), (1, 2, 0), (-1, 1, -1)),
    )


def _in_five(sizes: Triple, up: int, far: int, cut: int) -> tuple[_Part, ...]:
    """Up, to the far side, along the whole length there, back to the near side, and down again."""
    length, height, depth = sizes
    return (
        _Part((up, far, cut), (0, 0, 0), (1, 2, 0), (1, 1, 1)),
        _Part((depth, cut, height - up), (0, up, 0), (2, 0, 1), (1, 1, 1)),
        _Part((length, up, depth - far), (0, up - 1, depth - 1), (0, 1, 2), (1, -1, -1)),
        _Part((depth, length - cut, height - up), (length - 1, up, depth - 1), (2, 0, 1), (-1, -1, 1)),
        _Part((up, far, length - cut), (length - 1, up - 1, 0), (1, 2, 0), (-1, 1, -1)),
    )


def _turned(parts: tuple[_Part, ...]) -> tuple[_Part, ...]:
    """The parts with height and depth exchanged."""
    other = (0, 2, 1)
    return tuple(
        _Part(
            part.sizes,
            (part.corner[0], part.corner[2], part.corner[1]),
            (other[part.axes[0]], other[part.axes[1]], other[part.axes[2]]),
            part.signs,
        )
        for part in parts
    )
