"""What depends on which products: element by element, as scores do, or in any way short of a projection."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

from torch.fx import Node

from dilcompile.passes.graph.operators import CONVOLUTIONS, KEEPS_LAYOUT, MOVES_ONLY, PRODUCTS, is_pointwise, op_name

# Their first argument alone gives the values.
SHAPED_LIKE = frozenset("view_as reshape_as expand_as type_as".split())

Labels = dict[Node, frozenset[Node]]

SOFTMAXES = frozenset(("softmax", "_softmax", "_safe_softmax", "log_softmax", "_log_softmax"))
# Beside what is pointwise, moves elements or keeps the layout.
_PARTS = frozenset("unbind getitem chunk split split_with_sizes cat pad constant_pad_nd".split())
_ELEMENTWISE = KEEPS_LAYOUT | MOVES_ONLY | _PARTS
# Products with weights.
LAYERS = PRODUCTS | CONVOLUTIONS
# A layer of its own: what comes out is no longer scores.
_PROJECTS = CONVOLUTIONS | frozenset("linear addmm embedding topk argmax argsort sort layer_norm".split())


def carries_elements(node: Node) -> bool:
    """Is every element of the result made of one element of each operand?"""
    return op_name(node) in _ELEMENTWISE or is_pointwise(node)


def carries_something(node: Node, weights: frozenset[Node]) -> bool:
    """Anything but a layer of weights."""
    name = op_name(node)
    return name not in _PROJECTS and (name not in PRODUCTS or weights.isdisjoint(node.all_input_nodes))


def reached_from(nodes: Sequence[Node], roots: Container[Node], carries: Callable[[Node], bool]) -> Labels:
    """For every node, the roots that reach it through nodes that carry them; a root starts anew."""
    found: Labels = {}
    for node in nodes:
        if node in roots:
            found[node] = frozenset((node,))
        elif node.op == "call_function":
            sources = node.all_input_nodes[:1] if op_name(node) in SHAPED_LIKE else node.all_input_nodes
            inputs = [found[arg] for arg in sources if arg in found]
            if inputs and carries(node):
                found[node] = inputs[0] if len(inputs) == 1 else frozenset().union(*inputs)
    return found


def feeding(nodes: Sequence[Node], roots: Container[Node], carries: Callable[[Node], bool]) -> frozenset[Node]:
    """The nodes that reach a root through nodes that carry them, and through no other softmax."""
    found: set[Node] = set()
    for node in reversed(nodes):
        for user in node.users:
            if user in roots or (user in found and op_name(user) not in SOFTMAXES and carries(user)):
                found.add(node)
                break
    return frozenset(found)
