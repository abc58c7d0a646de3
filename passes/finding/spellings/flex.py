"""``flex_attention``'s higher-order operator: ``mask_mod`` and ``score_mod`` are graphs of their own, read like any mask.

What counts is what the two functions say, as it does when the model runs uncompiled; the block tables only say where
nothing needs computing. A block mask whose function lets everything through is therefore refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx import Graph, GraphModule, Node

from dilcompile.passes.finding.anchors import Attention, MaskOperand, Spelling
from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.pair_function import PairFunction
from dilcompile.passes.finding.spellings.arguments import first_output
from dilcompile.passes.graph.operators import CASTS, is_narrow, is_tensor, op_name, shape_of
from dilcompile.passes.graph.unproven import Unproven
from dilcompile.passes.masks.arithmetic import as_truth
from dilcompile.passes.masks.bounds import Bounds
from dilcompile.passes.masks.symbols import B, H, K, Lengths, Q
from dilcompile.passes.masks.terms import Choice, Expr, Truth, conjunction, elements_of, negation
from dilcompile.site import Length

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
    sizes = dict(zip((B, H, Q, K), (batch, heads, rows, shape_of(k)[2]), strict=True))
    mask = _Body(node, blocks[-1], (B, H, Q, K), mask_buffers, sizes, facts)  # type: ignore[index, arg-type]
    seen = mask.truth(mask.result)
    if seen is True and blocks[-2] != _WHOLE:  # type: ignore[index]
        raise Unproven(node, "the block mask's tables alone say what is hidden", "give the block mask its mask_mod")
    hides: tuple[MaskOperand, ...] = ()
    if seen is not True and mask.function.refusal(mask.result) is None:
        # What has no formula is a tensor for all pairs.
        hides, seen = (MaskOperand(mask.result, output, "keep", function=mask.function),), True
    scores = _Body(node, score_mod, (None, B, H, Q, K), score_buffers, sizes, facts)  # type: ignore[arg-type]
    modified = _modified(scores)
    return Attention(
        q, k, v, output, number * modified.factor,
        masks=(*hides, *(scores.added(other, factor, output) for other, factor in modified.added)),
        seen=conjunction(seen, modified.seen),
        softcap=modified.softcap,
        enable_gqa=True,
        narrowed="scores" if any(map(is_narrow, _made_of(scores))) else "no",
    )  # fmt: skip


@dataclass
class _Modified:
    """What ``score_mod`` makes of the scores.

    Args:
        factor, softcap: on the scores.
        seen: what it lets through.
        added: biases, each with the factor on it.
    """

    factor: float = 1.0
    softcap: float | None = None
    seen: Truth = True
    added: list[tuple[Node, float]] = field(default_factory=list)


class _Body:
    """One of the two functions: a graph whose inputs are indices (None: the score) and buffers of the graph around it."""

    def __init__(
        self,
        call: Node,
        held: Node,
        indices: Sequence[Expr | None],
        buffers: Sequence[Any],
        sizes: Mapping[Expr, Length],
        facts: Facts,
    ) -> None:
        module = getattr(call.graph.owning_module, str(held.target))
        assert isinstance(module, GraphModule)
        self.call, self.facts = call, facts
        self.graph: Graph = module.graph
        inputs = list(self.graph.find_nodes(op="placeholder"))
        self.score = next((own for own, index in zip(inputs, indices, strict=False) if index is None), None)
        given = [(own, index) for own, index in zip(inputs, indices, strict=False) if index is not None]
        facts.reader.given.update(given)
        output = first_output(call) or call
        for own, buffer in zip(inputs[len(indices) :], buffers, strict=True):
            if not isinstance(buffer, Node) or (is_tensor(buffer) and facts.mutations.writes(buffer, buffer, output)):
                raise Unproven(call, "a buffer of mask_mod or score_mod is written in place", "write it out of place")
            facts.reader.outside[own] = buffer
        # Scores are computed in float32 at least.
        dtype = torch.promote_types(call.args[0].meta["val"].dtype, torch.float32)  # type: ignore[union-attr]
        outer = tuple((own, facts.reader.outside[own]) for own in inputs[len(indices) :])
        self.function = PairFunction(tuple((own, sizes[index]) for own, index in given), outer, dtype)

    @property
    def result(self) -> Node:
        (output,) = self.graph.find_nodes(op="output")
        found = output.args[0]
        assert isinstance(found, Node)
        return found

    def added(self, node: Node, factor: float, output: Node) -> MaskOperand:
        """A value of the function that is added to the scores.

        Raises:
            Unproven: if it can't be computed for all pairs.
        """
        reason = self.function.refusal(node)
        if reason is not None:
            raise Unproven(self.call, f"score_mod adds a bias, and {reason}", _STAYS)
        return MaskOperand(node, output, "add", factor, function=self.function)

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


def _modified(body: _Body) -> _Modified:
    """``score_mod``, read from its result back to the score.

    Raises:
        Unproven: if it does anything else than scale, cap, hide and add.
    """
    found = _Modified()
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
            found.factor *= 1 / value if name == "div" else value
            node = path
        elif name == "tanh" and found.softcap is None:
            found.softcap, found.factor, node = found.factor, 1.0, sides[0]
        elif found.softcap is not None:
            raise Unproven(body.call, f"score_mod computes {name} of the scores before its soft cap", "cap first")
        elif name == "where":
            node, kept = _chosen(node, body, made_of_scores, found.factor)
            found.seen = conjunction(found.seen, kept)
        elif name in ("add", "sub"):
            path, other = sides if sides[0] in made_of_scores else reversed(sides)
            if (path is not sides[0] and name == "sub") or other in made_of_scores or node.kwargs.get("alpha", 1) != 1:
                raise Unproven(body.call, f"score_mod computes {name} of the scores twice", _STAYS)
            if isinstance(other, Node):  # a plain number cancels in the softmax
                _add(other, -found.factor if name == "sub" else found.factor, body, found)
            node = path
        else:
            raise Unproven(body.call, f"score_mod computes {name} of the scores", _STAYS)
    found.factor *= 1.0 if found.softcap is None else found.softcap
    return found


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


def _add(other: Node, factor: float, body: _Body, found: _Modified) -> None:
    """Note what is added to the scores: 0 or -inf hides, anything else is a bias."""
    reader = body.facts.reader
    value = reader.number(other, ())
    if isinstance(value, Choice) and factor > 0 and {value.then, value.other} == {sympy.Integer(0), -sympy.oo}:
        kept = value.when if value.then == 0 else negation(value.when)
        if not any(reader.is_inner(element) for element in elements_of(kept)):
            found.seen = conjunction(found.seen, Bounds(reader.sizes).settle(kept))
            return
    found.added.append((other, factor))


FLEX = Spelling("flex", frozenset(("higher_order::flex_attention",)), _read, order="bhsd")
