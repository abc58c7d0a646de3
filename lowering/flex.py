"""Blocks, chosen ones too, one window or every key by FlexAttention (Dong et al., arXiv 2412.05496), as torch.compile makes it.

The backward is FlexAttention's own too, from the output and the LSE that are there: nothing is computed again. Its operator
counts the LSE in powers of 2, torch's public function and all kernels here in powers of e.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental import _config

from dilcompile.lowering import digest
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.flex_mask import (
    BLOCK,
    Kind,
    Tables,
    buffers_of_mask,
    buffers_of_score,
    bytes_of_tables,
    refusal_of_relation,
    score_of,
    slope_of,
    tables,
    visible_of,
)

TAKES_ROW_MASKS = False
LEAST_ROWS = 1

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_LEAST_HEAD, _LARGEST_HEAD = 16, 256
# Of a BlockMask and what its function looks up, where that is kept; made for one call it may take what the queries take.
_MOST_BYTES = 1 << 28
_SCORES_AT_ONCE = 1 << 22
# Compiled functions: one a class of calls.
_KEPT = 256

Compiled = Callable[..., Any]


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``; torch's own kernel, but given lists, limits and functions of pairs."""
    return f"{digest.of_files('flex.py', 'flex_mask.py', 'band.py')}, CUDA {torch.version.cuda}"


def supports(call: Call, backward: bool) -> str | None:
    """Blocks, every key or one window, with padding, documents, softcap and a bias that is not trained."""
    if call.dropout_p > 0:
        return "dropout by position"
    if call.flat:
        return "flat scores"
    if not math.isfinite(call.scale):
        return f"scale {call.scale}"
    if backward and call.bias is not None and call.bias_grad:
        return "the gradient of a bias: FlexAttention adds it up in an order that changes from call to call"
    size = call.problem
    if 0 in (size.batch, size.q_len, size.k_len):
        return f"{size.batch} batch rows of {size.q_len} queries and {size.k_len} keys"
    return _of_device(call, backward) or refusal_of_relation(call) or _of_size(call)


def _of_size(call: Call) -> str | None:
    needed, most = bytes_of_tables(call), _MOST_BYTES
    if call.selection is not None:
        most = max(most, call.q.numel() * call.q.element_size())
    if needed <= most:
        return None
    return (
        f"its BlockMask, which has numbers for every block, there or not, would take {needed / 2**20:.0f} MiB, "
        f"more than {most >> 20}"
    )


def _of_device(call: Call, backward: bool) -> str | None:
    """What the device, its compiler and the operands' sizes rule out, or None."""
    if call.q.dtype not in _DTYPES:
        return f"the dtype is {call.q.dtype}, not float16, bfloat16 or float32"
    absent = _absent()
    if absent is not None:
        return absent
    if call.q.device.type == "cpu":
        return _of_cpu(backward)
    if call.q.device.type != "cuda":
        return f"the tensors are on {call.q.device}, neither on a CPU nor on a CUDA device"
    dims = sorted((call.problem.head_dim, call.problem.v_dim))
    if dims[0] < _LEAST_HEAD or dims[1] > _LARGEST_HEAD:
        return f"a head size ({call.problem.head_dim} and {call.problem.v_dim}) is not from {_LEAST_HEAD} to {_LARGEST_HEAD}"
    return _without_triton()


@lru_cache(maxsize=1)
def _absent() -> str | None:
    try:
        from torch.nn.attention.flex_attention import AuxRequest  # noqa: F401
    except ImportError:
        return f"torch {torch.__version__} has no FlexAttention that gives its LSE; 2.11 has"
    return None


@lru_cache(maxsize=1)
def _without_triton() -> str | None:
    return None if find_spec("triton") else "Triton, which FlexAttention is compiled with, is not installed"


def _of_cpu(backward: bool) -> str | None:
    if backward:
        return "on a CPU compiled FlexAttention has no backward"
    if not torch.cpu._is_avx2_supported():
        return "on a CPU without AVX2 FlexAttention is not compiled"
    return None


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return 0


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``. On a CPU the LSE, which compiled FlexAttention does not give there, is computed beside it."""
    with _plainly(call.q.device):
        kind, with_lse = Kind.of(call), _gives_lse(call.q.device)
        q, k, v = (x.detach() for x in (call.q, call.k, call.v))
        attend, found = _forward_of(kind, call.scale, with_lse, _class_of(call)), tables(call, kind)
        out, lse = attend(q, k, v, _lists(found, kind), buffers_of_mask(call, found), buffers_of_score(call))
        lse = _lse_by_rows(call, kind, found) if lse is None else lse
        return out, lse.to(call.score_dtype).contiguous()


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    with _plainly(call.q.device):
        kind = Kind.of(call)
        operands = [x.detach() for x in (call.q, call.k, call.v, out, lse, grad_out)]
        operands.append(torch.zeros_like(lse) if grad_lse is None else grad_lse.detach())
        gradients, found = _backward_of(kind, call.scale, _class_of(call)), tables(call, kind)
        d_q, d_k, d_v = gradients(*operands, _lists(found, kind), buffers_of_mask(call, found), buffers_of_score(call))
        return d_q, d_k, d_v, None


@contextmanager
def _plainly(device: torch.device) -> Iterator[None]:
    """What the caller has switched on would be compiled in, or compile all again, as lengths would that happen to be equal."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _config.patch(use_duck_shape=False):  # type: ignore[attr-defined]
        yield


def _gives_lse(device: torch.device) -> bool:
    return device.type != "cpu"


def _lists(found: Tables, kind: Kind) -> tuple[Tensor | None, ...]:
    """The tables of the BlockMask. Where more is hidden than they know, all blocks are partial."""
    num, some, num_full, full, *turned = found.lists
    if kind.hides_more:
        return num, some, None, None, turned[0], turned[1], None, None
    return num, some, num_full, full, *turned


def _class_of(call: Call) -> tuple[object, ...]:
    """What torch.compile makes other code for, beside the kind: so that no function is compiled more often than it may be.

    On a CPU the lengths too: the C++ code of FlexAttention in torch 2.13 takes some symbols of lengths for its own.
    """
    size, q = call.problem, call.q
    own = (q.device, q.dtype, size.heads, size.kv_heads, size.head_dim, size.v_dim)
    if q.device.type == "cpu":
        return *own, size.batch, size.q_len, size.k_len
    lengths = (size.q_len, size.k_len)
    ones = (size.batch == 1, *(length == 1 for length in lengths), *(length <= BLOCK for length in lengths))
    return *own, *ones, size.q_len < BLOCK, *(x.is_contiguous() for x in (q, call.k, call.v))


@lru_cache(maxsize=_KEPT)
def _forward_of(kind: Kind, scale: float, with_lse: bool, class_of_calls: tuple[object, ...]) -> Compiled:
    """FlexAttention for one class of calls: (q, k, v, lists, buffers of the mask and of the score) -> (out, LSE or None)."""
    from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

    visible, score = visible_of(kind), score_of(kind)
    asked = AuxRequest(lse=True) if with_lse else None

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any, score_mod: Any) -> Any:
        return flex_attention(
            q, k, v, score_mod, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_aux=asked
        )  # fmt: skip

    compiled = _compiled(attend, class_of_calls)

    def run(
        q: Tensor, k: Tensor, v: Tensor, lists: tuple[Tensor | None, ...], masks: tuple[Tensor, ...], scores: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor | None]:
        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return visible(b, h, q_idx, kv_idx, *masks)

        def score_mod(value: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return score(value, b, h, q_idx, kv_idx, *scores)

        make: Callable[..., BlockMask] = BlockMask
        mask = make((q.shape[2], k.shape[2]), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=mask_mod)
        found = compiled(q, k, v, mask, score_mod if scores else None)
        return (found[0], found[1].lse) if with_lse else (found, None)

    return run


@lru_cache(maxsize=_KEPT)
def _backward_of(kind: Kind, scale: float, class_of_calls: tuple[object, ...]) -> Compiled:
    """The gradients of q, k and v for one class of calls, by the operator that FlexAttention's autograd calls."""
    gradients = torch.compiler.allow_in_graph(_traced_backward(kind, scale))  # type: ignore[no-untyped-call]

    def compute(*operands: Any) -> Any:
        return gradients(*operands)

    return _compiled(compute, class_of_calls)


def _traced_backward(kind: Kind, scale: float) -> Compiled:
    from torch._higher_order_ops.flex_attention import flex_attention_backward
    from torch.nn.attention.flex_attention import BlockMask

    visible, score, slope = visible_of(kind), score_of(kind), slope_of(kind)
    options = {"PRESCALE_QK": False, "ROWS_GUARANTEED_SAFE": False, "BLOCKS_ARE_CONTIGUOUS": False, "WRITE_DQ": True}

    def gradients(
        q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor,
        lists: tuple[Tensor | None, ...], masks: tuple[Tensor, ...], scores: tuple[Tensor, ...],
    ) -> tuple[Tensor, ...]:  # fmt: skip
        make: Callable[..., BlockMask] = BlockMask
        mask = make((q.shape[2], k.shape[2]), *lists, BLOCK_SIZE=(BLOCK, BLOCK), mask_mod=visible)
        compute: Compiled = flex_attention_backward
        found = compute(
            q, k, v, out, lse / math.log(2), grad_out, grad_lse * math.log(2), score, slope, mask.as_tuple(), scale,
            dict(options), scores, masks,
        )  # fmt: skip
        return tuple(found[:3])

    return gradients


def _compiled(function: Compiled, class_of_calls: tuple[object, ...]) -> Compiled:
    """The function as torch.compile makes it; uncompiled it would hold all scores, so that failing is better.

    Its code is a copy: torch.compile counts how often it compiled by code, and gives up after some times.
    """
    assert isinstance(function, FunctionType)
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__, None, function.__closure__)
    on_cpu = isinstance(class_of_calls[0], torch.device) and class_of_calls[0].type == "cpu"
    return torch.compile(own, fullgraph=True, dynamic=not on_cpu)


def _lse_by_rows(call: Call, kind: Kind, held: Tables) -> Tensor:
    """The LSE of all rows, some at a time, by products over all keys."""
    size, device = call.problem, call.q.device
    visible, score, masks, scores = visible_of(kind), score_of(kind), buffers_of_mask(call, held), buffers_of_score(call)
    b, h, k = (torch.arange(n, device=device) for n in (size.batch, size.heads, size.k_len))
    keys = call.k.to(call.score_dtype).repeat_interleave(size.group, dim=1)
    step, found = max(1, _SCORES_AT_ONCE // max(1, size.batch * size.heads * size.k_len)), []
    for first in range(0, size.q_len, step):
        rows = torch.arange(first, min(first + step, size.q_len), device=device)[:, None]
        at = (b[:, None, None, None], h[:, None, None], rows, k)
        scaled = call.q[:, :, first : first + step].to(call.score_dtype) @ keys.mT * call.scale
        shown = torch.where(visible(*at, *masks), score(scaled, *at, *scores), -torch.inf)
        found.append(shown.logsumexp(-1))
    return torch.cat(found, dim=2)
