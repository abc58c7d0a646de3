"""Planned graphs of real models: the numbers of the unplanned ones, and nothing read that nobody wrote."""

import gc
import threading
import weakref

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import dilcompile.planned
from dilcompile.memory.pool import ArenaPool, size_class
from dilcompile.passes.memory import lifetimes
from dilcompile.passes.memory.plan_buffers import plan_graph
from dilcompile.planned import PlannedCall

LENGTH = 96


def policy(**memory):
    apply = {"form": "dilated", "segments": [32, 96], "rates": [1, 3], "offset": "own"}
    return {"version": 1, "rules": [{"apply": apply, **({"memory": memory} if memory else {})}]}


def llama():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=50
    )
    return LlamaForCausalLM(config)


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=128))


def bert():
    config = BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        vocab_size=50,
        max_position_embeddings=128,
    )
    return BertModel(config, add_pooling_layer=False)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def made(name: str):
    torch.manual_seed(0)
    torch._dynamo.reset()
    return MODELS[name]().double().eval()


def step(compiled, model, tokens):
    """The sum of squares of what comes out, and all gradients."""
    model.zero_grad()
    given = {} if isinstance(model, BertModel) else {"use_cache": False}
    loss = compiled(input_ids=tokens, **given)[0].square().mean()
    loss.backward()
    return [loss.detach()] + [p.grad.clone() for p in model.parameters() if p.grad is not None]


def compiled_by(model, dynamic=False, **memory):
    options = {"policy": policy(**memory), "inner": "aot_eager"}
    return torch.compile(model, backend="dilated", options=options, dynamic=dynamic)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("poison", ["0", "1"])
def test_the_numbers_are_those_of_the_unplanned_graph(name, poison, calls, monkeypatch):
    monkeypatch.setenv(dilcompile.planned.POISON, poison)
    model, tokens = made(name), torch.randint(0, 50, (2, LENGTH))
    expected = step(compiled_by(model), model, tokens)
    assert not calls
    found = step(compiled_by(model, pool="private", reuse="across_layers"), model, tokens)
    assert len(calls) == 2, "a forward and a backward"
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    for call in calls:
        plan = call.planned.plan
        assert plan.most_live <= plan.peak <= 1.05 * plan.most_live
        donated = sum(buffer.hint for arena in plan.donated for buffer in arena.buffers)
        # What BERT's forward keeps for its backward, which is most of it, is not planned.
        assert plan.peak <= (plan.without_reuse + donated) / (2.5 if name == "bert" else 3)


def test_gradients_are_written_where_the_fused_projection_has_them(calls):
    """GPT-2 joins the gradients of q, k and v: they are made in the joined tensor, and nothing is joined any more."""
    model, tokens = made("gpt2"), torch.randint(0, 50, (1, LENGTH))
    step(compiled_by(model, reuse="across_layers"), model, tokens)
    backward = calls[1].planned
    named = [str(node.target) for node in backward.gm.graph.nodes]
    assert named.count("dilcompile.attention_backward.out") == 2
    assert not [name for name in named if name.startswith(("aten.cat", "aten.copy_"))]
    places = {layout.buffer: [] for layout in backward.layouts}
    for layout in backward.layouts:
        places[layout.buffer].append((layout.offset, layout.stride))
    # q, k and v beside one another: 32 columns each of rows of 96.
    for name in ("cat", "cat_1"):
        assert {(offset, stride[-3:]) for offset, stride in places[name] if len(stride) == 4} == {
            (offset, (8, 96, 1)) for offset in (0, 32, 64)
        }


def chain(x):
    first = x.sin()
    last = first.cos().exp().tanh().neg()
    return last @ first.mT


def test_a_life_that_is_cut_short_is_found_out(monkeypatch):
    """A buffer that is planned to end before its last reader: memory filled with NaN shows it."""
    monkeypatch.setenv(dilcompile.planned.POISON, "1")
    x, found = torch.randn(16, 16), lifetimes._buffer

    def short(storage):
        storage.end -= storage.name == "sin"
        return found(storage)

    def run():
        gm = make_fx(chain, tracing_mode="fake")(x)
        return PlannedCall(plan_graph(gm), ArenaPool())([x])

    assert torch.equal(run(), chain(x))
    monkeypatch.setattr(lifetimes, "_buffer", short)
    assert run().isnan().all()


def test_lengths_that_change_are_not_planned_again(calls):
    model = made("llama")
    plain, planned = (compiled_by(model, True), compiled_by(model, True, pool="private", reuse="across_layers"))
    for length in (64, 80, 64):
        tokens = torch.randint(0, 50, (1, length))
        expected, found = (step(compiled, model, tokens) for compiled in (plain, planned))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert len(calls) == 2
    assert calls[0].pool.counts.hits > 0


@pytest.mark.parametrize("reuse", ["within_layer", "across_layers"])
def test_layers_share_only_where_the_policy_says_so(reuse, calls):
    model, tokens = made("llama"), torch.randint(0, 50, (1, LENGTH))
    step(compiled_by(model, pool="private", reuse=reuse), model, tokens)
    for call in calls:
        modules = [{buffer.module for buffer in arena.buffers} for arena in call.planned.plan.arenas]
        assert any(len(of_arena) > 1 for of_arena in modules) == (reuse == "across_layers")


def test_a_peak_that_is_predicted_is_the_peak(calls):
    """The same graph run node by node, each value given up after its last reader: what is live at most, to the byte."""
    model, tokens = made("llama"), torch.randint(0, 50, (1, LENGTH))
    step(compiled_by(model, pool="private", reuse="across_layers"), model, tokens)
    for call in calls:
        found, predicted = call.planned.lifetimes, [*call.planned.lifetimes.buffers]
        live = [sum(b.hint for b in predicted if b.begin <= at <= b.end) for at in range(found.steps)]
        plan = call.planned.plan
        planned = {buffer.name for arena in (*plan.arenas, *plan.donated) for buffer in arena.buffers}
        assert planned | {buffer.name for buffer in call.planned.elsewhere} == {buffer.name for buffer in predicted}
        assert not planned & set(found.held)
        assert call.planned.plan.most_live <= max(live)


def test_nothing_is_held_after_the_model_is_dropped(calls):
    model, tokens = made("gpt2"), torch.randint(0, 50, (1, LENGTH))
    compiled = compiled_by(model, pool="private", reuse="across_layers")
    step(compiled, model, tokens)
    pools = [weakref.ref(call.pool) for call in calls]
    assert pools[0]().held_bytes() > 0
    calls.clear()
    del compiled, model
    torch._dynamo.reset()
    gc.collect()
    assert all(pool() is None for pool in pools)


def test_a_default_pool_keeps_nothing(calls):
    model, tokens = made("llama"), torch.randint(0, 50, (1, LENGTH))
    step(compiled_by(model, reuse="across_layers"), model, tokens)
    assert all(call.pool.held_bytes() == 0 for call in calls)


class Meeting:
    """Calls of one planned graph that are in flight together: each stops in the middle of the graph until all are there."""

    def __init__(self, number: int) -> None:
        self.barrier, self.inside = threading.Barrier(number, timeout=60), None


MEETING = Meeting(1)


@torch.library.custom_op("dilcompile_tests::meet", mutates_args=())
def meet(x: torch.Tensor) -> torch.Tensor:
    MEETING.barrier.wait()
    if MEETING.inside is not None:
        inside, MEETING.inside = MEETING.inside, None
        inside()
    return x.clone()


@meet.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def meeting(x):
    """``first`` waits in the arena while the other calls run."""
    first = x.sin()
    return first * 2 + meet(x.cos()).exp().neg()


def met(pool, number, monkeypatch):
    """The largest error of that many calls at once, each from a thread of its own."""
    monkeypatch.setattr(f"{__name__}.MEETING", Meeting(number))
    inputs = [torch.randn(64, 64) for _ in range(number)]
    call = PlannedCall(plan_graph(make_fx(meeting, tracing_mode="fake")(inputs[0])), pool)
    found = {}
    threads = [threading.Thread(target=lambda n=n, x=x: found.update({n: call([x])})) for n, x in enumerate(inputs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    monkeypatch.setattr(f"{__name__}.MEETING", Meeting(1))
    return max(float((found[n] - meeting(x)).abs().max()) for n, x in enumerate(inputs))


def test_threads_in_one_graph_never_share_live_memory(monkeypatch):
    pool = ArenaPool()
    for _ in range(3):
        assert met(pool, 4, monkeypatch) == 0
    assert (pool.counts.asked, pool.counts.hits) == (12, 8)
    one, take = ArenaPool(), ArenaPool._take
    given = {}
    # What the pool is there for: one arena for all is found out.
    monkeypatch.setattr(ArenaPool, "_take", lambda self, *key: given.setdefault(key, take(self, *key)))
    assert met(one, 4, monkeypatch) > 0


def test_a_call_inside_a_call_has_memory_of_its_own(monkeypatch):
    x, pool, found = torch.randn(64, 64), ArenaPool(), []
    call = PlannedCall(plan_graph(make_fx(meeting, tracing_mode="fake")(x)), pool)
    monkeypatch.setattr(f"{__name__}.MEETING", Meeting(1))
    MEETING.inside = lambda: found.append(call([x + 1]))
    assert torch.equal(call([x]), meeting(x))
    assert torch.equal(found[0], meeting(x + 1))
    assert (pool.counts.asked, pool.counts.hits) == (2, 0)


def test_what_is_kept_is_what_the_largest_call_needs():
    pool, device = ArenaPool(), torch.device("cpu")

    def place(size):
        with pool.lease([(device, size)]) as lease:
            return lease.arenas[0].data_ptr()

    first = place(5000)
    assert place(4900) == first
    larger = place(100_000)
    assert pool.held_bytes() == size_class(100_000)
    assert place(5000) == place(80_000) == larger
    assert (pool.counts.asked, pool.counts.hits) == (5, 3)
    with pool.lease([(device, 5000)]) as one, pool.lease([(device, 5000)]) as other:
        assert one.arenas[0].data_ptr() == larger != other.arenas[0].data_ptr()
    pool.clear()
    assert pool.held_bytes() == 0


def test_size_classes_waste_at_most_a_quarter():
    for size in (1, 4096, 4097, 5000, 5120, 5121, 10**6, 2**30, 2**30 + 1):
        assert size <= size_class(size) <= max(4096, 1.25 * size)
    assert len({size_class(size) for size in range(4097, 8193)}) == 4
