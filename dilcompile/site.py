"""What the finder says about one attention: its axes, operands and mask, as values without graph nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch

Length = int | torch.SymInt
Kind = Literal["self", "cross"]
Phase = Literal["train", "prefill", "decode"]
BiasWord = Literal["alibi", "t5 buckets", "relative table", "tensor"]
Narrowed = Literal["no", "softmax", "scores"]
EmptyRows = Literal["zero", "uniform", "shifted", "others", "nan", "other"]


@dataclass(frozen=True)
class ByRow:
    """A factor that is known by vectors over the rows and over the keys.

    Args:
        word: ``chunk`` (rows and keys of one block), ``prefix`` (keys up to a bound, or causal beyond it), ``rows`` (any
            other run of keys a row), ``label`` (equal labels, which may come back), ``pairs`` (other comparisons of rows with
            keys), ``other`` (a part could not be read and stays a tensor).
        formula: over (b, q, k), for people.
    """

    word: str
    formula: str


@dataclass(frozen=True)
class MaskSpec:
    """Which pairs a mask lets through, as a conjunction of factors over (batch, query, key).

    Query row ``q`` stands at key position ``t = q + q_offset``.

    Args:
        causal: only keys ``k <= t``.
        left: only keys ``k >= t - left``; None for no limit.
        right: only keys ``k <= t + right``; None for no limit. ``right=0`` is called ``causal`` instead, as users do.
        q_offset: position of query row 0 on the key axis (0: top-left aligned; ``Sk - Sq``: bottom-right).
        key_padding: a factor ``keep[b, k]`` is known as an operand.
        runtime_offset: a number known when the model runs is added to ``q_offset`` (a cache of fixed size).
        documents: a factor ``document[b, t] == document[b, k]`` is known as an operand; documents do not come back.
        by_row: factors known by vectors over rows and keys.
        chunk: one of these is ``k // chunk == t // chunk``, chunks of so many positions; None if none is.
        unread: what could not be read, in words; the operand stays a tensor. None when everything was read.
        empty_rows: what the user's spelling gives for a row that may see no key: 0 (or no row can be without keys), the mean
            of all values (a finite fill; ``shifted``: one that was added, so the scores keep their gradient), ``others``: the
            result over other keys (several fills, or one so small that the scores show), NaN, or ``other``: something that
            no second mask describes.
    """

    causal: bool = False
    left: int | None = None
    right: int | None = None
    q_offset: Length = 0
    runtime_offset: bool = False
    key_padding: bool = False
    documents: bool = False
    by_row: tuple[ByRow, ...] = ()
    chunk: int | None = None
    unread: str | None = None
    empty_rows: EmptyRows = "zero"

    @property
    def words(self) -> tuple[str, ...]:
        """The factors by name: any of ``causal``, ``window``, ``document``, ``padding``, those of ``ByRow``, ``other``."""
        names = []
        if self.causal:
            names.append("causal")
        if self.left is not None or self.right is not None:
            names.append("window")
        if self.documents:
            names.append("document")
        for factor in self.by_row:
            if factor.word not in names:
                names.append(factor.word)
        if self.key_padding:
            names.append("padding")
        if self.unread is not None and "other" not in names:
            names.append("other")
        return tuple(names)

    def __str__(self) -> str:
        parts = []
        for word in self.words:
            if word == "window":
                left = "inf" if self.left is None else str(self.left)
                right = "inf" if self.right is None else str(self.right)
                parts.append(f"window({left}, {0 if self.causal else right})")
            elif word == "other":
                parts.append(f"other({self._unclear})")
            else:
                parts.append(word)
        return " & ".join(parts) or "none"

    @property
    def _unclear(self) -> str:
        formulas = [factor.formula for factor in self.by_row if factor.word == "other"]
        return " and ".join([*formulas, *([] if self.unread is None else [self.unread])])

    @property
    def formula(self) -> str:
        """The mask as a predicate over (b, q, k), for people."""
        offset = self.q_offset if isinstance(self.q_offset, int) else str(self.q_offset)
        t = "q" + ("" if offset == 0 else f" + {offset}") + (" + start" if self.runtime_offset else "")
        parts = []
        if self.causal:
            parts.append(f"k <= {t}")
        if self.left is not None:
            parts.append(f"k >= {t} - {self.left}")
        if self.right is not None:
            parts.append(f"k <= {t} + {self.right}")
        if self.documents:
            parts.append(f"document[b, {t}] == document[b, k]")
        parts.extend(factor.formula for factor in self.by_row)
        if self.key_padding:
            parts.append("keep[b, k]")
        if self.unread is not None:
            parts.append(self.unread)
        return " and ".join(parts) or "true"


@dataclass(frozen=True)
class BiasSpec:
    """One tensor that is added to the scores.

    Args:
        word: ``alibi`` (a slope of each head times the way to the key), ``t5 buckets`` (a learned number for each range of
            distances), ``relative table`` (one for each offset, along a line or over a grid), ``tensor`` (anything else).
        tensor: the name of its node.
        slopes: those of ``alibi``, one a head; empty if they are learned.
    """

    word: BiasWord
    tensor: str
    slopes: tuple[float, ...] = ()

    def __str__(self) -> str:
        shown = [f"{slope:.6g}" for slope in self.slopes]
        if len(shown) > 4:
            shown = [*shown[:2], "...", shown[-1]]
        return f"{self.word}({', '.join(shown)})" if shown else self.word


@dataclass(frozen=True)
class AttentionSite:
    """One attention in the user's model, as the finder proved it.

    Lengths may be symbolic (``torch.SymInt``). ``operands`` are the tensors of the graph that were proven to be queries, keys and
    values, in this order, each as its node's name and its shape: where the attention begins. ``multipliers`` is what
    queries, keys, values and output are multiplied with beside the scale. ``narrowed``: a float64 attention that computes its
    ``softmax`` in float32 and nothing else, as models do that name a dtype, or ``scores``: anything else, too.
    """

    index: int
    module: str
    source: str
    spelling: str
    kind: Kind
    batch: Length
    heads: int
    kv_heads: int
    q_len: Length
    k_len: Length
    head_dim: int
    v_dim: int
    dtype: torch.dtype
    softmax_dtype: torch.dtype
    device: torch.device
    scale: float
    mask: MaskSpec = field(default_factory=MaskSpec)
    softcap: float | None = None
    dropout_p: float = 0.0
    bias: tuple[BiasSpec, ...] = ()
    phase: Phase = "prefill"
    layer: int | None = None
    layer_type: str | None = None
    sinks: str | None = None
    multipliers: str | None = None
    operands: tuple[str, ...] = ()
    narrowed: Narrowed = "no"

    @property
    def group(self) -> int:
        """Query heads per key head (1: multi-head; ``heads``: multi-query)."""
        return self.heads // self.kv_heads

    def __str__(self) -> str:
        gqa = "" if self.group == 1 else f" kv_heads={self.kv_heads}"
        value = "" if self.v_dim == self.head_dim else f" v_dim={self.v_dim}"
        extra = "".join(
            f" {name}={held}"
            for name, held in (
                ("softcap", self.softcap),
                ("bias", " + ".join(map(str, self.bias)) or None),
                ("sinks", self.sinks),
                ("multipliers", self.multipliers),
                ("dropout", self.dropout_p or None),
            )
            if held is not None
        )
        default = math.isclose(self.scale, self.head_dim**-0.5, rel_tol=1e-6)
        scale = "" if default else f" scale={self.scale:.6g}"
        dtype = str(self.dtype).removeprefix("torch.")
        return (
            f"{self.module or '<top>'}: {self.kind} {self.spelling} B={self.batch} H={self.heads}{gqa} "
            f"Sq={self.q_len} Sk={self.k_len} D={self.head_dim}{value} {dtype} mask={self.mask}{scale}{extra}"
        )


@dataclass(frozen=True)
class Miss:
    """Something that looks like attention and was left alone.

    Args:
        module: path of the module that ran it.
        source: file and line in the user's code.
        node: name of the graph node at which the proof ended.
        reason: what could not be proven.
        cure: what the user can do about it, or why nothing needs doing.
    """

    module: str
    source: str
    node: str
    reason: str
    cure: str

    def __str__(self) -> str:
        return f"{self.module or '<top>'} ({self.source}): {self.node}: {self.reason}; {self.cure}"
