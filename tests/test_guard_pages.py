"""Nothing outside of its tensors is read or written by a kernel: pages that may not be touched lie on both sides."""

from __future__ import annotations

import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import scripts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="guard pages by Linux's mmap")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
ON_THE_CPU = ["native", pytest.param("triton", marks=needs_triton)]


def guarded(kernel: str, *more: str) -> subprocess.CompletedProcess[str]:
    env = {"DILCOMPILE_TRUST": "off"} | ({"TRITON_INTERPRET": "1"} if kernel == "triton" else {})
    return scripts.run(Path(__file__).with_name("guard_pages.py"), [kernel, *more], env=env)


@pytest.mark.parametrize("kernel", ON_THE_CPU)
def test_nothing_outside_the_tensors_is_touched(kernel: str) -> None:
    done = guarded(kernel)
    assert done.stdout.startswith("stayed inside "), (done.returncode, done.stderr[-3000:])
    assert int(done.stdout.split()[2]) >= 32


@pytest.mark.parametrize("kernel", ON_THE_CPU)
def test_a_kernel_that_reads_behind_its_keys_ends_the_process(kernel: str) -> None:
    done = guarded(kernel, "wrong")
    assert done.returncode == -signal.SIGSEGV, (done.stdout, done.stderr[-3000:])
