"""Buffers in memory that was given to a graph: only where it is dead, never two at once, and never where others still look."""

from dataclasses import replace
from itertools import combinations

import pytest
import sympy
import torch
import torch._functorch.config
from hypothesis import given, settings
from hypothesis import strategies as st
from test_planned_graphs import LENGTH, compiled_by, made, step
from torch._subclasses import FakeTensor

import dilcompile.passes.memory.plan_buffers
import dilcompile.planned
from dilcompile.memory import Buffer, BufferPlan
from dilcompile.memory.donate import Donated, donate
from dilcompile.memory.measure import measured
from dilcompile.memory.packing import most_live

S = sympy.Symbol("s0", positive=True, integer=True)
STEPS = 12
PLANNED = {"pool": "private", "reuse": "across_layers"}


@st.composite
def sizes(draw, symbolic):
    """A size and its hint at a length of 100."""
    constant = draw(st.integers(0, 300))
    if not symbolic:
        return constant, constant
    size = draw(st.sampled_from([0, 1, 64, 128])) * S + draw(st.sampled_from([0, 64, constant]))
    return size, int(size.subs({S: 100}))


@st.composite
def graphs(draw, symbolic=False):
    """Buffers, memory that is given, and what else is live."""

    def made(name, begin, end):
        size, hint = draw(sizes(symbolic))
        return Buffer(name, size, begin, end, hint)

    def life():
        begin = draw(st.integers(0, STEPS))
        return begin, draw(st.integers(begin, STEPS))

    buffers = [made(f"b{n}", *life()) for n in range(draw(st.integers(0, 12)))]
    memories = [made(f"d{n}", 0, draw(st.integers(0, STEPS))) for n in range(draw(st.integers(0, 5)))]
    others = [made(f"o{n}", *life()) for n in range(draw(st.integers(0, 4)))]
    over = [
        frozenset(b.name for b in buffers if b.begin == memory.end and b.size == memory.size and draw(st.booleans()))
        for memory in memories
    ]
    return buffers, [Donated(memory, (n,), own) for n, (memory, own) in enumerate(zip(memories, over, strict=True))], others


def check(arenas, donated):
    for arena, one in zip(arenas, donated, strict=True):
        placed = list(zip(arena.buffers, arena.offsets, strict=True))
        for buffer, at in placed:
            assert at + buffer.hint <= arena.inside.hint
            assert buffer.begin > one.memory.end or (buffer.begin == one.memory.end and buffer.name in one.over)
        for (first, at), (second, other) in combinations(placed, 2):
            if first.meets(second):
                assert at + first.hint <= other or other + second.hint <= at


@settings(deadline=None)
@given(graphs())
def test_only_dead_memory_is_taken_and_by_one_at_a_time(drawn):
    buffers, donated, others = drawn
    arenas, left = donate(buffers, donated, others)
    names = [buffer.name for arena in arenas for buffer in arena.buffers] + [buffer.name for buffer in left]
    assert sorted(names) == sorted(buffer.name for buffer in buffers)
    check(arenas, donated)
    # It is held for longer, but never so that more is held at once than was before.
    held = [
        replace(one.memory, end=max([one.memory.end, *(buffer.end for buffer in arena.buffers)]))
        for one, arena in zip(donated, arenas, strict=True)
    ]
    assert most_live([*held, *others]) == most_live([*(one.memory for one in donated), *others])
    assert donate(buffers, donated, others) == (arenas, left)


@settings(deadline=None, max_examples=60)
@given(graphs(symbolic=True), st.integers(1, 10**5))
def test_it_fits_at_every_length(drawn, length):
    buffers, donated, others = drawn
    arenas, _ = donate(buffers, donated, others)
    there = BufferPlan((), arenas).at({S: length})
    there.verify()
    check(there.donated, donated)


def names(arenas):
    return [{buffer.name for buffer in arena.buffers} for arena in arenas]


def test_what_fits_is_taken():
    """One after another, side by side, and from the last reader on where that writes over what it reads."""
    busy = Buffer("busy", 20_000, 0, 0, 20_000)
    memory = Donated(Buffer("d", 128 * S, 0, 1, 12_800), (0,), frozenset(["over"]))
    beside = [Buffer("one", 64 * S, 2, 3, 6400), Buffer("other", 64 * S, 3, 4, 6400)]
    after = [Buffer("whole", 128 * S, 5, 6, 12_800), Buffer("over", 128 * S, 1, 1, 12_800)]
    # Begins too early; more than there is at lengths below 100; at one that is rounded up.
    never = [Buffer("early", 64 * S, 1, 2, 6400), Buffer("short", 12_800, 7, 8, 12_800)]
    uneven = [Buffer("uneven", 64 * S + 4, 7, 8, 6404), Buffer("above", 64 * S - 4, 8, 8, 6396)]
    arenas, left = donate([*beside, *after, *never, *uneven], [memory], [busy])
    assert names(arenas) == [{"one", "other", "whole", "over", "uneven"}]
    assert [buffer.name for buffer in left] == ["early", "short", "above"]


def test_memory_is_not_held_where_that_would_be_the_most():
    memory, buffer = Donated(Buffer("d", 4096, 0, 1, 4096)), Buffer("b", 64, 3, 5, 64)
    for size, taken in ((4096, {"b"}), (4097, set())):
        # At step 4 there is something else.
        others = [Buffer("o", size, 4, 4, size), Buffer("first", 4096, 0, 0, 4096)]
        assert names(donate([buffer], [memory], others)[0]) == [taken]


def test_memory_of_a_module_is_for_its_own_buffers_where_modules_share_none():
    memories = [Donated(Buffer(name, 100, 0, 3, 100, module=name)) for name in ("a", "b")]
    buffers = [Buffer("x", 80, 4, 5, 80, module="b"), Buffer("y", 80, 6, 7, 80, module="c")]
    assert names(donate(buffers, memories)[0]) == [{"x", "y"}, set()]
    arenas, left = donate(buffers, memories, within_module=True)
    assert (names(arenas), left) == ([set(), {"x"}], buffers[1:])


def trained(batch=8):
    return made("gpt2"), torch.randint(0, 50, (batch, LENGTH), generator=torch.Generator().manual_seed(0))


def test_a_planned_step_needs_no_more_than_an_unplanned_one(calls):
    model, tokens = trained()
    peaks = []
    for memory in ({}, {"reuse": "across_layers"}):
        compiled = compiled_by(model, **memory)
        step(compiled, model, tokens)
        model.zero_grad()
        _, found = measured(lambda compiled=compiled: compiled(input_ids=tokens, use_cache=False)[0].square().mean().backward())
        peaks.append(found.peak)
    backward = calls[1]
    assert backward.planned.plan.donated
    assert backward.runs.refused == 0
    assert peaks[1] <= peaks[0]


@pytest.mark.parametrize("reuse", ["within_layer", "across_layers"])
def test_layers_use_the_memory_of_others_only_where_the_policy_says_so(reuse, calls):
    model, tokens = trained(batch=2)
    expected, found = (step(compiled_by(model, **use), model, tokens) for use in ({}, {"reuse": reuse}))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    backward = calls[1].planned.plan
    pairs = {(arena.inside.module, buffer.module) for arena in backward.donated for buffer in arena.buffers}
    assert len({saved for saved, _ in pairs}) > 2, "several modules' memory is used"
    assert any(saved != module for saved, module in pairs) == (reuse == "across_layers")


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_retained_graph_has_the_right_gradients(dynamic, calls):
    """Torch's own guard first; where it is off, memory that is needed again is left alone."""
    model, tokens = trained(batch=2)
    expected = step(compiled_by(model), model, tokens)
    compiled = compiled_by(model, dynamic, **PLANNED)
    found = step(compiled, model, tokens)
    assert calls[1].planned.plan.donated
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    model.zero_grad()
    loss = compiled(input_ids=tokens, use_cache=False)[0].square().mean()
    with pytest.raises(RuntimeError, match="donated"):
        loss.backward(retain_graph=True)
    with torch._functorch.config.patch(donated_buffer=False):
        loss.backward(retain_graph=True)
        assert calls[1].runs.refused == len(calls[1].planned.plan.donated)
        model.zero_grad()
        loss.backward()
    again = [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert calls[1].runs.refused == len(calls[1].planned.plan.donated)


def test_a_graph_that_is_retained_at_first_is_planned_without(calls):
    model, tokens = trained(batch=2)
    expected = step(compiled_by(model), model, tokens)
    model.zero_grad()
    loss = compiled_by(model, **PLANNED)(input_ids=tokens, use_cache=False)[0].square().mean()
    loss.backward(retain_graph=True)
    model.zero_grad()
    loss.backward()
    again = [loss.detach()] + [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(one, other) for one, other in zip(again, expected, strict=True))
    assert not calls[1].planned.plan.donated


def test_what_a_hook_holds_stays_as_it_is(calls):
    model, tokens = trained(batch=2)
    expected = step(compiled_by(model), model, tokens)
    held = []

    def pack(x):
        if not isinstance(x, FakeTensor):
            held.append((x, x.clone()))
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = step(compiled_by(model, **PLANNED), model, tokens)
    assert calls[1].runs.refused == len(calls[1].planned.plan.donated) > 0
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert all(torch.equal(x, before) for x, before in held)


def test_memory_that_is_taken_too_early_is_found_out(calls, monkeypatch):
    """Saved tensors that are planned to be dead before their last reader."""
    monkeypatch.setenv(dilcompile.planned.POISON, "1")
    model, tokens = trained(batch=2)
    found = dilcompile.passes.memory.plan_buffers.donated_memory

    def early(*given):
        return [replace(one, memory=replace(one.memory, end=max(0, one.memory.end - 1))) for one in found(*given)]

    monkeypatch.setattr(dilcompile.passes.memory.plan_buffers, "donated_memory", early)
    gradients = step(compiled_by(model, **PLANNED), model, tokens)[1:]
    assert calls[1].planned.plan.donated
    assert any(gradient.isnan().any() for gradient in gradients)
