"""Memory for arenas: given out to one call at a time, kept for the next where the policy says so."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dilcompile.memory.buffer import aligned

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


def arena_size(size: int, again: bool) -> int:
    """The bytes that are asked for, for an arena of this size.

    Args:
        again: a later call may have the arena, or need one of another size: the size class. Otherwise no more than is needed.
    """
    return size_class(size) if again else aligned(size)


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


# Of an arena: its device and the stream whose work uses it; what they ask for.
_Place = tuple[tuple[torch.device, int], ...]
_Sizes = tuple[int, ...]


@dataclass
class ArenaPool:
    """Arenas that are kept between calls, by device and stream.

    Two calls in flight (nested, of two threads, on two streams) never have the same arena: it is taken out while a call has it.
    An arena goes back to the stream whose work used it and is given to that stream alone, so that a later call comes behind that
    work. A call gets the smallest arenas that hold what it asks for; where larger ones are made, smaller ones that wait are given
    up: what is kept is what the largest call needs.

    While a CUDA graph is captured, arenas are the capture's own: the graph writes to them whenever it is replayed, so they are
    neither taken from the kept ones nor kept.

    Dynamo holds what it compiled for a module that is gone, so arenas are given up when the parameters are that calls came with.

    Args:
        keeps: keep arenas for the next call; otherwise torch's allocator has them back after each.
        apart: on CUDA they come from a ``torch.cuda.MemPool`` of this pool, whose segments nothing else uses, and which the
            device has back when the pool is dropped.
    """

    keeps: bool = True
    apart: bool = False
    counts: Counts = field(default_factory=Counts)
    _free: dict[_Place, list[tuple[_Sizes, Lease]]] = field(default_factory=dict)
    _mem_pools: dict[torch.device, torch.cuda.MemPool] = field(default_factory=dict)
    _owners: int = 0
    _orphaned: bool = False
    # What gives up arenas may run wherever Python collects garbage: in the middle of what follows, too.
    _lock: threading.RLock = field(default_factory=threading.RLock)

    @contextmanager
    def lease(self, sizes: Sequence[tuple[torch.device, int]], varies: bool = False) -> Iterator[Lease]:
        """Arenas of at least these sizes in bytes, for one call.

        Args:
            varies: the next call may ask for other sizes.
        """
        place = tuple((device, _stream(device)) for device, _ in sizes)
        classes = tuple(arena_size(size, self.keeps or varies) for _, size in sizes)
        captured = any(_captures(device) for device, _ in place)
        taken = (classes, Lease(self._made(place, classes))) if captured else self._take(place, classes)
        # A call that fails may leave something under way, which writes to its arenas still: they are not kept.
        yield taken[1]
        if captured:
            return
        with self._lock:
            if self.keeps and not self._orphaned:
                self._free.setdefault(place, []).append(taken)

    def keep_while(self, owner: Tensor) -> None:
        """Keep arenas as long as this tensor, or another one that was given here, lives."""
        with self._lock:
            self._owners, self._orphaned = self._owners + 1, False
        # The owner must not hold the pool.
        weakref.finalize(owner, _lose, weakref.ref(self)).atexit = False

    def _lost(self) -> None:
        with self._lock:
            self._owners -= 1
            if not self._owners:
                self._orphaned = True
                self.clear()

    def _take(self, place: _Place, classes: _Sizes) -> tuple[_Sizes, Lease]:
        with self._lock:
            self.counts.asked += 1
            waiting = self._free.get(place, [])
            fitting = [one for one in waiting if _within(classes, one[0])]
            if fitting:
                self.counts.hits += 1
                found = min(fitting, key=lambda one: sum(one[0]))
                waiting[:] = [one for one in waiting if one is not found]
                found[1].kept = True
                return found
            # Given back outside of the lock, at the end.
            smaller = [one for one in waiting if _within(one[0], classes)]
            waiting[:] = [one for one in waiting if not _within(one[0], classes)]
        smaller.clear()
        return classes, Lease(self._made(place, classes))

    def _made(self, place: _Place, classes: _Sizes) -> tuple[Tensor, ...]:
        made = []
        for (device, _), size in zip(place, classes, strict=True):
            with self._allocating(device):
                made.append(torch.empty(size, dtype=torch.uint8, device=device))
        return tuple(made)

    @contextmanager
    def _allocating(self, device: torch.device) -> Iterator[None]:
        """Where this pool's memory on a device comes from."""
        if not self.apart or device.type != "cuda" or _captures(device):
            yield
            return
        with self._lock:
            if device not in self._mem_pools:
                with torch.cuda.device(device):
                    self._mem_pools[device] = torch.cuda.MemPool()
            pool = self._mem_pools[device]
        with torch.cuda.use_mem_pool(pool, device):
            yield

    def held_bytes(self) -> int:
        """Bytes of the arenas that wait for a call."""
        with self._lock:
            return sum(arena.numel() for waiting in self._free.values() for _, lease in waiting for arena in lease.arenas)

    def clear(self) -> None:
        """Give back the arenas that wait."""
        with self._lock:
            self._free.clear()


def _lose(pool: weakref.ref[ArenaPool]) -> None:
    found = pool()
    if found is not None:
        found._lost()


def _within(classes: _Sizes, others: _Sizes) -> bool:
    """Is none of these larger than the other at its place?"""
    return all(one <= other for one, other in zip(classes, others, strict=True))


def _stream(device: torch.device) -> int:
    """A number of the stream on which work for this device is put now."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _captures(device: torch.device) -> bool:
    """Is work for this device now recorded into a CUDA graph?"""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()
