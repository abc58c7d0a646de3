"""Ranks give the numbers of one rank, forward and every gradient, and move exactly the bytes of their schedules."""

from __future__ import annotations

import hashlib
import os
import re
import time
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import over_ranks
from torch import Tensor, fx
from torch._functorch.aot_autograd import aot_module_simplified, make_boxed_func
from torch.fx.experimental.proxy_tensor import make_fx

from dilcompile import distributed, functional
from dilcompile.errors import PlacementError
from dilcompile.forms import make_form
from dilcompile.lowering import ops
from dilcompile.lowering.distributed import meshes, plan, step
from dilcompile.lowering.distributed.attention import sharded_attention
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.account import heads_traffic, traffic, tree_traffic
from dilcompile.placements.parts import by_part
from dilcompile.placements.shards import ORDERS, Shards
from dilcompile.relation import Problem

FORMS = {
    "dense": make_form("dense", {}),
    "window": make_form("sliding_window", {"window": 6}),
    "dilated": make_form("dilated", {"segments": (8, 16, 32), "rates": (1, 2, 4), "sinks": 1}),
    "blocks": make_form(
        "block_sparse", {"block": 16, "pattern": {"any": [{"local": {"before": 1, "behind": 0}}, {"global": {"columns": 1}}]}}
    ),
    "union": make_form(
        "union",
        {
            "of": [
                {"form": "sliding_window", "window": 3},
                {"form": "dilated", "segments": [16], "rates": [4], "offset": "own"},
            ]
        },
    ),
}
HEADS = {2: (4, 2), 3: (6, 2), 4: (4, 2)}
BATCH, LENGTH, HEAD_DIM, V_DIM = 2, 67, 5, 3


@dataclass(frozen=True)
class Case:
    """One attention; masks by name."""

    form: str
    causal: bool
    placement: str = "ring"
    order: str = "contiguous"
    masks: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)

    def whole(self) -> tuple[Any, ...]:
        """What the numbers depend on."""
        return self.form, self.causal, self.masks, tuple(sorted(self.options.items()))

    def __str__(self) -> str:
        return f"{self.form} {'causal' if self.causal else 'full'} {self.placement} {self.order} {self.masks} {self.options}"


@cache
def _operands(heads: int, kv_heads: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(heads)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=random)

    first = torch.arange(LENGTH) - torch.randint(2, 20, (BATCH, LENGTH), generator=random)
    return {
        "q": normal(BATCH, heads, LENGTH, HEAD_DIM),
        "k": normal(BATCH, kv_heads, LENGTH, HEAD_DIM),
        "v": normal(BATCH, kv_heads, LENGTH, V_DIM),
        "grad_out": normal(BATCH, heads, LENGTH, V_DIM),
        "grad_lse": normal(BATCH, heads, LENGTH),
        "padding": torch.rand(BATCH, LENGTH, generator=random) > 0.3,
        "documents": torch.tensor([0] * 21 + [1] * 3 + [2] * 43)[None],
        "limits": torch.stack([first.clamp(min=0), torch.full_like(first, LENGTH)]),
    }


def _alone(case: Case, heads: int, kv_heads: int) -> dict[str, Tensor]:
    """The whole sequence on one rank, by the reference."""
    given = _operands(heads, kv_heads)
    q, k, v = (given[name].clone().requires_grad_() for name in "qkv")
    padding, documents, limits = (given[name] if name in case.masks else None for name in ("padding", "documents", "limits"))
    dropout = case.options.get("dropout_p", 0.0)
    out, lse = ops.attention(
        q, k, v, padding, documents, None, torch.tensor([7]) if dropout else None, str(FORMS[case.form]), case.causal, None, None, 0,
        0.4, case.options.get("softcap"), dropout, "reference", row_limits=limits,
    )  # fmt: skip
    seen = torch.isfinite(lse)
    torch.autograd.backward([out, lse], [given["grad_out"], given["grad_lse"] * seen])
    return {"out": out.detach(), "lse": lse.detach(), "q": q.grad, "k": k.grad, "v": v.grad}


def _cut(x: Tensor, shards: Shards, rank: int, part: int, dim: int = 2) -> Tensor:
    """A rank's places; those without a token hold what must not be seen."""
    if x.dtype.is_floating_point:
        held = torch.full((*x.shape[:dim], shards.places, *x.shape[dim + 1 :]), 1e3, dtype=x.dtype)
    else:
        held = torch.ones((*x.shape[:dim], shards.places, *x.shape[dim + 1 :]), dtype=x.dtype)
    for run in shards.runs(rank):
        held.narrow(dim, run.place, len(run.positions)).copy_(x.index_select(dim, torch.tensor(run.positions.positions())))
    size = shards.places // shards.parts
    return held.narrow(dim, part * size, size).clone()


def _spec(case: Case, **changes: Any) -> Spec:
    spec = Spec(
        "cp", case.placement, str(FORMS[case.form]), case.order, LENGTH, is_causal=case.causal, scale=0.4, lse=True, site="model.attention",
        **({"kernel": "reference"} | case.options),
    )  # fmt: skip
    return replace(spec, **changes)


def _sharded(rank: int, spec: Spec, case: Case, heads: int, kv_heads: int) -> tuple[dict[str, Tensor], Any, Any]:
    """What this rank computes, its shards, and the bytes that it moved."""
    shards = plan.cut_of(spec, LENGTH, meshes.size_of(plan.keys_axis(spec)), meshes.size_of(plan.heads_axis(spec)))
    at = plan.here(spec)
    at = plan.Where(at.part) if spec.placement == "ulysses" else at
    given = _operands(heads, kv_heads)

    def own(name: str, dim: int = 2) -> Tensor:
        return _cut(given[name], shards, at.rank, at.part, dim)

    q, k, v = (own(name).requires_grad_() for name in "qkv")
    padding, documents, limits = (
        own(n, d) if n in case.masks else None for n, d in (("padding", 1), ("documents", 1), ("limits", 2))
    )
    # The first rank's seed counts.
    seed = torch.tensor([7 if rank == 0 else 8]) if spec.dropout_p else None
    with distributed.traffic() as moved:
        out, lse = sharded_attention(q, k, v, padding, documents, limits, seed, str(spec))
        assert lse is not None
        grad_lse = own("grad_lse").masked_fill(~torch.isfinite(lse), 0)
        torch.autograd.backward([out, lse], [own("grad_out"), grad_lse])
    found = {"out": out.detach(), "lse": lse.detach(), "q": q.grad, "k": k.grad, "v": v.grad}
    return found, (shards, at), moved


def _difference(found: dict[str, Tensor], expected: dict[str, Tensor], shards: Shards, at: plan.Where) -> float:
    """The largest, where tokens are; elsewhere there must be nothing."""
    largest = 0.0
    holds = _cut(torch.ones(1, LENGTH, dtype=torch.float64), shards, at.rank, at.part, 1)[0] == 1
    for name, x in found.items():
        right = _cut(expected[name], shards, at.rank, at.part)
        same = (x == right) | ((x - right).abs() <= 0)
        gap = torch.where(same, 0.0, (x - right).abs())[:, :, holds]
        largest = max(largest, float(gap.max()) if gap.numel() else 0.0)
        empty = x[:, :, ~holds]
        assert (empty == (-torch.inf if name == "lse" else 0)).all(), f"{name} where no token is"
    return largest


def _bytes(case: Case, shards: Shards, rank: int, heads: int, kv_heads: int) -> dict[str, tuple[int, int]]:
    """Sent and received by direction, from the schedule."""
    problem = Problem(BATCH, heads, kv_heads, LENGTH, LENGTH, HEAD_DIM, V_DIM, 0, case.causal)
    if case.placement == "ulysses":
        dealt = heads_traffic(problem, shards.places, shards.ranks, 8, lse=True)
        return {"forward": (dealt.forward,) * 2, "backward": (dealt.backward,) * 2}
    placement = PLACEMENTS[case.placement]
    schedule = placement.schedule(FORMS[case.form].relation(problem), shards, rank, "documents" in case.masks)
    row = BATCH * (HEAD_DIM + V_DIM) * 8
    sent, received = schedule.rows_sent * row, schedule.rows_received * row
    again = (sent, received) if placement.RESENDS else (0, 0)
    return {"forward": (sent, received), "backward": (again[0] + received, again[1] + sent)}


def _job(
    rank: int, cases: list[Case], expected: dict[Any, dict[str, Tensor]], heads: int, kv_heads: int
) -> tuple[list[str], set[int]]:
    """Problems found, and which cases are refused."""
    problems, refused = [], set()
    for number, case in enumerate(cases):
        spec = _spec(case)
        try:
            found, (shards, at), moved = _sharded(rank, spec, case, heads, kv_heads)
        except PlacementError:
            refused.add(number)
            continue
        gap = _difference(found, expected[case.whole()], shards, at)
        if not gap <= 1e-12:
            problems.append(f"wrong {case} on rank {rank}: {gap}")
        if not case.masks and case.options.keys() <= {"kernel"}:
            for direction, numbers in _bytes(case, shards, at.rank, heads, kv_heads).items():
                counted = moved.of(direction)
                if (counted.sent, counted.received) != numbers:
                    problems.append(f"bytes {case} on rank {rank} {direction}: {counted}, schedule {numbers}")
    return problems, refused


MASKED = [
    Case(form, causal, placement, order, masks)
    for form, causal in (("dense", True), ("window", False), ("dilated", True), ("union", True))
    for placement, order in (("ring", "zigzag"), ("all_gather", "contiguous"), ("ulysses", "zigzag"))
    for masks in (("padding",), ("documents",), ("limits", "padding"))
]
OPTIONS = [
    Case("dense", True, placement, order, (), options)
    for placement, order in (("ring", "striped"), ("gather_needed", "contiguous"), ("ulysses", "striped"))
    for options in ({"softcap": 2.0}, {"dropout_p": 0.25})
] + [Case("dilated", False, "gather_needed", "contiguous", (), {"dropout_p": 0.25})]
PLAIN = [
    Case(form, causal, placement, order)
    for form in FORMS
    for causal in (False, True)
    for placement in (*PLACEMENTS, "ulysses")
    for order in ORDERS
]


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_give_the_numbers_of_one_and_move_the_bytes_of_their_schedules(ranks: int) -> None:
    """All cases; on two ranks by the fastest kernel."""
    heads, kv_heads = HEADS[ranks]
    cases = [*PLAIN, *MASKED, *OPTIONS]
    if ranks == 2:
        cases = [replace(case, options={**case.options, "kernel": None}) for case in cases]
    expected = {case.whole(): _alone(case, heads, kv_heads) for case in {each.whole(): each for each in cases}.values()}
    found = over_ranks({"cp": ranks}, _job, cases, expected, heads, kv_heads)
    assert not [problem for problems, _ in found for problem in problems]
    # Nothing but the halo is refused, and that only where keys are not near.
    refused = found[0][1]
    assert {cases[number].placement for number in refused} <= {"halo"}
    kept = [case for number, case in enumerate(cases) if case.placement == "halo" and number not in refused]
    assert {case.form for case in kept} >= {"window"}
    assert {case.order for case in kept} <= {"contiguous"}


def _grid_job(rank: int, cases: list[tuple[Case, str]], expected: dict[Any, dict[str, Tensor]]) -> list[str]:
    """Sequence and heads over two axes."""
    problems = []
    for case, moving in cases:
        spec = _spec(case, axis="ring", heads_axis="heads", moving=moving)
        found, (shards, at), moved = _sharded(rank, spec, case, *HEADS[4])
        gap = _difference(found, expected[case.whole()], shards, at)
        if not gap <= 1e-12:
            problems.append(f"wrong {case} {moving} on rank {rank}: {gap}")
        if not case.masks:
            problem = Problem(BATCH, *HEADS[4], LENGTH, LENGTH, HEAD_DIM, V_DIM, 0, case.causal)
            dealt = heads_traffic(problem, shards.places // 2, 2, 8, lse=True)
            keys = traffic(PLACEMENTS[moving], by_part(FORMS[case.form].relation(problem), 2)[at.part], shards, 8)
            for direction, both in (
                ("forward", (dealt.forward + keys.sent[at.rank], dealt.forward + keys.received[at.rank])),
                ("backward", (dealt.backward + keys.sent_backward[at.rank], dealt.backward + keys.received_backward[at.rank])),
            ):
                counted = moved.of(direction)
                if (counted.sent, counted.received) != both:
                    problems.append(f"bytes {case} {moving} on rank {rank} {direction}: {counted}, predicted {both}")
    return problems


def test_usp_gives_the_numbers_of_one_rank() -> None:
    """Heads over one axis, and keys over the other by whatever moves them."""
    cases = [
        (Case(form, True, "usp", order, masks, options), moving)
        for form, order, moving, masks, options in (
            ("dense", "zigzag", "ring", (), {}),
            ("dense", "striped", "all_gather", ("documents", "padding"), {"dropout_p": 0.25}),
            ("window", "contiguous", "halo", ("limits",), {}),
            ("dilated", "contiguous", "gather_needed", (), {}),
        )
    ]
    expected = {case.whole(): _alone(case, *HEADS[4]) for case, _ in cases}
    found = over_ranks({"ring": 2, "heads": 2}, _grid_job, cases, expected)
    assert not [problem for each in found for problem in each]


@pytest.mark.parametrize("ranks", [8, 64])
@pytest.mark.parametrize("order", ["contiguous", "zigzag"])
def test_a_step_calls_the_kernel_once_a_branch_however_many_ranks_sent_rows(order: Any, ranks: int) -> None:
    """LongNet over a million tokens, by the schedules alone: a branch's keys go on from rank to rank as one stretch."""
    length, branches, kv_heads = 1 << 20, 10, 4
    form = make_form("dilated", {"segments": [2048 << n for n in range(branches)], "rates": [1 << n for n in range(branches)]})
    spec = Spec("cp", "gather_needed", str(form), order, length, is_causal=True, heads=8, kv_heads=kv_heads)
    made = plan.make_plan(str(spec), plan.Sizes(1, length // ranks, 64, 64, ranks))
    message = torch.empty(made.receives(1), dtype=torch.bfloat16, device="meta")
    (relation,) = made.relations
    predicted = PLACEMENTS["gather_needed"].volume(relation, made.shards).calls[1]
    most, most_received = 0, 0
    for rank in range(ranks):
        at = plan.Where(rank)
        calls = sum(1 for _ in step.meetings(made, at, 1, None, None, message))
        assert calls <= predicted[rank] <= (2 if order == "zigzag" else 1) * calls
        most = max(most, calls)
        received = (len(rows.positions) for transfer in made.step(at, 1).receives for rows in transfer.rows)
        most_received = max(most_received, sum(received))
    assert most <= branches * kv_heads * (2 if order == "zigzag" else 1)
    assert ranks < 64 or most_received > 4 * most


def _tree_job(rank: int, cases: list[Case], q_rows: int, q_offset: int, expected: list[dict[str, Tensor]]) -> list[str]:
    """Queries that all ranks have."""
    problems = []
    for case, right in zip(cases, expected, strict=True):
        given = _operands(*HEADS[3])
        shards, at = Shards(LENGTH, 3, case.order), plan.Where(rank)
        q = given["q"][:, :, q_offset : q_offset + q_rows].clone().requires_grad_()
        k, v = (_cut(given[name], shards, rank, 0).requires_grad_() for name in "kv")
        padding, documents = (_cut(given[n], shards, rank, 0, 1) if n in case.masks else None for n in ("padding", "documents"))
        seed = torch.tensor([7 + rank]) if "dropout_p" in case.options else None
        spec = _spec(case, q_offset=q_offset)
        with distributed.traffic() as moved:
            out, lse = sharded_attention(q, k, v, padding, documents, None, seed, str(spec))
            torch.autograd.backward([out, lse], [given["grad_out"][:, :, :q_rows], given["grad_lse"][:, :, :q_rows]])
        if not case.masks:
            problem = Problem(BATCH, *HEADS[3], q_rows, LENGTH, HEAD_DIM, V_DIM, q_offset, True)
            for direction, predicted in zip(("forward", "backward"), tree_traffic(problem, 3, 8), strict=True):
                counted = moved.of(direction)
                if (counted.sent, counted.received) != (predicted, predicted):
                    problems.append(f"bytes {case} on rank {rank} {direction}: {counted}, predicted {predicted}")
        gap = _difference({"k": k.grad, "v": v.grad}, right, shards, at)
        gap = max(gap, *(float((x - right[n]).abs().max()) for n, x in (("out", out), ("lse", lse), ("q", q.grad))))
        if not gap <= 1e-12:
            problems.append(f"wrong {case} on rank {rank}: {gap}")
    return problems


def test_tree_gives_the_numbers_of_one_rank() -> None:
    """Decoding: few queries, at the end or inside, that every rank has."""
    rows, offset = 3, LENGTH - 7
    cases = [
        Case("dense", True, "tree", "contiguous", ("padding",)),
        Case("dense", True, "tree", "striped", ("documents",), {"dropout_p": 0.25}),
        Case("window", True, "tree", "zigzag"),
        Case("dilated", True, "tree", "contiguous"),
    ]
    expected = []
    for case in cases:
        given = _operands(*HEADS[3])
        q, k, v = (given[name].clone().requires_grad_() for name in "qkv")
        padding, documents = (given[name] if name in case.masks else None for name in ("padding", "documents"))
        dropout = case.options.get("dropout_p", 0.0)
        out, lse = ops.attention(
            q[:, :, offset : offset + rows], k, v, padding, documents, None, torch.tensor([7]) if dropout else None,
            str(FORMS[case.form]), True, None, None, offset, 0.4, None, dropout, "reference",
        )  # fmt: skip
        torch.autograd.backward([out, lse], [given["grad_out"][:, :, :rows], given["grad_lse"][:, :, :rows]])
        grad_q = q.grad[:, :, offset : offset + rows]
        expected.append({"out": out.detach(), "lse": lse.detach(), "q": grad_q, "k": k.grad, "v": v.grad})
    found = over_ranks({"cp": 3}, _tree_job, cases, rows, offset, expected)
    assert not [problem for each in found for problem in each]


def _graph_job(rank: int, placements: list[str]) -> dict[str, Any]:
    """The graphs of forward and backward, and how far what they compute is from what eager computes."""
    found = {}
    for placement in placements:
        method, _, overlap = placement.partition(" ")
        spec = str(Spec("cp", method, "dense", is_causal=True, scale=0.4, site="model.attention", prefetch=overlap != "off"))
        torch.manual_seed(rank)
        eager = [torch.randn(1, 6, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
        traced = [x.detach().clone().requires_grad_() for x in eager]
        graph = fx.Graph()
        operands = [graph.placeholder(name) for name in "qkv"]
        both = graph.call_function(sharded_attention, (*operands, None, None, None, None, spec))
        graph.output((graph.call_function(torch.sin, (graph.call_function(lambda x: x[0], (both,)),)),))
        codes: list[str] = []

        def keep(module: fx.GraphModule, _: Any, codes: list[str] = codes) -> Any:
            codes.append(module.code)
            return make_boxed_func(module.forward)

        compiled = aot_module_simplified(fx.GraphModule(torch.nn.Module(), graph), traced, fw_compiler=keep, bw_compiler=keep)
        (out,) = compiled(*traced)
        right = sharded_attention(*eager, None, None, None, None, spec)[0].sin()
        for result in (out, right):
            result.square().sum().backward()
        gaps = [
            float((a - b).abs().max()) for a, b in ((out, right), *((x.grad, y.grad) for x, y in zip(eager, traced, strict=True)))
        ]
        found[placement] = (codes, max(gaps))
    spec = Spec("cp", "ring", "dense", is_causal=True, scale=0.4)
    q, k, v = (torch.randn(1, 6, 8, 4).bfloat16().requires_grad_() for _ in range(3))
    with distributed.traffic() as moved:
        sharded_attention(q, k, v, None, None, None, None, str(spec))[0].sum().backward()
    found["bytes"] = [(moved.of(direction).sent, moved.of(direction).received) for direction in ("forward", "backward")]
    return found


def _called(code: str) -> list[str]:
    """The operators of ours and of c10d, in order, by short names."""
    names = re.findall(r"torch\.ops\.(?:dilcompile|_c10d_functional)\.(\w+)\.default", code)
    return [name.removeprefix("dilcompile_") for name in names]


def test_every_rank_has_one_graph_and_computes_while_rows_travel() -> None:
    """Hashes of the graphs; an exchange is started before the step before computes, and waited for after that."""
    found = over_ranks({"cp": 3}, _graph_job, ["ring", "gather_needed", "ulysses", "ring off", "gather_needed off"])
    for (sent, received), behind in (each.pop("bytes") for each in found):
        # Operands have 2 bytes a number, the gradients that go back 4.
        assert behind == (sent + 2 * received, received + 2 * sent)
    assert not re.search("isend|irecv", str(found))
    for placement in found[0]:
        hashes = {hashlib.sha256("".join(rank[placement][0]).encode()).hexdigest() for rank in found}
        assert len(hashes) == 1, placement
        assert all(rank[placement][1] == 0 for rank in found), placement
    forward, backward = map(_called, found[0]["ring"][0])
    assert forward == ["exchange", "attend_step", "wait_tensor", "exchange", "attend_step", "wait_tensor", "attend_step"]
    behind = "attend_step_backward"
    assert backward == [
        *("exchange", "wait_tensor", "exchange", behind, "return_gradients", "wait_tensor", behind, "wait_tensor"),
        *("add_returned", "return_gradients", behind, "wait_tensor", "add_returned"),
    ]
    forward, backward = map(_called, found[0]["gather_needed"][0])
    assert forward == ["exchange", "attend_step", "wait_tensor", "attend_step"]
    assert backward == [behind, "return_gradients", behind, "wait_tensor", "add_returned"]
    # Without overlap nothing is under way while a step computes.
    for placement in ("ring off", "gather_needed off"):
        for code in found[0][placement][0]:
            under_way = 0
            for name in _called(code):
                under_way += {"exchange": 1, "return_gradients": 1, "wait_tensor": -1}.get(name, 0)
                assert not (name.startswith("attend_step") and under_way), placement
            assert under_way == 0
    forward, backward = map(_called, found[0]["ring off"][0])
    assert forward == ["attend_step", "exchange", "wait_tensor", "attend_step", "exchange", "wait_tensor", "attend_step"]
    assert backward.count("exchange") == backward.count("return_gradients") == 2
    assert _called(found[0]["ulysses"][0][0]) == [
        *["exchange_equal"] * 3,
        *["wait_tensor"] * 3,
        "attend_step",
        "exchange_equal",
        "wait_tensor",
    ]


def _faulty_job(rank: int, fault: str) -> str | None:
    """What the other ranks are told when rank 1 leaves or stays away before a step."""
    q, k, v = (torch.randn(1, 2, 4, 4) for _ in range(3))
    spec = str(Spec("cp", "ring", "dense", scale=0.5, site="model.layers.3.attention"))
    sharded_attention(q, k, v, None, None, None, None, spec)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = None
    if fault == "dies behind the forward":
        compiled = torch.compile(lambda *x: sharded_attention(*x, None, None, None, None, spec)[0], backend="aot_eager")
        out = compiled(*leaves)
    if rank == 1:
        if fault != "hangs":
            os._exit(3)
        time.sleep(8)
        return None
    start = time.monotonic()
    try:
        if out is None:
            sharded_attention(*leaves, None, None, None, None, spec)
        else:
            out.sum().backward()
    except PlacementError as error:
        return f"{time.monotonic() - start:.0f} s: {error}"
    return "no error"


@pytest.mark.parametrize("fault", ["dies", "hangs", "dies behind the forward"])
def test_a_rank_that_is_gone_is_named_by_the_others(fault: str) -> None:
    """Within the timeout of the group, with the site, the step, the axis and who was waited for."""
    first, gone, last = over_ranks({"cp": 3}, _faulty_job, fault, timeout=5.0)
    assert gone is None
    for rank, told in ((0, first), (2, last)):
        seconds, message = told.split(" s: ", 1)
        assert int(seconds) <= 6
        direction = "backward" if "behind" in fault else "forward"
        assert message.startswith(
            f"model.layers.3.attention: step 1, keys and values ({direction}) over mesh axis 'cp' failed on rank"
        )
        assert f"rank {rank} while it waited for ranks {', '.join(str(r) for r in range(3) if r != rank)}" in message
        assert "timeout of the group: 5 s" in message


@st.composite
def _simulated(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes, a form and a placement."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    parts = draw(st.sampled_from([n for n in range(1, heads + 1) if heads % n == 0]))
    length = draw(st.integers(1, 40))
    method = draw(st.sampled_from([*PLACEMENTS, "ulysses", "usp"]))
    first, rate = draw(st.integers(1, 8)), draw(st.integers(2, 4))
    branches = draw(st.integers(1, 3))
    form = draw(
        st.sampled_from(
            [
                {"form": "dense"},
                {"form": "sliding_window", "window": draw(st.integers(1, 20)), "sinks": draw(st.integers(0, 3))},
                {
                    "form": "dilated",
                    "segments": [first * rate**n for n in range(branches)],
                    "rates": [rate**n for n in range(branches)],
                    "offset": draw(st.sampled_from(["head_mod", "own"])),
                    "coverage": "zero",
                },
            ]
        )
    )
    return {
        "heads": heads,
        "kv_heads": kv_heads,
        "length": length,
        "form": form,
        "method": method,
        "order": draw(st.sampled_from(ORDERS)),
        "ranks": 1 if method == "ulysses" else draw(st.integers(1, 8)),
        "parts": parts if method in ("ulysses", "usp") else 1,
        "is_causal": draw(st.booleans()),
        "cut": draw(st.integers(0, length)),
    }


@settings(max_examples=60, deadline=None)
@given(_simulated())
def test_simulated_ranks_give_the_numbers_of_one(drawn: dict[str, Any]) -> None:
    """Up to eight ranks in this process, forward and all gradients, packed or not."""
    torch.manual_seed(0)
    shape = lambda heads, dim: (1, heads, drawn["length"], dim)  # noqa: E731
    q, k, v = (
        torch.randn(shape(drawn[heads], dim), dtype=torch.float64, requires_grad=True)
        for heads, dim in (("heads", 4), ("kv_heads", 4), ("kv_heads", 3))
    )
    cut = drawn["cut"]
    packed = torch.tensor([0, cut, drawn["length"]]) if 0 < cut < drawn["length"] else None
    options = {name: drawn[name] for name in ("is_causal",)} | {"cu_seqlens": packed}
    refused = ""
    try:
        made = distributed.simulate(
            q, k, v, drawn["form"], ranks=drawn["ranks"], parts=drawn["parts"], method=drawn["method"], order=drawn["order"],
            kernel="reference", **options,
        )  # fmt: skip
    except PlacementError as error:
        refused = str(error)
    if refused:
        assert "halo" in refused or "counts from the start of each packed document" in refused
        return
    out, lse = functional.attention(q, k, v, drawn["form"], kernel="reference", return_lse=True, **options)
    grad_out, grad_lse = torch.randn_like(out), torch.randn_like(lse) * torch.isfinite(lse)
    right = torch.autograd.grad([out, lse], [q, k, v], [grad_out, grad_lse])
    found = torch.autograd.grad([made.out, made.lse], [q, k, v], [grad_out, grad_lse])
    assert torch.equal(torch.isfinite(made.lse), torch.isfinite(lse))
    for one, other in (
        (made.out, out),
        (made.lse.nan_to_num(neginf=0), lse.nan_to_num(neginf=0)),
        *zip(found, right, strict=True),
    ):
        assert (one - other).abs().max() <= 1e-12


def _public_job(rank: int, seen: list[Tensor], right: Tensor) -> dict[str, Any]:
    """The function that users call, eager and compiled, and its errors."""
    q, k, v = (_cut(x, Shards(LENGTH, 2, "zigzag"), rank, 0) for x in seen)
    packed = torch.tensor([0, 20, LENGTH])

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = distributed.attention(
            q, k, v, FORMS["dilated"], axis="cp", method="ring", order="zigzag", length=LENGTH, is_causal=True, cu_seqlens=packed
        )  # fmt: skip
        assert isinstance(made, Tensor)
        return made

    expected = _cut(right, Shards(LENGTH, 2, "zigzag"), rank, 0)
    held = _cut(torch.ones(1, 1, LENGTH, 1), Shards(LENGTH, 2, "zigzag"), rank, 0) == 1
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    gaps = [float(((made - expected) * held).abs().max()) for made in (attend(q, k, v), compiled(q, k, v))]
    told = {}
    for name, options in (
        ("axis", {"axis": "cpx"}),
        ("method", {"method": "rings"}),
        ("order", {"order": "zig-zag"}),
        ("length", {"length": LENGTH}),
        ("data", {"form": {"form": "dilated", "segments": [8], "rates": [1], "merge_grad": "detach"}}),
    ):
        with pytest.raises(PlacementError) as error:
            distributed.attention(*(x[:, :, :20] for x in (q, k, v)), **{"form": "dense", **options})
        told[name] = str(error.value)
    with pytest.raises(PlacementError) as error:
        meshes.ensure({"cp": 4})
    told["sizes"] = str(error.value)
    with pytest.raises(PlacementError) as error:
        meshes.ensure({"cp": 2, "tp": 2})
    told["other axis"] = str(error.value)
    return {"gaps": gaps, "told": told}


def test_the_function_that_users_call() -> None:
    """Documents over two ranks; the graph of torch.compile gives the same; errors name the cure."""
    given = _operands(4, 2)
    seen = [given[name] for name in "qkv"]
    right = functional.attention(
        *seen, FORMS["dilated"], is_causal=True, cu_seqlens=torch.tensor([0, 20, LENGTH]), kernel="reference"
    )
    found = over_ranks({"cp": 2}, _public_job, seen, right)
    assert max(gap for each in found for gap in each["gaps"]) <= 1e-12
    told = found[1]["told"]
    assert told["axis"] == "mesh axis 'cpx' is unknown (did you mean 'cp'?); the axes are cp"
    assert told["method"].startswith(
        "placement 'rings' is unknown (did you mean 'ring'?); the placements are gather_needed, halo"
    )
    assert told["order"] == "order 'zig-zag' is unknown (did you mean 'zigzag'?); the orders are contiguous, zigzag, striped"
    assert f"{LENGTH} tokens over 2 ranks (contiguous) are 34 places a rank, but q, k and v have 20" in told["length"]
    assert "merge_grad 'detach' needs the LSE of each branch" in told["data"]
    assert told["sizes"].startswith("mesh axis 'cp' has 2 ranks but the policy says 4; change the policy's mesh")
    assert told["other axis"].startswith("the mesh given to dilcompile.distributed.set_mesh has no axis 'tp', it has cp")


def test_one_rank_is_the_ordinary_operator_and_needs_no_process_group() -> None:
    """And a mesh of more ranks says how to start them."""
    meshes.forget()
    with pytest.raises(PlacementError, match="no mesh has been set, so axis 'cp' is unknown"):
        distributed.attention(*(torch.randn(1, 2, 4, 4) for _ in range(3)), "dense")
    with pytest.raises(PlacementError, match=r"start it with: torchrun --nproc-per-node 4 script\.py"):
        meshes.ensure({"cp": 4})
    meshes.ensure({"cp": 1})
    try:
        graph = fx.Graph()
        both = graph.call_function(
            sharded_attention, (*map(graph.placeholder, "qkv"), None, None, None, None, str(Spec("cp", "ring", "dense")))
        )
        graph.output(both)
        module = fx.GraphModule(torch.nn.Module(), graph)
        code = make_fx(module)(*(torch.randn(1, 2, 4, 4) for _ in range(3))).code
        assert _called(code) == ["attention"]
    finally:
        meshes.forget()
