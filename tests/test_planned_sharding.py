"""Sharded attention in planned graphs: the bits of unplanned ones over real ranks, and nothing touched while it travels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from models import SdpaAttention, Stack
from ranks import over_ranks
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.distributed.fake_pg import FakeStore

import dilcompile.planned
from dilcompile.lowering import native, workspaces
from dilcompile.lowering.call import Call
from dilcompile.lowering.distributed import meshes, ops, out_forms
from dilcompile.lowering.distributed import step as attention_step
from dilcompile.lowering.distributed.exchange import wait
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.memory.measure import measured
from dilcompile.memory.pool import ArenaPool
from dilcompile.passes.memory import lifetimes
from dilcompile.passes.memory.plan_buffers import PlannedGraph, plan_graph
from dilcompile.planned import PlannedCall

LENGTH, DIM = 32, 32
MEMORY = {"pool": "private", "reuse": "across_layers"}


def compiled(model: nn.Module, ranks: int, method: str, order: str, memory: dict[str, str] | None) -> Any:
    torch._dynamo.reset()
    rule = {"apply": {"form": "keep"}, "shard": {"mesh": "cp", "method": method}, **({"memory": memory} if memory else {})}
    policy = {"mesh": {"cp": {"size": ranks, "layout": order}}, "rules": [rule]}
    return torch.compile(model, backend="dilated", options={"policy": policy, "inner": "aot_eager"}, fullgraph=True)


def made() -> nn.Module:
    torch.manual_seed(0)
    return Stack(SdpaAttention, dim=DIM).double()


def step(run: Any, model: nn.Module, x: Tensor) -> list[Tensor]:
    """What comes out, and all gradients."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    return [out.detach(), x.grad.clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]  # type: ignore[union-attr]


class Seen:
    """Every planned graph that is made while it is open."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.calls: list[PlannedCall] = []
        begin = PlannedCall.__init__

        def spied(call: PlannedCall, *args: Any) -> None:
            begin(call, *args)
            self.calls.append(call)

        patch.setattr(PlannedCall, "__init__", spied)


def parity(rank: int, cases: list[tuple[str, str]]) -> dict[str, Any]:
    """Of each case the names of what differs from the unplanned graph in a bit, and what was planned."""
    found: dict[str, Any] = {}
    for method, order in cases:
        # In bfloat16 a step's output is converted, and planned, while its LSE is saved.
        dtype = torch.bfloat16 if method == "gather_needed" else torch.float64
        model, inputs = made().to(dtype), torch.randn(2, 2, LENGTH // 2, DIM, dtype=dtype)
        plain = compiled(model, 2, method, order, None)
        wanted = [step(plain, model, x) for x in inputs]
        with pytest.MonkeyPatch.context() as patch:
            seen = Seen(patch)
            run = compiled(model, 2, method, order, MEMORY)
            # The second call has the arenas of the first; in the third dead memory is filled with NaN.
            for number, x in enumerate((*inputs, inputs[0])):
                for call in seen.calls:
                    call._by_step = number == 2
                pairs = zip(wanted[number % 2], step(run, model, x), strict=True)
                assert not any(
                    b.name.startswith(("attend_step", "copy", "new_empty")) for c in seen.calls for b in c.planned.elsewhere
                )
                found[f"{method}, call {number}"] = [i for i, (one, other) in enumerate(pairs) if not torch.equal(one, other)]
            found[f"{method}, planned"] = [roles(call.planned) for call in seen.calls]
    return found


def roles(planned: PlannedGraph) -> dict[str, int]:
    """How many buffers of each role the communication lane has."""
    said = [buffer.role for arena in planned.plan.arenas if arena.lane == "communication" for buffer in arena.buffers]
    return {role: said.count(role) for role in sorted(set(said))}


def test_the_numbers_over_two_ranks_are_those_of_unplanned_graphs() -> None:
    cases = [("ring", "zigzag"), ("gather_needed", "contiguous"), ("ulysses", "contiguous")]
    for found in over_ranks({"cp": 2}, parity, cases, patience=400.0):
        # Two layers; with 2 ranks a ring has one exchange.
        assert found.pop("ring, planned") == [{"receive": 2, "send": 2}, {"gradient": 2, "receive": 2, "send": 2}]
        # Received rows are saved for the backward, so that they lie in no arena.
        assert found.pop("gather_needed, planned") == [{"send": 2}, {"gradient": 2}]
        assert found.pop("ulysses, planned") == [{"receive": 8, "send": 8}, {"receive": 8, "send": 8}]
        assert len(found) == 9
        assert not any(found.values()), found


# What an operator may ask an allocator for: scalars, and positions of a few rows.
FEW = 512


class Inside:
    """What the steps of sharded attention allocate besides results that have no place, and what their kernels are given."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.allocated: list[int] = []
        self.steps = self.kernels = self.short = 0
        for name in ("forward", "backward"):
            patch.setattr(attention_step, name, self._counted(getattr(attention_step, name)))
            patch.setattr(native, name, self._given(getattr(native, name), name == "backward"))

    def _counted(self, run: Any) -> Any:
        def counting(*operands: Any) -> Any:
            *_, room = operands
            found, seen = measured(lambda: run(*operands))
            made = [x.nbytes for x, place in zip(found, room.results, strict=True) if place is None and x is not None]
            for size in made:
                assert size in seen.allocations
            left = list(seen.allocations)
            for size in made:
                left.remove(size)
            self.steps += 1
            self.allocated += [size for size in left if size > FEW]
            return found

        return counting

    def _given(self, run: Any, backward: bool) -> Any:
        def given(call: Call, *upstream: Any) -> Any:
            workspace = None if call.room is None else call.room.workspace
            self.kernels += 1
            self.short += workspace is None or workspace.numel() < native.workspace_bytes(call, backward)
            return run(call, *upstream)

        return given


def inside_steps(rank: int, cases: list[tuple[str, str, str]]) -> dict[str, Any]:
    """Of each case, in a second call: how many steps and kernels there were, what was allocated, and how many kernels lacked room."""
    found: dict[str, Any] = {}
    for method, order, dtype in cases:
        model = made().to(getattr(torch, dtype))
        # Runs of as many rows as the kernel that computes most calls wants.
        inputs = torch.randn(2, 2, 2 * native.LEAST_ROWS, DIM, dtype=getattr(torch, dtype))
        run = compiled(model, 2, method, order, MEMORY)
        step(run, model, inputs[0])
        with pytest.MonkeyPatch.context() as patch:
            inside = Inside(patch)
            step(run, model, inputs[1])
        found[f"{method} of {dtype}"] = (inside.steps, inside.kernels, inside.allocated, inside.short)
    return found


def test_a_planned_step_allocates_nothing_inside_its_operator() -> None:
    """Neither a kernel's results for a part of the keys, nor what they are merged and added with, nor rows that are put together."""
    cases = [("ring", "zigzag", "float32"), ("ring", "contiguous", "bfloat16"), ("gather_needed", "contiguous", "bfloat16")]
    for found in over_ranks({"cp": 2}, inside_steps, cases, patience=400.0):
        kernels = {case: count for case, (_, count, *_) in found.items()}
        # Under a causal mask the first of contiguous shards attends to its own keys alone.
        assert all(count >= 4 for count in kernels.values()), found
        # Two steps of two layers, forward and backward.
        assert found == {case: (8, count, [], 0) for case, count in kernels.items()}
        assert len(found) == 3


@pytest.fixture
def four_ranks() -> Iterator[None]:
    """One of four ranks whose messages go nowhere: for plans, not for numbers."""
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    try:
        meshes.set_mesh(init_device_mesh("cpu", (4,), mesh_dim_names=("cp",)))
        yield
    finally:
        meshes.forget()
        dist.destroy_process_group()


def touched(planned: PlannedGraph) -> list[str]:
    """Writes to memory that travels, or that came and is still to be read, found by a walk over the planned graph alone."""
    places, inputs = planned.plan.places, {}
    held = (*planned.plan.arenas, *planned.plan.donated)
    sizes = {buffer.name: buffer.hint for arena in held for buffer in arena.buffers}
    layouts = iter(planned.layouts)
    nodes = list(planned.gm.graph.nodes)
    order = {node: number for number, node in enumerate(nodes)}
    for node in nodes:
        if node.op == "placeholder" and node.name.startswith("buffer_"):
            name = next(layouts).buffer
            inputs[node] = (places[name][0], places[name][1], places[name][1] + sizes[name])
    held: list[tuple[str, int, int, tuple[int, int, int]]] = []
    for node in nodes:
        if "dilcompile" in str(node.target) and "_c10d_functional" in str(node.target):
            arrival = next(user for user in node.users if "wait_tensor" in str(user.target))
            message = node.kwargs.get("workspace")
            if "return_gradients" in str(node.target):
                message = written(node.args[0], inputs)
            if message is not None:
                held.append((f"{node.name}: message", order[node], order[arrival], inputs.get(message, message)))
            if "received" in node.kwargs:
                held.append((f"{node.name}: result", order[node], last_reader(arrival, order), inputs[node.kwargs["received"]]))
    bad = []
    for node in nodes:
        for place in (x for x in node.kwargs.values() if x in inputs):
            for name, first, last, (arena, start, stop) in held:
                inside = inputs[place][0] == arena and inputs[place][1] < stop and start < inputs[place][2]
                if inside and first < order[node] <= last:
                    bad.append(f"{node.name} writes to {name}")
    return bad


def written(value: Node, inputs: dict[Node, Any]) -> Any:
    """The place that the operator behind a getitem wrote this value to."""
    maker, number = value.args
    names = ("grad_q", "grad_k", "grad_v", "grad_received")
    return inputs[maker.kwargs[names[number]]]


def last_reader(node: Node, order: dict[Node, int]) -> int:
    """Of a value and all views of it."""
    views = ("view", "permute", "select", "slice", "transpose", "alias", "detach", "expand", "unsqueeze", "getitem")
    return max(
        (last_reader(user, order) if any(v in str(user.target) for v in views) else order[user] for user in node.users),
        default=order[node],
    )


def at_once(planned: PlannedGraph, role: str) -> int:
    """The most buffers of a role that are live in one step in the communication lane."""
    found = [b for arena in planned.plan.arenas if arena.lane == "communication" for b in arena.buffers if b.role == role]
    return max((sum(b.begin <= at <= b.end for b in found) for at in range(planned.lifetimes.steps)), default=0)


def test_a_ring_has_two_receive_buffers_which_layers_share(four_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = Seen(monkeypatch)
    model = made()
    step(compiled(model, 4, "ring", "zigzag", MEMORY), model, torch.randn(2, LENGTH // 4, DIM, dtype=torch.float64))
    forward, backward = (call.planned for call in seen.calls)
    rows = 2 * (LENGTH // 4) * DIM * 2 * 8  # batch, places, keys and values
    for planned, others in ((forward, 0), (backward, 1)):
        (lane,) = (arena for arena in planned.plan.arenas if arena.lane == "communication")
        assert {b.module for b in lane.buffers} == {"layers.0", "layers.1"}
        assert at_once(planned, "receive") == 2
        assert at_once(planned, "send") == 1
        assert at_once(planned, "gradient") == others
        # Three exchanges in each layer; all lie in what one layer needs.
        assert sum(b.role == "receive" for b in lane.buffers) == 6
        assert lane.peak == (3 + others) * rows
        assert not touched(planned)
    # A wait knows by the storage for what it waits: each has its own, over the arena.
    call = seen.calls[1]
    lease = next(iter(call.pool._free.values()))[0][1]
    (views,) = (lease.views[key] for key in lease.views if key[0] == call._number)
    number = next(n for n, arena in enumerate(backward.plan.arenas) if arena.lane == "communication")
    arena = lease.arenas[number]
    places = [backward.plan.places[layout.buffer][0] for layout in backward.layouts]
    # What lies in saved tensors has no view of an arena.
    places = [place for place in places if place < len(backward.plan.arenas)]
    travelling = [view for view, place in zip(views, places, strict=True) if place == number]
    assert len({view.untyped_storage()._cdata for view in travelling}) == len(travelling) == 18
    assert all(0 <= view.data_ptr() - arena.data_ptr() < arena.numel() for view in travelling)


ACTIONS = st.lists(
    st.tuples(st.sampled_from(["gather", "exchange", "wait", "add", "join"]), st.integers(0, 7)), min_size=4, max_size=20
)


def program(actions: list[tuple[str, int]]) -> Any:
    """A function that starts, computes and waits as the actions say."""
    spec = str(Spec("a", "all_gather", "cp", heads=1, kv_heads=1))

    def run(x: Tensor) -> Tensor:
        there, travelling = [x + 1, x * 2], []
        for what, number in actions:
            chosen = there[number % len(there)]
            if what == "gather":
                travelling.append(ops.gather(chosen, "cp", spec, "x", False))
            elif what == "exchange":
                travelling.append(ops.exchange_equal(chosen, "cp", spec, "x", False))
            elif what == "wait" and travelling:
                came = wait(travelling.pop(number % len(travelling)))
                there.append(came if came.shape == x.shape else came[0])
            elif what == "add":
                there.append(chosen + there[-1])
            elif what == "join":
                there.append(torch.cat([chosen, there[-1]])[: x.shape[0]])
        for started in travelling:
            came = wait(started)
            there.append(came if came.shape == x.shape else came[0])
        return torch.stack([y.sum() for y in there[-4:]])

    return run


def planned_of(actions: list[tuple[str, int]]) -> PlannedGraph:
    gm = make_fx(program(actions), tracing_mode="fake")(torch.randn(2, 64))
    gm.graph.eliminate_dead_code()
    return plan_graph(gm, workspace=workspaces.bytes_of)


@pytest.fixture(scope="module")
def two_ranks() -> Iterator[None]:
    meshes._register(meshes.Axis("cp", 2, 0, None))
    dilcompile.lowering.out_forms.register()
    out_forms.register()
    yield
    meshes.forget()


@given(actions=ACTIONS)
@settings(max_examples=30, deadline=None)
def test_what_travels_is_left_alone(two_ranks: None, actions: list[tuple[str, int]]) -> None:
    planned = planned_of(actions)
    assert not touched(planned)
    for arena in planned.plan.arenas:
        for buffer in arena.buffers:
            name = buffer.name.removesuffix(".workspace")
            if arena.lane == "communication":
                assert buffer.end >= planned.lifetimes.arrivals[name]


def test_a_message_that_is_given_up_early_is_found_out(two_ranks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the waits' part in lifetimes the walk sees what goes wrong."""
    actions = [("gather", 0), ("exchange", 0), ("gather", 1), *[("wait", 0)] * 3, *[("add", 0)] * 4]
    assert not touched(planned_of(actions))

    def early(walk: Any, read: list[int]) -> None:
        for key in read:
            walk._under_way.pop(key)
            walk.arrivals[walk.storages[key].name] = walk.storages[key].begin

    monkeypatch.setattr(lifetimes._Walk, "_wait", early)
    found = touched(planned_of(actions))
    assert any("message" in each for each in found)
    assert any("result" in each for each in found)


def test_what_nobody_waits_for_is_not_planned(two_ranks: None) -> None:
    """It is under way when the graph is through."""
    spec = str(Spec("a", "all_gather", "cp", heads=1, kv_heads=1))

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        started = ops.gather(x + 1, "cp", spec, "x", False)
        return started, (x * 2 + 3).sum()

    planned = plan_graph(make_fx(run, tracing_mode="fake")(torch.randn(2, 64)), workspace=workspaces.bytes_of)
    assert "gather" not in str(planned.plan.places)
    assert "_c10d_functional.dilcompile_gather.default" in [str(node.target) for node in planned.gm.graph.nodes]


def test_arenas_of_a_call_that_fails_are_not_kept() -> None:
    """Something may be under way in them."""
    pool = ArenaPool()
    with pytest.raises(RuntimeError, match="gone"), pool.lease([(torch.device("cpu"), 100)]):
        raise RuntimeError("a rank is gone")
    assert not pool.held_bytes()
    with pool.lease([(torch.device("cpu"), 100)]):
        pass
    assert pool.held_bytes()
