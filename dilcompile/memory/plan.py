"""A buffer plan: each arena's buffers stacked on one another, in a form that holds for every length.

The packing is found at the hints of the sizes. What is kept of it is not the offsets but, for each buffer, on which of those that
it meets it lies: its offset is the largest end of these. So two buffers that are live together stay apart whatever the lengths
become, without another search; only how tight the packing is may change.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import sympy

from dilcompile.memory.buffer import Buffer, Lane, aligned
from dilcompile.memory.packing import meeting, most_live, overlaps, pack, peak, without_reuse

Arenas = tuple["Arena", ...]
# Of the lower bound: an arena that is larger is packed again.
_LOOSE = 1.05


class Above(sympy.Function):  # type: ignore[misc]
    """The offset of what lies on these ends: the largest, rounded up to the alignment (the first argument).

    A number as soon as all ends are. ``Max`` and ``ceiling`` compare all pairs, in terms that grow with each buffer.
    """

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, alignment: sympy.Integer, *ends: sympy.Expr) -> sympy.Integer | None:
        """Where every end is a number."""
        known = all(end.is_Integer for end in ends)
        return sympy.Integer(aligned(max(map(int, ends), default=0), int(alignment))) if known else None


@dataclass(frozen=True)
class Arena:
    """The memory of one lane on one device.

    Args:
        buffers: from the lowest up, at the hints.
        below: for each buffer the numbers of those that it lies on, without those on which others of these lie.
        module: whose buffers these are; empty for those of all modules.
        inside: what was given to the graph, and in which these buffers lie when it is dead; None: the memory is the plan's.
    """

    device: str
    lane: Lane
    buffers: tuple[Buffer, ...]
    below: tuple[tuple[int, ...], ...]
    module: str = ""
    inside: Buffer | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """In bytes, at the hints."""
        return self.offsets_of([buffer.hint for buffer in self.buffers])

    def offsets_of(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """The offsets in bytes of buffers of these sizes."""
        found: list[int] = []
        for i, buffer in enumerate(self.buffers):
            found.append(max((aligned(found[j] + sizes[j], buffer.alignment) for j in self.below[i]), default=0))
        return tuple(found)

    @property
    def peak(self) -> int:
        """Bytes of the arena, at the hints."""
        return peak(self.buffers, self.offsets)

    @property
    def varies(self) -> bool:
        """Does its size depend on lengths that are known only when the graph runs?"""
        return not all(isinstance(buffer.size, int) or buffer.size.is_number for buffer in self.buffers)

    @property
    def most_live(self) -> int:
        """The lower bound: the most bytes that are live in one step."""
        return most_live(self.buffers)

    @property
    def without_reuse(self) -> int:
        """Bytes if each buffer had a place of its own."""
        return without_reuse(self.buffers)

    def expressions(self) -> tuple[sympy.Expr, ...]:
        """The offsets as expressions over the symbols of the sizes."""
        found: list[sympy.Expr] = []
        for i, buffer in enumerate(self.buffers):
            ends = [found[j] + sympy.sympify(self.buffers[j].size) for j in self.below[i]]
            found.append(Above(sympy.Integer(buffer.alignment), *ends))
        return tuple(found)

    def at(self, lengths: Mapping[sympy.Symbol, int]) -> Arena:
        """The same stacking where the symbols have these values: its hints are then the sizes."""
        inside = None if self.inside is None else _at(self.inside, lengths)
        return replace(self, buffers=tuple(_at(buffer, lengths) for buffer in self.buffers), inside=inside)


@dataclass(frozen=True)
class BufferPlan:
    """All arenas of a graph. Equal buffers give equal plans; a plan can be pickled.

    Args:
        arenas: memory that is made for a call.
        donated: memory that a call is given and that is dead before any of these buffers begins. Peaks and sums are without it.
    """

    arenas: Arenas
    donated: Arenas = ()

    @property
    def peak(self) -> int:
        """Bytes of all arenas together, at the hints."""
        return sum(arena.peak for arena in self.arenas)

    @property
    def varies(self) -> bool:
        """Does the size of any arena depend on lengths that are known only when the graph runs?"""
        return any(arena.varies for arena in self.arenas)

    @property
    def most_live(self) -> int:
        """The lower bound of each arena, added up."""
        return sum(arena.most_live for arena in self.arenas)

    @property
    def without_reuse(self) -> int:
        """Bytes if each buffer had a place of its own."""
        return sum(arena.without_reuse for arena in self.arenas)

    @cached_property
    def places(self) -> Mapping[str, tuple[int, int]]:
        """(number of the arena, offset in bytes) of each buffer by its name, at the hints; donated ones count on."""
        return {
            buffer.name: (number, offset)
            for number, arena in enumerate((*self.arenas, *self.donated))
            for buffer, offset in zip(arena.buffers, arena.offsets, strict=True)
        }

    def at(self, lengths: Mapping[sympy.Symbol, int]) -> BufferPlan:
        """The same stacking at other lengths."""
        return BufferPlan(*(tuple(arena.at(lengths) for arena in arenas) for arenas in (self.arenas, self.donated)))

    def fitted(self, lengths: Mapping[sympy.Symbol, int]) -> BufferPlan:
        """The plan at other lengths: the same stacking, but arenas that it makes more than 5 % too large are packed anew."""
        there = self.at(lengths)
        return replace(there, arenas=tuple(map(_fitted, there.arenas)))

    def verify(self) -> None:
        """Check that no two buffers that are live together overlap, and that all are within donated memory that they lie in.

        Raises:
            AssertionError: naming two that do.
        """
        for arena in (*self.arenas, *self.donated):
            found = overlaps(arena.buffers, arena.offsets)
            assert found is None, f"buffers {found[0]} and {found[1]} of {arena.device}, {arena.lane}, overlap" if found else ""
            if arena.inside is not None and arena.buffers:
                first = min(arena.buffers, key=lambda buffer: buffer.begin)
                assert arena.peak <= arena.inside.hint, f"more lies in {arena.inside.name} than it holds"
                assert first.begin >= arena.inside.end, f"buffer {first.name} lies in {arena.inside.name} before that is dead"


def plan_buffers(
    buffers: Sequence[Buffer],
    packing: Callable[[Sequence[Buffer]], tuple[int, ...]] = pack,
    *,
    within_module: bool = False,
) -> BufferPlan:
    """Pack buffers into one arena for each device and lane.

    Args:
        packing: gives the offsets of the buffers of one arena at their hints.
        within_module: only buffers of one module share memory: each module has arenas of its own.

    Raises:
        ValueError: if two buffers have one name.
    """
    names = [buffer.name for buffer in buffers]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"two buffers are named {twice}")
    by_arena: dict[tuple[str, Lane, str], list[Buffer]] = {}
    for buffer in buffers:
        by_arena.setdefault((buffer.device, buffer.lane, buffer.module if within_module else ""), []).append(buffer)
    arenas = [stacked(*kind, own, packing(own)) for kind, own in sorted(by_arena.items())]
    plan = BufferPlan(tuple(arenas))
    plan.verify()
    return plan


def _at(buffer: Buffer, lengths: Mapping[sympy.Symbol, int]) -> Buffer:
    size = buffer.size
    return replace(buffer, hint=size if isinstance(size, int) else int(sympy.sympify(size).subs(lengths)))


def _fitted(arena: Arena) -> Arena:
    if arena.peak <= _LOOSE * arena.most_live:
        return arena
    anew = stacked(arena.device, arena.lane, arena.module, arena.buffers, pack(arena.buffers))
    return anew if anew.peak < arena.peak else arena


def stacked(device: str, lane: Lane, module: str, buffers: Sequence[Buffer], offsets: Sequence[int]) -> Arena:
    """The arena of these buffers: what lies on what.

    A buffer of no bytes at its hint may have some at another length: it is ordered like all others.
    """
    order = sorted(range(len(buffers)), key=lambda i: (offsets[i], offsets[i] + buffers[i].hint, i))
    ordered = [buffers[i] for i in order]
    lower = [{m for m in met if m < n} for n, met in enumerate(meeting(ordered))]
    return Arena(device, lane, tuple(ordered), tuple(_uppermost(own, lower) for own in lower), module)


def _uppermost(own: Collection[int], lower: Sequence[Collection[int]]) -> tuple[int, ...]:
    """Of the buffers below one those that no other of them lies on: the end of that is no lower, whatever the lengths become."""
    found: list[int] = []
    covered: set[int] = set()
    for j in sorted(own, reverse=True):
        if j not in covered:
            found.append(j)
            covered.update(lower[j])
    return tuple(reversed(found))
