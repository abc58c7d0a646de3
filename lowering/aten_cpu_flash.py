"""ATen's flash op for CPU: strided operands, an additive mask beside the causal flag, LSE out and, for the backward, in."""

from __future__ import annotations

import torch
from torch import Tensor


def attend(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float, sees: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out [B, H, Sq, Dv] and LSE [B, H, Sq], -inf where no key is seen.

    Args:
        q, k, v: [B, H, S, D], as many heads each.
        causal: row i sees the keys up to i.
        mask: added to the scores, broadcastable to [B, H, Sq, Sk]; or None.
        sees: bool broadcastable to [B, H, Sq], rows with at least one key; None: all of them.
    """
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    # The op gives LSE 0 to rows that see no key.
    return out, lse if sees is None else lse.masked_fill(~sees, -torch.inf)


def gradients(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; lse: finite (``finite_for_backward``), of the joint softmax where this is a part of one."""
    d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )
    return d_q, d_k, d_v
