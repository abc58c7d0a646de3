"""The decode kernels: few query rows, whose keys are shared out to several programs and joined by their maximum and sum.

The walk, the scores and the running softmax are those of the forward (``attend``); a part is a run of the blocks that one
program of the forward would visit.
"""

import triton
import triton.language as tl

from dilcompile.lowering.triton.attend import attend
from dilcompile.lowering.triton.listed import step_of, steps_of
from dilcompile.lowering.triton.scores import (
    LN_2,
    bias_of_tile,
    facts_of_queries,
    load_rows,
    logarithm,
    power,
    row_state,
    tile_of_queries,
    unfolded,
)
from dilcompile.lowering.triton.walk import FAR, VARYING, blocks_of, bounds, part_of_term, reach_of_all


@triton.jit(do_not_specialize=VARYING)
def kept_range(PADDING, KEPT, padding_batch, padding_stride, k_len, BLOCK_N: tl.constexpr):
    """KEPT [B, 2]: the first key that the padding of a batch row keeps, and the first behind the last one."""
    batch = tl.program_id(0)
    PADDING += batch.to(tl.int64) * padding_batch
    low, high = k_len, 0
    for begin in range(0, k_len, BLOCK_N):
        k = begin + tl.arange(0, BLOCK_N)
        keep = tl.load(PADDING + k.to(tl.int64) * padding_stride, mask=k < k_len, other=0) != 0
        low = tl.minimum(low, tl.min(tl.where(keep, k, k_len), 0))
        high = tl.maximum(high, tl.max(tl.where(keep, k + 1, 0), 0))
    tl.store(KEPT + batch * 2, low)
    tl.store(KEPT + batch * 2 + 1, high)


@triton.jit
def visible(LIMITS, KEPT, batch, there, limit_low, limit_high, k_len):
    """(begin, end, inner_begin, inner_end): no row of the tile sees keys outside the first two; limits by row hide none from any
    row between the last two."""
    begin, end, inner_begin, inner_end = 0, k_len, 0, k_len
    if LIMITS is not None:
        begin, end = tl.min(tl.where(there, limit_low, FAR), 0), tl.max(tl.where(there, limit_high, 0), 0)
        inner_begin, inner_end = tl.max(tl.where(there, limit_low, 0), 0), tl.min(tl.where(there, limit_high, FAR), 0)
    if KEPT is not None:
        begin, end = tl.maximum(begin, tl.load(KEPT + batch * 2)), tl.minimum(end, tl.load(KEPT + batch * 2 + 1))
    return begin, end, inner_begin, inner_end


@triton.jit
def share(begin, end, before, start, blocks, full_from, full_to, span):
    """(start, blocks, full_from, full_to) of the blocks of a term that are numbers begin to before end among all of a tile;
    it has ``before`` blocks of other terms first."""
    skipped = tl.minimum(tl.maximum(begin - before, 0), blocks)
    kept = tl.minimum(tl.maximum(end - before, 0), blocks) - skipped
    full_from = tl.minimum(tl.maximum(full_from - skipped, 0), kept)
    return start + skipped * span, kept, full_from, tl.maximum(full_from, tl.minimum(full_to - skipped, kept))


@triton.jit
def share_of_step(
    step, at, own_begin, own_end, before, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line, kv_head, kv_heads,
    first_head, last_head, first, last, begin, end, inner_begin, inner_end, k_len, position,
    DEDUPE: tl.constexpr, Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile visits in one step, and of it what is numbers own_begin to before own_end among all of the tile.

    Returns:
        blocks of the step; then as ``listed.step_of``, of this part alone.
    """
    if K_BLOCK > 0:
        term, LINE, origin, start, high, rate, blocks, full_from, full_to, row_low, row_high, at = step_of(
            step, at, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line, kv_head, kv_heads, first_head, last_head,
            first, last, 0, k_len, k_len, position, False, DEDUPE, Q_BLOCK, K_BLOCK, BLOCK_N,
        )  # fmt: skip
        span = BLOCK_N
    else:
        term, LINE, origin = step // (2 if DEDUPE else 1), TERMS, 0
        low, high, inner_low, inner_high, rate = part_of_term(
            TERMS, RESIDUES, term, step % (2 if DEDUPE else 1), kv_head, kv_heads, first_head, last_head, first, last, begin, end,
            False, DEDUPE,
        )  # fmt: skip
        inner_low, inner_high = tl.maximum(inner_low, inner_begin), tl.minimum(inner_high, inner_end)
        start, blocks, full_from, full_to = blocks_of(low, high, inner_low, inner_high, rate, first, BLOCK_N)
        row_low, row_high, _, _ = bounds(TERMS, RESIDUES, term, kv_head, kv_heads, position, False)
        span = rate * BLOCK_N
    start, mine, full_from, full_to = share(own_begin, own_end, before, start, blocks, full_from, full_to, span)
    return blocks, term, LINE, origin, start, high, rate, mine, full_from, full_to, row_low, row_high, at


@triton.jit(do_not_specialize=VARYING)
def decode(
    Q, K, V, SUMS, TOPS, TOTALS, TERMS, RESIDUES, LINES, ENTRIES, TILES, PATTERNS,
    STARTS, ENDS, LIMITS, PADDING, BIAS, SEED, KEPT, PAGES,
    q_batch: tl.int64, q_head, q_row, k_batch: tl.int64, k_head, k_row,
    v_batch: tl.int64, v_head, v_row,
    document_batch, limit_batch, limit_stride, padding_batch, padding_stride,
    bias_batch: tl.int64, bias_head: tl.int64, bias_row, bias_key, page_batch, num_pages,
    q_len, k_len, q_offset, num_terms, num_tiles, kv_heads, first_line, line_head, scale, softcap, least_drawn, kept_factor,
    parts,
    GROUP: tl.constexpr, PACK: tl.constexpr, HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr, COUNTED: tl.constexpr,
    Q_BLOCK: tl.constexpr, K_BLOCK: tl.constexpr, PRECISION: tl.constexpr, PRODUCTS: tl.constexpr, SCORES: tl.constexpr,
    PAGE_SIZE: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """One program a part of the keys of a tile of queries, a key head (or part of its query heads) and a batch row.

    With PAGES [B, most pages] the first dim of K and V is that of the pages, and their rows are slots of one. SUMS [parts, B, H,
    Sq, Dv], TOPS and TOTALS [parts, B, H, Sq]: the running softmax of the part, in the base of the scores.
    """
    q_batch, q_head, q_row = unfolded(q_batch, q_head, q_row, FOLD)
    k_batch, k_head, k_row = unfolded(k_batch, k_head, k_row, FOLD)
    v_batch, v_head, v_row = unfolded(v_batch, v_head, v_row, FOLD)
    kv_head, batch, first_head, last_head, first, last, position, h, there, line = tile_of_queries(
        tl.program_id(0) // parts, TILES, PATTERNS, num_tiles, q_offset, q_len, GROUP, PACK, BLOCK_M, Q_BLOCK
    )
    if first == FAR:
        return
    part = tl.program_id(0) % parts
    dims, v_dims = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    K += kv_head.to(tl.int64) * k_head
    V += kv_head.to(tl.int64) * v_head
    if PAGES is None:
        K += batch * k_batch
        V += batch * v_batch
    else:
        PAGES += batch * page_batch
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
    row, head = (position - q_offset).to(tl.int64), h.to(tl.int64)
    q = load_rows(Q + batch * q_batch, row * q_row + head * q_head, there, dims, HEAD_DIM, BLOCK_D, True).to(PRODUCTS)
    t, document, limit_low, limit_high = facts_of_queries(
        position, position - q_offset, there, STARTS, LIMITS, limit_stride, k_len
    )
    bias = bias_of_tile(BIAS, row * bias_row + (head - first_head) * bias_head, there, BIAS_BY, "rows", SCORES)
    begin, end, inner_begin, inner_end = visible(LIMITS, KEPT, batch, there, limit_low, limit_high, k_len)
    total = tl.zeros([BLOCK_M], SCORES)
    top = tl.full([BLOCK_M], -float("inf"), SCORES)
    sums = tl.zeros([BLOCK_M, BLOCK_DV], SCORES)
    state = position
    if SEED is not None:
        state = row_state(SEED, batch, h, position)
    if COUNTED:
        low, high = reach_of_all(
            TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, first_head, last_head, first, last, begin, end, k_len,
            False,
        )  # fmt: skip
        blocks = tl.cdiv(tl.maximum(0, high - low), BLOCK_N)
        each = tl.cdiv(blocks, parts)
        start, blocks, _, _ = share(part * each, (part + 1) * each, 0, low, blocks, 0, 0, BLOCK_N)
        total, top, sums = attend(
            total, top, sums, q, K, V, k_row, v_row, dims, v_dims,
            TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, 0, kv_head, kv_heads,
            t, document, h, limit_low, limit_high, t, t, scale, softcap, BIAS, bias, bias_key, SEED, state, least_drawn,
            blocks, 0, 0, start, high, 1, TERMS, 0,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, 0, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, True, PRECISION,
            PAGES, num_pages, k_batch, v_batch, PAGE_SIZE,
        )  # fmt: skip
    else:
        # Runs of documents have nothing without a mask.
        FIRST: tl.constexpr = 1 if STARTS is not None else 0
        steps, at = steps_of(STARTS, ENDS, num_terms, first, last, k_len, DEDUPE, Q_BLOCK)
        all_blocks, begin_at = 0, at
        for step in range(steps):
            blocks, _term, _line, _origin, _start, _high, _rate, _mine, _from, _to, _low, _row_high, at = share_of_step(
                step, at, 0, 0, 0, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line - first_line, kv_head, kv_heads,
                first_head, last_head, first, last, begin, end, inner_begin, inner_end, k_len, position,
                DEDUPE, Q_BLOCK, K_BLOCK, BLOCK_N,
            )  # fmt: skip
            all_blocks += blocks
        each = tl.cdiv(all_blocks, parts)
        before, at = 0, begin_at
        for step in range(steps):
            blocks, term, LINE, origin, start, high, rate, mine, full_from, full_to, row_low, row_high, at = share_of_step(
                step, at, part * each, (part + 1) * each, before, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS,
                line - first_line, kv_head, kv_heads, first_head, last_head, first, last, begin, end, inner_begin, inner_end,
                k_len, position, DEDUPE, Q_BLOCK, K_BLOCK, BLOCK_N,
            )  # fmt: skip
            before += blocks
            for masks in tl.static_range(FIRST, 2):
                total, top, sums = attend(
                    total, top, sums, q, K, V, k_row, v_row, dims, v_dims,
                    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
                    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key, SEED, state,
                    least_drawn, mine, full_from, full_to, start, high, rate, LINE, origin,
                    HEAD_DIM, V_DIM, BLOCK_D, BLOCK_DV, BLOCK_N, K_BLOCK, CAPPED, BIAS_BY, HEADS, DEDUPE, COUNTED, masks == 1,
                    PRECISION, PAGES, num_pages, k_batch, v_batch, PAGE_SIZE,
                )  # fmt: skip
    if SEED is not None:
        sums *= kept_factor
    place = ((part.to(tl.int64) * tl.num_programs(2) + batch) * kv_heads * GROUP + head) * q_len + row
    tl.store(SUMS + place[:, None] * V_DIM + v_dims[None, :], sums, mask=there[:, None] & (v_dims < V_DIM)[None, :])
    tl.store(TOPS + place, top, mask=there)
    tl.store(TOTALS + place, total, mask=there)


@triton.jit(do_not_specialize=VARYING)
def join(
    SUMS, TOPS, TOTALS, OUT, LSE, out_batch: tl.int64, out_head, out_row, parts,
    NATURAL: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, FOLD: tl.constexpr,
):  # fmt: skip
    """The parts of one row, query head and batch row as one: each is worth the base of the scores to the power of its maximum
    less the joint one."""
    out_batch, out_head, out_row = unfolded(out_batch, out_head, out_row, FOLD)
    row, head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    rows, heads, batches = tl.num_programs(0), tl.num_programs(1), tl.num_programs(2)
    place = (batch * heads + head) * rows + row
    dims, v_dims = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_DV)
    top = tl.full([], -float("inf"), TOPS.dtype.element_ty)
    total = tl.zeros([], TOPS.dtype.element_ty)
    sums = tl.zeros([BLOCK_DV], TOPS.dtype.element_ty)
    for first in range(0, parts, BLOCK_S):
        part = first + dims
        at, there = part.to(tl.int64) * batches * heads * rows + place, part < parts
        tops = tl.load(TOPS + at, mask=there, other=-float("inf"))
        totals = tl.load(TOTALS + at, mask=there, other=0.0)
        values = load_rows(SUMS, at * V_DIM, there, v_dims, V_DIM, BLOCK_DV, True)
        higher = tl.maximum(top, tl.max(tops, 0))
        # A row that no part has seen a key of: anything finite keeps its weights 0 instead of not a number.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        weights, fade = power(tops - shift, NATURAL), power(top - shift, NATURAL)
        total = total * fade + tl.sum(weights * totals, 0)
        sums = sums * fade + tl.sum(weights[:, None] * values, 0)
        top = higher
    seen = total > 0
    out = sums / tl.where(seen, total, 1.0)
    pointers = OUT + batch * out_batch + head * out_head + row * out_row + v_dims
    tl.store(pointers, out.to(OUT.dtype.element_ty), mask=v_dims < V_DIM)
    lse = top + logarithm(tl.where(seen, total, 1.0), NATURAL)
    tl.store(LSE + place, lse if NATURAL else lse * LN_2)
