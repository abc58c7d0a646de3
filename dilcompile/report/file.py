"""The report as a file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from dilcompile.errors import DilcompileError

if TYPE_CHECKING:
    from dilcompile.report.record import Report

SUFFIXES = (".html", ".json")


def check_path(path: Path) -> None:
    """Raise DilcompileError if no report can be written under this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise DilcompileError(f"report: {str(path)!r} ends in {path.suffix or 'no suffix'!r}; name it .html or .json")
    if path.is_dir():
        raise DilcompileError(f"report: {str(path)!r} is a folder; name a file in it")


def write(report: Report, path: Path) -> None:
    """See ``Report.write``."""
    check_path(path)
    html = path.suffix.lower() == ".html"
    content = report.to_html() if html else json.dumps(report.to_dict(), indent=2) + "\n"
    # Several processes may write one report; each replaces it whole.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise DilcompileError(f"report: {str(path)!r} can't be written: {error.strerror}; name another place") from error
