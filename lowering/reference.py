"""The oracle: an explicit softmax with multiplicities, one chunk of query rows at a time. Slow, complete, any dtype."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dilcompile.lowering.call import Call, Gradients, lse_of, output_of
from dilcompile.lowering.dropout import keep_factor
from dilcompile.lowering.selection import Selection, adaptive_blocks
from dilcompile.progression import Progression
from dilcompile.relation import Relation, grid_of

TAKES_ROW_MASKS = True
LEAST_ROWS = 0  # it is the one that takes every call
_SCORES_AT_ONCE = 1 << 22


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``."""
    return None


def supports(call: Call, backward: bool) -> str | None:
    """Everything is supported."""
    return None


@dataclass(frozen=True)
class _Chunk:
    """Rows ``rows`` of batch row ``b``; tensors over [H, R, K] unless said."""

    b: int
    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    scores: Tensor
    slope: Tensor | None
    counts: tuple[Tensor, ...]
    keep: Tensor | None


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    call = call if call.pages is None else _gathered(call, call.pages)
    problem = call.problem
    out, lse = output_of(call, 0, call.q, problem.v_dim), lse_of(call)
    for chunk in _chunks(call):
        weights, chunk_lse = _softmax(chunk.scores, sum(chunk.counts[1:], chunk.counts[0]), call.narrow)
        weights = weights if chunk.keep is None else weights * chunk.keep
        out[chunk.b, :, chunk.rows] = (weights @ chunk.v).to(out.dtype)
        lse[chunk.b, :, chunk.rows] = chunk_lse
    return out, lse


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``; ``out`` and ``lse`` are computed again, in full precision, unless q and k are a part of their sequence."""
    grads = [torch.zeros(x.shape, dtype=call.score_dtype, device=x.device) for x in (call.q, call.k, call.v)]
    bias = call.bias
    grad_bias = None if bias is None else torch.zeros(bias.shape, dtype=call.score_dtype, device=bias.device)
    for chunk in _chunks(call):
        d_out = grad_out[chunk.b, :, chunk.rows].to(call.score_dtype)
        d_lse = None if grad_lse is None else grad_lse[chunk.b, :, chunk.rows].to(call.score_dtype)
        if call.held is None:
            d_value, d_scores = _score_gradient(call, chunk, d_out, d_lse)
        else:
            whole = (x[chunk.b, :, chunk.rows].to(call.score_dtype) for x in (out, lse))
            d_value, d_scores = _part_gradient(chunk, d_out, d_lse, *whole)
        if grad_bias is not None:
            _add_broadcast(grad_bias, chunk, d_scores)
        d_scores = (d_scores if chunk.slope is None else d_scores * chunk.slope) * call.scale
        grads[0][chunk.b, :, chunk.rows] = d_scores @ chunk.k
        grads[1][chunk.b] += _per_key_head(d_scores.mT @ chunk.q, call.problem.kv_heads)
        grads[2][chunk.b] += _per_key_head(d_value, call.problem.kv_heads)
    # Parts are added up before they are rounded.
    d_q, d_k, d_v = (grad.to(call.out_dtype) for grad in grads)
    return d_q, d_k, d_v, None if grad_bias is None or bias is None else grad_bias.to(bias.dtype)


def _gathered(call: Call, pages: Tensor) -> Call:
    """The call with its keys and values in one piece."""
    count, page_size, _ = (call.k.shape[dim] for dim in (0, 2, 3))
    needed = pages[:, : -(-call.problem.k_len // page_size)].long().clamp(0, count - 1)
    k, v = (x[needed].transpose(1, 2).flatten(2, 3)[:, :, : call.problem.k_len] for x in (call.k, call.v))
    return replace(call, k=k, v=v, pages=None)


def _chunks(call: Call) -> Iterator[_Chunk]:
    problem = call.problem
    step = max(1, _SCORES_AT_ONCE // max(1, problem.heads * problem.k_len))
    for b in range(problem.batch):
        k, v = (x[b].to(call.score_dtype).repeat_interleave(problem.group, dim=0) for x in (call.k, call.v))
        for start in range(0, problem.q_len, step):
            yield _chunk(call, b, slice(start, min(problem.q_len, start + step)), k, v)


def _chunk(call: Call, b: int, rows: slice, k: Tensor, v: Tensor) -> _Chunk:
    problem, device = call.problem, call.q.device
    h = torch.arange(problem.heads, device=device)[:, None, None]
    t, keys = _positions(call, rows)
    q = call.q[b, :, rows].to(call.score_dtype)
    scores, slope = q @ k.mT * call.scale, None
    if call.softcap is not None:
        capped = torch.tanh(scores / call.softcap)
        scores, slope = capped * call.softcap, 1 - capped * capped
    if call.flat:
        scores = torch.zeros_like(scores)
    if call.bias is not None:
        scores = scores + _bias_rows(call.bias, b, rows)
    keep = None
    if call.dropout_p > 0 and call.dropout_seed is not None:
        where = torch.tensor(b, device=device)
        first = 0 if call.held is None else call.held.first_head
        keep = keep_factor(call.dropout_seed, where, h + first, t, keys, call.dropout_p, call.score_dtype)
    visible = _by_row(call, b, rows, keys)
    if call.selection is not None:
        visible = visible & _selected(call, call.selection, b, t, keys)
    return _Chunk(b, rows, q, k, v, scores, slope, _counts(call, b, h, t, keys, visible), keep)


def _positions(call: Call, rows: slice) -> tuple[Tensor, Tensor]:
    """Those of the query rows [R, 1] and of the keys [K]."""
    problem = call.problem
    first = Progression(problem.q_offset, problem.q_offset + problem.q_len)
    queries, keys = (first, Progression(0, problem.k_len)) if call.held is None else (call.held.queries, call.held.keys)
    t, k = (torch.arange(part.start, part.stop, part.step, device=call.q.device) for part in (queries.positions()[rows], keys))
    return t[:, None], k


def _selected(call: Call, selection: Selection, b: int, t: Tensor, k: Tensor) -> Tensor:
    """The pairs [H or 1, R, K] in the selected blocks."""
    blocks = adaptive_blocks(call.relation)
    assert blocks is not None, "a selection is made for blocks"
    return selection.contains(b, t, k, grid_of(call.problem, blocks.grid.q_block, blocks.grid.k_block))


def _by_row(call: Call, b: int, rows: slice, k: Tensor) -> Tensor:
    """The pairs [R, K] that the row limits and the formula over pairs let through."""
    visible = torch.ones(rows.stop - rows.start, len(k), dtype=torch.bool, device=k.device)
    if call.row_limits is not None:
        first, stop = call.row_limits[:, b if call.row_limits.shape[1] > 1 else 0, rows, None]
        visible &= (k >= first) & (k < stop)
    if call.pairs is not None:
        by_row, by_key = (x[:, b if x.shape[1] > 1 else 0] for x in (call.pairs.rows, call.pairs.keys))
        visible &= call.pairs.visible(lambda number: by_row[number, rows, None] + by_key[number, k])
    return visible


def _counts(call: Call, b: int, h: Tensor, t: Tensor, k: Tensor, by_row: Tensor) -> tuple[Tensor, ...]:
    """The multiplicities, one tensor for all terms, or one a term where each has its own gradient."""
    visible = by_row
    if call.key_padding is not None:
        visible &= call.key_padding[b, k]
    if call.documents is not None:
        document = call.documents[b if call.documents.shape[0] > 1 else 0]
        visible &= document[t] == document[k]
        # Positions count from the start of each document.
        first = _starts(document)
        t, k = t - first[t], k - first[k]
    if call.merge_grad == "exact":
        return ((call.relation.multiplicity(h, t, k) * visible).to(call.score_dtype),)
    parts = []
    for count in range(1, len(call.relation.terms) + 1):
        upto = Relation(call.problem, call.relation.terms[:count]).multiplicity(h, t, k) * visible
        parts.append(upto.to(call.score_dtype))
    return tuple(part - before for part, before in zip(parts, [torch.zeros_like(parts[0]), *parts], strict=False))


def _starts(document: Tensor) -> Tensor:
    """For each position the first position of its run."""
    position = torch.arange(len(document), device=document.device)
    opens = torch.ones_like(document, dtype=torch.bool)
    opens[1:] = document[1:] != document[:-1]
    return torch.where(opens, position, 0).cummax(0).values


def _softmax(scores: Tensor, count: Tensor, narrow: bool) -> tuple[Tensor, Tensor]:
    """Weights [H, R, K] and LSE [H, R]; rows without keys give 0 and -inf."""
    logits = torch.where(count > 0, scores + count.log(), -torch.inf)
    lse = logits.logsumexp(dim=-1)
    weights = logits.float().softmax(dim=-1).to(logits.dtype) if narrow else logits.softmax(dim=-1)
    return weights.masked_fill((lse == -torch.inf)[..., None], 0), lse


def _score_gradient(call: Call, chunk: _Chunk, d_out: Tensor, d_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """Gradients of the values [H, K, Dv] and of the scores [H, R, K]."""
    total = sum(chunk.counts[1:], chunk.counts[0])
    weights, lse = _softmax(chunk.scores, total, call.narrow)
    d_weights = d_out @ chunk.v.mT
    kept = weights if chunk.keep is None else weights * chunk.keep
    if chunk.keep is not None:
        d_weights = d_weights * chunk.keep
    d_value = kept.mT @ d_out
    d_scores = torch.zeros_like(weights)
    for count in chunk.counts:
        part, part_lse = _softmax(chunk.scores, count, call.narrow)
        share = (part_lse - torch.where(lse == -torch.inf, 0, lse)).exp()[..., None]
        d_scores += share * _softmax_gradient(part, d_weights, call.narrow)
    if d_lse is not None:
        d_scores += weights * d_lse[..., None]
    return d_value, d_scores


def _part_gradient(chunk: _Chunk, d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """As ``_score_gradient`` for some of the keys of a row, whose out [H, R, Dv] and LSE [H, R] over all keys are given."""
    count = sum(chunk.counts[1:], chunk.counts[0])
    seen = (count > 0) & (lse > -torch.inf)[..., None]
    weights = torch.where(seen, (chunk.scores + count.log() - lse[..., None]).exp(), 0)
    d_weights, kept = d_out @ chunk.v.mT, weights
    if chunk.keep is not None:
        d_weights, kept = d_weights * chunk.keep, weights * chunk.keep
    d_scores = weights * (d_weights - (d_out * out).sum(-1, keepdim=True))
    if d_lse is not None:
        d_scores += weights * d_lse[..., None]
    return kept.mT @ d_out, d_scores


def _softmax_gradient(weights: Tensor, d_weights: Tensor, narrow: bool) -> Tensor:
    """Gradient of the scores from that of the weights."""
    if narrow:
        single = torch.float32
        found = torch._softmax_backward_data(d_weights.to(single), weights.to(single), -1, single)
        return found.to(weights.dtype)
    return weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True))


def _bias_rows(bias: Tensor, b: int, rows: slice) -> Tensor:
    """The rows of the bias of batch row ``b``, broadcastable to [H, R, K]."""
    bias = bias[(None,) * (4 - bias.dim())]
    bias = bias[b if bias.shape[0] > 1 else 0]
    return bias[:, rows] if bias.shape[1] > 1 else bias


def _add_broadcast(grad: Tensor, chunk: _Chunk, d_scores: Tensor) -> None:
    """Add [H, R, K] into the gradient of a bias, summing over the dims that the bias broadcasts."""
    place = _bias_rows(grad, chunk.b, chunk.rows)
    place += d_scores.sum_to_size(place.shape)


def _per_key_head(grad: Tensor, kv_heads: int) -> Tensor:
    """Sum [H, K, D] over the query heads of each key head."""
    return grad.reshape(kv_heads, grad.shape[0] // kv_heads, *grad.shape[1:]).sum(1)
