"""Is a graph the last that can see memory which it was given, so that it may write other things there?"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
from torch import Tensor


def _references(held: Sequence[object]) -> int:
    """The most that Python has to one of these."""
    return max(map(sys.getrefcount, held))


# To what a sequence alone holds.
_ONE = _references([object()])


def is_last_owner(tensors: Sequence[Tensor], size: int, strides: Sequence[tuple[int, ...]]) -> bool:
    """Is this memory seen by nobody but these tensors, and are they what was planned for?

    Not if the graph is retained for another backward, or if somebody (a hook of saved tensors, a checkpoint) holds one of them.

    Args:
        tensors: all inputs in the memory, each held by the list of arguments and by this sequence.
        size: in bytes; strides: of each tensor.
    """
    if torch._C._current_graph_task_id() != -1 and torch._C._autograd._get_current_graph_task_keep_graph():
        return False
    storage = tensors[0].untyped_storage()
    if storage.nbytes() < size or any(tensor.untyped_storage()._cdata != storage._cdata for tensor in tensors):
        return False
    # The memory is known to the tensors and to ``storage``; each of them to both sequences.
    if torch._C._storage_Use_Count(storage._cdata) > len(tensors) + 1 or _references(tensors) > _ONE + 1:
        return False
    return all(tensor.stride() == stride for tensor, stride in zip(tensors, strides, strict=True))


def bytes_in(tensor: Tensor) -> Tensor:
    """All of a tensor's memory, uint8."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage, 0, (storage.nbytes(),), (1,))
