"""Run a planned graph: arenas for each call, the buffers in them, and what was predicted beside what happened."""

from __future__ import annotations

import os
import weakref
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
from dilcompile.memory.owner import bytes_in, is_last_owner
from dilcompile.memory.pool import ArenaPool, Lease
from dilcompile.memory.watch import Watch
from dilcompile.passes.memory.climb import Climb
from dilcompile.passes.memory.donated import donated_numbers
from dilcompile.passes.memory.lifetimes import Lifetimes
from dilcompile.passes.memory.plan_buffers import PlannedGraph, plan_graph
from dilcompile.passes.memory.shared_buffers import Layout, at
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
            taken = None if climb is None else climb.taken
            reuse, share = (memory.reuse, 1.0) if taken is None else (taken.reuse, taken.workspaces)
            if reuse == "off":
                return _boxed(gm)
            donated = donated_numbers() if direction == "backward" else ()
            within = reuse == "within_layer"
            graph = plan_graph(gm, within_module=within, workspace=workspaces.of_share(share), donated=donated)
            call = PlannedCall(graph, pool)
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
    keeps: bool = True,
    runs: Runs | None = None,
) -> GraphMemory:
    """The account of a graph."""
    given = sum(buffer.hint for buffer in lifetimes.given)
    beside, kept = tuple(elsewhere), tuple(lifetimes.kept)
    return GraphMemory(graph, direction, plan, beside, kept, given, lifetimes.steps, planner, keeps, runs)


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
        # A parameter that it was called with, with whose module its arenas go.
        self._owner: weakref.ref[Tensor] | None = None
        self._by_step = os.environ.get(POISON) == "1"
        if not self._by_step:
            planned.gm.graph.set_codegen(_BoxedCodeGen())
            planned.gm.recompile()

    def __call__(self, args: list[Any]) -> Any:
        """Run the graph once."""
        lengths = {symbol: int(args[number]) for number, symbol in self.planned.symbols}
        plan = self._plan_at(lengths)
        self._keep_while_there(args)
        asked = [(torch.device(arena.device), arena.peak) for arena in plan.arenas]
        with self.pool.lease(asked, plan.varies) as lease:
            given, instead = self._given(plan, args, lengths)
            values = [*args, *self._buffers(plan, lease, given, lengths)]
            args.clear()
            result = self._run(plan, lease, given, values, instead)
            self.runs.calls += 1
            self.runs.lease_hits += lease.kept
        if self.after is not None:
            self.after()
        return result

    def _keep_while_there(self, args: Sequence[Any]) -> None:
        if not self.pool.keeps or (self._owner is not None and self._owner() is not None):
            return
        owner = next((arg for arg in args if isinstance(arg, torch.nn.Parameter)), None)
        if owner is not None:
            self._owner = weakref.ref(owner)
            self.pool.keep_while(owner)

    def account(self, graph: str, direction: Direction) -> GraphMemory:
        """What the plan comes to at the lengths of the example, and what calls came to so far."""
        found, runs = self.planned.lifetimes, replace(self.runs) if self.runs.calls else None
        return account_of(graph, direction, self.planned.plan, found, self.planned.elsewhere, keeps=self.pool.keeps, runs=runs)

    def _given(self, plan: BufferPlan, args: Sequence[Any], lengths: Mapping[sympy.Symbol, int]) -> tuple[list[Tensor], int]:
        """The memory of saved tensors in which buffers lie, and where others may still see it other memory; the bytes of that."""
        found, instead = [], 0
        for inside, arena in zip(self.planned.donated, plan.donated, strict=True):
            assert arena.inside is not None, "it is that of an input"
            tensors = [args[number] for number, _ in inside.inputs]
            strides = [tuple(at(size, lengths) for size in seen.stride) for _, seen in inside.inputs]
            if is_last_owner(tensors, arena.inside.hint, strides):
                found.append(bytes_in(tensors[0]))
            else:
                self.runs.refused += 1
                instead += arena.inside.hint
                found.append(torch.empty(arena.inside.hint, dtype=torch.uint8, device=arena.device))
        return found, instead

    def _run(self, plan: BufferPlan, lease: Lease, given: list[Tensor], values: list[Any], instead: int) -> Any:
        if self._by_step:
            return _Poisoned(self.planned, plan, [*lease.arenas, *given]).boxed_run(values)
        # What lies in it holds it as long as it is needed.
        given.clear()
        if self.after is not None and not self.runs.calls:
            # Someone listens: the first call is watched.
            with Watch([*values, *lease.arenas]) as watch:
                result = self.planned.gm.forward(values)
            self.runs.measured = plan.peak + instead + watch.most
            return result
        return self.planned.gm.forward(values)

    def _plan_at(self, lengths: Mapping[sympy.Symbol, int]) -> BufferPlan:
        key = tuple(lengths.values())
        if key not in self._plans:
            while len(self._plans) >= _MOST_LENGTHS:
                self._plans.pop(next(iter(self._plans)))
            self._plans[key] = self.planned.plan.fitted(lengths) if lengths else self.planned.plan
            self.runs.plans += 1
        return self._plans[key]

    def _buffers(
        self, plan: BufferPlan, lease: Lease, given: Sequence[Tensor], lengths: Mapping[sympy.Symbol, int]
    ) -> list[Tensor]:
        """The graph's further inputs; those in an arena are made once for it."""
        key, arenas = (self._number, *lengths.values()), len(lease.arenas)
        placed = [(layout, *plan.places[layout.buffer]) for layout in self.planned.layouts]
        if key not in lease.views:
            while len(lease.views) >= _MOST_LENGTHS:
                lease.views.pop(next(iter(lease.views)))
            apart = [arena.lane == "communication" for arena in plan.arenas]
            lease.views[key] = [
                _buffer(layout, lease.arenas[number], offset, lengths, apart[number])
                for layout, number, offset in placed
                if number < arenas
            ]
        views = iter(lease.views[key])
        return [
            next(views) if number < arenas else _buffer(layout, given[number - arenas], offset, lengths)
            for layout, number, offset in placed
        ]


def _buffer(layout: Layout, memory: Tensor, offset: int, lengths: Mapping[sympy.Symbol, int], apart: bool = False) -> Tensor:
    memory, unit = _apart(memory[offset:]) if apart else memory[offset:], layout.dtype.itemsize
    return layout.of(memory[: memory.numel() // unit * unit], lengths)


def _apart(memory: Tensor) -> Tensor:
    """The same bytes as a storage of its own, which holds the other: a wait knows by the storage for what it waits."""
    return from_dlpack(to_dlpack(memory))


class _Poisoned(Interpreter):
    """Node by node; memory is filled with NaN before any buffer has it, and again when the last reader is through."""

    def __init__(self, planned: PlannedGraph, plan: BufferPlan, memories: Sequence[Tensor]) -> None:
        super().__init__(planned.gm)
        self._ends = _ranges_by_last_reader(planned, plan, memories)
        for arena in memories[: len(plan.arenas)]:
            arena.fill_(_POISON)

    def run_node(self, n: Node) -> Any:
        """As ``Interpreter``."""
        result = super().run_node(n)
        for memory in self._ends.get(n.name, ()):
            memory.fill_(_POISON)
        return result


def _ranges_by_last_reader(planned: PlannedGraph, plan: BufferPlan, memories: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What is filled after which node: each buffer, and donated memory unless its last reader writes the first buffer there."""
    found: dict[str, list[Tensor]] = {}
    nodes = planned.lifetimes.nodes
    for memory, arena in zip(memories, (*plan.arenas, *plan.donated), strict=True):
        if arena.inside is not None and all(buffer.begin > arena.inside.end for buffer in arena.buffers):
            found.setdefault(nodes[arena.inside.end], []).append(memory)
        for buffer, offset in zip(arena.buffers, arena.offsets, strict=True):
            found.setdefault(nodes[buffer.end], []).append(memory[offset : offset + buffer.hint])
    return found
