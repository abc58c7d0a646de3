"""The Triton kernels' numbers, run by Triton's interpreter on a CPU. Run by ``test_triton`` in a process of its own.

Triton decides when it is imported whether it interprets, so these tests can't share a process with the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import test_ops
import torch
from oracles import counts, output_scale, softmax
from test_kernels import (
    FORMS,
    SCALE,
    assert_as_good_as_eager,
    assert_gradients_in_any_layout,
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
from dilcompile.lowering import ops, triton
from dilcompile.lowering.call import Call
from dilcompile.lowering.choice import miniature, trust
from dilcompile.lowering.triton import bound, plan, split
from dilcompile.relation import Relation, Term

HEAD_DEPENDENT = [FORMS[3], FORMS[6], FORMS[9]]
SET_WITH_EXTRAS = FORMS[7]


@pytest.fixture(autouse=True)
def fresh_plans() -> None:
    plan.plan_of.cache_clear()


@pytest.mark.parametrize(
    ("form", "causal"),
    [*((form, True) for form in FORMS), *((FORMS[n], False) for n in (0, 3, 5, 10))],
    ids=str,
)
def test_output_and_every_gradient(form: Form, causal: bool) -> None:
    kv_heads = 2 if form in HEAD_DEPENDENT else 1
    q, k, v = drawn(batch=1, heads=2, kv_heads=kv_heads, q_len=29, k_len=29)
    assert_grads("triton", form, setting_of(q, k, causal=causal), q, k, v)


MASKED: list[dict[str, Any]] = [{"softcap": 2.0}, {"key_padding": True}, {"documents": "shared"}, {"documents": "own"}]


@pytest.mark.parametrize(
    ("form", "asked"),
    # All masks under branches; the others walk another kind of term under the same masks.
    [*((FORMS[3], asked) for asked in MASKED), (Dense(), MASKED[3]), (SET_WITH_EXTRAS, MASKED[1]), (FORMS[2], MASKED[3])],
    ids=str,
)
def test_softcap_padding_and_documents(form: Form, asked: dict[str, Any]) -> None:
    q, k, v = drawn(heads=1, kv_heads=1, q_len=23, k_len=23)
    assert_grads("triton", form, setting_of(q, k, causal=True), q, k, v, **operands_of(asked, length=23))


def test_everything_at_once() -> None:
    q, k, v = drawn(heads=4, kv_heads=2, q_len=23, k_len=23, v_dim=5)
    operands = operands_of({"softcap": 1.5, "key_padding": True, "documents": "own"}, length=23)
    assert_grads("triton", FORMS[6], setting_of(q, k, causal=True, left=14), q, k, v, **operands)


PLACES: list[dict[str, Any]] = [
    {"causal": True, "left": 6},
    {"left": 6, "right": 3},
    {"causal": True, "right": -1},
    {"right": 2},
    {"causal": True, "q_offset": 10},
    {"q_offset": -3, "causal": True},
    {"q_offset": 25},
]


@pytest.mark.parametrize(
    ("form", "mask"),
    [
        *((FORMS[3], mask) for mask in PLACES),
        (Dense(), PLACES[1]),
        (Dense(), PLACES[5]),
        (FORMS[4], PLACES[0]),
        (FORMS[4], PLACES[5]),
    ],
    ids=str,
)
def test_the_sites_own_window_and_offsets(form: Form, mask: dict[str, Any]) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=23, k_len=31)
    assert_grads("triton", form, setting_of(q, k, **mask), q, k, v)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 1), (6, 2), (3, 3)])
def test_grouped_query_heads(heads: int, kv_heads: int) -> None:
    q, k, v = drawn(batch=1, heads=heads, kv_heads=kv_heads, q_len=19, k_len=19)
    assert_grads("triton", FORMS[3], setting_of(q, k, causal=True), q, k, v)


def test_a_group_too_large_to_stand_side_by_side() -> None:
    q, k, v = drawn(batch=1, heads=17, kv_heads=1, q_len=5, k_len=5)
    assert_grads("triton", Dense(), setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize("union", ["multiset", "set"])
def test_branches_that_part_the_heads_of_a_group(union: Any) -> None:
    q, k, v = drawn(batch=1, heads=3, kv_heads=1, q_len=13, k_len=13)
    form = Dilated([4, 8], [1, 2], heads="grouped", union=union, coverage="zero", local=1)
    assert_grads("triton", form, setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize(
    ("form", "length"), [*((FORMS[3], length) for length in (1, 16, 17)), (Dense(), 1), (Dense(), 17), (FORMS[1], 16)], ids=str
)
def test_ragged_lengths(form: Form, length: int) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=length, k_len=length)
    assert_grads("triton", form, setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize("form", [Dense(), Dilated([64, 128], [1, 2]), Dilated([48, 96], [1, 2], union="set")], ids=str)
def test_lengths_of_many_blocks(form: Form) -> None:
    """Long enough for blocks that need no mask."""
    q, k, v = drawn(batch=1, heads=1, kv_heads=1, q_len=98, k_len=98)
    assert_grads("triton", form, setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize(("asked", "p"), [({}, 0.3), ({"documents": "own"}, 0.6)], ids=str)
def test_dropout_depends_on_positions_only(asked: dict[str, Any], p: float) -> None:
    """The reference draws by ``lowering/dropout.py``; the seed needs more than 32 bits."""
    q, k, v = (x.requires_grad_() for x in drawn(heads=2, kv_heads=1, q_len=17, k_len=19))
    operands = {**operands_of(asked, length=19), "dropout_p": p, "seed": torch.tensor([(7 << 40) + 11])}
    at = setting_of(q, k, causal=True, q_offset=2)
    results = [run(q, k, v, FORMS[3], kernel, at, **operands) for kernel in ("triton", "reference")]
    grads = [torch.autograd.grad(loss_of(*result, True), (q, k, v)) for result in results]
    for found, exact in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(found, exact, rtol=0, atol=1e-11)
    assert not torch.equal(results[0][0], run(q, k, v, FORMS[3], "triton", at, **operands_of(asked, length=19))[0])


def test_no_keys_and_no_queries() -> None:
    for q_len, k_len in ((0, 5), (5, 0), (0, 0)):
        q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=q_len, k_len=k_len)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        out, lse = run(*leaves, Dense(), "triton", setting_of(q, k))
        assert torch.equal(out, torch.zeros_like(out))
        assert bool((lse == -torch.inf).all())
        for grad in torch.autograd.grad(out.sum(), leaves):
            assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("layout", ["contiguous", "gaps"])
def test_layouts(layout: str) -> None:
    q, k, v = drawn(batch=2, heads=2, kv_heads=1, q_len=17, k_len=17, layout=layout)
    assert_grads("triton", FORMS[3], setting_of(q, k), q, k, v)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("form", [Dense(), FORMS[3]], ids=str)
def test_limits_by_row(form: Form, batch: int) -> None:
    generator = torch.Generator().manual_seed(3)
    low = torch.randint(0, 10, (batch, 23), generator=generator)
    limits = torch.stack((low, low + torch.randint(0, 12, (batch, 23), generator=generator)))
    limits[1, :, 5] = 1000
    q, k, v = (x.requires_grad_() for x in drawn(heads=2, kv_heads=1, q_len=23, k_len=31))
    at = setting_of(q, k)
    out, lse = ops.attention(
        q, k, v, None, None, None, None, str(form), False, None, None, 0, SCALE, None, 0.0, "triton", row_limits=limits
    )  # fmt: skip
    position = torch.arange(31)
    seen = (position >= limits[0][..., None]) & (position < limits[1][..., None])
    exact = softmax(q, k, v, torch.from_numpy(counts(form, at))[None] * seen[:, None], SCALE)
    torch.testing.assert_close(out, exact[0] * output_scale(form), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, exact[1], rtol=0, atol=1e-12)
    grads, wanted = (torch.autograd.grad(loss_of(*pair, True), (q, k, v)) for pair in ((out, lse), exact))
    for grad, exact_grad in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, exact_grad, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("dtype", "softcap", "dim", "v_dim"),
    [
        (torch.float32, None, 80, 96), (torch.float32, 2.0, 64, 64), (torch.float32, 40.0, 64, 64), (torch.bfloat16, None, 64, 64),
        (torch.bfloat16, None, 80, 96), (torch.float16, 2.0, 80, 96),
    ],
    ids=str,
)  # fmt: skip
def test_low_precision(dim: int, v_dim: int, dtype: torch.dtype, softcap: float | None) -> None:
    """Head sizes that are powers of two, and others, which are padded."""
    form = Dilated([8, 32], [1, 2])
    inputs = drawn(batch=1, heads=2, kv_heads=1, q_len=33, k_len=33, dim=dim, v_dim=v_dim, dtype=dtype)
    at = setting_of(inputs[0], inputs[1], causal=True)
    leaves, exact_leaves = [x.requires_grad_() for x in inputs], [x.detach().double().requires_grad_() for x in inputs]
    found = run(*leaves, form, "triton", at, softcap=softcap)
    eager = expected(*leaves, form, at, dtype, softcap=softcap)
    exact = expected(*exact_leaves, form, at, softcap=softcap)
    assert (found[0].dtype, found[1].dtype) == (dtype, torch.float32)
    sides = ((found, leaves), (eager, leaves), (exact, exact_leaves))
    grads = [torch.autograd.grad(loss_of(*pair, True), wanted) for pair, wanted in sides]
    for mine, theirs, true in zip((*found, *grads[0]), (*eager, *grads[1]), (*exact, *grads[2]), strict=True):
        assert_as_good_as_eager(mine, theirs, true, dtype)


def test_nothing_outside_the_tensors_is_read_or_written() -> None:
    """Operands that lie in not-a-number, as does what the kernel writes."""

    def framed(x: Tensor) -> Tensor:
        around = torch.full((x.shape[0] + 2, x.shape[1] + 2, x.shape[2] + 40, x.shape[3] + 8), torch.nan, dtype=x.dtype)
        inside = around[1:-1, 1:-1, 20:-20, : x.shape[3]]
        return inside.copy_(x)

    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=19, k_len=21, dim=20, v_dim=12)
    at = setting_of(q, k, causal=True)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        for form in (Dense(), FORMS[3], SET_WITH_EXTRAS):
            assert_grads("triton", form, at, framed(q), framed(k), framed(v))
    finally:
        torch.use_deterministic_algorithms(False)


# Each mutation is a mistake that has been made in some implementation; the check must notice it.


def of_columns(change: Callable[[dict[str, int]], None]) -> Callable[[pytest.MonkeyPatch], None]:
    def mutate(monkeypatch: pytest.MonkeyPatch) -> None:
        right = plan._columns

        def changed(*args: Any) -> tuple[int, ...]:
            columns = dict(zip(plan.TERM_COLUMNS, right(*args), strict=True))
            change(columns)
            return tuple(columns.values())

        monkeypatch.setattr(plan, "_columns", changed)

    return mutate


def with_the_wrong_residue(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plan._residues

    def shifted(term: Term, heads: int) -> tuple[int, ...]:
        return tuple(x if x < 0 else (x + 1) % plan._rate(term) for x in right(term, heads))

    monkeypatch.setattr(plan, "_residues", shifted)


def without_the_last_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plan._tiles
    monkeypatch.setattr(plan, "_tiles", lambda *args, **more: right(*args, **more)[:, :-1])


def with_one_pattern_for_all_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    right = plan.plan_of
    monkeypatch.setattr(bound, "plan_of", lambda *args: replace(right(*args), patterns=torch.zeros_like(right(*args).patterns)))


def without_the_gradient_of_the_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton.backward
    monkeypatch.setattr(triton, "backward", lambda call, out, lse, grad, grad_lse: right(call, out, lse, grad, None))


def without_the_joint_lse(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton.backward
    monkeypatch.setattr(triton, "backward", lambda call, out, lse, *grads: right(call, out, lse - 0.1, *grads))


def without_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bound.bind
    monkeypatch.setattr(triton, "bind", lambda call, space: right(replace(call, key_padding=None), space))


def with_documents_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    right = bound._runs
    monkeypatch.setattr(bound, "_runs", lambda documents, space: right(torch.zeros_like(documents), space))


MUTATIONS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "segments one rate longer": (of_columns(lambda x: x.update(length=x["length"] + x["rate"])), "multiset"),
    "no causality": (of_columns(lambda x: x.update(right=plan.FAR)), "multiset"),
    "shared keys counted again": (of_columns(lambda x: x.update(dedupe=0)), "set"),
    "one sink more": (of_columns(lambda x: x.update(stop=x["stop"] + (x["stop"] == 1))), "set"),
    "wrong residue": (with_the_wrong_residue, "multiset"),
    "last tile left out": (without_the_last_tile, "multiset"),
    "one pattern for all heads": (with_one_pattern_for_all_heads, "unmasked blocks"),
    "no gradient of the LSE": (without_the_gradient_of_the_lse, "multiset"),
    "not the joint LSE": (without_the_joint_lse, "multiset"),
    "no padding": (without_padding, "masked"),
    "documents joined": (with_documents_joined, "masked"),
}


def check(name: str) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=2, q_len=17, k_len=17)
    at = setting_of(q, k, causal=True)
    if name == "set":
        assert_grads("triton", Dilated([4, 8], [1, 2], union="set", sinks=1), at, q, k, v)
    elif name == "unmasked blocks":
        q, k, v = drawn(batch=1, heads=2, kv_heads=2, q_len=96, k_len=96)
        assert_grads("triton", Dilated([96], [4], coverage="zero"), setting_of(q, k), q, k, v)
    elif name == "multiset":
        assert_grads("triton", Dilated([4, 12], [1, 4]), at, q, k, v)
    else:
        operands = operands_of({"key_padding": True, "documents": "own"}, batch=1, length=17)
        operands["documents"] = torch.arange(17)[None] // 6
        assert_grads("triton", Dilated([4, 12], [1, 2]), at, q, k, v, **operands)


@pytest.mark.parametrize("name", ["set", "multiset", "masked", "unmasked blocks"])
def test_the_check_passes_without_a_mutation(name: str) -> None:
    check(name)


@pytest.mark.parametrize("name", MUTATIONS)
def test_every_mutation_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate, where = MUTATIONS[name]
    mutate(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        check(where)


def small_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands for a call has two tiles of rows and several of keys, the last ones ragged."""
    monkeypatch.setattr(miniature, "_ROWS", 41)
    monkeypatch.setattr(miniature, "_USUAL", miniature._USUAL._replace(keys=61, segment=32, before=20, behind=12))
    miniature.kinds.cache_clear()


def test_the_check_that_comes_before_a_device_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = drawn(batch=1, heads=1, kv_heads=1, q_len=17, k_len=17, dtype=torch.float32)
    call = Call(q, k, v, None, None, None, None, FORMS[3].relation(_problem(q, k, v)), 0.3)
    small_checks(monkeypatch)
    assert trust.check(triton, call, False).passes
    with_the_wrong_residue(monkeypatch)
    plan.plan_of.cache_clear()
    assert not trust.check(triton, call, False).passes


def test_the_same_numbers_every_time() -> None:
    q, k, v = (x.requires_grad_() for x in drawn(batch=1, heads=4, kv_heads=1, q_len=21, k_len=21, dtype=torch.float32))
    at = setting_of(q, k, causal=True)
    results = [run(q, k, v, FORMS[3], "triton", at) for _ in range(2)]
    grads = [torch.autograd.grad(loss_of(*result, True), (q, k, v)) for result in results]
    for one, other in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("dim", "v_dim"), [(1, 1), (32, 32), (40, 24), (96, 96), (128, 128), (192, 128), (192, 192), (256, 256)])
def test_every_head_size(dim: int, v_dim: int) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=17, k_len=17, dim=dim, v_dim=v_dim)
    # Scores of the size that a model's are.
    q = q * (dim**-0.5 / SCALE)
    assert_grads("triton", FORMS[3], setting_of(q, k, causal=True), q, k, v)


@pytest.mark.parametrize(("contiguous", "least_keys"), [(True, 256), (False, 256), (False, 1)])
def test_the_fake_has_the_strides_of_the_real(contiguous: bool, least_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the forward and, with few keys split too, of a decode step."""
    monkeypatch.setattr(split, "LEAST_KEYS", least_keys)
    test_ops.test_the_fake_has_the_strides_of_the_real(contiguous, "triton")


def test_gradients_that_come_in_any_layout() -> None:
    assert_gradients_in_any_layout("triton", 5)


FAR = 2**48


@pytest.mark.parametrize(
    ("form", "mask"),
    [
        (Dense(), {"left": 2**63 - 1, "right": 2**63 - 1}),
        (Dense(), {"left": 3, "right": -(2**62)}),
        (FORMS[3], {"left": 2**40, "q_offset": 2**29 - 23}),
        (FORMS[3], {"q_offset": -(2**29) + 23}),
        (SlidingWindow(FAR, sinks=FAR), {"causal": True}),
        (SlidingWindow(4, step=FAR), {"causal": True}),
        (Dilated([FAR, 8], [16, 1]), {"causal": True}),
        (Dilated([8], [1], sinks=FAR, local=FAR), {"causal": True}),
    ],
    ids=str,
)
def test_numbers_far_outside_of_the_sequence(form: Form, mask: dict[str, Any]) -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=20, k_len=20)
    assert_grads("triton", form, setting_of(q, k, **mask), q, k, v)


def test_classes_that_are_too_fine_are_not_cut() -> None:
    form = Dilated([42, 55], [7, 11], coverage="zero")
    q, k, v = drawn(batch=1, heads=2, kv_heads=1, q_len=55, k_len=55)
    at = setting_of(q, k, causal=True)
    relation: Relation = form.relation(_problem(q, k, v))
    assert plan.plan_of(relation, 8, 16, False, q.device).counted
    assert_grads("triton", form, at, q, k, v)
    assert not plan.plan_of(SlidingWindow(5, step=2).relation(_problem(q, k, v)), 8, 16, False, q.device).counted


def _problem(q: Tensor, k: Tensor, v: Tensor) -> Any:
    from dilcompile.lowering.call import problem_of

    return problem_of(q, k, v, True, None, None, 0)


DESCRIBED = [
    (Dense(), {"causal": True}, {}),
    (Dense(), {"left": 9, "right": 4}, {"softcap": 2.0}),
    (Dilated([12, 40], [1, 4], offset="own"), {"causal": True}, {"key_padding": True}),
    (Dilated([24, 48], [2, 3], offset="head_mod", coverage="zero"), {}, {}),
    (
        Dilated([16, 48], [1, 2], union="set", sinks=1, coverage="zero"),
        {"causal": True, "q_offset": 10},
        {"bias": (1, 2, 27, 37)},
    ),
]


@pytest.mark.parametrize(("form", "mask", "asked"), DESCRIBED, ids=str)
def test_rows_loaded_by_descriptors(
    form: Form, mask: dict[str, Any], asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Residue classes, ragged ends, a head size that is padded; what lies behind the keys is not-a-number and is not read."""
    from triton.runtime.interpreter import InterpreterBuilder

    right, made = InterpreterBuilder.create_make_tensor_descriptor, []
    monkeypatch.setattr(
        InterpreterBuilder, "create_make_tensor_descriptor", lambda *args, **more: made.append(1) or right(*args, **more)
    )
    tile = bound.Bound.tile
    monkeypatch.setattr(bound.Bound, "tile", lambda *args: replace(tile(*args), described=True))
    batch = 2 if asked.get("key_padding") else 1
    q, k, v = drawn(batch=batch, heads=2, kv_heads=2, q_len=27, k_len=37, dim=24, v_dim=8)
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 9), value=torch.nan)[:, :, :37] for x in (k, v))
    operands = operands_of(asked, batch=batch, length=37)
    assert_grads("triton", form, setting_of(q, k, **mask), q, k, v, **operands)
    assert made


def test_rows_that_begin_between_16_bytes_have_no_descriptors() -> None:
    q, k, v = drawn(batch=1, heads=2, kv_heads=2, q_len=9, k_len=9, dim=24, v_dim=8, dtype=torch.bfloat16)
    call = Call(q, k, v, None, None, None, None, Dense().relation(_problem(q, k, v)), SCALE)
    taken = bound.bind(call)
    made = taken.plan(16, 16)
    assert taken.describable(made, k, v)
    assert not taken.describable(made, k[..., 1:], v)
    assert not taken.describable(made, torch.empty(1, 2, 9, 20, dtype=torch.bfloat16), v)
    assert not taken.describable(replace(made, counted=True), k, v)
