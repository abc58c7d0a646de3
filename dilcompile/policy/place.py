"""What a rule's ``shard`` makes of one site: a placement, or the reason why the site can't be held by several ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.fx.experimental.symbolic_shapes import statically_known_true

from dilcompile.errors import FormError
from dilcompile.forms import BlockSparse, Dilated, Form, KeepStructure, Union
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.choice import Method, PlacementChoice
from dilcompile.placements.choose import Site, choose
from dilcompile.placements.device import device_of
from dilcompile.placements.marks import MARKS
from dilcompile.placements.shards import Order, Shards
from dilcompile.policy.schema import num_bytes
from dilcompile.relation import Problem, Relation
from dilcompile.site import AttentionSite, Length

if TYPE_CHECKING:
    from dilcompile.policy.schema import Policy, Rule, Shard

_TABLES = "leave `shard` out for it, or take a model without it"


@dataclass(frozen=True)
class Unplaced:
    """Why a site can't be sharded, naming the limit, and the cure."""

    reason: str
    cure: str


def place(policy: Policy, rule: Rule, site: AttentionSite, form: Form) -> PlacementChoice | Unplaced | None:
    """The placement of a site under a rule; None where the rule asks for none, or its mesh axes have one rank.

    Args:
        form: what the site becomes, settled.
    """
    shard = rule.shard
    if shard is None or ranks_of(policy, shard) == 1:
        return None
    axis, *heads = shard.axes
    order = order_of(policy, shard)
    if order is None:
        return Unplaced(
            f"the order of its tokens is auto, and no batch was cut over mesh axis {axis!r} yet",
            "cut it with dilcompile.distributed.shard_inputs before the model is compiled, in the order that "
            "dilcompile.distributed.best_order finds",
        )
    shards = Shards(0, policy.mesh[axis].size, order, policy.mesh[heads[0]].size if heads else 1)
    method, moving, why = _method(rule, shard, site, form, shards)
    unfit = (
        _unfit_site(site, form.fidelity(site) == "exact")
        or _unfit_form(form)
        or _unfit_method(site, method, shards)
        or _refused(site, form, moving or method, shards)
    )
    if unfit is not None:
        return unfit
    return PlacementChoice(
        axis=axis,
        ranks=shards.ranks,
        method=method,
        order=order,
        overlap="off" if shard.overlap == "off" else "prefetch",
        heads_axis=heads[0] if heads else None,
        heads_ranks=shards.parts,
        moving=moving,
        why=why,
    )


def is_decoded(site: AttentionSite) -> bool:
    """One query behind many keys: every rank has it."""
    return site.phase == "decode" and _same(site.q_len, 1) and not _same(site.k_len, 1)


def whole_site(site: AttentionSite, ranks: int, method: str) -> AttentionSite:
    """A site whose rows are a shard, with the lengths of the whole sequence. A tree's queries are on all ranks."""
    return replace(site, q_len=site.q_len if method == "tree" else site.q_len * ranks, k_len=site.k_len * ranks)


def ranks_of(policy: Policy, shard: Shard) -> int:
    """Ranks that hold one sequence."""
    return math.prod(policy.mesh[axis].size for axis in shard.axes)


def order_of(policy: Policy, shard: Shard) -> Order | None:
    """In which order the ranks hold the tokens: as the rule says, else as the mesh axis does; ``auto``: as the last batch was
    cut, None where none was."""
    axis = policy.mesh.get(shard.axes[0])
    if shard.order != "auto":
        return shard.order
    if axis is None:
        return "contiguous"
    return MARKS.order_of(shard.axes[0]) if axis.layout == "auto" else axis.layout


def method_asked(rule: Rule, shard: Shard, site: AttentionSite) -> tuple[Method, str] | None:
    """The method where the rule leaves no choice, and why so."""
    if rule.apply.form == "ring":
        return "ring", "form: ring"
    if shard.dim == "heads":
        return "ulysses", "dim: heads"
    if shard.method != "auto":
        return shard.method, "the policy names it"
    return ("tree", "auto: one query, which every rank has") if is_decoded(site) else None


def _method(rule: Rule, shard: Shard, site: AttentionSite, form: Form, shards: Shards) -> tuple[Method, str | None, str]:
    """How keys come to queries, for ``usp`` what moves them, and why so."""
    asked = method_asked(rule, shard, site)
    if asked is not None and asked[0] != "usp":
        return asked[0], None, asked[1]
    planned = planned_site(site, form, shard.overlap != "off")
    # Where queries are not the positions of the keys it is refused later on.
    if planned is None or not _same(site.q_len, site.k_len):
        why = "no other placement moves fewer rows"
        return ("usp", "gather_needed", why) if shards.parts > 1 else ("gather_needed", None, f"auto: {why}")
    budget = None if rule.memory is None or rule.memory.budget is None else num_bytes(rule.memory.budget)
    device = device_of(site.device, shard.axes[0])
    chosen = choose(planned, replace(shards, length=planned.relation.problem.k_len), device, budget)
    if isinstance(chosen, str):
        none = f"auto: no placement can be had ({chosen})"
        return ("usp", "ring", none) if shards.parts > 1 else ("ring", None, none)
    why = f"auto: {chosen.why}" if asked is None else f"{asked[1]}; {chosen.why}"
    return chosen.best.method, chosen.best.moving, why  # type: ignore[return-value]


def planned_site(site: AttentionSite, form: Form, prefetch: bool = True) -> Site | None:
    """A site over the whole sequence as predictions take it; None where its lengths are not known."""
    relation = _relation(site, form)
    if relation is None:
        return None
    return Site(relation, site.dtype.itemsize, site.mask.documents, site.phase == "train", prefetch)


def _refused(site: AttentionSite, form: Form, method: str, shards: Shards) -> Unplaced | None:
    """Why the placement itself refuses the relation, at the lengths of the example."""
    relation = _relation(site, form) if method in PLACEMENTS else None
    if relation is None or shards.ranks == 1:
        return None
    reason = PLACEMENTS[method].reject(relation, replace(shards, length=relation.problem.k_len), site.mask.documents)
    return None if reason is None else Unplaced(reason, "or take method: auto")


def _relation(site: AttentionSite, form: Form) -> Relation | None:
    """The site's relation at the lengths of the example; None where they are not known."""
    sizes = [length if isinstance(length, int) else length.node.hint for length in (site.batch, site.q_len, site.k_len)]
    if not all(isinstance(size, int) for size in sizes):
        return None
    mask = site.mask
    batch, q_len, k_len = sizes
    problem = Problem(
        batch, site.heads, site.kv_heads, q_len, k_len, site.head_dim, site.v_dim, 0, mask.causal, mask.left, mask.right
    )
    try:
        return form.relation(problem)
    except FormError:
        return None  # it is told of where the form is bound to its sizes


def _unfit_site(site: AttentionSite, exact: bool) -> Unplaced | None:
    """What of the site itself is not known from one rank's rows."""
    mask = site.mask
    if site.bias:
        what = " + ".join(bias.word for bias in site.bias)
        return Unplaced(f"a bias over pairs ({what}) is added to its scores, computed for the rows of one rank alone", _TABLES)
    if mask.unread is not None:
        return Unplaced(f"its mask could not be read ({mask.unread}): a tensor over the pairs of one rank", _TABLES)
    if mask.runtime_offset or not (isinstance(mask.q_offset, int) and mask.q_offset == 0):
        return Unplaced(
            "its queries stand behind keys of a cache: which rank holds them is not known",
            "shard training and prefill without a cache (use_cache=False)",
        )
    if exact and mask.empty_rows not in ("zero", "nan"):
        return Unplaced(
            "a row that sees no key gets the mean of values that other ranks hold",
            "use attn_implementation='sdpa' or a mask of -inf, whose empty rows are 0 or NaN, or leave the padding out",
        )
    if exact and site.narrowed != "no":
        return Unplaced(
            "its float64 scores go through a softmax in float32, which is not repeated digit by digit over ranks",
            "compute it in float32, or with scaled_dot_product_attention",
        )
    return None


def _unfit_form(form: Form) -> Unplaced | None:
    """What of the form can't be computed in parts."""
    parts = form.parts if isinstance(form, Union) else (form,)
    for part in parts:
        if isinstance(part, Dilated) and part.merge_grad == "detach":
            return Unplaced("merge_grad 'detach' needs the LSE of each branch over the whole sequence", "take merge_grad: exact")
        if isinstance(part, BlockSparse) and part.curve is not None and part.curve.moves:
            return Unplaced("its blocks lie along a curve of the whole grid", "take order: none")
        if isinstance(part, BlockSparse) and part.is_adaptive:
            return Unplaced("its blocks are chosen from the data of the whole sequence", "take a pattern without data")
    return None


def _unfit_method(site: AttentionSite, method: Method, shards: Shards) -> Unplaced | None:
    """What of the site this way of bringing keys to queries doesn't take."""
    mask = site.mask
    by_row = [factor.formula for factor in mask.by_row if factor.word != "chunk" or mask.chunk is None]
    if by_row:
        return Unplaced(
            f"its mask has a factor by row ({' and '.join(by_row)}) over the rows of one rank; no formula over the whole "
            "sequence is known for it",
            "say it by documents or key padding, or leave `shard` out for it",
        )
    if method == "tree":
        return _unfit_tree(site)
    if site.kind != "self":
        return Unplaced(
            "it is cross attention: queries and keys are not positions of one sequence",
            "leave `shard` out for it; queries that every rank holds take method: tree",
        )
    dealt = shards.ranks if method == "ulysses" else shards.parts
    if site.heads % dealt:
        return Unplaced(
            f"{site.heads} query heads can't be dealt to {dealt} ranks", "take a number of ranks that divides them, or a ring"
        )
    if not _same(site.q_len, site.k_len):
        return Unplaced(
            f"it has {site.q_len} queries but {site.k_len} keys: a rank holds both of the same tokens", "leave `shard` out for it"
        )
    return None


def _same(a: Length, b: Length) -> bool:
    """Are two lengths surely the same? Adds no guard."""
    return statically_known_true(a == b)


def _unfit_tree(site: AttentionSite) -> Unplaced | None:
    if set(site.mask.words) - {"padding"}:
        return Unplaced(
            f"method tree is for queries that all ranks hold and that see every key; its mask is {site.mask}",
            "take another method",
        )
    return None


def kept_form(site: AttentionSite) -> Form:
    """What ``form: keep`` is where the site has to be computed over ranks: the pairs of its own mask, exactly."""
    return KeepStructure().settled(site)
