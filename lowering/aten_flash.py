"""ATen's flash op for CUDA: FlashAttention 2, or what the user has activated through PyTorch's registry (FA3, FA4)."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering.call import Call
from dilcompile.lowering.whole import Laid

LARGEST_HEAD = 256
# Compute capabilities (major) of the implementations in PyTorch's registry that can be named here.
_RUNS_ON = {"FA3": (9,), "FA4": (9, 10)}


class AtenFlash:
    """See ``FlashOp``."""

    def forward(self, laid: Laid) -> tuple[Tensor, Tensor]:
        """See ``FlashOp``."""
        out, lse, *_ = torch.ops.aten._flash_attention_forward(
            *laid.operands, *_lengths(laid), 0.0, laid.band.is_causal, return_debug_mask=False, **_options(laid)
        )
        return out, lse

    def backward(self, laid: Laid, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashOp``."""
        state = laid.no_draws(2, dtype=torch.uint64), laid.no_draws(0, dtype=torch.uint64)
        d_q, d_k, d_v = torch.ops.aten._flash_attention_backward(
            grad_out, *laid.operands, out, lse, *_lengths(laid), 0.0, laid.band.is_causal, *state, **_options(laid)
        )
        return d_q, d_k, d_v


def _lengths(laid: Laid) -> tuple[Tensor | None, Tensor | None, int, int]:
    """Where documents begin, and the most rows of each side."""
    held = laid.packed
    if held is None:
        return None, None, laid.q.shape[1], laid.k.shape[1]
    return held.queries, held.keys, held.most_queries, held.most_keys


def _options(laid: Laid) -> dict[str, Any]:
    """A window only where there is one: torch 2.11 refuses even none for FA4's backward, if it is given as -1."""
    if laid.band.is_full or laid.band.is_causal:
        return {"scale": laid.scale}
    return {"scale": laid.scale, "window_size_left": laid.band.left, "window_size_right": laid.band.right}


def activated() -> str | None:
    """The implementation that the user activated in PyTorch's registry, by name; None: ATen's own."""
    name: str | None = torch.nn.attention.current_flash_attention_impl()
    return name


def origin() -> str:
    """Who computes, for what is remembered about the op."""
    return f"{activated() or 'FlashAttention of torch'}, CUDA {torch.version.cuda}"


def refusal(call: Call, backward: bool, largest_head: int = LARGEST_HEAD) -> str | None:
    """What of device, dtype and head sizes the op does not take, or None."""
    reason = refusal_of_half(call, largest_head)
    return reason if reason is not None else _of_device(call.q.device, call.problem.head_dim, backward)


def refusal_of_half(call: Call, largest_head: int) -> str | None:
    """What of device, dtype and head sizes no flash op takes that wants half precision on CUDA, or None."""
    size = call.problem
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}, not on a CUDA device"
    if call.q.dtype not in (torch.float16, torch.bfloat16):
        return f"the dtype is {call.q.dtype}, not float16 or bfloat16"
    if size.head_dim != size.v_dim:
        return f"head sizes of q and v differ ({size.head_dim} and {size.v_dim})"
    if size.head_dim % 8 or size.head_dim > largest_head:
        return f"the head size {size.head_dim} is not a multiple of 8 up to {largest_head}"
    return None


def _of_device(device: torch.device, head_dim: int, backward: bool) -> str | None:
    """What the device does not do; nothing is asked of one that is not there."""
    found = _capability(device)
    if found is None:
        return None
    (major, minor), name = found, activated()
    if name is not None:
        takes = _RUNS_ON.get(name)
        if takes is None or major in takes:
            return None
        return f"{name} is activated, which takes compute capability {' or '.join(f'{n}.x' for n in takes)}, not {major}.{minor}"
    if major < 8:
        return f"compute capability {major}.{minor} is older than 8.0"
    if backward and 192 < head_dim <= 224 and ((major, minor) in ((8, 6), (8, 9)) or major == 12):
        return f"the head size {head_dim} has no backward on compute capability {major}.{minor}"
    return None


@lru_cache(maxsize=16)
def _capability(device: torch.device) -> tuple[int, int] | None:
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)
