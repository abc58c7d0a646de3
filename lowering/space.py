"""Memory that an operator takes besides its results, handed out from front to back of a workspace that was there before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor

# A cache line; what kernels load from the widest.
_ALIGNMENT = 64


class Space:
    """What is taken lies behind what was taken before; what the workspace has no place for comes from torch's allocator.

    Args:
        memory: uint8, flat; None: there is no workspace.
    """

    def __init__(self, memory: Tensor | None) -> None:
        self._memory = memory
        self._taken = 0

    def take(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Uninitialised and contiguous."""
        size = prod(shape) * dtype.itemsize
        memory = self._memory
        if memory is None or size == 0 or self._taken + size > memory.numel() or memory.device != device:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        # From the start of the storage, so that any dtype can be seen in it.
        offset = int(memory.storage_offset())
        first = _aligned(offset + self._taken) - offset
        if first + size > memory.numel():
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        self._taken = first + size
        return memory[first : first + size].view(dtype).view(tuple(shape))

    def like(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """``take`` of the shape of ``x``."""
        return self.take(x.shape, dtype or x.dtype, x.device)

    def heads_inside(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """[B, H, S, D] that lies in memory as [B, S, H, D]."""
        batch, heads, rows, dim = shape
        return self.take((batch, rows, heads, dim), dtype, device).transpose(1, 2)

    def contiguous(self, x: Tensor) -> Tensor:
        """``x`` itself where it lies so, or a copy."""
        return x if x.is_contiguous() else self.like(x).copy_(x)

    def dense_rows(self, x: Tensor) -> Tensor:
        """``x`` with neighbouring elements in its last dim, as kernels load them: itself, or a copy."""
        return x if x.stride(-1) == 1 else self.like(x).copy_(x)

    @property
    def left(self) -> int | None:
        """Bytes that nobody has taken; None: there is no workspace."""
        return None if self._memory is None else self._memory.numel() - self._taken

    def rest(self) -> Tensor | None:
        """What nobody has taken, for another to hand out."""
        return None if self._memory is None else self._memory[self._taken :]

    @contextmanager
    def again(self) -> Iterator[None]:
        """What is taken inside is free again behind."""
        before = self._taken
        try:
            yield
        finally:
            self._taken = before


# Of those who are given no workspace.
NOWHERE = Space(None)


def bytes_of(*taken: tuple[Sequence[int], torch.dtype]) -> int:
    """Of a workspace that holds tensors of these shapes and dtypes at once, wherever it begins."""
    sizes = [prod(shape) * dtype.itemsize for shape, dtype in taken]
    return sum(_aligned(size) + _ALIGNMENT for size in sizes if size)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT
