"""How blocks are computed: what an engine is, the masks its ops get, and the engine of explicit matrix products.

All engines take the same blocks, so that a softcap, dropout, a bias or unequal head sizes cost what the relation's pairs cost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dilcompile.lowering.call import Call
from dilcompile.lowering.dropout import keep_factor
from dilcompile.lowering.view_path.masking import Places, as_bias, band, band_bias, keys_seen, places, uncounted
from dilcompile.lowering.view_path.row_masks import RowMasks
from dilcompile.lowering.view_path.strided import Block, Cut, Operand, cuts
from dilcompile.relation import Relation

_PAIRS_AT_ONCE = 1 << 21


@dataclass(frozen=True)
class Part:
    """A part of a call whose operands are narrowed to it: some batch rows, key heads and one document.

    Args:
        q, k, v, padding, bias: operands; ``padding`` bool [B, Sk], ``bias`` expanded to [B, H, Sq, Sk].
        relation: the whole call's terms over this part's lengths.
        first_batch, first_head, first_position: where the part begins in the call.
        row_masks: limits and formulas by row; None without.
    """

    call: Call
    q: Operand
    k: Operand
    v: Operand
    padding: Operand | None
    bias: Operand | None
    relation: Relation
    first_batch: int
    first_head: int
    first_position: int
    row_masks: RowMasks | None = None

    def places(self, block: Block) -> Places:
        """Coordinates of a block inside the relation."""
        device = self.call.q.device
        return places(block, self.relation, self.first_batch, self.first_head, device)


@dataclass(frozen=True)
class Result:
    """Output and LSE of a cut of a block."""

    cut: Cut
    out: Tensor
    lse: Tensor


def needs_math(call: Call, bias_is_mask: bool = False) -> str | None:
    """Why a flash op can't compute this call, or None.

    Args:
        bias_is_mask: the op adds a mask of floats, which a bias may be where its gradient is not asked for.
    """
    if call.softcap is not None:
        return "softcap"
    if call.dropout_p > 0:
        return "dropout by position"
    if call.flat:
        return "flat scores"
    if call.bias is not None and not bias_is_mask:
        return "a bias over all pairs"
    if call.problem.head_dim != call.problem.v_dim:
        return f"head sizes of q and v differ ({call.problem.head_dim} and {call.problem.v_dim})"
    return None


@dataclass(frozen=True)
class Masked:
    """A cut with the mask the flash op gets, whether it masks causally by itself, and which rows see any key (None: all)."""

    cut: Cut
    mask: Tensor | None
    causal: bool
    sees: Tensor | None


def _whole(block: Block) -> Cut:
    first, second = block.sizes
    return slice(0, first), slice(0, second), slice(0, block.piece.rows), slice(0, block.piece.keys)


def masked_cuts(part: Part, block: Block) -> Iterator[Masked]:
    piece, dtype, device = block.piece, part.call.score_dtype, part.call.q.device
    simple = part.row_masks is None and not piece.exclusive and (piece.is_full or piece.is_causal)
    added = None if part.bias is None else block.view(part.bias)
    by_key = part.bias is None or part.bias.row == 0
    if part.row_masks is None and not piece.exclusive and part.padding is None and added is None:
        shape = (piece.rows, piece.keys, piece.low, piece.high)
        yield Masked(_whole(block), None if simple else band_bias(shape, dtype, device), piece.is_causal, None)
    elif simple and by_key:
        yield _by_key(part, block, added)
    elif simple and piece.is_full and part.padding is None and added is not None:
        yield Masked(_whole(block), added.to(dtype), False, _narrow_heads(part, block, added).amax(-1) > -torch.inf)
    else:
        for cut, visible in _visible_cuts(part, block, shared=True):
            if visible is None:
                continue
            if added is None:
                yield Masked(cut, as_bias(visible, dtype), False, visible.any(-1))
                continue
            mask = added[cut].to(dtype).masked_fill(~visible, -torch.inf)
            yield Masked(cut, mask, False, mask.amax(-1) > -torch.inf)


def _by_key(part: Part, block: Block, added: Tensor | None) -> Masked:
    """One number a key, on top of a full or causal block: the op needs no more of the mask than that row."""
    piece, dtype = block.piece, part.call.score_dtype
    mask = None if part.padding is None else as_bias(block.view(part.padding), dtype)
    if added is not None:
        row = added[..., :1, :].to(dtype)
        mask = row if mask is None else row + mask
    assert mask is not None
    keep = mask > -torch.inf
    sees = keep.cumsum(-1)[..., 0, : piece.rows] > 0 if piece.is_causal else keep.any(-1)
    return Masked(_whole(block), mask, piece.is_causal, sees)


def _narrow_heads(part: Part, block: Block, added: Tensor) -> Tensor:
    """The bias without repeats over the second folded dim."""
    assert part.bias is not None
    repeated = all(part.bias.stride(axis) == 0 for axis in block.second)
    return added[:, :1] if repeated else added


def _visible_cuts(part: Part, block: Block, shared: bool = False) -> Iterator[tuple[Cut, Tensor | None]]:
    """Cuts of bounded size with the pairs that count, bool broadcastable to the cut; None: no pair at all.

    Args:
        shared: nothing is held by the pair but the mask, so a dim that it doesn't vary along costs nothing.
    """
    piece, device, masks = block.piece, part.call.q.device, part.row_masks
    where = part.places(block) if piece.exclusive else None
    keep = None if part.padding is None else block.view(part.padding)

    def keys_of(row: int, stop: int) -> tuple[int, int]:
        first, last = keys_seen(piece, row, stop)
        return (first, last) if masks is None else masks.narrowed(block, row, stop, first, last)

    moves = any(axis.batch or axis.position or (part.bias is not None and part.bias.stride(axis)) for axis in block.second)
    free = shared and masks is not None and not moves and where is None
    for cut in cuts(block, _PAIRS_AT_ONCE, keys_of, whole_second=free):
        first, second, _, keys = cut
        if keys.stop == keys.start:
            yield cut, None
            continue
        visible = band(piece, cut, device)[None, None]
        if where is not None:
            visible = visible & uncounted(part.relation, piece.term, where.cut(cut))
        if keep is not None:
            visible = visible & keep[first, second, :, keys]
        if masks is not None:
            visible = visible & masks.visible(block, cut)
        yield cut, visible[:, :1] if free else visible


@dataclass(frozen=True)
class Upstream:
    """What a block's backward starts from: the joint output and LSE, and their gradients."""

    out: Operand
    lse: Operand
    grad_out: Operand
    grad_lse: Operand | None


@dataclass(frozen=True)
class Downstream:
    """Gradients of a cut of a block; ``scores`` (for the bias) over [first, second, rows, keys]."""

    cut: Cut
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor | None = None


class Engine(Protocol):
    """Computes blocks, in cuts of bounded size."""

    takes_grad_lse: bool

    def forward(self, part: Part, block: Block) -> Iterator[Result]:
        """Output and LSE of the block's own keys."""

    def backward(self, part: Part, block: Block, upstream: Upstream) -> Iterator[Downstream]:
        """Gradients of the block's operands; given the joint output and LSE they are exact, without a merge term."""


def finite_for_backward(lse: Tensor) -> Tensor:
    """Rows without keys get +inf: exp(s - inf) is 0 where exp(s + inf) is not a number."""
    return lse.masked_fill(lse == -torch.inf, torch.inf)


@dataclass(frozen=True)
class _Scores:
    """A cut of a block in the score dtype; ``weight`` is exp(scores - shift) with 0 for pairs that don't count."""

    cut: Cut
    q: Tensor
    k: Tensor
    v: Tensor
    logits: Tensor
    slope: Tensor | None
    keep: Tensor | None


def _scores(part: Part, block: Block) -> Iterator[_Scores]:
    call, dtype = part.call, part.call.score_dtype
    q, k, v = block.view(part.q), block.view(part.k), block.view(part.v)
    bias = None if part.bias is None else block.view(part.bias)
    where = part.places(block) if call.dropout_p > 0 else None
    for cut, visible in _visible_cuts(part, block):
        if visible is None:
            continue
        first, second, rows, keys = cut
        q_cut, k_cut, v_cut = (x[first, second, span].to(dtype) for x, span in ((q, rows), (k, keys), (v, keys)))
        logits, slope = q_cut @ k_cut.mT * call.scale, None
        if call.softcap is not None:
            capped = torch.tanh(logits / call.softcap)
            logits, slope = capped * call.softcap, 1 - capped * capped
        if call.flat:
            logits = torch.zeros_like(logits)
        if bias is not None:
            logits = logits + bias[first, second, rows, keys].to(dtype)
        keep = None if where is None else _keep(part, where.cut(cut))
        yield _Scores(cut, q_cut, k_cut, v_cut, logits.masked_fill(~visible, -torch.inf), slope, keep)


def _keep(part: Part, where: Places) -> Tensor:
    call, base = part.call, part.first_position
    assert call.dropout_seed is not None, "dropout needs a seed"
    return keep_factor(call.dropout_seed, where.b, where.h, where.t + base, where.k + base, call.dropout_p, call.score_dtype)


class MathEngine:
    """Explicit products: everything, on any device."""

    takes_grad_lse = True

    def forward(self, part: Part, block: Block) -> Iterator[Result]:
        """See ``Engine``."""
        for scores in _scores(part, block):
            lse = scores.logits.logsumexp(-1)
            # Not exp(logits - lse): where a finite fill hides every key, float32 can't hold fill + log(number of keys).
            weights = scores.logits.softmax(-1).masked_fill_((lse == -torch.inf)[..., None], 0)
            if scores.keep is not None:
                weights = weights * scores.keep
            yield Result(scores.cut, weights @ scores.v, lse)

    def backward(self, part: Part, block: Block, upstream: Upstream) -> Iterator[Downstream]:
        """See ``Engine``."""
        dtype = part.call.score_dtype
        out, grad_out = block.view(upstream.out), block.view(upstream.grad_out)
        lse = finite_for_backward(block.view(upstream.lse))
        grad_lse = None if upstream.grad_lse is None else block.view(upstream.grad_lse)
        for scores in _scores(part, block):
            at = scores.cut[:3]
            d_out = grad_out[at].to(dtype)
            delta = (d_out * out[at]).sum(-1)
            if grad_lse is not None:
                delta = delta - grad_lse[at]
            weights = (scores.logits - lse[at][..., None]).exp_()
            d_weights = d_out @ scores.v.mT
            kept = weights
            if scores.keep is not None:
                d_weights, kept = d_weights * scores.keep, weights * scores.keep
            d_logits = weights * (d_weights - delta[..., None])
            d_scores = (d_logits if scores.slope is None else d_logits * scores.slope) * part.call.scale
            bias_grad = None if part.bias is None else d_logits
            yield Downstream(scores.cut, d_scores @ scores.k, d_scores.mT @ scores.q, kept.mT @ d_out, bias_grad)
