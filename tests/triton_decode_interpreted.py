"""The Triton decode kernels' numbers, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles import Setting, counts, output_scale, softmax
from test_kernels import FORMS, SCALE, assert_as_good_as_eager, assert_grads, drawn, expected, operands_of, run, setting_of
from torch import Tensor

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import ops, triton
from dilcompile.lowering.call import Call, problem_of
from dilcompile.lowering.choice import trust
from dilcompile.lowering.triton import bound, decode, plan, split
from dilcompile.lowering.triton.compiled import ARCHS
from dilcompile.lowering.triton.config import Tile, tile_of

WINDOW = SlidingWindow(20, sinks=3)
# Segments of many blocks of 16 keys.
LONG = Dilated([32, 64], [1, 2])


@pytest.fixture(autouse=True)
def decoded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Few keys are split too, and the test must have run the decode kernels: the parts of each call."""
    found: list[int] = []
    right = split.parts_of

    def noted(*arguments: Any) -> int:
        found.append(getattr(split, "asked", None) or right(*arguments))
        return found[-1]

    monkeypatch.setattr(split, "LEAST_KEYS", 1)
    monkeypatch.setattr(split, "parts_of", noted)
    plan.plan_of_few.cache_clear()
    yield found
    assert found, "no call went to the decode kernels"


def in_parts(monkeypatch: pytest.MonkeyPatch, parts: int) -> None:
    monkeypatch.setattr(split, "asked", parts, raising=False)


def step_of(q: Tensor, k: Tensor, **mask: Any) -> Setting:
    """The queries are the last keys, as in a decode step."""
    return setting_of(q, k, **{"causal": True, "q_offset": k.shape[2] - q.shape[2], **mask})


def assert_exact(q: Tensor, k: Tensor, v: Tensor, form: Form, at: Setting, **operands: Any) -> None:
    # float64, which the interpreter computes in: no more than its rounding.
    for found, exact in zip(run(q, k, v, form, "triton", at, **operands), expected(q, k, v, form, at, **operands), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", [*FORMS, WINDOW, LONG], ids=str)
def test_every_form(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = drawn(batch=1, heads=2, kv_heads=2, q_len=2, k_len=51)
    assert_exact(q, k, v, form, step_of(q, k))


@pytest.mark.parametrize(("form", "parts"), [*((LONG, parts) for parts in (1, 2, 4, 5, 7)), (Dense(), 1), (Dense(), 5)], ids=str)
def test_every_number_of_parts(form: Form, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, parts)
    q, k, v = drawn(batch=2, heads=2, kv_heads=1, q_len=1, k_len=101)
    assert_exact(q, k, v, form, step_of(q, k))


@pytest.mark.parametrize("parts", [18, 40])
def test_more_parts_than_blocks_and_than_are_joined_at_once(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, parts)
    q, k, v = drawn(batch=1, heads=1, kv_heads=1, q_len=2, k_len=300)
    assert_exact(q, k, v, Dense(), step_of(q, k))


def test_the_number_of_parts_changes_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=1, k_len=150, dtype=torch.float32)
    found = []
    for parts in (1, 2, 5, 9):
        in_parts(monkeypatch, parts)
        found.append(run(q, k, v, LONG, "triton", step_of(q, k)))
        assert torch.equal(run(q, k, v, LONG, "triton", step_of(q, k))[0], found[-1][0])
    # Some digits of float32, near numbers of about 1 and an LSE of about 5.
    for out, lse in found[1:]:
        torch.testing.assert_close(out, found[0][0], rtol=0, atol=1e-6)
        torch.testing.assert_close(lse, found[0][1], rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len"),
    [(2, 2, 1), (1, 1, 2), (1, 1, 5), (1, 1, 8), (4, 1, 1), (4, 1, 4), (4, 1, 6), (8, 1, 3), (8, 2, 1), (8, 1, 7), (8, 1, 8)],
)
def test_queries_and_groups(heads: int, kv_heads: int, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    q, k, v = drawn(batch=1, heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=43)
    assert_exact(q, k, v, LONG if q_len % 2 else WINDOW, step_of(q, k))


@pytest.mark.parametrize(("heads", "kv_heads", "q_len"), [(65, 1, 1), (128, 1, 1), (11, 1, 8), (24, 1, 3), (1, 1, 64)])
def test_groups_that_fill_a_tile_or_several(heads: int, kv_heads: int, q_len: int, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    q, k, v = drawn(batch=1, heads=heads, kv_heads=kv_heads, q_len=q_len, k_len=66)
    assert_exact(q, k, v, Dense(), step_of(q, k))


@pytest.mark.parametrize(
    ("form", "length"), [*((LONG, length) for length in (1, 15, 16, 17, 33)), (Dense(), 1), (Dense(), 17)], ids=str
)
def test_ragged_lengths(form: Form, length: int) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=1, k_len=length)
    assert_exact(q, k, v, form, step_of(q, k))


PLACES: list[dict[str, Any]] = [
    {"causal": False},
    {"left": 30},
    {"causal": False, "left": 8, "right": 5, "q_offset": 20},
    {"q_offset": -2},
    {"q_offset": 75},
    {"q_offset": 20},
]


@pytest.mark.parametrize(
    ("form", "mask"), [*((LONG, mask) for mask in PLACES), *((Dense(), PLACES[n]) for n in (0, 3, 5))], ids=str
)
def test_the_sites_own_window_and_offsets(form: Form, mask: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """q_offset 20: a static cache of which 23 keys are there; -2: rows without keys."""
    in_parts(monkeypatch, 3)
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=3, k_len=70)
    assert_exact(q, k, v, form, step_of(q, k, **mask))


MASKED: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "shared"},
    {"documents": "own"},
    {"softcap": 1.5, "key_padding": True, "documents": "own"},
]


@pytest.mark.parametrize(
    ("form", "asked"), [*((LONG, asked) for asked in MASKED), (Dense(), MASKED[1]), (Dense(), MASKED[4])], ids=str
)
def test_softcap_padding_and_documents(form: Form, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = drawn(heads=2, kv_heads=1, q_len=2, k_len=61)
    assert_exact(q, k, v, form, step_of(q, k), **operands_of(asked, length=61))


def test_dropout_depends_on_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(heads=2, kv_heads=1, q_len=2, k_len=50)
    operands = {"dropout_p": 0.3, "seed": torch.tensor([(7 << 40) + 11])}
    in_parts(monkeypatch, 3)
    found, exact = (run(q, k, v, LONG, kernel, step_of(q, k), **operands) for kernel in ("triton", "reference"))
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)
    assert not torch.equal(found[0], run(q, k, v, LONG, "triton", step_of(q, k))[0])


def limited(q: Tensor, k: Tensor, v: Tensor, form: Form, limits: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    offset = k.shape[2] - q.shape[2]
    return ops.attention(
        q, k, v, more.get("key_padding"), None, more.get("bias"), None, str(form), False, None, None, offset, SCALE, None, 0.0,
        "triton", row_limits=limits,
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", [Dense(), LONG], ids=str)
def test_limits_by_row(form: Form, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a static cache has them: the second row of a batch sees nothing, limits may lie beyond the keys."""
    in_parts(monkeypatch, 3)
    q, k, v = drawn(heads=2, kv_heads=1, q_len=3, k_len=80)
    limits = torch.tensor([[[5, 30, 0], [20, 9, 33]], [[61, 30, 1000], [21, 80, 66]]])[:, :batch]
    position = torch.arange(80)
    seen = (position >= limits[0][..., None]) & (position < limits[1][..., None])
    at = step_of(q, k, causal=False)
    exact = softmax(q, k, v, torch.from_numpy(counts(form, at))[None] * seen[:, None], SCALE)
    out, lse = limited(q, k, v, form, limits)
    torch.testing.assert_close(out, exact[0] * output_scale(form), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("dim", "v_dim", "softcap"), [(64, 64, None), (80, 96, 2.0)])
def test_low_precision(dim: int, v_dim: int, softcap: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    inputs = drawn(batch=1, heads=4, kv_heads=1, q_len=3, k_len=150, dim=dim, v_dim=v_dim, dtype=dtype)
    at = step_of(inputs[0], inputs[1])
    for form in (Dense(), LONG):
        found = run(*inputs, form, "triton", at, softcap=softcap)
        eager = expected(*inputs, form, at, dtype, softcap=softcap)
        exact = expected(*(x.double() for x in inputs), form, at, softcap=softcap)
        assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
        for mine, theirs, true in zip(found, eager, exact, strict=True):
            assert_as_good_as_eager(mine, theirs, true, dtype)


def test_gradients_start_from_the_joined_lse() -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=3, k_len=40)
    assert_grads("triton", LONG, step_of(q, k), q, k, v)


@pytest.mark.parametrize("form", [Dense(), SlidingWindow(20, sinks=3), SlidingWindow(30, step=3), LONG], ids=str)
def test_only_the_keys_that_count_are_loaded(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are not a number: one that is loaded makes the output so, even with weight 0."""
    in_parts(monkeypatch, 3)
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=1, k_len=200)
    at = step_of(q, k, q_offset=170)
    wanted = expected(q, k, v, form, at)
    hidden = torch.from_numpy(counts(form, at).sum((0, 1)) == 0)
    assert bool(hidden.any())
    k[:, :, hidden] = v[:, :, hidden] = torch.nan
    for mine, exact in zip(run(q, k, v, form, "triton", at), wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


def test_keys_behind_limits_and_padding_are_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = drawn(batch=2, heads=2, kv_heads=1, q_len=1, k_len=120)
    keep = torch.zeros(2, 120, dtype=torch.bool)
    keep[0, 30:100] = keep[1, 50:51] = True
    limits = torch.tensor([[[0], [0]], [[90], [120]]])
    seen = keep & (torch.arange(120) < limits[1])
    exact = softmax(q, k, v, seen[:, None, None].expand(-1, 2, -1, -1).long(), SCALE)
    k.transpose(1, 2)[~seen] = torch.nan
    v.transpose(1, 2)[~seen] = torch.nan
    for mine, true in zip(limited(q, k, v, Dense(), limits, key_padding=keep), exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_nothing_outside_the_tensors_is_read_or_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def framed(x: Tensor) -> Tensor:
        around = torch.full((x.shape[0] + 2, x.shape[1] + 2, x.shape[2] + 40, x.shape[3] + 8), torch.nan, dtype=x.dtype)
        return around[1:-1, 1:-1, 20:-20, : x.shape[3]].copy_(x)

    in_parts(monkeypatch, 4)
    q, k, v = drawn(batch=1, heads=3, kv_heads=1, q_len=2, k_len=45, dim=20, v_dim=12)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for form in (Dense(), LONG):
            assert_exact(framed(q), framed(k), framed(v), form, step_of(q, k))
    finally:
        torch.use_deterministic_algorithms(False)


def paged(k: Tensor, v: Tensor, page_size: int, spare: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """(k, v, table): the same keys in pages of a pool, in any order; what no position has is not a number."""
    batch, heads, length, _ = k.shape
    count = -(-length // page_size)
    table = torch.randperm(batch * count + spare, generator=torch.Generator().manual_seed(1))[: batch * count].view(batch, count)
    pools = [x.new_full((batch * count + spare, heads, page_size, x.shape[3]), torch.nan) for x in (k, v)]
    for b in range(batch):
        for position in range(length):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, position // page_size], :, position % page_size] = x[b, :, position]
    return pools[0], pools[1], table.int()


def run_paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, form: Form, at: Setting, **operands: Any) -> tuple[Tensor, Tensor]:
    return ops.attention(
        q, k, v, operands.get("key_padding"), operands.get("documents"), operands.get("bias"), None, str(form), at.causal,
        at.left, at.right, at.q_offset, SCALE, operands.get("softcap"), 0.0, "triton", pages=table, k_len=at.k_len,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("form", "q_len", "page_size", "asked"),
    [
        (Dense(), 1, 16, {}),
        (LONG, 2, 16, {}),
        (WINDOW, 1, 5, {"softcap": 2.0}),
        (LONG, 3, 7, {"key_padding": True}),
        (Dense(), 2, 64, {"documents": "own"}),
        (Dense(), 1, 1, {}),
        (Dense(), 40, 16, {}),
    ],
    ids=str,
)
def test_keys_in_pages(form: Form, q_len: int, page_size: int, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = drawn(heads=2, kv_heads=1, q_len=q_len, k_len=45)
    at, operands = step_of(q, k), operands_of(asked, length=45)
    wanted = expected(q, k, v, form, at, **operands)
    for mine, exact in zip(run_paged(q, *paged(k, v, page_size), form, at, **operands), wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


def test_numbers_of_no_page_are_not_read_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second batch row is shorter. Far outside of the pool there is no memory: such a load would end the process."""
    in_parts(monkeypatch, 2)
    q, k, v = drawn(heads=2, kv_heads=1, q_len=1, k_len=80)
    at, keep = step_of(q, k), torch.ones(2, 80, dtype=torch.bool)
    keep[1, 32:] = False
    pool_k, pool_v, table = paged(k, v, 16)
    table[1, 2:] = torch.tensor([-1, 1 << 30, -(1 << 30)], dtype=torch.int32)
    wanted = expected(q, k, v, Dense(), at, key_padding=keep)
    found = run_paged(q, pool_k, pool_v, table, Dense(), at, key_padding=keep)
    for mine, exact in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)
    # Seen keys without a page: numbers of some kind, and the other batch row is untouched.
    for table_entry in (-1, 1 << 30):
        table[1, 1] = table_entry
        out, _ = run_paged(q, pool_k, pool_v, table, Dense(), at, key_padding=keep)
        assert bool(out.isfinite().all())
        torch.testing.assert_close(out[0], wanted[0][0], rtol=0, atol=1e-12)


def tiles_of_the_table() -> list[Tile]:
    kinds = itertools.product(ARCHS, (64, 128, 256), (torch.bfloat16, torch.float32), ("none", "some"), (16, 32, 64))
    found = [tile_of("decode", arch, head, dtype, masks, rows) for arch, head, dtype, masks, rows in kinds]
    return list({(tile.own, tile.other): tile for tile in found}.values())


@pytest.mark.parametrize("tile", tiles_of_the_table(), ids=str)
def test_every_tile_of_the_table(tile: Tile, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    right = bound.Bound.tile
    monkeypatch.setattr(bound.Bound, "tile", lambda self, step, rows=16: tile if step == "decode" else right(self, step, rows))
    group = tile.own // 2
    q, k, v = drawn(batch=1, heads=group, kv_heads=1, q_len=2, k_len=300)
    keep = torch.rand(1, 300, generator=torch.Generator().manual_seed(0)) > 0.2
    for form, operands in ((Dense(), {}), (LONG, {"key_padding": keep})):
        assert_exact(q, k, v, form, step_of(q, k), **operands)


# Each mutation is a mistake that a split over keys invites; the check must notice it.


def without_the_last_part(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.join

    class Short:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *args, **more: right[grid](*args[:8], args[8] - 1, **more)

    monkeypatch.setattr(decode, "join", Short())


def with_every_part_worth_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.join

    class Flat:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            def launch(sums: Tensor, tops: Tensor, *args: Any, **more: Any) -> None:
                right[grid](sums, tops.clamp(min=0, max=0), *args, **more)

            return launch

    monkeypatch.setattr(decode, "join", Flat())


def with_classes_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "class_of", lambda t, wanted: (0, 1))
    plan.plan_of_few.cache_clear()


def without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(bound: Any, space: Any) -> Tensor:
        return torch.tensor([[0, 40]] * bound.call.problem.batch, dtype=torch.int32)

    monkeypatch.setattr(triton, "_kept", nothing)


def check(**operands: Any) -> None:
    q, k, v = drawn(batch=2, heads=2, kv_heads=1, q_len=2, k_len=63)
    assert_exact(q, k, v, LONG, step_of(q, k), **operands)


MUTATIONS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "without the last part": without_the_last_part,
    "every part worth the same": with_every_part_worth_the_same,
    "classes not told apart": with_classes_not_told_apart,
    "the wrong end of the padding": without_padding,
}


def test_the_check_passes_without_a_mutation(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    check()
    check(**operands_of({"key_padding": True}, length=63))


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    MUTATIONS[name](monkeypatch)
    with pytest.raises(AssertionError):
        check(**operands_of({"key_padding": True} if "padding" in name else {}, length=63))


@pytest.mark.parametrize("name", [None, "without the last part", "every part worth the same"])
def test_the_check_on_a_device_computes_a_step_in_parts(name: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for a decode step (``trust.check``) is one too, so that a device that joins the parts wrongly is not trusted."""
    monkeypatch.setattr(split, "LEAST_KEYS", 256)
    q, k, v = drawn(batch=1, heads=4, kv_heads=2, q_len=1, k_len=300, dtype=torch.float32)
    relation = Dense().relation(problem_of(q, k, v, True, None, None, 299))
    if name is not None:
        MUTATIONS[name](monkeypatch)
    verdict = trust.check(triton, Call(q, k, v, None, None, None, None, relation, SCALE), False)
    assert verdict.failure is None
    assert verdict.passes == (name is None)
