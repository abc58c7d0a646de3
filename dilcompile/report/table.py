"""The report on a terminal, or as plain text of the same layout."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from dilcompile.report.record import Report
from dilcompile.report.rows import HEADINGS, Row, grouped, rows_of
from dilcompile.report.sections import READING, Section, sections
from dilcompile.report.totals import totals_of

if TYPE_CHECKING:
    from rich.console import RenderableType

# Without a terminal there is no width to ask for.
PLAIN_WIDTH = 160
NARROW = 130
_BETWEEN = 3
_WHOLE_LINES = ("attention", "numbers", "pairs", "FLOPs", "memory")
_STYLES = {"exact": "green", "approximate": "yellow", "unchanged": "dim"}


def text(report: Report) -> str:
    """The report as text: with colours and the terminal's width on a terminal, else plain and ``COLUMNS`` (160) wide."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    width = Console().width if on_terminal else int(os.environ.get("COLUMNS") or PLAIN_WIDTH)
    written = io.StringIO()
    console = Console(file=written, width=width, force_terminal=on_terminal, highlight=False)
    console.print(*renderables(report, width), sep="\n")
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines())


def renderables(report: Report, width: int) -> Iterator[RenderableType]:
    """The table, what there is to say beside it, and the sums. Where the table has no room, one block a row."""
    from rich.text import Text

    rows = grouped(rows_of(report.verdicts))
    if rows:
        yield Text(f"attention in {_graphs(report)}")
        yield _table(rows, width) if width >= NARROW else _blocks(rows)
    else:
        yield Text(f"no attention was found in {_graphs(report)}\n")
    for section in sections(report, rows):
        yield _section(section)
    yield Text("\n".join(totals_of(report).lines), style="bold")
    if report.decisions:
        yield Text("\n".join(READING), style="dim")


def _graphs(report: Report) -> str:
    number = len(report.graphs)
    return f"{number} graph{'' if number == 1 else 's'} under {report.policy.splitlines()[0]}"


def _table(rows: list[Row], width: int) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading, least in zip(HEADINGS, _least_widths(rows, width), strict=True):
        table.add_column(heading, overflow="fold", min_width=least)
    for row in rows:
        table.add_row(*(_cell(heading, lines) for heading, lines in zip(HEADINGS, row.cells, strict=True)))
    return table


def _least_widths(rows: list[Row], width: int) -> list[int]:
    """For each column the width at which no word is broken; where that is more than there is, the widest give way."""
    columns = [[line for row in rows for line in row.cells[index]] for index in range(len(HEADINGS))]
    words = [
        lines if heading in _WHOLE_LINES else [word for line in lines for word in line.split()]
        for heading, lines in zip(HEADINGS, columns, strict=True)
    ]
    least = [max((len(word) for word in (heading, *held)), default=1) for heading, held in zip(HEADINGS, words, strict=True)]
    while sum(least) > width - _BETWEEN * len(HEADINGS):
        least[least.index(max(least))] -= 1
    return least


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
