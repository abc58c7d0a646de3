"""One call of a model, eager or compiled, and the numbers that come out of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Numbers:
    """Results of one call: floating outputs, caches included, then the gradient of every parameter that got one."""

    outputs: list[Tensor]
    gradients: dict[str, Tensor]


def run(model: nn.Module, call: Callable[..., Any], inputs: dict[str, Any], gradients: bool) -> Numbers:
    """Call ``call`` (``model``, or what it was compiled to) with the random state of seed 0."""
    for parameter in model.parameters():
        parameter.grad = None
    torch.manual_seed(0)
    with torch.set_grad_enabled(gradients):
        results = list(tensors(call(**inputs)))
    outputs = [result.detach() for result in results]
    if not gradients:
        return Numbers(outputs, {})
    tracked = [result for result in results if result.requires_grad]
    sum(_weighted(result) for result in tracked).backward()  # type: ignore[union-attr]
    grads = {name: p.grad.detach().clone() for name, p in model.named_parameters() if p.grad is not None}
    return Numbers(outputs, grads)


def _weighted(result: Tensor) -> Tensor:
    """A scalar to which every element counts differently, and NaN or infinite ones don't.

    The weights are random: a smooth row of them says little after a layer norm.
    """
    weights = torch.randn(result.shape, generator=torch.Generator().manual_seed(0), dtype=result.dtype)
    finite = torch.where(result.isfinite(), result, 0.0)
    return (finite * weights).sum()


def tensors(value: Any) -> Iterator[Tensor]:
    """Every floating tensor in what a model returns, in order; caches are looked into."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif type(value).__module__.startswith("transformers"):
        yield from tensors(vars(value))


def difference(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest absolute difference, over the size of the wanted tensor where that is above 1.

    Infinite where shapes or numbers of tensors differ, or one of the two is NaN or infinite and the other is not.
    """
    if [tuple(a.shape) for a in found] != [tuple(b.shape) for b in wanted]:
        return math.inf
    return max((_pair_apart(a.double(), b.double()) for a, b in zip(found, wanted, strict=True)), default=0.0)


def _pair_apart(found: Tensor, wanted: Tensor) -> float:
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if bool((~same & ~(found.isfinite() & wanted.isfinite())).any()):
        return math.inf
    if bool(same.all()):
        return 0.0
    size = max(1.0, float(torch.where(wanted.isfinite(), wanted, 0.0).abs().max()))
    return float(torch.where(same, 0.0, found - wanted).abs().max()) / size


def apart(found: Numbers, wanted: Numbers) -> tuple[float, float]:
    """The differences of outputs and of gradients."""
    return difference(found.outputs, wanted.outputs), gradient_difference(found.gradients, wanted.gradients)


def gradient_difference(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """As ``difference``; a gradient that only one of the two has counts as zero in the other."""
    names = sorted(found.keys() | wanted.keys())
    either = [found.get(name, wanted.get(name)) for name in names]
    pairs = [
        (found.get(name, torch.zeros_like(held)), wanted.get(name, torch.zeros_like(held)))  # type: ignore[arg-type]
        for name, held in zip(names, either, strict=True)
    ]
    return difference([a for a, _ in pairs], [b for _, b in pairs])
