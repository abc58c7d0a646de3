"""Which formulas can be computed as a vector along the keys."""

from __future__ import annotations

import sympy
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.symbols import B, K, Lengths
from dilcompile.passes.masks.terms import Element, Expr, Truth, numbers_of
from dilcompile.passes.operators import shape_of


def emittable(truth: Truth, reader: MaskReader, lengths: Lengths) -> bool:
    """Can the factor be computed as a [B, Sk] tensor?"""
    return all(emittable_number(expr, reader, lengths) for expr in numbers_of(truth))


def emittable_number(expr: Expr, reader: MaskReader, lengths: Lengths) -> bool:
    """Is it a sum of numbers, the key position and elements at (b, k), each with a number before it?"""
    terms = [term.as_coeff_Mul() for term in sympy.Add.make_args(sympy.expand(expr))]
    return all(
        factor.is_finite and (rest == 1 or rest == K or (isinstance(rest, Element) and _plain_indices(rest, reader, lengths)))
        for factor, rest in terms
    )


def _plain_indices(element: Expr, reader: MaskReader, lengths: Lengths) -> bool:
    """Is the element indexed by b, k and numbers, the letters at most once, in a tensor that is long enough?"""
    live = [index for index in element.args[1:] if not index.is_Integer]
    if any(index not in (B, K) for index in live) or len(set(live)) != len(live):
        return False
    shape = shape_of(reader.elements[int(element.args[0])])
    ends = {B: lengths.batch, K: lengths.k_len}
    return all(
        index.is_Integer or statically_known_true(size >= ends[index])
        for size, index in zip(shape, element.args[1:], strict=True)
    )
