"""The nearest right spelling of a word that isn't known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known name that ``word`` most likely means, or None."""
    found = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return found[0] if found else None


def hint(word: object, known: Iterable[str]) -> str:
    """`` (did you mean 'x'?)``, or nothing."""
    near = closest(word, known) if isinstance(word, str) else None
    return f" (did you mean {near!r}?)" if near else ""
