"""The native CPU kernel by itself: what the contract of all kernels (test_kernels) does not see."""

from __future__ import annotations

import ctypes
import logging
import math
import platform
import subprocess
from concurrent.futures import ThreadPoolExecutor
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
    """Of q, k, v and the bias, if there is one."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if "bias" in more:
        more["bias"] = more["bias"].detach().requires_grad_()
    out, lse = run(*leaves, form, kernel, **more)
    leaves += [more["bias"]] if "bias" in more else []
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


def _with_gaps(x: Tensor, gaps: int) -> Tensor:
    """The same numbers: as they lie, with keys before rows, or each with one beside it that is not read."""
    if gaps == 0:
        return x
    return x.mT.contiguous().mT if gaps == 1 else torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0]


@settings(max_examples=100, deadline=None)
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
    if draw(st.booleans()):
        sizes = [draw(st.sampled_from([1, size])) for size in (2, heads, q_len, k_len)]
        bias = torch.randn(sizes, generator=generator, dtype=torch.float64)
        hidden = torch.rand(sizes, generator=generator) < draw(st.sampled_from([0.0, 0.2, 0.9]))
        more["bias"] = _with_gaps(bias.masked_fill(hidden, -torch.inf), draw(st.integers(0, 2)))
    if draw(st.booleans()):
        more["dropout_p"] = draw(st.sampled_from([1e-12, 0.3, 0.95]))
        more["seed"] = torch.tensor([draw(st.integers(-(2**63), 2**63 - 1))])
    for found, exact in zip(run(q, k, v, form, **more), run(q, k, v, form, "reference", **more), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)
    for found, exact in zip(
        gradients(q, k, v, form, "native", **more), gradients(q, k, v, form, "reference", **more), strict=True
    ):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


BIASES = [(2, 4, 300, 300), (1, 4, 300, 300), (1, 1, 300, 300), (4, 1, 300), (1, 300), (300, 1), (1,)]


BIASED: list[tuple[Form, int, float | None]] = [
    (Dense(), 4, None), (Dense(), 2, 2.0), (LONG, 2, None), (SlidingWindow(70, sinks=3), 4, None),
]  # fmt: skip


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize(("form", "kv_heads", "softcap"), BIASED, ids=str)
def test_a_bias_in_low_precision_is_as_good_as_in_the_views(
    form: Form, kv_heads: int, softcap: float | None, shape: tuple[int, ...]
) -> None:
    """Of the operands' dtype and of float32, over many blocks and tiles, some pairs hidden; the views compute it in float32.

    Dtypes by turns: each meets each shape and each form.
    """
    turn = BIASES.index(shape) + BIASED.index((form, kv_heads, softcap))
    dtype = (torch.float32, torch.bfloat16, torch.float16)[turn % 3]
    generator = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(2, 300, h, 33, generator=generator).to(dtype).transpose(1, 2) for h in (4, kv_heads, kv_heads))
    for bias_dtype in {dtype, torch.float32}:
        bias = torch.randn(shape, generator=generator).to(bias_dtype)
        bias = bias.masked_fill((torch.rand(shape, generator=generator) < 0.2) & (bias.numel() > 1), -torch.inf)
        more: dict[str, Any] = {"bias": bias, "softcap": softcap}
        wide: dict[str, Any] = {"bias": bias.double(), "softcap": softcap}
        results = (
            (run(q, k, v, form, "native", **more), gradients(q, k, v, form, "native", **more)),
            (run(q, k, v, form, "cpu", **more), gradients(q, k, v, form, "cpu", **more)),
            (
                run(q.double(), k.double(), v.double(), form, "reference", **wide),
                gradients(q.double(), k.double(), v.double(), form, "reference", **wide),
            ),
        )
        found, views, exact = ([*result, *grads] for result, grads in results)
        assert found[5].dtype == bias_dtype
        assert found[5].shape == bias.shape
        size = max(grad.norm() for grad in exact[2:])
        for place, (mine, theirs, true) in enumerate(zip(found, views, exact, strict=True)):
            seen = true.isfinite()
            assert torch.equal(mine.isfinite(), seen)
            mine, theirs, true = mine[seen].double(), theirs[seen].double(), true[seen]
            # Sums of the bias's gradient cancel where all keys of a row share a number.
            rounding = torch.finfo(torch.float32 if place == 1 else dtype).eps * (true.norm() if place < 5 else size)
            assert (mine - true).norm() <= 2 * (theirs - true).norm() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [None, (4, 300, 300)], ids=str)
@pytest.mark.parametrize(("form", "kv_heads"), [(Dense(), 4), (LONG, 2), (SlidingWindow(70, sinks=3), 1)], ids=str)
def test_dropout_in_low_precision_is_as_good_as_in_the_views(
    form: Form, kv_heads: int, bias: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    """The same pairs are dropped, in every block and tile."""
    generator = torch.Generator().manual_seed(8)
    q, k, v = (torch.randn(2, 300, h, 33, generator=generator).to(dtype).transpose(1, 2) for h in (4, kv_heads, kv_heads))
    more: dict[str, Any] = {"dropout_p": 0.4, "seed": torch.tensor([2**40 + 3]), "q_offset": -2}
    if bias is not None:
        more["bias"] = torch.randn(bias, generator=generator).to(dtype)
    wide = more | ({} if bias is None else {"bias": more["bias"].double()})
    found, views = ((*run(q, k, v, form, x, **more), *gradients(q, k, v, form, x, **more)) for x in ("native", "cpu"))
    doubles = (q.double(), k.double(), v.double())
    exact = (*run(*doubles, form, "reference", **wide), *gradients(*doubles, form, "reference", **wide))
    for mine, theirs, true in zip(found, views, exact, strict=True):
        seen = true.isfinite()
        mine, theirs, true = mine[seen].double(), theirs[seen].double(), true[seen]
        assert (mine - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(4, 300, 300), (1, 300)], ids=str)
def test_the_gradient_of_a_bias_is_computed_only_when_asked_for(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    q, k, v = drawn(length=300, dtype=dtype)
    options = (None, None, torch.randn(shape).to(dtype), None, str(LONG), True, None, None, 0, 0.3, None, 0.0, "native")
    out, lse = ops.attention(q, k, v, *options)
    without = ops.attention_backward(out, None, out, lse, q, k, v, *options, bias_grad=False)
    whole = ops.attention_backward(out, None, out, lse, q, k, v, *options, bias_grad=True)
    assert without[3].numel() == 0
    assert whole[3].shape == shape
    if dtype == torch.float32:
        assert torch.equal(without[0], whole[0])
    for one, other in zip(without[:3], whole[:3], strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_bias_of_the_lowest_number_hides_like_minus_infinity(dtype: torch.dtype) -> None:
    """But for a row that has nothing else, which gets the mean of its values (see test_kernels)."""
    q, k, v = drawn(length=300, dtype=dtype)
    hidden = torch.rand(300, 300, generator=torch.Generator().manual_seed(1)) < 0.5
    hidden[40:60, :40] = True
    hidden.fill_diagonal_(False)
    results = []
    for fill in (torch.finfo(dtype).min, -torch.inf):
        bias = torch.zeros(300, 300, dtype=dtype).masked_fill(hidden, fill)
        results.append((*run(q, k, v, LONG, bias=bias), *gradients(q, k, v, LONG, "native", bias=bias)[:3]))
    for lowest, infinite in zip(*results, strict=True):
        assert torch.equal(lowest, infinite)


@pytest.mark.parametrize("shape", [(700, 700), (4, 1, 700)], ids=str)
def test_the_gradient_of_a_shared_bias_is_the_same_each_time(shape: tuple[int, ...]) -> None:
    """Heads and rows share its numbers, so several threads have a part in each."""
    q, k, v = drawn(dtype=torch.float32)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    exact = gradients(q.double(), k.double(), v.double(), LONG, "reference", bias=bias.double())
    views = gradients(q, k, v, LONG, "cpu", bias=bias)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            once, again = (gradients(q, k, v, LONG, "native", bias=bias) for _ in range(2))
            assert all(torch.equal(*pair) for pair in zip(once, again, strict=True))
            assert (once[3] - exact[3]).norm() <= 2 * (views[3] - exact[3]).norm() + 1e-7 * exact[3].norm()
    finally:
        torch.set_num_threads(threads)


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
@pytest.mark.parametrize(
    ("dtype", "level"),
    [
        *((torch.float16, level) for level in ("x86-64", "x86-64-v3")),
        *((torch.bfloat16, level) for level in ("x86-64-v3", "x86-64-v4")),
        (torch.float32, "x86-64"),
        # float16 has conversions for each level and bfloat16 tile registers; the code of these is that of the others.
        *(
            pytest.param(dtype, level, marks=pytest.mark.slow)
            for dtype, level in [
                (torch.float16, "x86-64-v4"), (torch.bfloat16, "x86-64"), (torch.float32, "x86-64-v3"), (torch.float32, "x86-64-v4"),
            ]
        ),
    ],
    ids=str,
)  # fmt: skip
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
    square, row = torch.randn(300, 300).to(dtype), torch.randn(4, 1, 300).to(dtype)
    cases: list[dict[str, Any]] = [{}, {"bias": square}, {"bias": row}, {"dropout_p": 0.3, "seed": torch.tensor([4])}]
    for more in cases:
        wide = more | ({"bias": more["bias"].double()} if "bias" in more else {})
        exact = run(q.double(), k.double(), v.double(), LONG, "reference", **wide)
        views = run(q, k, v, LONG, "cpu", **more)
        for found, theirs, true in zip(run(q, k, v, LONG, **more), views, exact, strict=True):
            assert (found - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()
        true_grads = gradients(q.double(), k.double(), v.double(), LONG, "reference", **wide)
        pairs = zip(gradients(q, k, v, LONG, "native", **more), gradients(q, k, v, LONG, "cpu", **more), true_grads, strict=True)
        for found, theirs, true in pairs:
            assert (found - true).norm() <= 2 * (theirs - true).norm() + torch.finfo(dtype).eps * true.norm()


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
        ({"bias": torch.zeros(1, dtype=torch.int64)}, "a bias of dtype torch.int64; kernel 'cpu' can"),
        ({"dropout_p": 1.0, "seed": torch.tensor([1])}, "dropout of 1.0, which keeps nothing; kernel 'cpu' can"),
        ({"scale": math.inf}, "scale inf"),
        ({"q_offset": 2**31 - 20}, "20 keys and 20 queries from 2147483628: positions are held in 32 bits; kernel 'cpu' can"),
        ({"q_offset": -(2**40)}, "20 keys and 20 queries from -1099511627776: positions are held in 32 bits"),
    ],
    ids=str,
)
def test_what_it_refuses(more: dict[str, Any], reason: str) -> None:
    with pytest.raises(KernelError, match=f"kernel 'native' can't compute this attention: {reason}"):
        run(*drawn(length=20), Dense(), **more)


def test_several_callers_at_once() -> None:
    """Each thread of Python has its own workspaces."""
    inputs = [drawn(length=200, dim=16, seed=seed) for seed in range(4)]
    wanted = [gradients(*qkv, LONG, "native") for qkv in inputs]
    with ThreadPoolExecutor(4) as callers:
        found = list(callers.map(lambda qkv: gradients(*qkv, LONG, "native"), inputs * 5))
    for mine, exact in zip(found, wanted * 5, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(mine, exact, strict=True))


@pytest.mark.parametrize("scale", [1e30, -1e30, 1e10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_gradients_of_huge_scores_are_finite(dtype: torch.dtype, scale: float) -> None:
    """The LSE of such rows is rounded by more than exponentials bear; weights are not larger than 1 for that."""
    inputs = drawn(length=40, dim=16, dtype=dtype)
    for more in ({}, {"bias": torch.zeros(40, 40, dtype=dtype)}):
        found = gradients(*inputs, LONG, "native", scale=scale, **more)
        assert all(bool(grad.isfinite().all()) for grad in found)
        assert float(found[2].abs().max()) < 100


FAR = 2**48


@pytest.mark.parametrize(
    ("form", "left", "right", "q_offset"),
    [
        (Dense(), 2**63 - 1, 2**63 - 1, 0),
        (Dense(), -(2**63) + 1, 2**63 - 1, 0),
        (Dense(), 3, -(2**62), 0),
        (LONG, 2**63 - 1, 5, 2**31 - 41),
        (LONG, None, None, -(2**31) + 41),
        (SlidingWindow(FAR, sinks=FAR), 2**40, None, 7),
        (SlidingWindow(4, step=FAR), None, None, 0),
        (Dilated([FAR, 16], [FAR, 1]), None, None, 0),
        (Dilated([8], [1], sinks=FAR, local=FAR), None, None, 0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kernel", ["native", "cpu"])
def test_numbers_far_outside_of_the_sequence(kernel: str, form: Form, left: int | None, right: int | None, q_offset: int) -> None:
    leaves = [x.requires_grad_() for x in drawn(length=40, dim=8)]
    results = [
        ops.attention(*leaves, None, None, None, None, str(form), True, left, right, q_offset, 0.3, None, 0.0, name)
        for name in (kernel, "reference")
    ]
    grads = [torch.autograd.grad(out.sin().sum() + torch.where(lse.isfinite(), lse, 0).sum(), leaves) for out, lse in results]
    for found, exact in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-12)


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_no_number_stays_none(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 100, 16).to(dtype) for _ in range(3))
    q[0, 1, 77, 5] = torch.nan
    k[0, 0, 90, 3] = torch.nan
    found = run(q, k, v, Dense())[0]
    lost = torch.zeros(2, 100, dtype=torch.bool)
    lost[1, 77] = lost[0, 90:] = True
    assert torch.equal(found.isnan(), lost[None, ..., None].expand(found.shape))
