"""Rules that name modules hold for the modules that they name, though torch.compile lets several share one compiled frame."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dilcompile.decision import Rejection
from dilcompile.passes.graph.frames import Frame
from dilcompile.passes.graph.provenance import layer_index
from dilcompile.policy import Policy, rule_of
from dilcompile.report import Verdict
from dilcompile.site import AttentionSite


def apart(policy: Policy, frame: Frame, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The verdicts, if they hold for every module that will run the frame; Dynamo is told to compile it anew for each if not.

    Where the frame doesn't tell its module, sites that other modules need decided otherwise are left as they are.
    """
    others = [_serves_otherwise(policy, verdict.site, frame) for verdict in verdicts]
    if not any(others) or frame.hold():
        return list(verdicts)
    return [_shared(verdict, other) if other else verdict for verdict, other in zip(verdicts, others, strict=True)]


def _serves_otherwise(policy: Policy, site: AttentionSite, frame: Frame) -> str:
    """A module that runs the frame too, and for which another rule takes the site; empty if there is none."""
    own = rule_of(policy, site)
    return next((path for path in frame.others if rule_of(policy, _moved(site, frame.prefix, path)) is not own), "")


def _shared(verdict: Verdict, other: str) -> Rejection:
    reason = f"after a graph break its frame serves {other!r} too, which the policy decides by another rule"
    return Rejection(verdict.site, verdict.rule, reason, "take the graph break away, or let one rule decide both")


def _moved(site: AttentionSite, prefix: str, other: str) -> AttentionSite:
    module = other + site.module.removeprefix(prefix)
    return replace(site, module=module, layer=layer_index(module))
