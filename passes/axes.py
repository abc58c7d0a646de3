"""Axis tracking: what every dim of every tensor in the graph is made of.

A dim is a tuple of atoms, outermost first; a dim of size 1 is the empty tuple. Views split and merge atoms, transposes
move them, products match them up, everything else makes fresh ones. With it, ``[B*H, S, D]``, ``[B, S, H, D]`` and
``[B, Hkv, G, S, D]`` all show the same batch, head, sequence and feature atoms. Note that an atom is an identity, not a
size: the query and the key axis of one product are different atoms though they have the same length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.passes.products import Product, parse_product
from dilcompile.site import Length

Role = Literal["feature", "token"]
Leaves = tuple["Atom", ...]
Layout = tuple[Leaves, ...]


class Atom:
    """One axis, or the part of one that some view split off.

    Args:
        size: its length.
        role: ``feature`` if it comes out of a projection, ``token`` if it surely does not, None if unknown.
        broadcast: the tensor does not vary along it (it came from ``expand`` or ``repeat``).
        origin: the axis it is a copy, slice or extension of.
        moved: it is a slice or an extension, so that its positions are not those of its origin.
    """

    __slots__ = ("broadcast", "moved", "origin", "parts", "role", "size")

    def __init__(
        self,
        size: Length,
        role: Role | None = None,
        broadcast: bool = False,
        origin: Atom | None = None,
        moved: bool = False,
    ) -> None:
        self.size = size
        self.role = role
        self.broadcast = broadcast
        self.origin = origin
        self.moved = moved
        self.parts: Leaves | None = None

    def split(self, outer: Length, inner: Length) -> Leaves:
        self.parts = (
            Atom(outer, self.role, self.broadcast),
            Atom(inner, self.role, self.broadcast),
        )
        return self.parts

    @property
    def root(self) -> Atom:
        """The axis this one is a copy of, position by position."""
        atom = self
        while atom.origin is not None and not atom.moved:
            atom = atom.origin
        return atom


def same_size(a: Length, b: Length) -> bool:
    return statically_known_true(a == b)


def leaves(dim: Leaves) -> Leaves:
    """The dim's atoms with every later split applied."""
    found: list[Atom] = []
    for atom in dim:
        found.extend((atom,) if atom.parts is None else leaves(atom.parts))
    return tuple(found)


def flat(layout: Layout) -> Leaves:
    return tuple(atom for dim in layout for atom in leaves(dim))


def _divides(part: Length, whole: Length) -> bool:
    return bool(statically_known_true(whole % part == 0))  # type: ignore[operator]


def regroup(atoms: Leaves, shape: Sequence[Length]) -> Layout | None:
    """Group row-major ``atoms`` into dims of ``shape``, splitting atoms where a dim ends inside one.

    Returns None where a dim ends inside an atom that it doesn't divide.
    """
    queue = list(leaves(atoms))
    layout: list[Leaves] = []
    for size in shape:
        need, dim = size, []
        while not same_size(need, 1):
            if not queue:
                return None
            atom = queue.pop(0)
            if same_size(atom.size, need):
                dim.append(atom)
                break
            if _divides(atom.size, need):
                dim.append(atom)
                need = need // atom.size
            elif _divides(need, atom.size):
                outer, inner = atom.split(need, atom.size // need)
                dim.append(outer)
                queue.insert(0, inner)
                break
            else:
                return None
        layout.append(tuple(dim))
    return tuple(layout)


def align(a: Leaves, b: Leaves) -> list[tuple[Atom | None, Atom | None]] | None:
    """Pair up the atoms of two dims that are multiplied elementwise; None stands for a side of size 1.

    Returns None where the two can't be cut into common parts.
    """
    left, right = list(leaves(a)), list(leaves(b))
    if not left or not right:
        return [(x, None) for x in left] + [(None, y) for y in right]
    pairs: list[tuple[Atom | None, Atom | None]] = []
    while left and right:
        x, y = left.pop(0), right.pop(0)
        if same_size(x.size, y.size):
            pairs.append((x, y))
        elif _divides(y.size, x.size):
            outer, inner = x.split(y.size, x.size // y.size)
            pairs.append((outer, y))
            left.insert(0, inner)
        elif _divides(x.size, y.size):
            outer, inner = y.split(x.size, y.size // x.size)
            pairs.append((x, outer))
            right.insert(0, inner)
        else:
            return None
    return None if left or right else pairs


def op_name(node: Node) -> str:
    """``aten::masked_fill_.Scalar`` -> ``masked_fill``: in-place and functional spellings are one operator."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return getattr(node.target, "__name__", str(node.target))
    name = str(schema.name).split("::")[-1]
    return name[:-1] if name.endswith("_") and not name.endswith("__") else name


def shape_of(node: Node) -> tuple[Length, ...]:
    return tuple(node.meta["val"].shape)


def is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), torch.Tensor)


def tensor_args(node: Node) -> list[Node]:
    return [arg for arg in node.all_input_nodes if is_tensor(arg)]


def is_pointwise(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    # where's overloads with numbers lack the tag.
    return torch.Tag.pointwise in node.target.tags or op_name(node) == "where"


KEEPS_LAYOUT = frozenset(
    "to _to_copy contiguous clone alias detach dropout native_dropout lift_fresh lift_fresh_copy softmax _softmax "
    "_safe_softmax log_softmax _log_softmax layer_norm native_layer_norm rms_norm _fused_rms_norm triu tril copy "
    "masked_fill cumsum normalize float type_as alpha_dropout feature_dropout nan_to_num clamp hardtanh gelu "
    "silu relu".split()
)
VIEWS = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as _reshape_alias".split())


_RANDOM = frozenset(("dropout", "native_dropout", "bernoulli", "rand_like", "randn_like"))
# Operators that only move, copy or cast elements: their result varies along an axis just as their input does.
MOVES_ONLY = VIEWS | frozenset(
    "to _to_copy contiguous clone alias detach lift_fresh transpose swapaxes swapdims permute t mT adjoint numpy_T "
    "movedim moveaxis unsqueeze squeeze expand expand_as broadcast_to repeat repeat_interleave select slice narrow "
    "type_as float".split()
)


class Axes:
    """The layouts of all tensors of one graph, filled in one forward pass."""

    def __init__(self, nodes: Sequence[Node], weights: frozenset[Node]) -> None:
        self.weights = weights
        self.products: dict[Node, Product] = {}
        self._layouts: dict[Node, Layout] = {}
        self._of_products: set[Node] = set()
        for node in nodes:
            self._visit(node)

    def __getitem__(self, node: Node) -> Layout:
        return tuple(leaves(dim) for dim in self._layouts[node])

    def __contains__(self, node: Node) -> bool:
        return node in self._layouts

    def _visit(self, node: Node) -> None:
        if not is_tensor(node):
            return
        product = parse_product(node)
        if product is not None and product.rhs not in self.weights and product.lhs not in self.weights:
            self.products[node] = product
        layout = None
        if node.op == "call_function":
            rule = _RULES.get(op_name(node))
            if node in self.products or product is not None:
                layout = self._product(node, product)
            elif rule is not None:
                layout = rule(self, node)
            elif op_name(node) in KEEPS_LAYOUT:
                layout = self._layouts.get(node.all_input_nodes[0]) if node.all_input_nodes else None
            elif is_pointwise(node):
                layout = self._pointwise(node)
        self._layouts[node] = self._varying(node, self._checked(node, layout))
        if node in self.products or self._carries_scores(node):
            self._of_products.add(node)

    def _carries_scores(self, node: Node) -> bool:
        """Is it scores, moved or changed element by element?"""
        if self._of_products.isdisjoint(node.all_input_nodes):
            return False
        name = op_name(node)
        return name in KEEPS_LAYOUT or name in MOVES_ONLY or is_pointwise(node)

    def _varying(self, node: Node, layout: Layout) -> Layout:
        """Broadcast atoms stay so only where the result surely does not vary along them either."""
        atoms = [atom for dim in layout for atom in leaves(dim) if atom.broadcast]
        if not atoms or op_name(node) in MOVES_ONLY:
            return layout
        inputs = tensor_args(node)
        spread = {id(atom) for arg in inputs for atom in flat(self[arg]) if not atom.broadcast}
        constant = (
            is_pointwise(node)
            and op_name(node) not in _RANDOM
            and all(
                self._constant_along(arg, position - len(layout), leaves(dim))
                for arg in inputs
                for position, dim in enumerate(layout)
                if any(atom.broadcast for atom in leaves(dim))
            )
        )
        if constant and not any(id(atom) in spread for atom in atoms):
            return layout
        return tuple(
            tuple(Atom(atom.size, atom.role, origin=atom) if atom.broadcast else atom for atom in leaves(dim)) for dim in layout
        )

    def _constant_along(self, node: Node, position: int, dim: Leaves) -> bool:
        """Does a pointwise operand not vary along the broadcast atoms of a dim of the result (counted from the back)?"""
        own = self[node]
        if -position > len(own):
            return True
        here = {id(atom) for atom in own[position] if atom.broadcast}
        return all(atom.broadcast for atom in own[position]) or all(id(atom) in here for atom in dim if atom.broadcast)

    def _checked(self, node: Node, layout: Layout | None) -> Layout:
        """The layout if it fits the shape; else fresh atoms, with roles carried over by position."""
        shape = shape_of(node)
        if layout is not None and len(layout) == len(shape) and all(map(_spans, layout, shape)):
            return layout
        roles: list[Role | None] = [None] * len(shape)
        inputs = tensor_args(node)
        if node.op == "call_function" and inputs and len(self._layouts.get(inputs[0], ())) == len(shape):
            roles = [_role(dim) for dim in self[inputs[0]]]
        return tuple(self.fresh(size, role) for size, role in zip(shape, roles, strict=True))

    @staticmethod
    def fresh(size: Length, role: Role | None = None, origin: Leaves = (), broadcast: bool = False) -> Leaves:
        if same_size(size, 1):
            return ()
        return (Atom(size, role, broadcast, origin[0] if len(origin) == 1 else None, moved=True),)

    def _pointwise(self, node: Node) -> Layout:
        shape = shape_of(node)
        layout: list[Leaves] = [()] * len(shape)
        # Scores keep their axes, on whichever side of a mask they stand.
        for arg in sorted(tensor_args(node), key=lambda arg: arg not in self._of_products):
            inner = self._layouts[arg]
            for back in range(1, len(inner) + 1):
                if not layout[-back] or all(atom.broadcast for atom in leaves(layout[-back])):
                    layout[-back] = inner[-back] or layout[-back]
        return tuple(layout)

    def _product(self, node: Node, product: Product | None) -> Layout | None:
        if product is None or product.lhs not in self._layouts or product.rhs not in self._layouts:
            return None
        lhs, rhs = self._layouts[product.lhs], self._layouts[product.rhs]
        shape = shape_of(node)
        layout: list[Leaves] = [()] * len(shape)
        swapped = product.rhs in self._of_products and product.lhs not in self._of_products
        for left, right, out in product.batch:
            pairs = align(() if left is None else lhs[left], () if right is None else rhs[right])
            if pairs is None:
                return None
            # Probabilities keep their axes on whichever side of the values they stand.
            chosen = (_either(y, x) if swapped else _either(x, y) for x, y in pairs)
            layout[out] = tuple(atom for atom in chosen if atom is not None)
        mine = {id(atom) for dim, _ in product.lhs_free for atom in leaves(lhs[dim])}
        theirs = {id(atom) for dim, _ in product.rhs_free for atom in leaves(rhs[dim])}
        weight = product.rhs in self.weights or product.lhs in self.weights
        for free, operand, others in ((product.lhs_free, lhs, theirs), (product.rhs_free, rhs, mine)):
            for dim, out in free:
                atoms = leaves(operand[dim])
                if any(id(atom) in others for atom in atoms):
                    # Self-attention: one token axis on both sides becomes a row axis and a column axis.
                    atoms = tuple(Atom(atom.size, atom.role, atom.broadcast, atom) for atom in atoms)
                layout[out] = atoms
        if weight:
            free = product.rhs_free if product.rhs in self.weights else product.lhs_free
            for _, out in free:
                layout[out] = self.fresh(shape[out], "feature")
        return tuple(layout)


def _either(x: Atom | None, y: Atom | None) -> Atom | None:
    """The atom of a product's batch axis: of two, one that varies."""
    return y if x is None or (x.broadcast and y is not None) else x


def _spans(dim: Leaves, size: Length) -> bool:
    """Do the dim's atoms have the length of the dim? (An operator may have broadcast a dim of size 1.)"""
    total: Length = 1
    for atom in dim:
        total = total * atom.size
    return same_size(total, size)


def _role(dim: Leaves) -> Role | None:
    roles = {atom.role for atom in dim}
    return roles.pop() if len(roles) == 1 else None


Rule = Callable[[Axes, Node], "Layout | None"]


def _input(axes: Axes, node: Node) -> Layout:
    first = node.args[0]
    assert isinstance(first, Node)
    return axes._layouts[first]


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
        dim if same_size(old, new) else axes.fresh(new, _role(leaves(dim)), leaves(dim))
        for dim, old, new in zip(before, shape_of(first), shape, strict=True)
    )


def _getitem(axes: Axes, node: Node) -> Layout | None:
    parent = node.args[0]
    if not isinstance(parent, Node) or parent.op != "call_function" or not parent.args:
        return None
    name = op_name(parent)
    source = parent.args[0]
    if not isinstance(source, Node) or source not in axes:
        return None
    before = axes._layouts[source]
    if name in ("chunk", "split", "split_with_sizes", "tensor_split"):
        dim = _dim(parent, 2, len(before))
        after = list(before)
        after[dim] = axes.fresh(shape_of(node)[dim], _role(leaves(before[dim])), leaves(before[dim]))
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
    after = list(axes._layouts[usable[0]])
    newest = leaves(axes._layouts[usable[-1]][dim])
    after[dim] = axes.fresh(shape[dim], _role(newest), newest)
    return tuple(after)


def _stack(axes: Axes, node: Node) -> Layout | None:
    parts = [part for part in node.args[0] if isinstance(part, Node)]  # type: ignore[union-attr]
    after = list(axes._layouts[parts[0]])
    dim = _dim(node, 1, len(after) + 1)
    after.insert(dim, axes.fresh(shape_of(node)[dim]))
    return tuple(after)


def _linear(axes: Axes, node: Node) -> Layout:
    return (*_input(axes, node)[:-1], axes.fresh(shape_of(node)[-1], "feature"))


def _addmm(axes: Axes, node: Node) -> Layout | None:
    x = node.args[1]
    assert isinstance(x, Node)
    return (*axes._layouts[x][:1], axes.fresh(shape_of(node)[-1], "feature"))


def _conv(axes: Axes, node: Node) -> Layout | None:
    before, shape = _input(axes, node), shape_of(node)
    if len(before) != len(shape) or len(shape) < 3:
        return None
    spatial = tuple(axes.fresh(size, "token") for size in shape[2:])
    return (before[0], axes.fresh(shape[1], "feature"), *spatial)


def _embedding(axes: Axes, node: Node) -> Layout:
    ids = node.args[1]
    assert isinstance(ids, Node)
    return axes._layouts[ids] + (axes.fresh(shape_of(node)[-1], "feature"),)


def _attention(axes: Axes, node: Node) -> Layout:
    q, _, v = node.args[:3]
    assert isinstance(q, Node)
    assert isinstance(v, Node)
    shape = shape_of(node)
    batch = [axes._layouts[q][dim] for dim in range(len(shape_of(q)) - 2)]
    for operand in node.args[1:3]:
        assert isinstance(operand, Node)
        # A batch axis that the queries are broadcast along is the keys' or the values'.
        batch = [
            mine if _spans(mine, size) else other for mine, other, size in zip(batch, axes._layouts[operand], shape, strict=False)
        ]
    return (*batch, axes._layouts[q][-2], axes._layouts[v][-1])


def _reduce(axes: Axes, node: Node) -> Layout | None:
    before, shape = _input(axes, node), shape_of(node)
    if len(shape) == len(before):
        return tuple(() if same_size(size, 1) else dim for size, dim in zip(shape, before, strict=True))
    return None


def _view_as_complex(axes: Axes, node: Node) -> Layout:
    return _input(axes, node)[:-1]


def _view_as_real(axes: Axes, node: Node) -> Layout:
    return (*_input(axes, node), axes.fresh(2))


_RULES: dict[str, Rule] = {
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
    "stack": _stack,
    "linear": _linear,
    "addmm": _addmm,
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
    "embedding": _embedding,
    "scaled_dot_product_attention": _attention,
    "view_as_complex": _view_as_complex,
    "view_as_real": _view_as_real,
    **dict.fromkeys(("sum", "mean", "amax", "amin", "logsumexp", "any", "all"), _reduce),
}
