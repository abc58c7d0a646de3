"""What the zoo says of models whose numbers say nothing by themselves."""

from __future__ import annotations

import math

import pytest
import torch
from finding import double  # noqa: F401  (the fixture works by being here)
from torch import Tensor, nn
from zoo import causes
from zoo.causes import UNEXPLAINED, Trial, cause_of, says_nothing
from zoo.compiling import Tally, as_it_is, rewriting, widened

OWN_NAN = "the model's own float32 makes it NaN in float64"


class OwnFloat32(nn.Module):
    """A mask that is -inf and NaN, because float32 does not hold float64's least number."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        scores = q @ k.mT + (1 - keep[:, None].to(torch.float32)) * torch.finfo(q.dtype).min
        return scores.softmax(-1) @ v


def trial() -> Trial:
    keep = torch.ones(2, 5, dtype=torch.long)
    keep[1, 3:] = 0
    return Trial(OwnFloat32(), {"x": torch.randn(2, 5, 8), "keep": keep}, True, None)


def test_a_model_that_is_nan_by_itself_is_compared_without_its_float32() -> None:
    one = trial()
    eager = one.run(one.net)
    assert says_nothing(eager)
    tally = Tally()
    cause, left = cause_of(one, one.run_by(rewriting(tally)), eager)
    assert (cause, tally.rewritten) == (OWN_NAN, 1)
    assert left <= causes.BOUND
    assert not says_nothing(one.run_by(widened(as_it_is)))


def test_it_is_unexplained_where_it_stays_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    one = trial()
    eager = one.run(one.net)
    monkeypatch.setattr(causes, "widened", lambda backend: backend)
    assert cause_of(one, eager, eager) == (UNEXPLAINED, math.inf)
