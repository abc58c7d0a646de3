"""Batches cut over ranks, gathered again, and their loss: the numbers of one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ranks import over_ranks
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss

from dilcompile import distributed
from dilcompile.distributed.positions import all_positions
from dilcompile.errors import PlacementError
from dilcompile.lowering.distributed import meshes
from dilcompile.placements.shards import ORDERS, Shards

MESH = {"cp": 2, "heads": 2}
AXES = ("cp", "heads")


@given(st.integers(1, 60), st.integers(1, 7), st.sampled_from(ORDERS), st.integers(1, 3))
def test_positions_are_those_of_the_shards(length: int, ranks: int, order: Any, parts: int) -> None:
    shards = Shards(length, ranks, order, parts)
    found = all_positions(shards)
    assert sorted(found.flatten().tolist()) == list(range(ranks * shards.places))
    for rank in range(ranks):
        own = found[rank * parts : (rank + 1) * parts].flatten().tolist()
        held = {run.place + i: p for run in shards.runs(rank) for i, p in enumerate(run.positions.positions())}
        assert {place: p for place, p in enumerate(own) if p < length} == held
        if parts == 1 and ranks > 1:
            assert distributed.local_positions(length, order=order, rank=rank, ranks=ranks).tolist() == own


def _batch(length: int) -> dict[str, Any]:
    torch.manual_seed(length)
    ids = torch.randint(5, 100, (2, length))
    mask = torch.ones_like(ids)
    mask[0, length - 2 :] = 0
    return {"input_ids": ids, "labels": torch.where(mask == 1, ids, -100), "attention_mask": mask, "weights": torch.arange(3), "use_cache": False}


def _inputs_job(rank: int) -> list[str]:
    """Every order, over one axis and over two: what the shards hold, and that they make the whole again."""
    problems = []
    for order in ORDERS:
        for length in (8, 13):
            for heads_axis in (None, "heads"):
                over = {"axis": "cp", "order": order, "heads_axis": heads_axis}
                batch = _batch(length)
                shard = distributed.shard_inputs(batch, **over, dims={"weights": None}, pad_token_id=1)
                positions = distributed.local_positions(length, **over)
                expected = {name: F.pad(batch[name], (0, 16), value=pad) for name, pad in (("input_ids", 1), ("attention_mask", 0))}
                expected["labels"] = F.pad(batch["labels"][:, 1:], (0, 17), value=-100)
                expected["position_ids"] = torch.arange(length + 16).expand(2, -1)
                wrong = [name for name, whole in expected.items() if not torch.equal(shard[name], whole[:, positions])]
                rest = {name: value for name, value in shard.items() if name not in expected}
                if wrong or rest.keys() != {"weights", "use_cache"} or rest["weights"] is not batch["weights"]:
                    problems.append(f"{over} {length}: {wrong} {rest}")
                problems += [f"{over} {length}: {problem}" for problem in _gathered(rank, shard, batch, length, over)]
    return problems


def _gathered(rank: int, shard: dict[str, Tensor], batch: dict[str, Tensor], length: int, over: dict[str, Any]) -> list[str]:
    """unshard: integers, truth values, and numbers with the gradient of all ranks' losses."""
    problems = []
    if not torch.equal(distributed.unshard(shard["input_ids"], length=length, **over), batch["input_ids"]):
        problems.append("integers")
    kept = distributed.unshard(shard["attention_mask"] == 1, length=length, **over)
    if not torch.equal(kept, batch["attention_mask"] == 1):
        problems.append("truth values")
    positions = distributed.local_positions(length, **over)
    for dtype, dim in ((torch.float64, 1), (torch.bfloat16, -2)):
        rows = torch.arange(64 * 3, dtype=dtype).view(1, 64, 3)
        own = rows[:, positions].clone().requires_grad_()
        whole = distributed.unshard(own, length=length, dim=dim, **over)
        # Rank r weighs row i by (r + 1) * (i + 1).
        weights = torch.arange(1, length + 1, dtype=dtype)[:, None]
        (whole * weights * (rank + 1)).sum().backward()
        mine = [n + 1 for n in range(4) if over["heads_axis"] is not None or n % 2 == rank % 2]
        right = torch.where(positions < length, positions + 1, 0)[None, :, None] * sum(mine)
        if not torch.equal(whole, rows[:, :length]) or not torch.equal(own.grad, right.to(dtype).expand_as(own)):
            problems.append(f"{dtype} along {dim}")
    return problems


def test_a_batch_is_cut_and_made_whole_again() -> None:
    assert not [problem for each in over_ranks(MESH, _inputs_job) for problem in each]


def _logits(length: int, micro: int = 0) -> tuple[Tensor, Tensor]:
    """Logits of all tokens, and labels of which the last ranks have few."""
    torch.manual_seed(micro)
    logits = torch.randn(2, length, 11, dtype=torch.float64)
    labels = torch.randint(11, (2, length))
    labels[0, 2:], labels[1, 5:] = -100, -100
    return logits, labels


def _loss_job(rank: int) -> dict[str, Any]:
    """Losses and gradients of this rank's rows, of all ways to ask."""
    found: dict[str, Any] = {}
    for order in ORDERS:
        logits, labels = _logits(16)
        over = {"order": order, "heads_axis": "heads"}
        mine = distributed.local_positions(16, **over)
        shard = distributed.shard_inputs({"input_ids": labels.clamp(min=0), "labels": labels}, **over)
        for name, options in (("mean", {}), ("added", {"gradients": "sum"}), ("sum", {"reduction": "sum"})):
            loss, own = _loss_of(logits[:, mine], shard["labels"], options)
            found[f"{order} {name}"] = (mine, loss, own)
    parts = []
    micro = [distributed.shard_inputs({"input_ids": labels, "labels": labels}, heads_axis="heads") for _, labels in (_logits(16), _logits(8, 1))]
    items = distributed.count_tokens([each["labels"] for each in micro], axis=AXES)
    for (logits, _), each in zip((_logits(16), _logits(8, 1)), micro, strict=True):
        mine = each["position_ids"][0]
        parts.append((mine, *_loss_of(logits[:, mine], each["labels"], {"num_items_in_batch": items})))
    found["accumulated"] = (items, parts)
    nothing = torch.full((2, 3), -100)
    found["no token"] = _loss_of(torch.randn(2, 3, 11, dtype=torch.float64), nothing, {})
    found["compiled"] = _compiled()
    return found


def _loss_of(logits: Tensor, labels: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    own = logits.clone().requires_grad_()
    loss = distributed.sharded_loss(own, labels, axis=AXES, **options)
    loss.backward()
    return loss.detach(), own.grad


def _compiled() -> list[float]:
    """How far a compiled loss over gathered rows is from that of eager."""
    torch.manual_seed(meshes.rank_of("cp"))
    eager = torch.randn(2, 4, 11, dtype=torch.float64, requires_grad=True)
    traced = eager.detach().clone().requires_grad_()
    labels = torch.randint(11, (2, 4))

    def step(x: Tensor) -> Tensor:
        whole = distributed.unshard(x.sin(), order="zigzag", length=7)
        return distributed.sharded_loss(x, labels) + whole.square().sum() * (1 + whole[0, 0, 0])

    losses = step(eager), torch.compile(step, backend="aot_eager", fullgraph=True)(traced)
    for loss in losses:
        loss.backward()
    return [float((losses[0] - losses[1]).abs()), float((eager.grad - traced.grad).abs().max())]


def test_the_loss_is_that_of_one_rank() -> None:
    """Few labels on some ranks, none on others; all gradients; accumulation as Transformers counts it."""
    found = over_ranks(MESH, _loss_job)
    logits, labels = _logits(16)
    for order in ORDERS:
        for name, factor, count in (("mean", 4, None), ("added", 1, None), ("sum", 4, torch.tensor(1))):
            whole = logits.clone().requires_grad_()
            right = _one_rank(whole, labels, count)
            for rank in found:
                mine, loss, grad = rank[f"{order} {name}"]
                assert abs(loss - right) <= 1e-12
                assert (grad - factor * whole.grad[:, mine]).abs().max() <= 1e-12
    both = [_logits(16), _logits(8, 1)]
    items = sum((labels[:, 1:] != -100).sum() for _, labels in both)
    for number, (logits, labels) in enumerate(both):
        whole = logits.clone().requires_grad_()
        right = _one_rank(whole, labels, items)
        for rank in found:
            counted, parts = rank["accumulated"]
            mine, loss, grad = parts[number]
            assert counted == items
            assert abs(loss - right) <= 1e-12
            assert (grad - 4 * whole.grad[:, mine]).abs().max() <= 1e-12
    for rank in found:
        loss, grad = rank["no token"]
        assert loss == 0
        assert not grad.any()
        assert max(rank["compiled"]) <= 1e-12


def _one_rank(logits: Tensor, labels: Tensor, items: Tensor | None) -> Tensor:
    """Transformers' own loss, in float64."""
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    loss = F.cross_entropy(logits.flatten(0, 1), shifted.flatten(), reduction="mean" if items is None else "sum")
    loss = loss if items is None else loss / items
    loss.backward()
    theirs = ForCausalLMLoss(logits.detach(), labels, logits.shape[-1], num_items_in_batch=items)
    assert abs(theirs - loss) <= 1e-5 * abs(loss)
    return loss.detach()


def _different_job(rank: int) -> str:
    try:
        distributed.shard_inputs({"input_ids": torch.arange(8).view(1, 8) + rank})
    except PlacementError as error:
        return str(error)
    return "no error"


def test_ranks_with_different_batches_are_refused() -> None:
    for told in over_ranks({"cp": 2}, _different_job):
        assert "the ranks of mesh axis 'cp' were given different batches: 'input_ids' is (1, 8) sha256" in told
        assert "deal out batches over the data-parallel axis alone" in told


def _mistaken_job(rank: int) -> list[str]:
    """Attention of rows that were cut otherwise, or padded for a causal model."""
    told = []
    q = torch.randn(1, 2, 4, 4)
    for cut, options in (
        ({"order": "zigzag"}, {"order": "zigzag"}),
        ({"order": "zigzag"}, {"order": "striped"}),
        ({"is_causal": True}, {"is_causal": True}),
        ({"is_causal": True}, {}),
        ({}, {"key_padding": torch.ones(1, 4, dtype=torch.bool)}),
    ):
        distributed.shard_inputs({"input_ids": torch.arange(7).view(1, 7)}, **cut)
        try:
            distributed.attention(q, q, q, "dense", **options)
            told.append("")
        except PlacementError as error:
            told.append(str(error))
    return told


def test_rows_that_a_site_takes_for_others_are_refused() -> None:
    for told in over_ranks({"cp": 2}, _mistaken_job):
        assert told[::2] == ["", "", ""]
        assert "cut over mesh axis 'cp' with order 'zigzag', but this site takes its rows for order 'striped'" in told[1]
        assert "padded with is_causal=True, so that no mask hides the padding, but this site sees later tokens" in told[3]


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process believes to be the second of three ranks, which nobody needs as long as nothing is exchanged."""
    monkeypatch.setitem(meshes._axes, "cp", meshes.Axis("cp", 3, 1, None))
    monkeypatch.setitem(distributed.inputs._compared, "cp", None)


IDS = torch.arange(14).view(2, 7)


@pytest.mark.parametrize("order", ORDERS)
def test_one_rank_keeps_all(monkeypatch: pytest.MonkeyPatch, order: Any) -> None:
    monkeypatch.setitem(meshes._axes, "cp", meshes.Axis("cp", 1, 0, None))
    shard = distributed.shard_inputs({"input_ids": IDS, "labels": IDS}, order=order)
    assert shard.keys() == {"input_ids", "labels", "position_ids"}
    assert torch.equal(shard["input_ids"], IDS)
    assert torch.equal(distributed.unshard(shard["input_ids"], order=order), IDS)
    logits = torch.randn(2, 7, 20, dtype=torch.float64)
    right = F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    assert abs(distributed.sharded_loss(logits, shard["labels"]) - right) <= 1e-14


@pytest.mark.usefixtures("three")
def test_padding_stands_behind_all_tokens() -> None:
    """Masked where a token could see it, and of the same document as the last token."""
    shard = distributed.shard_inputs({"input_ids": IDS})
    assert shard["position_ids"].tolist() == [[3, 4, 5]] * 2
    assert shard["attention_mask"].tolist() == [[1, 1, 1]] * 2
    shard = distributed.shard_inputs({"input_ids": IDS}, is_causal=True, order="striped")
    assert shard.keys() == {"input_ids", "position_ids"}
    packed = torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    shard = distributed.shard_inputs({"input_ids": IDS, "position_ids": packed}, is_causal=True, order="striped")
    assert shard["position_ids"].tolist() == [[1, 0, 3]]
    wide = packed.expand(3, 1, 7)
    assert distributed.shard_inputs({"input_ids": IDS, "position_ids": wide}, is_causal=True, order="striped")["position_ids"].tolist() == [[[1, 0, 3]]] * 3
    tokens = distributed.shard_inputs({"input_ids": IDS, "labels": IDS}, shift_labels=False)
    assert torch.equal(tokens["labels"], IDS[:, 3:6])


@pytest.mark.usefixtures("three")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: distributed.shard_inputs({"input_ids": IDS}, axis="pc"), "mesh axis 'pc' is unknown"),
        (lambda: distributed.shard_inputs({"input_ids": IDS}, order="zig"), r"order 'zig' is unknown \(did you mean 'zigzag'\?\)"),
        (lambda: distributed.shard_inputs({"labels": IDS}), "the batch has no input_ids .* it has labels"),
        (lambda: distributed.shard_inputs({"input_ids": IDS, "label": IDS}), r"batch\['label'\] \[2, 7\] is of no known name \(did you mean 'labels'\?\)"),
        (lambda: distributed.shard_inputs({"input_ids": IDS}, dims={"x": 1}), "dims names 'x', which the batch doesn't have"),
        (lambda: distributed.shard_inputs({"input_ids": IDS, "x": IDS}, dims={"x": 2}), r"batch\['x'\] \[2, 7\] has no dim 2"),
        (lambda: distributed.shard_inputs({"input_ids": IDS, "labels": IDS[:, 1:]}), "different lengths: input_ids 7, labels 6"),
        (lambda: distributed.shard_inputs({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 7, 7)}), "a mask of pairs can't be cut by rows"),
        (lambda: distributed.shard_inputs({"input_ids": IDS, "position_ids": IDS}), "say is_causal=True .* a multiple of 3"),
        (lambda: distributed.shard_inputs({"input_ids": IDS[:, :0]}), "at least one token, got length 0"),
        (lambda: distributed.local_positions(7, rank=1), "give rank and ranks together"),
        (lambda: distributed.local_positions(7, rank=3, ranks=3), "rank 3 is not among 3 ranks"),
        (lambda: distributed.unshard(IDS, length=30), r"30 tokens over 3 ranks \(contiguous\) are 10 rows a rank, but the tensor has 7 along dim 1"),
        (lambda: distributed.unshard(IDS, dim=2), r"tensor \[2, 7\] has no dim 2"),
        (lambda: distributed.sharded_loss(torch.zeros(2, 7, 5), IDS[:, 1:]), r"logits \[2, 7, 5\] and labels \[2, 6\] don't fit"),
        (lambda: distributed.sharded_loss(torch.zeros(2, 7, 5), IDS, reduction="men"), r"reduction 'men' is unknown \(did you mean 'mean'\?\)"),
        (lambda: distributed.sharded_loss(torch.zeros(2, 7, 5), IDS, gradients="avg"), "gradients 'avg' is unknown; it is mean or sum"),
        (lambda: distributed.sharded_loss(torch.zeros(2, 7, 5), IDS, axis=("cp", "cp")), "axis names each mesh axis once"),
        (lambda: distributed.sharded_loss(torch.zeros(2, 7, 5), IDS, reduction="sum", num_items_in_batch=3), "num_items_in_batch divides the mean"),
        (lambda: distributed.count_tokens([]), "there are no labels to count"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        call()
