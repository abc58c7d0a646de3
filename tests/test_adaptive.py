"""Blocks that the data chooses: estimators against their definitions, attention against a softmax under the explicit mask."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from policy_sites import site
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention

import dilcompile
from dilcompile.blocks.adaptive import ESTIMATORS as NAMES
from dilcompile.blocks.adaptive import capacity
from dilcompile.blocks.grid import Grid
from dilcompile.errors import DilcompileError, FormError, KernelError
from dilcompile.forms import BlockSparse
from dilcompile.functional import Selection, attention, select_blocks
from dilcompile.lowering import flex, native, reference, select
from dilcompile.lowering.call import Call, problem_of, relation_of
from dilcompile.lowering.choice import trust
from dilcompile.lowering.estimators import ESTIMATORS
from dilcompile.lowering.estimators.operands import Operands, beside, reached
from dilcompile.lowering.selection import select_blocks as choose
from dilcompile.relation import Problem, grid_of
from dilcompile.report.rows import row_of
from dilcompile.site import MaskSpec

EPS = torch.finfo(torch.float64).eps
STATIC = {"any": [{"global": {"columns": 1}}, {"random": {"blocks": 1, "by_head": True}}]}


@pytest.fixture(autouse=True)
def _unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each class of calls is checked once; here they are compared themselves."""
    monkeypatch.setenv("DILCOMPILE_TRUST", "off")
    trust.forget()


def topk(estimator: str = "pooled", blocks: int = 3) -> dict[str, Any]:
    return {"topk": {"estimator": estimator, "blocks": blocks}}


def mass(estimator: str = "pooled", share: float = 0.6, most: int = 4) -> dict[str, Any]:
    return {"mass": {"estimator": estimator, "mass": share, "most": most}}


def operands(q_len: int, k_len: int, heads: int = 2, kv_heads: int = 1, batch: int = 2, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, q_len, 8), (kv_heads, k_len, 8), (kv_heads, k_len, 5))
    return tuple(torch.randn(batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes)


def pairs_of(blocks: Selection, size: Problem, sizes: tuple[int, int], keep: Tensor | None) -> Tensor:
    """The pairs [B, H, Sq, Sk] that lists of blocks let through, one by one."""
    seen = torch.zeros(size.batch, size.heads, size.q_len, size.k_len, dtype=torch.bool)
    columns, counts = (x.expand(size.batch, size.heads, *x.shape[2:]).tolist() for x in blocks)
    for b, h, row in product(range(size.batch), range(size.heads), range(blocks.counts.shape[2])):
        first = (size.q_offset // sizes[0] + row) * sizes[0] - size.q_offset
        for column in columns[b][h][row][: counts[b][h][row]]:
            seen[b, h, max(0, first) : first + sizes[0], column * sizes[1] : (column + 1) * sizes[1]] = True
    t, keys = _positions(size)
    seen &= (keys <= t) | (not size.is_causal)
    return seen if keep is None else seen & keep[:, None, None]


def eager(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    group = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5).masked_fill(~seen, -torch.inf)
    # A row without keys is 0, and so is its gradient.
    weights = torch.where(seen.any(-1, keepdim=True), scores, 0.0).softmax(-1) * seen
    return weights @ v.repeat_interleave(group, 1)


def rounding(terms: int, *results: Tensor) -> float:
    """What sums of so many terms of this size may be off by."""
    return 8 * EPS * terms * max([1.0, *(x.abs().max().item() for x in results)])


# Attention over the selected blocks


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_attention_is_the_softmax_over_the_selected_blocks(data: st.DataObject) -> None:
    q_len, kv_heads, group = (data.draw(st.integers(1, most)) for most in (90, 2, 2))
    k_len = q_len + data.draw(st.integers(0, 60))
    sizes = data.draw(st.sampled_from([(16, 16), (17, 17), (24, 16), (16, 40), (48, 16)]))
    chosen = data.draw(st.sampled_from([topk(name, 2) for name in NAMES] + [mass(name) for name in NAMES]))
    pattern = data.draw(st.sampled_from([chosen, {"any": [chosen, STATIC]}, {"any": [{"local": {}}, {"all": [chosen, STATIC]}]}]))
    q, k, v = operands(q_len, k_len, kv_heads * group, kv_heads, seed=data.draw(st.integers(0, 99)))
    keep = torch.rand(2, k_len, generator=torch.Generator().manual_seed(q_len)) > 0.3 if data.draw(st.booleans()) else None
    form, causal = BlockSparse(sizes, pattern), data.draw(st.booleans())

    blocks = select_blocks(q, k, form, is_causal=causal, key_padding=keep)
    size = problem_of(q, k, v, causal, None, None, k_len - q_len)
    _well_formed(blocks, size, form)
    seen = pairs_of(blocks, size, sizes, keep)
    whole = pairs_of(blocks, size, sizes, None)
    assert blocks.pairs(size, *sizes) == int(whole.sum()) <= size.batch * form.relation(size).pairs()
    if "any" in pattern:
        static = BlockSparse(sizes, {"any": [{"local": {}}, *([STATIC] if STATIC in pattern["any"] else [])]})
        held = form.relation(size).multiplicity(torch.arange(size.heads)[:, None, None], *_positions(size))
        assert (
            whole | ~(static.relation(size).multiplicity(torch.arange(size.heads)[:, None, None], *_positions(size)) > 0)
        ).all()
        assert (held >= whole).all()

    leaves = [x.requires_grad_() for x in (q, k, v)]
    expected = eager(*leaves, seen)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weight).sum(), leaves)
    for kernel in ("reference", "native"):
        found = attention(*leaves, form, is_causal=causal, key_padding=keep, kernel=kernel)
        assert isinstance(found, Tensor)
        assert (found - expected).abs().max() <= rounding(k_len, v)
        for mine, theirs in zip(torch.autograd.grad((found * weight).sum(), leaves), wanted, strict=True):
            assert (mine - theirs).abs().max() <= rounding(k_len * 8, theirs, v, q)


def _positions(size: Problem) -> tuple[Tensor, Tensor]:
    return torch.arange(size.q_len)[:, None] + size.q_offset, torch.arange(size.k_len)


def _well_formed(blocks: Selection, size: Problem, form: BlockSparse) -> None:
    """Lists ascend, stay within the capacity and the mask, and hold each row's own blocks."""
    (q_block, k_block), relation = form.sizes, form.relation(size)
    grid = grid_of(size, q_block, k_block)
    assert blocks.columns.dtype == blocks.counts.dtype == torch.int32
    assert blocks.capacity == capacity(relation.terms[0].generator.pattern, grid, size.heads)
    for row, (columns, count) in enumerate(
        zip(blocks.columns.flatten(0, 2).tolist(), blocks.counts.flatten().tolist(), strict=True)
    ):
        listed = columns[:count]
        assert count <= blocks.capacity
        assert listed == sorted(set(listed))
        i = grid.q_start // q_block + row % blocks.columns.shape[2]
        end = min((i + 1) * q_block, grid.q_stop) - 1
        assert all(0 <= column * k_block <= (end if size.is_causal else size.k_len - 1) for column in listed)
        own = {column for column in range(i * q_block // k_block, end // k_block + 1) if column < grid.columns}
        assert own <= set(listed)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([(16, 16), (17, 40), (48, 16)]),
    *(st.integers(0, 150),) * 2,
    st.integers(1, 200),
    *(st.none() | st.integers(-20, 90),) * 2,
)
def test_what_is_in_reach_on_a_device_has_pairs_by_the_grid(
    sizes: tuple[int, int], start: int, length: int, k_len: int, left: int | None, right: int | None
) -> None:
    grid = Grid(*sizes, start, start + length, k_len, left, right)
    if left is not None and right is not None and left + right < 0:
        return
    numbers, columns = torch.from_numpy(grid.rows), torch.arange(grid.columns)
    rows, places = (x.ravel() for x in np.meshgrid(grid.rows, columns.numpy(), indexing="ij"))
    some = torch.from_numpy(grid.pairs(rows, places) > 0).view(len(numbers), grid.columns)
    assert torch.equal(reached(grid, numbers), some)
    first, last = (torch.from_numpy(end)[:, None] for end in grid.beside(grid.rows))
    assert torch.equal(beside(grid, numbers), (columns >= first) & (columns <= last))


@pytest.mark.parametrize("estimator", NAMES)
def test_blocks_outside_of_the_window_are_never_taken(estimator: str) -> None:
    q, k, v = operands(150, 150)
    size = problem_of(q, k, v, True, 40, None, 0)
    blocks = choose(relation_of(BlockSparse(16, topk(estimator, 9)), size), q, k)
    assert blocks is not None
    rows, columns = torch.arange(10)[:, None], torch.arange(10)
    # All that there are: the first query of a row reaches 40 keys back.
    assert torch.equal(blocks.held(0, 10, 10), ((columns <= rows) & (columns * 16 + 15 >= rows * 16 - 40)).expand(2, 2, 10, 10))


@pytest.mark.parametrize("kernel", ["reference", "native"])
@pytest.mark.parametrize("estimator", NAMES)
def test_values_of_1_give_1(estimator: str, kernel: str) -> None:
    q, k, v = operands(100, 130)
    out = attention(q, k, torch.ones_like(v), BlockSparse(16, mass(estimator)), is_causal=True, kernel=kernel)
    assert isinstance(out, Tensor)
    assert (out - 1).abs().max() <= rounding(130)


def test_a_decode_step_selects_and_attends_from_one_query() -> None:
    q, k, v = operands(1, 150)
    for estimator in NAMES:
        form = BlockSparse(16, topk(estimator))
        blocks = select_blocks(q, k, form, is_causal=True)
        assert blocks.columns.shape == (2, 2, 1, 3)
        size = problem_of(q, k, v, True, None, None, 149)
        found = attention(q, k, v, form, is_causal=True)
        assert isinstance(found, Tensor)
        assert (found - eager(q, k, v, pairs_of(blocks, size, (16, 16), None))).abs().max() <= rounding(150, v)


def test_a_decode_step_by_vertical_slash_takes_the_blocks_of_the_largest_weight() -> None:
    q, k, _ = operands(1, 160)
    blocks = select_blocks(q, k, BlockSparse(16, topk("vertical_slash", 4)), is_causal=True)
    weights = (q @ k.mT * 8**-0.5).softmax(-1).unflatten(3, (-1, 16)).sum(-1)[:, :, 0]
    weights[..., 9] = 1  # its own
    assert torch.equal(blocks.columns[:, :, 0], weights.topk(4).indices.sort(-1).values.int())


# Estimators by their definitions


def weights_of(q: Tensor, k: Tensor, keep: Tensor, size: Problem) -> Tensor:
    """The exact weights [B, H, Sq, Sk] of a causal attention with a window of 40 before each query."""
    t, keys = _positions(size)
    seen = (keys <= t) & (t - keys <= 40) & keep[:, None, None]
    scores = (q @ k.repeat_interleave(2, 1).mT * 0.3).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num(0)


def defined(name: str, q: Tensor, k: Tensor, keep: Tensor, size: Problem) -> dict[tuple[int, ...], float]:
    """The weight (not its logarithm) of each block (b, h, row, column) of 16 x 24 positions, by loops."""
    found: dict[tuple[int, ...], float] = {}
    last = weights_of(q, k, keep, size)[:, :, -64:]
    for b in range(size.batch):
        kept = [n for n in range(size.k_len) if keep[b, n]]
        for h in range(size.heads):
            for i in range(size.q_offset // 16, -(-(size.q_offset + size.q_len) // 16)):
                rows = [t for t in range(i * 16, i * 16 + 16) if 0 <= t - size.q_offset < size.q_len]
                at = {t: q[b, h, t - size.q_offset] for t in rows}
                if name == "antidiagonal":
                    found.update({(b, h, i, j): x for j, x in enumerate(_antidiagonal(at, k[b, h // 2], keep[b], i, size))})
                    continue
                for j in range(-(-size.k_len // 24)):
                    keys = [n for n in kept if j * 24 <= n < j * 24 + 24]
                    if name == "pooled":
                        means = [sum(x) / max(1, len(x)) for x in ([*at.values()], [k[b, h // 2, n] for n in keys])]
                        found[b, h, i, j] = len(keys) * math.exp(0.3 * float(means[0] @ means[1])) if keys else 0.0
                    else:
                        found[b, h, i, j] = _vertical_slash(last[b, h], rows, j, size)
    return found


def _antidiagonal(at: dict[int, Tensor], k: Tensor, keep: Tensor, i: int, size: Problem) -> list[float]:
    """Tiles of 8 x 8: the mean score of one antidiagonal, a softmax over the tiles that are in reach, sums by block."""
    found = [0.0] * -(-size.k_len // 24)
    for top in (i * 16, i * 16 + 8):
        scores: dict[int, float] = {}
        for left in range(0, len(found) * 24, 8):
            pairs = [(top + n, left + 7 - n) for n in range(8)]
            pairs = [(t, n) for t, n in pairs if t in at and n < size.k_len and keep[n]]
            rows = [t for t in range(top, top + 8) if t in at]
            if pairs and left <= rows[-1] and left + 7 >= rows[0] - 40:
                scores[left] = math.exp(0.3 * sum(float(at[t] @ k[n]) for t, n in pairs) / len(pairs))
        for left, score in scores.items():
            found[left // 24] += score / sum(scores.values())
    return found


def _vertical_slash(last: Tensor, rows: list[int], j: int, size: Problem) -> float:
    begin = size.q_offset + size.q_len - len(last)
    by_distance = {begin - place: float(last.diagonal(place).sum()) for place in range(1 - len(last), size.k_len)}
    slashes = sum(by_distance.get(t - n, 0.0) for t in rows for n in range(j * 24, j * 24 + 24))
    return float(last[:, j * 24 : j * 24 + 24].sum()) + slashes / len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_an_estimator_is_what_its_definition_says(name: str) -> None:
    q, k, v = operands(75, 100, 2)
    keep = torch.rand(2, 100, generator=torch.Generator().manual_seed(3)) > 0.3
    keep[:, 48:72] = False
    size = replace(problem_of(q, k, v, True, 40, None, 20))
    grid = grid_of(size, 16, 24)
    scores = ESTIMATORS[name](Operands(q, k, keep, 0.3, None, grid))
    # In two parts, as long sequences are.
    found = torch.cat([scores(0, 2), scores(2, 5)], 2).exp()
    for (b, h, i, j), weight in defined(name, q, k, keep, size).items():
        mine = found[b, h, i - 1, j].item()
        assert abs(mine - weight) <= 1000 * EPS * max(1.0, weight), (b, h, i, j)


def test_the_registry_holds_the_estimators_that_policies_may_name() -> None:
    assert tuple(ESTIMATORS) == NAMES


def test_top_k_takes_the_best_and_mass_as_few_as_hold_it() -> None:
    q, k, v = operands(160, 160, 4, 2)
    size = problem_of(q, k, v, False, None, None, 0)
    scores = ESTIMATORS["pooled"](Operands(q, k, None, 8**-0.5, None, grid_of(size, 16, 16)))(0, 10)
    best = select_blocks(q, k, BlockSparse(16, topk("pooled", 4)))
    few = select_blocks(q, k, BlockSparse(16, mass("pooled", 0.5, 9)))
    capped = select_blocks(q, k, BlockSparse(16, mass("pooled", 0.99, 3)))
    shares = scores.softmax(-1)
    for b, h, i in torch.cartesian_prod(torch.arange(2), torch.arange(4), torch.arange(10)).tolist():
        order = [i, *(j for j in scores[b, h, i].argsort(descending=True).tolist() if j != i)]
        assert best.columns[b, h, i].tolist() == sorted(order[:4])
        count = int(few.counts[b, h, i])
        assert few.columns[b, h, i, :count].tolist() == sorted(order[:count])
        held = [float(shares[b, h, i, order[:n]].sum()) for n in (count - 1, count)]
        assert held[0] < 0.5 <= held[1]
        assert capped.columns[b, h, i].tolist() == sorted(order[:3])


def planted(name: str) -> tuple[Tensor, Tensor, set[tuple[int, int]]]:
    """Queries and keys [1, 1, 512, 64], float32, and the blocks of 16 in which they meet, at least 6 left of the diagonal."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 512, 64, generator=generator)
    if name == "vertical_slash":
        # One column that all look at, and one distance at which each looks back.
        sign = torch.randn(64, generator=generator)
        code = torch.randn(512 + 160, 64, generator=generator)
        k[0, 0] += code[:512]
        q[0, 0] += code[torch.arange(512) - 160] * (torch.arange(512) >= 160)[:, None] + sign
        k[0, 0, 96:112] += 0.7 * sign
        return q, k, {(i, i - 10) for i in range(12, 32)} | {(i, 6) for i in range(12, 32)}
    codes = torch.randn(32, 64, generator=generator)
    target = {i: int(torch.randint(0, i - 5, (), generator=generator)) for i in range(6, 32)}
    for i, j in target.items():
        q[0, 0, i * 16 : i * 16 + 16] += codes[j]
    k[0, 0] += codes.repeat_interleave(16, 0)
    return q, k, set(target.items())


@pytest.mark.parametrize("name", NAMES)
def test_planted_blocks_are_found(name: str) -> None:
    q, k, needles = planted(name)
    blocks = select_blocks(q, k, BlockSparse(16, topk(name, 4)), is_causal=True)
    held = blocks.held(0, 32, 32)[0, 0]
    recall = sum(bool(held[i, j]) for i, j in needles) / len(needles)
    # Four of 20 columns, the row's own among them, are 15 % at random.
    assert recall > 0.9


# Shapes come from sizes


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("pattern", [topk(name) for name in NAMES] + [{"any": [mass("antidiagonal"), STATIC]}], ids=str)
def test_nothing_waits_for_the_numbers(pattern: dict[str, Any], device: str) -> None:
    """Tensors without data can't be read back: ``item``, ``nonzero`` and tensors of two devices would raise."""
    real = operands(90, 120, 4, 2)
    wanted = select_blocks(*real[:2], BlockSparse(16, pattern), is_causal=True)
    with FakeTensorMode() if device == "cpu" else nullcontext():
        q, k = (torch.empty(x.shape, dtype=x.dtype, device=device) for x in real[:2])
        keep = torch.empty(2, 120, dtype=torch.bool, device=device)
        relation = relation_of(BlockSparse(16, pattern), problem_of(q, k, k, True, None, None, 30))
        found = choose(relation, q, k, keep)
    assert found is not None
    assert [x.shape for x in found] == [x.shape for x in wanted]
    assert found.columns.device.type == device


def test_long_sequences_are_chosen_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = operands(150, 200)
    forms = [BlockSparse(16, pattern) for pattern in (*map(topk, NAMES), {"any": [mass(), STATIC]})]
    whole = [select_blocks(q, k, form, is_causal=True) for form in forms]
    monkeypatch.setattr("dilcompile.lowering.selection._SCORES_AT_ONCE", 120)
    monkeypatch.setattr("dilcompile.lowering.estimators.antidiagonal._TILES_AT_ONCE", 500)
    for form, wanted in zip(forms, whole, strict=True):
        assert all(map(torch.equal, select_blocks(q, k, form, is_causal=True), wanted))


def test_a_million_positions_are_bounded_without_their_blocks() -> None:
    size = Problem(1, 32, 8, 1 << 20, 1 << 20, 128, 128, is_causal=True)
    relation = BlockSparse(64, {"any": [topk("pooled", 32), {"local": {"before": 3}}]}).relation(size)
    assert relation.density() < 36 * 64 / (1 << 20)


def test_the_bound_is_what_a_causal_top_k_computes() -> None:
    q, k, v = operands(160, 160, 4, 2)
    size = problem_of(q, k, v, True, None, None, 0)
    form = BlockSparse(16, topk("pooled", 4))
    blocks = select_blocks(q, k, form, is_causal=True)
    assert blocks.pairs(size, 16, 16) == 2 * form.relation(size).pairs()
    assert blocks.density(size, 16, 16) == form.relation(size).density()


# Given blocks


GIVEN = BlockSparse(16, {"any": [{"local": {}}, {"given": {"most": 2}}]})


def given_blocks() -> Selection:
    return Selection(
        torch.tensor([[[[0, 1], [0, 0], [1, 2], [0, 2]]]], dtype=torch.int32), torch.tensor([[[0, 1, 2, 2]]], dtype=torch.int32)
    )


@pytest.mark.parametrize("kernel", ["reference", "native"])
def test_given_blocks_are_attended_beside_those_of_the_pattern(kernel: str) -> None:
    q, k, v = (x.requires_grad_() for x in operands(64, 64))
    seen = torch.zeros(64, 64, dtype=torch.bool)
    for i, columns in enumerate([[0], [0, 1], [1, 2], [0, 2, 3]]):
        for column in columns:
            seen[i * 16 : i * 16 + 16, column * 16 : column * 16 + 16] = True
    expected = eager(q, k, v, seen.tril().expand(2, 2, 64, 64))
    found = attention(q, k, v, GIVEN, is_causal=True, blocks=given_blocks(), kernel=kernel)
    assert isinstance(found, Tensor)
    assert (found - expected).abs().max() <= rounding(64, v)
    wanted = torch.autograd.grad((expected**2).sum(), (q, k, v))
    for mine, theirs in zip(torch.autograd.grad((found**2).sum(), (q, k, v)), wanted, strict=True):
        assert (mine - theirs).abs().max() <= rounding(64 * 8, theirs)


def test_the_operator_says_what_it_returns() -> None:
    q, k, v = (x.requires_grad_() for x in operands(64, 64))
    arguments = (q, k, v, None, None, None, None, str(GIVEN), True, None, None, 0, 0.3, None, 0.0, None)
    lists = dict(zip(("block_columns", "block_counts"), given_blocks(), strict=True))
    torch.library.opcheck(torch.ops.dilcompile.attention.default, arguments, lists)


def test_batches_of_vmap_choose_by_themselves() -> None:
    q, k, v = (torch.stack([x, -x.flip(2)]) for x in operands(64, 64))
    form = BlockSparse(16, topk("pooled", 2))

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = attention(q, k, v, form, is_causal=True)
        assert isinstance(out, Tensor)
        return out

    one_by_one = torch.stack([run(*each) for each in zip(q, k, v, strict=True)])
    assert (torch.func.vmap(run)(q, k, v) - one_by_one).abs().max() <= rounding(64, v)


def changed(**more: Any) -> Selection:
    columns, counts = given_blocks()
    for name, value in more.items():
        if name == "column":
            columns[0, 0, 3, 1] = value
        elif name == "count":
            counts[0, 0, 2] = value
    return Selection(columns, counts)


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        (None, "`given` blocks did not come"),
        ((1, 2), "blocks must be a Selection"),
        (Selection(given_blocks().columns.long(), given_blocks().counts), r"blocks.columns must be int32, not torch.int64; cast it"),
        (Selection(given_blocks().columns, given_blocks().counts[0]), r"blocks.counts must be \[B or 1, H or 1, block rows\], not \[1, 4\]"),
        (Selection(given_blocks().columns[:, :, :3], given_blocks().counts), r"all dims but the last must agree"),
        (Selection(given_blocks().columns[:, :, :3], given_blocks().counts[:, :, :3]), r"= \[2 or 1, 2 or 1, 4, ...\], not \[1, 1, 3, 2\]"),
        (Selection(given_blocks().columns.repeat(1, 1, 1, 2), given_blocks().counts), r"more than the 2 of \{given: \{most: 2\}\}; raise `most`"),
        (changed(column=4), r"blocks.columns\[0, 0, 3, 1\] is 4, which is no block: 64 keys are 4 blocks of 16, numbers 0 to 3"),
        (changed(column=0), r"blocks.columns\[0, 0, 3\] does not ascend: 0 comes after 0"),
        (changed(count=3), r"blocks.counts\[0, 0, 2\] is 3, not from 0 to the capacity, 2"),
    ],
)  # fmt: skip
def test_wrong_blocks_are_errors_that_say_where(blocks: Any, said: str) -> None:
    with pytest.raises(DilcompileError, match=said):
        attention(*operands(64, 64), GIVEN, is_causal=True, blocks=blocks)


def test_blocks_without_a_place_are_an_error() -> None:
    for form in (BlockSparse(16, {"local": {}}), BlockSparse(16, topk())):
        with pytest.raises(FormError, match="the form has no place for them"):
            attention(*operands(64, 64), form, blocks=given_blocks())
    with pytest.raises(FormError, match="don't depend on the data"):
        select_blocks(*operands(64, 64)[:2], BlockSparse(16, {"local": {}}))


def test_queries_that_see_nothing_are_an_error_or_zero() -> None:
    q, k, v = operands(64, 64)
    alone = {"given": {"most": 2}}
    with pytest.raises(FormError, match="leaves the query at position 0"):
        attention(q, k, v, BlockSparse(16, alone), is_causal=True, blocks=given_blocks())
    out = attention(q, k, v, BlockSparse(16, alone, coverage="zero"), is_causal=True, blocks=given_blocks())
    assert isinstance(out, Tensor)
    assert not out[:, :, :16].any()
    assert out[:, :, 16:].any(-1).all()


# Who refuses, and who is asked


def call_of(form: BlockSparse, dtype: torch.dtype = torch.float32) -> Call:
    q, k, v = (x.to(dtype) for x in operands(200, 200, 4, 2))
    relation = relation_of(form, problem_of(q, k, v, True, None, None, 0))
    return Call(q, k, v, None, None, None, None, relation, 0.3, selection=choose(relation, q, k))


def test_kernels_that_list_blocks_beforehand_refuse_those_of_the_data() -> None:
    call = call_of(BlockSparse(16, topk()))
    for name, kernel in select.KERNELS.items():
        reason = select.refusal(kernel, call, False)
        able = kernel in (native, flex, reference)
        assert reason != "blocks that the data chooses" if able else reason == "blocks that the data chooses", name
    with pytest.raises(KernelError, match="blocks that the data chooses; kernel 'native' can"):
        attention(*operands(64, 64), BlockSparse(16, topk()), kernel="cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("backward", [False, True])
def test_the_numbers_of_selected_blocks_are_checked_and_right(
    dtype: torch.dtype, backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdict = trust.check(native, call_of(BlockSparse(16, topk()), dtype), backward)
    assert verdict.passes, verdict
    # Whoever leaves blocks out is found out.
    right = native.backward if backward else native.forward

    def fewer(call: Call, *rest: Any) -> Any:
        assert call.selection is not None
        return right(replace(call, selection=Selection(call.selection.columns, call.selection.counts // 2)), *rest)

    monkeypatch.setattr(native, "backward" if backward else "forward", fewer)
    assert not trust.check(native, call_of(BlockSparse(16, topk()), dtype), backward).passes


def test_documents_and_pages_are_refused() -> None:
    q, k, v = operands(64, 64)
    with pytest.raises(FormError, match="but packed documents came; give a pattern without data"):
        attention(q, k, v, BlockSparse(16, topk()), is_causal=True, cu_seqlens=torch.tensor([0, 20, 64]))
    form = BlockSparse(16, topk())
    assert "packed documents" in (form.reject(replace(site(), mask=MaskSpec(documents=True))) or "")
    assert form.reject(site()) is None
    assert "functional.attention" in (GIVEN.reject(site()) or "")
    with pytest.raises(FormError, match="chooses blocks from the data"):
        form.block_mask(Problem(1, 1, 1, 64, 64, 8, 8))


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ({"topk": {"estimator": "poled", "blocks": 2}}, "must be one of pooled, antidiagonal, vertical_slash, not 'poled'"),
        ({"topk": {"blocks": 2}}, "the option 'estimator' is missing"),
        ({"topk": {"estimator": "pooled", "blocks": 0}}, "must be a whole number of at least 1, not 0"),
        ({"mass": {"estimator": "pooled", "mass": 1.5, "most": 2}}, "must be a share above 0 and at most 1, not 1.5"),
        ({"mass": {"estimator": "pooled", "mass": 0.5}}, "the option 'most' is missing"),
        ({"given": {}}, "the option 'most' is missing"),
    ],
)
def test_wrong_options_are_named(pattern: Any, said: str) -> None:
    with pytest.raises(FormError, match=said):
        BlockSparse(16, pattern)


# From a policy


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, is_causal=True)


def policy(pattern: Any) -> dict[str, Any]:
    return {"version": 1, "rules": [{"apply": {"form": "block_sparse", "block": 16, "pattern": pattern}}]}


def test_a_compiled_model_attends_the_blocks_of_its_own_queries_and_keys() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, pattern = Causal(), {"any": [{"global": {"columns": 1}}, topk("antidiagonal", 3)]}
    run = torch.compile(model, backend="dilated", options={"policy": policy(pattern), "inner": "aot_eager"}, dynamic=True)
    for length in (150, 97, 16, 3):
        x = torch.randn(2, length, 32, dtype=torch.float64)
        q, k, v = model.project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        blocks = select_blocks(q, k, BlockSparse(16, pattern), is_causal=True)
        expected = eager(q, k, v, pairs_of(blocks, problem_of(q, k, v, True, None, None, 0), (16, 16), None))
        found = run(x)
        assert (found - expected).abs().max() <= rounding(length, v)
        mine, theirs = (torch.autograd.grad((out**2).sum(), model.project.weight)[0] for out in (found, expected))
        assert (mine - theirs).abs().max() <= rounding(length * 64, theirs)


def test_explain_says_what_is_estimated_and_that_counts_are_bounds() -> None:
    torch._dynamo.reset()
    report = dilcompile.explain(Causal(), torch.randn(1, 96, 32, dtype=torch.float64), policy=policy(topk("pooled", 3)))
    text = str(report)
    assert "approximate" in text
    assert "native" in text
    assert "the blocks are estimated from queries and keys in each call (pooled)" in " ".join(text.split())
    (decision,) = report.decisions
    assert any("at most" in note for note in decision.notes)
    assert "at most" in row_of(decision).pairs[0]
