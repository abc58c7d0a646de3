"""A small model trained with its sequence cut over ranks: the losses of one process that has all of it.

torchrun --nproc-per-node 4 examples/context_parallel.py --model longnet
torchrun --nproc-per-node 2 examples/context_parallel.py --model mistral --method halo --order contiguous
torchrun --nproc-per-node 2 examples/context_parallel.py [--model llama] [--steps 10] [--seq 501] [--order zigzag] [--method auto]
                                                         [--inner inductor|aot_eager|eager]

``llama`` is causal, ``mistral`` has a sliding window of 64 tokens, of which a rank needs its neighbour's last 63 keys alone, and
``longnet`` is the Llama with dilated attention.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedModel

from dilcompile import distributed

VOCABULARY = 16


def small(name: str) -> PreTrainedModel:
    """The same weights on every rank."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "use_cache": False,
    }  # fmt: skip
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**sizes, sliding_window=64))
    return LlamaForCausalLM(LlamaConfig(**sizes))


def form_of(name: str) -> dict[str, object]:
    """What a policy says of the model's attentions."""
    if name == "longnet":
        return {"form": "dilated", "segments": [64, 256, "seq"], "rates": [1, 4, 8], "offset": "own"}
    return {"form": "keep"}


def batch_of(step: int, length: int) -> dict[str, Tensor]:
    """Two sequences, each a random mix of two tokens of its own; the same on every rank."""
    draw = torch.Generator().manual_seed(step)
    pairs = torch.stack([torch.randperm(VOCABULARY, generator=draw)[:2] for _ in range(2)])
    ids = pairs.gather(1, torch.randint(2, (2, length), generator=draw))
    return {"input_ids": ids, "labels": ids}


def over_ranks(options: argparse.Namespace) -> list[float]:
    """The losses of training over all ranks of ``torchrun``."""
    ranks = dist.get_world_size()
    distributed.set_mesh(init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",)))
    policy = {
        "version": 1,
        "mesh": {"cp": {"size": ranks, "layout": options.order}},
        "rules": [{"name": "sharded", "apply": form_of(options.model), "shard": {"mesh": "cp", "method": options.method}}],
    }
    model = small(options.model)
    model.compile(backend="dilated", options={"policy": policy, "inner": options.inner})
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        shard = distributed.shard_inputs(batch_of(step, options.seq), order=options.order, is_causal=True)
        labels = shard.pop("labels")
        loss = distributed.sharded_loss(parallel(**shard).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def alone(options: argparse.Namespace) -> list[float]:
    """The losses of one process that has the whole sequence, by PyTorch alone but for a form that PyTorch doesn't have."""
    model = small(options.model)
    if options.model == "longnet":
        policy = {"version": 1, "rules": [{"name": "whole", "apply": form_of(options.model)}]}
        model.compile(backend="dilated", options={"policy": policy, "inner": options.inner})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(options.steps):
        batch = batch_of(step, options.seq)
        logits = model(input_ids=batch["input_ids"]).logits
        loss = cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama", choices=["llama", "longnet", "mistral"])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--seq", type=int, default=501)
    parser.add_argument("--order", default="zigzag", choices=["contiguous", "zigzag", "striped"])
    parser.add_argument("--method", default="auto")
    parser.add_argument("--inner", default="inductor")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    sharded = over_ranks(options)
    if dist.get_rank() == 0:
        whole = alone(options)
        for step, (one, other) in enumerate(zip(sharded, whole, strict=True)):
            print(f"step {step:3d}  loss {one:.6f} over {dist.get_world_size()} ranks, {other:.6f} alone")
        print(f"losses differ by at most {max(abs(a - b) for a, b in zip(sharded, whole, strict=True)):.1e}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
