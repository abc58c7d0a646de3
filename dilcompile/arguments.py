"""What direct use takes, checked: types, shapes, dtypes and devices, each error with what came and the cure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dilcompile.errors import DilcompileError, FormError, KernelError

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_INTEGERS = (int, torch.SymInt)
_LONGEST = 60


def check_operands(q: Any, k: Any, v: Any, in_pages: bool = False) -> None:
    """Raise DilcompileError unless q, k and v are what ``attention`` takes; in pages, k and v are of no batch."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise DilcompileError(f"{name} must be a tensor [B, H, S, D], not {_came(x)}; make it one with torch.as_tensor")
        if x.dim() != 4:
            raise DilcompileError(f"{name} must be [B, H, S, D], not {list(x.shape)}; add the missing dims")
        if x.dtype not in _DTYPES:
            raise DilcompileError(f"{name} has dtype {x.dtype}; attention needs float16, bfloat16, float32 or float64: cast it")
        if 0 in x.shape:
            raise DilcompileError(f"{name} is empty: {list(x.shape)}; every dim must be at least 1")
    if not q.dtype == k.dtype == v.dtype and not torch.is_autocast_enabled(q.device.type):
        raise DilcompileError(f"q, k and v have dtypes {q.dtype}, {k.dtype} and {v.dtype}; cast them to one")
    if not q.device == k.device == v.device:
        raise FormError(f"q, k and v are on {q.device}, {k.device} and {v.device}; move them to one device")
    if in_pages and k.shape[0] != v.shape[0]:
        raise DilcompileError(
            f"k has {k.shape[0]} pages but v has {v.shape[0]}; with block_table both are [pages, Hkv, page size, D]"
        )
    if not in_pages and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise DilcompileError(f"q, k and v have batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}; expand them")
    if k.shape[1] != v.shape[1] or k.shape[2] != v.shape[2]:
        raise DilcompileError(f"k is {list(k.shape)} but v is {list(v.shape)}; they must agree in all dims but the last")
    if q.shape[3] != k.shape[3]:
        raise DilcompileError(f"q has head size {q.shape[3]} but k has {k.shape[3]}; they must be equal")
    if q.shape[1] % k.shape[1]:
        raise DilcompileError(
            f"q has {q.shape[1]} heads, which is not a multiple of the {k.shape[1]} heads of k and v; "
            f"each key head serves equally many query heads"
        )


def check_options(scale: Any, softcap: Any, dropout_p: Any, is_causal: Any, q_offset: Any, kernel: Any) -> None:
    """Raise DilcompileError unless the options have their types and ranges."""
    if scale is not None and not (_is_number(scale) and math.isfinite(scale)):
        raise DilcompileError(f"scale must be a finite number, not {_came(scale)}; leave it out for D ** -0.5")
    if softcap is not None and not (_is_number(softcap) and math.isfinite(softcap) and softcap > 0):
        raise DilcompileError(f"softcap must be a finite number above 0, not {_came(softcap)}; leave it out for no cap")
    if not (_is_number(dropout_p) and 0 <= dropout_p < 1):
        raise DilcompileError(f"dropout_p must be at least 0 and below 1, not {_came(dropout_p)}; leave it out for no dropout")
    if not isinstance(is_causal, bool):
        raise DilcompileError(f"is_causal must be True or False, not {_came(is_causal)}; use bool(...)")
    if q_offset is not None and (isinstance(q_offset, bool) or not isinstance(q_offset, _INTEGERS)):
        raise DilcompileError(f"q_offset must be a whole number, not {_came(q_offset)}; leave it out for Sk - Sq")
    if kernel is not None and not isinstance(kernel, str):
        raise KernelError(
            f"kernel must be the name of a kernel, such as 'reference', not {_came(kernel)}; leave it out for the fastest"
        )


def branches(name: str, given: Any) -> Any:
    """The lengths or rates of the branches, a list or a word.

    Raises:
        FormError: if it is neither.
    """
    if isinstance(given, (str, Sequence)):
        return given if isinstance(given, str) else tuple(given)
    raise FormError(f"{name} must be a list of whole numbers, one a branch, or 'auto', not {_came(given)}; write {name}=[8, 16]")


def check_pages(block_table: Any, k_len: Any, q: Tensor, k: Tensor) -> None:
    """Raise DilcompileError unless the pages of each batch row hold ``k_len`` positions.

    The numbers of the pages are looked at on a CPU only; on a device and inside a compiled graph they are the caller's promise,
    and numbers of no page are not read through.
    """
    if block_table is None:
        if k_len is not None:
            raise DilcompileError(
                f"k_len={_came(k_len)} without block_table: keys that are not in pages are as many as k has rows"
            )
        return
    if not isinstance(block_table, Tensor):
        raise DilcompileError(
            f"block_table must be an int32 tensor [B, most pages], not {_came(block_table)}; "
            f"use torch.tensor(..., dtype=torch.int32)"
        )
    if block_table.dtype != torch.int32:
        raise DilcompileError(f"block_table must be int32, not {block_table.dtype}; cast it: block_table.int()")
    if block_table.dim() != 2 or block_table.shape[0] != q.shape[0]:
        raise DilcompileError(
            f"block_table must be [B, most pages] = [{q.shape[0]}, ...], not {list(block_table.shape)}; "
            f"give each batch row its pages"
        )
    _same_device("block_table", block_table, k)
    if isinstance(k_len, bool) or not isinstance(k_len, _INTEGERS):
        raise DilcompileError(f"k_len must be a whole number with block_table, not {_came(k_len)}; give the length in positions")
    page_size, held = k.shape[2], block_table.shape[1] * k.shape[2]
    if not 1 <= k_len <= held:
        raise DilcompileError(
            f"k_len must be from 1 to {held}, what {block_table.shape[1]} pages of {page_size} hold, not {k_len}; add pages to "
            f"block_table"
        )
    if block_table.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_numbers(block_table[:, : -(-k_len // page_size)], k.shape[0])


def _check_numbers(needed: Tensor, count: int) -> None:
    wrong = ((needed < 0) | (needed >= count)).nonzero()
    if len(wrong):
        row, column = wrong[0].tolist()
        raise DilcompileError(
            f"block_table[{row}, {column}]={int(needed[row, column])} is no page: k and v have {count}; where a batch row is "
            f"shorter than k_len, name any page and hide its keys by key_padding"
        )


def check_padding(key_padding: Any, q: Tensor, k_len: int) -> None:
    """Raise DilcompileError unless the key padding fits the keys."""
    if key_padding is None:
        return
    if not isinstance(key_padding, Tensor):
        raise DilcompileError(
            f"key_padding must be a bool tensor [B, Sk] (True keeps a key), not {_came(key_padding)}; use torch.tensor(...)"
        )
    if key_padding.dtype != torch.bool:
        raise DilcompileError(f"key_padding must be bool (True keeps a key), not {key_padding.dtype}; compare it first")
    if key_padding.dim() != 2 or key_padding.shape[0] != q.shape[0] or key_padding.shape[1] != k_len:
        raise DilcompileError(f"key_padding must be [B, Sk] = [{q.shape[0]}, {k_len}], not {list(key_padding.shape)}")
    _same_device("key_padding", key_padding, q)


def check_bias(bias: Any, q: Tensor, k_len: int) -> None:
    """Raise DilcompileError unless the bias fits the scores."""
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise DilcompileError(
            f"bias must be a float tensor that broadcasts to [B, H, Sq, Sk], not {_came(bias)}; make it one with torch.as_tensor"
        )
    if not bias.is_floating_point():
        raise DilcompileError(f"bias must be a float tensor, not {bias.dtype}; a bool mask goes into key_padding or a form")
    full = (q.shape[0], q.shape[1], q.shape[2], k_len)
    fits = bias.dim() <= 4 and all(size in (1, whole) for size, whole in zip(reversed(bias.shape), reversed(full), strict=False))
    if not fits:
        raise DilcompileError(f"bias of shape {list(bias.shape)} does not broadcast to [B, H, Sq, Sk] = {list(full)}")
    _same_device("bias", bias, q)


def check_blocks(blocks: Any, q: Tensor) -> None:
    """Raise DilcompileError unless ``blocks`` are two int32 tensors that belong together; the operator looks at their numbers."""
    if blocks is None:
        return
    if not isinstance(blocks, tuple) or len(blocks) != 2 or not all(isinstance(x, Tensor) for x in blocks):
        raise DilcompileError(
            f"blocks must be a Selection(columns, counts) of two int32 tensors, not {_came(blocks)}; "
            f"dilcompile.functional.select_blocks and dilcompile.nn.BlockGate make one"
        )
    shapes = {"columns": "[B or 1, H or 1, block rows, capacity]", "counts": "[B or 1, H or 1, block rows]"}
    for (name, wanted), x in zip(shapes.items(), blocks, strict=True):
        if x.dtype != torch.int32:
            raise DilcompileError(f"blocks.{name} must be int32, not {x.dtype}; cast it: {name}.int()")
        if x.dim() != wanted.count(",") + 1:
            raise DilcompileError(f"blocks.{name} must be {wanted}, not {list(x.shape)}")
        _same_device(f"blocks.{name}", x, q)
    columns, counts = blocks
    if columns.shape[:3] != counts.shape:
        raise DilcompileError(
            f"blocks.columns is {list(columns.shape)} but blocks.counts is {list(counts.shape)}; all dims but the last must agree"
        )


def documents(cu_seqlens: Any, q: Tensor, k_len: int, offset: int) -> Tensor:
    """The document number of each key position, int64 [1, Sk].

    Raises:
        DilcompileError: if ``cu_seqlens`` doesn't hold the documents' starts and the end.
    """
    q_len = q.shape[2]
    if not isinstance(cu_seqlens, Tensor):
        raise DilcompileError(
            f"cu_seqlens must be an int32 or int64 tensor of where the documents begin, not {_came(cu_seqlens)}; "
            f"use torch.tensor([0, ..., {k_len}])"
        )
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.shape[0] < 2:
        raise DilcompileError(
            f"cu_seqlens must be an int32 or int64 vector of at least 2 positions, "
            f"not {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    _same_device("cu_seqlens", cu_seqlens, q)
    if offset < 0 or offset + q_len > k_len:
        raise DilcompileError(
            f"cu_seqlens needs every query at a key position, but queries stand at {offset} to {offset + q_len - 1} "
            f"and there are {k_len} keys; set q_offset"
        )
    # The values are known only when running; inside a compiled graph they are the caller's promise.
    if not torch.compiler.is_compiling():
        _check_boundaries(cu_seqlens.tolist(), k_len)
    positions = torch.arange(k_len, device=q.device)
    return torch.searchsorted(cu_seqlens[1:].to(positions), positions, right=True)[None]


def _check_boundaries(boundaries: list[int], k_len: int) -> None:
    if boundaries[0] != 0:
        raise DilcompileError(f"cu_seqlens must start at 0, not {boundaries[0]}; it holds document starts and the end")
    if boundaries[-1] != k_len:
        raise DilcompileError(f"cu_seqlens must end at the number of keys, {k_len}, not {boundaries[-1]}")
    for index, (start, stop) in enumerate(pairwise(boundaries)):
        if stop < start:
            raise DilcompileError(f"cu_seqlens must not decrease, but cu_seqlens[{index + 1}]={stop} comes after {start}")


def _same_device(name: str, x: Tensor, k: Tensor) -> None:
    if x.device != k.device:
        raise FormError(f"{name} is on {x.device} but k is on {k.device}; move it there: {name}.to(k.device)")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _came(value: Any) -> str:
    """A value as an error shows it: what it is where it's short, and its type."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return f"{text} ({type(value).__name__})" if len(text) <= _LONGEST and "\n" not in text else f"a {type(value).__name__}"
