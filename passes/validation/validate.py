"""Prove a rewrite by trial: the site's own computation and its replacement on the same inputs, in float64.

What is compared is what the finder read of the site (roles, scale, mask, bias), so a site that becomes approximate is tried as
the dense form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from dilcompile.passes.validation.draws import Values, draws
from dilcompile.passes.validation.trial import Trial

# Scores of all heads in float64, several of them alive at once: above this a trial takes gigabytes.
MOST_PAIRS = 2**25
_GRADIENT_FLOOR = 1e-3


@dataclass(frozen=True)
class Finding:
    """The largest difference of all runs of one trial.

    Args:
        runs: how many inputs could be run. On other inputs the site itself fails, which says nothing.
        rel_l2: norm of the difference over that of the site's own result; infinite where only one of the two is NaN.
        largest: largest absolute difference.
        where: the inputs and the tensor of that difference.
        failure: why nothing could be run; empty if something was.
    """

    runs: int = 0
    rel_l2: float = 0.0
    largest: float = 0.0
    where: str = ""
    failure: str = ""

    def __str__(self) -> str:
        if not self.runs:
            return f"could not be run: {self.failure}"
        figures = f"max {self.largest:.1e}, rel_l2 {self.rel_l2:.1e}"
        return f"{figures} ({self.where})" if self.where else figures


def tried_at_random(trial: Trial, known: Mapping[Node, Any]) -> Finding:
    """The trial on drawn inputs; see ``draws``."""
    return tried(trial, draws(trial, known))


def tried(trial: Trial, inputs: Iterable[Values]) -> Finding:
    """The trial on these inputs: its output and, in training, the gradients of everything that was cut."""
    finding = Finding()
    for values in inputs:
        try:
            found = _compared(trial, values)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            finding = Finding(finding.runs, finding.rel_l2, finding.largest, finding.where, finding.failure or reason)
            continue
        worse = found if found.rel_l2 > finding.rel_l2 else finding
        finding = Finding(finding.runs + 1, worse.rel_l2, worse.largest, worse.where, finding.failure)
    return finding


def _compared(trial: Trial, values: Values) -> Finding:
    # Copies: both sides may be written in place.
    held = [value.clone() if isinstance(value, Tensor) else value for value in values.held]
    free = [value for leaf, value in zip(trial.leaves, held, strict=True) if leaf in trial.cuts] if trial.training else []
    given = [value.requires_grad_().clone() if any(value is own for own in free) else value for value in held]
    with torch.set_grad_enabled(trial.training):
        own, new = trial.gm(*given)
    pairs = [("output", own.detach(), new.detach())]
    if trial.training and own.requires_grad:
        weights = torch.randn(own.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        grads = [torch.autograd.grad(side, free, weights, retain_graph=True, allow_unused=True) for side in (own, new)]
        for index, (a, b) in enumerate(zip(*grads, strict=True)):
            if a is not None or b is not None:
                zeros = torch.zeros_like(free[index])
                pairs.append(("a gradient", zeros if a is None else a, zeros if b is None else b))
    # A gradient that is zero but for rounding is held against the output's size, not against its own.
    least = _GRADIENT_FLOOR * _norm(pairs[0][1])
    found = [Finding(1, *_apart(a, b, least), f"{name}, inputs: {values.name}") for name, a, b in pairs]
    return max(found, key=lambda finding: finding.rel_l2)


def _apart(own: Tensor, new: Tensor, least: float) -> tuple[float, float]:
    if own.shape != new.shape:
        return math.inf, math.inf
    same = (own == new) | (own.isnan() & new.isnan())
    if bool((~same & ~(own.isfinite() & new.isfinite())).any()):
        return math.inf, math.inf
    if bool(same.all()):
        return 0.0, 0.0
    apart = torch.where(same, 0.0, own - new)
    return float(apart.norm()) / max(_norm(own), least, 1e-300), float(apart.abs().max())


def _norm(tensor: Tensor) -> float:
    return float(torch.where(tensor.isfinite(), tensor, 0.0).norm())
