"""Compressed gradients over real processes: the identity of error feedback, convergence, bytes, buckets, states."""

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from ranks import over_ranks
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dilcompile.distributed import TopKCompression
from dilcompile.distributed.compression import _index_dtype
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


class Branches(nn.Module):
    """Two layers, of which a step may use one."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.once = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)

    def forward(self, x, both):
        return (self.always(x) + (self.once(x) if both else 0)).square().mean()


def unused(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For a layer that only the first step uses: its plain gradients, what came out in six steps, what is left."""
    torch.manual_seed(0)
    hook, plain, model = TopKCompression(0.1), Branches(), Branches()
    plain.load_state_dict(model.state_dict())
    ddp = hook.wrap(model, find_unused_parameters=True)
    sums = torch.zeros(2, 16, 16)
    for step in range(6):
        # Its first gradients are large, so that what they leave would be chosen in every later step.
        x = torch.randn(4, 16, generator=torch.Generator().manual_seed(2 * step + rank)) * (10 if step == 0 else 0.01)
        for each in (plain, ddp):
            each.zero_grad(set_to_none=True)
            each(x, step == 0).backward()
        for each, total in zip((plain, model), sums, strict=True):
            if each.once.weight.grad is not None:
                total += each.once.weight.grad
    return sums[0], sums[1], hook._residuals[model.once.weight].view(16, 16).clone()


class Scaled(nn.Module):
    """A parameter whose gradient is the input."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(64, dtype=dtype))

    def forward(self, x):
        return (self.weight * x).sum()


def widths(rank: int) -> dict[str, object]:
    """Gradients of two and of eight bytes, and a size of buckets that is not DDP's."""
    found: dict[str, object] = {}
    for dtype in (torch.float16, torch.bfloat16):
        hook, model = TopKCompression(1 / 64), Scaled(dtype)
        ddp, total = hook.wrap(model), torch.zeros(64)
        for _ in range(4):
            model.weight.grad = None
            ddp(torch.full((64,), 40_000.0, dtype=dtype)).backward()
            total += model.weight.grad.float()
        found[str(dtype)] = (total + hook._residuals[model.weight], hook.bytes_sent)
    whole, plain = Scaled(torch.float64), Scaled(torch.float64)
    for ddp in (TopKCompression(1.0).wrap(whole), DistributedDataParallel(plain)):
        ddp(torch.linspace(-1, 1, 64, dtype=torch.float64) / (3 + rank)).backward()
    found["float64"] = (whole.weight.grad, plain.weight.grad)
    ddp = DistributedDataParallel(Branches(), bucket_cap_mb=50)
    with pytest.raises(DilcompileError, match=r"1 was said, but the model's have 50 MiB.*bucket_cap_mb"):
        TopKCompression(bucket_size_mb=1).register(ddp)
    TopKCompression(bucket_size_mb=50).register(ddp)
    return found


def all_of_it(rank: int) -> dict[str, object]:
    hooks = TopKCompression(RATIO), TopKCompression(RATIO)
    losses = {"plain": trained(rank, None), "top-k": trained(rank, hooks[0]), "forgets": trained(rank, hooks[1], forgets=True)}
    moved = (hooks[0].bytes_sent, hooks[0].bytes_plain)
    return {"losses": losses, "moved": moved, "identity": identity(rank), "edges": edges(rank), "unused": unused(rank), "widths": widths(rank)}


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
    """A value of four bytes and an index of four for each number that is sent, exactly: the model is one bucket."""
    numel = sum(parameter.numel() for parameter in Model().parameters())
    for result in results:
        sent, plain = result["moved"]
        assert plain == STEPS * 4 * numel
        assert sent == STEPS * math.ceil(RATIO * numel) * (4 + 4)


def test_what_is_sent_and_what_is_left_are_all_gradients(results):
    """Over the ranks: the sum of plain gradients is the sum of what came out and what each rank kept, in float64 operands."""
    for parts in zip(*(zip(*(r["identity"][key] for key in ("wanted", "found", "left")), strict=True) for r in results), strict=True):
        wanted = sum(part[0] for part in parts)
        # What came out is the mean, the same on both.
        kept = sum(part[1] for part in parts) + sum(part[2] for part in parts)
        # Float64: some roundings of sums.
        torch.testing.assert_close(kept.double(), wanted, rtol=0, atol=1e-14 * wanted.abs().max().item())
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
                assert torch.equal(one, other)
        assert found["bytes"][0] == found["bytes"][1]
        assert found["bytes behind"][1] == 2 * found["bytes"][1]
        assert found["bytes behind"][0] < 1.03 * found["bytes"][0]


def test_infinite_gradients_arrive_on_all_ranks_and_are_not_kept(results):
    for result in results:
        assert not result["edges"]["finite"]
        assert result["edges"]["kept finite"]


def test_a_parameter_that_steps_do_not_use_keeps_what_it_has_left(results):
    """DDP throws away what comes out for it: were it sent, it would be lost."""
    wanted = sum(result["unused"][0] for result in results)
    kept = sum(result["unused"][1] + result["unused"][2] for result in results)
    # Float32: a rounding in the sum over steps, one in that over ranks, one in what is kept.
    atol = 3 * torch.finfo(torch.float32).eps * wanted.abs().max().item()
    torch.testing.assert_close(kept, wanted, rtol=0, atol=atol)


def test_sixteen_bit_gradients_stay_finite_and_whole(results):
    """What waits outgrows float16, whose largest number is 65504; what is sent doesn't."""
    for result in results:
        for dtype in ("torch.float16", "torch.bfloat16"):
            total, sent = result["widths"][dtype]
            given = torch.tensor(40_000.0).to(getattr(torch, dtype.removeprefix("torch."))).float()
            assert torch.equal(total, torch.full((64,), 4 * given.item()))
            assert sent == 4 * (2 + 4)


def test_ratio_one_in_float64_is_plain_averaging_bit_for_bit(results):
    for result in results:
        assert torch.equal(*result["widths"]["float64"])


@pytest.mark.parametrize("warmup", ["linear", "exponential"])
def test_the_ratio_falls_in_a_warm_up(warmup):
    hook, ratios = TopKCompression(0.01, warmup_steps=3, warmup=warmup), []
    for hook.steps in range(5):
        ratios.append(hook.current_ratio())
    assert ratios[3] == ratios[4] == 0.01
    steps = [(one - other) if warmup == "linear" else math.log(one / other) for one, other in itertools.pairwise([1.0, *ratios[:4]])]
    assert steps == pytest.approx([steps[0]] * 4)


def test_indices_of_large_buckets_are_int64():
    """A parameter of more numbers than int32 counts is a bucket; no machine of a test holds one."""
    assert _index_dtype(2**31 - 1) == torch.int32
    assert _index_dtype(2**31) == torch.int64


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ratio": 0}, "ratio: 0 is no share above 0"),
        ({"ratio": 1.5}, "ratio: 1.5 is no share"),
        ({"bucket_size_mb": 0}, "bucket_size_mb: 0 is no size"),
        ({"warmup_steps": -1}, "warmup_steps: -1 is below 0"),
        ({"warmup": "cosine"}, "warmup: 'cosine' is none of average, linear, exponential"),
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
    with pytest.raises(DilcompileError, match="call wrap or register first"):
        TopKCompression().load_state_dict({"steps": 0, "residuals": {}})
