"""Some rows of a value, made anew from the rows that they are made of: what is never asked for as a whole need not be there.

A slice is pulled back through the operators that made a value, until it stands at an input, or at a value that does not hold a
number for each pair of a query and a key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.axes.along import REDUCES, argument, dims_along, indexed_dims
from dilcompile.passes.axes.axis_rules import RULES as LAYOUT_RULES
from dilcompile.passes.axes.products import parse_product
from dilcompile.passes.graph.operators import PRODUCTS, VIEWS, full_name, indexed, is_pointwise, is_tensor, op_name, shape_of
from dilcompile.passes.memory.growing import Growing
from dilcompile.passes.memory.rows import Rows, run_in, sized, source_dim, triangle_of_rows
from dilcompile.passes.memory.shared_buffers import unviewed
from dilcompile.site import Length

aten = torch.ops.aten

COPIES = frozenset("_to_copy convert_element_type clone alias detach lift_fresh_copy copy contiguous".split())
_FILLED: dict[str, int | None] = {"full": None, "full_like": None, "new_full": None}
_FILLED.update(dict.fromkeys(("zeros", "zeros_like", "new_zeros"), 0))
_FILLED.update(dict.fromkeys(("ones", "ones_like", "new_ones"), 1))
_MOVES = frozenset("permute transpose t mT swapaxes swapdims movedim moveaxis unsqueeze squeeze expand select".split())
_BESIDE = frozenset("softmax _softmax _safe_softmax log_softmax _log_softmax cumsum cumprod logcumsumexp flip roll".split())


@dataclass
class RowsOf:
    """Makes rows of values; what is asked for twice is made once.

    Args:
        grow: where the nodes go.
        keys: a value with fewer numbers a row than this has none for each key; it is sliced.
        most: a value with no more numbers than this may be sliced, too: it is no larger than the queries.
        before: what has to be there before the rows are made. They are read off slices that wait for it, so that nothing makes
            rows earlier, or once for several.
    """

    grow: Growing
    keys: int
    most: int
    before: tuple[Node, ...]
    _made: dict[tuple[Node, Rows], Node | str] = field(default_factory=dict)

    def of(self, node: Node, rows: Rows) -> Node | str:
        """A node that holds these rows of a node's value, or the reason why there is none."""
        shape = shape_of(node)
        if rows.start == 0 and rows.stop == shape[rows.dim]:
            return node
        if (node, rows) not in self._made:
            self._made[node, rows] = self._of(node, rows, shape)
        return self._made[node, rows]

    def like(self, node: Node, args: Sequence[Any], **kwargs: Any) -> Node:
        """The node's operator over other arguments."""
        return self.grow.call(node.target, args, {**node.kwargs, **kwargs}, node)

    def sliced(self, node: Node, rows: Rows) -> Node:
        """The rows of the whole value."""
        return self.grow.call(torch.ops.dilcompile.after.default, (view_of(self.grow, node, rows), list(self.before)), {}, node)

    def _of(self, node: Node, rows: Rows, shape: tuple[Length, ...]) -> Node | str:
        if not all(isinstance(size, int) for size in shape):
            return f"the sizes of {named(node)} are known only when the graph runs"
        numbers = prod(int(size) for size in shape)
        if node.op != "call_function" or numbers // int(shape[rows.dim]) < self.keys:
            return self.sliced(node, rows)
        rule = _rule(node)
        if numbers <= self.most and (rule is None or rule is _product):
            return self.sliced(node, rows)
        found = f"what {named(node)} does to its rows is not known" if rule is None else rule(self, node, rows)
        return self.sliced(node, rows) if isinstance(found, str) and numbers <= self.most else found


def view_of(grow: Growing, node: Node, rows: Rows) -> Node:
    """The rows as a view of the whole value."""
    if rows.start == 0 and rows.stop == shape_of(node)[rows.dim]:
        return node
    return grow.call(aten.slice.Tensor, (node, rows.dim, rows.start, rows.stop), {}, node)


Rule = Callable[[RowsOf, Node, Rows], "Node | str"]


def _rule(node: Node) -> Rule | None:
    name = op_name(node)
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return _drawn
    if name in _RULES:
        return _RULES[name]
    if indexed(node) is not None:
        return _indexed
    if name in PRODUCTS:
        return _product
    if name in REDUCES:
        return _reduced
    if name in _BESIDE:
        return _beside
    return _pointwise if is_pointwise(node) else None


def named(node: Node) -> str:
    """For reasons."""
    return f"{node.name} ({full_name(node)})"


def _drawn(over: RowsOf, node: Node, rows: Rows) -> str:
    return f"{named(node)} draws random numbers, which are not drawn again"


def _pointwise(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    rank = len(shape_of(node))
    args = list(node.args)
    for number, arg in enumerate(args):
        if is_tensor(arg):
            made = broadcast(over, arg, rows, rank)  # type: ignore[arg-type]
            if isinstance(made, str):
                return made
            args[number] = made
    return over.like(node, args)


def broadcast(over: RowsOf, operand: Node, rows: Rows, rank: int) -> Node | str:
    """The rows of an operand that is broadcast to ``rank`` dims."""
    shape = shape_of(operand)
    own = rows.dim - rank + len(shape)
    return operand if own < 0 or shape[own] == 1 else over.of(operand, Rows(own, rows.start, rows.stop))


def _filled(over: RowsOf, node: Node, rows: Rows) -> Node:
    value, filling = node.meta["val"], _FILLED[op_name(node)]
    filling = argument(node, "fill_value") if filling is None else filling
    said = {"dtype": value.dtype, "device": value.device, "pin_memory": False}
    return over.grow.call(aten.full.default, (sized(node, rows), filling), said, node)


def _moved(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source, dim = node.args[0], source_dim(node, rows.dim)
    assert isinstance(source, Node)
    made = source if dim is None else over.of(source, Rows(dim, rows.start, rows.stop))
    if isinstance(made, str):
        return made
    if op_name(node) == "expand":
        return over.like(node, (made, sized(node, rows)))
    return over.like(node, (made, *node.args[1:]))


def _viewed(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source = node.args[0]
    assert isinstance(source, Node)
    before = run_in(node, source, rows)
    if before is None:
        return f"{named(node)} cuts or joins the rows"
    made = over.of(source, before)
    return made if isinstance(made, str) else reshaped(over.grow, made, sized(node, rows), node)


def reshaped(grow: Growing, node: Node, shape: list[int], like: Node) -> Node:
    """A view where there is one, else a view of a copy."""
    value = node.meta["val"]
    if unviewed(tuple(shape), tuple(value.shape), value.stride()) is None:
        node = grow.call(aten.clone.default, (node,), {"memory_format": torch.contiguous_format}, like)
    return grow.call(aten.view.default, (node, shape), {}, like)


def _slice(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source, dim = node.args[0], int(argument(node, "dim"))
    assert isinstance(source, Node)
    size = int(shape_of(source)[dim])
    if dim % len(shape_of(node)) != rows.dim:
        made = over.of(source, rows)
        return made if isinstance(made, str) else over.like(node, (made, *node.args[1:]))
    if argument(node, "step") != 1:
        return f"{named(node)} takes every other row"
    first = argument(node, "start") or 0
    first = min(max(first + size if first < 0 else first, 0), size)
    return over.of(source, Rows(rows.dim, first + rows.start, first + rows.stop))


def _cat(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    parts: Any = node.args[0]
    dim, made, first = int(argument(node, "dim")) % len(shape_of(node)), list[Node](), 0
    for part in parts:
        size = int(shape_of(part)[rows.dim])
        own = rows
        if dim == rows.dim:
            own = Rows(dim, max(0, rows.start - first), min(size, rows.stop - first))
            first += size
        found = over.of(part, own) if own.size > 0 else None
        if isinstance(found, str):
            return found
        if found is not None:
            made.append(found)
    return over.like(node, (made, dim))


def _reduced(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source = node.args[0]
    assert isinstance(source, Node)
    dim = source_dim(node, rows.dim) if op_name(node) in LAYOUT_RULES else None
    made = f"{named(node)} is not known by rows" if dim is None else over.of(source, Rows(dim, rows.start, rows.stop))
    return made if isinstance(made, str) else over.like(node, (made, *node.args[1:]))


def _beside(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source = node.args[0]
    assert isinstance(source, Node)
    if rows.dim in dims_along(node, shape_of(source)):
        return f"{named(node)} runs along the rows"
    made = over.of(source, rows)
    return made if isinstance(made, str) else over.like(node, (made, *node.args[1:]))


def _embedding(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    weight, numbers = node.args[:2]
    assert isinstance(numbers, Node)
    if rows.dim == len(shape_of(numbers)):
        return f"the rows are features of {named(node)}"
    made = over.of(numbers, rows)
    return made if isinstance(made, str) else over.like(node, (weight, made, *node.args[2:]))


def _indexed(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    tensor, numbers = node.args[:2]
    assert isinstance(tensor, Node)
    assert isinstance(numbers, (list, tuple))
    ways = [(operand, dim) for operand, dim, out in indexed_dims(node, tensor, numbers) if out == rows.dim]
    if not ways:
        return f"which rows of its operands {named(node)} takes is known only when the graph runs"
    made: dict[Node, Node] = {}
    for operand, dim in ways:
        found = over.of(operand, Rows(dim, rows.start, rows.stop))
        if isinstance(found, str):
            return found
        made[operand] = found
    # An operand may be among the indices, too, with another dim.
    if len(made) < len(ways):
        return f"{named(node)} takes one tensor several times"
    taken = [made.get(index, index) if isinstance(index, Node) else index for index in numbers]
    return over.like(node, (made.get(tensor, tensor), taken))


def _index_select(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source, dim, numbers = node.args
    assert isinstance(source, Node)
    assert isinstance(numbers, Node)
    along = int(dim) % len(shape_of(source)) == rows.dim  # type: ignore[arg-type]
    made = over.of(numbers, Rows(0, rows.start, rows.stop)) if along else over.of(source, rows)
    if isinstance(made, str):
        return made
    return over.like(node, (source, dim, made) if along else (made, dim, numbers))


def _gather(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source, dim, numbers = node.args[:3]
    assert isinstance(source, Node)
    assert isinstance(numbers, Node)
    taken = over.of(numbers, rows)
    if isinstance(taken, str):
        return taken
    if int(dim) % len(shape_of(source)) != rows.dim:  # type: ignore[arg-type]
        made = over.of(source, rows)
        if isinstance(made, str):
            return made
        source = made
    return over.like(node, (source, dim, taken, *node.args[3:]))


def _product(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    product = parse_product(node)
    if product is None:
        return f"what {named(node)} multiplies is not known"
    dims = [(left, right) for left, right, out in product.batch if out == rows.dim] or [
        *((dim, None) for dim, out in product.lhs_free if out == rows.dim),
        *((None, dim) for dim, out in product.rhs_free if out == rows.dim),
    ]
    (left, right), made = dims[0], list[Node]()
    for operand, dim in ((product.lhs, left), (product.rhs, right)):
        whole = dim is None or shape_of(operand)[dim] == 1
        found = operand if whole else over.of(operand, Rows(dim, rows.start, rows.stop))  # type: ignore[arg-type]
        if isinstance(found, str):
            return found
        made.append(found)
    before = []
    if op_name(node) in ("addmm", "baddbmm", "addmv", "addbmm"):
        addend = node.args[0]
        assert isinstance(addend, Node)
        found = broadcast(over, addend, rows, len(shape_of(node)))
        if isinstance(found, str):
            return found
        before = [found]
    return over.like(node, (*before, *made))


def _padded(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source, widths = node.args[:2]
    assert isinstance(source, Node)
    assert isinstance(widths, (list, tuple))
    rank = len(shape_of(source))
    if any(width for i, width in enumerate(widths) if rank - 1 - i // 2 == rows.dim):
        return f"{named(node)} pads the rows"
    made = over.of(source, rows)
    return made if isinstance(made, str) else over.like(node, (made, *node.args[1:]))


def _triangle(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source = node.args[0]
    assert isinstance(source, Node)
    made = over.of(source, rows)
    return made if isinstance(made, str) else over.like(node, (made, triangle_of_rows(node, rows)))


def _bucketize(over: RowsOf, node: Node, rows: Rows) -> Node | str:
    source = node.args[0]
    assert isinstance(source, Node)
    made = over.of(source, rows)
    return made if isinstance(made, str) else over.like(node, (made, *node.args[1:]))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(COPIES, _pointwise),
    **dict.fromkeys(_FILLED, _filled),
    **dict.fromkeys(_MOVES, _moved),
    **dict.fromkeys(VIEWS, _viewed),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("cat", "concat"), _cat),
    "slice": _slice,
    "embedding": _embedding,
    "gather": _gather,
    "index_select": _index_select,
    "constant_pad_nd": _padded,
    "bucketize": _bucketize,
}
