"""What looks like attention and is none: nothing of these models may be rewritten."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo.calls import hidden
from zoo.handwritten import SCALE, Attend, Stack, Written
from zoo.model import Model
from zoo.sizes import WIDTH


class Router(nn.Module):
    """A mixture of experts: a softmax over experts, then their weighted sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        chosen = self.gate(x).softmax(-1)
        return torch.einsum("bne,bned->bnd", chosen, torch.einsum("bnd,edf->bnef", x, self.experts))


class Pooling(nn.Module):
    """A softmax over tokens of a linear score: no query."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (self.score(x).softmax(1).transpose(1, 2) @ x).expand_as(x)


class Slots(nn.Module):
    """Slot attention: the softmax runs over the slots, which are the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.slots = nn.Parameter(torch.randn(8, WIDTH))
        self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        slots = F.layer_norm(self.slots + x.mean(1, keepdim=True), (WIDTH,))
        shares = (torch.einsum("bsd,bnd->bsn", slots, self.k(x)) * WIDTH**-0.5).softmax(1) + 1e-8
        shares = shares / shares.sum(-1, keepdim=True)
        found = torch.einsum("bsn,bnd->bsd", shares, self.v(x))
        return x + found.mean(1, keepdim=True)


def linear_attention(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return q.softmax(-1) @ (k.softmax(-2).transpose(-2, -1) @ v)


def channel_attention(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """XCiT's: features attend to features, the tokens are summed over."""
    q, k = (F.normalize(part.transpose(-2, -1), dim=-1) for part in (q, k))
    probs = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
    return (probs @ v.transpose(-2, -1)).transpose(-2, -1)


def bilinear(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """No softmax at all."""
    return (q @ k.transpose(-2, -1) * SCALE).relu() @ v / q.shape[-2]


def contrast(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A contrastive loss beside the values: its softmax meets no second product."""
    agreement = (q @ k.transpose(-2, -1)).log_softmax(-1).diagonal(dim1=-2, dim2=-1)
    return v + agreement[..., None]


def entry(name: str, make: Callable[[], nn.Module] | None = None, attend: Attend | None = None) -> Model:
    def build() -> nn.Module:
        return Stack(make if make is not None else lambda: Written(attend))  # type: ignore[arg-type]

    return Model(f"neg_{name}", "negative", build, hidden, ("native",), attention=False)


MODELS = (
    entry("router", Router),
    entry("attn_pool", Pooling),
    entry("slot", Slots),
    entry("linear_attention", attend=linear_attention),
    entry("channel_attention", attend=channel_attention),
    entry("bilinear", attend=bilinear),
    entry("contrast", attend=contrast),
)
