"""Attention written out by hand, in the spellings that people use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from zoo import calls
from zoo.calls import Call, hidden
from zoo.model import Inputs, Model, Setting
from zoo.sizes import HEAD_DIM, HEADS, KV_HEADS, LAYERS, LONGEST, WIDTH

Attend = Callable[..., Tensor]
SCALE = HEAD_DIM**-0.5


class Written(nn.Module):
    """Projections around ``attend(self, q, k, v, **more)``; q, k, v and its result are [B, H, S, D]."""

    def __init__(self, attend: Attend, kv_heads: int = HEADS) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(WIDTH, HEADS * HEAD_DIM), nn.Linear(HEADS * HEAD_DIM, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * HEAD_DIM) for _ in range(2))
        self.attend, self.kv_heads = attend, kv_heads
        self.register_buffer("lower", torch.tril(torch.ones(LONGEST, LONGEST))[None, None])
        self.temperature = nn.Parameter(torch.full((HEADS, 1, 1), 10.0))
        self.drop = nn.Dropout(0.1)
        self.mix = nn.Parameter(torch.eye(HEADS) + 0.1)
        self.sink = nn.Parameter(torch.linspace(-1, 1, HEADS))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        batch, length, _ = x.shape
        q = self.q(x).view(batch, length, HEADS, HEAD_DIM).transpose(1, 2)
        k, v = (part(x).view(batch, length, self.kv_heads, HEAD_DIM).transpose(1, 2) for part in (self.k, self.v))
        out = self.attend(self, q, k, v, **more)
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))


class Stack(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], layers: int = LAYERS) -> None:
        super().__init__()
        self.layers = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: Tensor, **more: Any) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, **more)
        return x


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ k.transpose(-2, -1) * SCALE


def _above(length: int) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1)


def _folded(*parts: Tensor) -> list[Tensor]:
    return [part.reshape(-1, *part.shape[2:]) for part in parts]


def divided(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)).softmax(-1) @ v


def multiplied(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _scores(q, k).softmax(-1) @ v


def unscaled(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1)).softmax(-1) @ v


def both_scaled(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    root = HEAD_DIM**-0.25
    return ((q * root) @ (k * root).transpose(-2, -1)).softmax(-1) @ v


def mask_added(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q, k) + _above(q.shape[-2])).softmax(-1) @ v


def mask_first(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_above(q.shape[-2]) + q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)).softmax(-1) @ v


def buffer_filled(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
    scores = scores.masked_fill(self.lower[:, :, :length, :length] == 0, -math.inf)
    return self.drop(F.softmax(scores, dim=-1)) @ v


def filled_in_place(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    scores = (q @ k.transpose(-2, -1)).mul_(SCALE)
    scores.masked_fill_(torch.ones(length, length, dtype=torch.bool).triu(1), torch.finfo(scores.dtype).min)
    return F.softmax(scores, dim=-1) @ v


def chosen(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    scores = _scores(q, k)
    lowest = torch.tensor(torch.finfo(scores.dtype).min, dtype=scores.dtype)
    return F.softmax(torch.where(at[:, None] >= at[None, :], scores, lowest), dim=-1) @ v


def padding_added(self: Written, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (_scores(q, k) + (1.0 - mask[:, None, None, :]) * -10000.0).softmax(-1) @ v


def padding_filled(self: Written, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return _scores(q, k).masked_fill(mask[:, None, None, :] == 0, -math.inf).softmax(-1) @ v


def documents(self: Written, q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    same = ids[:, None, :, None] == ids[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=same)


def window(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    at = torch.arange(q.shape[-2])
    apart = at[:, None] - at[None, :]
    return _scores(q, k).masked_fill(~((apart >= 0) & (apart < 8)), -math.inf).softmax(-1) @ v


def in_float32(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.softmax(_scores(q, k), dim=-1, dtype=torch.float32).to(q.dtype) @ v


def einsum(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhid,bhjd->bhij", q, k) * SCALE
    return torch.einsum("bhij,bhjd->bhid", scores.softmax(-1), v)


def einsum_heads_last(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q * SCALE, k)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def scores_transposed(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhjd,bhid->bhji", k, q) * SCALE
    return torch.einsum("bhji,bhjd->bhid", scores.softmax(dim=-2), v)


def heads_in_batch(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    folded = _folded(q, k, v)
    scores = torch.bmm(folded[0] * SCALE, folded[1].transpose(1, 2))
    return torch.bmm(F.softmax(scores, dim=-1), folded[2]).view(q.shape)


def baddbmm(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    folded, length = _folded(q, k, v), q.shape[-2]
    empty = torch.empty(folded[0].shape[0], length, length, dtype=q.dtype)
    scores = torch.baddbmm(empty, folded[0], folded[1].transpose(-1, -2), beta=0, alpha=SCALE)
    return torch.bmm(scores.softmax(-1), folded[2]).view(q.shape)


def alibi(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, _ = q.shape
    folded = _folded(q, k, v)
    slopes = torch.tensor([2.0 ** -(i + 1) for i in range(heads)], dtype=q.dtype).repeat(batch)[:, None, None]
    bias = slopes * torch.arange(length)[None, None, :]
    scores = bias.baddbmm(folded[0], folded[1].transpose(1, 2), beta=1.0, alpha=SCALE).view(batch, heads, length, length)
    probs = (scores + _above(length)).softmax(-1).view(batch * heads, length, length)
    return torch.bmm(probs, folded[2]).view(q.shape)


def keys_repeated(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (k, v))
    return _scores(q, k).softmax(-1) @ v


def keys_expanded(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, size = k.shape
    wide = (batch, heads, HEADS // KV_HEADS, length, size)
    k, v = (part[:, :, None].expand(wide).reshape(batch, HEADS, length, size) for part in (k, v))
    return _scores(q, k).softmax(-1) @ v


def queries_grouped(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, _, length, size = q.shape
    grouped = q.view(batch, KV_HEADS, HEADS // KV_HEADS, length, size)
    scores = torch.einsum("bkgqd,bksd->bkgqs", grouped, k) * SCALE
    return torch.einsum("bkgqs,bksd->bkgqd", scores.softmax(-1), v).reshape(q.shape)


def one_key_head(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]) * SCALE
    return torch.einsum("bhqk,bkd->bhqd", scores.softmax(-1), v[:, 0])


def log_then_exp(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.log_softmax(_scores(q, k), -1).exp() @ v


def exp_over_sum(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    powers = (scores - scores.amax(-1, keepdim=True)).exp()
    return (powers / powers.sum(-1, keepdim=True)) @ v


def divided_after(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    powers = _scores(q, k).exp()
    return (powers @ v) / powers.sum(-1, keepdim=True)


def sinks(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = _scores(q, k)
    column = self.sink.view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, column], dim=-1).softmax(-1)[..., :-1] @ v


def weights_returned(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    probs = (q @ k.transpose(-2, -1) / math.sqrt(HEAD_DIM)).softmax(-1)
    return probs @ v + probs.mean(dim=(1, 2)).sum(-1)[:, None, None, None]


def heads_weighted(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (_scores(q, k).softmax(-1) * torch.linspace(0.5, 1, HEADS, dtype=q.dtype).view(1, -1, 1, 1)) @ v


def heads_mixed(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mixed = torch.einsum("bhqk,hg->bgqk", _scores(q, k), self.mix)
    return torch.einsum("bhqk,hg->bgqk", mixed.softmax(-1), self.mix) @ v


def softcapped(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (torch.tanh(_scores(q, k) / 50.0) * 50.0).softmax(-1) @ v


def cosine(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    return (scores * self.temperature).softmax(-1) @ v


def differential(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    half = HEAD_DIM // 2
    first = _scores(q[..., :half], k[..., :half]).softmax(-1)
    second = _scores(q[..., half:], k[..., half:]).softmax(-1)
    return first @ v - 0.3 * (second @ v)


def sdpa_masked(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    length = q.shape[-2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(length, length, dtype=torch.bool).tril())


def sdpa_grouped(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def blocks(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    batch, heads, length, size = q.shape
    cut = [part.reshape(batch, heads, length // 16, 16, size) for part in (q, k, v)]
    return (_scores(cut[0], cut[1]).softmax(-1) @ cut[2]).reshape(q.shape)


def autocast(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = torch.matmul(q, k.transpose(-2, -1)) * SCALE
        return torch.matmul(scores.softmax(-1), v).to(q.dtype)


def two_queries(self: Written, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    shifted = torch.roll(q, 1, 2)
    return multiplied(self, q, k, v) + multiplied(self, shifted, k, v)


class FusedProjection(nn.Module):
    """timm's way: one projection, unbound."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.o = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(x).reshape(batch, length, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        probs = ((q * SCALE) @ k.transpose(-2, -1)).softmax(-1)
        return self.o((probs @ v).transpose(1, 2).reshape(batch, length, width))


class ShiftedWindows(nn.Module):
    """Swin's way: windows of 16 tokens in the batch, a table of relative biases, a mask for those that wrap around."""

    def __init__(self, size: int = 16) -> None:
        super().__init__()
        self.qkv, self.size = nn.Linear(WIDTH, 3 * WIDTH), size
        self.table = nn.Parameter(torch.randn(2 * size - 1, HEADS) * 0.1)
        at = torch.arange(size)
        self.register_buffer("index", at[:, None] - at[None, :] + size - 1)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        count = length // self.size
        x = torch.roll(x, -self.size // 2, 1).reshape(batch * count, self.size, width)
        q, k, v = self.qkv(x).reshape(-1, self.size, 3, HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4).unbind(0)
        scores = _scores(q, k) + self.table[self.index].permute(2, 0, 1)
        region = (torch.arange(length) >= length - self.size // 2).view(count, self.size)
        apart = (region[:, :, None] != region[:, None, :]).to(x.dtype) * -100.0
        scores = scores.view(batch, count, HEADS, self.size, self.size) + apart[None, :, None]
        out = scores.view(-1, HEADS, self.size, self.size).softmax(-1) @ v
        out = out.transpose(1, 2).reshape(batch, length, width)
        return torch.roll(out, self.size // 2, 1)


def entry(name: str, attend: Attend, inputs: Call = hidden, note: str = "", kv_heads: int = HEADS) -> Model:
    return Model(f"hw_{name}", "handwritten", lambda: Stack(lambda: Written(attend, kv_heads)), inputs, ("native",), note=note)


def _masked(at: Setting) -> Inputs:
    return {**hidden(at), "mask": calls.keep(at).float()}


def _packed(at: Setting) -> Inputs:
    return {**hidden(at), "ids": (torch.arange(at.seq) // 20).expand(at.batch, -1).contiguous()}


MODELS = (
    entry("div_nomask", divided),
    entry("mul_nomask", multiplied),
    entry("noscale", unscaled),
    entry("both_scaled", both_scaled),
    entry("mul_addmask", mask_added),
    entry("addmask_commuted", mask_first),
    entry("mingpt", buffer_filled, note="a registered triangle"),
    entry("inplace_masked_fill", filled_in_place),
    entry("where_mask", chosen),
    entry("pad_1minus", padding_added, _masked),
    entry("pad_filled", padding_filled, _masked),
    entry("documents", documents, _packed),
    entry("window", window),
    entry("fp32_softmax", in_float32),
    entry("einsum", einsum),
    entry("einsum_bqhd", einsum_heads_last),
    entry("einsum_transposed_scores", scores_transposed, note="softmax over dim -2"),
    entry("bmm", heads_in_batch),
    entry("baddbmm", baddbmm),
    entry("baddbmm_alibi", alibi),
    entry("gqa_repeat_interleave", keys_repeated, kv_heads=KV_HEADS),
    entry("gqa_expand", keys_expanded, kv_heads=KV_HEADS),
    entry("gqa_five_dims", queries_grouped, kv_heads=KV_HEADS),
    entry("mqa", one_key_head, kv_heads=1),
    entry("log_softmax_exp", log_then_exp),
    entry("exp_over_sum", exp_over_sum),
    entry("divided_after", divided_after, note="the sum is divided by after the second product"),
    entry("sinks", sinks, note="a learned column, dropped after"),
    entry("return_weights", weights_returned),
    entry("head_mask", heads_weighted),
    entry("talking_heads", heads_mixed, note="heads are mixed before and after"),
    entry("softcap", softcapped),
    entry("cosine", cosine, note="a learned scale"),
    entry("differential", differential, note="two attentions subtracted"),
    entry("sdpa_bool_mask", sdpa_masked),
    entry("sdpa_gqa", sdpa_grouped, kv_heads=KV_HEADS),
    entry("blocked_local", blocks, note="blocks in a fifth dim"),
    entry("autocast_bf16", autocast),
    entry("shared_keys", two_queries),
    Model("hw_fused_qkv_unbind", "handwritten", lambda: Stack(FusedProjection), hidden, ("native",)),
    Model("hw_shifted_windows", "handwritten", lambda: Stack(ShiftedWindows), hidden, ("native",), note="windows in the batch"),
)
