"""Calls whose rows are a part of a longer sequence: what the native kernel makes of them, against the reference."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilcompile import distributed, functional
from dilcompile.forms import Union, parse_form
from dilcompile.lowering import native, reference, select
from dilcompile.lowering.call import Call, Held, relation_of
from dilcompile.lowering.choice import trust
from dilcompile.placements.shards import ORDERS, Shards
from dilcompile.progression import Progression
from dilcompile.relation import Problem

UNION = str(
    Union(
        (
            {"form": "dilated", "segments": [16, 64], "rates": [1, 4], "offset": "own"},
            {"form": "sliding_window", "window": 6},
            {"form": "block_sparse", "block": 16, "pattern": {"random": {"blocks": 1}}},
        )
    )
)
FORMS = [
    "dense()",
    "sliding_window(window=9, step=3)",
    "sliding_window(window=7, sinks=4)",
    "dilated(segments=(12, 24, 66), rates=(1, 4, 6), offset='own')",
    "dilated(segments=(8, 60), rates=(1, 5), offset='head_mod', sinks=3, local=4)",
    "dilated(segments=(16, 40), rates=(2, 4), offset='branch', union='set', coverage='zero')",
    "dilated(segments=(10, 30), rates=(1, 3), offset='head_block', heads='grouped', coverage='zero')",
    "dilated(segments=(9, 36), rates=(3, 2), offset='zero', coverage='zero')",
    "block_sparse(block=16, pattern={'random': {'blocks': 2, 'by_head': True}})",
    "block_sparse(block=(32, 16), pattern={'local': {'before': 1}})",
    UNION,
]


def drawn(length: int, held: Held, form: str, dtype: torch.dtype = torch.float64, dim: int = 5, **site: Any) -> Call:
    """A call of 4 heads over 2 key heads, in a sequence of ``length`` positions."""
    size = Problem(2, 4, 2, length, length, dim, dim, **site)
    relation = relation_of(parse_form(form), size).at(len(held.queries), length, 0)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, rows, heads, dim, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2)
        for heads, rows in ((4, len(held.queries)), (2, len(held.keys)), (2, len(held.keys)))
    )
    return Call(q, k, v, None, None, None, None, relation, 0.4, held=held)


def part_of(call: Call, keys: Progression) -> Call:
    """The same queries over some of the keys."""
    assert call.held is not None
    assert call.held.keys == Progression(0, call.problem.k_len), "all keys are there to take from"
    k, v = (x[:, :, keys.start : keys.stop : keys.step] for x in (call.k, call.v))
    return replace(call, k=k, v=v, held=replace(call.held, keys=keys))


def close(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_parts_of_a_sequence_equal_the_reference_and_add_up_to_the_whole(data: st.DataObject) -> None:
    """One rank's queries over each part of the keys; with the LSE of all keys the gradients of the parts are those of the whole."""
    draw = data.draw
    length, ranks = draw(st.integers(1, 140)), draw(st.integers(1, 5))
    runs = Shards(length, ranks, draw(st.sampled_from(ORDERS))).runs(draw(st.integers(0, ranks - 1)))
    queries = runs[-1].positions if runs else Progression(draw(st.integers(0, length - 1)), length, draw(st.integers(1, 200)))
    site: dict[str, Any] = {"is_causal": draw(st.booleans()), "window_left": draw(st.sampled_from([None, None, 11]))}
    call = drawn(
        length, Held(queries, Progression(0, length), draw(st.sampled_from([0, 3]))), draw(st.sampled_from(FORMS)), **site
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    if draw(st.booleans()):
        call = replace(call, key_padding=torch.rand(2, length, generator=generator) > 0.3)
    if draw(st.booleans()):
        call = replace(call, documents=(torch.rand(draw(st.sampled_from([1, 2])), length, generator=generator) > 0.9).cumsum(1))
    if draw(st.booleans()):
        first = torch.randint(-3, length, (1, len(queries)), generator=generator)
        call = replace(
            call, row_limits=torch.stack([first, first + torch.randint(0, length + 5, first.shape, generator=generator)])
        )
    if draw(st.booleans()):
        call = replace(call, dropout_p=0.3, dropout_seed=torch.tensor([5]), softcap=1.5)
    other = Shards(length, draw(st.integers(1, 5)), draw(st.sampled_from(ORDERS)))
    parts = [run.positions for rank in range(other.ranks) for run in other.runs(rank)]
    out, lse = reference.forward(call)
    grad, grad_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in (out, lse))
    exact = reference.backward(call, out, lse, grad, grad_lse)
    sums = [torch.zeros(x.shape, dtype=torch.float64) for x in (call.q, call.k, call.v)]
    for keys in parts:
        part = part_of(call, keys)
        assert select.refusal(native, part, backward=True) is None
        for found, wanted in zip(native.forward(part), reference.forward(part), strict=True):
            close(found, wanted)
        # The gradient of the LSE of all keys is passed on by each part for its own.
        d_q, d_k, d_v, _ = native.backward(part, out, lse, grad, grad_lse)
        sums[0] += d_q
        sums[1][:, :, keys.start : keys.stop : keys.step] += d_k
        sums[2][:, :, keys.start : keys.stop : keys.step] += d_v
    for total, whole in zip(sums, exact[:3], strict=True):
        close(total, whole)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMS),
    st.booleans(),
    st.integers(0, 30),
    st.integers(1, 9),
    st.integers(0, 30),
    st.integers(1, 9),
    st.booleans(),
)
def test_any_two_progressions_equal_the_reference(
    form: str, causal: bool, q_start: int, q_step: int, k_start: int, k_step: int, documents: bool
) -> None:
    """Steps that divide a rate, are divided by one, and are foreign to it."""
    held = Held(Progression(q_start, 131, q_step), Progression(k_start, 127, k_step))
    call = drawn(131, held, form, is_causal=causal)
    if documents:
        call = replace(call, documents=(torch.arange(131) // 37)[None])
    out, lse = native.forward(call)
    exact_out, exact_lse = reference.forward(call)
    close(out, exact_out)
    close(lse, exact_lse)
    for found, wanted in zip(
        native.backward(call, out, lse, out, lse.nan_to_num(neginf=0)),
        reference.backward(call, out, lse, out, lse.nan_to_num(neginf=0)),
        strict=True,
    ):
        if wanted is not None and found is not None:
            close(found, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("steps", [(1, 1), (4, 3)], ids=str)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
def test_low_precision_is_as_good_as_eager_attention(form: str, steps: tuple[int, int], dtype: torch.dtype) -> None:
    """Twice the error of eager attention in this dtype and a rounding, over several blocks and tiles."""
    held = Held(Progression(100, 300, steps[0]), Progression(10, 270, steps[1]))
    call = drawn(300, held, form, dtype, dim=40, is_causal=True)
    for verdict in (trust._compare(native, call), trust._compare_gradients(native, call)):
        assert verdict.passes, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_four_ranks_are_as_exact_as_one(dtype: torch.dtype) -> None:
    """Results of steps are added in float32, and rounded once."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(1, heads, 256, 32, generator=generator, dtype=torch.float64).to(dtype) for heads in (4, 2, 2, 4)]

    def made(ranks: int | None, exact: bool) -> list[Tensor]:
        q, k, v, grad = (x.double() if exact else x for x in operands)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if ranks is None:
            out = functional.attention(*leaves, "dense", is_causal=True, kernel="native")
        else:
            options = {"ranks": ranks, "method": "ring", "order": "zigzag", "is_causal": True, "kernel": "native"}
            out = distributed.simulate(*leaves, "dense", **options).out
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    exact, one, four = made(None, True), made(None, False), made(4, False)
    for name, true, alone, found in zip(("out", "q", "k", "v"), exact, one, four, strict=True):
        assert found.dtype == dtype
        assert (found.double() - true).norm() <= 1.1 * (alone.double() - true).norm(), name


def test_numbers_far_outside_of_the_sequence_do_not_overflow() -> None:
    far = 2**48
    for form in (f"dilated(segments=({far}, 16), rates=({far}, 1), coverage='zero')", f"sliding_window(window=4, step={far})"):
        for held in (
            Held(Progression(3, 40, 5), Progression(1, 40, 3)),
            Held(Progression(7, 8, far), Progression(7, 8, far)),
            Held(Progression(0, 40, 39), Progression(0, 40, 39)),
        ):
            call = drawn(40, held, form)
            for found, wanted in zip(native.forward(call), reference.forward(call), strict=True):
                close(found, wanted)


def test_rows_that_do_not_fit_their_positions_are_named() -> None:
    call = drawn(20, Held(Progression(0, 20, 2), Progression(0, 20)), "dense()")
    with pytest.raises(AssertionError, match="20 rows do not stand at the 10 positions 0:20:2"):
        native.forward(replace(call, held=Held(Progression(0, 20, 2), Progression(0, 20, 2))))


@pytest.mark.parametrize("backward", [False, True])
def test_a_small_part_stands_for_the_parts_of_a_sequence_in_the_check_of_numbers(backward: bool) -> None:
    call = drawn(300, Held(Progression(8, 300, 4), Progression(0, 75)), FORMS[3], torch.float32, is_causal=True)
    assert trust.check(native, call, backward).passes
    assert trust.class_of(call) != trust.class_of(replace(call, held=Held(Progression(0, 73), Progression(0, 75))))
    assert trust.class_of(call) != trust.class_of(replace(call, held=None))
