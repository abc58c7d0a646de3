"""What a spec means at given sizes: the relation, who holds which positions, and every rank's schedule. Equal on all ranks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from torch import Tensor

from dilcompile.errors import PlacementError
from dilcompile.forms import BlockSparse, Form
from dilcompile.lowering.call import form_of, merge_grad
from dilcompile.lowering.distributed import meshes
from dilcompile.lowering.distributed.spec import Spec, parse_spec
from dilcompile.near import hint
from dilcompile.placements import PLACEMENTS
from dilcompile.placements.parts import by_part
from dilcompile.placements.schedule import Placement, RankSchedule, Step
from dilcompile.placements.shards import Order, Run, Shards
from dilcompile.relation import Problem, Relation

# Those that this folder executes beside the placements that move keys.
OTHERS = ("ulysses", "usp", "tree")


@dataclass(frozen=True)
class Where:
    """A rank by its numbers on the two axes: that over which keys move, and that over which heads are exchanged."""

    rank: int
    part: int = 0


@dataclass(frozen=True)
class Sizes:
    """What a rank holds: batch rows, places and head sizes; and the ranks of the two axes."""

    batch: int
    places: int
    head_dim: int
    v_dim: int
    ranks: int
    parts: int = 1


@dataclass(frozen=True)
class Plan:
    """One sharded attention, ready to be executed by any rank.

    Args:
        relations: over the whole sequence, one for each part of the heads.
        schedules: ``schedules[part][rank]``.
    """

    spec: Spec
    sizes: Sizes
    shards: Shards
    relations: tuple[Relation, ...]
    schedules: tuple[tuple[RankSchedule, ...], ...]
    resends: bool

    @property
    def num_steps(self) -> int:
        """Steps of every rank."""
        return len(self.schedules[0][0].steps)

    @property
    def heads(self) -> int:
        """Query heads of one part."""
        return self.relations[0].problem.heads

    @property
    def kv_heads(self) -> int:
        """Key heads of one part."""
        return self.relations[0].problem.kv_heads

    def step(self, at: Where, number: int) -> Step:
        """A step of a rank."""
        return self.schedules[at.part][at.rank].steps[number]

    def runs(self, at: Where) -> tuple[Run, ...]:
        """What the places of a rank hold, those of all its parts together."""
        return self.shards.runs(at.rank)

    def elements(self, rows: int) -> int:
        """Numbers in so many rows of one key head, keys and values, of all batch rows."""
        return rows * self.sizes.batch * (self.sizes.head_dim + self.sizes.v_dim)

    def receives(self, number: int) -> int:
        """Room for what the rank that receives most gets in a step, in numbers; 0: nobody gets anything."""
        return self._most[number][0]

    def sends(self, number: int) -> int:
        """Room for what the rank that sends most gives in a step, in numbers."""
        return self._most[number][1]

    def attends_own(self, number: int) -> bool:
        """Does a rank attend to keys of its own shard in this step?"""
        return self._most[number][2]

    @cached_property
    def _most(self) -> tuple[tuple[int, int, bool], ...]:
        found = []
        for number in range(self.num_steps):
            steps = [each.steps[number] for ranks in self.schedules for each in ranks]
            received, sent = (max(getattr(step, what) for step in steps) for what in ("rows_received", "rows_sent"))
            found.append((self.elements(received), self.elements(sent), any(step.local for step in steps)))
        return tuple(found)

    def relation(self, part: int, kv_heads: tuple[int, int], rows: int) -> Relation:
        """The relation of some key heads of a part, for so many query rows."""
        return _relation_of(self.relations[part], kv_heads).at(rows, self.shards.length, 0)


@lru_cache(maxsize=4096)
def _relation_of(relation: Relation, kv_heads: tuple[int, int]) -> Relation:
    return relation if kv_heads == (0, relation.problem.kv_heads) else relation.of_heads(*kv_heads)


def here(spec: Spec) -> Where:
    """This process."""
    return Where(meshes.rank_of(keys_axis(spec)), meshes.rank_of(heads_axis(spec)))


def keys_axis(spec: Spec) -> str | None:
    """The mesh axis over which keys move, or None."""
    return None if spec.placement == "ulysses" else spec.axis


def heads_axis(spec: Spec) -> str | None:
    """The mesh axis over which heads are exchanged, or None."""
    return spec.axis if spec.placement == "ulysses" else spec.heads_axis


def sizes_of(spec: Spec, k: Tensor, v: Tensor, cut: bool = False) -> Sizes:
    """What this rank holds; ``cut``: k and v are the slice of one part."""
    batch, _, rows, head_dim = map(int, k.shape)
    ranks, parts = meshes.size_of(keys_axis(spec)), meshes.size_of(heads_axis(spec))
    return Sizes(batch, rows * parts if cut else rows, head_dim, int(v.shape[3]), ranks, parts)


def plan_of(text: str, k: Tensor, v: Tensor) -> Plan:
    """The plan of a spec for keys and values as the steps see them (all places of a rank, the key heads of a part)."""
    spec = parse_spec(text)
    return make_plan(text, sizes_of(spec, k, v))


@lru_cache(maxsize=256)
def make_plan(text: str, sizes: Sizes) -> Plan:
    """The plan of a spec at these sizes.

    Raises:
        PlacementError: if the placement can't be had, with the reason.
    """
    spec = parse_spec(text)
    length = sizes.ranks * sizes.places if spec.length is None else spec.length
    shards, places = Shards(length, sizes.ranks, spec.order, sizes.parts), places_of(spec, length, sizes.ranks, sizes.parts)
    if places != sizes.places:
        raise PlacementError(
            f"{spec.site}: {length} tokens over {sizes.ranks * sizes.parts} ranks ({spec.order}) are "
            f"{places // sizes.parts} places a rank, but q, k and v have {sizes.places // sizes.parts}; cut and pad them "
            f"with dilcompile.distributed.shard_inputs"
        )
    whole = whole_relation(spec, sizes, length)
    reason = refusal(spec, whole, sizes)
    if reason is not None:
        raise PlacementError(f"{spec.site}: placement {spec.placement!r} can't be had: {reason}")
    relations = by_part(whole, sizes.parts)
    placement = moving_placement(spec)
    schedules = []
    for relation in relations:
        reason = None if sizes.ranks == 1 else placement.reject(relation, shards, spec.documents)
        if reason is not None:
            raise PlacementError(f"{spec.site}: placement {spec.placement!r} can't be had: {reason}")
        ranks = range(sizes.ranks)
        schedules.append(tuple(placement.schedule(relation, shards, rank, spec.documents) for rank in ranks))
    return Plan(spec, sizes, shards, relations, tuple(schedules), placement.RESENDS)


def cut_of(spec: Spec, length: int, ranks: int, parts: int) -> Shards:
    """How the ranks hold the operands: with ``ulysses`` those of the axis over which heads are exchanged hold the sequence."""
    return Shards(length, parts, spec.order) if spec.placement == "ulysses" else Shards(length, ranks, spec.order, parts)


def order_of_parts(spec: Spec) -> Order:
    """Which positions each rank of the axis over which heads are exchanged holds, of those that they hold together: with ``usp``
    slices of places, which lie as they lie."""
    return spec.order if spec.placement == "ulysses" else "contiguous"


def places_of(spec: Spec, length: int, ranks: int, parts: int) -> int:
    """Places of all parts of a rank together."""
    return cut_of(spec, length, ranks, parts).places * (parts if spec.placement == "ulysses" else 1)


def moving_placement(spec: Spec) -> Placement:
    """Who moves keys for this spec.

    Raises:
        PlacementError: if there is none of that name.
    """
    name = spec.placement
    if name == "ulysses":
        name = "all_gather"  # over one rank: all keys are there
    elif name == "usp":
        name = spec.moving or "ring"
    if name not in PLACEMENTS:
        known = (*PLACEMENTS, *OTHERS)
        raise PlacementError(f"placement {name!r} is unknown{hint(name, known)}; the placements are {', '.join(known)}")
    return PLACEMENTS[name]


def whole_relation(spec: Spec, sizes: Sizes, length: int, q_len: int | None = None, q_offset: int = 0) -> Relation:
    """The relation over the whole sequence and all heads."""
    problem = Problem(
        sizes.batch, spec.heads, spec.kv_heads, length if q_len is None else q_len, length, sizes.head_dim, sizes.v_dim, q_offset,
        spec.is_causal, spec.window_left, spec.window_right,
    )  # fmt: skip
    return form_of(spec.form).relation(problem)


def refusal(spec: Spec, relation: Relation, sizes: Sizes) -> str | None:
    """Why the relation can't be computed by steps, whatever moves the keys, or None."""
    form = form_of(spec.form)
    if relation.is_bound and sizes.ranks > 1:
        return "its blocks are chosen from the data of the whole sequence; take ulysses"
    if relation.is_bound and spec.documents:
        return "its blocks are chosen from the data of whole sequences, and documents are packed; take a pattern without data"
    if merge_grad(form) == "detach":
        return "merge_grad 'detach' needs the LSE of each branch over the whole sequence; take merge_grad 'exact'"
    if _moves_tokens(form):
        return "its tokens lie along a curve of the whole grid; take order 'none'"
    if sizes.parts > 1 and spec.heads % sizes.parts:
        return f"{spec.heads} query heads can't be dealt to {sizes.parts} ranks; take a divisor of {spec.heads}, or a ring"
    return None


def _moves_tokens(form: Form) -> bool:
    return isinstance(form, BlockSparse) and form.curve is not None and form.curve.moves
