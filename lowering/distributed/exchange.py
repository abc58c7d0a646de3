"""Collectives that don't wait: started here, waited for by ``_c10d_functional::wait_tensor``, whose errors say for whom.

What is sent lies in a buffer of its own until the wait, so that the compiler may use the operands' memory again at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes, traffic
from dilcompile.lowering.distributed.meshes import Axis
from dilcompile.lowering.distributed.traffic import Direction

# Its name until torch 2.12.
all_gather_single: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Errand:
    """What a collective is for, as errors and counters name it.

    Args:
        site: the attention, by its module path.
        what: what moves, with the step.
    """

    site: str
    what: str
    direction: Direction


def all_to_all(axis: str, out: Tensor, message: Tensor, received: Sequence[int], sent: Sequence[int], errand: Errand) -> None:
    """Start to exchange flat messages with the ranks of an axis.

    Args:
        out: flat; its first ``sum(received)`` numbers are written, in the order of ranks, and may be read after the wait.
        message: flat, ``sum(sent)`` numbers in the order of ranks; nobody else may write it.
        received, sent: how many numbers come from and go to each rank.
    """
    at = meshes.axis_of(axis)
    width = message.element_size()
    traffic.count(
        errand.site,
        errand.direction,
        (sum(sent) - sent[at.rank]) * width,
        (sum(received) - received[at.rank]) * width,
    )
    peers = [rank for rank in range(at.size) if rank != at.rank and (received[rank] or sent[rank])]
    watch = _Watch(at, errand, tuple(peers))
    into = out[: sum(received)]
    with watch:
        work = dist.all_to_all_single(into, message, list(received), list(sent), group=at.group, async_op=True)
    _register(out, _Watched(work, watch, (message, into)))


def all_gather(axis: str, out: Tensor, message: Tensor, errand: Errand) -> None:
    """Start to gather equal messages of the ranks of an axis into ``out``, flat, in the order of ranks."""
    at = meshes.axis_of(axis)
    moved = (at.size - 1) * message.numel() * message.element_size()
    traffic.count(errand.site, errand.direction, moved, moved)
    watch = _Watch(at, errand, tuple(rank for rank in range(at.size) if rank != at.rank))
    with watch:
        work = all_gather_single(out, message, group=at.group, async_op=True)
    _register(out, _Watched(work, watch, (message,)))


def wait(x: Tensor) -> Tensor:
    """``x`` when what was started for it has come."""
    waited: Tensor = torch.ops._c10d_functional.wait_tensor(x)
    return waited


def _register(out: Tensor, work: dist.Work) -> None:
    torch._C._distributed_c10d._register_work(out, work)


@dataclass(frozen=True)
class _Watch:
    """Names the errors of a collective."""

    axis: Axis
    errand: Errand
    peers: tuple[int, ...]

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            raise PlacementError(self._message(error)) from error

    def _message(self, error: RuntimeError) -> str:
        group = self.axis.group
        assert group is not None, "an axis of one rank exchanges nothing"
        numbers = ", ".join(str(dist.get_global_rank(group, peer)) for peer in self.peers)
        return (
            f"{self.errand.site}: {self.errand.what} ({self.errand.direction}) over mesh axis {self.axis.name!r} failed on rank "
            f"{dist.get_rank()} while it waited for ranks {numbers}, one of which stopped or is late (timeout of the group: "
            f"{_timeout(group)}); see their logs for the cause, or raise the timeout of init_process_group. {error}"
        )


def _timeout(group: dist.ProcessGroup) -> str:
    device = torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")
    options = getattr(group._get_backend(device), "options", None)
    found = getattr(options, "_timeout", None)
    return "unknown" if found is None else f"{found.total_seconds():g} s"


class _Watched(dist.Work):
    """A collective under way, with the buffers that it reads and writes."""

    def __init__(self, work: dist.Work, watch: _Watch, held: tuple[Tensor, ...]) -> None:
        super().__init__()
        self._work, self._watch, self._held = work, watch, held

    def wait(self, timeout: timedelta = timedelta(0)) -> bool:
        """Wait, by c10d's own means; for a CUDA device the current stream does."""
        with self._watch:
            done = self._work.wait() if not timeout else self._work.wait(timeout)
        self._held = ()
        return bool(done)
