"""Run a planned graph: arenas for each call, the buffers in them, and what was predicted beside what happened."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.graph import _BoxedCodeGen

from dilcompile.decision import MemoryUse
from dilcompile.lowering import out_forms, workspaces
from dilcompile.memory import BufferPlan
from dilcompile.memory.packing import most_live
from dilcompile.memory.pool import ArenaPool, Lease, size_class
from dilcompile.passes.plan_buffers import PlannedGraph, plan_graph
from dilcompile.passes.shared_buffers import Layout, at

# Fill memory that no live buffer has with NaN before and while the graph runs: what reads it is found out.
POISON = "DILCOMPILE_POISON"
_POISON = 0xFF
# Lengths whose plans are kept.
_MOST_LENGTHS = 64
_NUMBERS = count()


# Arenas of the policies that share them over all graphs.
_SHARED = ArenaPool()


def planned(memory: MemoryUse) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """The inner compiler ``aot_eager`` with the buffers of its graphs, forward and backward, in planned arenas."""

    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    out_forms.register()
    pool = _SHARED if memory.pool == "shared" else ArenaPool(keeps=memory.pool == "private")

    def place(gm: GraphModule, example_inputs: Sequence[Any]) -> PlannedCall:
        return PlannedCall(plan_graph(gm, within_module=memory.reuse == "within_layer", workspace=workspaces.bytes_of), pool)

    # What is saved for the backward is what torch's ``aot_eager`` saves.
    compiler: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]] = aot_autograd(
        fw_compiler=place, bw_compiler=place, partition_fn=min_cut_rematerialization_partition
    )
    return lambda gm, example_inputs: compiler(gm, list(example_inputs))


class PlannedCall:
    """A graph whose buffers lie in arenas; called with a list of its inputs, which it empties, as AOTAutograd's graphs are."""

    def __init__(self, planned: PlannedGraph, pool: ArenaPool) -> None:
        self.planned, self.pool = planned, pool
        self._number = next(_NUMBERS)
        # Of the instance: whoever wraps it copies only what that has.
        self._boxed_call = True
        self._plans: dict[tuple[int, ...], BufferPlan] = {}
        self._by_step = os.environ.get(POISON) == "1"
        if not self._by_step:
            planned.gm.graph.set_codegen(_BoxedCodeGen())
            planned.gm.recompile()

    def __call__(self, args: list[Any]) -> Any:
        """Run the graph once."""
        lengths = {symbol: int(args[number]) for number, symbol in self.planned.symbols}
        plan = self._plan_at(lengths)
        with self.pool.lease([(torch.device(arena.device), arena.peak) for arena in plan.arenas]) as lease:
            values = [*args, *self._buffers(plan, lease, lengths)]
            args.clear()
            if self._by_step:
                return _Poisoned(self.planned, plan, lease.arenas).boxed_run(values)
            return self.planned.gm.forward(values)

    def predicted_peak(self, lengths: Mapping[sympy.Symbol, int] | None = None) -> int:
        """Bytes that a call needs at most above what there was before: its arenas, what lies elsewhere, and what it gives back.

        Operators' own temporary memory is not in it.
        """
        lengths = lengths or {}
        arenas = sum(size_class(arena.peak) for arena in self._plan_at(lengths).arenas)
        others = [*self.planned.elsewhere, *self.planned.lifetimes.kept]
        return arenas + most_live([replace(other, hint=at(other.size, lengths)) for other in others])

    def _plan_at(self, lengths: Mapping[sympy.Symbol, int]) -> BufferPlan:
        key = tuple(lengths.values())
        if key not in self._plans:
            while len(self._plans) >= _MOST_LENGTHS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self.planned.plan.at(lengths) if lengths else self.planned.plan
        return self._plans[key]

    def _buffers(self, plan: BufferPlan, lease: Lease, lengths: Mapping[sympy.Symbol, int]) -> list[Tensor]:
        """The graph's further inputs; made once for an arena."""
        key = (self._number, *lengths.values())
        if key not in lease.views:
            lease.views[key] = [self._buffer(layout, plan, lease, lengths) for layout in self.planned.layouts]
        return lease.views[key]

    def _buffer(self, layout: Layout, plan: BufferPlan, lease: Lease, lengths: Mapping[sympy.Symbol, int]) -> Tensor:
        arena, offset = plan.places[layout.buffer]
        memory, unit = lease.arenas[arena][offset:], layout.dtype.itemsize
        return layout.of(memory[: memory.numel() // unit * unit], lengths)


class _Poisoned(Interpreter):
    """Node by node; memory is filled with NaN before any buffer has it, and again when the last reader is through."""

    def __init__(self, planned: PlannedGraph, plan: BufferPlan, arenas: Sequence[Tensor]) -> None:
        super().__init__(planned.gm)
        self._ends = _ranges_by_last_reader(planned, plan, arenas)
        for arena in arenas:
            arena.fill_(_POISON)

    def run_node(self, n: Node) -> Any:
        """As ``Interpreter``."""
        result = super().run_node(n)
        for memory in self._ends.get(n.name, ()):
            memory.fill_(_POISON)
        return result


def _ranges_by_last_reader(planned: PlannedGraph, plan: BufferPlan, arenas: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    found: dict[str, list[Tensor]] = {}
    for number, arena in enumerate(plan.arenas):
        for buffer, offset in zip(arena.buffers, arena.offsets, strict=True):
            reader = planned.lifetimes.nodes[buffer.end]
            found.setdefault(reader, []).append(arenas[number][offset : offset + buffer.hint])
    return found
