"""The native CPU kernel by itself: what the contract of all kernels (test_kernels) does not see."""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dilcompile.errors import KernelError
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import native, ops, select
from dilcompile.lowering.native import build

LONG = Dilated([64, 128, 256, 512], [1, 2, 4, 8])


def run(q: Tensor, k: Tensor, v: Tensor, form: Form, kernel: str | None = "native", causal: bool = True, **more: Any) -> Any:
    return ops.attention(
        q, k, v, more.get("key_padding"), more.get("documents"), more.get("bias"), more.get("seed"), str(form), causal,
        None, None, more.get("q_offset", 0), more.get("scale", 0.3), more.get("softcap"), more.get("dropout_p", 0.0), kernel,
    )  # fmt: skip


def drawn(
    length: int = 700, heads: int = 4, kv_heads: int = 2, dim: int = 64, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Any:
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads, dim), (kv_heads, dim), (kv_heads, dim))
    return tuple(torch.randn(1, length, h, d, generator=generator).to(dtype).transpose(1, 2) for h, d in sizes)


def gradients(q: Tensor, k: Tensor, v: Tensor, form: Form, kernel: str, **more: Any) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = run(*leaves, form, kernel, **more)
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return torch.autograd.grad((out * weight).sum() + torch.where(lse.isfinite(), lse, 0).sum(), leaves)


@pytest.mark.parametrize(
    "form", [Dense(), LONG, SlidingWindow(100, sinks=3), Dilated([64, "seq"], [1, 4], offset="own")], ids=str
)
def test_lengths_of_many_blocks_and_tiles(form: Form) -> None:
    q, k, v = drawn(length=1400)
    for found, exact in zip(run(q, k, v, form), run(q, k, v, form, "reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    for found, exact in zip(gradients(q, k, v, form, "native"), gradients(q, k, v, form, "reference"), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 80), (96, 32), (20, 36), (33, 7)], ids=str)
@pytest.mark.parametrize("large", [0.1, 3.0])
def test_low_precision_over_many_blocks_is_as_good_as_the_flash_op(
    large: float, dims: tuple[int, int], causal: bool, dtype: torch.dtype
) -> None:
    """Scores that grow from block to block make the running maximum move."""
    generator = torch.Generator().manual_seed(2)
    q, k, v = (torch.randn(1, 2, 600, d, generator=generator) for d in (dims[0], dims[0], dims[1]))
    k = k * torch.linspace(0, large, 600)[:, None]
    q, k, v = (x.to(dtype) for x in (q, k, v))
    exact, exact_lse = run(q.double(), k.double(), v.double(), LONG, "reference", causal)
    found, lse = run(q, k, v, LONG, "native", causal)
    views, views_lse = run(q, k, v, LONG, "cpu", causal)
    rounding = torch.finfo(dtype).eps * exact.abs().max()
    assert (found - exact).abs().max() <= 2 * (views - exact).abs().max() + rounding
    lse_rounding = torch.finfo(torch.float32).eps * exact_lse.abs().max()
    assert (lse - exact_lse).abs().max() <= 2 * (views_lse - exact_lse).abs().max() + lse_rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_many_keys_keep_their_precision(dtype: torch.dtype) -> None:
    """Against dense attention by the flash op, which adds up shorter sums."""
    generator = torch.Generator().manual_seed(6)
    q, k, v = (torch.randn(1, 4, s, 64, generator=generator).to(dtype) for s in (96, 20000, 20000))
    exact = run(q.double(), k.double(), v.double(), Dense(), "reference", False)
    found, views = (run(q, k, v, Dense(), kernel, False) for kernel in ("native", "cpu"))
    for mine, theirs, true in zip(found, views, exact, strict=True):
        assert (mine - true).norm() <= 2 * (theirs - true).norm()
        assert (mine - true).abs().max() <= 2 * (theirs - true).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [LONG, SlidingWindow(70, sinks=3), Dense()], ids=str)
@pytest.mark.parametrize(("dims", "heads", "softcap"), [((64, 64), 1, None), ((33, 7), 3, 2.0), ((96, 128), 2, None)])
def test_low_precision_gradients_over_many_blocks_are_as_good_as_the_flash_ops(
    dims: tuple[int, int], heads: int, softcap: float | None, form: Form, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(4)
    sizes = ((heads, dims[0]), (1, dims[0]), (1, dims[1]))
    q, k, v = (torch.randn(2, 450, h, d, generator=generator).to(dtype).transpose(1, 2) for h, d in sizes)
    exact = gradients(q.double(), k.double(), v.double(), form, "reference", softcap=softcap)
    found, views = (gradients(q, k, v, form, kernel, softcap=softcap) for kernel in ("native", "cpu"))
    for mine, theirs, true in zip(found, views, exact, strict=True):
        # In the root mean square: the largest of many errors is one draw from their tail.
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_relation_equals_the_reference(data: st.DataObject) -> None:
    draw = data.draw
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    branches = draw(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12)), min_size=1, max_size=min(3, heads)))
    dilated = Dilated(
        [rate * count for rate, count in branches], [rate for rate, _ in branches],
        offset=draw(st.sampled_from(["head_mod", "head_block", "branch", "zero", "own"])),
        union=draw(st.sampled_from(["multiset", "set"])), heads=draw(st.sampled_from(["all", "grouped"])),
        sinks=draw(st.integers(0, 3)), local=draw(st.integers(0, 4)), coverage="zero",
    )  # fmt: skip
    window = SlidingWindow(draw(st.integers(1, 30)), sinks=draw(st.integers(0, 3)), step=draw(st.integers(1, 4)))
    form = draw(st.sampled_from([dilated, window, Dense()]))
    q_len, k_len = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    q, k, v = (
        torch.randn(2, h, s, d, generator=generator, dtype=torch.float64)
        for h, s, d in ((heads, q_len, 5), (kv_heads, k_len, 5), (kv_heads, k_len, 3))
    )
    more: dict[str, Any] = {"causal": draw(st.booleans()), "q_offset": draw(st.integers(-4, 20))}
    if draw(st.booleans()):
        more["key_padding"] = torch.rand(2, k_len, generator=generator) > 0.3
    if draw(st.booleans()):
        more["softcap"] = 1.5
    if draw(st.booleans()) and more["q_offset"] >= 0 and more["q_offset"] + q_len <= k_len:
        more["documents"] = (torch.rand(draw(st.sampled_from([1, 2])), k_len, generator=generator) > 0.9).cumsum(1)
    for found, exact in zip(run(q, k, v, form, **more), run(q, k, v, form, "reference", **more), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    for found, exact in zip(
        gradients(q, k, v, form, "native", **more), gradients(q, k, v, form, "reference", **more), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


def test_threads_change_nothing() -> None:
    q, k, v = drawn(dtype=torch.float32)
    exact = gradients(q.double(), k.double(), v.double(), LONG, "reference")
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            once, again = (gradients(q, k, v, LONG, "native") for _ in range(2))
            assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
            found.append((run(q, k, v, LONG), once))
    finally:
        torch.set_num_threads(threads)
    for results, grads in found[1:]:
        assert all(torch.equal(*pair) for pair in zip(results, found[0][0], strict=True))
        assert torch.equal(grads[0], found[0][1][0])
        # Key gradients are summed in as many parts as there are threads for a head: equal up to rounding.
        for part, whole, true in zip(grads[1:], found[0][1][1:], exact[1:], strict=True):
            assert (part - true).abs().max() <= 2 * (whole - true).abs().max()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="levels of x86-64")
@pytest.mark.parametrize("level", ["x86-64", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrower_vectors(dtype: torch.dtype, level: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """16 bytes, AVX2 and AVX-512 without tile registers; what this machine can't run is only compiled."""
    (tmp_path / "kernel.cpp").write_text(build.source(dtype))
    made = tmp_path / "kernel.so"
    flags = ["-std=c++17", "-O1", f"-march={level}", "-ffp-contract=off", "-fno-signed-zeros", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(tmp_path / "kernel.cpp"), "-o", str(made)], check=True)
    if level == "x86-64-v4" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return
    built = build.Library(ctypes.CDLL(str(made)))
    monkeypatch.setattr(native, "library", lambda dtype: built)
    q, k, v = drawn(length=300, dtype=dtype)
    exact = run(q.double(), k.double(), v.double(), LONG, "reference")
    views = run(q, k, v, LONG, "cpu")
    for found, theirs, true in zip(run(q, k, v, LONG), views, exact, strict=True):
        assert (found - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()
    true_grads = gradients(q.double(), k.double(), v.double(), LONG, "reference")
    pairs = zip(gradients(q, k, v, LONG, "native"), gradients(q, k, v, LONG, "cpu"), true_grads, strict=True)
    for found, theirs, true in pairs:
        assert (found - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()


GUARDED = """
import ctypes, mmap, sys
import torch
from dilcompile.lowering import ops
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
PAGE = mmap.PAGESIZE

def guarded(shape, dtype, at_end):
    '''A [B, S, H, D] tensor that ends (or begins) where the memory does; the next page may not be touched.'''
    count = 1
    for size in shape:
        count *= size
    bytes_needed = count * dtype.itemsize
    pages = -(-bytes_needed // PAGE)
    base = libc.mmap(None, (pages + 2) * PAGE, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(base + page * PAGE), PAGE, 0) == 0
    start = base + PAGE + (pages * PAGE - bytes_needed if at_end else 0)
    memory = (ctypes.c_char * bytes_needed).from_address(start)
    x = torch.frombuffer(memory, dtype=dtype).view(shape)
    x.copy_(torch.randn(shape))
    return x.transpose(1, 2)

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    for at_end in (False, True):
        for dim, v_dim in ((64, 64), (33, 7), (96, 80)):
            for form in ("dense()", "dilated(segments=(64, 128), rates=(1, 4))", "sliding_window(window=9, sinks=2)"):
                q = guarded((1, 131, 2, dim), dtype, at_end)
                k, v = (guarded((1, 131, 1, d), dtype, at_end) for d in (dim, v_dim))
                options = (None, None, None, None, form, True, None, None, 0, 0.1, None, 0.0, "native")
                out, lse = ops.attention(q, k, v, *options)
                grad = guarded((1, 131, 2, v_dim), dtype, at_end)
                ops.attention_backward(grad, None, out, lse, q, k, v, *options)
print("stayed inside")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guard pages by Linux's mmap")
def test_nothing_outside_the_tensors_is_touched() -> None:
    done = subprocess.run([sys.executable, "-c", GUARDED], capture_output=True, text=True)
    assert done.stdout == "stayed inside\n", done.stderr


def test_without_a_compiler_the_view_path_computes_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fail(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("g++: not found")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    build.library.cache_clear()
    q, k, v = drawn(length=40)
    try:
        with caplog.at_level(logging.WARNING, logger="dilcompile"):
            found = [run(q, k, v, LONG, None) for _ in range(2)]
        assert caplog.messages == ["the native CPU kernel could not be built, the view path computes instead: g++: not found"]
        with pytest.raises(
            KernelError,
            match=r"kernel 'native' can't compute this attention: it could not be built \(g\+\+: not found\); it needs a C",
        ):
            run(q, k, v, LONG)
    finally:
        build.library.cache_clear()
    torch.testing.assert_close(found[0], run(q, k, v, LONG, "cpu"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"bias": torch.zeros(1)}, "a bias over all pairs; kernel 'cpu' can"),
        ({"dropout_p": 0.5, "seed": torch.tensor([1])}, "dropout by position; kernel 'cpu' can"),
        ({"scale": math.inf}, "scale inf"),
    ],
    ids=str,
)
def test_what_it_refuses(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(KernelError, match=f"kernel 'native' can't compute this attention: {reason}"):
        run(*drawn(length=20), Dense(), **more)


def test_few_queries_go_elsewhere_unless_it_is_asked_for() -> None:
    q, k, v = drawn(length=40)
    chosen = []
    original = native.forward
    # The kernel is checked before.
    run(q, k, v, Dense(), "native", causal=False), run(q[:, :, :8], k, v, Dense(), "native", causal=False)
    run(q[:, :, :1], k, v, Dense(), "native", causal=False)
    try:
        native.forward = lambda call: chosen.append(call.problem.q_len) or original(call)  # type: ignore[func-returns-value,assignment]
        for rows in (1, 7, 8, 40):
            run(q[:, :, :rows], k, v, Dense(), None, causal=False)
        run(q[:, :, :1], k, v, Dense(), "native", causal=False)
    finally:
        native.forward = original
    assert chosen == [8, 40, 1]
    assert next(iter(select.KERNELS)) == "native"


def test_the_sources_are_one_text_that_knows_the_machine() -> None:
    texts = {build.source(dtype) for dtype in build.ELEMENTS}
    assert len(texts) == 4
    for text in texts:
        assert '#include "' not in text
        assert torch.__version__ in text
        assert torch.backends.cpu.get_cpu_capability() in text
