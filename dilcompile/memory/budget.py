"""Budgets, and the ladder that is climbed until one is kept: what each rung is predicted to need, and which was taken.

Bounds are on what a graph makes: outputs, saved tensors, gradients and all between. Parameters and other inputs are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from dilcompile.errors import BudgetError
from dilcompile.memory.buffer import Buffer
from dilcompile.memory.step import Reuse, Step, at_peak, bytes_of, on_device, within
from dilcompile.memory.timeline import size_text

UNCOUNTED = "parameters and other inputs of the graph are not counted"
CURE = "give it a larger budget, a shorter sequence or a smaller batch"
_LARGEST = 3


@dataclass(frozen=True)
class Bound:
    """Most bytes.

    Args:
        source: who says so, as the user wrote it: ``rule long (policy.yaml:8)``.
        modules: paths, in the graph, of the modules whose buffers are bounded; None: all of the graph.
    """

    source: str
    most: int
    modules: frozenset[str] | None = None

    def owns(self, buffer: Buffer) -> bool:
        """Is it one of the buffers that are bounded? Those of inner modules are."""
        if self.modules is None or "" in self.modules:
            return True
        return any(buffer.module == path or buffer.module.startswith(f"{path}.") for path in self.modules)


@dataclass(frozen=True)
class Rung:
    """One way to run a graph, and what it is predicted to need.

    Args:
        reuse: see ``MemoryUse``.
        recompute: share of the saved bytes that the partition may save, from 1 to 0; None: what autograd saves.
        chunk: how many queries attention takes at once where it has a bias over pairs; None: all.
        workspaces: share of the workspaces with which operators are fastest, from 1 to 0.
        offload: how many saved tensors wait in host memory.
        forward, backward: most bytes live in each; backward None: there is none.
        peak: most bytes of the whole step, arenas included.
        saved: bytes that the device holds between forward and backward, outputs not counted.
        arenas: bytes of the arenas that are planned, of both.
        bounded: the bytes that each bound speaks of.
    """

    reuse: Reuse
    recompute: float | None = None
    chunk: int | None = None
    workspaces: float = 1.0
    offload: int = 0
    forward: int = 0
    backward: int | None = None
    peak: int = 0
    saved: int = 0
    arenas: int = 0
    bounded: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """``reuse off``, ``recompute 0.5, reuse across_layers`` ..."""
        words = [f"offload {self.offload}"] if self.offload else []
        words += [f"workspaces {self.workspaces:g}"] if self.workspaces < 1 else []
        words += [] if self.chunk is None else [f"chunks of {self.chunk} queries"]
        words += [] if self.recompute is None else [f"recompute {self.recompute:g}"]
        return ", ".join([*words, f"reuse {self.reuse}"])

    def __str__(self) -> str:
        backward = "" if self.backward is None else f", backward {size_text(self.backward)}, saved {size_text(self.saved)}"
        return f"{self.name}: {size_text(self.peak)} (forward {size_text(self.forward)}{backward})"


@dataclass(frozen=True)
class BudgetReport:
    """How a graph keeps its budgets.

    Args:
        bounds: what must be kept.
        tried: every rung that was predicted, in the order of the ladder.
        taken: the first that keeps all bounds.
        is_bound: the figures are upper bounds: the inner compiler fuses what they count one by one.
    """

    bounds: tuple[Bound, ...]
    tried: tuple[Rung, ...]
    taken: Rung
    is_bound: bool = False

    @property
    def notes(self) -> tuple[str, ...]:
        """One line a bound."""
        most = "at most " if self.is_bound else ""
        return tuple(
            f"{bound.source}: memory.budget of {size_text(bound.most)} is kept by {self.taken.name}, the last of "
            f"{len(self.tried)} tried: {most}{size_text(found)} predicted ({UNCOUNTED})"
            for bound, found in zip(self.bounds, self.taken.bounded, strict=True)
        )


@dataclass
class Ladder:
    """The rungs that were tried.

    Args:
        bounds: what must be kept.
        keeps: arenas are kept between calls.
    """

    bounds: tuple[Bound, ...]
    keeps: bool
    tried: list[Rung] = field(default_factory=list)

    def predicted(self, step: Step, way: Rung) -> Rung:
        """A rung with what it needs; it counts as tried."""
        allocated = step.allocated(self.keeps)
        by_phase = [bytes_of(within(allocated, phase)) for phase in step.phases]
        saved = [buffer for buffer in on_device(step.buffers) if buffer.role == "saved"]
        rung = replace(
            way,
            forward=by_phase[0],
            backward=by_phase[1] if len(by_phase) > 1 else None,
            peak=bytes_of(allocated),
            saved=sum(buffer.hint for buffer in saved),
            arenas=sum(arena.peak for _, arena in step.arenas),
            bounded=self.bounded(step),
        )
        self.tried.append(rung)
        return rung

    def keeps_all(self, rung: Rung) -> bool:
        """Are all bounds kept?"""
        return all(found <= bound.most for bound, found in zip(self.bounds, rung.bounded, strict=True))

    def excess(self, rung: Rung) -> float:
        """How far the bound that is furthest from being kept is exceeded; rungs are compared by it."""
        return max(found / bound.most for bound, found in zip(self.bounds, rung.bounded, strict=True))

    def bounded(self, step: Step) -> tuple[int, ...]:
        """The bytes that each bound speaks of: all, arenas included, or what is live of some modules, wherever it lies."""
        return tuple(
            bytes_of(step.allocated(self.keeps) if bound.modules is None else [b for b in step.buffers if bound.owns(b)])
            for bound in self.bounds
        )

    def error(self, step: Step, where: str, after: str) -> BudgetError | None:
        """That of the first bound that is not kept; None if all are.

        Args:
            where: the graph, and at which lengths; after: what was tried.
        """
        for bound, found in zip(self.bounds, self.bounded(step), strict=True):
            if found <= bound.most:
                continue
            own = on_device([buffer for buffer in step.buffers if bound.owns(buffer)])
            largest = "; ".join(map(_words, at_peak(own)[:_LARGEST]))
            return BudgetError(
                f"{bound.source}: memory.budget of {size_text(bound.most)} is {size_text(found - bound.most)} short "
                f"({found:,} bytes are needed, {bound.most:,} given) for {where}, {after}; the largest buffers at the peak: "
                f"{largest}; {UNCOUNTED}; {CURE}",
                self.tried,
            )
        return None

    def report(self, taken: Rung, is_bound: bool) -> BudgetReport:
        """What is told of the graph."""
        return BudgetReport(self.bounds, tuple(self.tried), taken, is_bound)


def _words(buffer: Buffer) -> str:
    module = f" of {buffer.module}" if buffer.module else ""
    return f"{buffer.name}{module}, {buffer.role}, {size_text(buffer.hint)} ({buffer.hint:,} bytes)"
