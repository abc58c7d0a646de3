"""Backends that compile a model for measuring: ours, with counts; Inductor's own fusion; a graph in float64 throughout."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.fx import GraphModule

from dilcompile.decision import Decision, Rejection
from dilcompile.passes.dialect.normalize import NormalizeError, normalize
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.policy import Policy
from dilcompile.report import GraphReport
from zoo.truth import Truth, Watch

Compiled = Callable[..., Any]
Backend = Callable[[GraphModule, Sequence[Any]], Compiled]
EXACT = Policy.load("exact")


@dataclass
class Tally:
    """What was found in the graphs of one model, each graph as often as it ran in one call."""

    graphs: list[tuple[GraphReport, list[int]]] = field(default_factory=list)

    def add(self, report: GraphReport) -> list[int]:
        runs = [0]
        self.graphs.append((report, runs))
        return runs

    @property
    def executed(self) -> int:
        return sum(runs[0] > 0 for _, runs in self.graphs)

    @property
    def rewritten(self) -> int:
        return sum(runs[0] * isinstance(verdict, Decision) for report, runs in self.graphs for verdict in report.verdicts)

    @property
    def listed(self) -> int:
        """Every site that the report speaks of."""
        return self.rewritten + self.refused.total() + self.missed.total()

    @property
    def refused(self) -> Counter[str]:
        """Reasons of found sites that stay as they are."""
        return _counted((v.reason, runs) for report, runs in self.graphs for v in report.verdicts if isinstance(v, Rejection))

    @property
    def missed(self) -> Counter[str]:
        """Reasons of what is listed as not proven."""
        return _counted((miss.reason, runs) for report, runs in self.graphs for miss in report.misses)

    @property
    def notes(self) -> Counter[str]:
        return _counted((note, runs) for report, runs in self.graphs for note in report.notes)

    @property
    def masks(self) -> Counter[str]:
        return _counted((str(v.site.mask), runs) for report, runs in self.graphs for v in report.verdicts)


def _counted(items: Any) -> Counter[str]:
    found: Counter[str] = Counter()
    for text, (runs,) in items:
        found[text] += runs
    return +found


def rewriting(tally: Tally, policy: Policy = EXACT) -> Backend:
    """Our passes; what they give runs eagerly, so that it is judged by itself."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        outcome = rewrite_dynamo(gm, example_inputs, policy, str(len(tally.graphs)))
        runs = tally.add(outcome.report)
        forward = (gm if outcome.gm is None else outcome.gm).forward

        def call(*args: Any) -> Any:
            runs[0] += 1
            return forward(*args)

        return call

    return backend


def widened(then: Backend) -> Backend:
    """``then`` on the graph with every cast to float32 made one to float64: the model without its own float32 parts."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        for part in gm.modules():
            for node in part.graph.nodes if isinstance(part, GraphModule) else ():
                node.args = _widen(node.args)
                node.kwargs = _widen(node.kwargs)
                if node.op == "call_method" and node.target == "float":
                    node.target = "double"
            if isinstance(part, GraphModule):
                part.recompile()
        return then(gm, example_inputs)

    return backend


def _widen(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, (tuple, list)):
        return type(value)(_widen(item) for item in value)
    if isinstance(value, dict):
        return {key: _widen(item) for key, item in value.items()}
    return value


def as_it_is(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
    return gm.forward


def watching(truth: Truth, weights: Sequence[torch.Tensor]) -> Backend:
    """The graphs without their dead code, with the attention in each counted while it runs."""

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        try:
            forward = normalize(gm, example_inputs).forward
        except NormalizeError:
            forward = gm.forward

        def call(*args: Any) -> Any:
            with Watch(truth, weights):
                return forward(*args)

        return call

    return backend


def fusions(model: nn.Module, call: Callable[[Compiled], Any]) -> int:
    """How many attentions Inductor's own pattern matcher takes, without generating any code."""
    from torch._functorch.aot_autograd import make_boxed_func
    from torch._inductor.compile_fx import compile_fx

    def keep(gm: GraphModule, example_inputs: Any, **options: Any) -> Compiled:
        def call(*args: Any) -> Any:
            # Compiled code gives tensors of their own, which the model may write into.
            return [x.clone() if isinstance(x, torch.Tensor) and x._is_view() else x for x in gm.forward(*args)]

        return make_boxed_func(call)

    def backend(gm: GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        return compile_fx(gm, list(example_inputs), inner_compile=keep)

    torch._dynamo.reset()
    counters.clear()
    call(torch.compile(model, backend=backend))
    return int(counters["inductor"]["fuse_attention"])
