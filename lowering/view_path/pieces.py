"""A relation cut into pieces: strided rectangles, triangles and bands that one dense attention call each can compute.

Rows and keys of a dilated segment are arithmetic progressions, so a piece is a view of the model's own layout: nothing is
gathered or copied. Pieces that differ only by a shift (segments, heads, residue classes, window tiles) are one piece with
an ``Axis``. The plan is plain data; who executes it is another file's business.

Note [coordinates]: inside a segment and a residue class, row number j and key number i are neighbours in steps of the
rate. Row j stands beside key j + d, and every mask is a band: j + low <= i <= j + high.

    segment of 8, rate 2, residue 1, causal           j, i: 0 1 2 3
    positions  0 1 2 3 4 5 6 7                        0     x
    class        1   3   5   7        ->              1     x x
                                                      2     x x x
                                                      3     x x x x
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from dilcompile.generators import Blocks, ByRow, Everything, Generator, Segment, Sinks, Window
from dilcompile.relation import Problem, Relation, grid_of

_NARROWEST_TILE, _WIDEST_TILE = 32, 256


@dataclass(frozen=True)
class Axis:
    """``size`` shifted copies; each step moves by ``head`` key heads, ``group`` query heads and ``position`` positions.

    Args:
        phases: copies with numbers equal modulo ``phases`` share no key (1: none of them do).
    """

    size: int
    head: int = 0
    group: int = 0
    position: int = 0
    phases: int = 1


@dataclass(frozen=True)
class Piece:
    """One dense attention over ``rows`` query rows and ``keys`` keys, both in steps of ``step``.

    Args:
        axes: shifted copies.
        head: first key head; group: first query head inside it.
        row: first query row (not position); key: first key.
        low, high: row j sees keys ``j + low <= i <= j + high``; None: no limit.
        term: index of the relation's term.
        exclusive: leave out pairs that an earlier term holds.
        fresh: no earlier piece has written these rows.
    """

    axes: tuple[Axis, ...]
    head: int
    group: int
    row: int
    rows: int
    key: int
    keys: int
    step: int
    low: int | None
    high: int | None
    term: int = 0
    exclusive: bool = False
    fresh: bool = False

    @property
    def copies(self) -> int:
        """How many shifted copies there are."""
        total = 1
        for axis in self.axes:
            total *= axis.size
        return total

    @property
    def is_full(self) -> bool:
        """No band: every row sees every key."""
        return self.low is None and self.high is None

    @property
    def is_causal(self) -> bool:
        """The band is the lower triangle, top-left aligned."""
        return self.low is None and self.high == 0


@dataclass(frozen=True)
class Plan:
    """The pieces of a relation for a range of key heads; ``covers``: together the fresh ones write every row."""

    pieces: tuple[Piece, ...]
    covers: bool


@dataclass(frozen=True)
class _Band:
    """Rows ``row .. row + rows`` and keys ``key .. key + keys`` in class coordinates; ``tiles`` copies every ``rows``."""

    row: int
    rows: int
    key: int
    keys: int
    low: int | None = None
    high: int | None = None
    tiles: int = 1
    fresh: bool = True


@dataclass(frozen=True)
class _Strip:
    """A generator in one shape: segments, rate, residues, and the limits on ``t - k`` and ``k - t``."""

    length: int | None
    rate: int
    residues: tuple[int, ...] | None
    heads: tuple[int, int]
    left: int | None
    right: int | None
    k_len: int


@lru_cache(maxsize=4096)
def plan(relation: Relation, first_head: int, last_head: int) -> Plan:
    """The pieces of all terms for the key heads ``first_head`` up to ``last_head``."""
    pieces: list[Piece] = []
    for index, term in enumerate(relation.terms):
        for piece in _term_pieces(term.generator, relation.problem, first_head, last_head):
            fresh = piece.fresh and index == 0
            pieces.append(replace(piece, term=index, exclusive=term.dedupe and index > 0, fresh=fresh))
    written = sum(piece.rows * piece.copies for piece in pieces if piece.fresh)
    rows = relation.problem.q_len * (last_head - first_head) * relation.problem.group
    return Plan(tuple(pieces), written == rows)


def _term_pieces(generator: Generator, problem: Problem, first_head: int, last_head: int) -> Iterator[Piece]:
    if isinstance(generator, Blocks):
        return _block_pieces(generator, problem, first_head, last_head)
    return _strip_pieces(_strip(generator, problem), problem, first_head, last_head)


def _block_pieces(generator: Blocks, problem: Problem, first_head: int, last_head: int) -> Iterator[Piece]:
    """A rectangle for each block row and each run of neighbouring blocks in it, cut by the problem's limits."""
    width, height = generator.grid.k_block, generator.grid.q_block
    first_row, stop_row = problem.q_offset, problem.q_offset + problem.q_len
    grid = grid_of(problem, height, width)
    for query_head, head, axes in _block_heads(generator, problem, first_head, last_head):
        lists = generator.lists(query_head, grid)
        for number, line in enumerate(lists.lines.tolist()):
            row, stop = max(line * height, first_row), min((line + 1) * height, stop_row)
            columns = lists.of_line(number)
            for turn, run in enumerate(np.split(columns, np.flatnonzero(np.diff(columns) != 1) + 1)):
                if len(run) == 0:
                    continue
                key, last = int(run[0]) * width, min((int(run[-1]) + 1) * width, problem.k_len)
                for band in _bands(0, stop - row, last - key, row - key, problem.left, problem.right):
                    piece = _piece(band, axes, head, query_head % problem.group, row - first_row, key, 1)
                    yield replace(piece, fresh=band.fresh and turn == 0)


def _block_heads(
    generator: Blocks, problem: Problem, first_head: int, last_head: int
) -> Iterator[tuple[int, int, tuple[Axis, ...]]]:
    """(query head, key head, axes) of heads that have the same blocks."""
    group = problem.group
    if generator.pattern.by_head:
        yield from ((h, h // group, ()) for h in range(first_head * group, last_head * group))
    else:
        yield first_head * group, first_head, (Axis(last_head - first_head, head=1), Axis(group, group=1))


def _strip(generator: ByRow, problem: Problem) -> _Strip:
    zeros, heads = (0,) * problem.kv_heads, (0, problem.heads)
    left, right = problem.left, problem.right
    if isinstance(generator, Everything):
        return _Strip(None, 1, zeros, heads, left, right, problem.k_len)
    if isinstance(generator, Sinks):
        return _Strip(None, 1, zeros, heads, left, right, min(generator.count, problem.k_len))
    if isinstance(generator, Segment):
        heads = heads if generator.heads is None else generator.heads
        return _Strip(generator.length, generator.rate, generator.residues, heads, left, right, problem.k_len)
    assert isinstance(generator, Window), generator
    left, right = _least(left, generator.left), _least(right, generator.right)
    residues = zeros if generator.step == 1 else None
    return _Strip(None, generator.step, residues, heads, left, right, problem.k_len)


def _least(one: int | None, other: int | None) -> int | None:
    if one is None or other is None:
        return other if one is None else one
    return min(one, other)


def _strip_pieces(strip: _Strip, problem: Problem, first_head: int, last_head: int) -> Iterator[Piece]:
    blocks = list(_head_blocks(strip.heads, problem.group, first_head, last_head))
    left = None if strip.left is None else strip.left // strip.rate
    right = None if strip.right is None else strip.right // strip.rate
    for origin, start, stop, key_stop, repeats in _spans(strip, problem):
        for head, heads, group, groups in blocks:
            for shape, points in _classes(strip, origin, start, stop, key_stop, head, heads):
                rows, keys, shift = shape
                bands = list(_bands(0, rows, keys, shift, left, right))
                for first, residue, axes in _runs(points, heads if strip.residues is None else 1):
                    axes = (*axes, Axis(groups, group=1), Axis(repeats, position=strip.length or 0))
                    base = origin + residue
                    row = base + shift * strip.rate - problem.q_offset
                    yield from (_piece(band, axes, first, group, row, base, strip.rate) for band in bands)


def _piece(band: _Band, axes: tuple[Axis, ...], head: int, group: int, row: int, key: int, rate: int) -> Piece:
    tiles = Axis(band.tiles, position=band.rows * rate, phases=-(-band.keys // band.rows))
    return Piece(
        axes=tuple(axis for axis in (*axes, tiles) if axis.size > 1),
        head=head,
        group=group,
        row=row + band.row * rate,
        rows=band.rows,
        key=key + band.key * rate,
        keys=band.keys,
        step=rate,
        low=band.low,
        high=band.high,
        fresh=band.fresh,
    )


def _head_blocks(heads: tuple[int, int], group: int, first_head: int, last_head: int) -> Iterator[tuple[int, int, int, int]]:
    """(key head, key heads, first query head inside, query heads inside) covering a range of query heads."""
    start, stop = max(heads[0], first_head * group), min(heads[1], last_head * group)
    while start < stop:
        head, inside = divmod(start, group)
        if inside == 0 and stop - start >= group:
            whole = (stop - start) // group
            yield head, whole, 0, group
            start += whole * group
        else:
            count = min(group - inside, stop - start)
            yield head, 1, inside, count
            start += count


def _spans(strip: _Strip, problem: Problem) -> Iterator[tuple[int, int, int, int, int]]:
    """(first position, first and last query position, last key, repeats) of every segment; equal ones in a row are one."""
    start, stop = problem.q_offset, problem.q_offset + problem.q_len
    length = strip.length
    if length is None:
        yield 0, start, stop, strip.k_len, 1
        return
    first_whole = -(-max(0, start) // length)
    whole = max(0, min(stop, strip.k_len) // length - first_whole)
    if whole:
        origin = first_whole * length
        yield origin, origin, origin + length, origin + length, whole
    first = max(0, start) // length
    last = -(-min(stop, strip.k_len + length) // length)
    for number in range(first, last):
        origin = number * length
        inside = first_whole <= number < first_whole + whole
        if inside or origin >= strip.k_len:
            continue
        yield origin, max(start, origin), min(stop, origin + length), min(strip.k_len, origin + length), 1


def _classes(
    strip: _Strip, origin: int, start: int, stop: int, key_stop: int, head: int, heads: int
) -> Iterable[tuple[tuple[int, int, int], list[tuple[int, int]]]]:
    """(rows, keys, shift) and the (key head, residue) that have this shape in one segment."""
    residues = strip.residues
    if residues is None:
        points = [(head, residue) for residue in range(strip.rate)]
    else:
        points = [(h, residues[h]) for h in range(head, head + heads)]
    shapes: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for point in points:
        begin = origin + point[1]
        shift = -(-(start - begin) // strip.rate)
        rows = len(range(begin + shift * strip.rate, stop, strip.rate))
        keys = len(range(begin, key_stop, strip.rate))
        if rows and keys:
            shapes.setdefault((rows, keys, shift), []).append(point)
    return shapes.items()


def _runs(points: Sequence[tuple[int, int]], heads: int) -> Iterator[tuple[int, int, tuple[Axis, ...]]]:
    """(key head, residue, axes) that together enumerate ``points``: evenly spaced runs of evenly spaced runs."""
    runs = list(_even(points))
    lengths: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
    for base, step, count in runs:
        lengths.setdefault((count, *step), []).append(base)
    for (count, head, residue), bases in lengths.items():
        inner = Axis(count, head=head, position=residue)
        for base, step, repeats in _even(bases):
            outer = Axis(repeats, head=step[0], position=step[1])
            yield base[0], base[1], (outer, inner, Axis(heads, head=1))


def _even(points: Sequence[tuple[int, int]]) -> Iterator[tuple[tuple[int, int], tuple[int, int], int]]:
    """Split a sequence of points into (first, step, count) of constant steps; views can't step backwards."""
    start = 0
    while start < len(points):
        stop, step = start + 1, (0, 0)
        if stop < len(points):
            step = (points[stop][0] - points[start][0], points[stop][1] - points[start][1])
        while (
            stop < len(points)
            and min(step) >= 0
            and step
            == (
                points[stop][0] - points[stop - 1][0],
                points[stop][1] - points[stop - 1][1],
            )
        ):
            stop += 1
        yield points[start], step if stop > start + 1 else (0, 0), stop - start
        start = stop


def _bands(start: int, stop: int, keys: int, shift: int, left: int | None, right: int | None) -> Iterator[_Band]:
    """Rows ``start`` to ``stop`` of a class: row j sees ``j + shift - left <= i <= j + shift + right``, 0 <= i < keys."""
    if left is not None and right is not None and left + right < 0:
        return
    start = start if right is None else max(start, -shift - right)
    stop = stop if left is None else min(stop, keys - shift + left)
    if start >= stop:
        return
    open_left = left is None or stop - 1 + shift - left <= 0
    open_right = right is None or start + shift + right + 1 >= keys
    if open_left and open_right:
        yield _Band(start, stop - start, 0, keys)
    elif open_left:
        assert right is not None
        yield from _triangle(start, stop, keys, shift + right)
    else:
        assert left is not None
        yield from _tiles(start, stop, keys, shift, left, None if open_right else right)


def _triangle(start: int, stop: int, keys: int, diagonal: int) -> Iterator[_Band]:
    """Row j sees the keys up to ``j + diagonal``: a rectangle that all rows see, a triangle, rows that see everything."""
    bend = min(stop, max(start, keys - diagonal))
    base = start + diagonal
    if bend > start:
        if base:
            yield _Band(start, bend - start, 0, base)
        yield _Band(start, bend - start, base, bend - start, high=0, fresh=base == 0)
    if stop > bend:
        yield _Band(bend, stop - bend, 0, keys)


def _tiles(start: int, stop: int, keys: int, shift: int, left: int, right: int | None) -> Iterator[_Band]:
    """A band that moves with the rows: equal tiles where it is whole, and the rows at its two ends."""
    opening = min(stop, max(start, left - shift))
    if opening > start:
        yield from _bands(start, opening, keys, shift, None, right)
    if right is None:
        yield from _rest(opening, stop, keys, shift, left, None)
        return
    rows = min(_WIDEST_TILE, max(_NARROWEST_TILE, _power_of_two((left + right + 1) // 4)))
    tiles = max(0, (min(stop, keys - shift - right) - opening) // rows)
    if tiles:
        first = opening + shift - left
        yield _Band(opening, rows, first, rows + left + right, low=0, high=left + right, tiles=tiles)
    yield from _rest(opening + tiles * rows, stop, keys, shift, left, right)


def _rest(start: int, stop: int, keys: int, shift: int, left: int, right: int | None) -> Iterator[_Band]:
    """Rows in blocks of the widest tile, each with the keys that any of them sees."""
    for row in range(start, stop, _WIDEST_TILE):
        last = min(stop, row + _WIDEST_TILE)
        low = max(0, row + shift - left)
        high = keys if right is None else min(keys, last + shift + right)
        yield _Band(
            row,
            last - row,
            low,
            high - low,
            low=row + shift - left - low,
            high=None if right is None else row + shift + right - low,
        )


def _power_of_two(number: int) -> int:
    return 1 << max(0, number.bit_length() - 1)
