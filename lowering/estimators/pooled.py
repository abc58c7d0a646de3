"""Mean queries against mean keys."""

from __future__ import annotations

from torch import Tensor

from dilcompile.lowering.estimators.operands import Operands, Rows


def estimate(operands: Operands) -> Rows:
    """The score of a block's mean query and mean kept key, and the logarithm of how many keys are kept.

    One product a block. Blocks scored by pooled keys: InfLLM (arXiv 2402.04617, section 3.2), Quest (arXiv 2406.10774), by both
    pooled queries and keys: SeerAttention (arXiv 2410.13276, section 3.1) and MInference's block-sparse heads (arXiv 2407.02490,
    section 3.2).
    """
    keys, there = operands.keys()
    count = there.sum(-1).to(operands.dtype)
    means = keys.sum(3) / count.clamp(min=1)[:, None, :, None]

    def rows(first: int, stop: int) -> Tensor:
        queries, held = operands.queries(first, stop)
        mean = queries.sum(3) / held.sum(-1).clamp(min=1)[:, None]
        return operands.scores(operands.products(mean, means)) + count.log()[:, None, None, :]

    return rows
