"""Whole models over ranks: the numbers of one rank, the same graph on every rank, and an error where ranks differ."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import SdpaAttention, llama
from ranks import over_ranks
from torch import Tensor, nn

from dilcompile import agreement, distributed
from dilcompile.pipeline import rewrite_dynamo
from dilcompile.placements import Shards
from dilcompile.policy import Policy

LENGTH = 12


def policy(ranks: int, order: str = "contiguous", **shard: Any) -> dict[str, Any]:
    return {
        "mesh": {"cp": {"size": ranks, "layout": order}},
        "rules": [{"apply": {"form": "keep"}, "shard": {"mesh": "cp", **shard}}],
    }


def own(x: Tensor, order: str, rank: int) -> Tensor:
    """The columns of a rank."""
    runs = Shards(x.shape[1], 2, order).runs(rank)  # type: ignore[arg-type]
    return x[:, torch.cat([torch.tensor(run.positions.positions()) for run in runs])]


def inputs(packed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, their positions, and weights of a sum over the output."""
    random = torch.Generator().manual_seed(0)
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]) if packed else torch.arange(LENGTH)
    ids = torch.randint(0, 96, (2, LENGTH), generator=random)
    return ids, positions.repeat(2, 1), torch.randn(2, LENGTH, 64, dtype=torch.float64, generator=random)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: weight.grad.clone() for name, weight in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    return found


def parity(rank: int, cases: list[tuple[str, str, bool, bool]]) -> list[tuple[float, float]]:
    """For each case the largest error of the output and of any gradient, relative to the largest number."""
    found = []
    for order, method, packed, checkpointed in cases:
        torch._dynamo.reset()
        model = llama("sdpa", num_hidden_layers=1).double()
        ids, positions, weights = inputs(packed)
        alone = model(input_ids=ids, position_ids=positions).last_hidden_state
        (alone * weights).sum().backward()
        wanted = gradients(model)
        if checkpointed:
            model.train()
            model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        options = {"policy": policy(2, order, method=method), "inner": "aot_eager"}
        compiled = torch.compile(model, backend="dilated", options=options, fullgraph=True)
        out = compiled(input_ids=own(ids, order, rank), position_ids=own(positions, order, rank)).last_hidden_state
        (out * own(weights, order, rank)).sum().backward()
        error = 0.0
        for name, grad in gradients(model).items():
            dist.all_reduce(grad)
            error = max(error, ((grad - wanted[name]).abs().max() / wanted[name].abs().max()).item())
        found.append((((out - own(alone, order, rank)).abs().max() / alone.abs().max()).item(), error))
    return found


def with_loss(rank: int) -> tuple[float, float, float]:
    """A step that holds the loss, compiled as one graph by Inductor: the loss of one rank, that of the ranks, and how far gradients are."""
    torch.manual_seed(0)
    model, ids, labels = nn.Sequential(nn.Embedding(96, 32), SdpaAttention()).double(), *torch.randint(0, 32, (2, 2, LENGTH))
    wanted = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
    wanted.backward()
    right = gradients(model)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return distributed.sharded_loss(model(ids), labels)

    compiled = torch.compile(step, backend="dilated", options={"policy": policy(2), "inner": "inductor"}, fullgraph=True)
    loss = compiled(own(ids, "contiguous", rank), own(labels, "contiguous", rank))
    loss.backward()
    error = 0.0
    for name, grad in gradients(model).items():
        # As data parallel averages them: each rank's loss is a share of as many as there are ranks.
        dist.all_reduce(grad)
        error = max(error, ((grad / 2 - right[name]).abs().max() / right[name].abs().max()).item())
    return wanted.item(), loss.item(), error


class Dropping(nn.Module):
    """Two attentions that drop out pairs, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(16, 48) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for projection in self.qkv:
            q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in projection(x).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, dropout_p=0.25, is_causal=True).transpose(1, 2).flatten(2)
        return x


def with_dropout(rank: int) -> dict[str, float]:
    """The largest errors where ranks have other seeds than one another: the first rank's is that of the process alone."""
    found = {}
    torch.manual_seed(0)
    model, x, weights = Dropping().double(), *torch.randn(2, 2, LENGTH, 16, dtype=torch.float64)
    form = {"form": "dilated", "segments": [4, 12], "rates": [1, 2]}
    for order, method in (("zigzag", "ring"), ("contiguous", "ulysses")):
        made = []
        for ranks in (1, 2):
            torch._dynamo.reset()
            asked = policy(ranks, order, method=method)
            asked["rules"][0]["apply"] = form
            compiled = torch.compile(model, backend="dilated", options={"policy": asked, "inner": "aot_eager"}, fullgraph=True)
            torch.manual_seed(7 + (rank if ranks > 1 else 0))
            here, wanted = ((own(one, order, rank) if ranks > 1 else one) for one in (x, weights))
            out = compiled(here)
            (out * wanted).sum().backward()
            made.append((out, gradients(model)))
        (alone, wanted_grads), (out, grads) = made
        for name, grad in grads.items():
            dist.all_reduce(grad)
            found[f"{order} {name}"] = (grad - wanted_grads[name]).abs().max().item()
        found[order] = (out - own(alone, order, rank)).abs().max().item()
    return found


def both(
    rank: int, cases: list[tuple[str, str, bool, bool]]
) -> tuple[list[tuple[float, float]], tuple[float, float, float], dict[str, float]]:
    return parity(rank, cases), with_loss(rank), with_dropout(rank)


@pytest.mark.long
def test_a_llama_over_two_ranks_computes_what_one_rank_does() -> None:
    cases = [
        ("zigzag", "ring", True, True),
        ("contiguous", "ulysses", True, False),
    ]
    for found, (wanted, loss, error), dropped in over_ranks({"cp": 2}, both, cases, patience=400.0):
        assert loss == pytest.approx(wanted, rel=1e-12)
        assert error < 1e-12
        assert max(dropped.values()) <= 1e-12, dropped
        for case, errors in zip(cases, found, strict=True):
            assert max(errors) < 1e-12, (case, errors)


def graphs(rank: int, changes: list[str]) -> list[str]:
    """What each change does to the ranks that compile: the graph's hash, or the error."""
    found = []
    for change in changes:
        torch._dynamo.reset()
        shard = {"method": "all_gather"} if change == "policy" and rank else {"method": "ring"}
        made = Policy.load(policy(2, **shard))
        model = llama("sdpa", num_hidden_layers=1)
        if change == "graph" and rank:
            model.layers[0].mlp.act_fn = nn.GELU()  # type: ignore[union-attr, index]
        ids, positions, _ = inputs(packed=False)
        columns = 4 if change == "shapes" and rank else 6
        kept: list[str] = []

        def keep(gm: Any, example_inputs: Any, made: Policy = made, kept: list[str] = kept) -> Any:
            outcome = rewrite_dynamo(gm, example_inputs, made, "0")
            assert outcome.gm is not None
            kept.append(agreement.graph_hash(outcome.gm))
            agreement.agree_over_ranks(outcome.gm, example_inputs, outcome.report, made)
            return gm.forward

        try:
            torch.compile(model, backend=keep)(input_ids=ids[:, :columns], position_ids=positions[:, :columns] + 6 * rank)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            kept = [str(error.inner_exception)]
        found.append(kept[0])
    return found


def test_ranks_that_compile_different_things_are_refused_with_both_values() -> None:
    changes = ["nothing", "policy", "shapes", "graph", "nothing"]
    one, other = over_ranks({"cp": 2}, graphs, changes)
    assert one[0] == one[4] == other[0] == other[4]
    assert len(one[0]) == 64
    for first, second, change in zip(one[1:4], other[1:4], changes[1:4], strict=True):
        assert first == second
        assert "the ranks of mesh axis 'cp' don't compile the same" in first, change
    assert "their policy differ" in one[1]
    assert "rank 0: policy" in one[1]
    assert "rank 1: policy" in one[1]
    assert "int64[2, 6]" in one[2]
    assert "int64[2, 4]" in one[2]
    assert "silu" in one[3]
    assert "gelu" in one[3]


def alone(rank: int) -> str:
    """Rank 1 has a policy that shards nothing."""
    made: Any = policy(2) if rank == 0 else "exact"
    model = llama("sdpa", num_hidden_layers=1)
    ids, positions, _ = inputs(packed=False)
    compiled = torch.compile(model, backend="dilated", options={"policy": made, "inner": "eager"})
    try:
        compiled(input_ids=ids[:, :6], position_ids=positions[:, :6])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        return str(error.inner_exception)
    return "ran"


def test_a_rank_that_compiles_alone_is_told_within_the_time_of_the_group() -> None:
    one, other = over_ranks({"cp": 2}, alone, timeout=6.0)
    assert other == "ran"
    assert one.startswith(
        "rank 0 compiles a graph whose sequence is sharded over mesh axis 'cp', but rank 1 did not within 0:00:06"
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_the_columns_of_a_rank(rank: int) -> None:
    assert own(torch.arange(8)[None], "zigzag", rank).tolist() == [[[0, 1, 6, 7], [2, 3, 4, 5]][rank]]
