"""Every public error of direct use, with its message."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dilcompile.errors import DilcompileError, FormError, KernelError
from dilcompile.functional import attention, dilated_attention


def x(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


GOOD: dict[str, Any] = {"q": x(2, 4, 6, 8), "k": x(2, 2, 6, 8), "v": x(2, 2, 6, 8), "form": "dense()"}

PAGES = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"q": x(4, 6, 8)}, "q must be [B, H, S, D], not [4, 6, 8]"),
    ({"q": x(2, 4, 6, 8, dtype=torch.int64)}, "q has dtype torch.int64; attention needs float16"),
    ({"k": x(2, 2, 0, 8), "v": x(2, 2, 0, 8)}, "k is empty: [2, 2, 0, 8]; every dim must be at least 1"),
    ({"k": x(2, 2, 6, 8, dtype=torch.bfloat16)}, "dtypes torch.float32, torch.bfloat16 and torch.float32; cast"),
    ({"v": x(2, 2, 6, 8).to("meta")}, "q, k and v are on cpu, cpu and meta; move them"),
    ({"q": x(3, 4, 6, 8)}, "batch sizes 3, 2 and 2"),
    ({"v": x(2, 2, 5, 8)}, "k is [2, 2, 6, 8] but v is [2, 2, 5, 8]"),
    ({"q": x(2, 4, 6, 4)}, "q has head size 4 but k has 8"),
    ({"q": x(2, 3, 6, 8)}, "q has 3 heads, which is not a multiple of the 2 heads of k and v"),
    ({"scale": float("nan")}, "scale must be a finite number, not nan"),
    ({"scale": float("inf")}, "scale must be a finite number, not inf"),
    ({"softcap": 0.0}, "softcap must be a finite number above 0, not 0.0"),
    ({"dropout_p": 1.0}, "dropout_p must be at least 0 and below 1, not 1.0"),
    ({"key_padding": x(2, 6)}, "key_padding must be bool (True keeps a key), not torch.float32"),
    ({"key_padding": x(2, 5).bool()}, "key_padding must be [B, Sk] = [2, 6], not [2, 5]"),
    ({"key_padding": x(2, 6).bool().to("meta")}, "key_padding is on meta but k is on cpu"),
    ({"bias": x(6, 6).bool()}, "bias must be a float tensor, not torch.bool"),
    ({"bias": x(4, 6, 5)}, "bias of shape [4, 6, 5] does not broadcast to [B, H, Sq, Sk] = [2, 4, 6, 6]"),
    ({"cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens must start at 0, not 1"),
    ({"cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens must end at the number of keys, 6, not 5"),
    ({"cu_seqlens": torch.tensor([0, 4, 2, 6])}, "must not decrease, but cu_seqlens[2]=2 comes after 4"),
    ({"cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens must be an int32 or int64 vector"),
    ({"cu_seqlens": torch.tensor([0])}, "vector of at least 2 positions, not [1]"),
    ({"cu_seqlens": torch.tensor([0, 6]), "q_offset": 2}, "queries stand at 2 to 7 and there are 6 keys"),
    ({"bias": x(6, 6).to("meta")}, "bias is on meta but k is on cpu; move it there: bias.to(k.device)"),
    ({"cu_seqlens": torch.tensor([0, 6]).to("meta")}, "cu_seqlens is on meta but k is on cpu; move it there"),
    ({"k": x(2, 2, 6, 8).to("meta")}, "q, k and v are on cpu, meta and cpu; move them"),
    ({"q": None}, "q must be a tensor [B, H, S, D], not None (NoneType); make it one"),
    ({"v": np.zeros((2, 2, 6, 8))}, "v must be a tensor [B, H, S, D], not a ndarray; make it one with torch.as_tensor"),
    ({"scale": "a"}, "scale must be a finite number, not 'a' (str); leave it out"),
    ({"scale": torch.tensor(0.5)}, "scale must be a finite number, not a tensor []; leave it out"),
    ({"scale": True}, "scale must be a finite number, not True (bool)"),
    ({"softcap": "a"}, "softcap must be a finite number above 0, not 'a' (str)"),
    ({"dropout_p": None}, "dropout_p must be at least 0 and below 1, not None (NoneType)"),
    ({"is_causal": "yes"}, "is_causal must be True or False, not 'yes' (str); use bool(...)"),
    ({"q_offset": 1.5}, "q_offset must be a whole number, not 1.5 (float); leave it out for Sk - Sq"),
    ({"kernel": 3}, "kernel must be the name of a kernel, such as 'reference', not 3 (int); leave it out"),
    ({"key_padding": [True] * 6}, "key_padding must be a bool tensor [B, Sk] (True keeps a key), not [True, True, True"),
    ({"cu_seqlens": [0, 3, 6]}, "not [0, 3, 6] (list); use torch.tensor([0, ..., 6])"),
    ({"bias": 0.5}, "bias must be a float tensor that broadcasts to [B, H, Sq, Sk], not 0.5 (float)"),
    ({"k_len": 6}, "k_len=6 (int) without block_table: keys that are not in pages are as many as k has rows"),
    (
        {"block_table": [[0], [1]]},
        "block_table must be an int32 tensor [B, most pages], not [[0], [1]] (list); use torch.tensor(",
    ),
    ({"block_table": PAGES.long(), "k_len": 6}, "block_table must be int32, not torch.int64; cast it: block_table.int()"),
    (
        {"block_table": PAGES[:1], "k_len": 6},
        "block_table must be [B, most pages] = [2, ...], not [1, 2]; give each batch row its",
    ),
    ({"block_table": PAGES[0], "k_len": 6}, "block_table must be [B, most pages] = [2, ...], not [2]"),
    ({"block_table": PAGES.to("meta"), "k_len": 6}, "block_table is on meta but k is on cpu; move it there"),
    ({"block_table": PAGES}, "k_len must be a whole number with block_table, not None (NoneType); give the length in positions"),
    ({"block_table": PAGES, "k_len": True}, "k_len must be a whole number with block_table, not True (bool)"),
    ({"block_table": PAGES, "k_len": 13}, "k_len must be from 1 to 12, what 2 pages of 6 hold, not 13; add pages to block_table"),
    ({"block_table": PAGES + 1, "k_len": 7}, "block_table[0, 1]=2 is no page: k and v have 2; where a batch row is shorter than"),
    ({"block_table": PAGES - 1, "k_len": 7}, "block_table[0, 0]=-1 is no page: k and v have 2"),
    ({"block_table": PAGES, "k_len": 7, "v": x(3, 2, 6, 8)}, "k has 2 pages but v has 3; with block_table both are [pages, Hkv"),
    ({"block_table": PAGES, "k_len": 7, "key_padding": x(2, 6).bool()}, "key_padding must be [B, Sk] = [2, 7], not [2, 6]"),
    ({"form": 3}, "form must be a Form, its text, or a mapping such as {'form': 'dense'}, not 3"),
    ({"form": {"window": 3}}, "form must be a Form, its text, or a mapping"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message[:50] for _, message in BAD])
def test_operands_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DilcompileError) as caught:
        attention(**{**GOOD, **changes})
    assert message in str(caught.value)


def test_forms_and_kernels() -> None:
    with pytest.raises(FormError, match="form 'ring' is unknown"):
        attention(**{**GOOD, "form": "ring()"})
    with pytest.raises(FormError, match="window must be a whole number"):
        attention(**{**GOOD, "form": {"form": "sliding_window", "window": -1}})
    with pytest.raises(FormError, match=r"form 'dens' is unknown \(did you mean 'dense'\?\); the forms are dense"):
        attention(**{**GOOD, "form": "dens"})
    with pytest.raises(FormError, match=r"unknown option 'sink' \(did you mean 'sinks'\?\); the options are window, sinks"):
        attention(**{**GOOD, "form": "sliding_window(window=4, sink=3)"})
    with pytest.raises(KernelError, match=r"kernel 'natve' is unknown \(did you mean 'native'\?\); the kernels are"):
        attention(**{**GOOD, "kernel": "natve"})
    with pytest.raises(FormError, match="segments\\[0\\]=9 is not a multiple"):
        dilated_attention(GOOD["q"], GOOD["k"], GOOD["v"], [9, 8], [2, 1])
    with pytest.raises(FormError, match="segments has 2 entries"):
        dilated_attention(GOOD["q"], GOOD["k"], GOOD["v"], [8, 16], [1])


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        (8, 1, "segment_lengths must be a list of whole numbers, one a branch, or 'auto', not 8 (int); write segment_lengths=["),
        (None, None, "segment_lengths must be a list of whole numbers, one a branch, or 'auto', not None (NoneType)"),
        ([8], 1, "dilation_rates must be a list of whole numbers, one a branch, or 'auto', not 1 (int); write dilation_rates=["),
        (torch.tensor([8]), [1], "segment_lengths must be a list of whole numbers, one a branch, or 'auto', not a tensor [1]"),
        ([8.0], [1], "segments[0] must be a whole number of at least 1, not 8.0"),
    ],
)
def test_branches(lengths: Any, rates: Any, message: str) -> None:
    with pytest.raises(FormError) as caught:
        dilated_attention(GOOD["q"], GOOD["k"], GOOD["v"], lengths, rates)
    assert message in str(caught.value)


def test_devices_are_form_errors() -> None:
    for changes in ({"bias": x(6, 6).to("meta")}, {"v": x(2, 2, 6, 8).to("meta")}):
        with pytest.raises(FormError, match="move"):
            attention(**{**GOOD, **changes})


def test_a_mapping_a_text_and_a_form_are_one() -> None:
    q, k, v = (torch.randn(2, heads, 6, 8) for heads in (4, 2, 2))
    by_text = attention(q, k, v, "dilated(segments=(4, 6), rates=(1, 2))", is_causal=True)
    by_mapping = attention(q, k, v, {"form": "dilated", "segments": [4, 6], "rates": [1, 2]}, is_causal=True)
    assert torch.equal(by_text, by_mapping)
    assert torch.equal(by_text, dilated_attention(q, k, v, [4, 6], [1, 2], is_causal=True))


def test_the_last_query_is_the_last_key() -> None:
    q, k, v = (torch.randn(1, heads, 6, 8) for heads in (4, 2, 2))
    whole = attention(q, k, v, "dense()", is_causal=True)
    torch.testing.assert_close(attention(q[:, :, 5:], k, v, "dense()", is_causal=True), whole[:, :, 5:])
