"""Compressed gradients over real processes: the identity of error feedback, convergence, bytes, buckets, states."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import over_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dilcompile.distributed import TopKCompression
from dilcompile.errors import DilcompileError

TEXT = Path(__file__).parents[1] / "examples" / "text" / "persuasion.txt"
STEPS, RATIO = 120, 0.005


class Model(nn.Module):
    """Bytes: an embedding, a causal attention, a perceptron."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(128, width)
        self.qkv, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inside, self.outside = nn.Linear(width, 2 * width), nn.Linear(2 * width, 128)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        x = x + self.output(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.outside(F.gelu(self.inside(x)))


def trained(rank: int, hook: TopKCompression | None, forgets: bool = False) -> list[float]:
    """The losses of a run, each the mean of both ranks' at the end of it."""
    torch.manual_seed(0)
    text = torch.tensor([min(byte, 127) for byte in TEXT.read_bytes()[:20_000]])
    model = Model()
    ddp = DistributedDataParallel(model) if hook is None else hook.wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    draws, losses = torch.Generator().manual_seed(rank), []
    for _ in range(STEPS):
        starts = torch.randint(0, len(text) - 65, (8,), generator=draws)
        batch = torch.stack([text[start : start + 65] for start in starts])
        loss = F.cross_entropy(ddp(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if forgets:
            for held in hook._residuals.values():
                held.zero_()
    return losses


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


def identity(rank: int) -> dict[str, torch.Tensor]:
    """Sums of three steps' plain gradients, of what was sent, and what is left."""
    torch.manual_seed(0)
    hook = TopKCompression(0.1, bucket_size_mb=0.004)
    plain, model = Model().double(), Model().double()
    model.load_state_dict(plain.state_dict())
    ddp = hook.wrap(model)
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    found = [torch.zeros_like(p) for p in model.parameters()]
    layouts = set()
    for step in range(3):
        batch = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(10 * step + rank))
        for each, into in ((plain, wanted), (ddp, found)):
            for parameter in each.parameters():
                parameter.grad = None
            F.cross_entropy(each(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()).backward()
            for total, grad in zip(into, gradients(each), strict=True):
                total += grad
        layouts.add(tuple(map(len, hook._buckets)))
    left = [hook._residuals[parameter].view_as(parameter) for parameter in model.parameters()]
    state = hook.state_dict()
    again = TopKCompression(0.1, bucket_size_mb=0.004)
    again.wrap(Model().double())
    again.load_state_dict(state)
    return {"wanted": wanted, "found": found, "left": left, "state": again.state_dict(), "own": state, "layouts": layouts}


def edges(rank: int) -> dict[str, object]:
    """Ratio 1, bytes, warm-up, no_sync and numbers that are none."""
    torch.manual_seed(0)
    batch = torch.randint(0, 128, (2, 17), generator=torch.Generator().manual_seed(rank))

    def backward(ddp, scale=1.0):
        (F.cross_entropy(ddp(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten()) * scale).backward()

    found: dict[str, object] = {}
    models = [Model() for _ in range(4)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    whole, warming = TopKCompression(1.0), TopKCompression(0.01, warmup_steps=1)
    under = [DistributedDataParallel(models[0]), whole.wrap(models[1]), warming.wrap(models[2])]
    for ddp in under:
        with ddp.no_sync():
            backward(ddp)
        backward(ddp)
    found["plain"], found["whole"], found["warm"] = (gradients(model) for model in models[:3])
    found["bytes"] = (warming.bytes_sent, warming.bytes_plain)
    backward(under[2])
    found["bytes behind"] = (warming.bytes_sent, warming.bytes_plain)
    few = TopKCompression(0.001)
    ddp = few.wrap(models[3])
    backward(ddp, math.inf if rank == 0 else 1.0)
    found["finite"] = all(grad.isfinite().all() for grad in gradients(models[3]))
    found["kept finite"] = all(part.isfinite().all() for part in few._residuals.values())
    return found


def all_of_it(rank: int) -> dict[str, object]:
    hooks = TopKCompression(RATIO), TopKCompression(RATIO)
    losses = {"plain": trained(rank, None), "top-k": trained(rank, hooks[0]), "forgets": trained(rank, hooks[1], forgets=True)}
    moved = (hooks[0].bytes_sent, hooks[0].bytes_plain)
    return {"losses": losses, "moved": moved, "identity": identity(rank), "edges": edges(rank)}


@pytest.fixture(scope="module")
def results():
    return over_ranks({"dp": 2}, all_of_it)


def test_it_converges_as_without_compression(results):
    """The last tenth of the losses: at most 5 % above those of plain averaging; without error feedback much more than that."""
    last = {
        name: sum(sum(result["losses"][name][-STEPS // 10 :]) for result in results) for name in ("plain", "top-k", "forgets")
    }
    first = sum(result["losses"]["plain"][0] for result in results) * STEPS / 10
    assert last["plain"] < 0.7 * first
    assert last["top-k"] < 1.05 * last["plain"]
    assert last["forgets"] > 1.08 * last["plain"]


def test_the_bytes_fall_by_the_ratio(results):
    """A value of four bytes and an index of four for each number that is sent."""
    numel = sum(parameter.numel() for parameter in Model().parameters())
    for result in results:
        sent, plain = result["moved"]
        assert plain == STEPS * 4 * numel
        assert sent == pytest.approx(2 * RATIO * plain, rel=0.02)
        assert sent >= 2 * RATIO * plain


def test_what_is_sent_and_what_is_left_are_all_gradients(results):
    """Over the ranks: the sum of plain gradients is the sum of what came out and what each rank kept, in float64 operands."""
    for parts in zip(*(zip(*(r["identity"][key] for key in ("wanted", "found", "left")), strict=True) for r in results), strict=True):
        wanted = sum(part[0] for part in parts)
        # What came out is the mean, the same on both.
        kept = sum(part[1] for part in parts) + sum(part[2] for part in parts)
        torch.testing.assert_close(kept.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())
        assert torch.equal(parts[0][1], parts[1][1])


def test_buckets_are_made_anew_and_residuals_follow_their_parameters(results):
    """The identity above holds over DDP's first steps, in which the buckets change."""
    assert all(len(result["identity"]["layouts"]) == 2 for result in results)


def test_a_state_goes_round(results):
    for result in results:
        own, again = result["identity"]["own"], result["identity"]["state"]
        assert own["steps"] == again["steps"] == 3
        assert set(own["residuals"]) == set(again["residuals"]) == {name for name, _ in Model().named_parameters()}
        assert all(torch.equal(part, again["residuals"][name]) for name, part in own["residuals"].items())


def test_ratio_one_and_warm_up_average_plainly(results):
    for result in results:
        found = result["edges"]
        for name in ("whole", "warm"):
            for one, other in zip(found[name], found["plain"], strict=True):
                torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)
        assert found["bytes"][0] == found["bytes"][1]
        assert found["bytes behind"][1] == 2 * found["bytes"][1]
        assert found["bytes behind"][0] < 1.03 * found["bytes"][0]


def test_infinite_gradients_arrive_on_all_ranks_and_are_not_kept(results):
    for result in results:
        assert not result["edges"]["finite"]
        assert result["edges"]["kept finite"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0}, "ratio: 0 is no share above 0"),
        ({"ratio": 1.5}, "ratio: 1.5 is no share"),
        ({"bucket_size_mb": 0}, "bucket_size_mb: 0 is no size"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is below 0"),
    ],
)
def test_bad_options_are_refused(wrong, message):
    with pytest.raises(DilcompileError, match=message):
        TopKCompression(**wrong)


def test_what_is_not_under_ddp_is_refused():
    with pytest.raises(DilcompileError, match="takes a DistributedDataParallel, not Model"):
        TopKCompression().register(Model())
    with pytest.raises(DilcompileError, match="none is initialised; start with torchrun"):
        TopKCompression().wrap(Model())
