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

    Waits for the device twice: how many documents there are, and how long the longest is, sizes what is launched.
    """
    k_len = documents.shape[1]
    opens = torch.ones_like(documents, dtype=torch.bool)
    torch.ne(documents[:, 1:], documents[:, :-1], out=opens[:, 1:])
    starts = opens.expand(batch, k_len).flatten().nonzero().flatten()
    keys = torch.cat([starts, starts.new_full((1,), batch * k_len)])
    row, position = keys // k_len, keys % k_len
    queries = row * q_len + (position - q_offset).clamp_(0, q_len)
    most = torch.stack([queries.diff().amax(), keys.diff().amax()]).tolist()
    return Packed(queries.to(torch.int32), keys.to(torch.int32), *most)
