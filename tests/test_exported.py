"""Exported programs go through the same passes."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from finding import Call
from models import CausalAttention, NoAttention, SdpaAttention, Stack, llama
from torch import nn
from torch.export import Dim, export

from dilcompile import rewrite_exported
from dilcompile.errors import DilcompileError, PolicyError
from dilcompile.passes.dialect.fused_layers import EXPANSIONS

ATTENTION = torch.ops.dilcompile.attention.default


def calls(ep: torch.export.ExportedProgram) -> list[torch.fx.Node]:
    return list(ep.graph.find_nodes(op="call_function", target=ATTENTION))


@pytest.mark.parametrize("kind", [CausalAttention, SdpaAttention])
@pytest.mark.parametrize("dynamic", [False, True])
def test_same_numbers(kind: Any, dynamic: bool) -> None:
    model, x = Stack(kind).eval(), torch.randn(2, 16, 32)
    shapes = ({1: Dim("length", min=2, max=48)},) if dynamic else None
    ep = export(model, (x,), dynamic_shapes=shapes)
    rewritten = rewrite_exported(ep, "exact")
    assert len(calls(rewritten)) == 2
    assert not calls(ep), "the program given is not changed"
    for length in (16, 40) if dynamic else (16,):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(rewritten.module()(x), model(x))


def test_a_module_is_no_program() -> None:
    with pytest.raises(DilcompileError, match=r"takes an ExportedProgram, not NoAttention; export it first: torch.export.export"):
        rewrite_exported(NoAttention(), "exact")  # type: ignore[arg-type]


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_hugging_face(implementation: str) -> None:
    model = llama(implementation).eval()
    ids, mask = torch.randint(0, 96, (2, 20)), torch.ones(2, 20, dtype=torch.long)
    mask[1, 15:] = 0
    ep = export(model, (), {"input_ids": ids, "attention_mask": mask}, strict=False)
    rewritten = rewrite_exported(ep, "exact")
    assert len(calls(rewritten)) == 2
    square = [node for node in rewritten.graph.nodes if tuple(getattr(node.meta.get("val"), "shape", ()))[-2:] == (20, 20)]
    assert not square, "no S x S tensor is left"
    found, expected = (run(input_ids=ids, attention_mask=mask)[0] for run in (rewritten.module(), model))
    torch.testing.assert_close(found[0], expected[0])
    torch.testing.assert_close(found[1, :15], expected[1, :15])


def test_no_attention() -> None:
    x = torch.randn(2, 8, 32)
    ep = export(NoAttention(), (x,))
    assert torch.equal(rewrite_exported(ep, "exact").module()(x), ep.module()(x))


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Two query heads share a key head."""
    return F.scaled_dot_product_attention(q, k[:, ::2], v[:, ::2], is_causal=True, enable_gqa=True)


def padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The last keys of the second sample are hidden, all of the first one's: its rows are 0."""
    keep = torch.arange(k.shape[2])[None, :] < torch.tensor([0, 7])[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep[:, None, None])


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.3).masked_fill(later, float("-inf")).softmax(-1) @ v


class Projected(nn.Module):
    """Four heads of queries, keys and values."""

    def __init__(self, attend: Any) -> None:
        super().__init__()
        self.qkv, self.attend = nn.Linear(32, 96), attend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (4, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.attend(q, k, v)


@pytest.mark.parametrize(("attend", "mask"), [(grouped, "causal"), (padded, "padding"), (written_out, "causal")])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_decomposed_to_core_aten(attend: Any, mask: str, dynamic: bool, strict: bool, tmp_path: Any) -> None:
    """``run_decompositions`` leaves products and a softmax with rows of zeros; the same is found in them."""
    model, x = Projected(attend).double(), torch.randn(2, 12, 32, dtype=torch.float64)
    shapes = ({1: Dim("length", min=8, max=48)},) if dynamic else None
    core = export(model, (x,), dynamic_shapes=shapes, strict=strict).run_decompositions()
    assert not core.graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default)
    path = tmp_path / "report.json"
    defaults = {"numerics": {"check": "compile"}, "fallback": {"quality": "error"}}
    policy = {"version": 1, "defaults": defaults, "rules": [{"name": "all", "apply": {"form": "dense"}}]}
    rewritten = rewrite_exported(core, policy, report=path)
    (graph,) = json.loads(path.read_text())["graphs"]
    ((verdict, said, notes),) = [(site["verdict"], site["mask"]["text"], site["notes"]) for site in graph["sites"]]
    assert (verdict, said, graph["misses"]) == ("rewritten", mask, [])
    assert any("compared on" in note for note in notes)
    for length in (12, 31) if dynamic else (12,):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        # Float64, summed in another order.
        torch.testing.assert_close(rewritten.module()(x), model(x), rtol=1e-12, atol=1e-12)


class Encoder(nn.Module):
    """Its layers are one operator each where it is exported strictly, in eval mode and without gradients."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, **options)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        return self.layers(x, src_key_padding_mask=hidden)


FUSED = torch.ops.aten._transformer_encoder_layer_fwd.default


def fused_program() -> tuple[nn.Module, tuple[torch.Tensor, ...], torch.export.ExportedProgram]:
    torch.manual_seed(0)
    model = Encoder(activation="gelu").eval()
    hidden = torch.zeros(2, 12, dtype=torch.bool)
    hidden[1, 7:] = True
    x = torch.randn(2, 12, 32)
    with torch.no_grad():
        ep = export(model, (x, hidden), strict=True)
    assert len(ep.graph.find_nodes(op="call_function", target=FUSED)) == 2
    return model, (x, hidden), ep


def test_fused_layers_are_written_out(tmp_path: Any) -> None:
    model, given, ep = fused_program()
    path = tmp_path / "report.json"
    rewritten = rewrite_exported(ep, "exact", report=path)
    (graph,) = json.loads(path.read_text())["graphs"]
    assert [(site["module"], site["mask"]["text"]) for site in graph["sites"]] == [
        ("layers.layers.0", "padding"), ("layers.layers.1", "padding"),
    ]  # fmt: skip
    assert len(calls(rewritten)) == 2
    assert not rewritten.graph.find_nodes(op="call_function", target=FUSED)
    assert len(ep.graph.find_nodes(op="call_function", target=FUSED)) == 2, "the program given is not changed"
    with torch.no_grad():
        torch.testing.assert_close(rewritten.module()(*given), model(*given))


def test_fused_layers_stay_where_nothing_is_rewritten() -> None:
    _, _, ep = fused_program()
    keeps = {"version": 1, "rules": [{"name": "none", "match": {"layers": [99]}, "apply": {"form": "dense"}}],
             "defaults": {"fallback": {"unmatched": "keep"}}}  # fmt: skip
    assert str(rewrite_exported(ep, keeps).graph) == str(ep.graph)


def test_a_fused_layer_that_can_not_be_traced_stays_with_a_note(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise NotImplementedError("no such layer")

    model, given, ep = fused_program()
    monkeypatch.setitem(EXPANSIONS, FUSED, fails)
    path = tmp_path / "report.json"
    rewritten = rewrite_exported(ep, "exact", report=path)
    (graph,) = json.loads(path.read_text())["graphs"]
    assert any("could not be written out" in note and "no such layer" in note for note in graph["notes"])
    with torch.no_grad():
        torch.testing.assert_close(rewritten.module()(*given), model(*given))


class FastMultihead(nn.Module):
    """The operator behind ``nn.MultiheadAttention``, with the weights of its attention asked for or not."""

    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(32, 4, batch_first=True), weights

    def forward(self, x: torch.Tensor) -> Any:
        m = self.inner
        out, weights = torch.ops.aten._native_multi_head_attention(
            x, x, x, 32, 4, m.in_proj_weight, m.in_proj_bias, m.out_proj.weight, m.out_proj.bias, None, self.weights
        )
        return (out, weights) if self.weights else out


@pytest.mark.parametrize("weights", [False, True])
def test_a_fused_layer_of_two_results(weights: bool) -> None:
    model, x = FastMultihead(weights).eval(), torch.randn(2, 12, 32)
    with torch.no_grad():
        rewritten = rewrite_exported(export(model, (x,)), "exact")
        torch.testing.assert_close(rewritten.module()(x), model(x))
    assert len(calls(rewritten)) == (0 if weights else 1), "weights that are returned stay"


def test_an_attention_that_is_the_output(tmp_path: Any) -> None:
    """The signature names what the graph returns now, so that the program can be saved."""
    given = tuple(torch.randn(2, 4, 12, 8) for _ in range(3))
    ep = export(Call(lambda q, k, v: (grouped(q, k, v), 3, written_out(q, k, v), q)), given)
    before = str(ep.graph_signature)
    rewritten = rewrite_exported(ep, "exact")
    rewritten.validate()
    assert str(ep.graph_signature) == before
    torch.export.save(rewritten, tmp_path / "program.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "program.pt2").module()(*given), ep.module()(*given))


def test_save_load_and_weights(tmp_path: Any) -> None:
    model, x = Stack().eval(), torch.randn(2, 16, 32)
    before = copy.deepcopy(model.state_dict())
    rewritten = rewrite_exported(export(model, (x,)), "exact")
    torch.export.save(rewritten, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2")
    torch.testing.assert_close(loaded.module()(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.values(), strict=True))


def test_bad_policy() -> None:
    with pytest.raises(PolicyError, match="no-such"):
        rewrite_exported(export(NoAttention(), (torch.randn(2, 8, 32),)), "no-such")


def test_aot_inductor(tmp_path: Any) -> None:
    model, x = Stack().eval(), torch.randn(2, 16, 32)
    rewritten = rewrite_exported(export(model, (x,), dynamic_shapes=({1: Dim("length", min=2, max=48)},)), "exact")
    path = torch._inductor.aoti_compile_and_package(rewritten, package_path=str(tmp_path / "model.pt2"))
    run = torch._inductor.aoti_load_package(path)
    for length in (16, 33):
        x = torch.randn(2, length, 32)
        torch.testing.assert_close(run(x), model(x))
