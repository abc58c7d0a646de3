"""Smaller workspaces: less is done at once, with the same bits and nothing allocated beside; and budgets that only they keep."""

import ctypes
import json
import subprocess

import pytest
import torch
from sympy.core.cache import clear_cache
from transformers import GPT2Config, GPT2LMHeadModel

from dilcompile.errors import BudgetError
from dilcompile.forms import Dense, Dilated
from dilcompile.lowering import native, ops, out_forms, workspaces
from dilcompile.lowering.native import build, workspace
from dilcompile.lowering.workspaces import bytes_of
from dilcompile.memory.measure import measured
from dilcompile.passes.memory import climb

LENGTH = 192
DILATED, DENSE = str(Dilated(segments=(32, 96), rates=(1, 3), offset="own")), str(Dense())
FORWARD, BACKWARD = torch.ops.dilcompile.attention, torch.ops.dilcompile.attention_backward
SHARES = (1.0, 0.5, 0.3, 0.25, 0.0)
# Query heads, key heads, form, causal, shape of the bias.
CASES = {
    "a head for each thread": (4, 4, DILATED, True, None),
    "many heads": (16, 16, DENSE, False, None),
    "few key heads": (6, 1, DILATED, True, None),
    "a bias of each query": (6, 1, DENSE, True, (2, 1, LENGTH, LENGTH)),
    "a bias of each key, many heads": (16, 16, DILATED, False, (1, 16, 1, LENGTH)),
    "a bias of each key, few key heads": (4, 2, DENSE, True, (1, 4, 1, LENGTH)),
    "a bias that heads share": (4, 2, DILATED, True, (LENGTH, LENGTH)),
}


@pytest.fixture(autouse=True)
def threads():
    """Four, for the processor's may be one; a test may set others."""
    out_forms.register()
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def calls_of(name, dtype):
    """The forward and the backward of a case, each an operator and its operands."""
    heads, kv_heads, form, causal, shape = CASES[name]
    generator = torch.Generator().manual_seed(0)

    def drawn(*sizes):
        return torch.randn(*sizes, generator=generator).to(dtype)

    q, k, v = (drawn(2, LENGTH, h, dim).transpose(1, 2) for h, dim in ((heads, 16), (kv_heads, 16), (kv_heads, 24)))
    bias = None if shape is None else drawn(*shape)
    operands = (q, k, v, None, None, bias, None, form, causal, None, None, 0, 0.3, None, 0.0, "native")
    out, lse = ops.attention(*operands)
    return (FORWARD, operands), (BACKWARD, (drawn(*out.shape), None, out, lse, *operands))


def size_of(op, operands, share):
    return int(bytes_of(op.default, operands, {}, share))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("num_threads", [1, 2, 4, 8])
@pytest.mark.parametrize("name", CASES)
def test_the_bits_are_the_same_in_every_workspace(name, num_threads, dtype):
    torch.set_num_threads(num_threads)
    for op, operands in calls_of(name, dtype):
        expected = op(*operands)
        sizes = [size_of(op, operands, share) for share in SHARES]
        assert sizes == sorted(sizes, reverse=True)
        assert all(size <= max(share * sizes[0] + 64, sizes[-1]) for share, size in zip(SHARES, sizes, strict=True))
        # With much less even the least is allocated in part.
        for size in {*sizes, sizes[-1] // 2, 64}:
            found = op.within(*operands, workspace=torch.full((size,), 0xFF, dtype=torch.uint8))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)), size


def counting(dtype, folder):
    """The library for a dtype, and how often it has allocated memory since it was asked last."""
    head = """
    #include <atomic>
    #include <cstdlib>
    static std::atomic<long> made{0};
    static void* counted(size_t line, size_t size) { ++made; return std::aligned_alloc(line, size); }
    extern "C" long made_since() { return made.exchange(0); }
    """
    text = build.source(dtype)
    assert text.count("std::aligned_alloc(") == 1
    (folder / "kernel.cpp").write_text(head + text.replace("std::aligned_alloc(", "counted("))
    flags = ["-std=c++17", "-O0", "-march=native", "-fopenmp", "-shared", "-fPIC"]
    subprocess.run(["g++", *flags, str(folder / "kernel.cpp"), "-o", str(folder / "kernel.so")], check=True)
    loaded = ctypes.CDLL(str(folder / "kernel.so"))
    return build.Library(loaded), loaded.made_since


def forget_sizes():
    """What one library says of its workspaces is not known of another."""
    workspaces._answer.cache_clear()
    clear_cache()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_allocated_beside_the_least(dtype, monkeypatch, tmp_path):
    built, made_since = counting(dtype, tmp_path)
    for module in (native, workspace):
        monkeypatch.setattr(module, "library", lambda dtype: built)
    forget_sizes()
    for name in CASES:
        for op, operands in calls_of(name, dtype):
            sizes = [size_of(op, operands, share) for share in SHARES]
            # The numbers of a class of calls are checked at the first of them.
            op(*operands)
            made_since()
            for size in sizes:
                op.within(*operands, workspace=torch.empty(size, dtype=torch.uint8))
                assert made_since() == 0, (name, size)
            op.within(*operands, workspace=torch.empty(sizes[-1] // 2, dtype=torch.uint8))
            assert made_since() > 0, name
    forget_sizes()


APPLY = {"form": "dilated", "segments": [256, 1024], "rates": [1, 4]}
TOKENS = 1024


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=50, n_positions=TOKENS, bos_token_id=0, eos_token_id=0)
    # oneDNN's products in bfloat16 allocate memory of their own.
    with torch.backends.mkldnn.flags(enabled=False):
        yield GPT2LMHeadModel(config).bfloat16().eval()


def compiled_by(model, path=None, **memory):
    torch._dynamo.reset()
    policy = {"version": 1, "defaults": {"memory": memory}, "rules": [{"apply": APPLY}]}
    options = {"policy": policy, "inner": "aot_eager", **({"report": str(path)} if path else {})}
    return torch.compile(model, backend="dilated", options=options)


def refused(run) -> BudgetError:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run()
    assert isinstance(caught.value.inner_exception, BudgetError)
    return caught.value.inner_exception


def words_of(seed):
    return torch.randint(0, 50, (1, TOKENS), generator=torch.Generator().manual_seed(seed))


def step(compiled, model, gradient):
    model.zero_grad()
    out = compiled(input_ids=words_of(1), use_cache=False)[0]
    out.backward(gradient)
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


def test_a_training_step_that_only_a_smaller_workspace_fits(model, monkeypatch, tmp_path):
    monkeypatch.setattr(climb, "SHARES", (0.5, 0.0))
    gradient = torch.randn(1, TOKENS, 50).bfloat16()
    error = refused(lambda: step(compiled_by(model, budget=10, reuse="across_layers"), model, gradient))
    # A quarter is one worker, and so is less.
    assert [rung.name for rung in error.tried] == [
        "reuse across_layers",
        "recompute 0.5, reuse across_layers",
        "recompute 0, reuse across_layers",
        "workspaces 0.5, recompute 0.5, reuse across_layers",
        "workspaces 0.25, recompute 0.5, reuse across_layers",
    ]
    *larger, smaller, _ = error.tried
    assert "of which workspaces 0.5, recompute 0.5, reuse across_layers needs least" in str(error)
    budget = (min(rung.peak for rung in larger) + smaller.peak) // 2
    assert smaller.peak < budget < min(rung.peak for rung in larger)
    expected = step(compiled_by(model), model, gradient)
    path = tmp_path / "report.json"
    compiled = compiled_by(model, path, budget=budget, reuse="across_layers")
    found = step(compiled, model, gradient)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    (graph,) = json.loads(path.read_text())["graphs"]
    assert graph["budget"]["taken"] == smaller.name
    assert [rung["workspaces"] for rung in graph["budget"]["tried"]] == [1.0, 1.0, 1.0, 0.5]
    assert any(f"kept by {smaller.name}" in note for note in graph["notes"])
    model.zero_grad()
    words = words_of(1)
    _, run = measured(lambda: compiled(input_ids=words, use_cache=False)[0].backward(gradient))
    # Sums of a layer norm's backward, two rows for each thread, are made inside of the operator: nobody foresees them.
    assert run.peak - smaller.peak in (0, 2 * 4 * 64 * 2)


@pytest.mark.parametrize("inner", ["aot_eager", "eager"])
def test_a_call_without_gradients_too(inner, model, calls):
    with torch.no_grad():

        def run(**memory):
            return compiled_by(model, **memory)(input_ids=words_of(2), use_cache=False)[0]

        error = refused(lambda: run(budget=10, reuse="across_layers"))
        assert [rung.workspaces for rung in error.tried] == [1.0, 0.5, 0.25]
        assert error.tried[0].peak > error.tried[1].peak > error.tried[2].peak
        assert torch.equal(run(budget=error.tried[2].peak, reuse="across_layers"), run())
    sizes = {arena.peak for arena in calls[-1].planned.plan.arenas}
    assert sizes == {error.tried[2].arenas}


def test_without_an_operator_that_takes_a_workspace_there_is_no_such_rung(model, monkeypatch):
    monkeypatch.setitem(APPLY, "kernel", "reference")
    with torch.no_grad():
        run = compiled_by(model, budget=10, reuse="across_layers")
        error = refused(lambda: run(input_ids=words_of(2), use_cache=False))
    assert [rung.name for rung in error.tried] == ["reuse across_layers"]


def test_a_budget_of_a_rule_counts_the_workspace_of_its_modules(model):
    def tried(**memory):
        torch._dynamo.reset()
        policy = {"version": 1, "rules": [{"name": "all", "apply": APPLY, "memory": {"reuse": "across_layers", **memory}}]}
        compiled = torch.compile(model, backend="dilated", options={"policy": policy, "inner": "aot_eager"})
        with torch.no_grad():
            return refused(lambda: compiled(input_ids=words_of(2), use_cache=False))

    error = tried(budget=10)
    bounded = [rung.bounded[0] for rung in error.tried]
    assert bounded[0] > bounded[1] > bounded[2]
    (largest, *_) = str(tried(budget=bounded[-1] - 1)).split("the largest buffers at the peak: ")[1].split("; ")
    assert largest.startswith("attention.workspace of transformer.h.0.attn, workspace, ")
