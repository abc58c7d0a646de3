"""Module patterns: globs that also match a dotted suffix, and ``re:`` for the rest."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Annotated

from dilcompile.policy.values import Check

Patterns = str | tuple[str, ...]


@lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    if pattern.startswith("re:"):
        return re.compile(pattern.removeprefix("re:"))
    whole = fnmatch.translate(pattern)
    # `self_attn` also means `model.layers.0.self_attn`: any suffix that starts at a dot.
    return re.compile(f"{whole}|{fnmatch.translate('*.' + pattern)}")


def matches(module: str, patterns: Patterns) -> bool:
    """Does the dotted path match any of the patterns as a whole, or, for globs, from one of its dots on?"""
    return any(_compiled(pattern).fullmatch(module) for pattern in listed(patterns))


def listed(patterns: Patterns) -> tuple[str, ...]:
    """One pattern or several, as several."""
    return (patterns,) if isinstance(patterns, str) else patterns


def check_pattern(pattern: str) -> None:
    """
    Raises:
        ValueError: if the pattern can't match what was meant.
    """
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
        return
    if pattern != pattern.strip():
        raise ValueError(f"the glob {pattern!r} starts or ends with a space")
    if re.sub(r"\[!?\]?[^\]]*\]", "", pattern).count("["):
        raise ValueError(f"the glob {pattern!r} has a '[' that is never closed")


def covers(wide: Patterns, narrow: Patterns) -> bool:
    """Is every path that ``narrow`` matches surely matched by ``wide``? False when unsure."""
    return all(any(_covers(one, other) for one in listed(wide)) for other in listed(narrow))


def _covers(wide: str, narrow: str) -> bool:
    if wide in ("*", narrow):
        return True
    if wide.startswith("re:") or narrow.startswith("re:") or re.search(r"[?\[]", wide):
        return False
    # With `*` as its only wildcard, a glob that matches another glob's text matches all that it stands for.
    return matches(narrow, wide)


def nearest(patterns: Patterns, modules: Iterable[str]) -> str | None:
    """The module path most like one of the patterns."""
    paths = list(dict.fromkeys(modules))
    scored = [
        (difflib.SequenceMatcher(None, pattern.replace("*", ""), path).ratio(), -index, path)
        for pattern in listed(patterns)
        for index, path in enumerate(paths)
    ]
    return max(scored)[2] if scored else None


Pattern = Annotated[str, Check("a module pattern", check_pattern)]
