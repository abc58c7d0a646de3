"""A Hugging Face model, unmodified: a small Llama with random weights, or SmolLM2-135M with its own (--real).

python examples/huggingface.py [--seq 1024] [--inner inductor|aot_eager|eager] [--real]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import smollm2
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import dilcompile

POLICY = str(Path(__file__).parent / "policy.yaml")


def small_llama() -> LlamaForCausalLM:
    """Two layers, grouped queries (4 query heads, 2 key heads), random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--inner", default="inductor")
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M with its real weights")
    options = parser.parse_args()
    if options.real:
        model, tokenizer = smollm2.load()
        ids = smollm2.text_tokens(tokenizer, options.seq)
    else:
        model = small_llama()
        ids = torch.randint(256, (1, options.seq))
    print(dilcompile.explain(model, input_ids=ids, use_cache=False, policy=POLICY))
    compiled = torch.compile(model, backend="dilated", options={"policy": POLICY, "inner": options.inner})
    with torch.no_grad():
        before = model(input_ids=ids, use_cache=False).logits
        after = compiled(input_ids=ids, use_cache=False).logits
    change = ((after - before).norm() / before.norm()).item()
    print(f"logits {tuple(after.shape)} change by {change:.2e} of their norm")


if __name__ == "__main__":
    main()
