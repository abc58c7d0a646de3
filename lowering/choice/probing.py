"""Calls that are made only to learn something: when they can be made, and what they must not disturb."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from dilcompile.errors import DilcompileError
from dilcompile.near import hint

_MODES = ("disk", "memory", "off")


def mode_of(option: str, default: str) -> str:
    """What an environment variable says about remembering: on disk, in memory, or that nothing is to be learnt.

    Raises:
        DilcompileError: if it has an unknown value.
    """
    mode = os.environ.get(option, default)
    if mode not in _MODES:
        raise DilcompileError(f"{option} takes {', '.join(_MODES)}, got {mode!r}{hint(mode, _MODES)}")
    return mode


def without_data(x: Tensor) -> bool:
    """Is there nothing to compute with?"""
    return isinstance(x, FakeTensor) or x.is_meta or torch._is_functional_tensor(x)


def captured(device: torch.device) -> bool:
    """Is a CUDA graph being captured? Nothing can be compared or timed then: no number reaches the CPU."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


@contextlib.contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """What the caller has switched on does not reach the calls, nor is anything recorded of them."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", device.type}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def device_name(device: torch.device) -> str:
    """The device by its model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} {torch.backends.cpu.get_cpu_capability()}"


def first_line(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
