"""What kind of bias is added to the scores, in a word: slopes by distance, a learned table, or numbers of any kind."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.finding.origins import behind, origins
from dilcompile.passes.finding.slopes import slopes_of
from dilcompile.passes.graph.operators import indexed, is_tensor, op_name, shape_of
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.masks.symbols import H, K, Lengths, Q
from dilcompile.passes.masks.terms import Number
from dilcompile.site import BiasSpec, BiasWord, Length

_LARGEST_INDEX = 1 << 22


def bias_spec(node: Node, value: Number | None, lengths: Lengths, axes: Axes, reader: MaskReader) -> BiasSpec:
    """The bias by its kind.

    Args:
        node: what is added to the scores.
        value: its element as a formula over (b, h, q, k), where there is one.
        lengths: of the site.
    """
    slopes = None if value is None else slopes_of(value, int(lengths.heads), axes, reader)
    if slopes is not None:
        return BiasSpec("alibi", node.name, slopes)
    return BiasSpec(_table_word(node, lengths.q_len, axes, reader) or "tensor", node.name)


def _table_word(node: Node, q_len: Length, axes: Axes, reader: MaskReader) -> BiasWord | None:
    """Rows of a table of weights, chosen by how far a key is from its row; those of T5 come out of a logarithm."""
    if "data" in origins(node, axes, reader):
        return None
    for one in behind(node, reader):
        table, numbers = _lookup(one, reader)
        if table is None or numbers is None or not origins(numbers, axes, reader) <= {"constant"}:
            continue
        if "weight" in origins(table, axes, reader) and _is_relative(numbers, q_len, reader):
            logarithm = any(op_name(source) == "log" for source in behind(numbers, reader))
            return "t5 buckets" if logarithm else "relative table"
    return None


def _lookup(node: Node, reader: MaskReader) -> tuple[Node | None, Node | None]:
    """A table and the numbers that choose its rows, if there is one tensor of them."""
    name, args = op_name(node), node.args
    if name == "embedding":
        return args[0], args[1]  # type: ignore[return-value]
    found = indexed(node)
    if found is None and name in ("index_select", "gather"):
        found = args[0], list(args[2:])  # type: ignore[assignment]
    if found is None:
        return None, None
    # In a function of one pair the head's own number chooses the column.
    numbers = [index for index in found[1] if isinstance(index, Node) and reader.given.get(index) != H]
    return (found[0], numbers[0]) if len(numbers) == 1 else (None, None)


def _is_relative(numbers: Node, q_len: Length, reader: MaskReader) -> bool:
    """Do the numbers come of differences between the places of rows and keys?"""
    for one in behind(numbers, reader):
        if op_name(one) in ("sub", "rsub") and (_pairs_up(one, q_len) or _of_a_pair(one, reader)):
            return True
        held = reader.tables.get(one)
        if held is not None and not held.dtype.is_floating_point and is_by_offset(held):
            return True
    return False


def _pairs_up(difference: Node, q_len: Length) -> bool:
    """Is it a difference of two tensors along different dims? A single row may have none of its own."""
    sides = [side for side in difference.args[:2] if is_tensor(side)]
    whole = shape_of(difference)
    smaller = [side for side in sides if shape_of(side) != whole]  # type: ignore[arg-type]
    single = isinstance(q_len, int) and q_len == 1
    return len(sides) == 2 and len(smaller) >= (1 if single else 2)


def _of_a_pair(difference: Node, reader: MaskReader) -> bool:
    """Is it a difference of the row's and the key's own numbers, inside a function of one pair?"""
    sides = [reader.made_of(side) for side in difference.args[:2] if is_tensor(side)]  # type: ignore[arg-type]
    return sides in ([[Q], [K]], [[K], [Q]])


def is_by_offset(table: torch.Tensor) -> bool:
    """Does a table of numbers for all pairs depend on their offset alone, along a line or over a grid of up to three dims?

    Rows and columns before the grid (class tokens) may hold anything.
    """
    if table.numel() > _LARGEST_INDEX:
        return False
    size = math.isqrt(table.numel())
    if size < 2 or size * size != table.numel():
        return False
    square = table.reshape(size, size)
    return any(_over_grid(square[extra:, extra:]) for extra in (0, 1, 2) if size - extra > 1)


def _over_grid(square: torch.Tensor) -> bool:
    size = square.shape[0]
    if bool((square == square[0, 0]).all()):
        return False
    for first in _divisors(size):
        for second in _divisors(size // first):
            grid = (first, second, size // first // second)
            if _is_toeplitz(square.reshape(*grid, *grid)):
                return True
    return False


def _is_toeplitz(pairs: torch.Tensor) -> bool:
    """Is it the same for all pairs of one offset, dim by dim?"""
    dims = pairs.dim() // 2
    for dim in range(dims):
        length = pairs.shape[dim]
        if length == 1:
            continue
        later = pairs.narrow(dim, 1, length - 1).narrow(dim + dims, 1, length - 1)
        earlier = pairs.narrow(dim, 0, length - 1).narrow(dim + dims, 0, length - 1)
        if not torch.equal(later, earlier):
            return False
    return True


def _divisors(size: int) -> list[int]:
    return [divisor for divisor in range(1, size + 1) if size % divisor == 0]
