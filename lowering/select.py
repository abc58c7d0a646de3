"""Which kernel computes a call: the first that supports it, fastest first, or the one asked for by name."""

from __future__ import annotations

from dilcompile.errors import KernelError
from dilcompile.lowering import cpu, flash, native, reference, sdpa, triton
from dilcompile.lowering.call import Call, Kernel
from dilcompile.near import hint

# Their names are also `KERNEL_NAMES` in decision.py, which policies are checked by.
KERNELS: dict[str, Kernel] = {
    "native": native,
    "sdpa": sdpa,
    "flash": flash,
    "cpu": cpu,
    "reference": reference,
    # By name only, behind one that takes everything: its numbers are not checked on the device it runs on yet.
    "triton": triton,
}


def select(call: Call, name: str | None = None, backward: bool = False) -> Kernel:
    """The kernel for this call.

    Args:
        call: operands and relation.
        name: take this kernel; None: the first of ``KERNELS`` that supports the call.
        backward: choose for the backward pass.

    Raises:
        KernelError: if the kernel asked for is unknown or can't compute the call.
    """
    if name is None:
        rows = call.problem.q_len * call.problem.group
        fitting = (kernel for kernel in KERNELS.values() if rows >= kernel.LEAST_ROWS)
        return next(kernel for kernel in fitting if refusal(kernel, call, backward) is None)
    if name not in KERNELS:
        raise KernelError(f"kernel {name!r} is unknown{hint(name, KERNELS)}; the kernels are {', '.join(KERNELS)}")
    reason = refusal(KERNELS[name], call, backward)
    if reason is not None:
        able = next(other for other, kernel in KERNELS.items() if refusal(kernel, call, backward) is None)
        raise KernelError(f"kernel {name!r} can't compute this attention: {reason}; kernel {able!r} can, or leave the kernel out")
    return KERNELS[name]


def refusal(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel can't compute the call, or None."""
    if not kernel.TAKES_ROW_MASKS and (call.row_limits is not None or call.pairs is not None or call.flat):
        return "a mask by row"
    if call.narrow and kernel is not reference:
        return "a softmax in float32 over scores in float64"
    if call.pages is not None and kernel not in (triton, reference):
        return "keys and values in pages"
    return kernel.supports(call, backward)
