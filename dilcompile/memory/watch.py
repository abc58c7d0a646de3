"""How many bytes the operators of a graph have given out and not got back, at the most, while it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the memory of every tensor that an operator returns, from then until its last user drops it.

    What an operator takes and gives back inside is not seen. Slow: for one call.

    Args:
        known: tensors that were there before, and what else the operators may be given; they don't count.
    """

    supports_higher_order_operators = True

    def __init__(self, known: Iterable[object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._seen: dict[int, int] = {}
        for value in known:
            if isinstance(value, Tensor):
                self._see(value, counts=False)

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator and look at what it returns."""
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value, counts=True)
        self.most = max(self.most, self.now)
        return result

    def _see(self, tensor: Tensor, counts: bool) -> None:
        if tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen[storage._cdata] = size
        self.now += size
        weakref.finalize(storage, self._gone, storage._cdata).atexit = False

    def _gone(self, key: int) -> None:
        self.now -= self._seen.pop(key, 0)
