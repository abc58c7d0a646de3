"""A bias whose gradient is not asked for is a mask of floats: the flash op adds it, as exactly as products would."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracles import counts, softmax
from test_kernels import SCALE, drawn, setting_of, small_tiles  # noqa: F401  (the fixture works by being here)
from torch import Tensor

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import cpu, ops
from dilcompile.lowering.view_path import engines

BATCH, HEADS, ROWS = 2, 4, 29
FORMS: list[Form] = [Dense(), SlidingWindow(6, sinks=2), Dilated([8, 16], [1, 2], union="set", sinks=1, local=2)]
SHAPES = {
    "a number a key": (1, 1, 1, ROWS), "a number a key and batch row": (BATCH, 1, 1, ROWS), "a number a key and head": (HEADS, 1, ROWS),
    "a number a pair": (BATCH, 1, ROWS, ROWS), "a number a pair and head": (HEADS, ROWS, ROWS), "a number a row": (ROWS, 1),
}  # fmt: skip


def _bias(shape: tuple[int, ...], hides: bool) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64)
    if hides:
        bias = bias.masked_fill(torch.rand(shape, generator=generator) > 0.7, -torch.inf)
        bias[..., :3, :] = -torch.inf if bias.shape[-2] > 3 else bias[..., :3, :]
    return bias


@pytest.mark.parametrize("hides", [False, True], ids=["finite", "with -inf"])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_output_and_gradients(name: str, form: Form, causal: bool, hides: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = q, k, v = [x.requires_grad_() for x in drawn(BATCH, HEADS, 2, ROWS, ROWS, dtype=torch.float64)]
    bias = _bias(SHAPES[name], hides)
    keep = torch.arange(ROWS).expand(BATCH, ROWS) % 7 != 3
    products: list[Any] = []
    monkeypatch.setattr(engines, "_scores", lambda *a: products.append(a) or iter(()))  # type: ignore[func-returns-value]
    for padding in (None, keep):
        count = torch.from_numpy(counts(form, setting_of(q, k, causal=causal)))[None].expand(BATCH, -1, -1, -1)
        count = count * (bias > -torch.inf).expand(BATCH, HEADS, ROWS, ROWS)
        count = count if padding is None else count * padding[:, None, None]
        wanted, wanted_lse = softmax(q, k, v, count, SCALE, None, bias.clamp(min=-1e30))
        got, got_lse = ops.attention(
            q, k, v, padding, None, bias, None, str(form), causal, None, None, 0, SCALE, None, 0.0, "cpu",
        )  # fmt: skip
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(got_lse, wanted_lse, rtol=1e-10, atol=1e-10)
        seen = wanted_lse.isfinite()
        weights = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).view(wanted.shape)
        grads = [
            torch.autograd.grad((o * weights).sum() + e[seen].sum(), given) for o, e in ((got, got_lse), (wanted, wanted_lse))
        ]
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert products == [], "no products of whole blocks are made"


def test_a_bias_with_a_gradient_has_it() -> None:
    q, k, v = drawn(BATCH, HEADS, 2, ROWS, ROWS, dtype=torch.float64)
    bias = _bias((HEADS, 1, ROWS), False).requires_grad_()
    out, _ = ops.attention(q, k, v, None, None, bias, None, "dense()", True, None, None, 0, SCALE, None, 0.0, "cpu")
    reference, _ = ops.attention(q, k, v, None, None, bias, None, "dense()", True, None, None, 0, SCALE, None, 0.0, "reference")
    weights = torch.linspace(0.5, 1.5, out.numel(), dtype=torch.float64).view(out.shape)
    grads = [torch.autograd.grad((o * weights).sum(), bias)[0] for o in (out, reference)]
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-9, atol=1e-9)


def test_forgetting_which_rows_see_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    masked = cpu.masked_cuts

    def all_see(part: Any, block: Any) -> Any:
        for one in masked(part, block):
            yield engines.Masked(one.cut, one.mask, one.causal, None)

    monkeypatch.setattr(cpu, "masked_cuts", all_see)
    q, k, v = drawn(BATCH, HEADS, 2, ROWS, ROWS, dtype=torch.float64)
    bias = _bias((BATCH, 1, ROWS, ROWS), True)
    _, lse = ops.attention(q, k, v, None, None, bias, None, "dense()", False, None, None, 0, SCALE, None, 0.0, "cpu")
    assert not (lse[:, :, :3] == -torch.inf).all()
