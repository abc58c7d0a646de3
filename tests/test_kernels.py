"""The contract of every kernel: the oracles of attention over a relation, form by form and dtype by dtype."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from oracles import Setting, counts, output_scale, softmax
from torch import Tensor

from dilcompile.decision import KERNEL_NAMES
from dilcompile.errors import KernelError
from dilcompile.forms import BlockSparse, Dense, Dilated, Form, SlidingWindow, Union, parse_form
from dilcompile.lowering import ops, select
from dilcompile.lowering.select import KERNELS
from dilcompile.lowering.view_path import engines, pieces, portions, strided, views
from dilcompile.relation import Problem, Relation

FORMS: list[Form] = [
    Dense(),
    SlidingWindow(5),
    SlidingWindow(12, sinks=2, step=3),
    Dilated([8, 16], [1, 2]),
    Dilated([4, 8, 16], [1, 2, 4], offset="own"),
    Dilated([4, 12], [1, 3], union="set", offset="branch"),
    Dilated([8, "seq"], [1, 2], offset="head_block", sinks=2, local=3),
    Dilated([8, 16], [1, 2], union="set", sinks=1, local=2),
    Dilated([8, 16], [2, 4], coverage="zero", output_scale="1/k"),
    Dilated([6, 16], [1, 1], heads="grouped"),
    BlockSparse(16, {"any": [{"local": {"before": 1, "behind": 1}}, {"random": {"blocks": 1, "by_head": True}}]}),
    BlockSparse([32, 16], {"all": [{"strided": {"stride": 2}}, {"local": {"before": 3}}]}, "zero"),
]
# What Triton's kernel leaves to others: branches that count keys again, blocks that differ between heads, a window.
UNION = Union(
    (
        {"form": "dilated", "segments": [8, 16], "rates": [1, 2]},
        {
            "form": "block_sparse",
            "block": [32, 16],
            "pattern": {"any": [{"global": {"columns": 1}}, {"random": {"blocks": 1, "by_head": True}}]},
        },
        {"form": "sliding_window", "window": 7, "sinks": 1},
    )
)
ALL_FORMS = [*FORMS, UNION]
# Those of CUDA devices are tested by stand-ins for their ops (test_flash_route), triton in its interpreter (test_triton), flex
# uncompiled (test_flex).
ON_CUDA = {"flash_band", "triton", "flash_attn", "cudnn", "efficient", "flex", "flash"}
ON_CPU = [name for name in KERNELS if name not in ON_CUDA]
SCALE = 0.4


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles, chunks and cuts small enough that short sequences cross their borders."""
    monkeypatch.setattr(pieces, "_NARROWEST_TILE", 2)
    monkeypatch.setattr(pieces, "_WIDEST_TILE", 4)
    monkeypatch.setattr(portions, "_CHUNK_BYTES", 10_000)
    monkeypatch.setattr(engines, "_PAIRS_AT_ONCE", 2000)
    pieces.plan.cache_clear()
    yield
    pieces.plan.cache_clear()


def drawn(
    batch: int = 2, heads: int = 4, kv_heads: int = 2, q_len: int = 37, k_len: int = 37, dim: int = 8, v_dim: int = 8,
    dtype: torch.dtype = torch.float64, layout: str = "heads last", seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k and v in a model's layout, contiguous, or with gaps between elements."""
    generator = torch.Generator().manual_seed(seed)

    def one(h: int, s: int, d: int) -> Tensor:
        if layout == "contiguous":
            return torch.randn(batch, h, s, d, generator=generator).to(dtype)
        if layout == "gaps":
            return torch.randn(batch, h, d, 2 * s, generator=generator).to(dtype)[..., ::2].mT
        return torch.randn(batch, s, h, d, generator=generator).to(dtype).transpose(1, 2)

    return one(heads, q_len, dim), one(kv_heads, k_len, dim), one(kv_heads, k_len, v_dim)


def setting_of(q: Tensor, k: Tensor, **mask: Any) -> Setting:
    return Setting(q.shape[1], k.shape[1], q.shape[2], k.shape[2], **mask)


def run(q: Tensor, k: Tensor, v: Tensor, form: Form, kernel: str | None, at: Setting, **operands: Any) -> Any:
    return ops.attention(
        q, k, v, operands.get("key_padding"), operands.get("documents"), operands.get("bias"), operands.get("seed"),
        str(form), at.causal, at.left, at.right, at.q_offset, SCALE, operands.get("softcap"),
        operands.get("dropout_p", 0.0), kernel,
    )  # fmt: skip


def refuses(kernel: str, form: Form, q: Tensor, k: Tensor, v: Tensor, at: Setting, **operands: Any) -> bool:
    """A kernel that can't compute a case must say so when it is asked for by name."""
    try:
        run(q, k, v, form, kernel, at, **operands)
    except KernelError as error:
        if f"kernel {kernel!r} can't compute this attention: " not in str(error):
            raise
        return True
    return False


def expected(
    q: Tensor, k: Tensor, v: Tensor, form: Form, at: Setting, dtype: torch.dtype = torch.float64, **operands: Any
) -> tuple[Tensor, Tensor]:
    count = torch.from_numpy(counts(form, at))[None]
    if operands.get("documents") is not None:
        rows = operands["documents"].tolist()
        count = torch.stack([torch.from_numpy(counts(form, at, row)) for row in rows])
    if operands.get("key_padding") is not None:
        count = count * operands["key_padding"][:, None, None]
    bias = operands.get("bias")
    if bias is not None:
        # A pair that the bias hides is none; the derivative of a softmax by minus infinity is not a number.
        hidden = bias == -torch.inf
        count, bias = count * ~hidden, bias.masked_fill(hidden, 0)
    out, lse = softmax(
        q.to(dtype), k.to(dtype), v.to(dtype), count, SCALE, operands.get("softcap"),
        None if bias is None else bias.to(dtype),
    )  # fmt: skip
    return out * output_scale(form), lse


def assert_as_good_as_eager(found: Tensor, eager: Tensor, exact: Tensor, dtype: torch.dtype) -> None:
    """The error is at most twice that of eager attention in the same dtype, and a rounding of the result."""
    assert not found.isnan().any()
    finite = exact.isfinite()
    assert torch.equal(found.isfinite(), finite)
    found, eager, exact = (x.double()[finite] for x in (found, eager, exact))
    size = exact.abs().max() if exact.numel() else torch.tensor(1.0)
    rounding = torch.finfo(dtype).eps * size
    assert (found - exact).abs().max() <= 2 * (eager - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_explicit_softmax(kernel: str, form: Form, causal: bool, dtype: torch.dtype) -> None:
    q, k, v = drawn(kv_heads=4 if kernel == "sdpa" else 2, dtype=dtype)
    at = setting_of(q, k, causal=causal)
    if refuses(kernel, form, q, k, v, at):
        return
    out, lse = run(q, k, v, form, kernel, at)
    exact_out, exact_lse = expected(q, k, v, form, at)
    eager_out, eager_lse = expected(q, k, v, form, at, dtype)
    assert out.dtype == dtype
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_as_good_as_eager(out, eager_out, exact_out, dtype)
    assert_as_good_as_eager(lse, eager_lse, exact_lse, dtype)


OPERANDS: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "shared"},
    {"documents": "own"},
    {"bias": (2, 4, 37, 37)},
    {"bias": (4, 1, 37)},
    {"bias": (37, 1), "softcap": 1.5, "key_padding": True, "documents": "own"},
]


def operands_of(asked: dict[str, Any], batch: int = 2, length: int = 37) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    made = dict(asked)
    if asked.get("key_padding"):
        keep = torch.rand(batch, length, generator=generator) > 0.4
        keep[0, :5] = False
        made["key_padding"] = keep
    if asked.get("documents"):
        rows = 1 if asked["documents"] == "shared" else batch
        made["documents"] = (torch.rand(rows, length, generator=generator) > 0.93).cumsum(1)
    if asked.get("bias"):
        made["bias"] = torch.randn(asked["bias"], generator=generator, dtype=torch.float64).requires_grad_()
    return made


def loss_of(out: Tensor, lse: Tensor, with_lse: bool) -> Tensor:
    """A scalar of all outputs with fixed random weights; -inf rows have no gradient."""
    generator = torch.Generator().manual_seed(5)
    loss = (out.double() * torch.randn(out.shape, generator=generator, dtype=torch.float64)).sum()
    if with_lse:
        finite = torch.where(lse.isfinite(), lse, 0).double()
        loss = loss + (finite * torch.randn(lse.shape, generator=generator, dtype=torch.float64)).sum()
    return loss


@pytest.mark.parametrize("asked", [{}, {"lse": True}, *OPERANDS, {"lse": True, "key_padding": True}], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_output_and_every_gradient(kernel: str, form: Form, causal: bool, asked: dict[str, Any]) -> None:
    asked = dict(asked)
    with_lse = asked.pop("lse", False)
    operands = operands_of(asked)
    q, k, v = (x.requires_grad_() for x in drawn(kv_heads=4 if kernel == "sdpa" else 2))
    at = setting_of(q, k, causal=causal)
    if refuses(kernel, form, q, k, v, at, **operands):
        return
    wanted = [q, k, v] + ([operands["bias"]] if "bias" in operands else [])
    found, exact = run(q, k, v, form, kernel, at, **operands), expected(q, k, v, form, at, **operands)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-12)
    grads, exact_grads = (torch.autograd.grad(loss_of(*pair, with_lse), wanted) for pair in (found, exact))
    for grad, exact_grad in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[6]], ids=str)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_gradients_in_low_precision(kernel: str, form: Form, dtype: torch.dtype) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(kv_heads=4 if kernel == "sdpa" else 2, dtype=dtype))
    at = setting_of(q, k, causal=True)
    if refuses(kernel, form, q, k, v, at):
        return
    found = torch.autograd.grad(loss_of(*run(q, k, v, form, kernel, at), True), (q, k, v))
    eager = torch.autograd.grad(loss_of(*expected(q, k, v, form, at, dtype), True), (q, k, v))
    exact_inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    exact = torch.autograd.grad(loss_of(*expected(*exact_inputs, form, at), True), exact_inputs)
    for grad, eager_grad, exact_grad in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(grad, eager_grad, exact_grad, dtype)


@pytest.mark.parametrize("scale", [-0.3, 0.0, -1e-60])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[1], FORMS[3], FORMS[6]], ids=str)
@pytest.mark.parametrize("kernel", ON_CPU)
def test_a_scale_that_is_not_above_zero(kernel: str, form: Form, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """ATen's flash ops hide pairs before they scale, so that such a scale gives NaN or shows what is hidden."""
    monkeypatch.setattr(sys.modules[__name__], "SCALE", scale)
    for causal in (False, True):
        for asked in ({"lse": True}, {"softcap": 2.0}, {"key_padding": True}):
            test_output_and_every_gradient(kernel, form, causal, asked)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            test_explicit_softmax(kernel, form, causal, dtype)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        test_gradients_in_low_precision(kernel, form, dtype)


def assert_grads(kernel: str | None, form: Form, at: Setting, q: Tensor, k: Tensor, v: Tensor, **operands: Any) -> None:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if operands.get("bias") is not None:
        operands["bias"] = operands["bias"].detach().requires_grad_()
    found, exact = run(*leaves, form, kernel, at, **operands), expected(*leaves, form, at, **operands)
    leaves += [operands["bias"]] if operands.get("bias") is not None else []
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[1], exact[1], rtol=0, atol=1e-12)
    pairs = [torch.autograd.grad(loss_of(*pair, True), leaves) for pair in (found, exact)]
    for grad, exact_grad in zip(*pairs, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 29])
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
@pytest.mark.parametrize("kernel", ["native", "cpu"])
def test_ragged_lengths(kernel: str, form: Form, length: int) -> None:
    q, k, v = drawn(batch=1, q_len=length, k_len=length)
    for causal in (False, True):
        assert_grads(kernel, form, setting_of(q, k, causal=causal), q, k, v)


@pytest.mark.parametrize(
    "mask",
    [
        {"causal": True, "left": 6},
        {"left": 6, "right": 3},
        {"causal": True, "right": -1},
        {"left": 4},
        {"right": 2},
        {"causal": True, "q_offset": 10},
        {"q_offset": -3, "causal": True},
        {"q_offset": -3},
    ],
    ids=str,
)
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_the_sites_own_window_and_offsets(form: Form, mask: dict[str, Any]) -> None:
    q, k, v = drawn(batch=1, q_len=23, k_len=31)
    for kernel in ("native", "cpu", "reference"):
        assert_grads(kernel, form, setting_of(q, k, **mask), q, k, v)


@pytest.mark.parametrize("layout", ["contiguous", "heads last", "gaps"])
@pytest.mark.parametrize("form", FORMS[:6], ids=str)
def test_layouts(form: Form, layout: str) -> None:
    q, k, v = drawn(layout=layout, q_len=32, k_len=32)
    assert_grads(None, form, setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_head_sizes_may_differ(kernel: str) -> None:
    q, k, v = drawn(v_dim=5)
    assert_grads(kernel, FORMS[3], setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 2), (6, 3), (6, 6)])
@pytest.mark.parametrize("form", [FORMS[3], FORMS[4], FORMS[6], FORMS[9]], ids=str)
def test_grouped_query_heads(form: Form, heads: int, kv_heads: int) -> None:
    q, k, v = drawn(heads=heads, kv_heads=kv_heads, q_len=21, k_len=21)
    assert_grads("cpu", form, setting_of(q, k, causal=True), q, k, v)


def assert_gradients_in_any_layout(kernel: str, q_len: int = 37) -> None:
    """What comes in may be expanded, transposed or a part of something: the same as if it lay dense."""
    q, k, v = (x.requires_grad_() for x in drawn(q_len=q_len, k_len=q_len))
    out, lse = run(q, k, v, FORMS[3], kernel, setting_of(q, k, causal=True))
    batch, heads, rows, dim = out.shape
    for grad_out, grad_lse in (
        (torch.randn(rows, dim, heads, batch, dtype=out.dtype).permute(3, 2, 0, 1), torch.randn_like(lse.mT).mT),
        (torch.randn(1, heads, 1, 1, dtype=out.dtype).expand_as(out), torch.randn((), dtype=lse.dtype).expand_as(lse)),
        (
            torch.randn(batch, heads, rows, 2 * dim, dtype=out.dtype)[..., ::2],
            torch.randn(batch, heads, rows + 3).double()[..., 3:],
        ),
    ):
        found = torch.autograd.grad((out, lse), (q, k, v), (grad_out, grad_lse), retain_graph=True)
        dense = [x.clone(memory_format=torch.contiguous_format) for x in (grad_out, grad_lse)]
        wanted = torch.autograd.grad((out, lse), (q, k, v), dense, retain_graph=True)
        for one, other in zip(found, wanted, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_gradients_that_come_in_any_layout(kernel: str) -> None:
    assert_gradients_in_any_layout(kernel)


@pytest.mark.parametrize("sizes", [{"q_len": 0}, {"k_len": 0}, {"batch": 0}, {"dim": 0}, {"v_dim": 0}], ids=str)
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[1], FORMS[10]], ids=str)
@pytest.mark.parametrize("kernel", [None, "native", "cpu", "reference"])
def test_dims_of_no_size(kernel: str | None, form: Form, sizes: dict[str, int]) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(**{"q_len": 9, "k_len": 9, **sizes}))
    at = setting_of(q, k, causal=True)
    bias = torch.randn(at.q_len, at.k_len, dtype=torch.float64).requires_grad_()
    for operands in ({}, {"bias": bias}):
        out, lse = run(q, k, v, form, kernel, at, **operands)
        grads = torch.autograd.grad(loss_of(out, lse, True), (q, k, v, *operands.values()))
        exact = run(q, k, v, form, "reference", at, **operands)
        exact_grads = torch.autograd.grad(loss_of(*exact, True), (q, k, v, *operands.values()))
        for found, true in zip((out, lse, *grads), (*exact, *exact_grads), strict=True):
            torch.testing.assert_close(found, true, rtol=0, atol=1e-12)
        if not at.k_len:
            assert not out.any()
            assert bool((lse == -torch.inf).all())


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_values_of_one_give_one(form: Form) -> None:
    q, k, v = drawn()
    out, lse = run(q, k, torch.ones_like(v), form, None, setting_of(q, k, causal=True))
    scale = output_scale(form)
    assert torch.allclose(out, torch.where(lse.isfinite(), scale, 0.0)[..., None].expand_as(out).double())


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_perturbing_a_key_changes_the_relations_rows(form: Form, kernel: str) -> None:
    q, k, v = drawn(batch=1)
    for causal in (False, True):
        at = setting_of(q, k, causal=causal)
        before, _ = run(q, k, v, form, kernel, at)
        count = counts(form, at)
        for key in (0, 9, 20, 36):
            moved = v.clone()
            moved[:, :, key] += 1.0
            changed = (run(q, k, moved, form, kernel, at)[0] != before).any(-1)[0]
            assert np.array_equal(changed.numpy(), count[:, :, key] > 0)


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_the_future_changes_no_past_row(form: Form) -> None:
    q, k, v = drawn()
    at = setting_of(q, k, causal=True)
    before, _ = run(q, k, v, form, None, at)
    k[:, :, 20:], v[:, :, 20:] = 7.0, 7.0
    after, _ = run(q, k, v, form, None, at)
    assert torch.equal(before[:, :, :20], after[:, :, :20])


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_permuting_heads_and_batch_permutes_the_output(form: Form) -> None:
    q, k, v = drawn(batch=3, kv_heads=4)
    at = setting_of(q, k, causal=True)
    out, _ = run(q, k, v, form, None, at)
    order = [2, 0, 1]
    moved, _ = run(q[order], k[order], v[order], form, None, at)
    torch.testing.assert_close(moved, out[order], rtol=0, atol=1e-13)
    if isinstance(form, Dilated) and (form.heads == "grouped" or form.offset in ("head_mod", "head_block")):
        return
    if "by_head" in str(form):
        return
    order = [3, 1, 0, 2]
    moved, _ = run(q[:, order], k[:, order], v[:, order], form, None, at)
    torch.testing.assert_close(moved, out[:, order], rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", [f for f in ALL_FORMS if "seq" not in str(f)], ids=str)
def test_decode_and_chunked_prefill_are_rows_of_the_prefill(form: Form) -> None:
    q, k, v = drawn()
    whole, whole_lse = run(q, k, v, form, None, setting_of(q, k, causal=True))
    for start, stop in [(0, 1), (8, 9), (16, 17), (36, 37), (0, 20), (20, 37), (13, 30)]:
        rows, keys = q[:, :, start:stop], slice(0, stop)
        at = setting_of(rows, k[:, :, keys], causal=True, q_offset=start)
        out, lse = run(rows, k[:, :, keys], v[:, :, keys], form, None, at)
        torch.testing.assert_close(out, whole[:, :, start:stop], rtol=0, atol=1e-13)
        torch.testing.assert_close(lse, whole_lse[:, :, start:stop], rtol=0, atol=1e-13)


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_the_density_reported_is_the_density_executed(form: Form) -> None:
    """With equal scores the LSE is the log of the number of keys: their sum is what the relation reports."""
    q, k, v = drawn(batch=1)
    at = setting_of(q, k, causal=True)
    _, lse = run(torch.zeros_like(q), k, v, form, "cpu", at)
    problem = Problem(1, at.heads, at.kv_heads, at.q_len, at.k_len, 8, 8, 0, True)
    relation = form.relation(problem)
    assert round(float(lse.exp().sum())) == relation.pairs()
    assert relation.density() == pytest.approx(counts(form, at).sum() / (at.heads * at.q_len * at.k_len))


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_a_second_call_a_copy_and_a_pickle_behave_the_same(form: Form, kernel: str) -> None:
    q, k, v = drawn(batch=1)
    at = setting_of(q, k, causal=True)
    first = run(q, k, v, form, kernel, at)[0]
    for again in (form, copy.deepcopy(form), pickle.loads(pickle.dumps(form)), parse_form(str(form))):
        assert torch.equal(run(q, k, v, again, kernel, at)[0], first)


@pytest.mark.parametrize("form", ALL_FORMS, ids=str)
def test_dropout_depends_on_positions_only(form: Form) -> None:
    q, k, v = (x.requires_grad_() for x in drawn())
    at, operands = setting_of(q, k, causal=True), {"dropout_p": 0.3, "seed": torch.tensor([11])}
    results = [run(q, k, v, form, kernel, at, **operands) for kernel in ("reference", "cpu", "native")]
    grads = [torch.autograd.grad(loss_of(*result, True), (q, k, v)) for result in results]
    for found, found_grads in zip(results[1:], grads[1:], strict=True):
        for one, other in zip((*results[0], *grads[0]), (*found, *found_grads), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)
    assert not torch.equal(results[0][0], run(q, k, v, form, "reference", at)[0])
    rows = q[:, :, 20:]
    for kernel in ("cpu", "native"):
        part = run(rows, k, v, form, kernel, replace(at, q_len=17, q_offset=20), **operands)[0]
        torch.testing.assert_close(part, results[0][0][:, :, 20:], rtol=0, atol=1e-12)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=2, q_len=400, k_len=400)
    at, seed = setting_of(q, k), torch.tensor([5])
    out, _ = run(torch.zeros_like(q), k, torch.ones_like(v), Dense(), "reference", at, dropout_p=0.25, seed=seed)
    # Each row averages 400 draws of variance p / (1 - p); 800 rows.
    assert abs(float(out.mean()) - 1) < 5 * (0.25 / 0.75 / (400 * 800)) ** 0.5


@pytest.mark.parametrize("union", ["multiset", "set"])
@pytest.mark.parametrize("kernel", ["cpu", "reference"])
def test_a_detached_merge_has_the_gradient_of_constant_weights(kernel: str, union: str) -> None:
    form = Dilated([8, 16], [1, 2], union=union, sinks=1, merge_grad="detach")
    q, k, v = (x.requires_grad_() for x in drawn())
    at = setting_of(q, k, causal=True)
    parts, before = [], np.zeros((4, 37, 37), dtype=np.int64)
    for some in (replace(form, segments=(8,), rates=(1,), sinks=0), replace(form, sinks=0), form):
        count = counts(some, at)
        parts.append(softmax(q, k, v, torch.from_numpy(count - before)[None], SCALE))
        before = count
    joint = torch.logsumexp(torch.stack([lse for _, lse in parts]), 0)
    out = sum((lse - joint).exp().nan_to_num(0.0).detach()[..., None] * part for part, lse in parts)
    found = run(q, k, v, form, kernel, at)
    torch.testing.assert_close(found[0], out, rtol=0, atol=1e-12)
    grads, wanted = (torch.autograd.grad(loss_of(x, found[1], False), (q, k, v)) for x in (found[0], out))
    for grad, exact in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, exact, rtol=0, atol=1e-11)


def test_merging_is_safe_where_either_side_is_empty() -> None:
    from dilcompile.lowering.merge import merge_into

    empty, full = -torch.inf, 100.0
    out, lse = torch.zeros(4, 1), torch.tensor([empty, empty, full, -full])
    out[2:] = 2.0
    merge_into(out, lse, torch.tensor([[0.0], [3.0], [0.0], [3.0]]), torch.tensor([empty, 1.0, empty, full]), False)
    assert out.flatten().tolist() == [0.0, 3.0, 2.0, 3.0]
    assert lse.tolist() == [empty, 1.0, full, full]


def test_uninitialised_memory_never_shows() -> None:
    q, k, v = drawn()
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for form in ALL_FORMS:
            for operands in ({}, operands_of({"key_padding": True}), {"softcap": 2.0}):
                for kernel in ("native", "cpu"):
                    assert not run(q, k, v, form, kernel, setting_of(q, k, causal=True), **operands)[0].isnan().any()
    finally:
        torch.use_deterministic_algorithms(False)


def test_choosing_a_kernel() -> None:
    q, k, v = drawn(kv_heads=4)
    at = setting_of(q, k)
    with pytest.raises(
        KernelError,
        match="kernel 'quick' is unknown; the kernels are native, sdpa, flash_band, triton, flash_attn, cudnn, efficient, ",
    ):
        run(q, k, v, Dense(), "quick", at)
    with pytest.raises(KernelError, match="kernel 'sdpa' can't compute this attention: softcap; kernel 'native' can"):
        run(q, k, v, Dense(), "sdpa", at, softcap=1.0)
    with pytest.raises(KernelError, match="kernel 'flash' can't compute this attention: the tensors are on cpu"):
        run(q, k, v, Dense(), "flash", at)
    with pytest.raises(KernelError, match="kernel 'triton' can't compute this attention: the tensors are on cpu, not on a CUDA"):
        run(q, k, v, Dense(), "triton", at)
    with pytest.raises(KernelError, match="not every key"):
        run(q, k, v, SlidingWindow(4), "sdpa", at)


# Each mutation is a mistake that has been made in some implementation; the checks above must notice it.


def without_lse_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    def equal(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, fresh: bool, space: Any = None) -> None:
        out.copy_(part) if fresh else out.lerp_(part, 0.5)
        lse.copy_(part_lse if fresh else torch.logaddexp(lse, part_lse))

    monkeypatch.setattr(views, "merge_into", equal)


def with_heads_and_positions_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    right = strided.key_operand
    monkeypatch.setattr(
        views, "key_operand", lambda x: replace(right(x), head=right(x).key, key=right(x).head) if x.shape[1] > 1 else right(x)
    )


def with_segments_one_rate_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pieces._strip

    def longer(generator: Any, problem: Problem) -> Any:
        strip = right(generator, problem)
        return replace(strip, length=None if strip.length is None else strip.length + strip.rate)

    monkeypatch.setattr(pieces, "_strip", longer)


def without_causality(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pieces._strip
    monkeypatch.setattr(pieces, "_strip", lambda generator, problem: replace(right(generator, problem), right=None))


def with_the_wrong_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    right = pieces._strip

    def shifted(generator: Any, problem: Problem) -> Any:
        strip = right(generator, problem)
        residues = None if strip.residues is None else tuple((c + 1) % strip.rate for c in strip.residues)
        return replace(strip, residues=residues)

    monkeypatch.setattr(pieces, "_strip", shifted)


def with_shared_keys_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "uncounted", lambda relation, term, where: torch.ones((), dtype=torch.bool))


def without_the_last_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    right = views.plan

    def shorter(relation: Relation, first: int, last: int) -> pieces.Plan:
        whole = right(relation, first, last)
        return replace(whole, pieces=whole.pieces[:-1])

    monkeypatch.setattr(views, "plan", shorter)


def without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = views._part
    monkeypatch.setattr(views, "_part", lambda call, region: replace(right(call, region), padding=None))


def without_the_joint_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    from dilcompile.lowering import cpu

    monkeypatch.setattr(cpu, "finite_for_backward", lambda lse: torch.where(lse.isfinite(), lse - 0.1, torch.inf))


def without_the_lse_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "_with_lse_as_head_dim", lambda call, joint, space: (call, replace(joint, grad_lse=None)))


def with_overlapping_tiles_added_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(target: Tensor, grad: Tensor, turns: Any) -> None:
        target.copy_(target + grad)

    monkeypatch.setattr(strided, "_add_in_turns", at_once)


def with_documents_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    right = views._documents
    monkeypatch.setattr(views, "_documents", lambda call: right(replace(call, documents=None)))


MUTATIONS: list[Callable[[pytest.MonkeyPatch], None]] = [
    without_lse_weight,
    with_heads_and_positions_swapped,
    with_segments_one_rate_longer,
    without_causality,
    with_the_wrong_residue,
    with_shared_keys_counted_again,
    without_the_last_piece,
    without_padding,
    without_the_joint_lse,
    without_the_lse_gradient,
    with_overlapping_tiles_added_at_once,
    with_documents_joined,
]


def check_everything() -> None:
    q, k, v = drawn(kv_heads=4)
    at = setting_of(q, k, causal=True)
    operands = operands_of({"key_padding": True, "documents": "own"})
    for form in (FORMS[1], FORMS[3], FORMS[7]):
        assert_grads("cpu", form, at, q, k, v)
    assert_grads("cpu", FORMS[3], at, q, k, v, **operands)


def test_the_check_passes_without_a_mutation() -> None:
    check_everything()


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_every_mutation_is_noticed(mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    mutation(monkeypatch)
    pieces.plan.cache_clear()
    with pytest.raises((AssertionError, RuntimeError)):
        check_everything()


def test_every_kernel_is_in_the_matrix() -> None:
    assert set(ON_CPU) | ON_CUDA == set(select.KERNELS)


def test_policies_know_every_kernel_by_name() -> None:
    assert tuple(select.KERNELS) == KERNEL_NAMES


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_a_bias_that_hides_every_key_with_a_finite_fill_gives_the_mean(kernel: str) -> None:
    """float32 can't hold finfo.min + log(number of keys), so the LSE alone would give the sum of the values."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 16) for _ in range(3))
    bias = torch.randn(1, 2, 12, 12)
    bias[:, :, 5] = torch.finfo(torch.float32).min
    out, _ = torch.ops.dilcompile.attention(
        q, k, v, None, None, bias, None, "dense()", False, None, None, 0, 0.25, None, 0.0, kernel
    )  # fmt: skip
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias))
    torch.testing.assert_close(out[:, :, 5], v.mean(2))


@pytest.mark.parametrize("fill", [torch.finfo(torch.float32).min, -1e9, -1e4])
@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_such_a_row_gives_every_value_its_share_of_the_gradient(kernel: str, fill: float) -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 12, 16).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 2, 12, 12)
    bias[:, :, 5] = fill
    weight = torch.randn(1, 2, 12, 16)
    found, _ = torch.ops.dilcompile.attention(
        q, k, v, None, None, bias, None, "dense()", False, None, None, 0, 0.25, None, 0.0, kernel
    )  # fmt: skip
    plain = ((q @ k.mT) * 0.25 + bias).softmax(-1) @ v
    for mine, theirs in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (found, plain)), strict=True):
        torch.testing.assert_close(mine, theirs)
