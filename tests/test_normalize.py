"""The retrace keeps results, inputs, module paths and source lines, and shows what fused layers hide."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import CausalAttention, SdpaAttention, Stack
from torch import Tensor, nn
from torch.fx import GraphModule

from dilcompile.passes.dialect import normalize as normalizing
from dilcompile.passes.dialect.normalize import NormalizeError, normalize
from dilcompile.passes.dialect.recording import whole
from dilcompile.passes.graph.operators import op_name
from dilcompile.passes.graph.provenance import module_path, source_line


def normalized(model: Callable[..., Any], *args: Any, dynamic: bool | None = None) -> tuple[GraphModule, GraphModule, Any]:
    """Dynamo's graph, the normalised graph, and what the normalised graph computes."""
    held: list[GraphModule] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        held.extend((gm, normalize(gm, example_inputs)))
        return held[-1].forward

    torch._dynamo.reset()
    out = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)(*args)
    return held[0], held[1], out


def ops(gm: GraphModule) -> list[str]:
    return [op_name(node) for node in gm.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [CausalAttention, SdpaAttention])
def test_same_result_inputs_and_names(kind: type[nn.Module], dynamic: bool) -> None:
    model, x = Stack(kind), torch.randn(2, 16, 32)
    before, after, out = normalized(model, x, dynamic=dynamic)
    torch.testing.assert_close(out, model(x))
    inputs = [[node.name for node in gm.graph.find_nodes(op="placeholder")] for gm in (before, after)]
    assert inputs[0] == inputs[1]
    assert all(isinstance(node.target, torch._ops.OpOverload) or op_name(node) in ("getitem", "mul", "add", "floordiv")
               for node in after.graph.nodes if node.op == "call_function")  # fmt: skip


def test_module_paths_and_source_lines() -> None:
    _, after, _ = normalized(Stack(), torch.randn(2, 16, 32))
    softmaxes = [node for node in after.graph.nodes if op_name(node) == "softmax"]
    assert [module_path(node) for node in softmaxes] == ["layers.0", "layers.1"]
    assert {source_line(node).split(":")[0] for node in softmaxes} == {"models.py"}


def test_attention_operators_stay_whole() -> None:
    assert ops(normalized(Stack(SdpaAttention), torch.randn(2, 16, 32))[1]).count("scaled_dot_product_attention") == 2
    assert ops(normalized(Stack(), torch.randn(2, 16, 32))[1]).count("softmax") == 2


class Products(nn.Module):
    """Every way to write a product, under autocast and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        y = y.add_(1) @ y.transpose(-1, -2)
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.matmul(nn.functional.linear(y, y[0]), y[0, 0])
        return torch.matmul(input=y.float(), other=self.linear.weight[:4, :4]).matmul(y[0].float())


def test_a_product_is_recorded_as_if_it_were_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's knowledge of a result saves running it; the graph is the same."""
    model, x = Products(), torch.randn(2, 4, 8)
    run: list[Any] = []
    monkeypatch.setattr(normalizing, "whole", lambda *args: run.append(whole(*args)) or run[-1])
    _, short, out = normalized(model, x)
    torch.testing.assert_close(out, model(x))
    assert [result is not None for result in run] == [True] * 4
    monkeypatch.setattr(normalizing, "WHOLE", {})
    _, long, _ = normalized(model, x)
    assert short.code == long.code
    for mine, its in zip(short.graph.nodes, long.graph.nodes, strict=True):
        held, wanted = mine.meta.get("val"), its.meta.get("val")
        if isinstance(wanted, Tensor):
            assert (held.shape, held.stride(), held.dtype) == (wanted.shape, wanted.stride(), wanted.dtype)


RESHAPED: list[Callable[[Tensor], Tensor]] = [
    lambda y: y.unsqueeze_(1),
    lambda y: y.contiguous().transpose_(0, 1),
    lambda y: torch.ops.aten.squeeze_.dim(y, 0),
]


@pytest.mark.parametrize("change", RESHAPED)
def test_a_product_that_is_reshaped_in_place_later_is_run(change: Callable[[Tensor], Tensor]) -> None:
    """BigBird's: what Dynamo knows of the product is the shape that it has in the end."""

    def call(x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.matmul(x, x.transpose(-1, -2))
        joined = torch.cat([y, x], -1)
        return joined, change(y) * 2

    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(normalized(call, x)[2], call(x))


def test_a_product_inside_a_vmap_is_run() -> None:
    weight, x = torch.randn(8, 8), torch.randn(4, 8)
    call = torch.vmap(lambda row: (torch.matmul(nn.functional.linear(row, weight), weight) ** 2).sum())
    torch.testing.assert_close(normalized(call, x)[2], call(x))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_encoder_fast_path_is_expanded(norm_first: bool, activation: str) -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, activation=activation, norm_first=norm_first, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(2, 12, 32), torch.zeros(2, 12, dtype=torch.bool)
    padding[1, 9:] = True
    with torch.no_grad():
        before, after, out = normalized(lambda x, p: model(x, src_key_padding_mask=p), x, padding)
        expected = model(x, src_key_padding_mask=padding)
    if norm_first is False:  # pre-norm layers do not take the fast path
        assert any("_transformer_encoder_layer_fwd" in str(node.target) for node in before.graph.nodes)
    assert "_transformer_encoder_layer_fwd" not in ops(after)
    assert ops(after).count("scaled_dot_product_attention") == 2
    torch.testing.assert_close(out[~padding], expected[~padding])


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_native_multi_head_attention_is_expanded(need_weights: bool, masked: bool) -> None:
    layer = nn.MultiheadAttention(32, 4, batch_first=True).eval()
    x, mask = torch.randn(2, 12, 32), None
    if masked:
        mask = torch.zeros(2, 12, dtype=torch.bool)
        mask[1, 9:] = True

    def call(x: Tensor) -> Any:
        return torch._native_multi_head_attention(
            x, x, x, 32, 4, layer.in_proj_weight, layer.in_proj_bias, layer.out_proj.weight, layer.out_proj.bias,
            mask, need_weights, True, 1 if masked else None,
        )  # fmt: skip

    with torch.no_grad():
        expected = call(x)
        _, after, found = normalized(call, x)
    assert "_native_multi_head_attention" not in ops(after)
    torch.testing.assert_close(found[0], expected[0])
    if need_weights:
        torch.testing.assert_close(found[1], expected[1])


def test_autocast_regions_show_their_dtypes() -> None:
    model = SdpaAttention()

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)

    _, after, _ = normalized(inside, torch.randn(2, 16, 32))
    linear = next(node for node in after.graph.nodes if op_name(node) == "linear")
    assert linear.meta["val"].dtype is torch.bfloat16


def test_checkpoint_bodies_are_normalised_and_stay_checkpoints() -> None:
    _, after, _ = normalized(Stack(SdpaAttention, checkpointed=True), torch.randn(2, 16, 32, requires_grad=True))
    calls = after.graph.find_nodes(op="call_function", target=torch.ops.higher_order.tag_activation_checkpoint)
    assert len(calls) == 2
    for call in calls:
        body = getattr(after, call.args[0].target)
        assert ops(body).count("scaled_dot_product_attention") == 1
        assert "_checkpoint_context_fn" not in body.meta


def test_what_cannot_be_retraced_is_named() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.ops.aten.view.default, (x, [7, 7])))
    with pytest.raises(NormalizeError, match=r"RuntimeError: .*shape"):
        normalize(GraphModule(nn.Module(), graph), [torch.randn(2, 3)])
