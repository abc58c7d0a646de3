"""Kernel flex over blocks that the data chooses: its lists against the pairs, output and gradients against float64, no waiting."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import softmax
from test_adaptive import GIVEN, call_of, eager, given_blocks, mass, operands, pairs_of, rounding, topk
from test_flex import shown_by_lists, small_blocks, uncompiled  # noqa: F401
from test_kernels import SCALE, assert_as_good_as_eager, drawn, operands_of, run, setting_of
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from dilcompile.errors import KernelError
from dilcompile.forms import BlockSparse
from dilcompile.functional import Selection, attention, select_blocks
from dilcompile.lowering import flex, flex_mask, select
from dilcompile.lowering.call import Call, problem_of, relation_of
from dilcompile.lowering.choice import trust
from dilcompile.lowering.flex_mask import Kind
from dilcompile.lowering.selection import select_blocks as choose
from dilcompile.relation import Problem

FREE = {"given": {"most": 9}}


def drawn_selection(size: Problem, rows: int, columns: int, shared: tuple[bool, bool]) -> Selection:
    generator = torch.Generator().manual_seed(rows * 31 + columns)
    shape = (1 if shared[0] else size.batch, 1 if shared[1] else size.heads, rows)
    order = torch.rand(*shape, columns, generator=generator).argsort(-1)[..., :9].sort(-1).values
    return Selection(order.int(), torch.randint(0, order.shape[-1] + 1, shape, generator=generator).int())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_lists_and_function_together_are_the_chosen_pairs(data: st.DataObject) -> None:
    draw = data.draw
    q_len, k_len, offset = draw(st.integers(1, 90)), draw(st.integers(1, 120)), draw(st.integers(0, 40))
    limit = st.one_of(st.none(), st.integers(0, 40))
    sizes = draw(st.sampled_from([(16, 16), (17, 24), (48, 16), (16, 64)]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_mask, "BLOCK", draw(st.sampled_from([8, 24, 32])))
        flex_mask._cut.cache_clear()
        shape = (torch.empty(2, heads, length, 8) for heads, length in ((4, q_len), (2, k_len), (2, k_len)))
        problem = problem_of(*shape, draw(st.booleans()), draw(limit), draw(limit), offset)
        relation = relation_of(BlockSparse(sizes, FREE, "zero"), problem)
        rows = (offset + q_len - 1) // sizes[0] - offset // sizes[0] + 1
        chosen = drawn_selection(problem, rows, -(-k_len // sizes[1]), (draw(st.booleans()), draw(st.booleans())))
        padding = torch.rand(2, k_len) > 0.3 if draw(st.booleans()) else None
        q, k, v = (torch.empty(2, h, n, 8) for h, n in ((4, q_len), (2, k_len), (2, k_len)))
        call = Call(q, k, v, padding, None, None, None, relation, 0.4, selection=chosen)
        t, keys = torch.arange(q_len)[:, None] + offset, torch.arange(k_len)
        limits = relation.multiplicity(torch.arange(4)[:, None, None], t, keys).bool()[None]
        wanted = limits & pairs_of(chosen, replace(problem, is_causal=False), sizes, padding)
        assert torch.equal(shown_by_lists(call).expand(2, 4, -1, -1), wanted)
        if padding is None and limits.all() and chosen.counts.min() == chosen.columns.shape[3] == -(-k_len // sizes[1]):
            # Where all is chosen, blocks that end before the sequences do are full.
            partial = flex_mask.tables(call, Kind.of(call)).lists[0]
            assert not partial[:, :, : q_len // flex_mask.BLOCK].any() or k_len % flex_mask.BLOCK


CHOSEN: list[Any] = [topk("pooled", 2), mass("antidiagonal"), {"any": [{"global": {"columns": 1}}, topk("vertical_slash", 2)]}]


@pytest.mark.parametrize("pattern", CHOSEN, ids=str)
@pytest.mark.parametrize("block", [8, 32])
@pytest.mark.usefixtures("uncompiled")
def test_output_and_gradients(block: int, pattern: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (flex, flex_mask):
        monkeypatch.setattr(module, "BLOCK", block)
    form = BlockSparse((24, 16), pattern, "zero")
    for q_len, causal, padded in ((90, True, False), (61, False, True), (61, True, True)):
        q, k, v = (x.requires_grad_() for x in operands(q_len, 90, 4, 2))
        keep = torch.rand(2, 90, generator=torch.Generator().manual_seed(1)) > 0.4 if padded else None
        blocks = select_blocks(q, k, form, is_causal=causal, key_padding=keep)
        wanted = eager(q, k, v, pairs_of(blocks, problem_of(q, k, v, causal, None, None, 90 - q_len), (24, 16), keep))
        assert_same(attention(q, k, v, form, is_causal=causal, key_padding=keep, kernel="flex"), wanted, q, k, v)


def assert_same(found: Any, wanted: Tensor, *leaves: Tensor) -> None:
    length = leaves[1].shape[2]
    assert (found - wanted).abs().max() <= rounding(length, leaves[2])
    weight = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    mine, theirs = (torch.autograd.grad((out * weight).sum(), leaves) for out in (found, wanted))
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() <= rounding(length * 8, other, leaves[2], leaves[0])


@pytest.mark.usefixtures("uncompiled")
def test_given_blocks_shared_by_batch_rows_and_heads() -> None:
    q, k, v = (x.requires_grad_() for x in operands(64, 64))
    found = attention(q, k, v, GIVEN, is_causal=True, blocks=given_blocks(), kernel="flex")
    assert_same(found, attention(q, k, v, GIVEN, is_causal=True, blocks=given_blocks(), kernel="reference"), q, k, v)  # type: ignore[arg-type]


@pytest.mark.usefixtures("uncompiled")
def test_a_new_length_compiles_nothing_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both passes as torch.compile traces them for a CUDA device, lengths being symbols, without its code."""
    torch._dynamo.reset()
    counters.clear()

    def traced(function: Any, class_of_calls: tuple[object, ...]) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")

    monkeypatch.setattr(flex, "_compiled", traced)
    monkeypatch.setattr(flex, "_class_of", lambda call: ())
    form = BlockSparse(16, topk("pooled", 2))
    for length in (51, 90):
        q, k, v = (x.requires_grad_() for x in operands(length, length, 4, 2))
        blocks = select_blocks(q, k, form, is_causal=True)
        wanted = eager(q, k, v, pairs_of(blocks, problem_of(q, k, v, True, None, None, 0), (16, 16), None))
        assert_same(attention(q, k, v, form, is_causal=True, kernel="flex"), wanted, q, k, v)
    assert counters["stats"]["unique_graphs"] == 2


def test_compiled_for_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's C++ code, by the kernel's name, with the LSE that it does not give."""
    for module in (flex, flex_mask):
        monkeypatch.setattr(module, "BLOCK", 128)
    monkeypatch.setenv("DILCOMPILE_TRUST", "off")
    q, k, v = drawn(heads=2, kv_heads=1, q_len=150, k_len=150, dim=16, v_dim=16, dtype=torch.float32)
    form, at = BlockSparse((64, 32), {"any": [{"fixed": {"stride": 3}}, topk("pooled", 2)]}), setting_of(q, k, causal=True)
    keep = operands_of({"key_padding": True}, length=150)["key_padding"]
    found = run(q.requires_grad_(), k, v, form, "flex", at, key_padding=keep)
    relation = relation_of(form, problem_of(q, k, v, True, None, None, 0))
    chosen = choose(relation, q, k, keep, SCALE)
    assert chosen is not None
    seen = pairs_of(chosen, relation.problem, (64, 32), keep).double()
    exact, eager = (softmax(*(x.to(dtype) for x in (q, k, v)), seen, SCALE) for dtype in (torch.float64, torch.float32))
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, torch.float32)
    assert (found[1] == -torch.inf).any()
    with pytest.raises(KernelError, match="on a CPU compiled FlexAttention has no backward"):
        found[0].sum().backward()


class _NothingIsReadBack(TorchDispatchMode):
    """Raises where an operator's result would have to come to the host before the next can start."""

    WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2", "masked_select", "allclose")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in self.WAITS, f"{name} waits for the device"
        assert name != "index" or all(x is None or x.dtype != torch.bool for x in args[1]), (
            "an index by a mask waits for the device"
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("pattern", CHOSEN, ids=str)
def test_nothing_is_read_back_on_the_way_to_the_kernel(pattern: Any) -> None:
    q, k, v = operands(90, 90, 4, 2)
    relation = relation_of(BlockSparse(16, pattern), problem_of(q, k, v, True, None, None, 0))
    with pytest.raises(AssertionError, match="waits for the device"), _NothingIsReadBack():
        q.sum().item()
    with _NothingIsReadBack():
        blocks = choose(relation, q, k)
        call = Call(q, k, v, None, None, None, None, relation, 0.3, selection=blocks)
        kind = Kind.of(call)
        found = flex_mask.tables(call, kind)
        flex_mask.buffers_of_mask(call, found)
        flex._lists(found, kind)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.usefixtures("uncompiled")
def test_the_check_that_a_device_makes_passes_and_notices(backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    call = call_of(BlockSparse(16, topk()))
    assert flex.supports(call, backward) is None
    verdict = trust.check(flex, call, backward)
    assert verdict.passes, verdict

    def fewer(call: Call, kind: Kind) -> flex_mask.Tables:
        assert call.selection is not None
        half = Selection(call.selection.columns, call.selection.counts // 2)
        return flex_mask.tables(replace(call, selection=half), kind)

    monkeypatch.setattr(flex, "tables", fewer)
    assert not trust.check(flex, call, backward).passes


def test_large_tables_are_refused_unless_the_queries_are_as_large() -> None:
    size = Problem(1, 32, 8, 1 << 17, 1 << 17, 128, 128, is_causal=True)
    relation = BlockSparse(64, FREE, "zero").relation(size)
    shape = (1, 32, 1 << 11, 9)
    q, k, v = (torch.empty(1, heads, 1 << 17, 128, dtype=torch.bfloat16, device="meta") for heads in (32, 8, 8))
    chosen = Selection(torch.empty(shape, dtype=torch.int32), torch.empty(shape[:3], dtype=torch.int32))
    with pytest.MonkeyPatch.context() as patch:
        for module in (flex, flex_mask):
            patch.setattr(module, "BLOCK", 128)
        call = Call(q, k, v, None, None, None, None, relation, 0.3, selection=chosen)
        assert flex._of_size(call) is None
        assert "MiB, more than 256" in (flex._of_size(replace(call, q=q[..., :16])) or "")
        assert flex._of_size(replace(call, q=q[..., :16], selection=Selection(*(x[:, :1] for x in chosen)))) is None


def test_it_is_a_rival_on_cuda_and_its_reason_is_its_own() -> None:
    assert "flex" in select.RIVALS["cuda"]
    call = call_of(BlockSparse(16, topk()), torch.float64)
    assert select.refusal(flex, call, False) == "the dtype is torch.float64, not float16, bfloat16 or float32"
