"""Every key, a causal triangle or a window, also in packed documents, by the package ``flash_attn`` (2.7 and newer 2.x)."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering import aten_flash, digest, whole
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.whole import Laid

TAKES_ROW_MASKS = False
LEAST_ROWS = 1

# The first whose functions take the window as two numbers.
_OLDEST = (2, 7)


class Package:
    """See ``FlashOp``; the functions below the package's autograd, which take out and LSE."""

    def forward(self, laid: Laid) -> tuple[Tensor, Tensor]:
        """See ``FlashOp``."""
        from flash_attn import flash_attn_interface as functions

        options = {"dropout_p": 0.0, **_options(laid), "return_softmax": False}
        if laid.packed is None:
            out, lse, *_ = functions._flash_attn_forward(laid.q, laid.k, laid.v, **options)
        else:
            out, lse, *_ = functions._flash_attn_varlen_forward(laid.q, laid.k, laid.v, **_documents(laid), **options)
        return out, lse

    def backward(self, laid: Laid, out: Tensor, lse: Tensor, grad_out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See ``FlashOp``."""
        from flash_attn import flash_attn_interface as functions

        grads = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (laid.q, laid.k, laid.v))
        options = {"dropout_p": 0.0, **_options(laid), "deterministic": torch.are_deterministic_algorithms_enabled()}
        operands = (grad_out, laid.q, laid.k, laid.v, out, lse, *grads)
        if laid.packed is None:
            functions._flash_attn_backward(*operands, **options)
        else:
            functions._flash_attn_varlen_backward(*operands, **_documents(laid), **options)
        return grads[0], grads[1], grads[2]


def _options(laid: Laid) -> dict[str, Any]:
    return {
        "softmax_scale": laid.scale,
        "causal": laid.band.is_causal,
        "window_size_left": laid.band.left,
        "window_size_right": laid.band.right,
        "softcap": 0.0 if laid.softcap is None else laid.softcap,
        "alibi_slopes": None,
    }


def _documents(laid: Laid) -> dict[str, Any]:
    held = laid.packed
    assert held is not None
    return {
        "cu_seqlens_q": held.queries,
        "cu_seqlens_k": held.keys,
        "max_seqlen_q": held.most_queries,
        "max_seqlen_k": held.most_keys,
    }


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``."""
    return f"{digest.of_files('flash_attn.py', 'whole.py', 'band.py', 'packed.py')}, flash_attn {_version()}"


def supports(call: Call, backward: bool) -> str | None:
    """One band of keys in half precision on CUDA, any number of query heads a key head, with a softcap in the forward."""
    if backward and call.softcap is not None:
        return "a softcap: its backward takes no gradient of the LSE"
    return aten_flash.refusal_of_half(call, aten_flash.LARGEST_HEAD) or _absent() or whole.beyond_whole(call)


def _absent() -> str | None:
    """Why the package can't be called, or None; it is not imported for that."""
    held = _version()
    if held is None:
        return "the package flash_attn is not installed (pip install flash-attn)"
    numbers = tuple(int(number) for number in re.findall(r"\d+", held)[:2])
    if not (_OLDEST <= numbers < (3,)):
        return f"flash_attn is {held}, not 2.7 or a newer 2.x"
    # FlashAttention 4 has the same name, and other functions.
    return None if _has_functions() else f"flash_attn {held} has no flash_attn_interface"


@lru_cache(maxsize=1)
def _version() -> str | None:
    try:
        return version("flash_attn")
    except PackageNotFoundError:
        return None


@lru_cache(maxsize=1)
def _has_functions() -> bool:
    spec = find_spec("flash_attn")
    places = [] if spec is None else spec.submodule_search_locations or []
    return any((Path(place) / "flash_attn_interface.py").is_file() for place in places)


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return whole.forward(call, Package())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return whole.backward(call, Package(), out, lse, grad_out, grad_lse)
