"""What was found out once, as files for other processes: one a subject, named by it, written whole or not at all."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from dilcompile.lowering import digest


def folder(kind: str) -> Path:
    """Where the files lie: beside what torch compiles, so that ``TORCHINDUCTOR_CACHE_DIR`` moves them too.

    Raises:
        OSError: if torch's folder is not there and can't be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir()) / "dilcompile" / kind


def read(place: Path, about: dict[str, str]) -> dict[str, Any] | None:
    """What is held about exactly this, or None if there is no file of that content."""
    try:
        held = json.loads(_path(place, about).read_text())
    except (OSError, ValueError):
        # A file cut short or of another origin says nothing: its subject is looked into again, and a file replaces this one.
        return None
    return held if isinstance(held, dict) and held.get("about") == about else None


def write(place: Path, about: dict[str, str], **held: Any) -> None:
    """Keep it.

    Raises:
        OSError: if the folder can't be written.
    """
    path = _path(place, about)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump({"about": about, **held}, file, indent=1)
        # Processes that write at once each replace the whole file.
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise


def _path(place: Path, about: dict[str, str]) -> Path:
    return place / f"{digest.of_text(json.dumps(about, sort_keys=True))}.json"
