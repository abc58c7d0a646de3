"""Where a float64 attention rounds to fewer digits on its way from the queries and keys to the output."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch.fx import Node

from dilcompile.passes.finding.anchors import Softmax
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.score_path import ScorePath
from dilcompile.passes.finding.score_steps import keeps_all
from dilcompile.passes.graph.operators import CASTS, REORDERS, is_float, is_narrow, op_name
from dilcompile.site import Narrowed

# They choose, move or negate numbers, or make those of float64 float32: once rounded, a number stays what it is.
_ROUNDS_NOTHING = CASTS | REORDERS | frozenset("expand expand_as slice narrow masked_fill where nan_to_num neg".split())
# Beside the scores, not among them: they lift hidden scores alone (see ``score_steps``).
_LIFTS = frozenset("max maximum clamp clamp_min".split())
_ADDS = frozenset("add sub rsub".split())


def narrowing(node: Node, softmax: Softmax, path: ScorePath, output: Node, facts: Facts) -> Narrowed:
    """Where an attention whose operands are float64 rounds to fewer digits.

    ``softmax`` says that one plain softmax in float32, of scores that were float64 before it, is all, so that a kernel can
    repeat its digits. Biases are not looked at.

    Args:
        node: the anchor of the softmax.
        output: what the attention ends at.
    """
    way = _way((*path.product.inner, path.product.node), output, facts)
    narrow = [one for one in way if is_narrow(one)]
    if not narrow:
        return "no"
    plain = op_name(node) == "softmax" and node.meta["val"].dtype is torch.float32
    if not plain or path.sinks or path.shifted or softmax.masks or softmax.division is not None:
        return "scores"
    added = [mask.on for mask in path.masks if mask.kind == "add"]
    # Sums of probabilities are not one to the last digit: what divides by them changes all.
    between = _way((node,), softmax.probabilities, facts)
    steps = {*narrow, *between} - {node}
    if not all(_rounds_nothing(one, added) for one in steps) or not _once(node, way, facts):
        return "scores"
    return "softmax"


def _way(starts: Collection[Node], end: Node, facts: Facts) -> list[Node]:
    """All that is made of ``starts`` and that ``end`` is made of, both among them, in graph order."""
    position = facts.mutations.position
    least = min(position[one] for one in starts)
    queue, before = [end], {end}
    while queue:
        fresh = {one for one in queue.pop().all_input_nodes if position[one] >= least} - before
        before |= fresh
        queue += fresh
    found = dict.fromkeys(one for one in starts if one in before)
    for one in sorted(before, key=position.__getitem__):
        if any(source in found for source in one.all_input_nodes):
            found[one] = None
    return sorted(found, key=position.__getitem__)


def _rounds_nothing(node: Node, added: Collection[Node]) -> bool:
    held = node.meta["val"]
    if not isinstance(held, torch.Tensor):
        return False
    if not held.dtype.is_floating_point:
        return held.dtype is torch.bool
    if held.dtype not in (torch.float32, torch.float64):
        return False
    name = op_name(node)
    if name == "dropout":
        return keeps_all(node)
    # What hides adds 0 where it lets through; what is a bias is told apart once it is read.
    return name in _ROUNDS_NOTHING or name in _LIFTS or (name in _ADDS and node in added)


def _once(softmax: Node, way: list[Node], facts: Facts) -> bool:
    """Are the scores float32 from one cast on and until they are cast back, the softmax in between?"""
    position = facts.mutations.position
    on_way = set(way)
    for node in way:
        sources = [one for one in node.all_input_nodes if one in on_way and is_float(one)]
        if position[node] < position[softmax]:
            again = is_float(node) and not is_narrow(node) and any(map(is_narrow, sources))
        else:
            again = node is not softmax and is_narrow(node) and not all(map(is_narrow, sources))
        if again:
            return False
    return True
