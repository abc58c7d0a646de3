"""Calls whose rows are a part of a longer sequence, by the Triton kernels in the interpreter, against the reference in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_held import FORMS, close, drawn, part_of
from torch import Tensor

from dilcompile import distributed, functional
from dilcompile.lowering import reference, select, triton
from dilcompile.lowering.call import Call, Held
from dilcompile.lowering.choice import trust
from dilcompile.lowering.triton import plan
from dilcompile.progression import Progression

LISTS = [form for form in FORMS if "block_sparse" in form]
WALKED = [form for form in FORMS if form not in LISTS]
LENGTH = 59
# Contiguous: those before, the own ones, those behind; strides that divide a rate, are divided by one, and are foreign to it.
PARTS = [
    (Progression(20, 40), Progression(0, 20)),
    (Progression(20, 40), Progression(20, 40)),
    (Progression(17, 38), Progression(30, LENGTH)),
    (Progression(1, LENGTH, 2), Progression(0, LENGTH, 2)),
    (Progression(2, LENGTH, 4), Progression(2, LENGTH, 4)),
    (Progression(3, LENGTH, 3), Progression(1, 50, 5)),
    (Progression(7, LENGTH), Progression(0, LENGTH, 6)),
]


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    plan.plan_of.cache_clear()


def drawn_part(form: str, queries: Progression, keys: Progression, **site: object) -> Call:
    """A call over all keys, and with those that it is asked for."""
    return part_of(drawn(LENGTH, Held(queries, Progression(0, LENGTH)), form, dim=8, **site), keys)


def assert_part(call: Call) -> None:
    """Forward and gradients; the LSE and output of all keys are some others."""
    assert select.refusal(triton, call, backward=True) is None
    found, exact = triton.forward(call), reference.forward(call)
    for mine, true in zip(found, exact, strict=True):
        assert mine.dtype == true.dtype
        close(mine, true)
    generator = torch.Generator().manual_seed(1)
    out, lse, grad, grad_lse = (torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in exact * 2)
    lse = torch.logaddexp(exact[1], lse)
    mine = triton.backward(call, out, lse, grad, grad_lse)
    for gradient, true in zip(mine[:3], reference.backward(call, out, lse, grad, grad_lse)[:3], strict=True):
        close(gradient, true)


@pytest.mark.parametrize(
    ("form", "parts"), [(WALKED[n], PARTS[m]) for n in (0, 1, 3, 5, 6) for m in range(len(PARTS)) if (n + m) % 2], ids=str
)
def test_two_progressions_equal_the_reference(form: str, parts: tuple[Progression, Progression]) -> None:
    assert_part(drawn_part(form, *parts, is_causal=form != WALKED[1]))


@pytest.mark.parametrize("parts", [PARTS[2], PARTS[5]], ids=lambda parts: " x ".join(map(str, parts)))
@pytest.mark.parametrize("mask", ["documents", "padding and dropout", "limits"])
def test_masks_mean_positions_of_the_sequence(mask: str, parts: tuple[Progression, Progression]) -> None:
    call = drawn_part(WALKED[3], *parts, is_causal=True)
    if mask == "documents":
        call = replace(call, documents=(torch.arange(LENGTH) // 23)[None])
    elif mask == "limits":
        first = torch.arange(len(parts[0])) * 2 - 3
        call = replace(call, row_limits=torch.stack([first, first + 31])[:, None])
    else:
        assert call.held is not None
        keep = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) > 0.3
        call = replace(
            call, key_padding=keep, dropout_p=0.3, dropout_seed=torch.tensor([5]), held=replace(call.held, first_head=3)
        )
    assert_part(call)


def test_classes_that_are_too_fine_are_walked_row_by_row() -> None:
    """Tiles are runs of the part's rows then."""
    call = drawn_part(
        "dilated(segments=(42, 55), rates=(7, 11), coverage='zero')", Progression(1, LENGTH, 2), Progression(0, 50, 3)
    )
    made = plan.plan_of(call.relation, 8, 16, False, torch.device("cpu"), call.held)
    assert made.counted
    assert_part(call)


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
def test_ranks_give_the_numbers_of_one(order: str) -> None:
    """The steps of a ring by this kernel, over places that are not all tokens."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(1, heads, 37, 8, generator=generator, dtype=torch.float64).requires_grad_() for heads in (2, 1, 1)]
    grad = torch.randn(1, 2, 37, 8, generator=generator, dtype=torch.float64)
    form = "dilated(segments=(8, 24), rates=(1, 2))"

    def made(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    options = {"ranks": 3, "method": "ring", "order": order, "is_causal": True, "kernel": "triton"}
    found = made(distributed.simulate(*leaves, form, **options).out)
    for mine, true in zip(found, made(functional.attention(*leaves, form, is_causal=True, kernel="reference")), strict=True):
        close(mine, true)


def test_results_are_wide_and_as_good_as_eager_attention() -> None:
    held = Held(Progression(12, 44, 2), Progression(3, 27))
    call = drawn(45, held, WALKED[0], torch.bfloat16, dim=16, is_causal=True)
    out, lse = triton.forward(call)
    grads = triton.backward(call, out.bfloat16(), lse, torch.ones_like(call.q), None)
    assert {x.dtype for x in (out, lse, *grads[:3])} == {torch.float32}
    for verdict in (trust._compare(triton, call), trust._compare_gradients(triton, call)):
        assert verdict.passes, verdict


def test_a_part_that_is_not_walked_is_refused_with_the_reason() -> None:
    parts = (Progression(1, LENGTH, 2), Progression(0, LENGTH))
    reason = select.refusal(triton, drawn_part(LISTS[0], *parts), False)
    assert reason == "the blocks of a pattern over a part of a sequence"
    far = Held(Progression(0, 3 * 65521, 65521), Progression(0, 4))
    relation = drawn(3 * 65521, far, "sliding_window(window=9000, step=3001)").relation
    assert plan.unplannable(relation, far) == (
        "rows 65521 positions apart and a rate of 3001: what both hold is too far apart for 32 bits"
    )
