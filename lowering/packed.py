"""Documents packed one behind the other, as flash ops take them: where each begins among all rows, and the longest.

documents [2, 5], the last 4 positions are queried       queries  0 1 4 8
0 0 1 1 1 / 7 7 7 7 7                                    keys     0 2 5 10
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Documents of all batch rows in a row.

    Args:
        queries, keys: int32 [documents + 1], the first query and key of each, and how many there are in all.
        most_queries, most_keys: of one document.
    """

    queries: Tensor
    keys: Tensor
    most_queries: int
    most_keys: int


def packed(documents: Tensor, batch: int, q_len: int, q_offset: int) -> Packed:
    """The documents [B or 1, Sk] of ``batch`` rows, of which ``q_len`` positions from ``q_offset`` on are queried.

    Waits for the device once: how many documents there are, and how long the longest is, sizes what is launched.
    """
    k_len = documents.shape[1]
    opens = torch.ones_like(documents, dtype=torch.bool)
    torch.ne(documents[:, 1:], documents[:, :-1], out=opens[:, 1:])
    opens = opens.expand(batch, k_len).flatten()
    place = torch.arange(batch * k_len, device=documents.device)
    # Of each key, where its document begins.
    begin = torch.where(opens, place, 0).cummax(0).values

    def queries_before(key: Tensor) -> Tensor:
        return key // k_len * q_len + (key % k_len - q_offset).clamp(0, q_len)

    lengths = ((queries_before(place + 1) - queries_before(begin)).amax(), (place + 1 - begin).amax())
    count, most_queries, most_keys = torch.stack([opens.sum(), *lengths]).tolist()
    # Keys that open no document write to the last place, which then gets the end of all.
    keys = place.new_empty(count + 1).scatter_(0, torch.where(opens, opens.cumsum(0) - 1, count), place)
    keys[count:].fill_(batch * k_len)
    return Packed(queries_before(keys).to(torch.int32), keys.to(torch.int32), most_queries, most_keys)
