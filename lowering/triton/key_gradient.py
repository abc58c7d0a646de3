"""The gradients of keys and values, as that of queries: each program owns a tile of keys, and walks the queries that see it."""

import triton
import triton.language as tl

from dilcompile.lowering.triton.listed import step_of, steps_of, visited
from dilcompile.lowering.triton.scores import (
    bias_of_tile,
    biased,
    capped,
    dropped,
    facts_of_keys,
    facts_of_queries,
    load_rows,
    masked,
    row_state,
    rows_of_tile,
    unfolded,
)
from dilcompile.lowering.triton.softmax import load_lse, weights_of
from dilcompile.lowering.triton.walk import (
    FAR,
    VARYING,
    block_at,
    part_of_keys,
    part_of_queries,
    reach_of_all,
    row_of,
    span_of,
    turns,
)


@triton.jit
def weights_of_queries(
    n, keys, Q, GRAD_OUT, LSE, REST, DELTA, q_head, q_row, out_head, out_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, term, kv_head, kv_heads,
    k, relative, k_document, keep, row_low, row_high, first_head, q_len, k_len, q_offset, scale, softcap,
    BIAS, bias, bias_head, bias_row, full_from, full_to, start, high, rate, LINE, origin,
    PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr,
    DEDUPE: tl.constexpr, COUNTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    SCORES: tl.constexpr, PART=None, first_row=0, row_rate=0,
):  # fmt: skip
    """(weights, slope of the cap, delta, positions, query heads, queries, gradients of their output) of a tile of keys and the
    n-th block of queries; weights are held [keys, queries]. Of a part of the queries, ``first_row`` is the row at ``start``,
    and rows ``rate`` positions apart are ``row_rate`` apart."""
    partly: tl.constexpr = MASKED or BLOCK_M % PACK != 0
    if BLOCKS == 0:
        block = start + block_at(n, full_from, full_to, MASKED) * (BLOCK_M // PACK) * rate
        position, member, there = rows_of_tile(block, rate, high, PACK, BLOCK_M)
        at = position - q_offset
        if PART is not None:
            block = first_row + block_at(n, full_from, full_to, MASKED) * (BLOCK_M // PACK) * row_rate
            at, _, _ = rows_of_tile(block, row_rate, high, PACK, BLOCK_M)
    else:
        visit = block_at(n, full_from, full_to, MASKED)
        number, member, there = rows_of_tile(0, 1, BLOCK_M // PACK, PACK, BLOCK_M)
        position, inside = visited(visit, number, LINE, origin, start, high, rate, BLOCKS, BLOCK_M // PACK, partly)
        there = there & inside & (position >= q_offset)
        at = position - q_offset
    h = first_head + member
    row, head = at.to(tl.int64), h.to(tl.int64)
    q = load_rows(Q, row * q_row + head * q_head, there, dims, HEAD_DIM, BLOCK_D, partly).to(keys.dtype)
    grad = load_rows(GRAD_OUT, row * out_row + head * out_head, there, v_dims, V_DIM, BLOCK_DV, partly).to(keys.dtype)
    place = head * q_len + row
    lse, rest = load_lse(LSE, REST, place, there)
    delta = tl.load(DELTA + place, mask=there, other=0.0)
    s = tl.dot(keys, tl.trans(q), input_precision=PRECISION, out_dtype=SCORES)
    s, slope = capped(s, scale, softcap, CAPPED)
    s = biased(s, BIAS, bias, row * bias_row + member.to(tl.int64) * bias_head, there, BIAS_BY, "keys", partly)
    if MASKED:
        t, document, limit_low, limit_high = facts_of_queries(position, at, there, STARTS, LIMITS, limit_stride, k_len)
        y = tl.where(there, t, FAR)
        s = masked(
            s, TERMS, RESIDUES, num_terms, term, kv_head, kv_heads, row_low, row_high, relative, y, h[None, :],
            k_document, document,
            k[:, None], limit_low[None, :], limit_high[None, :], STARTS, LIMITS, HEADS, DEDUPE, COUNTED, True,
            BIAS is not None,
        )  # fmt: skip
        if PADDED:
            s = tl.where(keep[:, None], s, -float("inf"))
    elif PADDED:
        s = tl.where(keep[:, None], s, -float("inf"))
    return weights_of(s, lse[None, :], rest[None, :], BIAS is not None), slope, delta, position, h, q, grad


@triton.jit
def gradient_of_scores(
    weights, values, grad, delta, SEED, batch, h, position, k, least_drawn, kept_factor,
    PRECISION: tl.constexpr, SCORES: tl.constexpr, PART=None,
):  # fmt: skip
    """The gradient of scores [keys, queries] as they enter the softmax, from their weights."""
    d_weights = tl.dot(values, tl.trans(grad), input_precision=PRECISION, out_dtype=SCORES)
    if SEED is not None:
        state = row_state(SEED, batch, h, position, PART)
        d_weights = dropped(d_weights * kept_factor, state[None, :], k[:, None], least_drawn)
    return weights * (d_weights - delta[None, :])


@triton.jit
def gather(
    k_sums, v_sums, keys, values, Q, GRAD_OUT, LSE, REST, DELTA, q_head, q_row, out_head, out_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, term, kv_head, kv_heads,
    k, relative, k_document, keep, row_low, row_high, first_head, q_len, k_len, q_offset, scale, softcap,
    BIAS, bias, bias_head, bias_row, SEED, batch, least_drawn, kept_factor,
    blocks, full_from, full_to, start, high, rate, LINE, origin,
    PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCKS: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr,
    DEDUPE: tl.constexpr, COUNTED: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    PART=None, first_row=0, row_rate=0,
):  # fmt: skip
    """Some blocks of queries added to the gradients of a tile of keys and values."""
    begin, end = turns(blocks, full_from, full_to, MASKED)
    for n in range(begin, end):
        weights, slope, delta, position, h, q, grad = weights_of_queries(
            n, keys, Q, GRAD_OUT, LSE, REST, DELTA, q_head, q_row, out_head, out_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, term, kv_head, kv_heads,
            k, relative, k_document, keep, row_low, row_high, first_head, q_len, k_len, q_offset, scale, softcap,
            BIAS, bias, bias_head, bias_row, full_from, full_to, start, high, rate, LINE, origin,
            PACK, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCKS, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, PADDED, MASKED,
            PRECISION, k_sums.dtype, PART, first_row, row_rate,
        )  # fmt: skip
        kept = weights
        if SEED is not None:
            state = row_state(SEED, batch, h, position, PART)
            kept = dropped(weights * kept_factor, state[None, :], k[:, None], least_drawn)
        v_sums = tl.dot(
            kept.to(GRAD_OUT.dtype.element_ty).to(keys.dtype), grad, v_sums, input_precision=PRECISION, out_dtype=v_sums.dtype
        )
        d_scores = gradient_of_scores(
            weights, values, grad, delta, SEED, batch, h, position, k, least_drawn, kept_factor, PRECISION, k_sums.dtype, PART
        )
        if CAPPED:
            d_scores *= slope
        d_scores = d_scores.to(Q.dtype.element_ty).to(keys.dtype)
        k_sums = tl.dot(d_scores, q, k_sums, input_precision=PRECISION, out_dtype=k_sums.dtype)
    return k_sums, v_sums


@triton.jit(do_not_specialize=VARYING)
def gradient_of_keys(
    Q, K, V, GRAD_OUT, LSE, REST, DELTA, GRAD_K, GRAD_V, TERMS, RESIDUES, LINES, ENTRIES, TILES, PATTERNS,
    STARTS, ENDS, LIMITS, PADDING, BIAS, SEED, PART,
    q_batch: tl.int64, q_head, q_row, k_batch: tl.int64, k_head, k_row,
    v_batch: tl.int64, v_head, v_row, out_batch: tl.int64, out_head, out_row,
    grad_k_batch: tl.int64, grad_k_head, grad_k_row, grad_v_batch: tl.int64, grad_v_head, grad_v_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row, bias_key,
    q_len, k_len, q_offset, num_terms, num_tiles, kv_heads, first_line, line_head,
    scale, softcap, least_drawn, kept_factor, grad_scale,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, COUNTED: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """One program a tile of keys of a key head: it walks the queries of all heads of the group."""
    q_batch, q_head, q_row = unfolded(q_batch, q_head, q_row, FOLD)
    k_batch, k_head, k_row = unfolded(k_batch, k_head, k_row, FOLD)
    v_batch, v_head, v_row = unfolded(v_batch, v_head, v_row, FOLD)
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
    grad_k_batch, grad_k_head, grad_k_row = unfolded(grad_k_batch, grad_k_head, grad_k_row, FOLD)
    grad_v_batch, grad_v_head, grad_v_row = unfolded(grad_v_batch, grad_v_head, grad_v_row, FOLD)
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    tile = TILES + (tl.load(PATTERNS + kv_head) * num_tiles + tl.program_id(0)) * 2
    first, stride, line = tl.load(tile), tl.load(tile + 1), 0
    k_begin, stop, k_step = part_of_keys(PART, k_len)
    end, q_step = part_of_queries(PART, q_offset, q_len)
    if first == FAR:
        return
    if K_BLOCK > 0:
        line, stride = stride, 1
        stop = tl.minimum(stop, (line + 1) * K_BLOCK)
    last = tl.minimum(first + (BLOCK_N - 1) * stride, first + (stop - 1 - first) // stride * stride)
    k, _, inside = rows_of_tile(first, stride, stop, 1, BLOCK_N)
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    at_head, k_at = kv_head.to(tl.int64), row_of(k, k_begin, PART, k_step).to(tl.int64)
    keys = load_rows(K + batch * k_batch + at_head * k_head, k_at * k_row, inside, dims, HEAD_DIM, BLOCK_D, True).to(PRODUCTS)
    values = load_rows(V + batch * v_batch + at_head * v_head, k_at * v_row, inside, v_dims, V_DIM, BLOCK_DV, True).to(PRODUCTS)
    Q += batch * q_batch
    GRAD_OUT += batch * out_batch
    LSE += batch * kv_heads * GROUP * q_len
    DELTA += batch * kv_heads * GROUP * q_len
    if REST is not None:
        REST += batch * kv_heads * GROUP * q_len
    if STARTS is not None:
        STARTS, ENDS = STARTS + batch * document_batch, ENDS + batch * document_batch
    if LIMITS is not None:
        LIMITS += batch * limit_batch
    if PADDING is not None:
        PADDING += batch * padding_batch
    relative, k_document, keep = facts_of_keys(k, inside, STARTS, PADDING, padding_stride)
    k_sums, v_sums = tl.zeros([BLOCK_N, BLOCK_D], SCORES), tl.zeros([BLOCK_N, BLOCK_DV], SCORES)
    for part in range(GROUP // PACK):
        first_head = kv_head * GROUP + part * PACK
        last_head = first_head + PACK - 1
        of_part = BIAS
        if BIAS is not None:
            of_part = BIAS + batch * bias_batch + first_head.to(tl.int64) * bias_head
        bias = bias_of_tile(of_part, k_at * bias_key, inside, BIAS_BY, "keys", SCORES)
        if COUNTED:
            low, high = reach_of_all(
                TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, first_head, last_head,
                first, last, q_offset, end, k_len, True,
            )  # fmt: skip
            low, blocks = span_of(low, high, q_offset, PART, q_step, BLOCK_M // PACK)
            k_sums, v_sums = gather(
                k_sums, v_sums, keys, values, Q, GRAD_OUT, LSE, REST, DELTA, q_head, q_row, out_head, out_row, dims, v_dims,
                TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, 0, kv_head, kv_heads,
                k, relative, k_document, keep, k, k, first_head, q_len, k_len, q_offset, scale, softcap,
                of_part, bias, bias_head, bias_row, SEED, batch, least_drawn, kept_factor,
                blocks, 0, 0, low, high, q_step, TERMS, 0,
                PACK, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, 0, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED,
                PADDING is not None, True, PRECISION, PART, row_of(low, q_offset, PART, q_step), 1,
            )  # fmt: skip
        else:
            FIRST: tl.constexpr = 1 if STARTS is not None else 0
            of_heads = LINES
            if LINES is not None:
                of_heads = LINES + first_head.to(tl.int64) * line_head
            steps, at = steps_of(STARTS, ENDS, num_terms, first, last, k_len, DEDUPE, K_BLOCK)
            for step in range(steps):
                term, LINE, origin, start, high, rate, blocks, full_from, full_to, row_low, row_high, at = step_of(
                    step, at, TERMS, RESIDUES, of_heads, ENTRIES, STARTS, ENDS, LIMITS, line - first_line, kv_head, kv_heads,
                    first_head, last_head, first, last, q_offset, end, k_len, k,
                    True, DEDUPE, K_BLOCK, Q_BLOCK, BLOCK_M // PACK, PART,
                )  # fmt: skip
                first_row, row_rate = row_of(start, q_offset, PART, q_step), row_of(rate, 0, PART, q_step)
                for masks in tl.static_range(FIRST, 2):
                    k_sums, v_sums = gather(
                        k_sums, v_sums, keys, values, Q, GRAD_OUT, LSE, REST, DELTA,
                        q_head, q_row, out_head, out_row, dims, v_dims,
                        TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, term, kv_head, kv_heads,
                        k, relative, k_document, keep, row_low, row_high, first_head, q_len, k_len, q_offset, scale,
                        softcap, of_part, bias, bias_head, bias_row, SEED, batch, least_drawn, kept_factor,
                        blocks, full_from, full_to, start, high, rate, LINE, origin,
                        PACK, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, Q_BLOCK, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED,
                        PADDING is not None, masks == 1, PRECISION, PART, first_row, row_rate,
                    )  # fmt: skip
    at = batch * grad_k_batch + at_head * grad_k_head
    pointers = GRAD_K + at + (k_at * grad_k_row)[:, None] + dims[None, :]
    tl.store(pointers, (k_sums * grad_scale).to(GRAD_K.dtype.element_ty), mask=inside[:, None] & (dims < HEAD_DIM)[None, :])
    at = batch * grad_v_batch + at_head * grad_v_head
    pointers = GRAD_V + at + (k_at * grad_v_row)[:, None] + v_dims[None, :]
    tl.store(pointers, v_sums.to(GRAD_V.dtype.element_ty), mask=inside[:, None] & (v_dims < V_DIM)[None, :])
