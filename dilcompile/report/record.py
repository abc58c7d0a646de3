"""What happened to every attention of a model: the record that ``explain`` returns and the backend writes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dilcompile.decision import Decision, Rejection
from dilcompile.site import AttentionSite, Miss

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

Verdict = Decision | Rejection


@dataclass(frozen=True)
class GraphReport:
    """One compiled graph (a model with graph breaks has several).

    Args:
        graph: Dynamo's compile id (``0/0``), or ``exported``.
        verdicts: one a site, in graph order; ``Decision`` means rewritten.
        misses: what looks like attention and was left alone.
        notes: what holds for the whole graph (why it could not be normalised, fuel that ran out ...).
        seconds: time of each step of the pipeline.
    """

    graph: str
    verdicts: tuple[Verdict, ...] = ()
    misses: tuple[Miss, ...] = ()
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """All graphs of one model under one policy.

    ``print(report)`` gives the table, in colour on a terminal; sites that are alike share a row there. ``to_dict`` and ``write``
    list every site.

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
    def notes(self) -> Sequence[str]:
        """What holds for whole graphs."""
        return tuple(f"graph {graph.graph}: {note}" for graph in self.graphs for note in graph.notes)

    def __str__(self) -> str:
        from dilcompile.report.table import text

        return text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dilcompile.report.table import renderables

        return renderables(self, options.max_width)

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON values; ``version`` counts changes of the keys (see ``dilcompile.report.plain``)."""
        from dilcompile.report.plain import plain

        return plain(self)

    def to_html(self) -> str:
        """One self-contained HTML page: no scripts, no files from elsewhere."""
        from dilcompile.report.page import page

        return page(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report to ``path``; missing folders are made, an old file is replaced in one step.

        Args:
            path: ``.html`` or ``.json``.

        Raises:
            DilcompileError: for another suffix, or a path that can't be written.
        """
        from dilcompile.report.file import write

        write(self, Path(path))
