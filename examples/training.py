"""Training through the backend: a small causal language model learns from its context, forward and backward rewritten.

python examples/training.py [--steps 60] [--seq 1024] [--inner inductor|aot_eager|eager]
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

POLICY = {
    "version": 1,
    "name": "training",
    "rules": [
        {
            "name": "dilated",
            "match": {"kind": "self", "phase": "train"},
            "apply": {"form": "dilated", "segments": [256, "seq"], "rates": [1, 4], "offset": "own"},
        }
    ],
}


class Block(nn.Module):
    """Pre-norm attention and a feed-forward layer."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        qkv = self.qkv(self.before_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, dim))
        return x + self.mlp(self.before_mlp(x))


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, length: int, dim: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, dim), nn.Embedding(length, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.head = nn.Linear(dim, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def batch_of(length: int, vocabulary: int) -> Tensor:
    """Two sequences, each a random mix of two tokens of its own: which two, only attention to the past can tell."""
    pairs = torch.stack([torch.randperm(vocabulary)[:2] for _ in range(2)])
    return pairs.gather(1, torch.randint(2, (2, length + 1)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--inner", default="inductor")
    options = parser.parse_args()
    torch.manual_seed(0)
    vocabulary = 16
    model = LanguageModel(vocabulary, options.seq)
    compiled = torch.compile(model, backend="dilated", options={"policy": POLICY, "inner": options.inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        ids = batch_of(options.seq, vocabulary)
        loss = F.cross_entropy(compiled(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == options.steps - 1:
            print(f"step {step:3d}  loss {losses[-1]:.4f}", flush=True)
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")


if __name__ == "__main__":
    main()
