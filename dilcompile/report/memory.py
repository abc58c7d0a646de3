"""The memory of a model's graphs as a part of a page: the table, what happened when they ran, and a picture of each arena."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape

from dilcompile.memory.account import GraphMemory
from dilcompile.memory.timeline import STYLE, svg
from dilcompile.memory.words import HEADINGS, READING, cells, largest_lines, ran
from dilcompile.report.style import whole

_LARGEST = 5


def memory_page(graphs: Sequence[GraphMemory], title: str, ladders: str = "") -> str:
    """A page of its own.

    Args:
        ladders: how budgets are kept, in words.
    """
    budgets = f"<h2>Budgets</h2><pre class=frame>{escape(ladders)}</pre>" if ladders else ""
    return whole(title, [f"<h1>Memory</h1><p class=soft>{escape(title)}</p>", budgets, memory_section(graphs)], STYLE)


def memory_section(graphs: Sequence[GraphMemory]) -> str:
    """The part of a page below its heading; empty where nothing is planned."""
    if not graphs:
        return ""
    head = "".join(f"<th>{heading}</th>" for heading in HEADINGS)
    rows = "\n".join(f"<tr>{''.join(f'<td class=nowrap>{escape(cell)}</td>' for cell in cells(graph))}</tr>" for graph in graphs)
    parts = [
        f'<div class=frame><table class="memory">\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>',
        *(f"<p><b>{escape(graph.name)}</b> {escape(ran(graph))}</p>" for graph in graphs if graph.runs is not None),
        f"<div class=patterns>{''.join(_figures(graphs))}</div>",
        *(f"<p class=soft>{escape(line)}</p>" for line in READING),
    ]
    return "\n".join(parts)


def _figures(graphs: Sequence[GraphMemory]) -> Iterator[str]:
    for number, graph in enumerate(graphs):
        for place, arena in enumerate(graph.plan.arenas):
            whose = f"{graph.name}: {arena.device}, {arena.lane}" + (f", {arena.module}" if arena.module else "")
            yield f"<figure>{svg(arena, whose, f'arena-{number}-{place}')}</figure>"
        if graph.buffers:
            head, lines = f"{graph.name}: the largest buffers", "\n".join(largest_lines(graph, _LARGEST))
            yield f"<details><summary>{escape(head)}</summary><pre class=frame>{escape(lines)}</pre></details>"
