"""The operators as PyTorch sees them: opcheck, strides, compile, autocast, FLOPs, import cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import scripts
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dilcompile.errors import KernelError
from dilcompile.forms import Dense, Dilated, SlidingWindow
from dilcompile.functional import attention, dilated_attention
from dilcompile.lowering import operands, ops

DILATED = Dilated([8, 16], [1, 2], sinks=1)


def arguments(contiguous: bool = True, dtype: torch.dtype = torch.float32, **changes: Any) -> tuple[Any, ...]:
    def one(heads: int, rows: int) -> Tensor:
        if contiguous:
            return torch.randn(2, heads, rows, 8, dtype=dtype, requires_grad=True)
        wide = torch.randn(2, rows, heads, 16, dtype=dtype)[..., ::2]
        return wide.transpose(1, 2).detach().requires_grad_()

    values = {
        "key_padding": None, "documents": None, "bias": None, "dropout_seed": None, "form": str(DILATED),
        "is_causal": True, "window_left": None, "window_right": None, "q_offset": 0, "scale": 0.3, "softcap": None,
        "dropout_p": 0.0, "kernel": None, **changes,
    }  # fmt: skip
    return (one(4, 20), one(2, 20), one(2, 20), *values.values())


CASES: list[dict[str, Any]] = [
    {},
    {"form": "dense()"},
    {"form": str(SlidingWindow(5)), "window_left": 6},
    {"key_padding": torch.arange(20).expand(2, 20) < 15, "documents": (torch.arange(20) // 7)[None]},
    {"bias": torch.randn(4, 1, 20), "softcap": 3.0, "dropout_p": 0.2, "dropout_seed": torch.tensor([4])},
]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("changes", CASES, ids=lambda case: ",".join(case) or "plain")
def test_opcheck(changes: dict[str, Any], contiguous: bool) -> None:
    torch.library.opcheck(torch.ops.dilcompile.attention.default, arguments(contiguous, **changes))


@pytest.mark.parametrize(
    "changes", [{"softcap": 0.0}, {"softcap": -1.0}, {"softcap": math.nan}, {"dropout_p": math.nan}], ids=str
)
def test_numbers_that_kernels_would_read_differently_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(KernelError, match=f"{next(iter(changes))} is a .*, not {next(iter(changes.values()))}"):
        torch.ops.dilcompile.attention(*arguments(**changes))


@pytest.mark.parametrize(
    ("at", "wrong", "said"),
    [
        (1, torch.zeros(2, 2, 20, 8, dtype=torch.float16), r"k \[2, 2, 20, 8\] float16 .* must have one dtype"),
        (1, torch.zeros(2, 2, 20, 4), r"k \[2, 2, 20, 4\] float32 .* must be \[B, H, Sq, D\], \[B, Hkv, Sk, D\]"),
        (2, torch.zeros(2, 2, 19, 8), r"v \[2, 2, 19, 8\] float32 must be"),
        (0, torch.zeros(2, 3, 20, 8), "H a multiple of Hkv; reshape them"),
        (0, torch.zeros(4, 20, 8), "add the missing dims"),
        (3, torch.zeros(2, 19, dtype=torch.bool), r"key_padding \[2, 19\] bool must be \[2, 20\] of bool"),
        (4, torch.zeros(3, 20, dtype=torch.int64), r"documents \[3, 20\] int64 must be \[1 or 2, 20\] of int32 or int64"),
        (5, torch.zeros(3, 1, 20), r"bias \[3, 1, 20\] float32 must be \[1 or 2, 1 or 4, 1 or 20, 1 or 20\]"),
    ],
)
def test_operands_that_do_not_belong_together(at: int, wrong: object, said: str) -> None:
    """Kernels read by address: a dtype or shape that is another one would be read outside of its memory."""
    given = [x.detach() if isinstance(x, Tensor) else x for x in arguments()]
    given[at] = wrong
    with pytest.raises(KernelError, match=said):
        ops.attention(*given)


def test_operands_on_several_devices() -> None:
    q, k, v, *_ = arguments()
    with pytest.raises(KernelError, match="are on meta, cpu and cpu; move them to one device"):
        operands.check_products(q.to("meta"), k, v, False)
    with pytest.raises(KernelError, match="key_padding is on meta but q is on cpu; move it there"):
        operands.check_masks(q, 20, torch.ones(2, 20, dtype=torch.bool, device="meta"), None, None, None)


@pytest.mark.parametrize("kernel", [None, "native", "cpu", "reference", "sdpa"])
@pytest.mark.parametrize("contiguous", [True, False])
def test_the_fake_has_the_strides_of_the_real(contiguous: bool, kernel: str | None) -> None:
    form = "dense()" if kernel == "sdpa" else str(DILATED)
    args = list(arguments(contiguous, form=form, kernel=kernel))
    if kernel == "sdpa":
        args[1], args[2] = args[0].detach(), args[0].detach()
    out, lse = torch.ops.dilcompile.attention(*args)
    assert out.stride() == (20 * 4 * 8, 8, 4 * 8, 1)
    assert lse.is_contiguous()
    real = torch.ops.dilcompile.attention_backward(torch.ones_like(out), None, out.detach(), lse.detach(), *args)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x.detach()) if isinstance(x, Tensor) else x for x in args]
        fake_out, fake_lse = torch.ops.dilcompile.attention(*fakes)
        fake = torch.ops.dilcompile.attention_backward(fake_out, None, fake_out, fake_lse, *fakes)
    for one, other in zip((out, lse, *real), (fake_out, fake_lse, *fake), strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize(
    "function",
    [
        lambda q, k, v: dilated_attention(q, k, v, [8, 16], [1, 2], is_causal=True, sinks=1),
        lambda q, k, v: attention(q, k, v, SlidingWindow(5), is_causal=True, softcap=4.0),
        lambda q, k, v: attention(q, k, v, {"form": "dense"}, cu_seqlens=torch.tensor([0, 5, k.shape[2]])),
        lambda q, k, v: attention(q[:, :, -3:], k, v, "dense()", is_causal=True, return_lse=True)[1],
    ],
)
def test_compiled_is_eager(function: Any, dynamic: bool) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (24, 40):
        q, k, v = (torch.randn(2, heads, length, 8, requires_grad=True) for heads in (4, 2, 2))
        results = [call(q, k, v) for call in (function, compiled)]
        grads = [torch.autograd.grad(result.square().sum(), (q, k, v)) for result in results]
        for one, other in zip((results[0], *grads[0]), (results[1], *grads[1]), strict=True):
            assert torch.equal(one, other)


# What a caller may not know when compiling: (function of q and a number, its values).
NUMBERS: dict[str, tuple[Callable[[Tensor, Any], Any], tuple[Any, ...]]] = {
    "segment": (lambda q, n: dilated_attention(q, q, q, [n], [1]), (8, 16, 4)),
    "lists": (lambda q, n: dilated_attention(q, q, q, n, [1, 4], sinks=1), ([8, 32], [16, 16], [4, 32])),
    "sinks": (lambda q, n: dilated_attention(q, q, q, [8], [1], sinks=n), (1, 2, 3)),
    "window": (lambda q, n: attention(q, q, q, {"form": "sliding_window", "window": n}), (8, 16, 4)),
    "form": (lambda q, n: attention(q, q, q, SlidingWindow(n)), (8, 16, 4)),
    "length": (lambda q, n: dilated_attention(q[:, :, :n], q, q, [q[:, :, :n].shape[2]], [1], sinks=1), (32, 16, 20)),
    "scale": (lambda q, n: dilated_attention(q, q, q, [8], [1], scale=n, softcap=9 * n), (0.8, 0.16, 0.4)),
    "scale of a length": (lambda q, n: attention(q[:, :, :n], q, q, "dense", scale=q[:, :, :n].shape[2] ** -0.5), (32, 16, 20)),
    "causal of a length": (lambda q, n: attention(q, q, q, "dense", is_causal=q[:, :, :n].shape[2] > 1), (32, 1, 20)),
}


@pytest.mark.parametrize("dynamic", [None, True, False])
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_that_change_between_calls(name: str, dynamic: bool | None) -> None:
    torch._dynamo.reset()
    function, values = NUMBERS[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    q = torch.randn(1, 4, 32, 8)
    for value in (*values, *values):
        assert torch.equal(compiled(q, value), function(q, value))


def test_numbers_of_a_closure() -> None:
    q, lengths, window = torch.randn(1, 4, 32, 8), [8, 32], 8
    for function in (
        lambda q: dilated_attention(q, q, q, lengths, [1, 4]),
        lambda q: dilated_attention(q, q, q, [window], [1]),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
        assert torch.equal(compiled(q), function(q))


def test_numbers_of_an_exported_length() -> None:
    class Whole(torch.nn.Module):
        def forward(self, q: Tensor) -> Any:
            return dilated_attention(q, q, q, [8, q.shape[2]], [1, 4], scale=q.shape[2] ** -0.5)

    q = torch.randn(1, 4, 32, 8)
    for strict in (False, True):
        program = torch.export.export(Whole(), (q,), strict=strict)
        assert torch.equal(program.module()(q), Whole()(q))


def test_inductor_takes_the_operator() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: dilated_attention(q * 2, q, q + 1, [8, 16], [1, 2]).sum(-1), fullgraph=True)
    q = torch.randn(1, 2, 24, 8)
    torch.testing.assert_close(compiled(q), dilated_attention(q * 2, q, q + 1, [8, 16], [1, 2]).sum(-1))


def test_autocast_casts_as_sdpa_does() -> None:
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            out, lse = attention(q, q, q, "dense()", return_lse=True)
            assert out.dtype == torch.nn.functional.scaled_dot_product_attention(q, q, q).dtype == dtype
            assert lse.dtype == torch.float32
            assert torch.equal(out, attention(q.to(dtype), q.to(dtype), q.to(dtype), "dense()"))
        out.float().sum().backward()
        assert q.grad is not None
        assert q.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention(q.double(), q.double(), q.double(), "dense()").dtype == torch.float64


def test_flops_are_those_of_the_pairs() -> None:
    q, k, v = (torch.randn(2, heads, 64, 8, requires_grad=True) for heads in (4, 2, 2))
    with FlopCounterMode(display=False) as counter:
        dilated_attention(q, k, v, [8, 32], [1, 2]).sum().backward()
    pairs = 64 * 8 + 2 * 16 * 16
    found = counter.get_flop_counts()["Global"]
    assert found[torch.ops.dilcompile.attention] == 2 * 4 * pairs * 4 * 8
    assert found[torch.ops.dilcompile.attention_backward] == 2 * 4 * pairs * 10 * 8


def test_a_gradient_that_nobody_asks_for_is_not_materialised() -> None:
    q, k, v, *rest = arguments()
    _, lse = torch.ops.dilcompile.attention(q, k, v, *rest)
    (grad,) = torch.autograd.grad(lse[lse.isfinite()].sum(), (v,), allow_unused=True)
    assert grad is None or not grad.any()


def test_a_fresh_process_imports_no_optional_package() -> None:
    # torch's own flop counter imports Triton where it is installed.
    code = (
        "import sys, torch, torch.utils.flop_counter; before = set(sys.modules); import dilcompile.lowering.ops; "
        "late = {name.split('.')[0] for name in set(sys.modules) - before}; "
        "print(sorted(late & {'triton', 'transformers', 'pydantic', 'yaml', 'typer', 'rich', 'plotly'}))"
    )
    found = scripts.run(code)
    assert found.stdout.strip() == "[]", found.stderr


def test_the_oracle_imports_nothing_optimised() -> None:
    code = (
        "import sys, torch, dilcompile.lowering.reference as r; "
        "names = {n.rpartition('.')[2] for n in sys.modules if n.startswith('dilcompile.lowering.')}; "
        "print(sorted(names & {'cpu', 'flash', 'sdpa', 'views', 'engines', 'merge', 'pieces', 'strided'}))"
    )
    found = scripts.run(code)
    assert found.stdout.strip() == "[]", found.stderr


def test_window_arguments_and_dense_agree() -> None:
    q, k, v, *_ = arguments()
    by_mask = ops.attention(q, k, v, None, None, None, None, str(Dense()), True, 4, None, 0, 0.3, None, 0.0, None)[0]
    by_form = attention(q, k, v, SlidingWindow(5), is_causal=True, scale=0.3)
    assert torch.equal(by_mask, by_form)
