"""The memory of a model, planned at any length without computing anything: forward and backward of each of its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from dilcompile.budgeted import Budgeted, bounds_of
from dilcompile.decision import MemoryUse
from dilcompile.errors import BudgetError, DilcompileError
from dilcompile.inspect import GraphBreak, Results, each_graph, explain, lowered_at_once, memory_of
from dilcompile.memory.account import Direction, GraphMemory
from dilcompile.memory.budget import Bound, Rung
from dilcompile.memory.timeline import size_text
from dilcompile.memory.words import text
from dilcompile.passes.graph.frames import compiled_frame
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.placements.marks import Marks
from dilcompile.planned import PlannedCall, memory_use
from dilcompile.policy import Policy
from dilcompile.report.lengths import hint

ASSUMED = MemoryUse(pool="private", reuse="across_layers")
_ASSUMED = "no rule says memory.reuse: planned as across_layers would be"


@dataclass(frozen=True)
class Climbed:
    """The ways that were tried to keep the budgets of a graph.

    Args:
        graph: its name.
        bounds: what must be kept.
        tried: each way with what it is predicted to need, in order.
        taken: that which keeps all bounds; None: none does, see ``error``.
    """

    graph: str
    bounds: tuple[Bound, ...]
    tried: tuple[Rung, ...]
    taken: Rung | None
    error: str = ""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values; sizes in bytes."""
        bounds = [{"source": bound.source, "most": bound.most} for bound in self.bounds]
        tried = [{"name": rung.name, **asdict(rung)} for rung in self.tried]
        taken = None if self.taken is None else self.taken.name
        return {"graph": self.graph, "bounds": bounds, "tried": tried, "taken": taken, "error": self.error}

    def __str__(self) -> str:
        budgets = ", ".join(f"{size_text(bound.most)} ({bound.source})" for bound in self.bounds)
        end = f"not kept: {self.error}" if self.taken is None else f"kept by {self.taken.name}"
        return "\n".join([f"{self.graph}: memory.budget of {budgets}", *(f"  {rung}" for rung in self.tried), f"  {end}"])


@dataclass(frozen=True)
class MemoryPlan:
    """All graphs of one call of a model, in the order in which they are compiled.

    Args:
        length: tokens of the sequence; None: as the example has them.
        assumed: what the policy leaves open and is taken for granted here; empty for nothing.
        budgets: of the graphs that have some, how they are kept; such a graph is planned as it then runs.
    """

    graphs: tuple[GraphMemory, ...]
    length: int | None = None
    assumed: str = ""
    budgets: tuple[Climbed, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {
            "length": self.length,
            "assumed": self.assumed,
            "budgets": [climbed.to_dict() for climbed in self.budgets],
            "graphs": [graph.to_dict() for graph in self.graphs],
        }

    @property
    def ladders(self) -> str:
        """How budgets are kept, in words; empty where there are none."""
        return "\n".join(map(str, self.budgets))

    def __str__(self) -> str:
        tokens = "" if self.length is None else f" at {self.length:,} tokens"
        head = f"memory of {len(self.graphs)} graph{'' if len(self.graphs) == 1 else 's'}{tokens}"
        return "\n".join([head, *filter(None, (self.assumed, self.ladders)), "", text(self.graphs)])


def memory_plan(
    model: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    policy: Policy,
    length: int | None = None,
    *,
    train: bool = True,
) -> MemoryPlan:
    """Plan the memory of ``model(*args, **kwargs)`` as ``inner: aot_eager`` would have it; nothing is computed.

    Graphs are traced with tensors that hold no data. Only a model with graph breaks is run once, as it is, on the example's own
    inputs. Where a rule shards the sequence, this is the memory of one rank that has all of it.

    Args:
        length: tokens of the sequence, in place of the example's: every size of an input that is the example's length becomes
            this one.
        train: with the backward, if anything asks for a gradient.

    Raises:
        PolicyError: for a policy that can't be read.
        DilcompileError: if no graph is captured, or the length can't be changed.
    """
    loaded = _without_runs(policy)
    if length is not None:
        args, kwargs = at_length(args, kwargs, length_of(model, args, kwargs, loaded), length)
    found: list[GraphMemory] = []
    budgets: list[Climbed] = []
    assumed = False

    def look(gm: GraphModule, example_inputs: Sequence[Any], name: str, marks: Marks) -> tuple[None, Results]:
        nonlocal assumed
        outcome = rewrite_dynamo(gm, example_inputs, loaded, name, enforce=False, marks=marks)
        use = memory_use(outcome.report, loaded)
        plans, rewritten = use is not None and use.reuse != "off", gm if outcome.gm is None else outcome.gm
        bounds = bounds_of(loaded, outcome.report, compiled_frame().prefix)
        graphs = _climbed(rewritten, example_inputs, use or MemoryUse(), name, bounds, budgets) if bounds else ()
        assumed |= not plans and not graphs
        found.extend(graphs or memory_of(rewritten, example_inputs, use if plans else ASSUMED, name))
        return None, outcome.results

    with contextlib.nullcontext() if train else torch.no_grad():
        try:
            each_graph(model, args, kwargs, look, may_run=length is None)
        except GraphBreak as error:
            raise DilcompileError(
                f"the model breaks into several graphs ({error}), and what follows a break is known only by running it: plan it "
                f"at the length of the example, or mend the break"
            ) from error.__cause__
    if not found:
        raise DilcompileError("Dynamo captured nothing of this call: there is no graph to plan")
    return MemoryPlan(tuple(found), length, _ASSUMED if assumed else "", tuple(budgets))


def _climbed(
    gm: GraphModule, example_inputs: Sequence[Any], use: MemoryUse, name: str, bounds: tuple[Bound, ...], told: list[Climbed]
) -> tuple[GraphMemory, ...]:
    """What planning comes to in the way that keeps the bounds; nothing where no way does, or none that plans."""
    found: list[GraphMemory] = []

    def tell(call: PlannedCall, direction: Direction) -> None:
        found.append(call.account(name, direction))

    budgeted = Budgeted("aot_eager", name, use, bounds, {}, tell, innermost=_never)
    try:
        with lowered_at_once():
            budgeted(gm, example_inputs)
    except BudgetError as error:
        told.append(Climbed(name, bounds, error.tried, None, str(error)))
        return ()
    assert budgeted.report is not None, "a graph that was compiled has a report"
    told.append(Climbed(name, bounds, budgeted.report.tried, budgeted.report.taken))
    return tuple(found)


def _never(*_: Any, **__: Any) -> Any:
    raise AssertionError("Inductor has no part in this")


def _without_runs(policy: Policy) -> Policy:
    """The policy without what computes or asks other ranks before a graph runs: comparisons and shards."""
    off = policy.defaults.numerics.model_copy(update={"check": "off"})
    rules = [
        rule.model_copy(update={"shard": None, "numerics": rule.numerics.model_copy(update={"check": "off"})})
        for rule in policy.rules
    ]
    return policy.model_copy(update={"rules": tuple(rules), "defaults": policy.defaults.model_copy(update={"numerics": off})})


def length_of(model: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], policy: Policy) -> int:
    """The length that the example's attention has over one sequence.

    Raises:
        DilcompileError: if there is none, or there are several.
    """
    report = explain(model, *args, policy=policy, **kwargs)
    lengths = {hint(site.k_len) for site in report.sites if site.kind == "self"}
    if len(lengths) != 1:
        known = " and ".join(map(str, sorted(held for held in lengths if held is not None)))
        said = f"the model's attention is over sequences of {known} tokens" if lengths else "the model has no self-attention"
        raise DilcompileError(f"--length: {said}: give the example the length that is to be planned, and leave --length out")
    found = lengths.pop()
    if found is None:
        raise DilcompileError("--length: the example's own length is not known before it runs: give it the length to be planned")
    return found


def at_length(args: Any, kwargs: Any, old: int, new: int) -> Any:
    """The arguments with every size ``old`` of a tensor made ``new``; such tensors hold no values, their memory is not touched.

    Raises:
        DilcompileError: if no tensor has that size.
    """
    changed = 0

    def resized(tensor: Tensor) -> Tensor:
        nonlocal changed
        if old not in tensor.shape or old == new:
            return tensor
        changed += 1
        shape = [new if size == old else size for size in tensor.shape]
        return torch.empty(shape, dtype=tensor.dtype, device=tensor.device, requires_grad=tensor.requires_grad)

    found = tree_map_only(Tensor, resized, (args, dict(kwargs)))
    if not changed and old != new:
        raise DilcompileError(
            f"--length: no input of the example has a size of {old}, the length of its attention; leave --length out"
        )
    return found
