"""Union: the pairs of several forms under one softmax."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np

from dilcompile.blocks.composed import AnyOf
from dilcompile.blocks.coverage import gaps
from dilcompile.errors import FormError, OptionProblem, Place
from dilcompile.forms.base import Form, Says, not_one_of
from dilcompile.forms.block_sparse import BlockSparse
from dilcompile.forms.dilated import Dilated
from dilcompile.forms.sliding_window import SlidingWindow
from dilcompile.generators import Blocks, Generator, Segment, Sinks, Window
from dilcompile.near import hint
from dilcompile.progression import Positions
from dilcompile.relation import Problem, Relation, Term

if TYPE_CHECKING:
    from dilcompile.site import AttentionSite

PARTS: dict[str, type[Form]] = {form.name: form for form in (SlidingWindow, Dilated, BlockSparse)}
_PART = {"type": "object", "required": ["form"], "properties": {"form": {"enum": list(PARTS)}}}
_NO_PART = {
    "dense": "holds every pair already, so that nothing can be added to it",
    "keep_structure": "holds every pair of the site's own mask already, so that nothing can be added to it",
    "union": "is no part: put its parts beside the others",
    "keep": "leaves the site as the model computes it, so that nothing can be added to it",
}
# What is said of the union as a whole.
_WHOLE = ("coverage", "kernel")
_OF_TOKENS = ("order", "grid", "lead")


@dataclass(frozen=True)
class Union(Form):
    """One softmax over the pairs that any of several forms holds.

    A pair counts as often as the `dilated` part counts it, and once where only other parts hold it: several parts never add up.
    So one part at most may count a key once a branch (``union: multiset``); ``union: set`` is for further ones.

    Args:
        of: two forms or more, each with its own options: ``sliding_window``, ``dilated``, ``block_sparse``.
        coverage: ``require``: parts that together leave a query without keys are an error; ``zero``: such queries give 0.

    Raises:
        FormError: with everything that is wrong with the parts.
    """

    name: ClassVar[str] = "union"

    of: Annotated[tuple[dict[str, Any], ...], Says("minItems", 2), Says("items", _PART)]
    coverage: Literal["require", "zero"] = "require"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "of", tuple(_part(one) for one in self.of))

    @property
    def parts(self) -> tuple[Form, ...]:
        """The forms that are united, without coverage of their own."""
        return self.of  # type: ignore[return-value]

    def problems(self) -> list[OptionProblem]:
        """Everything that is wrong with each part, and with the parts together."""
        found = not_one_of(("coverage",), self.coverage, ("require", "zero"))
        if not isinstance(self.of, (list, tuple)):
            return [*found, OptionProblem(("of",), f"must be a list of forms, not {self.of!r}")]
        if len(self.of) < 2:
            found.append(OptionProblem(("of",), f"must be two forms or more, not {len(self.of)}"))
        for number, one in enumerate(self.of):
            found += _wrong_part(one, ("of", number))
        if found:
            return found
        several = [number for number, one in enumerate(map(_part, self.of)) if _counts_again(one)]
        for number in several[1:]:
            text = (
                f"counts a key once a branch, as of[{several[0]}] does, and what the two count together is not said: give all "
                "but one `union: set`, or put their branches into one"
            )
            found.append(OptionProblem(("of", number), text, about=(("of", several[0]),)))
        return found

    def relation(self, problem: Problem) -> Relation:
        """The terms of all parts. But for those of the part that counts keys again, each adds only what no earlier one holds.

        Raises:
            FormError: under ``coverage: require``, if the parts together hold no key of a query that may see some; or if a part
                can't be had at these sizes.
        """
        again = [term for part in self.parts if _counts_again(part) for term in part.relation(problem).terms]
        once = [term for part in self.parts if not _counts_again(part) for term in part.relation(problem).terms]
        kept = [term for term in again if isinstance(term.generator, Segment)]
        others = [term.generator for term in (*again, *once) if term not in kept]
        segments = [one for one in others if isinstance(one, Segment)]
        windows = _joined_windows([one for one in others if isinstance(one, Window)])
        most = max((one.count for one in others if isinstance(one, Sinks)), default=0)
        blocks = _joined_blocks([one for one in others if isinstance(one, Blocks)])
        # Windows last: kernels give what they add a list of its own.
        added: list[Generator] = [*segments, *blocks, *([Sinks(most)] if most else []), *windows]
        terms = (*kept, *(Term(one, dedupe=bool(kept) or number > 0) for number, one in enumerate(added)))
        if self.coverage == "require":
            self._require_keys(terms, problem)
        return Relation(problem, terms)

    def _require_keys(self, terms: tuple[Term, ...], problem: Problem) -> None:
        generators = [term.generator for term in terms]
        if any(_holds_own(one) for one in generators):
            return
        by_head = any(isinstance(one, Blocks) and one.pattern.by_head for one in generators)
        differ = by_head or any(isinstance(one, Segment) for one in generators)
        for head in range(problem.heads if differ else 1):
            left = _without_keys(generators, head, problem)
            if len(left):
                raise FormError(
                    f"form {self.name}: its parts leave the query at position {left[0]} (head {head}) without any key, at "
                    f"{problem.q_len} queries and {problem.k_len} keys; add a part {{form: sliding_window, window: 1}}, so that "
                    "each query sees itself, or accept zeros with coverage='zero'"
                )

    def fidelity(self, site: AttentionSite) -> Literal["exact", "approximate"]:
        """Exact where a part holds every pair and none is counted more often than another."""
        again = [part for part in self.parts if _counts_again(part)]
        return "exact" if any(part.fidelity(site) == "exact" for part in again or self.parts) else "approximate"

    def reject(self, site: AttentionSite) -> str | None:
        """What any of the parts refuses."""
        for number, part in enumerate(self.parts):
            reason = part.reject(site)
            if reason is not None:
                return f"of[{number}], {part.name}: {reason}"
        return None

    @property
    def made_for(self) -> int | None:
        """As many as there are patterns per head in a part."""
        return max((part.made_for for part in self.parts if part.made_for is not None), default=None)

    def notes(self, site: AttentionSite) -> tuple[str, ...]:
        """Those of the parts that still hold beside the others."""
        found = []
        for number, part in enumerate(self.parts):
            # That rows see little says a part of itself; here others add to it.
            alone = replace(part, local=1) if isinstance(part, Dilated) else part
            found += [f"of[{number}], {part.name}: {note}" for note in alone.notes(site)]
        return tuple(found)

    def plain(self) -> dict[str, Any]:
        """See ``Form``."""
        parts = [{"form": part.name, **part.plain()} for part in self.parts]
        for part in parts:
            part.pop("coverage", None)
        return {**super().plain(), "of": parts}


def _counts_again(part: Form) -> bool:
    return isinstance(part, Dilated) and part.union == "multiset" and (isinstance(part.segments, str) or len(part.segments) > 1)


def _part(data: object) -> Form:
    """The form of right data. Whether every query has keys is asked of the union."""
    if isinstance(data, Form):
        return replace(data, coverage="zero") if hasattr(data, "coverage") else data  # type: ignore[call-arg]
    assert isinstance(data, dict)
    kind = PARTS[data["form"]]
    return kind(**{**_whole(kind), **_options(data)})


def _whole(kind: type[Form]) -> dict[str, Any]:
    return {"coverage": "zero"} if "coverage" in {option.name for option in fields(kind)} else {}


def _options(data: dict[str, Any]) -> dict[str, Any]:
    """The options beside ``form``, lists as the forms hold them."""
    return {name: tuple(held) if isinstance(held, list) else held for name, held in data.items() if name != "form"}


def _wrong_part(data: object, at: Place) -> list[OptionProblem]:
    if isinstance(data, Form):
        data = {"form": data.name, **data.plain()}
        data.pop("coverage", None)
    if not isinstance(data, dict):
        text = f"must be a form with its options, such as {{form: sliding_window, window: 512}}, not {data!r}"
        return [OptionProblem(at, text)]
    names = ", ".join(PARTS)
    if "form" not in data:
        return [OptionProblem(at, f"key 'form' is missing: a part is one of {names}")]
    name = data["form"]
    kind = PARTS.get(name) if isinstance(name, str) else None
    if kind is None:
        why = _NO_PART.get(str(name), f"is no part of a union{hint(str(name), PARTS)}")
        return [OptionProblem((*at, "form"), f"{name!r} {why}; a part is one of {names}")]
    return _wrong_options(kind, _options(data), at)


def _wrong_options(kind: type[Form], options: dict[str, Any], at: Place) -> list[OptionProblem]:
    known = {option.name: option for option in fields(kind) if option.name not in (*_WHOLE, *_OF_TOKENS)}
    found, form = [], object.__new__(kind)
    for name in options:
        if name in _WHOLE:
            found.append(OptionProblem((*at, name), "is said of the whole union: give it beside `of`"))
        elif name in _OF_TOKENS:
            text = "is said of tokens, and those of a union are in the model's order: leave it out"
            found.append(OptionProblem((*at, name), text))
        elif name not in known:
            text = f"unknown option {name!r}{hint(name, known)}; the options of {kind.name} are {', '.join(known)}"
            found.append(OptionProblem((*at, name), text))
    missing = [name for name, option in known.items() if option.default is MISSING and name not in options]
    found += [OptionProblem(at, f"{kind.name}: the option {name!r} is missing") for name in missing]
    # Not built, since it would raise; its own checks are asked of what would stand in its fields.
    for option in fields(kind):
        default = None if option.default is MISSING else option.default
        held = options.get(option.name, default) if option.name in known else _whole(kind).get(option.name, default)
        object.__setattr__(form, option.name, held)
    for problem in form.problems():
        if problem.at[:1] not in [(name,) for name in missing]:
            about = tuple((*at, *place) for place in problem.about)
            found.append(replace(problem, at=(*at, *problem.at), about=about))
    if kind is Dilated and options.get("output_scale", 1.0) != 1.0:
        text = "scales the output of a whole form, which a part has not; leave it out"
        found.append(OptionProblem((*at, "output_scale"), text))
    if kind is Dilated and options.get("merge_grad") == "detach":
        text = "needs each branch's own output, and the parts of a union share one softmax; leave it out"
        found.append(OptionProblem((*at, "merge_grad"), text))
    if isinstance(form, BlockSparse) and not found and form.is_adaptive:
        text = "chooses blocks from the data, and a union is known from sizes alone: put it under `any` of one block_sparse form"
        found.append(OptionProblem((*at, "pattern"), text))
    return found


def _joined_windows(windows: list[Window]) -> list[Window]:
    """Windows around each query of step 1 as one, and the others."""
    around = [one for one in windows if one.step == 1 and min(_wide(one.left), _wide(one.right)) >= 0]
    others = list(dict.fromkeys(one for one in windows if one not in around))
    if not around:
        return others
    return [*others, Window(_widest([one.left for one in around]), _widest([one.right for one in around]))]


def _wide(limit: int | None) -> int:
    return 0 if limit is None else limit


def _widest(limits: list[int | None]) -> int | None:
    known = [limit for limit in limits if limit is not None]
    return max(known) if len(known) == len(limits) else None


def _joined_blocks(found: list[Blocks]) -> Iterator[Blocks]:
    """Blocks of one size as one."""
    sizes = dict.fromkeys((one.grid.q_block, one.grid.k_block) for one in found)
    for size in sizes:
        alike = [one for one in found if (one.grid.q_block, one.grid.k_block) == size]
        patterns = tuple(dict.fromkeys(one.pattern for one in alike))
        yield alike[0] if len(patterns) == 1 else replace(alike[0], pattern=AnyOf(patterns))


def _holds_own(generator: object) -> bool:
    """Has each query a key in it, itself or the first one?"""
    if isinstance(generator, Segment):
        return generator.heads is None and (generator.residues is None or generator.rate == 1)
    return isinstance(generator, (Window, Sinks))


def _without_keys(generators: list[Any], head: int, problem: Problem) -> Positions:
    """The query positions that have no key under a head, ascending."""
    start, stop = (max(0, problem.q_offset + n) for n in (0, problem.q_len))
    left = np.arange(start, stop, dtype=np.int64)
    for one in generators:
        if isinstance(one, Blocks):
            begin, end = gaps(one.lists(head, one.grid), one.grid)
            order = np.argsort(begin)
            inside = np.searchsorted(begin[order], left, side="right") - 1
            left = left[(inside >= 0) & (left < np.append(end[order], 0)[inside])]
        else:
            assert isinstance(one, Segment)
            left = np.setdiff1d(left, one.active(head, start, stop), assume_unique=True)
    return left
