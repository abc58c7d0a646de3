"""Walk from a softmax back to the query-key product and forward to the value product, collecting what happens on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch.fx import Node

from dilcompile.passes.axes import KEEPS_LAYOUT, VIEWS, Axes, is_pointwise, is_tensor, op_name
from dilcompile.passes.mask_reader import MaskReader, Unreadable
from dilcompile.passes.products import Product

SOFTMAX = frozenset(("softmax", "_softmax", "_safe_softmax"))
_CASTS = frozenset("to _to_copy contiguous clone alias lift_fresh lift_fresh_copy type_as float".split())
_MOVES = VIEWS | frozenset(
    "transpose permute t mT swapaxes movedim unsqueeze squeeze expand slice select unbind getitem chunk".split()
)
_DROPOUT = frozenset(("dropout", "native_dropout"))
_LABELLED = _CASTS | _MOVES | _DROPOUT | KEEPS_LAYOUT | frozenset(("cat", "tanh", "where"))


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
    """One mask or bias on the way: added, or hiding where true or where false."""

    node: Node
    on: Node  # the score tensor it meets, whose dims it broadcasts against
    kind: str  # "add" | "hide" | "keep"
    factor: float = 1.0
    fill: float = float("-inf")


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

    factor: float = 1.0  # product of all scalings met so far (those nearer to the softmax)
    cap_outer: float | None = None  # c in c * tanh(...), once the tanh was met
    masks: list[MaskOperand] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)

    @property
    def seen_tanh(self) -> bool:
        return self.cap_outer is not None


def walk_scores(softmax: Node, axes: Axes, score_labels: dict[Node, frozenset[Node]], reader: MaskReader) -> ScorePath:
    """From the softmax's input back to the one product it depends on.

    Raises:
        Unproven: naming the operator at which the proof ended.
    """
    node = softmax.args[0]
    assert isinstance(node, Node)
    if len(score_labels[node]) > 1:
        raise Unproven(
            node,
            "the scores add up several products (relative or talking-heads attention)",
            "it stays as it is; no form covers a sum of products yet",
        )
    stages = _Stages()
    while node not in axes.products:
        stages.nodes.append(node)
        node = _step(node, stages, score_labels, reader)
    product = axes.products[node]
    stages.nodes.append(node)
    scale = stages.factor * product.alpha * (stages.cap_outer or 1.0)
    if product.addend is not None:
        stages.masks.append(MaskOperand(product.addend, node, "add", stages.factor * product.beta))
        if stages.seen_tanh:
            raise Unproven(node, "a mask or bias is added before the soft cap", "add it after the cap")
    return ScorePath(product, scale, stages.cap_outer, tuple(stages.masks), tuple(stages.nodes))


def _step(node: Node, stages: _Stages, score_labels: dict[Node, frozenset[Node]], reader: MaskReader) -> Node:
    """Record what ``node`` does to the scores; return the node it does it to."""
    name = op_name(node)
    if node.op != "call_function":
        raise Unproven(node, "the scores come from outside this graph", "avoid the graph break between scores and softmax")
    if name in _CASTS or name in VIEWS or name in ("transpose", "permute", "unsqueeze", "squeeze"):
        return _first(node)
    if name in ("mul", "div"):
        path, other = _sides(node, score_labels)
        if name == "div" and path is not node.args[0]:
            raise Unproven(node, "the scores divide something", "it stays as it is")
        value = _scalar(other, node, reader)
        stages.factor *= 1 / value if name == "div" else value
        return path
    if name in ("add", "sub"):
        return _addition(node, stages, score_labels, reader)
    if name == "masked_fill":
        _masked(node, node.args[1], "hide", node.args[2], stages, reader)
        return _first(node)
    if name == "where":
        return _where(node, stages, score_labels, reader)
    if name == "tanh":
        if stages.seen_tanh:
            raise Unproven(node, "two soft caps", "it stays as it is")
        stages.cap_outer, stages.factor = stages.factor, 1.0
        return _first(node)
    if name in ("matmul", "bmm", "mm", "einsum", "linear", "conv2d", "baddbmm"):
        raise Unproven(node, "the scores are mixed by a learned product (talking heads)", "no form covers it; it stays as it is")
    raise Unproven(node, f"aten.{name} stands between the product and the softmax", "it stays as it is")


def _addition(node: Node, stages: _Stages, score_labels: dict[Node, frozenset[Node]], reader: MaskReader) -> Node:
    path, other = _sides(node, score_labels)
    if op_name(node) == "sub" and path is not node.args[0]:
        raise Unproven(node, "the scores are subtracted from something", "it stays as it is")
    if not is_tensor(other):
        return path  # a constant on every score cancels in the softmax
    if op_name(other) in ("amax", "max", "getitem") and _is_row_maximum(other, path):
        return path
    sign = -1.0 if op_name(node) == "sub" else 1.0
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)):
        raise Unproven(node, "the mask is scaled by a computed number", "it stays as it is")
    if stages.seen_tanh:
        raise Unproven(node, "a mask or bias is added before the soft cap", "add it after the cap")
    stages.masks.append(MaskOperand(other, node, "add", sign * stages.factor * float(alpha)))
    return path


def _is_row_maximum(other: Node, path: Node) -> bool:
    reduce = other.args[0] if op_name(other) == "getitem" else other
    return isinstance(reduce, Node) and op_name(reduce) in ("amax", "max") and reduce.args[0] is path


def _masked(node: Node, mask: Any, kind: str, fill: Any, stages: _Stages, reader: MaskReader) -> None:
    value = _scalar(fill, node, reader)
    if value > -1e3:
        raise Unproven(node, f"hidden scores are filled with {value:g}, which does not hide them", "fill with -inf")
    if stages.seen_tanh:
        raise Unproven(node, "a mask is applied before the soft cap", "apply it after the cap")
    if not is_tensor(mask):
        raise Unproven(node, "the mask is not a tensor", "it stays as it is")
    stages.masks.append(MaskOperand(mask, node, kind, 1.0, value))


def _where(node: Node, stages: _Stages, score_labels: dict[Node, frozenset[Node]], reader: MaskReader) -> Node:
    condition, then, other = node.args[:3]
    if isinstance(condition, Node) and condition in score_labels:
        raise Unproven(node, "the mask depends on the scores", "it stays as it is")
    if isinstance(then, Node) and then in score_labels and other not in score_labels:
        _masked(node, condition, "keep", other, stages, reader)
        return then
    if isinstance(other, Node) and other in score_labels and then not in score_labels:
        _masked(node, condition, "hide", then, stages, reader)
        return other
    raise Unproven(node, "where chooses between two scores", "it stays as it is")


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
    found = scalar_or_none(value, reader)
    if found is None:
        raise Unproven(node, "the scores are scaled by a tensor (a learned or computed temperature)", "scale the queries instead")
    return found


def scalar_or_none(value: Any, reader: MaskReader) -> float | None:
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Node):
        return None
    held = value.meta.get("val")
    if not is_tensor(value):
        return None if held is None else float(held)
    if held is None or any(size != 1 for size in held.shape):
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
    return op_name(user) != "sym_size"


def _through(user: Node) -> float:
    """The share of probabilities kept by a node on the way to the values."""
    if user.op == "output":
        raise Unproven(user, "the attention weights are returned", "run the model without output_attentions / need_weights")
    name = op_name(user)
    if name in _CASTS or name in VIEWS or name in ("transpose", "permute", "unsqueeze", "squeeze"):
        return 1.0
    if name in _DROPOUT:
        p, train = user.args[1], user.args[2]
        return 1.0 - float(p) if train else 1.0  # type: ignore[arg-type]
    if name == "getitem" and op_name(user.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return 1.0
    if name == "mul":
        raise Unproven(user, "the probabilities are multiplied (a head mask or renormalisation)", "it stays as it is")
    if name in ("matmul", "bmm", "einsum", "linear", "conv2d"):
        raise Unproven(user, "the probabilities are mixed by a learned product (talking heads)", "no form covers it; it stays as it is")
    raise Unproven(user, f"aten.{name} stands between the softmax and the values", "it stays as it is")
