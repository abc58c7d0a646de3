"""The ways in which attention is written: a rule file each, tried in this order where several share an operator.

To add one: write ``passes/finding/spellings/<spelling>.py`` with a ``Spelling``, name it here, and give it one positive and three
negatives in ``tests/test_find_anchors.py``.
"""

from __future__ import annotations

from dilcompile.passes.finding.anchors import Spelling
from dilcompile.passes.finding.spellings.exp_less_logsumexp import EXP_LESS_LOGSUMEXP
from dilcompile.passes.finding.spellings.exp_of_log_softmax import EXP_OF_LOG_SOFTMAX
from dilcompile.passes.finding.spellings.exp_over_sum import EXP_OVER_SUM
from dilcompile.passes.finding.spellings.flash import FLASH
from dilcompile.passes.finding.spellings.flex import FLEX
from dilcompile.passes.finding.spellings.fused_sdpa import FUSED_SDPA
from dilcompile.passes.finding.spellings.renormalised import RENORMALISED
from dilcompile.passes.finding.spellings.safe_softmax import SAFE_SOFTMAX
from dilcompile.passes.finding.spellings.sdpa import SDPA
from dilcompile.passes.finding.spellings.softmax import SOFTMAX
from dilcompile.passes.finding.spellings.varlen import VARLEN

SPELLINGS: tuple[Spelling, ...] = (
    SDPA,
    FUSED_SDPA,
    FLEX,
    FLASH,
    VARLEN,
    RENORMALISED,
    SAFE_SOFTMAX,
    SOFTMAX,
    EXP_OF_LOG_SOFTMAX,
    EXP_LESS_LOGSUMEXP,
    EXP_OVER_SUM,
)

# The rules to try at an operator, in order.
BY_ANCHOR: dict[str, tuple[Spelling, ...]] = {
    anchor: tuple(spelling for spelling in SPELLINGS if anchor in spelling.anchors)
    for anchor in dict.fromkeys(anchor for spelling in SPELLINGS for anchor in spelling.anchors)
}
# Operators that compute a whole attention, and the order of their dims.
CALLS: dict[str, str] = {anchor: spelling.order for spelling in SPELLINGS if spelling.order for anchor in spelling.anchors}
