"""Lengths that may be symbolic, as numbers for counting and as text for people. Nothing here adds a guard."""

from __future__ import annotations

from dataclasses import replace

from dilcompile.decision import Decision
from dilcompile.policy.place import whole_site
from dilcompile.relation import Problem
from dilcompile.report.record import GraphReport, Verdict
from dilcompile.site import AttentionSite, Length


def hint(length: Length) -> int | None:
    """The length, for a symbol its value in the example call; None where there is none."""
    if isinstance(length, int):
        return length
    held = length.node.hint
    return held if isinstance(held, int) else None


def shown(length: Length) -> str:
    """``4096``, or ``s27=4096`` for a symbol."""
    if isinstance(length, int):
        return str(length)
    held = hint(length)
    return str(length) if held is None or str(held) == str(length) else f"{length}={held}"


def symbol(length: Length) -> str | None:
    """The symbol's text, or None for a plain number."""
    return None if isinstance(length, int) or str(hint(length)) == str(length) else str(length)


def problem_of(site: AttentionSite) -> Problem | None:
    """The site's sizes as plain numbers; None if one of them is not known before the model runs."""
    batch, q_len, k_len, offset = (hint(length) for length in (site.batch, site.q_len, site.k_len, site.mask.q_offset))
    if batch is None or q_len is None or k_len is None or offset is None:
        return None
    return Problem(
        batch=batch,
        heads=site.heads,
        kv_heads=site.kv_heads,
        q_len=q_len,
        k_len=k_len,
        head_dim=site.head_dim,
        v_dim=site.v_dim,
        q_offset=offset,
        is_causal=site.mask.causal,
        window_left=site.mask.left,
        window_right=site.mask.right,
    )


def of_whole_sequences(graph: GraphReport) -> GraphReport:
    """The report with the lengths of the whole sequence where a rank has a shard of it."""
    return replace(graph, verdicts=tuple(map(_whole, graph.verdicts)))


def _whole(verdict: Verdict) -> Verdict:
    if not isinstance(verdict, Decision) or verdict.placement is None:
        return verdict
    placement = verdict.placement
    return replace(verdict, site=whole_site(verdict.site, placement.ranks * placement.heads_ranks, placement.method))
