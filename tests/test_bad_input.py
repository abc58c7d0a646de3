"""What the finder can't or must not look into runs as it is, with a note, and never fails for it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from finding import Call
from models import NoAttention
from spellings import EXACT, Found, compiled
from torch import Tensor, nn
from torch._C import DispatchKey
from torch._higher_order_ops.base_hop import BaseHOP
from torch._higher_order_ops.hints_wrap import hints_wrapper
from torch._ops import HigherOrderOperator
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import dilcompile
from dilcompile import RewriteError
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.policy import Policy


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def attend(x: Tensor) -> Tensor:
    q = x[:, None]
    return (q @ q.mT / 4).softmax(-1) @ q


def sdpa(x: Tensor) -> Tensor:
    q = x[:, None]
    return F.scaled_dot_product_attention(q, q, q)


def numbers() -> Tensor:
    return torch.randn(2, 8, 16, dtype=torch.float64)


def same(call: Callable[..., Tensor], *args: Any) -> Found:
    """Compiled and plain agree; what was found."""
    run, found = compiled(call)
    with torch.no_grad():
        torch.testing.assert_close(run(*args), call(*args), rtol=0, atol=1e-12)
    return found


def notes(found: Found) -> list[str]:
    return [note for outcome in found.outcomes for note in outcome.report.notes]


def test_no_attention_leaves_the_graph_alone() -> None:
    found = same(NoAttention(), torch.randn(2, 8, 32))
    assert (found.graphs, found.sites, found.misses, notes(found)) == ([], [], [], [])


class Chosen(nn.Module):
    """The number of tokens is known when it runs: ``nonzero`` in the graph."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        return attend(x[:, keep.nonzero()[:, 0]])


class Cut(nn.Module):
    """A length that a tensor holds."""

    def forward(self, x: Tensor, length: Tensor) -> Tensor:
        size = length.item()
        torch._check(size >= 2)
        torch._check(size <= x.shape[1])
        return attend(x[:, :size])


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("model", "given"), [(Chosen(), torch.tensor([1, 1, 0, 1, 1, 0, 1, 1])), (Cut(), torch.tensor(5))])
def test_shapes_that_depend_on_data(model: nn.Module, given: Tensor, captured: bool) -> None:
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=captured, capture_scalar_outputs=captured):
        found = same(model, numbers(), given)
    assert len(found.sites) + len(found.misses) == 1


def _renormalised(s: Tensor) -> Tensor:
    p = s.softmax(-1) * torch.ones(s.shape[-2:], dtype=s.dtype).tril()
    return p / p.sum(-1, keepdim=True)


def _for_more_heads(s: Tensor) -> Tensor:
    """As many heads as there are tokens: whether that is more than one, only the run knows."""
    return s.softmax(-1).masked_fill(torch.zeros(s.shape[-1], 1, 1, dtype=torch.bool), 0.0)


@pytest.mark.parametrize(
    ("weights", "sites"),
    [
        (lambda s: s.softmax(-1), 1),
        (lambda s: s.softmax(-1).masked_fill((s == -torch.inf).all(-1, keepdim=True), 0.0), 1),
        (_renormalised, 1),
        (_for_more_heads, 0),
    ],
)
def test_spellings_are_compared_without_guards(weights: Callable[[Tensor], Tensor], sites: int) -> None:
    """Lengths that only the run knows can't be asked for; a length that is a symbol must not become a number."""

    def call(x: Tensor, keep: Tensor) -> Tensor:
        q = x[:, keep.nonzero()[:, 0]][:, None]
        return weights(q @ q.mT / 4) @ q

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        found = same(call, numbers(), torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]))
    assert not [miss.reason for miss in found.misses if "the finder failed" in miss.reason]
    assert (len(found.sites), len(found.misses)) == (sites, 1 - sites)
    torch._dynamo.reset()
    run, found = compiled(lambda x: weights(x[:, None] @ x[:, None].mT) @ x[:, None], dynamic=True)
    for length in (7, 9, 12):
        run(torch.randn(2, length, 16, dtype=torch.float64))
    assert len(found.outcomes) == 1


def _scaled(q: Tensor, t: Tensor) -> Tensor:
    return (q @ q.mT * (2 * t).sum().item()).softmax(-1) @ q


def _scaled_within(q: Tensor, t: Tensor) -> Tensor:
    """By a product's own factor."""
    return torch.baddbmm(q.new_zeros(1, 1, 1), q, q.mT, beta=0, alpha=(2 * t).sum().item()).softmax(-1) @ q


def _scaled_output(q: Tensor, t: Tensor) -> Tensor:
    return torch.baddbmm(q.new_zeros(1, 1, 1), (q @ q.mT).softmax(-1), q, beta=0, alpha=(2 * t).sum().item())


@pytest.mark.parametrize("call", [_scaled, _scaled_within, _scaled_output], ids=lambda call: call.__name__)
def test_a_scale_that_only_the_run_knows(call: Callable[..., Tensor]) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = same(call, numbers(), torch.tensor(0.7, dtype=torch.float64))
    (miss,) = found.misses
    assert "scaled by a number that is computed in the graph" in miss.reason


def branch(x: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, attend, lambda x: x[:, None] * 2, (x,))


def in_and_after_a_branch(x: Tensor) -> Tensor:
    return attend(branch(x)[:, 0])


def repeated(x: Tensor) -> Tensor:
    from torch._higher_order_ops.while_loop import while_loop

    def step(count: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return count + 1, attend(x)[:, 0]

    return while_loop(lambda count, x: count < 3, step, (torch.tensor(0), x))[1]


@torch.compiler.nested_compile_region
def region(x: Tensor) -> Tensor:
    return attend(x)


def through_a_region(x: Tensor) -> Tensor:
    return region(region(x)[:, 0])


@pytest.mark.parametrize(
    ("call", "operator", "sites"),
    [
        (branch, "cond", 0),
        (in_and_after_a_branch, "cond", 1),
        (repeated, "while_loop", 0),
        (through_a_region, "invoke_subgraph", 0),
    ],
)
def test_graphs_inside_operators_are_left_and_told_of(call: Callable[..., Tensor], operator: str, sites: int) -> None:
    found = same(call, numbers())
    assert (len(found.sites), found.rewritten) == (sites, sites)
    told = [note for note in notes(found) if note.startswith(operator)]
    assert told
    assert all("runs as it is: 1 softmax or attention call in its own graph are not looked at" in note for note in told)


def test_operators_without_attention_inside_are_not_told_of() -> None:
    def doubled(x: Tensor) -> Tensor:
        return attend(torch.cond(x.sum() > 0, lambda x: x * 2, lambda x: x * 3, (x,)))

    found = same(doubled, numbers())
    assert (found.rewritten, notes(found)) == (1, [])


def test_an_operator_of_the_users_own() -> None:
    @torch.library.custom_op("bad_input::doubled", mutates_args=())
    def doubled(x: Tensor) -> Tensor:
        return x * 2

    doubled.register_fake(torch.empty_like)
    assert same(lambda x: attend(doubled(x)), numbers()).rewritten == 1


@pytest.fixture
def alone() -> Iterator[Any]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("call", [attend, sdpa])
def test_dtensors_pass_through(call: Callable[..., Tensor], alone: Any) -> None:
    x = distribute_tensor(numbers(), alone, [Replicate()])
    run, found = compiled(call)
    with torch.no_grad():
        out = run(x)
        assert isinstance(out, DTensor)
        torch.testing.assert_close(out.full_tensor(), call(x).full_tensor())
    assert (found.sites, found.misses, found.graphs) == ([], [], [])
    (note,) = notes(found)
    assert note.startswith("left as it is: it computes with tensor subclasses (")
    assert note.endswith(" is a DTensor)")


@pytest.mark.parametrize("call", [attend, sdpa])
def test_other_subclasses_pass_through(call: Callable[..., Tensor]) -> None:
    x = TwoTensor(numbers(), numbers())
    run, found = compiled(call)
    out, wanted = run(x), call(x)
    torch.testing.assert_close(out.a, wanted.a)
    torch.testing.assert_close(out.b, wanted.b)
    assert found.graphs == []
    assert "is a TwoTensor" in notes(found)[0]


def test_jagged_tensors_pass_through() -> None:
    x = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(7, 16)], layout=torch.jagged)

    def heads(x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q, q)

    run, found = compiled(heads)
    torch.testing.assert_close(run(x).values(), heads(x).values())
    assert found.graphs == []
    assert "is a NestedTensor" in notes(found)[0]


def test_strided_nested_tensors_pass_through() -> None:
    def call(x: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(x, x.transpose(1, 2)).softmax(-1), x)

    x = torch.nested.nested_tensor([torch.randn(5, 16), torch.randn(7, 16)])
    run, found = compiled(call)
    with torch.no_grad():
        torch.testing.assert_close(run(x).to_padded_tensor(0.0), call(x).to_padded_tensor(0.0))
    assert found.outcomes == []
    text = " ".join(str(dilcompile.explain(call, x, policy="exact")).split())
    assert "no attention was found" in text
    assert "Dynamo captured nothing of this call" in text or "torch.compile broke the graph" in text


class Mine(BaseHOP):
    """A higher-order operator of the user's own, as torch has people write one."""

    def __init__(self) -> None:
        super().__init__("bad_input_mine")

    def __call__(self, body: Any, *operands: Any, **how: Any) -> Any:
        return super().__call__(body, *operands, **how)


class Bare(HigherOrderOperator):
    """One that Dynamo does not know: it breaks the graph there."""

    def __init__(self) -> None:
        super().__init__("bad_input_bare")

    def __call__(self, body: Any, *operands: Any) -> Any:
        return super().__call__(body, *operands)


MINE, BARE = Mine(), Bare()
for _key in (DispatchKey.CompositeExplicitAutograd, DispatchKey.Autograd):
    BARE.py_impl(_key)(lambda body, *operands: body(*operands))


def hinted(x: Tensor) -> Tensor:
    return hints_wrapper(attend, (x,), {}, hints={"any": True})


@pytest.mark.parametrize(("call", "operator"), [(hinted, "hints_wrapper"), (lambda x: MINE(attend, x), "bad_input_mine")])
def test_higher_order_operators_that_are_not_known(call: Callable[..., Tensor], operator: str) -> None:
    def also_outside(x: Tensor) -> Tensor:
        return attend(call(x)[:, 0])

    (run, found), x = compiled(also_outside), numbers()
    with torch.no_grad():
        torch.testing.assert_close(run(x), attend(attend(x)[:, 0]), rtol=0, atol=1e-12)
    told = [note for note in notes(found) if note.startswith((operator, "left as it is"))]
    assert told, notes(found)
    assert "softmax or attention call" in told[0]
    assert found.rewritten == 1


def test_a_higher_order_operator_that_breaks_the_graph() -> None:
    found = same(lambda x: attend(BARE(attend, x)[:, 0]), numbers())
    assert (len(found.sites), found.rewritten) == (2, 2), "the parts before and after it"


def exported(call: Callable[..., Tensor], *args: Any, where: Any, strict: bool) -> dict[str, Any]:
    """The program computes the same; what its report says of the graph."""
    model = call if isinstance(call, nn.Module) else Call(call)
    with torch.no_grad():
        program = torch.export.export(model, args, strict=strict)
        after = dilcompile.rewrite_exported(program, "exact", report=where / "report.json").module()(*args)
        wanted = model(*args)
    if isinstance(wanted, DTensor):
        after, wanted = after.full_tensor(), wanted.full_tensor()
    torch.testing.assert_close(after, wanted, rtol=0, atol=1e-12)
    (graph,) = json.loads((where / "report.json").read_text())["graphs"]
    described: dict[str, Any] = graph
    return described


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("call", "given", "operator", "sites"),
    [
        (branch, (), "cond", 0),
        (in_and_after_a_branch, (), "cond", 1),
        (repeated, (), "while_loop", 0),
        (Chosen(), (torch.tensor([1, 1, 0, 1, 1, 0, 1, 1]),), None, 1),
        (Cut(), (torch.tensor(5),), None, 1),
    ],
)
def test_exported_programs(call: Any, given: Any, operator: str | None, sites: int, strict: bool, tmp_path: Any) -> None:
    graph = exported(call, numbers(), *given, where=tmp_path, strict=strict)
    assert [site["verdict"] for site in graph["sites"]] == ["rewritten"] * sites
    assert [note.split()[0] for note in graph["notes"]] == ([] if operator is None else [operator])
    assert not any("eval_with_key" in said for said in (*graph["notes"], *(site["source"] for site in graph["sites"])))


@pytest.mark.parametrize("strict", [False, True])
def test_exported_dtensors(strict: bool, alone: Any, tmp_path: Any) -> None:
    x = distribute_tensor(numbers(), alone, [Shard(0)])
    graph = exported(attend, x, where=tmp_path, strict=strict)
    assert (graph["sites"], graph["misses"]) == ([], [])
    (note,) = graph["notes"]
    assert note.startswith("left as it is: it computes with tensor subclasses (")
    assert "is a DTensor" in note


@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 8, 16), (2, 1, 16)])
def test_nothing_to_attend_to(shape: tuple[int, ...]) -> None:
    same(attend, torch.randn(shape))
    same(sdpa, torch.randn(shape))


def test_the_policy_may_make_it_an_error() -> None:
    strict = Policy.load(
        {"version": 1, "defaults": {"fallback": {"unsupported": "error"}}, "rules": [{"apply": {"form": "dense"}}]}
    )

    def run(call: Callable[..., Tensor], policy: Policy) -> None:
        torch._dynamo.reset()

        def backend(gm: Any, example_inputs: Any) -> Any:
            rewrite_dynamo(gm, example_inputs, policy, "0")
            return gm.forward

        torch.compile(call, backend=backend)(TwoTensor(numbers(), numbers()))

    run(attend, EXACT)
    run(lambda x: x * 2, strict)  # there is nothing in it that a rule could have been meant for
    with pytest.raises(Exception, match=r"graph 0: left as it is: it computes with tensor subclasses") as caught:
        run(attend, strict)
    assert isinstance(getattr(caught.value, "inner_exception", caught.value), RewriteError)
