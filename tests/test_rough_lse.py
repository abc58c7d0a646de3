"""Attention whose LSE nobody reads (``exact_lse=False``): the native kernel narrows its weights as it makes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import ops

LONG = Dilated([64, 128, 256, 512], [1, 2, 4, 8])
OWN = Dilated([64, 512], [1, 16], offset="own", local=20, sinks=3)
FORMS = [Dense(), LONG, OWN, Dilated([64, 512], [1, 4], union="set"), SlidingWindow(100, sinks=3)]


def run(q: Tensor, k: Tensor, v: Tensor, form: Form, kernel: str, causal: bool = True, **more: Any) -> tuple[Tensor, Tensor]:
    found: tuple[Tensor, Tensor] = ops.attention(
        q, k, v, more.get("key_padding"), None, None, None, str(form), causal, None, None, 0, more.get("scale", 0.3),
        more.get("softcap"), 0.0, kernel, exact_lse=more.get("exact_lse", False),
    )  # fmt: skip
    return found


def drawn(length: int, dims: tuple[int, int] = (64, 64), heads: int = 2, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((2 * heads, dims[0]), (heads, dims[0]), (heads, dims[1]))
    return [torch.randn(1, h, length, d, generator=generator).bfloat16() for h, d in sizes]


@pytest.mark.parametrize("more", [{}, {"softcap": 2.0}, {"padded": True}], ids=str)
@pytest.mark.parametrize("dims", [(64, 64), (80, 33)], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_output_is_as_good_as_the_flash_ops(form: Form, causal: bool, dims: tuple[int, int], more: dict[str, Any]) -> None:
    more, (q, k, v) = dict(more), drawn(600, dims)
    k = k * torch.linspace(0, 2, 600)[:, None].bfloat16()
    if more.pop("padded", False):
        more["key_padding"] = torch.rand(1, 600, generator=torch.Generator().manual_seed(1)) > 0.3
    exact, exact_lse = run(q.double(), k.double(), v.double(), form, "reference", causal, **more)
    found, lse = run(q, k, v, form, "native", causal, **more)
    views, _ = run(q, k, v, form, "cpu", causal, **more)
    eps = torch.finfo(torch.bfloat16).eps
    assert (found - exact).abs().max() <= 2 * (views - exact).abs().max() + eps * exact.abs().max()
    # In the root mean square too, where the largest error is one draw from its tail.
    assert (found - exact).norm() <= 2 * (views - exact).norm()
    seen = exact_lse.isfinite()
    assert torch.equal(lse.isfinite(), seen)
    # Each weight is within a digit of bfloat16.
    assert ((lse - exact_lse)[seen].abs() <= eps + torch.finfo(torch.float32).eps * exact_lse[seen].abs()).all()


def test_values_that_are_alike_come_out_as_they_are() -> None:
    """Weights are divided by the sum of these very weights."""
    q, k, v = drawn(700)
    found, _ = run(q, k, torch.ones_like(v), LONG, "native")
    assert torch.equal(found, torch.ones_like(found))


@pytest.mark.parametrize("number", [float("nan"), float("inf"), 1e38, -3e38, 1e20, -1e12], ids=str)
@pytest.mark.parametrize("operand", [0, 1])
def test_what_is_no_number_or_very_large(operand: int, number: float) -> None:
    """Weights in 16 bits hold neither: such tiles are computed as ever."""
    operands = drawn(300)
    operands[operand][0, 1, 77, 5] = number
    found, lse = run(*operands, LONG, "native")
    expected, expected_lse = run(*operands, LONG, "reference")
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    there = expected.isfinite()
    assert (found - expected)[there].abs().max() <= 2 * torch.finfo(torch.bfloat16).eps * expected[there].abs().max()


@pytest.mark.parametrize("scale", [1e-30, 1e-45, 1e-3, 50.0, 1e8, 1e30])
def test_scales(scale: float) -> None:
    q, k, v = drawn(300)
    found, _ = run(q, k, v, LONG, "native", scale=scale)
    expected, _ = run(q, k, v, LONG, "reference", scale=scale)
    assert (found - expected).abs().max() <= 4 * torch.finfo(torch.bfloat16).eps * expected.abs().max()


def test_what_gradients_are_made_from_is_exact() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(200))
    _, lse = run(q, k, v, LONG, "native", exact_lse=False)
    with torch.no_grad():
        _, exact = run(q, k, v, LONG, "native", exact_lse=True)
        _, rough = run(q, k, v, LONG, "native", exact_lse=False)
    assert torch.equal(lse, exact)
    if torch.cpu._is_amx_tile_supported():
        assert not torch.equal(rough, exact)


def test_an_lse_in_the_dtype_of_the_scores_is_exact() -> None:
    q, k, v = (x.float() for x in drawn(200))
    assert torch.equal(run(q, k, v, LONG, "native")[1], run(q, k, v, LONG, "native", exact_lse=True)[1])


def test_an_lse_that_is_returned_is_exact() -> None:
    q, k, v = drawn(200)
    _, lse = attention(q, k, v, LONG, is_causal=True, kernel="native", return_lse=True)
    _, exact = run(q, k, v, LONG, "native", scale=64**-0.5, exact_lse=True)
    assert torch.equal(lse, exact)


class _Attention(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.nn.functional.scaled_dot_product_attention(x * self.scale, x, x, is_causal=True)
        return out


class _Sinks(_Attention):
    """Scores of a sink beside those of the keys, as gpt-oss has them."""

    def forward(self, x: Tensor) -> Tensor:
        scores = (x * self.scale) @ x.mT * 0.25
        scores = scores.masked_fill(torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).tril().logical_not(), float("-inf"))
        sinks = self.scale.expand(*scores.shape[:-1], 1)
        out: Tensor = torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ x
        return out


@pytest.mark.parametrize(
    ("model", "training", "exact"), [(_Attention, False, False), (_Attention, True, True), (_Sinks, False, True)]
)
def test_graphs_ask_for_an_exact_lse_where_it_is_read(
    model: type[torch.nn.Module], training: bool, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, right = [], ops._call

    def noted(*args: Any, **kwargs: Any) -> Any:
        call = right(*args, **kwargs)
        asked.append(call.exact_lse)
        return call

    monkeypatch.setattr(ops, "_call", noted)
    policy = {"version": 1, "rules": [{"name": "window", "apply": {"form": "sliding_window", "window": 8}}]}
    compiled = torch.compile(model(), backend="dilated", options={"policy": policy, "inner": "eager"})
    with torch.set_grad_enabled(training):
        compiled(torch.randn(1, 2, 32, 16, dtype=torch.bfloat16))
    assert asked == [exact]
