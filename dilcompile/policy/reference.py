"""The reference tables of docs/policy.md, from the schema: ``python -m dilcompile.policy.reference docs/policy.md``."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from dilcompile.decision import KERNEL_NAMES
from dilcompile.forms import FORMS, Form
from dilcompile.policy.apply import APPLY, KEEPING, RESERVED, policy_options
from dilcompile.policy.load import PRESETS
from dilcompile.policy.predicates import PREDICATES
from dilcompile.policy.schema import Fallback, Memory, MeshAxis, Numerics, Policy, Shard, Tolerance
from dilcompile.policy.section import Section
from dilcompile.policy.values import expected, written


def _table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def match_keys() -> str:
    """One row a predicate."""
    rows = [(f"`{p.name}`", expected(p.kind), p.doc, f"`{p.example}`") for p in PREDICATES.values()]
    return _table(("key", "takes", "the rule takes a site if", "example"), rows)


def forms() -> str:
    """``keep`` and ``ring``, then one section a form with a row an option."""
    parts = [
        f"Every form also takes `kernel`, the name of the kernel to use: {', '.join(f'`{name}`' for name in KERNEL_NAMES)}. "
        "Without it the fastest that can is used. A site that the named kernel can't compute is treated as "
        "`fallback: {unsupported: ...}` says; another kernel never takes its place.",
        *(f"### `form: {name}`\n\n{APPLY[name].__doc__}" for name in KEEPING),
    ]
    parts += [_form(name, form) for name, form in FORMS.items()]
    names = ", ".join(f"`{name}`" for name in RESERVED)
    parts.append(f"Not built yet, and refused with an error: {names}.")
    return "\n\n".join(parts)


def _form(name: str, form: type[Form]) -> str:
    doc = re.sub(r"``([^`]*)``", r"`\1`", form.__doc__ or "")
    head = f"### `form: {name}`\n\n{' '.join(doc.split(chr(10) * 2)[0].split())}"
    meanings = dict(re.findall(r"^ {8}(\w+): (.*(?:\n {12}.*)*)$", doc, flags=re.MULTILINE))
    kinds = get_type_hints(form, include_extras=True)
    rows = [
        (f"`{option.name}`", expected(kinds[option.name]), _default(option.default), " ".join(meanings[option.name].split()))
        for option in policy_options(form)
    ]
    return f"{head}\n\n{_table(('key', 'takes', 'default', 'meaning'), rows)}" if rows else head


def _default(value: Any) -> str:
    if value is None:
        return "none"
    return "required" if value is dataclasses.MISSING else f"`{written(value)}`"


def _section(section: type[Section]) -> str:
    rows = []
    for name, field in section.model_fields.items():
        plain = not (isinstance(field.annotation, type) and issubclass(field.annotation, Section))
        kind: Any = field.annotation
        if field.metadata:
            takes = expected(_annotated(kind, field.metadata))
        else:
            takes = expected(kind) if plain else f"see `{name}`"
        default = "required" if field.is_required() else f"`{written(field.default)}`"
        if not plain or field.default is None:
            default = "none"
        rows.append((f"`{name}`", takes, default, field.description or ""))
    doc = " ".join((section.__doc__ or "").split())
    return f"{doc}\n\n{_table(('key', 'takes', 'default', 'meaning'), rows)}"


def _annotated(kind: Any, metadata: list[Any]) -> Any:
    parts: Any = (kind, *metadata)
    return Annotated[parts]


def presets() -> str:
    """Each preset with the comment at its head and its rules."""
    parts = []
    for name, path in PRESETS.items():
        head = re.match(r"(#.*\n)+", path.read_text(encoding="utf-8"))
        words = re.sub(r"^# ?", "", head[0], flags=re.MULTILINE).strip() if head else ""
        rules = "\n".join(re.sub(r" \(preset [^)]*\)", "", str(rule)) for rule in Policy.load(name).rules)
        parts.append(f"### `{name}`\n\n{words}\n\n```text\n{rules}\n```")
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[], str]] = {
    "match": match_keys,
    "forms": forms,
    "shard": lambda: _section(Shard),
    "mesh": lambda: _section(MeshAxis),
    "memory": lambda: _section(Memory),
    "numerics": lambda: _section(Numerics),
    "tolerance": lambda: _section(Tolerance),
    "fallback": lambda: _section(Fallback),
    "presets": presets,
}


def render(page: str) -> str:
    """The page with the text between ``<!-- generated: NAME -->`` and ``<!-- end -->`` made anew."""

    def fill(found: re.Match[str]) -> str:
        return f"{found[1]}\n{BLOCKS[found[2]]()}\n{found[3]}"

    return re.sub(r"(<!-- generated: (\w+) -->)\n.*?(<!-- end -->)", fill, page, flags=re.DOTALL)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(render(Path(name).read_text(encoding="utf-8")), encoding="utf-8")
