"""Check one value against its key's annotation: a bool is no number, nor is NaN, and no list is empty."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import Field

from dilcompile.near import hint
from dilcompile.policy.problems import Misfit, raise_all


@dataclass(frozen=True)
class Check:
    """A finer check than the type, as metadata of ``Annotated``.

    Args:
        words: what is expected, for people ("ranges such as '0-3,30-'").
        holds: returns normally if the value is fine; raises ValueError with the reason, or returns False.
    """

    words: str
    holds: Callable[[Any], object]


WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}

# `Field` is for the JSON schema only; `conform` asks the checks.
Count = Annotated[int, Check("a whole number of at least 1", lambda value: value >= 1), Field(ge=1)]
Positive = Annotated[float, Check("a number above 0", lambda value: value > 0), Field(gt=0)]


def conform(kind: Any, value: object) -> Any:
    """``value`` as the annotation ``kind`` says: lists become tuples, nothing else changes.

    Raises:
        Misfit: says what was expected and what came.
    """
    origin = get_origin(kind)
    if origin is Annotated:
        return _conform_checked(kind, value)
    if origin is Literal:
        return _conform_literal(kind, value)
    if origin in (Union, types.UnionType):
        return _conform_union(kind, value)
    if origin is tuple:
        return _conform_list(kind, value)
    if origin is dict:
        # What stands in it is the form's own business.
        if isinstance(value, dict):
            return value
        raise Misfit(f"expected {expected(kind)}, got {shown(value)}")
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise Misfit(f"expected a finite number, got {value}", near=True)
        return value
    if kind is str and value == "":
        raise Misfit("expected text, got an empty text", near=True)
    if kind in (int, str, bool, types.NoneType) and type(value) is kind:
        return value
    assert kind in (int, float, str, bool, types.NoneType), f"policy values can't be of type {kind!r}"
    raise Misfit(f"expected {expected(kind)}, got {shown(value)}")


def _conform_checked(kind: Any, value: object) -> Any:
    inner, *checks = get_args(kind)
    named = [check for check in checks if isinstance(check, Check)]
    try:
        value = conform(inner, value)
    except Misfit as misfit:
        if misfit.near or not named:
            raise
        raise Misfit(f"expected {named[0].words}, got {shown(value)}") from None
    for check in named:
        try:
            verdict = check.holds(value)
        except ValueError as reason:
            raise Misfit(str(reason), near=True) from None
        if verdict is False:
            raise Misfit(f"expected {check.words}, got {shown(value)}", near=True)
    return value


def _conform_literal(kind: Any, value: object) -> Any:
    known = get_args(kind)
    for name in known:
        if type(value) is type(name) and value == name:
            return name
    near = hint(value, [name for name in known if isinstance(name, str)])
    raise Misfit(f"expected {expected(kind)}, got {shown(value)}{near}")


def _conform_union(kind: Any, value: object) -> Any:
    misfits: list[Misfit] = []
    for member in get_args(kind):
        try:
            return conform(member, value)
        except Misfit as misfit:
            misfits.append(misfit)
    for found in misfits:
        if found.near:
            raise found
    names = [name for member in get_args(kind) for name in _names(member)]
    raise Misfit(f"expected {expected(kind)}, got {shown(value)}{hint(value, names)}")


def _conform_list(kind: Any, value: object) -> Any:
    item, *rest = get_args(kind)
    assert rest == [...], f"policy lists are tuple[T, ...], not {kind!r}"
    if not isinstance(value, (list, tuple)):
        raise Misfit(f"expected {expected(kind)}, got {shown(value)}")
    if not value:
        raise Misfit(f"expected {expected(kind)}, got an empty list", near=True)
    held, found = [], []
    for index, entry in enumerate(value):
        try:
            held.append(conform(item, entry))
        except Misfit as misfit:
            found += [Misfit(str(part), (index, *part.path)) for part in misfit.parts]
    raise_all(found)
    return tuple(held)


def _names(kind: Any) -> tuple[str, ...]:
    return tuple(n for n in get_args(kind) if isinstance(n, str)) if get_origin(kind) is Literal else ()


def expected(kind: Any) -> str:
    """The annotation in words: "a whole number, 'seq' or 'auto'"."""
    origin = get_origin(kind)
    if origin is Annotated:
        checks = [check.words for check in get_args(kind)[1:] if isinstance(check, Check)]
        return checks[0] if checks else expected(get_args(kind)[0])
    if origin is Literal:
        return _either([repr(name) for name in get_args(kind)])
    if origin in (Union, types.UnionType):
        return _either(_expected_members(kind))
    if origin is tuple:
        return f"a list (each entry {expected(get_args(kind)[0])})"
    if origin is dict:
        return "a mapping"
    return WORDS.get(kind, "nothing")


def _expected_members(kind: Any) -> list[str]:
    parts: list[str] = []
    for member in get_args(kind):
        if member is types.NoneType:
            continue
        if get_origin(member) is Literal:
            parts += [repr(name) for name in get_args(member)]
        elif get_origin(member) is tuple and parts and expected(get_args(member)[0]) == _either(parts):
            parts.append("a list of them")
        else:
            parts.append(expected(member))
    return parts


def _either(parts: list[str]) -> str:
    unique = list(dict.fromkeys(parts))
    return " or ".join([", ".join(unique[:-1]), unique[-1]]) if len(unique) > 1 else unique[0]


def written(value: object) -> str:
    """A value as YAML on one line; text always quoted."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(written, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(entry)}' for key, entry in value.items())}}}"
    return repr(value)


def shown(value: object) -> str:
    """A value as the user wrote it, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
