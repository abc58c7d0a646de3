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
from torch.utils.dlpack import from_dlpack, to_dlpack  # type: ignore[attr-defined]

from dilcompile.decision import Decision, MemoryUse
from dilcompile.lowering import out_forms, workspaces
from dilcompile.memory import Buffer, BufferPlan
from dilcompile.memory.account import Direction, GraphMemory, Planner, Runs
from dilcompile.memory.packing import most_live
from dilcompile.memory.pool import ArenaPool, Lease, size_class
from dilcompile.memory.watch import Watch
from dilcompile.passes.climb import Climb
from dilcompile.passes.lifetimes import Lifetimes
from dilcompile.passes.plan_buffers import PlannedGraph, plan_graph
from dilcompile.passes.shared_buffers import Layout, at
from dilcompile.policy import Policy
from dilcompile.policy import memory_use as asked_memory
from dilcompile.report import GraphReport

# Fill memory that no live buffer has with NaN before and while the graph runs: what reads it is found out.
POISON = "DILCOMPILE_POISON"
_POISON = 0xFF
# Lengths whose plans are kept.
_MOST_LENGTHS = 64
_NUMBERS = count()


# Arenas of the policies that share them over all graphs.
_SHARED = ArenaPool()


Tell = Callable[["PlannedCall", Direction], None]


def memory_use(report: GraphReport, policy: Policy) -> MemoryUse | None:
    """What the rules say of the graph's buffers: the first that decided a site and says anything, else the defaults."""
    found = [verdict.memory for verdict in report.verdicts if isinstance(verdict, Decision) and verdict.memory is not None]
    return found[0] if found else asked_memory(policy)


def planned(
    memory: MemoryUse, tell: Tell | None = None, climb: Climb | None = None
) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
    """The inner compiler ``aot_eager`` with the buffers of its graphs, forward and backward, in planned arenas.

    Args:
        tell: is given each graph when it has been planned.
        climb: chooses, for the one graph that is compiled, how its budgets are kept.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    _with_forms()
    pool = _SHARED if memory.pool == "shared" else ArenaPool(keeps=memory.pool == "private", apart=memory.pool == "private")

    def placing(direction: Direction) -> Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]:
        def place(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
            if climb is not None and direction == "inference":
                climb.infer(gm)
            reuse = memory.reuse if climb is None or climb.taken is None else climb.taken.reuse
            if reuse == "off":
                return _boxed(gm)
            call = PlannedCall(plan_graph(gm, within_module=reuse == "within_layer", workspace=workspaces.bytes_of), pool)
            if tell is not None:
                tell(call, direction)
            return call

        return place

    compiler: Callable[[GraphModule, Sequence[Any]], Callable[..., Any]] = aot_autograd(
        fw_compiler=placing("forward"),
        bw_compiler=placing("backward"),
        inference_compiler=placing("inference"),
        # Without a budget as aot_eager has it: what is cheap to compute again is not saved.
        partition_fn=min_cut_rematerialization_partition if climb is None else climb.split,
    )
    return lambda gm, example_inputs: compiler(gm, list(example_inputs))


def _with_forms() -> None:
    """See that operators have their forms."""
    out_forms.register()
    if hasattr(torch.ops.dilcompile, "attend_step"):
        # Loaded for sharded graphs alone, and by now it has been.
        from dilcompile.lowering.distributed import out_forms as sharded

        sharded.register()


def _boxed(gm: GraphModule) -> Callable[..., Any]:
    """The graph, called with a list of its inputs, which it empties: a saved tensor is given up after its last reader."""
    gm.graph.set_codegen(_BoxedCodeGen())
    gm.recompile()

    def run(args: list[Any]) -> Any:
        return gm.forward(args)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def account_of(
    graph: str,
    direction: Direction,
    plan: BufferPlan,
    lifetimes: Lifetimes,
    elsewhere: Sequence[Buffer] = (),
    *,
    planner: Planner = "dilcompile",
    runs: Runs | None = None,
) -> GraphMemory:
    """The account of a graph."""
    given = sum(buffer.hint for buffer in lifetimes.given)
    beside, kept = tuple(elsewhere), tuple(lifetimes.kept)
    return GraphMemory(graph, direction, plan, beside, kept, given, lifetimes.steps, planner, runs)


class PlannedCall:
    """A graph whose buffers lie in arenas; called with a list of its inputs, which it empties, as AOTAutograd's graphs are."""

    def __init__(self, planned: PlannedGraph, pool: ArenaPool) -> None:
        self.planned, self.pool = planned, pool
        self._number = next(_NUMBERS)
        # Of the instance: whoever wraps it copies only what that has.
        self._boxed_call = True
        self._plans: dict[tuple[int, ...], BufferPlan] = {}
        self.runs = Runs()
        # Called after each call.
        self.after: Callable[[], None] | None = None
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
            result = self._run(plan, lease, values)
            self.runs.calls += 1
            self.runs.lease_hits += lease.kept
        if self.after is not None:
            self.after()
        return result

    def account(self, graph: str, direction: Direction) -> GraphMemory:
        """What the plan comes to at the lengths of the example, and what calls came to so far."""
        found, runs = self.planned.lifetimes, replace(self.runs) if self.runs.calls else None
        return account_of(graph, direction, self.planned.plan, found, self.planned.elsewhere, runs=runs)

    def _run(self, plan: BufferPlan, lease: Lease, values: list[Any]) -> Any:
        if self._by_step:
            return _Poisoned(self.planned, plan, lease.arenas).boxed_run(values)
        if self.after is not None and not self.runs.calls:
            # Someone listens: the first call is watched.
            with Watch([*values, *lease.arenas]) as watch:
                result = self.planned.gm.forward(values)
            self.runs.measured = plan.peak + watch.most
            return result
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
            self._plans[key] = self.planned.plan.fitted(lengths) if lengths else self.planned.plan
            self.runs.plans += 1
        return self._plans[key]

    def _buffers(self, plan: BufferPlan, lease: Lease, lengths: Mapping[sympy.Symbol, int]) -> list[Tensor]:
        """The graph's further inputs; made once for an arena."""
        key = (self._number, *lengths.values())
        if key not in lease.views:
            while len(lease.views) >= _MOST_LENGTHS:
                lease.views.pop(next(iter(lease.views)))
            lease.views[key] = [self._buffer(layout, plan, lease, lengths) for layout in self.planned.layouts]
        return lease.views[key]

    def _buffer(self, layout: Layout, plan: BufferPlan, lease: Lease, lengths: Mapping[sympy.Symbol, int]) -> Tensor:
        arena, offset = plan.places[layout.buffer]
        memory, unit = lease.arenas[arena][offset:], layout.dtype.itemsize
        if plan.arenas[arena].lane == "communication":
            memory = _apart(memory)
        return layout.of(memory[: memory.numel() // unit * unit], lengths)


def _apart(memory: Tensor) -> Tensor:
    """The same bytes as a storage of its own, which holds the other: a wait knows by the storage for what it waits."""
    return from_dlpack(to_dlpack(memory))


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
