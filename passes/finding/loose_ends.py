"""Every softmax gets a verdict: what stands between two products, and is reached by no proof, is said to be there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property

from torch.fx import Node

from dilcompile.passes.axes.atoms import flat
from dilcompile.passes.axes.labels import LAYERS, Labels, carries_elements, carries_something, feeding, reached_from
from dilcompile.passes.axes.products import parse_product
from dilcompile.passes.finding.anchors import Softmax
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import full_name, op_name
from dilcompile.passes.graph.unproven import Unproven

# Made like another tensor, and then written to.
_BLANKS = frozenset("new_zeros new_ones new_full new_empty zeros_like ones_like full_like empty_like".split())


class LooseEnds:
    """Tells attention from routers and gates, and finds what breaks the way between product and softmax."""

    def __init__(self, nodes: Sequence[Node], facts: Facts) -> None:
        self.nodes, self.facts = nodes, facts
        self._read: set[Node] = set()

    def note(self, softmax: Softmax) -> None:
        """A rule has read this softmax: what it is made of needs no verdict of its own."""
        self._read |= {softmax.probabilities, softmax.reader}

    def joins_products(self, softmax: Softmax) -> bool:
        """Does it stand between a product of activations and another one?

        Raises:
            Unproven: if it does, but something on the way is neither elementwise nor a view.
        """
        scores, weights = softmax.scores, softmax.probabilities
        narrow_before, narrow_after = scores in self.facts.scores, weights in self._feeding
        if narrow_before and narrow_after:
            return True
        before = narrow_before or scores in self._widely_reached or self._keeps_axis(softmax, scores, _inputs)
        after = narrow_after or weights in self._widely_feeding or self._keeps_axis(softmax, weights, _users)
        if not before or not after:
            return False
        if narrow_before:
            at, between = self._first(weights, _users, self._leaves_elements), "softmax and the values"
        else:
            at, between = self._first(scores, _inputs, self._is_past_scores), "product and the softmax"
        if op_name(at) in LAYERS or parse_product(at) is not None:
            raise Unproven(at, "heads are mixed by a learned product (talking heads)", "no form covers it; it stays as it is")
        if op_name(at) in _BLANKS:
            reason = "the scores are copied part by part into another tensor (blocks or sliding chunks)"
            raise Unproven(at, reason, "no form covers data that is moved by blocks; it stays as it is")
        raise Unproven(at, f"{_called(at)} stands between the {between}", "it stays as it is")

    def _keeps_axis(self, softmax: Softmax, start: Node, around: Callable[[Node], list[Node]]) -> bool:
        """Is there a product that has the softmax's axis, on a way from ``start`` on which every tensor has it?"""
        axes = self.facts.axes
        columns = {id(atom) for atom in axes[softmax.reader][softmax.dim]}
        queue, seen = [start], {start}
        for node in queue:
            for other in around(node):
                if not columns or other in seen or other not in axes:
                    continue
                seen.add(other)
                if other in axes.products and (around is _users or self._has_both_sides(softmax, other, columns)):
                    return True
                if columns <= {id(atom) for atom in flat(axes[other])}:
                    queue.append(other)
        return False

    def _has_both_sides(self, softmax: Softmax, product: Node, columns: set[int]) -> bool:
        """Has the softmax an axis of either operand of the product, as scores have? A projection of it keeps one."""
        axes, found = self.facts.axes, self.facts.axes.products[product]
        own = {id(atom) for atom in flat(axes[softmax.reader])}
        sides = [{id(atom) for _, at in free for atom in axes[product][at]} for free in (found.lhs_free, found.rhs_free)]
        return columns <= {id(atom) for atom in flat(axes[product])} and all(not side or side & own for side in sides)

    def check(self, node: Node) -> None:
        """An exponential that no rule has read.

        Raises:
            Unproven: if it is summed or divided and stands between two products, as a softmax would.
        """
        if (
            op_name(node) not in ("exp", "exp2")
            or node in self._read
            or node not in self.facts.scores
            or node not in self._feeding
        ):
            return
        if any(op_name(user) == "sum" or (op_name(user) == "div" and user.args[0] is node) for user in node.users):
            raise Unproven(node, "the exponentials of the scores are not divided by their own sum", "write torch.softmax")

    def _first(self, start: Node, around: Callable[[Node], list[Node]], found: Callable[[Node], bool]) -> Node:
        queue, seen = [start], {start}
        for node in queue:
            if found(node):
                return node
            fresh = [other for other in around(node) if other not in seen and other.op == "call_function"]
            seen.update(fresh)
            queue += fresh
        return start

    def _leaves_elements(self, node: Node) -> bool:
        return node in self._feeding or not carries_elements(node)

    def _is_past_scores(self, node: Node) -> bool:
        return not self.facts.scores.keys().isdisjoint(node.all_input_nodes)

    @cached_property
    def _feeding(self) -> frozenset[Node]:
        """Nodes whose elements reach a product of activations, unchanged or scaled."""
        return feeding(self.nodes, self.facts.axes.products, carries_elements)

    @cached_property
    def _widely_feeding(self) -> frozenset[Node]:
        return feeding(self.nodes, self.facts.axes.products, lambda node: carries_something(node, self.facts.axes.weights))

    @cached_property
    def _widely_reached(self) -> Labels:
        products = self.facts.axes.products
        return reached_from(self.nodes, products, lambda node: carries_something(node, self.facts.axes.weights))


def _users(node: Node) -> list[Node]:
    return list(node.users)


def _inputs(node: Node) -> list[Node]:
    return node.all_input_nodes


def _called(node: Node) -> str:
    return full_name(node).replace("::", ".")
