"""The roles of an attention in one call, as its operator's definition gives them."""

from __future__ import annotations

from dilcompile.passes.axes.atoms import Atom, Leaves, align, leaves
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.dim_order import dims_of
from dilcompile.passes.finding.anchors import Attention
from dilcompile.passes.finding.roles import Roles, Shared, varying
from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.unproven import Unproven


def roles_of_call(call: Attention, axes: Axes) -> Roles:
    """Who is who among the dims of q, k and v.

    Raises:
        Unproven: if the operands' dims don't fit together.
    """
    q, k, v, node = call.q, call.k, call.v, call.output
    rank = len(shape_of(q))
    if len(shape_of(k)) != rank or len(shape_of(v)) != rank or rank < 2:
        raise Unproven(node, "query, key and value have different ranks", "give them one rank")
    letters = dims_of(call.order, rank)
    shared: list[Shared] = []
    for dim, letter in enumerate(letters):
        if letter in "bh":
            shared += _shared_axis(call, axes, dim, letter == "h")
    outer = tuple(axes[node][dim] for dim, letter in enumerate(letters) if letter in "bh")
    s, d = letters.index("s"), letters.index("d")
    rows, columns = axes[q][s], axes[k][s]
    # In self-attention rows and columns are one token axis; the scores, never shown, have two.
    own_columns = tuple(Atom(atom.size, atom.role, atom.broadcast, atom) for atom in columns)
    return Roles(
        q, k, v, tuple(shared), rows, columns, axes[v][s], rows, axes[q][d], axes[k][d], axes[v][d], own_columns, node,
        hidden_scores=(*outer, rows, own_columns),
    )  # fmt: skip


def _shared_axis(call: Attention, axes: Axes, dim: int, is_head: bool) -> list[Shared]:
    node = call.output
    q_dim, k_dim, v_dim = (axes[operand][dim] for operand in (call.q, call.k, call.v))
    q_size, k_size = shape_of(call.q)[dim], shape_of(call.k)[dim]
    if is_head and call.enable_gqa and not same_size(q_size, k_size):
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
        found.append(Shared(out, varying(x), varying(y), varying(value), head))
    return found


def _grouped(q_dim: Leaves, k_dim: Leaves, kv_heads: int, group: int) -> list[tuple[Atom | None, Atom | None]] | None:
    """Pair query heads (key head outermost) with key heads."""
    own = align(q_dim, (*leaves(k_dim), Atom(group, "feature", True)))
    if own is None:
        return None
    return [(x, None if y is not None and y.broadcast else y) for x, y in own]
