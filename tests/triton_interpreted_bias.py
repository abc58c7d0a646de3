"""The bias in the Triton kernels, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import Setting
from test_kernels import (
    FORMS,
    SCALE,
    assert_as_good_as_eager,
    assert_grads,
    drawn,
    expected,
    loss_of,
    operands_of,
    run,
    setting_of,
)
from torch import Tensor

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import reference, triton
from dilcompile.lowering.call import Call
from dilcompile.lowering.triton import bound
from dilcompile.relation import Problem

BATCH, HEADS, ROWS, KEYS = 2, 2, 11, 18
# One number a key, a key of each head, a pair, a pair of each batch row, a row, all pairs; and shapes of fewer dims.
SHAPES = [
    (1, 1, 1, KEYS), (1, HEADS, 1, KEYS), (BATCH, 1, 1, KEYS), (1, HEADS, ROWS, KEYS), (BATCH, 1, ROWS, KEYS),
    (BATCH, HEADS, ROWS, KEYS), (BATCH, HEADS, ROWS, 1), (1, 1, ROWS, 1), (KEYS,), (HEADS, 1, 1), (1,),
]  # fmt: skip
SHAPES_BY_FORM: list[tuple[Form, bool, list[tuple[int, ...]]]] = [
    (Dense(), False, SHAPES),
    # Each form with one bias by key, pair or row at least; its batch and heads are strides, which no form sees.
    (FORMS[3], True, [SHAPES[n] for n in (1, 4, 6)]),
    (FORMS[5], True, SHAPES[3:4]),
    (FORMS[9], False, SHAPES[1:3]),
    (SlidingWindow(7, sinks=2), True, [SHAPES[0], SHAPES[3]]),
    (FORMS[4], True, [SHAPES[2], SHAPES[4]]),
    (FORMS[7], True, SHAPES[3:4]),
]


def bias_of(shape: tuple[int, ...], hidden: float = 0.2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers as large as scores; so many of them hide their pairs, and so does a whole row."""
    generator = torch.Generator().manual_seed(9)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    if bias.numel() > 1:
        bias = bias.masked_fill(torch.rand(shape, generator=generator) < hidden, -torch.inf)
    if hidden and len(shape) == 4 and shape[2] > 1:
        bias[0, 0, 4] = -torch.inf
    return bias


def inputs_of(heads: int = HEADS, kv_heads: int = 1, **more: Any) -> tuple[Setting, tuple[Tensor, Tensor, Tensor]]:
    masks = {name: more.pop(name) for name in ("causal", "left", "right", "q_offset") if name in more}
    sizes = {"batch": BATCH, "q_len": ROWS, "k_len": KEYS} | more
    q, k, v = drawn(heads=heads, kv_heads=kv_heads, **sizes)
    return setting_of(q, k, **masks), (q, k, v)


@pytest.mark.parametrize(
    ("form", "causal", "shape"), [(form, causal, shape) for form, causal, shapes in SHAPES_BY_FORM for shape in shapes], ids=str
)
def test_every_shape(form: Form, causal: bool, shape: tuple[int, ...]) -> None:
    at, inputs = inputs_of(kv_heads=2 if form == FORMS[9] else 1, causal=causal, q_offset=2)
    assert_grads("triton", form, at, *inputs, bias=bias_of(shape))


def spread(shape: tuple[int, ...], to: tuple[int, ...]) -> Tensor:
    return bias_of(shape).expand(to)


WHOLE = (BATCH, HEADS, ROWS, KEYS)
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a number a key of each head, expanded": lambda: spread((1, HEADS, 1, KEYS), WHOLE),
    "a number a key, expanded": lambda: spread((1, 1, 1, KEYS), (1, HEADS, ROWS, KEYS)),
    "a number a row, expanded": lambda: spread((1, HEADS, ROWS, 1), WHOLE),
    "one number, expanded": lambda: torch.tensor(0.7, dtype=torch.float64).expand(WHOLE),
    "keys first": lambda: bias_of((BATCH, HEADS, KEYS, ROWS)).transpose(2, 3),
    "heads last": lambda: bias_of((1, ROWS, KEYS, HEADS)).permute(0, 3, 1, 2),
    "a part of a larger one": lambda: bias_of((3, 4, 30, 50))[1:, 1:3, 7 : 7 + ROWS, 3 : 3 + 2 * KEYS : 2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str) -> None:
    at, inputs = inputs_of(causal=True)
    assert_grads("triton", FORMS[3], at, *inputs, bias=LAYOUTS[layout]())


@pytest.mark.parametrize(("heads", "kv_heads", "by"), [(2, 2, "keys"), (6, 2, "keys"), (6, 2, "pairs"), (17, 1, "pairs")])
def test_grouped_query_heads(heads: int, kv_heads: int, by: str) -> None:
    """Heads side by side in a tile (3), and more than stand there (17), each with numbers of its own."""
    at, inputs = inputs_of(heads, kv_heads, batch=1, q_len=5, k_len=6, causal=True)
    assert_grads("triton", Dense(), at, *inputs, bias=bias_of((1, heads, 1 if by == "keys" else 5, 6)))


MASKED: list[dict[str, Any]] = [
    {"softcap": 2.0},
    {"key_padding": True},
    {"documents": "own"},
    {"softcap": 1.5, "key_padding": True, "documents": "shared"},
]


@pytest.mark.parametrize(
    ("asked", "shape"),
    [*((asked, (BATCH, 1, ROWS, KEYS)) for asked in MASKED), *((MASKED[n], (1, HEADS, 1, KEYS)) for n in (0, 3))],
    ids=str,
)
def test_caps_padding_and_documents(asked: dict[str, Any], shape: tuple[int, ...]) -> None:
    at, inputs = inputs_of(causal=True, left=15)
    assert_grads("triton", FORMS[3], at, *inputs, bias=bias_of(shape), **operands_of(asked, length=KEYS))


@pytest.mark.parametrize(
    ("form", "shape"), [(Dilated([48, 96], [1, 2]), (1, 1, 1, 98)), (SlidingWindow(20, sinks=1), (98, 98))], ids=str
)
def test_lengths_of_many_blocks(form: Form, shape: tuple[int, ...]) -> None:
    """Long enough for blocks that need no mask, and for tiles of the bias that no term reaches."""
    at, inputs = inputs_of(1, 1, batch=1, q_len=98, k_len=98, causal=True)
    assert_grads("triton", form, at, *inputs, bias=bias_of(shape))


def test_nothing_outside_the_bias_is_read_and_all_of_its_gradient_is_written() -> None:
    """The bias lies in not-a-number, as does what the kernel writes."""
    at, inputs = inputs_of(1, 1, batch=1, q_len=50, k_len=70, causal=True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for shape in ((1, 1, 50, 70), (1, 1, 1, 70), (1, 1, 50, 1)):
            around = torch.full([x + 4 for x in shape], torch.nan, dtype=torch.float64)
            bias = around[tuple(slice(2, 2 + x) for x in shape)].copy_(bias_of(shape))
            assert_grads("triton", SlidingWindow(5), at, *inputs, bias=bias)
    finally:
        torch.use_deterministic_algorithms(False)


def test_dropout_depends_on_positions_only() -> None:
    at, inputs = inputs_of(causal=True)
    for shape in ((1, HEADS, ROWS, KEYS), (1, HEADS, 1, KEYS)):
        leaves = [x.requires_grad_() for x in (*inputs, bias_of(shape, hidden=0.0))]
        operands = {"bias": leaves[3], "dropout_p": 0.3, "seed": torch.tensor([(7 << 40) + 11])}
        results = [run(*leaves[:3], FORMS[3], kernel, at, **operands) for kernel in ("triton", "reference")]
        grads = [torch.autograd.grad(loss_of(*result, True), leaves) for result in results]
        # float64; the gradient of a number a key is a sum over all rows.
        for found, exact in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)


@pytest.mark.parametrize("fill", [-1e4, float(torch.finfo(torch.float32).min)])
def test_rows_that_a_finite_fill_covers_are_no_empty_rows(fill: float) -> None:
    """All of their keys weigh as their scores say, or alike where the fill leaves nothing of those, as in eager attention."""
    at, inputs = inputs_of(dtype=torch.float32, causal=True)
    bias = torch.zeros(BATCH, 1, ROWS, KEYS)
    bias[0, :, :6], bias[1, :, :, 4:] = fill, fill
    found = run(*inputs, FORMS[3], "triton", at, bias=bias)
    eager = expected(*inputs, FORMS[3], at, torch.float32, bias=bias)
    exact = expected(*(x.double() for x in inputs), FORMS[3], at, bias=bias)
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, torch.float32)


def covered(fill: float, shape: tuple[int, ...]) -> Tensor:
    bias = torch.zeros(shape)
    bias[0, ..., 5:, : 1 if shape[3] == 1 else KEYS] = fill
    bias[-1] = fill
    return bias


def gradients_of(kernel: Any, given: tuple[Tensor, Tensor, Tensor], bias: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v = given
    size = Problem(BATCH, HEADS, HEADS, ROWS, KEYS, q.shape[3], v.shape[3], 0, True)
    call = Call(q, k, v, None, None, bias, None, FORMS[5].relation(size), SCALE)
    out, lse = kernel.forward(call)
    ramp = torch.linspace(-1, 1, out.numel()).view(out.shape)
    found: tuple[Tensor | None, ...] = kernel.backward(call, out, lse, ramp, torch.where(lse.isfinite(), ramp[..., 0], 0))
    return found


@pytest.mark.parametrize("fill", [-1e9, 1e9, float(torch.finfo(torch.float32).min)])
@pytest.mark.parametrize("shape", [(BATCH, 1, 1, KEYS), WHOLE, (BATCH, HEADS, ROWS, 1)], ids=str)
def test_gradients_of_rows_whose_lse_keeps_the_fill_alone(shape: tuple[int, ...], fill: float) -> None:
    """float32 has no digits for the logarithm of the number of keys beside such a fill."""
    _, inputs = inputs_of(kv_heads=HEADS, dtype=torch.float32)
    bias = covered(fill, shape)
    for mine, theirs in zip(gradients_of(triton, inputs, bias), gradients_of(reference, inputs, bias), strict=True):
        assert mine is not None
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


DTYPES = [
    (torch.float32, torch.float32), (torch.float32, torch.float64), (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
]  # fmt: skip


@pytest.mark.parametrize(
    ("dtype", "of_bias", "shape"),
    [
        *((*DTYPES[n], (1, 2, 29, 33)) for n in range(5)),
        *((*DTYPES[n], (1, 2, 1, 33)) for n in (0, 3)),
        *((*DTYPES[n], (1, 1, 29, 1)) for n in (1, 3)),
    ],
    ids=str,
)
def test_low_precision(dtype: torch.dtype, of_bias: torch.dtype, shape: tuple[int, ...]) -> None:
    at, (q, k, v) = inputs_of(batch=1, q_len=29, k_len=33, dim=64, v_dim=64, dtype=dtype, causal=True)
    bias = bias_of(shape, dtype=of_bias)
    # Scores of the size that a model's are.
    leaves = [x.requires_grad_() for x in (q * (64**-0.5 / SCALE), k, v, bias)]
    exact_leaves = [x.detach().double().requires_grad_() for x in leaves]
    found = run(*leaves[:3], FORMS[3], "triton", at, bias=bias)
    eager = expected(*leaves[:3], FORMS[3], at, dtype, bias=bias)
    exact = expected(*exact_leaves[:3], FORMS[3], at, bias=exact_leaves[3])
    sides = ((found, leaves), (eager, leaves), (exact, exact_leaves))
    grads = [torch.autograd.grad(loss_of(*pair, True), wanted) for pair, wanted in sides]
    assert grads[0][3].dtype == of_bias
    assert grads[0][3].shape == shape
    for mine, theirs, true in zip((*found, *grads[0]), (*eager, *grads[1]), (*exact, *grads[2]), strict=True):
        assert_as_good_as_eager(mine, theirs, true, dtype)


def test_a_gradient_that_is_not_asked_for_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    at, inputs = inputs_of()
    seen = []
    right = triton._gradient_of_bias
    monkeypatch.setattr(triton, "_gradient_of_bias", lambda *args: seen.append(right(*args)))
    leaves = [x.requires_grad_() for x in inputs]
    torch.autograd.grad(run(*leaves, Dense(), "triton", at, bias=bias_of((KEYS,)))[0].sum(), leaves)
    assert seen == [None]


def test_no_keys_and_no_queries() -> None:
    for q_len, k_len in ((0, 5), (5, 0)):
        at, inputs = inputs_of(q_len=q_len, k_len=k_len)
        leaves = [x.requires_grad_() for x in (*inputs, torch.zeros(HEADS, q_len, k_len), torch.zeros(1, 1))]
        for bias in leaves[3:]:
            out, lse = run(*leaves[:3], Dense(), "triton", at, bias=bias)
            assert torch.equal(out, torch.zeros_like(out))
            assert bool((lse == -torch.inf).all())
            for x, grad in zip((*leaves[:3], bias), torch.autograd.grad(out.sum(), (*leaves[:3], bias)), strict=True):
                assert torch.equal(grad, torch.zeros_like(x))


def test_the_same_numbers_every_time() -> None:
    at, inputs = inputs_of(batch=1, dtype=torch.float32, causal=True)
    for shape in ((HEADS, 1, KEYS), (ROWS, KEYS)):
        leaves = [x.requires_grad_() for x in (*inputs, bias_of(shape, dtype=torch.float32))]
        results = [run(*leaves[:3], FORMS[3], "triton", at, bias=leaves[3]) for _ in range(2)]
        grads = [torch.autograd.grad(loss_of(*result, True), leaves) for result in results]
        for one, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
            assert torch.equal(one, other)


# Each mutation is a mistake that the check must notice.


def of_bound(method: str, changed: Callable[..., Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        right = getattr(bound.Bound, method)
        monkeypatch.setattr(bound.Bound, method, lambda *args: changed(right, *args))

    return mutate


def of_gradient(changed: Callable[[Any], Any]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        right = triton._gradient_of_bias
        monkeypatch.setattr(triton, "_gradient_of_bias", lambda bound, *args: right(changed(bound), *args))

    return mutate


def with_strides(change: Callable[[tuple[int, ...]], tuple[int, ...]]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        right = bound._strides_over_pairs
        monkeypatch.setattr(bound, "_strides_over_pairs", lambda *args: change(right(*args)))

    return mutate


def without_the_gradient_of_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton._gradient_of_bias
    monkeypatch.setattr(triton, "_gradient_of_bias", lambda bound, operands, grad_lse, *rest: right(bound, operands, None, *rest))


KEY_BIAS, PAIR_BIAS, ROW_BIAS = (1, HEADS, 1, KEYS), (BATCH, HEADS, ROWS, KEYS), (BATCH, 1, ROWS, 1)
MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[int, ...]]] = {
    "one bias for all rows": (of_bound("bias_by", lambda right, *args: "keys"), PAIR_BIAS),
    "one bias for all keys": (of_bound("bias_by", lambda right, *args: "rows"), PAIR_BIAS),
    "scores in base 2": (of_bound("factors", lambda right, *args: (right(*args)[0] * 1.44, *right(*args)[1:])), KEY_BIAS),
    "that of the first head": (with_strides(lambda x: (x[0], 0, x[2], x[3])), KEY_BIAS),
    "that of the first batch row": (with_strides(lambda x: (0, *x[1:])), PAIR_BIAS),
    "keys one further apart": (with_strides(lambda x: (*x[:3], 0)), KEY_BIAS),
    "gradient without padding and documents": (of_gradient(lambda bound: replace(bound, masks=(None,) * 4)), PAIR_BIAS),
    "gradient without the bias": (of_gradient(lambda bound: replace(bound, bias_strides=(0, 0, 0, 0))), PAIR_BIAS),
    "gradient without the gradient of the LSE": (without_the_gradient_of_the_lse, ROW_BIAS),
}


def check(shape: tuple[int, ...]) -> None:
    at, inputs = inputs_of(causal=True)
    operands = operands_of({"key_padding": True, "documents": "own"}, length=KEYS)
    assert_grads("triton", FORMS[3], at, *inputs, bias=bias_of(shape), **operands)


@pytest.mark.parametrize("shape", [KEY_BIAS, PAIR_BIAS, ROW_BIAS], ids=str)
def test_the_check_passes_without_a_mutation(shape: tuple[int, ...]) -> None:
    check(shape)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, shape = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(shape)
