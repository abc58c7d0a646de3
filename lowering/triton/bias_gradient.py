"""The gradient of the bias: one program a tile of it, which walks all that shares its numbers."""

import triton
import triton.language as tl

from dilcompile.lowering.triton.key_gradient import gradient_of_scores, weights_of_queries
from dilcompile.lowering.triton.listed import step_of, steps_of
from dilcompile.lowering.triton.scores import (
    bias_of_tile,
    facts_of_keys,
    facts_of_queries,
    load_rows,
    rows_of_tile,
    unfolded,
)
from dilcompile.lowering.triton.walk import VARYING, bounds, reach_of_all


@triton.jit
def pairs_of_blocks(
    MAP, map_row, first_row, k, inside, position, there, STARTS, q_offset, k_len, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr
):
    """Which pairs of keys, at positions k in their documents, and queries are in a block. MAP [block rows, block columns]: of a
    head, from block row first_row on."""
    t, _, _, _ = facts_of_queries(position, position, there, STARTS, None, 0, k_len)
    there = there & (t >= 0)
    row = tl.where(there, t // Q_BLOCK - first_row, 0).to(tl.int64)
    at = (row * map_row)[None, :] + (k // K_BLOCK)[:, None]
    return tl.load(MAP + at, mask=there[None, :] & inside[:, None], other=0) != 0


@triton.jit
def share_of_bias(
    sums, batch, h, Q, K, V, GRAD_OUT, LSE, REST, DELTA,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, dims, v_dims,
    TERMS, RESIDUES, LINES, ENTRIES, MAP, STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride, bias_batch, bias_head, bias_row, bias_key,
    line, line_head, map_head, map_row, first_row, first_key, stop, first_query,
    q_len, k_len, q_offset, num_terms, kv_heads, scale, softcap, least_drawn, kept_factor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr,
    DEDUPE: tl.constexpr, ALL_QUERIES: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """What one query head of one batch row adds to a tile of the bias's gradient."""
    kv_head = h // GROUP
    k, _member, inside = rows_of_tile(first_key, 1, stop, 1, BLOCK_N)
    at_head, at_query, k_at = kv_head.to(tl.int64), h.to(tl.int64), k.to(tl.int64)
    keys = load_rows(K + batch * k_batch + at_head * k_head, k_at * k_row, inside, dims, HEAD_DIM, BLOCK_D, True).to(PRODUCTS)
    values = load_rows(V + batch * v_batch + at_head * v_head, k_at * v_row, inside, v_dims, V_DIM, BLOCK_DV, True).to(PRODUCTS)
    rows = batch * kv_heads * GROUP * q_len
    if STARTS is not None:
        STARTS, ENDS = STARTS + batch * document_batch, ENDS + batch * document_batch
    if LIMITS is not None:
        LIMITS += batch * limit_batch
    if PADDING is not None:
        PADDING += batch * padding_batch
    BIAS += batch * bias_batch + at_query * bias_head
    relative, k_document, keep = facts_of_keys(k, inside, STARTS, PADDING, padding_stride)
    bias = bias_of_tile(BIAS, k_at * bias_key, inside, BIAS_BY, "keys", SCORES)
    last_key, end = tl.minimum(first_key + BLOCK_N, stop) - 1, q_offset + q_len
    LISTED: tl.constexpr = K_BLOCK > 0 and ALL_QUERIES
    MAPPED: tl.constexpr = K_BLOCK > 0 and not ALL_QUERIES
    steps, at = 1, first_key
    if LISTED:
        steps, at = steps_of(STARTS, ENDS, 1, first_key, last_key, k_len, False, K_BLOCK)
        LINES += at_query * line_head
    for step in range(steps):
        if LISTED:
            _, LINE, origin, begin, high, rate, visits, _, _, row_low, row_high, at = step_of(
                step, at, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line, kv_head, kv_heads, h, h,
                first_key, last_key, q_offset, end, k_len, k, True, False, K_BLOCK, Q_BLOCK, BLOCK_M,
            )  # fmt: skip
        elif MAPPED:
            begin, high, at_key = first_query, tl.minimum(first_query + BLOCK_M, end), k
            if STARTS is not None:
                at_key = k - k_document
            LINE, origin, rate = TERMS, 0, 1
            row_low, row_high, _, _ = bounds(TERMS, RESIDUES, 0, kv_head, kv_heads, at_key, True)
            position = first_query + tl.arange(0, BLOCK_M)
            held = pairs_of_blocks(
                MAP + at_query * map_head, map_row, first_row, at_key, inside, position, position < end, STARTS, q_offset, k_len,
                Q_BLOCK, K_BLOCK,
            )  # fmt: skip
            visits = tl.max(tl.max(held.to(tl.int32), 1), 0)
        else:
            LINE, origin, rate, row_low, row_high = TERMS, 0, 1, k, k
            begin, high = reach_of_all(
                TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, h, h, first_key, last_key, q_offset, end, k_len, True
            )
            if not ALL_QUERIES:
                begin, high = tl.maximum(begin, first_query), tl.minimum(high, first_query + BLOCK_M)
                # The sums are of the tile's own queries, reached or not.
                high = tl.where(begin < high, high, first_query)
                begin = first_query
            visits = tl.cdiv(tl.maximum(0, high - begin), BLOCK_M)
        for n in range(visits):
            weights, _slope, delta, position, head, _q, grad = weights_of_queries(
                n, keys, Q + batch * q_batch, GRAD_OUT + batch * out_batch, LSE + rows, REST + rows, DELTA + rows,
                q_head, q_row, out_head, out_row, dims, v_dims,
                TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, 0, kv_head, kv_heads,
                k, relative, k_document, keep, row_low, row_high, h, q_len, k_len, q_offset, scale, softcap,
                BIAS, bias, bias_head, bias_row, 0, 0, begin, high, rate, LINE, origin,
                1, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, Q_BLOCK if LISTED else 0, CAPPED, BIAS_BY, HEADS, DEDUPE,
                K_BLOCK == 0, PADDING is not None, True, PRECISION, SCORES,
            )  # fmt: skip
            if MAPPED:
                weights = tl.where(held, weights, 0.0)
            sums += gradient_of_scores(
                weights, values, grad, delta, SEED, batch, head, position, k, least_drawn, kept_factor, PRECISION, SCORES
            )
    return sums


@triton.jit(do_not_specialize=VARYING)
def gradient_of_bias(
    Q, K, V, GRAD_OUT, LSE, REST, DELTA, GRAD_BIAS, TERMS, RESIDUES, LINES, ENTRIES, TILES, MAP,
    STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
    q_batch: tl.int64, q_head, q_row, k_batch: tl.int64, k_head, k_row,
    v_batch: tl.int64, v_head, v_row, out_batch: tl.int64, out_head, out_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row, bias_key,
    q_len, k_len, q_offset, num_terms, kv_heads, heads, batches, scale, softcap, least_drawn, kept_factor,
    first_line, line_head, map_head, map_row, first_row,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, ALL_QUERIES: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
    FOLD: tl.constexpr,
):  # fmt: skip
    """One program a tile of GRAD_BIAS [batch rows, heads, queries, keys]; with ALL_QUERIES [batch rows, heads, 1, keys].

    heads, batches: how many of them each number is for, which the program walks. Pairs are counted by all terms at once. Of
    blocks, TILES of keys walk their lists for all queries; a tile of pairs asks MAP [heads or 1, block rows, block columns].
    """
    q_batch, q_head, q_row = unfolded(q_batch, q_head, q_row, FOLD)
    k_batch, k_head, k_row = unfolded(k_batch, k_head, k_row, FOLD)
    v_batch, v_head, v_row = unfolded(v_batch, v_head, v_row, FOLD)
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
    tiles = tl.cdiv(k_len, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    first_row_of_tile = tl.program_id(0) // tiles * BLOCK_M
    line, stop = 0, k_len
    if TILES is not None:
        first_key, line = tl.load(TILES + tl.program_id(0) * 2), tl.load(TILES + tl.program_id(0) * 2 + 1)
        stop, line = tl.minimum(k_len, (line + 1) * K_BLOCK), line - first_line
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    sums = tl.zeros([BLOCK_N, BLOCK_M], SCORES)
    for n in range(heads * batches):
        h = tl.program_id(1) + n % heads
        batch = (tl.program_id(2) + n // heads).to(tl.int64)
        sums = share_of_bias(
            sums, batch, h, Q, K, V, GRAD_OUT, LSE, REST, DELTA,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, dims, v_dims,
            TERMS, RESIDUES, LINES, ENTRIES, MAP, STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
            document_batch, limit_batch, limit_stride, padding_batch, padding_stride, bias_batch, bias_head, bias_row, bias_key,
            line, line_head, map_head, map_row, first_row, first_key, stop, q_offset + first_row_of_tile, q_len, k_len, q_offset,
            num_terms, kv_heads, scale, softcap, least_drawn, kept_factor,
            GROUP, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAPPED, BIAS_BY, HEADS, DEDUPE, ALL_QUERIES,
            Q_BLOCK, K_BLOCK, PRECISION, PRODUCTS, SCORES,
        )  # fmt: skip
    place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    k = first_key + tl.arange(0, BLOCK_N)
    if ALL_QUERIES:
        tl.store(GRAD_BIAS + place * k_len + k, tl.sum(sums, 1).to(GRAD_BIAS.dtype.element_ty), mask=k < stop)
    else:
        row = first_row_of_tile + tl.arange(0, BLOCK_M)
        pointers = GRAD_BIAS + ((place * q_len + row) * k_len)[:, None] + k[None, :]
        there = (row < q_len)[:, None] & (k < k_len)[None, :]
        tl.store(pointers, tl.trans(sums).to(GRAD_BIAS.dtype.element_ty), mask=there)
