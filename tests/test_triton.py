"""The Triton kernel without a GPU: its numbers in the interpreter, its plan, what it refuses, and its compiled code."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import threading
import weakref
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.errors import KernelError
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.generators import Segment
from dilcompile.lowering import ops, triton
from dilcompile.lowering.triton import compiled, plan, split
from dilcompile.lowering.triton.compiled import Case
from dilcompile.lowering.triton.config import INTERPRETED, Masks
from dilcompile.relation import Problem, Relation, Term

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "name",
    [
        "triton_interpreted.py",
        "triton_interpreted_bias.py",
        "triton_interpreted_blocks.py",
        "triton_interpreted_parts.py",
        "triton_interpreted_tiles.py",
        "triton_interpreted_workspaces.py",
        "triton_decode_interpreted.py",
        "triton_tuning_interpreted.py",
        "triton_decode_interpreted_bias.py",
    ],
)
def test_the_numbers_in_the_interpreter(name: str) -> None:
    """They need a process in which Triton is imported to interpret."""
    tests = Path(__file__).with_name(name)
    command = [sys.executable, "-m", "pytest", "-x", "--tb=short", "-p", "no:cacheprovider", str(tests)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "1"})
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout


def test_without_triton_everything_imports_and_says_so() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, dilcompile.lowering.ops as ops, dilcompile.lowering.select\n"
        "x = torch.ones(1, 1, 4, 8)\n"
        "try:\n"
        "    ops.attention(x, x, x, None, None, None, None, 'dense()', False, None, None, 0, 1.0, None, 0.0, 'triton')\n"
        "except Exception as error:\n"
        "    print(error)\n"
    )
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert "Triton is not installed (pip install dilcompile[triton])" in done.stdout, done.stderr


def test_no_kernel_is_imported_before_a_call() -> None:
    code = (
        "import sys, dilcompile, dilcompile.lowering.select\n"
        "print(sorted(name for name in sys.modules if name.startswith('dilcompile.lowering.triton.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(
        [f"dilcompile.lowering.triton.{name}" for name in ("bound", "config", "lists", "parts", "plan", "split", "tiles")]
    )


def refusal(monkeypatch: pytest.MonkeyPatch, q: torch.Tensor, form: Form = Dense(), **more: Any) -> str:  # noqa: B008
    """What the kernel says when it is asked for by name, as if it interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(triton, "find_spec", lambda name: name)
    with pytest.raises(KernelError) as error:
        ops.attention(
            q, q, q, None, None, more.get("bias"), more.get("seed"), str(form), False, None, None, more.get("q_offset", 0),
            more.get("scale", 1.0), None, more.get("dropout_p", 0.0), "triton", **more.get("masks", {}),
        )  # fmt: skip
    return str(error.value)


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        ({"bias": torch.zeros(1, dtype=torch.int32)}, "a bias of dtype torch.int32; kernel 'cpu' can"),
        ({"dropout_p": 1.0, "seed": torch.tensor([1])}, "dropout of 1.0, which keeps nothing; kernel 'cpu' can"),
        ({"scale": math.inf}, "scale inf"),
        ({"masks": {"flat": True}}, "flat scores"),
        ({"q_offset": 1 << 29}, "4 keys and 4 queries from 536870912: positions are held in 32 bits, below 536870912"),
    ],
    ids=str,
)
def test_what_it_refuses(more: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = refusal(monkeypatch, torch.ones(1, 1, 4, 8), **more)
    assert f"kernel 'triton' can't compute this attention: {reason}" in found


def test_head_sizes_and_dtypes_that_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    many = torch.ones(1, 1, 4, 8).expand(70000, 1, 4, 8)
    assert "70000 batch rows of 1 heads, more than 65535" in refusal(monkeypatch, many)
    assert "head size 260, more than 256" in refusal(monkeypatch, torch.ones(1, 1, 4, 260))
    call = refusal(monkeypatch, torch.ones(1, 1, 4, 8).to(torch.float8_e4m3fn))
    assert "dtype torch.float8_e4m3fn" in call


def test_segments_that_are_no_multiple_of_their_rate_are_refused() -> None:
    problem = Problem(1, 1, 1, 20, 20, 8, 8)
    reason = plan.unplannable(Relation(problem, (Term(Segment(5, 2)),)))
    assert reason == "segments of 5 with rate 2: lengths must be multiples of their rates"
    assert plan.unplannable(Relation(problem, (Term(Segment(21, 2)),))) is None
    reason = plan.unplannable(Relation(problem, (Term(Segment(1 << 17, 1 << 17)),)))
    assert reason == "a rate of 131072, more than 65536"


def test_classes_that_would_be_too_many_are_not_listed() -> None:
    assert plan.residue_classes(((1 << 16, -1), (3, -1)), 1 << 16) is None
    assert plan.residue_classes(((1 << 16, 5),)) is not None


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 12).flatmap(lambda rate: st.tuples(st.just(rate), st.integers(-1, rate - 1))), min_size=1, max_size=4)
)
def test_classes_part_the_positions_and_no_term_splits_one(wanted: list[tuple[int, int]]) -> None:
    classes = plan.residue_classes(tuple(wanted))
    assert classes is not None
    period = math.lcm(*(stride for _, stride in classes))
    members = [list(range(start, start + period, stride)) for start, stride in classes]
    assert Counter(x % period for own in members for x in own) == Counter(range(period))
    for each, own in zip(classes, members, strict=True):
        assert {plan.class_of(x, tuple(wanted)) for x in own[:3]} == {each}
        for rate, residue in wanted:
            residues = {x % rate for x in own}
            assert len(residues) == 1 or (residue >= 0 and residue not in residues)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_tiles_hold_every_position_once(data: st.DataObject) -> None:
    rates = data.draw(st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=3))
    form = Dilated([24] * len(rates), rates, offset=data.draw(st.sampled_from(["own", "head_mod", "branch"])), coverage="zero")
    q_len, k_len, offset = (data.draw(st.integers(low, 90)) for low in (1, 1, -20))
    problem = Problem(1, 4, 2, q_len, k_len, 8, 8, q_offset=offset, is_causal=data.draw(st.booleans()))
    count = data.draw(st.integers(1, 9))
    made = plan.plan_of(form.relation(problem), count, 16, False, torch.device("cpu"))
    few = plan.plan_of_few(form.relation(problem), count, False, torch.device("cpu"))
    assert few.keys.tiles.numel() == 0
    for rows, first, end in (
        (made.queries, offset, offset + q_len),
        (few.queries, offset, offset + q_len),
        (made.keys, 0, k_len),
    ):
        for pattern in rows.tiles.tolist():
            held = [t + n * stride for t, stride in pattern if t != plan.FAR for n in range(rows.count)]
            assert Counter(x for x in held if x < end) == Counter(range(first, end))


@pytest.mark.parametrize(
    ("q_len", "heads", "kv_heads", "k_len", "decoded", "packed", "rows"),
    [
        (1, 32, 8, 131072, True, 4, 16),
        (1, 32, 8, 255, False, 4, 16),
        (8, 8, 1, 256, True, 8, 64),
        (9, 8, 1, 256, False, 4, 64),
        (64, 4, 4, 4096, True, 1, 64),
        (65, 4, 4, 4096, False, 1, 64),
        (1, 128, 1, 4096, True, 64, 64),
        (2, 24, 1, 4096, True, 24, 64),
        (1, 71, 1, 4096, True, 1, 16),
        (3, 7, 1, 4096, True, 7, 32),
    ],
)
def test_few_queries_over_many_keys_are_split(
    q_len: int, heads: int, kv_heads: int, k_len: int, decoded: bool, packed: int, rows: int
) -> None:
    size = Problem(1, heads, kv_heads, q_len, k_len, 64, 64)
    assert split.is_decode(size) == decoded
    assert (split.packed(size), split.rows_of_tile(size, split.packed(size))) == (packed, rows)


def parts(form: Form, wanted: int = 264, batch: int = 1, k_len: int = 131072) -> int:
    relation = form.relation(Problem(batch, 32, 8, 1, k_len, 64, 64, q_offset=k_len - 1, is_causal=True))
    made = plan.plan_of_few(relation, 4, False, torch.device("cpu"))
    return split.parts_of(relation, made, INTERPRETED, wanted)


def test_parts_fill_the_device_and_are_not_too_small() -> None:
    assert parts(Dense()) == 33
    assert parts(Dense(), batch=4) == 9
    assert parts(Dense(), batch=64) == 1
    assert parts(Dense(), k_len=1024) == 8
    assert parts(Dense(), k_len=100) == 1
    assert parts(Dense(), wanted=1 << 20) == 128
    assert parts(SlidingWindow(512)) == 4
    assert parts(Dilated([2048, 131072], [1, 64], offset="own")) == 32


@pytest.mark.parametrize(
    "form", [Dense(), SlidingWindow(5, sinks=2), SlidingWindow(12, step=3), Dilated([8, 16], [1, 2], offset="own")], ids=str
)
def test_the_most_keys_of_a_row_bound_what_it_sees(form: Form) -> None:
    for offset in (0, 13, 36):
        problem = Problem(1, 2, 2, 1, 37, 8, 8, q_offset=offset, is_causal=True)
        relation = form.relation(problem)
        h, t, k = torch.arange(2)[:, None], torch.full((1, 1), offset), torch.arange(37)
        seen = int(relation.multiplicity(h, t, k).sum(1).max())
        assert seen <= plan.most_keys(relation, False) <= seen + 8
        assert int((relation.multiplicity(h, t, k) > 0).sum(1).max()) <= plan.most_keys(relation, True) <= 37


def planned() -> plan.Plan:
    plan.plan_of.cache_clear()
    relation = Dilated([8, 16], [1, 2]).relation(Problem(1, 2, 2, 40, 40, 8, 8))
    return plan.held(plan.plan_of(relation, 16, 16, False, torch.device("meta")))


def test_plans_are_not_made_in_the_pool_of_a_cuda_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pool is its thread's; what a default device says is that thread's too."""
    right, threads = plan._moved, []
    monkeypatch.setattr(plan, "_moved", lambda *args: threads.append(threading.get_ident()) or right(*args))
    with torch.device("meta"):
        made = planned()
    assert {x.device.type for x in (made.terms, made.residues, made.patterns, made.queries.tiles, made.keys.tiles)} == {"meta"}
    assert threads
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("capturing", [True, False])
def test_a_plan_that_a_cuda_graph_reads_is_kept(capturing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_captured", {})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    terms = weakref.ref(planned().terms)
    plan.plan_of.cache_clear()
    gc.collect()
    assert (terms() is not None) == capturing


OWN = {
    "sm80": "mma.sync",
    "sm90": "wgmma.mma_async",
    "sm100": "tcgen05.mma",
    "sm120": "mma.sync",
    "gfx942": "v_mfma",
    "gfx950": "v_mfma",
}


def listed() -> list[str]:
    return compiled.TABLE.read_text().splitlines()[2:]


def columns(line: str) -> dict[str, str]:
    return dict(zip(compiled.TITLES, line.split(), strict=True))


def proven(case: Case) -> bool:
    """The cases that must not spill and must use the architecture's own tensor core instruction, or with few rows an older one."""
    return (
        case.step not in ("sums", "join", "kept")
        and case.head_dim in (64, 128)
        and case.switches in ((), ("128-blocks",), ("described",), ("part",))
        and case.arch.startswith("sm")
        and case.dtype in (torch.bfloat16, torch.float16)
    )


def instruction(case: Case) -> str:
    """The tensor core instruction that a proven case must use: NVIDIA's newer ones take 64 rows."""
    return "mma.sync" if case.step == "decode" and case.tile.own < 64 and case.arch.startswith("sm") else OWN[case.arch]


def test_the_table_lists_every_case_without_spills() -> None:
    cases = list(compiled.cases())
    assert len(listed()) == len(cases)
    assert {case.arch for case in cases} == set(compiled.SHARED)
    for case, line in zip(cases, listed(), strict=True):
        found = columns(line)
        key = (case.step, case.arch, str(case.dtype).removeprefix("torch."), str(case.head_dim), str(case.v_dim))
        assert tuple(found[title] for title in ("kernel", "arch", "dtype", "D", "Dv")) == key
        assert found["tile"] == f"{case.tile.own}x{case.tile.other}", "run python -m dilcompile.lowering.triton.compiled --write"
        assert found["stack"] == "0", line
        assert int(found["shared"]) <= compiled.SHARED[case.arch], line
        assert (int(found["TMA"]) > 0) == ("described" in case.switches), line
        assert found["instruction"] == instruction(case) or not proven(case), line
        assert int(found["products"]) > 0 or case.dtype == torch.float32 or case.step in ("sums", "join", "kept"), line


def assert_compiles_as_listed(case: Case) -> None:
    import triton as package

    found = compiled.compile_case(case)
    assert found.instruction == instruction(case) or not proven(case)
    assert found.shared <= compiled.SHARED[case.arch]
    assert (found.described > 0) == ("described" in case.switches)
    assert found.products > 0 or case.dtype == torch.float32 or case.step in ("sums", "join", "kept")
    if package.__version__ in compiled.TABLE.read_text().splitlines()[0]:
        assert compiled.row(case, found) in listed(), "run python -m dilcompile.lowering.triton.compiled --write"
    assert found.stack == 0


ALL = list(compiled.cases())
QUICK = [
    case
    for case in ALL
    if proven(case)
    and (case.arch != "sm100" or (case.step == "forward" and case.head_dim == 64))
    # Of what one architecture shares with another, each kernel at one head size.
    and (
        case.arch not in ("sm80", "sm120")
        or (case.head_dim == 64) == ((case.arch == "sm80") == (case.step in ("forward", "keys")))
    )
    and (case.dtype == torch.bfloat16 and (case.block == 0 or case.arch == "sm90"))
]


@needs_triton
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_compiled_ahead_of_time(case: Case) -> None:
    assert_compiles_as_listed(case)


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in ALL if case not in QUICK], ids=str)
def test_compiled_ahead_of_time_for_every_row_of_the_table(case: Case) -> None:
    assert_compiles_as_listed(case)


def test_a_tile_that_spills_would_be_seen() -> None:
    """The check reads what the compiler says: this tile is too large for its registers."""
    pytest.importorskip("triton")
    case = Case("forward", "sm90", torch.bfloat16, 128, 128)
    assert compiled.compile_case(case, compiled.Tile(128, 128, 4, 2)).stack > 0


def test_a_tile_that_needs_more_shared_memory_than_there_is_would_be_seen() -> None:
    pytest.importorskip("triton")
    case = Case("forward", "sm120", torch.bfloat16, 128, 128)
    assert compiled.compile_case(case, compiled.Tile(128, 64, 8, 4)).shared > compiled.SHARED["sm120"]
    assert compiled.compile_case(case).shared <= compiled.SHARED["sm120"]


def test_loads_by_descriptor_are_counted() -> None:
    text = "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier [%r1];\nwgmma.mma_async;\ncp.async.bulk.commit_group;"
    assert compiled.described(text) == 1


def test_every_kind_of_tile_is_in_the_table() -> None:
    """What a call may get is compiled: each kind of masks, and each family of architectures, for every kernel."""
    for step in ("forward", "queries", "keys", "bias", "decode"):
        kinds = {case.masks for case in ALL if case.step == step}
        assert kinds == ({"some", "pairs", "counted pairs"} if step == "bias" else set(get_args(Masks))), step
        assert {case.arch for case in ALL if case.step == step} >= {"sm80", "sm90", "sm100", "sm120", "gfx942"}
