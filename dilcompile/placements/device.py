"""What a rank computes and moves in a second: from sources, or measured."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path

import torch

from dilcompile.errors import DilcompileError


@dataclass(frozen=True)
class Device:
    """What a rank computes and moves in a second.

    Args:
        flops: of attention in dtypes of 2 bytes, multiply and add counted as 2.
        bandwidth: bytes that a rank receives in a second, while it sends as many, from ranks of its node.
        network: the same from ranks of other nodes.
        latency: seconds that an exchange takes beside its bytes.
        call: seconds that a call of a kernel takes beside its arithmetic, its launch and the merging of its results.
        memory: bytes that are read or written in a second where operands are packed.
        node: ranks of a node.
        source: where the numbers come from.
    """

    flops: float
    bandwidth: float
    network: float
    latency: float
    call: float
    memory: float
    node: int
    source: str

    def wire(self, ranks: int) -> float:
        """Bytes a second where so many ranks exchange: the slower link if there are several nodes."""
        return self.bandwidth if ranks <= self.node else self.network

    def save(self, path: str | PathLike[str]) -> None:
        """Write it as JSON; ``load`` gives an equal one back."""
        Path(path).write_text(json.dumps(asdict(self), indent=2) + "\n")

    @staticmethod
    def load(path: str | PathLike[str]) -> Device:
        """The device that ``save`` wrote.

        Raises:
            DilcompileError: if the file can't be read or is none.
        """
        names = [each.name for each in fields(Device)]
        try:
            held = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise DilcompileError(f"{path}: no device can be read from it ({error}); write it with Device.save") from error
        if not isinstance(held, dict) or sorted(held) != sorted(names):
            raise DilcompileError(f"{path}: a device has exactly the keys {', '.join(names)}; write it with Device.save")
        wrong = [name for name in names[:-1] if not (isinstance(held[name], (int, float)) and held[name] > 0)]
        if wrong:
            raise DilcompileError(f"{path}: {wrong[0]} must be a number above 0, got {held[wrong[0]]!r}")
        return Device(**held)


_FA3 = "0.8 of the 740 TFLOP/s that FlashAttention-3 reaches (arXiv 2407.08608)"
_FA2 = "0.8 of the 230 TFLOP/s that FlashAttention-2 reaches (arXiv 2307.08691)"
_HBM = "0.8 of the memory bandwidth of the datasheet"
# Not measured here, but for what sources say; ``dilcompile.distributed.calibrate`` measures.
DEVICES: dict[str, Device] = {
    "h100": Device(
        592e12, 450e9, 50e9, 20e-6, 10e-6, 2.7e12, 8,
        f"{_FA3}; NVLink 4, 900 GB/s both ways (NVIDIA H100 datasheet); {_HBM}, 3.35 TB/s; 400 Gb/s network",
    ),
    "h200": Device(
        592e12, 450e9, 50e9, 20e-6, 10e-6, 3.8e12, 8,
        f"as h100: {_FA3}; NVLink 4 (NVIDIA H200 datasheet); {_HBM}, 4.8 TB/s; 400 Gb/s network",
    ),
    "a100": Device(
        184e12, 300e9, 25e9, 20e-6, 10e-6, 1.6e12, 8,
        f"{_FA2}; NVLink 3, 600 GB/s both ways (NVIDIA A100 datasheet); {_HBM}, 2.0 TB/s; 200 Gb/s network",
    ),
    "cpu": Device(1e11, 2e9, 1e9, 100e-6, 10e-6, 1e10, 1, "assumed: a few cores, gloo over a 10 Gb/s network"),
}  # fmt: skip


# Measured, by mesh axis.
_of_axes: dict[str, Device] = {}


def use(device: Device, axis: str) -> None:
    """Predict with this device for sites over a mesh axis, until there is another mesh."""
    _of_axes[axis] = device


def forget() -> None:
    """There is another mesh."""
    _of_axes.clear()


def device_of(device: torch.device, axis: str | None = None) -> Device:
    """What is predicted with: that of the mesh axis if it has one, else the entry of ``DEVICES`` for a torch device.

    An unknown CUDA device is taken for an ``h100``.
    """
    if axis in _of_axes:
        return _of_axes[axis]
    if device.type != "cuda":
        return DEVICES["cpu"]
    name = torch.cuda.get_device_name(device).lower() if torch.cuda.is_available() else ""
    return next((held for key, held in DEVICES.items() if key in name), DEVICES["h100"])
