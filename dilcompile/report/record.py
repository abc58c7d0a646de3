"""What happened to every attention of a model, as data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from dilcompile.decision import Decision, Rejection
from dilcompile.memory.account import GraphMemory
from dilcompile.memory.budget import BudgetReport
from dilcompile.site import AttentionSite, Miss

Verdict = Decision | Rejection


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph (a model with graph breaks has several).

    Args:
        graph: Dynamo's compile id (``0/0``), the number of an ``exported`` program, or ``none`` if none was captured.
        verdicts: one a site, in graph order; ``Decision`` means rewritten.
        misses: what looks like attention and was left alone.
        notes: what holds for the whole graph (why it could not be normalised, fuel that ran out ...).
        seconds: time of each step of the pipeline.
        budget: how it keeps the budgets of the policy; None: there are none.
        memory: the plans of its forward and its backward, where there are any.
    """

    graph: str
    verdicts: tuple[Verdict, ...] = ()
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    budget: BudgetReport | None = None
    memory: tuple[GraphMemory, ...] = ()


@dataclass(frozen=True)
class Record:
    """All graphs of one model under one policy.

    Args:
        policy: the policy's text.
        unused_rules: one line for each rule that decided no site, with what sites have instead.
    """

    policy: str
    graphs: tuple[GraphReport, ...]
    unused_rules: tuple[str, ...] = ()

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """One a site, in graph order."""
        return tuple(verdict for graph in self.graphs for verdict in graph.verdicts)

    @property
    def sites(self) -> tuple[AttentionSite, ...]:
        """Every attention that was found, rewritten or not."""
        return tuple(verdict.site for verdict in self.verdicts)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The sites that were rewritten."""
        return tuple(verdict for verdict in self.verdicts if isinstance(verdict, Decision))

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The sites that were found and stay as they are."""
        return tuple(verdict for verdict in self.verdicts if isinstance(verdict, Rejection))

    @property
    def misses(self) -> tuple[Miss, ...]:
        """What looks like attention and could not be proven to be it."""
        return tuple(miss for graph in self.graphs for miss in graph.misses)

    @property
    def memory(self) -> tuple[GraphMemory, ...]:
        """What the buffers of all graphs come to, where they are planned."""
        return tuple(memory for graph in self.graphs for memory in graph.memory)

    @property
    def notes(self) -> Sequence[str]:
        """What holds for whole graphs."""
        return tuple(f"graph {graph.graph}: {note}" for graph in self.graphs for note in graph.notes)
