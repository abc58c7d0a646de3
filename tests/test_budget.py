"""Budgets of memory on real models: which rung is taken, that numbers stay, what is refused and how it is said."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_sites import site
from test_planned_graphs import LENGTH, made, step
from torch._functorch.partitioners import default_partition
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dilcompile import rewrite_exported
from dilcompile.budgeted import bounds_of
from dilcompile.decision import Rejection
from dilcompile.errors import BudgetError
from dilcompile.memory import Buffer, plan_buffers
from dilcompile.memory.budget import Bound, Ladder, Rung
from dilcompile.memory.packing import most_live
from dilcompile.memory.step import Phase, Step, at_peak, bytes_of
from dilcompile.passes.graph.copies import copied
from dilcompile.passes.memory import climb
from dilcompile.passes.memory.climb import Climb
from dilcompile.passes.memory.foresee import foresee
from dilcompile.passes.memory.offload import offload, offloadable
from dilcompile.pipeline import UNBOUNDED
from dilcompile.policy import Policy
from dilcompile.report import GraphReport

APPLY = {"form": "dilated", "segments": [32, 96], "rates": [1, 3], "offset": "own"}
# Fewer than there are: each is a partition.
SHARES = (0.75, 0.5, 0.0)


def one_layer():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=50)).double().eval()


def policy(whole=None, **rule):
    defaults = {"defaults": {"memory": whole}} if whole else {}
    return {"version": 1, **defaults, "rules": [{"name": "all", "apply": APPLY, **({"memory": rule} if rule else {})}]}


def compiled_by(model, path=None, inner="aot_eager", dynamic=False, whole=None, **rule):
    torch._dynamo.reset()
    options = {"policy": policy(whole, **rule), "inner": inner, **({"report": str(path)} if path else {})}
    return torch.compile(model, backend="dilated", options=options, dynamic=dynamic)


def refused(run) -> BudgetError:
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        run()
    assert isinstance(caught.value.inner_exception, BudgetError)
    return caught.value.inner_exception


@pytest.fixture(autouse=True)
def few_shares(monkeypatch):
    monkeypatch.setattr(climb, "SHARES", SHARES)
    # See test_smaller_workspaces.
    monkeypatch.setattr(climb, "WORKSPACES", ())


def graph_of(path):
    (graph,) = json.loads(path.read_text())["graphs"]
    return graph


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_a_budget_between_two_peaks_takes_the_lower_one_and_keeps_every_bit(name, tmp_path):
    model, tokens = made(name), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, whole={"budget": 10, "reuse": "within_layer"}), model, tokens))
    within, across, *recomputed = error.tried
    assert [rung.name for rung in error.tried] == [
        "reuse within_layer", "reuse across_layers", *(f"recompute {share:g}, reuse across_layers" for share in SHARES)
    ]  # fmt: skip
    # What is saved for nothing has to be computed again at once.
    assert within.peak > across.peak >= recomputed[0].peak > recomputed[1].peak
    assert recomputed[2].saved == 0
    assert recomputed[2].peak > recomputed[1].peak
    expected = step(compiled_by(model), model, tokens)
    for higher, lower in ((within, across), (recomputed[0], recomputed[1])):
        budget = (higher.peak + lower.peak) // 2
        path = tmp_path / f"{budget}.json"
        found = step(compiled_by(model, path, whole={"budget": budget, "reuse": "within_layer"}), model, tokens)
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        graph = graph_of(path)
        assert graph["budget"]["taken"] == lower.name
        assert [rung["name"] for rung in graph["budget"]["tried"]] == [
            rung.name for rung in error.tried[: error.tried.index(lower) + 1]
        ]
        assert any(f"kept by {lower.name}" in note for note in graph["notes"])


def test_what_was_dropped_out_is_not_drawn_again():
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 128}
    model, tokens = GPT2LMHeadModel(GPT2Config(**sizes)).double().train(), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, whole={"budget": 10}), model, tokens))
    # With nothing saved all would be drawn again: that rung is left out.
    assert [rung.recompute for rung in error.tried] == [None, None, None, *SHARES[:-1]]
    least = min(error.tried, key=lambda rung: rung.peak)
    assert least.recompute is not None
    results = []
    for compiled in (compiled_by(model), compiled_by(model, whole={"budget": least.peak})):
        torch.manual_seed(1)
        results.append(step(compiled, model, tokens))
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def live_bytes(run) -> int:
    """The most bytes that torch's CPU allocator has given out while ``run`` ran, beyond those of before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most


def test_the_peak_of_a_step_is_the_one_that_was_foreseen_to_the_byte():
    model, tokens = made("gpt2"), torch.randint(0, 50, (2, LENGTH))
    rungs = refused(lambda: step(compiled_by(model, whole={"budget": 10}), model, tokens)).tried
    gradient = torch.zeros(2, LENGTH, 50, dtype=torch.float64)

    def run():
        compiled(input_ids=tokens, use_cache=False)[0].backward(gradient)

    for rung in (rungs[0], min(rungs, key=lambda rung: rung.peak)):
        compiled = compiled_by(model, whole={"budget": rung.peak})
        run()
        model.zero_grad()
        # Sums of a layer norm's backward, two rows in double, are made inside of the operator: nobody foresees them.
        assert live_bytes(run) - rung.peak in (0, 2 * 32 * 8)
        model.zero_grad()


def test_what_does_not_fit_is_said_with_what_is_missing_and_the_largest_buffers():
    model, tokens = made("llama"), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, whole={"budget": "100KiB"}), model, tokens))
    least = min(error.tried, key=lambda rung: rung.peak)
    text = str(error)
    assert f"({least.peak:,} bytes are needed, 102,400 given)" in text
    assert f"{least.name} needs least" in text
    assert "refused: the graph is on a CPU, whose memory is the host's" in text
    assert "parameters and other inputs of the graph are not counted" in text
    assert text.split("the largest buffers at the peak: ")[1].count(" bytes)") == 3
    assert "of model.layers.0.mlp" in text


def test_the_budget_of_a_rule_is_that_of_its_modules(tmp_path):
    model, tokens = one_layer(), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, budget=10), model, tokens))
    assert str(error).startswith("rule all (<dict> rules[0]): memory.budget of 10 B")
    assert ".self_attn, " in str(error)
    assert ".mlp" not in str(error)
    for rung in error.tried:
        assert rung.bounded[0] < rung.peak
    own = min(rung.bounded[0] for rung in error.tried)
    both = {"whole": {"budget": 2 * error.tried[0].peak}, "budget": own}
    step(compiled_by(model, tmp_path / "report.json", **both), model, tokens)
    notes = graph_of(tmp_path / "report.json")["notes"]
    assert [note.partition(":")[0] for note in notes] == ["defaults", "rule all (<dict> rules[0])"]


def test_a_rule_that_keeps_its_sites_bounds_them_too():
    kept = Policy.load({"version": 1, "rules": [{"apply": {"form": "keep"}, "memory": {"budget": "1KiB"}}]})
    module = site(module="model.layers.0.self_attn")
    report = GraphReport("0", (Rejection(module, kept.rules[0].label, "the policy keeps it", asked=True),))
    (bound,) = bounds_of(kept, report, "model")
    assert (bound.most, bound.modules) == (1024, {"layers.0.self_attn"})
    assert bound.owns(Buffer("x", 1, 0, 0, 1, module="layers.0.self_attn.q_proj"))
    assert not bound.owns(Buffer("x", 1, 0, 0, 1, module="layers.0.self_attn_norm"))


def test_a_length_that_would_not_fit_is_refused_before_it_runs(monkeypatch):
    monkeypatch.setattr(climb, "SHARES", ())
    model = one_layer()
    short, long = (torch.randint(0, 50, (1, length)) for length in (64, 96))
    error = refused(lambda: step(compiled_by(model, dynamic=True, whole={"budget": 10}), model, short))
    budget = round(1.2 * error.tried[0].peak)
    compiled = compiled_by(model, dynamic=True, whole={"budget": budget})
    expected = step(compiled, model, short)
    with pytest.raises(BudgetError, match=r"memory.budget of .* short .* at s\d+ = 96, run as was chosen .*reuse off"):
        step(compiled, model, long)
    assert all(torch.equal(one, other) for one, other in zip(step(compiled, model, short), expected, strict=True))


def test_eager_keeps_no_budget_with_gradients_and_plans_without():
    model, tokens = one_layer(), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, inner="eager", whole={"budget": "1GiB"}), model, tokens))
    assert "memory.budget (defaults) can't be kept with inner: eager" in str(error)
    assert "take inner: aot_eager or inner: inductor" in str(error)
    with torch.no_grad():
        expected = compiled_by(model, inner="eager")(input_ids=tokens, use_cache=False)[0]
        found = compiled_by(model, inner="eager", whole={"budget": "1GiB"})(input_ids=tokens, use_cache=False)[0]
        assert torch.equal(found, expected)
        error = refused(lambda: compiled_by(model, inner="eager", whole={"budget": 10})(input_ids=tokens, use_cache=False))
    assert [rung.backward for rung in error.tried] == [None] * 3, "only how memory is used again is left to choose"


def test_inductor_takes_the_partition_that_fits(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=1, n_head=4, vocab_size=50, n_positions=128)
    model, tokens = GPT2LMHeadModel(config).double().eval(), torch.randint(0, 50, (2, LENGTH))
    error = refused(lambda: step(compiled_by(model, inner="inductor", whole={"budget": 10}), model, tokens))
    assert {rung.reuse for rung in error.tried} == {"off"}
    first, least = error.tried[0], min(error.tried, key=lambda rung: rung.peak)
    assert least.peak < first.peak
    path = tmp_path / "report.json"
    found = step(compiled_by(model, path, inner="inductor", whole={"budget": least.peak}), model, tokens)
    graph = graph_of(path)
    assert graph["budget"]["taken"] == least.name
    assert graph["budget"]["is_upper_bound"]
    assert "at most" in graph["notes"][-1]
    expected = step(compiled_by(model), model, tokens)
    torch.testing.assert_close(found, expected)


def test_an_exported_program_says_that_nobody_keeps_its_budget(tmp_path):
    attention = torch.nn.Module()
    attention.forward = lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x)
    program = torch.export.export(attention, (torch.randn(1, 2, 96, 8),))
    rewrite_exported(program, policy({"budget": "1GiB"}), report=tmp_path / "report.json")
    assert graph_of(tmp_path / "report.json")["notes"] == [UNBOUNDED]


def test_a_size_that_depends_on_data_is_refused():
    gm = make_fx(lambda x: x.nonzero().double() * 2, tracing_mode="symbolic")(torch.randn(4))
    with pytest.raises(BudgetError, match=r"how large nonzero of the graph .* depends on data.*leave the budget out"):
        foresee(gm)


class Found(Exception):
    """Leaves the compilation."""


def joint_of(batch):
    """The joint graph of a tiny GPT-2, with what a partition is given."""

    def spied(self, gm, inputs, **options):
        raise Found(copied(gm), inputs, options)

    compiled, tokens = compiled_by(made("gpt2"), whole={"budget": "1GiB"}), torch.randint(0, 50, (batch, LENGTH))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Climb, "split", spied)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            compiled(input_ids=tokens, use_cache=False)
    return caught.value.inner_exception.args


def on(device, *parts):
    """The graphs, whose fake values say that they are on ``device``."""
    for value in {id(v): v for part in parts for n in part.graph.nodes for v in [n.meta.get("val")]}.values():
        for tensor in value if isinstance(value, (tuple, list)) else [value]:
            if isinstance(tensor, torch.Tensor):
                tensor.fake_device = torch.device(device)


def test_saved_tensors_wait_in_host_memory_where_nothing_else_fits(monkeypatch):
    # What this one saves can all be moved; others save parts of tensors, which stay.
    monkeypatch.setattr(climb, "SHARES", (0.1, 0.0))
    gm, inputs, options = joint_of(256)
    on("cuda:0", gm)

    def climbed(most):
        made = Climb(Ladder((Bound("defaults", most),), keeps=False), "0", "across_layers", default_partition)
        return made, made.split(copied(gm), inputs, **options)

    with pytest.raises(BudgetError, match=r"defaults: memory.budget of 10 B") as caught:
        climbed(10)
    tried = caught.value.tried
    offloaded = [rung for rung in tried if rung.offload]
    before = min((rung for rung in tried if not rung.offload), key=lambda rung: rung.peak)
    assert [rung.offload for rung in offloaded[:-1]] == [2**i for i in range(len(offloaded) - 1)]
    assert offloaded[-1].saved == 0
    least = min(offloaded, key=lambda rung: rung.peak)
    assert least.peak < before.peak
    made, (forward, backward) = climbed(least.peak)
    assert made.taken.name == least.name
    step = foresee(forward, backward, options["num_fwd_outputs"])
    there = [buffer for buffer in step.buffers if buffer.role == "saved" and buffer.device == "cpu"]
    assert len(there) == least.offload
    copies = [
        node
        for part in (forward, backward)
        for node in part.graph.nodes
        if node.name.startswith("host_") and node.op == "call_function"
    ]
    assert all(node.kwargs == {"device": torch.device("cpu"), "non_blocking": True} for node in copies), "only then is it pinned"
    assert len(copies) == len(there)


def test_offload_changes_no_bit():
    """The rewritten graphs themselves, run on a CPU, where a copy goes nowhere; every tensor that could wait goes through two."""
    gm, inputs, options = joint_of(2)
    outputs = options["num_fwd_outputs"]
    plain, moved = (default_partition(copied(gm), inputs, **options) for _ in range(2))
    assert "on a CPU" in offloadable(*moved, outputs)
    on("cuda:0", *moved)
    groups = offloadable(*moved, outputs)
    assert len(groups) > 10
    on("cuda:0", *plain)
    offload(*moved, groups)
    torch.manual_seed(0)
    values = [
        torch.randint(0, 50, v.shape) if v.dtype == torch.int64 else torch.randn(v.shape, dtype=v.dtype) for v in fakes(moved[0])
    ]
    results = []
    for forward, backward in (plain, moved):
        for node in (*forward.graph.nodes, *backward.graph.nodes):
            if node.target is torch.ops.aten._to_copy.default and "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cpu")}
        forward.recompile(), backward.recompile()
        found = forward(*values)
        tangents = [torch.ones_like(x) for x in found[:outputs]]
        results.append([*found[:outputs], *backward(*found[outputs:], *tangents)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True) if one is not None)


def fakes(gm):
    return [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]


buffers = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6), st.integers(0, 40)), min_size=1, max_size=12)


def step_of(drawn, within_module=None) -> Step:
    """One phase; every second buffer lies in an arena."""
    made = [Buffer(f"b{i}", size, begin, begin + long, size, module=str(i % 3)) for i, (begin, long, size) in enumerate(drawn)]
    last = max(buffer.end for buffer in made)
    if within_module is None:
        return Step(tuple(made), (Phase(0, last),))
    plan = plan_buffers(made[::2], within_module=within_module)
    return Step(tuple(made), (Phase(0, last, plan, frozenset(buffer.name for buffer in made[::2])),))


@settings(max_examples=100, deadline=None)
@given(st.lists(buffers, min_size=1, max_size=6), st.integers(1, 200))
def test_the_first_that_fits_is_taken_and_nothing_better_is_passed_over(all_drawn, most):
    ladder = Ladder((Bound("defaults", most),), keeps=False)
    made = Climb(ladder, "0", "off", partition=None)
    empty = GraphModule({}, torch.fx.Graph())
    steps = [step_of(drawn) for drawn in all_drawn]
    attempts = (climb._Attempt(ladder.predicted(step, Rung("off")), step, empty) for step in steps)
    peaks = [bytes_of(step.buffers) for step in steps]
    fitting = [peak for peak in peaks if peak <= most]
    if fitting:
        assert made._first_fit(attempts).rung.peak == fitting[0]
        assert len(made.report.tried) == peaks.index(fitting[0]) + 1
        return
    with pytest.raises(BudgetError) as caught:
        made._first_fit(attempts)
    assert f"({min(peaks):,} bytes are needed, {most:,} given)" in str(caught.value)
    assert [rung.peak for rung in caught.value.tried] == peaks


@settings(max_examples=100, deadline=None)
@given(buffers, st.booleans(), st.booleans())
def test_a_step_needs_no_less_than_is_live(drawn, within_module, keeps):
    step = step_of(drawn)
    live = most_live(step.buffers)
    assert bytes_of(step.allocated(keeps)) == live
    assert sum(buffer.hint for buffer in at_peak(step.buffers)) == live
    assert bytes_of(step_of(drawn, within_module).allocated(keeps)) >= live
