"""Climb the ladder of a budget: partition copies of the joint graph in one way after the other, until what is foreseen fits.

Where a tensor is kept changes from rung to rung, and how many queries attention takes at once, never what is computed: what is
recomputed runs the same operators on the same operands, and what draws random numbers is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import sympy
import torch
from torch.fx import GraphModule, Node
from torch.utils.checkpoint import CheckpointPolicy

from dilcompile.memory.budget import BudgetReport, Ladder, Rung
from dilcompile.memory.step import Reuse, Step
from dilcompile.passes.graph.copies import copied
from dilcompile.passes.memory.chunk_queries import chunk_queries, chunk_sizes
from dilcompile.passes.memory.foresee import foresee
from dilcompile.passes.memory.offload import offload, offloadable
from dilcompile.passes.memory.plan_buffers import Workspaces, without, workspaces_of

Pair = tuple[GraphModule, GraphModule]
Partition = Callable[..., Pair]

REUSES: tuple[Reuse, ...] = ("off", "within_layer", "across_layers")
# Of the bytes that a partition saves at its fastest, the rung before. Less saved is not always less at the peak.
SHARES = (0.75, 0.5, 0.25, 0.1, 0.05, 0.0)
# Of the workspaces with which operators are fastest; 0 is the least with which they allocate nothing.
WORKSPACES = (0.5, 0.25, 0.125, 0.0)


def _without(share: float) -> Workspaces:
    return without


@dataclass(frozen=True)
class _Attempt:
    """One rung with the graphs that it would run; the backward is None where there is none."""

    rung: Rung
    step: Step
    forward: GraphModule
    backward: GraphModule | None = None


@dataclass
class Climb:
    """The choice for one graph, made when it is partitioned, or compiled for inference.

    Args:
        ladder: the bounds.
        graph: its name, for errors.
        reuse: as the policy says; the first rung.
        partition: what the inner compiler takes without a budget.
        arenas: buffers can be planned: the graph runs operator by operator.
        workspace: see ``plan_graph``; of a share of what operators want.
    """

    ladder: Ladder
    graph: str
    reuse: Reuse
    partition: Partition
    arenas: bool = True
    workspace: Callable[[float], Workspaces] = _without
    taken: Rung | None = None
    report: BudgetReport | None = None
    _step: Step | None = None
    _whys: list[str] = field(default_factory=list)

    def split(self, joint: GraphModule, inputs: Sequence[Any], *, num_fwd_outputs: int, **options: Any) -> Pair:
        """The forward and the backward of a joint graph: a ``partition_fn`` of AOTAutograd.

        Raises:
            BudgetError: if no rung keeps all bounds.
        """
        options["num_fwd_outputs"] = num_fwd_outputs
        chosen = self._first_fit(self._rungs(joint, inputs, num_fwd_outputs, options))
        assert chosen.backward is not None, "a joint graph has two parts"
        return chosen.forward, chosen.backward

    def infer(self, gm: GraphModule) -> None:
        """Choose for a graph without a backward, and change it in place where the choice asks for that.

        Raises:
            BudgetError: if no rung keeps all bounds.
        """
        chosen = self._first_fit(self._inferring(gm))
        if chosen.forward is not gm:
            gm.graph = chosen.forward.graph

    def check(self, lengths: Mapping[sympy.Symbol, int]) -> None:
        """Is the budget kept at other lengths, too, in the way that was chosen?

        Raises:
            BudgetError: if not.
        """
        assert self._step is not None, "a graph is checked after it is compiled"
        assert self.taken is not None, "a graph is checked after it is compiled"
        where = f"graph {self.graph} at {', '.join(f'{symbol} = {length:,}' for symbol, length in lengths.items())}"
        after = f"run as was chosen for the lengths that it was compiled at ({self.taken.name})"
        error = self.ladder.error(self._step.at(lengths), where, after)
        if error is not None:
            raise error

    def _first_fit(self, attempts: Iterator[_Attempt]) -> _Attempt:
        best: _Attempt | None = None
        for attempt in attempts:
            if best is None or self.ladder.excess(attempt.rung) < self.ladder.excess(best.rung):
                best = attempt
            if self.ladder.keeps_all(attempt.rung):
                break
        assert best is not None, "a ladder has a first rung"
        tried = f"{len(self.ladder.tried)} ways to run it tried, of which {best.rung.name} needs least"
        error = self.ladder.error(best.step, f"graph {self.graph}", "; ".join([tried, *self._whys]))
        if error is not None:
            raise error
        self.taken, self._step = best.rung, best.step
        self.report = self.ladder.report(best.rung, not self.arenas)
        return best

    def _rungs(self, joint: GraphModule, inputs: Sequence[Any], outputs: int, options: dict[str, Any]) -> Iterator[_Attempt]:
        best: _Attempt | None = None
        forward, backward = self.partition(copied(joint), inputs, **options)
        for attempt in self._reuses(forward, backward, outputs):
            best = self._better(best, attempt)
            yield attempt
        assert best is not None, "there is a first one"
        for share in SHARES:
            parts = _recomputing(joint, inputs, share, options)
            if draws_again(*parts):
                continue
            attempt = self._attempt(replace(best.rung, recompute=share), *parts, outputs)
            best = self._better(best, attempt)
            yield attempt
        split = partial(self._parts, inputs=inputs, share=best.rung.recompute, options=options)
        for attempt in self._chunks(best, joint, split, outputs):
            best = self._better(best, attempt)
            yield attempt
        for attempt in self._smaller(best, outputs):
            best = self._better(best, attempt)
            yield attempt
        yield from self._offloads(best, joint, inputs, outputs, options)

    def _inferring(self, gm: GraphModule) -> Iterator[_Attempt]:
        best: _Attempt | None = None
        for attempt in self._reuses(gm, None, None):
            best = self._better(best, attempt)
            yield attempt
        assert best is not None, "there is a first one"
        for attempt in self._chunks(best, gm, lambda chunked: (chunked, None), None):
            best = self._better(best, attempt)
            yield attempt
        yield from self._smaller(best, None)

    def _parts(self, joint: GraphModule, inputs: Sequence[Any], share: float | None, options: dict[str, Any]) -> Pair:
        if share is None:
            return self.partition(joint, inputs, **options)
        return _recomputing(joint, inputs, share, options)

    def _reuses(self, forward: GraphModule, backward: GraphModule | None, outputs: int | None) -> Iterator[_Attempt]:
        reuses = REUSES[REUSES.index(self.reuse) :] if self.arenas else REUSES[:1]
        for reuse in reuses:
            yield self._attempt(Rung(reuse), forward, backward, outputs)

    def _attempt(self, way: Rung, forward: GraphModule, backward: GraphModule | None, outputs: int | None) -> _Attempt:
        step = foresee(forward, backward, outputs, way.reuse, self.workspace(way.workspaces))
        return _Attempt(self.ladder.predicted(step, way), step, forward, backward)

    def _better(self, best: _Attempt | None, attempt: _Attempt) -> _Attempt:
        return attempt if best is None or self.ladder.excess(attempt.rung) < self.ladder.excess(best.rung) else best

    def _chunks(
        self,
        best: _Attempt,
        gm: GraphModule,
        split: Callable[[GraphModule], tuple[GraphModule, GraphModule | None]],
        outputs: int | None,
    ) -> Iterator[_Attempt]:
        """Attentions with a bias over pairs take fewer and fewer queries at once, while less is needed; none if none can."""
        for chunk in chunk_sizes(gm):
            found = chunk_queries(gm, chunk)
            self._whys += [why for why in found.whys if why not in self._whys]
            if found.gm is None:
                continue
            forward, backward = split(found.gm)
            if backward is not None and draws_again(forward, backward):
                return
            attempt = self._attempt(replace(best.rung, chunk=chunk), forward, backward, outputs)
            yield attempt
            if self._better(best, attempt) is best:
                return
            best = attempt

    def _smaller(self, best: _Attempt, outputs: int | None) -> Iterator[_Attempt]:
        """The same graphs with less memory for operators, where they are given any: each share that changes something."""
        if not self.arenas:
            return
        graphs = [best.forward, *([] if best.backward is None else [best.backward])]
        # Operators of graphs that are not planned make their own memory, which is not counted.
        reuse = REUSES[-1] if best.rung.reuse == "off" else best.rung.reuse
        before = self._workspace_bytes(graphs, 1.0)
        for share in WORKSPACES:
            now = self._workspace_bytes(graphs, share)
            if now == before:
                continue
            before = now
            yield self._attempt(replace(best.rung, reuse=reuse, workspaces=share), best.forward, best.backward, outputs)

    def _workspace_bytes(self, graphs: Sequence[GraphModule], share: float) -> int:
        return sum(buffer.hint for gm in graphs for buffer in workspaces_of(gm, self.workspace(share)))

    def _offloads(
        self, best: _Attempt, joint: GraphModule, inputs: Sequence[Any], outputs: int, options: dict[str, Any]
    ) -> Iterator[_Attempt]:
        """The largest saved tensors wait in host memory: twice as many each time."""
        assert best.backward is not None, "saved tensors are for a backward"
        found = offloadable(best.forward, best.backward, outputs)
        if isinstance(found, str):
            self._whys.append(f"offload of saved tensors to host memory is refused: {found}")
            return
        number = 1
        while True:
            forward, backward = copied(best.forward), copied(best.backward)
            offload(forward, backward, found[:number])
            yield self._attempt(replace(best.rung, offload=min(number, len(found))), forward, backward, outputs)
            if number >= len(found):
                return
            number *= 2


def _recomputing(joint: GraphModule, inputs: Sequence[Any], share: float, options: dict[str, Any]) -> Pair:
    """Parts that save about ``share`` of the bytes that the fastest ones do, and compute the rest again."""
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    own = copied(joint)
    for node in own.graph.nodes:
        if _draws(node) and "recompute" not in node.meta:
            for drawn in (node, *(user for user in node.users if getattr(user.target, "__name__", "") == "getitem")):
                drawn.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    with torch._functorch.config.patch(activation_memory_budget=share):
        forward, backward = min_cut_rematerialization_partition(own, inputs, **options)
    return forward, backward


def draws_again(forward: GraphModule, backward: GraphModule) -> bool:
    """Would the backward draw random numbers that the forward has drawn?"""
    names = {node.name for node in forward.graph.nodes if _draws(node)}
    return any(node.name in names for node in backward.graph.nodes if _draws(node))


def _draws(node: Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
