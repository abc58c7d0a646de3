"""What a row becomes that sees no key, from what each operand does to the scores that it hides.

A key may be hidden by one operand or by several; what its score is then decides which keys such a row sees after all:
those with the largest. Where it is one number for all of them (a fill that swallows the score), they weigh alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import compress, pairwise, product
from typing import Literal

import torch

from dilcompile.passes.masks.hiding import HIDES, absorbs
from dilcompile.passes.masks.terms import And, Truth, conjunction, disjunction, negation
from dilcompile.site import EmptyRows

Gradient = Literal["all", "scores", "bias", "none"]
# More operands than this are no mask that a person wrote.
_MOST_OPERANDS = 4
# How many times larger a fill is than a bias that it swallows.
_BEYOND_BIAS = 1e5

# What is left of a gradient where a fill takes the place of the one bias.
_CUT: dict[Gradient, Gradient] = {"all": "scores", "bias": "none", "none": "none"}


@dataclass(frozen=True)
class Hiding:
    """How one operand hides scores.

    Args:
        keep: where it lets through.
        fills: what the hidden scores become, or what is added to them.
        replaces: the scores are overwritten, not added to.
        dtype: of the scores that it meets.
        ends: the largest number that casts after it let through; larger ones become infinite.
        digits: the coarsest relative resolution of what comes after it.
        outer: how many biases are added after it.
        cuts: it takes the place of one bias.
    """

    keep: Truth
    fills: frozenset[float]
    replaces: bool
    dtype: torch.dtype
    ends: float = math.inf
    digits: float = 0.0
    outer: int = 0
    cuts: bool = False

    @property
    def resolution(self) -> float:
        """What is left of a score beside the fill, be it lost where it is added or in a later cast."""
        return max(torch.finfo(self.dtype).eps, self.digits)

    @property
    def rounds_later(self) -> bool:
        """Is a number of this dtype rounded on its way to the softmax?"""
        return self.digits > torch.finfo(self.dtype).eps


@dataclass(frozen=True)
class Instead:
    """Keys that a row sees where it sees no other.

    Args:
        visible: which.
        flat: it weighs them all alike.
        gradient: what still has a gradient then: scores and biases, scores, the biases that are added last, or nothing.
        joins: they share one softmax with those before, and differ in their gradient only.
    """

    visible: Truth
    flat: bool
    gradient: Gradient
    joins: bool = False


@dataclass(frozen=True)
class Emptiness:
    """What rows without keys become.

    Args:
        rows: see ``MaskSpec.empty_rows``.
        instead: where ``rows`` is ``others``, what they see instead; what still sees nothing goes on to the next that joins none.
    """

    rows: EmptyRows
    instead: tuple[Instead, ...] = ()


@dataclass(frozen=True)
class Floor:
    """Scores below ``least`` are lifted to it after all masks.

    Args:
        halves: a score that is equal to it gets half of its gradient.
    """

    least: float
    halves: bool


@dataclass(frozen=True)
class _Level:
    """What the score of a key becomes that some operands hide: one number, or the score and a number."""

    value: float
    is_score: bool
    gradient: Gradient | None


def emptiness_of(
    hidings: Sequence[Hiding],
    biases: int,
    *,
    zero: bool,
    training: bool,
    capped: bool,
    narrow: bool = False,
    floor: Floor | None = None,
) -> Emptiness:
    """What rows become that see no key.

    Args:
        hidings: in the order from the softmax inwards.
        biases: how many operands are no masks.
        zero: rows whose scores are all -inf become 0, not NaN.
        training: gradients are asked for.
        capped: the scores go through a soft cap before they are masked.
        narrow: a float64 attention whose softmax is float32, digit by digit.
        floor: what hidden scores are lifted to in the end.
    """
    if not hidings:
        return Emptiness("zero")
    other, nothing = Emptiness("other"), Emptiness("zero" if zero else "nan")
    if len(hidings) > _MOST_OPERANDS or any(len(hiding.fills) != 1 for hiding in hidings):
        alike = all(hiding.fills == {-math.inf} for hiding in hidings)
        return nothing if alike and floor is None else other
    levels = {hidden: _level(list(compress(hidings, hidden)), biases, narrow) for hidden in _subsets(hidings)}
    if floor is not None:
        levels = {hidden: _lifted(level, floor) for hidden, level in levels.items()}
    if any(level is None for level in levels.values()):
        return other
    reached = {hidden: level for hidden, level in levels.items() if level is not None and level.value != -math.inf}
    if not reached:
        return nothing
    kinds = sorted({(level.value, level.is_score) for level in reached.values()}, reverse=True)
    # Fills that a later cast can't tell apart are one.
    coarsest = max((one.digits for one in hidings if one.rounds_later), default=0.0)
    if any(upper[0] - lower[0] < max(-HIDES, 4 * coarsest * abs(lower[0])) for upper, lower in pairwise(kinds)):
        return other
    stages = []
    for kind in kinds:
        own = {hidden: level.gradient for hidden, level in reached.items() if (level.value, level.is_score) == kind}
        lower = [hidden for hidden, level in levels.items() if level is not None and (level.value, level.is_score) < kind]
        gradients: set[Gradient] = {gradient or "none" for gradient in own.values()} if training else {"none"}
        if training and None in own.values():
            return other
        for number, gradient in enumerate(sorted(gradients)):
            apart = [hidden for hidden, one in own.items() if training and one != gradient]
            visible = conjunction(*(_not_just(hidden, hidings) for hidden in (*lower, *apart)))
            stages.append(Instead(visible, not kind[1], gradient, joins=number > 0))
    (first, *rest) = stages
    if first.visible is True and not rest and first.flat:
        if first.gradient == "none":
            return Emptiness("uniform")
        # The slope of a mean is no float32 softmax's, digit by digit.
        if first.gradient == "all" and not biases and not capped and not narrow:
            return Emptiness("shifted")
    return Emptiness("others", tuple(stages))


def _subsets(hidings: Sequence[Hiding]) -> Iterator[tuple[bool, ...]]:
    """The sets of operands that may hide one key together and without the others."""
    for hidden in product((False, True), repeat=len(hidings)):
        if not any(hidden):
            continue
        hides = [one.keep for one in compress(hidings, hidden)]
        shown = [one.keep for one in compress(hidings, [not h for h in hidden])]
        if not any(_implies(one, other) for one in shown for other in hides):
            yield hidden


def _parts(truth: Truth) -> frozenset[Truth]:
    if isinstance(truth, And):
        return truth.parts
    return frozenset() if truth is True else frozenset((truth,))


def _implies(one: Truth, other: Truth) -> bool:
    """Does ``other`` hold wherever ``one`` does? Told by their factors."""
    return _parts(other) <= _parts(one)


def _level(hiding: Sequence[Hiding], biases: int, narrow: bool) -> _Level | None:
    """What a score becomes that exactly these operands hide; None: it depends on more than that."""
    value: float | None = None
    gradient: Gradient | None = "all"
    added, blurred, swallowed = 0.0, False, 0
    for one in reversed(hiding):  # from the product outwards
        (fill,) = one.fills
        if one.replaces:
            value, swallowed = fill, one.outer
            gradient = "none" if one.outer == 0 else "bias" if one.outer == biases else None
        elif value is not None:
            value = float(torch.tensor(value, dtype=one.dtype) + torch.tensor(fill, dtype=one.dtype))
        elif absorbs(fill, one.resolution):
            value, swallowed = fill, biases
        else:
            added, blurred = added + fill, blurred or one.rounds_later or (narrow and one.dtype is not torch.float64)
        ends = one.ends
        if value is not None and abs(value) > ends:
            value = -math.inf
    if biases and any(one.cuts for one in hiding):
        gradient = _CUT.get(gradient) if biases == 1 and gradient is not None else None
    if value is None:
        # The scores show, and with them whether a bias is among them; a later cast may have taken some of their digits.
        return None if blurred or any(one.cuts for one in hiding) else _Level(added, True, "all")
    if swallowed and value != -math.inf and not absorbs(value / _BEYOND_BIAS, max(one.resolution for one in hiding)):
        return None
    return _Level(value, False, gradient)


def _lifted(level: _Level | None, floor: Floor) -> _Level | None:
    if level is None or (level.is_score and level.value > floor.least / 2) or level.value > floor.least:
        return level
    if level.is_score:
        return None
    if level.value == floor.least and level.gradient != "none":
        return replace(level, gradient=None if floor.halves else level.gradient)
    return _Level(floor.least, False, "none")


def _not_just(hidden: tuple[bool, ...], hidings: Sequence[Hiding]) -> Truth:
    """Not hidden by exactly these operands."""
    either: list[Truth] = []
    for one, is_hidden in zip(hidings, hidden, strict=True):
        either.append(one.keep if is_hidden else negation(one.keep))
    # What implies another alternative says nothing more.
    fewest = [one for one in either if not any(one is not other and _implies(one, other) for other in either)]
    return disjunction(*fewest)
