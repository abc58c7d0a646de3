"""Random compositions of all spelling rules: each is found, exact, and windowed on the axes it says."""

from __future__ import annotations

from dataclasses import replace

from finding import double  # noqa: F401  (the fixture works by being here)
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from spellings import HIDES, LAYOUTS, MAKERS, MASKS, SCALES, SHARES, SOFTMAXES, Spelling
from test_find_spellings import SIZES, check_exact, check_windowed, may_be_kept

spellings = st.builds(
    Spelling,
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from(SCALES),
    mask=st.sampled_from(MASKS),
    maker=st.sampled_from(MAKERS),
    hide=st.sampled_from(HIDES),
    softmax=st.sampled_from(SOFTMAXES),
    share=st.sampled_from(SHARES),
    dropout=st.booleans(),
    sizes=st.sampled_from(SIZES),
)
slow = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@slow
@given(spellings)
@example(Spelling(layout="h*b", mask="causal+padding", share="tile", hide="where", sizes=(4, 4, 4, 4)))
def test_compositions(spelling: Spelling) -> None:
    check_exact(spelling)


@settings(slow, max_examples=25)
@given(spellings)
def test_windowed_compositions(spelling: Spelling) -> None:
    assume(not may_be_kept(spelling))
    check_windowed(replace(spelling, dropout=False))


@settings(slow, max_examples=12)
@given(spellings)
def test_dynamic_compositions(spelling: Spelling) -> None:
    found = check_exact(spelling, dynamic=True)
    # Dynamo makes a float an input of the graph under dynamic=True: a scale beside a soft cap, mask or sink is data then.
    otherwise = "the scores are changed otherwise before they are scaled by a tensor"
    assert {miss.reason for miss in found.misses} <= ({otherwise} if spelling.scale == "tensor" else set())
    if found.misses:
        return
    assert len(found.sites) >= 1
