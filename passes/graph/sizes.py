"""Lengths and shapes that are proven to be the same."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.site import Length


def same_size(a: Length, b: Length) -> bool:
    """Are they proven to be the same? Without a guard: lengths that may turn out to be the same are not."""
    return statically_known_true(a == b)


def same_shape(a: Sequence[Length], b: Sequence[Length]) -> bool:
    """As ``same_size``, of all of them."""
    return len(a) == len(b) and all(map(same_size, a, b))
