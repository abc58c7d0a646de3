"""Outputs in huge pages where the system has them to give: rows of one residue lie a page apart each, and pages are dear to find.

At 65,536 tokens and 8 heads in bfloat16 a causal forward takes a tenth less so. Keys and values are the caller's memory; torch
allocates those so with ``THP_MEM_ALLOC_ENABLE=1``.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from mmap import PAGESIZE

from torch import Tensor

_LEAST = 4 << 20

_MADV_HUGEPAGE = 14  # Linux, include/uapi/asm-generic/mman-common.h


@cache
def _libc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if sys.platform == "linux" else None


def advise(x: Tensor) -> Tensor:
    """``x``, whose memory was not touched yet, after a hint to the system; small tensors as they are."""
    libc, storage = _libc(), x.untyped_storage()
    if libc is not None and storage.nbytes() >= _LEAST:
        first = -(-storage.data_ptr() // PAGESIZE) * PAGESIZE
        stop = (storage.data_ptr() + storage.nbytes()) // PAGESIZE * PAGESIZE
        # A hint: where it can't be followed nothing happens.
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), _MADV_HUGEPAGE)
    return x
