"""Sites are named by the path that ``named_modules`` gives, in one graph, after graph breaks, however the model is compiled."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from models import CausalAttention, Stack
from torch import Tensor, nn
from torch.fx import GraphModule

from dilcompile.errors import DilcompileWarning
from dilcompile.passes.graph.regions import Graph
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.policy import Policy


class Block(nn.Module):
    """An attention whose own forward breaks the graph before it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = CausalAttention()

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        torch._dynamo.graph_break()
        return self.attention(x)


class Deep(nn.Module):
    """Blocks in a list in a module, with breaks between and inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = x + block(x)
            torch._dynamo.graph_break()
        return x


def paths(model: nn.Module, compiling: Callable[..., Any]) -> list[str]:
    found: list[str] = []

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = rewrite_dynamo(gm, example_inputs, Policy.load("exact"), "test")
        found.extend(verdict.site.module for verdict in outcome.report.verdicts)
        return gm.forward

    torch._dynamo.reset()
    compiling(model, backend)(torch.randn(2, 16, 32))
    return found


def as_wrapper(model: nn.Module, backend: Any) -> Any:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Any:
    model.compile(backend=backend)
    return model


def inside_another(model: nn.Module, backend: Any) -> Any:
    """A model that runs a compiled one: paths are those of the compiled one."""
    return nn.Sequential(torch.compile(model, backend=backend), nn.Identity())


def its_forward(model: nn.Module, backend: Any) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)  # type: ignore[method-assign]
    return model


def a_function_around_it(model: nn.Module, backend: Any) -> Any:
    return torch.compile(lambda x: model(x) * 2, backend=backend)


def given_to_a_function(model: nn.Module, backend: Any) -> Any:
    compiled = torch.compile(lambda module, x: module(x) * 2, backend=backend)
    return lambda x: compiled(model, x)


WAYS = [as_wrapper, in_place, inside_another, its_forward, a_function_around_it, given_to_a_function]


@pytest.mark.parametrize("compiling", WAYS, ids=lambda way: way.__name__)
def test_paths_are_whole(compiling: Callable[..., Any]) -> None:
    assert paths(Stack(), compiling) == ["layers.0", "layers.1"]
    assert paths(Stack(broken=True), compiling) == ["layers.0", "layers.1"]
    # One compiled frame may serve both blocks: it is named by the block that it was compiled for.
    first, *others = paths(Deep(), compiling)
    assert (first, set(others) <= {"model.blocks.1.attention"}) == ("model.blocks.0.attention", True)


def test_a_graph_that_is_compiled_by_no_model_has_no_prefix() -> None:
    assert Graph(GraphModule(nn.Module(), torch.fx.Graph()), frozenset(), {}, False).frame.prefix == ""


class Layers(nn.Module):
    """Layers of one kind, with a break between each that lets torch.compile take one frame for all of them."""

    def __init__(self, count: int, broken: bool, layer: Callable[[], nn.Module] = CausalAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(count))
        self.broken = broken

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
            if self.broken:
                torch._dynamo.graph_break()
        return x


def rules(layers: str) -> dict[str, Any]:
    second = {"name": "second", "match": {"layers": layers}, "apply": {"form": "sliding_window", "window": 2}}
    return {"version": 1, "rules": [second, {"name": "others", "apply": {"form": "dense"}}]}


def run(model: nn.Module, policy: dict[str, Any], x: Tensor, report: Path) -> tuple[Tensor, dict[str, str]]:
    """What the compiled model gives, and the rule of each module's site."""
    torch._dynamo.reset()
    with torch.no_grad():
        out = torch.compile(model, backend="dilated", options={"policy": policy, "inner": "eager", "report": report})(x)
    sites = [site for graph in json.loads(report.read_text())["graphs"] for site in graph["sites"]]
    return out, {site["module"]: site["rule"].split()[0] for site in sites}


def test_a_rule_for_a_layer_holds_for_that_layer_after_a_graph_break(tmp_path: Path) -> None:
    """More layers than torch.compile would compile one function for, were they not told apart."""
    broken, whole = Layers(10, broken=True).double(), Layers(10, broken=False).double()
    whole.load_state_dict(broken.state_dict())
    x = torch.randn(2, 16, 32, dtype=torch.float64)
    wanted, _ = run(whole, rules("1"), x, tmp_path / "whole.json")
    got, taken = run(broken, rules("1"), x, tmp_path / "broken.json")
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12)
    assert taken == {f"layers.{i}": "second" if i == 1 else "others" for i in range(10)}


def test_layers_of_one_rule_share_their_frame(tmp_path: Path) -> None:
    _, taken = run(Layers(10, broken=True), rules("0-"), torch.randn(2, 16, 32), tmp_path / "report.json")
    assert len(taken) < 10
    assert set(taken.values()) == {"second"}


def _attend(q: Tensor) -> Tensor:
    return nn.functional.scaled_dot_product_attention(q, q, q)


class OfAFunction(nn.Module):
    """The attention stands in a function that doesn't know whose it is, between graph breaks."""

    def forward(self, x: Tensor) -> Tensor:
        torch._dynamo.graph_break()
        out = _attend(x.unflatten(-1, (4, 8)).transpose(1, 2))
        torch._dynamo.graph_break()
        return out.transpose(1, 2).flatten(2)


class Called(OfAFunction):
    """As above, and torch.compile can't take the frame around the function."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(1):
            torch._dynamo.graph_break()
            out = _attend(x.unflatten(-1, (4, 8)).transpose(1, 2))
        return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("layer", [OfAFunction, Called])
def test_a_frame_that_cannot_tell_modules_of_different_rules_is_left(layer: Any, tmp_path: Path) -> None:
    model, x = Layers(3, True, layer), torch.randn(2, 16, 32, dtype=torch.float64)
    with pytest.warns(DilcompileWarning, match=r"after a graph break its frame serves 'layers\.1\S*' too"):
        got, _ = run(model, rules("1"), x, tmp_path / "report.json")
    torch.testing.assert_close(got, model(x), rtol=0, atol=1e-12)
    got, taken = run(model, rules("0-"), x, tmp_path / "report.json")
    assert set(taken.values()) == {"second"}
    assert not torch.allclose(got, model(x))
