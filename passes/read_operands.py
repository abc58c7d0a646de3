"""Read all mask operands of a site in the site's own axes, and tell masks from biases."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import sympy
from torch.fx import Node

from dilcompile.passes.axes import Atom, Axes, Leaves, shape_of
from dilcompile.passes.mask_reader import MaskReader, as_expr, lift
from dilcompile.passes.mask_terms import Bounds, Expr, Ge0, Truth, conjunction, negation
from dilcompile.passes.masks import B, H, K, Lengths, NotAMask, Q, ReadMask, UnclearWindow, keep_of, read_mask
from dilcompile.passes.roles import Roles
from dilcompile.passes.score_path import MaskOperand
from dilcompile.site import EmptyRows, Length, MaskSpec


def read_site_mask(
    operands: Sequence[MaskOperand],
    is_causal: bool,
    roles: Roles,
    axes: Axes,
    reader: MaskReader,
    sizes: tuple[Length, Length, Length, Length],
) -> tuple[ReadMask, tuple[MaskOperand, ...]]:
    """The conjunction of all masks, and the operands that are biases.

    Args:
        sizes: batch, heads, q_len, k_len.
    """
    lengths = Lengths(*sizes)
    reader.sizes.update(lengths.bounds)
    symbols = _symbols(roles)
    keep: Truth = Ge0(Q - K) if is_causal else True
    fills: set[EmptyRows] = set()
    bias: list[MaskOperand] = []
    for operand in operands:
        indices = _indices(operand, roles, axes, symbols)
        if operand.kind == "add":
            try:
                visible, filled = _additive(operand, indices, reader, lengths)
            except NotAMask:
                bias.append(operand)
                continue
            keep, fills = conjunction(keep, visible), fills | filled
            continue
        hidden = reader.truth(operand.node, indices)
        keep = conjunction(keep, hidden if operand.kind == "keep" else negation(hidden))
        if operand.on is not roles.output:  # SDPA hides with -inf and gives 0 where nothing is left
            fills.add("nan" if operand.fill == float("-inf") else "uniform")
    try:
        return read_mask(keep, fills, reader, lengths), tuple(bias)
    except UnclearWindow as unclear:
        return ReadMask(MaskSpec(unread=str(unclear))), tuple(bias)


def _additive(
    operand: MaskOperand, indices: tuple[Expr, ...], reader: MaskReader, lengths: Lengths
) -> tuple[Truth, set[EmptyRows]]:
    value = reader.number(operand.node, indices)
    if operand.factor != 1.0:
        value = lift(operator.mul, value, as_expr(operand.factor))
    visible, fills = keep_of(value)
    return Bounds(lengths.bounds).settle(visible), fills


def _symbols(roles: Roles) -> dict[int, Expr]:
    """An index expression for every atom of the scores."""
    found: dict[int, Expr] = {}
    for atoms, symbol in (
        (tuple(axis.out for axis in roles.batch), B),
        (tuple(axis.out for axis in roles.heads), H),
        (roles.out_rows, Q),
        (roles.score_columns, K),
    ):
        found.update(_digits(atoms, symbol))
    return found


def _digits(atoms: Leaves, symbol: sympy.Symbol) -> dict[int, Expr]:
    """Mixed-radix digits of an index over several atoms; the plain symbol for one."""
    if len(atoms) == 1:
        return {id(atoms[0]): symbol}
    found: dict[int, Expr] = {}
    rest: Expr = symbol
    for atom in reversed(atoms):
        size = as_expr(atom.size)
        found[id(atom)] = sympy.Mod(rest, size)
        rest = sympy.floor(rest / size)
    return found


def _indices(operand: MaskOperand, roles: Roles, axes: Axes, symbols: dict[int, Expr]) -> tuple[Expr, ...]:
    """The operand's indices for the pair (b, h, q, k): its dims are broadcast against the scores'."""
    # An SDPA call's own output stands for scores that it never shows.
    score_dims = _score_dims(operand.on, roles, axes) if operand.on is roles.output else axes[operand.on]
    rank = len(shape_of(operand.node))
    dims = score_dims[len(score_dims) - rank :]
    return tuple(_index(dim, symbols) for dim in dims)


def _score_dims(node: Node, roles: Roles, axes: Axes) -> tuple[Leaves, ...]:
    """The dims of the scores that an SDPA call never shows."""
    return (*axes[node][:-2], roles.out_rows, roles.score_columns)


def _index(dim: Leaves, symbols: dict[int, Expr]) -> Expr:
    index: Expr = sympy.Integer(0)
    for atom in dim:
        index = index * as_expr(atom.size) + _symbol(atom, symbols)
    return sympy.expand(index)


def _symbol(atom: Atom, symbols: dict[int, Expr]) -> Expr:
    return symbols[id(atom)]

