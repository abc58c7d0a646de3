"""Helpers of torch.nn that torch.compile can't trace, in a form that it can.

A graph break inside of torch.nn makes torch.compile run the whole module uncompiled, so that no backend sees its attention. Two
helpers of ``nn.Transformer*`` and ``nn.MultiheadAttention`` break: one reads a mask's values to find out whether it is causal,
one warns. Both are replaced where Dynamo traces them, and only there; uncompiled calls are not affected.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.modules import transformer


@torch.compiler.substitute_in_graph(transformer._detect_is_causal_mask)
def _detect_is_causal_mask(mask: Tensor | None, is_causal: bool | None = None, size: int | None = None) -> bool:
    """What the caller says of the mask. It is only a hint: the mask itself is applied where the hint is False."""
    return is_causal is True


@torch.compiler.substitute_in_graph(functional._canonical_mask)
def _canonical_mask(
    mask: Tensor | None,
    mask_name: str,
    other_type: torch.dtype | None,
    other_name: str,
    target_type: torch.dtype,
    check_other: bool = True,
) -> Tensor | None:
    """The mask as a float tensor; types that differ from the other mask's are taken without a warning."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise AssertionError(f"only bool and floating types of {mask_name} are supported")
    return torch.zeros_like(mask, dtype=target_type).masked_fill_(mask, float("-inf"))
