"""Memory for arenas: given out to one call at a time, kept for the next where the policy says so."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

# Of a size class, in bytes.
_LEAST = 1 << 12


def size_class(size: int) -> int:
    """The least class that holds ``size`` bytes: four classes an octave, so that lengths that grow rarely need a new arena.

    At most a quarter more than asked for (above 4 KiB).
    """
    if size <= _LEAST:
        return _LEAST
    unit = 1 << ((size - 1).bit_length() - 3)
    return -(-size // unit) * unit


@dataclass
class Counts:
    """How often arenas were asked for, and how often ones that were kept could be given."""

    asked: int = 0
    hits: int = 0


@dataclass
class Lease:
    """The arenas of one call.

    Args:
        arenas: uint8, one for each that was asked for.
        views: tensors over them that were made before, by whatever says what they are; they go where the arenas go.
        kept: they are of an earlier call.
    """

    arenas: tuple[Tensor, ...]
    views: dict[object, list[Tensor]] = field(default_factory=dict)
    kept: bool = False


_Key = tuple[tuple[torch.device, int, int], ...]


@dataclass
class ArenaPool:
    """Arenas that are kept between calls, by device, stream and size class.

    Two calls in flight (nested, of two threads, on two streams) never have the same arena: it is taken out while a call has it.
    An arena goes back to the stream whose work used it, so that a later call on that stream comes behind that work.

    Args:
        keeps: keep arenas for the next call; otherwise torch's allocator has them back after each.
    """

    keeps: bool = True
    counts: Counts = field(default_factory=Counts)
    _free: dict[_Key, list[Lease]] = field(default_factory=lambda: defaultdict(list))
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def lease(self, sizes: Sequence[tuple[torch.device, int]]) -> Iterator[Lease]:
        """Arenas of at least these sizes in bytes, for one call."""
        key = tuple((device, _stream(device), size_class(size)) for device, size in sizes)
        taken = self._take(key)
        try:
            yield taken
        finally:
            if self.keeps:
                with self._lock:
                    self._free[key].append(taken)

    def _take(self, key: _Key) -> Lease:
        with self._lock:
            self.counts.asked += 1
            if self._free[key]:
                self.counts.hits += 1
                found = self._free[key].pop()
                found.kept = True
                return found
        return Lease(tuple(torch.empty(size, dtype=torch.uint8, device=device) for device, _, size in key))

    def held_bytes(self) -> int:
        """Bytes of the arenas that wait for a call."""
        with self._lock:
            return sum(arena.numel() for leases in self._free.values() for lease in leases for arena in lease.arenas)

    def clear(self) -> None:
        """Give back the arenas that wait."""
        with self._lock:
            self._free.clear()


def _stream(device: torch.device) -> int:
    """A number of the stream on which work for this device is put now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
