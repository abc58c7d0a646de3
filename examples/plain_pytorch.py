"""A plain PyTorch model, once with nn.TransformerEncoder and once with attention written out by hand.

python examples/plain_pytorch.py [--seq 1024] [--inner inductor|aot_eager|eager]

Both models are left as they are. The exact policy must give the model's own numbers; the dilated one must not.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import dilcompile

POLICY = str(Path(__file__).parent / "policy.yaml")


class WrittenOut(nn.Module):
    """Causal self attention as a person writes it: two matrix products, a mask, a softmax."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, dim = x.shape
        q, k, v = self.qkv(x).view(batch, length, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-2, -1) / (dim // self.heads) ** 0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = scores.masked_fill(future, float("-inf")).softmax(dim=-1)
        return self.out((weights @ v).transpose(1, 2).reshape(batch, length, dim))


def encoder(dim: int, heads: int, layers: int) -> nn.Module:
    """torch's own encoder; in eval mode it runs as one fused operator, which the backend expands."""
    layer = nn.TransformerEncoderLayer(dim, heads, 2 * dim, dropout=0.0, batch_first=True, norm_first=False)
    return nn.TransformerEncoder(layer, layers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--inner", default="inductor")
    options = parser.parse_args()
    torch.manual_seed(0)
    x = torch.randn(1, options.seq, 128)
    for name, model in (("nn.TransformerEncoder", encoder(128, 4, 2).eval()), ("written out by hand", WrittenOut(128, 4).eval())):
        print(f"\n{name}\n{dilcompile.explain(model, x, policy=POLICY)}")
        with torch.no_grad():
            before = model(x)
            for policy in ("exact", POLICY):
                torch._dynamo.reset()
                after = torch.compile(model, backend="dilated", options={"policy": policy, "inner": options.inner})(x)
                change = ((after - before).norm() / before.norm()).item()
                print(f"policy {Path(policy).name}: the output changes by {change:.2e} of its norm")


if __name__ == "__main__":
    main()
