"""One rule an operator: what it does to scores on their way from the product to the softmax.

The walk goes backwards, from the softmax inwards: a factor met later applies to what was met before it no more.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import Node

from dilcompile.passes.axes.atoms import Leaves
from dilcompile.passes.axes.products import parse_product
from dilcompile.passes.finding.anchors import MaskOperand, Multiplier, Sink
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.graph.operators import CASTS, REORDERS, is_tensor, op_name, shape_of
from dilcompile.passes.graph.sizes import same_size
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.emptiness import Floor

STAYS = "it stays as it is"
# Hidden scores keep a weight of exp(-1000) = 0 at most.
_HIDES = -1e3
# Beside them no score of the row is large.
_ROW_NUMBERS = frozenset(("amax", "max", "logsumexp"))


@dataclass
class Stages:
    """What was met so far, from the softmax inwards.

    Args:
        columns: the axis that the softmax runs over.
        product: the product that the walk is after; others that are added to it are biases.
        factor: product of all scalings (those nearer to the softmax).
        ends: the largest number that all dtypes hold, as the softmax sees it.
        resolution: the relative resolution of the dtype with the fewest digits.
        limit: beyond it an exponential is zero, until a maximum is taken off.
        cap_outer: c in ``c * tanh(...)``, once the tanh was met.
        floor: what the scores are lifted to last of all.
        shifted: one number for all keys of a row was added; it cancels in the softmax, but for the last digits.
    """

    columns: Leaves
    product: Node
    factor: float = 1.0
    ends: float = math.inf
    resolution: float = 0.0
    limit: float = math.inf
    cap_outer: float | None = None
    floor: Floor | None = None
    masks: list[MaskOperand] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    multipliers: list[Multiplier] = field(default_factory=list)
    shifted: bool = False

    def on_path(self, value: Any, facts: Facts) -> bool:
        """Is it made of the product, element by element?"""
        return isinstance(value, Node) and self.product in facts.scores.get(value, ())

    @property
    def holds(self) -> float:
        """The largest number that reaches the softmax as a number."""
        return min(self.ends, self.limit)

    def through(self, node: Node) -> None:
        """Larger numbers than this node's dtype holds end here; what stands after it scales them. So do smaller digits."""
        self.ends = min(self.ends, largest(node) * abs(self.factor))
        self.resolution = max(self.resolution, resolution(node))

    def shift(self) -> None:
        """A number a row is taken off: what hid all of a row is ordinary again, in what comes after."""
        self.limit = self.ends = math.inf
        self.resolution = 0.0


Step = Callable[[Node, Stages, Facts], Node]


def step(node: Node, stages: Stages, facts: Facts) -> Node:
    """Record what ``node`` does to the scores; return the node it does it to.

    Raises:
        Unproven: if it does something that no rule covers.
    """
    if node.op != "call_function":
        raise Unproven(node, "the scores come from outside this graph", "avoid the graph break between scores and softmax")
    stages.through(node)
    rule = STEPS.get(op_name(node))
    if rule is not None:
        return rule(node, stages, facts)
    if parse_product(node) is not None:
        return _mixed(node, stages, facts)
    raise Unproven(node, f"aten.{op_name(node)} stands between the product and the softmax", STAYS)


def first(node: Node) -> Node:
    found = node.args[0]
    assert isinstance(found, Node)
    return found


def largest(node: Node) -> float:
    dtype = node.meta["val"].dtype
    return float(torch.finfo(dtype).max) if dtype.is_floating_point else math.inf


def resolution(node: Node) -> float:
    dtype = node.meta["val"].dtype
    return float(torch.finfo(dtype).eps) if dtype.is_floating_point else 0.0


def uncast(node: Node) -> Node:
    """What a cast or copy is made of.

    Raises:
        Unproven: if the cast cuts fractions off.
    """
    if not node.meta["val"].dtype.is_floating_point:
        dtype = str(node.meta["val"].dtype).removeprefix("torch.")
        raise Unproven(node, f"a cast to {dtype} cuts fractions off", STAYS)
    return first(node)


def uncapped(node: Node, stages: Stages) -> None:
    if stages.cap_outer is not None:
        raise Unproven(node, "a mask or bias is added before the soft cap", "add it after the cap")


def unscaled(node: Node, stages: Stages) -> None:
    if stages.multipliers:
        raise Unproven(node, "the scores are changed otherwise before they are scaled by a tensor", "scale the queries instead")


def unweighed(node: Node, stages: Stages) -> None:
    """One number for all keys of a row is none any more where keys are multiplied each with a number of its own."""
    if any(one.by_key for one in stages.multipliers):
        unscaled(node, stages)


def multiplier(node: Node, path: Node, other: Node, columns: Leaves, facts: Facts) -> Multiplier:
    """``other`` as what ``path`` is multiplied with, or divided by, at ``node``.

    Raises:
        Unproven: if it makes the result larger.
    """
    shape = shape_of(node)
    if len(shape) != len(shape_of(path)) or not all(map(same_size, shape, shape_of(path))):
        raise Unproven(node, "they are multiplied by a tensor with dims that the scores lack", STAYS)
    wanted = {id(atom) for atom in columns}
    sizes = shape_of(other)
    dims = facts.axes[node][len(shape) - len(sizes) :]
    by_key = any(
        not same_size(size, 1) and any(id(atom) in wanted for atom in dim) for dim, size in zip(dims, sizes, strict=True)
    )
    return Multiplier(other, node, op_name(node) in ("div", "true_divide"), by_key)


def keeps_all(node: Node) -> bool:
    """A slice, expansion or dropout that does nothing."""
    if op_name(node) == "dropout":
        return bool(not node.args[2] or node.args[1] == 0)
    if op_name(node) == "slice" and len(node.args) > 4 and node.args[4] != 1:
        return False
    before, after = shape_of(first(node)), shape_of(node)
    return len(before) == len(after) and all(map(same_size, before, after))


def is_row_number(other: Node, path: Node, columns: Leaves, facts: Facts) -> bool:
    """One number for all keys of a row, made of the scores themselves and of their size: it cancels in the softmax."""
    while op_name(other) in ("detach", "alias") or (op_name(other) == "expand" and isinstance(other.args[0], Node)):
        other = first(other)
    if op_name(other) == "getitem" and other.args[1] != 0:
        return False
    reduce = other.args[0] if op_name(other) == "getitem" else other
    if not isinstance(reduce, Node) or op_name(reduce) not in _ROW_NUMBERS or not reduce.args:
        return False
    of = reduce.args[0]
    while isinstance(of, Node) and of is not path and op_name(of) == "detach":
        of = of.args[0]
    if of is not path or facts.mutations.stale(path, reduce):
        return False
    layout = facts.axes[path]
    dims = reduce.args[1] if len(reduce.args) > 1 else []
    reduced = {int(d) % len(layout) for d in ([dims] if isinstance(dims, int) else dims or [])}  # type: ignore[union-attr, arg-type]
    keeps_dims = len(shape_of(other)) == len(layout)
    return keeps_dims and len(reduced) == 1 and any(layout[dim] == columns for dim in reduced)


def _cast(node: Node, stages: Stages, facts: Facts) -> Node:
    return uncast(node)


def _reorder(node: Node, stages: Stages, facts: Facts) -> Node:
    return first(node)


def _nothing(node: Node, stages: Stages, facts: Facts) -> Node:
    if not keeps_all(node):
        raise Unproven(node, f"aten.{op_name(node)} stands between the product and the softmax", STAYS)
    return first(node)


def _negation(node: Node, stages: Stages, facts: Facts) -> Node:
    stages.factor = -stages.factor
    return first(node)


def _scaling(node: Node, stages: Stages, facts: Facts) -> Node:
    path, other = _sides(node, stages, facts)
    divides = op_name(node) in ("div", "true_divide")
    if divides and path is not node.args[0]:
        raise Unproven(node, "the scores divide something", STAYS)
    if node.kwargs.get("rounding_mode") is not None:
        raise Unproven(node, "the scores are rounded", STAYS)
    value = facts.scalar(other, node)
    if value is None and is_tensor(other):
        stages.multipliers.append(multiplier(node, path, other, stages.columns, facts))
        return path
    if value is None:
        raise Unproven(node, "the scores are scaled by a number that is computed in the graph", "scale the queries instead")
    if divides and value == 0:
        raise Unproven(node, "the scores are divided by zero", STAYS)
    stages.factor *= 1 / value if divides else value
    return path


def _addition(node: Node, stages: Stages, facts: Facts) -> Node:
    path, other = _sides(node, stages, facts)
    alpha = facts.scalar(node.kwargs.get("alpha", 1), node)
    if alpha is None or alpha == 0:
        raise Unproven(node, "the mask is scaled by a computed number", STAYS)
    of_path, of_other = {"add": (1.0, alpha), "sub": (1.0, -alpha), "rsub": (-alpha, 1.0)}[op_name(node)]
    if path is not node.args[0]:
        of_path, of_other = of_other, of_path
    uncapped(node, stages)
    if is_tensor(other) and is_row_number(other, path, stages.columns, facts):
        unweighed(node, stages)
        if stages.sinks:
            raise Unproven(node, "a number a row is taken off the scores, but not off the sinks", "take it off both")
        stages.shift()
        stages.shifted = True
    elif is_tensor(other):
        unscaled(node, stages)
        stages.masks.append(
            MaskOperand(other, node, "add", stages.factor * of_other, ends=stages.holds, digits=stages.resolution)
        )
    elif stages.sinks:
        raise Unproven(node, "a number is added to the scores, but not to the sinks", STAYS)
    else:
        unweighed(node, stages)
        stages.shifted = True
    # A constant on every score of a row cancels in the softmax.
    stages.factor *= of_path
    return path


def _masked_fill(node: Node, stages: Stages, facts: Facts) -> Node:
    _masked(node, node.args[1], "hide", node.args[2], stages, facts)
    return first(node)


def _masked(node: Node, mask: Any, kind: str, fill: Any, stages: Stages, facts: Facts) -> None:
    number = facts.scalar(fill, node)
    if number is None:
        raise Unproven(node, "hidden scores are filled with a computed number", "fill with -inf")
    value = number * stages.factor
    if not value <= _HIDES:
        raise Unproven(node, f"hidden scores are filled with {value:g}, which does not hide them", "fill with -inf")
    uncapped(node, stages)
    unscaled(node, stages)
    if not is_tensor(mask):
        raise Unproven(node, "the mask is not a tensor", STAYS)
    stages.masks.append(MaskOperand(mask, node, kind, 1.0, value, stages.holds, stages.resolution))


def _where(node: Node, stages: Stages, facts: Facts) -> Node:
    condition, then, other = node.args[:3]
    if stages.on_path(condition, facts):
        raise Unproven(node, "the mask depends on the scores", STAYS)
    if stages.on_path(then, facts) and not stages.on_path(other, facts):
        _masked(node, condition, "keep", other, stages, facts)
        return then  # type: ignore[return-value]
    if stages.on_path(other, facts) and not stages.on_path(then, facts):
        _masked(node, condition, "hide", then, stages, facts)
        return other  # type: ignore[return-value]
    raise Unproven(node, "where chooses between two scores", STAYS)


def _tanh(node: Node, stages: Stages, facts: Facts) -> Node:
    if stages.cap_outer is not None:
        raise Unproven(node, "two soft caps", STAYS)
    unscaled(node, stages)
    stages.cap_outer, stages.factor = stages.factor, 1.0
    return first(node)


def _lifted(node: Node, stages: Stages, facts: Facts) -> Node:
    """``max(scores, least)``, ``clamp(scores, min=least)``: acts on -inf alone where no other number is smaller."""
    halves = op_name(node) in ("max", "maximum")
    path, least = _at_least(node, stages, facts) if halves else (first(node), _lower_bound(node, facts))
    if least is None:
        raise Unproven(node, "the scores are clamped by a computed number", STAYS)
    if least == -math.inf:
        return path
    if least > -largest(node):
        reason = f"the scores are clamped at {least:g}, which may cut off what counts"
        raise Unproven(node, reason, "clamp at the dtype's least number")
    if stages.masks or stages.sinks or stages.multipliers or stages.cap_outer is not None or stages.factor != 1.0:
        raise Unproven(node, "the scores are changed after they are clamped", "clamp them last")
    if -least > stages.holds:
        raise Unproven(node, "the number that scores are clamped at becomes infinite", "clamp in the softmax's own dtype")
    stages.floor = Floor(least, halves or (stages.floor is not None and stages.floor.halves))
    return path


def _at_least(node: Node, stages: Stages, facts: Facts) -> tuple[Node, float | None]:
    if len(node.args) < 2 or not is_tensor(node.args[1]):
        raise Unproven(node, f"aten.{op_name(node)} stands between the product and the softmax", STAYS)
    path, other = _sides(node, stages, facts)
    return path, facts.scalar(other, node)


def _lower_bound(node: Node, facts: Facts) -> float | None:
    names = ("min", "max")
    given = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if given.get("max") is not None:
        raise Unproven(node, "the scores are clamped from above", STAYS)
    return facts.scalar(given.get("min"), node)


def _cat(node: Node, stages: Stages, facts: Facts) -> Node:
    parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
    asked: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    dim = int(asked) % len(shape_of(node))
    scores = [part for part in parts if part in facts.scores]
    if facts.axes[node][dim] != stages.columns:
        raise Unproven(node, "scores of several products are put side by side", STAYS)
    if len(scores) != 1:
        raise Unproven(node, "the keys come in several parts, each with a product of its own", STAYS)
    uncapped(node, stages)
    unscaled(node, stages)
    stages.sinks += [Sink(part, node, dim, stages.factor) for part in parts if part is not scores[0]]
    stages.columns = facts.axes[scores[0]][dim]
    path = scores[0]
    assert isinstance(path, Node)
    return path


def _pad(node: Node, stages: Stages, facts: Facts) -> Node:
    """Columns of one number."""
    widths = node.args[1]
    mode = node.args[2] if op_name(node) == "pad" and len(node.args) > 2 else "constant"
    given = node.args[3 if op_name(node) == "pad" else 2 :]
    value = facts.scalar(given[0], node) if given and given[0] is not None else 0.0
    plain = isinstance(widths, (list, tuple)) and len(widths) == 2 and all(isinstance(w, int) and w >= 0 for w in widths)
    if not plain or mode != "constant" or value is None or facts.axes[node][-1] != stages.columns:
        raise Unproven(node, "the scores are padded", "mask them instead")
    uncapped(node, stages)
    unscaled(node, stages)
    number = int(sum(widths))  # type: ignore[arg-type]
    if number:
        stages.sinks.append(Sink(value * stages.factor + math.log(number), node, len(shape_of(node)) - 1))
    stages.columns = facts.axes[first(node)][-1]
    return first(node)


def _mixed(node: Node, stages: Stages, facts: Facts) -> Node:
    raise Unproven(node, "the scores are mixed by a learned product (talking heads)", "no form covers it; it stays as it is")


def _sides(node: Node, stages: Stages, facts: Facts) -> tuple[Node, Any]:
    """(the operand on the score path, the other one)."""
    a, b = node.args[:2]
    labelled = [stages.on_path(x, facts) for x in (a, b)]
    if all(labelled):
        raise Unproven(node, "the scores meet themselves", STAYS)
    return (a, b) if labelled[0] else (b, a)  # type: ignore[return-value]


STEPS: dict[str, Step] = {
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(REORDERS, _reorder),
    **dict.fromkeys(("dropout", "slice", "narrow", "expand", "expand_as"), _nothing),
    "neg": _negation,
    **dict.fromkeys(("mul", "div", "true_divide"), _scaling),
    **dict.fromkeys(("add", "sub", "rsub"), _addition),
    "masked_fill": _masked_fill,
    "where": _where,
    "tanh": _tanh,
    **dict.fromkeys(("max", "maximum", "clamp", "clamp_min"), _lifted),
    **dict.fromkeys(("cat", "concat"), _cat),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "conv2d": _mixed,
}
