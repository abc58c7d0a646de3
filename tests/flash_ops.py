"""Stand-ins for flash ops that run on CUDA devices only: under the very same schema or signature, with the true numbers.

Each refuses what the real one does: other dtypes of offsets, other layouts of the LSE, windows that are no numbers.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

# As torch 2.11 has them; the schemas of the torch that runs the tests are checked by its dispatcher.
SCHEMAS_OF_2_11 = {
    "_flash_attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
        "bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, "
        "Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    ),
    "_flash_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, "
        "SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None, "
        "SymInt? window_size_left=None, SymInt? window_size_right=None) -> (Tensor, Tensor, Tensor)"
    ),
    "_efficient_attention_forward": (
        "(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
        "SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, "
        "Tensor? seqlen_k=None, int? window_size=None) -> (Tensor, Tensor, Tensor, Tensor, SymInt, SymInt)"
    ),
    "_efficient_attention_backward": (
        "(Tensor grad_out_, Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor out, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor logsumexp, float dropout_p, Tensor philox_seed, "
        "Tensor philox_offset, int custom_mask_type, bool bias_requires_grad, *, float? scale=None, int? num_splits_key=None, "
        "int? window_size=None, bool shared_storage_dqdkdv=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "_scaled_dot_product_cudnn_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor? attn_bias, bool compute_log_sumexp, float dropout_p=0.0, "
        "bool is_causal=False, bool return_debug_mask=False, *, float? scale=None) -> "
        "(Tensor, Tensor, Tensor, Tensor, SymInt, SymInt, Tensor, Tensor, Tensor)"
    ),
    "_scaled_dot_product_cudnn_attention_backward": (
        "(Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, Tensor philox_seed, "
        "Tensor philox_offset, Tensor attn_bias, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, "
        "bool is_causal, *, float? scale=None) -> (Tensor, Tensor, Tensor)"
    ),
}

# flash_attn 2.7 to 2.8, and FlashAttention 3 below PyTorch's registry takes the same numbers through ATen.
_DENSE = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
_PACKED = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"
SIGNATURES_OF_FLASH_ATTN = {
    "_flash_attn_forward": f"q k v {_DENSE} return_softmax",
    "_flash_attn_varlen_forward": (
        f"q k v {_PACKED} dropout_p softmax_scale causal window_size_left=-1 window_size_right=-1 softcap=0.0 alibi_slopes=None "
        "return_softmax=False block_table=None leftpad_k=None seqused_k=None"
    ),
    "_flash_attn_backward": f"dout q k v out softmax_lse dq dk dv {_DENSE} deterministic rng_state=None",
    "_flash_attn_varlen_backward": f"dout q k v out softmax_lse dq dk dv {_PACKED} {_DENSE} deterministic rng_state=None",
}


def signature_of(text: str) -> inspect.Signature:
    """The signature that a row of ``SIGNATURES_OF_FLASH_ATTN`` stands for."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    made = []
    for word in text.split():
        name, _, default = word.partition("=")
        given = {"default": {"None": None, "False": False}.get(default, default)} if default else {}
        made.append(inspect.Parameter(name, kind, **given))
    return inspect.Signature(made)


# One sequence: q [R, H, D], k [K, Hkv, D], v [K, Hkv, Dv]; the window counts from the corner of the last row and key.


def visible(rows: int, keys: int, left: int, right: int, lower: bool = True) -> Tensor:
    """Bool [R, K]; -1: no limit; not ``lower``: the window counts from the first row and key."""
    shift = keys - rows if lower else 0
    gap = torch.arange(keys) - torch.arange(rows)[:, None] - shift
    seen = torch.ones(rows, keys, dtype=torch.bool)
    if left >= 0:
        seen &= gap >= -left
    if right >= 0:
        seen &= gap <= right
    return seen


def scores(q: Tensor, k: Tensor, seen: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """Float64 scores [H, R, K] and their slope."""
    k = k.double().repeat_interleave(q.shape[1] // k.shape[1], 1)
    found = torch.einsum("rhd,khd->hrk", q.double(), k) * scale
    slope = torch.ones_like(found)
    if softcap > 0:
        capped = torch.tanh(found / softcap)
        found, slope = capped * softcap, 1 - capped * capped
    return found.masked_fill(~seen, -torch.inf), slope


def forward(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0) -> tuple[Tensor, Tensor]:
    """out [R, H, Dv] and lse [H, R]; a row without keys gives 0 and, as FlashAttention 2 does, +inf."""
    found, _ = scores(q, k, seen, scale, softcap)
    lse = found.logsumexp(-1)
    weights = (found - lse.masked_fill(lse == -torch.inf, 0)[..., None]).exp()
    v = v.double().repeat_interleave(q.shape[1] // v.shape[1], 1)
    out = torch.einsum("hrk,khd->rhd", weights, v).to(q.dtype)
    return out, lse.masked_fill(lse == -torch.inf, torch.inf).to(torch.promote_types(q.dtype, torch.float32))


def backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, seen: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients from the out and the LSE that are given, whoever computed them."""
    found, slope = scores(q, k, seen, scale, softcap)
    group = q.shape[1] // k.shape[1]
    weights = (found - lse.double()[..., None]).exp()
    wide = v.double().repeat_interleave(group, 1)
    delta = (grad.double() * out.double()).sum(-1).T
    d_weights = torch.einsum("rhd,khd->hrk", grad.double(), wide)
    d_scores = weights * (d_weights - delta[..., None]) * slope * scale

    def shared(x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, group)).sum(2)

    d_q = torch.einsum("hrk,khd->rhd", d_scores, k.double().repeat_interleave(group, 1))
    d_k = shared(torch.einsum("hrk,rhd->khd", d_scores, q.double()))
    d_v = shared(torch.einsum("hrk,rhd->khd", weights, grad.double()))
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)


def spans(
    q: Tensor, k: Tensor, cum_q: Tensor | None, cum_k: Tensor | None, max_q: int, max_k: int
) -> Iterator[tuple[Any, Any, Any]]:
    """Where the rows, keys and LSE of each sequence lie."""
    if cum_q is None or cum_k is None:
        assert cum_q is None
        assert cum_k is None
        assert (q.dim(), k.dim()) == (4, 4)
        assert (max_q, max_k) == (q.shape[1], k.shape[1])
        yield from ((b, b, b) for b in range(q.shape[0]))
        return
    assert (q.dim(), k.dim()) == (3, 3)
    for cum, x, most in ((cum_q, q, max_q), (cum_k, k, max_k)):
        assert cum.dtype == torch.int32, "offsets are int32"
        assert cum.is_contiguous()
        assert int(cum[0]) == 0
        assert int(cum[-1]) == x.shape[0]
        assert int(cum.diff().min()) >= 0
        assert int(cum.diff().max()) <= most, "rows beyond the maximum are not computed"
    assert cum_q.shape == cum_k.shape
    for i in range(len(cum_q) - 1):
        rows, keys = slice(int(cum_q[i]), int(cum_q[i + 1])), slice(int(cum_k[i]), int(cum_k[i + 1]))
        yield rows, keys, (slice(None), rows)


def check_operands(*operands: Tensor) -> None:
    """What the ops ask of q, k, v."""
    for x in operands:
        assert x.stride(-1) == 1
        assert x.shape[-1] % 8 == 0, "head sizes are multiples of 8"
    assert operands[0].shape[-2] % operands[1].shape[-2] == 0


def window_of(causal: bool, left: int | None, right: int | None, rows: int, keys: int) -> Tensor:
    """As FlashAttention 2 reads its three arguments."""
    left, right = (-1 if n is None else n for n in (left, right))
    if causal:
        right = 0
    return visible(rows, keys, left if left < keys else -1, right if right < keys else -1)


class Flash:
    """ATen's ``_flash_attention_forward`` and ``_backward``; ``launches``: what was called; ``given``: how the last forward was."""

    def __init__(self) -> None:
        self.launches: list[str] = []
        self.given: dict[str, Any] = {}

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int,
        dropout_p: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None, window_size_left: int | None = None,
        window_size_right: int | None = None, softcap: float = 0.0, **rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        assert dropout_p == 0
        assert not return_debug_mask
        assert all(held is None for held in rest.values())
        self.given = {
            "cum_seq_q": cum_seq_q, "cum_seq_k": cum_seq_k, "max_q": max_q, "max_k": max_k, "is_causal": is_causal, "scale": scale,
            "window": (window_size_left, window_size_right),
        }  # fmt: skip
        self.launches.append("forward" if cum_seq_q is None else "packed forward")
        check_operands(query, key, value)
        assert scale is not None
        out = torch.full_like(query, torch.nan)
        shape = (query.shape[0], query.shape[2], query.shape[1]) if cum_seq_q is None else (query.shape[1], query.shape[0])
        lse = torch.full(shape, torch.nan, dtype=torch.promote_types(query.dtype, torch.float32))
        for rows, keys, at in spans(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
            q, k, v = query[rows], key[keys], value[keys]
            seen = window_of(is_causal, window_size_left, window_size_right, q.shape[0], k.shape[0])
            out[rows], lse[at] = forward(q, k, v, seen, scale, softcap)
        empty = torch.empty(0)
        return out, lse, empty, empty, empty

    def backward(
        self, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None, max_q: int, max_k: int, dropout_p: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None, softcap: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        assert dropout_p == 0
        self.launches.append("backward" if cum_seq_q is None else "packed backward")
        check_operands(query, key, value, out, grad_out)
        assert logsumexp.is_contiguous()
        assert rng_state.dtype == torch.uint64
        assert scale is not None
        shape = (query.shape[0], query.shape[2], query.shape[1]) if cum_seq_q is None else (query.shape[1], query.shape[0])
        assert logsumexp.shape == shape
        grads = tuple(torch.full(x.shape, torch.nan, dtype=x.dtype) for x in (query, key, value))
        for rows, keys, at in spans(query, key, cum_seq_q, cum_seq_k, max_q, max_k):
            q, k, v = query[rows], key[keys], value[keys]
            seen = window_of(is_causal, window_size_left, window_size_right, q.shape[0], k.shape[0])
            found = backward(grad_out[rows], q, k, v, out[rows], logsumexp[at], seen, scale, softcap)
            for grad, mine, where in zip(grads, found, (rows, keys, keys), strict=True):
                grad[where] = mine
        return grads[0], grads[1], grads[2]


def _efficient_seen(kind: int, window: int | None, rows: int, keys: int) -> Tensor:
    """The op's masks: none, from the first row and key, from the last; its window counts the query's own key."""
    assert kind in (0, 1, 2)
    assert window is None or (window > 0 and kind != 0), "a window needs a causal mask"
    return visible(rows, keys, -1 if window is None else window - 1, -1 if kind == 0 else 0, lower=kind == 2)


def efficient_forward(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None, max_seqlen_k: int | None, dropout_p: float, custom_mask_type: int, compute_log_sumexp: bool = False, *,
    scale: float | None = None, seqlen_k: Tensor | None = None, window_size: int | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """ATen's ``_efficient_attention_forward``."""
    assert (bias, cu_seqlens_q, cu_seqlens_k, seqlen_k, dropout_p) == (None, None, None, None, 0)
    assert compute_log_sumexp
    assert query.shape[2] == key.shape[2], "query heads can't share a key head"
    check_operands(query, key, value)
    assert scale is not None
    batch, rows, heads, _ = query.shape
    seen = _efficient_seen(custom_mask_type, window_size, rows, key.shape[1])
    found = [forward(query[b], key[b], value[b], seen, scale) for b in range(batch)]
    lse = torch.full((batch, heads, -(-rows // 32) * 32), torch.inf, dtype=found[0][1].dtype)
    lse[:, :, :rows] = torch.stack([lse for _, lse in found])
    state = torch.zeros((), dtype=torch.int64)
    return torch.stack([out for out, _ in found]), lse, state, state, rows, key.shape[1]


def efficient_backward(
    grad_out_: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, out: Tensor, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, logsumexp: Tensor, dropout_p: float, philox_seed: Tensor,
    philox_offset: Tensor, custom_mask_type: int, bias_requires_grad: bool, *, scale: float | None = None,
    num_splits_key: int | None = None, window_size: int | None = None, shared_storage_dqdkdv: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """ATen's ``_efficient_attention_backward``."""
    assert (bias, cu_seqlens_q, dropout_p, bias_requires_grad, shared_storage_dqdkdv) == (None, None, 0, False, False)
    batch, rows, heads, _ = query.shape
    assert (max_seqlen_q, max_seqlen_k) == (rows, key.shape[1])
    assert logsumexp.shape == (batch, heads, -(-rows // 32) * 32), "the LSE is padded to 32 rows"
    assert bool((logsumexp[:, :, rows:] == torch.inf).all())
    assert scale is not None
    seen = _efficient_seen(custom_mask_type, window_size, rows, key.shape[1])
    found = [
        backward(grad_out_[b], query[b], key[b], value[b], out[b], logsumexp[b, :, :rows], seen, scale) for b in range(batch)
    ]
    return (*(torch.stack(grads) for grads in zip(*found, strict=True)), torch.empty(()))


def cudnn_forward(
    query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None, compute_log_sumexp: bool, dropout_p: float = 0.0,
    is_causal: bool = False, return_debug_mask: bool = False, *, scale: float | None = None,
) -> tuple[Any, ...]:  # fmt: skip
    """ATen's ``_scaled_dot_product_cudnn_attention``: [B, H, S, D], a triangle from the first row and key, LSE [B, H, S, 1]."""
    assert (attn_bias, dropout_p, return_debug_mask) == (None, 0, False)
    assert compute_log_sumexp
    assert scale is not None
    rows, keys = query.shape[2], key.shape[2]
    seen = visible(rows, keys, -1, 0 if is_causal else -1, lower=False)
    found = [forward(*(x[b].transpose(0, 1) for x in (query, key, value)), seen, scale) for b in range(query.shape[0])]
    out, lse = torch.stack([out for out, _ in found]).transpose(1, 2), torch.stack([lse for _, lse in found])
    state = torch.zeros((), dtype=torch.int64)
    return out, lse[..., None], state, state, rows, keys, state, state, state


def cudnn_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, philox_seed: Tensor,
    philox_offset: Tensor, attn_bias: Tensor | None, cum_seq_q: Tensor | None, cum_seq_k: Tensor | None, max_q: int, max_k: int,
    dropout_p: float, is_causal: bool, *, scale: float | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """ATen's ``_scaled_dot_product_cudnn_attention_backward``."""
    assert (attn_bias, cum_seq_q, cum_seq_k, dropout_p) == (None, None, None, 0)
    assert (max_q, max_k) == (query.shape[2], key.shape[2])
    assert logsumexp.shape == (*query.shape[:3], 1)
    assert scale is not None
    seen = visible(max_q, max_k, -1, 0 if is_causal else -1, lower=False)
    found = [
        backward(*(x[b].transpose(0, 1) for x in (grad_out, query, key, value, out)), logsumexp[b, :, :, 0], seen, scale)
        for b in range(query.shape[0])
    ]
    return tuple(torch.stack(grads).transpose(1, 2) for grads in zip(*found, strict=True))


@contextmanager
def aten_on_cpu() -> Iterator[Flash]:
    """The ops of ATen as kernels of the CPU, called through torch's dispatcher and so by its own schemas."""
    flash = Flash()
    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash.forward, "CPU")
    library.impl("_flash_attention_backward", flash.backward, "CPU")
    library.impl("_efficient_attention_forward", efficient_forward, "CPU")
    library.impl("_efficient_attention_backward", efficient_backward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention", cudnn_forward, "CPU")
    library.impl("_scaled_dot_product_cudnn_attention_backward", cudnn_backward, "CPU")
    try:
        yield flash
    finally:
        library._destroy()


def _bound(name: str, flash: Flash) -> Any:
    """A function of the package, with its signature."""
    signature = signature_of(SIGNATURES_OF_FLASH_ATTN[name])

    def called(*args: Any, **kwargs: Any) -> Any:
        held = signature.bind(*args, **kwargs)
        held.apply_defaults()
        given = held.arguments
        packed = [given.get(key) for key in ("cu_seqlens_q", "cu_seqlens_k")]
        lengths = (
            (given["max_seqlen_q"], given["max_seqlen_k"])
            if packed[0] is not None
            else (given["q"].shape[1], given["k"].shape[1])
        )
        options = {"scale": given["softmax_scale"], "window_size_left": given["window_size_left"],
                   "window_size_right": given["window_size_right"], "softcap": given["softcap"]}  # fmt: skip
        for key in ("alibi_slopes", "block_table", "leftpad_k", "seqused_k", "rng_state"):
            assert given.get(key) is None
        operands = (given["q"], given["k"], given["v"])
        if "forward" in name:
            out, lse, *_ = flash.forward(*operands, *packed, *lengths, given["dropout_p"], given["causal"], False, **options)
            return out, lse, torch.empty(0), torch.empty(0)
        assert isinstance(given["deterministic"], bool)
        state = torch.zeros(2, dtype=torch.uint64)
        grads = flash.backward(
            given["dout"], *operands, given["out"], given["softmax_lse"], *packed, *lengths, given["dropout_p"], given["causal"],
            state, state, **options,
        )  # fmt: skip
        for target, grad in zip((given["dq"], given["dk"], given["dv"]), grads, strict=True):
            assert target.is_contiguous()
            target.copy_(grad)
        return torch.empty(0)

    called.__signature__ = signature  # type: ignore[attr-defined]
    return called


@contextmanager
def package_on_cpu() -> Iterator[Flash]:
    """The package ``flash_attn``."""
    flash = Flash()
    package, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
    for name in SIGNATURES_OF_FLASH_ATTN:
        setattr(interface, name, _bound(name, flash))
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    sys.modules |= {"flash_attn": package, "flash_attn.flash_attn_interface": interface}
    try:
        yield flash
    finally:
        del sys.modules["flash_attn"], sys.modules["flash_attn.flash_attn_interface"]
