"""The bias in the Triton decode kernels, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_kernels import assert_as_good_as_eager, assert_grads, drawn, expected, operands_of, run
from torch import Tensor
from triton_decode_interpreted import LONG, WINDOW, assert_exact, decoded, in_parts, limited, paged, run_paged, step_of
from triton_interpreted_bias import of_bound, with_strides

from dilcompile.forms import Dense, Dilated, Form
from dilcompile.lowering.triton import bound, decode

__all__ = ["decoded"]

BATCH, HEADS, ROWS, KEYS = 2, 4, 2, 51
# One number a key, a key of each head (ALiBi), a key of each batch row, a pair (T5), a pair of each batch row, a row, all pairs.
SHAPES = [
    (1, 1, 1, KEYS), (1, HEADS, 1, KEYS), (BATCH, 1, 1, KEYS), (1, HEADS, ROWS, KEYS), (BATCH, 1, ROWS, KEYS),
    (BATCH, HEADS, ROWS, KEYS), (BATCH, HEADS, ROWS, 1), (1, 1, ROWS, 1), (KEYS,), (HEADS, 1, 1), (1,),
]  # fmt: skip
FORMS = [
    Dense(),
    LONG,
    WINDOW,
    Dilated([8, 16], [1, 2], union="set", sinks=1, local=2),
    Dilated([6, 16], [1, 1], heads="grouped"),
]


def inputs_of(heads: int = HEADS, kv_heads: int = 2, **more: Any) -> tuple[Tensor, Tensor, Tensor]:
    return drawn(**{"batch": BATCH, "heads": heads, "kv_heads": kv_heads, "q_len": ROWS, "k_len": KEYS, **more})


def bias_of(shape: tuple[int, ...], hidden: float = 0.2, dtype: torch.dtype = torch.float64) -> Tensor:
    """Numbers as large as scores; so many of those of keys hide them."""
    generator = torch.Generator().manual_seed(9)
    bias = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    draws = torch.rand(shape, generator=generator)
    return bias.masked_fill(draws < hidden, -torch.inf) if shape[-1] > 1 else bias


@pytest.mark.parametrize(
    ("form", "shape"), [*((FORMS[0], shape) for shape in SHAPES), *((LONG, SHAPES[n]) for n in (1, 3, 4, 6))], ids=str
)
def test_every_shape(form: Form, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    assert_exact(q, k, v, form, step_of(q, k), bias=bias_of(shape))


@pytest.mark.parametrize(
    ("form", "shape"), [(FORMS[2], SHAPES[1]), (FORMS[2], SHAPES[3]), (FORMS[3], SHAPES[3]), (FORMS[4], SHAPES[1])], ids=str
)
def test_every_form(form: Form, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    q, k, v = inputs_of(batch=1)
    assert_exact(q, k, v, form, step_of(q, k), bias=bias_of(shape))


WHOLE = (BATCH, HEADS, ROWS, KEYS)
LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "a number a key of each head, expanded": lambda: bias_of((1, HEADS, 1, KEYS)).expand(WHOLE),
    "a number a row, expanded": lambda: bias_of((1, HEADS, ROWS, 1)).expand(WHOLE),
    "keys first": lambda: bias_of((BATCH, HEADS, KEYS, ROWS)).transpose(2, 3),
    "heads last": lambda: bias_of((1, ROWS, KEYS, HEADS)).permute(0, 3, 1, 2),
    "the last rows of all": lambda: bias_of((1, HEADS, KEYS, KEYS))[:, :, -ROWS:],
    "a part of a larger one": lambda: bias_of((3, 7, 30, 150))[1:, 1 : 1 + HEADS, 7 : 7 + ROWS, 3 : 3 + 2 * KEYS : 2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    q, k, v = inputs_of()
    assert_exact(q, k, v, LONG, step_of(q, k), bias=LAYOUTS[layout]())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "q_len", "by"),
    [
        (1, 1, 1, "keys"), (2, 2, 3, "rows"), (6, 2, 1, "keys"), (6, 2, 1, "pairs"), (6, 2, 1, "rows"), (17, 1, 1, "pairs"),
        (65, 1, 1, "keys"), (65, 1, 1, "pairs"),
    ],
)  # fmt: skip
def test_grouped_query_heads(heads: int, kv_heads: int, q_len: int, by: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Heads side by side in a tile, and more than stand there (65), each with numbers of its own."""
    in_parts(monkeypatch, 2)
    q, k, v = inputs_of(heads, kv_heads, batch=1, q_len=q_len)
    shape = (1, heads, 1 if by == "keys" else q_len, 1 if by == "rows" else KEYS)
    assert_exact(q, k, v, Dense(), step_of(q, k), bias=bias_of(shape))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]], ids=str)
@pytest.mark.parametrize(
    "asked", [{"softcap": 2.0}, {"key_padding": True}, {"softcap": 1.5, "key_padding": True, "documents": "own"}], ids=str
)
def test_caps_padding_and_documents(asked: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    assert_exact(q, k, v, LONG, step_of(q, k), bias=bias_of(shape), **operands_of(asked, length=KEYS))


@pytest.mark.parametrize("parts", [1, 2, 5, 18])
def test_every_number_of_parts(parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough for blocks that need no mask; all keys of a part hidden by the bias."""
    in_parts(monkeypatch, parts)
    q, k, v = inputs_of(k_len=290)
    bias = bias_of((1, HEADS, 1, 290))
    bias[..., 40:150] = -torch.inf
    assert_exact(q, k, v, Dense(), step_of(q, k), bias=bias)


def test_rows_that_the_bias_hides_have_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    bias = torch.zeros(1, HEADS, ROWS, KEYS, dtype=torch.float64)
    bias[0, 1, 0] = -torch.inf
    out, lse = run(q, k, v, Dense(), "triton", step_of(q, k), bias=bias)
    assert bool((out[:, 1, 0] == 0).all())
    assert bool((lse[:, 1, 0] == -torch.inf).all())
    assert_exact(q, k, v, Dense(), step_of(q, k), bias=bias)


@pytest.mark.parametrize("fill", [-1e4, float(torch.finfo(torch.float32).min)])
def test_a_finite_fill_is_no_minus_infinity(fill: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that it covers weigh their keys alike, in each part and in all of them joined: hence base e."""
    in_parts(monkeypatch, 3)
    inputs = inputs_of(dtype=torch.float32, k_len=70)
    at = step_of(*inputs[:2])
    bias = torch.zeros(BATCH, 1, ROWS, 70)
    bias[0, :, 0], bias[1, :, :, 30:] = fill, fill
    found = run(*inputs, Dense(), "triton", at, bias=bias)
    eager = expected(*inputs, Dense(), at, torch.float32, bias=bias)
    exact = expected(*(x.double() for x in inputs), Dense(), at, bias=bias)
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "of_bias"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32), (torch.float16,) * 2],
    ids=str,
)
@pytest.mark.parametrize("shape", [(1, 4, 1, 150)], ids=str)
def test_low_precision(dtype: torch.dtype, of_bias: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    inputs = drawn(batch=1, heads=4, kv_heads=1, q_len=3, k_len=150, dim=64, v_dim=64, dtype=dtype)
    at, bias = step_of(inputs[0], inputs[1]), bias_of(shape, dtype=of_bias)
    found = run(*inputs, LONG, "triton", at, bias=bias)
    eager = expected(*inputs, LONG, at, dtype, bias=bias)
    exact = expected(*(x.double() for x in inputs), LONG, at, bias=bias.double())
    for mine, theirs, true in zip(found, eager, exact, strict=True):
        assert_as_good_as_eager(mine, theirs, true, dtype)


def test_dropout_depends_on_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    operands = {"dropout_p": 0.3, "seed": torch.tensor([(7 << 40) + 11]), "bias": bias_of(SHAPES[1])}
    found, exact = (run(q, k, v, LONG, kernel, step_of(q, k), **operands) for kernel in ("triton", "reference"))
    for mine, true in zip(found, exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


def test_gradients_start_from_the_joined_lse() -> None:
    q, k, v = inputs_of()
    for shape in (SHAPES[1], SHAPES[3]):
        assert_grads("triton", LONG, step_of(q, k), q, k, v, bias=bias_of(shape))


def test_limits_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a static cache has them."""
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    bias, limits = bias_of(SHAPES[1]), torch.tensor([[[0, 5]], [[31, 32]]])
    position = torch.arange(KEYS)
    seen = (position >= limits[0][..., None]) & (position < limits[1][..., None])
    at = step_of(q, k, causal=False)
    exact = expected(q, k, v, Dense(), at, bias=bias.expand(BATCH, HEADS, ROWS, KEYS).masked_fill(~seen[:, None], -torch.inf))
    for mine, true in zip(limited(q, k, v, Dense(), limits, bias=bias), exact, strict=True):
        torch.testing.assert_close(mine, true, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("page_size", "shape"), [*((5, SHAPES[n]) for n in (1, 3, 6)), *((16, SHAPES[n]) for n in (2, 4, 5))], ids=str
)
def test_keys_in_pages(page_size: int, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 3)
    q, k, v = inputs_of()
    at, bias = step_of(q, k), bias_of(shape)
    wanted = expected(q, k, v, LONG, at, bias=bias)
    for mine, exact in zip(run_paged(q, *paged(k, v, page_size), LONG, at, bias=bias), wanted, strict=True):
        torch.testing.assert_close(mine, exact, rtol=0, atol=1e-12)


def test_nothing_outside_the_bias_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 4)
    q, k, v = inputs_of(batch=1, heads=3, kv_heads=1, k_len=45)
    for shape in ((1, 3, 1, 45), (1, 3, ROWS, 45), (1, 3, ROWS, 1)):
        around = torch.full([x + 4 for x in shape], torch.nan, dtype=torch.float64)
        bias = around[tuple(slice(2, 2 + x) for x in shape)].copy_(bias_of(shape))
        for form in (Dense(), LONG):
            assert_exact(q, k, v, form, step_of(q, k), bias=bias)


# Each mutation is a mistake that the check must notice.


def joined_in_base_2(monkeypatch: pytest.MonkeyPatch) -> None:
    right = decode.join

    class Other:
        def __getitem__(self, grid: Any) -> Callable[..., Any]:
            return lambda *args, **more: right[grid](*args, **{**more, "NATURAL": False})

    monkeypatch.setattr(decode, "join", Other())


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[int, ...]]] = {
    "parts joined in base 2": (joined_in_base_2, SHAPES[1]),
    "one bias for all rows": (of_bound("bias_by", lambda right, *args: "keys"), SHAPES[3]),
    "one bias for all keys": (of_bound("bias_by", lambda right, *args: "rows"), SHAPES[3]),
    "scores in base 2": (of_bound("factors", lambda right, *args: (right(*args)[0] * 1.44, *right(*args)[1:])), SHAPES[1]),
    "that of the first head": (with_strides(lambda x: (x[0], 0, x[2], x[3])), SHAPES[1]),
    "that of the first row": (with_strides(lambda x: (*x[:2], 0, x[3])), SHAPES[3]),
    "that of the first batch row": (with_strides(lambda x: (0, *x[1:])), SHAPES[4]),
}


def check(shape: tuple[int, ...]) -> None:
    q, k, v = inputs_of()
    assert_exact(q, k, v, LONG, step_of(q, k), bias=bias_of(shape))


@pytest.mark.parametrize("shape", SHAPES[1:5], ids=str)
def test_the_check_passes_without_a_mutation(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    check(shape)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    in_parts(monkeypatch, 2)
    mutate, shape = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(shape)


def test_a_step_with_a_bias_is_split() -> None:
    """The ordinary forward is not asked."""
    q, k, v = inputs_of()

    def refused(*args: Any) -> Any:
        raise AssertionError("one program walks all keys")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(bound.Bound, "plan", refused)
        run(q, k, v, LONG, "triton", step_of(q, k), bias=bias_of(SHAPES[1]))
