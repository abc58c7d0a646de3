"""The gradient of the bias: one program a tile of it, which walks all that shares its numbers."""

import triton
import triton.language as tl

from dilcompile.lowering.triton.gradients import gradient_of_scores, scores_of_queries
from dilcompile.lowering.triton.scores import bias_of_tile, facts_of_keys, load_rows, power, rows_of_tile
from dilcompile.lowering.triton.walk import reach_of_all


@triton.jit
def share_of_bias(
    sums, batch, h, Q, K, V, GRAD_OUT, LSE, DELTA,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride, bias_batch, bias_head, bias_row, bias_key,
    first_key, first_query, q_len, k_len, q_offset, num_terms, kv_heads, scale, softcap, least_drawn, kept_factor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr,
    DEDUPE: tl.constexpr, ALL_QUERIES: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """What one query head of one batch row adds to a tile of the bias's gradient."""
    kv_head = h // GROUP
    k, _, inside = rows_of_tile(first_key, 1, k_len, 1, BLOCK_N)
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
    last_key = tl.minimum(first_key + BLOCK_N, k_len) - 1
    low, high = reach_of_all(
        TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, h, h, first_key, last_key, q_offset, q_offset + q_len,
        k_len, True,
    )  # fmt: skip
    if not ALL_QUERIES:
        low, high = tl.maximum(low, first_query), tl.minimum(high, first_query + BLOCK_M)
        # The sums are of the tile's own queries, reached or not.
        high = tl.where(low < high, high, first_query)
        low = first_query
    for n in range(tl.cdiv(tl.maximum(0, high - low), BLOCK_M)):
        s, _slope, lse, delta, position, head, _q, grad = scores_of_queries(
            n, keys, Q + batch * q_batch, GRAD_OUT + batch * out_batch, LSE + rows, DELTA + rows,
            q_head, q_row, out_head, out_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, limit_stride, num_terms, 0, kv_head, kv_heads,
            k, relative, k_document, keep, k, k, h, q_len, k_len, q_offset, scale, softcap,
            BIAS, bias, bias_head, bias_row, 0, 0, low, high, 1,
            1, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, CAPPED, BIAS_BY, HEADS, DEDUPE, True, PADDING is not None, True,
            PRECISION, SCORES,
        )  # fmt: skip
        weights = power(s - lse[None, :], True)
        sums += gradient_of_scores(
            weights, values, grad, delta, SEED, batch, head, position, k, least_drawn, kept_factor, PRECISION, SCORES
        )
    return sums


@triton.jit(do_not_specialize=["q_len", "k_len", "q_offset", "num_terms", "kv_heads", "least_drawn", "heads", "batches"])
def gradient_of_bias(
    Q, K, V, GRAD_OUT, LSE, DELTA, GRAD_BIAS, TERMS, RESIDUES, STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride, bias_batch, bias_head, bias_row, bias_key,
    q_len, k_len, q_offset, num_terms, kv_heads, heads, batches, scale, softcap, least_drawn, kept_factor,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, ALL_QUERIES: tl.constexpr,
    PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
):  # fmt: skip
    """One program a tile of GRAD_BIAS [batch rows, heads, queries, keys]; with ALL_QUERIES [batch rows, heads, 1, keys].

    heads, batches: how many of them each number is for, which the program walks. Pairs are counted by all terms at once.
    """
    tiles = tl.cdiv(k_len, BLOCK_N)
    first_key = tl.program_id(0) % tiles * BLOCK_N
    first_row = tl.program_id(0) // tiles * BLOCK_M
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    sums = tl.zeros([BLOCK_N, BLOCK_M], SCORES)
    for n in range(heads * batches):
        h = tl.program_id(1) + n % heads
        batch = (tl.program_id(2) + n // heads).to(tl.int64)
        sums = share_of_bias(
            sums, batch, h, Q, K, V, GRAD_OUT, LSE, DELTA,
            q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row, out_batch, out_head, out_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, ENDS, LIMITS, PADDING, BIAS, SEED,
            document_batch, limit_batch, limit_stride, padding_batch, padding_stride, bias_batch, bias_head, bias_row, bias_key,
            first_key, q_offset + first_row, q_len, k_len, q_offset, num_terms, kv_heads, scale, softcap,
            least_drawn, kept_factor,
            GROUP, HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, CAPPED, BIAS_BY, HEADS, DEDUPE, ALL_QUERIES,
            PRECISION, PRODUCTS, SCORES,
        )  # fmt: skip
    place = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    k = first_key + tl.arange(0, BLOCK_N)
    if ALL_QUERIES:
        tl.store(GRAD_BIAS + place * k_len + k, tl.sum(sums, 1).to(GRAD_BIAS.dtype.element_ty), mask=k < k_len)
    else:
        row = first_row + tl.arange(0, BLOCK_M)
        pointers = GRAD_BIAS + ((place * q_len + row) * k_len)[:, None] + k[None, :]
        there = (row < q_len)[:, None] & (k < k_len)[None, :]
        tl.store(pointers, tl.trans(sums).to(GRAD_BIAS.dtype.element_ty), mask=there)
