"""Tell the world what was decided: the report file, and structured trace artifacts for tlparse."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from dilcompile.policy import Policy
from dilcompile.report import GraphReport, Report

# Graphs compiled so far, by report path: one file tells of all graphs of a process. Keyed by compile id, because Dynamo
# may call the backend twice for one graph.
_graphs: dict[Path, dict[str, GraphReport]] = {}


def publish(graph: GraphReport, policy: Policy, path: str | os.PathLike[str] | None) -> None:
    """Log the graph's report as a trace artifact and, if asked, (re)write the report file.

    Args:
        path: ``.html`` or ``.json``.

    Raises:
        DilcompileError: for another suffix.
    """
    report = Report(str(policy), (graph,))
    payload = report.to_dict()
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "dilcompile_report", "encoding": "json"},
        payload_fn=lambda: json.dumps(payload),
    )
    if path is None:
        return
    target = Path(path)
    graphs = _graphs.setdefault(target.absolute(), {})
    graphs[graph.graph] = graph
    Report(str(policy), tuple(graphs.values())).write(target)
