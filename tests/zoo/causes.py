"""Why a rewritten model differs from the plain one by more than rounding in float64: found out by taking things away."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from zoo.compiling import Backend, Tally, as_it_is, rewriting, widened
from zoo.runs import Numbers, apart, run

BOUND = 1e-9
UNEXPLAINED = "UNEXPLAINED"
_OWN_NAN = "the model's own float32 makes it NaN in float64"


@dataclass(frozen=True)
class Trial:
    """One call of one model, to be repeated in other ways."""

    net: nn.Module
    inputs: dict[str, Any]
    gradients: bool
    dynamic: bool | None

    def compiled(self, backend: Backend) -> Callable[..., Any]:
        torch._dynamo.reset()
        return torch.compile(self.net, backend=backend, dynamic=self.dynamic)

    def run(self, call: Callable[..., Any]) -> Numbers:
        return run(self.net, call, self.inputs, self.gradients)

    def run_by(self, backend: Backend) -> Numbers:
        return self.run(self.compiled(backend))


def says_nothing(numbers: Numbers) -> bool:
    """Is no output a number? Any other model would equal it."""
    return not any(bool(output.isfinite().any()) for output in numbers.outputs)


def cause_of(trial: Trial, found: Numbers, eager: Numbers) -> tuple[str, float]:
    """The first thing that leaves no difference when it is taken away, and the difference that is then left.

    Args:
        found, eager: what the rewritten and the plain model give.
    """
    if says_nothing(eager):
        left = _widened_apart(trial)
        return (_OWN_NAN if left <= BOUND else UNEXPLAINED), left
    left = max(apart(trial.run(trial.net), eager))
    if left > BOUND:
        return "the model differs from itself at the same seed", left
    with _math():
        left = max(apart(found, trial.run(trial.net)))
        if left <= BOUND:
            return "torch's fused CPU attention differs from its own math", left
        left = max(apart(found, trial.run_by(as_it_is)))
        if left <= BOUND:
            return "torch.compile without any rewriting differs alike", left
        left = _widened_apart(trial)
    # Rounding makes no number infinite or undefined; the model's own NaN spreads to what comes after it.
    if left > BOUND or not math.isfinite(max(apart(_where_finite(found, eager), eager))):
        return UNEXPLAINED, left
    return ("own float32" if math.isfinite(max(apart(found, eager))) else _OWN_NAN), left


def _where_finite(found: Numbers, eager: Numbers) -> Numbers:
    """What was found where the plain model has numbers, and its own elsewhere."""
    outputs = [
        torch.where(wanted.isfinite(), got, wanted) if got.shape == wanted.shape else got
        for got, wanted in zip(found.outputs, eager.outputs, strict=False)
    ]
    gradients = {
        name: torch.where(eager.gradients[name].isfinite(), got, eager.gradients[name]) if name in eager.gradients else got
        for name, got in found.gradients.items()
    }
    return Numbers([*outputs, *found.outputs[len(outputs) :]], gradients)


def _widened_apart(trial: Trial) -> float:
    """The difference of the rewritten to the plain graphs, both without float32; infinite where they say nothing even then."""
    plain = trial.run_by(widened(as_it_is))
    return math.inf if says_nothing(plain) else max(apart(trial.run_by(widened(rewriting(Tally()))), plain))


@contextlib.contextmanager
def _math() -> Iterator[None]:
    """SDPA calls written out by torch itself."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
