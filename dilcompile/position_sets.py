"""Sets of positions as progressions: what is common, what is left, what is reached. Work and memory go by progressions, never
by positions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from math import gcd

import numpy as np

from dilcompile.progression import Positions, Progression

Parts = tuple[Progression, ...]


def between(part: Progression, low: int, high: int) -> Progression:
    """The positions of ``part`` in ``[low, high)``."""
    first = part.start
    if low > first:
        first += -((first - low) // part.step) * part.step
    return Progression(first, max(first, min(part.stop, high)), part.step)


def meet(one: Progression, other: Progression) -> Progression:
    """The positions of both (Chinese remainder theorem)."""
    if other.step == 1:
        return between(one, other.start, other.stop)
    low, high = max(one.start, other.start), min(one.stop, other.stop)
    divisor = gcd(one.step, other.step)
    gap = other.start - one.start
    if gap % divisor or high <= low:
        return Progression(low, low, 1)
    over = other.step // divisor
    inverse = pow(one.step // divisor, -1, over) if over > 1 else 0
    step = one.step * over
    common = one.start + one.step * (gap // divisor * inverse % over)
    return between(Progression(low - (low - common) % step, high, step), low, high)


def without(one: Progression, other: Progression) -> list[Progression]:
    """The positions of ``one`` that are not of ``other``.

    Where ``other`` is as fine as ``one``, at most two progressions; else one more for each class of ``one`` modulo the common
    step that stays.
    """
    common = meet(one, other)
    if common.start >= common.stop:
        return [one] if one.start < one.stop else []
    last = common.positions()[-1]
    found = [between(one, one.start, common.start), between(one, last + one.step, one.stop)]
    stays = range(common.start + one.step, common.start + common.step, one.step)
    found += [Progression(start, last, common.step) for start in stays]
    return [part for part in found if part.start < part.stop]


def disjoint(parts: Iterable[Progression]) -> Parts:
    """The union of ``parts`` as disjoint progressions, ascending by their first position: of nested ones the finest first, so
    that each coarser one loses at most one stretch in the middle."""
    runs = [(step, _runs(held)) for step, classes in sorted(_by_step(parts).items()) for held in classes.values()]
    found: list[Progression] = []
    for number, (step, left) in enumerate(runs):
        low, high = left[0].start, left[-1].stop
        # Of nested ones the coarsest first: what the others hold is gone with it.
        for finer, there in reversed(runs[:number]):
            # Most are of other steps, stretches or classes: there is nothing to cut.
            apart = finer == step or there[0].start >= high or low >= there[-1].stop
            if apart or (there[0].start - low) % gcd(finer, step):
                continue
            left = list(_cut(left, there) if step % finer else _cut_nested(left, there))
            if not left:
                break
            low, high = min(part.start for part in left), max(part.stop for part in left)
        found += left
    return tuple(sorted(found, key=lambda part: (part.start, part.step)))


def _by_step(parts: Iterable[Progression]) -> dict[int, dict[int, list[Progression]]]:
    """The parts by step and class."""
    found: dict[int, dict[int, list[Progression]]] = {}
    for part in parts:
        size = -((part.start - part.stop) // part.step)
        if size <= 0:
            continue
        # A single position is of every step.
        step = part.step if size > 1 else 1
        stop = part.start + size * step
        found.setdefault(step, {}).setdefault(part.start % step, []).append(Progression(part.start, stop, step))
    return found


def _runs(parts: list[Progression]) -> list[Progression]:
    """Parts of one class as runs that neither meet nor touch; each stops one step behind its last position."""
    found: list[Progression] = []
    for part in sorted(parts, key=lambda one: one.start):
        if found and part.start <= found[-1].stop:
            found[-1] = Progression(found[-1].start, max(found[-1].stop, part.stop), part.step)
        else:
            found.append(part)
    return found


def _cut(parts: Sequence[Progression], away: Sequence[Progression]) -> Iterator[Progression]:
    """``parts`` without the runs ``away`` of one class, which ascend."""
    starts, stops = [part.start for part in away], [part.stop for part in away]
    for part in parts:
        left = [part]
        for other in away[bisect_right(stops, part.start) : bisect_left(starts, part.stop)]:
            left = [piece for one in left for piece in without(one, other)]
        yield from left


def _cut_nested(parts: Sequence[Progression], away: Sequence[Progression]) -> Iterator[Progression]:
    """``_cut`` where ``away`` holds every position of the parts between its ends, so that only stretches are left."""
    for part in parts:
        start, stop, step = part.start, part.stop, part.step
        for other in away:
            if other.stop <= start or other.start >= stop:
                continue
            # The first positions that are gone and that are left again.
            gone = start + max(0, -((start - other.start) // step)) * step
            again = start - (start - other.stop) // step * step
            if again <= gone:
                continue
            if gone > start:
                yield Progression(start, min(gone, stop), step)
            start = again
        if start < stop:
            yield Progression(start, stop, step)


def joined(starts: Positions, stops: Positions) -> list[Progression]:
    """The union of runs ``[starts[i], stops[i])``, none of them empty, as runs that neither meet nor touch."""
    order = np.argsort(starts, kind="stable")
    starts, stops = starts[order], np.maximum.accumulate(stops[order])
    fresh = np.append(True, starts[1:] > stops[:-1])[: len(starts)]
    ends = np.append(np.flatnonzero(fresh)[1:], len(starts))[: fresh.sum()] - 1
    return [Progression(low, high) for low, high in zip(starts[fresh].tolist(), stops[ends].tolist(), strict=True)]


def reached(rows: Progression, step: int, left: int | None, right: int | None, low: int, high: int) -> list[Progression]:
    """The positions k in ``[low, high)`` with ``-left <= k - t <= right`` and ``(k - t) % step == 0`` for some t of ``rows``.

    They are the sums of two progressions. None is no limit.
    """
    if not len(rows) or high <= low:
        return []
    last = rows.positions()[-1]
    back = -((last - low if left is None else left) // step) * step
    ahead = (high - 1 - rows.start if right is None else right) // step * step
    if ahead < back:
        return []
    distances = Progression(back, ahead + 1, step)
    found = (between(part, low, high) for part in _sums(rows, distances))
    return [part for part in found if len(part)]


def _sums(one: Progression, other: Progression) -> list[Progression]:
    if one.step < other.step:
        one, other = other, one
    first = one.start + other.start
    last = one.positions()[-1] + other.positions()[-1]
    # Each stretch of the finer one reaches the next.
    if one.step % other.step == 0 and (len(other) * other.step >= one.step or len(one) == 1):
        return [Progression(first, last + 1, other.step)]
    divisor = gcd(one.step, other.step)
    common = one.step // divisor * other.step
    if len(one) * one.step >= common:
        return list(_joined(one, other, one.step // divisor))
    if len(other) * other.step >= common:
        return list(_joined(other, one, other.step // divisor))
    few, many = sorted((one, other), key=len)
    return [Progression(many.start + shift, many.stop + shift, many.step) for shift in few.positions()]


def _joined(long: Progression, shifts: Progression, apart: int) -> Iterator[Progression]:
    """The sums where shifts that are ``apart`` of one another continue the same progression of ``long``."""
    for number in range(min(len(shifts), apart)):
        same = shifts.positions()[number::apart]
        yield Progression(long.start + same[0], long.positions()[-1] + same[-1] + 1, long.step)
