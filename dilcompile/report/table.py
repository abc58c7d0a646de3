"""The report on a terminal, or as plain text of the same layout."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dilcompile.memory.words import table as memory_lines
from dilcompile.report.record import Record
from dilcompile.report.rows import HEADINGS, Row, grouped, rows_of
from dilcompile.report.sections import READING, Section, sections
from dilcompile.report.totals import totals_of

if TYPE_CHECKING:
    from rich.console import RenderableType

# Without a terminal there is no width to ask for.
PLAIN_WIDTH = 160
NARROW = 130
_BETWEEN = 2
_WHOLE_LINES = ("attention", "numbers", "pairs", "FLOPs", "memory")
_STYLES = {"exact": "green", "approximate": "yellow", "unchanged": "dim"}


def text(report: Record) -> str:
    """The report as text: with colours and the terminal's width on a terminal, else plain and ``COLUMNS`` (160) wide."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    width = Console().width if on_terminal else int(os.environ.get("COLUMNS") or PLAIN_WIDTH)
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=on_terminal, highlight=False)
    console.print(*renderables(report, width), sep="\n")
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def renderables(report: Record, width: int) -> Iterator[RenderableType]:
    """The table, what there is to say beside it, and the sums. Where the table has no room, one block a row."""
    from rich.text import Text

    rows = grouped(rows_of(report.verdicts))
    if rows:
        yield Text(f"attention in {_graphs(report)}")
        yield _table(rows, width) if width >= NARROW else _blocks(rows)
    else:
        yield Text(f"no attention was found in {_graphs(report)}\n")
    if not report.graphs:
        yield Text("Dynamo captured nothing of this call: it may be disabled here, or a torch function mode is active\n")
    for section in sections(report, rows):
        yield _section(section)
    if report.memory:
        yield Text("\n".join(["Memory", *(f"  {line}" for line in memory_lines(report.memory))]) + "\n", no_wrap=True)
    yield Text("\n".join(totals_of(report).lines), style="bold")
    if report.decisions:
        yield Text("\n".join(READING), style="dim")


def _graphs(report: Record) -> str:
    number = len(report.graphs)
    return f"{number} graph{'' if number == 1 else 's'} under {report.policy.splitlines()[0]}"


def _table(rows: list[Row], width: int) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=True)
    for heading, columns in zip(HEADINGS, _widths(rows, width), strict=True):
        table.add_column(heading, overflow="fold", width=columns)
    for row in rows:
        table.add_row(*(_cell(heading, lines) for heading, lines in zip(HEADINGS, row.cells, strict=True)))
    return table


def _widths(rows: list[Row], width: int) -> list[int]:
    """The columns' widths. No word is broken where there is room for that, and then no line of the first three.

    Rich by itself takes from every column alike, and cuts numbers.
    """
    lines = [[heading, *(line for row in rows for line in row.cells[index][:3])] for index, heading in enumerate(HEADINGS)]
    whole = [max(map(len, held)) for held in lines]
    found = [
        most if heading in _WHOLE_LINES else max(len(word) for line in held for word in line.split())
        for heading, held, most in zip(HEADINGS, lines, whole, strict=True)
    ]
    room = width - _BETWEEN * len(HEADINGS) - 2
    while sum(found) > room:
        found[found.index(max(found))] -= 1
    while sum(found) < room and found != whole:
        short = [most / now for most, now in zip(whole, found, strict=True)]
        found[short.index(max(short))] += 1
    return found


def _cell(heading: str, lines: tuple[str, ...]) -> RenderableType:
    from rich.text import Text

    cell = Text()
    for index, line in enumerate(lines):
        style = _STYLES.get(line, "") if heading == "numbers" else "dim" if index else ""
        cell.append(("\n" if index else "") + line, style=style)
    return cell


def _blocks(rows: list[Row]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for row in rows:
        for heading, lines in zip(HEADINGS, row.cells, strict=True):
            if lines:
                grid.add_row(heading, Text(", ".join(lines), style=_STYLES.get(lines[0], "")))
        grid.add_row()
    return grid


def _section(section: Section) -> RenderableType:
    from rich.text import Text

    block = Text(f"{section.heading}\n", style="bold")
    for about, said, cure in section.items:
        block.append(f"  {about}" + (f": {said}" if said else "") + (f"\n    -> {cure}" if cure else "") + "\n", style="not bold")
    return block
