"""Walk from a softmax back to the query-key product and forward to the value product, collecting what happens on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Node

from dilcompile.passes.axes import KEEPS_LAYOUT, VIEWS, Axes, Leaves, is_pointwise, is_tensor, op_name, shape_of
from dilcompile.passes.masks.arithmetic import Unreadable
from dilcompile.passes.masks.reader import MaskReader
from dilcompile.passes.mutations import Mutations
from dilcompile.passes.products import Product

SOFTMAX = frozenset(("softmax", "_softmax", "_safe_softmax"))
_CASTS = frozenset("to _to_copy contiguous clone alias lift_fresh lift_fresh_copy type_as float".split())
# Every element stays, only its place changes.
_REORDERS = VIEWS | frozenset("transpose permute t mT swapaxes swapdims movedim moveaxis unsqueeze squeeze".split())
_MOVES = _REORDERS | frozenset("expand slice select unbind getitem chunk".split())
_DROPOUT = frozenset(("dropout", "native_dropout"))
_LABELLED = _CASTS | _MOVES | _DROPOUT | KEEPS_LAYOUT | frozenset(("cat", "tanh", "where"))
# Their result depends on the shape of their tensor arguments, not on the values.
_SHAPE_ONLY = frozenset(
    "sym_size sym_numel zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty".split()
)
# Their first argument alone gives the values.
_SHAPED_LIKE = frozenset("view_as reshape_as expand_as type_as".split())
# Hidden scores keep a weight of exp(-1000) = 0 at most.
_HIDES = -1e3


class Unproven(Exception):
    """The walk met something that the proof does not cover.

    Args:
        node: where it ended.
        reason: what it met.
        cure: what the user can do.
    """

    def __init__(self, node: Node, reason: str, cure: str) -> None:
        super().__init__(reason)
        self.node, self.reason, self.cure = node, reason, cure


@dataclass(frozen=True)
class MaskOperand:
    """One mask or bias on the way: added, or hiding where true or where false.

    Args:
        node: the mask.
        on: the score tensor it meets, whose dims it broadcasts against.
        kind: ``add``, ``hide`` (where true) or ``keep`` (where true).
        factor: what the added tensor is multiplied with before it reaches the softmax.
        fill: what hidden scores are when they reach the softmax.
        ends: the largest number that the casts after it let through; larger ones become infinite.
    """

    node: Node
    on: Node
    kind: str
    factor: float = 1.0
    fill: float = float("-inf")
    ends: float = float("inf")


@dataclass(frozen=True)
class ScorePath:
    """``softmax(softcap(scale * product) + masks)``."""

    product: Product
    scale: float
    softcap: float | None
    masks: tuple[MaskOperand, ...]
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class ValuePath:
    """``dropout(probabilities) x values``."""

    product: Product
    dropout_p: float
    nodes: tuple[Node, ...]


def labels(nodes: list[Node], roots: Callable[[Node], bool]) -> dict[Node, frozenset[Node]]:
    """For every tensor, the root nodes it is an elementwise or layout function of."""
    found: dict[Node, frozenset[Node]] = {}
    for node in nodes:
        if roots(node):
            found[node] = frozenset((node,))
        elif node.op == "call_function" and (op_name(node) in _LABELLED or is_pointwise(node)):
            inputs = [found[arg] for arg in node.all_input_nodes if arg in found]
            if inputs:
                found[node] = frozenset().union(*inputs)
    return found


@dataclass
class _Stages:
    """Reads the stages from the softmax towards the product, so later factors apply to earlier (inner) stages."""

    columns: Leaves  # the axis that the softmax runs over
    factor: float = 1.0  # product of all scalings met so far (those nearer to the softmax)
    ends: float = math.inf  # the largest number of all dtypes met so far
    cap_outer: float | None = None  # c in c * tanh(...), once the tanh was met
    masks: list[MaskOperand] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    @property
    def seen_tanh(self) -> bool:
        return self.cap_outer is not None


class ScoreWalk:
    """The walk from a softmax's input back to the one product that it depends on.

    Args:
        axes: the layouts of the graph.
        score_labels: for every tensor the products it is an elementwise function of.
        reader: reads constants.
        mutations: the graph's in-place writes.
    """

    def __init__(self, axes: Axes, score_labels: dict[Node, frozenset[Node]], reader: MaskReader, mutations: Mutations) -> None:
        self.axes, self.labels, self.reader, self.mutations = axes, score_labels, reader, mutations

    def path(self, softmax: Node, dim: int) -> ScorePath:
        """What stands between the product and the softmax over ``dim``.

        Raises:
            Unproven: naming the operator at which the proof ended.
        """
        node = _first(softmax)
        if len(self.labels[node]) > 1:
            raise Unproven(
                node,
                "the scores add up several products (relative or talking-heads attention)",
                "it stays as it is; no form covers a sum of products yet",
            )
        stages, reader = _Stages(self.axes[softmax][dim], ends=_largest(softmax)), softmax
        while True:
            if self.mutations.stale(node, reader):
                raise Unproven(node, "the scores are written through another view", "write the mask out of place")
            stages.nodes.append(node)
            if node in self.axes.products:
                break
            node, reader = self._step(node, stages), node
        product = self.axes.products[node]
        scale = stages.factor * product.alpha * (1.0 if stages.cap_outer is None else stages.cap_outer)
        if product.addend is not None:
            self._uncapped(node, stages)
            stages.masks.append(MaskOperand(product.addend, node, "add", stages.factor * product.beta, ends=stages.ends))
        for operand in stages.masks:
            self._independent(operand, node)
        return ScorePath(product, scale, stages.cap_outer, tuple(stages.masks), tuple(stages.nodes))

    def _step(self, node: Node, stages: _Stages) -> Node:
        """Record what ``node`` does to the scores; return the node it does it to."""
        name = op_name(node)
        if node.op != "call_function":
            raise Unproven(node, "the scores come from outside this graph", "avoid the graph break between scores and softmax")
        if name in _CASTS:
            stages.ends = min(stages.ends, _largest(node))
            return uncast(node)
        if name in _REORDERS or _does_nothing(node):
            return _first(node)
        if name in ("mul", "div"):
            return self._scaling(node, stages)
        if name == "neg":
            stages.factor = -stages.factor
            return _first(node)
        if name in ("add", "sub"):
            return self._addition(node, stages)
        if name == "masked_fill":
            self._masked(node, node.args[1], "hide", node.args[2], stages)
            return _first(node)
        if name == "where":
            return self._where(node, stages)
        if name == "tanh":
            if stages.seen_tanh:
                raise Unproven(node, "two soft caps", "it stays as it is")
            stages.cap_outer, stages.factor = stages.factor, 1.0
            return _first(node)
        if name in ("matmul", "bmm", "mm", "einsum", "linear", "conv2d", "baddbmm"):
            raise Unproven(
                node, "the scores are mixed by a learned product (talking heads)", "no form covers it; it stays as it is"
            )
        raise Unproven(node, f"aten.{name} stands between the product and the softmax", "it stays as it is")

    def _scaling(self, node: Node, stages: _Stages) -> Node:
        path, other = _sides(node, self.labels)
        if op_name(node) == "div" and path is not node.args[0]:
            raise Unproven(node, "the scores divide something", "it stays as it is")
        if node.kwargs.get("rounding_mode") is not None:
            raise Unproven(node, "the scores are rounded", "it stays as it is")
        value = _scalar(other, node, self.reader)
        if op_name(node) == "div" and value == 0:
            raise Unproven(node, "the scores are divided by zero", "it stays as it is")
        stages.factor *= 1 / value if op_name(node) == "div" else value
        return path

    def _addition(self, node: Node, stages: _Stages) -> Node:
        path, other = _sides(node, self.labels)
        if op_name(node) == "sub" and path is not node.args[0]:
            raise Unproven(node, "the scores are subtracted from something", "it stays as it is")
        self._uncapped(node, stages)
        if not is_tensor(other):
            return path  # a constant on every score cancels in the softmax
        if self._is_row_maximum(other, path, stages.columns):
            return path
        sign = -1.0 if op_name(node) == "sub" else 1.0
        alpha = node.kwargs.get("alpha", 1)
        if not isinstance(alpha, (int, float)):
            raise Unproven(node, "the mask is scaled by a computed number", "it stays as it is")
        stages.masks.append(MaskOperand(other, node, "add", sign * stages.factor * float(alpha), ends=stages.ends))
        return path

    def _is_row_maximum(self, other: Node, path: Node, columns: Leaves) -> bool:
        """One number for all keys of a row, made of the scores themselves: it cancels in the softmax."""
        if op_name(other) == "getitem" and other.args[1] != 0:
            return False
        reduce = other.args[0] if op_name(other) == "getitem" else other
        if not isinstance(reduce, Node) or op_name(reduce) not in ("amax", "max") or reduce.args[0] is not path:
            return False
        if self.mutations.stale(path, reduce):
            return False
        layout = self.axes[path]
        dims = reduce.args[1] if len(reduce.args) > 1 else []
        reduced = {int(d) % len(layout) for d in ([dims] if isinstance(dims, int) else dims)}  # type: ignore[union-attr, arg-type]
        keeps_dims = len(shape_of(other)) == len(layout)
        return keeps_dims and any(layout[dim] == columns for dim in reduced)

    def _masked(self, node: Node, mask: Any, kind: str, fill: Any, stages: _Stages) -> None:
        value = _scalar(fill, node, self.reader) * stages.factor
        if not value <= _HIDES:
            raise Unproven(node, f"hidden scores are filled with {value:g}, which does not hide them", "fill with -inf")
        self._uncapped(node, stages)
        if not is_tensor(mask):
            raise Unproven(node, "the mask is not a tensor", "it stays as it is")
        stages.masks.append(MaskOperand(mask, node, kind, 1.0, value, stages.ends))

    def _where(self, node: Node, stages: _Stages) -> Node:
        condition, then, other = node.args[:3]
        if isinstance(condition, Node) and condition in self.labels:
            raise Unproven(node, "the mask depends on the scores", "it stays as it is")
        if isinstance(then, Node) and then in self.labels and other not in self.labels:
            self._masked(node, condition, "keep", other, stages)
            return then
        if isinstance(other, Node) and other in self.labels and then not in self.labels:
            self._masked(node, condition, "hide", then, stages)
            return other
        raise Unproven(node, "where chooses between two scores", "it stays as it is")

    @staticmethod
    def _uncapped(node: Node, stages: _Stages) -> None:
        if stages.seen_tanh:
            raise Unproven(node, "a mask or bias is added before the soft cap", "add it after the cap")

    def _independent(self, operand: MaskOperand, product: Node) -> None:
        """A mask or bias that is computed from the scores is none: it mixes them."""
        start, position = self.mutations.position[product], self.mutations.position
        queue, seen = [operand.node], {operand.node}
        while queue:
            node = queue.pop()
            if node is product:
                raise Unproven(operand.node, "a mask or bias is computed from the scores themselves", "it stays as it is")
            if position[node] < start or op_name(node) in _SHAPE_ONLY:
                continue
            sources = node.all_input_nodes[:1] if op_name(node) in _SHAPED_LIKE else node.all_input_nodes
            written = self.mutations.writes(node, node, operand.on) if is_tensor(node) else []
            fresh = [source for source in (*sources, *written) if source not in seen]
            seen.update(fresh)
            queue += fresh


def _largest(node: Node) -> float:
    dtype = node.meta["val"].dtype
    return float(torch.finfo(dtype).max) if dtype.is_floating_point else math.inf


def uncast(node: Node) -> Node:
    """What a cast or copy is made of.

    Raises:
        Unproven: if the cast cuts fractions off.
    """
    if not node.meta["val"].dtype.is_floating_point:
        raise Unproven(
            node, f"a cast to {str(node.meta['val'].dtype).removeprefix('torch.')} cuts fractions off", "it stays as it is"
        )
    return _first(node)


def _does_nothing(node: Node) -> bool:
    """A dropout that is switched off."""
    return op_name(node) == "dropout" and bool(not node.args[2] or node.args[1] == 0)


def _sides(node: Node, score_labels: dict[Node, frozenset[Node]]) -> tuple[Node, Any]:
    """(the operand on the score path, the other one)."""
    a, b = node.args[:2]
    labelled = [isinstance(x, Node) and x in score_labels for x in (a, b)]
    if all(labelled):
        raise Unproven(node, "the scores meet themselves", "it stays as it is")
    return (a, b) if labelled[0] else (b, a)  # type: ignore[return-value]


def _first(node: Node) -> Node:
    first = node.args[0]
    assert isinstance(first, Node)
    return first


def _scalar(value: Any, node: Node, reader: MaskReader) -> float:
    """A number, a node that holds one, or a tensor that is one constant.

    Raises:
        Unproven: if it is data (a learned temperature).
    """
    found = scalar_or_none(value, reader, node)
    if found is None:
        raise Unproven(node, "the scores are scaled by a tensor (a learned or computed temperature)", "scale the queries instead")
    return found


def scalar_or_none(value: Any, reader: MaskReader, at: Node) -> float | None:
    """The number that ``at`` reads, or None if it is data."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node):
        return None
    held = value.meta.get("val")
    if not is_tensor(value):
        return None if held is None else float(held)
    if held is None or any(size != 1 for size in held.shape) or reader.stale(value, at):
        return None
    try:
        number = reader.number(value, (sympy.Integer(0),) * held.dim())
    except Unreadable:
        return None
    return float(number) if isinstance(number, sympy.Expr) and number.is_number else None


def walk_values(softmax: Node, axes: Axes) -> ValuePath:
    """From the softmax forward to the one product that consumes its probabilities.

    Raises:
        Unproven: if the probabilities are changed, or used by anything else too.
    """
    node, kept, nodes = softmax, 1.0, [softmax]
    while True:
        users = [user for user in node.users if user.op != "call_function" or _matters(user)]
        if len(users) != 1:
            raise Unproven(
                node,
                "the attention weights are used elsewhere too" if users else "the attention weights are not used",
                "run the model without output_attentions / need_weights",
            )
        user = users[0]
        if user in axes.products:
            product = axes.products[user]
            if product.alpha != 1.0 or product.addend is not None:
                raise Unproven(user, "something is added to the output of the value product", "it stays as it is")
            return ValuePath(product, 1.0 - kept, tuple(nodes))
        nodes.append(user)
        kept *= _through(user)
        node = user


def _matters(user: Node) -> bool:
    return op_name(user) not in ("sym_size", "_assert_tensor_metadata")


def _through(user: Node) -> float:
    """The share of probabilities kept by a node on the way to the values."""
    if user.op == "output":
        raise Unproven(user, "the attention weights are returned", "run the model without output_attentions / need_weights")
    name = op_name(user)
    if name in _CASTS:
        uncast(user)
        return 1.0
    if name in _REORDERS:
        return 1.0
    if name in _DROPOUT:
        p, train = user.args[1], user.args[2]
        return 1.0 - float(p) if train else 1.0  # type: ignore[arg-type]
    if name == "getitem" and op_name(user.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return 1.0
    if name == "mul":
        raise Unproven(user, "the probabilities are multiplied (a head mask or renormalisation)", "it stays as it is")
    if name in ("matmul", "bmm", "einsum", "linear", "conv2d"):
        raise Unproven(
            user, "the probabilities are mixed by a learned product (talking heads)", "no form covers it; it stays as it is"
        )
    raise Unproven(user, f"aten.{name} stands between the softmax and the values", "it stays as it is")
