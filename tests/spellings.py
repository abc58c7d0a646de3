"""Attention written out as users write it: composable pieces of modules, and one way to compile and compare them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from dilcompile.decision import Decision
from dilcompile.pipeline import Outcome, rewrite_dynamo
from dilcompile.policy import Policy
from dilcompile.site import AttentionSite, Miss

EXACT = Policy.load("exact")
WINDOW = 3
WINDOWED = Policy.load(
    {
        "version": 1,
        "rules": [{"name": "w", "match": {}, "apply": {"form": "sliding_window", "window": WINDOW}}],
        "defaults": {"fallback": {"unsupported": "keep", "unmatched": "keep"}},
    }
)


@dataclass
class Found:
    """What one compiled call found and made."""

    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def sites(self) -> list[AttentionSite]:
        return [verdict.site for outcome in self.outcomes for verdict in outcome.report.verdicts]

    @property
    def misses(self) -> list[Miss]:
        return [miss for outcome in self.outcomes for miss in outcome.report.misses]

    @property
    def rewritten(self) -> int:
        return sum(isinstance(v, Decision) for outcome in self.outcomes for v in outcome.report.verdicts)

    @property
    def refusals(self) -> list[str]:
        return [
            v.reason for outcome in self.outcomes for v in outcome.report.verdicts if not isinstance(v, Decision)
        ]

    @property
    def masks(self) -> list[str]:
        return [str(site.mask) for site in self.sites]

    @property
    def graphs(self) -> list[GraphModule]:
        return [outcome.gm for outcome in self.outcomes if outcome.gm is not None]


def compiled(module: Callable[..., Any], policy: Policy = EXACT, dynamic: bool | None = None) -> tuple[Any, Found]:
    """The module compiled with the inner compiler ``eager``, and a record of what is found at each compilation."""
    torch._dynamo.reset()
    found = Found()

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        outcome = rewrite_dynamo(gm, example_inputs, policy, "test")
        found.outcomes.append(outcome)
        return (gm if outcome.gm is None else outcome.gm).forward

    return torch.compile(module, backend=backend, dynamic=dynamic), found


def agree(
    module: nn.Module,
    *inputs: Any,
    policy: Policy = EXACT,
    reference: Callable[..., Any] | None = None,
    dynamic: bool | None = None,
    tolerance: float = 1e-9,
    gradients: bool = True,
    **named: Any,
) -> Found:
    """Assert that compiled and plain run agree, forward and in every gradient; return what was found.

    Args:
        reference: what to compare with; None: the module itself, uncompiled.
    """
    run, found = compiled(module, policy, dynamic)
    wanted, wanted_grads = _run(module, reference or module, inputs, named, gradients)
    got, got_grads = _run(module, run, inputs, named, gradients)
    assert len(wanted) == len(got)
    for expected, actual in zip(wanted + wanted_grads, got + got_grads, strict=True):
        if expected is None or actual is None:
            assert expected is None
            assert actual is None or not actual.any()
            continue
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)
    return found


def _run(
    module: nn.Module, call: Callable[..., Any], inputs: Sequence[Any], named: dict[str, Any], gradients: bool
) -> tuple[list[Any], list[Any]]:
    leaves = [_leaf(value, gradients) for value in inputs]
    kwargs = {name: _leaf(value, gradients) for name, value in named.items()}
    for parameter in module.parameters():
        parameter.grad = None
    results = [r for r in torch.utils._pytree.tree_leaves(call(*leaves, **kwargs)) if isinstance(r, Tensor)]
    if not gradients:
        return [r.detach() for r in results], []
    total = sum(_weighted(r) for r in results if r.requires_grad)
    total.backward()  # type: ignore[union-attr]
    tracked = [x for x in (*leaves, *kwargs.values()) if isinstance(x, Tensor) and x.requires_grad]
    return [r.detach() for r in results], [x.grad for x in (*tracked, *module.parameters())]


def _weighted(result: Tensor) -> Tensor:
    """A scalar that depends on every element differently."""
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    return (result * weights).sum()


def _leaf(value: Any, gradients: bool) -> Any:
    if not isinstance(value, Tensor):
        return value
    wants = gradients and value.is_floating_point()
    return value.detach().clone().requires_grad_(wants)


def square_tensors(gm: GraphModule, length: int) -> list[Node]:
    """Nodes that hold a tensor with two dims of the given length."""
    return [
        node
        for node in gm.graph.nodes
        if isinstance(node.meta.get("val"), Tensor) and sum(size == length for size in node.meta["val"].shape) >= 2
    ]
