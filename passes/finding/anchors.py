"""What a spelling rule hands to the finder: a softmax over scores, or a whole attention in one call."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch.fx import Node

from dilcompile.passes.finding.facts import Facts
from dilcompile.passes.finding.pair_function import PairFunction
from dilcompile.passes.masks.terms import Truth
from dilcompile.site import BiasSpec, Narrowed

EmptyRule = Literal["plain", "zero", "cleared", "odd"]


@dataclass(frozen=True)
class MaskOperand:
    """One mask or bias on the way: added, or hiding where true or where false.

    Args:
        node: the mask.
        on: the score tensor it meets, whose dims it broadcasts against.
        kind: ``add``, ``hide`` (where true), ``keep`` (where true) or ``gate`` (multiplied with); once read, also ``below``
            (hiding where a large negative number is added) and ``drown`` (a float mask that is data: it may swallow the scores).
        factor: what the added tensor is multiplied with before it reaches the softmax.
        fill: what hidden scores are when they reach the softmax.
        ends: the largest number that the casts after it let through; larger ones become infinite.
        digits: the coarsest relative resolution of what comes after it.
        spec: what kind of bias it is, once read.
        function: what the mask is a value of, where it is a number for one pair and not a tensor of the graph.
        binary: it holds integers that are taken to be 0 and 1.
    """

    node: Node
    on: Node
    kind: str
    factor: float = 1.0
    fill: float = -math.inf
    ends: float = math.inf
    digits: float = 0.0
    spec: BiasSpec | None = None
    function: PairFunction | None = None
    binary: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """That of the scores it meets."""
        held: torch.dtype = self.on.meta["val"].dtype
        return held if self.function is None else self.function.dtype


@dataclass(frozen=True)
class Sink:
    """Logits that take part in the softmax and are dropped after it: ``logsumexp`` of them joins every row's sum.

    Args:
        logit: a number, or the tensor of them.
        on: the tensor it is concatenated to; its last dim but for the column's broadcasts against it.
        dim: the dim of the columns.
        factor: what the tensor is multiplied with before it reaches the softmax.
    """

    logit: float | Node
    on: Node
    dim: int
    factor: float = 1.0

    def __str__(self) -> str:
        return self.logit.name if isinstance(self.logit, Node) else f"{self.logit:g}"


@dataclass(frozen=True)
class Multiplier:
    """What scores are multiplied with, element by element, where it is data.

    Args:
        node: the tensor.
        on: the result, whose dims it broadcasts against.
        inverse: they are divided by it.
        by_key: it varies over the keys.
    """

    node: Node
    on: Node
    inverse: bool = False
    by_key: bool = False

    def __str__(self) -> str:
        return f"1 / {self.node.name}" if self.inverse else self.node.name


@dataclass(frozen=True)
class Division:
    """Where weights are divided by their own sum once they have met the values.

    Args:
        at: the node that divides.
        by: what it divides by: the sum of each row, and what was added to it.
        total: the node that sums the weights.
    """

    at: Node
    by: Node
    total: Node


@dataclass(frozen=True)
class Softmax:
    """A softmax, however it is written.

    Args:
        scores: what it is taken of.
        reader: the node that reads the scores.
        dim: the dim it runs over.
        probabilities: the node that holds its result.
        dtype: what it computes in.
        limit: a score of minus this weighs exactly nothing, whatever the others are (no maximum is taken off); inf: there is
            no such number.
        empty: what a row that sees nothing becomes: ``plain`` as softmax has it (NaN, or the mean of what was hidden by a
            number), ``zero`` where softmax has NaN, ``cleared`` likewise but for NaN in gradients, ``odd`` where that number is
            lost in rounding.
        masks: what hides exponentials.
        sinks: what else is in the sum.
        base: of the exponentials.
        division: where the probabilities are weights that sum up to one only once the values are summed.
    """

    scores: Node
    reader: Node
    dim: int
    probabilities: Node
    dtype: torch.dtype
    limit: float = math.inf
    empty: EmptyRule = "plain"
    masks: tuple[MaskOperand, ...] = ()
    sinks: tuple[Sink, ...] = ()
    base: float = math.e
    division: Division | None = None


@dataclass(frozen=True)
class Attention:
    """A whole attention in one call.

    Args:
        q, k, v: the operands.
        order: the meaning of the dims (see ``dim_order``).
        output: the node that holds the result, in the same order.
        scale: factor on q . k.
        masks: boolean (true is seen) or added.
        seen: the pairs that the call itself lets through, in the symbols of ``masks.symbols``.
        softcap: c in ``c * tanh(s / c)`` on the scaled scores.
        enable_gqa: query head h reads key head ``h // group``.
        empty: see ``Softmax``.
        documents: where packed sequences start and end (``[0, ..., total]``); only tokens of one sequence see each other.
        narrowed: see ``AttentionSite``, were the operands float64.
    """

    q: Node
    k: Node
    v: Node
    output: Node
    scale: float
    order: str = "bhsd"
    masks: tuple[MaskOperand, ...] = ()
    seen: Truth = True
    softcap: float | None = None
    dropout_p: float = 0.0
    enable_gqa: bool = False
    empty: EmptyRule = "zero"
    documents: Node | None = None
    narrowed: Narrowed = "no"


@dataclass(frozen=True)
class Spelling:
    """One way in which attention, or the softmax of one, is written.

    Args:
        name: what reports call it.
        anchors: the operators it is looked for at, with their namespace.
        read: what stands there; None if it is something else.
        order: the order of dims, for operators that compute a whole attention.
    """

    name: str
    anchors: frozenset[str]
    read: Callable[[Node, Facts], Softmax | Attention | None]
    order: str | None = None
