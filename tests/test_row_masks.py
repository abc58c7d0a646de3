"""Row limits, formulas over pairs and positions known when running: every form and kernel against an explicit softmax in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from oracles import counts, output_scale, softmax
from test_kernels import SCALE, drawn, setting_of, small_tiles  # noqa: F401  (the fixture works by being here)
from torch import Tensor

from dilcompile.errors import KernelError
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import ops, select
from dilcompile.lowering.pairs import parse
from dilcompile.lowering.view_path import row_masks

BATCH, ROWS, KEYS = 2, 23, 31
FORMS: list[Form] = [Dense(), SlidingWindow(6, sinks=2), Dilated([8, 16], [1, 2], union="set", sinks=1, local=2)]
KERNELS = [name for name, kernel in select.KERNELS.items() if kernel.TAKES_ROW_MASKS and name not in ("flash", "triton")]


def _limits(batch: int = BATCH, whole: bool = False) -> Tensor:
    """First key and end of every row; some rows see nothing, one end lies before its first key."""
    generator = torch.Generator().manual_seed(3)
    low = torch.randint(0, KEYS, (batch, ROWS), generator=generator) // 2
    end = low + torch.randint(0, 12, (batch, ROWS), generator=generator)
    if whole:
        low, end = torch.zeros_like(low), torch.full_like(end, KEYS)
    else:
        end[:, 4], end[:, 5] = 0, 1000
    return torch.stack((low, end))


def _terms(batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randint(0, 4, (3, batch, ROWS), generator=generator)
    keys = -torch.randint(0, 4, (3, batch, KEYS), generator=generator)
    rows[0] = torch.arange(ROWS)
    keys[0] = -torch.arange(KEYS)
    return rows, keys


FORMULA = "g0 | e1 & ~g2"


def _by_formula(rows: Tensor, keys: Tensor) -> Tensor:
    sums = rows[..., None] + keys[..., None, :]
    return (sums[0] >= 0) | (sums[1] == 0) & ~(sums[2] >= 0)


def _by_limits(limits: Tensor) -> Tensor:
    position = torch.arange(KEYS)
    return (position >= limits[0][..., None]) & (position < limits[1][..., None])


def _cases() -> dict[str, tuple[dict[str, Any], Tensor]]:
    """Operands, and the pairs that they let through: [B or 1, Sq, Sk]."""
    found: dict[str, tuple[dict[str, Any], Tensor]] = {}
    for batch in (1, BATCH):
        limits, (rows, keys) = _limits(batch), _terms(batch)
        formula = {"row_terms": rows, "key_terms": keys, "pairs": FORMULA}
        found[f"limits of {batch}"] = ({"row_limits": limits}, _by_limits(limits))
        found[f"formula of {batch}"] = (formula, _by_formula(rows, keys))
        found[f"both of {batch}"] = ({"row_limits": limits, **formula}, _by_limits(limits) & _by_formula(rows, keys))
    return found


CASES = _cases()


def _run(
    q: Tensor, k: Tensor, v: Tensor, form: Form, kernel: str | None, more: dict[str, Any], **asked: Any
) -> tuple[Tensor, Tensor]:
    return ops.attention(
        q, k, v, asked.get("key_padding"), asked.get("documents"), asked.get("bias"), None, str(form),
        asked.get("causal", False), asked.get("left"), None, asked.get("q_offset", 0), SCALE, asked.get("softcap"), 0.0, kernel,
        **more,
    )  # fmt: skip


def _agree(kernel: str, form: Form, more: dict[str, Any], visible: Tensor, **asked: Any) -> None:
    """Output, LSE and every gradient, the LSE's included; a kernel that takes limits only says so of formulas."""
    given = [x.requires_grad_() for x in drawn(BATCH, 4, 2, ROWS, KEYS, dtype=torch.float64)]
    q, k, v = given
    setting = setting_of(q, k, causal=asked.get("causal", False), left=asked.get("left"), q_offset=asked.get("q_offset", 0))
    documents = asked.get("documents")
    numbers = [None] if documents is None else documents.tolist()
    count = torch.stack([torch.from_numpy(counts(form, setting, row)) for row in numbers]) * visible[:, None]
    if asked.get("key_padding") is not None:
        count = count * asked["key_padding"][:, None, None]
    if kernel == "native" and "pairs" in more:
        with pytest.raises(KernelError, match=r"kernel 'native' can't compute this attention: a formula over pairs"):
            _run(q, k, v, form, kernel, more, **asked)
        return
    wanted, wanted_lse = softmax(q, k, v, count, SCALE, asked.get("softcap"), asked.get("bias"))
    wanted = wanted * output_scale(form)
    got, got_lse = _run(q, k, v, form, kernel, more, **asked)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(got_lse, wanted_lse, rtol=1e-10, atol=1e-10)
    leaves = [*given, *([asked["bias"]] if asked.get("bias") is not None else [])]
    seen = wanted_lse.isfinite()
    weights = torch.linspace(0.5, 1.5, wanted.numel(), dtype=torch.float64).view(wanted.shape)
    grads = [
        torch.autograd.grad((out * weights).sum() + (lse[seen] * 0.3).sum(), leaves)
        for out, lse in ((got, got_lse), (wanted, wanted_lse))
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_masks_by_row(case: str, form: Form, kernel: str) -> None:
    more, visible = CASES[case]
    _agree(kernel, form, more, visible)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "asked",
    [
        {"causal": True, "q_offset": 8},
        {"causal": True, "left": 9, "q_offset": 3},
        {"key_padding": torch.arange(KEYS).expand(BATCH, KEYS) % 5 != 2},
        {"documents": (torch.arange(KEYS) // 9)[None], "q_offset": 4},
        {"softcap": 2.0},
        {"bias": torch.randn(4, ROWS, KEYS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()},
    ],
    ids=lambda asked: ",".join(asked),
)
def test_masks_by_row_beside_others(asked: dict[str, Any], kernel: str) -> None:
    for name in (f"both of {BATCH}", "limits of 1"):
        more, visible = CASES[name]
        for form in FORMS[:2]:
            _agree(kernel, form, more, visible, **asked)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("start", [0, 5, 8, 30])
def test_a_position_known_when_running(start: int, form: Form, kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(BATCH, 4, 2, 5, KEYS, dtype=torch.float64))
    wanted = _run(q, k, v, form, kernel, {}, causal=True, left=20, q_offset=start)
    got = _run(q, k, v, form, kernel, {"q_start": torch.tensor([start - 2])}, causal=True, left=20, q_offset=2)
    for mine, theirs in zip(got, wanted, strict=True):
        assert torch.equal(mine, theirs)
    grads = [torch.autograd.grad(out.sum(), (q, k, v)) for out, _ in (got, wanted)]
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(*grads, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_opcheck(case: str) -> None:
    q, k, v = (x.requires_grad_() for x in drawn(BATCH, 4, 2, ROWS, KEYS, dtype=torch.float32))
    rest = (None, None, None, None, "dense()", True, None, None, 0, SCALE, None, 0.0, None)
    more = {"q_start": torch.tensor([3]), **CASES[case][0]}
    torch.library.opcheck(torch.ops.dilcompile.attention.default, (q, k, v, *rest), more)


def test_a_kernel_that_takes_no_masks_by_row_says_so() -> None:
    q, k, v = drawn(BATCH, 4, 4, ROWS, KEYS)
    with pytest.raises(KernelError, match="kernel 'sdpa' can't compute this attention: a mask by row; kernel 'native' can"):
        _run(q, k, v, Dense(), "sdpa", {"row_limits": _limits()})


@pytest.mark.parametrize("text", ["g0 |", "f0", "g", "g0 + e1", "g0 and e1", "print(g0)"])
def test_what_is_no_formula(text: str) -> None:
    with pytest.raises(ValueError, match="not a formula over pairs"):
        parse(text)


@pytest.mark.parametrize("heads", [1, 3])
def test_limits_of_segments_beside_more_heads(heads: int) -> None:
    """Segments are the smaller of the two dims that an op has: each has limits of its own."""
    q, k, v = drawn(1, heads, heads, 16, 16, dtype=torch.float64)
    low = torch.arange(16)[None] % 5
    more = {"row_limits": torch.stack((low, low + 9))}
    form = Dilated([8, 16], [1, 2])
    for got, wanted in zip(_run(q, k, v, form, "cpu", more), _run(q, k, v, form, "reference", more), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


def test_keys_outside_all_limits_are_not_read() -> None:
    """Rows in order, each near its own keys: the scores that are computed are those of the cuts' own reach."""
    q, k, v = drawn(1, 1, 1, 512, 512, dtype=torch.float32)
    low = (torch.arange(512) // 32 * 32)[None]
    k = k.clone()
    k[:, :, 300:] = torch.nan
    out, _ = _run(q, k, v, Dense(), "cpu", {"row_limits": torch.stack((low, low + 32))})
    # A key that is read and masked would still spread its NaN.
    assert out[:, :, :288].isfinite().all()


def _forget_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made = row_masks.row_masks

    def wrong(call: Any, *rest: Any) -> Any:
        limits = call.row_limits
        return made(replace(call, row_limits=torch.stack((limits[0], limits[1] + 1))), *rest)

    monkeypatch.setattr("dilcompile.lowering.view_path.views.row_masks", wrong)


def _narrow_too_much(monkeypatch: pytest.MonkeyPatch) -> None:
    narrowed = row_masks.RowMasks.narrowed
    monkeypatch.setattr(row_masks.RowMasks, "narrowed", lambda *a: (narrowed(*a)[0], max(narrowed(*a)[0], narrowed(*a)[1] - 1)))


def _forget_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dilcompile.lowering.view_path.views.row_masks", lambda *a: None)


@pytest.mark.parametrize("mutation", [_forget_the_end, _narrow_too_much, _forget_the_masks])
def test_a_mutation_is_noticed(mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    more, visible = CASES["limits of 2"]
    mutation(monkeypatch)
    with pytest.raises(AssertionError):
        _agree("cpu", Dense(), more, visible)


@pytest.mark.parametrize("kernel", ["cpu", "reference"])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flat_scores_weigh_all_keys_alike_and_keep_their_gradient(softcap: float | None, kernel: str) -> None:
    more, visible = CASES["limits of 2"]
    q, k, v = given = [x.requires_grad_() for x in drawn(BATCH, 4, 2, ROWS, KEYS, dtype=torch.float64)]
    bias = torch.randn(4, 1, KEYS, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    scores = q @ k.repeat_interleave(2, 1).mT * SCALE
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    logits = (scores - scores.detach() + bias).masked_fill(~visible[:, None], -torch.inf)
    empty = ~visible.any(-1)[:, None, :, None]
    wanted = logits.softmax(-1).masked_fill(empty, 0) @ v.repeat_interleave(2, 1)
    got, _ = _run(q, k, v, Dense(), kernel, {**more, "flat": True}, softcap=softcap, bias=bias)
    torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    grads = [
        torch.autograd.grad((out * torch.linspace(0.5, 1.5, 8, dtype=out.dtype)).sum(), [*given, bias]) for out in (got, wanted)
    ]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torch.nan_to_num(theirs), rtol=1e-9, atol=1e-9)


def test_limits_that_no_row_meets_cost_nothing() -> None:
    q, k, v = drawn(1, 2, 2, 4096, 4096, dtype=torch.float32)
    q.requires_grad_()
    out, lse = _run(q, k, v, Dense(), None, {"row_limits": torch.zeros(2, 1, 4096, dtype=torch.int64), "flat": True})
    assert not out.any()
    assert (lse == -torch.inf).all()
    with torch.profiler.profile() as profile:
        out.sum().backward()
    assert not [event for event in profile.events() if "matmul" in event.name or "bmm" in event.name]
