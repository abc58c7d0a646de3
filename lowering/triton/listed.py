"""The walk along lists of blocks, where a pattern names block by block what a tile visits; and the steps of any walk.

The positions of a line's blocks, one after the other, are numbered through: blocks in which every pair counts come first, so
that what needs no mask is one run of numbers. A visit takes SIZE of them, of one block or of several.
"""

import triton
import triton.language as tl

from dilcompile.lowering.triton.walk import FAR, blocks_of, bounds, met, part_of_term

LINE_COLUMNS = tl.constexpr(3)


@triton.jit
def visited(n, number, LINE, origin, start, high, count, BLOCKS: tl.constexpr, SIZE: tl.constexpr, MASKED: tl.constexpr):
    """(positions, which there are) of the n-th visit; number: those of its SIZE positions.

    LINE: where the blocks start, each of BLOCKS positions, counted from origin; count: positions in all of them; high: the first
    position behind those that there are.
    """
    if BLOCKS % SIZE == 0:
        first = start + n * SIZE
        x = tl.load(LINE + first // BLOCKS) + (first % BLOCKS + origin) + number
        inside = x < high
    else:
        at = start + n * SIZE + number
        inside = at < count
        x = tl.load(LINE + at // BLOCKS, mask=inside, other=FAR) if MASKED else tl.load(LINE + at // BLOCKS)
        x += at % BLOCKS + origin
        inside = inside & (x < high)
    return x, inside


@triton.jit
def line_of(LINES, ENTRIES, number, stop, BLOCKS: tl.constexpr, SIZE: tl.constexpr, CUT: tl.constexpr):
    """(LINE, positions, visits, visits without a mask) of the line with this number; CUT: of its blocks that start below stop,
    which are in ascending order, all of them with a mask."""
    row = LINES + number * LINE_COLUMNS
    begin, full, total = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    LINE = ENTRIES + begin
    if CUT:
        low = begin * 0
        while low < total:
            middle = (low + total) // 2
            below = tl.load(LINE + middle) < stop
            low, total = tl.where(below, middle + 1, low), tl.where(below, total, middle)
    return LINE, total * BLOCKS, tl.cdiv(total * BLOCKS, SIZE), full * BLOCKS // SIZE


@triton.jit
def run_at(STARTS, ENDS, at, last, OWN_BLOCK: tl.constexpr):
    """(start of the document, its end, line, where the run ends) of the positions from ``at`` to ``last`` at most that are in one
    document and one line of its blocks."""
    origin, finish = tl.load(STARTS + at), tl.load(ENDS + at)
    line = (at - origin) // OWN_BLOCK
    return origin, finish, line, tl.minimum(tl.minimum(finish, origin + (line + 1) * OWN_BLOCK), last + 1)


@triton.jit
def steps_of(STARTS, ENDS, num_terms, first, last, k_len, DEDUPE: tl.constexpr, OWN_BLOCK: tl.constexpr):
    """(steps of the walk of a tile, where the first run begins): a step is a term, a part of one, or with lists and documents a
    run of the tile's positions."""
    steps, begin = num_terms * (2 if DEDUPE else 1), first
    if OWN_BLOCK > 0 and STARTS is not None:
        begin, last = tl.maximum(first, 0), tl.minimum(last, k_len - 1)
        steps, at = begin * 0, begin
        while at <= last:
            _, _, _, at = run_at(STARTS, ENDS, at, last, OWN_BLOCK)
            steps += 1
    return steps, begin


@triton.jit
def step_of(
    step, at, TERMS, RESIDUES, LINES, ENTRIES, STARTS, ENDS, LIMITS, line, kv_head, kv_heads, first_head, last_head,
    first, last, begin, end, k_len, position,
    TRANSPOSED: tl.constexpr, DEDUPE: tl.constexpr, OWN_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, SIZE: tl.constexpr,
    PART=None,
):  # fmt: skip
    """What a tile visits in one step of its walk.

    Args:
        at: where the run of this step begins, with lists and documents. line: of the tile, with lists alone.
        LINES: the lists of the tile's heads. begin, end: of the other side. position: those of the tile's rows.

    Returns:
        term; LINE, origin, start, high: see ``visited``; the rate of the term, or the count of ``visited``; visits, those from
        full_from to before full_to without a mask; row_low, row_high: ``bounds`` of the rows; where the next run begins.
    """
    if BLOCKS == 0:
        term = step // (2 if DEDUPE else 1)
        low, high, inner_low, inner_high, rate = part_of_term(
            TERMS, RESIDUES, term, step % (2 if DEDUPE else 1), kv_head, kv_heads, first_head, last_head, first, last, begin, end,
            TRANSPOSED, DEDUPE,
        )  # fmt: skip
        if LIMITS is not None:
            inner_high = inner_low
        if PART is not None:
            first, rate, there = met(PART, term, first, begin, rate, TRANSPOSED)
            high = tl.where(there, high, low)
        start, visits, full_from, full_to = blocks_of(low, high, inner_low, inner_high, rate, first, SIZE)
        row_low, row_high, _, _ = bounds(TERMS, RESIDUES, term, kv_head, kv_heads, position, TRANSPOSED)
        return term, TERMS, 0, start, high, rate, visits, full_from, full_to, row_low, row_high, at
    else:
        start, full_from, origin, high, behind = 0, 0, 0, end, at
        if STARTS is not None:
            origin, finish, line, behind = run_at(STARTS, ENDS, at, tl.minimum(last, k_len - 1), OWN_BLOCK)
            # The first line of the lists is that of positions that are in no block.
            line, high = line + 1, tl.minimum(end, finish)
        LINE, rate, visits, full_to = line_of(LINES, ENTRIES, line, high - origin, BLOCKS, SIZE, STARTS is not None)
        row_low, row_high, _, _ = bounds(TERMS, RESIDUES, 0, kv_head, kv_heads, position - origin, TRANSPOSED)
        if STARTS is not None:
            row_high = tl.where((position >= at) & (position < behind), row_high, row_low)
        if LIMITS is not None or STARTS is not None:
            full_to = 0
        return 0, LINE, origin, start, high, rate, visits, full_from, full_to, row_low, row_high, behind
