"""How large a workspace a call has to be given for the library to allocate nothing else but lists of positions.

That of the fastest arrangement, or a share of it: then fewer threads work, on fewer heads at once, with the same result.
"""

from __future__ import annotations

from collections.abc import Sequence

import sympy
import torch
from torch import Tensor

from dilcompile.lowering.native.build import BIAS_DTYPES, ELEMENTS, CallStruct, SquareStruct, library

_DTYPES = tuple(ELEMENTS)


class WorkspaceBytes(sympy.Function):  # type: ignore[misc]
    """Bytes of the workspace of a call of these sizes, see ``workspace_bytes``: a number as soon as all of them are numbers."""

    is_integer = True
    is_nonnegative = True

    @classmethod
    def eval(cls, share: sympy.Rational, *sizes: sympy.Expr) -> sympy.Integer | None:
        """What the library says, where every size is a number."""
        return sympy.Integer(_asked(float(share), *map(int, sizes))) if all(size.is_Integer for size in sizes) else None


def workspace_bytes(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, softcap: float | None, dropout_p: float, backward: bool,
    bias_grad: bool, share: float = 1.0,
) -> sympy.Expr:  # fmt: skip
    """Of an attention by as many threads as torch has now.

    Args:
        q, k, v, bias: see ``Call``; they may hold no data, and have sizes that are symbols.
        share: from 1 to 0: at most this of what the fastest arrangement takes, but no less than the least takes.
    """
    batch, heads, rows, dim = q.shape
    # The bias and, as strides, along which of its dims it has more than one number.
    shape: Sequence[int] = () if bias is None else (*[1] * (4 - bias.dim()), *bias.shape)
    along = [int(not (isinstance(size, int) and size == 1)) for size in shape] or [0] * 4
    dtype = -1 if bias is None else BIAS_DTYPES[bias.dtype]
    sizes = (
        _DTYPES.index(q.dtype), int(backward), torch.get_num_threads(),
        batch, heads, k.shape[1], rows, k.shape[2], dim, v.shape[3],
        dtype, *along, int(bias_grad), int(softcap is not None), int(dropout_p > 0),
    )  # fmt: skip
    expressions = (size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size) for size in sizes)
    return WorkspaceBytes(sympy.Rational(share), *expressions)


def _asked(
    share: float, dtype: int, backward: int, threads: int,
    batch: int, heads: int, kv_heads: int, rows: int, keys: int, dim: int, v_dim: int,
    bias: int, of_batch: int, of_head: int, of_row: int, of_key: int, bias_grad: int, capped: int, drops: int,
) -> int:  # fmt: skip
    built = library(_DTYPES[dtype])
    if isinstance(built, str):
        return 0
    struct = CallStruct(batch, heads, kv_heads, rows, keys, dim, v_dim, q_step=1, k_stop=keys, k_step=1, k_rows=keys)
    struct.scale, struct.softcap, struct.dropout_factor, struct.threads = 1.0, float(capped), float(drops), threads
    if bias >= 0:
        # Some address: which operands there are is all that is asked.
        square = SquareStruct(8, of_batch, of_head, of_row, of_key)
        struct.bias, struct.bias_dtype = square, bias
        if backward and bias_grad:
            struct.grad_bias = square
    return built.workspace(struct, bool(backward), share)
