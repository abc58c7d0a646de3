"""Which positions of the other side a tile visits, and which pairs count. Shared by all kernels.

A kernel's tile holds positions of one side (``first`` to ``last``, one residue class) and walks the other side: queries walk
keys, and in the backward keys walk queries (``TRANSPOSED``). A term is one row of ``Plan.terms``.
"""

import triton
import triton.language as tl

# More than any position and its negative; two of them added fit in 32 bits.
FAR = tl.constexpr(1 << 30)
COLUMNS = tl.constexpr(8)
# Numbers of a part of a sequence before those of its terms, and of a term; see ``parts.numbers_of``.
PART_COLUMNS, PART_OF_TERM = tl.constexpr(5), tl.constexpr(4)
# What changes from call to call: a kernel is compiled once for all of it. The strides of a mask follow the length, and so may the
# address of a slice; those of other operands are multiples of 16 in every call (``scores.unfolded``).
VARYING = [
    *("q_len", "k_len", "q_offset", "num_terms", "num_tiles", "kv_heads", "first_line", "line_head", "map_head", "map_row"),
    *("first_row", "least_drawn", "heads", "batches", "parts", "num_pages"),
    *("document_batch", "limit_batch", "limit_stride", "padding_batch", "padding_stride", "page_batch"),
    *("bias_batch", "bias_head", "bias_row", "bias_key", "LIMITS", "PADDING", "BIAS", "SEED", "PAGES", "GRAD_LSE"),
]


@triton.jit
def floor_mod(x, n):
    """x mod n, not negative (Triton's own has the sign of x)."""
    return (x % n + n) % n


@triton.jit
def part_of_queries(PART, q_offset, q_len):
    """(the first position behind the queries, their distance)."""
    end, step = q_offset + q_len, 1
    if PART is not None:
        step = tl.load(PART + 3)
        end = q_offset + (q_len - 1) * step + 1
    return end, step


@triton.jit
def part_of_keys(PART, k_len):
    """(the first position of the keys, the first behind them, their distance)."""
    begin, end, step = 0, k_len, 1
    if PART is not None:
        begin, end, step = tl.load(PART), tl.load(PART + 1), tl.load(PART + 2)
    return begin, end, step


@triton.jit
def row_of(position, begin, PART, step):
    """The row that stands at a position."""
    row = position - begin
    if PART is not None:
        row = row // step
    return row


@triton.jit
def met(PART, term, first, begin, rate, TRANSPOSED: tl.constexpr):
    """(a position of the residue class of ``first`` modulo rate among the other side's, which begin at ``begin``; the distance of
    such; whether there are any): the Chinese remainder theorem."""
    row = PART + PART_COLUMNS + term * PART_OF_TERM + (2 if TRANSPOSED else 0)
    divisor, inverse, step = tl.load(row), tl.load(row + 1), tl.load(PART + (3 if TRANSPOSED else 2))
    over, gap = step // divisor, begin - first
    steps = floor_mod(floor_mod(gap // divisor, over) * inverse, over)
    return first + steps * rate, rate * over, gap % divisor == 0


@triton.jit
def segment_start(t, length):
    """Where the segment of position t begins; before 0 there is one segment, which holds no key."""
    return tl.where(t < 0, -length, t // length * length)


@triton.jit
def reach(
    TERMS, RESIDUES, term, kv_head, kv_heads, first_head, last_head, first, last, begin, end,
    TRANSPOSED: tl.constexpr, ONE_CLASS: tl.constexpr = True,
):  # fmt: skip
    """(low, high, inner_low, inner_high, rate): positions of the other side from low to before high are paired with some row
    of the tile, those from inner_low to before inner_high with every row of it (of those in the tile's residue class)."""
    row = TERMS + term * COLUMNS
    length, rate = tl.load(row), tl.load(row + 1)
    left, right = tl.load(row + 2), tl.load(row + 3)
    stop, head_start, head_stop = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)
    residue = tl.load(RESIDUES + term * kv_heads + kv_head)
    if TRANSPOSED:
        left, right = right, left
    low, high = tl.maximum(begin, first - left), tl.minimum(end, last + right + 1)
    inner_low, inner_high = tl.maximum(begin, last - left), tl.minimum(end, first + right + 1)
    if length > 0:
        first_segment, last_segment = segment_start(first, length), segment_start(last, length)
        low, high = tl.maximum(low, first_segment), tl.minimum(high, last_segment + length)
        inner_low, inner_high = tl.maximum(inner_low, last_segment), tl.minimum(inner_high, first_segment + length)
    active = (head_start <= last_head) & (head_stop > first_head)
    if ONE_CLASS:
        active = active & ((residue < 0) | (floor_mod(first, rate) == residue))
    if TRANSPOSED:
        if ONE_CLASS:
            active = active & (first < stop)
        inner_high = tl.where(last < stop, inner_high, inner_low)
    else:
        high, inner_high = tl.minimum(high, stop), tl.minimum(inner_high, stop)
    high = tl.where(active, high, low)
    inner_high = tl.where(active & (head_start <= first_head) & (head_stop > last_head), inner_high, inner_low)
    return low, high, inner_low, inner_high, rate


@triton.jit
def part_of_term(
    TERMS, RESIDUES, term, part, kv_head, kv_heads, first_head, last_head, first, last, begin, end,
    TRANSPOSED: tl.constexpr, DEDUPE: tl.constexpr,
):  # fmt: skip
    """``reach`` of one of the two parts of a term: before and behind the pairs that an earlier term holds already."""
    low, high, inner_low, inner_high, rate = reach(
        TERMS, RESIDUES, term, kv_head, kv_heads, first_head, last_head, first, last, begin, end, TRANSPOSED
    )
    if DEDUPE:
        if tl.load(TERMS + term * COLUMNS + 7) == 0:
            high = tl.where(part == 0, high, low)
        else:
            hole_low, hole_high = high, high
            for other in range(term):
                _, _, full_low, full_high, other_rate = reach(
                    TERMS, RESIDUES, other, kv_head, kv_heads, first_head, last_head, first, last, begin, end, TRANSPOSED
                )
                wider = (rate % other_rate == 0) & (full_high - full_low > hole_high - hole_low)
                hole_low, hole_high = tl.where(wider, full_low, hole_low), tl.where(wider, full_high, hole_high)
            high = tl.where(part == 0, tl.minimum(high, hole_low), high)
            low = tl.where(part == 0, low, tl.maximum(low, hole_high))
            inner_low, inner_high = tl.maximum(inner_low, low), tl.minimum(inner_high, high)
            for other in range(term):
                some_low, some_high, _, _, _ = reach(
                    TERMS, RESIDUES, other, kv_head, kv_heads, first_head, last_head, first, last, begin, end, TRANSPOSED
                )
                # Here an earlier term may hold some pairs: they are looked at one by one.
                met = tl.maximum(some_low, inner_low) < tl.minimum(some_high, inner_high)
                inner_high = tl.where(met, inner_low, inner_high)
    return low, high, inner_low, inner_high, rate


@triton.jit
def reach_of_all(
    TERMS, RESIDUES, STARTS, ENDS, num_terms, kv_head, kv_heads, first_head, last_head, first, last, begin, end, k_len,
    TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """(low, high) of all terms together, for a tile of neighbouring rows of any class and, with STARTS, of any document."""
    first_start, last_start = 0, 0
    first_length, last_length = FAR, FAR
    limit_low, limit_high = begin, end
    if STARTS is not None:
        first, last = tl.minimum(tl.maximum(first, 0), k_len - 1), tl.minimum(tl.maximum(last, 0), k_len - 1)
        first_start, last_start = tl.load(STARTS + first), tl.load(STARTS + last)
        first_length, last_length = tl.load(ENDS + first) - first_start, tl.load(ENDS + last) - last_start
        first, last, begin, end = first - first_start, last - last_start, 0, FAR
    low, high = first_length, 0
    for term in range(num_terms):
        term_low, term_high, _, _, _ = reach(
            TERMS, RESIDUES, term, kv_head, kv_heads, first_head, last_head, first, last, begin, end, TRANSPOSED, False
        )
        low, high = tl.minimum(low, term_low), tl.maximum(high, term_high)
    high = tl.minimum(high, last_length)
    return tl.maximum(limit_low, low + first_start), tl.minimum(limit_high, high + last_start)


@triton.jit
def span_of(low, high, begin, PART, step, SIZE: tl.constexpr):
    """(the first position from ``low`` on, blocks of SIZE up to before ``high``) of those that begin at ``begin``."""
    if PART is not None:
        low += floor_mod(begin - low, step)
        return low, tl.cdiv(tl.cdiv(tl.maximum(0, high - low), step), SIZE)
    return low, tl.cdiv(tl.maximum(0, high - low), SIZE)


@triton.jit
def blocks_of(low, high, inner_low, inner_high, rate, first, SIZE: tl.constexpr):
    """(start, blocks, full_from, full_to): blocks of SIZE positions start, start + rate, ... of the tile's class; from full_from
    to before full_to they need no mask."""
    start = low + floor_mod(first - low, rate)
    span = rate * SIZE
    blocks = tl.cdiv(tl.maximum(0, high - start), span)
    full_from = tl.cdiv(tl.maximum(0, inner_low - start), span)
    full_to = tl.cdiv(tl.maximum(0, tl.minimum(inner_high, high) - start), rate) // SIZE
    full_from = tl.minimum(full_from, blocks)
    return start, blocks, full_from, tl.maximum(full_from, full_to)


@triton.jit
def turns(blocks, full_from, full_to, MASKED: tl.constexpr):
    """(begin, end): numbers of a tile's blocks that need a mask (see ``block_at``), or of those that need none."""
    if MASKED:
        return 0, blocks - (full_to - full_from)
    return full_from, full_to


@triton.jit
def block_at(n, full_from, full_to, MASKED: tl.constexpr):
    """The n-th block among those with a mask, or among those without."""
    if MASKED:
        return tl.where(n < full_from, n, n + full_to - full_from)
    return n


@triton.jit
def bounds(TERMS, RESIDUES, term, kv_head, kv_heads, x, TRANSPOSED: tl.constexpr):
    """(low, high, rate, residue): each row x is paired with the other side's positions of its residue class modulo rate, from
    low to before high."""
    row = TERMS + term * COLUMNS
    length, rate = tl.load(row), tl.load(row + 1)
    left, right, stop = tl.load(row + 2), tl.load(row + 3), tl.load(row + 4)
    wanted = tl.load(RESIDUES + term * kv_heads + kv_head)
    residue = floor_mod(x, rate)
    if TRANSPOSED:
        low, high = x - right, tl.minimum(x + left + 1, FAR)
        there = x < stop
    else:
        low, high = tl.maximum(x - left, 0), tl.minimum(x + right + 1, stop)
        there = x < FAR
    if length > 0:
        start = segment_start(x, length)
        low, high = tl.maximum(low, start), tl.minimum(high, start + length)
    there = there & ((wanted < 0) | (residue == wanted))
    return low, tl.where(there, high, low), rate, residue


@triton.jit
def has_heads(TERMS, term, h):
    """Whether a term is one of query heads h."""
    row = TERMS + term * COLUMNS
    return (h >= tl.load(row + 5)) & (h < tl.load(row + 6))
