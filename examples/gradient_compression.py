"""Train with compressed gradients: torchrun --nproc-per-node 2 examples/gradient_compression.py

A hundredth of the gradients of each bucket travels in a step, the rest waits for later ones. The same run with plain averaging
stands beside it.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dilcompile.distributed import TopKCompression

TEXT = Path(__file__).parent / "text" / "persuasion.txt"


class Model(nn.Module):
    """Next byte from the bytes before: an embedding, one causal attention, a perceptron."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, 256))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [B, S, 256] of tokens [B, S]."""
        x = self.embedding(tokens)
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.perceptron(x)


def train(hook: TopKCompression | None, steps: int) -> float:
    """The mean loss of the last tenth of a run, over all ranks."""
    torch.manual_seed(0)
    text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()
    model = Model()
    ddp = DistributedDataParallel(model) if hook is None else hook.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draws, losses = torch.Generator().manual_seed(dist.get_rank()), []
    for _ in range(steps):
        starts = torch.randint(0, len(text) - 129, (8,), generator=draws)
        batch = torch.stack([text[start : start + 129] for start in starts])
        loss = F.cross_entropy(ddp(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    mean = torch.stack(losses[-max(1, steps // 10) :]).mean()
    dist.all_reduce(mean)
    return mean.item() / dist.get_world_size()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--ratio", type=float, default=0.01)
    args = parser.parse_args()
    dist.init_process_group("gloo")
    hook = TopKCompression(args.ratio)
    plain, compressed = train(None, args.steps), train(hook, args.steps)
    if dist.get_rank() == 0:
        print(f"plain averaging: loss {plain:.3f}, {hook.bytes_plain / 1e6:.2f} MB given to collectives by each rank")
        print(f"top {args.ratio:.1%}: loss {compressed:.3f}, {hook.bytes_sent / 1e6:.2f} MB")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
