"""A gate learns which blocks to attend: retrieval from blocks that are planted among others, next to a gate that stays random.

Every block of a sequence carries a code and a label, and asks for the label of one earlier block by that block's code. Each
block may attend three blocks, itself among them. The gate sees no target: where the label is found, the loss falls.

    python examples/block_gate.py
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize, one_hot

from dilcompile.nn import BlockGate

BLOCK, ROWS, CODE, LABELS = 16, 16, 16, 8
# From here on a row has more blocks before it than it may attend.
FIRST = 4


class Batch(NamedTuple):
    """Args: x: [B, S, 2 * CODE + LABELS]; planted, wanted: int64 [B, ROWS], the block that each asks for, and its label."""

    x: Tensor
    planted: Tensor
    wanted: Tensor


def draw(size: int, generator: torch.Generator) -> Batch:
    """Sequences of ROWS blocks; row 0 asks for itself."""
    codes = normalize(torch.randn(size, ROWS, CODE, generator=generator), dim=-1)
    labels = torch.randint(LABELS, (size, ROWS), generator=generator)
    planted = (torch.rand(size, ROWS, generator=generator) * torch.arange(ROWS)).long()
    asked = codes.gather(1, planted[..., None].expand_as(codes))
    blocks = torch.cat([codes, asked, one_hot(labels, LABELS)], -1).repeat_interleave(BLOCK, 1)
    return Batch(blocks + 0.1 * torch.randn(blocks.shape, generator=generator), planted, labels.gather(1, planted))


class Retrieval(nn.Module):
    """One attention head over the blocks that the gate chooses, and a linear readout."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.gate = BlockGate(1, CODE, block=BLOCK, blocks=3, gate_dim=CODE, start=2.0, end=0.1, steps=steps)
        self.readout = nn.Linear(LABELS, LABELS)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What each position asks for, what it is, and its label, [B, 1, S, ...]."""
        is_code, asked, label = x[:, None].split([CODE, CODE, LABELS], -1)
        # No head would find a block by itself: queries stand at a right angle to their keys.
        return asked.roll(CODE // 2, -1), is_code, label

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the labels [B, S, LABELS]."""
        found: Tensor = self.readout(self.gate(*self.operands(x))[:, 0])
        return found

    def recall(self, batch: Batch) -> float:
        """The share of planted blocks among those attended, where there was a choice."""
        q, k, _ = self.operands(batch.x)
        blocks = self.gate.gated(q, k, scale=CODE**-0.5).blocks
        found = blocks.held(0, ROWS, ROWS)[:, 0].gather(2, batch.planted[..., None])
        return found[:, FIRST:].float().mean().item()


def train(steps: int, frozen: bool, seed: int = 0) -> tuple[float, float, float]:
    """(first loss, last loss, recall of planted blocks on sequences never seen); ``frozen``: the gate stays as it was drawn."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = Retrieval(steps)
    model.gate.requires_grad_(not frozen)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=3e-2)
    losses = []
    for _ in range(steps):
        batch = draw(16, generator)
        # The last position of each block answers.
        loss = cross_entropy(model(batch.x)[:, BLOCK - 1 :: BLOCK].flatten(0, 1), batch.wanted.flatten())
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None and bool(p.grad.any()) for p in model.parameters() if p.requires_grad)
        optimizer.step()
        model.gate.step()
        losses.append(loss.item())
    model.eval()
    few = max(1, steps // 20)
    return sum(losses[:few]) / few, sum(losses[-few:]) / few, model.recall(draw(64, generator))


def main() -> None:
    """Train both and say what they found."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=150)
    steps = parser.parse_args().steps
    for frozen in (False, True):
        first, last, recall = train(steps, frozen)
        print(f"{'random' if frozen else 'trained'} gate: loss {first:.3f} -> {last:.3f}, recall of planted blocks {recall:.3f}")


if __name__ == "__main__":
    main()
