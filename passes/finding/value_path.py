"""The walk from a softmax's probabilities forward to the one value product that reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.axes.atoms import Leaves, flat
from dilcompile.passes.axes.axes import Axes
from dilcompile.passes.axes.products import Product, parse_product
from dilcompile.passes.finding.anchors import Division, MaskOperand, Multiplier, Softmax
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.score_path import independent, of_floats, of_known_factors, unwritten
from dilcompile.passes.finding.score_steps import STAYS, keeps_all, multiplier, uncast
from dilcompile.passes.finding.spellings.own_sum import zeroed
from dilcompile.passes.graph.operators import CASTS, REORDERS, is_tensor, narrows, op_name, shape_of
from dilcompile.passes.graph.sizes import same_shape
from dilcompile.passes.graph.unproven import Unproven

_SCALINGS = frozenset(("mul", "div", "true_divide"))
_DROPOUT = frozenset(("dropout", "native_dropout"))
_CURE = "run the model without output_attentions / need_weights, and without a graph break after the attention"


@dataclass(frozen=True)
class ValuePath:
    """``factor * multipliers * dropout(probabilities) x values``.

    Args:
        probabilities: the operand of the product.
        cleared: NaN among the probabilities becomes 0.
        masks: what sets probabilities to 0.
        output: the node that holds the result.
    """

    product: Product
    probabilities: Node
    dropout_p: float
    factor: float
    multipliers: tuple[Multiplier, ...]
    cleared: bool
    masks: tuple[MaskOperand, ...]
    output: Node


def walk_values(softmax: Softmax, columns: Leaves, scores: Node, facts: Facts) -> ValuePath:
    """From the probabilities to the one product that consumes them.

    Args:
        softmax: where the probabilities are.
        columns: the axis that is left when the sinks are dropped.
        scores: the product that the probabilities are made of.

    Raises:
        Unproven: if the probabilities are changed, or used by anything else too.
    """
    node, kept, factor, axes = softmax.probabilities, 1.0, 1.0, facts.axes
    division = softmax.division
    multipliers: list[Multiplier] = []
    masks: list[MaskOperand] = []
    cleared = False
    while True:
        users = [user for user in node.users if _matters(user) and (division is None or user is not division.total)]
        if len(users) != 1:
            raise Unproven(node, _said_of(users), _CURE)
        user = users[0]
        if user in axes.reading:
            product = _unadded(axes.reading[user], facts)
            output = product.node if division is None else _divided(product, node, division, facts)
            return ValuePath(product, node, 1.0 - kept, factor * product.alpha, tuple(multipliers), cleared, tuple(masks), output)
        if op_name(user) in _SCALINGS:
            weight = _weight(user, node, columns, scores, facts)
            if isinstance(weight, Multiplier):
                multipliers.append(weight)
            else:
                factor *= weight
        elif op_name(user) == "nan_to_num":
            _clears(user, multipliers, facts)
            cleared = True
        elif (mask := zeroed(user, node, facts)) is not None:
            masks.append(_zeroes(mask, node, softmax, multipliers, scores, facts))
        else:
            kept *= _through(user, columns, axes)
        node = user


def _divided(product: Product, weights: Node, division: Division, facts: Facts) -> Node:
    """The node that divides the product by the sum of the weights, each row by its own.

    Raises:
        Unproven: if the product is changed before, used by anything else, or meets the sums of other rows.
    """
    node, axes = product.node, facts.axes
    while node is not division.at:
        users = [user for user in node.users if _matters(user)]
        if len(users) != 1 or (users[0] is not division.at and not _moves(users[0])):
            reason = "the product of weights and values is used before it is divided by the sum of the weights"
            raise Unproven(node, reason, "divide the weights first")
        if facts.mutations.stale(node, users[0]):
            raise Unproven(node, "it is written in place before the attention ends", "write it out of place")
        node = users[0]
    of_values = product.lhs_free if product.rhs is weights else product.rhs_free
    features = {id(atom) for _, out in of_values for atom in axes[product.node][out]}
    found, by = axes[node], axes[division.by]
    fits = all(all(atom.broadcast for atom in own) or own == dim for dim, own in zip(reversed(found), reversed(by), strict=False))
    rows = {id(atom) for atom in flat(found)} - features
    if not fits or len(by) > len(found) or {id(atom) for atom in flat(by) if not atom.broadcast} != rows:
        raise Unproven(division.at, "the rows are divided by the sums of others", "divide the weights first")
    if sorted(map(id, flat(found))) != sorted(map(id, flat(axes[product.node]))):
        raise Unproven(division.at, "the axes of the output can't be told", "divide the weights first")
    return node


def _moves(user: Node) -> bool:
    return op_name(user) in REORDERS or (op_name(user) in CASTS and bool(user.meta["val"].dtype.is_floating_point))


def _unadded(product: Product, facts: Facts) -> Product:
    """The product itself.

    Raises:
        Unproven: if something but zero is added to it, if it rounds, or if a part of it is written before it is read.
    """
    addend, node = product.addend, product.node
    if addend is not None and not facts.is_zero(addend, node):
        raise Unproven(node, "something is added to the output of the value product", STAYS)
    of_floats(product)
    of_known_factors(product)
    if narrows(product.reader, node):
        raise Unproven(node, "the weighted values are summed in fewer digits than they have", "sum them in their own dtype")
    unwritten(product, facts)
    return product


def _said_of(users: list[Node]) -> str:
    if any(map(_returned, users)):
        return "the attention weights are returned"
    return "the attention weights are used elsewhere too" if users else "the attention weights are not used"


def _returned(user: Node) -> bool:
    return user.op == "output" or (op_name(user) in REORDERS | CASTS and any(map(_returned, user.users)))


def _matters(user: Node) -> bool:
    return user.op != "call_function" or op_name(user) not in ("sym_size", "_assert_tensor_metadata")


def _weight(user: Node, node: Node, columns: Leaves, scores: Node, facts: Facts) -> float | Multiplier:
    """What the probabilities ``node`` are multiplied with: a number, or a tensor that is not made of them."""
    first, second = user.args[:2]
    divides = op_name(user) != "mul"
    if first is second or (divides and first is not node) or user.kwargs.get("rounding_mode") is not None:
        raise Unproven(user, f"aten.{op_name(user)} stands between the softmax and the values", STAYS)
    other = second if first is node else first
    number = facts.scalar(other, user)
    if number is not None and not (divides and number == 0):
        return 1 / number if divides else number
    if number is not None or not isinstance(other, Node) or not is_tensor(other):
        raise Unproven(user, "the probabilities are multiplied by a number that is computed in the graph", STAYS)
    independent(other, user, scores, facts.mutations, "a weight of the probabilities")
    return multiplier(user, node, other, columns, facts)


def _clears(user: Node, multipliers: Sequence[Multiplier], facts: Facts) -> None:
    """``nan_to_num`` of probabilities: none of them is infinite."""
    given = user.args[1] if len(user.args) > 1 else user.kwargs.get("nan")
    if given is not None and facts.scalar(given, user) != 0:
        raise Unproven(user, "NaN among the probabilities becomes another number than 0", "fill with 0")
    if multipliers:
        raise Unproven(user, "the probabilities are multiplied by a tensor before NaN becomes 0", "clear them first")


def _zeroes(
    mask: MaskOperand, weights: Node, softmax: Softmax, multipliers: Sequence[Multiplier], scores: Node, facts: Facts
) -> MaskOperand:
    """A mask under which probabilities become 0."""
    if multipliers:
        raise Unproven(mask.on, "the probabilities are multiplied by a tensor before some become 0", "mask them first")
    if softmax.empty == "odd" or softmax.masks or softmax.division is not None or softmax.sinks:
        raise Unproven(mask.on, "some probabilities of a softmax that is written out become 0", "write torch.softmax")
    if facts.mutations.stale(weights, mask.on) or not same_shape(shape_of(mask.on), shape_of(weights)):
        raise Unproven(mask.on, "the probabilities are not what is masked", STAYS)
    independent(mask.node, mask.on, scores, facts.mutations, "a mask of the probabilities")
    return mask


def _through(user: Node, columns: Leaves, axes: Axes) -> float:
    """The share of probabilities kept by a node on the way to the values."""
    if user.op == "output":
        raise Unproven(user, "the attention weights are returned", _CURE)
    name = op_name(user)
    if name in CASTS:
        uncast(user)
        return 1.0
    if name in REORDERS:
        return 1.0
    if name in ("slice", "narrow") and (keeps_all(user) or columns in axes[user]):
        return 1.0  # the sinks' columns are cut off
    if name in ("expand", "expand_as") and keeps_all(user):
        return 1.0
    if name in _DROPOUT:
        p, train = user.args[1], user.args[2]
        return 1.0 - float(p) if train else 1.0  # type: ignore[arg-type]
    if name == "getitem" and op_name(user.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return 1.0
    if name == "conv2d" or parse_product(user) is not None:
        raise Unproven(
            user, "the probabilities are mixed by a learned product (talking heads)", "no form covers it; it stays as it is"
        )
    raise Unproven(user, f"aten.{name} stands between the softmax and the values", STAYS)
