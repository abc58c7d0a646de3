"""One row a site, as text: what the terminal's table and the HTML page both show."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from dilcompile.decision import Decision, Rejection
from dilcompile.report import units
from dilcompile.report.block_counts import block_count
from dilcompile.report.costs import Costs, costs_of, problem_with
from dilcompile.report.kernels import Choice, kernel_of
from dilcompile.report.lengths import shown
from dilcompile.report.orders import orders_of, words
from dilcompile.site import AttentionSite

HEADINGS = ("site", "attention", "mask", "becomes", "numbers", "pairs", "FLOPs", "memory")


@dataclass(frozen=True)
class Row:
    """One site, or several that are alike but for their layer. A cell is one to five lines, the first the most important.

    Args:
        site: module path, source line.
        attention: kind and spelling; sizes; the way of the dtypes; what else the scores go through, where there is any.
        roles: the tensors that are queries, keys, values, biases, sinks, multipliers. Sites that differ in them alone are alike.
        mask: the mask that was read, in words; its formula.
        becomes: the form, or ``kept``; the rule; how many blocks there are, where it has any; what its order of tokens gains.
        numbers: ``exact``, ``approximate`` or ``unchanged``.
        kernel: who computes it (``forward / backward`` where they differ).
        pairs: pairs of the form over those of the mask; over all.
        flops: before -> after.
        memory: bytes of q, k, v and output; what is not built any more.
        notes: what the user should know.
        reason, cure: why a site is kept, and what to change; empty for a rewritten one.
        asked: it is kept because the policy says so.
        costs: of one of the sites.
        count: how many sites.
    """

    site: tuple[str, str]
    attention: tuple[str, ...]
    mask: tuple[str, str]
    becomes: tuple[str, ...]
    numbers: str
    kernel: str
    pairs: tuple[str, str]
    flops: tuple[str, str]
    memory: tuple[str, str]
    notes: tuple[str, ...] = ()
    reason: str = ""
    cure: str = ""
    asked: bool = False
    costs: Costs | None = None
    count: int = 1
    roles: str = field(default="", compare=False)

    @property
    def cells(self) -> tuple[tuple[str, ...], ...]:
        """The lines of every cell, in the order of ``HEADINGS``."""
        held = (
            self.site,
            (*self.attention, self.roles),
            self.mask,
            self.becomes,
            (self.numbers, self.kernel),
            self.pairs,
            self.flops,
            self.memory,
        )
        return tuple(tuple(line for line in cell if line) for cell in held)

    def __str__(self) -> str:
        return " | ".join(", ".join(cell) for cell in self.cells)


def row_of(verdict: Decision | Rejection) -> Row:
    """The row of one site."""
    site = verdict.site
    costs, problem = costs_of(verdict), problem_with(verdict)
    notes = () if problem is None else (f"can't be computed at these sizes: {problem}",)
    mask = (str(site.mask), site.mask.formula if site.mask.words else "")
    common = {
        "site": (site.module or "<top>", "" if site.source == "unknown" else site.source),
        "attention": (f"{site.kind} {site.spelling}", sizes(site), dtypes(site), besides(site)),
        "roles": roles(site),
        "mask": mask,
        "costs": costs,
    }
    if isinstance(verdict, Rejection):
        return Row(
            **common,  # type: ignore[arg-type]
            becomes=("kept" if verdict.asked else "kept: refused", _rule(verdict.rule)),
            kernel="by the model",
            numbers="unchanged",
            pairs=("", ""),
            flops=("", "") if costs is None else (units.count(costs.flops_before), ""),
            memory=("", "") if costs is None else (units.size(costs.operand_bytes), ""),
            reason=verdict.reason,
            cure=verdict.cure,
            asked=verdict.asked,
        )
    choice, count, orders = kernel_of(verdict), block_count(verdict), orders_of(verdict.form)
    if choice.reason is not None and problem is None:
        notes = (*notes, f"no kernel is named: {choice.reason}")
    if choice.passed_over is not None:
        notes = (*notes, choice.passed_over)
    notes = (*notes, *choice.remarks)
    return Row(
        **common,  # type: ignore[arg-type]
        becomes=(str(verdict.form), _rule(verdict.rule), "" if count is None else str(count), words(orders), _placed(verdict)),
        kernel=_by(choice),
        numbers=verdict.fidelity,
        pairs=_pairs(costs),
        flops=("", "") if costs is None else (units.count(costs.flops_before), f"-> {units.count(costs.flops_after)}"),
        memory=_memory(costs),
        notes=(*notes, *_why_placed(verdict), *verdict.notes),
    )


def _placed(decision: Decision) -> str:
    return "" if decision.placement is None else str(decision.placement)


def _why_placed(decision: Decision) -> tuple[str, ...]:
    placement = decision.placement
    return () if placement is None else (f"placement {placement.method}: {placement.why}; lengths and sums are of all ranks",)


def _by(choice: Choice) -> str:
    if choice.forward is None:
        return "by a kernel not known"
    differs = choice.backward is not None and choice.backward != choice.forward
    return f"by {choice.forward}" + (f" / {choice.backward}" if differs else "")


def _rule(label: str | None) -> str:
    """The rule's name; its file and line are in the JSON."""
    return "" if label is None else f"rule {label.partition(' (')[0]}"


def rows_of(verdicts: Iterable[Decision | Rejection]) -> list[Row]:
    """One row a site, in graph order."""
    return [row_of(verdict) for verdict in verdicts]


def sizes(site: AttentionSite) -> str:
    """``B 1  H 9/3  S 4096  D 64``: batch, heads (query/key), lengths (query x key), head size (q, k x v)."""
    heads = str(site.heads) if site.group == 1 else f"{site.heads}/{site.kv_heads}"
    q_len, k_len = shown(site.q_len), shown(site.k_len)
    length = q_len if q_len == k_len else f"{q_len} x {k_len}"
    dim = str(site.head_dim) if site.v_dim == site.head_dim else f"{site.head_dim} x {site.v_dim}"
    return f"B {shown(site.batch)}  H {heads}  S {length}  D {dim}"


def dtypes(site: AttentionSite) -> str:
    """``bfloat16``, or ``bfloat16, softmax in float32`` where the model goes through another type."""
    own, softmax = (str(dtype).removeprefix("torch.") for dtype in (site.dtype, site.softmax_dtype))
    return own if own == softmax or site.spelling == "sdpa" else f"{own}, softmax in {softmax}"


def roles(site: AttentionSite) -> str:
    """The tensors of the graph by what they are: ``q view_1 [2, 4, 48, 16], k ..., v ..., bias ...``."""
    biases = (("bias", bias.tensor) for bias in site.bias)
    named = [*zip("qkv", site.operands, strict=False), *biases, ("sinks", site.sinks), ("multipliers", site.multipliers)]
    return ", ".join(f"{role} {held}" for role, held in named if held is not None)


def besides(site: AttentionSite) -> str:
    """A scale of its own, tensors beside it, soft cap, bias, sinks, dropout; empty if there is none."""
    scale = "" if math.isclose(site.scale, site.head_dim**-0.5, rel_tol=1e-6) else f"scale {site.scale:.6g}"
    multipliers = "" if site.multipliers is None else "multipliers"
    softcap = "" if site.softcap is None else f"soft cap {site.softcap:g}"
    bias = " + ".join(f"bias {bias}" for bias in site.bias)
    sinks = "" if site.sinks is None else "sinks"
    dropout = f"dropout {site.dropout_p:g}" if site.dropout_p else ""
    return ", ".join(part for part in (scale, multipliers, softcap, bias, sinks, dropout) if part)


def _pairs(costs: Costs | None) -> tuple[str, str]:
    if costs is None:
        return ("", "")
    most = "at most " if costs.is_bound else ""
    return (f"{most}{units.percent(costs.density_of_mask)} of mask", f"{most}{units.percent(costs.density_of_all)} of all")


def _memory(costs: Costs | None) -> tuple[str, str]:
    if costs is None:
        return ("", "")
    avoided = costs.scores_bytes + costs.mask_bytes
    return (units.size(costs.operand_bytes), f"not {units.size(avoided)}" if avoided else "")


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def grouped(rows: Sequence[Row]) -> list[Row]:
    """Rows that differ only in one number of their module path become one, in the order of the first of each.

    ``layers.0.attn``, ``layers.1.attn``, ``layers.4.attn`` become ``layers.{0-1,4}.attn``. No site is left out.
    """
    alike: dict[Row, list[Row]] = {}
    for row in rows:
        key = replace(row, site=(_NUMBER.sub("#", row.site[0], count=1), row.site[1]))
        alike.setdefault(key, []).append(row)
    return [_merged(found) for found in alike.values()]


def _merged(rows: list[Row]) -> Row:
    first = rows[0]
    if len(rows) == 1:
        return first
    module = _together([row.site[0] for row in rows])
    source = ", ".join(part for part in (first.site[1], f"{len(rows)} sites") if part)
    return replace(first, site=(module, source), count=len(rows))


def _together(modules: list[str]) -> str:
    """Modules that differ in their first number alone, as one name."""
    numbers = [int(match.group()) for module in modules if (match := _NUMBER.search(module))]
    if len(set(numbers)) < 2:
        return modules[0]
    return _NUMBER.sub("{" + ranges(numbers) + "}", modules[0], count=1)


def named(modules: Iterable[str]) -> str:
    """Any modules in one line: ``layers.{0-3}.attn, encoder.attn``."""
    alike: dict[str, list[str]] = {}
    for module in modules:
        alike.setdefault(_NUMBER.sub("#", module, count=1), []).append(module)
    return ", ".join(map(_together, alike.values()))


def ranges(numbers: Iterable[int]) -> str:
    """``0-2,5`` for 0, 1, 2, 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
