"""Put buffers into memory that was given to the graph and that nobody reads any more: saved tensors, as a backward runs.

Such memory is there anyway until its last reader. To lie in it is free as long as it may go on to be there: what it is held for
longer must not raise the most bytes that are held at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import sympy

from dilcompile.memory.buffer import Buffer, aligned
from dilcompile.memory.packing import Bytes, gap
from dilcompile.memory.plan import Arena, stacked


@dataclass(frozen=True)
class Donated:
    """Memory that a graph is given for good.

    Args:
        memory: from step 0 to its last reader.
        inputs: the numbers of the inputs that lie in it.
        over: names of buffers of its size that may lie in all of it from the step of that reader on, which makes them.
    """

    memory: Buffer
    inputs: tuple[int, ...] = ()
    over: frozenset[str] = frozenset()


def donate(
    buffers: Sequence[Buffer], donated: Sequence[Donated], others: Sequence[Buffer] = (), *, within_module: bool = False
) -> tuple[tuple[Arena, ...], list[Buffer]]:
    """Place buffers in donated memory, largest first, each where memory is held for the fewest bytes and steps more.

    Args:
        others: what else is live beside the arenas.
        within_module: memory is for buffers of the module that saved it alone.

    Returns:
        For each donated memory, in order, the buffers in it (which fit at every length), and those that are left for arenas.
    """
    last = max((buffer.end for buffer in (*buffers, *others, *(one.memory for one in donated))), default=0)
    held = Bytes(last + 1)
    for other in (*others, *(one.memory for one in donated)):
        held.add(other.begin, other.end, other.hint)
    most, regions, left = held.most, [_Region(one, one.memory.end) for one in donated], []
    for buffer in sorted(buffers, key=lambda b: (-b.hint, b.begin, b.name)):
        fitting = [region for region in regions if region.may(buffer) and (not within_module or region.is_of(buffer.module))]
        fitting.sort(key=lambda region: (region.longer(buffer), region.one.memory.hint))
        for region in fitting:
            size, until = region.one.memory.hint, region.until
            if buffer.end > until and held.within(until + 1, buffer.end) + size > most:
                continue
            if region.take(buffer):
                held.add(until + 1, buffer.end, size)
                break
        else:
            left.append(buffer)
    order = {buffer.name: number for number, buffer in enumerate(buffers)}
    return tuple(region.arena() for region in regions), sorted(left, key=lambda buffer: order[buffer.name])


@dataclass
class _Region:
    """Donated memory with what lies in it; ``until``: the last step in which it is held."""

    one: Donated
    until: int
    buffers: list[Buffer] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def may(self, buffer: Buffer) -> bool:
        """Is the memory large enough, dead and of the buffer's kind?"""
        memory = self.one.memory
        if not 0 < buffer.hint <= memory.hint or buffer.begin < memory.end:
            return False
        dead = buffer.begin > memory.end or buffer.name in self.one.over
        kind = buffer.device == memory.device and buffer.lane == memory.lane
        return dead and kind and at_most(buffer.size, memory.size)

    def is_of(self, module: str) -> bool:
        """Did this module save it?"""
        return self.one.memory.module == module

    def longer(self, buffer: Buffer) -> int:
        """Bytes times steps for which it is held more with this buffer."""
        return self.one.memory.hint * max(0, buffer.end - self.until)

    def take(self, buffer: Buffer) -> bool:
        """Place the buffer, if there is room."""
        taken = sorted((at, at + other.hint) for other, at in zip(self.buffers, self.offsets, strict=True) if other.meets(buffer))
        at = gap(buffer, taken, tightest=True)
        if at + buffer.hint > self.one.memory.hint:
            return False
        found = replace(self, buffers=[*self.buffers, buffer], offsets=[*self.offsets, at])
        if not found.holds():
            return False
        self.buffers, self.offsets, self.until = found.buffers, found.offsets, max(self.until, buffer.end)
        return True

    def holds(self) -> bool:
        """Does all of it lie in the memory at every length? Asked only where sizes are expressions."""
        if all(isinstance(buffer.size, int) for buffer in (self.one.memory, *self.buffers)):
            return True
        arena = self.arena()
        tops: list[int | sympy.Expr] = []
        for buffer, below in zip(arena.buffers, arena.below, strict=True):
            start = _largest([tops[n] for n in below])
            if start is None or not at_most(start + buffer.size, self.one.memory.size):
                return False
            tops.append(start + _up(buffer.size, buffer.alignment))
        return True

    def arena(self) -> Arena:
        """What lies on what."""
        memory = self.one.memory
        found = stacked(memory.device, memory.lane, "", self.buffers, self.offsets)
        return replace(found, inside=memory)


def _largest(sizes: Sequence[int | sympy.Expr]) -> int | sympy.Expr | None:
    """That which is not below any other at any length; None if there is none."""
    if not sizes:
        return 0
    return next((size for size in sizes if all(at_most(other, size) for other in sizes)), None)


def _up(size: int | sympy.Expr, alignment: int) -> int | sympy.Expr:
    """At least the size, rounded up."""
    if isinstance(size, int):
        return aligned(size, alignment)
    parts = sympy.expand(size).as_coefficients_dict()
    whole = all(part % alignment == 0 and term.is_integer for term, part in parts.items())
    return size if whole else size + alignment - 1


def at_most(size: int | sympy.Expr, room: int | sympy.Expr) -> bool:
    """Is it known that the size is within the room at every length?"""
    if isinstance(size, int) and isinstance(room, int):
        return size <= room
    return bool(size == room) or bool(sympy.expand(sympy.sympify(room) - size).is_nonnegative)
