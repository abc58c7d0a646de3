"""Dilated attention (LongNet, arXiv 2307.02486): a union of branches, each a segment length and a dilation rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from dilcompile.errors import FormError, OptionProblem
from dilcompile.forms.base import Form, NotNegative, Positive, Says, cross_site, not_integer, not_one_of, unread_mask
from dilcompile.generators import Segment, Sinks, Window
from dilcompile.relation import Problem, Relation, Term

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite

FIRST_AUTO_SEGMENT = 2048
AUTO_RATIO = 2
# The options that decide whether every query has keys.
COVERING = (("rates",), ("offset",), ("heads",), ("sinks",), ("local",), ("coverage",))


@dataclass(frozen=True)
class Dilated(Form):
    """Branch i attends, in segments of ``segments[i]`` keys, the keys of one residue class modulo ``rates[i]``.

    Args:
        segments: segment lengths; ``'seq'`` stands for the number of keys; ``'auto'``: 2048, 4096, ... up to the number of keys.
        rates: one dilation rate a segment; ``'auto'``: 1, 2, 4, ...
        offset: the residue class: ``head_mod`` (key head mod rate), ``head_block``, ``branch``, ``zero``, or ``own`` (the
            query's own).
        union: a key in two branches counts twice (``multiset``, LongNet) or once (``set``).
        heads: every head has all branches (``all``) or head group i has branch i only (``grouped``).
        output_scale: factor on the output; ``'1/k'`` is one over the number of branches.
        sinks: the first keys, seen by every query.
        local: the nearest keys, seen by every query.
        coverage: ``require``: options that leave queries without keys are an error; ``zero``: such queries give 0.
        merge_grad: ``exact``, or ``detach``: the merge weights get no gradient (torchscale).

    With causal attention a token at a multiple of the longest segment sees only itself, the sinks and the local keys.

    Raises:
        FormError: naming the option, what came and what was expected.
    """

    name: ClassVar[str] = "dilated"
    paired: ClassVar[tuple[str, ...]] = ("segments", "rates")

    segments: tuple[Positive | Literal["seq"], ...] | Literal["auto"] = "auto"
    rates: tuple[Positive, ...] | Literal["auto"] = "auto"
    offset: Literal["head_mod", "head_block", "branch", "zero", "own"] = "head_mod"
    union: Literal["multiset", "set"] = "multiset"
    heads: Literal["all", "grouped"] = "all"
    output_scale: Annotated[float, Says("not", {"const": 0})] | Literal["1/k"] = 1.0
    sinks: NotNegative = 0
    local: NotNegative = 0
    coverage: Literal["require", "zero"] = "require"
    merge_grad: Literal["exact", "detach"] = "exact"

    def __post_init__(self) -> None:
        for option in ("segments", "rates"):
            if isinstance(getattr(self, option), list):
                object.__setattr__(self, option, tuple(getattr(self, option)))
        super().__post_init__()

    def problems(self) -> list[OptionProblem]:
        """Everything that is wrong with the options, alone and together."""
        found = [
            *self._wrong_branches(),
            *not_one_of(("offset",), self.offset, ("head_mod", "head_block", "branch", "zero", "own")),
            *not_one_of(("union",), self.union, ("multiset", "set")),
            *not_one_of(("heads",), self.heads, ("all", "grouped")),
            *not_one_of(("coverage",), self.coverage, ("require", "zero")),
            *not_one_of(("merge_grad",), self.merge_grad, ("exact", "detach")),
            *not_integer(("sinks",), self.sinks, 0),
            *not_integer(("local",), self.local, 0),
            *self._wrong_output_scale(),
        ]
        # What leaves queries without keys can be told from rates and switches that are right by themselves.
        if not any(problem.at[:1] in ((), *COVERING) for problem in found):
            found += self._uncovered()
        return found

    def branches(self, k_len: int) -> tuple[tuple[int, int], ...]:
        """(segment length, dilation rate) of every branch when there are ``k_len`` keys; lengths are not clipped."""
        if not isinstance(self.segments, str):
            assert not isinstance(self.rates, str)
            lengths = [k_len if length == "seq" else int(length) for length in self.segments]
            return tuple(zip((max(1, length) for length in lengths), self.rates, strict=True))
        found = [(FIRST_AUTO_SEGMENT, 1)]
        while found[-1][0] < k_len:
            found.append((found[-1][0] * AUTO_RATIO, found[-1][1] * AUTO_RATIO))
        return tuple(found)

    def relation(self, problem: Problem) -> Relation:
        """The branches, then the sinks and local keys that no branch holds."""
        branches = self.branches(problem.k_len)
        groups = self._head_groups(problem.heads, len(branches))
        terms = [
            Term(
                Segment(length, rate, self._residues(problem, index, rate), problem.group, groups[index]),
                dedupe=self.union == "set" and index > 0,
            )
            for index, (length, rate) in enumerate(branches)
        ]
        if self.sinks:
            terms.append(Term(Sinks(self.sinks), dedupe=True))
        if self.local:
            terms.append(Term(Window(self.local - 1, 0 if problem.is_causal else self.local - 1), dedupe=True))
        return Relation(problem, tuple(terms))

    def scale_of_output(self, k_len: int) -> float:
        """The factor on the output as a number."""
        return 1 / len(self.branches(k_len)) if isinstance(self.output_scale, str) else float(self.output_scale)

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Exact where the branches are nothing but full attention at every length that the site may have."""
        if self.output_scale != 1 and (isinstance(self.segments, str) or self.output_scale != "1/k" or len(self.segments) > 1):
            return "approximate"
        full = self._full_branches(site)
        # A multiset of full branches counts every key equally often, which the softmax doesn't see.
        enough = any(full) if self.union == "set" and self.heads == "all" else all(full)
        return "exact" if enough else "approximate"

    def reject(self, site: AttentionSite) -> str | None:
        """A mask that could not be read; cross attention, whose two axes have no common positions; too few heads."""
        return cross_site(site) or unread_mask(site) or self._too_few_heads(site)

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """Rows that see little, and branches that depend on the length."""
        found = []
        if site.mask.causal and not self.sinks and not self.local and self.fidelity(site) == "approximate":
            longest = "the longest segment" if isinstance(self.segments, str) or "seq" in self.segments else max(self.segments)
            found.append(
                f"causal segments start at position 0: a token at a multiple of {longest} sees only itself; "
                "add `sinks` or `local`"
            )
        if (isinstance(self.segments, str) or "seq" in self.segments) and self.union == "multiset":
            found.append(
                "the branches depend on the number of keys, so a decode step is not the row of a longer prefill; "
                "give the segments as numbers"
            )
        return tuple(found)

    def _residues(self, problem: Problem, index: int, rate: int) -> tuple[int, ...] | None:
        heads = range(problem.kv_heads)
        if self.offset == "own":
            return None
        if self.offset == "head_mod":
            return tuple(head % rate for head in heads)
        if self.offset == "head_block":
            return tuple(head // -(-problem.kv_heads // rate) for head in heads)
        return tuple((index % rate if self.offset == "branch" else 0) for _ in heads)

    def _too_few_heads(self, site: AttentionSite) -> str | None:
        """Why the heads can't be dealt to the branches, or None; asks no more of a symbolic length than it must."""
        if self.heads == "all":
            return None
        if isinstance(self.segments, str):
            longest = FIRST_AUTO_SEGMENT * AUTO_RATIO ** (site.heads - 1)
            if site.k_len <= longest:
                return None
            found = f"more than {site.heads} branches (segments 'auto' over more than {longest} keys)"
        else:
            if len(self.segments) <= site.heads:
                return None
            found = f"{len(self.segments)} branches"
        return f"heads='grouped' gives every branch a group of heads, but there are {found} and it has {site.heads} heads"

    def _head_groups(self, heads: int, count: int) -> list[tuple[int, int] | None]:
        if self.heads == "all":
            return [None] * count
        if heads < count:
            raise FormError(
                f"form {self.name}: heads='grouped' gives every branch a group of heads, but there are {count} branches and "
                f"{heads} heads; use heads='all' or fewer branches"
            )
        sizes = [heads // count + (index < heads % count) for index in range(count)]
        starts = [sum(sizes[:index]) for index in range(count)]
        return [(start, start + size) for start, size in zip(starts, sizes, strict=True)]

    def _full_branches(self, site: AttentionSite) -> list[bool]:
        """For each branch whether it is full attention at every length of the site."""
        k_len = site.k_len if isinstance(site.k_len, int) else None
        if isinstance(self.segments, str):
            return [k_len is not None and k_len <= FIRST_AUTO_SEGMENT]
        assert not isinstance(self.rates, str)
        return [
            rate == 1 and (length == "seq" or (k_len is not None and isinstance(length, int) and k_len <= length))
            for length, rate in zip(self.segments, self.rates, strict=True)
        ]

    def _wrong_branches(self) -> list[OptionProblem]:
        both = (("segments",), ("rates",))
        auto = [option for option in ("segments", "rates") if isinstance(getattr(self, option), str)]
        found = [problem for option in auto for problem in not_one_of((option,), getattr(self, option), ("auto",))]
        if len(auto) == 1:
            text = f"{auto[0]} is 'auto' but the other is a list; give both as lists or both as 'auto'"
            return found or [OptionProblem((), text, about=both)]
        if auto:
            return found
        if not isinstance(self.segments, tuple) or not isinstance(self.rates, tuple):
            came = self.segments if not isinstance(self.segments, tuple) else self.rates
            text = f"segments and rates must be lists of whole numbers or 'auto', not {came!r}"
            return [OptionProblem((), text, about=both)]
        if not self.segments or not self.rates:
            text = "segments and rates are empty; give at least one segment length and its rate"
            return [OptionProblem((), text, about=both)]
        if len(self.segments) != len(self.rates):
            text = f"segments has {len(self.segments)} entries but rates has {len(self.rates)}; give one rate a segment"
            found.append(OptionProblem((), text, about=both))
        for index, length in enumerate(self.segments):
            found += _wrong_segment(index, length)
        for index, rate in enumerate(self.rates):
            found += not_integer(("rates", index), rate, 1)
        # Of lists that don't pair only the entries that have a partner are compared.
        for index, (length, rate) in enumerate(zip(self.segments, self.rates, strict=False)):
            if not isinstance(length, str) and not _wrong_segment(index, length) and not not_integer((), rate, 1):
                found += _uneven(index, length, rate)
        return found

    def _wrong_output_scale(self) -> list[OptionProblem]:
        value = self.output_scale
        if value == "1/k":
            return []
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and math.isfinite(float(value)) and value != 0:
            return []
        return [OptionProblem(("output_scale",), f"must be a finite number other than 0, or '1/k', not {value!r}")]

    def _uncovered(self) -> list[OptionProblem]:
        if self.coverage == "zero" or self.offset == "own" or self.sinks or self.local or isinstance(self.rates, str):
            return []
        whole = [rate == 1 for rate in self.rates]
        if all(whole) if self.heads == "grouped" else any(whole):
            return []
        text = (
            f"rates {self.rates!r} leave queries without any key (heads={self.heads!r}, offset={self.offset!r}); "
            "add a branch of rate 1, offset='own', sinks or local keys, or accept zeros with coverage='zero'"
        )
        entries = tuple(("rates", index) for index in range(len(self.rates)))
        return [OptionProblem((), text, about=(*COVERING, *entries))]


def _wrong_segment(index: int, length: object) -> list[OptionProblem]:
    at = ("segments", index)
    if isinstance(length, str):
        return [] if length == "seq" else [OptionProblem(at, f"must be a whole number or 'seq', not {length!r}")]
    return not_integer(at, length, 1)


def _uneven(index: int, length: int, rate: int) -> list[OptionProblem]:
    if length % rate == 0:
        return []
    text = f"is not a multiple of rates[{index}]={rate}; use {length // rate * rate or rate}"
    return [OptionProblem(("segments", index), text, str(length), (("rates", index),))]
