"""What an allocator that decides at run time would reach with the same buffers: a replay of torch's caching allocator for CUDA.

Its rules as c10/cuda/CUDACachingAllocator.cpp has them: sizes are rounded up to 512 bytes; up to 1 MiB come from segments of
2 MiB, more from segments of 20 MiB, from 10 MiB on from a segment of their own, a multiple of 2 MiB; the smallest free block that
fits is taken and what is left of it stays free (of large ones only if it is more than 1 MiB); free neighbours are joined.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dilcompile.memory.buffer import Buffer, aligned

_UNIT = 512
_SMALL, _SMALL_SEGMENT = 1 << 20, 2 << 20
_LARGE, _LARGE_SEGMENT, _ROUND = 10 << 20, 20 << 20, 2 << 20


@dataclass
class _Block:
    size: int
    segment: int
    start: int
    small: bool
    free: bool = True


@dataclass
class _Heap:
    blocks: list[_Block] = field(default_factory=list)
    reserved: int = 0
    segments: int = 0

    def take(self, size: int) -> _Block:
        """The smallest free block that holds ``size`` bytes, or a new segment."""
        size = max(_UNIT, aligned(size, _UNIT))
        small = size <= _SMALL
        fitting = [block for block in self.blocks if block.free and block.small == small and block.size >= size]
        block = min(fitting, key=lambda b: (b.size, b.segment, b.start)) if fitting else self._reserve(size, small)
        left = block.size - size
        if left >= _UNIT if small else left > _SMALL:
            rest = _Block(left, block.segment, block.start + size, small)
            self.blocks.insert(self.blocks.index(block) + 1, rest)
            block.size = size
        block.free = False
        return block

    def _reserve(self, size: int, small: bool) -> _Block:
        whole = _SMALL_SEGMENT if small else _LARGE_SEGMENT if size < _LARGE else aligned(size, _ROUND)
        block = _Block(whole, self.segments, 0, small)
        self.segments += 1
        self.reserved += whole
        self.blocks.append(block)
        return block

    def give(self, block: _Block) -> None:
        """Free a block and join it with free neighbours of its segment."""
        block.free = True
        at = self.blocks.index(block)
        for other in (at + 1, at - 1):
            if not 0 <= other < len(self.blocks):
                continue
            neighbour = self.blocks[other]
            if neighbour.free and neighbour.segment == block.segment:
                first, second = (block, neighbour) if other > at else (neighbour, block)
                first.size += second.size
                self.blocks.remove(second)
                block, at = first, self.blocks.index(first)


def reserved_by_caching(buffers: Sequence[Buffer]) -> int:
    """Bytes that torch's caching allocator would have reserved after the steps of these buffers, from an empty start."""
    heap, held = _Heap(), dict[str, _Block]()
    begins: dict[int, list[Buffer]] = {}
    ends: dict[int, list[Buffer]] = {}
    for buffer in buffers:
        begins.setdefault(buffer.begin, []).append(buffer)
        ends.setdefault(buffer.end, []).append(buffer)
    for step in sorted({*begins, *ends}):
        for buffer in begins.get(step, ()):
            held[buffer.name] = heap.take(buffer.hint)
        for buffer in ends.get(step, ()):
            heap.give(held.pop(buffer.name))
    return heap.reserved
