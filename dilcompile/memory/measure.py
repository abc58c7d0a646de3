"""What torch's allocator for CPUs gives out and takes back while something runs: its own hooks, as the profiler reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

Result = TypeVar("Result")


@dataclass(frozen=True)
class Measured:
    """The bytes of a run, in order.

    Args:
        changes: of each allocation, and negative of each that was given back, also of what was there before the run.
    """

    changes: tuple[int, ...]

    @property
    def peak(self) -> int:
        """The most bytes above what was there before."""
        live = most = 0
        for change in self.changes:
            live += change
            most = max(most, live)
        return most

    @property
    def left(self) -> int:
        """Bytes more, or fewer, than before."""
        return sum(self.changes)

    @property
    def allocations(self) -> tuple[int, ...]:
        """The bytes of each allocation."""
        return tuple(change for change in self.changes if change > 0)


def measured(run: Callable[[], Result]) -> tuple[Result, Measured]:
    """The result of ``run``, and what torch allocated on the CPU for it.

    Memory that is not torch's, of C++ or Python, is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    profiler = found.profiler
    assert profiler is not None, "the profiler ran"
    assert profiler.kineto_results is not None, "the profiler has ended"
    # In the order in which they were recorded, which is that in which they happened on a thread.
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    events = [event for event in events if event.device_type().name == "CPU"]
    events.sort(key=lambda event: event.start_ns())
    return result, Measured(tuple(event.nbytes() for event in events))
