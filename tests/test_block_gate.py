"""The gate that learns which blocks are attended: what it adds to scores, how it draws, and that it learns."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from dilcompile.errors import DilcompileError
from dilcompile.functional import attention
from dilcompile.nn import BlockGate

EPS = torch.finfo(torch.float64).eps
SCALE = 8**-0.5


def example() -> ModuleType:
    place = Path(__file__).parents[1] / "examples" / "block_gate.py"
    spec = importlib.util.spec_from_file_location("block_gate_example", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gate(**options: Any) -> BlockGate:
    torch.manual_seed(0)
    return BlockGate(4, 8, **{"kv_heads": 2, "block": 16, "blocks": 3, "gate_dim": 6, **options}).double()


def operands(q_len: int = 90, k_len: int = 90) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        for shape in ((4, q_len, 8), (2, k_len, 8), (2, k_len, 5))
    )
    return q, k, v


def seen_by(held: Tensor, q_len: int, k_len: int, first: int = 0) -> Tensor:
    """Pairs of the blocks [B, H, rows, columns] of 16, the first row that of the query at ``first``."""
    rows = (torch.arange(q_len) + first) // 16 - first // 16
    return held[:, :, rows][..., torch.arange(k_len) // 16]


@pytest.mark.parametrize(
    ("q_len", "causal", "padded"), [(90, False, False), (90, False, True), (37, False, True), (90, True, False)]
)
def test_the_logits_are_added_to_the_scores_of_the_chosen_blocks(q_len: int, causal: bool, padded: bool) -> None:
    module, (q, k, v) = gate(is_causal=causal), operands(q_len)
    first = 90 - q_len
    keep = torch.rand(2, 90, generator=torch.Generator().manual_seed(2)) > 0.3 if padded else None
    gated = module.gated(q, k, scale=SCALE, key_padding=keep)
    held = gated.blocks.held(0, gated.logits.shape[2], 6)
    if causal:
        # What is added is of the means up to each position, which at the ends of blocks are those of the logits.
        added = (gated.q[..., 8:] * SCALE) @ gated.k[..., 8:].repeat_interleave(2, 1).mT
        ends = [15, 31, 47, 63, 79, 89]
        lower = torch.ones(6, 6, dtype=torch.bool).tril()
        assert (added[:, :, ends][..., ends] - gated.logits)[..., lower].abs().max() <= 100 * EPS
    else:
        added = torch.where(seen_by(held, q_len, 90, first), seen_by(gated.logits, q_len, 90, first), 0)
    seen = seen_by(held, q_len, 90, first) & (torch.ones(q_len, 90, dtype=torch.bool).tril(first) | (not causal))
    seen = seen if keep is None else seen & keep[:, None, None]
    scores = (q @ k.repeat_interleave(2, 1).mT * SCALE + added).masked_fill(~seen, -torch.inf)
    expected = scores.softmax(-1).nan_to_num(0) @ v.repeat_interleave(2, 1)
    assert (module(q, k, v, key_padding=keep) - expected).abs().max() <= 1000 * EPS


def test_a_block_s_logit_is_of_its_projected_means() -> None:
    module, (q, k, _) = gate(is_causal=False), operands()
    logits = module.gated(q, k, scale=SCALE).logits
    for h, i, j in ((0, 0, 5), (3, 5, 2)):
        mine = q[1, h, i * 16 : i * 16 + 16].mean(0) @ module.to_query[h]
        theirs = k[1, h // 2, j * 16 : j * 16 + 16].mean(0) @ module.to_key[h // 2]
        assert (logits[1, h, i, j] - mine @ theirs * 6**-0.5).abs() <= 100 * EPS


@pytest.mark.parametrize("training", [False, True])
def test_rows_have_their_own_block_no_later_one_and_so_many(training: bool) -> None:
    module, (q, k, _) = gate().train(training), operands()
    held = module.gated(q, k, scale=SCALE).blocks.held(0, 6, 6)
    assert held.diagonal(dim1=2, dim2=3).all()
    assert not held.triu(1).any()
    assert torch.equal(held.sum(-1), torch.tensor([1, 2, 3, 3, 3, 3]).expand(2, 4, 6))


def test_evaluation_takes_the_largest_logits() -> None:
    module, (q, k, _) = gate().eval(), operands()
    gated = module.gated(q, k, scale=SCALE)
    logits = gated.logits + torch.diag(torch.full((6,), torch.inf)).nan_to_num(0, posinf=1e9)
    assert torch.equal(gated.blocks.columns[:, :, 3:], logits[:, :, 3:].topk(3).indices.sort(-1).values.int())


def test_later_tokens_do_not_reach_the_scores_of_earlier_ones() -> None:
    module, (q, k, v) = gate().eval(), operands()
    blocks = module.gated(q, k, scale=SCALE).blocks

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gated = module.gated(q, k, scale=SCALE)
        out = attention(gated.q, gated.k, v, module.form, is_causal=True, scale=SCALE, blocks=blocks)
        assert isinstance(out, Tensor)
        return out

    later = [torch.cat([x[:, :, :40], torch.randn_like(x[:, :, 40:])], 2) for x in (q, k, v)]
    before, after = run(q, k, v), run(*later)
    assert torch.equal(before[:, :, :40], after[:, :, :40])
    assert not torch.equal(before[:, :, 40:], after[:, :, 40:])


def test_a_decode_step_is_gated_at_its_place() -> None:
    module, (q, k, v) = gate().eval(), operands(1)
    gated = module.gated(q, k, scale=SCALE)
    assert gated.blocks.columns.shape == (2, 4, 1, 3)
    assert (gated.blocks.columns[..., -1] == 5).all()
    assert module(q, k, v).shape == (2, 4, 1, 5)


def test_half_precision_chooses_as_float32_does() -> None:
    module = gate().float().eval()
    q, k, v = (x.bfloat16() for x in operands())
    low, high = module.gated(q, k, scale=SCALE), module.gated(q.float(), k.float(), scale=SCALE)
    assert low.q.dtype == low.k.dtype == module(q, k, v).dtype == torch.bfloat16
    assert torch.equal(low.logits, high.logits)
    assert all(map(torch.equal, low.blocks, high.blocks))


# Gumbel top-k


def test_training_draws_blocks_as_often_as_their_weights_say() -> None:
    module = gate(blocks=2, start=0.7)
    logits = torch.randn(1, 4, 1, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(5000, 4, 1, 6)
    from dilcompile.blocks.grid import Grid

    held = module._chosen(logits, Grid(16, 16, 80, 96, 96)).held(0, 1, 6)[:, :, 0]
    assert held[..., 5].all()  # its own
    expected = (logits[0, :, 0, :5] / 0.7).softmax(-1)
    found = held[..., :5].double().mean(0)
    # Four standard deviations of a mean of 5000 draws.
    assert ((found - expected).abs() <= 4 * (expected * (1 - expected) / 5000).sqrt()).all()


def test_noise_is_of_the_seed_and_the_step_alone() -> None:
    q, k, _ = operands()
    first, other = gate(start=50.0, steps=100), gate(start=50.0, steps=100, seed=1)
    drawn = [module.gated(q, k, scale=SCALE).blocks.columns for module in (first, first, other)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    first.step()
    assert not torch.equal(drawn[0], first.gated(q, k, scale=SCALE).blocks.columns)


def test_the_temperature_falls_by_equal_factors_and_is_kept_with_the_model() -> None:
    module = gate(start=2.0, end=0.5, steps=4)
    found = []
    for _ in range(6):
        found.append(module.temperature.item())
        module.step()
    assert found == pytest.approx([2.0, 2.0 * 0.5**0.5, 1.0, 0.5**0.5, 0.5, 0.5])
    other = gate(start=2.0, end=0.5, steps=4)
    other.load_state_dict(module.state_dict())
    assert other.temperature.item() == pytest.approx(0.5)


# Learning


def test_every_parameter_receives_a_gradient_also_in_a_compiled_graph() -> None:
    q, k, v = operands()
    weight = torch.randn(2, 4, 90, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch._dynamo.reset()
    found = []
    for compiled in (False, True):
        module = gate()
        run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
        (run(q, k, v) * weight).sum().backward()
        found.append([parameter.grad for parameter in module.parameters()])
    for mine, theirs in zip(*found, strict=True):
        assert mine is not None
        assert theirs is not None
        # Of every head, and every feature of it.
        assert (mine != 0).all()
        assert (mine - theirs).abs().max() <= 1000 * EPS * mine.abs().max()


def test_a_gate_finds_planted_blocks_and_a_random_one_does_not() -> None:
    first, last, recall = example().train(80, frozen=False)
    assert last < 0.2 * first
    assert recall > 0.95
    random_first, random_last, random_recall = example().train(80, frozen=True)
    assert random_last > 0.7 * random_first
    assert random_recall < 0.4


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kv_heads": 3}, "4 heads are no multiple of 3 kv_heads"),
        ({"blocks": 0}, "blocks must be a whole number of at least 1, not 0"),
        ({"end": 0.0}, "end must be a finite temperature above 0, not 0.0"),
        ({"block": 8}, "must be a whole number of at least 16"),
    ],
)
def test_wrong_options_are_errors(options: dict[str, Any], said: str) -> None:
    with pytest.raises(DilcompileError, match=said):
        gate(**options)


def test_operands_of_another_gate_are_errors() -> None:
    q, k, v = operands()
    with pytest.raises(DilcompileError, match=r"k is \[2, 4, 90, 8\], but the gate was made for 2 heads of size 8"):
        gate()(q, q, v)
    with pytest.raises(DilcompileError, match="the first query stands at position -1, in no block"):
        gate()(q, k, v, q_offset=-1)
