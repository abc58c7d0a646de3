"""Dense attention on a CPU by one ATen call that also gives the LSE."""

from __future__ import annotations

import torch
from torch import Tensor

from dilcompile.generators import Everything
from dilcompile.lowering import aten_cpu_flash
from dilcompile.lowering.call import Call, Gradients, dense_rows
from dilcompile.lowering.view_path.engines import finite_for_backward, needs_math
from dilcompile.relation import Term

TAKES_ROW_MASKS = False
LEAST_ROWS = 1


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``."""
    return None


def supports(call: Call, backward: bool) -> str | None:
    """Every key, or causal from the top left, on a CPU."""
    if call.relation.terms != (Term(Everything()),):
        return f"the relation is {call.relation}, not every key"
    if call.problem.is_causal and call.problem.q_offset != 0:
        return f"causal attention starts at key position {call.problem.q_offset}, not at 0"
    if call.documents is not None:
        return "documents"
    if call.problem.group != 1:
        return f"{call.problem.group} query heads share a key head: the op would need copies of the keys"
    if backward and call.merge_grad != "exact":
        return "the gradient of the merge is detached"
    reason = needs_math(call)
    if reason is not None or call.q.device.type == "cpu":
        return reason
    return f"the tensors are on {call.q.device}, not on a CPU"


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    q, k, v = (dense_rows(x) for x in (call.q, call.k, call.v))
    out, lse = aten_cpu_flash.attend(q, k, v, call.problem.is_causal, _mask(call), call.scale, _rows_that_see(call))
    return out, lse.contiguous()


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    q, k, v, out, grad_out = (dense_rows(x) for x in (call.q, call.k, call.v, out, grad_out))
    sizes = q.shape[-1], k.shape[-1], v.shape[-1]
    if grad_lse is not None:
        # Note [LSE gradient] in views.py: more head columns turn the op's delta into delta - grad_lse.
        q, k, v, out, grad_out = (torch.nn.functional.pad(x, (0, 8)) for x in (q, k, v, out, grad_out))
        out[..., -1] = -1
        grad_out[..., -1] = grad_lse.to(grad_out.dtype)
    lse = finite_for_backward(lse)
    grads = aten_cpu_flash.gradients(grad_out, q, k, v, out, lse, call.problem.is_causal, _mask(call), call.scale)
    return grads[0][..., : sizes[0]], grads[1][..., : sizes[1]], grads[2][..., : sizes[2]], None


def _mask(call: Call) -> Tensor | None:
    """Key padding as an additive mask [B, 1, Sq (stride 0), Sk]."""
    if call.key_padding is None:
        return None
    keep = call.key_padding
    bias = torch.zeros(keep.shape, dtype=call.score_dtype, device=keep.device).masked_fill_(~keep, -torch.inf)
    return bias[:, None, None]


def _rows_that_see(call: Call) -> Tensor | None:
    """Bool broadcastable to [B, H, Sq]: rows with at least one key; None: all of them."""
    if call.key_padding is None:
        return None
    if not call.problem.is_causal:
        return call.key_padding.any(-1)[:, None, None]
    # Row i sees the keys up to i.
    seen = call.key_padding.cumsum(-1) > 0
    last = torch.arange(call.problem.q_len, device=seen.device).clamp_(max=call.problem.k_len - 1)
    return seen[:, None, last]
