"""Whole numbers and version numbers as policies write them: ``0-3,30-`` and ``>=9.0``."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from dilcompile.policy.values import Check

Span = tuple[int, float]
Version = tuple[int, int]

COMPARE: dict[str, Callable[[Version, Version], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    "==": operator.eq,
    ">": operator.gt,
    "<": operator.lt,
    "": operator.eq,
}


def spans(value: int | str | tuple[int, ...]) -> tuple[Span, ...]:
    """``"0-3,30-"`` as ``((0, 3), (30, inf))``, sorted and joined where they touch.

    Raises:
        ValueError: if the text isn't numbers and ranges.
    """
    if isinstance(value, int):
        return ((value, value),)
    if isinstance(value, tuple):
        return _joined([(number, float(number)) for number in value])
    found: list[Span] = []
    for part in value.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(-\s*(\d*))?\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} in {value!r} is not a number, 'a-b' or 'a-'")
        first = int(match[1])
        last = float(match[3] or math.inf) if match[2] else float(first)
        if last < first:
            raise ValueError(f"the range {part.strip()!r} ends before it starts")
        found.append((first, last))
    return _joined(found)


def _joined(found: list[Span]) -> tuple[Span, ...]:
    joined: list[Span] = []
    for first, last in sorted(found):
        if joined and first <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], last))
        else:
            joined.append((first, last))
    return tuple(joined)


def within(number: int, value: int | str | tuple[int, ...]) -> bool:
    """Is ``number`` in the ranges?"""
    return any(first <= number <= last for first, last in spans(value))


def covers(wide: int | str | tuple[int, ...], narrow: int | str | tuple[int, ...]) -> bool:
    """Is every number of ``narrow`` in ``wide``?"""
    return all(any(f <= first and last <= la for f, la in spans(wide)) for first, last in spans(narrow))


def comparisons(value: str | float) -> tuple[tuple[str, Version], ...]:
    """``">=8.0,<9"`` as ``((">=", (8, 0)), ("<", (9, 0)))``.

    Raises:
        ValueError: if the text isn't comparisons with versions.
    """
    found = []
    for part in str(value).split(","):
        match = re.fullmatch(r"\s*(>=|<=|==|>|<|)\s*(\d+)(?:\.(\d+))?\s*", part)
        if match is None:
            raise ValueError(f"{part.strip()!r} is not a comparison such as '>=9.0'")
        found.append((match[1], (int(match[2]), int(match[3] or 0))))
    return tuple(found)


def satisfies(version: Version, value: str | float) -> bool:
    """Do all comparisons hold for ``version``?"""
    return all(COMPARE[sign](version, bound) for sign, bound in comparisons(value))


# For editors; what a range or a comparison really is, `spans` and `comparisons` say.
_RANGE, _COMPARISON = r"\s*\d+\s*(-\s*\d*)?\s*", r"\s*(>=|<=|==|>|<)?\s*\d+(\.\d+)?\s*"
RANGES, COMPARISONS = (rf"^{one}(,{one})*$" for one in (_RANGE, _COMPARISON))

Number = Annotated[int, Check("a whole number of at least 0", lambda value: value >= 0), Field(ge=0)]
Ranges = Number | Annotated[str, Check("ranges such as '0-3,30-'", spans), Field(pattern=RANGES)] | tuple[Number, ...]
Comparison = (
    Annotated[str, Check("a comparison such as '>=9.0'", comparisons), Field(pattern=COMPARISONS)]
    | Annotated[float, Check("a version such as 9.0", comparisons)]
)
