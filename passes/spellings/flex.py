"""``flex_attention``'s higher-order operator: ``mask_mod`` and ``score_mod`` are graphs of their own, read like any mask.

What counts is what the two functions say, as it does when the model runs uncompiled; the block tables only say where
nothing needs computing. A block mask whose function lets everything through is therefore refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node

from dilcompile.passes.anchors import Attention, Spelling
from dilcompile.passes.facts import Facts
from dilcompile.passes.masks.arithmetic import as_truth
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.symbols import B, H, K, Lengths, Q
from dilcompile.passes.masks.terms import Choice, Expr, Truth, conjunction, elements_of, negation
from dilcompile.passes.operators import CASTS, is_tensor, op_name, shape_of
from dilcompile.passes.spellings.arguments import first_output
from dilcompile.passes.unproven import Unproven

_STAYS = "it stays as it is"
# The block size of a call without a block mask.
_WHOLE = 1 << 30


def _read(node: Node, facts: Facts) -> Attention | None:
    q, k, v, score_mod, blocks, scale, _, score_buffers, mask_buffers = node.args
    output = first_output(node)
    if output is None:
        return None
    number = facts.scalar(scale, node)
    if number is None:
        raise Unproven(node, "the scale is computed in the graph", "give it as a number")
    assert isinstance(q, Node)
    assert isinstance(k, Node)
    assert isinstance(v, Node)
    batch, heads, rows, _ = shape_of(q)
    facts.reader.set_sizes(Lengths(batch, heads, rows, shape_of(k)[2]).bounds)
    mask = _Body(node, blocks[-1], (B, H, Q, K), mask_buffers, facts)  # type: ignore[index, arg-type]
    seen = mask.truth(mask.result)
    if seen is True and blocks[-2] != _WHOLE:  # type: ignore[index]
        raise Unproven(node, "the block mask's tables alone say what is hidden", "give the block mask its mask_mod")
    scores = _Body(node, score_mod, (None, B, H, Q, K), score_buffers, facts)  # type: ignore[arg-type]
    factor, softcap, kept = _modified(scores)
    return Attention(
        q, k, v, output, number * factor,
        seen=conjunction(seen, kept),
        softcap=softcap,
        enable_gqa=True,
    )  # fmt: skip


class _Body:
    """One of the two functions: a graph whose inputs are indices (None: the score) and buffers of the graph around it."""

    def __init__(self, call: Node, held: Node, indices: Sequence[Expr | None], buffers: Sequence[Any], facts: Facts) -> None:
        module = getattr(call.graph.owning_module, str(held.target))
        assert isinstance(module, GraphModule)
        self.call, self.facts = call, facts
        self.graph: Graph = module.graph
        inputs = list(self.graph.find_nodes(op="placeholder"))
        self.score = next((own for own, index in zip(inputs, indices, strict=False) if index is None), None)
        for own, index in zip(inputs, indices, strict=False):
            if index is not None:
                facts.reader.given[own] = index
        for own, buffer in zip(inputs[len(indices) :], buffers, strict=True):
            if not isinstance(buffer, Node) or (is_tensor(buffer) and facts.mutations.stale(buffer, call)):
                raise Unproven(call, "a buffer of mask_mod or score_mod is written in place", "write it out of place")
            facts.reader.outside[own] = buffer

    @property
    def result(self) -> Node:
        (output,) = self.graph.find_nodes(op="output")
        found = output.args[0]
        assert isinstance(found, Node)
        return found

    def truth(self, node: Node) -> Truth:
        """A boolean of the function over (b, h, q, k).

        Raises:
            Unproven: if it depends on something that has no formula.
        """
        found = Bounds(self.facts.reader.sizes).settle(as_truth(self.facts.reader.value(node, ())))
        for element in elements_of(found):
            source = self.facts.reader.elements[int(element.args[0])]
            if source.graph is self.graph:
                raise Unproven(self.call, f"mask_mod computes {op_name(source)}, which has no formula", _STAYS)
        return found


def _modified(body: _Body) -> tuple[float, float | None, Truth]:
    """``score_mod`` as (factor on the scores, soft cap, what it lets through).

    Raises:
        Unproven: if it does anything else (adds a bias ...).
    """
    factor: float = 1.0
    cap: float | None = None
    seen: Truth = True
    node: Any = body.result
    made_of_scores = _made_of(body)
    while node is not body.score:
        if not isinstance(node, Node) or node not in made_of_scores:
            raise Unproven(body.call, "score_mod does not depend on the score", _STAYS)
        name, sides = op_name(node), list(node.args[:2])
        if name in CASTS:
            node = sides[0]
        elif name in ("mul", "div"):
            path, other = sides if sides[0] in made_of_scores else reversed(sides)
            value = body.facts.scalar(other, node)
            if not value or other in made_of_scores or (name == "div" and path is not sides[0]):
                raise Unproven(body.call, "score_mod scales the scores by something computed", _STAYS)
            factor *= 1 / value if name == "div" else value
            node = path
        elif name == "tanh" and cap is None:
            cap, factor, node = factor, 1.0, sides[0]
        elif cap is not None:
            raise Unproven(body.call, f"score_mod computes {name} of the scores before its soft cap", "cap first")
        elif name == "where":
            node, kept = _chosen(node, body, made_of_scores, factor)
            seen = conjunction(seen, kept)
        elif name in ("add", "sub"):
            path, other = sides if sides[0] in made_of_scores else reversed(sides)
            if cap is not None or (path is not sides[0] and name == "sub") or other in made_of_scores:
                raise Unproven(body.call, "score_mod adds something before its soft cap", _STAYS)
            seen = conjunction(seen, _hiding(other, body))
            node = path
        else:
            raise Unproven(body.call, f"score_mod computes {name} of the scores", _STAYS)
    return factor * (1.0 if cap is None else cap), cap, seen


def _made_of(body: _Body) -> set[Any]:
    found: set[Any] = {body.score}
    for node in body.graph.nodes:
        if node.op == "call_function" and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _chosen(node: Node, body: _Body, made_of_scores: set[Any], factor: float) -> tuple[Any, Truth]:
    condition, then, other = node.args[:3]
    swap = other in made_of_scores
    path, fill = (other, then) if swap else (then, other)
    hidden = body.facts.scalar(fill, node)
    if condition in made_of_scores or hidden is None or hidden * factor != -math.inf:
        raise Unproven(body.call, "score_mod puts something else than -inf in place of scores", "use -inf, or a mask_mod")
    kept = body.truth(condition)  # type: ignore[arg-type]
    return path, negation(kept) if swap else kept


def _hiding(other: Any, body: _Body) -> Truth:
    """What an added number lets through, if it is 0 or -inf; a plain number cancels in the softmax."""
    if not isinstance(other, Node):
        return True
    value = body.facts.reader.number(other, ())
    if isinstance(value, Choice) and value.then == 0 and value.other == -math.inf:
        return value.when
    if isinstance(value, Choice) and value.other == 0 and value.then == -math.inf:
        return negation(value.when)
    if not isinstance(value, Choice) and value.is_number and value.is_finite:
        return True
    raise Unproven(body.call, "score_mod adds a bias", "no form takes the formula of a bias; it stays as it is")


FLEX = Spelling("flex", frozenset(("higher_order::flex_attention",)), _read, order="bhsd")
