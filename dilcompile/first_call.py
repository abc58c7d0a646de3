"""``numerics.check: first_call``: compare rewritten sites with the model's own computation on what they are really called with.

The rewritten graph runs once more, uncompiled, on copies of what it writes to, and gives the operands of every site. On these
each site's own computation and its replacement run in float64. A difference sends this and all later calls to the user's
original graph.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileWarning, RewriteError
from dilcompile.passes.validation.draws import Values, in_float64
from dilcompile.passes.validation.trial import Probe, Trial
from dilcompile.passes.validation.validate import Finding, tried
from dilcompile.pipeline import Outcome
from dilcompile.report import GraphReport
from dilcompile.rewriting import MISREAD, NOTE, difference

Compiled = Callable[..., Any]


def compared(
    compiled: Compiled, outcome: Outcome, original: Callable[[], Compiled], publish: Callable[[GraphReport], None]
) -> Compiled:
    """``compiled``, with the outcome's trials held on its first call (on every call, where a site's policy says ``always``).

    Args:
        original: compiles the user's own graph.
        publish: tells of the graph anew, once it is known how the comparison went.
    """
    probe = outcome.probe
    assert probe is not None
    decisions, trials = zip(*outcome.trials, strict=True)
    always = any(decision.check.when == "always" for decision in decisions)
    calls, differs = 0, False

    def run(*args: Any) -> Any:
        nonlocal calls, differs
        if not differs and (always or not calls):
            start = time.perf_counter()
            findings = _findings(probe, trials, args)
            differing = _differing(decisions, findings)
            if not calls or differing:
                publish(_amended(outcome.report, list(zip(decisions, findings, strict=True)), time.perf_counter() - start))
            calls += 1
            differs = bool(differing)
            _act(differing)
        return (original() if differs else compiled)(*args)

    return run


def _findings(probe: Probe, trials: Iterable[Trial], args: Sequence[Any]) -> list[Finding]:
    copied = [arg.detach().clone() if i in probe.written else arg for i, arg in enumerate(args)]
    cuda = {arg.device.index for arg in args if isinstance(arg, torch.Tensor) and arg.device.type == "cuda"}
    with torch.random.fork_rng(cuda), torch.no_grad():
        values: Mapping[Node, Any] = dict(zip(probe.leaves, probe.gm(*copied), strict=True))
    return [tried(trial, [Values("of this call", tuple(in_float64(values[leaf]) for leaf in trial.leaves))]) for trial in trials]


def _differing(decisions: Sequence[Decision], findings: Sequence[Finding]) -> list[tuple[Decision, Finding]]:
    pairs = zip(decisions, findings, strict=True)
    return [(decision, finding) for decision, finding in pairs if finding.rel_l2 > decision.check.rel_l2]


def _act(differing: Sequence[tuple[Decision, Finding]]) -> None:
    """Warn or raise as the policy's ``fallback.quality`` says."""
    for consequence in ("error", "warn"):
        lines = [
            f"{decision.site.module or '<top>'} ({decision.site.source}): {difference(decision, finding)}"
            for decision, finding in differing
            if decision.check.on_difference == consequence
        ]
        if lines and consequence == "error":
            raise RewriteError("\n".join(lines))
        if lines:
            kept = "; this graph runs as the model has it"
            warnings.warn("\n".join(lines) + kept, DilcompileWarning, stacklevel=3)


def _amended(report: GraphReport, findings: Sequence[tuple[Decision, Finding]], seconds: float) -> GraphReport:
    """The report with what the comparison gave; where one site differs, none of the graph is rewritten any more."""
    by_site = {id(decision.site): finding for decision, finding in findings}
    wrong = any(finding.rel_l2 > decision.check.rel_l2 for decision, finding in findings)
    verdicts: list[Decision | Rejection] = []
    for verdict in report.verdicts:
        finding = by_site.get(id(verdict.site))
        if isinstance(verdict, Rejection):
            verdicts.append(verdict)
        elif finding is not None and finding.rel_l2 > verdict.check.rel_l2:
            verdicts.append(Rejection(verdict.site, verdict.rule, difference(verdict, finding), MISREAD))
        elif wrong:
            reason = "another site of its graph differs from the model, so the graph runs as the model has it"
            verdicts.append(Rejection(verdict.site, verdict.rule, reason, "see that site"))
        elif finding is not None:
            said = f"compared on the first call: {finding}" if finding.runs else f"not compared: it {finding}"
            others = [note for note in verdict.notes if not note.startswith(NOTE)]
            verdicts.append(replace(verdict, notes=(*others, f"{NOTE} {said}")))
        else:
            verdicts.append(verdict)
    return replace(
        report, verdicts=tuple(verdicts), seconds={**report.seconds, "check": seconds + report.seconds.get("check", 0.0)}
    )
