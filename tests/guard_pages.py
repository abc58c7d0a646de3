"""A kernel on tensors that begin or end where memory does: run by ``test_guard_pages`` in a process of its own.

Every operand, the saved output and LSE, their gradients and what the kernel writes lie directly before or behind a page that may
not be touched, so that any access outside ends the process. Arguments: a kernel, and a mistake to be made, if any.
"""

from __future__ import annotations

import ctypes
import itertools
import math
import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dilcompile.lowering import call as calls
from dilcompile.lowering import native, ops
from dilcompile.lowering.call import Call, Held, form_of, problem_of, relation_of
from dilcompile.lowering.select import KERNELS
from dilcompile.lowering.triton.bound import Bound
from dilcompile.progression import Progression

PAGE = mmap.PAGESIZE
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_LIBC.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_mapped: list[tuple[int, int]] = []


def guarded(shape: tuple[int, ...], dtype: torch.dtype, at_end: bool) -> Tensor:
    """An uninitialised contiguous tensor that ends (or begins) where its memory does."""
    needed = math.prod(shape) * dtype.itemsize
    pages = -(-needed // PAGE)
    size = (pages + 2) * PAGE
    base = _LIBC.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    _mapped.append((base, size))
    for page in (0, pages + 1):
        assert _LIBC.mprotect(ctypes.c_void_p(base + page * PAGE), ctypes.c_size_t(PAGE), 0) == 0
    start = base + PAGE + (pages * PAGE - needed if at_end else 0)
    return torch.frombuffer((ctypes.c_char * needed).from_address(start), dtype=dtype).view(shape)


def placed(x: Tensor, at_end: bool) -> Tensor:
    return guarded(tuple(x.shape), x.dtype, at_end).copy_(x)


def heads_last(x: Tensor, at_end: bool) -> Tensor:
    """[B, H, S, D] that lies as [B, S, H, D]."""
    return placed(x.transpose(1, 2).contiguous(), at_end).transpose(1, 2)


FORMS = [
    "dense()",
    "dilated(segments=(16, 32), rates=(1, 4))",
    "dilated(segments=(8, 64), rates=(1, 2), offset='own', union='set', sinks=2, local=3)",
    "sliding_window(window=9, sinks=2)",
    "block_sparse(block=16, pattern={'local': {'before': 1}})",
]
# Query rows, keys, heads, key heads, head sizes.
LARGE = [
    (131, 131, 2, 1, 64, 64), (1, 1, 1, 1, 1, 1), (2, 129, 4, 2, 33, 7), (17, 63, 3, 3, 96, 80), (65, 16, 2, 2, 32, 32),
    (127, 130, 2, 1, 128, 128), (33, 35, 2, 1, 192, 128), (50, 31, 1, 1, 256, 256), (15, 200, 2, 2, 80, 20), (64, 64, 1, 1, 16, 48),
]  # fmt: skip
SMALL = [(17, 17, 2, 1, 16, 16), (1, 1, 1, 1, 1, 1), (2, 19, 4, 2, 33, 7), (9, 21, 1, 1, 20, 48)]
OPTIONS = ["plain", "padding", "documents", "limits", "bias by pair", "bias by key", "bias by row", "dropout", "softcap"]
# Kernels that compute parts of a sequence.
OF_PARTS = ("native",)


def operands(option: str, rows: int, keys: int, heads: int, dtype: torch.dtype, at_end: bool) -> dict[str, Any]:
    made: dict[str, Any] = {}
    if option == "padding":
        made["key_padding"] = placed(torch.rand(2, keys) > 0.3, at_end)
    if option == "documents":
        made["documents"] = placed((torch.rand(2, keys) > 0.9).cumsum(1), at_end)
    if option == "limits":
        first = torch.randint(-3, keys, (2, rows))
        made["row_limits"] = placed(torch.stack([first, first + torch.randint(0, keys + 5, (2, rows))]), at_end)
    if option.startswith("bias"):
        shape = {"bias by pair": (2, heads, rows, keys), "bias by key": (1, heads, 1, keys), "bias by row": (2, 1, rows, 1)}[
            option
        ]
        made["bias"] = placed(torch.randn(shape).to(dtype if keys % 2 else torch.float32), at_end)
    if option == "dropout":
        made |= {"dropout_p": 0.3, "dropout_seed": placed(torch.tensor([7]), at_end)}
    return made | ({"softcap": 2.0} if option == "softcap" else {})


def cases(kernel: str) -> Iterator[tuple[Any, ...]]:
    """Every size, every form and every option, though not each with each other."""
    small = kernel == "triton"
    dtypes = (torch.float32,) if small else (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    forms = [form for form in FORMS if not (small and "block" in form)]
    turns = itertools.cycle([*OPTIONS, "part"] if kernel in OF_PARTS else OPTIONS)
    for size, form in itertools.product(SMALL if small else LARGE, forms):
        for dtype in dtypes:
            for _ in range(1 if small else 2):
                yield size, form, dtype, next(turns)


def attend(kernel: str, size: tuple[int, ...], form: str, dtype: torch.dtype, option: str, at_end: bool) -> None:
    rows, keys, heads, kv_heads, dim, v_dim = size
    q, k, v, grad_out = (
        heads_last(torch.randn(2, h, s, d).to(dtype), at_end)
        for h, s, d in ((heads, rows, dim), (kv_heads, keys, dim), (kv_heads, keys, v_dim), (heads, rows, v_dim))
    )
    if option == "part":
        return attend_part(kernel, q, k, v, grad_out, form, at_end)
    held = operands(option, rows, keys, heads, dtype, at_end)
    if option == "documents" and rows > keys:
        return
    arguments = (
        held.get("key_padding"), held.get("documents"), held.get("bias"), held.get("dropout_seed"), form, True, None, None,
        keys - rows, 0.2, held.get("softcap"), held.get("dropout_p", 0.0), kernel, None, held.get("row_limits"),
    )  # fmt: skip
    out, lse = ops.attention(q, k, v, *arguments)
    out, lse = heads_last(out, at_end), placed(lse, at_end)
    grad_lse = placed(torch.randn(lse.shape).to(lse.dtype), at_end)
    ops.attention_backward(grad_out, grad_lse, out, lse, q, k, v, *arguments)


def attend_part(kernel: str, q: Tensor, k: Tensor, v: Tensor, grad_out: Tensor, form: str, at_end: bool) -> None:
    """Rows with a step, and keys with another one, of a sequence that goes on after both."""
    held = Held(Progression(2, 2 + 3 * q.shape[2], 3), Progression(1, 1 + 2 * k.shape[2], 2))
    length = max(held.queries.stop, held.keys.stop) + 7
    whole = problem_of(q, k, v, True, None, None, 0, length)
    relation = relation_of(form_of(form), replace(whole, q_len=length)).at(q.shape[2], length, 0)
    padding = placed(torch.rand(2, length) > 0.3, at_end)
    call = Call(q, k, v, padding, None, None, None, relation, 0.2, held=held)
    out, lse = KERNELS[kernel].forward(call)
    KERNELS[kernel].backward(call, heads_last(out, at_end), placed(lse, at_end), grad_out, None)


def guard_what_is_written(at_end: bool) -> None:
    def empty_output(q: Tensor, v_dim: int, dtype: torch.dtype | None = None) -> Tensor:
        batch, heads, rows, _ = q.shape
        return guarded((batch, rows, heads, v_dim), dtype or q.dtype, at_end).transpose(1, 2)

    # Where kernels get it from, see ``output_of``.
    calls.empty_output = empty_output


def with_more_keys_than_there_are() -> None:
    right = native._bind

    def bind(*args: Any) -> Any:
        bound = right(*args)
        bound.struct.k_len += PAGE
        bound.struct.k_stop += PAGE
        return bound

    native._bind = bind  # type: ignore[assignment]


def with_keys_behind_the_last() -> None:
    right = Bound.sizes

    def sizes(self: Any, *rows: Any) -> Any:
        q_len, k_len, *more = right(self, *rows)
        return (q_len, k_len + PAGE, *more)

    Bound.sizes = sizes  # type: ignore[method-assign]


MISTAKES = {"native": with_more_keys_than_there_are, "triton": with_keys_behind_the_last}


def main(kernel: str, wrong: bool) -> None:
    torch.manual_seed(0)
    assert kernel in KERNELS
    if kernel == "triton":
        import interpreter

        interpreter.leave_out_what_changes_nothing()
        interpreter.round_products_once()
    count = 0
    for number, case in enumerate(cases(kernel)):
        if wrong and number == 0:
            attend(kernel, (20, 20, 1, 1, 16, 16), "dense()", torch.float32, "plain", True)
            MISTAKES[kernel]()
        for at_end in (False, True):
            guard_what_is_written(at_end)
            attend(kernel, *case, at_end)
            count += 1
        while _mapped:
            _LIBC.munmap(*_mapped.pop())
    print(f"stayed inside {count} times")


if __name__ == "__main__":
    main(sys.argv[1], len(sys.argv) > 2)
