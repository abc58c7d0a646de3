"""The operator ``dilcompile::after``: a copy that waits, for graphs whose order of work says what they need at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("dilcompile::after", mutates_args=(), schema="(Tensor x, Tensor[] before) -> Tensor")
def after(x: Tensor, before: Sequence[Tensor]) -> Tensor:
    """A copy of ``x``, made when ``before`` is there: whatever reorders, merges or fuses a graph keeps to that."""
    return x.clone()


@after.register_fake
def _(x: Tensor, before: Sequence[Tensor]) -> Tensor:
    return x.clone()
