"""The report on a terminal, or as plain text of the same layout."""

from __future__ import annotations

import io
import os
import sys
from typing import TYPE_CHECKING

from dilcompile.report.record import Report
from dilcompile.report.rows import HEADINGS, Row, grouped, rows_of
from dilcompile.report.sections import READING, Section, sections
from dilcompile.report.totals import totals_of

if TYPE_CHECKING:
    from rich.console import RenderableType

# Without a terminal there is no width to ask for.
PLAIN_WIDTH = 160
NARROW = 110
WIDEST = 34
_WHOLE_LINES = ("attention", "numbers", "pairs", "FLOPs", "memory")
_STYLES = {"exact": "green", "approximate": "yellow", "unchanged": "dim"}


def text(report: Report) -> str:
    """The report as text: with colours and the terminal's width on a terminal, else plain and ``COLUMNS`` (160) wide."""
    from rich.console import Console

    on_terminal = sys.stdout.isatty()
    width = None if on_terminal else int(os.environ.get("COLUMNS") or PLAIN_WIDTH)
    console = Console(file=io.StringIO(), width=width, force_terminal=on_terminal, highlight=False)
    if on_terminal:
        console.width = Console().width
    console.print(renderable(report, narrow=console.width < NARROW))
    written = console.file.getvalue()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in written.splitlines())


def renderable(report: Report, narrow: bool = False) -> RenderableType:
    """The table, what there is to say beside it, and the sums. ``narrow``: one block a row in place of the table."""
    from rich.console import Group
    from rich.text import Text

    rows = grouped(rows_of(report.verdicts))
    parts: list[RenderableType] = []
    if rows:
        parts.append(_blocks(rows) if narrow else _table(report, rows))
    else:
        parts.append(Text(f"no attention was found in {_graphs(report)}"))
    parts += [_section(section) for section in sections(report, rows)]
    parts.append(Text("\n".join(totals_of(report).lines), style="bold"))
    if report.decisions:
        parts.append(Text("\n".join(READING), style="dim"))
    return Group(*parts)


def _graphs(report: Report) -> str:
    number = len(report.graphs)
    return f"{number} graph{'' if number == 1 else 's'} under {report.policy.splitlines()[0]}"


def _table(report: Report, rows: list[Row]) -> RenderableType:
    from rich import box
    from rich.table import Table

    table = Table(
        title=f"attention in {_graphs(report)}", box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False, collapse_padding=True
    )
    for heading in HEADINGS:
        table.add_column(heading, overflow="fold", min_width=_least(heading, rows))
    for row in rows:
        table.add_row(*(_cell(heading, lines) for heading, lines in zip(HEADINGS, row.cells, strict=True)))
    return table


def _least(heading: str, rows: list[Row]) -> int:
    """A width at which the column's longest word is not broken, but for words that no table has room for."""
    index = HEADINGS.index(heading)
    lines = [line for row in rows for line in row.cells[index]]
    words = lines if heading in _WHOLE_LINES else [word for line in lines for word in line.split()]
    return min(max((len(word) for word in words), default=1), WIDEST)


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
