"""Rewrite the decided sites of a graph one by one; where the policy asks for it, each is tried before it is accepted."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.fx import Node

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileError, DilcompileWarning, RewriteError, ShardingError
from dilcompile.forms import KeepStructure
from dilcompile.passes.finding.find_sites import Findings
from dilcompile.passes.finding.match import Match
from dilcompile.passes.graph.dead_code import erase_dead, unused
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.strict_views import relax_views
from dilcompile.passes.graph.whole_sequence import Sharding
from dilcompile.passes.rewriting.rewrite import redirect, rewrite_site
from dilcompile.passes.validation.trial import Probe, Trial, cut_out, probe, take_back
from dilcompile.passes.validation.validate import MOST_PAIRS, Finding, tried_at_random
from dilcompile.report import Verdict

FUEL = "DILCOMPILE_FUEL"
NOTE = "numerics.check:"
MISREAD = "please report it: the finder read this site wrongly"


@dataclass
class Rewritten:
    """What became of the sites.

    Args:
        runs_later: trials may be left to the graph's first call.
        verdicts: one a site, in their order.
        tables: inputs whose values masks were read from.
        trials: of the sites that are to be compared when the graph runs, with their decisions.
        outputs: what each rewritten site computed, and what computes it now.
        probe: gives what these trials need; None without trials.
        check_seconds: what the comparisons took.
        sharding: what sharded sites call; None where no site is sharded.
    """

    runs_later: bool
    verdicts: list[Verdict] = field(default_factory=list)
    tables: dict[Node, torch.Tensor] = field(default_factory=dict)
    trials: list[tuple[Decision, Trial]] = field(default_factory=list)
    outputs: dict[Node, Node] = field(default_factory=dict)
    probe: Probe | None = None
    check_seconds: float = 0.0
    sharding: Sharding | None = None


class Refused(Exception):
    """A rewrite that was tried and differs; the reason and the cure."""

    def __init__(self, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.reason, self.cure = reason, cure


def rewrite_sites(
    parts: Sequence[Graph],
    found: Sequence[Findings],
    verdicts: Sequence[Verdict],
    known: Mapping[Node, Any],
    *,
    enforce: bool,
    runs_later: bool,
) -> Rewritten:
    """Rewrite every decided site in place, then erase what became dead.

    Args:
        parts: the graph and the checkpoint bodies in it; found: the sites of each; verdicts: one a site.
        known: values of the graph's inputs, as far as there are any.
        enforce: act on the policy's fallbacks.
        runs_later: whoever asked runs the graph and holds the trials that are left to its first call.

    Raises:
        RewriteError: where the policy says that a failure is an error.
        ShardingError: if a site that is to be sharded can't be.
        DilcompileError: if ``DILCOMPILE_FUEL`` is no whole number.
    """
    fuel = _fuel()
    sharded = any(isinstance(verdict, Decision) and verdict.placement is not None for verdict in verdicts)
    done = Rewritten(runs_later, sharding=sharding_functions() if sharded else None)
    queue = iter(verdicts)
    idle = frozenset().union(*(unused(part.gm) for part in parts))
    for part, findings in zip(parts, found, strict=True):
        for match in findings.matches:
            verdict = next(queue)
            if isinstance(verdict, Decision) and fuel == 0:
                verdict = Rejection(verdict.site, verdict.rule, f"{FUEL} ran out", "raise it or unset it", axis=_axis(verdict))
                _require_sharded(verdict, enforce)
            if isinstance(verdict, Decision):
                verdict = _rewrite_one(part, findings, match, verdict, known, enforce, done)
            if isinstance(verdict, Decision):
                fuel -= 1
                done.tables.update({node: part.tables[node] for node in match.tables})
            done.verdicts.append(verdict)
    if done.trials:
        done.probe = probe(parts[0].gm, [trial for _, trial in done.trials])
    for part in reversed(parts):  # bodies before the graphs around them
        erase_dead(part.gm, idle)
        relax_views(part.gm)
        part.drop_unused_inputs()
        part.gm.graph.lint()
        part.gm.recompile()
    return done


def sharding_functions() -> Sharding:
    """What sharded sites call."""
    from dilcompile.lowering.distributed.attention import sharded_attention
    from dilcompile.lowering.distributed.whole import whole_sequence

    return Sharding(sharded_attention, whole_sequence)


def _axis(decision: Decision) -> str | None:
    return None if decision.placement is None else decision.placement.axis


def _require_sharded(rejection: Rejection, enforce: bool) -> None:
    """A shard of a sequence is no whole one, so the model's own attention is no way out."""
    if enforce and rejection.axis is not None:
        where = f"{rejection.site.module or '<top>'} ({rejection.site.source})"
        raise ShardingError(f"{where} is sharded over mesh axis {rejection.axis!r}: {rejection.reason}; {rejection.cure}")


def _fuel() -> int:
    """How many sites may be rewritten; negative: all."""
    text = os.environ.get(FUEL, "-1")
    try:
        return int(text)
    except ValueError:
        raise DilcompileError(f"{FUEL} takes a whole number of rewrites, got {text!r}") from None


def _rewrite_one(
    part: Graph, findings: Findings, match: Match, decision: Decision, known: Mapping[Node, Any], enforce: bool, done: Rewritten
) -> Verdict:
    """The decision if the rewrite went through; else the graph as it was, and the reason."""
    try:
        if decision.check.when == "off":
            _rewrite(part, findings, match, decision, done)
            return decision
        return _tried(part, findings, match, decision, known, done)
    except ShardingError as error:
        if enforce:
            raise
        reason, cure, consequence = str(error), "", decision.fallback
    except Refused as refused:
        reason, cure, consequence = refused.reason, refused.cure, decision.check.on_difference
    except Exception as error:
        reason, cure = f"the rewrite failed: {type(error).__name__}: {error}", "please report it; the original attention is kept"
        consequence = decision.fallback
    rejection = Rejection(decision.site, decision.rule, reason, cure, axis=_axis(decision))
    _require_sharded(rejection, enforce)
    message = f"{match.site.module or '<top>'} ({match.site.source}): {reason}"
    if enforce and consequence == "error":
        raise RewriteError(message)
    if enforce and consequence == "warn":
        warnings.warn(f"{message}; the original attention is kept", DilcompileWarning, stacklevel=2)
    return rejection


def _rewrite(part: Graph, findings: Findings, match: Match, decision: Decision, done: Rewritten) -> None:
    done.outputs[match.roles.output] = _inserted(part, findings, match, decision, done)


def _inserted(part: Graph, findings: Findings, match: Match, decision: Decision, done: Rewritten) -> Node:
    """The site's new output. Sites before it were found, and are read, as they were before: what they are now is read instead."""
    result = rewrite_site(part, match, decision, findings.axes, done.sharding)
    for before, now in done.outputs.items():
        redirect(before, now)
    return result


def _tried(
    part: Graph, findings: Findings, match: Match, decision: Decision, known: Mapping[Node, Any], done: Rewritten
) -> Decision:
    """The decision, rewritten and noted what its trial gave.

    Raises:
        Refused: if the replacement computes something else.
    """
    problem = _not_tried(decision)
    if problem:
        _rewrite(part, findings, match, decision, done)
        return replace(decision, notes=(*decision.notes, f"{NOTE} not compared: {problem}"))
    start = time.perf_counter()
    # An approximate form differs by intent: what is proven is the reading of the site, which its own structure shows.
    # Of a shard too, as if it were all there is.
    stand_in = replace(decision, form=KeepStructure().settled(decision.site), fidelity="exact", kernel=None, placement=None)
    output = match.roles.output
    mark = output.prev
    result = _inserted(part, findings, match, stand_in, done)
    trial = cut_out(part, mark, output, result)
    now = decision.check.when == "compile" or trial.inside or not done.runs_later
    finding = tried_at_random(trial, known) if now else Finding()
    take_back(mark, output, result)
    done.check_seconds += time.perf_counter() - start
    if now and finding.runs and finding.rel_l2 > decision.check.rel_l2:
        raise Refused(difference(decision, finding), MISREAD)
    _rewrite(part, findings, match, decision, done)
    if not now:
        done.trials.append((decision, trial))
    return replace(decision, notes=(*decision.notes, f"{NOTE} {_said(decision, finding, now)}"))


def _said(decision: Decision, finding: Finding, now: bool) -> str:
    if not now:
        return "to be compared on every call" if decision.check.when == "always" else "to be compared on the first call"
    return f"compared on {finding.runs} random inputs: {finding}" if finding.runs else f"not compared: it {finding}"


def difference(decision: Decision, finding: Finding) -> str:
    """The reason for which a site is left as it is."""
    return f"{NOTE} its replacement differs from the model: {finding}; tolerance rel_l2 {decision.check.rel_l2:.1e}"


def _not_tried(decision: Decision) -> str:
    """Why a site can't be tried; empty if it can."""
    site = decision.site
    sizes = [length if isinstance(length, int) else length.node.hint for length in (site.batch, site.q_len, site.k_len)]
    if not all(isinstance(size, int) for size in sizes):
        return "its lengths are only known when it runs"
    pairs = sizes[0] * sizes[1] * sizes[2] * site.heads
    if pairs > MOST_PAIRS:
        return f"it has {pairs} scores, more than {MOST_PAIRS}; compile it with shorter inputs once"
    return KeepStructure().reject(site) or ""
