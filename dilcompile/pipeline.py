"""The whole way from a graph to a rewritten graph, as one list of steps."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import GraphModule, Node

import dilcompile.traceable as _registered  # noqa: F401  (before Dynamo traces anything for us)
from dilcompile.decision import Decision
from dilcompile.errors import RewriteError, ShardingError
from dilcompile.passes.dialect.expand_fused_layers import expand_fused_layers
from dilcompile.passes.dialect.normalize import NormalizeError, normalize
from dilcompile.passes.finding.find_sites import find_sites
from dilcompile.passes.finding.match import Match
from dilcompile.passes.graph.regions import Graph, regions
from dilcompile.passes.graph.unseen import closed_bodies, like_attention, subclasses
from dilcompile.passes.validation.trial import Probe, Trial
from dilcompile.placements.marks import MARKS, Mark, Marks
from dilcompile.policy import Policy, resolve
from dilcompile.policy.orders import faster_orders
from dilcompile.report import GraphReport, Verdict
from dilcompile.report.faster import where_faster
from dilcompile.report.kernels import able
from dilcompile.rewriting import rewrite_sites
from dilcompile.sequence_check import check_sequence
from dilcompile.shared_frames import apart
from dilcompile.site import AttentionSite

# A global of the compiled code, one of another module, a cell of a closure.
_VARIABLE = re.compile(r"^G\['\w+'\]$|^G\['__import_\w+'\]\.\w+$|cell_contents$")

UNBOUNDED = "memory.budget has no effect on an exported program: who compiles it plans its memory"


@dataclass(frozen=True)
class Outcome:
    """A graph after the pipeline.

    Args:
        gm: the rewritten graph; None if nothing was rewritten, so that the caller keeps its own.
        report: what was found and decided.
        tables: inputs whose values the masks were read from, by position: they must not change.
        trials: sites to compare with the model's own computation when the graph runs, with their decisions.
        probe: gives what the trials need; None without trials.
        results: what is known of the graph's results along a sharded sequence; empty if nothing is.
    """

    gm: GraphModule | None
    report: GraphReport
    tables: Mapping[int, torch.Tensor] = field(default_factory=dict)
    trials: tuple[tuple[Decision, Trial], ...] = ()
    probe: Probe | None = None
    results: tuple[Mark | None, ...] = ()


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, step: str) -> None:
        now = time.perf_counter()
        self.seconds[step] = self.seconds.get(step, 0.0) + now - self._since
        self._since = now

    def move(self, step: str, part: str, seconds: float) -> None:
        """Count a part of a step by itself."""
        if seconds:
            self.seconds[step] -= seconds
            self.seconds[part] = self.seconds.get(part, 0.0) + seconds


def rewrite_dynamo(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    policy: Policy,
    name: str,
    *,
    enforce: bool = True,
    marks: Marks = MARKS,
) -> Outcome:
    """Rewrite a graph that Dynamo captured; ``gm`` itself is not changed.

    Args:
        name: what the report calls the graph.
        enforce: act on the policy's fallbacks. False: only say what would be done (for ``explain``).
        marks: what is known of tensors that run along a sharded sequence.

    Raises:
        RewriteError: where the policy says that a failure is an error.
        ShardingError: if the policy shards a site and the graph would compute something else than on one rank.
    """
    clock = _Clock()
    if not _may_hold_attention(gm):
        return Outcome(None, GraphReport(name, seconds=clock.seconds))
    strange = subclasses(dict(zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True)))
    if strange:
        return _left(gm, name, f"it computes with tensor subclasses ({strange})", policy, clock, enforce)
    try:
        normal = normalize(gm, example_inputs)
    except NormalizeError as error:
        return _left(gm, name, f"it could not be normalised ({error})", policy, clock, enforce)
    clock.lap("normalize")
    inputs = list(normal.graph.find_nodes(op="placeholder"))
    values = dict(zip(inputs, example_inputs, strict=True))
    graph = Graph(normal, _parameters(values), _buffers(values), training(example_inputs), captured=_captured(values))
    outcome = rewrite_normal(graph, policy, name, clock, known=values, enforce=enforce, marks=marks)
    positions = {node: i for i, node in enumerate(inputs)}
    return replace(outcome, tables={positions[node]: graph.tables[node] for node in outcome.tables if node in positions})  # type: ignore[index]


def rewrite_exported_graph(graph: Graph, policy: Policy, name: str) -> Outcome:
    """Rewrite the graph of an exported program, in place.

    Raises:
        RewriteError: where the policy says that a failure is an error.
    """
    strange = subclasses({node: node.meta.get("val") for node in graph.gm.graph.nodes})
    if strange:
        why = f"it computes with tensor subclasses ({strange})"
        return _left(graph.gm, name, why, policy, _Clock(), enforce=True)
    notes = (*expand_fused_layers(graph.gm), *([UNBOUNDED] if policy.has_budget else []))
    outcome = rewrite_normal(graph, policy, name)
    return replace(outcome, report=replace(outcome.report, notes=(*outcome.report.notes, *notes)))


def rewrite_normal(
    graph: Graph,
    policy: Policy,
    name: str,
    clock: _Clock | None = None,
    *,
    known: Mapping[Node, Any] | None = None,
    enforce: bool = True,
    marks: Marks = MARKS,
) -> Outcome:
    """Rewrite a graph in pre-dispatch ATen, in place.

    Args:
        known: values of its inputs, if it will be run on such; else ``numerics.check`` draws all of them at once.
        marks: see ``rewrite_dynamo``.

    Returns:
        An outcome whose ``tables`` are keyed by node.
    """
    clock = _Clock() if clock is None else clock
    parts = list(regions(graph))
    found = [find_sites(part) for part in parts]
    clock.lap("find")
    sites = [_with_operands(match) for findings in found for match in findings.matches]
    verdicts = _numbered(
        resolve(policy, sites, enforce=enforce, revise=lambda made: apart(policy, graph.frame, where_faster(able(made))))
    )
    clock.lap("resolve")
    misses = tuple(miss for findings in found for miss in findings.misses)
    done = rewrite_sites(parts, found, verdicts, known or {}, enforce=enforce, runs_later=known is not None)
    clock.lap("rewrite")
    clock.move("rewrite", "check", done.check_seconds)
    checked = check_sequence(parts, done, policy, name, known or {}, marks, enforce)
    notes = (*closed_bodies(part.gm for part in parts), *checked.notes, *faster_orders(policy, done.verdicts))
    clock.lap("shard")
    report = GraphReport(name, tuple(done.verdicts), misses, notes, clock.seconds)
    rewritten = any(isinstance(verdict, Decision) for verdict in done.verdicts)
    kept = graph.gm if rewritten else None
    return Outcome(kept, report, done.tables, tuple(done.trials), done.probe, checked.results)  # type: ignore[arg-type]


def _with_operands(match: Match) -> AttentionSite:
    """The site with the names of its queries, keys and values in the graph."""
    sources = (match.q.source, match.k.source, match.v.source)
    shapes = (", ".join(map(str, source.meta["val"].shape)) for source in sources)
    return replace(match.site, operands=tuple(f"{source.name} [{shape}]" for source, shape in zip(sources, shapes, strict=True)))


def _numbered(verdicts: Sequence[Verdict]) -> list[Verdict]:
    return [replace(verdict, site=replace(verdict.site, index=i)) for i, verdict in enumerate(verdicts)]


def _left(gm: GraphModule, name: str, why: str, policy: Policy, clock: _Clock, enforce: bool) -> Outcome:
    """A graph that nothing is done to, with the reason as a note."""
    note = f"left as it is: {why}"
    if enforce and policy.shards and like_attention(gm):
        raise ShardingError(
            f"graph {name} holds something like attention, which the policy may shard, and can't be looked into: {why}"
        )
    if enforce and policy.defaults.fallback.unsupported == "error" and like_attention(gm):
        raise RewriteError(f"graph {name}: {note}")
    return Outcome(None, GraphReport(name, notes=(note,), seconds=clock.seconds))


def _may_hold_attention(gm: GraphModule) -> bool:
    """Attention has at least one product or one fused call; a graph without is left before any work is done on it."""
    return any(node.op in ("call_function", "call_method", "call_module") for node in gm.graph.nodes)


def _parameters(values: Mapping[Node, Any]) -> frozenset[Node]:
    return frozenset(node for node, value in values.items() if isinstance(value, torch.nn.Parameter))


def _buffers(values: Mapping[Node, Any]) -> dict[Node, torch.Tensor]:
    """Registered buffers with their values: masks may be read off them, and they are watched afterwards."""
    return {node: value for node, value in values.items() if "_buffers[" in _source(node) and _is_plain(value)}


def _captured(values: Mapping[Node, Any]) -> dict[Node, torch.Tensor]:
    """Tensors that are variables of the code around the model: globals, and cells of closures."""
    return {node: value for node, value in values.items() if _VARIABLE.search(_source(node)) and _is_plain(value)}


def _source(node: Node) -> str:
    """Where Dynamo found an input, as an expression."""
    source = getattr(node, "_dynamo_source", None)
    return "" if source is None else str(source.name() if callable(source.name) else source.name)


def _is_plain(value: Any) -> bool:
    return type(value) is torch.Tensor and not value.requires_grad


def training(example_inputs: Sequence[Any]) -> bool:
    """Is a gradient asked for?"""
    return torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in example_inputs)
