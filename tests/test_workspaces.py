"""Workspaces inside operators: what kernels say that they take is what they then don't allocate, at every length."""

import pickle

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from dilcompile.forms import Dilated
from dilcompile.lowering import ops, out_forms, workspaces
from dilcompile.lowering.space import Space
from dilcompile.lowering.space import bytes_of as space_bytes
from dilcompile.memory.measure import measured

FORWARD, BACKWARD = torch.ops.dilcompile.attention, torch.ops.dilcompile.attention_backward
CANARY = 4096


@pytest.fixture(autouse=True)
def threads():
    """Chunks are as large as threads are many."""
    out_forms.register()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case(length=256, dtype=torch.bfloat16, grad_lse=False, merge_grad="exact", kernel="cpu"):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, heads, 16, dtype=dtype).transpose(1, 2) for heads in (8, 4, 4))
    form = str(Dilated(segments=(length // 4, length), rates=(1, 4), offset="own", merge_grad=merge_grad))
    operands = (q, k, v, None, None, None, None, form, True, None, None, 0, 0.3, None, 0.0, kernel)
    out, lse = ops.attention(*operands)
    upstream = (torch.randn_like(out), torch.randn_like(lse) if grad_lse else None, out, lse, *operands)
    return (FORWARD, operands), (BACKWARD, upstream)


def test_a_space_hands_out_what_it_has_and_no_more():
    memory = torch.full((space_bytes(((3, 5), torch.float64), ((7,), torch.int32)) + 1,), 0xFF, dtype=torch.uint8)[1:]
    space = Space(memory)
    first = space.take((3, 5), torch.float64, memory.device).fill_(1)
    with space.again():
        again = space.take((7,), torch.int32, memory.device).fill_(2)
    other = space.take((7,), torch.int32, memory.device)
    assert other.data_ptr() == again.data_ptr()
    assert (first == 1).all()
    start = memory.untyped_storage().data_ptr()
    assert all((x.data_ptr() - start) % 64 == 0 and 0 <= x.data_ptr() - start < memory.numel() for x in (first, other))
    elsewhere = space.take((1000,), torch.float32, memory.device)
    assert not 0 <= elsewhere.data_ptr() - start <= memory.numel()


@pytest.mark.parametrize("merge_grad", ["exact", "detach"])
@pytest.mark.parametrize("grad_lse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_view_path_takes_its_accumulators_from_the_workspace(dtype, grad_lse, merge_grad):
    """The bits of a call without one; the peak is lower by all of it but what stands where something larger stood anyway."""
    for op, given in case(dtype=dtype, grad_lse=grad_lse, merge_grad=merge_grad):
        expected, plain = measured(lambda op=op, given=given: op(*given))
        size = int(workspaces.bytes_of(op.default, given, {}))
        memory = torch.full((size + CANARY,), 0xFF, dtype=torch.uint8)
        found, inside = measured(lambda op=op, given=given, memory=memory, size=size: op.within(*given, workspace=memory[:size]))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        assert (memory[size:] == 0xFF).all()
        if size:
            assert (memory[:size] != 0xFF).any()
            assert inside.peak < plain.peak or len(inside.allocations) < len(plain.allocations)
        if op is BACKWARD and grad_lse:
            assert inside.peak < 0.6 * plain.peak


def test_a_share_of_the_workspace_makes_the_forward_s_chunks_smaller():
    (op, given), _ = case(length=512)
    expected, whole = op(*given), int(workspaces.bytes_of(op.default, given, {}))
    sizes = [int(workspaces.bytes_of(op.default, given, {}, share)) for share in (0.5, 0.25, 0)]
    assert whole > sizes[0] > sizes[1] >= sizes[2] > 0
    peaks = []
    for size in (whole, *sizes):
        memory = torch.empty(size, dtype=torch.uint8)
        found, inside = measured(lambda memory=memory: op.within(*given, workspace=memory))
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        peaks.append(inside.peak)
    # A smaller workspace is not made up for by more from the allocator.
    assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("kernel", ["cpu", None])
def test_a_length_that_is_a_symbol_becomes_the_answer_at_that_length(kernel):
    """In a graph over any length, which is pickled and read again."""
    (_, operands), _ = case(length=64, kernel=kernel)
    form = str(Dilated(segments=(16, 64), rates=(1, 4), offset="own"))
    rest = (*operands[3:7], form, *operands[8:])
    gm = make_fx(lambda q, k, v: FORWARD.default(q, k, v, *rest)[0], tracing_mode="symbolic")(*operands[:3])
    (node,) = (node for node in gm.graph.nodes if node.target is FORWARD.default)
    said = workspaces.bytes_of(node.target, [getattr(x, "meta", {}).get("val", x) for x in node.args], {})
    assert said.free_symbols
    again = pickle.loads(pickle.dumps(said))
    for length in (32, 96, 1024):
        given = [x.new_empty(x.shape[0], x.shape[1], length, 16) for x in operands[:3]]
        values = {size.node.expr: at for x, y in zip(_values(gm), given, strict=True) for size, at in _sizes(x, y)}
        assert again.subs(values) == workspaces.bytes_of(FORWARD.default, (*given, *rest), {}) > 0


def _values(gm):
    return [node.meta["val"] for node in gm.graph.nodes if node.op == "placeholder"]


def _sizes(x, y):
    return [(size, at) for size, at in zip(x.shape, y.shape, strict=True) if isinstance(size, torch.SymInt)]
