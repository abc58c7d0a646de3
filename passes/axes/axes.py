"""Axis tracking: what every dim of every tensor in the graph is made of, in one forward pass.

Views split and merge atoms, transposes move them, products match them up, everything else makes fresh ones. With it,
``[B*H, S, D]``, ``[B, S, H, D]`` and ``[B, Hkv, G, S, D]`` all show the same batch, head, sequence and feature atoms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from torch.fx import Node

from dilcompile.passes.axes.atoms import Atom, Layout, Leaves, Role, align, flat, leaves, role_of, spans
from dilcompile.passes.axes.axis_rules import RULES, attention
from dilcompile.passes.axes.labels import carries_elements
from dilcompile.passes.axes.products import Product, parse_product
from dilcompile.passes.graph.operators import (
    KEEPS_LAYOUT,
    MOVES_ONLY,
    RANDOM,
    full_name,
    is_pointwise,
    is_tensor,
    op_name,
    shape_of,
    tensor_args,
)
from dilcompile.passes.graph.sizes import same_size
from dilcompile.site import Length

_NO_CALLS: Mapping[str, str] = MappingProxyType({})


class Axes:
    """The layouts of all tensors of one graph, filled in one forward pass.

    Args:
        weights: what is made of parameters alone.
        calls: operators that compute a whole attention, and the order of their dims (see ``Attention``).

    Attributes:
        products: the products of two activations.
        reading: the products by the nodes that read their operands.
        of_products: they, and what is made of them element by element.
        parametric: anything made of parameters alone.
    """

    def __init__(self, nodes: Sequence[Node], weights: frozenset[Node], calls: Mapping[str, str] = _NO_CALLS) -> None:
        self.weights, self.calls = weights, calls
        self.products: dict[Node, Product] = {}
        self.reading: dict[Node, Product] = {}
        self._layouts: dict[Node, Layout] = {}
        self.of_products: set[Node] = set()
        self.parametric = set(weights)
        for node in nodes:
            self._visit(node)

    def __getitem__(self, node: Node) -> Layout:
        return tuple(leaves(dim) for dim in self._layouts[node])

    def __contains__(self, node: Node) -> bool:
        return node in self._layouts

    def _visit(self, node: Node) -> None:
        if node.op == "call_function" and node.all_input_nodes and self.parametric.issuperset(node.all_input_nodes):
            self.parametric.add(node)
        if not is_tensor(node):
            return
        product = parse_product(node)
        if product is not None and not self._is_layer(product):
            self.products[node] = product
            self.reading.update(dict.fromkeys(product.inner or (node,), product))
        layout = None
        if node.op == "call_function":
            rule = RULES.get(op_name(node))
            if node in self.products or product is not None:
                layout = self._product(node, product)
            elif full_name(node) in self.calls:
                layout = attention(self, node)
            elif rule is not None:
                layout = rule(self, node)
            elif op_name(node) in KEEPS_LAYOUT:
                layout = self._layouts.get(node.all_input_nodes[0]) if node.all_input_nodes else None
            elif is_pointwise(node):
                layout = self._pointwise(node)
        self._layouts[node] = self._varying(node, self._checked(node, layout))
        if node in self.products or self._carries_scores(node):
            self.of_products.add(node)

    def _is_layer(self, product: Product) -> bool:
        """A projection by weights; for ``linear`` and ``addmm`` those may be anything made of parameters alone."""
        if product.rhs in self.weights or product.lhs in self.weights:
            return True
        return op_name(product.node) in ("linear", "addmm") and product.rhs in self.parametric

    def _carries_scores(self, node: Node) -> bool:
        """Is it scores, moved or changed element by element?"""
        return not self.of_products.isdisjoint(node.all_input_nodes) and carries_elements(node)

    def _varying(self, node: Node, layout: Layout) -> Layout:
        """Broadcast atoms stay so only where the result surely does not vary along them either."""
        atoms = [atom for dim in layout for atom in leaves(dim) if atom.broadcast]
        if not atoms or op_name(node) in MOVES_ONLY:
            return layout
        inputs = tensor_args(node)
        spread = {id(atom) for arg in inputs for atom in flat(self[arg]) if not atom.broadcast}
        constant = (
            is_pointwise(node)
            and op_name(node) not in RANDOM
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
            tuple(Atom(atom.size, atom.role, origin=atom, placed=atom.placed) if atom.broadcast else atom for atom in leaves(dim))
            for dim in layout
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
        if layout is not None and len(layout) == len(shape) and all(map(spans, layout, shape)):
            return layout
        roles: list[Role | None] = [None] * len(shape)
        inputs = tensor_args(node)
        if node.op == "call_function" and inputs and len(self._layouts.get(inputs[0], ())) == len(shape):
            roles = [role_of(dim) for dim in self[inputs[0]]]
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
        for arg in sorted(tensor_args(node), key=lambda arg: arg not in self.of_products):
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
        swapped = product.rhs in self.of_products and product.lhs not in self.of_products
        for left, right, out in product.batch:
            pairs = align(() if left is None else lhs[left], () if right is None else rhs[right])
            if pairs is None:
                return None
            # Probabilities keep their axes on whichever side of the values they stand.
            chosen = (_either(y, x) if swapped else _either(x, y) for x, y in pairs)
            layout[out] = tuple(atom for atom in chosen if atom is not None)
        mine = {id(atom) for dim, _ in product.lhs_free for atom in leaves(lhs[dim])}
        theirs = {id(atom) for dim, _ in product.rhs_free for atom in leaves(rhs[dim])}
        for free, operand, others in ((product.lhs_free, lhs, theirs), (product.rhs_free, rhs, mine)):
            for dim, out in free:
                atoms = leaves(operand[dim])
                if any(id(atom) in others for atom in atoms):
                    # Self-attention: one token axis on both sides becomes a row axis and a column axis.
                    atoms = tuple(Atom(atom.size, atom.role, atom.broadcast, atom, placed=atom.placed) for atom in atoms)
                layout[out] = atoms
        if self._is_layer(product):
            # Where both are weights (learned tokens) the second one projects, as in ``linear``.
            first = product.lhs in self.weights and product.rhs not in self.weights
            made, kept = (product.lhs_free, product.rhs_free) if first else (product.rhs_free, product.lhs_free)
            for _, out in made:
                layout[out] = self.fresh(shape[out], "feature")
            for _, out in kept:
                layout[out] = tuple(atom.as_places() for atom in layout[out])
        return tuple(layout)


def _either(x: Atom | None, y: Atom | None) -> Atom | None:
    """The atom of a product's batch axis: of two, one that varies."""
    return y if x is None or (x.broadcast and y is not None) else x
