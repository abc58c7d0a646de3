"""What Triton's JIT would compile for calls of many lengths: one variant of each kernel, whatever the length is. No device is asked.

The key of a variant is made by Triton's own functions from the arguments that the launches get; tensors hold no data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dilcompile.forms import BlockSparse, Dense, Dilated, Form, SlidingWindow
from dilcompile.lowering import triton
from dilcompile.lowering.call import Call, Held, problem_of
from dilcompile.lowering.triton import bound, plan
from dilcompile.progression import Progression

jit = pytest.importorskip("triton.runtime.jit")

# Multiples of 16 and none, primes, powers of two.
LENGTHS = (1040, 1041, 1153, 2050, 4096, 5003, 16385)
HEADS, KV_HEADS, BATCH = 8, 2, 2
DILATED = Dilated([512, 1024], [1, 2], offset="own")
BLOCKS = BlockSparse(64, {"any": [{"local": {"before": 1}}, {"global": {"columns": 1}}]})
Launch = tuple[str, str]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> set[Launch]:
    """(kernel, key of its variant) of each launch; nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend

    found: set[Launch] = set()
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binders: dict[Any, Callable[..., Any]] = {}

    def note(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        if kernel not in binders:
            binders[kernel] = jit.create_function_from_signature(kernel.signature, kernel.params, backend)
        _, specialization, told = binders[kernel](*arguments, **options)
        # A walk of its own: the forward kernel, which then only completes an LSE.
        walks = kernel.__name__ == "attention" and arguments[kernel.arg_names.index("REST")] is not None
        found.add(("rest of the LSE" if walks else kernel.__name__, f"{specialization} {told}"))

    monkeypatch.setattr(jit.JITFunction, "run", note)
    monkeypatch.setattr(bound, "arch", lambda device: "sm90")
    monkeypatch.setattr(triton, "_programs_at_once", lambda device: 264)
    for cached in (plan.plan_of, plan.plan_of_few, plan.plan_of_blocks):
        cached.cache_clear()
    return found


@dataclass(frozen=True)
class Shape:
    """How the operands of a call are made at each length; rows: of queries, as many as keys if there is no number."""

    dim: int = 64
    layout: str = "BSHD"
    batch: int = BATCH
    heads: int = HEADS
    rows: int | None = None
    dtype: torch.dtype = torch.bfloat16

    def operand(self, heads: int, length: int) -> Tensor:
        """[B, H, S, D], in memory as the layout says."""
        sizes = {"B": self.batch, "H": heads, "S": length, "D": self.dim}
        made = torch.empty([sizes[x] for x in self.layout], dtype=self.dtype, device="meta")
        return made.permute([self.layout.index(x) for x in "BHSD"])


def call_at(length: int, form: Form, shape: Shape, masks: tuple[str, ...] = ()) -> Call:
    rows = length if shape.rows is None else shape.rows
    q, k, v = shape.operand(shape.heads, rows), shape.operand(KV_HEADS, length), shape.operand(KV_HEADS, length)
    relation = form.relation(problem_of(q, k, v, True, None, None, length - rows))
    batch = shape.batch

    def meta(*sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    operands: dict[str, Callable[[], Tensor]] = {
        # A slice: where it begins follows the length, as with a cache.
        "key_padding": lambda: meta(batch, 2 * length, dtype=torch.bool)[:, length:],
        "documents": lambda: meta(batch, length, dtype=torch.int64),
        "row_limits": lambda: meta(2, batch, rows, dtype=torch.int64),
        "dropout_seed": lambda: meta(1, dtype=torch.int64),
        "bias": lambda: meta(1, shape.heads, rows, length, dtype=shape.dtype),
    }
    made: dict[str, Any] = {name: operands[name]() for name in masks if name in operands}
    if "key_bias" in masks:
        made["bias"] = meta(batch, shape.heads, 1, length, dtype=torch.float32)
    call = Call(q, k, v, None, None, None, None, relation, 0.125, 30.0 if "softcap" in masks else None)
    return replace(call, **made, dropout_p=0.25 if "dropout_seed" in masks else 0.0)


def run(call: Call, with_backward: bool) -> None:
    out, lse = triton.forward(call)
    if with_backward:
        out, grad_out = (torch.empty_like(out, dtype=call.q.dtype) for _ in range(2))
        triton.backward(call, out, lse, grad_out, torch.empty_like(lse))


def variants(found: set[Launch]) -> dict[str, int]:
    names = [name for name, _ in found]
    return {name: names.count(name) for name in sorted(set(names))}


MASKS: list[tuple[str, ...]] = [
    (), ("key_padding",), ("documents",), ("row_limits",), ("dropout_seed", "softcap"), ("key_bias",), ("bias",),
    ("bias", "documents"),
]  # fmt: skip


@pytest.mark.parametrize("masks", MASKS, ids=lambda masks: "+".join(masks) or "none")
@pytest.mark.parametrize("form", [Dense(), DILATED, BLOCKS], ids=["dense", "dilated", "blocks"])
def test_lengths_share_one_variant(form: Form, masks: tuple[str, ...], launched: set[Launch]) -> None:
    for length in LENGTHS:
        run(call_at(length, form, Shape(), masks), True)
    found = variants(launched)
    assert set(found) == {"attention", "row_sums", "gradient_of_queries", "gradient_of_keys"} | (
        {"rest of the LSE", "gradient_of_bias"} if {"bias", "key_bias"} & set(masks) else set()
    )
    assert set(found.values()) == {1}, found


@pytest.mark.parametrize(
    "shape",
    [Shape(layout="BHSD"), Shape(layout="SBHD"), Shape(batch=1), Shape(dim=40), Shape(dim=20), Shape(dim=128, dtype=torch.float32),
     Shape(dim=12, layout="BHSD", batch=1)],
    ids=str,
)  # fmt: skip
def test_layouts_and_head_sizes_do_not_follow_the_length(shape: Shape, launched: set[Launch]) -> None:
    for length in LENGTHS:
        run(call_at(length, DILATED, shape), True)
    assert set(variants(launched).values()) == {1}, variants(launched)


@pytest.mark.parametrize("masks", [(), ("documents",), ("row_limits", "dropout_seed")], ids=str)
def test_parts_of_any_sequence_share_one_variant(masks: tuple[str, ...], launched: set[Launch]) -> None:
    """Wherever their rows stand: in a run, in stripes, alone."""
    for length in (1041, 4096, 16385):
        half = -(-length // 2)
        for queries, keys in (
            (Progression(half, length), Progression(0, half)),
            (Progression(half, length), Progression(half, length)),
            (Progression(1, length, 4), Progression(3, length, 8)),
            (Progression(5, 6), Progression(7, 8, 3)),
        ):
            rows = call_at(len(queries), DILATED, Shape())
            call = call_at(length, DILATED, Shape(rows=len(queries)), masks)
            k, v = (x[:, :, keys.start : keys.stop : keys.step] for x in (call.k, call.v))
            held = Held(queries, keys, first_head=length % 3)
            run(replace(call, q=rows.q, k=k, v=v, relation=call.relation.at(len(queries), length, 0), held=held), True)
    assert set(variants(launched).values()) == {1}, variants(launched)


@pytest.mark.parametrize("layout", ["BSHD", "BHSD"])
def test_strides_beyond_32_bits_are_no_variant(layout: str, launched: set[Launch]) -> None:
    for length in (4096, (1 << 18) + 3):
        call = call_at(length, Dense(), Shape(dim=128, heads=72, layout=layout), ("bias",))
        run(call, True)
    assert call.q.stride(0) > 1 << 31
    assert set(variants(launched).values()) == {1}, variants(launched)


@pytest.mark.parametrize("masks", MASKS[:4] + MASKS[5:], ids=lambda masks: "+".join(masks) or "none")
@pytest.mark.parametrize("form", [Dense(), SlidingWindow(500, sinks=4), DILATED, BLOCKS], ids=str)
def test_a_growing_cache_shares_one_variant(form: Form, masks: tuple[str, ...], launched: set[Launch]) -> None:
    for length in (*LENGTHS, (1 << 22) + 3):
        run(call_at(length, form, Shape(rows=1, layout="BHSD"), masks), False)
    found = variants(launched)
    assert set(found) == {"decode", "join"} | ({"kept_range"} if "key_padding" in masks else set())
    assert set(found.values()) == {1}, found


def test_pages_share_one_variant(launched: set[Launch]) -> None:
    for length in LENGTHS:
        pages = -(-length // 16)
        call = call_at(length, DILATED, Shape(rows=1))
        pool = torch.empty(BATCH * pages + 5, KV_HEADS, 16, 64, dtype=torch.bfloat16, device="meta")
        table = torch.empty(BATCH, pages, dtype=torch.int32, device="meta")
        run(replace(call, k=pool, v=pool, pages=table), False)
    assert variants(launched) == {"decode": 1, "join": 1}


def test_a_number_that_is_specialised_would_be_seen(launched: set[Launch], monkeypatch: pytest.MonkeyPatch) -> None:
    """The key is Triton's: with the lengths left to it there would be variants."""
    from dilcompile.lowering.triton.attend import attention

    for param in attention.params:
        if param.name == "k_len":
            monkeypatch.setattr(param, "do_not_specialize", False)
    for length in LENGTHS:
        run(call_at(length, Dense(), Shape()), False)
    assert variants(launched) == {"attention": 2}


@pytest.mark.parametrize(
    ("sizes", "dtype", "fold"),
    [((2, 3, 5, 64), torch.bfloat16, 1), ((2, 3, 5, 40), torch.bfloat16, 2), ((2, 3, 5, 20), torch.bfloat16, 16),
     ((2, 3, 5, 20), torch.float32, 4), ((1, 1, 5, 8), torch.float16, 2)],
)  # fmt: skip
def test_strides_are_given_as_multiples_of_16(sizes: tuple[int, ...], dtype: torch.dtype, fold: int) -> None:
    """So the compiler knows, whatever they are, that 16 bytes can be loaded at once where that is so."""
    x = torch.empty(sizes, dtype=dtype)
    strides, found = bound.folded(x)
    assert found == fold
    assert [stride // fold for stride in strides] == [0 if sizes[n] == 1 else x.stride(n) for n in range(3)]
    assert all(stride % 16 == 0 for stride in strides)
