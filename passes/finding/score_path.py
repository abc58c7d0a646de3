"""The walk from a softmax back to the one query-key product that it depends on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch.fx import Node

from dilcompile.passes.axes.atoms import Leaves
from dilcompile.passes.axes.labels import SHAPED_LIKE
from dilcompile.passes.axes.products import Product
from dilcompile.passes.finding.anchors import MaskOperand, Multiplier, Sink, Softmax
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.score_steps import Stages, largest, resolution, step, uncapped, unscaled
from dilcompile.passes.graph.mutations import Mutations
from dilcompile.passes.graph.operators import is_float, is_tensor, op_name
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.emptiness import Floor

# Their result depends on the shape of their tensor arguments, not on the values.
_SHAPE_ONLY = frozenset(
    "sym_size sym_numel zeros_like ones_like full_like empty_like rand_like randn_like "
    "new_zeros new_ones new_full new_empty".split()
)


@dataclass(frozen=True)
class ScorePath:
    """``softmax([softcap(scale * multipliers * product) + masks, sinks])`` over ``columns``.

    Args:
        shifted: a number that cancels was added to all scores of a row.
    """

    product: Product
    columns: Leaves
    scale: float
    softcap: float | None
    masks: tuple[MaskOperand, ...]
    sinks: tuple[Sink, ...]
    multipliers: tuple[Multiplier, ...]
    floor: Floor | None = None
    shifted: bool = False


def walk_scores(softmax: Softmax, product: Node, facts: Facts) -> ScorePath:
    """What stands between a product and the softmax.

    Args:
        product: one of the products that the scores are made of; what the others add is a bias.

    Raises:
        Unproven: naming the operator at which the proof ended.
    """
    node, reader = softmax.scores, softmax.reader
    stages = Stages(facts.axes[node][softmax.dim], product, math.log(softmax.base), limit=softmax.limit)
    stages.ends, stages.resolution = largest(reader), resolution(reader)
    stages.masks += softmax.masks
    stages.sinks += softmax.sinks
    while True:
        if facts.mutations.stale(node, reader):
            raise Unproven(node, "the scores are written through another view", "write the mask out of place")
        if node is product:
            break
        node, reader = step(node, stages, facts), node
    found, cap = facts.axes.products[product], stages.cap_outer
    of_floats(found)
    of_known_factors(found)
    unwritten(found, facts)
    # c * tanh(a * s) is the operator's softcap * tanh(scale * s / softcap) at scale a * c.
    scale = stages.factor * found.alpha * (1.0 if cap is None else cap)
    if found.addend is not None and not facts.is_zero(found.addend, node):
        uncapped(node, stages)
        unscaled(node, stages)
        stages.through(node)
        stages.masks.append(
            MaskOperand(found.addend, node, "add", stages.factor * found.beta, ends=stages.holds, digits=stages.resolution)
        )
    for operand in stages.masks:
        independent(operand.node, operand.on, node, facts.mutations)
    for one in stages.multipliers:
        independent(one.node, one.on, node, facts.mutations, "a scale")
    for sink in stages.sinks:
        if isinstance(sink.logit, Node):
            independent(sink.logit, sink.on, node, facts.mutations)
    return ScorePath(
        found,
        stages.columns,
        scale,
        cap,
        tuple(stages.masks),
        tuple(stages.sinks),
        tuple(stages.multipliers),
        stages.floor,
        stages.shifted,
    )


def of_floats(product: Product) -> None:
    """Raises: Unproven: if integers are multiplied, or a product is summed in integers."""
    if not all(map(is_float, (product.lhs, product.rhs, product.node))):
        raise Unproven(product.node, "integers are multiplied or summed", "cast them to floats before")


def of_known_factors(product: Product) -> None:
    """Raises: Unproven: if a product is scaled by a number that only the run knows."""
    if product.computed:
        reason = "the product is scaled by a number that is computed in the graph"
        raise Unproven(product.node, reason, "scale an operand instead")


def unwritten(product: Product, facts: Facts) -> None:
    """Raises: Unproven: if what a product is computed by is written in place before it is read."""
    for node in product.inner:
        if not set(product.inner).issuperset(facts.mutations.writes(node, node, product.node)):
            raise Unproven(node, "a part of the product is written through another view", "write it out of place")


def independent(operand: Node, on: Node, product: Node, mutations: Mutations, what: str = "a mask or bias") -> None:
    """What is computed from the scores is no mask, bias, scale or weight of them: it mixes them.

    Raises:
        Unproven: if ``operand`` is made of ``product``.
    """
    position = mutations.position
    start = position[product]
    queue, seen = [operand], {operand}
    while queue:
        node = queue.pop()
        if node is product:
            raise Unproven(operand, f"{what} is computed from the scores themselves", "it stays as it is")
        if position[node] < start or op_name(node) in _SHAPE_ONLY:
            continue
        sources = node.all_input_nodes[:1] if op_name(node) in SHAPED_LIKE else node.all_input_nodes
        written = mutations.writes(node, node, on) if is_tensor(node) else []
        fresh = [source for source in (*sources, *written) if source not in seen]
        seen.update(fresh)
        queue += fresh
