"""The CPU kernel: strided views through ATen's flash op for CPU."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from dilcompile.lowering import aten_cpu_flash
from dilcompile.lowering.call import Call, Gradients
from dilcompile.lowering.view_path import portions, views
from dilcompile.lowering.view_path.engines import (
    Downstream,
    Engine,
    MathEngine,
    Part,
    Result,
    Upstream,
    finite_for_backward,
    masked_cuts,
    needs_math,
)
from dilcompile.lowering.view_path.strided import Block

TAKES_ROW_MASKS = True
LEAST_ROWS = 1


class FlashEngine:
    """ATen's flash op for CPU: strided operands, an additive mask beside the causal flag, LSE out and joint LSE in."""

    takes_grad_lse = False

    def forward(self, part: Part, block: Block) -> Iterator[Result]:
        """See ``Engine``."""
        q, k, v = block.view(part.q), block.view(part.k), block.view(part.v)
        for masked in masked_cuts(part, block):
            first, second, rows, keys = masked.cut
            inputs = q[first, second, rows], k[first, second, keys], v[first, second, keys]
            out, lse = aten_cpu_flash.attend(*inputs, masked.causal, masked.mask, part.call.scale, masked.sees)
            yield Result(masked.cut, out, lse)

    def backward(self, part: Part, block: Block, upstream: Upstream) -> Iterator[Downstream]:
        """See ``Engine``."""
        q, k, v = block.view(part.q), block.view(part.k), block.view(part.v)
        out, grad_out = block.view(upstream.out), block.view(upstream.grad_out)
        lse = finite_for_backward(block.view(upstream.lse))
        for masked in masked_cuts(part, block):
            first, second, rows, keys = masked.cut
            inputs = q[first, second, rows], k[first, second, keys], v[first, second, keys]
            own = out[first, second, rows], lse[first, second, rows]
            grads = aten_cpu_flash.gradients(
                grad_out[first, second, rows], *inputs, *own, masked.causal, masked.mask, part.call.scale
            )
            yield Downstream(masked.cut, *grads)


def fingerprint(call: Call) -> str | None:
    """See ``Kernel``."""
    return None


def supports(call: Call, backward: bool) -> str | None:
    """Everything, on a CPU."""
    if call.q.device.type != "cpu":
        return f"the tensors are on {call.q.device}, not on a CPU"
    return None


def workspace_bytes(call: Call, backward: bool, share: float = 1.0, grad_lse: bool = False) -> int:
    """See ``Kernel``."""
    return portions.workspace_bytes(
        call, _engine(call, bias_is_mask=not (backward and call.bias_grad)), backward, share, grad_lse
    )


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """See ``Kernel``."""
    return views.forward(call, _engine(call, bias_is_mask=True))


def backward(call: Call, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> Gradients:
    """See ``Kernel``."""
    return views.backward(call, _engine(call, bias_is_mask=not call.bias_grad), out, lse, grad_out, grad_lse)


def _engine(call: Call, bias_is_mask: bool) -> Engine:
    return FlashEngine() if needs_math(call, bias_is_mask) is None else MathEngine()
