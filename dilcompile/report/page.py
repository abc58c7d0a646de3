"""The report as one HTML page that needs nothing else: no scripts, no fonts, no files from elsewhere."""

from __future__ import annotations

import json
from html import escape

from dilcompile.blocks.picture import STYLE as PICTURE_STYLE
from dilcompile.memory.timeline import STYLE as ARENA_STYLE
from dilcompile.report import units
from dilcompile.report.memory import memory_section
from dilcompile.report.patterns import Pattern, patterns_of
from dilcompile.report.record import Record
from dilcompile.report.rows import HEADINGS, Row, grouped, named, rows_of
from dilcompile.report.sections import READING, Section, sections
from dilcompile.report.style import whole
from dilcompile.report.totals import Totals, totals_of


def page(report: Record) -> str:
    """See ``Report.to_html``."""
    rows, totals = rows_of(report.verdicts), totals_of(report)
    title = report.policy.splitlines()[0] if report.policy else "policy"
    body = [
        f"<h1>What happened to every attention</h1><p class=soft>{escape(title)} · {_graphs(report)}</p>",
        _cards(totals),
        _table(rows) if rows else f"<p>No attention was found in {_graphs(report)}.</p>",
        *(_section(section) for section in sections(report, grouped(rows))),
        _patterns(patterns_of(report)),
        *(["<h2>Memory</h2>", memory_section(report.memory)] if report.memory else []),
        _reading(totals),
        _details("Policy", report.policy),
        _details("Seconds of each step, by graph", _seconds(report)),
    ]
    return whole(title, body, PICTURE_STYLE, ARENA_STYLE)


def _graphs(report: Record) -> str:
    number = len(report.graphs)
    return f"{number} graph{'' if number == 1 else 's'}"


def _cards(totals: Totals) -> str:
    cards = [
        (str(totals.sites), "attention sites"),
        (str(totals.rewritten), f"rewritten: {totals.exact} exact, {totals.approximate} approximate"),
        (str(totals.kept + totals.refused), f"as they were: {totals.kept} asked, {totals.refused} refused"),
        (str(totals.misses), "missed"),
    ]
    if totals.flops_before:
        share = totals.flops_after / totals.flops_before
        before, after = units.count(totals.flops_before), units.count(totals.flops_after)
        cards.append((units.percent(share), f"of the attention FLOPs: {before} → {after}"))
    if totals.scores_bytes:
        cards.append((units.size(totals.scores_bytes), "scores of the largest site not held"))
    if totals.mask_bytes:
        cards.append((units.size(totals.mask_bytes), "masks not built, at least"))
    shown = (f"<div class=card><b>{escape(number)}</b>{escape(said)}</div>" for number, said in cards)
    return f"<div class=cards>{''.join(shown)}</div>"


def _table(rows: list[Row]) -> str:
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    body = "\n".join(_row(row) for row in rows)
    return f"<div class=frame><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>"


def _row(row: Row) -> str:
    cells = []
    for heading, lines in zip(HEADINGS, row.cells, strict=True):
        held = _lines(lines)
        if heading == "numbers":
            held = f'<span class="tag {row.numbers}">{escape(row.numbers)}</span>{_lines(lines[1:], first=False)}'
        elif heading == "pairs" and row.costs is not None and lines:
            share = min(1.0, row.costs.density_of_mask)
            bar = f'<div class=bar><i style="width:{100 * share:.1f}%"></i></div>'
            held = f"{escape(lines[0])}{bar}{_lines(lines[1:], first=False)}"
        elif heading == "becomes" and row.reason and not row.asked:
            held = f'<span class="tag refused">{escape(lines[0])}</span>{_lines(lines[1:], first=False)}'
        kind = {"attention": "attention", "becomes": "form", "mask": "mask"}.get(heading, "nowrap")
        cells.append(f'<td class="{kind}">{held}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _lines(lines: tuple[str, ...], first: bool = True) -> str:
    """The first line plain, the others small."""
    large = [escape(line) for line in lines[:1]] if first else []
    return "".join([*large, *(f"<small>{escape(line)}</small>" for line in lines[len(large) :])])


def _section(section: Section) -> str:
    items = []
    for about, said, cure in section.items:
        text = f"<b>{escape(about)}</b> {escape(said)}" if said else escape(about)
        items.append(f"<li>{text}" + (f"<p class='soft cure'>{escape(cure)}</p>" if cure else "") + "</li>")
    return f"<h2>{escape(section.heading)}</h2><div class=frame><ul>{''.join(items)}</ul></div>"


def _patterns(patterns: list[Pattern]) -> str:
    """One figure for each distinct pattern, with the sites that have it."""
    figures = [
        f"<figure><div class=pictures>{''.join(pattern.svgs(f'pattern-{number}'))}</div><figcaption>"
        f"<b>{escape(named(pattern.modules))}</b> <code>{escape(pattern.form)}</code></figcaption></figure>"
        for number, pattern in enumerate(patterns)
    ]
    return f"<h2>Which pairs are computed</h2><div class=patterns>{''.join(figures)}</div>" if figures else ""


def _reading(totals: Totals) -> str:
    lines = [*totals.lines, *(READING if totals.rewritten else ())]
    return "<h2>How to read it</h2>" + "".join(f"<p class=soft>{escape(line)}</p>" for line in lines)


def _seconds(report: Record) -> str:
    rounded = {graph.graph: {step: round(seconds, 4) for step, seconds in graph.seconds.items()} for graph in report.graphs}
    return "\n".join(f"{graph}: {json.dumps(steps)}" for graph, steps in rounded.items())


def _details(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre class=frame>{escape(content)}</pre></details>"
