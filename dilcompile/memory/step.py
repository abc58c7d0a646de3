"""All buffers of one step, forward and backward on one line of time, and the bytes that they need at most."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import sympy

from dilcompile.memory.buffer import Buffer
from dilcompile.memory.packing import most_live
from dilcompile.memory.plan import Arena, BufferPlan
from dilcompile.memory.pool import arena_size
from dilcompile.memory.replay import reserved_by_caching

Reuse = Literal["off", "within_layer", "across_layers"]


@dataclass(frozen=True)
class Phase:
    """The forward or the backward.

    Args:
        begin, end: its first and last step on the line of the whole step.
        plan: the arenas of its buffers; None: none is planned.
        placed: names of the step's buffers that lie in these arenas, or in saved tensors that are dead.
        held: names of those saved tensors, and the last step of what lies in them.
    """

    begin: int
    end: int
    plan: BufferPlan | None = None
    placed: frozenset[str] = frozenset()
    held: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Step:
    """What a graph makes in one forward and backward. Parameters and other inputs are not in it.

    Args:
        buffers: begin and end count the forward's steps, then the backward's. Outputs live to the end, saved tensors to their
            last reader.
        phases: the forward, and the backward where there is one.
    """

    buffers: tuple[Buffer, ...]
    phases: tuple[Phase, ...]

    def at(self, lengths: Mapping[sympy.Symbol, int]) -> Step:
        """The same step where the symbols of the sizes have these values."""
        phases = (phase if phase.plan is None else replace(phase, plan=phase.plan.fitted(lengths)) for phase in self.phases)
        # Many buffers have one size.
        sizes = {size: int(sympy.sympify(size).subs(lengths)) for size in {buffer.size for buffer in self.buffers}}
        return Step(tuple(replace(buffer, hint=sizes[buffer.size]) for buffer in self.buffers), tuple(phases))

    @property
    def arenas(self) -> tuple[tuple[Phase, Arena], ...]:
        """Each arena with its phase."""
        return tuple((phase, arena) for phase in self.phases if phase.plan is not None for arena in phase.plan.arenas)

    def allocated(self, keeps: bool) -> tuple[Buffer, ...]:
        """What an allocator is asked for: the buffers, with arenas in place of those that lie in one.

        Args:
            keeps: arenas are kept between calls, so that those of both phases are there all the time.
        """
        placed = frozenset().union(*(phase.placed for phase in self.phases))
        last = max(phase.end for phase in self.phases)
        held = {name: end for phase in self.phases for name, end in phase.held.items()}
        found = [
            replace(buffer, end=max(buffer.end, held.get(buffer.name, 0))) for buffer in self.buffers if buffer.name not in placed
        ]
        for number, (phase, arena) in enumerate(self.arenas):
            assert phase.plan is not None, "the arena is its plan's"
            size, (begin, end) = (
                arena_size(arena.peak, keeps or phase.plan.varies),
                (0, last) if keeps else (phase.begin, phase.end),
            )
            found.append(Buffer(f"arena {number}", size, begin, end, size, arena.device, arena.lane, module=arena.module))
        return tuple(found)


def bytes_of(buffers: Sequence[Buffer]) -> int:
    """The most bytes that these buffers need at once on the device that has most of them; the host's count where no other is.

    On a CUDA device what torch's caching allocator would reserve for them, elsewhere what is live.
    """
    found = [_on_device(device, [buffer for buffer in buffers if buffer.device == device]) for device in _counted(buffers)]
    return max(found, default=0)


def on_device(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Those whose bytes are counted: not what waits in the host's memory for another device."""
    return [buffer for buffer in buffers if buffer.device in _counted(buffers)]


def _counted(buffers: Sequence[Buffer]) -> set[str]:
    devices = {buffer.device for buffer in buffers}
    return {device for device in devices if device != "cpu"} or devices


def _on_device(device: str, buffers: Sequence[Buffer]) -> int:
    return reserved_by_caching(buffers) if device.startswith("cuda") else most_live(buffers)


def within(buffers: Sequence[Buffer], phase: Phase) -> list[Buffer]:
    """Those that are live in a phase, cut to it."""
    return [
        replace(buffer, begin=max(buffer.begin, phase.begin), end=min(buffer.end, phase.end))
        for buffer in buffers
        if buffer.begin <= phase.end and phase.begin <= buffer.end
    ]


def at_peak(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Those of any byte that are live in the step that has most bytes, largest first."""
    changes: dict[int, int] = {}
    for buffer in buffers:
        changes[buffer.begin] = changes.get(buffer.begin, 0) + buffer.hint
        changes[buffer.end + 1] = changes.get(buffer.end + 1, 0) - buffer.hint
    live, most, peak = 0, -1, 0
    for step in sorted(changes):
        live += changes[step]
        if live > most:
            most, peak = live, step
    found = [buffer for buffer in buffers if buffer.hint and buffer.begin <= peak <= buffer.end]
    return sorted(found, key=lambda buffer: (-buffer.hint, buffer.begin, buffer.name))
