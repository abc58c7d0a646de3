"""Which kernel computes a call: of those that support it and whose numbers are trusted, or the one asked for by name."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from dilcompile.errors import KernelError
from dilcompile.lowering import cpu, cudnn, efficient, flash, flash_attn, flash_band, flex, native, reference, sdpa, triton
from dilcompile.lowering.call import Call, Kernel
from dilcompile.lowering.choice import contest, trust
from dilcompile.lowering.triton.bound import interpreting
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
    # Blocks, windows, every key, by FlexAttention.
    "flex": flex,
    # What is left in half precision on CUDA devices: an op a piece, and products where a piece is masked.
    "flash": flash,
    "cpu": cpu,
    "reference": reference,
}


# Where these are able, the clock decides (contest.py). Elsewhere the order above, which was measured on CPUs.
RIVALS: dict[str, tuple[str, ...]] = {"cuda": ("flash_band", "triton", "flash_attn", "cudnn", "efficient", "flex", "flash")}


def select(call: Call, name: str | None = None, backward: bool = False) -> Kernel:
    """The kernel for this call.

    Args:
        call: operands and relation.
        name: take this kernel; None: the first of ``KERNELS`` that supports the call and is trusted, or the fastest of such
            where they are timed.
        backward: choose for the backward pass.

    Raises:
        KernelError: if the kernel asked for is unknown, can't compute the call, or computes wrong numbers on this device.

    Warns:
        DilcompileWarning: once where a kernel is passed over because its numbers are not trusted.
    """
    if name is None:
        return _fastest(call, backward)
    if name not in KERNELS:
        raise KernelError(f"kernel {name!r} is unknown{hint(name, KERNELS)}; the kernels are {', '.join(KERNELS)}")
    reason = reason_against(KERNELS[name], call, backward)
    if reason is not None:
        able = next(other for other, kernel in KERNELS.items() if reason_against(kernel, call, backward) is None)
        raise KernelError(f"kernel {name!r} can't compute this attention: {reason}; kernel {able!r} can, or leave the kernel out")
    return _tuned(KERNELS[name], call, backward)


def foreseen(call: Call, name: str | None, backward: bool) -> list[Kernel]:
    """Those of which one will compute, as far as operands say that hold no data: no clock is asked, and no number is checked."""
    if name is not None:
        return [KERNELS[name]] if name in KERNELS and refusal(KERNELS[name], call, backward) is None else []
    able = [kernel for kernel in _in_order(call) if _first_choice(kernel, call) and refusal(kernel, call, backward) is None]
    rivals = [KERNELS[name] for name in RIVALS.get(call.q.device.type, ())]
    return [kernel for kernel in able if kernel in rivals] or able[:1]


def _fastest(call: Call, backward: bool) -> Kernel:
    """The first able and trusted kernel, or where kernels are timed the fastest of those."""
    rivals = [KERNELS[name] for name in RIVALS.get(call.q.device.type, ())]
    timed = contest.known(call, backward) if rivals else None
    if timed is not None:
        found = next(_fitting((KERNELS[name] for name in timed), call, backward), None)
        if found is not None:
            return found
    first = next(_fitting(_in_order(call), call, backward))
    if first not in rivals or not contest.decides(call):
        return first
    return contest.fastest([first, *_fitting((rival for rival in rivals if rival is not first), call, backward)], call, backward)


def _in_order(call: Call) -> Iterator[Kernel]:
    """The kernels as they are taken without a clock: without those that wait for the device to count documents."""
    waits = (flash_band, flash_attn) if call.documents is not None else ()
    return (kernel for kernel in KERNELS.values() if kernel not in waits)


def _fitting(kernels: Iterable[Kernel], call: Call, backward: bool) -> Iterator[Kernel]:
    for kernel in kernels:
        able = _first_choice(kernel, call) and refusal(kernel, call, backward) is None
        if able and trust.trusted(kernel, call, backward):
            yield _tuned(kernel, call, backward)


def _tuned(kernel: Kernel, call: Call, backward: bool) -> Kernel:
    """The kernel, its tiles found by the clock where the user asks for that."""
    if kernel is triton:
        triton.tune(call, backward)
    return kernel


def measured(call: Call, backward: bool) -> str | None:
    """What the kernels that were timed for calls of this class take, or None."""
    times = contest.known(call, backward) if call.q.device.type in RIVALS else None
    if times is None:
        return None
    taken = ", ".join(f"{name} {seconds * 1e3:.3g} ms" for name, seconds in times.items())
    return f"timed here ({'backward' if backward else 'forward'}): {taken}"


def _first_choice(kernel: Kernel, call: Call) -> bool:
    """May it be taken where no kernel is named? Triton's interpreter is for tests; on a CPU FlexAttention is only the slower."""
    if (kernel is triton and interpreting()) or (kernel is flex and call.q.device.type == "cpu"):
        return False
    return call.problem.q_len * call.problem.group >= kernel.LEAST_ROWS


def passed_over(call: Call, backward: bool) -> str | None:
    """Which faster kernel is not taken because its numbers are wrong, as far as that is known, and what was found; or None."""
    for kernel in _in_order(call):
        if _first_choice(kernel, call) and refusal(kernel, call, backward) is None:
            doubt = trust.doubt(kernel, call, backward)
            return None if doubt is None else f"kernel {trust.name_of(kernel)} is not used: {doubt}"
    raise AssertionError("the reference takes every call")


def reason_against(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel can't compute the call, or not rightly, or None."""
    return refusal(kernel, call, backward) or trust.doubt(kernel, call, backward)


def refusal(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel can't compute the call, or None."""
    if not kernel.TAKES_ROW_MASKS and (call.row_limits is not None or call.pairs is not None or call.flat):
        return "a mask by row"
    if call.selection is not None and kernel not in (native, flex, reference):
        return "blocks that the data chooses"
    if call.held is not None and kernel not in (native, flash_band, triton, reference):
        return "a part of a sequence"
    if call.narrow and kernel is not reference:
        return "a softmax in float32 over scores in float64"
    if call.pages is not None and kernel not in (triton, reference):
        return "keys and values in pages"
    return kernel.supports(call, backward)
