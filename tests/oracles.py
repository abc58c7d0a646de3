"""Independent oracles, written from the definitions with loops and dense float64 arrays; nothing of the package's maths is used."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dilcompile.blocks.grid import Grid
from dilcompile.blocks.patterns import Random
from dilcompile.blocks.spec import plain


@dataclass(frozen=True)
class Setting:
    """Sizes and the site's own mask."""

    heads: int
    kv_heads: int
    q_len: int
    k_len: int
    q_offset: int = 0
    causal: bool = False
    left: int | None = None
    right: int | None = None


def counts(form: Any, at: Setting, documents: list[int] | None = None) -> np.ndarray:
    """Multiplicities [H, Sq, Sk] of a form, pair by pair; ``documents`` numbers the key positions."""
    return _counts(form, at, None if documents is None else tuple(documents)).copy()


@lru_cache(maxsize=512)
def _counts(form: Any, at: Setting, documents: tuple[int, ...] | None) -> np.ndarray:
    found = np.zeros((at.heads, at.q_len, at.k_len), dtype=np.int64)
    for h in range(at.heads):
        for i in range(at.q_len):
            for k in range(at.k_len):
                found[h, i, k] = _count(form, at, documents, h, i + at.q_offset, k)
    return found


def _count(form: Any, at: Setting, documents: tuple[int, ...] | None, h: int, t: int, k: int) -> int:
    if at.causal and k > t:
        return 0
    if at.left is not None and t - k > at.left:
        return 0
    if at.right is not None and k - t > at.right:
        return 0
    if documents is not None:
        if documents[t] != documents[k]:
            return 0
        start = documents.index(documents[t])
        t, k = t - start, k - start
    if form.name == "dense":
        return 1
    if form.name == "union":
        # Parts never add up: what counts a pair most often says how often it counts.
        return max(_count(part, at, None, h, t, k) for part in form.parts)
    near = abs(t - k)
    if form.name == "sliding_window":
        in_window = near < form.window and (t - k) % form.step == 0
        return int(in_window or k < form.sinks)
    if form.name == "block_sparse":
        q_block, k_block = form.sizes
        if form.grid is not None:
            t, k = (form.curve.positions[token] for token in (t, k))
        return int(t >= 0 and _in_block(plain(form.pattern), form, at, h, t // q_block, k // k_block))
    return _dilated(form, at, h, t, k)


def _in_block(pattern: Any, form: Any, at: Setting, h: int, i: int, j: int) -> bool:
    """Whether a pattern, as users write it, holds block (i, j)."""
    (name, said), (q_block, k_block) = next(iter(pattern.items())), form.sizes
    if name in ("any", "all"):
        return (any if name == "any" else all)(_in_block(part, form, at, h, i, j) for part in said)
    if name in ("heads", "groups"):
        share = 1 if name == "heads" else at.heads // len(said)
        return _in_block(said[h // share], form, at, h, i, j)
    own, first = ((i + 1) * q_block - 1) // k_block, i * q_block // k_block
    if name == "local":
        return first - said.get("before", 0) <= j <= own + said.get("behind", 0)
    if name == "global":
        return j < said.get("columns", 0) or i < said.get("rows", 0)
    if name == "strided":
        return (own - j) % said["stride"] == 0
    if name == "dilated_sliding":
        return abs(own - j) in [n * said["dilation"] for n in range(said["blocks"] + 1)]
    if name == "fixed":
        return j % said["stride"] == said.get("offset", 0)
    if name == "vertical_slash":
        return j in said.get("verticals", []) or own - j in said.get("slashes", [])
    if name == "hierarchical":
        return _in_groups(said["spans"], said.get("heads", []), own, j)
    if name == "document":
        ends = list(accumulate(said.get("lengths", [])))
        rows, columns = (
            {bisect_right(ends, position) for position in range(n * size, (n + 1) * size)}
            for n, size in ((i, q_block), (j, k_block))
        )
        return bool(rows & columns)
    if name == "near":
        return (i, j) in near_blocks(form.curve, said["radius"], q_block, k_block)
    if name == "explicit":
        rows = [said["columns"][start:stop] for start, stop in pairwise(said["starts"])]
        return i < len(rows) and j in rows[i]
    if name in ("bigbird", "longformer"):
        return _in_published(name, said, form, at, h, i, j)
    assert name == "random", name
    right = at.right if not at.causal else 0 if at.right is None else min(0, at.right)
    drawn = Random(said["blocks"], said.get("seed", 0), said.get("by_head", False))
    return j in _drawn_columns(drawn, h, i, Grid(q_block, k_block, 0, (i + 1) * q_block, at.k_len, at.left, right))


@lru_cache(maxsize=4096)
def _drawn_columns(drawn: Random, h: int, i: int, grid: Grid) -> frozenset[int]:
    """The columns of block row i: its draw does not depend on the pair that is asked for."""
    return frozenset((drawn.codes(h, np.array([i]), grid) - i * grid.columns).tolist())


def near_pairs(curve: Any, radius: int | list[int]) -> np.ndarray:
    """Which tokens are near which, bool [S, S] along the curve, from the cell of each token; tokens in front are near to all."""
    cells = np.array([divmod_all(int(token) - curve.lead, curve.grid) for token in curve.tokens])
    found = (np.abs(cells[:, None] - cells) <= np.array(radius)).all(-1)
    lead = curve.tokens < curve.lead
    return found | lead[:, None] | lead


def divmod_all(token: int, grid: tuple[int, ...]) -> list[int]:
    """The cell of a token of the grid, the last axis fastest."""
    cell: list[int] = []
    for size in reversed(grid):
        token, place = divmod(token, size)
        cell.insert(0, place)
    return cell


def near_blocks(curve: Any, radius: int | list[int], q_block: int, k_block: int) -> set[tuple[int, int]]:
    """The blocks that hold a pair of near tokens, by looking at each pair."""
    return _near_blocks(curve, tuple(radius) if isinstance(radius, (list, tuple)) else radius, q_block, k_block)


@lru_cache(maxsize=64)
def _near_blocks(curve: Any, radius: Any, q_block: int, k_block: int) -> set[tuple[int, int]]:
    return {(int(t) // q_block, int(k) // k_block) for t, k in zip(*near_pairs(curve, radius).nonzero(), strict=True)}


def _in_groups(spans: list[int], heads: list[int], own: int, j: int) -> bool:
    """Whether column j is in the row's narrowest group, or leads a group inside one of the row's wider groups."""
    wider = [*spans[1:], None]
    leads = [j % span < most and (wide is None or own // wide == j // wide) for span, most, wide in zip(spans, heads, wider)]  # noqa: B905
    return own // spans[0] == j // spans[0] or any(leads)


def _in_published(name: str, said: Any, form: Any, at: Setting, h: int, i: int, j: int) -> bool:
    """The patterns of papers, by their parts."""
    near, columns, rows = (said.get(option, 1) for option in ("local", "columns", "rows"))
    parts: list[Any] = [{"local": {"before": near, "behind": near}}, {"global": {"columns": columns, "rows": rows}}]
    if name == "bigbird":
        parts.append({"random": {"blocks": said.get("random", 3), "seed": said.get("seed", 0)}})
    return _in_block({"any": parts}, form, at, h, i, j)


def _dilated(form: Any, at: Setting, h: int, t: int, k: int) -> int:
    branches = [(at.k_len if w == "seq" else w, r) for w, r in zip(form.segments, form.rates, strict=True)]
    key_head = h // (at.heads // at.kv_heads)
    total = 0
    for i, (w, r) in enumerate(branches):
        if form.heads == "grouped" and not _in_group(h, i, at.heads, len(branches)):
            continue
        if t < 0 or t // w != k // w:
            continue
        offset = {
            "head_mod": key_head % r,
            "head_block": key_head // -(-at.kv_heads // r),
            "branch": i % r,
            "zero": 0,
            "own": (t % w) % r,
        }[form.offset]
        total += (t % w) % r == offset and (k % w) % r == offset
    if form.union == "set":
        total = min(total, 1)
    extra = k < form.sinks or abs(t - k) < form.local
    return max(total, int(extra))


def _in_group(h: int, i: int, heads: int, groups: int) -> bool:
    sizes = [heads // groups + (g < heads % groups) for g in range(groups)]
    return sum(sizes[:i]) <= h < sum(sizes[: i + 1])


def output_scale(form: Any) -> float:
    """The factor on a form's output."""
    scale = getattr(form, "output_scale", 1.0)
    return 1 / len(form.segments) if scale == "1/k" else scale


def softmax(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    count: Tensor,
    scale: float,
    softcap: float | None = None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention with multiplicities ``count`` [B or 1, H, Sq, Sk] in the dtype given, differentiable: (out, lse)."""
    group = q.shape[1] // k.shape[1]
    k, v = (torch.stack([x[:, h // group] for h in range(q.shape[1])], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    seen = count.sum(-1, keepdim=True) > 0
    top = torch.where(count > 0, scores, -torch.inf).amax(-1, keepdim=True).detach()
    weights = count.to(scores.dtype) * torch.exp(torch.where(count > 0, scores - torch.where(seen, top, 0.0), -torch.inf))
    total = weights.sum(-1, keepdim=True)
    out = torch.where(seen, weights / torch.where(seen, total, 1.0), 0.0) @ v
    lse = torch.where(seen, top + torch.log(torch.where(seen, total, 1.0)), -torch.inf)[..., 0]
    return out, lse
