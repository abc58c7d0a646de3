"""Offsets for buffers, so that no two that are live together overlap: dynamic storage allocation, which is NP-hard.

Greedy orders, each placing a buffer in a gap among those that it meets (Pisarchyk and Lee, "Efficient memory management for deep
neural net inference", arXiv 2001.03288, section 5), then, for few buffers, an exact search. Compared with the largest sum of
sizes that are live in one step, which no packing can beat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from dilcompile.memory.buffer import Buffer, aligned

Offsets = tuple[int, ...]
# Above this the exact search is not tried; and how many placements it may try below it.
FEW = 12
_MOST_PLACEMENTS = 4_000
# How many buffers may be placed again where there are more: some hundredths of a second.
_MOST_REPACKED = 4_000


@dataclass
class Bytes:
    """How many bytes are held in each of a number of steps."""

    steps: int
    at: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.at = [0] * self.steps

    def add(self, begin: int, end: int, size: int) -> None:
        """So many more from one step to another, both included."""
        for step in range(begin, end + 1):
            self.at[step] += size

    def within(self, begin: int, end: int) -> int:
        """The most in these steps."""
        return max(self.at[begin : end + 1], default=0)

    @property
    def most(self) -> int:
        """The most in any step."""
        return max(self.at, default=0)


def most_live(buffers: Sequence[Buffer]) -> int:
    """The largest number of bytes that are live in one step: the lower bound of every packing."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.begin] = changes.get(buffer.begin, 0) + buffer.hint
        changes[buffer.end + 1] = changes.get(buffer.end + 1, 0) - buffer.hint
    live = most = 0
    for step in sorted(changes):
        live += changes[step]
        most = max(most, live)
    return most


def without_reuse(buffers: Sequence[Buffer]) -> int:
    """Bytes if each buffer had a place of its own."""
    total = 0
    for buffer in buffers:
        total = aligned(total, buffer.alignment) + buffer.hint
    return total


def peak(buffers: Sequence[Buffer], offsets: Offsets) -> int:
    """Bytes of the arena that these offsets need."""
    return max((offset + buffer.hint for buffer, offset in zip(buffers, offsets, strict=True)), default=0)


def pack(buffers: Sequence[Buffer]) -> Offsets:
    """The offset of each buffer in one arena: the best of all orders and fits, at their hints. Deterministic."""
    neighbours = meeting(buffers)
    bound, best = most_live(buffers), None
    for key in _ORDERS:
        order = sorted(range(len(buffers)), key=lambda i: (*key(buffers[i]), i))
        for tightest in (True, False):
            found = _placed(buffers, order, neighbours, tightest)
            if best is None or peak(buffers, found) < peak(buffers, best):
                best = found
            if peak(buffers, best) <= bound:
                return best
    assert best is not None, "there are orders"
    if len(buffers) <= FEW:
        return _searched(buffers, neighbours, best, bound)
    return _raised(buffers, neighbours, best, bound)


# Largest first; longest-lived first; by what they take of space and time; in the order of the steps, and backwards.
_ORDERS: tuple[Callable[[Buffer], tuple[int, ...]], ...] = (
    lambda b: (-b.hint, b.begin),
    lambda b: (b.begin - b.end, -b.hint),
    lambda b: (-b.hint * (b.end - b.begin + 1), b.begin),
    lambda b: (b.begin, -b.hint),
    lambda b: (-b.end, -b.hint),
)


def meeting(buffers: Sequence[Buffer]) -> list[list[int]]:
    """For each buffer those that it meets, by a sweep over the steps."""
    found: list[list[int]] = [[] for _ in buffers]
    live: list[int] = []
    for i in sorted(range(len(buffers)), key=lambda i: buffers[i].begin):
        live = [j for j in live if buffers[j].end >= buffers[i].begin]
        for j in live:
            found[i].append(j)
            found[j].append(i)
        live.append(i)
    return found


def _placed(buffers: Sequence[Buffer], order: Sequence[int], neighbours: Sequence[Sequence[int]], tightest: bool) -> Offsets:
    """Each buffer in turn in the tightest, or the lowest, gap that holds it among those it meets."""
    offsets: list[int | None] = [None] * len(buffers)
    for i in order:
        taken = sorted((at, at + buffers[j].hint) for j in neighbours[i] if (at := offsets[j]) is not None)
        offsets[i] = gap(buffers[i], taken, tightest)
    return tuple(offset for offset in offsets if offset is not None)


def gap(buffer: Buffer, taken: Sequence[tuple[int, int]], tightest: bool) -> int:
    """Where the buffer fits between the ranges ``taken``, ascending; behind all of them if nowhere."""
    best, room, end = None, None, 0
    for start, stop in taken:
        offset = aligned(end, buffer.alignment)
        if offset + buffer.hint <= start and (room is None or start - offset < room):
            best, room = offset, start - offset
            if not tightest:
                break
        end = max(end, stop)
    return aligned(end, buffer.alignment) if best is None else best


def _raised(buffers: Sequence[Buffer], neighbours: Sequence[Sequence[int]], best: Offsets, bound: int) -> Offsets:
    """Again and again the buffer that sticks out is placed first; the best of all these packings."""
    turns = _MOST_REPACKED // len(buffers)
    for tightest in (True, False):
        order, found = sorted(range(len(buffers)), key=lambda i: (-buffers[i].hint, buffers[i].begin, i)), best
        for _ in range(turns):
            found = _placed(buffers, order, neighbours, tightest)
            if peak(buffers, found) < peak(buffers, best):
                best = found
            if peak(buffers, best) <= bound:
                return best
            highest = max(order, key=lambda i: (found[i] + buffers[i].hint, -i))
            order.remove(highest)
            order.insert(0, highest)
    return best


def _searched(buffers: Sequence[Buffer], neighbours: Sequence[Sequence[int]], best: Offsets, bound: int) -> Offsets:
    """The least peak of all orders of first fit, by branch and bound; some such order is optimal."""
    offsets: list[int | None] = [None] * len(buffers)
    least, found, tries = peak(buffers, best), best, 0

    def place(left: frozenset[int], top: int) -> None:
        nonlocal least, found, tries
        if not left:
            least, found = top, tuple(offset for offset in offsets if offset is not None)
            return
        for i in sorted(left, key=lambda i: (-buffers[i].hint, i)):
            tries += 1
            if tries > _MOST_PLACEMENTS or least <= bound:
                return
            taken = sorted((at, at + buffers[j].hint) for j in neighbours[i] if (at := offsets[j]) is not None)
            at = gap(buffers[i], taken, tightest=False)
            if max(top, at + buffers[i].hint) < least:
                offsets[i] = at
                place(left - {i}, max(top, at + buffers[i].hint))
                offsets[i] = None

    place(frozenset(range(len(buffers))), 0)
    return found


def overlaps(buffers: Sequence[Buffer], offsets: Offsets) -> tuple[str, str] | None:
    """The names of two buffers that are live together and overlap, or None: what proves a plan."""
    events: dict[int, list[int]] = {}
    for i, buffer in enumerate(buffers):
        events.setdefault(buffer.begin, []).append(i)
    live: list[int] = []
    for step in sorted(events):
        live = [i for i in live if buffers[i].end >= step] + events[step]
        ranges = sorted((offsets[i], offsets[i] + buffers[i].hint, i) for i in live if buffers[i].hint)
        for (_, stop, i), (start, _, j) in pairwise(ranges):
            if start < stop:
                return buffers[i].name, buffers[j].name
    return None
