"""What the plan of one graph comes to, beside other ways to give the same buffers memory, and what happened when it ran."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, get_args

from dilcompile.memory.buffer import Buffer
from dilcompile.memory.packing import most_live
from dilcompile.memory.plan import Arena, BufferPlan
from dilcompile.memory.pool import arena_size
from dilcompile.memory.replay import reserved_by_caching

Direction = Literal["inference", "forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
# Who gives the buffers their places: the plan; or Inductor, and they are counted only.
Planner = Literal["dilcompile", "inductor"]


@dataclass
class Runs:
    """What calls of a planned graph came to so far. Several threads may count at once: then one may be lost.

    Args:
        calls: how many.
        plans: how often offsets were worked out; all other calls found those of an earlier one at the same lengths.
        lease_hits: how often arenas of the size classes were there already.
        measured: the peak of all that the graph made in its first call, in bytes, or None if it was not measured.
        refused: how often a saved tensor in which buffers were to lie could still be seen by others: they got other memory.
    """

    calls: int = 0
    plans: int = 0
    lease_hits: int = 0
    measured: int | None = None
    refused: int = 0

    def __str__(self) -> str:
        calls = f"{self.calls:,} call{'' if self.calls == 1 else 's'}"
        plans = f"{self.plans:,} planned, {max(0, self.calls - self.plans):,} by the plan of an earlier one"
        refused = f"; {self.refused:,} saved tensors not free to lie in" if self.refused else ""
        return f"{calls}: {plans}; arenas found in {self.lease_hits:,}, made in {self.calls - self.lease_hits:,}{refused}"


@dataclass(frozen=True)
class GraphMemory:
    """The memory of one graph.

    Args:
        graph: Dynamo's name of the graph; with ``direction`` unique in a model.
        plan: of the buffers that lie in arenas.
        elsewhere: made and given up in the graph too, but by operators that take no place to write to.
        kept: outputs and what is saved for the backward, which stay behind.
        given: bytes of inputs, parameters and what an earlier graph saved among them, which were there before.
        steps: how many nodes compute.
        keeps: arenas are kept for later calls.
        runs: None: it has not run.
    """

    graph: str
    direction: Direction
    plan: BufferPlan
    elsewhere: tuple[Buffer, ...] = ()
    kept: tuple[Buffer, ...] = ()
    given: int = 0
    steps: int = 0
    planner: Planner = "dilcompile"
    keeps: bool = True
    runs: Runs | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """``0/0 forward``."""
        return f"{self.graph} {self.direction}"

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """All that lie in arenas."""
        return tuple(buffer for arena in self.plan.arenas for buffer in arena.buffers)

    @cached_property
    def ratio(self) -> float:
        """The planned peak over the most bytes that are live at once; 1 is the best that there can be."""
        return self.plan.peak / self.plan.most_live if self.plan.most_live else 1.0

    @cached_property
    def by_caching(self) -> int:
        """Bytes that torch's caching allocator would reserve, device by device."""
        devices = sorted({buffer.device for buffer in self.buffers})
        return sum(reserved_by_caching([b for b in self.buffers if b.device == device]) for device in devices)

    @property
    def classes(self) -> tuple[int, ...]:
        """The bytes that are asked for, one an arena: its size class, or its own size where no other call may have it."""
        return tuple(arena_size(arena.peak, self.keeps or self.plan.varies) for arena in self.plan.arenas)

    @property
    def donated(self) -> tuple[Buffer, ...]:
        """What lies in saved tensors that are dead; no arena has it."""
        return tuple(buffer for arena in self.plan.donated for buffer in arena.buffers)

    @property
    def predicted(self) -> int:
        """The peak of all that the graph makes: arenas, what lies elsewhere, and what it keeps, as that comes to be."""
        return self.plan.peak + most_live((*self.elsewhere, *self.kept))

    @property
    def kept_bytes(self) -> int:
        """Bytes that stay behind."""
        return sum(buffer.hint for buffer in self.kept)

    @property
    def elsewhere_bytes(self) -> int:
        """The most bytes that are live at once of what is not planned."""
        return most_live(self.elsewhere)

    @property
    def num_buffers(self) -> int:
        """How many buffers have a byte."""
        return sum(buffer.hint > 0 for buffer in self.buffers)

    def largest(self, number: int = 5) -> list[tuple[Arena, Buffer, int]]:
        """The largest buffers with their arena and offset; of those without a byte there is nothing to see."""
        placed = [
            (arena, buffer, offset)
            for arena in self.plan.arenas
            for buffer, offset in zip(arena.buffers, arena.offsets, strict=True)
            if buffer.hint
        ]
        return sorted(placed, key=lambda one: (-one[1].hint, one[1].begin, one[1].name))[:number]

    def live(self, parts: int) -> list[int]:
        """The most planned bytes that are live in each of ``parts`` equal stretches of the steps (fewer where steps are)."""
        changes = [0] * (self.steps + 1)
        for buffer in self.buffers:
            changes[buffer.begin] += buffer.hint
            changes[buffer.end + 1] -= buffer.hint
        parts, total, now = min(parts, self.steps), [0] * min(parts, self.steps), 0
        for step in range(self.steps):
            now += changes[step]
            at = step * parts // self.steps
            total[at] = max(total[at], now)
        return total

    def to_dict(self, number: int = 5) -> dict[str, object]:
        """As plain JSON values; sizes in bytes. ``number``: how many of the largest buffers."""
        return {
            "graph": self.graph,
            "direction": self.direction,
            "planner": self.planner,
            "steps": self.steps,
            "buffers": self.num_buffers,
            "planned": self.plan.peak,
            "live_at_once": self.plan.most_live,
            "ratio": self.ratio,
            "without_reuse": self.plan.without_reuse,
            "caching_allocator": self.by_caching,
            "over_saved": {"buffers": len(self.donated), "live_at_once": most_live(self.donated)},
            "elsewhere": {"buffers": len(self.elsewhere), "live_at_once": self.elsewhere_bytes},
            "given": self.given,
            "kept": self.kept_bytes,
            "predicted": self.predicted,
            "arenas": [_arena(arena, size) for arena, size in zip(self.plan.arenas, self.classes, strict=True)],
            "largest": [_placed(arena, buffer, offset) for arena, buffer, offset in self.largest(number)],
            "runs": None if self.runs is None else {key: getattr(self.runs, key) for key in self.runs.__dataclass_fields__},
        }


def _arena(arena: Arena, size: int) -> Mapping[str, object]:
    about = {"device": arena.device, "lane": arena.lane, "module": arena.module, "buffers": len(arena.buffers)}
    return {**about, "planned": arena.peak, "live_at_once": arena.most_live, "size_class": size}


def _placed(arena: Arena, buffer: Buffer, offset: int) -> Mapping[str, object]:
    about = {"name": buffer.name, "module": buffer.module, "role": buffer.role, "bytes": buffer.hint}
    return {**about, "device": arena.device, "lane": arena.lane, "offset": offset, "begin": buffer.begin, "end": buffer.end}
