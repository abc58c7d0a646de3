"""Inner compilers that keep a budget of memory: which bounds hold for a graph, and how each inner compiler takes the choice."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch.fx import GraphModule

import dilcompile.lowering.after as _registered  # noqa: F401
from dilcompile.decision import MemoryUse
from dilcompile.errors import BudgetError
from dilcompile.lowering import workspaces
from dilcompile.memory.budget import Bound, BudgetReport, Ladder
from dilcompile.passes.memory.climb import Climb
from dilcompile.pipeline import training
from dilcompile.planned import Tell, planned
from dilcompile.policy import Policy
from dilcompile.policy.schema import num_bytes
from dilcompile.report import GraphReport

Compiled = Callable[..., Any]
# Lengths that are known to keep the budget.
_MOST_LENGTHS = 1024


def bounds_of(policy: Policy, report: GraphReport, prefix: str) -> tuple[Bound, ...]:
    """What the graph must keep: the whole-graph budget of the defaults, and that of each rule that decided a site of it.

    Args:
        prefix: path of the module whose frame the graph is of.
    """
    found = []
    whole = policy.defaults.memory
    if whole is not None and whole.budget is not None:
        found.append(Bound("defaults", num_bytes(whole.budget)))
    for rule in policy.rules:
        # Of sites that it leaves as they are, too.
        sites = [verdict.site for verdict in report.verdicts if verdict.rule == rule.label]
        if sites and rule.memory is not None and rule.memory.budget is not None:
            modules = frozenset(site.module.removeprefix(prefix).strip(".") for site in sites)
            found.append(Bound(f"rule {rule.label}", num_bytes(rule.memory.budget), modules))
    return tuple(found)


@dataclass
class Budgeted:
    """An inner compiler under bounds; each call chooses anew for the graph that it is given.

    Args:
        name: ``inductor``, ``aot_eager`` or ``eager``; graph: its name, for errors.
        patches: of Inductor's configuration.
        tell: is given each graph that has been planned; see ``planned``.
        innermost: Inductor's compiler of one graph.
    """

    name: str
    graph: str
    memory: MemoryUse
    bounds: tuple[Bound, ...]
    patches: Mapping[str, Any]
    tell: Tell
    innermost: Compiled
    report: BudgetReport | None = None

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        """Compile the graph in a way that keeps the bounds.

        Raises:
            BudgetError: if there is none, at the lengths of the example; what is returned raises it for other lengths.
        """
        if self.name == "eager" and training(example_inputs):
            sources = ", ".join(bound.source for bound in self.bounds)
            raise BudgetError(
                f"graph {self.graph}: memory.budget ({sources}) can't be kept with inner: eager, where autograd saves tensors as "
                "it runs; take inner: aot_eager or inner: inductor"
            )
        climb = self._climb()
        compile_inner = self._inductor(climb) if self.name == "inductor" else planned(self.memory, self.tell, climb)
        compiled = compile_inner(gm, example_inputs)
        assert climb.report is not None, "the inner compiler partitions a graph, or compiles it for inference"
        self.report = climb.report
        return _checked(compiled, climb, example_inputs)

    def _climb(self) -> Climb:
        from torch._functorch.partitioners import min_cut_rematerialization_partition

        ladder = Ladder(self.bounds, self.memory.pool != "default")
        partition, plans = min_cut_rematerialization_partition, self.name != "inductor"
        return Climb(ladder, self.graph, self.memory.reuse, partition, plans, workspaces.of_share)

    def _inductor(self, climb: Climb) -> Callable[[GraphModule, Sequence[Any]], Compiled]:
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx

        from dilcompile.inductor_partition import Partitioner

        if config.custom_partitioner_fn is not None:
            raise BudgetError(
                f"graph {self.graph}: memory.budget partitions the graph itself, but "
                "torch._inductor.config.custom_partitioner_fn is set too; leave one of them out"
            )

        def foreseen(gm: GraphModule, example_inputs: Sequence[Any], **options: Any) -> Any:
            if options.get("is_inference"):
                climb.infer(gm)
            return self.innermost(gm, example_inputs, **options)

        def compile_inner(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
            patches = {**self.patches, "custom_partitioner_fn": Partitioner(climb)}
            # A graph that came from the cache would not be partitioned again, and nothing would be known of it.
            with torch._functorch.config.patch(enable_autograd_cache=False):
                compiled = compile_fx(gm, list(example_inputs), inner_compile=foreseen, config_patches=patches)
            assert callable(compiled)
            return compiled

        return compile_inner


def with_budget(report: GraphReport, budget: BudgetReport | None) -> GraphReport:
    """The report with how its budgets are kept."""
    return report if budget is None else replace(report, budget=budget, notes=(*report.notes, *budget.notes))


def _checked(compiled: Compiled, climb: Climb, example_inputs: Sequence[Any]) -> Compiled:
    """Refuse lengths at which the budget would not be kept, before anything runs."""
    symbols = [(number, value.node.expr) for number, value in enumerate(example_inputs) if isinstance(value, torch.SymInt)]
    lengths = [(number, symbol) for number, symbol in symbols if isinstance(symbol, sympy.Symbol)]
    if not lengths:
        return compiled
    known: set[tuple[int, ...]] = set()

    def run(*args: Any) -> Any:
        key = tuple(int(args[number]) for number, _ in lengths)
        if key not in known:
            climb.check({symbol: value for (_, symbol), value in zip(lengths, key, strict=True)})
            if len(known) >= _MOST_LENGTHS:
                known.clear()
            known.add(key)
        return compiled(*args)

    return run
