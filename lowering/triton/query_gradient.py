"""The gradient of queries: scores are computed again, and the joint log-sum-exp makes it exact.

Each program owns the rows that it writes, so nothing is added atomically and nothing depends on timing.
"""

import triton
import triton.language as tl

from dilcompile.lowering.triton.listed import step_of, steps_of
from dilcompile.lowering.triton.scores import (
    bias_of_tile,
    described,
    dropped,
    facts_of_queries,
    load_rows,
    row_state,
    scores_of_keys,
    tile_of_queries,
    unfolded,
)
from dilcompile.lowering.triton.softmax import load_lse, weights_of
from dilcompile.lowering.triton.walk import FAR, VARYING, part_of_keys, part_of_queries, reach_of_all, row_of, span_of, turns


@triton.jit
def descend(
    sums, q, grad, lse, rest, delta, K, V, k_row, v_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key, SEED, state,
    least_drawn, kept_factor, blocks, full_from, full_to, start, high, rate, LINE, origin,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr,
    COUNTED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, KEYS=None, VALUES=None,
    PART=None, key_row=0, row_rate=0,
):  # fmt: skip
    """Some blocks of keys added to the gradient of a tile of queries."""
    begin, end = turns(blocks, full_from, full_to, MASKED)
    for n in range(begin, end):
        s, slope, k, keys, values = scores_of_keys(
            n, q, K, V, k_row, v_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
            t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key,
            full_from, full_to, start, high, rate, LINE, origin,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCKS, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, MASKED, PRECISION,
            sums.dtype, KEYS=KEYS, VALUES=VALUES, PART=PART, key_row=key_row, row_rate=row_rate,
        )  # fmt: skip
        weights = weights_of(s, lse[:, None], rest[:, None], BIAS is not None)
        d_weights = tl.dot(grad, tl.trans(values.to(q.dtype)), input_precision=PRECISION, out_dtype=sums.dtype)
        if SEED is not None:
            d_weights = dropped(d_weights * kept_factor, state[:, None], k[None, :], least_drawn)
        d_scores = weights * (d_weights - delta[:, None])
        if CAPPED:
            d_scores *= slope
        d_scores = d_scores.to(K.dtype.element_ty).to(q.dtype)
        sums = tl.dot(d_scores, keys, sums, input_precision=PRECISION, out_dtype=sums.dtype)
    return sums


@triton.jit(do_not_specialize=VARYING)
def gradient_of_queries(
    Q, K, V, GRAD_OUT, LSE, REST, DELTA, GRAD_Q, TERMS, RESIDUES, LINES, ENTRIES, TILES, PATTERNS,
    STARTS, ENDS, LIMITS, PADDING, BIAS, SEED, PART,
    q_batch: tl.int64, q_head, q_row, k_batch: tl.int64, k_head, k_row,
    v_batch: tl.int64, v_head, v_row, out_batch: tl.int64, out_head, out_row,
    grad_batch: tl.int64, grad_head, grad_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row, bias_key,
    q_len, k_len, q_offset, num_terms, num_tiles, kv_heads, first_line, line_head,
    scale, softcap, least_drawn, kept_factor, grad_scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, COUNTED: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
    FOLD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries, as in the forward; ``out_*`` are the strides of GRAD_OUT."""
    q_batch, q_head, q_row = unfolded(q_batch, q_head, q_row, FOLD)
    k_batch, k_head, k_row = unfolded(k_batch, k_head, k_row, FOLD)
    v_batch, v_head, v_row = unfolded(v_batch, v_head, v_row, FOLD)
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
    grad_batch, grad_head, grad_row = unfolded(grad_batch, grad_head, grad_row, FOLD)
    kv_head, batch, first_head, last_head, first, last, position, h, there, line = tile_of_queries(
        tl.program_id(0), TILES, PATTERNS, num_tiles, q_offset, q_len, GROUP, PACK, BLOCK_M, Q_BLOCK, PART
    )
    if first == FAR:
        return
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    K += batch * k_batch + kv_head.to(tl.int64) * k_head
    V += batch * v_batch + kv_head.to(tl.int64) * v_head
    if STARTS is not None:
        STARTS, ENDS = STARTS + batch * document_batch, ENDS + batch * document_batch
    if LINES is not None:
        LINES += first_head.to(tl.int64) * line_head
    if LIMITS is not None:
        LIMITS += batch * limit_batch
    if PADDING is not None:
        PADDING += batch * padding_batch
    if BIAS is not None:
        BIAS += batch * bias_batch + first_head.to(tl.int64) * bias_head
    _, q_step = part_of_queries(PART, q_offset, q_len)
    k_begin, k_end, k_step = part_of_keys(PART, k_len)
    number = row_of(position, q_offset, PART, q_step)
    row, head = number.to(tl.int64), h.to(tl.int64)
    q = load_rows(Q + batch * q_batch, row * q_row + head * q_head, there, dims, HEAD_DIM, BLOCK_D, True).to(PRODUCTS)
    grad_at = row * out_row + head * out_head
    grad = load_rows(GRAD_OUT + batch * out_batch, grad_at, there, v_dims, V_DIM, BLOCK_DV, True).to(PRODUCTS)
    place = (batch * kv_heads * GROUP + head) * q_len + row
    lse, rest = load_lse(LSE, REST, place, there)
    delta = tl.load(DELTA + place, mask=there, other=0.0)
    t, document, limit_low, limit_high = facts_of_queries(position, number, there, STARTS, LIMITS, limit_stride, k_len)
    bias = bias_of_tile(BIAS, row * bias_row + (head - first_head) * bias_head, there, BIAS_BY, "rows", SCORES)
    sums = tl.zeros([BLOCK_M, BLOCK_D], SCORES)
    state = position
    if SEED is not None:
        state = row_state(SEED, batch, h, position, PART)
    if COUNTED:
        low, high = reach_of_all(
            TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, first_head, last_head, first, last, k_begin, k_end,
            k_len, False,
        )  # fmt: skip
        low, blocks = span_of(low, high, k_begin, PART, k_step, BLOCK_N)
        sums = descend(
            sums, q, grad, lse, rest, delta, K, V, k_row, v_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, 0, kv_head, kv_heads,
            t, document, h, limit_low, limit_high, t, t, scale, softcap, BIAS, bias, bias_key, SEED, state, least_drawn,
            kept_factor, blocks, 0, 0, low, high, k_step, TERMS, 0,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, 0, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, True, PRECISION,
            PART=PART, key_row=row_of(low, k_begin, PART, k_step), row_rate=1,
        )  # fmt: skip
    else:
        # Runs of documents have nothing without a mask.
        FIRST: tl.constexpr = 1 if STARTS is not None else 0
        steps, at = steps_of(STARTS, ENDS, num_terms, first, last, k_len, DEDUPE, Q_BLOCK)
        for step in range(steps):
            term, LINE, origin, start, high, rate, blocks, full_from, full_to, row_low, row_high, at = step_of(
                step, at, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line - first_line, kv_head, kv_heads,
                first_head, last_head, first, last, k_begin, k_end, k_len, position,
                False, DEDUPE, Q_BLOCK, K_BLOCK, BLOCK_N, PART,
            )  # fmt: skip
            key_row, row_rate = row_of(start, k_begin, PART, k_step), row_of(rate, 0, PART, k_step)
            KEYS, VALUES = None, None
            if DESCRIBED:
                KEYS = described(K, k_row, start, rate, k_len, HEAD_DIM, BLOCK_D, BLOCK_N)
                VALUES = described(V, v_row, start, rate, k_len, V_DIM, BLOCK_DV, BLOCK_N)
            for masks in tl.static_range(FIRST, 2):
                sums = descend(
                    sums, q, grad, lse, rest, delta, K, V, k_row, v_row, dims, v_dims,
                    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
                    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key,
                    SEED, state, least_drawn, kept_factor, blocks, full_from, full_to, start, high, rate, LINE, origin,
                    HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, K_BLOCK, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, masks == 1,
                    PRECISION, KEYS=KEYS, VALUES=VALUES, PART=PART, key_row=key_row, row_rate=row_rate,
                )  # fmt: skip
    pointers = GRAD_Q + batch * grad_batch + (row * grad_row + head * grad_head)[:, None] + dims[None, :]
    tl.store(pointers, (sums * grad_scale).to(GRAD_Q.dtype.element_ty), mask=there[:, None] & (dims < HEAD_DIM)[None, :])
