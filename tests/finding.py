"""What the finder's tests share: float64 on one thread, functions as modules, and what was found in one line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def double() -> Iterator[None]:
    """float64 by default, one thread, a fixed seed. Use with ``pytestmark = pytest.mark.usefixtures("double")``."""
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
