"""Read all mask operands of a site in the site's own axes, and tell masks from biases."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import sympy
import torch

from dilcompile.passes.axes.atoms import Atom, Leaves
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.anchors import EmptyRule, MaskOperand
from dilcompile.passes.finding.bias_words import bias_spec
from dilcompile.passes.finding.drowning import may_drown
from dilcompile.passes.finding.gates import gates_as_fills
from dilcompile.passes.finding.roles import Roles
from dilcompile.passes.finding.summands import Summand, summands
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.arithmetic import Unreadable, as_expr, lift
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.emptiness import Emptiness, Floor, Hiding, Instead, emptiness_of
from dilcompile.passes.masks.factors import read_mask
from dilcompile.passes.masks.hiding import NotAMask, keep_of
from dilcompile.passes.masks.read import Others, ReadMask
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.symbols import DIGITS, B, H, K, Lengths, Q
from dilcompile.passes.masks.terms import Expr, Number, Truth, conjunction, elements_of, mapped, negation
from dilcompile.site import Length

Sinks = Literal["none", "ordinary", "data"]

# A logit beside which every ordinary one has all the weight.
_NOTHING = -1e30


def read_site_mask(
    operands: Sequence[MaskOperand],
    seen: Truth,
    roles: Roles,
    axes: Axes,
    reader: MaskReader,
    sizes: tuple[Length, Length, Length, Length],
    *,
    capped: bool = False,
    narrow: bool = False,
    training: bool = False,
    rule: EmptyRule = "plain",
    zeroed: Sequence[MaskOperand] = (),
    floor: Floor | None = None,
    sinks: Sinks = "none",
) -> tuple[ReadMask, tuple[MaskOperand, ...]]:
    """The conjunction of all masks, and the operands that are biases.

    Args:
        seen: what the spelling itself lets through.
        sizes: batch, heads, q_len, k_len.
        capped: the scores go through a soft cap before they are masked.
        narrow: a float64 attention whose softmax is float32.
        training: gradients are asked for.
        rule: what the spelling makes of rows that see nothing.
        zeroed: what sets probabilities to 0 after the softmax.
        floor: what the scores are lifted to after all masks.
        sinks: what stands beside the keys: nothing, logits that are ordinary numbers, or data.

    Raises:
        Unproven: if probabilities become 0 that the masks don't hide.
    """
    lengths = Lengths(*sizes)
    places = _places(roles, lengths)
    reader.set_sizes(places.sizes)
    reader.binary.clear()
    keep = seen
    hidings: list[Hiding] = []
    bias: list[MaskOperand] = []
    operands = gates_as_fills(operands, lambda one: _value(one, _indices(one, roles, axes, places.of), reader), reader)

    def hides_only(operand: MaskOperand) -> bool:
        return _hides_only(operand, _indices(operand, roles, axes, places.of), reader)

    for summand in summands(operands, reader, hides_only):
        operand, binary = summand.operand, set(reader.binary)
        try:
            visible, hiding = _visible(summand, _indices(operand, roles, axes, places.of), reader)
        except NotAMask:
            reader.binary = binary
            indices = _indices(operand, roles, axes, places.of)
            spec = bias_spec(operand.node, _number(operand, indices, reader), lengths, axes, reader)
            kind = "drown" if _drowns(operand, training, axes, reader) else operand.kind
            bias.append(replace(operand, kind=kind, spec=spec))
            continue
        keep = conjunction(keep, visible)
        if hiding is not None:
            # The operands are met from the softmax inwards: what is a bias by now is added after this one.
            hidings.append(replace(hiding, outer=sum(one.kind == "add" for one in bias)))
        if read_mask(places.whole(visible), "zero", reader, lengths).spec.unread is not None:
            # What can't be read of it stays a tensor beside what can.
            bias.append(replace(operand, kind="below" if operand.kind == "add" else operand.kind))
    if seen is not True and (hidings or any(one.kind == "drown" for one in bias)):
        hidings.append(Hiding(seen, frozenset((-math.inf,)), True, torch.float32))
    zero = rule in ("zero", "cleared")
    plain, data = sum(one.kind == "add" for one in bias), any(one.kind == "drown" for one in bias)
    empty = emptiness_of(hidings, plain, zero=zero, training=training, capped=capped, narrow=narrow, floor=floor)
    if data:
        empty = _drowned(bias, floor, reader) or _by_its_own_numbers(empty, hidings)
    if rule == "cleared" and training and (data or any(not one.replaces for one in hidings)) and empty.rows in ("zero", "others"):
        # The gradient of such a row is NaN, and goes wherever its mask was added.
        empty = Emptiness("other")
    if rule == "odd" and empty.rows in ("uniform", "shifted", "others"):
        empty = Emptiness("other")
    if zeroed:
        shown = conjunction(*(_shown(one, _indices(one, roles, axes, places.of), reader) for one in zeroed))
        known = not data and floor is None and not (training and any(not one.replaces for one in hidings))
        empty = Emptiness("zero") if _hides_no_more(shown, keep, zeroed[0], reader) and known else Emptiness("other")
    if sinks != "none" and hidings:
        # Next to an ordinary sink, keys at the least number weigh nothing at all.
        nothing = all(fill <= _NOTHING for hiding in hidings for fill in hiding.fills)
        empty = Emptiness("zero" if nothing and sinks == "ordinary" else "other")
    read = read_mask(places.whole(keep), empty.rows, reader, lengths, tensors=any(one.kind != "add" for one in bias))
    read = replace(read, binary=frozenset(reader.binary))
    return _with_others(read, empty, zero, data, reader, lengths, places), tuple(bias)


def _shown(zeroed: MaskOperand, indices: tuple[Expr, ...], reader: MaskReader) -> Truth:
    """Which probabilities are left by a mask that sets them to 0."""
    try:
        chosen = reader.truth(zeroed.node, indices, zeroed.on)
    except Unreadable as error:
        raise Unproven(zeroed.on, "probabilities become 0 under a mask that can't be read", "mask the scores alone") from error
    return chosen if zeroed.kind == "keep" else negation(chosen)


def _hides_no_more(shown: Truth, keep: Truth, zeroed: MaskOperand, reader: MaskReader) -> bool:
    """Are the probabilities that are left all those that the masks of the scores let through? False: not only those.

    Raises:
        Unproven: if some that are let through are not left.
    """
    settle = Bounds(reader.sizes).settle
    visible = settle(keep)
    if settle(conjunction(keep, shown)) != visible:
        raise Unproven(zeroed.on, "probabilities become 0 that the mask of the scores does not hide", "mask the scores alone")
    return settle(shown) == visible


def _drowns(operand: MaskOperand, training: bool, axes: Axes, reader: MaskReader) -> bool:
    """May it swallow scores? In evaluation what is learned is a bias like any other: nothing is computed from the row again."""
    learned = _follows_gradient(operand, reader)
    return (training or not learned) and may_drown(operand.node, operand.dtype, axes, reader, inputs=not learned)


def _drowned(bias: Sequence[MaskOperand], floor: Floor | None, reader: MaskReader) -> Emptiness | None:
    """What rows whose scores are swallowed become, if that is not known; None if it is."""
    drowning = [one for one in bias if one.kind == "drown"]
    # A log-sum-exp of nothing but giant fills has lost how many there are: weights made from it again are wrong.
    learned = any(_follows_gradient(one, reader) for one in drowning)
    # Which numbers a later cast makes -inf, or which scores it takes from beside them.
    cut = any(one.ends < torch.finfo(one.dtype).max or one.digits > torch.finfo(one.dtype).eps for one in drowning)
    return Emptiness("other") if learned or cut or floor is not None else None


def _by_its_own_numbers(empty: Emptiness, hidings: Sequence[Hiding]) -> Emptiness:
    """A float mask that is data may swallow all scores of a row, whose keys then weigh by its own numbers."""
    if empty.rows not in ("zero", "nan") or any(hiding.fills != {-math.inf} for hiding in hidings):
        return Emptiness("other")
    return Emptiness("others", (Instead(conjunction(*(hiding.keep for hiding in hidings)), True, "all"),))


def _with_others(
    read: ReadMask, empty: Emptiness, zero: bool, data: bool, reader: MaskReader, lengths: Lengths, places: Places
) -> ReadMask:
    """The mask with what rows without keys see instead.

    Args:
        zero: rows that see nothing at all become 0, not NaN.
        data: a float mask may hide what the formulas show.
    """
    if read.spec.empty_rows != "others":
        return read
    stages = empty.instead
    if len(stages) == 1 and stages[0].visible is True and not stages[0].flat and read.spec.words == ("padding",):
        # A row without keys sees all of them: the softmax ignores one number added to all.
        return replace(read, spec=replace(read.spec, empty_rows="zero"), all_if_none=True)
    others = []
    for stage in stages:
        mask = read_mask(places.whole(stage.visible), "zero" if zero else "nan", reader, lengths, tensors=data)
        if mask.spec.unread is not None:
            return replace(read, spec=replace(read.spec, empty_rows="other"))
        others.append(Others(mask, stage.flat, stage.gradient, stage.joins))
    return replace(read, others=tuple(others), elements=tuple(reader.elements))


def _visible(summand: Summand, indices: tuple[Expr, ...], reader: MaskReader) -> tuple[Truth, Hiding | None]:
    """Where an operand lets through, and how it hides the rest (None if it hides nothing)."""
    operand, settle = summand.operand, Bounds(reader.sizes).settle
    if operand.kind != "add":
        chosen = reader.truth(operand.node, indices, operand.on)
        for element in elements_of(chosen) if operand.binary else ():
            reader.take_as_binary(element)
        visible = settle(chosen if operand.kind == "keep" else negation(chosen))
        fill = frozenset((operand.fill,))
        hiding = Hiding(visible, fill, not summand.adds, operand.dtype, operand.ends, operand.digits, cuts=summand.cuts)
        return visible, None if visible is True else hiding
    value = _value(operand, indices, reader)
    dtype = operand.dtype
    visible, fills = keep_of(value, torch.finfo(dtype).eps, reader)
    if any(reader.is_inner(element) for element in elements_of(visible)):
        raise NotAMask("an element that only the function itself can compute")
    visible = settle(visible)
    if visible is True:
        return True, None
    return visible, Hiding(visible, frozenset(fills), False, dtype, operand.ends, operand.digits)


def _hides_only(operand: MaskOperand, indices: tuple[Expr, ...], reader: MaskReader) -> bool:
    """Does it add nothing but 0 where it lets through?"""
    binary = set(reader.binary)
    try:
        keep_of(_value(operand, indices, reader), torch.finfo(operand.dtype).eps, reader)
    except (NotAMask, Unreadable):
        return False
    finally:
        reader.binary = binary
    return True


def _follows_gradient(operand: MaskOperand, reader: MaskReader) -> bool:
    held = [operand.node] if operand.function is None else [outer for _, outer in operand.function.buffers]
    return any(reader.follows_gradient(node) for node in held)


def _number(operand: MaskOperand, indices: tuple[Expr, ...], reader: MaskReader) -> Number | None:
    """One element of a bias as a formula."""
    try:
        return _value(operand, indices, reader)
    except Unreadable:
        return None


def _value(operand: MaskOperand, indices: tuple[Expr, ...], reader: MaskReader) -> Number:
    """One element of what is added, as it reaches the softmax."""
    value = reader.number(operand.node, indices, operand.on)
    return value if operand.factor == 1.0 else lift(operator.mul, value, as_expr(operand.factor))


@dataclass(frozen=True)
class Places:
    """The index expressions of the atoms that the scores are made of.

    Args:
        of: the symbol of every atom.
        sizes: the range of every symbol.
        last: of each axis of several atoms the innermost symbol, as what is left of the axis's own index: ``q1 = q - 7 * q0``.
        others: its other symbols, as parts of the axis's own index: ``q0 = floor(q / 7)``.
    """

    of: Mapping[int, Expr]
    sizes: Mapping[sympy.Symbol, Expr]
    last: Mapping[sympy.Symbol, Expr]
    others: Mapping[sympy.Symbol, Expr]

    def whole(self, truth: Truth) -> Truth:
        """The same truth over the axes' own indices."""
        if not self.last:
            return truth
        # Where the parts of an index come together they leave no trace; what stands alone is a part of it.
        return mapped(truth, lambda expr: sympy.expand(expr.subs(self.last)).subs(self.others))


def _places(roles: Roles, lengths: Lengths) -> Places:
    of: dict[int, Expr] = {}
    sizes, last, others = dict(lengths.bounds), {}, {}
    for atoms, symbol in (
        (tuple(axis.out for axis in roles.batch), B),
        (tuple(axis.out for axis in roles.heads), H),
        (roles.out_rows, Q),
        (roles.score_columns, K),
    ):
        if len(atoms) <= 1:
            of.update((id(atom), symbol) for atom in atoms)
            continue
        if len(atoms) > len(DIGITS[symbol]):
            raise Unproven(roles.output, "an axis of the scores is made of too many parts", "it stays as it is")
        outer: Expr = sympy.Integer(0)
        for atom, digit in zip(atoms, DIGITS[symbol], strict=False):
            of[id(atom)], sizes[digit] = digit, as_expr(atom.size)
            outer = outer * as_expr(atom.size) + digit
        last[digit] = symbol - (outer - digit)
        inner = as_expr(atoms[-1].size)
        for atom, digit in reversed(list(zip(atoms[:-1], DIGITS[symbol], strict=False))):
            others[digit] = sympy.floor(symbol / inner)
            if atom is not atoms[0]:
                others[digit] = sympy.Mod(others[digit], as_expr(atom.size))
            inner = inner * as_expr(atom.size)
    return Places(of, sizes, last, others)


def _indices(operand: MaskOperand, roles: Roles, axes: Axes, symbols: Mapping[int, Expr]) -> tuple[Expr, ...]:
    """The operand's indices for the pair (b, h, q, k): its dims are broadcast against the scores'."""
    score_dims = roles.score_dims(operand.on, axes)
    rank = len(shape_of(operand.node))
    if rank > len(score_dims):
        raise Unproven(operand.node, "a mask has more dims than the scores", "give the scores the mask's batch dims")
    dims = score_dims[len(score_dims) - rank :]
    if any(id(atom) not in symbols for dim in dims for atom in dim):
        raise Unproven(operand.node, "a mask runs along an axis that the scores don't have", "it stays as it is")
    return tuple(_index(dim, symbols) for dim in dims)


def _index(dim: Leaves, symbols: Mapping[int, Expr]) -> Expr:
    index: Expr = sympy.Integer(0)
    for atom in dim:
        index = index * as_expr(atom.size) + _symbol(atom, symbols)
    return sympy.expand(index)


def _symbol(atom: Atom, symbols: Mapping[int, Expr]) -> Expr:
    return symbols[id(atom)]
