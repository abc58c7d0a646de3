"""One rule an operator: the layout of its result, from the layouts of its arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from dilcompile.passes.axes.atoms import Layout, Leaves, flat, leaves, regroup, role_of, spans
from dilcompile.passes.axes.dim_order import dims_of
from dilcompile.passes.graph.operators import VIEWS, full_name, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.site import Length

if TYPE_CHECKING:
    from dilcompile.passes.axes.axes import Axes

Rule = Callable[["Axes", Node], "Layout | None"]


def _input(axes: Axes, node: Node) -> Layout:
    first = node.args[0]
    assert isinstance(first, Node)
    return axes[first]


def _dim(node: Node, position: int, rank: int, default: int = 0) -> int:
    dim = node.args[position] if len(node.args) > position else node.kwargs.get("dim", default)
    assert isinstance(dim, int)
    return dim % rank if rank else 0


def _view(axes: Axes, node: Node) -> Layout | None:
    before, shape = _input(axes, node), shape_of(node)
    grouped = regroup(flat(before), shape)
    if grouped is not None:
        return grouped
    # What stands before the dim that can't be cut keeps its identity.
    kept: list[Leaves] = []
    for old, size, dim in zip(shape_of(node.args[0]), shape, before, strict=False):  # type: ignore[arg-type]
        if not same_size(old, size):
            break
        kept.append(dim)
    rest = [axes.fresh(size) for size in shape[len(kept) :]]
    return tuple(kept + rest)


def _permute(order: Callable[[Node, int], Sequence[int]]) -> Rule:
    def rule(axes: Axes, node: Node) -> Layout:
        before = _input(axes, node)
        return tuple(before[dim] for dim in order(node, len(before)))

    return rule


def _swap(node: Node, rank: int) -> Sequence[int]:
    order = list(range(rank))
    i, j = _dim(node, 1, rank), _dim(node, 2, rank)
    order[i], order[j] = order[j], order[i]
    return order


def _swap_last(node: Node, rank: int) -> Sequence[int]:
    order = list(range(rank))
    order[-2:] = reversed(order[-2:])
    return order


def _movedim(node: Node, rank: int) -> Sequence[int]:
    source, target = node.args[1], node.args[2]
    sources = [source] if isinstance(source, int) else list(source)  # type: ignore[arg-type]
    targets = [target] if isinstance(target, int) else list(target)  # type: ignore[arg-type]
    moved = {int(t) % rank: int(s) % rank for s, t in zip(sources, targets, strict=True)}
    rest = iter(dim for dim in range(rank) if dim not in moved.values())
    return [moved[dim] if dim in moved else next(rest) for dim in range(rank)]


def _unsqueeze(axes: Axes, node: Node) -> Layout:
    before = list(_input(axes, node))
    before.insert(_dim(node, 1, len(before) + 1), ())
    return tuple(before)


def _squeeze(axes: Axes, node: Node) -> Layout | None:
    before = _input(axes, node)
    if len(node.args) == 1:
        return tuple(d for d, size in zip(before, shape_of(node.args[0]), strict=True) if not same_size(size, 1))  # type: ignore[arg-type]
    asked = node.args[1]
    dims = [asked] if isinstance(asked, int) else list(asked)  # type: ignore[arg-type]
    gone = {int(d) % len(before) for d in dims}
    return tuple(d for i, d in enumerate(before) if i not in gone or d)


def _expand(axes: Axes, node: Node) -> Layout:
    before, shape = _input(axes, node), shape_of(node)
    padded = ((),) * (len(shape) - len(before)) + before
    return tuple(dim or axes.fresh(size, broadcast=True) for dim, size in zip(padded, shape, strict=True))


def _repeat(axes: Axes, node: Node) -> Layout | None:
    before = _input(axes, node)
    times = node.args[1]
    if not isinstance(times, (list, tuple)):
        return None
    padded = ((),) * (len(times) - len(before)) + before
    return tuple(
        (axes.fresh(n, broadcast=True) if not isinstance(n, Node) else axes.fresh(n.meta["val"], broadcast=True)) + dim
        for n, dim in zip(times, padded, strict=True)
    )


def _repeat_interleave(axes: Axes, node: Node) -> Layout | None:
    if len(node.args) < 2 or isinstance(node.args[1], Node) or ("dim" not in node.kwargs and len(node.args) < 3):
        return None
    before = list(_input(axes, node))
    dim = _dim(node, 2, len(before))
    before[dim] = before[dim] + axes.fresh(node.args[1], broadcast=True)  # type: ignore[arg-type]
    return tuple(before)


def _select(axes: Axes, node: Node) -> Layout:
    before = list(_input(axes, node))
    del before[_dim(node, 1, len(before))]
    return tuple(before)


def _slice(axes: Axes, node: Node) -> Layout:
    before, shape = _input(axes, node), shape_of(node)
    first = node.args[0]
    assert isinstance(first, Node)
    return tuple(
        dim if same_size(old, new) else _segment(node, i, dim, new) or axes.fresh(new, role_of(leaves(dim)), leaves(dim))
        for i, (dim, old, new) in enumerate(zip(before, shape_of(first), shape, strict=True))
    )


def _segment(node: Node, position: int, dim: Leaves, size: Length) -> Leaves:
    """The part of a concatenated axis that a slice cuts out, if it is one."""
    if len(dim) != 1 or not dim[0].segments or _dim(node, 1, len(shape_of(node))) != position:
        return ()
    at: Length = 0
    start = node.args[2] if len(node.args) > 2 else node.kwargs.get("start", 0)
    step = node.args[4] if op_name(node) == "slice" and len(node.args) > 4 else 1
    start = start.meta["val"] if isinstance(start, Node) else start or 0
    if step != 1 or not isinstance(start, (int, torch.SymInt)):
        return ()
    if isinstance(start, int) and start < 0:
        start = start + dim[0].size
    for length, part in dim[0].segments:
        if same_size(at, start) and same_size(length, size):
            return () if any(atom.broadcast for atom in part) else part
        at = at + length
    return ()


def _getitem(axes: Axes, node: Node) -> Layout | None:
    parent = node.args[0]
    if not isinstance(parent, Node) or parent.op != "call_function" or not parent.args:
        return None
    if full_name(parent) in axes.calls:
        return attention(axes, parent) if node.args[1] == 0 else None
    name = op_name(parent)
    source = parent.args[0]
    if not isinstance(source, Node) or source not in axes:
        return None
    before = axes[source]
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        dim = _dim(parent, 2, len(before))
        after = list(before)
        after[dim] = axes.fresh(shape_of(node)[dim], role_of(leaves(before[dim])), leaves(before[dim]))
        return tuple(after)
    if name == "unbind":
        dim = _dim(parent, 1, len(before))
        return before[:dim] + before[dim + 1 :]
    if name in ("native_dropout", "native_layer_norm", "_fused_rms_norm") and node.args[1] == 0:
        return before
    return None


def _cat(axes: Axes, node: Node) -> Layout | None:
    parts = [part for part in node.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    shape = shape_of(node)
    usable = [part for part in parts if len(shape_of(part)) == len(shape)]
    if not usable:
        return None
    dim = _dim(node, 1, len(shape))
    # Scores keep their axes, on whichever side of other columns they stand.
    after = list(axes[next((part for part in usable if part in axes.of_products), usable[0])])
    newest = axes[usable[-1]][dim]
    after[dim] = axes.fresh(shape[dim], role_of(newest), newest)
    if len(usable) == len(parts):
        _remember(after[dim], [(shape_of(part)[dim], axes[part][dim]) for part in parts])
    return tuple(after)


def _pad(axes: Axes, node: Node) -> Layout | None:
    before, shape = list(_input(axes, node)), shape_of(node)
    widths = node.args[1]
    if not isinstance(widths, (list, tuple)) or len(widths) != 2 or not all(isinstance(width, int) for width in widths):
        return None
    own, old = before[-1], shape_of(node.args[0])[-1]  # type: ignore[arg-type]
    before[-1] = axes.fresh(shape[-1], role_of(own), own)
    _remember(before[-1], [(widths[0], ()), (old, own), (widths[1], ())])  # type: ignore[list-item]
    return tuple(before)


def _remember(joined: Leaves, segments: list[tuple[Length, Leaves]]) -> None:
    """What a concatenated axis is put together from: a slice that cuts one part out again is that part's axis."""
    if len(joined) == 1:
        joined[0].segments = tuple(segments)


def _stack(axes: Axes, node: Node) -> Layout | None:
    parts = [part for part in node.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    after = list(axes[parts[0]])
    dim = _dim(node, 1, len(after) + 1)
    after.insert(dim, axes.fresh(shape_of(node)[dim]))
    return tuple(after)


def _conv(axes: Axes, node: Node) -> Layout | None:
    before, shape = _input(axes, node), shape_of(node)
    if len(before) != len(shape) or len(shape) < 3:
        return None
    weight = node.args[1]
    assert isinstance(weight, Node)
    # A kernel of size 1 mixes channels alone.
    alone = all(same_size(size, 1) for size in shape_of(weight)[2:]) and all(map(spans, before[2:], shape[2:]))
    spatial = (
        tuple(tuple(atom.as_places() for atom in dim) for dim in before[2:])
        if alone
        else tuple(axes.fresh(size, "token") for size in shape[2:])
    )
    return (before[0], axes.fresh(shape[1], "feature"), *spatial)


def _embedding(axes: Axes, node: Node) -> Layout:
    ids = node.args[1]
    assert isinstance(ids, Node)
    return axes[ids] + (axes.fresh(shape_of(node)[-1], "feature"),)


def attention(axes: Axes, call: Node) -> Layout | None:
    """The output of a whole attention: batch, heads and rows of the queries, features of the values."""
    operands = [arg for arg in call.args[:3] if isinstance(arg, Node)]
    q, _, v = operands
    shape = shape_of(q)
    if any(len(shape_of(operand)) != len(shape) for operand in operands):
        return None
    letters = dims_of(axes.calls[full_name(call)], len(shape))
    layout = []
    for dim, letter in enumerate(letters):
        # A batch axis that the queries are broadcast along is the keys' or the values'.
        sources = {"s": (q,), "d": (v,)}.get(letter, operands)
        layout.append(next((axes[source][dim] for source in sources if not same_size(shape_of(source)[dim], 1)), ()))
    return tuple(layout)


def _reduce(axes: Axes, node: Node) -> Layout | None:
    before, shape = _input(axes, node), shape_of(node)
    if len(shape) == len(before):
        return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, before, strict=True))
    asked = node.args[1] if len(node.args) > 1 else None
    dims = [asked] if isinstance(asked, int) else list(asked) if isinstance(asked, (list, tuple)) else range(len(before))
    gone = {int(dim) % len(before) for dim in dims}
    return tuple(dim for i, dim in enumerate(before) if i not in gone)


def _view_as_complex(axes: Axes, node: Node) -> Layout:
    return _input(axes, node)[:-1]


def _view_as_real(axes: Axes, node: Node) -> Layout:
    return (*_input(axes, node), axes.fresh(2))


RULES: dict[str, Rule] = {
    **dict.fromkeys(VIEWS, _view),
    "transpose": _permute(_swap),
    "swapaxes": _permute(_swap),
    "swapdims": _permute(_swap),
    "permute": _permute(lambda node, rank: [int(d) % rank for d in node.args[1]]),  # type: ignore[union-attr, arg-type]
    "t": _permute(_swap_last),
    "mT": _permute(_swap_last),
    "adjoint": _permute(_swap_last),
    "numpy_T": _permute(lambda node, rank: list(reversed(range(rank)))),
    "movedim": _permute(_movedim),
    "moveaxis": _permute(_movedim),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "expand_as": _expand,
    "broadcast_to": _expand,
    "repeat": _repeat,
    "repeat_interleave": _repeat_interleave,
    "select": _select,
    "slice": _slice,
    "narrow": _slice,
    "getitem": _getitem,
    "cat": _cat,
    "concat": _cat,
    "pad": _pad,
    "constant_pad_nd": _pad,
    "stack": _stack,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
    "embedding": _embedding,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "any", "all"), _reduce),
}
