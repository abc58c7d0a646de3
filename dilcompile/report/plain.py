"""The report as plain JSON values. The keys are part of the public surface: ``VERSION`` counts their changes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dilcompile.blocks.cells import BlockCount
from dilcompile.decision import Decision, Rejection
from dilcompile.memory.budget import BudgetReport
from dilcompile.placements.choice import PlacementChoice
from dilcompile.report.block_counts import block_count
from dilcompile.report.costs import Costs, costs_of, problem_with
from dilcompile.report.kernels import Choice, kernel_of
from dilcompile.report.lengths import hint, symbol
from dilcompile.report.patterns import Pattern, patterns_of
from dilcompile.report.record import GraphReport, Record
from dilcompile.report.totals import totals_of
from dilcompile.site import AttentionSite, MaskSpec, Miss

SCHEMA = "dilcompile.report"
VERSION = 8


def plain(report: Record) -> dict[str, Any]:
    """See ``Report.to_dict``."""
    totals = totals_of(report)
    return {
        "schema": SCHEMA,
        "version": VERSION,
        "policy": report.policy,
        "graphs": [_graph(graph) for graph in report.graphs],
        "patterns": [_pattern(pattern) for pattern in patterns_of(report)],
        "unused_rules": list(report.unused_rules),
        "totals": {key: getattr(totals, key) for key in totals.__dataclass_fields__},
    }


def _graph(graph: GraphReport) -> dict[str, Any]:
    return {
        "graph": graph.graph,
        "sites": [_verdict(verdict) for verdict in graph.verdicts],
        "misses": [_miss(miss) for miss in graph.misses],
        "notes": list(graph.notes),
        "seconds": dict(graph.seconds),
        "budget": _budget(graph.budget),
        "memory": [memory.to_dict() for memory in graph.memory],
    }


def _budget(budget: BudgetReport | None) -> dict[str, Any] | None:
    """How budgets are kept: ``tried`` are the rungs in order, ``taken`` the last of them or the best. Sizes in bytes."""
    if budget is None:
        return None
    bounds = [
        {"source": b.source, "most": b.most, "modules": None if b.modules is None else sorted(b.modules)} for b in budget.bounds
    ]
    rungs = [{"name": rung.name, **asdict(rung), "bounded": list(rung.bounded)} for rung in budget.tried]
    return {"bounds": bounds, "tried": rungs, "taken": budget.taken.name, "is_upper_bound": budget.is_bound}


def _verdict(verdict: Decision | Rejection) -> dict[str, Any]:
    costs = costs_of(verdict)
    return {
        **_site(verdict.site),
        **(_decision(verdict) if isinstance(verdict, Decision) else _rejection(verdict)),
        "costs": None if costs is None else _costs(costs),
        "blocks": _blocks(block_count(verdict)),
    }


def _decision(decision: Decision) -> dict[str, Any]:
    choice, problem = kernel_of(decision), problem_with(decision)
    return {
        "verdict": "rewritten",
        "rule": decision.rule,
        "form": str(decision.form),
        "fidelity": decision.fidelity,
        "placement": _placement(decision.placement),
        **_kernel(choice, decision.kernel),
        "reason": problem,
        "cure": None,
        "notes": list(decision.notes),
    }


def _rejection(rejection: Rejection) -> dict[str, Any]:
    return {
        "verdict": "kept" if rejection.asked else "refused",
        "rule": rejection.rule,
        "form": None,
        "fidelity": None,
        "placement": None,
        **_kernel(Choice(None), None),
        "reason": rejection.reason,
        "cure": rejection.cure or None,
        "notes": [],
    }


def _placement(placement: PlacementChoice | None) -> dict[str, Any] | None:
    """How ranks hold the sequence: the site's lengths and costs are then those of all of them."""
    return None if placement is None else {key: getattr(placement, key) for key in placement.__dataclass_fields__}


def _kernel(choice: Choice, asked: str | None) -> dict[str, Any]:
    return {
        "kernel": choice.forward,
        "kernel_backward": choice.backward,
        "kernel_asked": asked,
        "kernel_reason": choice.reason,
        "kernel_passed_over": choice.passed_over,
        "kernel_remarks": list(choice.remarks),
    }


def _site(site: AttentionSite) -> dict[str, Any]:
    """Lengths are those of the example call; ``symbols`` names the ones that are not fixed."""
    lengths = {"batch": site.batch, "q_len": site.q_len, "k_len": site.k_len}
    return {
        "index": site.index,
        "module": site.module,
        "source": site.source,
        "spelling": site.spelling,
        "kind": site.kind,
        "phase": site.phase,
        "layer": site.layer,
        "layer_type": site.layer_type,
        **{name: hint(length) for name, length in lengths.items()},
        "symbols": {name: held for name, length in lengths.items() if (held := symbol(length)) is not None},
        "heads": site.heads,
        "kv_heads": site.kv_heads,
        "head_dim": site.head_dim,
        "v_dim": site.v_dim,
        "dtype": str(site.dtype).removeprefix("torch."),
        "softmax_dtype": str(site.softmax_dtype).removeprefix("torch."),
        "device": str(site.device),
        "scale": site.scale,
        "softcap": site.softcap,
        "dropout_p": site.dropout_p,
        "bias": [{"word": bias.word, "tensor": bias.tensor, "slopes": list(bias.slopes)} for bias in site.bias],
        "sinks": site.sinks,
        "multipliers": site.multipliers,
        "operands": dict(zip(("q", "k", "v"), site.operands, strict=False)),
        "mask": _mask(site.mask),
    }


def _mask(mask: MaskSpec) -> dict[str, Any]:
    return {
        "words": list(mask.words),
        "text": str(mask),
        "formula": mask.formula,
        "left": mask.left,
        "right": mask.right,
        "q_offset": hint(mask.q_offset),
        "unread": mask.unread,
        "empty_rows": mask.empty_rows,
    }


def _costs(costs: Costs) -> dict[str, Any]:
    counted = {key: getattr(costs, key) for key in costs.__dataclass_fields__}
    return {**counted, "density_of_mask": costs.density_of_mask, "density_of_all": costs.density_of_all}


def _blocks(count: BlockCount | None) -> dict[str, int] | None:
    """Of one batch row, and of one head where all have the same blocks."""
    if count is None:
        return None
    return {**{key: getattr(count, key) for key in count.__dataclass_fields__}, "empty": count.empty}


def _pattern(pattern: Pattern) -> dict[str, Any]:
    """One distinct pattern; ``unseen``: factors of the mask that depend on data and are not counted.

    ``orders``: the blocks of its neighbourhood by its order of tokens, then by rows.
    """
    return {
        "form": pattern.form,
        "lengths": pattern.lengths,
        "sites": [
            {"graph": graph, "index": index, "module": module}
            for (graph, index), module in zip(pattern.sites, pattern.modules, strict=True)
        ],
        "density_of_mask": pattern.density_of_mask,
        "density_of_all": pattern.density_of_all,
        "is_bound": pattern.is_bound,
        "blocks": _blocks(pattern.count),
        "unseen": list(pattern.unseen),
        "orders": [{**asdict(order), "radius": list(order.radius)} for order in pattern.orders],
    }


def _miss(miss: Miss) -> dict[str, Any]:
    return {key: getattr(miss, key) for key in miss.__dataclass_fields__}
