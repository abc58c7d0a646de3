"""Keys and values in pages of a pool: the numbers of gathered ones, on the CPU, and what is refused. See ``test_triton`` for the GPU's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from dilcompile.errors import DilcompileError, KernelError
from dilcompile.forms import Dense, Dilated, Form, SlidingWindow
from dilcompile.functional import attention
from dilcompile.lowering import reference
from dilcompile.lowering.select import KERNELS

LENGTH, PAGE = 29, 4
FORMS = [Dense(), SlidingWindow(6, sinks=2), Dilated([8, 16], [1, 2], output_scale="1/k")]


def drawn(q_len: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, the keys and values of each batch row, and the same in a pool: (q, k, v, pool of k, pool of v, table)."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 4, q_len, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(3, 2, LENGTH, dim, generator=generator, dtype=torch.float64) for dim in (8, 5))
    count = -(-LENGTH // PAGE)
    table = torch.randperm(40, generator=generator)[: 3 * count].view(3, count).int()
    pools = [torch.full((40, 2, PAGE, x.shape[3]), torch.nan, dtype=x.dtype) for x in (k, v)]
    for b in range(3):
        for position in range(LENGTH):
            for pool, x in zip(pools, (k, v), strict=True):
                pool[table[b, position // PAGE], :, position % PAGE] = x[b, :, position]
    return q, k, v, pools[0], pools[1], table


@pytest.mark.parametrize("q_len", [1, 7])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_pages_are_where_the_table_says(form: Form, q_len: int) -> None:
    q, k, v, pool_k, pool_v, table = drawn(q_len)
    keep = torch.arange(LENGTH) < torch.tensor([[LENGTH], [3], [17]])
    for options in ({}, {"key_padding": keep, "softcap": 2.0}, {"cu_seqlens": torch.tensor([0, 20, LENGTH])}):
        asked: dict[str, Any] = {"is_causal": True, "return_lse": True, **options}
        found = attention(q, pool_k, pool_v, form, block_table=table, k_len=LENGTH, **asked)
        for mine, exact in zip(found, attention(q, k, v, form, kernel="reference", **asked), strict=True):
            assert torch.equal(mine, exact)


def test_another_page_is_noticed() -> None:
    q, k, v, pool_k, pool_v, table = drawn()
    wrong = table.clone()
    wrong[0, 1] = table[0, 2]
    found = attention(q, pool_k, pool_v, "dense()", block_table=wrong, k_len=LENGTH)
    exact = attention(q, k, v, "dense()")
    assert not torch.allclose(found[0], exact[0])
    torch.testing.assert_close(found[1:], exact[1:])


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in ("reference", "triton")])
def test_kernels_that_read_no_pages_say_so(name: str) -> None:
    q, _, _, pool_k, pool_v, table = drawn()
    with pytest.raises(KernelError, match=f"kernel '{name}' can't .* keys and values in pages; kernel 'reference' can"):
        attention(q, pool_k, pool_v, "dense()", block_table=table, k_len=LENGTH, kernel=name)


def test_numbers_of_no_page_are_not_read_through_by_the_gather() -> None:
    """Where the numbers are not checked (on a device), hidden keys may have any."""
    q, k, v, pool_k, pool_v, table = drawn()
    keep = torch.arange(LENGTH) < 16
    keep = keep.expand(3, -1)
    table[:, 4:] = torch.tensor([-7, 1 << 30, 40, -1], dtype=torch.int32)
    arguments = (None, None, None, "dense()", False, None, None, LENGTH - 1, 0.3, None, 0.0, None)
    pool_k, pool_v = pool_k.nan_to_num(), pool_v.nan_to_num()
    out, _ = torch.ops.dilcompile.attention(q, pool_k, pool_v, keep, *arguments, pages=table, k_len=LENGTH)
    torch.testing.assert_close(out, torch.ops.dilcompile.attention(q, k, v, keep, *arguments)[0])


def test_there_is_no_gradient() -> None:
    q, _, _, pool_k, pool_v, table = drawn()
    out = attention(q.requires_grad_(), pool_k, pool_v, "dense()", block_table=table, k_len=LENGTH)
    with pytest.raises(DilcompileError, match=r"keys and values in pages have no gradient: .*; call under torch.no_grad\(\), or"):
        out.sum().backward()


def arguments() -> tuple[Any, ...]:
    q, _, _, pool_k, pool_v, table = drawn()
    more = (None, None, None, None, "dense()", True, None, None, LENGTH - 1, 0.3, None, 0.0, None, None, None, None, None)
    return (q, pool_k.nan_to_num(), pool_v.nan_to_num(), *more, None, False, False, table, LENGTH)


def test_the_operator_passes_its_checks() -> None:
    torch.library.opcheck(torch.ops.dilcompile.attention.default, arguments())
    operands = arguments()
    real = torch.ops.dilcompile.attention(*operands)
    with FakeTensorMode() as mode:
        made = [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in operands]
        fake = torch.ops.dilcompile.attention(*made)
    for one, other in zip(real, fake, strict=True):
        assert (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)


def test_flops_are_those_of_the_positions() -> None:
    with FlopCounterMode(display=False) as counter:
        torch.ops.dilcompile.attention(*arguments())
    assert counter.get_flop_counts()["Global"][torch.ops.dilcompile.attention] == 3 * 4 * LENGTH * 2 * (8 + 5)


def test_compiled() -> None:
    q, _, _, pool_k, pool_v, table = drawn()

    def step(q: Tensor, table: Tensor) -> Tensor:
        return attention(2 * q, pool_k, pool_v, "dense()", is_causal=True, block_table=table, k_len=LENGTH)

    torch.testing.assert_close(torch.compile(step, fullgraph=True)(q, table), step(q, table))


def test_mapped_over_queries() -> None:
    q, _, _, pool_k, pool_v, table = drawn()
    attend = lambda q: attention(q, pool_k, pool_v, "dense()", block_table=table, k_len=LENGTH)  # noqa: E731
    several = torch.stack((q, 2 * q))
    torch.testing.assert_close(torch.vmap(attend)(several), torch.stack([attend(x) for x in several]))


def test_the_gather_is_what_makes_it_equal(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference._gathered
    monkeypatch.setattr(reference, "_gathered", lambda call, pages: right(call, pages.flip(1)))
    with pytest.raises(AssertionError):
        test_pages_are_where_the_table_says(Dense(), 1)
