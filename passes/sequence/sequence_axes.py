"""Which dims run along a sequence that several ranks hold, in a graph and the checkpoint bodies in it.

It begins at the sharded sites: their rows, keys and values are the sequence. What is added to it, multiplied with it or joined
beside it runs along it too, forward and backward, so that the inputs that have to be sharded are found as well.
"""

from __future__ import annotations

import json
import operator
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from torch.fx import GraphModule, Node

from dilcompile.passes.axes.along import indexed_dims
from dilcompile.passes.axes.atoms import Atom, Layout, Leaves
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.products import parse_product
from dilcompile.passes.dialect.normalize import CHECKPOINT
from dilcompile.passes.finding.gather_facts import weight_like
from dilcompile.passes.finding.spellings import CALLS
from dilcompile.passes.graph.operators import (
    MOVES_ONLY,
    full_name,
    indexed,
    is_pointwise,
    is_tensor,
    op_name,
    shape_of,
    tensor_args,
)
from dilcompile.passes.graph.regions import Graph
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.whole_sequence import Sharding
from dilcompile.passes.sequence.known_rows import NOTHING_KNOWN, KnownRows
from dilcompile.placements.marks import Mark

OWN = "dilcompile::attention"
# Their results have the dims of the first argument, all but those that they act along.
DIMWISE = frozenset(
    "topk sort max min median mode kthvalue cummax cummin aminmax var_mean std_mean gather one_hot flip roll diff argmax argmin "
    "argsort prod var std norm linalg_vector_norm cumprod logcumsumexp native_layer_norm _fused_rms_norm native_dropout "
    "batch_norm group_norm constant_pad_nd pad glu index_select scatter scatter_add tril triu softmax log_softmax".split()
)
# Their numbers go from the first place on.
COUNTED = frozenset("arange linspace logspace range eye tril_indices triu_indices".split())
_JOINS = frozenset(("cat", "concat", "stack"))


class SequenceAxes:
    """The dims of all tensors that run along a sharded sequence.

    Args:
        parts: the rewritten graph, then the bodies in it.
        known: what is known of the graph's inputs.

    Attributes:
        sites: the sharded calls, with what their specs say.
        guessed: inputs that were taken for a part of the sequence by their size alone.
    """

    def __init__(self, parts: Sequence[Graph], sharding: Sharding, known: KnownRows = NOTHING_KNOWN) -> None:
        self.sharding, self.known = sharding, known
        self.orders = {**CALLS, OWN: "bhsd", sharding.attention.__name__: "bhsd"}
        self.sites: dict[Node, dict[str, str]] = {}
        self._axes: dict[GraphModule, Axes] = {}
        self._of_graph = {part.gm.graph: part.gm for part in parts}
        # Atoms that run along one axis if the other one does.
        self._links: dict[Atom, list[Atom]] = defaultdict(list)
        self.parents: dict[Atom, Atom] = {}
        for part in parts:
            nodes = list(part.gm.graph.nodes)
            self._axes[part.gm] = Axes(nodes, weight_like(nodes, part.weights), self.orders)
        for part in parts:
            for node in part.gm.graph.nodes:
                self._link(part.gm, node)
                self._note_parts(node)
        self.axis_of: dict[Atom, str] = {}
        self.conflicts: list[tuple[Node, str, str]] = []
        for site, spec in self.sites.items():
            operands = site.args[1:3] if spec["placement"] == "tree" else site.args[:3]
            self._spread(site, [(arg, 2) for arg in operands], spec["axis"])  # type: ignore[misc]
        self.guessed: list[Node] = []
        for node in parts[0].gm.graph.find_nodes(op="placeholder"):
            if is_tensor(node) and node not in parts[0].weights and node not in parts[0].tables:
                self._begin(node)
        self._counted = self._reached(atom for part in parts for node in part.gm.graph.nodes for atom in self._counts(part, node))

    # What is known.

    def layout(self, node: Node) -> Layout:
        """The atoms of every dim."""
        return self._axes[self._of_graph[node.graph]][node]

    def cut_of(self, node: Node) -> list[Atom]:
        """The atoms that are still whole here, and that some view cuts."""
        held = self._axes[self._of_graph[node.graph]]._layouts[node]
        return [atom for dim in held for atom in dim if atom.parts is not None]

    def axis(self, dim: Leaves) -> str | None:
        """The mesh axis along which a dim runs, or None."""
        return next((self.axis_of[atom.root] for atom in dim if atom.root in self.axis_of), None)

    def dims(self, node: Node) -> frozenset[int]:
        """The dims of a tensor that hold the sequence."""
        if not is_tensor(node):
            return frozenset()
        return frozenset(i for i, dim in enumerate(self.layout(node)) if self.axis(dim) is not None)

    def mark_of(self, node: Node) -> Mark:
        """What a later graph is told of a result of this one."""
        counted = frozenset(
            i for i, dim in enumerate(self.layout(node)) if any(atom.root in self._counted for atom in dim) and not self.axis(dim)
        )
        if not self.axis_of and not self.known:
            return Mark(None, counted)
        return Mark({dim: str(self.axis(self.layout(node)[dim])) for dim in self.dims(node)}, counted)

    # How it spreads.

    def _begin(self, node: Node) -> None:
        """From an input of which it is known, or, where no site tells, that is as long as a rank's part of a sequence."""
        mark = self.known.inputs.get(node)
        if mark is not None and mark.axes is not None:
            for dim, axis in mark.axes.items():
                self._spread(node, [(node, dim)], axis)
        elif not self.sites:
            for dim, size in enumerate(shape_of(node)):
                axis_of_size = self.known.axis_of_size(size)
                # What was counted is wrong only where it is used beside tokens.
                if axis_of_size is not None and (mark is None or dim not in mark.counted):
                    self._spread(node, [(node, dim)], axis_of_size)
                    self.guessed.append(node)

    def _spread(self, start: Node, dims: Iterable[tuple[Node, int]], axis: str) -> None:
        queue = [atom.root for node, dim in dims for atom in self.layout(node)[dim]]
        while queue:
            atom = queue.pop()
            if atom in self.axis_of:
                if self.axis_of[atom] != axis:
                    self.conflicts.append((start, self.axis_of[atom], axis))
                    return
                continue
            self.axis_of[atom] = axis
            queue += self._links[atom]

    def _counts(self, part: Graph, node: Node) -> Iterator[Atom]:
        """The axes along which a node holds numbers that were counted from this rank's first row on."""
        if node.op == "placeholder" and part.parent is None and node in self.known.inputs:
            dims: Iterable[int] = self.known.inputs[node].counted
        elif is_tensor(node) and (op_name(node) in COUNTED or _is_cut_of_table(part, node)):
            dims = range(len(shape_of(node)))
        else:
            return
        for dim in dims:
            # What is cut out of a table along one dim leaves the others whole.
            yield from (
                atom.root
                for atom in self.layout(node)[dim]
                if node.op != "call_function" or op_name(node) in COUNTED or atom.moved
            )

    def _reached(self, atoms: Iterable[Atom]) -> frozenset[Atom]:
        """Atoms, and those that run along them."""
        found, queue = set[Atom](), list(atoms)
        while queue:
            atom = queue.pop()
            if atom not in found:
                found.add(atom)
                queue += self._links[atom]
        return frozenset(found)

    def _note_parts(self, node: Node) -> None:
        if not is_tensor(node):
            return
        queue = [atom for dim in self._axes[self._of_graph[node.graph]]._layouts[node] for atom in dim]
        while queue:
            atom = queue.pop()
            for part in atom.parts or ():
                if part not in self.parents:
                    self.parents[part] = atom
                    self._same(part.root, atom.root)
                queue.append(part)

    def _same(self, a: Atom, b: Atom) -> None:
        if a is not b:
            self._links[a].append(b)
            self._links[b].append(a)

    def _pair(self, a: Leaves, b: Leaves) -> None:
        """Two dims hold the same places."""
        if len(a) == len(b) and all(same_size(x.size, y.size) for x, y in zip(a, b, strict=True)):
            for x, y in zip(a, b, strict=True):
                self._same(x.root, y.root)
        elif len(a) == 1 and len(b) > 1:
            self._holds(a[0], b)
        elif len(b) == 1 and len(a) > 1:
            self._holds(b[0], a)

    def _holds(self, whole: Atom, parts: Leaves) -> None:
        """One axis that several were joined to elsewhere: it runs along what they run along."""
        for part in parts:
            self._links[part.root].append(whole.root)

    def _pair_back(self, a: Node, b: Node) -> None:
        """Dims of two tensors that broadcast, counted from the back."""
        for x, y in zip(reversed(self.layout(a)), reversed(self.layout(b)), strict=False):
            self._pair(x, y)

    def _pair_alike(self, a: Node, b: Node) -> None:
        """Dims of two tensors of one rank, where they are of one size."""
        if len(shape_of(a)) == len(shape_of(b)):
            sizes = zip(shape_of(a), shape_of(b), strict=True)
            for (m, n), x, y in zip(sizes, self.layout(a), self.layout(b), strict=True):
                if same_size(m, n):
                    self._pair(x, y)

    def _link(self, gm: GraphModule, node: Node) -> None:
        if node.target is self.sharding.attention:
            self.sites[node] = json.loads(str(node.args[-1]))
            self._link_site(node)
        elif node.target is CHECKPOINT:
            self._link_body(gm, node)
        elif node.target is operator.getitem:
            self._link_item(node)
        elif node.op == "call_function" and is_tensor(node):
            self._link_operator(node)

    def _link_operator(self, node: Node) -> None:
        name, product = op_name(node), parse_product(node)
        if name in _JOINS:
            for part in tensor_args(node):
                self._link_joined(part, node)
        elif product is not None and name not in ("sum", "mean"):
            for left, right, out in product.batch:
                for operand, dim in ((product.lhs, left), (product.rhs, right)):
                    if dim is not None:
                        self._pair(self.layout(operand)[dim], self.layout(node)[out])
            if product.addend is not None:
                self._pair_back(product.addend, node)
        elif (found := indexed(node)) is not None:
            for arg, dim, out in indexed_dims(node, *found):
                self._pair(self.layout(arg)[dim], self.layout(node)[out])
        elif is_pointwise(node) or name == "copy":
            for arg in tensor_args(node):
                self._pair_back(arg, node)
        elif name in DIMWISE:
            for arg in tensor_args(node):
                self._pair_alike(arg, node)

    def _link_joined(self, part: Node, node: Node) -> None:
        shape, whole = shape_of(part), shape_of(node)
        if len(shape) == len(whole):
            self._pair_alike(part, node)
        elif op_name(node) == "stack":
            asked = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
            assert isinstance(asked, int)
            dim = asked % len(whole)
            rest = [held for i, held in enumerate(self.layout(node)) if i != dim]
            for x, y in zip(self.layout(part), rest, strict=True):
                self._pair(x, y)

    def _link_site(self, call: Node) -> None:
        """What stands beside the keys, one number a token."""
        keys = call.args[1]
        assert isinstance(keys, Node)
        for mask in call.args[3:5]:
            if is_tensor(mask) and same_size(shape_of(mask)[-1], shape_of(keys)[2]):  # type: ignore[arg-type]
                self._pair(self.layout(mask)[-1], self.layout(keys)[2])  # type: ignore[arg-type]

    def _link_item(self, node: Node) -> None:
        parent, index = node.args[0], node.args[1]
        if not isinstance(parent, Node) or not is_tensor(node) or parent.op != "call_function":
            return
        if full_name(parent) in self.orders and index == 1 and len(shape_of(node)) == 3:
            q = parent.args[0]
            assert isinstance(q, Node)
            for x, y in zip(self.layout(q), self.layout(node), strict=False):
                self._pair(x, y)
        elif parent.target is not CHECKPOINT and op_name(parent) in DIMWISE and is_tensor(parent.args[0]):
            self._pair_alike(parent.args[0], node)  # type: ignore[arg-type]

    def _link_body(self, gm: GraphModule, call: Node) -> None:
        body = getattr(gm, str(getattr(call.args[0], "target", "")), None)
        if not isinstance(body, GraphModule) or body not in self._axes:
            return
        for own, outer in zip(body.graph.find_nodes(op="placeholder"), call.args[1:], strict=True):
            if is_tensor(own) and is_tensor(outer):
                self._pair_alike(outer, own)  # type: ignore[arg-type]
        results = body.graph.output_node().args[0]
        results = results if isinstance(results, (list, tuple)) else (results,)
        for user in call.users:
            if user.target is operator.getitem:
                made = results[user.args[1]]  # type: ignore[index]
                if is_tensor(made) and is_tensor(user):
                    self._pair_alike(made, user)  # type: ignore[arg-type]


def _is_cut_of_table(part: Graph, node: Node) -> bool:
    """A slice of a weight or a buffer."""
    if node.op != "call_function" or op_name(node) not in ("slice", "narrow"):
        return False
    source = node
    while source.op == "call_function" and op_name(source) in MOVES_ONLY and source.all_input_nodes:
        source = source.all_input_nodes[0]
    return source in part.weights or source in part.tables or source.op == "get_attr"
