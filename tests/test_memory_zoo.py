"""Buffer plans of the zoo's rewritten models, forward and backward: near the lower bound at every length, and the same everywhere.

Graphs are traced only; nothing is computed.
"""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from zoo import ZOO
from zoo.model import quiet
from zoo.regimes import PLAIN

from dilcompile.memory_plan import ASSUMED, memory_plan
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.policy import Policy

POLICY = Policy.load("exact")
# Encoders, decoders, both; grouped heads, experts, relative positions, windows of images, convolutions beside attention.
MODELS = {
    "bert": "eager",
    "deberta_v2": "eager",
    "gpt2": "eager",
    "llama": "sdpa",
    "gemma2": "eager",
    "mixtral": "eager",
    "t5": "eager",
    "swinv2": "eager",
    "wav2vec2": "sdpa",
    "nn_transformer": "native",
}


@pytest.mark.parametrize("name", MODELS)
def test_plans_are_near_the_lower_bound(name: str) -> None:
    quiet()
    torch._dynamo.reset()
    net = ZOO[name].build(MODELS[name]).train()
    found = memory_plan(net, (), ZOO[name].call(replace(PLAIN, padding="none")), POLICY)
    directions = [graph.direction for graph in found.graphs]
    assert directions.count("forward") == directions.count("backward") >= 1
    assert sum(len(graph.buffers) + len(graph.donated) for graph in found.graphs) > 20
    for graph in found.graphs:
        graph.plan.verify()
        assert graph.plan.most_live <= graph.plan.peak <= 1.05 * graph.plan.most_live
        assert graph.plan.peak <= graph.plan.without_reuse
        assert pickle.loads(pickle.dumps(graph)) == graph


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_plan_for_any_length_is_near_the_lower_bound_at_each(name: str) -> None:
    quiet()
    torch._dynamo.reset()
    net, inputs = ZOO[name].build("sdpa").train(), ZOO[name].call(replace(PLAIN, padding="none"))
    calls: list[Any] = []

    def backend(gm: Any, example_inputs: Any) -> Any:
        from dilcompile.planned import planned

        gm = rewrite_dynamo(gm, example_inputs, POLICY, "0").gm
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            return planned(ASSUMED, lambda call, direction: calls.append(call))(gm, example_inputs)

    torch.compile(net, backend=backend, dynamic=True)(**inputs)
    assert len(calls) == 2
    for call in calls:
        symbols = [symbol for _, symbol in call.planned.symbols]
        assert symbols
        for length in (1, 77, 1000, 65536):
            plan = call.planned.plan.fitted(dict.fromkeys(symbols, length))
            plan.verify()
            assert plan.most_live <= plan.peak <= 1.05 * plan.most_live
            assert plan.peak <= plan.without_reuse
