"""Every key, a causal triangle or a window, also in packed documents, by one launch of ATen's flash op."""

from __future__ import annotations

from torch import Tensor

from dilcompile.lowering import aten_flash, digest, whole
from dilcompile.lowering.aten_flash import AtenFlash
from dilcompile.lowering.call import Call, Gradients

TAKES_ROW_MASKS = False
LEAST_ROWS = 1


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; torch's own op, but given windows, views and the lengths of documents."""
    return f"{digest.of_files('flash_band.py', 'aten_flash.py', 'whole.py', 'band.py', 'packed.py')}, {aten_flash.origin()}"


def supports(call: Call, backward: bool) -> str | None:
    """One band of keys in half precision on CUDA, any number of query heads a key head."""
    if call.softcap is not None:
        return "softcap"
    return aten_flash.refusal(call, backward) or whole.beyond_whole(call)


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return whole.forward(call, AtenFlash())


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return whole.backward(call, AtenFlash(), out, lse, grad_out, grad_lse)
