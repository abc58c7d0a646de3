"""The forward kernel: one tile of queries, one running softmax over the keys of all terms."""

import triton
import triton.language as tl

from dilcompile.lowering.triton.listed import step_of, steps_of
from dilcompile.lowering.triton.scores import (
    LN_2,
    bias_of_tile,
    described,
    dropped,
    facts_of_queries,
    is_rough,
    load_rows,
    logarithm,
    power,
    row_state,
    scores_of_keys,
    tile_of_queries,
    unfolded,
)
from dilcompile.lowering.triton.walk import FAR, VARYING, part_of_keys, part_of_queries, reach_of_all, row_of, span_of, turns


@triton.jit
def attend(
    total, top, sums, q, K, V, k_row, v_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key, SEED, state,
    least_drawn, blocks, full_from, full_to, start, high, rate, LINE, origin,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr,
    COUNTED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    PAGES=None, num_pages=0, k_page=0, v_page=0, PAGE_SIZE: tl.constexpr = 1, KEYS=None, VALUES=None,
    PART=None, key_row=0, row_rate=0,
):  # fmt: skip
    """Some blocks of keys joined to the sum of exponentials, the maximum and the weighted sum of values."""
    begin, end = turns(blocks, full_from, full_to, MASKED)
    for n in range(begin, end):
        s, _, k, _, values = scores_of_keys(
            n, q, K, V, k_row, v_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
            t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key,
            full_from, full_to, start, high, rate, LINE, origin,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, BLOCKS, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, MASKED, PRECISION,
            sums.dtype,
            PAGES, num_pages, k_page, v_page, PAGE_SIZE, KEYS, VALUES, PART, key_row, row_rate,
        )  # fmt: skip
        higher = tl.maximum(top, tl.max(s, 1))
        shift = higher
        if MASKED or PADDING is not None or BIAS is not None:
            # A row that has seen no key yet: anything finite keeps its weights 0 instead of not a number.
            shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights = power(s - shift[:, None], BIAS is not None)
        fade = power(top - shift, BIAS is not None)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        if SEED is not None:
            weights = dropped(weights, state[:, None], k[None, :], least_drawn)
        weights = weights.to(V.dtype.element_ty).to(q.dtype)
        sums = tl.dot(weights, values.to(q.dtype), sums, input_precision=PRECISION, out_dtype=sums.dtype)
        top = higher
    return total, top, sums


@triton.jit(do_not_specialize=VARYING)
def attention(
    Q, K, V, OUT, LSE, REST, TERMS, RESIDUES, LINES, ENTRIES, TILES, PATTERNS,
    STARTS, ENDS, LIMITS, PADDING, BIAS, SEED, PART,
    q_batch: tl.int64, q_head, q_row, k_batch: tl.int64, k_head, k_row,
    v_batch: tl.int64, v_head, v_row, out_batch: tl.int64, out_head, out_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row, bias_key,
    q_len, k_len, q_offset, num_terms, num_tiles, kv_heads, first_line, line_head,
    scale, softcap, least_drawn, kept_factor,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, COUNTED: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
    FOLD: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One program a tile of queries, key head (or part of its query heads) and batch row.

    PRODUCTS: dtype of the operands of matrix products; SCORES: of scores and sums. FOLD: see ``unfolded``.
    DESCRIBED: keys and values are loaded by descriptors of their rows (TMA).

    REST: in place of all that is computed, what an LSE that is there already has no digits for: of rows that a fill of a bias
    hides whole, about the logarithm of the number of their keys. Tiles without such rows are not walked.
    """
    q_batch, q_head, q_row = unfolded(q_batch, q_head, q_row, FOLD)
    k_batch, k_head, k_row = unfolded(k_batch, k_head, k_row, FOLD)
    v_batch, v_head, v_row = unfolded(v_batch, v_head, v_row, FOLD)
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
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
    known, lost = there, there
    if REST is not None:
        known = tl.load(LSE + (batch * kv_heads * GROUP + head) * q_len + row, mask=there, other=0.0)
        lost = is_rough(known)
        if tl.max(lost.to(tl.int32), 0) == 0:
            return
    q = load_rows(Q + batch * q_batch, row * q_row + head * q_head, there, dims, HEAD_DIM, BLOCK_D, True).to(PRODUCTS)
    t, document, limit_low, limit_high = facts_of_queries(position, number, there, STARTS, LIMITS, limit_stride, k_len)
    bias = bias_of_tile(BIAS, row * bias_row + (head - first_head) * bias_head, there, BIAS_BY, "rows", SCORES)
    total = tl.zeros([BLOCK_M], SCORES)
    top = tl.full([BLOCK_M], -float("inf"), SCORES)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], SCORES)
    state = position
    if SEED is not None:
        state = row_state(SEED, batch, h, position, PART)
    if COUNTED:
        low, high = reach_of_all(
            TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, first_head, last_head, first, last, k_begin, k_end,
            k_len, False,
        )  # fmt: skip
        low, blocks = span_of(low, high, k_begin, PART, k_step, BLOCK_N)
        total, top, sums = attend(
            total, top, sums, q, K, V, k_row, v_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, 0, kv_head, kv_heads,
            t, document, h, limit_low, limit_high, t, t, scale, softcap, BIAS, bias, bias_key, SEED, state, least_drawn,
            blocks, 0, 0, low, high, k_step, TERMS, 0,
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
                total, top, sums = attend(
                    total, top, sums, q, K, V, k_row, v_row, dims, v_dims,
                    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
                    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key,
                    SEED, state, least_drawn, blocks, full_from, full_to, start, high, rate, LINE, origin,
                    HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, K_BLOCK, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, masks == 1,
                    PRECISION, KEYS=KEYS, VALUES=VALUES, PART=PART, key_row=key_row, row_rate=row_rate,
                )  # fmt: skip
    seen = total > 0
    place = (batch * kv_heads * GROUP + head) * q_len + row
    if REST is not None:
        tl.store(REST + place, top - known + logarithm(tl.where(seen, total, 1.0), BIAS is not None), mask=there & lost & seen)
    else:
        out = sums / tl.where(seen, total, 1.0)[:, None]
        if SEED is not None:
            out *= kept_factor
        pointers = OUT + batch * out_batch + (row * out_row + head * out_head)[:, None] + v_dims[None, :]
        tl.store(pointers, out.to(OUT.dtype.element_ty), mask=there[:, None] & (v_dims < V_DIM)[None, :])
        lse = top + logarithm(tl.where(seen, total, 1.0), BIAS is not None)
        if BIAS is None:
            lse *= LN_2
        tl.store(LSE + place, lse, mask=there)
