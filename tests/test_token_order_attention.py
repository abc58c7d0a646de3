"""Attention along an order of a grid's tokens: the same numbers as under the mask of its blocks in the model's own order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import oracles
import pytest
import torch
from oracles import Setting
from policy_sites import site
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import dilcompile
from dilcompile.blocks.curve import Curve, OrderName
from dilcompile.blocks.fullness import fullness
from dilcompile.errors import FormError, PolicyError
from dilcompile.forms import BlockSparse, parse_form
from dilcompile.functional import select_blocks
from dilcompile.lowering import token_order
from dilcompile.policy import Policy
from dilcompile.policy.check import check
from dilcompile.relation import Problem
from dilcompile.site import ByRow, MaskSpec

NEAR = {"near": {"radius": 1}}
FORMS = [
    BlockSparse(16, NEAR, order="none", grid=(16, 6), lead=2),
    BlockSparse(16, NEAR, order="row", grid=(16, 6), lead=2),
    BlockSparse(16, {"any": [{"local": {"before": 1}}, {"near": {"radius": 0}}]}, order="morton", grid=(16, 6), lead=1),
    BlockSparse((16, 24), {"any": [{"strided": {"stride": 2}}, {"local": {}}]}, order="hilbert", grid=(16, 6)),
    BlockSparse(16, NEAR, order="hilbert", grid=(16, 6), lead=3),
    BlockSparse(16, {"near": {"radius": [0, 1, 1]}}, order="hilbert", grid=(2, 6, 8)),
]
HEADS, KV_HEADS, DIM = 4, 2, 8


def mask(form: BlockSparse) -> Tensor:
    """The pairs of tokens [1, H, S, S], one by one."""
    length = len(form.curve or ())
    return torch.from_numpy(oracles.counts(form, Setting(HEADS, KV_HEADS, length, length)))[None].bool()


def operands(form: BlockSparse, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Not contiguous: every second feature of what lies in memory as [B, H, S, D]."""
    torch.manual_seed(0)
    length = len(form.curve or ())
    made = (torch.randn(2, heads, length, 2 * DIM, dtype=dtype)[..., ::2] for heads in (HEADS, KV_HEADS, KV_HEADS))
    return tuple(x.requires_grad_() for x in made)


def biases(length: int) -> Iterator[Tensor]:
    for shape in ((HEADS, length, length), (2, 1, 1, length), (length, 1)):
        yield torch.randn(shape, dtype=torch.float64, requires_grad=True)


def assert_same(form: BlockSparse, bias: Tensor | None = None, padding: Tensor | None = None, kernel: str | None = None) -> None:
    q, k, v = operands(form)
    out, lse = dilcompile.functional.attention(
        q, k, v, form, bias=bias, key_padding=padding, softcap=5.0, return_lse=True, kernel=kernel
    )
    assert mask(form).double().mean() < 0.8
    seen = mask(form) if padding is None else mask(form) & padding[:, None, None]
    expected, expected_lse = oracles.softmax(q, k, v, seen.double(), DIM**-0.5, 5.0, bias)
    inputs = [q, k, v] + ([] if bias is None else [bias])
    weight, of_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    grads, expected_grads = (
        torch.autograd.grad((one * weight).sum() + (other * of_lse).sum(), inputs)
        for one, other in ((out, lse), (expected, expected_lse))
    )
    # Roundings of float64 in sums over at most 99 tokens, 2 batch rows and 4 heads.
    for found, wanted in zip((out, lse, *grads), (expected, expected_lse, *expected_grads), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_numbers_are_those_of_the_mask_in_the_models_order(form: BlockSparse) -> None:
    assert parse_form(str(form)) == form
    assert_same(form)
    assert_same(form, kernel="reference")
    padding = torch.rand(2, len(form.curve or ())) > 0.2
    padding[:, :3] = True
    for bias in biases(len(form.curve or ())):
        assert_same(form, bias, padding)


CHOSEN: list[dict[str, Any]] = [
    {"any": [{"global": {"columns": 1}}, {"topk": {"estimator": "antidiagonal", "blocks": 2}}]},
    {"mass": {"estimator": "pooled", "mass": 0.4, "most": 3}},
]


@pytest.mark.parametrize("pattern", CHOSEN, ids=str)
@pytest.mark.parametrize("order", ["hilbert", "row"])
def test_blocks_are_chosen_along_the_curve(order: OrderName, pattern: dict[str, Any]) -> None:
    """From the rows in the order in which blocks count them; what these show, in the model's order, is what is attended."""
    form = BlockSparse(16, pattern, order=order, grid=(16, 6), lead=3)
    q, k, v = operands(form)
    assert form.curve is not None
    tokens, back = torch.tensor(form.curve.tokens), torch.tensor(form.curve.positions)
    padding = torch.rand(2, 99, generator=torch.Generator().manual_seed(2)) > 0.2
    along = (x.index_select(2, tokens) for x in (q, k))
    blocks = select_blocks(*along, BlockSparse(16, pattern), key_padding=padding[:, tokens])
    assert all(map(torch.equal, blocks, select_blocks(q, k, form, key_padding=padding)))
    held = blocks.held(0, 7, 7).repeat_interleave(16, 2).repeat_interleave(16, 3)[:, :, :99, :99]
    seen = held[:, :, back][..., back] & padding[:, None, None]
    expected, expected_lse = oracles.softmax(q, k, v, seen.double(), DIM**-0.5)
    weight, of_lse = torch.randn_like(expected), torch.randn_like(expected_lse)
    for kernel in ("native", "reference"):
        found = dilcompile.functional.attention(q, k, v, form, key_padding=padding, return_lse=True, kernel=kernel)
        mine, wanted = (
            torch.autograd.grad((out * weight).sum() + (lse * of_lse).sum(), (q, k, v), retain_graph=True)
            for out, lse in (found, (expected, expected_lse))
        )
        # Roundings of float64 in sums over at most 99 tokens, 2 batch rows and 4 heads.
        for one, other in zip((*found, *mine), (expected, expected_lse, *wanted), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kernel", ["native", "cpu", "reference"])
def test_every_kernel_computes_in_single_precision(kernel: str) -> None:
    form = FORMS[4]
    q, k, v = operands(form, torch.float32)
    out = dilcompile.functional.attention(q, k, v, form, kernel=kernel)
    expected, _ = oracles.softmax(q.double(), k.double(), v.double(), mask(form).double(), DIM**-0.5)
    dense = scaled_dot_product_attention(q, k, v, mask(form), enable_gqa=True)
    error, usual = ((x.double() - expected).abs().max() for x in (out, dense))
    assert error <= 2 * usual + torch.finfo(torch.float32).eps


def _forgets_the_way_back(patch: pytest.MonkeyPatch) -> None:
    found = token_order._indices
    patch.setattr(token_order, "_indices", lambda *at: (found(*at)[0], torch.arange(len(found(*at)[0]))))


def _takes_the_inverse(patch: pytest.MonkeyPatch) -> None:
    found = token_order._indices
    patch.setattr(token_order, "_indices", lambda *at: found(*at)[::-1])


def _leaves_the_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(token_order, "_square", lambda bias, order: bias)


@pytest.mark.parametrize("mutate", [_forgets_the_way_back, _takes_the_inverse, _leaves_the_bias])
def test_mutations_are_seen(mutate: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMS[4]
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(form, next(biases(len(form.curve or ()))))


@pytest.mark.parametrize("form", FORMS[2:], ids=str)
def test_values_of_one_and_heads_and_keys_in_the_models_numbering(form: BlockSparse) -> None:
    q, k, v = (x.detach().clone() for x in operands(form))
    out = dilcompile.functional.attention(q, k, v, form)
    assert isinstance(out, Tensor)
    ones = dilcompile.functional.attention(q, k, torch.ones_like(v), form)
    torch.testing.assert_close(ones, torch.ones_like(out), rtol=0, atol=1e-14)
    swapped = dilcompile.functional.attention(q.flip(0), k.flip(0), v.flip(0), form)
    assert torch.equal(swapped, out.flip(0))
    seen = mask(form)[0]
    if bool((seen == seen[:1]).all()):
        order = torch.tensor([2, 3, 0, 1])
        permuted = dilcompile.functional.attention(q[:, order], k.flip(1), v.flip(1), form)
        torch.testing.assert_close(permuted, out[:, order], rtol=0, atol=1e-14)
    for token in (0, 7, v.shape[2] - 1):
        moved = v.clone()
        moved[:, :, token] += 1
        changed = (dilcompile.functional.attention(q, k, moved, form) != out).any(-1)
        assert torch.equal(changed, seen[None, :, :, token].expand_as(changed))


def test_dropout_draws_the_same_in_every_kernel_and_in_the_backward() -> None:
    form, seed = FORMS[3], 5
    q, k, v = operands(form)
    found = []
    for kernel in ("native", "reference"):
        torch.manual_seed(seed)
        out = dilcompile.functional.attention(q, k, v, form, dropout_p=0.4, kernel=kernel)
        assert isinstance(out, Tensor)
        # Values enter linearly, so that the gradient knows the output.
        (grad,) = torch.autograd.grad(out.sum(), v)
        assert (grad * v).sum().item() == pytest.approx(out.sum().item(), abs=1e-10)
        found.append(out)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def image_model(attention: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=64, patch_size=4,
        attn_implementation=attention,
    )  # fmt: skip
    made: torch.nn.Module = transformers.ViTModel(config, add_pooling_layer=False)
    return made.double().eval()


def video_model(attention: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.VideoMAEConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32, image_size=64, patch_size=4,
        num_frames=8, tubelet_size=2, attn_implementation=attention,
    )  # fmt: skip
    made: torch.nn.Module = transformers.VideoMAEModel(config)
    return made.double().eval()


MODELS: dict[str, tuple[Callable[[str], torch.nn.Module], tuple[int, ...], dict[str, Any]]] = {
    "image": (image_model, (2, 3, 64, 64), {"block": 16, "grid": [16, 16], "lead": 1, "pattern": {"near": {"radius": 4}}}),
    "video": (video_model, (1, 8, 3, 64, 64), {"block": 64, "grid": [4, 16, 16], "pattern": {"near": {"radius": [3, 4, 4]}}}),
}


def policy(options: dict[str, Any], order: str = "hilbert") -> dict[str, Any]:
    apply = {"form": "block_sparse", "order": order, **options}
    return {"version": 1, "defaults": {"fallback": {"unsupported": "error"}}, "rules": [{"name": "g", "apply": apply}]}


def attended(seen: Tensor) -> Callable[..., tuple[Tensor, None]]:
    """Attention of transformers under a mask of all pairs."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, scaling: float, **__: Any) -> tuple[Tensor, None]:
        return scaled_dot_product_attention(q, k, v, seen, scale=scaling).transpose(1, 2), None

    return attend


def mask_of_blocks(curve: Curve, radius: int | list[int], block: int) -> Tensor:
    """The pairs of tokens [S, S] in the blocks of near ones."""
    seen = torch.zeros(len(curve), len(curve), dtype=torch.bool)
    for i, j in oracles.near_blocks(curve, radius, block, block):
        seen[i * block : (i + 1) * block, j * block : (j + 1) * block] = True
    at = torch.from_numpy(curve.positions.copy())
    return seen[at][:, at]


@pytest.mark.parametrize(("name", "order"), [("image", "hilbert"), ("image", "morton"), ("video", "hilbert")])
def test_a_compiled_model_is_the_model_under_the_mask_of_its_blocks(name: str, order: OrderName) -> None:
    transformers = pytest.importorskip("transformers")
    make, shape, options = MODELS[name]
    torch._dynamo.reset()
    torch.manual_seed(0)
    said = policy(options, order=order)
    curve = Curve(order, tuple(options["grid"]), options.get("lead", 0))
    radius, block = options["pattern"]["near"]["radius"], options["block"]
    seen = mask_of_blocks(curve, radius, block)
    assert 0.1 < seen.double().mean() < 0.7
    transformers.AttentionInterface.register("under_blocks", attended(seen))
    model, masked = make("sdpa"), make("under_blocks")
    masked.load_state_dict(model.state_dict())
    run = torch.compile(model, backend="dilated", options={"policy": said, "inner": "eager"}, fullgraph=True)
    pixels = torch.rand(shape, dtype=torch.float64)
    found, expected, dense = (each(pixels).last_hidden_state for each in (run, masked, model))
    assert (found - dense).abs().max() > 1e-3
    # Roundings of float64 through two layers.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    weight = torch.randn_like(found)
    grads = [torch.autograd.grad((x * weight).sum(), tuple(each.parameters()), allow_unused=True) for x, each in ((found, model), (expected, masked))]  # fmt: skip
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
    # In the order of rows there are more blocks that hold the same neighbours, and fewer full ones.
    reach = tuple(radius) if isinstance(radius, list) else radius
    here, rows = (fullness(one, reach, block) for one in (curve, Curve("row", curve.grid, curve.lead)))
    assert here.blocks < rows.blocks
    assert here.full > rows.full


def test_the_report_names_order_and_grid() -> None:
    make, shape, options = MODELS["image"]
    report = dilcompile.explain(make("sdpa"), torch.rand(shape, dtype=torch.float64), policy=policy(options))
    (form,) = {str(decision.form) for decision in report.decisions}
    assert form.endswith("order='hilbert', grid=(16, 16), lead=1)")
    assert form.split("(")[0] in str(report)
    assert "order='hilbert'" in " ".join(str(report).split())
    wrong = dilcompile.explain(make("sdpa"), torch.rand(shape, dtype=torch.float64), policy=policy({**options, "lead": 0}))
    assert "the sequence has 257 tokens, the grid [16, 16] 256" in " ".join(str(wrong).split())


OPTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "order alone": ({"order": "hilbert"}, "order 'hilbert' is one of the tokens of a grid: give `grid`"),
    "unknown order": ({"order": "hilbrt", "grid": (8, 8)}, "order must be one of none, row, hilbert, morton, not 'hilbrt'"),
    "near alone": ({"pattern": {"any": [{"near": {"radius": 1}}]}}, "pattern near is about places in a grid of tokens: give"),
    "lead alone": ({"lead": 1}, "lead 1 tokens stand in front of a grid: give `grid`"),
    "lead": ({"lead": -1, "grid": (8, 8)}, "lead must be a whole number of at least 0, not -1"),
    "grid alone": ({"grid": (8, 8)}, "grid is of no use without an order or the pattern `near`"),
    "one axis": ({"order": "row", "grid": (64,)}, "grid must be the two or three sizes of the grid of tokens, not [64]"),
    "no size": ({"order": "row", "grid": (8, 0)}, "grid[1] must be a whole number of at least 1, not 0"),
    "radii": ({"pattern": {"near": {"radius": [1, 1, 1]}}, "grid": (8, 8)}, "near has 3 radii, the grid [8, 8] has 2 axes"),
    "radius": ({"pattern": {"near": {"radius": [1, -1]}}, "grid": (8, 8)}, "near.radius[1] must be a whole number of at least 0"),
    "block": (
        {"order": "hilbert", "grid": (14, 14)},
        "block 16 does not divide the 196 tokens of the grid [14, 14]; sizes that do: 28, 49, 98, 196",
    ),
    "block of keys": (
        {"block": (49, 64), "order": "hilbert", "grid": (14, 14)},
        "block 64 does not divide the 196 tokens of the grid [14, 14]; sizes",
    ),
    "larger": (
        {"block": 128, "order": "hilbert", "grid": (8, 8)},
        "block 128 is larger than the grid [8, 8] of 64 tokens; sizes that do: 16, 32, 64",
    ),
    "distances": (
        {"order": "row", "grid": (8, 8), "lead": 1, "pattern": {"topk": {"estimator": "vertical_slash", "blocks": 2}}},
        "estimator vertical_slash looks at distances along the sequence, which order 'row' leaves: estimate by pooled or antidiagonal",
    ),
    "prime": ({"order": "hilbert", "grid": (1, 257)}, "tokens of the grid [1, 257]; no size from 16 to 256 does"),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_that_do_not_fit_say_so(name: str) -> None:
    options, said = OPTIONS[name]
    with pytest.raises(FormError) as caught:
        BlockSparse(**{"block": 16, "pattern": {"local": {}}, **options})
    assert said in str(caught.value)


PLAIN = Problem(1, 4, 4, 64, 64, 8, 8)
GRID = BlockSparse(16, {"local": {"before": 1}}, order="hilbert", grid=(8, 8))
SIZES: dict[str, tuple[Problem, str]] = {
    "length": (Problem(1, 4, 4, 65, 65, 8, 8), "the sequence has 65 tokens, the grid [8, 8] 64; give the grid of the model's tokens"),
    "cross": (Problem(1, 4, 4, 64, 32, 8, 8), "64 queries from position 0 on and 32 keys are not the tokens of one grid [8, 8]"),
    "offset": (Problem(1, 4, 4, 64, 64, 8, 8, q_offset=3), "64 queries from position 3 on"),
    "causal": (Problem(1, 4, 4, 64, 64, 8, 8, is_causal=True), "a causal mask or a window runs along the sequence, which order"),
    "window": (Problem(1, 4, 4, 64, 64, 8, 8, window_left=3), "which order 'hilbert' leaves; take order 'none'"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_and_masks_that_do_not_fit_say_so(name: str) -> None:
    problem, said = SIZES[name]
    GRID.relation(PLAIN)
    with pytest.raises(FormError) as caught:
        GRID.relation(problem)
    assert said in str(caught.value)


MASKS: dict[str, tuple[MaskSpec, str]] = {
    "causal": (MaskSpec(causal=True), "its mask (causal) runs along the sequence, which order 'hilbert' leaves; take order 'none'"),
    "window": (MaskSpec(left=3), "its mask (window)"),
    "rows": (MaskSpec(by_row=(ByRow("chunk", "q // 4 == k // 4"),)), "its mask (chunk)"),
    "documents": (MaskSpec(documents=True), "its sequences are packed documents, not one grid [8, 8] of tokens"),
    "offset": (MaskSpec(runtime_offset=True), "its queries do not stand beside the first keys"),
}


@pytest.mark.parametrize("name", MASKS)
def test_sites_whose_mask_is_one_of_the_sequence_are_refused(name: str) -> None:
    mask, said = MASKS[name]
    assert said in (GRID.reject(site(mask=mask)) or "")
    assert GRID.reject(site(mask=MaskSpec(key_padding=True))) is None


def test_an_order_that_moves_nothing_takes_a_causal_site() -> None:
    form = BlockSparse(16, {"near": {"radius": 1}}, order="row", grid=(8, 8))
    assert form.reject(site()) is None
    q, k, v = (torch.randn(1, HEADS, 64, DIM, dtype=torch.float64) for _ in range(3))
    seen = torch.from_numpy(oracles.counts(form, Setting(HEADS, HEADS, 64, 64, causal=True)))[None].bool()
    out = dilcompile.functional.attention(q, k, v, form, is_causal=True)
    torch.testing.assert_close(out, scaled_dot_product_attention(q, k, v, seen), rtol=0, atol=1e-13)
    # Its blocks are runs of the sequence, as those of a BlockMask are.
    assert form.block_mask(Problem(1, 4, 4, 64, 64, 8, 8, is_causal=True)).seq_lengths == (64, 64)


def test_calls_with_operands_of_the_sequence_are_refused() -> None:
    q, k, v = (torch.randn(1, 2, 64, 8) for _ in range(3))
    with pytest.raises(FormError, match=r"packed documents are not one grid \[8, 8\]"):
        dilcompile.functional.attention(q, k, v, GRID, cu_seqlens=torch.tensor([0, 20, 64]))
    limits = torch.stack([torch.zeros(1, 64), torch.full((1, 64), 64)]).long()
    with pytest.raises(FormError, match="a mask by row counts along the sequence"):
        torch.ops.dilcompile.attention(
            q, k, v, None, None, None, None, str(GRID), False, None, None, 0, 1.0, None, 0.0, None, None, limits
        )
    with pytest.raises(FormError, match="a BlockMask has runs of the sequence"):
        GRID.block_mask(PLAIN)


def test_a_query_without_keys_is_named_by_its_token() -> None:
    form = BlockSparse(16, {"fixed": {"stride": 4}}, order="hilbert", grid=(8, 8))
    form.relation(PLAIN)
    holes = BlockSparse(16, {"explicit": {"starts": [0, 1, 1, 2, 3], "columns": [0, 0, 0]}}, order="hilbert", grid=(8, 8))
    assert holes.curve is not None
    with pytest.raises(FormError, match=rf"position 16 \(along the curve; token {holes.curve.tokens[16]}, block row 1\)"):
        holes.relation(PLAIN)


def test_a_policy_reads_orders_and_says_where_they_are_wrong() -> None:
    text = """
version: 1
rules:
  - apply: {form: block_sparse, block: 28, pattern: {near: {radius: 2}}, order: hilbert, grid: [14, 14], lead: 1}
"""
    built = Policy.from_yaml(text).rules[0].apply.build()
    assert built == BlockSparse(28, {"near": {"radius": 2}}, order="hilbert", grid=(14, 14), lead=1)
    with pytest.raises(PolicyError, match=r"<text>:4:\d+: rules\[0\].apply.block: 16 does not divide the 196 tokens"):
        Policy.from_yaml(text.replace("28", "16"))
    with pytest.raises(PolicyError, match="expected 'none', 'row', 'hilbert' or 'morton', got 'hilbrt'"):
        Policy.from_yaml(text.replace("hilbert", "hilbrt"))
    (found,) = check(Policy.from_yaml(text.replace("- apply", "- match: {causal: true}\n    apply")))
    assert "its mask (causal) runs along the sequence" in str(found)
