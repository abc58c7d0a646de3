"""The report that ``explain`` returns and the backend writes: the record with its text, JSON and HTML."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dilcompile.report.file import check_path, replace_file
from dilcompile.report.page import page
from dilcompile.report.patterns import Pattern, patterns_of
from dilcompile.report.plain import plain
from dilcompile.report.record import Record

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult


@dataclass(frozen=True)
class Report(Record):
    """All graphs of one model under one policy.

    ``print(report)`` gives the table, in colour on a terminal; sites that are alike share a row there. ``to_dict`` and ``write``
    list every site.
    """

    def __str__(self) -> str:
        from dilcompile.report.table import text  # rich is imported only where something is shown

        return text(self)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        from dilcompile.report.table import renderables

        return renderables(self, options.max_width)

    @property
    def patterns(self) -> list[Pattern]:
        """Which pairs are computed, one for each distinct pattern with the sites that have it; ``print`` one for its picture."""
        return patterns_of(self)

    def to_dict(self) -> dict[str, object]:
        """The report as plain JSON values; ``version`` counts changes of the keys (see ``dilcompile.report.plain``)."""
        return plain(self)

    def to_html(self) -> str:
        """One self-contained HTML page: no scripts, no files from elsewhere."""
        return page(self)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the report to ``path``; missing folders are made, an old file is replaced in one step.

        Args:
            path: ``.html`` or ``.json``.

        Raises:
            DilcompileError: for another suffix, or a path that can't be written.
        """
        target = Path(path)
        check_path(target)
        html = target.suffix.lower() == ".html"
        replace_file(target, self.to_html() if html else json.dumps(self.to_dict(), indent=2) + "\n")
