"""Attention in chunks of queries: outputs, gradients and draws stay, the peak is the foreseen one, and refusals say why."""

import copy

import pytest
import torch
from test_budget import graph_of, live_bytes, refused
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import embedding, pad
from torch.utils._pytree import tree_leaves
from transformers import (
    DebertaV2Config,
    DebertaV2Model,
    MPNetConfig,
    MPNetModel,
    T5Config,
    T5EncoderModel,
    T5Model,
    XLNetConfig,
    XLNetModel,
)

from dilcompile.lowering import after as _registered  # noqa: F401
from dilcompile.passes.graph.copies import copied
from dilcompile.passes.memory import climb
from dilcompile.passes.memory.chunk_gradients import Shares, course_of
from dilcompile.passes.memory.chunk_queries import chunk_queries, chunk_sizes
from dilcompile.passes.memory.growing import Growing, fake_mode_of, put_in_order
from dilcompile.passes.memory.lifetimes import lifetimes_of
from dilcompile.passes.memory.rows import Rows
from dilcompile.passes.memory.rows_of import RowsOf

LENGTH = 512
BERT = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}


def t5(kind=T5EncoderModel, layers=2, dropout=0.0):
    sizes = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": layers, "num_heads": 4}
    torch.manual_seed(0)
    return kind(T5Config(**sizes, dropout_rate=dropout)).train()


def mpnet():
    torch.manual_seed(0)
    return MPNetModel(MPNetConfig(**BERT, num_hidden_layers=2, max_position_embeddings=LENGTH + 2, **NO_DROPOUT)).train()


def deberta():
    """Its bias is made of the queries and the keys."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "max_position_embeddings": LENGTH, "position_buckets": 32, **NO_DROPOUT}
    return DebertaV2Model(DebertaV2Config(**BERT, **sizes, relative_attention=True, pos_att_type=["c2p", "p2c"])).train()


NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
MODELS = {"t5": lambda: t5(T5Model, 1), "mpnet": mpnet, "deberta": deberta}


@pytest.fixture(autouse=True)
def few_ways(monkeypatch):
    monkeypatch.setattr(climb, "SHARES", ())


def compiled_by(model, budget, inner="aot_eager", path=None, dynamic=False, apply=None):
    torch._dynamo.reset()
    policy = {"version": 1, "defaults": {"memory": {"budget": budget}}, "rules": [{"apply": apply or {"form": "dense"}}]}
    options = {"policy": policy, "inner": inner, **({"report": str(path)} if path else {})}
    return torch.compile(model, backend="dilated", options=options, dynamic=dynamic)


def inputs_of(model, batch=1):
    torch.manual_seed(1)
    ids = torch.randint(2, 50, (batch, LENGTH))
    mask = torch.ones(batch, LENGTH)
    mask[:, -40:] = 0
    more = {"decoder_input_ids": ids, "use_cache": False} if isinstance(model, T5Model) else {}
    return {"input_ids": ids, "attention_mask": mask, **more}


def step(run, model, inputs, seed=2):
    """The output and all gradients."""
    torch.manual_seed(seed)
    model.zero_grad()
    out = run(**inputs)[0]
    torch.manual_seed(3)
    out.backward(torch.randn_like(out, dtype=torch.float64).to(out.dtype))
    return {"out": out.detach(), **{name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}}


def assert_as_exact(found, whole, exact):
    """As near to float64 as what computes all queries at once."""
    assert found.keys() == whole.keys() == exact.keys()
    for key, right in exact.items():
        errors = [(each[key] - right).norm() for each in (found, whole)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * right.norm(), key


def least_of(run):
    """The rungs with chunks, where none keeps the budget; the last is the best of all."""
    tried = refused(run).tried
    chunked = [rung for rung in tried if rung.chunk is not None and rung.workspaces == 1]
    assert min(tried, key=lambda rung: rung.peak) is chunked[-1]
    return chunked[-1], min(rung.peak for rung in tried if rung.chunk is None)


class Found(Exception):
    """Leaves the compilation."""


def joint_of(model, inputs):
    """The joint graph of a step."""

    def spied(self, gm, given, **options):
        raise Found(copied(gm))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(climb.Climb, "split", spied)
        with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
            compiled_by(model, "1GiB")(**inputs)
    (gm,) = caught.value.inner_exception.args
    return gm


def values_of(gm):
    """Something for each input of a graph: tokens, padding, weights, gradients."""
    torch.manual_seed(1)
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta["val"]
        if not value.is_floating_point():
            yield torch.randint(2, 50, value.shape)
        elif value.shape[-1:] == (LENGTH,):
            yield (torch.arange(LENGTH) < LENGTH - 40).to(value.dtype).expand(value.shape)
        elif not value.shape:
            yield torch.full((), 8.0, dtype=value.dtype)
        else:
            yield torch.randn(value.shape, dtype=value.dtype) / value.shape[-1] ** 0.5


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients_are_those_of_all_queries_at_once(name):
    model = MODELS[name]()
    gm = joint_of(model, inputs_of(model, batch=2))
    found = chunk_queries(gm, 256)
    assert not found.whys
    pairs = [node for node in found.gm.graph.nodes if sum(size == LENGTH for size in shape_of(node)) > 1]
    assert all(node.op == "placeholder" for node in pairs), pairs
    values = list(values_of(gm))
    run = [Interpreter(graph).run for graph in (found.gm, gm)]
    chunked, whole = (flat(way(*values)) for way in run)
    exact = flat(run[1](*(value.double() if value.is_floating_point() else value for value in values)))
    for right, one, other in zip(exact, chunked, whole, strict=True):
        assert one.stride() == other.stride()
        errors = [(found - right).norm() for found in (one, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6 * right.norm()


def shape_of(node):
    value = node.meta.get("val")
    return value.shape if isinstance(value, torch.Tensor) else ()


def fakes(gm):
    return flat([result.meta["val"] for result in tree_leaves(gm.graph.output_node().args) if result is not None])


def flat(results):
    return [result for result in tree_leaves(results) if result is not None]


def test_what_is_dropped_out_stays_and_the_peak_is_the_foreseen_one_to_the_byte():
    model = t5(layers=1, dropout=0.2)
    inputs = inputs_of(model, batch=2)
    rung, _ = least_of(lambda: step(compiled_by(model, 10), model, inputs))
    whole = step(compiled_by(model, "1GiB"), model, inputs)
    compiled = compiled_by(model, rung.peak)
    chunked = step(compiled, model, inputs)
    assert torch.equal(chunked["out"], whole["out"])
    # Dropout draws the same in float64.
    exact = copy.deepcopy(model).double()
    assert_as_exact(chunked, whole, step(compiled_by(exact, "1GiB"), exact, inputs))
    compiled = compiled_by(model, rung.peak)
    step(compiled, model, inputs)
    model.zero_grad()
    gradient = torch.ones(2, LENGTH, 32)
    assert live_bytes(lambda: compiled(**inputs)[0].backward(gradient)) == rung.peak


def test_without_gradients_every_bit_stays_and_the_peak_is_the_foreseen_one(tmp_path):
    model = t5().eval()
    inputs = inputs_of(model)
    with torch.no_grad():
        rung, before = least_of(lambda: compiled_by(model, 10)(**inputs))
        assert rung.peak < 0.6 * before
        expected = compiled_by(model, "1GiB")(**inputs)[0]
        compiled = compiled_by(model, rung.peak)
        assert torch.equal(compiled(**inputs)[0], expected)
        assert live_bytes(lambda: compiled(**inputs)) == rung.peak


def test_a_chunk_s_bias_is_dead_before_the_next_one_is_made(monkeypatch):
    seen = []
    attempt = climb.Climb._attempt

    def spied(self, way, forward, backward, outputs):
        if way.chunk is not None:
            seen.append((forward, backward))
        return attempt(self, way, forward, backward, outputs)

    monkeypatch.setattr(climb.Climb, "_attempt", spied)
    model = t5()
    least_of(lambda: step(compiled_by(model, 10), model, inputs_of(model)))
    of_chunk = 4 * 256 * LENGTH * 4
    for gm, most in zip(seen[-1], (2, 3), strict=True):
        found = lifetimes_of(gm)
        large = [buffer for buffer in (*found.buffers, *found.kept) if buffer.hint >= of_chunk]
        assert large, "the bias of a chunk is there"
        assert all(buffer.hint == of_chunk for buffer in large)
        live = [sum(buffer.begin <= at <= buffer.end for buffer in large) for at in range(found.steps)]
        # Where a bias is made, and the look-up behind it; in the backward its gradient, too.
        assert max(live) <= most
        assert not any(buffer.hint >= of_chunk for buffer in found.kept)


def test_inductor_keeps_the_order_of_the_chunks(tmp_path):
    model = t5(layers=1)
    inputs = inputs_of(model)
    rung, _ = least_of(lambda: step(compiled_by(model, 10, "inductor"), model, inputs))
    compiled = compiled_by(model, rung.peak, "inductor", tmp_path / "report.json")
    found = step(compiled, model, inputs)
    assert graph_of(tmp_path / "report.json")["budget"]["taken"] == rung.name
    exact = copy.deepcopy(model).double()
    assert_as_exact(found, step(model, model, inputs), step(exact, exact, inputs))
    model.zero_grad()
    gradient = torch.ones(1, LENGTH, 32)
    assert live_bytes(lambda: compiled(**inputs)[0].backward(gradient)) <= rung.peak


def test_halves_are_summed_in_float32():
    model = t5(layers=1).bfloat16()
    gm = joint_of(model, inputs_of(model))
    chunked = chunk_queries(gm, 256).gm
    sums = [node for node in chunked.graph.nodes if node not in gm.graph.nodes and node.name.startswith("add_tensor")]
    assert {node.meta["val"].dtype for node in sums} >= {torch.float32}
    assert [v.dtype for v in fakes(chunked)] == [v.dtype for v in fakes(gm)]
    values = list(values_of(gm))
    right_way = joint_of(model.double(), {**inputs_of(model), "attention_mask": torch.ones(1, LENGTH, dtype=torch.float64)})
    exact = flat(Interpreter(right_way).run(*(value.double() if value.is_floating_point() else value for value in values)))
    for right, one, other in zip(exact, *(flat(Interpreter(way).run(*values)) for way in (chunked, gm)), strict=True):
        errors = [(found.double() - right).norm() for found in (one, other)]
        assert errors[0] <= 1.5 * errors[1] + 2**-8 * right.norm()


def test_a_bias_whose_rows_are_mixed_is_refused_with_the_reason():
    torch.manual_seed(0)
    model = XLNetModel(XLNetConfig(vocab_size=50, d_model=32, n_layer=1, n_head=4, d_inner=48, dropout=0.0)).train()
    error = refused(lambda: step(compiled_by(model, 10), model, {"input_ids": torch.randint(0, 50, (1, LENGTH))}))
    assert all(rung.chunk is None for rung in error.tried)
    assert "attention of layer.0.rel_attn takes no chunks of queries: a gradient of the bias goes through view" in str(error)
    assert "which cuts or joins the rows" in str(error)


def test_a_length_that_is_known_only_when_the_graph_runs_is_refused_with_the_reason():
    model = t5(layers=1).eval()
    with torch.no_grad():
        error = refused(lambda: compiled_by(model, 10, dynamic=True)(**inputs_of(model)))
    assert all(rung.chunk is None for rung in error.tried)
    assert "takes no chunks of queries: its lengths are known only when the graph runs" in str(error)


def test_without_a_bias_over_pairs_no_chunks_are_tried():
    class Attention(torch.nn.Module):
        def forward(self, x, bias):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=bias)

    x = torch.randn(1, 2, LENGTH, 8)
    for bias in (None, torch.randn(1, 1, 1, LENGTH)):
        with torch.no_grad():
            error = refused(lambda bias=bias: compiled_by(Attention(), 10)(x, bias))
        assert all(rung.chunk is None for rung in error.tried)
        assert "chunks" not in str(error)


def attention_graph(form="dense()", length=LENGTH, **more):
    """One call whose bias is made in the graph."""

    def run(q, bias):
        by_name = {"q_offset": 0, "scale": 1.0, "softcap": None, "dropout_p": 0.0, "kernel": None, **more}
        masks = {"key_padding": None, "documents": None, "bias": bias * 2, "dropout_seed": None}
        return torch.ops.dilcompile.attention(
            q, q, q, **masks, form=form, is_causal=False, window_left=None, window_right=None, **by_name
        )

    with FakeTensorMode() as mode:
        given = mode.from_tensor(torch.randn(1, 2, length, 8)), mode.from_tensor(torch.randn(length, length))
        return make_fx(run, tracing_mode="fake")(*given)


@pytest.mark.parametrize(
    ("form", "why"),
    [
        (
            "block_sparse(block=64, pattern={'topk': {'estimator': 'pooled', 'blocks': 2}})",
            "its blocks are chosen from all of its queries",
        ),
        ("block_sparse(pattern={'near': {'radius': 2}}, block=64, order='hilbert', grid=(16, 32))", "in the order of a curve"),
    ],
)
def test_forms_that_look_at_all_queries_are_refused_with_the_reason(form, why):
    found = chunk_queries(attention_graph(form), 256)
    assert found.gm is None
    (reason,) = found.whys
    assert why in reason


@pytest.mark.parametrize("form", ["dense()", "dilated(segments=(64, 256), rates=(1, 4))", "sliding_window(window=100)"])
def test_a_chunk_stands_where_its_queries_do(form):
    gm = attention_graph(form)
    assert list(chunk_sizes(gm)) == [256]
    found = chunk_queries(gm, 256)
    torch.manual_seed(0)
    given = torch.randn(1, 2, LENGTH, 8), torch.randn(LENGTH, LENGTH)
    for one, other in zip(found.gm(*given), gm(*given), strict=True):
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("length", "sizes"), [(257, []), (530, [256]), (700, [256]), (1024, [512, 256]), (1600, [768, 512, 256])], ids=str
)
def test_chunks_are_about_half_of_the_queries_and_no_size_comes_twice(length, sizes):
    assert list(chunk_sizes(attention_graph(length=length))) == sizes


S = 12


def far():
    return torch.arange(S)[None] - torch.arange(S)[:, None]


WAYS = {
    "cast and scaled": lambda x: (x.double() * 2).float() / torch.arange(1, S + 1)[:, None],
    "its mean taken off": lambda x: x - x.mean(1, keepdim=True).expand(S, S),
    "looked up": lambda x: embedding(far().abs(), x).permute(2, 0, 1)[1],
    "indexed": lambda x: x[far().abs(), far().clamp(0, 3)],
    "indexed in front": lambda x: x[far().abs()].sum(-1),
    "gathered along keys": lambda x: x.gather(1, far().abs()),
    "gathered along rows": lambda x: x.gather(0, far().abs()),
    "split and joined": lambda x: x.view(S // 4, 4, S).reshape(S, S),
    "moved": lambda x: x.unsqueeze(1).transpose(0, 2).squeeze(1),
    "flat": lambda x: x.reshape(-1)[(far() % 7).reshape(-1)].view(S, S),
    "chosen": lambda x: torch.where(far() > 0, x, torch.zeros(())),
    "filled": lambda x: x.masked_fill(far() > 2, 0.0),
    "multiplied": lambda x: x @ (torch.eye(S) + 1),
    "multiplied in batches": lambda x: torch.einsum("id,ijd->ij", torch.ones(S, S), x[far().abs()]),
    "softmax of keys": lambda x: x.softmax(1),
    "joined": lambda x: torch.cat([x[:5], x[5:] * 2]),
    "joined along keys": lambda x: torch.cat([x[:, 3:], x[:, :3]], 1),
    "padded": lambda x: pad(x[:, 2:], (1, 1)),
    "a part of its rows": lambda x: x[torch.arange(S + 4) % S][2 : S + 2],
    "a triangle": lambda x: x.tril(1) + x.triu(2) * 3,
    "of numbers": lambda x: torch.full((S, S), 2.0) * x + torch.ones_like(x),
    "shifted": lambda x: pad(x, (0, 0, 2, 0))[1 : S + 1],
    "drawn": lambda x: torch.bernoulli(x.abs().clamp(0, 1)) * x,
}
# Those of which some rows can't be had, and those whose gradients can't, with the reason.
NO_ROWS = {
    "shifted": "constant_pad_nd (aten::constant_pad_nd) pads the rows",
    "drawn": "bernoulli (aten::bernoulli) draws random numbers, which are not drawn again",
}
NO_GRADIENTS = {
    "its mean taken off": "add_1 (aten::add) adds another gradient to that of the bias",
    "softmax of keys": "the gradient of the bias goes through _softmax_backward_data",
    "joined": "a gradient of the bias goes through slice",
    "shifted": "a gradient of the bias goes through constant_pad_nd",
}


def grown(gm):
    mode = fake_mode_of(gm.graph)
    return Growing(gm.graph, mode, gm.graph.output_node())


@pytest.mark.parametrize("name", WAYS)
def test_rows_are_those_of_the_whole(name):
    torch.manual_seed(0)
    x = torch.randn(S, S)
    gm = make_fx(WAYS[name], tracing_mode="fake")(x)
    (whole,) = gm.graph.output_node().args
    for start, stop in ((0, 4), (4, 8), (8, S)):
        made = RowsOf(grown(gm), S, 0, ()).of(whole, Rows(0, start, stop))
        if name in NO_ROWS:
            assert made == NO_ROWS[name]
            return
        assert not isinstance(made, str), made
        assert made.meta["val"].shape == (stop - start, S)
        gm.graph.output_node().args = (made,)
        gm.recompile()
        torch.testing.assert_close(gm(x), WAYS[name](x)[start:stop])


@pytest.mark.parametrize("name", [name for name in WAYS if name != "drawn"])
def test_gradients_of_rows_add_up_to_that_of_the_whole(name):
    torch.manual_seed(0)
    x, gradient = torch.randn(S, 3), torch.randn(S, S)

    def backward(x, gradient):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(WAYS[name](x @ torch.ones(3, S).tril(0).add(torch.eye(S)[:3])), x, gradient)[0]

    gm = make_fx(backward, tracing_mode="fake")(x, gradient)
    expected = gm(x, gradient)
    source = list(gm.graph.find_nodes(op="placeholder"))[1]
    course = course_of(gm.graph, {source: S})
    if name in NO_GRADIENTS:
        assert NO_GRADIENTS[name] in course.whys[source]
        return
    assert not course.whys, course.whys
    shares = Shares(course, tuple(node for node in gm.graph.nodes if node in course.rows or node in course.ends))
    grow = grown(gm)
    for start, stop in ((0, 4), (4, 8), (8, S)):
        over = RowsOf(grow, S, 0, ())
        rows = Rows(0, start, stop)
        assert not isinstance(shares.add(source, over.sliced(source, rows), rows, over), str)
    assert shares.end_of_call(grow) is None
    shares.settle(gm.graph, grow)
    put_in_order(gm.graph)
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    gm.recompile()
    assert {shape_of(user) for user in source.users} == {(4, S)}, "the whole gradient is read by nobody"
    torch.testing.assert_close(gm(x, gradient), expected)
