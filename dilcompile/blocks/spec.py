"""Patterns as users write them, ``{any: [{local: {before: 3}}, {global: {columns: 1}}]}``: read, checked, written back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

from dilcompile.blocks.adaptive import ESTIMATORS, Given, Scored, is_adaptive
from dilcompile.blocks.composed import AllOf, AnyOf, PerHead
from dilcompile.blocks.curve import Curve
from dilcompile.blocks.patterns import (
    Document,
    Explicit,
    Fixed,
    Global,
    Hierarchical,
    Local,
    Near,
    Pattern,
    Random,
    Strided,
    VerticalSlash,
)
from dilcompile.errors import OptionProblem, Place
from dilcompile.near import hint

# (name, options): hashable, and ``plain`` gives the mapping back.
Spec = tuple[str, tuple[Any, ...]]


@dataclass(frozen=True)
class _Kind:
    """A named pattern.

    Args:
        options: the least value of each whole-number option; for a list of them ``[least]``, for either ``(least, [least])``;
            ``bool`` for a truth, ``float`` for a share, a tuple of words for one of them.
        required: those without a default.
        build: the pattern of the options that are given.
        wrong: what is wrong with options that are right one by one, or None.
        on_grid: ``build`` takes the curve of the tokens, too.
    """

    options: dict[str, Any]
    required: tuple[str, ...]
    build: Callable[..., Pattern]
    wrong: Callable[..., str | None] = lambda **given: None
    on_grid: bool = False


def _bigbird(local: int = 1, columns: int = 1, rows: int = 1, random: int = 3, seed: int = 0) -> Pattern:
    return AnyOf((Local(local, local), Global(columns, rows), Random(random, seed)))


def _longformer(local: int = 1, columns: int = 1, rows: int = 1) -> Pattern:
    return AnyOf((Local(local, local), Global(columns, rows)))


def _random(blocks: int, seed: int = 0, by_head: bool = False) -> Pattern:
    return Random(blocks, seed, by_head)


def _mass(estimator: str, mass: float, most: int) -> Pattern:
    return Scored(estimator, most, mass)


def _near(radius: int | tuple[int, ...], curve: Curve) -> Pattern:
    return Near(radius if isinstance(radius, tuple) else (radius,) * len(curve.grid), curve)


def _not_nested(spans: tuple[int, ...], heads: tuple[int, ...] = ()) -> str | None:
    if any(wide % narrow for narrow, wide in pairwise(spans)) or not spans:
        return f"spans {list(spans)} must be a list in which each is a multiple of the one before"
    if len(heads) > len(spans):
        return f"heads has {len(heads)} entries but spans has {len(spans)}; at most one head a span"
    return None


def _not_rows(starts: tuple[int, ...], columns: tuple[int, ...]) -> str | None:
    rising = all(one <= other for one, other in pairwise(starts))
    if not starts or starts[0] != 0 or starts[-1] != len(columns) or not rising:
        return f"starts must rise from 0 to the number of columns ({len(columns)})"
    return None


KINDS: dict[str, _Kind] = {
    "local": _Kind({"before": 0, "behind": 0}, (), lambda before=0, behind=0: Local(before, behind)),
    "global": _Kind({"columns": 0, "rows": 0}, (), lambda columns=0, rows=0: Global(columns, rows)),
    "strided": _Kind({"stride": 1}, ("stride",), Strided),
    "dilated_sliding": _Kind(
        {"dilation": 1, "blocks": 0}, ("dilation", "blocks"), lambda dilation, blocks: Strided(dilation, blocks)
    ),
    "fixed": _Kind(
        {"stride": 1, "offset": 0},
        ("stride",),
        Fixed,
        lambda stride, offset=0: None if offset < stride else f"offset {offset} is not below stride {stride}",
    ),
    "vertical_slash": _Kind(
        {"verticals": [0], "slashes": [0]}, (), lambda verticals=(), slashes=(): VerticalSlash(verticals, slashes)
    ),
    "hierarchical": _Kind(
        {"spans": [1], "heads": [0]}, ("spans",), lambda spans, heads=(): Hierarchical(spans, heads), _not_nested
    ),
    "random": _Kind({"blocks": 0, "seed": 0, "by_head": bool}, ("blocks",), _random),
    "document": _Kind({"lengths": [1]}, (), lambda lengths=(): Document(lengths)),
    "near": _Kind({"radius": (0, [0])}, ("radius",), _near, on_grid=True),
    "explicit": _Kind({"starts": [0], "columns": [0]}, ("starts", "columns"), Explicit, _not_rows),
    "topk": _Kind(
        {"estimator": ESTIMATORS, "blocks": 1}, ("estimator", "blocks"), lambda estimator, blocks: Scored(estimator, blocks)
    ),
    "mass": _Kind({"estimator": ESTIMATORS, "mass": float, "most": 1}, ("estimator", "mass", "most"), _mass),
    "given": _Kind({"most": 1}, ("most",), Given),
    "bigbird": _Kind({"local": 0, "columns": 0, "rows": 0, "random": 0, "seed": 0}, (), _bigbird),
    "longformer": _Kind({"local": 0, "columns": 0, "rows": 0}, (), _longformer),
}
_WHOLE: dict[str, Callable[[tuple[Pattern, ...]], Pattern]] = {"any": AnyOf, "all": AllOf}
_BY_HEAD: dict[str, Callable[[tuple[Pattern, ...]], Pattern]] = {
    "heads": lambda parts: PerHead(parts),
    "groups": lambda parts: PerHead(parts, share=0),
}
# Those that are made of a list of patterns.
SETS = {**_WHOLE, **_BY_HEAD}


def problems_of(data: object, at: Place) -> list[OptionProblem]:
    """Everything that is wrong with a pattern."""
    data = plain(data)
    if not isinstance(data, dict) or len(data) != 1:
        return [OptionProblem(at, f"must be one pattern by name, such as {{local: {{before: 2}}}}, not {data!r}")]
    (name, options), names = next(iter(data.items())), [*_WHOLE, *KINDS, *_BY_HEAD]
    if name in SETS:
        if not isinstance(options, (list, tuple)) or not options:
            return [OptionProblem((*at, name), f"must be a list of patterns, not {options!r}")]
        found = [problem for n, part in enumerate(options) for problem in problems_of(part, (*at, name, n))]
        return found or (_chosen_by_head(options, (*at, name)) if name in _BY_HEAD else [])
    if name not in KINDS:
        return [OptionProblem(at, f"pattern {name!r} is unknown{hint(str(name), names)}; the patterns are {', '.join(names)}")]
    return _problems_of_options(KINDS[name], {} if options is None else options, (*at, name))


def _chosen_by_head(parts: Any, at: Place) -> list[OptionProblem]:
    text = "chooses blocks for each head by the data already; put it beside the patterns per head, under `any` or `all`"
    return [
        OptionProblem((*at, n), f"pattern {part!r} {text}")
        for n, part in enumerate(parts)
        if is_adaptive(pattern_of(cast(Spec, frozen(part))))
    ]


def _problems_of_options(kind: _Kind, options: object, at: Place) -> list[OptionProblem]:
    if not isinstance(options, dict):
        return [OptionProblem(at, f"must be a mapping of options ({', '.join(kind.options)}), not {options!r}")]
    found = [
        OptionProblem(at, f"unknown option {key!r}{hint(str(key), kind.options)}; the options are {', '.join(kind.options)}")
        for key in options
        if key not in kind.options
    ]
    found += [OptionProblem(at, f"the option {key!r} is missing") for key in kind.required if key not in options]
    for key, value in options.items():
        found += _problems_of_value(value, kind.options.get(key), (*at, key))
    if not found:
        wrong = kind.wrong(**_frozen(options))
        found += [] if wrong is None else [OptionProblem(at, wrong)]
    return found


def _problems_of_value(value: object, wanted: Any, at: Place) -> list[OptionProblem]:
    if wanted is bool:
        return [] if isinstance(value, bool) else [OptionProblem(at, f"must be true or false, not {value!r}")]
    if wanted is float:
        right = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1
        return [] if right else [OptionProblem(at, f"must be a share above 0 and at most 1, not {value!r}")]
    if isinstance(wanted, tuple) and isinstance(wanted[0], str):
        near = hint(value, wanted) if isinstance(value, str) else ""
        return [] if value in wanted else [OptionProblem(at, f"must be one of {', '.join(wanted)}, not {value!r}{near}")]
    if isinstance(wanted, tuple):
        wanted = wanted[isinstance(value, (list, tuple))]
    if isinstance(wanted, list):
        if not isinstance(value, (list, tuple)):
            return [OptionProblem(at, f"must be a list of whole numbers, not {value!r}")]
        return [problem for n, one in enumerate(value) for problem in _problems_of_value(one, wanted[0], (*at, n))]
    if wanted is not None and (isinstance(value, bool) or not isinstance(value, int) or value < wanted):
        return [OptionProblem(at, f"must be a whole number of at least {wanted}, not {value!r}")]
    return []


def _frozen(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def frozen(data: object) -> object:
    """A right pattern as a ``Spec``; anything else as it is."""
    if not isinstance(data, dict) or problems_of(data, ()):
        return data
    name, options = next(iter(data.items()))
    if name in SETS:
        return (name, tuple(frozen(part) for part in options))
    return (name, tuple(_frozen(options or {}).items()))


def plain(spec: object) -> Any:
    """What a ``Spec`` was made of; anything else as it is."""
    if not isinstance(spec, tuple):
        return spec
    name, options = spec
    if name in SETS:
        return {name: [plain(part) for part in options]}
    return {name: {key: list(value) if isinstance(value, tuple) else value for key, value in options}}


def pattern_of(spec: Spec, curve: Curve | None = None) -> Pattern:
    """The pattern of a right ``Spec``; the curve is that of the tokens, for patterns on a grid."""
    name, options = spec
    if name in SETS:
        return SETS[name](tuple(pattern_of(part, curve) for part in options))
    kind = KINDS[name]
    return kind.build(**dict(options), **({"curve": curve} if kind.on_grid else {}))


def parts_of(spec: Spec) -> list[Spec]:
    """The named patterns that a ``Spec`` is made of."""
    name, options = spec
    return [single for part in options for single in parts_of(part)] if name in SETS else [spec]


def has_lengths(spec: Spec) -> bool:
    """Whether the pattern names lengths of documents."""
    return any(name == "document" and dict(options).get("lengths") for name, options in parts_of(spec))
