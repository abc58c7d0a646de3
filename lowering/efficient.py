"""Every key, a causal triangle or window by ATen's memory-efficient op: also float32, also values of another head size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering import digest, whole
from dilcompile.lowering.band import Band, limits_of
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.whole import Laid

TAKES_ROW_MASKS = False
LEAST_ROWS = 1

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# The op's numbers for masks; its triangle ends in the last row and the last key.
_NO_MASK, _LOWER_RIGHT = 0, 2
# Rows of LSE that the op's backward loads at once.
_LSE_ROWS = 32


class AtenEfficient:
    """See ``FlashOp``."""

    def forward(self, laid: Laid) -> tuple[Tensor, Tensor]:
        """See ``FlashOp``."""
        bias_and_lengths = (None,) * 5
        out, lse, *_ = torch.ops.aten._efficient_attention_forward(
            *laid.operands, *bias_and_lengths, 0.0, _mask(laid.band), compute_log_sumexp=True, **_options(laid)
        )
        return out, lse.narrow(2, 0, laid.q.shape[1])

    def backward(self, laid: Laid, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashOp``."""
        padded = torch.nn.functional.pad(lse, (0, -lse.shape[2] % _LSE_ROWS), value=torch.inf)
        lengths = None, None, laid.q.shape[1], laid.k.shape[1]
        state, bias_wants_grad = laid.no_draws(), False
        d_q, d_k, d_v, _ = torch.ops.aten._efficient_attention_backward(
            grad_out, *laid.operands, None, out, *lengths, padded, 0.0, state, state, _mask(laid.band), bias_wants_grad,
            **_options(laid),
        )  # fmt: skip
        return d_q, d_k, d_v


def _mask(band: Band) -> int:
    return _NO_MASK if band.is_full else _LOWER_RIGHT


def _options(laid: Laid) -> dict[str, Any]:
    """The op counts the query's own key into its window."""
    window = {} if laid.band.left < 0 else {"window_size": laid.band.left + 1}
    return {"scale": laid.scale, **window}


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; torch's own op, but given offsets, windows and another kernel's LSE."""
    return f"{digest.of_files('efficient.py', 'whole.py', 'band.py')}, CUDA {torch.version.cuda}"


def supports(call: Call, backward: bool) -> str | None:
    """One band of keys that ends at the query, or all keys, on CUDA."""
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}, not on a CUDA device"
    if call.q.dtype not in _DTYPES:
        return f"the dtype is {call.q.dtype}, not float16, bfloat16 or float32"
    if call.softcap is not None:
        return "softcap"
    if call.documents is not None:
        return "documents"
    size = call.problem
    if size.group != 1:
        return f"{size.group} query heads share a key head: the op would need copies of the keys"
    if size.head_dim % 8 or size.v_dim % 8:
        return f"a head size ({size.head_dim} and {size.v_dim}) is not a multiple of 8"
    return whole.beyond_whole(call) or _of_band(call)


def _of_band(call: Call) -> str | None:
    limits = limits_of(call.relation)
    return None if limits == (None, None) or limits[1] == 0 else "a window that does not end at the query"


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return whole.forward(call, AtenEfficient())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return whole.backward(call, AtenEfficient(), out, lse, grad_out, grad_lse)
