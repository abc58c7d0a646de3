"""Give every atom of a query-key-value triple its role: batch, head, query row, key column, feature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from dilcompile.passes.axes import Atom, Axes, Leaves, align, flat, is_tensor, leaves, op_name, same_size, shape_of
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.products import Product
from dilcompile.passes.score_path import Unproven, scalar_or_none


@dataclass(frozen=True)
class Shared:
    """An axis that query and output have, and that key and value have or are broadcast along.

    Args:
        out: the atom in the scores and in the output.
        q, k, v: the atom in each operand; None where the operand does not vary along it.
        is_head: a head axis (it comes out of a projection), else a batch axis.
    """

    out: Atom
    q: Atom | None
    k: Atom | None
    v: Atom | None
    is_head: bool


@dataclass(frozen=True)
class Roles:
    """Who is who in one attention; everything in atoms, so that any layout reads the same.

    Args:
        q, k, v: the operand nodes.
        shared: batch and head axes, in the order of the scores.
        rows, columns: query and key axis (as atoms of q, and of k and v).
        out_rows: the query axis as it appears in the output.
        features, v_features: contracted axis (in q, in k), and the value's own.
        output: the node that holds the result.
    """

    q: Node
    k: Node
    v: Node
    shared: tuple[Shared, ...]
    q_rows: Leaves
    k_columns: Leaves
    v_columns: Leaves
    out_rows: Leaves
    q_features: Leaves
    k_features: Leaves
    v_features: Leaves
    score_columns: Leaves
    output: Node

    @property
    def batch(self) -> tuple[Shared, ...]:
        return tuple(axis for axis in self.shared if not axis.is_head)

    @property
    def heads(self) -> tuple[Shared, ...]:
        """Head axes, those of the keys first: query head = key head * group + member."""
        own = [axis for axis in self.shared if axis.is_head and (axis.k is not None or axis.v is not None)]
        grouped = [axis for axis in self.shared if axis.is_head and axis.k is None and axis.v is None]
        return tuple(own + grouped)


def _varying(atom: Atom | None) -> Atom | None:
    return None if atom is None or atom.broadcast else atom


def roles_of_products(scores: Product, softmax: Node, dim: int, values: Product, axes: Axes) -> Roles:
    """Prove that softmax and value product run over the key axis, and name the axes.

    Raises:
        Unproven: naming the product whose axes don't fit.
    """
    columns = axes[softmax][dim]
    lhs_out = _joined(axes, scores.node, scores.lhs_free)
    rhs_out = _joined(axes, scores.node, scores.rhs_free)
    if columns and _ids(columns) <= _ids(rhs_out):
        q, k, q_free, k_free, flip = scores.lhs, scores.rhs, scores.lhs_free, scores.rhs_free, False
    elif columns and _ids(columns) <= _ids(lhs_out):
        q, k, q_free, k_free, flip = scores.rhs, scores.lhs, scores.rhs_free, scores.lhs_free, True
    else:
        raise Unproven(
            softmax, "the softmax does not run over the key axis of the product", "it is not token attention; it stays as it is"
        )
    if any(atom.role == "feature" for atom in columns):
        raise Unproven(softmax, "the softmax runs over a feature axis (channel attention)", "it is not token attention")
    shared = _shared_of_scores(scores, axes, flip)
    k_columns, extra = _column_side(axes, k, k_free, scores.node, columns)
    if len(k_columns) != len(columns):
        raise Unproven(softmax, "the softmax does not run over the key axis of the product", "it is not token attention")
    rows, out_rows, heads = _row_side(axes, q, q_free, scores.node)
    shared += [Shared(out, atom, None, None, True) for atom, out in heads]
    shared += [Shared(out, None, atom, None, True) for atom, out in extra]
    contracted = scores.contracted
    q_features = tuple(atom for left, right in contracted for atom in axes[q][right if flip else left])
    k_features = tuple(atom for left, right in contracted for atom in axes[k][left if flip else right])
    if any(atom.role == "token" for atom in q_features + k_features):
        raise Unproven(scores.node, "the product sums over a token axis (channel attention)", "it is not token attention")
    return _with_values(q, k, shared, rows, out_rows, columns, k_columns, q_features, k_features, values, softmax, axes)


def _ids(atoms: Leaves) -> set[int]:
    return {id(atom) for atom in atoms}


def _joined(axes: Axes, node: Node, free: tuple[tuple[int, int], ...]) -> Leaves:
    return tuple(atom for _, out in free for atom in axes[node][out])


def _shared_of_scores(scores: Product, axes: Axes, flip: bool) -> list[Shared]:
    found = []
    lhs, rhs, out = axes[scores.lhs], axes[scores.rhs], axes[scores.node]
    rank = len(scores.batch)
    for i, (left, right, at) in enumerate(scores.batch):
        pairs = align(() if left is None else lhs[left], () if right is None else rhs[right])
        if pairs is None:
            raise Unproven(scores.node, "query and key have batch axes that can't be matched", "it stays as it is")
        for (x, y), result in zip(pairs, leaves(out[at]), strict=True):
            q, k = (y, x) if flip else (x, y)
            named = [atom for atom in (q, k) if atom is not None and not atom.broadcast]
            is_head = any(atom.role == "feature" for atom in named)
            unknown = all(atom.role is None for atom in named)
            found.append((i, unknown, Shared(result, _varying(q), _varying(k), None, is_head)))
    if not any(axis.is_head for _, _, axis in found):
        # Nothing says where the heads come from: they stand last before the rows, as in [B, H, S, D].
        found = [(i, unknown, Shared(s.out, s.q, s.k, None, unknown and i == rank - 1 and rank >= 2)) for i, unknown, s in found]
    return [axis for _, _, axis in found]


def _row_side(
    axes: Axes, q: Node, free: tuple[tuple[int, int], ...], scores: Node
) -> tuple[Leaves, Leaves, list[tuple[Atom, Atom]]]:
    """The query axis, and head axes that only the queries have (multi-query attention)."""
    pairs = [(atom, out) for dim, at in free for atom, out in zip(axes[q][dim], axes[scores][at], strict=True)]
    rows = [(atom, out) for atom, out in pairs if atom.role != "feature"]
    heads = [(atom, out) for atom, out in pairs if atom.role == "feature"]
    if not rows and heads:
        if len(heads) > 1 or len(free) > 1:
            raise Unproven(scores, "the query axis can't be told from the heads", "it stays as it is")
        raise Unproven(scores, "the query axis is a feature axis (channel attention)", "it is not token attention")
    if len(free) > 1 and not heads:
        # Unknown origins: the row axis is the one next to the keys in the scores.
        last = max(at for _, at in free)
        own = set(_ids(axes[scores][last]))
        rows, heads = (
            [(a, o) for a, o in pairs if id(o) in own],
            [(a, o) for a, o in pairs if id(o) not in own],
        )
    return tuple(atom for atom, _ in rows), tuple(out for _, out in rows), heads


def _column_side(
    axes: Axes, k: Node, free: tuple[tuple[int, int], ...], scores: Node, columns: Leaves
) -> tuple[Leaves, list[tuple[Atom, Atom]]]:
    wanted = _ids(columns)
    pairs = [(atom, out) for dim, at in free for atom, out in zip(axes[k][dim], axes[scores][at], strict=True)]
    own = {id(out): atom for atom, out in pairs}
    return tuple(own[id(out)] for out in columns if id(out) in own), [(a, o) for a, o in pairs if id(o) not in wanted]


def _with_values(
    q: Node,
    k: Node,
    shared: list[Shared],
    rows: Leaves,
    out_rows: Leaves,
    columns: Leaves,
    k_columns: Leaves,
    q_features: Leaves,
    k_features: Leaves,
    values: Product,
    softmax: Node,
    axes: Axes,
) -> Roles:
    """Match the value product against the scores' axes."""
    known = {id(axis.out): axis for axis in shared}
    wanted = _ids(columns)
    for probs, flip in ((values.lhs, False), (values.rhs, True)):
        contracted = [(right, left) if flip else (left, right) for left, right in values.contracted]
        if _ids(tuple(a for p, _ in contracted for a in axes[probs][p])) == wanted:
            break
    else:
        raise Unproven(values.node, "the value product does not sum over the key axis", "it is not token attention")
    v = values.lhs if flip else values.rhs
    v_columns = _in_order(columns, [(axes[probs][p], axes[v][c]) for p, c in contracted], values.node)
    matched: dict[int, Atom | None] = {}
    for left, right, _ in values.batch:
        p_dim, v_dim = (right, left) if flip else (left, right)
        pairs = align(() if p_dim is None else axes[probs][p_dim], () if v_dim is None else axes[v][v_dim])
        if pairs is None:
            raise Unproven(values.node, "probabilities and values have batch axes that can't be matched", "it stays as it is")
        for p_atom, v_atom in pairs:
            if p_atom is None or id(p_atom) not in known:
                raise Unproven(values.node, "the values have a batch axis that the scores lack", "it stays as it is")
            matched[id(p_atom)] = _varying(v_atom)
    row_ids = _ids(out_rows)
    free = values.rhs_free if flip else values.lhs_free
    for dim, _ in free:
        for atom in axes[probs][dim]:
            if id(atom) not in row_ids and id(atom) not in known:
                raise Unproven(values.node, "an axis of the probabilities is neither query, head nor batch", "it stays as it is")
    v_free = values.lhs_free if flip else values.rhs_free
    v_features = tuple(atom for dim, _ in v_free for atom in axes[v][dim])
    # In the order of the query's own rows, whatever order the output has them in.
    result_rows = tuple(atom for row in out_rows for atom in flat(axes[values.node]) if _same_axis(atom, row))
    if len(result_rows) != len(out_rows):
        raise Unproven(values.node, "the query axis does not reach the output", "it is not token attention")
    joined = tuple(Shared(s.out, s.q, s.k, matched.get(id(s.out)), s.is_head) for s in shared)
    return Roles(
        q, k, v, joined, rows, k_columns, v_columns, result_rows, q_features, k_features, v_features, columns, values.node
    )  # fmt: skip


def _in_order(columns: Leaves, dims: list[tuple[Leaves, Leaves]], product: Node) -> Leaves:
    """The values' atoms in the order of the keys' columns."""
    partner: dict[int, list[Atom]] = {}
    for ours, theirs in dims:
        pairs = align(ours, theirs)
        if pairs is None or any(x is None or y is None for x, y in pairs):
            raise Unproven(product, "keys and values are cut into different parts", "it stays as it is")
        for x, y in pairs:
            assert x is not None
            assert y is not None
            partner.setdefault(id(x), []).append(y)
    found = [partner.get(id(column)) for column in leaves(columns)]
    if any(atoms is None or len(atoms) != 1 for atoms in found):
        raise Unproven(product, "keys and values are cut into different parts", "it stays as it is")
    return tuple(atom for atoms in found for atom in atoms or ())


def _same_axis(atom: Atom, row: Atom) -> bool:
    return atom is row or atom.origin is row


def roles_of_sdpa(node: Node, axes: Axes) -> Roles:
    """The roles that the operator's own definition gives (``torch.nn.functional.scaled_dot_product_attention``)."""
    q, k, v = node.args[:3]
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    rank = len(shape_of(q))
    if len(shape_of(k)) != rank or len(shape_of(v)) != rank or rank < 2:
        raise Unproven(node, "query, key and value have different ranks", "give them one rank")
    shared: list[Shared] = []
    for dim in range(rank - 2):
        heads_here = dim == rank - 3 and rank >= 4
        shared += _sdpa_axis(node, axes, dim, heads_here)
    rows, columns = axes[q][-2], axes[k][-2]
    # In self-attention rows and columns are one token axis; the scores, never shown, have two.
    own_columns = tuple(Atom(atom.size, atom.role, atom.broadcast, atom) for atom in columns)
    return Roles(
        q, k, v, tuple(shared), rows, columns, axes[v][-2], rows, axes[q][-1], axes[k][-1], axes[v][-1],
        own_columns, node,
    )  # fmt: skip


def _sdpa_axis(node: Node, axes: Axes, dim: int, is_head: bool) -> list[Shared]:
    q, k, v = node.args[:3]
    q_dim, k_dim, v_dim = (axes[operand][dim] for operand in (q, k, v))  # type: ignore[index]
    q_size, k_size = shape_of(q)[dim], shape_of(k)[dim]  # type: ignore[arg-type]
    if is_head and node.kwargs.get("enable_gqa", False) and not same_size(q_size, k_size):
        group = q_size // k_size
        pairs = _grouped(q_dim, k_dim, int(k_size), int(group))
    else:
        pairs = align(q_dim, k_dim)
    if pairs is None:
        raise Unproven(node, "query and key have batch axes that can't be matched", "it stays as it is")
    own = tuple(y for _, y in pairs if y is not None)
    v_pairs = dict.fromkeys((id(y) for y in own), None)
    matched = align(own, v_dim)
    if matched is None:
        raise Unproven(node, "key and value have batch axes that can't be matched", "it stays as it is")
    by_key: dict[int, Atom | None] = {**v_pairs, **{id(y): w for y, w in matched if y is not None}}
    found = []
    for x, y in pairs:
        out = x if x is not None else y
        assert out is not None
        value = by_key.get(id(y)) if y is not None else None
        head = is_head or any(a is not None and a.role == "feature" and not a.broadcast for a in (x, y))
        found.append(Shared(out, _varying(x), _varying(y), _varying(value), head))
    return found


def _grouped(q_dim: Leaves, k_dim: Leaves, kv_heads: int, group: int) -> list[tuple[Atom | None, Atom | None]] | None:
    """Pair query heads (key head outermost) with key heads."""
    own = align(q_dim, (*leaves(k_dim), Atom(group, "feature", True)))
    if own is None:
        return None
    return [(x, None if y is not None and y.broadcast else y) for x, y in own]


LAYOUT_ONLY = frozenset(
    "view reshape _unsafe_view flatten unflatten transpose permute t mT swapaxes movedim unsqueeze squeeze expand "
    "repeat repeat_interleave contiguous clone alias to _to_copy type_as float".split()
)


@dataclass(frozen=True)
class Operand:
    """Where to read one of q, k, v from: behind all views and copies, before any head was repeated.

    Args:
        source: the node to read.
        factor: product of the plain numbers it was multiplied with on the way.
    """

    source: Node
    factor: float


def strip(node: Node, needed: Leaves, axes: Axes, reader: MaskReader, stale_at: Node, scaled: bool) -> Operand:
    """Walk back from an operand through everything that only moves, repeats, copies or scales it.

    Args:
        needed: the operand's atoms that vary; the walk stops before a tensor that has others.
        stale_at: the node at whose place the operand will be read.
        scaled: also walk through multiplication by a number (q and k, not v).
    """
    wanted = _ids(needed)
    source, factor = node, 1.0
    while source.op == "call_function" and source.args and is_tensor(source.args[0]):
        before = source.args[0]
        assert isinstance(before, Node)
        own = {id(atom) for atom in flat(axes[before]) if not atom.broadcast}
        if own != wanted or reader.stale(source, stale_at) or reader.stale(before, stale_at):
            break
        name = op_name(source)
        if name in LAYOUT_ONLY and not _narrows(before, source):
            source = before
        elif scaled and name in ("mul", "div") and source.kwargs.get("rounding_mode") is None:
            value = scalar_or_none(source.args[1], reader, source)
            if value is None or value == 0:
                break
            factor *= 1 / value if name == "div" else value
            source = before
        else:
            break
    return Operand(source, factor)


def _narrows(before: Node, after: Node) -> bool:
    """A cast to a dtype that can't hold every value rounds; it is not only layout."""
    old, new = before.meta["val"].dtype, after.meta["val"].dtype
    return bool(torch.promote_types(old, new) != new)
