"""A small call that goes the same ways through a kernel as a given one: which calls are of a class, and what stands for it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dilcompile.blocks.adaptive import Given, capacity
from dilcompile.blocks.heads import in_turns
from dilcompile.generators import Blocks, Generator, Segment, Sinks, Window
from dilcompile.lowering.call import Call, Held
from dilcompile.lowering.pairs import Pairs
from dilcompile.lowering.selection import Selection, adaptive_blocks
from dilcompile.progression import Progression
from dilcompile.relation import Problem, Relation, Term, grid_of

# Blocks of a row that the data chooses.
_LISTED = 4


class _Lengths(NamedTuple):
    """How long things are in a small call.

    Args:
        segment: of a branch of rate 1; others are twice as long, no segment ends where the keys do. before, behind: of windows.
        site_before, site_behind: of the site's own window.
    """

    keys: int
    segment: int
    before: int
    behind: int
    site_before: int
    site_behind: int


# Several tiles of rows and several blocks of keys of every kernel, the last ones ragged.
_ROWS = 136
_USUAL = _Lengths(200, 96, 70, 40, 90, 50)
# Keys of a few rows that are shared out to several programs: two parts at least in what each term holds.
_SHARED = _Lengths(840, 448, 280, 160, 360, 200)
_BATCH = 2
# With fewer rows kernels go other ways, and with so few of a key head over so many keys too; no more query heads count for that.
_FEW_ROWS = 16
_FEW_OF_MANY, _MANY_KEYS = 64, 256
_MOST_GROUPED = 8
# Rows of a residue class: with fewer, kernels may not tile by class any more.
_FINE = 32


@lru_cache(maxsize=1024)
def kinds(relation: Relation) -> str:
    """The class of a relation as text: equal for relations that one small relation stands for."""
    small = _relation(relation)
    size = small.problem
    return f"{small}, {size.q_len} rows from {size.q_offset}, heads {size.heads}/{size.kv_heads}"


def miniature(call: Call) -> Call:
    """A small call of the same class, the same whenever it is made. No random state is touched."""
    relation, device = _relation(call.relation), call.q.device
    held = None if call.held is None else _held(call.held, relation.problem)
    if held is not None:
        relation = relation.at(len(held.queries), relation.problem.k_len, 0)
    size = relation.problem
    num_keys = size.k_len if held is None else len(held.keys)
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def operand(heads: int, length: int, dim: int) -> Tensor:
        return drawn(_BATCH, length, heads, dim).transpose(1, 2)

    # Scores that grow from block to block move the running maximum.
    k = operand(size.kv_heads, num_keys, size.head_dim) * torch.linspace(0, 2, num_keys, dtype=torch.float64)[:, None]
    q, v = operand(size.heads, size.q_len, size.head_dim), operand(size.kv_heads, num_keys, size.v_dim)
    pages = None if call.pages is None else torch.randperm(_BATCH * -(-size.k_len // call.k.shape[2]), generator=generator)
    if pages is not None:
        pages = pages.view(_BATCH, -1)
        k, v = (_in_pages(x, pages, call.k.shape[2]) for x in (k, v))
    keep = torch.rand(_BATCH, size.k_len, generator=generator) > 0.3
    # Some first rows see no key at all.
    keep[0, :5] = False
    documents = (torch.rand(_BATCH, size.k_len, generator=generator) > 0.98).cumsum(1)
    first = torch.randint(0, size.k_len, (_BATCH, size.q_len), generator=generator)
    limits = torch.stack([first, first + torch.randint(0, size.k_len, first.shape, generator=generator)])
    rows, keys = (torch.randint(-2, 3, (2, 1, n), generator=generator).to(device) for n in (size.q_len, size.k_len))
    return replace(
        call,
        q=q.to(device, call.q.dtype),
        k=k.to(device, call.q.dtype),
        v=v.to(device, call.q.dtype),
        key_padding=None if call.key_padding is None else keep.to(device),
        documents=None if call.documents is None else documents[: _several(call.documents.shape[0])].to(device),
        bias=None if call.bias is None else drawn(*_bias_shape(call.bias, size)).to(device, call.bias.dtype),
        dropout_seed=None if call.dropout_seed is None else torch.tensor([11], device=device),
        relation=relation,
        scale=max(1, size.head_dim) ** -0.5,
        softcap=None if call.softcap is None else 2.0,
        dropout_p=0.3 if call.dropout_p > 0 else 0.0,
        row_limits=None if call.row_limits is None else limits[:, : _several(call.row_limits.shape[1])].to(device),
        pairs=None if call.pairs is None else Pairs("g0 | e1", rows, keys),
        pages=None if pages is None else pages.to(device, torch.int32),
        selection=None if call.selection is None else _selection(call.selection, relation, generator, device),
        held=held,
    )


def _held(held: Held, size: Problem) -> Held:
    """Parts of a small sequence: neither the first positions nor the last keys; what has a step has one of 2."""
    q_step, k_step = (min(part.step, 2) for part in (held.queries, held.keys))
    first = 5
    return Held(Progression(first, min(size.k_len, first + size.q_len * q_step), q_step), Progression(3, size.k_len - 20, k_step))


def _selection(held: Selection, relation: Relation, generator: torch.Generator, device: torch.device) -> Selection:
    """Lists of some blocks, for as many batch rows and heads as there were, some of them empty."""
    blocks, size = adaptive_blocks(relation), relation.problem
    assert blocks is not None, "a selection is made for blocks"
    grid = grid_of(size, blocks.grid.q_block, blocks.grid.k_block)
    most = capacity(blocks.pattern, grid, size.heads)
    shape = (_several(held.columns.shape[0]), 1 if held.columns.shape[1] == 1 else size.heads, len(grid.rows))
    order = torch.rand(*shape, grid.columns, generator=generator).argsort(-1)[..., :most].sort(-1).values
    counts = torch.randint(0, most + 1, shape, generator=generator)
    return Selection(order.to(device, torch.int32), counts.to(device, torch.int32))


def _in_pages(x: Tensor, pages: Tensor, size: int) -> Tensor:
    """Keys or values [B, Hkv, Sk, D] as a pool [pages, Hkv, size, D]: page n of batch row b is number ``pages[b, n]``."""
    padded = torch.nn.functional.pad(x, (0, 0, 0, pages.shape[1] * size - x.shape[2]))
    batch, heads, _, dim = padded.shape
    pool = padded.view(batch, heads, -1, size, dim).transpose(1, 2).reshape(-1, heads, size, dim)
    return pool.index_select(0, pages.flatten().argsort())


def _several(rows: int) -> int:
    """As many batch rows as the operand has: one for all, or each its own."""
    return 1 if rows == 1 else _BATCH


def _bias_shape(bias: Tensor, size: Problem) -> tuple[int, ...]:
    whole = (_BATCH, size.heads, size.q_len, size.k_len)[4 - bias.dim() :]
    return tuple(1 if held == 1 else length for held, length in zip(bias.shape, whole, strict=True))


def _relation(relation: Relation) -> Relation:
    size = _problem(relation.problem)
    # Terms that become alike are one.
    terms = dict.fromkeys(Term(_generator(term.generator, relation.problem, size), term.dedupe) for term in relation.terms)
    return Relation(size, tuple(terms))


def _is_shared(size: Problem) -> bool:
    """Are the query rows of a key head so few and the keys so many that these are shared out?"""
    return size.q_len * min(size.group, _MOST_GROUPED) <= _FEW_OF_MANY and size.k_len >= _MANY_KEYS


def _lengths(whole: Problem) -> _Lengths:
    return _SHARED if _is_shared(whole) else _USUAL


def _num_rows(size: Problem) -> int:
    """As many as there are if they are few; else many, or nearly the 16, 32 or 64 that a tile of few has place for."""
    if size.q_len <= _FEW_ROWS // 2 - 1:
        return max(1, size.q_len)
    if not _is_shared(size):
        return _ROWS if size.q_len >= _FEW_ROWS else 7
    grouped = min(size.group, _MOST_GROUPED)
    return next(rows for rows in (16, 32, 64) if size.q_len * grouped <= rows) // grouped - 1


def _problem(size: Problem) -> Problem:
    rows, lengths = _num_rows(size), _lengths(size)
    group = min(size.group, _FEW_OF_MANY if _is_shared(size) else _MOST_GROUPED)
    kv_heads = 2 if group <= _MOST_GROUPED // 2 else 1
    return Problem(
        batch=_BATCH,
        heads=group * kv_heads,
        kv_heads=kv_heads,
        q_len=rows,
        k_len=lengths.keys,
        head_dim=size.head_dim,
        v_dim=size.v_dim,
        q_offset=0 if size.q_offset == 0 else lengths.keys - rows,
        is_causal=size.is_causal,
        window_left=_before(size.window_left, lengths.site_before),
        window_right=_behind(size.window_right, lengths.site_behind),
    )


def _before(limit: int | None, small: int) -> int | None:
    """A limit on what lies before the query; negative: the query itself is left out."""
    return None if limit is None else small if limit >= 0 else -1


def _behind(limit: int | None, small: int) -> int | None:
    """A limit on what lies behind the query; 0, as good as causal, stays 0."""
    return 0 if limit == 0 else _before(limit, small)


def _generator(generator: Generator, whole: Problem, size: Problem) -> Generator:
    lengths = _lengths(whole)
    if isinstance(generator, Segment):
        rate = _rate(generator.rate, whole)
        residues = None if generator.residues is None else tuple(head % rate for head in range(size.kv_heads))
        return Segment(
            lengths.segment if rate == 1 else 2 * lengths.segment, rate, residues, size.group, _half(generator.heads, size.heads)
        )
    if isinstance(generator, Window):
        return Window(_before(generator.left, lengths.before), _behind(generator.right, lengths.behind), min(generator.step, 3))
    if isinstance(generator, Blocks):
        # Chosen by an estimate or by the caller, lists are lists.
        pattern = Given(_LISTED) if generator.adaptive else in_turns(generator.pattern, size.heads)
        return Blocks(grid_of(size, generator.grid.q_block, generator.grid.k_block), pattern, size.group)
    return Sinks(3) if isinstance(generator, Sinks) else generator


def _rate(rate: int, whole: Problem) -> int:
    if rate == 1:
        return 1
    return 4 if rate * _FINE <= max(whole.q_len, whole.k_len) else 64


def _half(heads: tuple[int, int] | None, count: int) -> tuple[int, int] | None:
    """The first heads or the last, as a branch of some heads has them."""
    if heads is None:
        return None
    return (0, -(-count // 2)) if heads[0] == 0 else (count // 2, count)
