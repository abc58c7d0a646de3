"""One site cut out of its graph together with its replacement, so that the two can be run side by side in float64.

The replacement's operands are where the graph is cut: queries, keys, values and biases that depend on activations or weights may
then hold any numbers. What is made of positions, masks and constants alone is not cut there but computed from the graph's own
inputs, because a mask and what was read off it must come from the same input.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Graph as FxGraph
from torch.fx import GraphModule, Node

from dilcompile.passes.graph.mutations import storage, written
from dilcompile.passes.graph.operators import is_tensor, op_name
from dilcompile.passes.graph.regions import Graph

_NARROW = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Trial:
    """A site's own computation beside its replacement.

    Args:
        gm: takes the values of ``leaves``, in their order, and gives (the site's own output, the replacement's). All of it
            computes in float64 on the CPU, without dropout, by the reference kernel.
        leaves: the nodes of the whole graph whose values it needs: where it was cut, and inputs of the graph.
        cuts: those of them that may hold any numbers.
        tables: those of them that are buffers, with their values.
        training: gradients will be asked for.
        inside: the site stands in the body of a checkpoint, whose values nobody sees from outside.
    """

    gm: GraphModule
    leaves: tuple[Node, ...]
    cuts: frozenset[Node]
    tables: Mapping[Node, torch.Tensor]
    training: bool
    inside: bool


def passed_number(node: Node) -> float | None:
    """The number that an input is, where Dynamo passes a number of the model's own as a tensor (``dynamic=True``); else None.

    The graph is guarded to hold for that number alone once a rule has read it.
    """
    if node.op != "placeholder" or not is_tensor(node) or node.meta["val"].dim() != 0 or not node.users:
        return None
    read = [user.meta.get("val") for user in node.users if op_name(user) == "item"]
    hints = [value.node.hint for value in read if isinstance(value, torch.SymFloat)]
    return float(hints[0]) if len(hints) == len(node.users) and None not in hints else None


def emitted(mark: Node, output: Node) -> list[Node]:
    """The nodes that a rewrite put between ``mark``, which stood right before the site's output, and that output."""
    found, node = [], mark.next
    while node is not output:
        found.append(node)
        node = node.next
    return found


def take_back(mark: Node, output: Node, result: Node) -> None:
    """Undo a rewrite: the site's own output is used again, and what was emitted for it is gone."""
    result.replace_all_uses_with(output)
    for node in reversed(emitted(mark, output)):
        node.graph.erase_node(node)


def cut_out(graph: Graph, mark: Node, output: Node, result: Node) -> Trial:
    """The trial of a site that was just rewritten, before anything dead is erased.

    Args:
        mark: the node that stood right before ``output`` when the site was rewritten.
        output, result: what the site computed, and what computes it now.
    """
    cutter = _Cutter(graph, mark, output)
    leaves, nodes = cutter.slice_of((output, result))
    mini, root = FxGraph(), dict[str, Any]()
    copies: dict[Node, Node] = {leaf: mini.placeholder(f"leaf_{i}") for i, leaf in enumerate(leaves)}
    for node in nodes:
        copies[node] = _copied(mini, node, {own: copies[cutter.outer(own)] for own in node.all_input_nodes}, root)
    mini.output((copies[cutter.outer(output)], copies[cutter.outer(result)]))
    cuts = frozenset(leaf for leaf in leaves if leaf.op != "placeholder" or cutter.active(leaf))
    tables = {leaf: table for leaf in leaves if (table := cutter.table(leaf)) is not None}
    return Trial(GraphModule(root, mini), tuple(leaves), cuts, tables, graph.training, graph.call is not None)


@dataclass(frozen=True)
class Probe:
    """A whole graph that gives the values of the leaves of trials.

    Args:
        gm: takes the graph's inputs, gives the values of ``leaves`` in their order.
        written: positions of the inputs whose memory it writes to.
    """

    gm: GraphModule
    leaves: tuple[Node, ...]
    written: frozenset[int]


def probe(gm: GraphModule, trials: Iterable[Trial]) -> Probe:
    """The probe for trials of a graph, made before anything that they need is erased."""
    leaves = tuple(dict.fromkeys(leaf for trial in trials for leaf in trial.leaves))
    graph = FxGraph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(gm.graph, copies)
    graph.output([copies[leaf] for leaf in leaves])
    graph.eliminate_dead_code()
    storages = {storage(target) for node in gm.graph.nodes for target in written(node)}
    inputs = enumerate(gm.graph.find_nodes(op="placeholder"))
    overwritten = frozenset(i for i, node in inputs if is_tensor(node) and storage(node) in storages)
    return Probe(GraphModule(gm, graph), leaves, overwritten)


@dataclass
class _Cutter:
    graph: Graph
    mark: Node
    output: Node
    _active: dict[Node, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = set(emitted(self.mark, self.output))
        self._operands = {self.outer(arg) for node in own for arg in node.all_input_nodes if arg not in own}
        self._writes: dict[int, list[Node]] = defaultdict(list)
        region: Graph | None = self.graph
        while region is not None:
            for node in region.gm.graph.nodes:
                for target in written(node):
                    self._writes[storage(target)].append(node)
            region = region.parent

    def outer(self, node: Node) -> Node:
        """What a checkpoint's input stands for in the graph around it, as long as it still holds that."""
        region = self.graph
        while node.op == "placeholder" and region.parent is not None:
            if node.graph is region.gm.graph:
                argument = _argument(region, node)
                if argument is None:
                    return node
                node = argument
            region = region.parent
        return node

    def active(self, node: Node) -> bool:
        """Does the node depend on activations or weights?"""
        open_nodes = [node]
        while open_nodes:
            held = open_nodes[-1]
            inputs = [self.outer(arg) for arg in held.all_input_nodes]
            unknown = [arg for arg in inputs if arg not in self._active]
            if held in self._active or not unknown:
                self._active.setdefault(held, any(self._active[arg] for arg in inputs) or self._is_source(held))
                open_nodes.pop()
            else:
                open_nodes += unknown
        return self._active[node]

    def _is_source(self, node: Node) -> bool:
        if node.op != "placeholder" or not is_tensor(node) or passed_number(node) is not None:
            return False
        return bool(node.meta["val"].dtype.is_floating_point) and self.table(node) is None

    def table(self, node: Node) -> torch.Tensor | None:
        """The value of a buffer."""
        region: Graph | None = self.graph
        while region is not None:
            if node in region.tables:
                return region.tables[node]
            region = region.parent
        return None

    def slice_of(self, ends: Iterable[Node]) -> tuple[list[Node], list[Node]]:
        """The leaves and the nodes between them and ``ends``, both in the order in which they are computed."""
        leaves: set[Node] = set()
        nodes: set[Node] = set()
        pending = [self.outer(end) for end in ends]
        while pending:
            node = pending.pop()
            if node in leaves or node in nodes:
                continue
            if node.op == "placeholder" or self._is_cut(node):
                leaves.add(node)
                continue
            nodes.add(node)
            pending += [self.outer(arg) for arg in node.all_input_nodes]
            # A write through another view of the same memory has no user that leads to it.
            if is_tensor(node):
                pending += [write for write in self._writes.get(storage(node), ()) if self._before_output(write)]
        return self._ordered(leaves), self._ordered(nodes)

    def _is_cut(self, node: Node) -> bool:
        return node in self._operands and is_tensor(node) and bool(node.meta["val"].dtype.is_floating_point) and self.active(node)

    def _before_output(self, write: Node) -> bool:
        return write.graph is not self.output.graph or write < self.output

    def _ordered(self, nodes: set[Node]) -> list[Node]:
        """Outer graphs first, each in its own order."""
        regions: list[Graph] = [self.graph]
        while regions[-1].parent is not None:
            regions.append(regions[-1].parent)
        found = []
        for region in reversed(regions):
            found += sorted(node for node in nodes if node.graph is region.gm.graph)
        return found


def _argument(body: Graph, placeholder: Node) -> Node | None:
    """The node of the graph around ``body`` whose value this input has; None if it was written to in between."""
    assert body.call is not None
    assert body.parent is not None
    position = list(body.gm.graph.find_nodes(op="placeholder")).index(placeholder)
    argument = body.call.args[1 + position]
    if not isinstance(argument, Node) or (is_tensor(argument) and body.parent.stale(argument, body.call)):
        return None
    return argument


def _copied(mini: FxGraph, node: Node, inputs: Mapping[Node, Node], root: dict[str, Any]) -> Node:
    if node.op == "get_attr":
        held = _attribute(node)
        name = f"held_{len(root)}"
        root[name] = held.double().cpu() if isinstance(held, torch.Tensor) and held.is_floating_point() else held
        return mini.get_attr(name)
    given = {own: _narrowed(mini, own, copy, node) for own, copy in inputs.items()}
    copy = mini.node_copy(node, lambda arg: given[arg])
    copy.args, copy.kwargs = _widened(copy.args), _widened(copy.kwargs)
    _without_chance(copy)
    return copy


def _narrowed(mini: FxGraph, own: Node, copy: Node, reader: Node) -> Node:
    """What ``reader`` gets of a value whose dtype it narrows: in float64 the range of its own dtype is kept, the rounding is not.

    A mask's finite fill may be infinite after such a cast, which makes another thing of a row that sees nothing.
    """
    before, after = own.meta.get("val"), reader.meta.get("val")
    if not (isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)):
        return copy
    if not (before.dtype.is_floating_point and after.dtype.is_floating_point):
        return copy
    most = torch.finfo(after.dtype).max
    return mini.call_function(_in_range, (copy, most)) if torch.finfo(before.dtype).max > most else copy


def _in_range(x: torch.Tensor, most: float) -> torch.Tensor:
    return torch.where(x > most, torch.inf, torch.where(x < -most, -torch.inf, x))


def _attribute(node: Node) -> Any:
    held: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        held = getattr(held, part)
    return held


def _widened(value: Any) -> Any:
    if value in _NARROW if isinstance(value, torch.dtype) else False:
        return torch.float64
    if isinstance(value, torch.device):
        return torch.device("cpu")
    if isinstance(value, (tuple, list)):
        return type(value)(_widened(item) for item in value)
    if isinstance(value, dict):
        return {key: _widened(item) for key, item in value.items()}
    return value


def _without_chance(node: Node) -> None:
    """No dropout; of the kernels the one that is written from the definition and takes everything."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    neutral: dict[str, Any] = {"dropout_p": 0.0, "kernel": "reference", "half_to_float": False, "narrow": False}
    if "dropout" in schema.name:
        neutral["p"] = 0.0
    for i, argument in enumerate(schema.arguments):
        if argument.name in neutral:
            if i < len(node.args):
                node.update_arg(i, neutral[argument.name])
            elif argument.name in node.kwargs:
                node.update_kwarg(argument.name, neutral[argument.name])
