"""A gate that learns which blocks of keys each block of queries attends."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from dilcompile import functional
from dilcompile.blocks.adaptive import widest_own
from dilcompile.blocks.grid import Grid
from dilcompile.errors import DilcompileError
from dilcompile.forms import BlockSparse
from dilcompile.lowering.dropout import drawn
from dilcompile.lowering.estimators.operands import beside, cut, reached
from dilcompile.lowering.selection import Selection, best, listed


class Gated(NamedTuple):
    """What a gate makes of queries and keys.

    Args:
        q: [B, H, Sq, D + gate_dim]; k: [B, Hkv, Sk, D + gate_dim]: their products, scaled, are the scores and the gate's own.
        blocks: the blocks that are attended.
        logits: [B, H, block rows, block columns], of each block; -inf where a block is out of reach.
    """

    q: Tensor
    k: Tensor
    blocks: Selection
    logits: Tensor


class BlockGate(nn.Module):
    """Attention over the blocks that a learned gate chooses: ``out = gate(q, k, v)``.

    A block's logit is the product of its mean query and its mean key, each projected by head (pooled gates: SeerAttention, arXiv
    2410.13276, section 3.1). In training, blocks are drawn without replacement by Gumbel top-k (arXiv 1903.06059): the largest of
    logits and noise, the noise times a temperature that falls from ``start`` to ``end`` over ``steps`` calls of ``step``. In
    evaluation they are the largest logits. The row's own blocks are always among them, none is out of a causal mask's reach.

    The choice has no gradient. The logits do: they are added to the scores of the blocks that were chosen, as the inner product
    of ``gate_dim`` more features of queries and keys. So the ordinary backward reaches all parameters, and a block that helps
    is chosen more often. Under a causal mask each query and key has the mean up to itself in place of its block's, so that
    nothing later reaches a score; the logit is that of a block's last query and key. The choice itself looks at whole blocks.

    Args:
        heads, head_dim: of the queries; kv_heads: of the keys, ``heads`` by default.
        block: positions in a block, 16 to 256; or two numbers, queries and keys.
        blocks: how many blocks each row attends, its own among them.
        gate_dim: features of the gate.
        is_causal: keys up to the query's own position only.
        start, end, steps: the temperature; in between it falls by an equal factor each step.
        seed: of the noise, which depends on it, the step and the position alone.

    Raises:
        DilcompileError: if an argument is out of its range; FormError: for the block's size.
    """

    def __init__(
        self,
        heads: int,
        head_dim: int,
        *,
        kv_heads: int | None = None,
        block: int | tuple[int, int] = 64,
        blocks: int = 8,
        gate_dim: int = 16,
        is_causal: bool = True,
        start: float = 1.0,
        end: float = 0.05,
        steps: int = 1000,
        seed: int = 0,
    ) -> None:
        super().__init__()
        kv_heads = heads if kv_heads is None else kv_heads
        _refuse_wrong(heads, kv_heads, blocks, gate_dim, start, end, steps)
        self.blocks, self.is_causal, self.start, self.end, self.steps, self.seed = blocks, is_causal, start, end, steps, seed
        sizes = block if isinstance(block, tuple) else (block, block)
        self.most = max(blocks, widest_own(Grid(*sizes, 0, 0, 0)))
        self.form = BlockSparse(block, {"any": [{"local": {}}, {"given": {"most": self.most}}]})
        self.to_query = nn.Parameter(torch.randn(heads, head_dim, gate_dim) * head_dim**-0.5)
        self.to_key = nn.Parameter(torch.randn(kv_heads, head_dim, gate_dim) * head_dim**-0.5)
        self.steps_done: Tensor
        self.register_buffer("steps_done", torch.zeros((), dtype=torch.int64))

    def step(self) -> None:
        """One step further: a lower temperature, other noise. Call it when the optimizer has taken its step."""
        self.steps_done += 1

    @property
    def temperature(self) -> Tensor:
        """The factor on the noise, float32 without dims."""
        return self.start * (self.end / self.start) ** (self.steps_done / self.steps).clamp(max=1.0)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        key_padding: Tensor | None = None,
        q_offset: int | None = None,
        kernel: str | None = None,
    ) -> Tensor:
        """Attention over the chosen blocks; the operands and what is raised are those of ``dilcompile.functional.attention``.

        Args:
            q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; v: [B, Hkv, Sk, Dv].

        Returns:
            [B, H, Sq, Dv].
        """
        scale = q.shape[3] ** -0.5 if scale is None else scale
        gated = self.gated(q, k, scale=scale, key_padding=key_padding, q_offset=q_offset)
        out = functional.attention(
            gated.q, gated.k, v, self.form, is_causal=self.is_causal, scale=scale, key_padding=key_padding,
            q_offset=q_offset, kernel=kernel, blocks=gated.blocks,
        )  # fmt: skip
        assert isinstance(out, Tensor), "no LSE was asked for"
        return out

    def gated(
        self, q: Tensor, k: Tensor, *, scale: float, key_padding: Tensor | None = None, q_offset: int | None = None
    ) -> Gated:
        """The operands of the attention, and the chosen blocks.

        Args:
            q: [B, H, Sq, D]; k: [B, Hkv, Sk, D]; key_padding: bool [B, Sk], True keeps a key.
            scale: of the attention: scores are ``scale * q . k`` and the gate's product, unscaled.
            q_offset: position of the first query, ``Sk - Sq`` by default, at least 0.

        Raises:
            DilcompileError: if heads or head sizes are not the gate's, or a query stands before position 0.
        """
        self._refuse_others(q, k)
        first = k.shape[2] - q.shape[2] if q_offset is None else q_offset
        if first < 0:
            raise DilcompileError(f"the first query stands at position {first}, in no block; set q_offset to at least 0")
        grid = Grid(*self.form.sizes, first, first + q.shape[2], k.shape[2], None, 0 if self.is_causal else None)
        there = torch.ones(1, 1, dtype=torch.bool, device=q.device)
        # Sums over a block want more digits than half precision has.
        wide = torch.promote_types(q.dtype, torch.float32)
        projected = q.to(wide) @ self.to_query.to(wide)
        queries = self._pooled(projected, there.expand(1, q.shape[2]), grid.q_block, first % grid.q_block)
        there = there.expand(1, k.shape[2]) if key_padding is None else key_padding
        keys = self._pooled(k.to(wide) @ self.to_key.to(wide), there, grid.k_block, 0)
        queries = queries * self.to_query.shape[2] ** -0.5
        logits = self._logits(queries.detach(), keys.detach(), grid)
        extended_q, extended_k = torch.cat([q, (queries / scale).to(q.dtype)], 3), torch.cat([k, keys.to(k.dtype)], 3)
        return Gated(extended_q, extended_k, self._chosen(logits, grid), logits)

    def _refuse_others(self, q: Tensor, k: Tensor) -> None:
        for name, x, weight in (("q", q, self.to_query), ("k", k, self.to_key)):
            if x.dim() != 4 or (x.shape[1], x.shape[3]) != tuple(weight.shape[:2]):
                raise DilcompileError(
                    f"{name} is {list(x.shape)}, but the gate was made for {weight.shape[0]} heads of size {weight.shape[1]}: "
                    f"[B, {weight.shape[0]}, S, {weight.shape[1]}]"
                )

    def _pooled(self, x: Tensor, there: Tensor, size: int, before: int) -> Tensor:
        """The means of x [B, H, S, G] over blocks of ``size``, at every position; up to it under a causal mask.

        Args:
            there: bool [B or 1, S], what counts; before: how many positions of the first block are not among x.
        """
        length = x.shape[2]
        behind = -(before + length) % size
        held = cut(pad(there, (before, behind)), 1, size)[:, None, :, :, None].to(x.dtype)
        parts = cut(pad(x, (0, 0, before, behind)), 2, size) * held
        if self.is_causal:
            means = parts.cumsum(3) / held.cumsum(3).clamp(min=1)
        else:
            means = (parts.sum(3, keepdim=True) / held.sum(3, keepdim=True).clamp(min=1)).expand_as(parts)
        return means.flatten(2, 3)[:, :, before : before + length]

    def _logits(self, queries: Tensor, keys: Tensor, grid: Grid) -> Tensor:
        """Products of the last query and the last key of each block."""
        rows = self._rows(grid, queries.device)
        last = ((rows + 1) * grid.q_block).clamp(max=grid.q_stop) - 1 - grid.q_start
        end = ((torch.arange(grid.columns, device=keys.device) + 1) * grid.k_block).clamp(max=grid.k_len) - 1
        group = queries.shape[1] // keys.shape[1]
        found = queries[:, :, last] @ keys[:, :, end].repeat_interleave(group, 1).mT
        return found.masked_fill(~reached(grid, rows), -torch.inf)

    @torch.no_grad()
    def _chosen(self, logits: Tensor, grid: Grid) -> Selection:
        rows = self._rows(grid, logits.device)
        seen = reached(grid, rows)
        if self.training:
            logits = logits + self.temperature * self._noise(logits, rows)
        held = best(logits, beside(grid, rows) & seen, seen, self.blocks)
        return listed(held, min(self.most, grid.columns))

    def _rows(self, grid: Grid, device: torch.device) -> Tensor:
        return torch.arange(grid.q_start // grid.q_block, -(-grid.q_stop // grid.q_block), device=device)

    def _noise(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Gumbel's distribution, drawn by position."""
        batch, heads, _, columns = (torch.arange(size, device=logits.device) for size in logits.shape)
        seed = self.steps_done + (self.seed << 32)
        number = drawn(seed, batch[:, None, None, None], heads[:, None, None], rows[:, None], columns)
        return -torch.log(-torch.log((number.double() + 0.5) / 2**32)).to(logits.dtype)

    def extra_repr(self) -> str:
        """The options that are no parameters."""
        temperature = f"temperature {self.start} to {self.end} in {self.steps} steps"
        return f"block={self.form.block}, blocks={self.blocks}, is_causal={self.is_causal}, {temperature}"


def _refuse_wrong(heads: int, kv_heads: int, blocks: int, gate_dim: int, start: float, end: float, steps: int) -> None:
    for name, value in (("heads", heads), ("kv_heads", kv_heads), ("blocks", blocks), ("gate_dim", gate_dim), ("steps", steps)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise DilcompileError(f"{name} must be a whole number of at least 1, not {value!r}")
    if heads % kv_heads:
        raise DilcompileError(f"{heads} heads are no multiple of {kv_heads} kv_heads; each key head serves equally many")
    for name, temperature in (("start", start), ("end", end)):
        if not (temperature > 0 and math.isfinite(temperature)):
            raise DilcompileError(f"{name} must be a finite temperature above 0, not {temperature!r}")
