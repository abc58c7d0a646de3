"""Scores of a block of pairs, as every kernel computes them: scaled, capped, with their bias, masked.

Scores are in base 2. With a bias they are in base e (``NATURAL``): a fill such as the lowest number that the dtype has would
become minus infinity by the factor between the two, and its rows would hold no keys.
"""

import triton
import triton.language as tl

from dilcompile.lowering.triton.listed import visited
from dilcompile.lowering.triton.walk import COLUMNS, FAR, block_at, bounds, floor_mod, has_heads, part_of_queries

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def tanh(x):
    """The quotient of exponentials loses digits near 0, where the series has them: the nearer the more digits there are."""
    near: tl.constexpr = 0.4 if x.dtype == tl.float32 else 0.1
    square = x * x
    tail = -0.05396825396825397 + square * (0.021869488536155203 - square * 0.008863235529902197)
    series = x + x * square * (-0.3333333333333333 + square * (0.13333333333333333 + square * tail))
    return tl.where(tl.abs(x) < near, series, 1 - 2 / (tl.exp2(x * (2 * LOG2_E)) + 1))


@triton.jit
def rows_of_tile(first, stride, end, PACK: tl.constexpr, SIZE: tl.constexpr):
    """(t, member, there): positions of a tile's rows; PACK query heads stand beside each other at each position."""
    row = tl.arange(0, SIZE)
    number = row // PACK
    t = first + number * stride
    return t, row % PACK, (number < SIZE // PACK) & (t < end)


@triton.jit
def tile_of_queries(
    number, TILES, PATTERNS, num_tiles, q_offset, q_len, GROUP: tl.constexpr, PACK: tl.constexpr, BLOCK_M: tl.constexpr,
    Q_BLOCK: tl.constexpr = 0, PART=None,
):  # fmt: skip
    """(key head, batch row, first and last query head, first and last position, positions, query heads, which there are, block
    row) of this program's tile, which has this number in its pattern; the first position of a tile that is none is ``FAR``."""
    kv_head, batch = tl.program_id(1) // (GROUP // PACK), tl.program_id(2).to(tl.int64)
    first_head = kv_head * GROUP + tl.program_id(1) % (GROUP // PACK) * PACK
    tile = TILES + (tl.load(PATTERNS + kv_head) * num_tiles + number) * 2
    first, stride, line = tl.load(tile), tl.load(tile + 1), 0
    end, _ = part_of_queries(PART, q_offset, q_len)
    if Q_BLOCK > 0:
        line, stride = stride, 1
        end = tl.minimum(end, (line + 1) * Q_BLOCK)
    last = tl.minimum(first + (BLOCK_M // PACK - 1) * stride, first + (end - 1 - first) // stride * stride)
    position, member, there = rows_of_tile(first, stride, end, PACK, BLOCK_M)
    return kv_head, batch, first_head, first_head + PACK - 1, first, last, position, first_head + member, there, line


@triton.jit
def unfolded(batch, head, row, FOLD: tl.constexpr):
    """Strides in elements. A launch gives them times FOLD, so that all are multiples of 16 whatever the length is: what they are
    multiples of is all that the compiler has to know to load whole vectors, and it compiles for nothing else of them."""
    return batch // FOLD, head // FOLD, row // FOLD


@triton.jit
def described(base, stride, start, rate, end, DIM: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """The rows before ``end`` of the residue class of ``start`` as one tensor [rows, DIM], of which a unit of the GPU (TMA) loads
    ROWS at a time: row n lies at n * rate + start % rate. What is behind the last row is 0."""
    residue = start % rate
    rows = tl.maximum(tl.cdiv(end - residue, rate), 1)
    first, step = base + residue.to(tl.int64) * stride, rate.to(tl.int64) * stride
    return tl.make_tensor_descriptor(first, [rows, DIM], [step, 1], [ROWS, BLOCK])


@triton.jit
def load_rows(base, row_offset, there, dims, DIM: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    """Rows [rows, BLOCK] with zeros where there are none; 64-bit offsets."""
    pointers = base + row_offset[:, None] + dims[None, :]
    if MASKED:
        if DIM == BLOCK:
            return tl.load(pointers, mask=there[:, None], other=0.0)
        return tl.load(pointers, mask=there[:, None] & (dims < DIM)[None, :], other=0.0)
    if DIM == BLOCK:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dims < DIM)[None, :], other=0.0)


@triton.jit
def facts_of_queries(t, row, there, STARTS, LIMITS, limit_stride, k_len):
    """(position in its document, start of that, first key, end of keys) of query rows at positions t; what is not asked for
    is t."""
    relative, document, limit_low, limit_high = t, t, t, t
    if STARTS is not None:
        known = there & (t >= 0) & (t < k_len)
        document = tl.load(STARTS + t, mask=known, other=-2)
        relative = t - tl.maximum(document, 0)
    if LIMITS is not None:
        limit_low = tl.load(LIMITS + row, mask=there, other=0)
        limit_high = tl.load(LIMITS + limit_stride + row, mask=there, other=0)
    return relative, document, limit_low, limit_high


@triton.jit
def facts_of_keys(k, inside, STARTS, PADDING, padding_stride):
    """(position in its document, start of that, whether it is kept) of key positions k; the first of hidden keys is ``FAR``."""
    relative, document, keep = k, k, inside
    if PADDING is not None:
        keep = tl.load(PADDING + k.to(tl.int64) * padding_stride, mask=inside, other=0) != 0
    if STARTS is not None:
        document = tl.load(STARTS + k, mask=inside, other=-1)
        relative = k - document
    return tl.where(keep, relative, FAR), document, keep


@triton.jit
def power(x, NATURAL: tl.constexpr):
    """What weighs a score, to the base that scores have."""
    return tl.exp(x) if NATURAL else tl.exp2(x)


@triton.jit
def logarithm(x, NATURAL: tl.constexpr):
    """The inverse of ``power``."""
    return tl.log(x) if NATURAL else tl.log2(x)


@triton.jit
def is_rough(lse):
    """Whether an LSE is so large that its digits say little of the sum: weights made from it would be off by a thousandth."""
    most: tl.constexpr = 8000.0 if lse.dtype == tl.float32 else 4.0e12
    return (tl.abs(lse) > most) & (tl.abs(lse) < float("inf"))


@triton.jit
def capped(s, scale, softcap, CAPPED: tl.constexpr):
    """Scores from products, and the slope of the cap: ``scale`` holds the factor of the base, without a cap."""
    if CAPPED:
        bent = tanh(s * scale)
        return bent * softcap, 1 - bent * bent
    return s * scale, s


@triton.jit
def bias_of_tile(BIAS, at, there, BIAS_BY: tl.constexpr, OWN: tl.constexpr, SCORES: tl.constexpr):
    """What a tile's rows keep of the bias for all blocks: its numbers, where it has one for each of them, else their offsets.

    OWN: ``rows`` or ``keys``, what the tile holds. A row that is none has the offset 0, where there is a number.
    """
    kept = at
    if BIAS is not None:
        kept = tl.load(BIAS + at, mask=there, other=0.0).to(SCORES) if BIAS_BY == OWN else tl.where(there, at, 0)
    return kept


@triton.jit
def biased(s, BIAS, of_tile, at, there, BIAS_BY: tl.constexpr, OWN: tl.constexpr, MASKED: tl.constexpr):
    """Scores [tile, block] with their bias: ``of_tile`` is ``bias_of_tile``, ``at`` are the offsets of the block."""
    if BIAS is not None:
        if BIAS_BY == OWN:
            s += of_tile[:, None]
        elif BIAS_BY == "pairs":
            pointers = BIAS + of_tile[:, None] + at[None, :]
            s += (tl.load(pointers, mask=there[None, :], other=0.0) if MASKED else tl.load(pointers)).to(s.dtype)
        else:
            s += (tl.load(BIAS + at, mask=there, other=0.0) if MASKED else tl.load(BIAS + at)).to(s.dtype)[None, :]
    return s


@triton.jit
def masked(
    s, TERMS, RESIDUES, num_terms, term, kv_head, kv_heads, low, high, x, y, h, x_document, y_document, key, limit_low,
    limit_high,
    STARTS, LIMITS, HEADS: tl.constexpr, DEDUPE: tl.constexpr, COUNTED: tl.constexpr, TRANSPOSED: tl.constexpr,
    NATURAL: tl.constexpr,
):  # fmt: skip
    """Scores [x, y] of a tile's rows x and a block's positions y, minus infinity where a pair does not count.

    y is ``FAR`` where there is nothing. low, high: ``bounds`` of the rows in this term. h, limit_low and limit_high are those of
    the queries and broadcast with s, like key, the position of the keys. COUNTED: all terms at once, plus the logarithm of how
    often each pair counts.
    """
    if COUNTED:
        found = tl.zeros(s.shape, tl.int32)
        for each in range(num_terms):
            low, high, rate, residue = bounds(TERMS, RESIDUES, each, kv_head, kv_heads, x, TRANSPOSED)
            held = (y[None, :] >= low[:, None]) & (y[None, :] < high[:, None])
            held = held & (floor_mod(y, rate)[None, :] == residue[:, None])
            if HEADS:
                held = held & has_heads(TERMS, each, h)
            if DEDUPE:
                held = held & ((found == 0) | (tl.load(TERMS + each * COLUMNS + 7) == 0))
            found += held.to(tl.int32)
        s = tl.where(found > 0, s + logarithm(tl.maximum(found, 1).to(s.dtype), NATURAL), -float("inf"))
    else:
        s = tl.where((y[None, :] >= low[:, None]) & (y[None, :] < high[:, None]), s, -float("inf"))
        if HEADS:
            s = tl.where(has_heads(TERMS, term, h), s, -float("inf"))
        if DEDUPE:
            for each in range(term * tl.load(TERMS + term * COLUMNS + 7)):
                low, high, rate, residue = bounds(TERMS, RESIDUES, each, kv_head, kv_heads, x, TRANSPOSED)
                held = (y[None, :] >= low[:, None]) & (y[None, :] < high[:, None])
                held = held & (floor_mod(y, rate)[None, :] == residue[:, None])
                if HEADS:
                    held = held & has_heads(TERMS, each, h)
                s = tl.where(held, -float("inf"), s)
    if STARTS is not None:
        s = tl.where(x_document[:, None] == y_document[None, :], s, -float("inf"))
    if LIMITS is not None:
        s = tl.where((key >= limit_low) & (key < limit_high), s, -float("inf"))
    return s


@triton.jit
def places_of_keys(k, inside, k_row, v_row, PAGES, num_pages, k_page, v_page, PAGE_SIZE: tl.constexpr):
    """(offsets of the keys at positions k, offsets of their values, which can be loaded). PAGES: the numbers of a batch row's
    pages; keys of what is no page can't be loaded."""
    slot, there = k.to(tl.int64), inside
    k_at, v_at = slot * k_row, slot * v_row
    if PAGES is not None:
        page, slot = tl.load(PAGES + k // PAGE_SIZE, mask=inside, other=-1).to(tl.int64), (k % PAGE_SIZE).to(tl.int64)
        k_at, v_at, there = page * k_page + slot * k_row, page * v_page + slot * v_row, inside & (page >= 0) & (page < num_pages)
    return k_at, v_at, there


@triton.jit
def scores_of_keys(
    n, q, K, V, k_row, v_row, dims, v_dims,
    TERMS, RESIDUES, STARTS, LIMITS, PADDING, padding_stride, num_terms, term, kv_head, kv_heads,
    t, document, h, limit_low, limit_high, row_low, row_high, scale, softcap, BIAS, bias, bias_key,
    full_from, full_to, start, high, rate, LINE, origin,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCKS: tl.constexpr, CAPPED: tl.constexpr, BIAS_BY: tl.constexpr, HEADS: tl.constexpr, DEDUPE: tl.constexpr,
    COUNTED: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, SCORES: tl.constexpr,
    PAGES=None, num_pages=0, k_page=0, v_page=0, PAGE_SIZE: tl.constexpr = 1, KEYS=None, VALUES=None,
    PART=None, key_row=0, row_rate=0,
):  # fmt: skip
    """(scores, slope of the cap, k, keys, values) of a tile of queries and the n-th block of keys, at positions k. Of a part of
    the keys, ``key_row`` is the row at ``start``, and rows ``rate`` positions apart are ``row_rate`` apart."""
    if BLOCKS == 0:
        number = block_at(n, full_from, full_to, MASKED) * BLOCK_N + tl.arange(0, BLOCK_N)
        k = start + number * rate
        inside = k < high
        slot = k
        if PART is not None:
            slot = key_row + number * row_rate
    else:
        visit = block_at(n, full_from, full_to, MASKED)
        k, inside = visited(visit, tl.arange(0, BLOCK_N), LINE, origin, start, high, rate, BLOCKS, BLOCK_N, MASKED)
        slot = k
    k_at, v_at, there = places_of_keys(slot, inside, k_row, v_row, PAGES, num_pages, k_page, v_page, PAGE_SIZE)
    partly: tl.constexpr = MASKED or PAGES is not None
    if KEYS is not None:
        row = start // rate + block_at(n, full_from, full_to, MASKED) * BLOCK_N
        keys = KEYS.load([row, 0]).to(q.dtype)
        values = VALUES.load([row, 0])
    else:
        keys = load_rows(K, k_at, there, dims, HEAD_DIM, BLOCK_D, partly).to(q.dtype)
        values = load_rows(V, v_at, there, v_dims, V_DIM, BLOCK_DV, partly)
    s = tl.dot(q, tl.trans(keys), input_precision=PRECISION, out_dtype=SCORES)
    s, slope = capped(s, scale, softcap, CAPPED)
    s = biased(s, BIAS, bias, k.to(tl.int64) * bias_key, inside, BIAS_BY, "rows", MASKED)
    if MASKED:
        y, k_document, _ = facts_of_keys(k, inside, STARTS, PADDING, padding_stride)
        s = masked(
            s, TERMS, RESIDUES, num_terms, term, kv_head, kv_heads, row_low, row_high, t, y, h[:, None], document, k_document,
            k[None, :], limit_low[:, None], limit_high[:, None], STARTS, LIMITS, HEADS, DEDUPE, COUNTED, False,
            BIAS is not None,
        )  # fmt: skip
    elif PADDING is not None:
        _, _, keep = facts_of_keys(k, inside, STARTS, PADDING, padding_stride)
        s = tl.where(keep[None, :], s, -float("inf"))
    return s, slope, k, keys, values


@triton.jit
def mixed(x):
    """The mixer of ``lowering/dropout.py``, in the arithmetic modulo 2**32 of uint32."""
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def row_state(SEED, batch, h, t, PART=None):
    """What the queries (batch, h, t) put into the draws of their pairs: uint32, like h and t. A part may have heads before it."""
    seed = tl.load(SEED)
    if PART is not None:
        h += tl.load(PART + 4)
    state = mixed(seed.to(tl.uint32)) ^ mixed((seed >> 32).to(tl.uint32) + 0x9E3779B9)
    state = mixed(state + batch.to(tl.uint32) * 0x85EBCA6B)
    state = mixed(state + h.to(tl.uint32) * 0xC2B2AE35)
    return mixed(state + t.to(tl.uint32))


@triton.jit
def dropped(x, state, k, least):
    """x with 0 for the pairs that are drawn to be dropped; ``row_state`` and keys k broadcast to its shape.

    least: the least draw that is kept, less 2**31, so that it fits in 32 bits.
    """
    drawn = mixed(state ^ mixed(k.to(tl.uint32) + 0x27D4EB2F))
    return tl.where(drawn.to(tl.int64) - 0x80000000 >= least, x, 0.0)
