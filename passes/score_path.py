"""The walk from a softmax back to the one query-key product that it depends on."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.anchors import MaskOperand, Sink, Softmax
from dilcompile.passes.atoms import Leaves
from dilcompile.passes.facts import Facts
from dilcompile.passes.mutations import Mutations
from dilcompile.passes.operators import is_tensor, op_name
from dilcompile.passes.products import Product
from dilcompile.passes.score_steps import Stages, largest, step, uncapped
from dilcompile.passes.unproven import Unproven

# Their result depends on the shape of their tensor arguments, not on the values.
_SHAPE_ONLY = frozenset(
    "sym_size sym_numel zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty".split()
)
# Their first argument alone gives the values.
_SHAPED_LIKE = frozenset("view_as reshape_as expand_as type_as".split())


@dataclass(frozen=True)
class ScorePath:
    """``softmax([softcap(scale * product) + masks, sinks])`` over ``columns``."""

    product: Product
    columns: Leaves
    scale: float
    softcap: float | None
    masks: tuple[MaskOperand, ...]
    sinks: tuple[Sink, ...]


def walk_scores(softmax: Softmax, facts: Facts) -> ScorePath:
    """What stands between the product and the softmax.

    Raises:
        Unproven: naming the operator at which the proof ended.
    """
    node, reader = softmax.scores, softmax.reader
    if len(facts.scores[node]) > 1:
        raise Unproven(
            node,
            "the scores add up several products (relative or talking-heads attention)",
            "it stays as it is; no form covers a sum of products yet",
        )
    stages = Stages(facts.axes[node][softmax.dim], ends=largest(reader), limit=softmax.limit)
    stages.masks += softmax.masks
    stages.sinks += softmax.sinks
    while True:
        if facts.mutations.stale(node, reader):
            raise Unproven(node, "the scores are written through another view", "write the mask out of place")
        if node in facts.axes.products:
            break
        node, reader = step(node, stages, facts), node
    product = facts.axes.products[node]
    cap = stages.cap_outer
    # c * tanh(a * s) is the operator's softcap * tanh(scale * s / softcap) at scale a * c.
    scale = stages.factor * product.alpha * (1.0 if cap is None else cap)
    if product.addend is not None:
        uncapped(node, stages)
        stages.masks.append(MaskOperand(product.addend, node, "add", stages.factor * product.beta, ends=stages.holds))
    for operand in stages.masks:
        independent(operand.node, operand.on, node, facts.mutations)
    for sink in stages.sinks:
        if isinstance(sink.logit, Node):
            independent(sink.logit, sink.on, node, facts.mutations)
    return ScorePath(product, stages.columns, scale, cap, tuple(stages.masks), tuple(stages.sinks))


def independent(operand: Node, on: Node, product: Node, mutations: Mutations) -> None:
    """A mask or bias that is computed from the scores is none: it mixes them.

    Raises:
        Unproven: if ``operand`` is made of ``product``.
    """
    position = mutations.position
    start = position[product]
    queue, seen = [operand], {operand}
    while queue:
        node = queue.pop()
        if node is product:
            raise Unproven(operand, "a mask or bias is computed from the scores themselves", "it stays as it is")
        if position[node] < start or op_name(node) in _SHAPE_ONLY:
            continue
        sources = node.all_input_nodes[:1] if op_name(node) in _SHAPED_LIKE else node.all_input_nodes
        written = mutations.writes(node, node, on) if is_tensor(node) else []
        fresh = [source for source in (*sources, *written) if source not in seen]
        seen.update(fresh)
        queue += fresh
