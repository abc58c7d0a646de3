"""Where the gradient of a bias over pairs goes, and its shares chunk by chunk in place of the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import torch
from torch.fx import Graph, Node

from dilcompile.passes.graph.operators import shape_of
from dilcompile.passes.memory.gradient_rows import Ended, is_sum_of_both, is_zero, linear
from dilcompile.passes.memory.growing import Growing
from dilcompile.passes.memory.rows import Rows
from dilcompile.passes.memory.rows_of import RowsOf, named

aten = torch.ops.aten


@dataclass
class Course:
    """What the gradients become.

    Args:
        rows: of each node that holds a number for each pair, one gradient or a sum of several: all of its rows.
        ends: the nodes made of such ones that hold none for each pair: where the rows are then, or that they were added.
        whys: of gradients that no chunk of rows can follow: the reasons.
    """

    rows: dict[Node, Rows] = field(default_factory=dict)
    ends: dict[Node, Rows | Ended] = field(default_factory=dict)
    whys: dict[Node, str] = field(default_factory=dict)


def course_of(graph: Graph, sources: Mapping[Node, int]) -> Course:
    """Follow gradients.

    Args:
        sources: gradients [.., rows, keys] of biases, and how many keys they have.
    """
    left = dict(sources)
    whys: dict[Node, str] = {}
    while True:
        found = _followed(graph, left)
        if not found.whys:
            return Course(found.rows, found.ends, whys)
        # What is added to them has to be left whole, too.
        whys |= found.whys
        left = {source: keys for source, keys in left.items() if source not in whys}


def _followed(graph: Graph, sources: Mapping[Node, int]) -> Course:
    found, of, below = Course(), dict[Node, frozenset[Node]](), set[Node]()
    for node in graph.nodes:
        read = node.all_input_nodes
        if node in sources:
            length = int(shape_of(node)[-2])
            found.rows[node], of[node] = Rows(len(shape_of(node)) - 2, 0, length), frozenset([node])
        held = [operand for operand in read if operand in found.rows]
        if any(operand in below for operand in read) or node in sources:
            below.add(node)
        # Zeros are as large, or of the dtype, and no more.
        if not held or node in sources or is_zero(node):
            continue
        own = frozenset[Node]().union(*(of[operand] for operand in held))
        after = _after(node, held, found, below)
        if isinstance(after, str):
            found.whys |= dict.fromkeys(own, after)
        elif isinstance(after, Ended) or _few(node, after, min(sources[source] for source in own)):
            found.ends[node] = after
        else:
            found.rows[node], of[node] = after, own
    return found


def _after(node: Node, held: list[Node], found: Course, below: set[Node]) -> Rows | Ended | str:
    if node.op != "call_function":
        return "the gradient of the bias is a result of the graph"
    if is_sum_of_both(node):
        rows = {found.rows.get(operand) for operand in node.all_input_nodes}
        alike = all(shape_of(operand) == shape_of(node) for operand in node.all_input_nodes)
        (first, *more) = rows
        return first if first is not None and not more and alike else f"{named(node)} adds another gradient to that of the bias"
    rule, others = linear(node), [operand for operand in node.all_input_nodes if operand not in held and not is_zero(operand)]
    if rule is None or len(held) > 1 or any(operand in below for operand in others):
        return f"the gradient of the bias goes through {named(node)}"
    return rule.lands(node, held[0], found.rows[held[0]])


def _few(node: Node, rows: Rows, keys: int) -> bool:
    return prod(map(int, shape_of(node))) // int(shape_of(node)[rows.dim]) < keys


@dataclass
class Shares:
    """The shares that chunks have in the ends of a course, added up as they come.

    Args:
        order: the nodes of the course as they stand in the graph.
        sums: by the end.
    """

    course: Course
    order: tuple[Node, ...]
    sums: dict[Node, Node] = field(default_factory=dict)
    _parts: dict[Node, list[Node]] = field(default_factory=dict)

    def add(self, source: Node, held: Node, rows: Rows, over: RowsOf) -> list[Node] | str:
        """Let rows of one gradient go on.

        Returns:
            What has to be there before the next chunk begins, or the reason why they can't.
        """
        now, made = {source: (held, rows)}, list[Node]()
        for node in self.order:
            read = [operand for operand in node.all_input_nodes if operand in now]
            if not read:
                continue
            found = self._taken(node, [(operand, *now[operand]) for operand in read], over)
            if isinstance(found, str):
                return found
            share, after = found
            if node in self.course.rows:
                assert isinstance(after, Rows), "where rows end there is an end"
                now[node] = (share, after)
            elif isinstance(after, Rows):
                self._parts.setdefault(node, []).append(share)
                made.append(share)
            else:
                made.append(self._summed(node, share, over.grow))
        return made

    def _taken(self, node: Node, read: list[tuple[Node, Node, Rows]], over: RowsOf) -> tuple[Node, Rows | Ended] | str:
        operand, held, rows = read[0]
        if is_sum_of_both(node):
            for _, other, _ in read[1:] or (read if node.args[0] is node.args[1] else []):
                held = over.grow.call(aten.add.Tensor, (held, other), {}, node)
            return held, rows
        rule = linear(node)
        assert rule is not None, "a course leads through what is linear"
        after = rule.lands(node, operand, rows)
        made = after if isinstance(after, str) else rule.takes(over, node, operand, held, rows)
        return made if isinstance(made, str) else (made, after)  # type: ignore[return-value]

    def _summed(self, node: Node, share: Node, grow: Growing) -> Node:
        self.sums[node] = grow.wide_sum(self.sums.get(node), share, node)
        return self.sums[node]

    def end_of_call(self, grow: Growing) -> str | None:
        """Join what one call's chunks have made of rows; a reason if they are not all rows."""
        for node, parts in self._parts.items():
            rows = self.course.ends[node]
            assert isinstance(rows, Rows), "parts are of rows"
            if sum(int(shape_of(part)[rows.dim]) for part in parts) != shape_of(node)[rows.dim]:
                return f"the gradient of the bias is padded by rows before {named(node)}"
            self._summed(node, grow.call(aten.cat.default, (parts, rows.dim), {}, node), grow)
        self._parts.clear()
        return None

    def settle(self, graph: Graph, grown: Growing) -> None:
        """Let the sums stand for the ends."""
        for node, total in self.sums.items():
            grow = Growing(graph, grown.mode, node)
            value = node.meta["val"]
            made = grow.cast(total, value.dtype)
            if made.meta["val"].stride() != value.stride():
                laid = grow.call(aten.new_empty_strided.default, (made, list(value.shape), list(value.stride())), {}, node)
                made = grow.call(aten.copy.default, (laid, made), {}, node)
            node.replace_all_uses_with(made)
