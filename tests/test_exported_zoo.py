"""Exported programs of the zoo go through the same finder and passes, and compute the same afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.export import export
from zoo import ZOO, truth
from zoo.model import Setting, quiet
from zoo.runs import difference, tensors

import dilcompile

ATTENTION = torch.ops.dilcompile.attention.default
# Each site is also tried by itself in float64 throughout, where a model's own float32 parts don't show.
EXACT = {
    "version": 1,
    "defaults": {"numerics": {"check": "compile"}, "fallback": {"unsupported": "keep", "quality": "error"}},
    "rules": [{"name": "all", "apply": {"form": "dense"}}],
}
# Name, implementation, and how many of its sites are rewritten: all of them.
SAMPLE = """
    bert eager 2        modernbert sdpa 2      gpt2 sdpa 2         llama eager 2        mistral sdpa 2       falcon eager 2
    bloom eager 2       gemma3_text eager 2    deepseek_v3 eager 2 t5 eager 6           bart sdpa 6          vit eager 2
    swin eager 4        beit eager 2           clip eager 4        nn_mha native 2      nn_encoder native 2  hw_mingpt native 2
    hw_einsum_transposed_scores native 2       hw_gqa_five_dims native 2                hw_window native 2   neg_channel_attention native 0
""".split()
TRIPLES = [(name, way, int(sites)) for name, way, sites in zip(SAMPLE[::3], SAMPLE[1::3], SAMPLE[2::3], strict=True)]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    quiet()
    threads, before = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("name", "implementation", "sites"), TRIPLES, ids=[name for name, _, _ in TRIPLES])
def test_same_numbers(name: str, implementation: str, sites: int) -> None:
    model, inputs = ZOO[name].build(implementation).double(), ZOO[name].call(Setting(), torch.float64)
    with torch.no_grad():
        program = export(model, (), inputs, strict=False)
        rewritten = dilcompile.rewrite_exported(program, EXACT)
        wanted, found = (list(tensors(call(**inputs))) for call in (program.module(), rewritten.module()))
    assert len(list(rewritten.graph.find_nodes(op="call_function", target=ATTENTION))) == sites
    assert truth.count(model, inputs) == sites or not ZOO[name].attention
    apart = difference(found, wanted)
    assert apart <= (1e-6 if _goes_through_float32(program) else 1e-9)


def _goes_through_float32(program: torch.export.ExportedProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.dtype is torch.float32 for value in values)
