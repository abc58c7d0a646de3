"""What a rule can ask of a site: one function per key of ``match``.

The annotation of ``value`` is the key's type, the docstring its documentation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar, get_type_hints

import torch

from dilcompile.policy import patterns, ranges
from dilcompile.policy.patterns import Pattern
from dilcompile.policy.ranges import Comparison, Ranges
from dilcompile.policy.values import Check, Count
from dilcompile.site import AttentionSite

Holds = TypeVar("Holds", bound=Callable[[AttentionSite, Any], bool])
Covers = Callable[[Any, Any], bool]

Mask = Literal["none", "causal", "window", "chunk", "prefix", "document", "label", "rows", "pairs", "padding", "other"]
Dtype = Literal["float64", "float32", "float16", "bfloat16", "fp64", "fp32", "fp16", "bf16"]
LONG_NAMES = {"fp64": "float64", "fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Predicate:
    """One key of ``match``.

    Args:
        name: the key.
        kind: annotation of its value.
        holds: does the site satisfy the value?
        covers: ``covers(a, b)``: every site that satisfies b surely satisfies a. Finds shadowed rules.
        example: a value, as YAML.
    """

    name: str
    kind: Any
    holds: Callable[[AttentionSite, Any], bool]
    covers: Covers
    example: str

    @property
    def doc(self) -> str:
        """The first paragraph of the function's docstring, on one line."""
        return " ".join((self.holds.__doc__ or "").split("\n\n")[0].split())


PREDICATES: dict[str, Predicate] = {}


def predicate(example: str, covers: Covers = operator.eq) -> Callable[[Holds], Holds]:
    """Register a function as the key of its name. What may add a guard on a length comes last."""

    def register(holds: Holds) -> Holds:
        kind = get_type_hints(holds, include_extras=True)["value"]
        PREDICATES[holds.__name__] = Predicate(holds.__name__, kind, holds, covers, example)
        return holds

    return register


def _listed(value: object) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _superset(wide: object, narrow: object) -> bool:
    return set(_listed(narrow)) <= set(_listed(wide))


def _any_or_equal(wide: object, narrow: object) -> bool:
    return wide in ("any", narrow)


@predicate('"model.layers.*.self_attn"', patterns.covers)
def module(site: AttentionSite, value: Pattern | tuple[Pattern, ...]) -> bool:
    """The site's module path matches: a glob, a regular expression after `re:`, or a list of them.
    A glob matches the whole path, or its end from a dot on.
    """
    return patterns.matches(site.module, value)


@predicate('"*.vision.*"', lambda wide, narrow: patterns.covers(narrow, wide))
def ignore(site: AttentionSite, value: Pattern | tuple[Pattern, ...]) -> bool:
    """The site's module path matches none of these patterns."""
    return not patterns.matches(site.module, value)


@predicate("self", _any_or_equal)
def kind(site: AttentionSite, value: Literal["self", "cross", "any"]) -> bool:
    """Queries and keys come from the same tokens (`self`) or not (`cross`)."""
    return value in ("any", site.kind)


@predicate("true")
def causal(site: AttentionSite, value: bool) -> bool:
    """The site's mask is causal, or is not."""
    return site.mask.causal == value


@predicate("[none, causal]", _superset)
def masked(site: AttentionSite, value: Mask | tuple[Mask, ...]) -> bool:
    """The site's mask has one of these factors. `none`: no mask. `label`: equal labels, which may come back; `rows`: any other
    run of keys a row; `pairs`: other comparisons of rows with keys; `other`: a part could not be read."""
    words = site.mask.words or ("none",)
    return any(word in words for word in _listed(value))


@predicate('"0-3,30-"', ranges.covers)
def layers(site: AttentionSite, value: Ranges) -> bool:
    """The site's layer number is in these ranges, from 0, ends included."""
    return site.layer is not None and ranges.within(site.layer, value)


@predicate('"8-"', ranges.covers)
def heads(site: AttentionSite, value: Ranges) -> bool:
    """The number of query heads is in these ranges."""
    return ranges.within(site.heads, value)


@predicate("sliding_attention", _superset)
def layer_type(site: AttentionSite, value: str | tuple[str, ...]) -> bool:
    """The layer's type as the model's configuration names it is one of these."""
    return site.layer_type in _listed(value)


@predicate('"64,128"', ranges.covers)
def head_dim(site: AttentionSite, value: Ranges) -> bool:
    """The size of one query head is in these ranges."""
    return ranges.within(site.head_dim, value)


@predicate("true")
def gqa(site: AttentionSite, value: bool) -> bool:
    """Several query heads share a key head, or none do."""
    return (site.group > 1) == value


def _dtypes(value: object) -> set[str]:
    return {LONG_NAMES.get(name, name) for name in _listed(value)}


@predicate("[bf16, fp16]", lambda wide, narrow: _dtypes(narrow) <= _dtypes(wide))
def dtype(site: AttentionSite, value: Dtype | tuple[Dtype, ...]) -> bool:
    """The queries' dtype is one of these; `fp32` and `float32` are the same."""
    return str(site.dtype).removeprefix("torch.") in _dtypes(value)


def _check_device(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        raise ValueError(f"torch knows no device {name!r}") from None


Device = Annotated[str, Check("a device such as 'cuda'", _check_device)]


def _on_device(device: torch.device, name: str) -> bool:
    asked = torch.device(name)
    return device.type == asked.type and asked.index in (None, device.index)


@predicate("cuda", _superset)
def device(site: AttentionSite, value: Device | tuple[Device, ...]) -> bool:
    """The site runs on this kind of device, or on this very one (`cuda:1`)."""
    return any(_on_device(site.device, name) for name in _listed(value))


@predicate('">=9.0"')
def compute_capability(site: AttentionSite, value: Comparison) -> bool:
    """The site's CUDA device has this compute capability; commas join several comparisons.
    Never true on other devices.
    """
    if site.device.type != "cuda":
        return False
    return ranges.satisfies(torch.cuda.get_device_capability(site.device), value)


@predicate("train", _any_or_equal)
def phase(site: AttentionSite, value: Literal["train", "prefill", "decode", "any"]) -> bool:
    """What the site is compiled for."""
    return value in ("any", site.phase)


def _ranks() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


@predicate('"2-"', ranges.covers)
def world_size(site: AttentionSite, value: Ranges) -> bool:
    """The number of ranks that run is in these ranges; 1 without torch.distributed."""
    return ranges.within(_ranks(), value)


def _as_number(least: int | Literal["auto"]) -> int:
    return 1 if least == "auto" else least


@predicate("16384", lambda wide, narrow: _as_number(wide) <= _as_number(narrow))
def min_seq(site: AttentionSite, value: Count | Literal["auto"]) -> bool:
    """The site has at least this many keys; `auto`: any number, but it is left as it is where dense attention is faster.
    For a symbolic length this adds a guard, so that shorter inputs are decided anew.
    """
    return value == "auto" or bool(site.k_len >= value)


@predicate("65536", operator.ge)
def max_seq(site: AttentionSite, value: Count) -> bool:
    """The site has at most this many keys."""
    return bool(site.k_len <= value)


def satisfied(site: AttentionSite, wanted: Iterable[tuple[str, object]]) -> bool:
    """Does the site satisfy every key of a rule's ``match``? Keys that may add a guard are asked last."""
    asked = dict(wanted)
    return all(predicate.holds(site, asked[key]) for key, predicate in PREDICATES.items() if key in asked)
