"""What a kernel is made of, as a short text that changes with it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

_HERE = Path(__file__).parent
_LENGTH = 16


@lru_cache(maxsize=16)
def of_files(*names: str) -> str:
    """The digest of these files and folders' Python files, named as they lie in this folder."""
    whole = hashlib.sha256()
    for name in names:
        path = _HERE / name
        for file in sorted(path.glob("*.py")) if path.is_dir() else [path]:
            whole.update(file.read_bytes())
    return whole.hexdigest()[:_LENGTH]


def of_text(text: str) -> str:
    """The digest of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:_LENGTH]
