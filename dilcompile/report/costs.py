"""What one site costs before and after, counted from the relations, not measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from dilcompile.decision import Decision, Rejection
from dilcompile.errors import DilcompileError
from dilcompile.forms import Dense, Form, KeepStructure
from dilcompile.relation import Problem, Relation
from dilcompile.report.lengths import problem_of
from dilcompile.site import AttentionSite


@dataclass(frozen=True)
class Costs:
    """Of one forward pass through one site, over the whole batch and all heads.

    What depends on data is not counted: key padding and documents let every pair through here.

    Args:
        pairs_all: Sq x Sk of every head and batch row.
        pairs_mask: of these, what the model's own mask lets through.
        pairs_form: the exact sum of multiplicities of the decided relation, or the most that there may be (``is_bound``);
            ``pairs_mask`` for a site that is kept.
        flops_before, flops_after: 2 (D + Dv) a pair of ``pairs_mask``, of ``pairs_form``.
        operand_bytes: q, k, v and the output.
        scores_bytes: the S x S scores in the softmax's dtype that the model writes out and the rewritten site does not hold.
        mask_bytes: a bool mask over all pairs that is not built any more (one a batch row if it holds padding or documents).
        is_bound: the data chooses, so that ``pairs_form`` and ``flops_after`` are the most that may be computed.
    """

    pairs_all: int
    pairs_mask: int
    pairs_form: int
    flops_before: int
    flops_after: int
    operand_bytes: int
    scores_bytes: int
    mask_bytes: int
    is_bound: bool

    @property
    def density_of_mask(self) -> float:
        """Pairs of the form over pairs of the model's own mask: above 1 is possible for a multiset."""
        return self.pairs_form / max(1, self.pairs_mask)

    @property
    def density_of_all(self) -> float:
        """Pairs of the form over Sq x Sk."""
        return self.pairs_form / max(1, self.pairs_all)


def costs_of(verdict: Decision | Rejection) -> Costs | None:
    """The costs of a site; None where a length is not known or the form can't be had at these sizes (see ``problem_with``)."""
    site = verdict.site
    problem = problem_of(site)
    if problem is None or problem_with(verdict) is not None:
        return None
    rewritten = isinstance(verdict, Decision)
    # Of a form that does not hold the site's chunks they are not counted on either side.
    whole = isinstance(verdict, Decision) and not verdict.form.holds_chunks
    mask = pairs((Dense() if whole else KeepStructure().settled(site)).relation(problem))
    relation = relation_of(verdict)
    form = mask if relation is None else pairs(relation)
    per_pair = 2 * (problem.head_dim + problem.v_dim) * problem.batch
    return Costs(
        pairs_all=problem.batch * problem.heads * problem.q_len * problem.k_len,
        pairs_mask=problem.batch * mask,
        pairs_form=problem.batch * form,
        flops_before=per_pair * mask,
        flops_after=per_pair * form,
        operand_bytes=_operand_bytes(site, problem),
        scores_bytes=_scores_bytes(site, problem) if rewritten else 0,
        mask_bytes=_mask_bytes(site, problem) if rewritten else 0,
        is_bound=relation is not None and relation.is_bound,
    )


def problem_with(verdict: Decision | Rejection) -> str | None:
    """Why the decided form can't be had at the example's sizes, or None."""
    found = _bound(verdict)
    return found if isinstance(found, str) else None


def relation_of(verdict: Decision | Rejection) -> Relation | None:
    """The decided relation at the example's sizes; None for a kept site, an unknown length, or what ``problem_with`` tells."""
    found = _bound(verdict)
    return found if isinstance(found, Relation) else None


def _bound(verdict: Decision | Rejection) -> Relation | str | None:
    problem = problem_of(verdict.site)
    return None if problem is None or isinstance(verdict, Rejection) else _relation(verdict.form, problem)


@lru_cache(maxsize=256)
def _relation(form: Form, problem: Problem) -> Relation | str:
    """The relation, or why the form can't be had; found once for all sites that are alike."""
    try:
        return form.relation(problem)
    except DilcompileError as error:
        return str(error)


@lru_cache(maxsize=1024)
def pairs(relation: Relation) -> int:
    """``relation.pairs()``, counted once for all sites that are alike."""
    return relation.pairs()


def _operand_bytes(site: AttentionSite, size: Problem) -> int:
    rows = size.heads * size.q_len * (size.head_dim + size.v_dim)
    keys = size.kv_heads * size.k_len * (size.head_dim + size.v_dim)
    return size.batch * (rows + keys) * site.dtype.itemsize


def _scores_bytes(site: AttentionSite, size: Problem) -> int:
    if site.spelling == "sdpa":
        return 0
    return size.batch * size.heads * size.q_len * size.k_len * site.softmax_dtype.itemsize


def _mask_bytes(site: AttentionSite, size: Problem) -> int:
    """Only where a mask tensor is certain: SDPA's causal flag needs none."""
    words = set(site.mask.words)
    by_row = bool(words - {"causal", "window", "chunk", "prefix"})
    if "other" in words or not words or (site.spelling == "sdpa" and words == {"causal"}):
        return 0
    return (size.batch if by_row else 1) * size.q_len * size.k_len
