"""The kernels on a CUDA device, against float64: every form, dtype and head size, addresses beyond 32 bits, graphs, streams.

``make gpu`` runs these (``pytest --gpu``). With ``TRITON_INTERPRET=1`` and no device they run in Triton's interpreter, which shows
that the tests themselves are sound.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import Setting
from test_kernels import FORMS, SCALE, assert_as_good_as_eager, drawn, expected, loss_of, operands_of, refuses, run, setting_of
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dilcompile.distributed import simulate
from dilcompile.forms import BlockSparse, Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import ops
from dilcompile.lowering.choice import contest
from dilcompile.lowering.select import KERNELS, RIVALS
from dilcompile.lowering.triton import tiles
from dilcompile.memory.pool import ArenaPool
from dilcompile.passes.memory.plan_buffers import plan_graph
from dilcompile.planned import PlannedCall

pytestmark = pytest.mark.gpu
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
on_device_only = pytest.mark.skipif(DEVICE == "cpu", reason="asks for the device itself")
LENGTH = 333 if DEVICE == "cuda" else 45
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# FlexAttention is compiled for each case; on a CPU it has no backward.
LEFT_OUT = {"native"} if DEVICE == "cuda" else {"native", "flex"}
# Segments that cross tiles of 128 rows.
WIDE = Dilated([64, 256], [1, 2])
# Lists that all heads share, and a list for each.
SHARED: dict[str, Any] = {"any": [{"local": {"before": 1}}, {"global": {"columns": 1, "rows": 1}}]}
BY_HEAD: dict[str, Any] = {"any": [{"local": {}}, {"random": {"blocks": 2, "by_head": True}}]}
BLOCKS = [*(BlockSparse(block, SHARED) for block in (16, 64, 128, (128, 32), (16, 256))), BlockSparse((40, 24), BY_HEAD)]


def inputs_of(dim: int, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v whose scores are of the size that a model's are: ``run`` scales by ``SCALE`` for every head size."""
    q, k, v = drawn(dim=dim, **more)
    return q * (dim**-0.5 / SCALE), k, v


def there(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


def results(
    call: Callable[..., tuple[Tensor, Tensor]], inputs: tuple[Tensor, ...], *arguments: Any, **operands: Any
) -> tuple[Tensor, ...]:
    """Output, LSE and the gradients of all inputs and of the bias, on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    given = list(leaves)
    if operands.get("bias") is not None:
        operands["bias"] = operands["bias"].detach().requires_grad_()
        leaves.append(operands["bias"])
    out, lse = (x.cpu() for x in call(*given, *arguments, **operands))
    return (out.detach(), lse.detach(), *(x.cpu() for x in torch.autograd.grad(loss_of(out, lse, True), leaves)))


def check(kernel: str, form: Form, inputs: tuple[Tensor, ...], at: Setting, **operands: Any) -> None:
    """No error is larger than twice that of eager attention in the same dtype."""
    dtype = inputs[0].dtype
    placed = {name: there(value) for name, value in operands.items()}
    found = results(run, tuple(x.to(DEVICE) for x in inputs), form, kernel, at, **placed)
    eager = results(expected, inputs, form, at, dtype, **operands)
    exact = results(expected, tuple(x.double() for x in inputs), form, at, **operands)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", [*FORMS, WIDE, SlidingWindow(150, sinks=3)], ids=str)
@pytest.mark.parametrize("kernel", [name for name in KERNELS if name not in LEFT_OUT])
def test_every_form(kernel: str, form: Form, causal: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(
        kv_heads=4 if kernel in ("sdpa", "flash", "efficient") else 2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=dtype
    )
    at = setting_of(inputs[0], inputs[1], causal=causal)
    if kernel not in ("triton", "reference") and refuses(kernel, form, *(x.to(DEVICE) for x in inputs), at):
        return
    check(kernel, form, inputs, at)


FLEX: list[tuple[Form, dict[str, Any], dict[str, Any]]] = [
    (BLOCKS[1], {"causal": True}, {"key_padding": True}),
    (BLOCKS[2], {}, {"softcap": 2.0}),
    (BLOCKS[3], {"causal": True}, {}),
    (BLOCKS[-1], {"causal": True}, {"key_padding": True}),
    (Dense(), {"causal": True}, {"documents": "own", "softcap": 1.5}),
    (SlidingWindow(LENGTH // 5), {"causal": True}, {"documents": "shared"}),
]


@on_device_only
@pytest.mark.parametrize(("form", "mask", "asked"), FLEX, ids=str)
def test_flexattention_takes_blocks_and_operands(form: Form, mask: dict[str, Any], asked: dict[str, Any]) -> None:
    inputs = inputs_of(kv_heads=2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    check("flex", form, inputs, setting_of(inputs[0], inputs[1], **mask), **operands_of(asked, length=LENGTH))


@on_device_only
@pytest.mark.parametrize("rows", [1, 100])
def test_flexattention_of_few_queries(rows: int) -> None:
    inputs = inputs_of(kv_heads=2, q_len=rows, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    check("flex", BLOCKS[1], inputs, setting_of(inputs[0], inputs[1], causal=True, q_offset=LENGTH - rows))


@on_device_only
@pytest.mark.parametrize("dim", [32, 80, 128, 256])
def test_flexattention_of_every_head_size(dim: int) -> None:
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=LENGTH, k_len=LENGTH, dim=dim, v_dim=dim, dtype=torch.bfloat16)
    check("flex", BLOCKS[2], inputs, setting_of(inputs[0], inputs[1], causal=True))


@on_device_only
def test_flexattention_with_a_bias_that_is_not_trained() -> None:
    inputs = inputs_of(kv_heads=2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    at, bias = setting_of(inputs[0], inputs[1], causal=True), torch.randn(1, 4, LENGTH, LENGTH)
    found = run(*map(there, inputs), BLOCKS[1], "flex", at, bias=there(bias))
    check_step(BLOCKS[1], inputs, at, tuple(x.cpu() for x in found), bias=bias)


# One launch of a flash op of torch, cuDNN or the package flash_attn, where that is installed.
ONE_LAUNCH = ("flash_band", "flash_attn", "cudnn", "efficient")
CHUNK = LENGTH // 3
BANDS: dict[str, tuple[Form, dict[str, Any], int]] = {
    "every key": (Dense(), {}, LENGTH),
    "causal": (Dense(), {"causal": True}, LENGTH),
    "causal window": (SlidingWindow(LENGTH // 4), {"causal": True}, LENGTH),
    "window": (SlidingWindow(LENGTH // 4), {}, LENGTH),
    "the site's window": (Dense(), {"left": 70, "right": 20}, LENGTH),
    "a chunk at the end": (Dense(), {"causal": True, "q_offset": LENGTH - CHUNK}, CHUNK),
    "a chunk in the middle": (SlidingWindow(LENGTH // 5), {"causal": True, "q_offset": LENGTH // 4}, CHUNK),
    "causal from the first key, fewer queries than keys": (Dense(), {"causal": True}, CHUNK),
    "one query": (Dense(), {"causal": True, "q_offset": LENGTH - 1}, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kv_heads", "dim"), [(4, 64), (2, 64), (1, 128), (4, 128), (2, 256), (4, 80)])
@pytest.mark.parametrize("wanted", BANDS)
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_one_launch(kernel: str, wanted: str, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
    form, mask, rows = BANDS[wanted]
    inputs = inputs_of(kv_heads=kv_heads, q_len=rows, k_len=LENGTH, dim=dim, v_dim=dim, dtype=dtype)
    at = setting_of(inputs[0], inputs[1], **mask)
    if refuses(kernel, form, *(x.to(DEVICE) for x in inputs), at):
        return
    check(kernel, form, inputs, at)


@pytest.mark.parametrize("whose", ["shared", "own"])
@pytest.mark.parametrize("form", [Dense(), SlidingWindow(LENGTH // 5)], ids=str)
@pytest.mark.parametrize("kernel", ONE_LAUNCH)
def test_packed_documents_in_one_launch(kernel: str, form: Form, whose: str) -> None:
    inputs = inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    operands = operands_of({"documents": whose}, length=LENGTH)
    at = setting_of(inputs[0], inputs[1], causal=True)
    placed = {name: there(value) for name, value in operands.items()}
    if refuses(kernel, form, *(x.to(DEVICE) for x in inputs), at, **placed):
        return
    check(kernel, form, inputs, at, **operands)


@on_device_only
def test_torchs_flash_op_takes_what_it_should() -> None:
    """That the tests above skip nothing of it."""
    for form, mask, rows in BANDS.values():
        q, k, v = inputs_of(q_len=rows, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
        assert not refuses("flash_band", form, *map(there, (q, k, v)), setting_of(q, k, **mask))


@on_device_only
@pytest.mark.filterwarnings("ignore::dilcompile.errors.DilcompileWarning")
@pytest.mark.parametrize("form", [Dense(), SlidingWindow(512), WIDE], ids=str)
def test_the_clock_decides(form: Form) -> None:
    """All that can compute a call were timed, the fastest is taken, and its numbers are right."""
    contest.forget()
    inputs = inputs_of(heads=4, kv_heads=4, q_len=1500, k_len=1500, dim=64, v_dim=64, dtype=torch.bfloat16)
    q, k, v = (there(x).requires_grad_() for x in inputs)
    at = setting_of(q, k, causal=True)
    out, _ = run(q, k, v, form, None, at)
    torch.autograd.grad(out.sum(), (q, k, v))
    forward, backward = contest._times.values()
    able = {name for name in RIVALS["cuda"] if not refuses(name, form, q.detach(), k.detach(), v.detach(), at)}
    assert set(forward) == able
    assert {"triton", "flash"} <= set(backward)
    assert all(0 < seconds < 1 for times in (forward, backward) for seconds in times.values())
    # Two digits of bfloat16: the kernels round their weights and outputs apart; each is held to float64 by itself above.
    torch.testing.assert_close(out, run(q, k, v, form, "triton", at)[0], rtol=2e-2, atol=2e-2)


@on_device_only
def test_tuned_tiles_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tiles.OPTION, "memory")
    tiles.forget()
    inputs = inputs_of(heads=4, kv_heads=2, q_len=1100, k_len=1100, dim=64, v_dim=64, dtype=torch.bfloat16)
    check("triton", WIDE, inputs, setting_of(inputs[0], inputs[1], causal=True))
    assert {kind.step for kind in tiles._chosen} == {"forward", "queries", "keys"}
    tiles.forget()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("dim", "v_dim"), [(32, 32), (64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256), (40, 24)]
)
def test_every_head_size(dim: int, v_dim: int, dtype: torch.dtype) -> None:
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=LENGTH, k_len=LENGTH, dim=dim, v_dim=v_dim, dtype=dtype)
    check("triton", WIDE, inputs, setting_of(inputs[0], inputs[1], causal=True))


OPERANDS: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "shared"},
    {"documents": "own"},
    {"softcap": 1.5, "key_padding": True, "documents": "own"},
]


@pytest.mark.parametrize("asked", OPERANDS, ids=str)
@pytest.mark.parametrize("form", [Dense(), WIDE, FORMS[6], FORMS[7]], ids=str)
def test_caps_padding_and_documents(form: Form, asked: dict[str, Any]) -> None:
    inputs = inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    check("triton", form, inputs, setting_of(inputs[0], inputs[1], causal=True), **operands_of(asked, length=LENGTH))


# One number a key, a key of each head, a pair, a pair of each batch row, a row.
BIASES = [(1, 1, 1, LENGTH), (1, 4, 1, LENGTH), (4, LENGTH, LENGTH), (2, 1, LENGTH, LENGTH), (2, 4, LENGTH, 1)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("form", [Dense(), WIDE, FORMS[7], FORMS[9], SlidingWindow(150, sinks=3)], ids=str)
@pytest.mark.parametrize("kernel", ["triton", "flash"])
def test_every_bias(kernel: str, form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """-inf in it hides pairs; its gradient is summed over what shares it."""
    inputs = inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=dtype)
    at = setting_of(inputs[0], inputs[1], causal=True)
    generator = torch.Generator().manual_seed(7)
    bias = torch.randn(shape, generator=generator).to(dtype)
    bias = bias.masked_fill(torch.rand(shape, generator=generator) < 0.2, -torch.inf)
    if kernel == "flash" and refuses(kernel, form, *(x.to(DEVICE) for x in inputs), at, bias=bias.to(DEVICE)):
        return
    check(kernel, form, inputs, at, bias=bias)


@pytest.mark.parametrize("asked", OPERANDS, ids=str)
@pytest.mark.parametrize("shape", BIASES[1:3], ids=str)
def test_a_bias_beside_caps_padding_and_documents(shape: tuple[int, ...], asked: dict[str, Any]) -> None:
    inputs = inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    at = setting_of(inputs[0], inputs[1], causal=True)
    check("triton", WIDE, inputs, at, bias=bias, **operands_of(asked, length=LENGTH))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 2), (17, 1), (3, 3)])
def test_grouped_query_heads(heads: int, kv_heads: int) -> None:
    inputs = inputs_of(batch=1, heads=heads, kv_heads=kv_heads, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.float32)
    check("triton", WIDE, inputs, setting_of(inputs[0], inputs[1], causal=True))


@pytest.mark.parametrize("length", [1, 16, 127, 128, 129])
@pytest.mark.parametrize(
    "mask", [{"causal": True}, {"causal": True, "left": 60}, {"q_offset": 25}, {"q_offset": -3, "causal": True}]
)
def test_lengths_windows_and_offsets(length: int, mask: dict[str, Any]) -> None:
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=length, k_len=length + 30, dim=64, v_dim=64, dtype=torch.float32)
    check("triton", WIDE, inputs, setting_of(inputs[0], inputs[1], **mask))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("form", BLOCKS, ids=str)
def test_blocks_of_any_size(form: Form, causal: bool, dtype: torch.dtype) -> None:
    inputs = inputs_of(batch=1, kv_heads=2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=dtype)
    check("triton", form, inputs, setting_of(inputs[0], inputs[1], causal=causal))


@pytest.mark.parametrize(("dim", "v_dim"), [(32, 32), (80, 80), (128, 128), (192, 128), (256, 256)])
@pytest.mark.parametrize("block", [16, 64, 128], ids=str)
def test_blocks_of_every_head_size(block: int, dim: int, v_dim: int) -> None:
    inputs = inputs_of(batch=1, heads=4, kv_heads=1, q_len=LENGTH, k_len=LENGTH, dim=dim, v_dim=v_dim, dtype=torch.bfloat16)
    check("triton", BlockSparse(block, SHARED), inputs, setting_of(inputs[0], inputs[1], causal=True))


@pytest.mark.parametrize("asked", OPERANDS, ids=str)
@pytest.mark.parametrize("form", [BLOCKS[0], BLOCKS[1], BLOCKS[-1]], ids=str)
def test_blocks_with_caps_padding_and_documents(form: Form, asked: dict[str, Any]) -> None:
    inputs = inputs_of(kv_heads=2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    at = setting_of(inputs[0], inputs[1], causal=True)
    check("triton", form, inputs, at, **operands_of(asked, length=LENGTH))


@pytest.mark.parametrize("shape", BIASES, ids=str)
@pytest.mark.parametrize("form", [BLOCKS[3], BLOCKS[-1]], ids=str)
def test_blocks_with_every_bias(form: Form, shape: tuple[int, ...]) -> None:
    inputs = inputs_of(kv_heads=2, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7))
    check("triton", form, inputs, setting_of(inputs[0], inputs[1], causal=True), bias=bias)


@pytest.mark.parametrize("mask", [{"q_offset": 25}, {"q_offset": -20, "causal": True}, {"causal": True, "left": 60}], ids=str)
def test_blocks_where_queries_are_not_the_keys(mask: dict[str, Any]) -> None:
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=LENGTH, k_len=LENGTH + 30, dim=64, v_dim=64, dtype=torch.float32)
    check("triton", BlockSparse(64, SHARED), inputs, setting_of(inputs[0], inputs[1], **mask))


# A decode step's keys: many blocks, and more parts than one.
CACHE = 2040 if DEVICE == "cuda" else 300
# Segments in which the last key stands far from the first.
DEEP = Dilated([512, 2048], [1, 4])


def decode_inputs(q_len: int = 1, **more: Any) -> tuple[tuple[Tensor, ...], Setting]:
    inputs = inputs_of(**{"batch": 2, "heads": 8, "kv_heads": 2, "dim": 64, "v_dim": 64, **more}, q_len=q_len, k_len=CACHE)
    return inputs, setting_of(inputs[0], inputs[1], causal=True, q_offset=CACHE - q_len)


def check_step(form: Form, inputs: tuple[Tensor, ...], at: Setting, found: tuple[Tensor, ...], **operands: Any) -> None:
    """Output and LSE of a step: no error is larger than twice that of eager attention in the same dtype."""
    dtype = inputs[0].dtype
    eager = expected(*inputs, form, at, dtype, **operands)
    exact = expected(*(x.double() for x in inputs), form, at, **operands)
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine.cpu(), theirs, true, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "form", [Dense(), SlidingWindow(500, sinks=4), DEEP, FORMS[7], BlockSparse(64, SHARED), BlockSparse(64, BY_HEAD)], ids=str
)
@pytest.mark.parametrize("q_len", [1, 5])
def test_a_decode_step(q_len: int, form: Form, dtype: torch.dtype) -> None:
    inputs, at = decode_inputs(q_len, dtype=dtype)
    check_step(form, inputs, at, run(*map(there, inputs), form, "triton", at))


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 128), (8, 1, 128), (64, 1, 128), (6, 2, 80), (2, 1, 256)])
def test_a_decode_step_of_any_group(heads: int, kv_heads: int, dim: int) -> None:
    inputs, at = decode_inputs(2, heads=heads, kv_heads=kv_heads, dim=dim, v_dim=dim, dtype=torch.bfloat16)
    check_step(DEEP, inputs, at, run(*map(there, inputs), DEEP, "triton", at))


@pytest.mark.parametrize("asked", OPERANDS, ids=str)
def test_a_decode_step_with_caps_padding_and_documents(asked: dict[str, Any]) -> None:
    inputs, at = decode_inputs(2, dtype=torch.bfloat16)
    operands = operands_of(asked, length=CACHE)
    placed = {name: there(value) for name, value in operands.items()}
    check_step(DEEP, inputs, at, run(*map(there, inputs), DEEP, "triton", at, **placed), **operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 8, 1, CACHE), (1, 1, 5, CACHE), (2, 8, 5, CACHE), (8, 5, 1)], ids=str)
@pytest.mark.parametrize("form", [Dense(), DEEP], ids=str)
def test_a_decode_step_with_a_bias(form: Form, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    inputs, at = decode_inputs(5, dtype=dtype)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(7)).to(dtype)
    bias[..., : CACHE // 3] -= 1e4 if shape[-1] > 1 else 0
    check_step(form, inputs, at, run(*map(there, inputs), form, "triton", at, bias=there(bias)), bias=bias)


@pytest.mark.parametrize("page_size", [16, 48])
def test_a_decode_step_over_pages(page_size: int) -> None:
    inputs, at = decode_inputs(dtype=torch.bfloat16)
    count = -(-CACHE // page_size)
    table = torch.randperm(2 * count + 3, generator=torch.Generator().manual_seed(0))[: 2 * count].view(2, count).int()
    pools = []
    for x in inputs[1:]:
        pool = torch.full((2 * count + 3, x.shape[1], page_size, x.shape[3]), torch.nan, dtype=x.dtype)
        padded = torch.nn.functional.pad(x, (0, 0, 0, count * page_size - CACHE), value=torch.nan)
        pool[table.long()] = padded.unflatten(2, (count, page_size)).transpose(1, 2)
        pools.append(pool)
    found = attention(
        *map(there, (inputs[0], *pools)), DEEP, is_causal=True, scale=SCALE, kernel="triton", return_lse=True,
        block_table=there(table), k_len=CACHE,
    )  # fmt: skip
    check_step(DEEP, inputs, at, found)


def test_a_decode_step_gives_the_same_numbers_every_time() -> None:
    inputs, at = decode_inputs(dtype=torch.bfloat16)
    for one, other in zip(*(run(*map(there, inputs), DEEP, "triton", at) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_dropout_draws_as_the_reference_does() -> None:
    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.float32)
    at = setting_of(inputs[0], inputs[1], causal=True)
    operands = {"dropout_p": 0.3, "seed": torch.tensor([(7 << 40) + 11])}
    placed = {name: there(value) for name, value in operands.items()}
    found = results(run, tuple(x.to(DEVICE) for x in inputs), WIDE, "triton", at, **placed)
    exact = results(run, tuple(x.double() for x in inputs), WIDE, "reference", at, **operands)
    eager = results(run, inputs, WIDE, "reference", at, **operands)
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, torch.float32)


def test_the_same_numbers_every_time() -> None:
    inputs = tuple(x.to(DEVICE) for x in inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16))
    at = setting_of(inputs[0], inputs[1], causal=True)
    for one, other in zip(*(results(run, inputs, WIDE, "triton", at) for _ in range(2)), strict=True):
        assert torch.equal(one, other)


def test_nothing_outside_the_tensors_is_read() -> None:
    """Operands that lie in not-a-number; compute-sanitizer watches this test where it is installed."""

    def framed(x: Tensor) -> Tensor:
        around = torch.full((x.shape[0] + 2, x.shape[1] + 2, x.shape[2] + 40, x.shape[3] + 8), torch.nan, dtype=x.dtype)
        around = around.to(DEVICE)
        return around[1:-1, 1:-1, 20:-20, : x.shape[3]].copy_(x)

    inputs = inputs_of(batch=1, heads=2, kv_heads=1, q_len=75, k_len=83, dim=40, v_dim=24, dtype=torch.float32)
    at = setting_of(inputs[0], inputs[1], causal=True)
    for form in (Dense(), FORMS[3], FORMS[7], BlockSparse((40, 24), BY_HEAD)):
        found = results(run, tuple(framed(x) for x in inputs), form, "triton", at)
        eager = results(expected, inputs, form, at, torch.float32)
        exact = results(expected, tuple(x.double() for x in inputs), form, at)
        for mine, theirs, true in zip(found, eager, exact, strict=True):
            assert_as_good_as_eager(mine, theirs, true, torch.float32)


@on_device_only
def test_offsets_beyond_32_bits() -> None:
    """Queries and outputs of more than 2**31 elements; rows at both ends against float64."""
    length, heads, dim, window = (1 << 22) + 3, 8, 64, 100
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": DEVICE, "generator": generator}
    q = torch.randn(1, length, heads, dim, **draw).transpose(1, 2)
    k, v = (torch.randn(1, 1, length, dim, **draw) for _ in range(2))
    at = setting_of(q, k, causal=True)
    out, lse = run(q, k, v, SlidingWindow(window), "triton", at)
    for begin in (0, length // 2, length - 300):
        rows, keys = slice(begin, begin + 300), slice(max(0, begin - window), begin + 300)
        part = setting_of(q[:, :, rows], k[:, :, keys], causal=True, q_offset=begin - keys.start)
        some = [x.cpu() for x in (q[:, :, rows], k[:, :, keys], v[:, :, keys])]
        exact = expected(*some, SlidingWindow(window), part)
        eager = expected(*some, SlidingWindow(window), part, torch.bfloat16)
        assert_as_good_as_eager(out[:, :, rows].cpu(), eager[0], exact[0], torch.bfloat16)
        assert_as_good_as_eager(lse[:, :, rows].cpu(), eager[1], exact[1], torch.bfloat16)


@on_device_only
def test_a_bias_of_more_than_32_bits() -> None:
    """Rows of the last head, whose numbers lie behind 2**31 others, forward and backward."""
    length, heads, dim, rows = 1 << 14, 9, 64, 40
    generator = torch.Generator(DEVICE).manual_seed(0)
    draw = {"dtype": torch.bfloat16, "device": DEVICE, "generator": generator}
    q, k, v = (torch.randn(1, h, length, dim, **draw) for h in (heads, 1, 1))
    bias = torch.randn(1, heads, length, length, **draw).requires_grad_()
    at = setting_of(q, k, causal=True)
    out, _ = run(q, k, v, SlidingWindow(100), "triton", at, bias=bias)
    (grad,) = torch.autograd.grad(out[:, -1, -rows:].sum(), bias)
    keys = slice(length - 200, length)
    some = [q[:, -1:, -rows:], k[:, :, keys], v[:, :, keys], bias.detach()[:, -1:, -rows:, keys]]
    part = setting_of(some[0], some[1], causal=True, q_offset=200 - rows)
    exact, eager = [x.cpu().double() for x in some], [x.cpu() for x in some]
    sides = []
    for values, dtype in ((eager, torch.bfloat16), (exact, torch.float64)):
        values[3].requires_grad_()
        found, _ = expected(*values[:3], SlidingWindow(100), part, dtype, bias=values[3])
        sides.append((found, torch.autograd.grad(found.sum(), values[3])[0]))
    mine = (out.detach()[:, -1:, -rows:].cpu(), grad[:, -1:, -rows:, keys].cpu())
    for one, theirs, true in zip(mine, *sides, strict=True):
        assert_as_good_as_eager(one, theirs, true, torch.bfloat16)
    assert not grad[:, :-1].any()


@on_device_only
def test_a_captured_graph_gives_the_same() -> None:
    q, k, v = (x.to(DEVICE) for x in inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16))
    attend = lambda: attention(q, k, v, WIDE, is_causal=True, kernel="triton")  # noqa: E731
    wanted = attend()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = attend()
    q.copy_(q.flip(0))
    graph.replay()
    assert torch.equal(found, attend())
    assert not torch.equal(found, wanted)


@on_device_only
def test_several_streams() -> None:
    inputs = [
        tuple(x.to(DEVICE) for x in inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, seed=n, dtype=torch.float16))
        for n in range(4)
    ]
    wanted = [attention(*qkv, WIDE, is_causal=True, kernel="triton") for qkv in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    found = []
    for stream, qkv in zip(streams, inputs, strict=True):
        with torch.cuda.stream(stream):
            found.append(attention(*qkv, WIDE, is_causal=True, kernel="triton"))
    torch.cuda.synchronize()
    for mine, theirs in zip(found, wanted, strict=True):
        assert torch.equal(mine, theirs)


@on_device_only
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_under_inductor(mode: str) -> None:
    q, k, v = (x.to(DEVICE) for x in inputs_of(q_len=LENGTH, k_len=LENGTH, dim=64, v_dim=64, dtype=torch.bfloat16))

    def layer(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = attention(2 * q, k, v, WIDE, is_causal=True, kernel="triton", return_lse=True)
        return out + 1, lse

    wanted = results(layer, (q, k, v))
    compiled = torch.compile(layer, fullgraph=True, mode=mode)
    # With CUDA graphs the first call warms up, the second records, the third replays.
    for _ in range(3):
        for mine, theirs in zip(results(compiled, (q, k, v)), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=torch.finfo(torch.bfloat16).eps, atol=torch.finfo(torch.bfloat16).eps)


@on_device_only
def test_the_ops_pass_their_checks() -> None:
    q, k, v = (x.to(DEVICE) for x in inputs_of(batch=1, q_len=70, k_len=70, dim=64, v_dim=64, dtype=torch.float32))
    arguments = (q, k, v, None, None, None, None, str(WIDE), True, None, None, 0, SCALE, None, 0.0, "triton")
    torch.library.opcheck(torch.ops.dilcompile.attention.default, arguments)
    assert ops.attention(*arguments)[0].is_cuda


@pytest.mark.parametrize("order", ["contiguous", "zigzag", "striped"])
@pytest.mark.parametrize("form", [Dense(), WIDE], ids=str)
@pytest.mark.parametrize(("kernel", "bound"), [("triton", 1.1), (None, 2.0)])
def test_the_steps_of_four_ranks_are_as_exact_as_one_rank(kernel: str | None, bound: float, form: Form, order: Any) -> None:
    """A ring, executed on one device; a flash op that takes the steps rounds each part."""
    q, k, v = inputs_of(32, batch=1, heads=2, kv_heads=1, q_len=LENGTH, k_len=LENGTH, dtype=torch.bfloat16)

    def made(exact: bool, ranks: int | None) -> list[Tensor]:
        leaves = [(x.double() if exact else x.to(DEVICE)).detach().requires_grad_() for x in (q, k, v)]
        if ranks is None:
            out = attention(*leaves, form, is_causal=True, kernel="reference" if exact else "triton")
        else:
            options = {"ranks": ranks, "method": "ring", "order": order, "is_causal": True, "kernel": kernel}
            out = simulate(*leaves, form, **options).out
        assert isinstance(out, Tensor)
        return [x.cpu().double() for x in (out.detach(), *torch.autograd.grad(out.square().sum(), leaves))]

    for true, alone, found in zip(made(True, None), made(False, None), made(False, 4), strict=True):
        assert (found - true).norm() <= bound * (alone - true).norm()


# Arenas of planned graphs.


def arenas_of(pool: ArenaPool, size: int = 1 << 20) -> int:
    """Where a call's arena lies."""
    with pool.lease([(torch.device("cuda", 0), size)]) as lease:
        return lease.arenas[0].data_ptr()


@on_device_only
def test_a_private_pool_gives_its_memory_back_when_it_is_dropped() -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    pool = ArenaPool(keeps=True, apart=True)
    first = arenas_of(pool, 64 << 20)
    assert arenas_of(pool, 60 << 20) == first
    assert torch.cuda.memory_reserved() >= before + (64 << 20)
    # What waits in the pool is not what others are given.
    other = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    assert other.data_ptr() != first
    del other, pool
    gc.collect()
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() == before


@on_device_only
def test_an_arena_stays_on_its_stream() -> None:
    pool, side = ArenaPool(keeps=True, apart=True), torch.cuda.Stream()
    mine = arenas_of(pool)
    with torch.cuda.stream(side):
        theirs = arenas_of(pool)
        assert arenas_of(pool) == theirs
    assert mine != theirs
    assert arenas_of(pool) == mine


def chained(x: Tensor) -> Tensor:
    first = x.sin()
    return (first.cos().exp().tanh().neg() @ first.mT) * 2


@on_device_only
def test_two_streams_in_one_planned_graph_give_right_numbers() -> None:
    inputs = [torch.randn(2048, 2048, device="cuda") for _ in range(2)]
    call = PlannedCall(plan_graph(make_fx(chained, tracing_mode="fake")(inputs[0])), ArenaPool(keeps=True, apart=True))
    expected = [chained(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for x, stream in zip(inputs, streams, strict=True):
            with torch.cuda.stream(stream):
                found.append(call([x]))
        torch.cuda.synchronize()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@on_device_only
def test_a_captured_planned_graph_replays_while_others_run() -> None:
    x = torch.randn(512, 512, device="cuda")
    pool = ArenaPool(keeps=True, apart=True)
    call = PlannedCall(plan_graph(make_fx(chained, tracing_mode="fake")(x)), pool)
    call([x])
    held, graph = pool.held_bytes(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call([x])
    # The graph's arenas are its own: none was taken, none is kept.
    assert pool.held_bytes() == held
    pool.clear()
    for _ in range(3):
        x.normal_()
        junk = torch.full((1 << 24,), float("nan"), device="cuda")
        graph.replay()
        assert torch.equal(out, chained(x))
        assert torch.equal(call([x]), chained(x))
        del junk
