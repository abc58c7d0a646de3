"""The walk from a softmax's probabilities forward to the one value product that reads them."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.atoms import Leaves
from dilcompile.passes.axes import Axes
from dilcompile.passes.operators import CASTS, REORDERS, op_name
from dilcompile.passes.products import Product
from dilcompile.passes.score_steps import STAYS, keeps_all, uncast
from dilcompile.passes.unproven import Unproven

_DROPOUT = frozenset(("dropout", "native_dropout"))
_CURE = "run the model without output_attentions / need_weights, and without a graph break after the attention"


@dataclass(frozen=True)
class ValuePath:
    """``dropout(probabilities) x values``; ``probabilities`` is the operand of the product."""

    product: Product
    probabilities: Node
    dropout_p: float


def walk_values(probabilities: Node, columns: Leaves, axes: Axes) -> ValuePath:
    """From the probabilities to the one product that consumes them.

    Args:
        columns: the axis that is left when the sinks are dropped.

    Raises:
        Unproven: if the probabilities are changed, or used by anything else too.
    """
    node, kept = probabilities, 1.0
    while True:
        users = [user for user in node.users if user.op != "call_function" or _matters(user)]
        if len(users) != 1:
            raise Unproven(node, _said_of(users), _CURE)
        user = users[0]
        if user in axes.products:
            product = axes.products[user]
            if product.alpha != 1.0 or product.addend is not None:
                raise Unproven(user, "something is added to the output of the value product", STAYS)
            return ValuePath(product, node, 1.0 - kept)
        kept *= _through(user, columns, axes)
        node = user


def _said_of(users: list[Node]) -> str:
    if any(map(_returned, users)):
        return "the attention weights are returned"
    return "the attention weights are used elsewhere too" if users else "the attention weights are not used"


def _returned(user: Node) -> bool:
    return user.op == "output" or (op_name(user) in REORDERS | CASTS and any(map(_returned, user.users)))


def _matters(user: Node) -> bool:
    return op_name(user) not in ("sym_size", "_assert_tensor_metadata")


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
    if name in _DROPOUT:
        p, train = user.args[1], user.args[2]
        return 1.0 - float(p) if train else 1.0  # type: ignore[arg-type]
    if name == "getitem" and op_name(user.args[0]) == "native_dropout":  # type: ignore[arg-type]
        return 1.0
    if name == "mul":
        raise Unproven(user, "the probabilities are multiplied (a head mask or renormalisation)", STAYS)
    if name in ("matmul", "bmm", "einsum", "linear", "conv2d"):
        raise Unproven(
            user, "the probabilities are mixed by a learned product (talking heads)", "no form covers it; it stays as it is"
        )
    raise Unproven(user, f"aten.{name} stands between the softmax and the values", STAYS)
