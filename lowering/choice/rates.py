"""How fast dense attention and the kernels are: seconds that a call costs by itself, and FLOP/s, by device, dtype and kernel.

Those of ``cpu`` were measured (``rates-cpu.json`` beside this, by ``benchmarks/rates.py``, one thread). Those of ``cuda`` are
assumed, from what flash kernels reach on an H100; no device was at hand. ``DILCOMPILE_RATES`` names a file that the same
benchmark made on another machine; its kernels and dtypes go before these.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dilcompile.errors import DilcompileError

OPTION = "DILCOMPILE_RATES"
DENSE = "dense"
MEASURED = Path(__file__).with_name("rates-cpu.json")


@dataclass(frozen=True)
class Rate:
    """What a call costs: ``overhead`` seconds and what its FLOPs take at ``flops`` a second, on a CPU a second and thread."""

    overhead: float
    flops: float

    def __post_init__(self) -> None:
        if not (self.overhead >= 0 and self.flops > 0):
            raise ValueError(f"overhead {self.overhead} or flops {self.flops}")


# device -> dtype -> kernel -> forward, and forward with backward.
Table = Mapping[str, Mapping[str, Mapping[str, tuple[Rate, Rate]]]]


def rate_of(device: torch.device, dtype: torch.dtype, kernel: str, train: bool) -> Rate | None:
    """The rate of a kernel (or of ``dense``), or None where there is none.

    Raises:
        DilcompileError: if ``DILCOMPILE_RATES`` names no readable file.
    """
    name, path = str(dtype).removeprefix("torch."), os.environ.get(OPTION)
    own: list[Table] = [] if path is None else [_read(path)]
    for table in (*own, _read(str(MEASURED)), ASSUMED):
        held = table.get(device.type, {}).get(name, {}).get(kernel)
        if held is not None:
            return held[1] if train else held[0]
    return None


@lru_cache(maxsize=4)
def _read(path: str) -> Table:
    try:
        return table_of(json.loads(Path(path).read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DilcompileError(
            f"{OPTION}: {path} is no file of rates ({type(error).__name__}: {error}); benchmarks/rates.py makes one"
        ) from None


def table_of(held: dict[str, Any]) -> Table:
    """The table in what ``benchmarks/rates.py`` writes.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: if it is of another form.
    """
    return {
        held["device"]: {
            dtype: {kernel: (_rate(found["forward"]), _rate(found["train"])) for kernel, found in kernels.items()}
            for dtype, kernels in held["rates"].items()
        }
    }


def _rate(found: dict[str, Any]) -> Rate:
    return Rate(float(found["overhead_s"]), float(found["flops_per_s"]))


def _assumed(dense: float, triton: float, flash: float) -> dict[str, tuple[Rate, Rate]]:
    """Backward passes run at three quarters of the forward's rate."""
    one_launch = dict.fromkeys(("flash_band", "flash_attn", "cudnn", "efficient"), (60e-6, dense))
    walked = dict.fromkeys(("triton", "flex"), (120e-6, triton))
    launches = {DENSE: (15e-6, dense), **one_launch, **walked, "flash": (500e-6, flash)}
    return {name: (Rate(cost, rate), Rate(2.5 * cost, 0.8 * rate)) for name, (cost, rate) in launches.items()}


ASSUMED: Table = {
    "cuda": {
        "bfloat16": _assumed(350e12, 200e12, 200e12),
        "float16": _assumed(350e12, 200e12, 200e12),
        "float32": _assumed(20e12, 8e12, 4e12),
    },
}
