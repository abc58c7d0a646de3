"""Give every atom of a query-key-value triple its role: batch, head, query row, key column, feature."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.axes.atoms import Atom, Layout, Leaves, align, flat, leaves
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.products import Product
from dilcompile.passes.finding.value_path import ValuePath
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.unproven import Unproven


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
        hidden_scores: the dims of the scores, where a call computes them inside.
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
    hidden_scores: Layout | None = None

    def score_dims(self, on: Node, axes: Axes) -> Layout:
        """The dims of a score tensor; a call's own output stands for the scores that it never shows."""
        return self.hidden_scores if self.hidden_scores is not None and on is self.output else axes[on]

    @property
    def batch(self) -> tuple[Shared, ...]:
        return tuple(axis for axis in self.shared if not axis.is_head)

    @property
    def heads(self) -> tuple[Shared, ...]:
        """Head axes, those of the keys first: query head = key head * group + member."""
        own = [axis for axis in self.shared if axis.is_head and (axis.k is not None or axis.v is not None)]
        grouped = [axis for axis in self.shared if axis.is_head and axis.k is None and axis.v is None]
        return tuple(own + grouped)


def varying(atom: Atom | None) -> Atom | None:
    return None if atom is None or atom.broadcast else atom


def roles_of_products(scores: Product, softmax: Node, columns: Leaves, values: ValuePath, axes: Axes) -> Roles:
    """Prove that softmax and value product run over the key axis, and name the axes.

    Args:
        columns: the axis that the softmax runs over, without the sinks.

    Raises:
        Unproven: naming the product whose axes don't fit.
    """
    lhs_out = _joined(axes, scores.node, scores.lhs_free)
    rhs_out = _joined(axes, scores.node, scores.rhs_free)
    # A single key has no atoms: its softmax is 1, whichever side it stands on.
    if _ids(columns) <= _ids(rhs_out) if columns else not rhs_out:
        q, k, q_free, k_free, flip = scores.lhs, scores.rhs, scores.lhs_free, scores.rhs_free, False
    elif _ids(columns) <= _ids(lhs_out) if columns else not lhs_out:
        q, k, q_free, k_free, flip = scores.rhs, scores.lhs, scores.rhs_free, scores.lhs_free, True
    else:
        raise Unproven(
            softmax, "the softmax does not run over the key axis of the product", "it is not token attention; it stays as it is"
        )
    if any(atom.is_channel for atom in columns):
        raise Unproven(softmax, "the softmax runs over a feature axis (channel attention)", "it is not token attention")
    shared = _shared_of_scores(scores, axes, flip)
    k_columns, extra = _column_side(axes, k, k_free, scores.node, columns)
    if len(k_columns) != len(columns):
        raise Unproven(softmax, "the softmax does not run over the key axis of the product", "it is not token attention")
    rows, out_rows, heads = _row_side(axes, q, q_free, scores.node)
    shared += [Shared(out, atom, None, None, True) for atom, out in heads]
    shared += [Shared(out, None, atom, None, True) for atom, out in extra]
    contracted = [(right, left) if flip else (left, right) for left, right in scores.contracted]
    if not all(same_size(shape_of(q)[ours], shape_of(k)[theirs]) for ours, theirs in contracted):
        raise Unproven(scores.node, "the features of queries or keys are broadcast along the others'", "expand them first")
    q_features = tuple(atom for ours, _ in contracted for atom in axes[q][ours])
    k_features = tuple(atom for _, theirs in contracted for atom in axes[k][theirs])
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
            found.append((i, unknown, Shared(result, varying(q), varying(k), None, is_head)))
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
    if not rows and len(heads) == 1 and heads[0][0].placed:
        # Tokens that a projection along their own axis has made (a mixer's).
        rows, heads = heads, []
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
    path: ValuePath,
    softmax: Node,
    axes: Axes,
) -> Roles:
    """Match the value product against the scores' axes."""
    known = {id(axis.out): axis for axis in shared}
    values, probs = path.product, path.probabilities
    flip = probs is values.rhs
    contracted = [(right, left) if flip else (left, right) for left, right in values.contracted]
    if _ids(tuple(a for p, _ in contracted for a in axes[probs][p])) != _ids(columns):
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
            matched[id(p_atom)] = varying(v_atom)
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
        q, k, v, joined, rows, k_columns, v_columns, result_rows, q_features, k_features, v_features, columns, path.output
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
