"""The memory of a model, planned at any length without computing anything: forward and backward of each of its graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.utils._pytree import tree_map_only

from dilcompile.decision import MemoryUse
from dilcompile.errors import DilcompileError
from dilcompile.inspect import GraphBreak, Results, each_graph, explain, memory_of
from dilcompile.memory.account import GraphMemory
from dilcompile.memory.words import text
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.placements.marks import Marks
from dilcompile.planned import memory_use
from dilcompile.policy import Policy
from dilcompile.report.lengths import hint

ASSUMED = MemoryUse(pool="private", reuse="across_layers")
_ASSUMED = "no rule says memory.reuse: planned as across_layers would be"
_UNBOUNDED = "memory.budget changes nothing here: the report of the compiled model lists its ladder"


@dataclass(frozen=True)
class MemoryPlan:
    """All graphs of one call of a model, in the order in which they are compiled.

    Args:
        length: tokens of the sequence; None: as the example has them.
        assumed: what the policy leaves open and is taken for granted here; empty for nothing.
    """

    graphs: tuple[GraphMemory, ...]
    length: int | None = None
    assumed: str = ""

    def to_dict(self) -> dict[str, object]:
        """As plain JSON values."""
        return {"length": self.length, "assumed": self.assumed, "graphs": [graph.to_dict() for graph in self.graphs]}

    def __str__(self) -> str:
        tokens = "" if self.length is None else f" at {self.length:,} tokens"
        head = f"memory of {len(self.graphs)} graph{'' if len(self.graphs) == 1 else 's'}{tokens}"
        return "\n".join([head, *([self.assumed] if self.assumed else []), "", text(self.graphs)])


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
    assumed = False

    def look(gm: GraphModule, example_inputs: Sequence[Any], name: str, marks: Marks) -> tuple[None, Results]:
        nonlocal assumed
        outcome = rewrite_dynamo(gm, example_inputs, loaded, name, enforce=False, marks=marks)
        use = memory_use(outcome.report, loaded)
        plans = use is not None and use.reuse != "off"
        assumed |= not plans
        found.extend(memory_of(gm if outcome.gm is None else outcome.gm, example_inputs, use if plans else ASSUMED, name))
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
    said = (_ASSUMED if assumed else "", _UNBOUNDED if _has_budget(loaded) else "")
    return MemoryPlan(tuple(found), length, "; ".join(filter(None, said)))


def _has_budget(policy: Policy) -> bool:
    said = (policy.defaults.memory, *(rule.memory for rule in policy.rules))
    return any(memory is not None and memory.budget is not None for memory in said)


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
