"""From how many keys on a form is faster than the model's own dense attention: modelled, from FLOPs, bytes and rates.

A call takes its kernel's overhead, and the longer of what its FLOPs take at the kernel's rate and what its keys and values
take to be read. Dense attention is taken to compute every pair, or those up to the query where its mask is causal and nothing
else.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from dilcompile.errors import FormError
from dilcompile.forms import Dense, Form
from dilcompile.lowering.choice.rates import DENSE, Rate, rate_of
from dilcompile.progression import Progression
from dilcompile.relation import Problem, Relation

LONGEST = 1 << 20
_SHORTEST = 16
# Bytes a second that keys and values are read at, where so few rows share them that FLOPs are no matter.
_BANDWIDTH = {"cpu": 20e9, "cuda": 3e12}
_FEW_ROWS = 64


@dataclass(frozen=True)
class Setting:
    """A site as the model sees it.

    Args:
        form: what it would become.
        problem: its sizes at some length.
        grows: the queries are as many as the keys, or as many fewer as here; otherwise their number is fixed.
        plain: its mask is none, or causal alone.
        device, dtype: of the operands. train: forward and backward count.
        forward, backward: the kernels that would compute it; backward only in training.
    """

    form: Form
    problem: Problem
    grows: bool
    plain: bool
    device: torch.device
    dtype: torch.dtype
    train: bool
    forward: str
    backward: str | None = None


def crossover(setting: Setting, threads: int) -> int | None:
    """The number of keys from which on the form is faster than dense attention; None: not up to ``LONGEST`` keys.

    Raises:
        LookupError: if there are no rates for the device, dtype and kernels.
        DilcompileError: if ``DILCOMPILE_RATES`` names no readable file.
    """
    dense = rate_of(setting.device, setting.dtype, DENSE, setting.train)
    # The kernel of the backward is nearly always that of the forward; the slower one counts where it isn't.
    names = dict.fromkeys(name for name in (setting.forward, setting.backward) if name is not None)
    own = [rate_of(setting.device, setting.dtype, name, setting.train) for name in names]
    known = [rate for rate in own if rate is not None]
    if dense is None or len(known) < len(own):
        raise LookupError(f"no rates of {', '.join((DENSE, *names))} on {setting.device.type} in {setting.dtype}")
    return _search(setting, dense, max(known, key=lambda rate: 1 / rate.flops), threads if setting.device.type == "cpu" else 1)


@lru_cache(maxsize=256)
def _search(setting: Setting, dense: Rate, own: Rate, threads: int) -> int | None:
    def is_faster(keys: int) -> bool:
        problem = _problem(setting, keys)
        try:
            relation = setting.form.relation(problem)
        except FormError:
            return False
        whole = Dense().relation(_seen_by_dense(setting, problem))
        return _seconds(relation, own, setting, threads) < _seconds(whole, dense, setting, threads)

    high = next((keys for keys in _doubling() if is_faster(keys)), None)
    if high is None or high == _SHORTEST:
        return None if high is None else 1
    low = high // 2
    while high - low > max(1, high // 64):
        middle = (low + high) // 2
        low, high = (low, middle) if is_faster(middle) else (middle, high)
    return high


def _doubling() -> Iterator[int]:
    keys = _SHORTEST
    while keys <= LONGEST:
        yield keys
        keys *= 2


def _problem(setting: Setting, keys: int) -> Problem:
    """The sizes with another number of keys; queries keep their place before the end."""
    size = setting.problem
    behind = size.k_len - size.q_len
    rows = max(1, keys - behind) if setting.grows else size.q_len
    at_end = size.q_offset == behind
    return replace(size, q_len=rows, k_len=keys, q_offset=keys - rows if at_end else size.q_offset)


def _seen_by_dense(setting: Setting, problem: Problem) -> Problem:
    """All pairs, or the triangle of a causal mask that starts at the first key."""
    triangle = setting.plain and problem.is_causal and problem.q_offset == 0
    return replace(problem, is_causal=triangle, window_left=None, window_right=None)


def _seconds(relation: Relation, rate: Rate, setting: Setting, threads: int) -> float:
    flops = relation.flops() + (relation.flops(backward=True) if setting.train else 0)
    return rate.overhead + max(flops / (rate.flops * threads), _bytes(relation, setting) / _BANDWIDTH[setting.device.type])


def _bytes(relation: Relation, setting: Setting) -> int:
    """Bytes of the keys and values that are read; with many rows they are read from near and don't count."""
    size = relation.problem
    if size.q_len * size.group > _FEW_ROWS:
        return 0
    rows = Progression(size.q_offset, size.q_offset + size.q_len)
    keys = sum(len(held) for head in range(size.kv_heads) for held in relation.keys_needed(rows, head))
    return size.batch * keys * (size.head_dim + size.v_dim) * setting.dtype.itemsize
