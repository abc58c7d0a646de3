"""What kind of bias is added to the scores, in a word: slopes by distance, a learned table, or numbers of any kind."""

from __future__ import annotations

import sympy
from torch.fx import Node

from dilcompile.passes.axes import Axes
from dilcompile.passes.masks.symbols import H, K, Q
from dilcompile.passes.masks.terms import Choice, Element, Expr, Number
from dilcompile.passes.operators import is_tensor, op_name

_MOST_NODES = 300


def bias_word(node: Node, value: Number | None, axes: Axes) -> str:
    """``alibi``, ``t5 buckets``, ``relative table``, or ``tensor``.

    Args:
        node: what is added to the scores.
        value: its element as a formula over (b, h, q, k), where there is one.
    """
    if value is not None and _falls_with_distance(value):
        return "alibi"
    return _table_word(node, axes) or "tensor"


def _falls_with_distance(value: Number) -> bool:
    """``slope(h) * position``, the position a key's own number or a count along the keys, with or without the row's."""
    if isinstance(value, Choice):
        return _falls_with_distance(value.then) or _falls_with_distance(value.other)
    terms = [term for term in sympy.Add.make_args(sympy.expand(value)) if K in term.free_symbols]
    return bool(terms) and all(_is_slope(term) for term in terms)


def _is_slope(term: Expr) -> bool:
    factors = sympy.Mul.make_args(term)
    slopes = [factor for factor in factors if factor.free_symbols == {H}]
    places = [factor for factor in factors if K in factor.free_symbols]
    return len(slopes) == 1 and all(_is_place(place) for place in places) and H not in sympy.Mul(*places).free_symbols


def _is_place(factor: Expr) -> bool:
    inner = factor.args[0] if isinstance(factor, sympy.Abs) else factor
    return bool(inner.is_integer) or isinstance(inner, Element) or (inner - K + Q).is_number


def _table_word(node: Node, axes: Axes) -> str | None:
    """Rows of a table of weights, chosen by whole numbers; those of T5 come out of a logarithm."""
    queue, seen = [node], {node}
    while queue and len(seen) < _MOST_NODES:
        one = queue.pop()
        table, numbers = _lookup(one)
        if table is not None and numbers is not None and table in axes.parametric:
            return "t5 buckets" if _through_logarithm(numbers) else "relative table"
        fresh = [source for source in one.all_input_nodes if source not in seen and is_tensor(source)]
        seen.update(fresh)
        queue += fresh
    return None


def _lookup(node: Node) -> tuple[Node | None, Node | None]:
    name, args = op_name(node), node.args
    if name == "embedding":
        return args[0], args[1]  # type: ignore[return-value]
    if name in ("index", "index_select", "gather") and isinstance(args[0], Node):
        chosen = args[1] if name == "index" else args[2:]
        numbers = [index for index in chosen if isinstance(index, Node)]  # type: ignore[union-attr]
        return args[0], numbers[0] if numbers else None
    return None, None


def _through_logarithm(node: Node) -> bool:
    queue, seen = [node], {node}
    while queue and len(seen) < _MOST_NODES:
        one = queue.pop()
        if op_name(one) == "log":
            return True
        fresh = [source for source in one.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue += fresh
    return False
