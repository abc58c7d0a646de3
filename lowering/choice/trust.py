"""Whether a compiled kernel may be trusted: its numbers are checked once for each class of calls, on small inputs.

What a compiler makes of a kernel depends on the device, the compiler's version and what the call switches on. So before a kernel
computes the first call of a class, it computes a small call of that class, and the ``reference`` kernel the same in float64 on
the CPU. No error may be larger than twice that of eager attention in the same dtype, and a rounding of the result.

The verdict is kept in memory and in torch's cache folder (``folder``). ``DILCOMPILE_TRUST`` says otherwise: ``memory`` reads and
writes no files, ``off`` trusts every kernel unchecked.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from collections.abc import Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from dilcompile.errors import DilcompileWarning
from dilcompile.lowering import aten_flash, digest, reference
from dilcompile.lowering.call import Call, Kernel, empty_output
from dilcompile.lowering.choice import probing, verdicts
from dilcompile.lowering.choice.miniature import kinds, miniature
from dilcompile.lowering.choice.verdicts import Verdict
from dilcompile.lowering.selection import Selection

log = logging.getLogger(__name__)

OPTION = "DILCOMPILE_TRUST"

# By class of calls: why the kernel is not trusted; None: it is.
_reasons: dict[tuple[object, ...], str | None] = {}
_told: set[str] = set()
_lock = threading.RLock()
_UNKNOWN = object()


def doubt(kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Why this kernel's numbers are not trusted for calls of this kind, or None.

    Operands that hold no data are judged by what is known; nothing is computed for them.

    Raises:
        DilcompileError: if ``DILCOMPILE_TRUST`` has an unknown value.
    """
    key = _key(kernel, call, backward)
    reason = _reasons.get(key, _UNKNOWN)
    return _settle(key, kernel, call, backward) if reason is _UNKNOWN else reason  # type: ignore[return-value]


def trusted(kernel: Kernel, call: Call, backward: bool) -> bool:
    """Is there no doubt?

    Warns:
        DilcompileWarning: once a class of calls, if there is and the call is a real one.
    """
    reason = doubt(kernel, call, backward)
    if reason is None:
        return True
    if reason not in _told and not probing.without_data(call.q):
        _told.add(reason)
        warnings.warn(f"kernel {name_of(kernel)!r} is not used: {reason}; the next one computes", DilcompileWarning, stacklevel=2)
    return False


def forget() -> None:
    """Drop the verdicts in memory, so that the next calls read or check anew."""
    with _lock:
        _reasons.clear()
        _told.clear()


def num_known() -> int:
    """How many verdicts there are in memory; grows with each new one."""
    return len(_reasons)


def _key(kernel: Kernel, call: Call, backward: bool) -> tuple[object, ...]:
    return kernel, backward, *class_of(call)


def class_of(call: Call) -> tuple[object, ...]:
    """The class of a call, made on every call: what kernels compile different code for, or take different ways through it."""
    q, size, documents, limits, bias = call.q, call.problem, call.documents, call.row_limits, call.bias
    return (
        q.device,
        q.dtype,
        size.head_dim,
        size.v_dim,
        kinds(call.relation),
        call.softcap is None,
        call.key_padding is None,
        None if documents is None else documents.shape[0] > 1,
        None if limits is None else limits.shape[1] > 1,
        None if bias is None else (call.bias_grad, bias.dtype, *(length > 1 for length in bias.shape)),
        call.pairs is None,
        None if call.pages is None else call.k.shape[2],
        call.dropout_p > 0,
        call.flat,
        call.exact_lse,
        None if call.held is None else (call.held.queries.step > 1, call.held.keys.step > 1),
        None if call.selection is None else tuple(length > 1 for length in call.selection.columns.shape[:2]),
        call.merge_grad,
        _chosen_by_user(q),
    )


def _chosen_by_user(q: Tensor) -> str | None:
    """How CUDA devices multiply in float32; the flash op that the user activated for half precision."""
    if q.device.type != "cuda":
        return None
    return torch.backends.cuda.matmul.fp32_precision if q.dtype is torch.float32 else aten_flash.activated()


def name_of(kernel: Kernel) -> str:
    """Its name among the kernels."""
    return kernel.__name__.rpartition(".")[2]


def _settle(key: tuple[object, ...], kernel: Kernel, call: Call, backward: bool) -> str | None:
    """Find the verdict of a class that is not known yet, and keep it."""
    mode, made_from = probing.mode_of(OPTION, "disk"), kernel.fingerprint(call)
    if mode == "off" or made_from is None:
        return None
    with _lock:
        if key in _reasons:
            return _reasons[key]
        about = _about(kernel, call, backward, made_from)
        verdict = verdicts.read(about) if mode == "disk" else None
        if verdict is None:
            if probing.without_data(call.q):
                return None
            if probing.captured(call.q.device):
                return (
                    f"its numbers were never checked for calls like this ({about['class']}), and a CUDA graph is being captured; "
                    "call it once before capturing"
                )
            try:
                verdict = check(kernel, call, backward)
            except (torch.OutOfMemoryError, MemoryError):
                return "there was no memory left to check its numbers"
            log.info("checked kernel %s: %s: %s", name_of(kernel), about["class"], verdict)
            if mode == "disk" and verdict.failure is None:
                verdicts.write(about, verdict)
        _reasons[key] = None if verdict.passes else _said(verdict, about)
        return _reasons[key]


def _about(kernel: Kernel, call: Call, backward: bool, made_from: str) -> dict[str, str]:
    """All that the verdict depends on, as text."""
    key = _key(kernel, call, backward)
    return {
        "kernel": name_of(kernel),
        "made from": f"{made_from}, torch {torch.__version__}",
        "device": probing.device_name(call.q.device),
        "dtype": str(call.q.dtype).removeprefix("torch."),
        "class": f"{'backward' if backward else 'forward'} of {kinds(call.relation)}",
        "switches": repr([str(part) for part in key[3:]]),
        "checked by": digest.of_files("choice/trust.py", "choice/miniature.py", "reference.py"),
    }


def _said(verdict: Verdict, about: dict[str, str]) -> str:
    where = f"on {about['device']} in {about['dtype']} ({about['class']})"
    if verdict.failure is not None:
        return f"its check {where} failed: {verdict.failure}"
    return (
        f"its numbers are wrong {where}: the error of {verdict.of} is {verdict.error:.2e}, more than {verdict.bound:.2e}, "
        "twice that of eager attention and a rounding"
    )


def check(kernel: Kernel, call: Call, backward: bool) -> Verdict:
    """Compare a kernel with the reference on a small call of the same class; only the kernel runs on the call's device."""
    with probing.undisturbed(call.q.device):
        small = miniature(call)
        try:
            return _compare_gradients(kernel, small) if backward else _compare(kernel, small)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            return Verdict(failure=probing.first_line(error))


class _Eager(Call):
    """A call as eager attention computes it: each step in the dtype of the operands."""

    @property
    def score_dtype(self) -> torch.dtype:
        """The operands' own."""
        return self.q.dtype


def _eager(call: Call) -> Call:
    held = {field.name: getattr(call, field.name) for field in fields(call)}
    return _Eager(**{**held, "bias": None if call.bias is None else call.bias.to(call.q.dtype)})


def _exact(call: Call) -> Call:
    """The call in float64 on the CPU."""

    def moved(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.cpu().double() if x.is_floating_point() else x.cpu()

    operands = {field.name: getattr(call, field.name) for field in fields(call)}
    tensors = {name: moved(held) for name, held in operands.items() if isinstance(held, Tensor)}
    pairs = None if call.pairs is None else replace(call.pairs, rows=call.pairs.rows.cpu(), keys=call.pairs.keys.cpu())
    selection = None if call.selection is None else Selection(*(x.cpu() for x in call.selection))
    return replace(call, **tensors, pairs=pairs, selection=selection)  # type: ignore[arg-type]


def _compare(kernel: Kernel, small: Call) -> Verdict:
    return _worst(
        ("out", "lse"), kernel.forward(small), reference.forward(_eager(small)), reference.forward(_exact(small)), small
    )


def _compare_gradients(kernel: Kernel, small: Call) -> Verdict:
    names = ("the gradient of q", "the gradient of k", "the gradient of v", "the gradient of the bias")
    exact_call = _exact(small)
    exact_out, exact_lse = reference.forward(exact_call)
    out = empty_output(small.q, small.problem.v_dim).copy_(exact_out)
    lse = exact_lse.to(small.q.device, small.score_dtype)
    generator = torch.Generator().manual_seed(1)
    grad_out, grad_lse = (
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, x.dtype) for x in (out, lse)
    )
    found_verdicts = []
    # Without a gradient of the LSE, as models train, and with one.
    for into_lse in (None, grad_lse):
        exact_into_lse = None if into_lse is None else into_lse.cpu().double()
        found = kernel.backward(small, out, lse, grad_out, into_lse)
        eager = reference.backward(_eager(small), out, lse, grad_out, into_lse)
        exact = reference.backward(exact_call, exact_out, exact_lse, grad_out.cpu().double(), exact_into_lse)
        found_verdicts.append(_worst(names, found, eager, exact, small))
    return max(found_verdicts, key=lambda verdict: verdict.ratio)


def _worst(
    names: Sequence[str],
    found: Sequence[Tensor | None],
    eager: Sequence[Tensor | None],
    exact: Sequence[Tensor | None],
    small: Call,
) -> Verdict:
    """The verdict about the result that is the farthest from exact, for its bound."""
    held = [
        (name, mine, theirs.cpu().double(), true)
        for name, mine, theirs, true in zip(names, found, eager, exact, strict=False)
        if mine is not None and theirs is not None and true is not None
    ]
    # Gradients may cancel to nothing, where a row sees one key alone: what rounds is of the size of the largest.
    size = max(_largest(true) for *_, true in held)
    rounding = torch.finfo(small.q.dtype).eps * size
    made = [
        # A gradient has its operand's dtype, which a bias has for itself.
        _judged(name, mine.cpu().double(), theirs, true, rounding * _num_rounded(small, true) + _half_digit(mine.dtype, true))
        for name, mine, theirs, true in held
    ]
    return max(made, key=lambda verdict: verdict.ratio)


def _largest(x: Tensor) -> float:
    return float(torch.where(x.isfinite(), x, 0).abs().max()) if x.numel() else 0.0


def _half_digit(dtype: torch.dtype, result: Tensor) -> float:
    """What rounding to a dtype changes at most."""
    return torch.finfo(dtype).eps / 2 * _largest(result)


def _num_rounded(small: Call, result: Tensor) -> float:
    """How many roundings of a result's size are allowed beside eager's error."""
    size = small.problem
    # A bias that pairs share gets the sum of theirs.
    summed = max(size.k_len + size.head_dim, size.batch * size.heads * size.q_len * size.k_len // max(1, result.numel()))
    if small.q.dtype == torch.float64:
        # The reference rounds each sum too, which eager attention, the same sums, does not show.
        return summed
    # The largest of many errors is one draw from their tail: sums of float32 in another order wander off by their root.
    return math.sqrt(summed) if small.q.dtype == torch.float32 else 1.0


def _judged(name: str, found: Tensor, eager: Tensor, exact: Tensor, rounding: float) -> Verdict:
    finite = exact.isfinite()
    bound = 2 * _largest(eager - exact) + rounding
    # Rows without keys have an LSE of -inf.
    alike = torch.equal(found[~finite], exact[~finite]) and bool(found[finite].isfinite().all())
    return Verdict(name, _largest(found - exact) if alike else math.inf, bound)
