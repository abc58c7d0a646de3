"""Tell the world what was decided: the report file, and structured trace artifacts for tlparse."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from torch._logging._internal import trace_structured

from dilcompile.memory.account import DIRECTIONS, GraphMemory
from dilcompile.policy import Policy, unused_rules
from dilcompile.report import GraphReport, Report
from dilcompile.report.file import report_path
from dilcompile.report.lengths import of_whole_sequences

ARTIFACT = "dilcompile_report"

# Graphs compiled so far, by report path and policy: one file tells of all graphs of a process. Keyed by compile id, because
# Dynamo may call the backend twice for one graph.
_graphs: dict[tuple[Path, str], dict[str, GraphReport]] = {}


def publish(graph: GraphReport, policy: Policy, path: str | os.PathLike[str] | None) -> None:
    """Log the graph's report as a trace artifact and, if asked, (re)write the report file.

    Args:
        path: ``.html`` or ``.json``.

    Raises:
        DilcompileError: for another suffix, or a path that can't be written.
    """
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": ARTIFACT, "encoding": "json"},
        payload_fn=lambda: json.dumps(gathered((graph,), policy).to_dict()),
    )
    if path is None:
        return
    target = report_path(path)
    graphs = _graphs.setdefault((target.absolute(), policy.fingerprint), {})
    graphs[graph.graph] = graph
    gathered(tuple(graphs.values()), policy).write(target)


class Telling:
    """What is told of one graph, as it becomes known: first what was decided, then its memory, then what its first calls came to.

    Args:
        path: of the report file, or None: only a trace artifact tells of the graph.
    """

    def __init__(self, report: GraphReport, policy: Policy, path: str | os.PathLike[str] | None) -> None:
        self._report, self._policy, self._path = report, policy, path
        publish(report, policy, path)

    @property
    def graph(self) -> str:
        """What reports call it."""
        return self._report.graph

    @property
    def wanted(self) -> bool:
        """Is there a file to tell of the memory in?"""
        return self._path is not None

    def amend(self, report: GraphReport) -> None:
        """Other verdicts or notes."""
        self._report = replace(report, memory=self._report.memory)
        publish(self._report, self._policy, self._path)

    def memory(self, account: GraphMemory) -> None:
        """Keep the memory of one of its graphs, in place of what is known of that; told by ``again``.

        (Inner compilers call this while they trace, where nothing else should be computed.)
        """
        others = [held for held in self._report.memory if held.direction != account.direction]
        ordered = sorted([*others, account], key=lambda held: DIRECTIONS.index(held.direction))
        self._report = replace(self._report, memory=tuple(ordered))

    def again(self) -> None:
        """Tell anew, if there is any memory to tell of."""
        if self._report.memory:
            publish(self._report, self._policy, self._path)


def forget() -> None:
    """Start report files anew: compile ids begin again, and stand for other graphs."""
    _graphs.clear()


def gathered(graphs: tuple[GraphReport, ...], policy: Policy) -> Report:
    """The report on these graphs, with the rules that none of their sites took."""
    graphs = tuple(map(of_whole_sequences, graphs))
    verdicts = [verdict for graph in graphs for verdict in graph.verdicts]
    return Report(str(policy), graphs, tuple(unused_rules(policy, verdicts)))
