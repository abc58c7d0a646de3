"""What the Triton kernels know of a relation: its terms as numbers, and rows cut into tiles of one residue class.

Queries whose residues are alike in every term read the same keys with the same stride. Such a residue class is an arithmetic
progression of positions, a tile is a run of it. Classes refine only as far as the terms need: with rates 1, 2, 4 and a fixed
offset they are the odd positions (only rate 1 is active), every fourth one (rates 1 and 2) and every fourth one (all).

    rates 1, 2, 4, offset 0:   position  0 1 2 3 4 5 6 7        rates 1, 2, 4, offset own:   0 1 2 3 4 5 6 7
                               class     C A B A C A B A                                     A B C D A B C D

Nothing here imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from math import gcd, lcm
from typing import TypeVar

import torch
from torch import Tensor

from dilcompile.generators import Blocks, Everything, Segment, Sinks, Window
from dilcompile.lowering.call import Held
from dilcompile.lowering.triton.lists import Lists, blocks_of, lists_on, map_on
from dilcompile.lowering.triton.parts import numbers_of, unwalkable
from dilcompile.position_sets import meet
from dilcompile.progression import Progression
from dilcompile.relation import Problem, Relation, Term

# Stands for "no limit"; positions stay below it, and sums of two fit in 32 bits.
FAR = 1 << 30
# The columns of ``Plan.terms``.
TERM_COLUMNS = ("length", "rate", "left", "right", "stop", "head_start", "head_stop", "dedupe")
# Classes may leave rows of tiles empty. Where more than this share of rows is for nobody, rows are not cut into classes.
_MOST_ROWS_PER_QUERY = 4
_LARGEST_RATE = 1 << 16


@dataclass(frozen=True)
class Rows:
    """The positions of one side, cut into tiles of ``count`` of them each.

    Args:
        tiles: int32 [patterns, tiles, 2], the first position of each tile and the distance of its positions. ``FAR`` where a
            pattern has fewer tiles than another.
    """

    tiles: Tensor
    count: int


@dataclass(frozen=True)
class Plan:
    """A relation as the kernels read it.

    Args:
        terms: int32 [terms, 8], see ``TERM_COLUMNS``. Keys of a term: in the segment of ``length`` (0: none) of the query, at
            most ``left`` before and ``right`` behind it, below ``stop``, of its residue class modulo ``rate``.
        residues: int32 [terms, key heads]; -1: the query's own class.
        patterns: int32 [key heads], which row of ``Rows.tiles`` a key head has.
        counted: tiles are runs of neighbouring rows and walk their keys once, counting each pair by all terms. Otherwise
            tiles are of one class and walk the keys of term after term.
        dedupes: some term counts only what earlier ones don't hold.
        by_head: some term is not one of all query heads.
        lists: of the blocks that the relation is made of, as the side walks them whose tiles the plan has.
        part: where rows stand that are a part of their sequence, see ``parts.numbers_of``.
    """

    terms: Tensor
    residues: Tensor
    patterns: Tensor
    queries: Rows
    keys: Rows
    counted: bool
    dedupes: bool
    by_head: bool
    lists: Lists | None = None
    part: Tensor | None = None

    @property
    def tables(self) -> tuple[Tensor | None, ...]:
        """What the kernels read of the terms: as numbers, residues, and of blocks their lines and entries."""
        lists = self.lists
        return (self.terms, self.residues, *((None, None) if lists is None else (lists.lines, lists.entries)))

    @property
    def places(self) -> tuple[int, int]:
        """The first line of the lists, and the distance from one query head's to the next one's."""
        return (0, 0) if self.lists is None else (self.lists.first_line, self.lists.line_head)


def unplannable(relation: Relation, held: Held | None = None) -> str | None:
    """Why positions of this relation can't be cut into residue classes, or None."""
    size = relation.problem
    if held is not None:
        if any(isinstance(term.generator, Blocks) for term in relation.terms):
            return "the blocks of a pattern over a part of a sequence"
        if max(held.queries.stop, held.keys.stop) >= FAR // 2:
            return f"positions up to {held.queries.stop} and {held.keys.stop}: they are held in 32 bits, below {FAR // 2}"
        if (reason := unwalkable(held, _rates(relation))) is not None:
            return reason
    if max(size.k_len, size.q_len + abs(size.q_offset)) >= FAR // 2:
        return f"{size.k_len} keys and {size.q_len} queries from {size.q_offset}: positions are held in 32 bits, below {FAR // 2}"
    for term in relation.terms:
        generator = term.generator
        if isinstance(generator, Blocks) and len(relation.terms) > 1:
            return "the blocks of a pattern beside other terms"
        if _rate(term) > _LARGEST_RATE:
            return f"a rate of {_rate(term)}, more than {_LARGEST_RATE}"
        if isinstance(generator, Segment) and generator.length % generator.rate and generator.length < size.k_len:
            return f"segments of {generator.length} with rate {generator.rate}: lengths must be multiples of their rates"
    return None


# Plans that CUDA graphs read each time they are replayed, by their identity.
_captured: dict[int, object] = {}
T = TypeVar("T")


def held(plan: T) -> T:
    """The plan or map, kept for good if a CUDA graph is being captured: the graph holds addresses, not tensors."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        _captured[id(plan)] = plan
    return plan


def _moved(plan: Plan, device: torch.device) -> Plan:
    """The plan with its tensors on a device, there for every stream."""
    queries, keys = (replace(side, tiles=side.tiles.to(device)) for side in (plan.queries, plan.keys))
    terms, residues, patterns = (x.to(device) for x in (plan.terms, plan.residues, plan.patterns))
    part = None if plan.part is None else plan.part.to(device)
    return replace(plan, terms=terms, residues=residues, patterns=patterns, queries=queries, keys=keys, part=part)


def _placed(plan: Plan, device: torch.device) -> Plan:
    """The plan on a device, in memory of its own.

    While Inductor warms up or records a CUDA graph, what its thread allocates comes from the graph's pool, in which nothing may
    stay (``mode: reduce-overhead``); a plan stays in the cache. Hence a thread for it.
    """
    return _elsewhere(lambda: _moved(plan, device), device)


def _elsewhere(make: Callable[[], T], device: torch.device) -> T:
    """What is made on a device, by a thread for it."""
    if device.type == "cpu":
        return make()
    with ThreadPoolExecutor(1) as other:
        return other.submit(make).result()


@lru_cache(maxsize=1024)
def plan_of(
    relation: Relation, queries: int, keys: int, by_document: bool, device: torch.device, part: Held | None = None
) -> Plan:
    """The plan of a relation.

    Args:
        queries, keys: positions in a tile of each side.
        by_document: positions count from the start of each document, which only the device knows.
        device: where its tensors are.
        part: where the rows stand, if they are a part of their sequence.
    """
    size = relation.problem
    of_head = _residues_by_head(relation)
    patterns = sorted(set(of_head))
    places = (Progression(size.q_offset, size.q_offset + size.q_len), Progression(0, size.k_len))
    if part is not None:
        places = (part.queries, part.keys)
    spans = ((places[0], queries), (places[1], keys))
    classes = None if by_document else _classes(_rates(relation), patterns, spans)
    counted = classes is None
    if classes is None:
        patterns, classes = [of_head[0]], [[(0, 1)]]
    # Causal queries have the more keys the later they stand, keys the more queries the earlier: the longest work goes first.
    sides = [
        Rows(_tiles(classes, *span, backwards), span[1])
        for span, backwards in zip(spans, (size.right is not None, False), strict=True)
    ]
    plan = _plan(relation, patterns, sides[0], sides[1], counted)
    return _placed(plan if part is None else replace(plan, part=numbers_of(part, _rates(relation))), device)


@lru_cache(maxsize=64)
def plan_of_blocks(relation: Relation, count: int, transposed: bool, by_document: bool, device: torch.device) -> Plan:
    """The plan of a relation of blocks, for one side: tiles of ``count`` of its queries, or (transposed) of its keys."""

    def made() -> Plan:
        lists = lists_on(relation, count, transposed, by_document, device)
        rows, none = Rows(lists.tiles[None], count), Rows(lists.tiles[None, :0], 1)
        patterns = [_residues_by_head(relation)[0]]
        plan = _plan(relation, patterns, none if transposed else rows, rows if transposed else none, False)
        return replace(_moved(plan, device), lists=lists)

    return _elsewhere(made, device)


@lru_cache(maxsize=8)
def map_of(relation: Relation, by_document: bool, device: torch.device) -> tuple[Tensor, int]:
    """``lists.map_on`` in memory of its own."""
    return _elsewhere(lambda: map_on(relation, by_document, device), device)


@lru_cache(maxsize=256)
def plan_of_few(relation: Relation, queries: int, by_document: bool, device: torch.device) -> Plan:
    """The plan of a relation with few query rows (a decode step): only the classes that hold one of them, however fine, and no
    tiles of keys, which nothing walks from. The arguments are those of ``plan_of``."""
    if blocks_of(relation) is not None:
        return plan_of_blocks(relation, queries, False, by_document, device)
    size, of_head = relation.problem, _residues_by_head(relation)
    begin, end = size.q_offset, size.q_offset + size.q_len
    patterns = [of_head[0]] if by_document else sorted(set(of_head))
    classes: list[list[Class]] = [[(0, 1)]]
    if not by_document:
        wanted = [tuple(zip(_rates(relation), pattern, strict=True)) for pattern in patterns]
        classes = [sorted({class_of(t, each) for t in range(begin, end)}) for each in wanted]
    rows = Rows(_tiles(classes, Progression(begin, end), queries, False), queries)
    no_keys = Rows(torch.empty((len(patterns), 0, 2), dtype=torch.int32, device="cpu"), 1)
    return _placed(_plan(relation, patterns, rows, no_keys, by_document), device)


def _plan(relation: Relation, patterns: list[tuple[int, ...]], queries: Rows, keys: Rows, counted: bool) -> Plan:
    size, of_head = relation.problem, _residues_by_head(relation)
    return Plan(
        terms=torch.tensor([_columns(term, size) for term in relation.terms], dtype=torch.int32, device="cpu"),
        residues=torch.tensor(list(zip(*of_head, strict=True)), dtype=torch.int32, device="cpu"),
        patterns=torch.tensor([0 if counted else patterns.index(x) for x in of_head], dtype=torch.int32, device="cpu"),
        queries=queries,
        keys=keys,
        counted=counted,
        # The first term has no earlier one.
        dedupes=any(term.dedupe for term in relation.terms[1:]),
        by_head=any(isinstance(term.generator, Segment) and term.generator.heads is not None for term in relation.terms),
    )


def _rates(relation: Relation) -> tuple[int, ...]:
    return tuple(_rate(term) for term in relation.terms)


def _residues_by_head(relation: Relation) -> list[tuple[int, ...]]:
    return list(zip(*(_residues(term, relation.problem.kv_heads) for term in relation.terms), strict=True))


Class = tuple[int, int]
Span = tuple[Progression, int]


def _classes(rates: tuple[int, ...], patterns: list[tuple[int, ...]], spans: tuple[Span, Span]) -> list[list[Class]] | None:
    """The classes of each pattern, or None if they are too fine to fill tiles of both sides."""
    found = []
    for pattern in patterns:
        classes = residue_classes(
            tuple(zip(rates, pattern, strict=True)), _MOST_ROWS_PER_QUERY * max(len(part) for part, _ in spans)
        )
        if classes is None:
            return None
        for part, count in spans:
            common = [lcm(stride, part.step) for start, stride in classes if (start - part.start) % gcd(stride, part.step) == 0]
            rows = sum(-(-(part.stop - part.start) // (step * count)) * count for step in common)
            if rows > _MOST_ROWS_PER_QUERY * max(len(part), count):
                return None
        found.append(classes)
    return found


def residue_classes(wanted: tuple[tuple[int, int], ...], most: int = 1 << 16) -> list[Class] | None:
    """Progressions (start, stride) that part the whole numbers, such that no class is split by any of the terms.

    Args:
        wanted: (rate, residue) of each term; residue -1: every residue is a class of its own.
        most: with more classes than this the answer is None.

    >>> residue_classes(((1, 0), (2, 0), (4, 0)))
    [(0, 4), (2, 4), (1, 2)]
    >>> residue_classes(((1, -1), (2, -1)))
    [(0, 2), (1, 2)]
    """
    found: list[Class] = [(0, 1)]
    for rate, residue in wanted:
        if residue < 0 and sum(rate // gcd(stride, rate) for _, stride in found) > max(1, most):
            return None
        found = [part for each in found for part in _split(each, rate, residue)]
    return found


def class_of(t: int, wanted: tuple[tuple[int, int], ...]) -> Class:
    """The one of ``residue_classes`` that holds position t.

    >>> class_of(7, ((1, 0), (2, 0), (4, 0)))
    (1, 2)
    """
    stride = 1
    for rate, residue in wanted:
        while (prime := _splits_by(t, stride, rate, residue)) > 1:
            stride *= prime
    return t % stride, stride


def _split(each: Class, rate: int, residue: int) -> list[Class]:
    start, stride = each
    prime = _splits_by(start, stride, rate, residue)
    if prime == 1:
        return [each]
    return [part for n in range(prime) for part in _split((start + n * stride, stride * prime), rate, residue)]


def _splits_by(member: int, stride: int, rate: int, residue: int) -> int:
    """Into how many parts a term next splits the class of this stride that holds ``member``."""
    common = gcd(stride, rate)
    never = residue >= 0 and member % common != residue % common
    if common == rate or never:
        return 1
    return next(p for p in range(2, rate + 1) if rate // common % p == 0)


def _tiles(classes: list[list[Class]], part: Progression, count: int, backwards: bool) -> Tensor:
    lists = []
    for found in classes:
        tiles = []
        for start, stride in found:
            own = meet(Progression(start + (part.start - start) // stride * stride, part.stop, stride), part)
            tiles += [(t, own.step) for t in range(own.start, own.stop, own.step * count)]
        lists.append(sorted(tiles, reverse=backwards))
    longest = max(1, *(len(tiles) for tiles in lists))
    return torch.tensor([tiles + [(FAR, 1)] * (longest - len(tiles)) for tiles in lists], dtype=torch.int32, device="cpu")


def _rate(term: Term) -> int:
    generator = term.generator
    if isinstance(generator, Segment):
        return generator.rate
    return generator.step if isinstance(generator, Window) else 1


def _residues(term: Term, kv_heads: int) -> tuple[int, ...]:
    generator = term.generator
    if isinstance(generator, Segment) and generator.residues is not None:
        return generator.residues
    return (-1,) * kv_heads


def _columns(term: Term, size: Problem) -> tuple[int, ...]:
    generator = term.generator
    length, left, right, stop, heads = 0, size.left, size.right, size.k_len, (0, size.heads)
    if isinstance(generator, Segment):
        # A longer segment would be this one too: there are no keys behind.
        length, heads = min(generator.length, FAR // 2), generator.heads or heads
    elif isinstance(generator, Window):
        left, right = _nearer(left, generator.left), _nearer(right, generator.right)
    elif isinstance(generator, Sinks):
        stop = min(stop, generator.count)
    else:
        assert isinstance(generator, Everything | Blocks), generator
    return length, _rate(term), _limit(left), _limit(right), stop, *heads, int(term.dedupe)


def most_keys(relation: Relation, counted: bool) -> int:
    """How many keys a tile of few query rows visits at most, all terms together; counted: each key once, whatever the rates."""
    size, found = relation.problem, 0
    for term in relation.terms:
        length, rate, left, right, stop, *_ = _columns(term, size)
        span = min(size.q_offset + size.q_len + right, stop) - max(0, size.q_offset - left)
        found += -(-max(0, min(span, length or span)) // (1 if counted else rate))
    return min(found, size.k_len) if counted else found


def _nearer(one: int | None, other: int | None) -> int | None:
    return other if one is None else one if other is None else min(one, other)


def _limit(distance: int | None) -> int:
    return FAR if distance is None else max(-FAR, min(FAR, distance))
