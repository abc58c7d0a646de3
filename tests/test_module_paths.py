"""Sites are named by the path that ``named_modules`` gives, in one graph, after graph breaks, however the model is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from models import CausalAttention, Stack
from torch import Tensor, nn
from torch.fx import GraphModule

from dilcompile.passes.regions import Graph
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


@pytest.mark.parametrize("compiling", [as_wrapper, in_place, inside_another], ids=lambda way: way.__name__)
def test_paths_are_whole(compiling: Callable[..., Any]) -> None:
    assert paths(Stack(), compiling) == ["layers.0", "layers.1"]
    assert paths(Stack(broken=True), compiling) == ["layers.0", "layers.1"]
    # One compiled frame may serve both blocks: it is named by the block that it was compiled for.
    first, *others = paths(Deep(), compiling)
    assert (first, set(others) <= {"model.blocks.1.attention"}) == ("model.blocks.0.attention", True)


def test_a_graph_that_is_compiled_by_no_model_has_no_prefix() -> None:
    assert Graph(GraphModule(nn.Module(), torch.fx.Graph()), frozenset(), {}, False).prefix == ""
