"""torch.nn's own attention modules: every option of MultiheadAttention and the transformer layers, in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from finding import double  # noqa: F401  (the fixture works by being here)
from spellings import Found, agree
from torch import Tensor, nn

B, S, E, H = 2, 7, 12, 3
CAUSAL = torch.ones(S, S, dtype=torch.bool).triu(1)


class Call(nn.Module):
    """A module called in one way."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        self.module, self.call = module, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(self.module, *inputs)


def causal() -> Tensor:
    return torch.ones(S, S, dtype=torch.bool).triu(1)


def padding() -> Tensor:
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, -3:] = True
    return mask


def infinite(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(mask, float("-inf"))


def alone(**how: Any) -> Callable[..., Any]:
    return lambda m, x, *_: m(x, x, x, **how)


# name, options of the module, call, what is found: masks, or the reason of the miss.
ATTENTION: list[tuple[str, dict[str, Any], Callable[..., Any], str]] = [
    ("plain", {}, lambda m, x, p, y: m(x, x, x, need_weights=False)[0], "none"),
    ("weights", {}, lambda m, x, p, y: m(x, x, x), "the attention weights are used elsewhere too"),
    ("weights of each head", {}, lambda m, x, p, y: m(x, x, x, average_attn_weights=False), "the attention weights are returned"),
    ("weights not taken", {}, lambda m, x, p, y: m(x, x, x)[0], "none"),
    ("padding", {}, lambda m, x, p, y: m(x, x, x, key_padding_mask=p, need_weights=False)[0], "padding"),
    ("padding, weights not taken", {}, lambda m, x, p, y: m(x, x, x, key_padding_mask=p)[0], "padding"),
    ("float padding", {}, lambda m, x, p, y: m(x, x, x, key_padding_mask=infinite(p), need_weights=False)[0], "padding"),
    ("causal", {}, lambda m, x, p, y: m(x, x, x, attn_mask=causal(), need_weights=False)[0], "causal"),
    ("float causal", {}, lambda m, x, p, y: m(x, x, x, attn_mask=infinite(causal()), need_weights=False)[0], "causal"),
    ("causal and padding", {}, lambda m, x, p, y: m(x, x, x, attn_mask=causal(), key_padding_mask=p, need_weights=False)[0], "causal & padding"),
    ("causal by flag", {}, lambda m, x, p, y: m(x, x, x, attn_mask=causal(), is_causal=True, need_weights=False)[0], "causal"),
    ("a mask from outside", {}, lambda m, x, p, y: m(x, x, x, attn_mask=CAUSAL, need_weights=False)[0], "other"),
    ("a mask a head", {}, lambda m, x, p, y: m(x, x, x, attn_mask=causal().expand(B * H, S, S), need_weights=False)[0], "causal"),
    ("add_zero_attn", {"add_zero_attn": True}, lambda m, x, p, y: m(x, x, x, need_weights=False)[0], "none"),
    ("add_bias_kv", {"add_bias_kv": True}, lambda m, x, p, y: m(x, x, x, key_padding_mask=p, need_weights=False)[0], "other"),
    ("kdim and vdim", {"kdim": 8, "vdim": 8}, lambda m, x, p, y: m(x, y, y, need_weights=False)[0], "none"),
    ("without bias", {"bias": False}, lambda m, x, p, y: m(x, x, x, need_weights=False)[0], "none"),
    ("without a batch", {}, lambda m, x, p, y: m(x[0], x[0], x[0], need_weights=False)[0], "none"),
]  # fmt: skip


def _said(found: Found) -> str:
    words = [miss.reason for miss in found.misses]
    words += ["other" if "other" in site.mask.words else str(site.mask) for site in found.sites]
    return ", ".join(dict.fromkeys(words))


# torch.nn's fused paths are for batch_first without gradients; by turns in the others.
@pytest.mark.parametrize(
    ("case", "batch_first", "mode"),
    [
        pytest.param(case, batch_first, mode, id=f"{case[0]}-{'batch' if batch_first else 'sequence'} first-{mode}")
        for n, case in enumerate(ATTENTION)
        for batch_first, mode in ((True, "no_grad"), (False, "train"), (n % 2 == 0, "eval"))
    ],
)
def test_multihead_attention(case: tuple[str, dict[str, Any], Callable[..., Any], str], batch_first: bool, mode: str) -> None:
    name, options, call, golden = case
    shape = (B, S) if batch_first else (S, B)
    inputs = (torch.randn(*shape, E), padding(), torch.randn(*shape, 8))
    module = Call(nn.MultiheadAttention(E, H, batch_first=batch_first, **options), call).train(mode == "train")
    with torch.set_grad_enabled(mode != "no_grad"):
        found = agree(module, *inputs, gradients=mode != "no_grad")
    assert _said(found) == golden, name
    assert found.rewritten == (0 if golden.startswith("the attention weights are") else 1)


LAYER: list[tuple[str, Callable[..., Any], str]] = [
    ("plain", lambda m, x, p: m(x), "none"),
    ("causal", lambda m, x, p: m(x, causal()), "causal"),
    ("float causal by flag", lambda m, x, p: m(x, infinite(causal()), is_causal=True), "causal"),
    ("padding", lambda m, x, p: m(x, src_key_padding_mask=p), "padding"),
    ("causal and padding", lambda m, x, p: m(x, causal(), src_key_padding_mask=p), "causal & padding"),
]


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("case", LAYER, ids=lambda case: case[0])
def test_encoder_layer(case: tuple[str, Callable[..., Any], str], norm_first: bool, mode: str) -> None:
    name, call, golden = case
    # As above.
    batch_first = mode == "no_grad" or (mode == "eval" and norm_first)
    layer = nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=batch_first, norm_first=norm_first, activation="gelu")
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    with torch.set_grad_enabled(mode != "no_grad"):
        found = agree(Call(layer, call).train(mode == "train"), x, padding(), gradients=mode != "no_grad")
    assert (_said(found), found.rewritten) == (golden, 1), name


@pytest.mark.parametrize("train", [True, False])
def test_decoder(train: bool) -> None:
    def call(module: nn.Module, x: Tensor, keep: Tensor) -> Tensor:
        return module(x, x.flip(0) * 2, tgt_mask=infinite(causal()), tgt_is_causal=True, memory_key_padding_mask=keep)

    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2)
    found = agree(Call(decoder, call).train(train), torch.randn(B, S, E), padding())
    assert found.masks == ["causal", "padding", "causal", "padding"]
    assert [site.kind for site in found.sites] == ["self", "cross"] * 2
    assert [site.layer for site in found.sites] == [0, 0, 1, 1]
    assert found.rewritten == 4


def _encoder(**how: Any) -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2, **how)


def _decoder() -> nn.Module:
    return nn.TransformerDecoder(nn.TransformerDecoderLayer(E, H, 16, dropout=0.0, batch_first=True), 2)


# Calls at which torch.compile itself breaks inside of torch.nn: a mask without a hint whether it is causal, masks of two types.
BREAKING: list[tuple[str, Callable[[], nn.Module], Callable[..., Any], list[str]]] = [
    ("encoder, mask", _encoder, lambda m, x, p, c: m(x, c.detach()), ["other"] * 2),
    ("encoder, mask made inside", _encoder, lambda m, x, p, c: m(x, nn.Transformer.generate_square_subsequent_mask(S)), ["causal"] * 2),
    ("encoder, two types", lambda: _encoder(enable_nested_tensor=False), lambda m, x, p, c: m(x, infinite(causal()), p), ["causal & padding"] * 2),
    ("decoder, mask", _decoder, lambda m, x, p, c: m(x, x * 2, infinite(causal())), ["causal", "none"] * 2),
    ("decoder, two types", _decoder, lambda m, x, p, c: m(x, x * 2, infinite(causal()), tgt_key_padding_mask=p), ["causal & padding", "none"] * 2),
    ("attention, two types", lambda: nn.MultiheadAttention(E, H, batch_first=True), lambda m, x, p, c: m(x, x, x, p, False, infinite(causal()))[0], ["causal & padding"]),
]  # fmt: skip


@pytest.mark.parametrize("mode", ["train", "eval", "no_grad"])
@pytest.mark.parametrize("case", BREAKING, ids=lambda case: case[0])
def test_calls_that_torch_compile_breaks_at(
    case: tuple[str, Callable[[], nn.Module], Callable[..., Any], list[str]], mode: str
) -> None:
    _, maker, call, masks = case
    with torch.set_grad_enabled(mode != "no_grad"):
        found = agree(
            Call(maker(), call).train(mode == "train"),
            torch.randn(B, S, E),
            padding(),
            infinite(causal()),
            gradients=mode != "no_grad",
        )
    assert ["other" if "other" in site.mask.words else str(site.mask) for site in found.sites] == masks
    assert (found.rewritten, found.misses) == (len(masks), [])


def test_dropout_keeps_its_probability() -> None:
    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.25)

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.drop((q @ k.mT).softmax(-1)) @ v

    from spellings import compiled

    for train, p in ((True, 0.25), (False, 0.0)):
        run, found = compiled(Dropped().train(train))
        run(*(torch.randn(B, H, S, 4) for _ in range(3)))
        assert [site.dropout_p for site in found.sites] == [pytest.approx(p)]


def test_half_precision_softmax_in_float32() -> None:
    class Half(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            scores = (q @ k.mT).masked_fill(causal(), torch.finfo(q.dtype).min)
            return torch.softmax(scores.float(), -1).to(q.dtype) @ v

    for dtype in (torch.bfloat16, torch.float16):
        inputs = [torch.randn(B, H, S, 8, dtype=torch.float32).to(dtype) for _ in range(3)]
        found = agree(Half(), *inputs, tolerance=3e-2, gradients=False)
        assert (found.masks, found.sites[0].softmax_dtype, found.sites[0].dtype) == (["causal"], torch.float32, dtype)


@pytest.mark.parametrize("cut", ["cache", "shift", "none"])
def test_keys_at_other_positions_are_cross_attention(cut: str) -> None:
    """A window over positions needs the positions: a longer or shifted key axis without a causal mask has none."""

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(E, 3 * E)

        def forward(self, x: Tensor, past: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4).unbind(0)
            if cut == "cache":
                k, v = torch.cat((past, k), 2), torch.cat((past, v), 2)
            if cut == "shift":
                q, k, v = q[:, :, :-1], k[:, :, 1:], v[:, :, 1:]
            return (q @ k.mT).softmax(-1) @ v

    found = agree(Cut(), torch.randn(B, S, E), torch.randn(B, H, 5, E // H))
    assert [site.kind for site in found.sites] == ["self" if cut == "none" else "cross"]
