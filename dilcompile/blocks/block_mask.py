"""Patterns as the ``BlockMask`` of ``torch.nn.attention.flex_attention``, and back.

The tables of a BlockMask are dense: two int32 numbers for each block of the grid and head by rows, two by columns, whether it
counts or not. The conversion adds one byte a block (what ``mask_mod`` looks up); beyond that it takes time and memory of the
blocks that count.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from dilcompile.blocks.cells import with_pairs
from dilcompile.blocks.grid import Flags, Grid
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Explicit, Pattern
from dilcompile.errors import FormError
from dilcompile.progression import Positions

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
Table = npt.NDArray[np.int32]
_PAIRS_AT_ONCE = 1 << 22


def to_block_mask(pattern: Pattern, grid: Grid, heads: int, device: torch.device | str = "cpu") -> BlockMask:
    """The pairs of a pattern within the limits of the grid, for one batch row; heads that don't differ share one table.

    Args:
        grid: its first query is query 0 of the BlockMask.
        heads: number of query heads.

    Raises:
        FormError: if the first query does not begin a block: FlexAttention's blocks do.
    """
    _begins_a_block(grid)
    lists = [lists_of(pattern.codes(head, grid.rows, grid), grid) for head in range(heads if pattern.by_head else 1)]
    make: Callable[..., BlockMask] = BlockMask
    return make(
        (grid.q_stop - grid.q_start, grid.k_len),
        *tables_of(lists, grid, device),
        BLOCK_SIZE=(grid.q_block, grid.k_block),
        mask_mod=_mask_mod(held_of(lists, grid, device), grid),
    )


def held_of(lists: Sequence[BlockLists], grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Which blocks each head has, bool [heads, rows, columns]; rows count from that of the first query."""
    held = np.zeros((len(lists), len(grid.rows), grid.columns), dtype=np.bool_)
    for head, each in enumerate(lists):
        held[head, each.owners() - grid.q_start // grid.q_block, each.blocks] = True
    return torch.from_numpy(held).to(device)


def full_of(lists: Sequence[BlockLists], grid: Grid, device: torch.device | str = "cpu") -> Tensor:
    """Which of them FlexAttention calls full, as ``held_of`` has them."""
    return held_of([_only(each, each.full & _inside(each, grid)) for each in lists], grid, device)


def _only(lists: BlockLists, kept: Flags) -> BlockLists:
    starts = np.concatenate([[0], np.cumsum(kept)])[lists.starts]
    return BlockLists(lists.lines, starts, lists.blocks[kept], lists.full[kept])


def tables_of(lists: Sequence[BlockLists], grid: Grid, device: torch.device | str = "cpu") -> tuple[Tensor, ...]:
    """The tables of a BlockMask: how many partial blocks each row has and which, the same of full ones, then both by columns.

    Args:
        lists: of each head, or of all; blocks without any pair are left out.
        grid: its first query begins a block.

    Returns:
        Eight int32 tensors, counts [1, heads, lines] and numbers [1, heads, lines, lines of the other side] in turns, ordered
        as ``BlockMask`` takes them.
    """
    lists, columns = [with_pairs(each, grid) for each in lists], np.arange(grid.columns, dtype=np.int64)
    first, rows = grid.q_start // grid.q_block, len(grid.rows)
    by_row, by_column = [], []
    for each in lists:
        whole, turned = each.full & _inside(each, grid), each.transposed(columns)
        by_row.append(_tables(each.owners() - first, each.blocks, whole, rows, grid.columns))
        whole = turned.full & _inside(turned, grid, turned=True)
        by_column.append(_tables(turned.owners(), turned.blocks - first, whole, grid.columns, rows))
    return (*_stacked(by_row, device), *_stacked(by_column, device))


def _begins_a_block(grid: Grid) -> None:
    if grid.q_start % grid.q_block:
        raise FormError(
            f"a BlockMask counts blocks from the first query: q_offset {grid.q_start} is no multiple of the {grid.q_block} "
            "queries of a block; pad the queries, or choose a block that divides the offset"
        )


def _inside(lists: BlockLists, grid: Grid, turned: bool = False) -> Flags:
    """Whether each block ends before the sequences do: FlexAttention calls a block full only if no padding is in it."""
    rows, columns = (lists.blocks, lists.owners()) if turned else (lists.owners(), lists.blocks)
    found: Flags = ((rows + 1) * grid.q_block <= grid.q_stop) & ((columns + 1) * grid.k_block <= grid.k_len)
    return found


def _tables(lines: Positions, blocks: Positions, full: Flags, num_lines: int, width: int) -> list[Table]:
    """How many partial blocks each line has, and which; then the same of the full ones."""
    found: list[Table] = []
    for kept in (~full, full):
        owners = lines[kept]
        counts = np.bincount(owners, minlength=num_lines)
        place = np.arange(len(owners)) - np.repeat(np.cumsum(counts) - counts, counts)
        indices = np.zeros((num_lines, width), dtype=np.int32)
        indices[owners, place] = blocks[kept]
        found += [counts.astype(np.int32), indices]
    return found


def _stacked(heads: list[list[Table]], device: torch.device | str) -> tuple[Tensor, ...]:
    return tuple(torch.from_numpy(np.stack(each)[None]).to(device) for each in zip(*heads, strict=True))


def _mask_mod(held: Tensor, grid: Grid) -> MaskMod:
    heads, q_block, k_block, offset, left, right = len(held), grid.q_block, grid.k_block, grid.q_start, grid.left, grid.right

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        found = held[h if heads > 1 else torch.zeros_like(h), q_idx // q_block, kv_idx // k_block]
        ahead = kv_idx - q_idx - offset
        if left is not None:
            found = found & (ahead >= -left)
        if right is not None:
            found = found & (ahead <= right)
        return found

    return mask_mod


def explicit_of(mask: BlockMask, grid: Grid) -> list[Explicit]:
    """The listed blocks of a BlockMask as patterns that, within the limits of the grid, hold the same pairs.

    One for each head, or one for all where they don't differ.

    The tables say which blocks count, as in FlexAttention's kernels; ``mask_mod`` is asked in the partial ones only. A pattern
    holds whole blocks, so inside of those ``mask_mod`` must hide what the limits hide, and nothing else.

    Args:
        grid: the site's own limits at the lengths and block sizes of ``mask``.

    Raises:
        FormError: if no such patterns exist: batch rows differ, or a mask stands inside a block; or if the first query does not
            begin a block.
    """
    _begins_a_block(grid)
    partial = _of_heads(mask, mask.kv_indices, mask.kv_num_blocks)
    full = None
    if mask.full_kv_indices is not None and mask.full_kv_num_blocks is not None:
        full = _of_heads(mask, mask.full_kv_indices, mask.full_kv_num_blocks)
    none = np.zeros((0, 2), dtype=np.int64)
    found = [_explicit(mask, part, none if full is None else full[head], head, grid) for head, part in enumerate(partial)]
    return found[:1] if all(one == found[0] for one in found) else found


def _explicit(mask: BlockMask, partial: Positions, full: Positions, head: int, grid: Grid) -> Explicit:
    """The blocks of one head, from its (row, column) entries."""
    first = grid.q_start // grid.q_block
    _whole_within(full, grid, first)
    kept = np.concatenate([full, partial[_agrees(mask, partial, head, grid, first)]])
    codes = np.unique((kept[:, 0] + first) * grid.columns + kept[:, 1])
    rows, columns = np.divmod(codes, max(1, grid.columns))
    starts = np.searchsorted(rows, np.arange(first + mask.kv_num_blocks.shape[-1] + 1))
    return Explicit(tuple(starts.tolist()), tuple(columns.tolist()))


def _of_heads(mask: BlockMask, indices: Tensor, counts: Tensor) -> list[Positions]:
    """The (row, column) of each entry, int64 [entries, 2], of each head; batch rows must be alike."""
    num_rows, width = indices.shape[-2:]
    batch, heads = (1, 1, *indices.shape[:-2])[-2:]
    indices, counts = indices.reshape(batch, heads, num_rows, width).cpu(), counts.reshape(batch, heads, num_rows).cpu()
    there = torch.arange(width) < counts[..., None]
    sorted_ones = torch.where(there, indices, width).sort(-1).values
    if (sorted_ones != sorted_ones[:1]).any():
        raise FormError(
            f"a BlockMask of shape {tuple(mask.shape)} has other blocks in another batch row; a pattern is one for all batch rows"
        )
    return [_entries(indices[0, head], counts[0, head]) for head in range(heads)]


def _entries(indices: Tensor, counts: Tensor) -> Positions:
    """The (row, column) of each entry, int64 [entries, 2]."""
    row, place = (torch.arange(indices.shape[-1]) < counts[:, None]).nonzero(as_tuple=True)
    found: Positions = torch.stack([row, indices[row, place].long()], dim=1).numpy()
    return found


def _whole_within(full: Positions, grid: Grid, first: int) -> None:
    wrong = np.flatnonzero(~grid.full(full[:, 0] + first, full[:, 1]))
    if len(wrong):
        row, column = full[wrong[0]].tolist()
        raise FormError(
            f"block (row {row}, column {column}) of the BlockMask is full, but the site's own mask hides pairs in it: "
            "give the limits (is_causal, window_left, window_right) that the BlockMask was made with"
        )


def _agrees(mask: BlockMask, blocks: Positions, head: int, grid: Grid, first: int) -> Flags:
    """Which partial blocks of a head have pairs at all.

    Raises:
        FormError: if ``mask_mod`` and the limits differ in a block that has pairs.
    """
    some = np.zeros(len(blocks), dtype=np.bool_)
    step = max(1, _PAIRS_AT_ONCE // (grid.q_block * grid.k_block))
    batch = (1, 1, *mask.kv_indices.shape[:-2])[-2]
    for start in range(0, len(blocks), step):
        part = torch.from_numpy(blocks[start : start + step])
        q = part[:, :1] * grid.q_block + torch.arange(grid.q_block)
        k = part[:, 1:] * grid.k_block + torch.arange(grid.k_block)
        inside = (q < grid.q_stop - grid.q_start)[:, :, None] & (k < grid.k_len)[:, None, :]
        wanted = inside & _within(q + grid.q_start, k, grid)
        for b in range(batch):
            seen = inside & _asked(mask, b, head, q.clamp(max=grid.q_stop - grid.q_start - 1), k.clamp(max=grid.k_len - 1))
            _refuse_mask_inside(seen, wanted, part, grid)
            some[start : start + step] |= seen.flatten(1).any(1).numpy()
    return some


def _within(t: Tensor, k: Tensor, grid: Grid) -> Tensor:
    """What the limits let through, bool [blocks, queries, keys]."""
    ahead = k[:, None, :] - t[:, :, None]
    found = torch.ones_like(ahead, dtype=torch.bool)
    if grid.left is not None:
        found &= ahead >= -grid.left
    if grid.right is not None:
        found &= ahead <= grid.right
    return found


def _asked(mask: BlockMask, b: int, h: int, q: Tensor, k: Tensor) -> Tensor:
    """``mask_mod``, which takes one pair, at each pair of the blocks, bool [blocks, queries, keys]."""
    device = mask.kv_indices.device
    by_key = torch.vmap(mask.mask_mod, in_dims=(None, None, None, 0))
    by_block = torch.vmap(torch.vmap(by_key, in_dims=(None, None, 0, None)), in_dims=(None, None, 0, 0))
    at = (torch.tensor(b, device=device), torch.tensor(h, device=device), q.to(device), k.to(device))
    found: Tensor = by_block(*at)
    return found.cpu()


def _refuse_mask_inside(seen: Tensor, wanted: Tensor, blocks: Tensor, grid: Grid) -> None:
    """Raise unless each block is empty, or holds what the limits let through."""
    wrong = ((seen != wanted) & seen.flatten(1).any(1)[:, None, None]).nonzero()
    if len(wrong):
        n, q, k = wrong[0].tolist()
        row, column = blocks[n].tolist()
        raise FormError(
            f"block (row {row}, column {column}) of the BlockMask: its mask_mod "
            f"{'hides' if wanted[n, q, k] else 'shows'} the pair of query {row * grid.q_block + q} and key "
            f"{column * grid.k_block + k}, the site's own mask does not; a pattern holds whole blocks, so that what is "
            "hidden inside of one must be what the site's own mask (is_causal, window_left, window_right) hides; give these "
            "limits, or make the BlockMask with the BLOCK_SIZE at whose borders its mask_mod changes"
        )
