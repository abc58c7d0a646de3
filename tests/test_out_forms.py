"""The forms of the operators that write into given memory: the bits of the operators, wherever results and workspaces lie."""

import pytest
import torch

from dilcompile.forms import Dense, Dilated
from dilcompile.lowering import ops, out_forms
from dilcompile.lowering.workspaces import bytes_of

DILATED = str(Dilated(segments=(32, 96), rates=(1, 3), offset="own"))
FORWARD, BACKWARD = torch.ops.dilcompile.attention, torch.ops.dilcompile.attention_backward
CANARY = 4096


@pytest.fixture(autouse=True)
def threads():
    """Gradients of keys are added up in parts where threads are many."""
    out_forms.register()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def case(kernel, form=DILATED, dtype=torch.float32, with_bias=False):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 96, heads, 16, dtype=dtype).transpose(1, 2) for heads in (4, 2, 2))
    bias = torch.randn(1, 4, 1, 96, dtype=dtype) if with_bias else None
    operands = (q, k, v, None, None, bias, None, form, True, None, None, 0, 0.3, None, 0.0, kernel)
    out, lse = ops.attention(*operands)
    return operands, (torch.randn_like(out), None, out, lse, *operands)


def slices():
    """Memory for the gradients of q, k and v side by side, as a fused projection's has them, and what it is cut from."""
    whole = torch.full((2, 96, 8 * 16), torch.nan)
    parts = [whole[..., :64].view(2, 96, 4, 16), whole[..., 64:96].view(2, 96, 2, 16), whole[..., 96:].view(2, 96, 2, 16)]
    return [part.transpose(1, 2) for part in parts]


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("kernel", ["native", "cpu", "reference", None])
def test_results_are_those_of_the_operator_bit_for_bit(kernel, with_bias):
    operands, upstream = case(kernel, with_bias=with_bias)
    out, lse = upstream[2], upstream[3]
    into, lse_into = torch.full_like(out, torch.nan), torch.full_like(lse, torch.nan)
    made = FORWARD.out(*operands, out=into, lse=lse_into)
    assert made[0] is into
    assert torch.equal(into, out)
    assert torch.equal(lse_into, lse)
    expected = BACKWARD(*upstream)
    names = ("grad_q", "grad_k", "grad_v", "grad_bias")
    given = dict(zip(names, [*slices(), torch.full_like(expected[3], torch.nan)], strict=True))
    BACKWARD.out(*upstream, **given)
    for name, grad in zip(names, expected, strict=True):
        assert torch.equal(given[name], grad), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("share", [1, 0.5, 0.01])
def test_a_workspace_is_used_and_never_left(share, with_bias, dtype):
    """Whatever lies in it before, and however small it is."""
    operands, upstream = case("native", dtype=dtype, with_bias=with_bias)
    expected = [*FORWARD(*operands), *BACKWARD(*upstream)]
    found = []
    for op, given in ((FORWARD, operands), (BACKWARD, upstream)):
        size = int(int(bytes_of(op.default, given, {})) * share)
        memory = torch.full((size + CANARY,), 0xFF, dtype=torch.uint8)
        found += op.within(*given, workspace=memory[:size])
        assert (memory[size:] == 0xFF).all()
        if share == 1:
            assert (memory[:size] != 0xFF).any()
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_takes_no_workspace_is_given_none():
    for kernel, form in (("reference", DILATED), ("sdpa", str(Dense()))):
        given = (
            *(x.expand(2, 4, 96, 16) for x in torch.randn(3, 2, 4, 96, 16)),
            *case("cpu")[0][3:7],
            form,
            *case("cpu")[0][8:15],
        )
        assert bytes_of(FORWARD.default, (*given, kernel), {}) == 0
    operands, upstream = case(None)
    assert bytes_of(BACKWARD.default, upstream, {}) > bytes_of(FORWARD.default, operands, {}) > 0
    assert bytes_of(torch.ops.aten.add.Tensor, (1, 2), {}) == 0


@pytest.mark.parametrize(("share", "sums"), [(1.0, 2 * 2 * 3), (0.0, 2)])
def test_a_workspace_grows_with_the_sums_that_are_held(share, sums):
    """4 key heads over 3 threads: 3 parts of each, with a row of 32 float32 for each key; at least one and that of those before."""
    torch.set_num_threads(3)

    def size(rows):
        q, k = (torch.empty(2, heads, rows, 16, dtype=torch.bfloat16) for heads in (4, 2))
        operands = (q, k, k, None, None, None, None, DILATED, True, None, None, 0, 0.25, None, 0.0, "native")
        return int(bytes_of(BACKWARD.default, (q, None, q, q[..., 0].float(), *operands), {}, share))

    assert size(192) - size(96) == sums * 96 * 32 * 4
