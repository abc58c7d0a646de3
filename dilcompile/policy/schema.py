"""The policy as typed sections: what the YAML file may hold, with its defaults and its JSON schema."""

from __future__ import annotations

import hashlib
import json
import math
import re
from os import PathLike
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, PrivateAttr, create_model, model_validator

from dilcompile.policy.apply import AnyApply, Apply
from dilcompile.policy.document import write_yaml
from dilcompile.policy.predicates import PREDICATES, satisfied
from dilcompile.policy.problems import Misfit
from dilcompile.policy.section import Section
from dilcompile.policy.strict import strict
from dilcompile.policy.values import Check, Count, Positive, written
from dilcompile.site import AttentionSite

Consequence: TypeAlias = Literal["warn", "keep", "error"]
SIZE = r"^\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|B)\s*$"
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def num_bytes(size: int | str) -> int:
    """``"6GiB"`` as a number of bytes.

    Raises:
        ValueError: if the text is not a number and a unit, or less than a byte.
    """
    match = re.fullmatch(SIZE, size) if isinstance(size, str) else None
    if isinstance(size, int):
        return size
    if match is None:
        raise ValueError(f"{size!r} is not a size such as '6GiB' (units: {', '.join(UNITS)})")
    found = int(float(match[1]) * UNITS[match[2]])
    if not found:
        raise ValueError(f"{size!r} is less than a byte")
    return found


class _Match(Section):
    """What a site must be for the rule to take it. All keys must hold; no key: every site."""

    def takes(self, site: AttentionSite) -> bool:
        """Does the site satisfy every key?"""
        return satisfied(site, self.given().items())


if TYPE_CHECKING:
    Match: TypeAlias = _Match
else:
    Match = create_model(
        "Match",
        __base__=_Match,
        __doc__=_Match.__doc__,
        **{name: (predicate.kind | None, Field(None, description=predicate.doc)) for name, predicate in PREDICATES.items()},
    )


class MeshAxis(Section):
    """One axis of the device mesh."""

    size: Annotated[Count, Field(description="Ranks along the axis.")]
    layout: Annotated[
        Literal["contiguous", "zigzag", "striped", "auto"],
        Field(
            description="How the sequence is cut over the ranks; `auto`: as `shard_inputs` cut the last batch before a model is "
            "compiled, in the order that `best_order` finds."
        ),
    ] = "contiguous"


class Shard(Section):
    """How the rule's sites are held over ranks. The numbers stay those of one rank."""

    mesh: Annotated[
        str | tuple[str, ...],
        Field(
            description="Name of the mesh axis; for `usp` two, with `auto` as well: that over which keys move, then that over "
            "which heads are exchanged."
        ),
    ]
    dim: Annotated[
        Literal["seq", "heads"],
        Field(
            description="What is cut while a site is computed: `heads` is method `ulysses`. The model itself holds the sequence "
            "in parts."
        ),
    ] = "seq"
    method: Annotated[
        Literal["auto", "gather_needed", "halo", "ring", "all_gather", "ulysses", "usp", "tree"],
        Field(
            description="How the keys travel; `auto`: as is predicted to be fastest, `usp` over two axes, `tree` where one query "
            "is decoded. What moves keys in `usp` is predicted too."
        ),
    ] = "auto"
    order: Annotated[
        Literal["auto", "contiguous", "zigzag", "striped"],
        Field(description="Order of the tokens over the ranks; `auto`: the mesh axis's layout."),
    ] = "auto"
    overlap: Annotated[
        Literal["off", "prefetch", "auto"],
        Field(
            description="`prefetch`: keys of the next step travel while this one computes; `off`: after it, so that one message "
            "less is held and links are free meanwhile; `auto`: `prefetch`."
        ),
    ] = "auto"

    @property
    def axes(self) -> tuple[str, ...]:
        """The names of the mesh axes."""
        return (self.mesh,) if isinstance(self.mesh, str) else self.mesh

    @model_validator(mode="after")
    def _fits(self) -> Shard:
        two = self.method == "usp"
        either = self.method == "auto" and self.dim == "seq"
        if len(set(self.axes)) != len(self.axes) or len(self.axes) not in ((1, 2) if either else (2,) if two else (1,)):
            takes = "two different mesh axes, as in [cp, heads]" if two else "one mesh axis"
            takes = "one mesh axis, or two different ones" if either else takes
            raise Misfit(f"method {self.method!r} takes {takes}, got {written(self.mesh)}", ("mesh",))
        if self.dim == "heads" and self.method not in ("auto", "ulysses"):
            raise Misfit(f"dim 'heads' is method 'ulysses', got {self.method!r}; leave one of them out", ("method",))
        return self


class Memory(Section):
    """Where the buffers of the graph live, planned where its operators run one by one (`inner: aot_eager`), and how many bytes
    they may take. In `defaults`, `budget` is that of a whole graph; in a rule, that of the modules whose attention it decides.
    """

    pool: Annotated[Literal["default", "private", "shared"], Field(description="Which arena.")] = "default"
    budget: Annotated[
        Annotated[int, Check("a number of bytes", lambda value: value > 0), Field(gt=0)]
        | Annotated[str, Check("a size such as '6GiB'", num_bytes), Field(pattern=SIZE)]
        | None,
        Field(
            description="Most bytes of what is made at once, forward and backward, parameters and inputs not counted; with "
            "`shard.method: auto` also of other ranks' rows. A number, or a size such as `6GiB`."
        ),
    ] = None
    reuse: Annotated[Literal["off", "within_layer", "across_layers"], Field(description="Who may share a buffer.")] = "off"


class Tolerance(Section):
    """How far a checked site may be from the model's own computation."""

    rel_l2: Annotated[
        Positive,
        Field(description="Norm of the difference over that of the model's own result. Both are computed in float64."),
    ] = 1e-9


class Numerics(Section):
    """How exactly sites are computed."""

    accumulate: Annotated[Literal["fp32"], Field(description="Type of the running sums.")] = "fp32"
    merge_grad: Annotated[
        Literal["exact", "detach"],
        Field(description="Default of the option `merge_grad` of forms that have it."),
    ] = "exact"
    check: Annotated[
        Literal["off", "compile", "first_call", "always"],
        Field(
            description="Compare each rewritten site with the model's own computation, in float64: on random inputs before the "
            "rewrite is accepted (`compile`), or on the inputs of the first or of every call (`first_call`, `always`)."
        ),
    ] = "off"
    tolerance: Annotated[Tolerance, Field(description="Bound of `check`.")] = Tolerance()


class Fallback(Section):
    """What happens where the policy can't be followed."""

    unsupported: Annotated[
        Consequence,
        Field(description="A form can't be given to a site: keep it and warn, keep it and list it, or stop."),
    ] = "warn"
    unmatched: Annotated[
        Consequence,
        Field(
            description="A graph has attention sites and no rule takes any of them (`defaults` only): keep them and warn, keep "
            "them quietly, or stop."
        ),
    ] = "warn"
    shape: Annotated[
        Consequence,
        Field(description="A later call brings sizes that the form can't take. No effect in this version."),
    ] = "keep"
    quality: Annotated[
        Consequence,
        Field(
            description="`numerics.check` found more than the tolerance: keep the model's own computation and warn, keep it "
            "and list it, or stop."
        ),
    ] = "warn"


class Defaults(Section):
    """What holds for every rule that doesn't say otherwise, key by key."""

    numerics: Numerics = Numerics()
    fallback: Fallback = Fallback()
    memory: Annotated[Memory | None, Field(description="`budget`: of each whole graph.")] = None


class Rule(Section):
    """Takes the sites that ``match`` describes and that no earlier rule took."""

    name: Annotated[str | None, Field(description="Shown in reports; unique in a policy.")] = None
    match: Annotated[Match, Field(description="Which sites.")] = Match()
    apply: Annotated[AnyApply, Field(description="What they become.")]
    shard: Annotated[Shard | None, Field(description="How they are held over ranks.")] = None
    memory: Annotated[
        Memory | None, Field(description="Over `defaults.memory`, key by key, but for `budget`: both are kept.")
    ] = None
    numerics: Annotated[Numerics, Field(description="Over `defaults.numerics`, key by key.")] = Numerics()
    fallback: Annotated[Fallback, Field(description="Over `defaults.fallback`, key by key.")] = Fallback()

    @model_validator(mode="after")
    def _ring_is_sharded(self) -> Rule:
        if self.apply.form != "ring":
            return self
        if self.shard is None:
            raise Misfit("form 'ring' needs the ranks that the keys go around: add shard: {mesh: AXIS}", ("apply", "form"))
        if self.shard.method not in ("auto", "ring") or self.shard.dim == "heads":
            asked = "heads" if self.shard.dim == "heads" else self.shard.method
            raise Misfit(f"form 'ring' is method 'ring', but shard asks for {asked!r}; leave one of them out", ("apply", "form"))
        return self

    _cited: str = PrivateAttr("")
    _extended: bool = PrivateAttr(False)

    @property
    def label(self) -> str:
        """Name and place: ``decoder-self (policy.yaml:8)``."""
        name = self.name or "unnamed rule"
        return f"{name} ({self._cited})" if self._cited else name

    @property
    def extended(self) -> bool:
        """It comes from what the policy extends."""
        return self._extended

    def __str__(self) -> str:
        match = ", ".join(f"{key}: {written(value)}" for key, value in self.match.given().items()) or "every site"
        options = ", ".join(f"{key}: {written(value)}" for key, value in self.apply.options.items())
        kernel = f" on {self.apply.kernel}" if self.apply.kernel else ""
        over = "" if self.shard is None else f" over {' x '.join(self.shard.axes)}"
        return f"{self.label}: {match} -> {self.apply.form}{f'({options})' if options else ''}{kernel}{over}"


class Policy(Section):
    """Ordered rules: the first one that matches a site decides it.

    ``Policy.load`` reads any source and resolves ``extends``: what it returns holds all rules itself.
    Two policies are equal if their content is.
    """

    version: Annotated[
        Annotated[int, Check("1, the version of the policy language", lambda value: value == 1)],
        Field(description="Version of the policy language: 1.", json_schema_extra={"const": 1}),
    ] = 1
    name: Annotated[str | None, Field(description="Shown in reports.")] = None
    extends: Annotated[
        str | tuple[str, ...] | None,
        Field(description="Presets, or files relative to this one, whose rules follow this file's."),
    ] = None
    mesh: Annotated[dict[str, MeshAxis], Field(description="Axes of the device mesh by name.")] = Field(default_factory=dict)
    defaults: Annotated[Defaults, Field(description="For every rule.")] = Defaults()
    rules: Annotated[tuple[Rule, ...], Field(description="First match wins.")] = ()

    @classmethod
    def load(cls, source: str | PathLike[str] | dict[str, Any] | Policy | None = None) -> Policy:
        """A policy from a file, a dict, a preset's name or a Policy.

        None: what ``DILCOMPILE_POLICY`` names, else the preset ``longnet``.

        Raises:
            PolicyError: with every problem found, each with its file, line and column.
        """
        from dilcompile.policy.load import load

        return load(source)

    @classmethod
    def from_yaml(cls, source: str | PathLike[str]) -> Policy:
        """A policy from a file, or from YAML text (text that spans lines, or starts with ``{``).

        Raises:
            PolicyError: with every problem found, each with its file, line and column.
        """
        from dilcompile.policy.load import load_yaml

        return load_yaml(source)

    def to_yaml(self) -> str:
        """The policy as YAML; ``from_yaml`` gives an equal policy back."""
        return write_yaml({"version": self.version, **self.plain()})

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """JSON Schema (draft 2020-12) of the file, for editors."""
        schema = strict(cls.model_json_schema())
        # A file without rules of its own takes those of what it extends.
        some = {"anyOf": [{"required": ["rules"]}, {"required": ["extends"]}]}
        return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, **some}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the content, presets included: part of the compile cache key."""
        whole = type(self).load(self)
        content = {"version": whole.version, **whole.plain()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def model_post_init(self, context: Any) -> None:
        """Rules that no file cites are cited by their index, so that every label is unique."""
        for index, rule in enumerate(self.rules):
            rule._cited = rule._cited or f"rules[{index}]"

    @property
    def shards(self) -> bool:
        """A rule holds its sites over several ranks."""
        cut = [rule.shard for rule in self.rules if rule.shard is not None]
        return any(math.prod(self.mesh[axis].size for axis in shard.axes) > 1 for shard in cut)

    @property
    def has_budget(self) -> bool:
        """A budget of memory is given somewhere."""
        given = [self.defaults.memory, *(rule.memory for rule in self.rules)]
        return any(memory is not None and memory.budget is not None for memory in given)

    def numerics_of(self, rule: Rule) -> Numerics:
        """The rule's numerics over the defaults."""
        return Numerics(**{**self.defaults.numerics.given(), **rule.numerics.given()})

    def fallback_of(self, rule: Rule) -> Fallback:
        """The rule's fallback over the defaults."""
        return Fallback(**{**self.defaults.fallback.given(), **rule.fallback.given()})

    def memory_of(self, rule: Rule | None) -> Memory | None:
        """The rule's memory over the defaults, with the rule's own budget; None where neither says anything."""
        own = None if rule is None else rule.memory
        if own is None and self.defaults.memory is None:
            return None
        given = {} if self.defaults.memory is None else self.defaults.memory.given()
        given.pop("budget", None)
        return Memory(**given | ({} if own is None else own.given()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __reduce__(self) -> tuple[Any, ...]:
        # The models of the forms are made at import; a pickle holds plain values only.
        return (_restored, (self.plain(), [(rule._cited, rule._extended) for rule in self.rules]))

    def __str__(self) -> str:
        return "\n".join([f"policy {self.name or '(unnamed)'}", *(f"  {rule}" for rule in self.rules)])


def _restored(content: dict[str, Any], origins: list[tuple[str, bool]]) -> Policy:
    policy = Policy.model_validate(content)
    for rule, (place, extended) in zip(policy.rules, origins, strict=True):
        rule._cited, rule._extended = place, extended
    return policy


__all__ = [
    "Apply",
    "Defaults",
    "Fallback",
    "Match",
    "Memory",
    "MeshAxis",
    "Numerics",
    "Policy",
    "Rule",
    "Shard",
    "Tolerance",
]
