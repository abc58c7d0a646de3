"""How large a workspace a call has to be given for the library to allocate nothing else but lists of positions.

That of the fastest arrangement, or a share of it: then fewer threads work, on fewer heads at once, with the same result.
"""

from __future__ import annotations

import torch

from dilcompile.lowering.call import Call
from dilcompile.lowering.native.build import BIAS_DTYPES, CallStruct, SquareStruct, library


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``: what the library says for as many threads as torch has now. It depends on no relation."""
    built = library(call.q.dtype)
    if isinstance(built, str):
        return 0
    size, keys = call.problem, call.k.shape[2]
    struct = CallStruct(
        size.batch, size.heads, size.kv_heads, size.q_len, keys, size.head_dim, size.v_dim,
        q_step=1, k_stop=keys, k_step=1, k_rows=keys, scale=1.0, softcap=call.softcap or 0.0,
        dropout_factor=float(call.dropout_p > 0), threads=torch.get_num_threads(), wide=call.held is not None,
    )  # fmt: skip
    if call.bias is not None:
        # Some address, and along which dims there is more than one number: no operand is read.
        shape = (*[1] * (4 - call.bias.dim()), *call.bias.shape)
        square = SquareStruct(8, *(int(along != 1) for along in shape))
        struct.bias, struct.bias_dtype = square, BIAS_DTYPES[call.bias.dtype]
        if backward and call.bias_grad:
            struct.grad_bias = square
    return built.workspace(struct, backward, share)
