"""Forms of the operators of sharded attention that write into memory which was there before; see ``lowering/out_forms.py``.

A collective's ``out`` form starts it into the given memory, and ``workspace`` is what it sends; both are its own until the wait.
The wait knows it by the storage of the result, so that no two results under way may lie in one storage.
"""

from __future__ import annotations

from functools import cache

from dilcompile.lowering.distributed import compute, ops, start
from dilcompile.lowering.out_forms import define


@cache
def register() -> None:
    """Add the forms to the operators, once."""
    define(ops.exchange, ("received",), start.exchange, workspace=True)
    define(ops.gather, ("received",), start.gather, workspace=True)
    define(ops.exchange_equal, ("received",), start.exchange_equal, workspace=True)
    define(ops.return_gradients, ("received",), start.return_gradients)
    define(ops.attend_step, ("merged", "merged_lse"), compute.step, workspace=True)
    define(ops.attend_step_backward, ("grad_q", "grad_k", "grad_v", "grad_received"), compute.step_backward, workspace=True)
    define(ops.add_returned, ("sum_k", "sum_v"), compute.sums)
    define(ops.attend_shard, ("out", "lse"), compute.shard, workspace=True)
    define(ops.attend_shard_backward, ("grad_q", "grad_k", "grad_v"), compute.shard_backward, workspace=True)
    define(ops.merge_parts, ("out", "lse"), compute.merge, workspace=True)
