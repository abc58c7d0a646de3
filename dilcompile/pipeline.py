"""The whole way from a graph to a rewritten graph, as one list of steps."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileWarning, RewriteError
from dilcompile.passes.find_sites import Findings, find_sites
from dilcompile.passes.normalize import NormalizeError, normalize
from dilcompile.passes.regions import Graph, regions
from dilcompile.passes.rewrite import erase_dead, rewrite_site, unused
from dilcompile.policy import Policy, resolve
from dilcompile.report import GraphReport, Verdict


@dataclass(frozen=True)
class Outcome:
    """A graph after the pipeline.

    Args:
        gm: the rewritten graph; None if nothing was rewritten, so that the caller keeps its own.
        report: what was found and decided.
        tables: inputs whose values the masks were read from, by position: they must not change.
    """

    gm: GraphModule | None
    report: GraphReport
    tables: Mapping[int, torch.Tensor] = field(default_factory=dict)


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._since
        self._since = now


def rewrite_dynamo(gm: GraphModule, example_inputs: Sequence[Any], policy: Policy, name: str, *, enforce: bool = True) -> Outcome:
    """Rewrite a graph that Dynamo captured; ``gm`` itself is not changed.

    Args:
        name: what the report calls the graph.
        enforce: act on the policy's fallbacks. False: only say what would be done (for ``explain``).

    Raises:
        RewriteError: where the policy says that a failure is an error.
    """
    clock = _Clock()
    if not _may_hold_attention(gm):
        return Outcome(None, GraphReport(name, seconds=clock.seconds))
    try:
        normal = normalize(gm, example_inputs)
    except NormalizeError as error:
        note = f"left as it is: it could not be normalised ({error})"
        if enforce and policy.defaults.fallback.unsupported == "error":
            raise RewriteError(f"graph {name}: {note}") from error
        return Outcome(None, GraphReport(name, notes=(note,), seconds=clock.seconds))
    clock.lap("normalize")
    inputs = list(normal.graph.find_nodes(op="placeholder"))
    values = dict(zip(inputs, example_inputs, strict=True))
    graph = Graph(normal, _parameters(values), _buffers(values), _training(example_inputs))
    outcome = rewrite_normal(graph, policy, name, clock, enforce=enforce)
    positions = {node: i for i, node in enumerate(inputs)}
    return replace(outcome, tables={positions[node]: graph.tables[node] for node in outcome.tables if node in positions})  # type: ignore[index]


def rewrite_normal(graph: Graph, policy: Policy, name: str, clock: _Clock | None = None, *, enforce: bool = True) -> Outcome:
    """Rewrite a graph in pre-dispatch ATen, in place.

    Returns:
        An outcome whose ``tables`` are keyed by node.
    """
    clock = _Clock() if clock is None else clock
    parts = list(regions(graph))
    found = [find_sites(part) for part in parts]
    clock.lap("find")
    sites = [match.site for findings in found for match in findings.matches]
    verdicts = _numbered(resolve(policy, sites, enforce=enforce))
    clock.lap("resolve")
    misses = tuple(miss for findings in found for miss in findings.misses)
    settled, tables = _rewrite_all(parts, found, verdicts, enforce)
    clock.lap("rewrite")
    report = GraphReport(name, tuple(settled), misses, (), clock.seconds)
    rewritten = any(isinstance(verdict, Decision) for verdict in settled)
    return Outcome(graph.gm if rewritten else None, report, tables)  # type: ignore[arg-type]


def _rewrite_all(
    parts: Sequence[Graph], found: Sequence[Findings], verdicts: Sequence[Verdict], enforce: bool
) -> tuple[list[Verdict], dict[Node, torch.Tensor]]:
    fuel = int(os.environ.get("DILCOMPILE_FUEL", "-1"))
    settled: list[Verdict] = []
    tables: dict[Node, torch.Tensor] = {}
    queue = iter(verdicts)
    idle = frozenset().union(*(unused(part.gm) for part in parts))
    for part, findings in zip(parts, found, strict=True):
        for match in findings.matches:
            verdict = next(queue)
            if isinstance(verdict, Decision) and fuel == 0:
                verdict = Rejection(verdict.site, verdict.rule, "DILCOMPILE_FUEL ran out", "raise it or unset it")
            if isinstance(verdict, Decision):
                verdict = _rewrite_one(part, findings, match, verdict, enforce)
            if isinstance(verdict, Decision):
                fuel -= 1
                tables.update({node: part.tables[node] for node in match.tables})
            settled.append(verdict)
    for part in reversed(parts):  # bodies before the graphs around them
        erase_dead(part.gm, idle)
        part.drop_unused_inputs()
        part.gm.graph.lint()
        part.gm.recompile()
    return settled, tables


def _rewrite_one(part: Graph, findings: Findings, match: Any, decision: Decision, enforce: bool) -> Verdict:
    """The decision if the rewrite went through; else the graph as it was, and the reason."""
    try:
        rewrite_site(part, match, decision, findings.axes)
        return decision
    except Exception as error:
        reason = f"the rewrite failed: {type(error).__name__}: {error}"
        message = f"{match.site.module or '<top>'} ({match.site.source}): {reason}"
        if enforce and decision.fallback == "error":
            raise RewriteError(message) from error
        if enforce and decision.fallback == "warn":
            warnings.warn(f"{message}; the original attention is kept", DilcompileWarning, stacklevel=2)
        return Rejection(decision.site, decision.rule, reason, "please report it; the original attention is kept")


def _numbered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [replace(verdict, site=replace(verdict.site, index=i)) for i, verdict in enumerate(verdicts)]


def _may_hold_attention(gm: GraphModule) -> bool:
    """Attention has at least one product or one fused call; a graph without is left before any work is done on it."""
    return any(node.op in ("call_function", "call_method", "call_module") for node in gm.graph.nodes)


def _parameters(values: Mapping[Node, Any]) -> frozenset[Node]:
    return frozenset(node for node, value in values.items() if isinstance(value, torch.nn.Parameter))


def _buffers(values: Mapping[Node, Any]) -> dict[Node, torch.Tensor]:
    """Registered buffers with their values: masks may be read off them, and they are watched afterwards."""
    found = {}
    for node, value in values.items():
        source = getattr(node, "_dynamo_source", None)
        name = "" if source is None else str(source.name() if callable(source.name) else source.name)
        plain = type(value) is torch.Tensor and not value.requires_grad
        if "_buffers[" in name and plain:
            found[node] = value
    return found


def _training(example_inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
