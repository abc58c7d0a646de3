"""`--html FILE`: the page that a command writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dilcompile.errors import DilcompileError

if TYPE_CHECKING:
    from pathlib import Path


def check_page(html: Path | None) -> None:
    """Before anything is computed: can the page be written there? None: there is to be none.

    Raises:
        DilcompileError: if it can't, or is not named .html.
    """
    from dilcompile.report.file import check_path

    if html is None:
        return
    check_path(html)
    if html.suffix.lower() != ".html":
        raise DilcompileError(f"--html {html}: name it .html; --json prints the JSON")
