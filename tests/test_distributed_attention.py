"""Ranks give the numbers of one rank, forward and every gradient, and move exactly the bytes of their schedules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from ranks import over_ranks
from torch import Tensor

from dilcompile import distributed
from dilcompile.errors import PlacementError
from dilcompile.forms import make_form
from dilcompile.lowering import ops
from dilcompile.lowering.distributed import meshes, plan
from dilcompile.lowering.distributed.attention import sharded_attention
from dilcompile.lowering.distributed.spec import Spec
from dilcompile.placements import PLACEMENTS
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
        **case.options,
    )  # fmt: skip
    return replace(spec, **changes)


def _sharded(rank: int, spec: Spec, case: Case, heads: int, kv_heads: int) -> tuple[dict[str, Tensor], Any, Any]:
    """What this rank computes, its shards, and the bytes that it moved."""
    shards = Shards(LENGTH, meshes.size_of(plan.keys_axis(spec)), spec.order, meshes.size_of(plan.heads_axis(spec)))
    at = plan.here(spec)
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
    placement = PLACEMENTS[case.placement]
    schedule = placement.schedule(FORMS[case.form].relation(problem), shards, rank, "documents" in case.masks)
    row = BATCH * (HEAD_DIM + V_DIM) * 8
    sent, received = schedule.rows_sent * row, schedule.rows_received * row
    again = (sent, received) if placement.RESENDS else (0, 0)
    return {"forward": (sent, received), "backward": (again[0] + received, again[1] + sent)}


def _job(rank: int, cases: list[Case], expected: dict[Any, dict[str, Tensor]], heads: int, kv_heads: int) -> list[str]:
    """Problems found."""
    problems = []
    for case in cases:
        spec = _spec(case)
        try:
            found, (shards, at), moved = _sharded(rank, spec, case, heads, kv_heads)
        except PlacementError as error:
            problems.append(f"refused {case}: {error}")
            continue
        gap = _difference(found, expected[case.whole()], shards, at)
        if not gap <= 1e-12:
            problems.append(f"wrong {case} on rank {rank}: {gap}")
        if case.placement in PLACEMENTS and not case.masks and not case.options:
            for direction, numbers in _bytes(case, shards, at.rank, heads, kv_heads).items():
                counted = moved.of(direction)
                if (counted.sent, counted.received) != numbers:
                    problems.append(f"bytes {case} on rank {rank} {direction}: {counted}, schedule {numbers}")
    return problems


MASKED = [
    Case(form, causal, placement, order, masks)
    for form, causal in (("dense", True), ("window", False), ("dilated", True), ("union", True))
    for placement, order in (("ring", "zigzag"), ("all_gather", "contiguous"), ("ulysses", "striped"))
    for masks in (("padding",), ("documents",), ("limits", "padding"))
]
OPTIONS = [
    Case("dense", True, placement, order, (), options)
    for placement, order in (("ring", "striped"), ("gather_needed", "contiguous"), ("ulysses", "zigzag"))
    for options in ({"softcap": 2.0}, {"dropout_p": 0.25})
] + [Case("dilated", False, "gather_needed", "contiguous", (), {"dropout_p": 0.25})]
PLAIN = [
    Case(form, causal, placement, order)
    for form in FORMS
    for causal in (False, True)
    for placement in (*PLACEMENTS, "ulysses")
    for order in ORDERS
]


def _refusals(problems: list[str]) -> set[str]:
    return {problem.split(" ", 1)[1].split(":")[0] for problem in problems if problem.startswith("refused")}


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_give_the_numbers_of_one_and_move_the_bytes_of_their_schedules(ranks: int) -> None:
    """All cases on three ranks, every seventh of them on two and on four."""
    heads, kv_heads = HEADS[ranks]
    every = [*PLAIN, *MASKED, *OPTIONS]
    cases = every if ranks == 3 else every[ranks::7]
    expected = {case.whole(): _alone(case, heads, kv_heads) for case in {each.whole(): each for each in cases}.values()}
    found = over_ranks({"cp": ranks}, _job, cases, expected, heads, kv_heads)
    problems = [problem for each in found for problem in each]
    assert not [problem for problem in problems if not problem.startswith("refused")]
    # Nothing but the halo is refused, and that only where keys are not near.
    refused = [case for case in cases if str(case) in _refusals(problems)]
    assert {case.placement for case in refused} <= {"halo"}
    kept = [case for case in cases if case.placement == "halo" and case not in refused]
    assert ranks != 3 or {case.form for case in kept} >= {"window"}
    assert {case.order for case in kept} <= {"contiguous"}
