"""Every key or a causal square by cuDNN's attention, as ATen calls it."""

from __future__ import annotations

import torch
from torch import Tensor

from dilcompile.lowering import aten_flash, digest, whole
from dilcompile.lowering.band import limits_of
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.whole import Laid

TAKES_ROW_MASKS = False
LEAST_ROWS = 1

# What cuDNN takes on every device that it runs on.
_LARGEST_HEAD = 128


class Cudnn:
    """See ``FlashOp``; the op itself takes [B, H, S, D]."""

    def forward(self, laid: Laid) -> tuple[Tensor, Tensor]:
        """See ``FlashOp``."""
        q, k, v = (x.transpose(1, 2) for x in laid.operands)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q, k, v, None, True, 0.0, laid.band.is_causal, False, scale=laid.scale
        )
        # [B, H, S, 1]
        return out.transpose(1, 2), lse.view(lse.shape[:3])

    def backward(self, laid: Laid, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashOp``."""
        q, k, v, out, grad_out = (x.transpose(1, 2) for x in (*laid.operands, out, grad_out))
        state = laid.no_draws()
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_out, q, k, v, out, lse.unsqueeze(-1), state, state, None, None, None, q.shape[2], k.shape[2], 0.0,
            laid.band.is_causal, scale=laid.scale,
        )  # fmt: skip
        return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2)


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; another library's code, of a version of its own."""
    return f"{digest.of_files('cudnn.py', 'whole.py', 'band.py')}, CUDA {torch.version.cuda}, cuDNN {_version()}"


def supports(call: Call, backward: bool) -> str | None:
    """Every key, or as many keys as queries and causal, in half precision on CUDA."""
    if call.softcap is not None:
        return "softcap"
    if call.documents is not None:
        return "documents"
    reason = aten_flash.refusal_of_half(call, _LARGEST_HEAD)
    if reason is not None:
        return reason
    if torch.cuda.is_available() and _version() is None:
        return "this torch has no cuDNN"
    if backward and torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, which torch.use_deterministic_algorithms asks for"
    return whole.beyond_whole(call) or _of_band(call)


def _version() -> int | None:
    held: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return held


def _of_band(call: Call) -> str | None:
    """The op's triangle begins in the first row and key."""
    limits, size = limits_of(call.relation), call.problem
    if limits == (None, None) or (limits == (None, 0) and size.q_offset == 0):
        return None
    return "a window" if limits != (None, 0) else f"causal attention starts at key position {size.q_offset}, not at 0"


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return whole.forward(call, Cudnn())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return whole.backward(call, Cudnn(), out, lse, grad_out, grad_lse)
