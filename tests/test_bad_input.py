"""What the finder can't or must not look into runs as it is, with a note, and never fails for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import NoAttention
from spellings import EXACT, Found, compiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

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
