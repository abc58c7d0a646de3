"""Planned graphs with operators that take memory in their own way: the numbers are those of the unplanned graph, bit for bit."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from test_planned_graphs import compiled_by
from torch.utils.checkpoint import checkpoint

import dilcompile.planned


@torch.library.custom_op("dilcompile_tests::double_it", mutates_args=("x",))
def double_it(x: torch.Tensor) -> None:
    x.mul_(2)


@double_it.register_fake
def _(x: torch.Tensor) -> None:
    return None


def attend(x):
    return F.scaled_dot_product_attention(x, x.sin(), x.cos())


def strided(x):
    """Its backward adds into memory that it sees from the begin of the storage on."""
    return attend(x).reshape(-1).as_strided((10, 5), (3, 1), 7).sin()


def strided_in_place(x):
    y = (attend(x) * 2).contiguous()
    y.as_strided((10, 5), (3, 1), 7).mul_(3)
    return y.sin()


def changed_by_a_custom_operator(x):
    first, second = attend(x).sin(), x.cos()
    for view in (second[:, 3:5], second.transpose(0, 1), first.reshape(-1)[3:77]):
        double_it(view)
    return first * second + 1


def of_unknown_size(x):
    return attend(x)[x.sum(-1) > 0].sin().exp() * 2


def of_a_length_in_the_data(x):
    length = (x.sum() > 1e9).long().add(3).item()
    torch._check(length > 0)
    torch._check(length < 10)
    return x.new_zeros(length, 4).add(1).sin() * 2 + attend(x).exp().sum()


def dropped_out_in_a_checkpoint(x):
    return checkpoint(lambda y: F.dropout(attend(y).sin(), 0.3).exp(), x.sin(), use_reentrant=False) * 2


def sparse_gradients(table):
    tokens = torch.arange(64).reshape(2, 32) % 9
    return attend(F.embedding(tokens, table, sparse=True).unsqueeze(1)).sin()


GRADIENTS = (strided, of_unknown_size, dropped_out_in_a_checkpoint, sparse_gradients)
NONE = (strided_in_place, changed_by_a_custom_operator, of_unknown_size, of_a_length_in_the_data)


def run(compiled, x, trains):
    x = x.clone().requires_grad_(trains)
    torch.manual_seed(1)
    out = compiled(x)
    return [out.detach(), *(torch.autograd.grad(out.square().sum(), [x]) if trains else ())]


@pytest.mark.parametrize("poison", ["0", "1"])
@pytest.mark.parametrize(
    ("trains", "f"), [*((True, f) for f in GRADIENTS), *((False, f) for f in NONE)], ids=lambda f: getattr(f, "__name__", f)
)
def test_the_numbers_are_those_of_the_unplanned_graph(f, trains, poison, calls, monkeypatch):
    monkeypatch.setenv(dilcompile.planned.POISON, poison)
    torch.manual_seed(0)
    x, found = torch.randn(9, 8) if f is sparse_gradients else torch.randn(2, 1, 32, 8), []
    for memory in ({}, {"reuse": "across_layers"}):
        torch._dynamo.reset()
        with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
            found.append(run(compiled_by(f, **memory), x, trains))
    assert len(calls) == 1 + trains
    assert all(torch.equal(one.to_dense(), other.to_dense()) for one, other in zip(*found, strict=True))
    assert any(call.planned.plan.peak for call in calls)


def attended():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x):
            return attend(self.linear(x)).sin().exp()

    return Model()


@pytest.mark.parametrize("pool", ["private", "shared"])
def test_arenas_go_with_the_last_model_that_they_are_kept_for(pool, calls):
    """Without a reset, too: Dynamo keeps what it compiled."""
    torch._dynamo.reset()
    models, pools = [], []
    for _ in range(2):
        model = attended()
        compiled = compiled_by(model, pool=pool, reuse="across_layers")
        compiled(torch.randn(2, 1, 32, 8)).sum().backward()
        models.append(model)
        pools.append(calls[-1].pool)
        del model, compiled
    assert all(one.held_bytes() > 0 for one in pools)
    last = weakref.ref(models.pop())
    gc.collect()
    assert last() is None
    assert (pools[1].held_bytes() == 0) == (pool == "private")
    assert pools[0].held_bytes() > 0
    models.clear()
    gc.collect()
    assert [one.held_bytes() for one in pools] == [0, 0]
