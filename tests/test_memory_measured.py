"""What torch's allocator is asked for, beside what was predicted: to the byte, on a CPU."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_planned_graphs import LENGTH, MODELS, compiled_by, made, policy, step

from dilcompile.forms import Dense, Dilated
from dilcompile.lowering import ops
from dilcompile.lowering.select import KERNELS
from dilcompile.memory.measure import measured
from dilcompile.memory.packing import most_live
from dilcompile.memory.pool import ArenaPool, arena_size
from dilcompile.planned import PlannedCall

DILATED = str(Dilated(segments=(32, 96), rates=(1, 3), offset="own"))


def test_allocations_are_seen():
    held = torch.empty(1000)

    def run():
        first = held + held
        second = first[:500].clone()
        del first
        return second.double()

    result, found = measured(run)
    assert found.allocations == (4000, 2000, 4000)
    assert found.peak == 6000
    assert found.left == result.nbytes


@pytest.mark.parametrize("name", MODELS)
def test_the_predicted_peak_is_the_measured_one(name, monkeypatch):
    """Forward and backward of a planned model: the arena is one allocation, and with what lies elsewhere the peak is as predicted."""
    calls = []
    plain = PlannedCall.__call__

    def measuring(self, args):
        self.pool = ArenaPool(keeps=False)
        # Inputs that nobody else held would be given up on the way: only those are in whose memory buffers lie.
        dying = {number for inside in self.planned.donated for number, _ in inside.inputs}
        plain(self, list(args))
        held = [x for number, x in enumerate(args) if number not in dying]
        result, found = measured(lambda: plain(self, args))
        assert self.runs.refused == len(self.planned.donated), "while the arguments were held, and only then"
        del held
        calls.append((self, found))
        return result

    monkeypatch.setattr(PlannedCall, "__call__", measuring)
    model, tokens = made(name), torch.randint(0, 50, (2, LENGTH))
    step(compiled_by(model, reuse="across_layers"), model, tokens)
    assert len(calls) == 2
    for call, found in calls:
        plan = call.planned.plan
        arenas = [arena_size(arena.peak, again=False) for arena in plan.arenas]
        dying = [replace(arena.inside, end=max(buffer.end for buffer in arena.buffers)) for arena in plan.donated]
        there, others = sum(buffer.hint for buffer in dying), [*call.planned.elsewhere, *call.planned.lifetimes.kept]
        assert len(arenas) == 1
        assert found.allocations.count(arenas[0]) == 1
        assert call.account("0", "forward").predicted == arenas[0] + most_live(others) > arenas[0]
        # A number that an operator makes a tensor of is its own.
        assert found.peak - (arenas[0] + most_live([*others, *dying]) - there) in (0, 8)
        assert found.left == sum(buffer.hint for buffer in call.planned.lifetimes.kept) - there


# Each with operands of its own choice where it doesn't take the dilated ones.
FORMS = {"native": DILATED, "cpu": DILATED, "reference": DILATED, "sdpa": str(Dense())}


def operands(with_bias=False):
    """q, k, v and maybe a bias that gradients are recorded for, and the bytes of out and LSE."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 96, 4, 16).transpose(1, 2).requires_grad_() for _ in range(3))
    bias = torch.randn(1, 4, 96, 96, requires_grad=True) if with_bias else None
    return (q, k, v, bias), q.numel() * 4 + 2 * 4 * 96 * 4


def saved_by(run):
    """The result of ``run``, and the storages that autograd saved for it, by address."""
    saved: dict[int, int] = {}

    def pack(x):
        saved[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return result, saved


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", FORMS)
def test_the_operator_saves_out_and_lse_and_its_inputs(kernel, with_bias):
    assert kernel in KERNELS
    if with_bias and kernel == "sdpa":
        pytest.skip("it takes no bias whose gradient is asked for")
    (q, k, v, bias), both = operands(with_bias)
    padding = None if kernel == "sdpa" else torch.ones(2, 96, dtype=torch.bool).tril(90)

    def run():
        return ops.attention(q, k, v, padding, None, bias, None, FORMS[kernel], True, None, None, 0, 0.3, None, 0.0, kernel)

    run()
    _check(run, [x for x in (q, k, v, bias, padding) if x is not None], both)


def _check(run, inputs, both):
    """Out, LSE and inputs are what autograd saves; and out and LSE are all memory that the forward leaves behind."""
    _, saved = saved_by(run)
    own = {x.untyped_storage().data_ptr() for x in inputs}
    assert own - saved.keys() == set()
    assert sum(size for place, size in saved.items() if place not in own) == both
    result, found = measured(run)
    assert found.left == both
    result[0].square().mean().backward()
    assert all(x.grad is not None for x in inputs if x.requires_grad)


class Attention(torch.nn.Module):
    """Nothing but attention."""

    def forward(self, q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, out.detach()


@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_compiled_graphs_save_out_and_lse_and_inputs(inner, kernel):
    torch._dynamo.reset()
    (q, k, v, _), both = operands()
    (rule,) = policy()["rules"]
    asked = {"version": 1, "rules": [{"apply": {**rule["apply"], "kernel": kernel}}]}
    compiled = torch.compile(Attention(), backend="dilated", options={"policy": asked, "inner": inner}, fullgraph=True)
    compiled(q, k, v)
    _check(lambda: compiled(q, k, v), [q, k, v], both)
