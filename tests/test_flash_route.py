"""Kernels that are one launch of a flash op: their windows, packed documents, layouts and argument forms, without a device.

The ops run as stand-ins (``flash_ops``) under the real schemas and signatures; their numbers are compared with float64.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import flash_ops
import pytest
import torch
from flash_ops import Flash, aten_on_cpu, package_on_cpu
from test_kernels import assert_grads, drawn, operands_of, setting_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import aten_flash, cudnn, efficient, flash, flash_attn, flash_band, native, reference, select, whole
from dilcompile.lowering.band import Band, band_of
from dilcompile.lowering.call import Call, Held, merge_grad, problem_of, relation_of
from dilcompile.lowering.choice import contest, trust
from dilcompile.lowering.choice.miniature import miniature
from dilcompile.lowering.packed import packed
from dilcompile.lowering.view_path import pieces
from dilcompile.progression import Progression
from dilcompile.report import kernels

ONE_LAUNCH: tuple[ModuleType, ...] = (flash_band, flash_attn, efficient, cudnn)
ROUTES: tuple[ModuleType, ...] = (*ONE_LAUNCH, flash)
NAMES = [kernel.__name__.rpartition(".")[2] for kernel in ROUTES]


@pytest.fixture(autouse=True)
def nothing_known() -> Iterator[None]:
    trust.forget()
    yield
    trust.forget()


@contextmanager
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Flash, Flash]]:
    """The ops on the CPU, and kernels that take tensors of the CPU and of float64 for those of a device."""

    def refusal_of_half(call: Call, largest_head: int) -> str | None:
        size = call.problem
        return "head sizes" if size.head_dim != size.v_dim or size.head_dim % 8 or size.head_dim > largest_head else None

    monkeypatch.setattr(aten_flash, "refusal_of_half", refusal_of_half)
    monkeypatch.setattr(efficient, "supports", lambda call, backward: _efficient_on_cpu(call))
    monkeypatch.setattr(flash_attn, "_absent", lambda: None)
    with aten_on_cpu() as aten, package_on_cpu() as package:
        yield aten, package


def _efficient_on_cpu(call: Call) -> str | None:
    size = call.problem
    if call.softcap is not None or call.documents is not None or size.group != 1 or size.head_dim % 8 or size.v_dim % 8:
        return "not its call"
    return whole.beyond_whole(call) or efficient._of_band(call)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Flash, Flash]]:
    with stand_ins(monkeypatch) as held:
        yield held


def call_of(
    form: Form, causal: bool = False, q_offset: int = 0, left: int | None = None, right: int | None = None, softcap: float | None = None,
    documents: Tensor | None = None, **sizes: Any,
) -> Call:  # fmt: skip
    q, k, v = drawn(**sizes)
    problem = problem_of(q, k, v, causal, left, right, q_offset)
    return Call(
        q, k, v, None, documents, None, None, relation_of(form, problem), 0.4, softcap, merge_grad=merge_grad(form)
    )  # fmt: skip


def drawn_documents(batch: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, length, generator=generator) > 0.8).cumsum(1)


OFFSET = {"q_len": 11, "k_len": 37}
CALLS: dict[str, Callable[..., Call]] = {
    "every key": lambda **m: call_of(Dense(), **m),
    "causal": lambda **m: call_of(Dense(), causal=True, **m),
    "window": lambda **m: call_of(SlidingWindow(6), causal=True, **m),
    "window of both sides": lambda **m: call_of(SlidingWindow(6), **m),
    "the site's window": lambda **m: call_of(Dense(), left=5, right=2, **m),
    "the narrower of two": lambda **m: call_of(SlidingWindow(9), left=4, causal=True, **m),
    "one chunk in the middle": lambda **m: call_of(Dense(), causal=True, q_offset=7, **(OFFSET | m)),
    "one chunk at the end": lambda **m: call_of(Dense(), causal=True, q_offset=26, **(OFFSET | m)),
    "a window in the middle": lambda **m: call_of(SlidingWindow(4), q_offset=20, **(OFFSET | m)),
    "a causal window in the middle": lambda **m: call_of(SlidingWindow(4), causal=True, q_offset=13, **(OFFSET | m)),
    "a window that ends behind the keys": lambda **m: call_of(SlidingWindow(9), q_offset=24, **(OFFSET | m)),
    "causal, fewer queries than keys": lambda **m: call_of(Dense(), causal=True, **(OFFSET | m)),
    "one query": lambda **m: call_of(Dense(), causal=True, q_offset=36, **({"q_len": 1, "k_len": 37} | m)),
    "more queries than keys": lambda **m: call_of(Dense(), **({"q_len": 37, "k_len": 11} | m)),
    "documents": lambda **m: call_of(Dense(), causal=True, documents=drawn_documents(2, 37), **m),
    "documents for all": lambda **m: call_of(Dense(), documents=drawn_documents(1, 37), **m),
    "documents and a window": lambda **m: call_of(SlidingWindow(4), causal=True, documents=drawn_documents(2, 37), **m),
    "documents, the last queries": lambda **m: call_of(
        SlidingWindow(4), causal=True, q_offset=26, documents=drawn_documents(2, 37), **(OFFSET | m)
    ),
    "all of documents, queries in the middle": lambda **m: call_of(
        Dense(), q_offset=9, documents=drawn_documents(2, 37), **(OFFSET | m)
    ),
    "documents, queries in the middle": lambda **m: call_of(
        Dense(), causal=True, q_offset=9, documents=drawn_documents(2, 37), **(OFFSET | m)
    ),
    "softcap": lambda **m: call_of(Dense(), causal=True, softcap=1.5, **m),
    "softcap and documents": lambda **m: call_of(Dense(), softcap=1.5, documents=drawn_documents(2, 37), **m),
    "values of another size": lambda **m: call_of(Dense(), causal=True, **({"v_dim": 16} | m)),
    "branches": lambda **m: call_of(Dilated([8, 16], [1, 2]), causal=True, **m),
    "branches of all residues": lambda **m: call_of(Dilated([4, 8, 16], [1, 2, 4], offset="own"), **m),
    "branches, sinks and near keys": lambda **m: call_of(
        Dilated([8, "seq"], [1, 2], offset="head_block", sinks=2, local=3), causal=True, **m
    ),
}
# Who can compute what: forward, and backward where it differs.
EVERYWHERE = {"every key", "causal"}
SQUARE = EVERYWHERE | {"more queries than keys", "causal, fewer queries than keys"}
CAUSAL_OR_ALL = SQUARE | {
    "one query",
    "window", "the narrower of two", "one chunk in the middle", "one chunk at the end", "a causal window in the middle",
    "values of another size",
}  # fmt: skip
BANDS = (CAUSAL_OR_ALL - {"values of another size"}) | {
    "window of both sides", "the site's window", "a window in the middle", "a window that ends behind the keys", "documents",
    "documents for all", "documents and a window", "documents, the last queries", "documents, queries in the middle",
    "all of documents, queries in the middle",
}  # fmt: skip
TAKES = {
    "flash_band": BANDS,
    "flash_attn": BANDS | {"softcap", "softcap and documents"},
    "efficient": CAUSAL_OR_ALL,
    "cudnn": SQUARE,
    "flash": (BANDS | {"branches", "branches of all residues", "branches, sinks and near keys"}),
}


@pytest.mark.parametrize("name", NAMES)
def test_what_each_kernel_takes(name: str, ops: object) -> None:
    taken = {
        wanted for wanted, make in CALLS.items() if select.refusal(select.KERNELS[name], make(**_heads(name)), False) is None
    }
    assert taken == TAKES[name]


def _heads(name: str) -> dict[str, int]:
    return {"kv_heads": 4} if name == "efficient" else {}


PAIRS = [(name, wanted) for name in NAMES for wanted in CALLS if wanted in TAKES[name]]


def assert_equal(found: Any, wanted: Any, tolerance: float = 1e-11) -> None:
    for mine, true in zip(found, wanted, strict=True):
        if true is None:
            assert mine is None
            continue
        torch.testing.assert_close(mine, true, rtol=tolerance, atol=tolerance)


def assert_right(name: str, call: Call) -> None:
    """Output, LSE and gradients, with and without one of the LSE, against the reference in float64."""
    kernel = select.KERNELS[name]
    out, lse = reference.forward(call)
    found = kernel.forward(call)
    assert found[0].shape == out.shape
    assert found[1].is_contiguous()
    assert_equal(found, (out, lse))
    if kernel.supports(call, True) is not None:
        assert call.softcap is not None
        return
    generator = torch.Generator().manual_seed(3)
    grad_out, grad_lse = (torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in (out, lse))
    for into_lse in (None, grad_lse):
        wanted = reference.backward(call, out, lse, grad_out, into_lse)
        assert_equal(kernel.backward(call, out, lse, grad_out, into_lse), wanted)


@pytest.mark.parametrize(("name", "wanted"), PAIRS)
def test_numbers(name: str, wanted: str, ops: object) -> None:
    assert_right(name, CALLS[wanted](**_heads(name)))


@pytest.mark.parametrize("asked", [{}, {"documents": "own"}, {"documents": "shared"}], ids=str)
@pytest.mark.parametrize("form", [Dense(), SlidingWindow(6)], ids=str)
@pytest.mark.parametrize("name", ["flash_band", "flash_attn", "flash"])
def test_through_the_operator_against_the_oracle(name: str, form: Form, asked: dict[str, Any], ops: object) -> None:
    """By name, with autograd through the operator, and a scale that is not above 0."""
    q, k, v = drawn()
    at = setting_of(q, k, causal=True)
    assert_grads(name, form, at, q, k, v, **operands_of(asked))
    if not asked:
        out = attention(q, k, v, form, is_causal=True, scale=-0.3, kernel=name)
        torch.testing.assert_close(out, attention(q, k, v, form, is_causal=True, scale=-0.3, kernel="reference"))


@pytest.mark.parametrize("layout", ["heads last", "contiguous", "gaps"])
@pytest.mark.parametrize("name", NAMES)
def test_layouts(name: str, layout: str, ops: object) -> None:
    for wanted in {"window", "documents", "one chunk in the middle", "causal", "branches"} & TAKES[name]:
        assert_right(name, CALLS[wanted](**_heads(name), layout=layout))


@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 1), (6, 2), (4, 4)])
def test_query_heads_share_key_heads_without_copies(heads: int, kv_heads: int, ops: tuple[Flash, Flash]) -> None:
    for name in ("flash_band", "flash_attn"):
        for wanted in ("window", "documents and a window"):
            assert_right(name, CALLS[wanted](heads=heads, kv_heads=kv_heads))


def test_one_launch_a_pass(ops: tuple[Flash, Flash]) -> None:
    """Forward, backward, and for a gradient of the LSE one more of each."""
    aten, package = ops
    for held, name in ((aten, "flash_band"), (package, "flash_attn")):
        for wanted, kind in (("window", ""), ("documents and a window", "packed ")):
            held.launches.clear()
            assert_right(name, CALLS[wanted]())
            one = [f"{kind}forward", f"{kind}backward"]
            assert held.launches == [*one, f"{kind}backward", *one]


def test_a_triangle_is_called_causal(ops: tuple[Flash, Flash]) -> None:
    """Ops have kernels of their own for it, which windows don't get."""
    for held, name in zip(ops, ("flash_band", "flash_attn"), strict=True):
        for wanted, causal in (("causal", True), ("documents", True), ("window", False), ("every key", False)):
            select.KERNELS[name].forward(CALLS[wanted]())
            assert held.given["is_causal"] == causal


def test_windows_of_pieces_go_through_the_op(ops: tuple[Flash, Flash], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a causal window, nothing is left to explicit products."""
    from dilcompile.lowering.view_path import engines

    def none(*arguments: object) -> Any:
        raise AssertionError("an explicit product")

    monkeypatch.setattr(engines, "_scores", none)
    for wanted in ("window", "window of both sides", "the site's window", "branches"):
        assert_right("flash", CALLS[wanted]())
    with pytest.raises(AssertionError, match="an explicit product"):
        assert_right("flash", CALLS["branches, sinks and near keys"]())


def test_the_window_of_every_piece_is_its_own() -> None:
    taken = left = 0
    for make in CALLS.values():
        call = make()
        for piece in pieces.plan(call.relation, 0, call.problem.kv_heads).pieces:
            gap = torch.arange(piece.keys) - torch.arange(piece.rows)[:, None]
            wanted = torch.ones_like(gap, dtype=torch.bool)
            if piece.low is not None:
                wanted &= gap >= piece.low
            if piece.high is not None:
                wanted &= gap <= piece.high
            band = flash.band_of_piece(piece)
            if band is None:
                left += 1
                continue
            taken += 1
            assert torch.equal(flash_ops.visible(piece.rows, piece.keys, band.left, band.right), wanted)
    assert taken > 50
    assert left == 0


def test_any_band_of_a_piece_is_the_ops_window_or_none() -> None:
    limits = (None, -4, -1, 0, 1, 2, 5)
    taken = 0
    for rows, keys, low, high in itertools.product((1, 3, 4), (1, 3, 6), limits, limits):
        band = flash.band_of_piece(pieces.Piece((), 0, 0, 0, rows, 0, keys, 1, low, high))
        if band is None:
            continue
        taken += 1
        gap = torch.arange(keys) - torch.arange(rows)[:, None]
        wanted = torch.ones_like(gap, dtype=torch.bool)
        wanted &= torch.tensor(True) if low is None else gap >= low
        wanted &= torch.tensor(True) if high is None else gap <= high
        assert torch.equal(flash_ops.visible(rows, keys, band.left, band.right), wanted), (rows, keys, low, high)
    assert taken > 100


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_check_that_a_device_makes_passes(name: str, dtype: torch.dtype, ops: object) -> None:
    for wanted in TAKES[name]:
        call = CALLS[wanted](**_heads(name), dtype=dtype)
        for backward in (False, True):
            if select.KERNELS[name].supports(call, backward) is None:
                verdict = trust.check(select.KERNELS[name], call, backward)
                assert verdict.passes, (wanted, verdict)


@pytest.mark.parametrize("name", NAMES)
def test_what_stands_for_a_call_is_taken_by_the_kernel(name: str, ops: object) -> None:
    """Else the check of a device would find wrong numbers where there are none."""
    kernel = select.KERNELS[name]
    for make in CALLS.values():
        call = make(**_heads(name))
        for more in ({}, {"right": 50}, {"left": 3}, {"q_offset": 5}, {"q_len": 7}, {"left": 2, "right": 1}):
            small, size = miniature(call), replace(call.relation.problem, **_of_problem(more))
            call = replace(call, q=torch.zeros(2, size.heads, size.q_len, 8), relation=replace(call.relation, problem=size))
            if select.refusal(kernel, call, False) is None:
                small = miniature(call)
                assert select.refusal(kernel, small, False) is None, (call.relation, small.relation)


def _of_problem(more: dict[str, int]) -> dict[str, int]:
    return {{"left": "window_left", "right": "window_right"}.get(name, name): value for name, value in more.items()}


# What is wrong is seen


def shifted(monkeypatch: pytest.MonkeyPatch, change: Callable[[Band], Band]) -> None:
    monkeypatch.setattr(whole, "band_of", lambda *given: change(band_of(*given)))  # type: ignore[arg-type]


def with_a_key_less_before(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, lambda band: replace(band, left=band.left - 1))


def with_a_key_more_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, lambda band: replace(band, right=band.right + 1))


def with_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    shifted(monkeypatch, lambda band: replace(band, first=band.first - 1, stop=band.stop - 1))


def with_one_document_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: Any) -> Any:
        held = packed(*arguments)
        middle = len(held.keys) // 2
        held.keys[middle] += 1
        return held

    monkeypatch.setattr(whole, "packed", wrong)


def with_offsets_in_int64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "packed", lambda *a: replace(held := packed(*a), queries=held.queries.long()))


def with_the_longest_too_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "packed", lambda *a: replace(held := packed(*a), most_keys=held.most_keys - 1))


def with_batch_rows_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "packed", lambda documents, *rest: packed(documents[:1], *rest))


def without_the_lse_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_with_lse_gradient", lambda laid, op, lse, grad_lse, grads, *_: grads)


def with_heads_and_rows_of_the_lse_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "_lse_unlaid", lambda lse, batch: lse.reshape(batch, lse.shape[0], -1))


def with_gradients_of_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole._uncut
    monkeypatch.setattr(whole, "_uncut", lambda grad, band, like: right(grad, replace(band, first=0, stop=grad.shape[2]), like))


MUTATIONS = [
    (with_a_key_less_before, "window"), (with_a_key_more_behind, "window"), (with_other_keys, "a causal window in the middle"),
    (with_one_document_too_long, "documents"), (with_offsets_in_int64, "documents"), (with_the_longest_too_short, "documents"),
    (with_batch_rows_joined, "documents"), (without_the_lse_gradient, "window"),
    (with_heads_and_rows_of_the_lse_swapped, "documents"), (with_gradients_of_other_keys, "a causal window in the middle"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["flash_band", "flash_attn"])
@pytest.mark.parametrize(("mutation", "wanted"), MUTATIONS)
def test_every_mutation_is_noticed(
    mutation: Callable[[pytest.MonkeyPatch], None], wanted: str, name: str, ops: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutation(monkeypatch)
    with pytest.raises((AssertionError, RuntimeError)):
        assert_right(name, CALLS[wanted]())


def test_the_padding_of_the_efficient_ops_lse_is_noticed(ops: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficient, "_LSE_ROWS", 16)
    with pytest.raises(AssertionError, match="padded to 32 rows"):
        assert_right("efficient", CALLS["causal"](**_heads("efficient")))


# Argument forms


class Recorded(TorchDispatchMode):
    """The attention ops that are called, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "attention" in func.name():
            self.seen.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


def fits(schema: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Do the arguments bind to the schema, each to one of its type?"""
    parameters = torch._C.parse_schema(f"aten::op{schema}").arguments
    positional = [one for one in parameters if not one.kwarg_only]
    if len(args) > len(positional) or not set(kwargs) <= {one.name for one in parameters[len(args) :]}:
        return False
    held = {one.name: value for one, value in zip(positional, args, strict=False)} | kwargs
    return all(one.name in held or one.has_default_value() for one in parameters) and all(
        _of_type(str(one.type), held[one.name]) for one in parameters if one.name in held
    )


def _of_type(kind: str, value: Any) -> bool:
    if value is None:
        # Undefined tensors are tensors.
        return kind.startswith(("Optional", "Tensor"))
    plain = {"Tensor": Tensor, "bool": bool, "float": (float, int), "int": int, "SymInt": int}
    kind = kind.removeprefix("Optional[").removesuffix("]")
    return isinstance(value, plain[kind]) and (kind == "bool" or not isinstance(value, bool))


@pytest.mark.parametrize("name", [name for name in NAMES if name != "flash_attn"])
def test_arguments_fit_the_schemas_of_torch_2_11_too(name: str, ops: object) -> None:
    """Those of the torch that runs here are checked by its dispatcher in all tests above."""
    seen = Recorded()
    for wanted in TAKES[name]:
        with seen:
            assert_right(name, CALLS[wanted](**_heads(name)))
    assert seen.seen
    for func, args, kwargs in seen.seen:
        schema = flash_ops.SCHEMAS_OF_2_11[func._schema.name.removeprefix("aten::")]
        assert fits(schema, args, kwargs), func


def test_arguments_that_do_not_fit_are_noticed(ops: object) -> None:
    seen = Recorded()
    with seen:
        assert_right("flash_band", CALLS["window"]())
    func, args, kwargs = seen.seen[0]
    schema = flash_ops.SCHEMAS_OF_2_11[func._schema.name.removeprefix("aten::")]
    assert not fits(schema, args[:-1], kwargs)
    assert not fits(schema, (*args, 1), kwargs)
    assert not fits(schema, (args[1], *args[:-1]), kwargs)
    assert not fits(schema, args, kwargs | {"window": 3})
    assert not fits(schema, args, kwargs | {"window_size_left": 1.5})
    with pytest.raises(RuntimeError, match=r"(?i)unknown keyword"):
        torch.ops.aten._flash_attention_forward(*args, **kwargs, window=3)


@pytest.mark.parametrize(
    ("wanted", "window"), [("documents", (-1, 0)), ("documents for all", (-1, -1)), ("documents and a window", (3, 0))]
)
def test_packed_documents_are_given_as_torchs_varlen_attn_gives_them(
    wanted: str, window: tuple[int, int], ops: tuple[Flash, Flash]
) -> None:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    call = CALLS[wanted]()
    assert call.documents is not None
    out, lse = flash_band.forward(call)
    mine = ops[0].given
    held = packed(call.documents, 2, 37, 0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (call.q, call.k, call.v))
    found: Any = varlen_attn(
        q, k, v, held.queries, held.keys, held.most_queries, held.most_keys, return_aux=AuxRequest(lse=True), scale=call.scale,
        window_size=window, enable_gqa=True,
    )  # fmt: skip
    theirs = ops[0].given
    # No window, and what is behind the query of a causal one, may be said in two ways.
    limits = [flash_ops.window_of(given["is_causal"], *given["window"], 9, 9) for given in (mine, theirs)]
    assert torch.equal(*limits)
    for name in set(theirs) - {"window"}:
        value = theirs[name]
        assert torch.equal(mine[name], value) if isinstance(value, Tensor) else mine[name] == value, name
    assert torch.equal(out, found[0].view(2, 37, 4, 8).transpose(1, 2))
    assert torch.equal(lse, found[1].view(4, 2, 37).transpose(0, 1))


@pytest.mark.parametrize("impl", ["_fa3", "_fa4"])
def test_arguments_bind_to_what_the_registry_puts_in_the_ops_place(impl: str, ops: object) -> None:
    """torch's adapters of FlashAttention 3 and 4, which can be imported without them."""
    module = importlib.import_module(f"torch.nn.attention.{impl}")
    ends = {"forward": "_default" if impl == "_fa3" else "", "backward": ""}
    adapters = {
        f"aten::_flash_attention_{way}": inspect.signature(getattr(module, f"{impl}_flash_attention_{way}_impl{end}"))
        for way, end in ends.items()
    }
    seen = Recorded()
    with seen:
        for wanted in ("every key", "causal", "window", "documents", "documents and a window"):
            assert_right("flash_band", CALLS[wanted]())
    assert {func._schema.name for func, *_ in seen.seen} == set(adapters)
    windows = []
    for func, args, kwargs in seen.seen:
        held = adapters[func._schema.name].bind(*args, **kwargs).arguments
        windows.append(tuple(held.get(name) for name in ("window_size_left", "window_size_right")))
    # torch 2.11 refuses FA4's backward if any window is given, even none.
    assert set(windows) == {(None, None), (5, 0), (3, 0)}


@pytest.mark.parametrize("name", ["flash_band", "efficient", "cudnn"])
def test_torchs_own_shapes(name: str) -> None:
    """On operands that hold no data torch's own shape functions of the ops answer."""
    kernel = select.KERNELS[name]
    for wanted in sorted(TAKES[name]):
        call = CALLS[wanted](**_heads(name), dtype=torch.bfloat16)
        if call.documents is not None:
            # How many there are is known from data alone.
            continue
        q, k, v = (torch.empty(x.shape, dtype=x.dtype, device="meta") for x in (call.q, call.k, call.v))
        faked = replace(call, q=q, k=k, v=v)
        out, lse = kernel.forward(faked)
        assert (out.shape, out.dtype) == ((*q.shape[:3], v.shape[3]), q.dtype)
        assert (lse.shape, lse.dtype) == (q.shape[:3], torch.float32)
        if name == "efficient":
            # torch 2.13's shape function of the op's backward forgets its operand `out`.
            continue
        grads = kernel.backward(faked, out, lse, torch.empty_like(out), torch.empty_like(lse))
        assert [None if x is None else x.shape for x in grads] == [q.shape, k.shape, v.shape, None]


def test_torchs_own_shapes_of_packed_documents() -> None:
    held = packed(drawn_documents(2, 37), 2, 37, 0)
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to("meta", torch.bfloat16) for x in drawn())
    offsets = replace(held, queries=held.queries.to("meta"), keys=held.keys.to("meta"))
    laid = whole.Laid(q, k, v, Band(0, 37, 4, 0), offsets, 0.4, None)
    out, lse = aten_flash.AtenFlash().forward(laid)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (4, 74), torch.float32)
    grads = aten_flash.AtenFlash().backward(laid, out, lse, torch.empty_like(out))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_the_packages_functions_are_called_by_their_signatures(ops: tuple[Flash, Flash]) -> None:
    """Nothing but names that 2.7 and 2.8 know; those without a default are all given."""
    for text in flash_ops.SIGNATURES_OF_FLASH_ATTN.values():
        signature = flash_ops.signature_of(text)
        required = [name for name, one in signature.parameters.items() if one.default is inspect.Parameter.empty]
        signature.bind(**dict.fromkeys(required))
        with pytest.raises(TypeError):
            signature.bind(**dict.fromkeys(required[:-1]))
        with pytest.raises(TypeError):
            signature.bind(**dict.fromkeys([*required, "window_size"]))


# Packing


def test_packing_waits_for_the_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    right, waits = Tensor.tolist, []
    monkeypatch.setattr(Tensor, "tolist", lambda x: waits.append("tolist") or right(x))
    for name in ("nonzero", "item", "__int__", "__bool__", "__index__", "cpu"):
        monkeypatch.setattr(Tensor, name, lambda *_, name=name: pytest.fail(f"waits in {name}"))
    packed(torch.tensor([[0, 0, 1, 1, 1], [7, 7, 7, 7, 7]]), 2, 4, 1)
    assert waits == ["tolist"]


def test_documents_are_packed_as_drawn() -> None:
    held = packed(torch.tensor([[0, 0, 1, 1, 1], [7, 7, 7, 7, 7]]), 2, 4, 1)
    assert held.queries.tolist() == [0, 1, 4, 8]
    assert held.keys.tolist() == [0, 2, 5, 10]
    assert (held.most_queries, held.most_keys) == (4, 5)
    assert packed(torch.tensor([[0, 0, 1]]), 3, 3, 0).keys.tolist() == [0, 2, 3, 5, 6, 8, 9]
    # Equal numbers that are not neighbours are two documents.
    assert packed(torch.tensor([[4, 5, 4]]), 1, 3, 0).keys.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(20))
def test_packing_by_hand(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, keys, rows = (int(torch.randint(1, most, (1,), generator=generator)) for most in (4, 30, 30))
    rows = min(rows, keys)
    first = int(torch.randint(0, keys - rows + 1, (1,), generator=generator))
    documents = drawn_documents(batch, keys, seed)
    wanted: list[tuple[int, int]] = []
    for b in range(batch):
        numbers = documents[b].tolist()
        for number in dict.fromkeys(numbers):
            positions = [i for i, n in enumerate(numbers) if n == number]
            wanted.append((sum(first <= i < first + rows for i in positions), len(positions)))
    held = packed(documents, batch, rows, first)
    assert list(zip(held.queries.diff().tolist(), held.keys.diff().tolist(), strict=True)) == wanted
    assert (held.most_queries, held.most_keys) == tuple(max(column) for column in zip(*wanted, strict=True))


# The band


def test_every_band_is_the_relation_and_no_row_is_without_keys() -> None:
    found = 0
    for rows in range(1, 6):
        for keys in range(0, 8):
            for offset in range(-3, 8):
                for left in (None, 0, 1, 3, 9):
                    for right in (None, 0, 1, 4, 9):
                        band = band_of(_banded(rows, keys, offset, left, right))
                        if isinstance(band, str):
                            continue
                        found += 1
                        at = torch.arange(rows)[:, None] + offset
                        gap = torch.arange(keys) - at
                        wanted = torch.ones_like(gap, dtype=torch.bool)
                        wanted &= torch.tensor(True) if left is None else gap >= -left
                        wanted &= torch.tensor(True) if right is None else gap <= right
                        seen = torch.zeros_like(wanted)
                        seen[:, band.first : band.stop] = flash_ops.visible(rows, band.stop - band.first, band.left, band.right)
                        assert torch.equal(seen, wanted), (rows, keys, offset, left, right, band)
                        assert seen.any(1).all()
    assert found > 4000


def _banded(rows: int, keys: int, offset: int, left: int | None, right: int | None) -> Any:
    q, k = torch.empty(1, 1, rows, 8), torch.empty(1, 1, keys, 8)
    return relation_of(Dense(), problem_of(q, k, k, False, left, right, offset))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: call_of(SlidingWindow(4, sinks=2)), "not every key or one window"),
        (lambda: call_of(Dilated([8, 16], [1, 2])), "not every key or one window"),
        (lambda: call_of(SlidingWindow(8, step=2)), "of the window only every 2th key is seen"),
        (lambda: call_of(Dense(), left=-1), "the window leaves out the query's own key"),
        (lambda: call_of(Dense(), causal=True, q_offset=-3), "37 queries from position -3 on see only 34 keys"),
        (lambda: call_of(Dense(), causal=True, q_len=37, k_len=20), "37 queries from position 0 on see only 20 keys"),
    ],
)
def test_relations_that_are_no_band_say_why(make: Callable[[], Call], reason: str) -> None:
    found = band_of(make().relation)
    assert isinstance(found, str)
    assert reason in found


# Reasons


def on_cuda(call: Call) -> Call:
    """The call with operands that hold no data, on a CUDA device."""

    def there(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape, dtype=x.dtype, device="cuda")

    return replace(call, q=there(call.q), k=there(call.k), v=there(call.v), documents=there(call.documents))  # type: ignore[arg-type]


HALF: dict[str, Any] = {"dtype": torch.bfloat16}
REASONS = [
    ("flash_band", lambda: call_of(Dense(), dtype=torch.float32), "the dtype is torch.float32, not float16 or bfloat16"),
    ("flash_band", lambda: call_of(Dense(), dim=12, v_dim=12, **HALF), "the head size 12 is not a multiple of 8 up to 256"),
    ("flash_band", lambda: call_of(Dense(), dim=264, v_dim=264, **HALF), "the head size 264 is not a multiple of 8 up to 256"),
    ("flash_band", lambda: call_of(Dense(), v_dim=16, **HALF), "head sizes of q and v differ (8 and 16)"),
    ("flash_band", lambda: call_of(Dense(), softcap=2.0, **HALF), "softcap"),
    ("flash_band", lambda: call_of(SlidingWindow(4), documents=drawn_documents(2, 37), **HALF), "documents under a window behind the query"),
    ("flash_band", lambda: call_of(Dense(), q_offset=30, documents=drawn_documents(2, 37), **OFFSET, **HALF),
     "11 queries from position 30 on, of which some are in no document"),
    ("flash", lambda: call_of(Dense(), dim=256, v_dim=256, **HALF), "the head size 256 is not a multiple of 8 up to 248"),
    ("cudnn", lambda: call_of(Dense(), dim=136, v_dim=136, **HALF), "the head size 136 is not a multiple of 8 up to 128"),
    ("cudnn", lambda: call_of(SlidingWindow(4), **HALF), "a window"),
    ("cudnn", lambda: call_of(Dense(), causal=True, q_offset=26, **OFFSET, **HALF), "causal attention starts at key position 26, not at 0"),
    ("cudnn", lambda: CALLS["documents"](**HALF), "documents"),
    ("efficient", lambda: call_of(Dense(), dtype=torch.float64, kv_heads=4), "the dtype is torch.float64, not float16, bfloat16 or float32"),
    ("efficient", lambda: call_of(Dense(), **HALF), "2 query heads share a key head: the op would need copies of the keys"),
    ("efficient", lambda: call_of(Dense(), kv_heads=4, dim=12, **HALF), "a head size (12 and 8) is not a multiple of 8"),
    ("efficient", lambda: call_of(SlidingWindow(4), kv_heads=4, **HALF), "a window that does not end at the query"),
    ("flash_attn", lambda: call_of(Dense(), **HALF), "the package flash_attn is not installed (pip install flash-attn)"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "make", "reason"), REASONS)
def test_reasons(name: str, make: Callable[[], Call], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash_attn, "_version", lambda: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        found = select.KERNELS[name].supports(on_cuda(make()), False)
    assert found is not None
    assert reason in found


@pytest.mark.parametrize("name", NAMES)
def test_tensors_of_another_device_are_refused(name: str) -> None:
    assert (
        select.KERNELS[name].supports(call_of(Dense(), kv_heads=4, **HALF), False)
        == "the tensors are on cpu, not on a CUDA device"
    )


@pytest.mark.parametrize(
    "more", [{"key_padding": torch.ones(2, 37, dtype=torch.bool)}, {"flat": True}, {"bias": torch.zeros(37)}]
)
@pytest.mark.parametrize("name", NAMES[:4])
def test_what_no_launch_takes(name: str, more: dict[str, Any], ops: object) -> None:
    assert select.refusal(select.KERNELS[name], replace(call_of(Dense(), kv_heads=4), **more), False) is not None


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        (None, "the package flash_attn is not installed (pip install flash-attn)"),
        ("2.6.3", "flash_attn is 2.6.3, not 2.7 or a newer 2.x"),
        ("3.0.0", "flash_attn is 3.0.0, not 2.7 or a newer 2.x"),
        ("2.8.3.post2", "flash_attn 2.8.3.post2 has no flash_attn_interface"),
    ],
)
def test_a_package_that_is_not_there_or_another_is_no_error(
    version: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flash_attn, "_version", lambda: version)
    assert flash_attn._absent() == reason
    monkeypatch.setattr(flash_attn, "_has_functions", lambda: True)
    assert flash_attn._absent() == (None if version is not None and version.startswith("2.8") else reason)


def test_the_packages_softcap_has_no_backward(ops: object) -> None:
    call = CALLS["softcap"]()
    assert flash_attn.supports(call, False) is None
    assert flash_attn.supports(call, True) == "a softcap: its backward takes no gradient of the LSE"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Callable[[tuple[int, int], str | None], None]:
    """A device of this compute capability, and what the user activated."""

    def of(capability: tuple[int, int], impl: str | None) -> None:
        monkeypatch.setattr(aten_flash, "_capability", lambda device: capability)
        monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: impl)

    return of


@pytest.mark.parametrize(
    ("capability", "impl", "head_dim", "backward", "reason"),
    [
        ((9, 0), None, 128, True, None),
        ((7, 5), None, 128, False, "compute capability 7.5 is older than 8.0"),
        ((8, 9), None, 224, False, None),
        ((8, 9), None, 224, True, "the head size 224 has no backward on compute capability 8.9"),
        ((9, 0), "FA3", 128, True, None),
        ((10, 0), "FA3", 128, False, "FA3 is activated, which takes compute capability 9.x, not 10.0"),
        ((8, 0), "FA4", 64, False, "FA4 is activated, which takes compute capability 9.x or 10.x, not 8.0"),
        ((10, 0), "FA4", 64, False, None),
        ((8, 0), "another", 64, False, None),
    ],
)
def test_devices_and_activated_implementations(
    capability: tuple[int, int], impl: str | None, head_dim: int, backward: bool, reason: str | None, device: Callable[..., None]
) -> None:
    device(capability, impl)
    assert aten_flash._of_device(torch.device("cuda"), head_dim, backward) == reason


def test_another_implementation_is_checked_anew(device: Callable[..., None]) -> None:
    """What was found about FlashAttention 2 says nothing about FA3; it is never activated for the user."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = on_cuda(call_of(Dense(), **HALF))
    device((9, 0), None)
    before = trust._key(flash_band, call, False), flash_band.fingerprint(call)
    device((9, 0), "FA3")
    after = trust._key(flash_band, call, False), flash_band.fingerprint(call)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert after[1] is not None
    assert "FA3" in after[1]


def test_explain_says_whose_code_torchs_flash_op_is(device: Callable[..., None]) -> None:
    device((9, 0), "FA3")
    said = ("torch's flash op is FA3 here, which was activated through its registry",)
    assert kernels._whose("flash_band", None) == kernels._whose("triton", "flash") == said
    assert kernels._whose("triton", "cudnn") == ()
    known = kernels._known()
    device((9, 0), None)
    assert kernels._whose("flash_band", None) == ()
    assert kernels._known() != known


def test_documents_are_counted_on_the_cpu_only_where_the_clock_says_so(ops: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a clock a kernel that waits for nothing goes before: one that is also there while a graph is captured."""
    monkeypatch.setattr(select, "RIVALS", {"cpu": ("flash_band", "native")})
    monkeypatch.setattr(select, "KERNELS", {"flash_band": flash_band, **select.KERNELS})
    without, packed_too = CALLS["causal"](), CALLS["documents"]()
    monkeypatch.setenv(contest.OPTION, "off")
    assert select.select(without) is flash_band
    assert select.select(packed_too) is native
    monkeypatch.setenv(contest.OPTION, "memory")
    monkeypatch.setattr(contest, "timer_of", lambda device: lambda run, best: 1.0 if best == float("inf") else 0.5)
    contest.forget()
    assert select.select(packed_too) is flash_band
    contest.forget()


def test_while_a_graph_is_captured_documents_are_refused(ops: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert whole.beyond_whole(on_cuda(CALLS["causal"](**HALF))) is None
        assert "a CUDA graph that is being captured" in (whole.beyond_whole(on_cuda(CALLS["documents"](**HALF))) or "")


PARTS = {
    "earlier keys": (Dense(), Progression(24, 36), Progression(0, 12), {"causal": True}),
    "own keys": (Dense(), Progression(24, 36), Progression(24, 36), {"causal": True}),
    "keys on both sides of the last query": (Dense(), Progression(4, 13), Progression(2, 30), {"causal": True}),
    "every key of a few": (Dense(), Progression(3, 37, 5), Progression(1, 30, 5), {}),
    "stripes before": (Dense(), Progression(2, 37, 4), Progression(1, 37, 4), {"causal": True}),
    "a window": (SlidingWindow(8), Progression(10, 17), Progression(5, 20), {"causal": True}),
    "a window of both sides": (SlidingWindow(8), Progression(10, 17), Progression(5, 28), {}),
    "one query": (Dense(), Progression(20, 21), Progression(0, 37, 3), {"causal": True}),
}


def part_call(form: Form, queries: Progression, keys: Progression, site: dict[str, Any]) -> Call:
    call = call_of(form, **site, q_len=len(queries), k_len=37)
    k, v = (x[:, :, keys.start : keys.stop : keys.step] for x in (call.k, call.v))
    return replace(call, k=k, v=v, held=Held(queries, keys))


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize("name", PARTS)
def test_parts_of_a_sequence_are_a_band(name: str) -> None:
    """With out and LSE of all keys, of which the part has some."""
    call = part_call(*PARTS[name])
    assert select.refusal(flash_band, call, backward=True) is None
    found, exact = flash_band.forward(call), reference.forward(call)
    generator = torch.Generator().manual_seed(0)
    out, grad_out = (torch.randn(exact[0].shape, generator=generator, dtype=torch.float64) for _ in range(2))
    lse, grad_lse = exact[1] + 0.5, torch.randn(exact[1].shape, generator=generator, dtype=torch.float64)
    mine, true = (kernel.backward(call, out, lse, grad_out, grad_lse)[:3] for kernel in (flash_band, reference))
    for one, other in zip((*found, *mine), (*exact, *true), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("ops")
@pytest.mark.parametrize(
    ("queries", "keys", "reason"),
    [
        (Progression(1, 37, 4), Progression(2, 37, 4), "9 queries from position -1 on see only 8 keys"),
        (Progression(0, 37, 4), Progression(0, 37, 2), "queries are 4 positions apart and keys 2"),
    ],
    ids=str,
)
def test_parts_that_are_no_band_say_why(queries: Progression, keys: Progression, reason: str) -> None:
    call = part_call(Dense(), queries, keys, {"causal": True})
    assert select.refusal(flash_band, call, backward=False) == reason
    packed_too = replace(part_call(*PARTS["own keys"]), documents=drawn_documents(2, 37))
    assert select.refusal(flash_band, packed_too, backward=False) == "documents over a part of a sequence"
    assert select.refusal(flash_attn, part_call(*PARTS["own keys"]), backward=False) == "a part of a sequence"
