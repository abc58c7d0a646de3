"""The Triton kernels along lists of blocks, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from oracles import softmax
from test_kernels import SCALE, assert_as_good_as_eager, drawn, loss_of, operands_of
from torch import Tensor
from triton_interpreted import small_checks
from triton_interpreted_bias import bias_of

from dilcompile.blocks.lists import BlockLists
from dilcompile.forms import BlockSparse
from dilcompile.functional import attention
from dilcompile.lowering import ops, triton
from dilcompile.lowering.call import Call, problem_of
from dilcompile.lowering.choice import trust
from dilcompile.lowering.triton import bound, lists, plan, split
from dilcompile.lowering.triton.config import Tile

Outcome = tuple[Tensor, ...]
# What kernels make of blocks, whichever queries these leave without keys.
blocks_of = partial(BlockSparse, coverage="zero")
BESIDE: dict[str, Any] = {"local": {"before": 1, "behind": 1}}
BY_HEAD: dict[str, Any] = {"any": [{"local": {}}, {"random": {"blocks": 1, "by_head": True}}]}
FAMILIES: list[dict[str, Any]] = [
    {"local": {"before": 1}},
    {"any": [{"global": {"columns": 1, "rows": 1}}, {"local": {}}]},
    {"strided": {"stride": 2}},
    {"dilated_sliding": {"dilation": 2, "blocks": 1}},
    {"fixed": {"stride": 3, "offset": 1}},
    {"vertical_slash": {"verticals": [0, 2], "slashes": [0, 1]}},
    {"hierarchical": {"spans": [1, 2], "heads": [1, 1]}},
    {"random": {"blocks": 2, "seed": 3}},
    BY_HEAD,
    {"explicit": {"starts": [0, 2, 2, 4], "columns": [0, 2, 1, 3]}},
    {"bigbird": {"random": 1}},
    {"longformer": {}},
    {"all": [{"strided": {"stride": 2}}, {"local": {"before": 3, "behind": 3}}]},
]
# Tiles of parts of one block, heads side by side; pieces of several blocks, a list a head.
BOTH = [blocks_of(16, FAMILIES[1]), blocks_of((20, 24), BY_HEAD)]


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    for cached in (plan.plan_of_blocks, plan.plan_of_few, lists._lines_on, lists._rows):
        cached.cache_clear()


def exact(inputs: tuple[Tensor, ...], form: BlockSparse, mask: dict[str, Any], dtype: torch.dtype, **operands: Any) -> Outcome:
    """Output, LSE and gradients by pairs: what the relation says of each pair, one by one."""
    q, k, v = leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    documents, bias, pairs = operands.get("documents"), operands.get("bias"), []
    whole = form.relation(problem_of(q, k, v, mask["causal"], None, None, mask["q_offset"]))
    t, key, h = (
        torch.arange(q.shape[2])[:, None] + mask["q_offset"],
        torch.arange(k.shape[2]),
        torch.arange(q.shape[1])[:, None, None],
    )
    for row in [None] if documents is None else documents:
        start, same = 0 * key, torch.ones_like(t + key, dtype=torch.bool)
        inside = ((t >= 0) & (t < len(key))).squeeze(1)
        first = torch.zeros_like(t)
        if row is not None:
            start = torch.searchsorted(row.contiguous(), row.contiguous())
            at = t.squeeze(1).clamp(0, len(key) - 1)
            first, same = start[at][:, None], inside[:, None] & (row[at][:, None] == row)
        pairs.append(whole.multiplicity(h, t - first, key - start) * same)
    count = torch.stack(pairs)
    if operands.get("key_padding") is not None:
        count = count * operands["key_padding"][:, None, None]
    if operands.get("row_limits") is not None:
        low, high = operands["row_limits"][..., None]
        count = count * ((key >= low) & (key < high))[:, None]
    if bias is not None:
        hidden = bias == -torch.inf
        leaves.append(bias := bias.detach().clone().requires_grad_())
        count, bias = count * ~hidden, bias.masked_fill(hidden, 0).to(dtype)
    found = softmax(q, k, v, count, SCALE, operands.get("softcap"), bias)
    return (*found, *torch.autograd.grad(loss_of(*found, True), leaves))


def computed(
    inputs: tuple[Tensor, ...], form: BlockSparse, mask: dict[str, Any], kernel: str = "triton", **operands: Any
) -> Outcome:
    q, k, v = leaves = [x.detach().requires_grad_() for x in inputs]
    if (bias := operands.get("bias")) is not None:
        leaves.append(bias := bias.detach().clone().requires_grad_())
    found = ops.attention(
        q, k, v, operands.get("key_padding"), operands.get("documents"), bias, operands.get("seed"), str(form), mask["causal"],
        None, None, mask["q_offset"], SCALE, operands.get("softcap"), operands.get("dropout_p", 0.0), kernel,
        row_limits=operands.get("row_limits"),
    )  # fmt: skip
    return (*found, *torch.autograd.grad(loss_of(*found, True), leaves))


def check(inputs: tuple[Tensor, ...], form: BlockSparse, causal: bool = True, q_offset: int = 0, **operands: Any) -> Outcome:
    """Output, LSE and every gradient, in float64: no more than its rounding."""
    mask = {"causal": causal, "q_offset": q_offset}
    found, true = computed(inputs, form, mask, **operands), exact(inputs, form, mask, torch.float64, **operands)
    for mine, theirs in zip(found, true, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)
    return found


@pytest.mark.parametrize(
    ("pattern", "causal"),
    # The kernels see lists of blocks: of what these are made, only the tests of patterns can tell.
    [*((one, True) for one in FAMILIES[::2]), *((one, False) for one in FAMILIES[1::2]), (BY_HEAD, False), (FAMILIES[1], True)],
    ids=str,
)
def test_every_family_of_patterns(pattern: dict[str, Any], causal: bool) -> None:
    check(drawn(batch=1, heads=2, kv_heads=1, q_len=57, k_len=57), blocks_of(16, pattern), causal)


# Tiles have 16 rows and take 16 positions at once: parts of a block, and pieces of several.
SIZES: list[Any] = [17, 20, 40, 48, (16, 48), (48, 16), (24, 40), (33, 16), (256, 16)]


@pytest.mark.parametrize(
    ("block", "causal"), [*((block, True) for block in SIZES), *((SIZES[n], False) for n in (1, 5, 8))], ids=str
)
def test_blocks_of_any_size(block: Any, causal: bool) -> None:
    check(drawn(batch=1, heads=2, kv_heads=1, q_len=69, k_len=69), blocks_of(block, {"strided": {"stride": 2}}), causal)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "pattern"), [(4, 1, BESIDE), (6, 2, BESIDE), (17, 1, BESIDE), (6, 2, BY_HEAD)], ids=str
)
def test_grouped_query_heads(heads: int, kv_heads: int, pattern: dict[str, Any]) -> None:
    """Heads side by side in a tile where they share their lists, three of them in 16 rows; and each with a list of its own."""
    check(drawn(batch=1, heads=heads, kv_heads=kv_heads, q_len=25, k_len=25), blocks_of((16, 20), pattern))


@pytest.mark.parametrize(("own", "other"), [(16, 64), (32, 64), (64, 32)])
@pytest.mark.parametrize("form", [*BOTH, blocks_of((64, 32), BY_HEAD)], ids=str)
def test_tiles_as_large_as_a_device_takes(form: BlockSparse, own: int, other: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A visit takes several whole blocks, and tiles have more rows than a block."""
    right = bound.Bound.tile

    def larger(self: Any, step: Any, *rows: int) -> Tile:
        return Tile(own, other, 4, 1) if step in ("forward", "queries", "keys", "bias") else right(self, step, *rows)

    monkeypatch.setattr(bound.Bound, "tile", larger)
    inputs = drawn(batch=1, heads=2, kv_heads=1, q_len=101, k_len=101)
    # Each form and each size with a bias, and without.
    has_bias = (form.sizes[0] + own + other) // 16 % 2 == 0
    check(inputs, form, not has_bias, bias=bias_of((2, 1, 101)) if has_bias else None)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 31, 33])
def test_ragged_lengths(length: int) -> None:
    for causal in (False, True):
        check(drawn(batch=1, heads=2, kv_heads=2, q_len=length, k_len=length), blocks_of(16, BESIDE), causal)


@pytest.mark.parametrize(
    ("form", "q_offset"), [*((BOTH[0], offset) for offset in (-40, -3, 7, 20, 60)), (BOTH[1], -3), (BOTH[1], 20)], ids=str
)
def test_queries_anywhere_beside_the_keys(q_offset: int, form: BlockSparse) -> None:
    """Before the first key and behind the last one; block rows cut by the first query."""
    check(drawn(batch=1, heads=2, kv_heads=1, q_len=37, k_len=51), form, form is BOTH[0], q_offset)


MASKED: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "shared"},
    {"softcap": 1.5, "key_padding": True, "documents": "own"},
]


@pytest.mark.parametrize(
    ("form", "asked"), [*((BOTH[1], asked) for asked in MASKED), (BOTH[0], MASKED[1]), (BOTH[0], MASKED[3])], ids=str
)
def test_softcap_padding_and_documents(form: BlockSparse, asked: dict[str, Any]) -> None:
    """Documents begin anywhere in a tile, and one tile holds pieces of several."""
    inputs = drawn(batch=2 if "own" in asked.values() else 1, heads=2, kv_heads=1, q_len=45, k_len=45)
    check(inputs, form, form is BOTH[0], **operands_of(asked, batch=inputs[0].shape[0], length=45))


@pytest.mark.parametrize("q_offset", [-5, 9, 40])
def test_documents_where_queries_are_not_the_keys(q_offset: int) -> None:
    operands = operands_of({"documents": "own"}, length=57)
    check(drawn(heads=2, kv_heads=1, q_len=25, k_len=57), blocks_of(16, BESIDE), False, q_offset, **operands)


@pytest.mark.parametrize("batch", [1, 2])
def test_limits_by_row(batch: int) -> None:
    low = torch.randint(0, 20, (batch, 43), generator=torch.Generator().manual_seed(3))
    limits = torch.stack((low, low + 17))
    limits[1, :, 5] = 1000
    check(drawn(heads=2, kv_heads=1, q_len=43, k_len=51), blocks_of(16, BESIDE), False, row_limits=limits)


ROWS = 37
SHAPES = [(1, 1, 1, ROWS), (2, 2, 1, ROWS), (1, 2, ROWS, ROWS), (2, 1, ROWS, ROWS), (ROWS, ROWS), (2, 2, ROWS, 1), (1,)]


@pytest.mark.parametrize(
    ("form", "shape"), [*((BOTH[0], shape) for shape in SHAPES), *((BOTH[1], SHAPES[n]) for n in (1, 3, 5))], ids=str
)
def test_a_bias_of_every_shape(form: BlockSparse, shape: tuple[int, ...]) -> None:
    check(drawn(heads=2, kv_heads=1, q_len=ROWS, k_len=ROWS), form, bias=bias_of(shape))


@pytest.mark.parametrize(("shape", "q_offset"), [(SHAPES[1], -4), (SHAPES[3], 6)], ids=str)
def test_a_bias_beside_everything_else(shape: tuple[int, ...], q_offset: int) -> None:
    operands = operands_of({"softcap": 1.5, "key_padding": True, "documents": "own"}, length=ROWS)
    inputs = drawn(heads=2, kv_heads=1, q_len=ROWS, k_len=ROWS, v_dim=5)
    check(inputs, blocks_of((20, 16), FAMILIES[1]), True, q_offset, bias=bias_of(shape), **operands)


@pytest.mark.parametrize(("asked", "p"), [({}, 0.3), ({"documents": "own"}, 0.6)], ids=str)
def test_dropout_depends_on_positions_only(asked: dict[str, Any], p: float) -> None:
    inputs, form = drawn(heads=2, kv_heads=1, q_len=37, k_len=39), blocks_of((16, 20), BESIDE)
    operands = {**operands_of(asked, length=39), "dropout_p": p, "seed": torch.tensor([(7 << 40) + 11])}
    mask = {"causal": True, "q_offset": 2}
    for mine, theirs in zip(*(computed(inputs, form, mask, name, **operands) for name in ("triton", "reference")), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-11)


def test_rows_without_keys_give_nothing() -> None:
    form = blocks_of(16, {"explicit": {"starts": [0, 1, 1, 2], "columns": [0, 2]}})
    out, lse, *_ = check(drawn(batch=1, heads=1, kv_heads=1, q_len=48, k_len=48), form, False)
    assert bool((lse[:, :, 16:32] == -torch.inf).all())
    assert not out[:, :, 16:32].any()
    assert bool(lse[:, :, :16].isfinite().all() & lse[:, :, 32:].isfinite().all())


@pytest.mark.parametrize(("q_len", "k_len"), [(0, 5), (5, 0), (0, 0)])
def test_no_keys_and_no_queries(q_len: int, k_len: int) -> None:
    inputs = drawn(batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=k_len)
    out, lse, *grads = computed(inputs, blocks_of(16, {"local": {}}), {"causal": True, "q_offset": 0})
    assert not any(x.any() for x in (out, *grads))
    assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype) -> None:
    form, mask = blocks_of((24, 16), FAMILIES[1]), {"causal": True, "q_offset": 0}
    inputs = drawn(batch=1, heads=2, kv_heads=1, q_len=45, k_len=45, dim=40, v_dim=64, dtype=dtype)
    found, eager, true = computed(inputs, form, mask), exact(inputs, form, mask, dtype), exact(inputs, form, mask, torch.float64)
    for mine, theirs, best in zip(found, eager, true, strict=True):
        assert_as_good_as_eager(mine, theirs, best, dtype)


def framed(x: Tensor) -> Tensor:
    """The same in the midst of not-a-number."""
    around = torch.full((x.shape[0] + 2, x.shape[1] + 2, x.shape[2] + 40, x.shape[3] + 8), torch.nan, dtype=x.dtype)
    return around[1:-1, 1:-1, 20:-20, : x.shape[3]].copy_(x)


def test_nothing_outside_the_tensors_is_read_or_written() -> None:
    """Operands that lie in not-a-number, as does what the kernel writes."""
    inputs = tuple(framed(x) for x in drawn(batch=1, heads=2, kv_heads=1, q_len=39, k_len=45, dim=20, v_dim=12))
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for block in (16, (20, 24)):
            check(inputs, blocks_of(block, BY_HEAD), False, 3)
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_same_numbers_every_time() -> None:
    inputs = drawn(batch=1, heads=4, kv_heads=1, q_len=41, k_len=41, dtype=torch.float32)
    for one, other in zip(
        *(computed(inputs, blocks_of(16, BESIDE), {"causal": True, "q_offset": 0}) for _ in range(2)), strict=True
    ):
        assert torch.equal(one, other)


STEPS: list[tuple[int, dict[str, Any]]] = [
    (1, {}), (20, {}), (2, {"key_padding": True, "softcap": 2.0}), (3, {"documents": "own"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("q_len", "asked", "form"), [*((*step, BOTH[1]) for step in STEPS), (*STEPS[1], BOTH[0]), (*STEPS[3], BOTH[0])], ids=str
)
def test_a_decode_step(q_len: int, asked: dict[str, Any], form: BlockSparse, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries, also of two block rows, whose blocks are shared out to several programs."""
    called: list[int] = []
    monkeypatch.setattr(split, "LEAST_KEYS", 1)
    monkeypatch.setattr(split, "parts_of", lambda *_: called.append(3) or 3)
    inputs = drawn(heads=2, kv_heads=1, q_len=q_len, k_len=70)
    check(inputs, form, True, 70 - q_len, **operands_of(asked, length=70))
    assert called == [3]


@pytest.mark.parametrize("pattern", [FAMILIES[1], BY_HEAD], ids=str)
def test_keys_in_pages(pattern: dict[str, Any]) -> None:
    q, k, v = drawn(heads=4, kv_heads=2, q_len=3, k_len=60)
    table = torch.randperm(11, generator=torch.Generator().manual_seed(0))[:10].view(2, 5)
    pools = []
    for x in (k, v):
        pool = torch.full((11, 2, 12, x.shape[3]), torch.nan, dtype=x.dtype)
        pool[table.flatten()] = x.view(2, 2, 5, 12, -1).transpose(1, 2).reshape(10, 2, 12, -1)
        pools.append(pool)
    form = blocks_of(16, pattern)
    whole = attention(q, k, v, form, is_causal=True, scale=SCALE, kernel="triton")
    paged = attention(q, *pools, form, is_causal=True, scale=SCALE, kernel="triton", block_table=table.int(), k_len=60)
    torch.testing.assert_close(paged, whole, rtol=0, atol=1e-12)


# Each mutation is a mistake that has been made in some implementation; the check must notice it.
Mutate = Callable[[pytest.MonkeyPatch], None]


def in_lists(change: Callable[[lists.Lists], lists.Lists]) -> Mutate:
    right = lists.lists_on
    return lambda monkeypatch: monkeypatch.setattr(plan, "lists_on", lambda *args: change(right(*args)))


def of_columns(tensor: Tensor, column: int, change: Callable[[Tensor], Tensor]) -> Tensor:
    made = tensor.clone()
    made[..., column] = change(tensor)
    return made


def not_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    def same(self: BlockLists, lines: np.ndarray[Any, Any]) -> BlockLists:
        return replace(self, lines=lines, starts=np.resize(self.starts, len(lines) + 1))

    monkeypatch.setattr(BlockLists, "transposed", same)


def with_ragged_blocks_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks cut by the ends of the sequences are walked as if they were whole."""
    right = lists._grid
    monkeypatch.setattr(lists, "_grid", lambda *args: replace(right(*args), k_len=right(*args).columns * 16))


MUTATIONS: dict[str, Mutate] = {
    "every block full": in_lists(lambda x: replace(x, lines=of_columns(x.lines, 1, lambda lines: lines[..., 2]))),
    "blocks in ascending order": lambda m: m.setattr(lists.np, "lexsort", lambda keys: np.arange(len(keys[0]))),
    "lists not transposed": not_transposed,
    "columns off by one": in_lists(lambda x: replace(x, entries=x.entries + 1)),
    "blocks off by one": in_lists(lambda x: replace(x, entries=(x.entries - 16).clamp(min=0))),
    "last block of a line left out": in_lists(
        lambda x: replace(x, lines=of_columns(x.lines, 2, lambda n: (n[..., 2] - 1).clamp(0)))
    ),
    "one list for all heads": in_lists(lambda x: replace(x, line_head=0)),
    "lines off by one": in_lists(lambda x: replace(x, first_line=x.first_line + 1)),
    "last tile left out": in_lists(lambda x: replace(x, tiles=x.tiles[:-1])),
    "ragged blocks full": with_ragged_blocks_full,
}


def check_mutated() -> None:
    inputs = drawn(batch=1, heads=2, kv_heads=1, q_len=57, k_len=57)
    for causal in (True, False):
        check(tuple(framed(x) for x in inputs), blocks_of(16, BY_HEAD), causal)


def test_the_check_passes_without_a_mutation() -> None:
    check_mutated()


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTATIONS[name](monkeypatch)
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError)):
        check_mutated()


def test_the_check_that_comes_before_a_device_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=45, k_len=45, dtype=torch.float32)
    relation = blocks_of(16, BY_HEAD).relation(problem_of(q, k, v, True, None, None, 0))
    call = Call(q, k, v, None, None, None, None, relation, 0.3)
    small_checks(monkeypatch)
    assert trust.check(triton, call, True).passes
    MUTATIONS["one list for all heads"](monkeypatch)
    plan.plan_of_blocks.cache_clear()
    assert not trust.check(triton, call, False).passes
