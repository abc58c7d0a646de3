"""Every key of the policy language by where it stands: the hints for an unknown key."""

from __future__ import annotations

from dilcompile.near import closest
from dilcompile.policy.apply import APPLY
from dilcompile.policy.problems import Path
from dilcompile.policy.schema import (
    Defaults,
    Fallback,
    Match,
    Memory,
    MeshAxis,
    Numerics,
    Policy,
    Rule,
    Shard,
    Tolerance,
)
from dilcompile.policy.section import Section

SECTIONS: dict[str, type[Section]] = {
    "defaults": Defaults,
    "rules": Rule,
    "match": Match,
    "shard": Shard,
    "memory": Memory,
    "numerics": Numerics,
    "fallback": Fallback,
    "tolerance": Tolerance,
}


def section_at(path: Path, form: str = "") -> type[Section] | None:
    """The section that ``path`` leads to; ``form`` picks the one of ``apply``."""
    names = [step for step in path if isinstance(step, str)]
    if not names:
        return Policy
    if names[-1] == "apply":
        return APPLY.get(form)
    return MeshAxis if names[0] == "mesh" else SECTIONS.get(names[-1])


def key_hint(path: Path, form: str = "") -> str:
    """`` (did you mean 'causal'?)``: the nearest name, or the place where this very key belongs."""
    word, section = str(path[-1]), section_at(path[:-1], form)
    of_forms = [name for name, model in APPLY.items() if word in model.model_fields]
    inside = path[-2:-1] == ("apply",)
    if inside and form and of_forms:
        return f" (form {form!r} takes no such key; {', '.join(of_forms)} {'does' if len(of_forms) == 1 else 'do'})"
    near = closest(word, section.model_fields) if section is not None else None
    elsewhere = [f"{name}.{word}" for name, section in SECTIONS.items() if word in section.model_fields]
    if of_forms and not inside:
        elsewhere.append(f"apply.{word}")
    meant = near or (elsewhere[0] if elsewhere else None)
    return f" (did you mean {meant!r}?)" if meant else ""
