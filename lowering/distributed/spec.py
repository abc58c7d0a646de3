"""What a sharded site is, as text: the same on every rank, so that graphs that hold it are the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import lru_cache
from typing import Any

from dilcompile.errors import PlacementError
from dilcompile.placements.shards import Order


@dataclass(frozen=True)
class Spec:
    """One sharded attention. Its text is JSON and parses back.

    Args:
        axis: the mesh axis over which the sequence is held; for ``usp`` the axis over which keys move.
        placement: how keys come to queries, a name of ``dilcompile.placements``, ``ulysses``, ``usp`` or ``tree``.
        form: text of the form.
        order: how positions are held by ranks, see ``Shards``.
        length: tokens of the whole sequence; None: ranks times the rows that each holds.
        heads_axis: for ``usp``, the mesh axis over which heads are exchanged. A rank's places of ``axis`` are cut in as many
            slices as that has ranks.
        moving: for ``usp``, the placement that moves keys over ``axis``.
        prefetch: rows of the next step travel while this one computes.
        is_causal, window_left, window_right: the site's own mask, over positions of the whole sequence.
        scale: factor on q . k, above 0.
        softcap, dropout_p, kernel: see ``dilcompile::attention``.
        q_offset: for ``tree``, the position of the first query; None: the last query is the last token.
        site: what errors and counters call it.
        lse: the LSE is asked for; otherwise a placement may leave it out.
        heads, kv_heads, documents: query heads and key heads of the whole site, and whether packed documents come with it; set by
            ``sharded_attention``.
    """

    axis: str
    placement: str
    form: str
    order: Order = "contiguous"
    length: int | None = None
    heads_axis: str | None = None
    moving: str | None = None
    is_causal: bool = False
    window_left: int | None = None
    window_right: int | None = None
    scale: float = 1.0
    softcap: float | None = None
    dropout_p: float = 0.0
    kernel: str | None = None
    q_offset: int | None = None
    site: str = "attention"
    lse: bool = False
    prefetch: bool = True
    heads: int = 0
    kv_heads: int = 0
    documents: bool = False

    def __str__(self) -> str:
        return json.dumps({name: value for name, value in asdict(self).items() if value != _DEFAULTS.get(name)})

    def within(self, **changes: Any) -> Spec:
        """The same with some fields changed."""
        return replace(self, **changes)


_DEFAULTS = {each.name: each.default for each in fields(Spec)}


@lru_cache(maxsize=1024)
def parse_spec(text: str) -> Spec:
    """The spec with this text.

    Raises:
        PlacementError: if the text isn't one.
    """
    try:
        return Spec(**json.loads(text))
    except (TypeError, ValueError) as error:
        raise PlacementError(f"no spec of a sharded attention: {error}; its text is made by str(Spec(...)): {text}") from error
