"""How long the finder takes: milliseconds a site at several depths, and normalising as a share of AOTAutograd's time.

    python benchmarks/finding.py                 # GPT-2 of 12, 48, 96 layers, Llama, Swin, ViT
    python benchmarks/finding.py --json FILE

Times are processor time of this process: what else the machine does is not counted. The first graph of a process pays for
imports and is left out. AOTAutograd runs as Inductor runs it, with its decompositions, joint-graph passes and partitioner;
its code generation is left out.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.fx import GraphModule

from dilcompile import pipeline
from dilcompile.passes.dialect.normalize import normalize
from dilcompile.passes.finding.find_sites import find_sites
from dilcompile.passes.graph.regions import Graph, regions

SMALL = {"hidden_size": 48, "intermediate_size": 40, "num_attention_heads": 4, "vocab_size": 99}


def gpt2(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=48, n_layer=layers, n_head=4, vocab_size=99)
    return GPT2LMHeadModel._from_config(config, attn_implementation="eager"), text()


def llama(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**SMALL, num_hidden_layers=layers, num_key_value_heads=2)
    return LlamaForCausalLM._from_config(config, attn_implementation="eager"), text()


def swin(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import SwinConfig, SwinModel

    config = SwinConfig(image_size=56, embed_dim=24, depths=[2, layers - 2], num_heads=[2, 4], window_size=7)
    return SwinModel._from_config(config, attn_implementation="eager"), {"pixel_values": torch.randn(1, 3, 56, 56)}


def vit(layers: int) -> tuple[torch.nn.Module, dict[str, Any]]:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(hidden_size=48, intermediate_size=40, num_attention_heads=4, num_hidden_layers=layers, image_size=32)
    return ViTModel._from_config(config, attn_implementation="eager"), {"pixel_values": torch.randn(1, 3, 32, 32)}


def text() -> dict[str, Any]:
    mask = torch.ones(2, 37, dtype=torch.int64)
    mask[1, :4] = 0
    return {"input_ids": torch.randint(0, 99, (2, 37)), "attention_mask": mask, "use_cache": False}


MODELS: tuple[tuple[str, Callable[[int], tuple[torch.nn.Module, dict[str, Any]]], int], ...] = (
    ("gpt2", gpt2, 12),
    ("gpt2", gpt2, 48),
    ("gpt2", gpt2, 96),
    ("llama", llama, 12),
    ("llama", llama, 48),
    ("swin", swin, 12),
    ("vit", vit, 12),
)


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time, without Python's own garbage collection."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        result = run()
        return time.process_time() - start, result
    finally:
        gc.enable()


def interpreted(inner: GraphModule, _: Sequence[Any], **options: Any) -> Callable[..., Any]:
    """In place of Inductor's code generation."""
    return make_boxed_func(inner.forward)


def measure(name: str, maker: Callable[[int], tuple[torch.nn.Module, dict[str, Any]]], layers: int) -> dict[str, Any]:
    """One model, one compilation: finding, normalising, and AOTAutograd on the same graph."""
    torch.manual_seed(0)
    model, inputs = maker(layers)
    row: dict[str, Any] = {"model": name, "layers": layers, "sites": 0, "find_ms": 0.0, "normalize_ms": 0.0, "aot_ms": 0.0}

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        taken, normal = seconds(lambda: normalize(gm, example_inputs))
        row["normalize_ms"] += 1000 * taken
        values = dict(zip(normal.graph.find_nodes(op="placeholder"), example_inputs, strict=True))
        graph = Graph(normal, pipeline._parameters(values), pipeline._buffers(values), True)
        taken, found = seconds(lambda: [find_sites(part) for part in regions(graph)])
        row["find_ms"] += 1000 * taken
        row["sites"] += sum(len(findings.matches) for findings in found)
        taken, compiled = seconds(lambda: compile_fx(gm, example_inputs, inner_compile=interpreted))
        row["aot_ms"] += 1000 * taken
        return compiled

    torch._dynamo.reset()
    torch.compile(model, backend=backend)(**inputs)
    row["find_ms_per_site"] = row["find_ms"] / max(1, row["sites"])
    row["normalize_share"] = row["normalize_ms"] / row["aot_ms"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", help="write the rows to this file too")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure("warm up", gpt2, 2)
    print(f"{'model':8}{'layers':>8}{'sites':>8}{'ms/site':>10}{'normalise ms':>14}{'AOTAutograd ms':>16}{'share':>8}")
    rows = []
    for name, maker, layers in MODELS:
        row = measure(name, maker, layers)
        rows.append(row)
        print(
            f"{name:8}{layers:8}{row['sites']:8}{row['find_ms_per_site']:10.2f}{row['normalize_ms']:14.0f}"
            f"{row['aot_ms']:16.0f}{row['normalize_share']:8.0%}",
            flush=True,
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"torch": torch.__version__, "rows": rows}, file, indent=1)
            file.write("\n")


if __name__ == "__main__":
    main()
