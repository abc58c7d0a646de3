"""Kernel flex: FlexAttention uncompiled against float64, its lists against the pairs, its gradients traced.

Its C++ code is computed with in tests/test_flex_selection.py.

Uncompiled it computes what it is told pair by pair and gives the LSE and gradients, as compiled on a CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_blocks import COMPOSED, grids, visible
from test_flash_route import call_of
from test_kernels import FORMS, assert_grads, drawn, expected, operands_of, run, setting_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.attention import flex_attention as torchs

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.lists import BlockLists, lists_of
from dilcompile.blocks.patterns import Pattern
from dilcompile.blocks.recut import counted_from_first_query, recut, within_reach
from dilcompile.errors import KernelError
from dilcompile.forms import BlockSparse, Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import flex, flex_mask, select
from dilcompile.lowering.call import Call
from dilcompile.lowering.choice import trust
from dilcompile.lowering.flex_mask import Kind

BLOCKS, RECTANGULAR = FORMS[10], FORMS[11]
LISTED: list[Form] = [Dense(), SlidingWindow(6), BLOCKS, RECTANGULAR]
SMALL = 8


def forget() -> None:
    for cache in (flex._forward_of, flex._backward_of, flex_mask._kept, flex_mask._cut):
        cache.cache_clear()
    trust.forget()


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks so small that short sequences have several."""
    for module in (flex, flex_mask):
        monkeypatch.setattr(module, "BLOCK", SMALL)
    forget()
    yield
    forget()


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU what a CUDA device would be asked, in any dtype; the check of numbers is asked for by itself below."""
    monkeypatch.setenv(trust.OPTION, "off")
    monkeypatch.setattr(flex, "_of_device", lambda call, backward: None)
    monkeypatch.setattr(flex, "_gives_lse", lambda device: True)
    monkeypatch.setattr(flex, "_compiled", lambda function, class_of_calls: function)
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


OPERANDS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "shared"},
    {"documents": "own", "key_padding": True, "softcap": 1.5},
]


@pytest.mark.parametrize("asked", OPERANDS, ids=str)
@pytest.mark.parametrize("form", LISTED, ids=str)
def test_output_lse_and_gradients(form: Form, asked: dict[str, Any], uncompiled: None) -> None:
    q, k, v = drawn(v_dim=5)
    for causal in (False, True):
        at, operands = setting_of(q, k, causal=causal), operands_of(asked)
        if isinstance(form, BlockSparse) and "documents" in asked:
            with pytest.raises(KernelError, match="blocks that count from the start of each document"):
                run(q, k, v, form, "flex", at, **operands)
        else:
            assert_grads("flex", form, at, q, k, v, **operands)


MASKS: list[dict[str, Any]] = [
    {"causal": True, "left": 6},
    {"left": 6, "right": 3},
    {"causal": True, "right": -1},
    {"causal": True, "q_offset": 10},
    {"q_offset": 31},
]


@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("form", LISTED, ids=str)
def test_windows_and_offsets(form: Form, mask: dict[str, Any], uncompiled: None) -> None:
    q, k, v = drawn(batch=1, q_len=23, k_len=31)
    assert_grads("flex", form, setting_of(q, k, **mask), q, k, v)


@pytest.mark.parametrize("shape", [(2, 4, 37, 37), (4, 1, 37), (2, 1, 37, 1)], ids=str)
def test_a_bias_that_is_not_trained(shape: tuple[int, ...], uncompiled: None) -> None:
    q, k, v = drawn()
    at, generator = setting_of(q, k, causal=True), torch.Generator().manual_seed(7)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    pairs = [call(*leaves) for call in (
        lambda *x: run(*x, BLOCKS, "flex", at, bias=bias, softcap=2.0),
        lambda *x: expected(*x, BLOCKS, at, bias=bias, softcap=2.0),
    )]  # fmt: skip
    for one, other in zip(*pairs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    for one, other in zip(*(torch.autograd.grad(pair[0].sum(), leaves) for pair in pairs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    trained = run(*leaves, BLOCKS, "flex", at, bias=bias.detach().requires_grad_())[0]
    with pytest.raises(KernelError, match="the gradient of a bias"):
        trained.sum().backward()


def shown_by_lists(call: Call) -> Tensor:
    """The pairs [B, H, Sq, Sk] that FlexAttention's kernels visit: those of full blocks, and of partial ones what the function lets
    through."""
    kind, size = Kind.of(call), call.problem
    found = flex_mask.tables(call, kind)
    num, some, num_full, full, *_ = flex._lists(found, kind)
    b, h, q, k = (torch.arange(n) for n in (size.batch, size.heads, size.q_len, size.k_len))
    function = flex_mask.visible_of(kind)(
        b[:, None, None, None], h[:, None, None], q[:, None], k, *flex_mask.buffers_of_mask(call, found)
    )

    def spread(counts: Tensor | None, columns: Tensor | None) -> Tensor:
        if counts is None or columns is None:
            return torch.zeros(1, 1, size.q_len, size.k_len, dtype=torch.bool)
        there = torch.zeros(*columns.shape[:-1], columns.shape[-1] + 1, dtype=torch.bool)
        listed = torch.arange(columns.shape[-1]) < counts[..., None]
        there.scatter_(-1, torch.where(listed, columns, columns.shape[-1]).long(), True)
        return there[..., q // flex_mask.BLOCK, :][..., k // flex_mask.BLOCK]

    partial, whole = spread(num, some), spread(num_full, full)
    assert not (partial & whole).any()
    assert not (whole & ~function).any()
    return partial & function | whole


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lists_and_function_together_are_the_relation(data: st.DataObject) -> None:
    draw = data.draw
    q_len, k_len, offset = draw(st.integers(1, 40)), draw(st.integers(1, 60)), draw(st.integers(0, 20))
    limit = st.one_of(st.none(), st.integers(0, 20))
    form = draw(st.sampled_from([*LISTED, BlockSparse((48, 16), {"bigbird": {"random": 1}}, "zero")]))
    mask = {"causal": draw(st.booleans()), "left": draw(limit), "right": draw(limit), "q_offset": offset}
    if isinstance(form, BlockSparse):
        form = replace(form, coverage="zero")
    padding = torch.rand(2, k_len) > 0.3 if draw(st.booleans()) else None
    call = replace(call_of(form, **mask, q_len=q_len, k_len=k_len), key_padding=padding)
    assert flex_mask.refusal_of_relation(call) is None
    h, t, k = torch.arange(4)[:, None, None], torch.arange(q_len)[:, None] + offset, torch.arange(k_len)
    wanted = call.relation.multiplicity(h, t, k).bool()[None]
    wanted = wanted if padding is None else wanted & padding[:, None, None]
    assert torch.equal(shown_by_lists(call).expand(2, 4, -1, -1), wanted.expand(2, 4, -1, -1))


def pairs_of(lists: BlockLists, grid: Grid) -> Tensor:
    """The pairs [queries, keys] in listed blocks, hidden ones among them."""
    held = torch.zeros(grid.q_stop - grid.q_start, grid.k_len, dtype=torch.bool)
    for row, column in zip(lists.owners(), lists.blocks, strict=True):
        queries = slice(max(0, row * grid.q_block - grid.q_start), max(0, (row + 1) * grid.q_block - grid.q_start))
        held[queries, column * grid.k_block : (column + 1) * grid.k_block] = True
    return held


@settings(max_examples=100, deadline=None)
@given(COMPOSED, grids(), st.integers(1, 9), st.integers(1, 9))
def test_blocks_of_another_size_hold_the_same_pairs(pattern: Pattern, grid: Grid, q_block: int, k_block: int) -> None:
    lists = lists_of(pattern.codes(0, grid.rows, grid), grid)
    into = counted_from_first_query(grid, q_block, k_block)
    found, shown = recut(lists, grid, into), pairs_of(lists, grid) & visible(grid)
    assert torch.equal(visible(into), visible(grid))
    # No false empty, and nothing is listed that meets no listed block.
    assert not (shown & ~pairs_of(found, into)).any()
    for row, column, full in zip(found.owners(), found.blocks, found.full, strict=True):
        block = np.s_[row * q_block : (row + 1) * q_block, column * k_block : (column + 1) * k_block]
        assert full == bool(shown[block].all())
        assert pairs_of(lists, grid)[block].any()
    assert torch.equal(pairs_of(within_reach(into), into) & visible(into), visible(into))


def test_the_lists_of_blocks_of_128_are_those_of_the_forms_own_block_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flex, flex_mask):
        monkeypatch.setattr(module, "BLOCK", 128)
    form = BlockSparse(128, {"bigbird": {"random": 1}})
    call = call_of(form, causal=True, batch=1, q_len=700, k_len=700)
    mask = form.block_mask(call.problem)
    kind = Kind.of(call)
    found = flex._lists(flex_mask.tables(call, kind), kind)
    held = (mask.kv_num_blocks, mask.kv_indices, mask.full_kv_num_blocks, mask.full_kv_indices)
    held += (mask.q_num_blocks, mask.q_indices, mask.full_q_num_blocks, mask.full_q_indices)
    assert all(torch.equal(one, other) for one, other in zip(found, held, strict=True))


CALLS: list[Callable[[], Call]] = [
    lambda: call_of(Dense(), causal=True, dtype=torch.float32),
    lambda: call_of(BLOCKS, softcap=2.0, dtype=torch.float32),
    lambda: replace(call_of(RECTANGULAR, causal=True, dtype=torch.bfloat16), key_padding=operands_of({"key_padding": True})["key_padding"]),
]  # fmt: skip


@pytest.mark.parametrize("make", CALLS)
def test_the_check_that_a_device_makes_passes(make: Callable[[], Call], uncompiled: None) -> None:
    for backward in (False, True):
        verdict = trust.check(flex, make(), backward)
        assert verdict.passes, verdict


def _lse_in_powers_of_2(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flex, "math", SimpleNamespace(log=lambda x: 1.0))


def _no_limits(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flex, "visible_of", lambda kind: flex_mask.visible_of(replace(kind, right=False)))


def _no_pattern(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flex, "visible_of", lambda kind: flex_mask.visible_of(replace(kind, blocks=None)))


def _no_slope(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(flex, "slope_of", lambda kind: flex_mask.slope_of(replace(kind, softcap=False)))


@pytest.mark.parametrize(
    ("mutation", "number", "backward"),
    [(_lse_in_powers_of_2, 0, True), (_no_limits, 0, False), (_no_pattern, 1, False), (_no_slope, 1, True)],
)
def test_that_check_notices(
    mutation: Callable[[pytest.MonkeyPatch], None], number: int, backward: bool, uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        mutation(patch)
        assert not trust.check(flex, CALLS[number](), backward).passes


def test_a_new_length_compiles_nothing_anew(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes as torch.compile traces them for a CUDA device, lengths being symbols, without its code."""
    torch._dynamo.reset()
    counters.clear()

    def traced(function: Any, class_of_calls: tuple[object, ...]) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    monkeypatch.setattr(flex, "_compiled", traced)
    monkeypatch.setattr(flex, "_class_of", lambda call: ())
    for length in (21, 37, 45):
        q, k, v = drawn(q_len=length, k_len=length)
        keep = operands_of({"key_padding": True}, length=length)["key_padding"]
        assert_grads("flex", BLOCKS, setting_of(q, k, causal=True), q, k, v, softcap=2.0, key_padding=keep)
    assert counters["stats"]["unique_graphs"] == 2


def on_cuda(call: Call) -> Call:
    """The call as a device would hold it, without data."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (call.q, call.k, call.v))
    return replace(call, q=q, k=k, v=v)


HALF: dict[str, Any] = {"dtype": torch.bfloat16, "dim": 64, "v_dim": 64}
REASONS: list[tuple[Callable[[], Call], str]] = [
    (lambda: call_of(Dense(), dtype=torch.float64), "the dtype is torch.float64"),
    (lambda: on_cuda(call_of(Dense(), dtype=torch.bfloat16)), "a head size (8 and 8) is not from 16 to 256"),
    (lambda: call_of(Dilated([8, 16], [1, 2]), **HALF), "the relation is segment(8, rate 1, residue 0) + "),
    (lambda: call_of(SlidingWindow(12, step=3), **HALF), "of the window only every 3th key is seen"),
    (lambda: call_of(BLOCKS, q_offset=-3, **HALF), "query row 0 stands at position -3"),
    (lambda: replace(call_of(Dense(), **HALF), dropout_p=0.1), "dropout by position"),
    (lambda: replace(call_of(Dense(), **HALF), flat=True), "flat scores"),
    (lambda: replace(call_of(Dense(), **HALF), scale=float("nan")), "scale nan"),
    (lambda: call_of(Dense(), q_len=0, **HALF), "2 batch rows of 0 queries and 37 keys"),
    (
        lambda: replace(call_of(Dense(), q_len=50, **HALF), documents=torch.zeros(1, 37, dtype=torch.int64)),
        "50 queries from position 0 on, of which some are in no document",
    ),
    (
        lambda: replace(call_of(Dense(), **HALF), relation=Dense().relation(replace(call_of(Dense()).problem, q_len=1 << 20, k_len=1 << 20))),
        "would take 262144 MiB, more than 256",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("make", "reason"), REASONS)
def test_reasons(make: Callable[[], Call], reason: str) -> None:
    assert reason in (flex.supports(make(), False) or "")


def test_without_triton_or_flex_attention_there_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    call = on_cuda(call_of(Dense(), causal=True, **HALF))
    for backward in (False, True):
        assert flex.supports(call, backward) is None
    monkeypatch.setattr(flex, "_without_triton", lambda: "no Triton")
    assert flex.supports(call, False) == "no Triton"
    monkeypatch.setattr(flex, "_absent", lambda: "no FlexAttention")
    assert flex.supports(call, False) == "no FlexAttention"


def test_on_a_cpu_it_is_taken_only_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    others: dict[str, ModuleType] = {"flex": flex, "reference": select.reference}
    monkeypatch.setattr(select, "KERNELS", others)
    q, k, v = drawn(dtype=torch.float32)
    called: list[Call] = []
    monkeypatch.setattr(flex, "forward", lambda call: called.append(call) or select.reference.forward(call))
    monkeypatch.setenv("DILCOMPILE_TRUST", "off")
    attention(q, k, v, Dense())
    assert not called
    attention(q, k, v, Dense(), kernel="flex")
    assert len(called) == 1
