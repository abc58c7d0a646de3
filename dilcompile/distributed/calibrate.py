"""What the ranks of a mesh axis compute and move in a second, measured by what placements do."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from dilcompile.errors import PlacementError
from dilcompile.functional import attention
from dilcompile.lowering.distributed import meshes
from dilcompile.lowering.distributed.exchange import Errand, all_to_all, wait
from dilcompile.lowering.distributed.meshes import Axis
from dilcompile.placements import device as devices
from dilcompile.placements.device import Device

_TIMES = 5


def use_device(device: Device, axis: str = "cp") -> None:
    """Predict with this device for sites over a mesh axis: ``method: auto`` and ``best_order`` do then.

    All ranks must be given the same one, else they may compile different graphs, which is refused. It is forgotten where
    ``set_mesh`` gets another mesh.

    Raises:
        PlacementError: for an unknown axis.
    """
    meshes.axis_of(axis)
    devices.use(device, axis)


def calibrate(
    *,
    axis: str = "cp",
    heads_axis: str | None = None,
    dtype: torch.dtype | None = None,
    message: int | None = None,
    rows: int | None = None,
) -> Device:
    """Measure the ranks of a mesh axis, and predict with that from then on (``use_device``).

    All ranks call it, while nothing else runs. Exchanges are all-to-alls as those of placements: small ones give the latency,
    large ones the bandwidth. The rate of computing is that of causal attention by the kernel that one device would use. The
    slowest rank counts, so that all ranks get the same numbers.

    Args:
        axis: over which keys move. heads_axis: with ``usp`` the other one, which is measured by itself: ``bandwidth`` is its,
            ``network`` that over ``axis``.
        dtype: of the attention that is timed: bfloat16 on CUDA, else float32, whose rate is doubled for dtypes of 2 bytes as
            predictions halve it again.
        message: bytes that a rank receives in a large exchange: 256 MiB on CUDA, else 8 MiB.
        rows: of that attention: 8192 on CUDA, else 512.

    Returns:
        the device; ``save`` writes it as JSON, for ``dilcompile plan --device FILE`` and for ``use_device(Device.load(FILE))``.

    Raises:
        PlacementError: for an unknown axis, one of a single rank, or where another rank stopped.
    """
    at = meshes.axis_of(axis)
    if at.size == 1 or at.group is None:
        raise PlacementError(f"mesh axis {axis!r} has one rank, between which nothing moves; calibrate needs at least two")
    where = _device_of(at)
    is_cuda = where.type == "cuda"
    message = (256 << 20 if is_cuda else 8 << 20) if message is None else message
    dtype = (torch.bfloat16 if is_cuda else torch.float32) if dtype is None else dtype
    latency, bandwidth = _exchanges(axis, where, message)
    network, node = bandwidth, at.size
    if heads_axis is not None and meshes.size_of(heads_axis) > 1:
        quicker, bandwidth = _exchanges(heads_axis, where, message)
        latency, node = max(latency, quicker), meshes.size_of(heads_axis)
    flops = _flops(where, dtype, (8192 if is_cuda else 512) if rows is None else rows)
    # In the same order on all ranks; the slowest counts.
    given = torch.tensor(
        [-latency, -_call(where, dtype), bandwidth, network, flops, _memory(where, message)], dtype=torch.float64, device=where
    )
    for name in (axis, heads_axis):
        group = None if name is None else meshes.axis_of(name).group
        if group is not None:
            dist.all_reduce(given, op=dist.ReduceOp.MIN, group=group)
    latency, call, bandwidth, network, flops, memory = given.tolist()
    axes = axis if heads_axis is None else f"{axis} and {heads_axis}"
    told = f"{dist.get_backend(at.group)}, {at.size} ranks"
    source = f"measured over mesh axis {axes} ({told}), attention in {str(dtype)[6:]} on {where.type}"
    found = Device(flops, bandwidth, network, -latency, -call, memory, node, source)
    use_device(found, axis)
    return found


def _device_of(at: Axis) -> torch.device:
    assert at.group is not None
    return torch.device("cuda", torch.cuda.current_device()) if "nccl" in dist.get_backend(at.group) else torch.device("cpu")


def _exchanges(axis: str, where: torch.device, message: int) -> tuple[float, float]:
    """Seconds of an exchange beside its bytes, and bytes that are received in a second."""
    small = _seconds(where, lambda: _exchange(axis, where, 8))
    large = _seconds(where, lambda: _exchange(axis, where, message))
    return small, message / max(large - small, 1e-9)


def _exchange(axis: str, where: torch.device, received: int) -> None:
    """One all-to-all by which a rank receives so many bytes."""
    at = meshes.axis_of(axis)
    each = max(1, received // (at.size - 1))
    counts = [0 if rank == at.rank else each for rank in range(at.size)]
    sent, came = (torch.zeros(sum(counts), dtype=torch.uint8, device=where) for _ in range(2))
    all_to_all(axis, came, sent, counts, counts, Errand("dilcompile.distributed.calibrate", "an exchange", "forward"))
    wait(came)


def _flops(where: torch.device, dtype: torch.dtype, rows: int) -> float:
    """Of attention, as if in a dtype of 2 bytes."""
    heads, dim = 16, 128 if where.type == "cuda" else 64
    q, k, v = (torch.randn(1, heads, rows, dim, dtype=dtype, device=where) for _ in range(3))
    spent = _seconds(where, lambda: attention(q, k, v, "dense", is_causal=True))
    return 4 * heads * dim * (rows * (rows + 1) // 2) / spent * max(2, dtype.itemsize) / 2


def _call(where: torch.device, dtype: torch.dtype) -> float:
    """Seconds of an attention of so few rows that its arithmetic takes none."""
    q, k, v = (torch.randn(1, 1, 16, 64, dtype=dtype, device=where) for _ in range(3))
    return _seconds(where, lambda: attention(q, k, v, "dense"))


def _memory(where: torch.device, message: int) -> float:
    """Bytes that are read or written in a second where rows are packed: heads and rows change places."""
    x = torch.zeros(max(1, message // (2 * 16 * 128)), 16, 128, dtype=torch.bfloat16, device=where)
    return 2 * x.numel() * x.element_size() / _seconds(where, lambda: x.transpose(0, 1).contiguous())


def _seconds(where: torch.device, job: Callable[[], object]) -> float:
    """The median of a few calls, after one that does not count."""
    spent = []
    for _ in range(1 + _TIMES):
        _finish(where)
        start = time.perf_counter()
        job()
        _finish(where)
        spent.append(time.perf_counter() - start)
    return statistics.median(spent[1:])


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
