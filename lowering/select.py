"""Which kernel computes a call: the first that supports it and whose numbers are trusted, or the one asked for by name."""

from __future__ import annotations

from dilcompile.errors import KernelError
from dilcompile.lowering import cpu, cudnn, efficient, flash, flash_attn, flash_band, native, reference, sdpa, triton, trust
from dilcompile.lowering.call import Call, Kernel
from dilcompile.near import hint

# Fastest first; their names are also `KERNEL_NAMES` in decision.py, which policies are checked by.
KERNELS: dict[str, Kernel] = {
    # On a CPU: the whole relation in one pass, at more than the rate of torch's own dense attention.
    "native": native,
    # On a CPU, every key, or causal: one call of torch's own flash op.
    "sdpa": sdpa,
    # On CUDA devices every key, causal or a window, by one launch of torch's flash op.
    "flash_band": flash_band,
    # On CUDA devices everything else in one launch, after its numbers were checked there.
    "triton": triton,
    # Parts of what the two before take, by other code: where that was measured to be faster.
    "flash_attn": flash_attn,
    "cudnn": cudnn,
    "efficient": efficient,
    # What is left in half precision on CUDA devices: an op a piece, and products where a piece is masked.
    "flash": flash,
    "cpu": cpu,
    "reference": reference,
}


def select(call: Call, name: str | None = None, backward: bool = False) -> Kernel:
    """The kernel for this call.

    Args:
        call: operands and relation.
        name: take this kernel; None: the first of ``KERNELS`` that supports the call and is trusted.
        backward: choose for the backward pass.

    Raises:
        KernelError: if the kernel asked for is unknown, can't compute the call, or computes wrong numbers on this device.

    Warns:
        DilcompileWarning: once where a kernel is passed over because its numbers are not trusted.
    """
    if name is None:
        fitting = (
            kernel for kernel in KERNELS.values() if _first_choice(kernel, call) and refusal(kernel, call, backward) is None
        )
        return next(kernel for kernel in fitting if trust.trusted(kernel, call, backward))
    if name not in KERNELS:
        raise KernelError(f"kernel {name!r} is unknown{hint(name, KERNELS)}; the kernels are {', '.join(KERNELS)}")
    reason = reason_against(KERNELS[name], call, backward)
    if reason is not None:
        able = next(other for other, kernel in KERNELS.items() if reason_against(kernel, call, backward) is None)
        raise KernelError(f"kernel {name!r} can't compute this attention: {reason}; kernel {able!r} can, or leave the kernel out")
    return KERNELS[name]


def _first_choice(kernel: Kernel, call: Call) -> bool:
    """May it be taken where no kernel is named? Triton's interpreter is for tests."""
    if kernel is triton and triton.interpreting():
        return False
    return call.problem.q_len * call.problem.group >= kernel.LEAST_ROWS


def passed_over(call: Call, backward: bool) -> str | None:
    """Which faster kernel is not taken because its numbers are wrong, as far as that is known, and what was found; or None."""
    for name, kernel in KERNELS.items():
        if _first_choice(kernel, call) and refusal(kernel, call, backward) is None:
            doubt = trust.doubt(kernel, call, backward)
            return None if doubt is None else f"kernel {name} is not used: {doubt}"
    raise AssertionError("the reference takes every call")


def reason_against(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel can't compute the call, or not rightly, or None."""
    return refusal(kernel, call, backward) or trust.doubt(kernel, call, backward)


def refusal(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel can't compute the call, or None."""
    if not kernel.TAKES_ROW_MASKS and (call.row_limits is not None or call.pairs is not None or call.flat):
        return "a mask by row"
    if call.narrow and kernel is not reference:
        return "a softmax in float32 over scores in float64"
    if call.pages is not None and kernel not in (triton, reference):
        return "keys and values in pages"
    return kernel.supports(call, backward)
