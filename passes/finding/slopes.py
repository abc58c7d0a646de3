"""ALiBi: a bias that falls by a slope of each head with every step away from the row's own position."""

from __future__ import annotations

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.origins import origins, value_of
from dilcompile.passes.graph.operators import CASTS, op_name
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.symbols import H, K, Q, symbols_of
from dilcompile.passes.masks.terms import Choice, Element, Expr, Number, elements_of, mapped

# A buffer that is looked through for slopes has no more elements than this.
_LARGEST_TABLE = 1 << 22


def slopes_of(value: Number, heads: int, axes: Axes, reader: MaskReader) -> tuple[float, ...] | None:
    """The slope of each head, or None if the bias is no ALiBi. Empty: it is one, with slopes that are learned.

    A slope of m: a key one step nearer has m more. Only what differs between the keys of a row counts: the softmax takes no
    notice of the rest.

    Args:
        value: the bias's element as a formula over (b, h, q, k).
    """
    if isinstance(value, Element) and (held := reader.tables.get(_node(value, reader))) is not None:
        return _of_table(held, value.args[1:], heads)
    cases = _cases(value)
    if not cases or any(_slope(case, heads, axes, reader) is None for case in cases):
        return None
    found = [_at_head(value, head, heads, axes, reader) for head in range(heads)]
    known = tuple(slope for slope in found if slope is not None)
    return known if len(known) == heads else ()


def _cases(value: Number) -> list[Expr]:
    """The formulas of all heads: a choice may be made by the head's number alone."""
    if not isinstance(value, Choice):
        return [value]
    if symbols_of(value.when) - {H} or elements_of(value.when):
        return []
    then, other = _cases(value.then), _cases(value.other)
    return [*then, *other] if then and other else []


def _slope(value: Expr, heads: int, axes: Axes, reader: MaskReader) -> Expr | None:
    """The factor on the steps, over h; None if the formula is anything else than such a factor times steps."""
    total: Expr = sympy.Integer(0)
    around: set[bool] = set()
    for term in sympy.Add.make_args(value):
        if K not in term.free_symbols:
            continue
        of_head: Expr = sympy.Integer(1)
        of_place: Expr = sympy.Integer(1)
        for factor in sympy.Mul.make_args(term):
            if factor.free_symbols <= {H} and all(_is_fixed(held, axes, reader) for held in factor.atoms(Element)):
                of_head = of_head * factor
            else:
                of_place = of_place * factor
        step = _step(of_place, reader)
        if step is None:
            return None
        around.add(of_place.has(sympy.Abs))
        total = total + step * of_head
    # Counted up along the keys and away from the row at once it is no line on either side.
    if len(around) > 1 or total.is_zero or (heads > 1 and H not in total.free_symbols):
        return None
    return total


def _is_fixed(element: Expr, axes: Axes, reader: MaskReader) -> bool:
    return "data" not in origins(_node(element, reader), axes, reader)


def _step(place: Expr, reader: MaskReader) -> Expr | None:
    """How much more the place of a key is than that of the key one step further from the row; None if it is no place."""
    number, inner = place.as_coeff_Mul()
    if isinstance(inner, sympy.Abs):
        inside = sympy.expand(inner.args[0])
        along = inside.coeff(K)
        flat = inside - along * K + along * Q
        apart = along.is_number and not along.is_zero and not (sympy.expand(flat).free_symbols & {K, Q, H})
        return -number * abs(along) if apart and not inside.atoms(Element) else None
    counted = _count(inner, reader)
    if counted is not None:
        return number * counted
    inside = sympy.expand(place)
    along = inside.coeff(K)
    if not along.is_number or along.is_zero or K in (inside - along * K).free_symbols or H in inside.free_symbols:
        return None
    return along


def _count(place: Expr, reader: MaskReader) -> Expr | None:
    """Keys counted by a running sum of their mask, and perhaps 0 where the mask is 0."""
    counts = [held for held in place.atoms(Element) if op_name(_node(held, reader)) == "cumsum"]
    if len(counts) != 1 or H in place.free_symbols:
        return None
    (count,) = counts
    running = _node(count, reader)
    if count.args[1 + int(running.args[1]) % (len(count.args) - 1)] != K:  # type: ignore[arg-type]
        return None
    mask = _uncast(running.args[0])  # type: ignore[arg-type]
    found: Expr | None = None
    for factor in sympy.Mul.make_args(place):
        along = sympy.expand(factor).coeff(count)
        if count in factor.atoms(Element):
            rest = sympy.expand(factor) - along * count
            found = along if found is None and along.is_number and K not in rest.free_symbols else None
            if found is None:
                return None
        elif not (_is_element(factor, mask, reader) and factor.args[1:] == count.args[1:]):
            return None
    return found


def _is_element(factor: Expr, mask: Node, reader: MaskReader) -> bool:
    return isinstance(factor, Element) and _uncast(_node(factor, reader)) is mask


def _uncast(node: Node) -> Node:
    while op_name(node) in CASTS and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def _node(element: Expr, reader: MaskReader) -> Node:
    return reader.elements[int(element.args[0])]


def _at_head(value: Number, head: int, heads: int, axes: Axes, reader: MaskReader) -> float | None:
    while isinstance(value, Choice):
        value = value.then if _holds(value, head) else value.other
    slope = _slope(value, heads, axes, reader)
    assert slope is not None
    here = slope.subs(H, head)
    for element in here.atoms(Element):
        node = _node(element, reader)
        of_head = {own: torch.tensor(head) for own, index in reader.given.items() if index == H and own.graph is node.graph}
        table = value_of(node, reader, of_head)
        if table is not None and not table.shape:
            here = here.subs(element, float(table))
            continue
        if table is None or not all(index.is_Integer for index in element.args[1:]):
            return None
        here = here.subs(element, float(table[tuple(int(index) for index in element.args[1:])]))
    return float(here) if here.is_number else None


def _holds(value: Choice, head: int) -> bool:
    return Bounds({}).settle(mapped(value.when, lambda expr: expr.subs(H, head))) is True


def _of_table(table: torch.Tensor, indices: tuple[Expr, ...], heads: int) -> tuple[float, ...] | None:
    """The slopes of a buffer [H, (Q,) K] by its values; entries of -inf are a mask's."""
    if table.numel() > _LARGEST_TABLE or not table.dtype.is_floating_point or any(isinstance(i, Element) for i in indices):
        return None
    kinds = ["".join(str(s) for s in (H, Q, K) if s in index.free_symbols) for index in indices]
    if kinds and (kinds[-1] != "k" or [kind for kind in kinds if kind] not in (["h", "k"], ["h", "q", "k"])):
        return None
    if any(not kind and size != 1 for kind, size in zip(kinds, table.shape, strict=True)):
        return None
    held = table.detach().to("cpu", torch.float64).reshape(heads, -1, table.shape[-1]) if table.shape else None
    if held is None or held.shape[-1] < 2:
        return None
    found = [_of_rows(rows, float(torch.finfo(table.dtype).eps)) for rows in held]
    return None if any(slope is None for slope in found) or len({*found}) < min(2, heads) else tuple(found)  # type: ignore[arg-type]


def _of_rows(rows: torch.Tensor, eps: float) -> float | None:
    """The slope of one head's rows, counted up along the keys or by the distance from the diagonal."""
    seen = rows.isfinite()
    if not bool(seen.any()):
        return None
    near = 2 * eps * float(rows[seen].abs().max())
    steps, both = rows[:, 1:] - rows[:, :-1], seen[:, 1:] & seen[:, :-1]
    at = torch.arange(rows.shape[1])
    before = at[1:] <= at[: rows.shape[0], None] if rows.shape[0] > 1 else torch.ones_like(both)
    first = steps[both & before]
    if first.numel() == 0:
        return None
    slope = float(first.median())
    rising = torch.where(both, (steps - slope).abs(), 0.0)
    falling = torch.where(both, (steps - torch.where(before, slope, -slope)).abs(), 0.0)
    straight = min(float(rising.max()), float(falling.max())) <= near
    return slope if straight and abs(slope) > near else None
