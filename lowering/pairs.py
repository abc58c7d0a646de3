"""Formulas over pairs: a row's number and a key's number added and compared, joined by and, or and not.

``g0 & (e1 | g2)`` over the terms ``rows[n, b, q]`` and ``keys[n, b, k]`` lets (b, q, k) through where the sum of the terms 0 is
at least 0, and the terms 1 add up to 0 or the terms 2 to at least 0. Every mask that is made of facts about rows, facts about
keys and comparisons between the two has such a formula, and needs two vectors a comparison instead of a square.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

Sums = Callable[[int], Tensor]
Formula = Callable[[Sums], Tensor]


@dataclass(frozen=True)
class Pairs:
    """A formula and its terms.

    Args:
        text: the formula; ``g<n>``: the sum of the terms n is at least 0; ``e<n>``: it is 0; ``&``, ``|``, ``~``, parentheses.
        rows: int64 [terms, B or 1, Sq].
        keys: int64 [terms, B or 1, Sk].
    """

    text: str
    rows: Tensor
    keys: Tensor

    def visible(self, sums: Sums) -> Tensor:
        """Where the formula holds, given the sum of the terms of each number."""
        return parse(self.text)(sums)


@lru_cache(maxsize=256)
def parse(text: str) -> Formula:
    """The formula as a function.

    Raises:
        ValueError: if the text is none.
    """
    try:
        return _built(ast.parse(text, mode="eval").body, text)
    except SyntaxError:
        raise ValueError(f"not a formula over pairs: {text!r}") from None


def _built(node: ast.expr, text: str) -> Formula:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitAnd, ast.BitOr)):
        left, right = _built(node.left, text), _built(node.right, text)
        if isinstance(node.op, ast.BitAnd):
            return lambda sums: left(sums) & right(sums)
        return lambda sums: left(sums) | right(sums)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        inner = _built(node.operand, text)
        return lambda sums: ~inner(sums)
    if isinstance(node, ast.Name) and node.id[:1] in ("g", "e") and node.id[1:].isdigit():
        number = int(node.id[1:])
        return (lambda sums: sums(number) >= 0) if node.id[0] == "g" else (lambda sums: sums(number) == 0)
    raise ValueError(f"not a formula over pairs: {text!r}")
