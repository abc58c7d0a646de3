"""Logits beside the keys that are dropped after the softmax: concatenated, padded, or a number in the sum; in every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call, double, said  # noqa: F401  (the fixture works by being here)
from spellings import WINDOW, WINDOWED, agree
from torch import Tensor, nn

B, H, S, D = 2, 4, 7, 6


class Sunk(nn.Module):
    """gpt-oss' attention: two query heads a key head, a learned logit a head, the row's maximum taken off."""

    def __init__(self, extra: Callable[[], Tensor] | None = None, fill: float | None = None, sinks: int = 1) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(H * D, H * D), nn.Linear(H * D, H * D)
        self.sinks = nn.Parameter(torch.randn(H, sinks))
        self.extra, self.fill = extra, fill

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        q = self.q(x).view(B, S, H, D).transpose(1, 2)
        k, v = (part.view(B, S, H // 2, D).transpose(1, 2).repeat_interleave(2, 1) for part in self.kv(x).chunk(2, -1))
        fill = torch.finfo(x.dtype).min if self.fill is None else self.fill
        hidden = torch.ones(S, S, dtype=torch.bool).triu(1)[None, None]
        if self.extra is not None:
            hidden = hidden | self.extra()
        if keep is not None:
            hidden = hidden | ~keep[:, None, None]
        scores = q @ k.mT * 0.4 + torch.zeros(hidden.shape).masked_fill(hidden, fill)
        sinks = self.sinks.reshape(1, H, 1, -1).expand(B, -1, S, -1)
        scores = torch.cat([scores, sinks], -1)
        scores = scores - scores.max(-1, keepdim=True).values
        weights = F.softmax(scores, -1)[..., :S]
        return (weights @ v).transpose(1, 2).reshape(B, S, -1)


def keep(empty: bool) -> Tensor:
    mask = torch.ones(B, S, dtype=torch.bool)
    mask[1, :3] = False
    mask[0] = not empty
    return mask


@pytest.mark.parametrize("fill", [None, -1e30, -float("inf")])
@pytest.mark.parametrize("empty", [False, True])
@pytest.mark.parametrize("sinks", [1, 3])
def test_learned_sinks(fill: float | None, empty: bool, sinks: int) -> None:
    found = agree(Sunk(fill=fill, sinks=sinks), torch.randn(B, S, H * D), keep(empty))
    (site,) = found.sites
    assert (said(found), site.kv_heads, site.sinks is not None) == ("causal & padding (zero)", H // 2, True)


def test_learned_sinks_under_symbolic_lengths() -> None:
    found = agree(Sunk(), torch.randn(B, S, H * D), keep(False), dynamic=True)
    assert said(found) == "causal & padding (zero)"


def test_sinks_stay_beside_the_keys_of_a_window() -> None:
    def far() -> Tensor:
        places = torch.arange(S)
        return (places[:, None] - places[None, :]).abs() >= WINDOW

    module, reference = Sunk(), Sunk(far)
    reference.load_state_dict(module.state_dict())
    found = agree(module, torch.randn(B, S, H * D), policy=WINDOWED, reference=reference, gradients=False)
    assert found.rewritten == 1


def qkv() -> tuple[Tensor, ...]:
    return torch.randn(B, H, S, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)


def of_scores(weights: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda q, k, v, *more: weights(q @ k.mT * 0.4, *more) @ v


def _front(s: Tensor) -> Tensor:
    return torch.cat((s.new_zeros(B, H, S, 2), s), -1).softmax(-1)[..., 2:]


def _scaled(s: Tensor, sink: Tensor) -> Tensor:
    return (torch.cat((s, sink.expand(B, H, S, 1)), -1) * 3.0).softmax(-1)[..., :-1]


def _kept(s: Tensor) -> Tensor:
    return F.pad(s, (0, 1)).softmax(-1)[..., 1:]


def _two_parts(s: Tensor) -> Tensor:
    return torch.cat((s, s * 2), -1).softmax(-1)[..., :S]


def _shifted_inside(s: Tensor, sink: Tensor) -> Tensor:
    s = s - s.amax(-1, keepdim=True)
    return torch.cat((s, sink.expand(B, H, S, 1)), -1).softmax(-1)[..., :-1]


def _masked_after(s: Tensor, sink: Tensor) -> Tensor:
    s = torch.cat((s, sink.expand(B, H, S, 1)), -1)
    return s.masked_fill(torch.ones(S, S + 1, dtype=torch.bool).triu(1), -1e30).softmax(-1)[..., :-1]


def _added_to_keys_alone(s: Tensor) -> Tensor:
    return F.pad(s + 1.0, (0, 1)).softmax(-1)[..., :-1]


CASES: list[tuple[str, Callable[..., Any], bool, str]] = [
    ("softmax1 by padding", of_scores(lambda s: F.pad(s, (0, 1)).softmax(-1)[..., :-1]), False, "none (zero)"),
    ("padding of another number", of_scores(lambda s: F.pad(s, (0, 2), value=0.7).softmax(-1)[..., :S]), False, "none (zero)"),
    ("zeros in front", of_scores(_front), False, "none (zero)"),
    ("scaled together", of_scores(_scaled), True, "none (zero)"),
    ("a sink a row", of_scores(_scaled), True, "none (zero)"),
    ("the wrong column dropped", of_scores(_kept), False, "miss: aten.slice stands between the softmax and the values"),
    ("two products side by side", of_scores(_two_parts), False, "miss: the keys come in several parts, each with a product of its own"),
    ("the maximum taken off the keys alone", of_scores(_shifted_inside), True, "miss: a number a row is taken off the scores, but not off the sinks"),
    ("a mask over the sink too", of_scores(_masked_after), True, "miss: a mask runs along an axis that the scores don't have"),
    ("a number added to the keys alone", of_scores(_added_to_keys_alone), False, "miss: a number is added to the scores, but not to the sinks"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_columns_beside_the_keys(case: tuple[str, Callable[..., Any], bool, str]) -> None:
    name, function, with_sink, golden = case
    shape = (B, H, S, 1) if name == "a sink a row" else (H, 1, 1)
    found = agree(Call(function), *qkv(), *([torch.randn(shape)] if with_sink else []))
    assert said(found) == golden, name


def test_a_sink_of_data_beside_rows_without_keys_is_kept() -> None:
    """A data sink may itself be hidden: what such a row becomes depends on it."""

    def call(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
        scores = torch.cat(((q @ k.mT).masked_fill(~mask[:, None, None], -1e30), sink), -1)
        return scores.softmax(-1)[..., :-1] @ v

    found = agree(Call(call), *qkv(), keep(True), torch.full((B, H, S, 1), -1e30))
    assert said(found) == "kept: padding (other)"
