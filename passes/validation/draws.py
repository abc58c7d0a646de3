"""Inputs for a trial: random numbers where any will do, and masks, positions and numbers as models are given them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Node

from dilcompile.passes.validation.trial import Trial, passed_number

Size = tuple[int, ...]
Draw = Callable[[Size, torch.Generator], Tensor]


@dataclass(frozen=True)
class Values:
    """One value a leaf, and what the inputs among them are like."""

    name: str
    held: tuple[Any, ...]


def _padded_behind(shape: Size, generator: torch.Generator) -> Tensor:
    kept = torch.ones(shape, dtype=torch.int64)
    if shape:
        kept[-1, ..., shape[-1] - shape[-1] // 3 :] = 0
    return kept


def _padded_in_front(shape: Size, generator: torch.Generator) -> Tensor:
    return _padded_behind(shape, generator).flip(-1) if shape else _padded_behind(shape, generator)


def _hidden(shape: Size, generator: torch.Generator) -> Tensor:
    """The last row of the batch sees nothing at all."""
    kept = torch.ones(shape, dtype=torch.int64)
    if shape:
        kept[-1] = 0
    return kept


def _positions(shape: Size, generator: torch.Generator) -> Tensor:
    """Two documents a row, each counted from 0."""
    length = shape[-1] if shape else 1
    first = (2 * length + 2) // 3
    counted = torch.cat([torch.arange(first), torch.arange(length - first)])
    return counted.expand(shape).clone() if shape else torch.tensor(length // 2)


def _numbers(shape: Size, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 4, shape, generator=generator)


DRAWS: Mapping[str, Draw] = {
    "padded behind": _padded_behind,
    "padded in front": _padded_in_front,
    "a row hidden": _hidden,
    "positions": _positions,
    "numbers": _numbers,
}


def draws(trial: Trial, known: Mapping[Node, Any]) -> Iterator[Values]:
    """Values for the leaves: one draw where they are activations alone, else one for each kind of input, and the inputs as given.

    Args:
        known: values of the graph's inputs; fake ones count as not known.
    """
    given = trial.cuts | trial.tables.keys()
    drawn = [leaf for leaf in trial.leaves if leaf not in given and passed_number(leaf) is None]
    asked = [leaf for leaf in drawn if isinstance(leaf.meta.get("val"), Tensor)]
    kinds = list(DRAWS) if asked else ["activations"]
    if asked and all(_real(known.get(leaf)) for leaf in asked):
        kinds.insert(0, "as given")
    for seed, kind in enumerate(kinds):
        generator = torch.Generator().manual_seed(seed)
        yield Values(kind, tuple(_value(leaf, kind, trial, known, generator) for leaf in trial.leaves))


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor) and value.device.type != "meta"


def _value(leaf: Node, kind: str, trial: Trial, known: Mapping[Node, Any], generator: torch.Generator) -> Any:
    fake = leaf.meta.get("val")
    if not isinstance(fake, Tensor):
        return _number(known.get(leaf, fake))
    number = passed_number(leaf)
    if number is not None:
        return torch.tensor(number, dtype=torch.float64)
    shape = tuple(_number(size) for size in fake.shape)
    if leaf in trial.cuts:
        return torch.randn(shape, generator=generator, dtype=torch.float64)
    if leaf in trial.tables or kind == "as given":
        held = trial.tables.get(leaf, known.get(leaf))
        assert held is not None
        return in_float64(held)
    made = DRAWS[kind](shape, generator)
    if fake.dtype is torch.bool:
        return made.ne(0)
    return made.to(torch.float64 if fake.dtype.is_floating_point else fake.dtype)


def in_float64(value: Any) -> Any:
    """A tensor as a trial takes it: on the CPU, floating ones in float64."""
    if not isinstance(value, Tensor):
        return value
    held = value.detach().cpu()
    return held.double() if held.is_floating_point() else held


def _number(value: Any) -> Any:
    """The size that a symbolic length has in this call."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value.node.hint
    return value
