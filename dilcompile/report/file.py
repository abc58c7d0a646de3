"""The report as a file."""

from __future__ import annotations

import os
from pathlib import Path

from dilcompile.errors import DilcompileError

SUFFIXES = (".html", ".json")


def report_path(value: object) -> Path:
    """The path that a user gave for a report.

    Raises:
        DilcompileError: if it is no path, or no report can be written under this name.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise DilcompileError(
            f"options: report must be the path of an .html or .json file, not {value!r}; leave it out for no report"
        )
    path = Path(value)
    check_path(path)
    return path


def check_path(path: Path) -> None:
    """Raise DilcompileError if no report can be written under this name."""
    if path.suffix.lower() not in SUFFIXES:
        raise DilcompileError(f"report: {str(path)!r} ends in {path.suffix or 'no suffix'!r}; name it .html or .json")
    if path.is_dir():
        raise DilcompileError(f"report: {str(path)!r} is a folder; name a file in it")


def replace_file(path: Path, content: str) -> None:
    """Write the whole file in one step: several processes may write one report.

    Raises:
        DilcompileError: if the place can't be written.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(content, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise DilcompileError(f"report: {str(path)!r} can't be written: {error.strerror}; name another place") from error
