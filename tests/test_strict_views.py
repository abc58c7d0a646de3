"""What is viewed behind an attention can be viewed behind the rewritten one, which lies in memory in another order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from finding import Call, Case, check, double  # noqa: F401  (the fixture works by being here)
from spellings import agree
from torch import Tensor

from dilcompile import rewriting

B, H, S, D = 2, 3, 5, 4


def qkv() -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, S, D) for _ in range(3))


def shared() -> tuple[Tensor, ...]:
    """Six query heads over three key heads."""
    return torch.randn(B, 2 * H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def viewed(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v: change((q @ k.mT).softmax(-1) @ v)


def repeated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """JetMoe's: heads repeated as a whole, and a ``contiguous()`` that was one already."""
    out = F.scaled_dot_product_attention(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))
    return out.transpose(1, 2).contiguous().view(B, S, 2, H * D)


CASES: list[Case] = [
    ("heads in the batch", viewed(lambda x: x.view(B * H, S, D)), qkv, "none (zero)"),
    ("rows of all heads", viewed(lambda x: (x * 2).view(B, H * S, D)), qkv, "none (zero)"),
    ("like another", viewed(lambda x: x.view_as(torch.zeros(B * H, S, D))), qkv, "none (zero)"),
    ("heads repeated as a whole", repeated, shared, "none (zero)"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_views_behind_a_site(case: Case) -> None:
    check(case)


def test_without_them_the_view_is_impossible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "relax_views", lambda gm: None)
    _, function, inputs, _ = CASES[0]
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        agree(Call(function), *inputs())
