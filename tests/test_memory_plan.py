"""Buffer plans: disjoint, as small as can be, valid at every length, the same every time."""

import os
import pickle
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations, permutations
from xml.etree import ElementTree

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from dilcompile.memory import Arena, Buffer, BufferPlan, plan_buffers
from dilcompile.memory.account import GraphMemory
from dilcompile.memory.buffer import ALIGNMENT
from dilcompile.memory.packing import FEW, most_live, overlaps, pack, peak, without_reuse
from dilcompile.memory.timeline import svg
from dilcompile.memory.words import drawn, largest_lines, text


@st.composite
def buffer_lists(draw, most: int = 25):
    steps = draw(st.integers(1, 12))
    found = []
    for number in range(draw(st.integers(1, most))):
        begin = draw(st.integers(0, steps))
        size = draw(st.one_of(st.just(0), st.integers(1, 5000)))
        lane = draw(st.sampled_from(["compute", "compute", "communication"]))
        found.append(Buffer(f"b{number}", size, begin, begin + draw(st.integers(0, steps)), size, lane=lane))
    return found


def taken(plan: BufferPlan):
    """(arena, buffer, offset) of every buffer."""
    return [(arena, buffer, offset) for arena in plan.arenas for buffer, offset in zip(arena.buffers, arena.offsets, strict=True)]


@settings(deadline=None)
@given(buffer_lists())
def test_live_buffers_never_overlap(buffers):
    plan = plan_buffers(buffers)
    assert sorted(buffer.name for _, buffer, _ in taken(plan)) == sorted(buffer.name for buffer in buffers)
    for (arena, one, at), (other_arena, other, other_at) in combinations(taken(plan), 2):
        assert at % ALIGNMENT == 0
        if arena is other_arena and one.begin <= other.end and other.begin <= one.end:
            assert at + one.hint <= other_at or other_at + other.hint <= at


@settings(deadline=None)
@given(buffer_lists())
def test_the_peak_is_between_what_is_live_and_the_sum(buffers):
    plan = plan_buffers(buffers)
    for arena in plan.arenas:
        steps = range(max(buffer.end for buffer in arena.buffers) + 1)
        live = max(sum(b.hint for b in arena.buffers if b.begin <= step <= b.end) for step in steps)
        assert arena.most_live == live <= arena.peak <= arena.without_reuse


@settings(deadline=None)
@given(buffer_lists())
def test_plans_are_deterministic_and_survive_pickling(buffers):
    plan = plan_buffers(buffers)
    assert plan_buffers(list(buffers)) == plan
    assert pickle.loads(pickle.dumps(plan)) == plan


@settings(max_examples=25, deadline=None)
@given(buffer_lists(most=5))
def test_few_buffers_are_packed_optimally(buffers):
    buffers = [buffer for buffer in buffers if buffer.lane == "compute"]
    best = min((_first_fit(buffers, order) for order in permutations(range(len(buffers)))), default=0)
    assert len(buffers) <= FEW
    if buffers:
        assert peak(buffers, pack(buffers)) == best


def _first_fit(buffers, order) -> int:
    """The peak where each buffer in turn gets the lowest free place, found by trying every multiple of the alignment."""
    offsets: dict[int, int] = {}
    for i in order:
        at = 0
        while any(
            buffers[i].meets(buffers[j]) and at < offsets[j] + buffers[j].hint and offsets[j] < at + buffers[i].hint
            for j in offsets
        ):
            at += ALIGNMENT
        offsets[i] = at
    return max((at + buffers[i].hint for i, at in offsets.items()), default=0)


@settings(deadline=None)
@given(buffer_lists(most=10), st.integers(1, 10**6))
def test_a_plan_holds_at_every_length(buffers, length):
    symbol = sympy.Symbol("s0", positive=True, integer=True)
    symbolic = [
        Buffer(b.name, symbol * (b.hint % 7) + b.hint % 64, b.begin, b.end, 100 * (b.hint % 7) + b.hint % 64, lane=b.lane)
        for b in buffers
    ]
    plan = plan_buffers(symbolic)
    there = plan.at({symbol: length})
    there.verify()
    for arena, planned in zip(there.arenas, plan.arenas, strict=True):
        assert [int(e.subs({symbol: length})) for e in planned.expressions()] == list(arena.offsets)


def test_expressions_of_many_buffers_are_as_many_terms():
    symbol, number = sympy.Symbol("s", positive=True, integer=True), 400
    sizes = [symbol * (7 * i % 64 + 1) * 4 if i % 3 else symbol**2 + i for i in range(number)]
    hints = [int(size.subs(symbol, 128)) for size in sizes]
    buffers = [Buffer(f"b{i}", sizes[i], i * 37 % number, i * 37 % number + i % 20, hints[i]) for i in range(number)]
    (planned,) = plan_buffers(buffers).arenas
    expressions = planned.expressions()
    # Each names the buffers right below it and no more: those share what is below them.
    assert sum(len(expression.args) for expression in expressions) < 4 * number
    for length in (1, 77, 4096):
        assert [int(e.subs(symbol, length)) for e in expressions] == list(planned.at({symbol: length}).offsets)


def test_an_overlap_is_noticed():
    buffers = [Buffer("a", 100, 0, 2, 100), Buffer("b", 100, 2, 3, 100), Buffer("c", 100, 3, 4, 100)]
    assert overlaps(buffers, (0, 128, 0)) is None
    assert overlaps(buffers, (0, 64, 0)) == ("a", "b")
    with pytest.raises(AssertionError, match="buffers a and b of cpu, compute, overlap"):
        BufferPlan((Arena("cpu", "compute", tuple(buffers), below=((), (), ())),)).verify()


def test_a_chain_of_layers_shares_one_place():
    layers = [Buffer(f"layer{n}", 1 << 20, 2 * n, 2 * n + 1, 1 << 20) for n in range(200)]
    assert plan_buffers(layers).peak == 1 << 20
    assert without_reuse(layers) == 200 << 20
    assert most_live(layers) == 1 << 20


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"begin": 3, "end": 2}, "ends at step 2, before it begins"),
        ({"hint": -1}, "a size of -1 bytes"),
        ({"alignment": 48}, "an alignment of 48"),
    ],
)
def test_bad_buffers_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Buffer(**{"name": "b", "size": 1, "begin": 0, "end": 1, "hint": 1, **wrong})


def test_two_buffers_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two buffers are named a"):
        plan_buffers([Buffer("a", 1, 0, 1, 1), Buffer("a", 1, 2, 3, 1)])


def test_the_picture_and_the_table_show_every_buffer():
    buffers = [Buffer("a", 4096, 0, 2, 4096, module="layer.0"), Buffer("b", 8192, 2, 5, 8192, role="gradient")]
    arena = plan_buffers(buffers).arenas[0]
    root = ElementTree.fromstring(svg(arena, "Forward & more", "forward", alone=True))
    shapes = [e for e in root.iter() if "buffer" in e.get("class", "").split()]
    heights = {e[0].text.split(":")[0]: float(e.get("height")) for e in shapes}
    assert set(heights) == {"a of layer.0", "b"}
    assert heights["b"] == pytest.approx(2 * heights["a of layer.0"], rel=1e-2)
    boxes = {e[0].text[0]: [float(e.get(key)) for key in ("x", "y", "width", "height")] for e in shapes}
    apart = boxes["a"][1] >= boxes["b"][1] + boxes["b"][3] - 0.1 or boxes["b"][1] >= boxes["a"][1] + boxes["a"][3] - 0.1
    assert apart, "both are live in step 2"


def test_the_words_say_what_the_plan_comes_to():
    buffers = [Buffer("a", 4096, 0, 2, 4096, module="layer.0"), Buffer("b", 8192, 2, 5, 8192), Buffer("c", 8192, 6, 7, 8192)]
    memory = GraphMemory("0", "forward", plan_buffers(buffers), elsewhere=(Buffer("d", 64, 0, 1, 64),), given=2048, steps=8)
    head, row, *_ = text([memory]).splitlines()
    told = dict(zip(re.split(r"\s{2,}", head), re.split(r"\s{2,}", row), strict=False))
    assert told == {
        "graph": "0 forward", "steps": "8", "buffers": "3", "planned": "12 KiB", "live at once": "12 KiB", "ratio": "1.000",
        "without reuse": "20 KiB", "caching allocator": "2 MiB", "size classes": "12 KiB", "over saved": "0 B",
        "elsewhere": "64 B (1)", "given": "2 KiB", "kept": "0 B",
    }  # fmt: skip
    assert memory.live(8) == [4096, 4096, 12288, 8192, 8192, 8192, 8192, 8192]
    assert memory.live(2) == [12288, 8192]
    assert [line[13:] for line in drawn(memory)] == [
        "  █",
        "  █",
        "  ██████",
        "  ██████",
        "████████",
        "████████",
        "-------- 8 steps",
    ]
    assert largest_lines(memory, 1) == ["b: 8 KiB at 0, steps 2 to 5, workspace, and 1 more of this size"]


@settings(max_examples=25, deadline=None)
@given(buffer_lists(most=12), st.integers(1, 10**6))
def test_a_fitted_plan_is_never_larger_than_the_same_stacking(buffers, length):
    symbol = sympy.Symbol("s0", positive=True, integer=True)
    symbolic = [replace(b, size=symbol * (b.hint % 7) + b.hint % 64, hint=100 * (b.hint % 7) + b.hint % 64) for b in buffers]
    plan = plan_buffers(symbolic)
    stacked, fitted = plan.at({symbol: length}), plan.fitted({symbol: length})
    fitted.verify()
    assert fitted.most_live <= fitted.peak <= stacked.peak
    if stacked.peak > 1.05 * stacked.most_live:
        assert fitted.peak == min(stacked.peak, plan_buffers([b for arena in stacked.arenas for b in arena.buffers]).peak)


PLAN = """
import pickle, sys
from dilcompile.memory import plan_buffers
sys.stdout.buffer.write(pickle.dumps(plan_buffers(pickle.load(sys.stdin.buffer))))
"""


def test_another_process_plans_the_same():
    symbols = sympy.symbols("s0 s1", positive=True, integer=True)
    sizes = [(64 * symbols[n % 2] + 128 * n * symbols[1], n % 9, n % 9 + n % 5) for n in range(40)]
    hints = [int(size.subs(dict.fromkeys(symbols, 10))) for size, _, _ in sizes]
    roles = ("workspace", "gradient", "receive")
    buffers = [
        Buffer(f"b{n}", size, begin, end, hint, lane="communication" if n % 4 == 3 else "compute", role=roles[n % 3])
        for n, ((size, begin, end), hint) in enumerate(zip(sizes, hints, strict=True))
    ]
    # This process has another seed, or none.
    env = {**os.environ, "PYTHONHASHSEED": "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"}
    done = subprocess.run([sys.executable, "-c", PLAN], input=pickle.dumps(buffers), capture_output=True, env=env, check=True)
    assert pickle.loads(done.stdout) == plan_buffers(buffers)
