"""From any source to one policy: read, check everything, then join it with what it extends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path as FilePath
from typing import Any

from pydantic import ValidationError

from dilcompile.errors import PolicyError
from dilcompile.near import hint
from dilcompile.policy.apply import also_unfit
from dilcompile.policy.document import Document, read_yaml
from dilcompile.policy.keys import key_hint
from dilcompile.policy.problems import Misfit, Path, Problem
from dilcompile.policy.schema import Policy
from dilcompile.policy.values import shown

ENVIRONMENT = "DILCOMPILE_POLICY"
DEFAULT_PRESET = "longnet"
PRESETS = {path.stem: path for path in sorted((FilePath(__file__).parent / "presets").glob("*.yaml"))}


@dataclass
class _Joined:
    """What a document says together with what it extends; ``complete``: all of that could be read."""

    name: str | None = None
    mesh: dict[str, Any] = field(default_factory=dict)
    defaults: dict[str, dict[str, Any]] = field(default_factory=dict)
    rules: list[tuple[dict[str, Any], Document, int]] = field(default_factory=list)
    complete: bool = True

    def under(self, base: _Joined) -> None:
        """Add what ``base`` has and this one doesn't; a rule of a name that is taken is replaced."""
        self.mesh = {**base.mesh, **self.mesh}
        self.complete = self.complete and base.complete
        for section, keys in base.defaults.items():
            self.defaults[section] = {**keys, **self.defaults.get(section, {})}
        taken = {rule["name"] for rule, _, _ in self.rules if "name" in rule}
        self.rules += [entry for entry in base.rules if entry[0].get("name") not in taken]


def load(source: str | PathLike[str] | dict[str, Any] | Policy | None = None) -> Policy:
    """See ``Policy.load``."""
    if isinstance(source, Policy):
        return source if source.rules and not source.extends else load(source.plain())
    if isinstance(source, dict):
        return _finish(Document("<dict>", source, kind="dict"), FilePath())
    whence = ""
    if source is None:
        source = os.environ.get(ENVIRONMENT) or DEFAULT_PRESET
        whence = f"{ENVIRONMENT}: "
    if not isinstance(source, (str, PathLike)):
        raise PolicyError([f"a policy is a path, a preset's name, a dict or a Policy, not {shown(source)}"])
    name = os.fspath(source)
    if not name.strip():
        raise PolicyError([f"{whence}a policy is a path, a preset's name, a dict or a Policy, not an empty text"])
    path, reason = _find(name, FilePath())
    if path is None:
        raise PolicyError([f"{whence}{name}: {reason}"])
    return _load_file(path, f"preset {name}" if name in PRESETS else name)


def load_yaml(source: str | PathLike[str]) -> Policy:
    """See ``Policy.from_yaml``."""
    if isinstance(source, str) and ("\n" in source or source.lstrip().startswith("{") or not source.strip()):
        return _finish(read_yaml(source, "<text>"), FilePath())
    return load(source)


def _load_file(path: FilePath, name: str) -> Policy:
    document = _read(path, name)
    return _finish(document, path.parent, (path.resolve(),))


def _read(path: FilePath, name: str) -> Document:
    try:
        return read_yaml(path.read_text(encoding="utf-8-sig"), name)
    except UnicodeDecodeError as error:
        raise PolicyError([f"{name}: the file is not UTF-8 text (byte {error.start})"]) from None
    except OSError as error:
        raise PolicyError([f"{name}: the file can't be read ({error.strerror})"]) from None


def _find(name: str, folder: FilePath) -> tuple[FilePath | None, str]:
    """The file that a source or an entry of ``extends`` means, or the reason why there is none."""
    if name in PRESETS:
        return PRESETS[name], ""
    path = folder / FilePath(name).expanduser()
    if path.is_file():
        return path, ""
    has = f"the presets are {', '.join(PRESETS)}"
    if path.is_dir():
        return None, "is a folder, not a policy file"
    if path.suffix in (".yaml", ".yml", ".json") or os.sep in name:
        beside = [file.name for file in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        near = path.stem if path.stem in PRESETS else path.name
        return None, f"no such file{hint(near, [*beside, *PRESETS])}"
    return None, f"no preset or file of this name: {has}{hint(name, PRESETS)}"


def _finish(document: Document, folder: FilePath, stack: tuple[FilePath, ...] = ()) -> Policy:
    lines: list[str] = []
    joined = _join(document, folder, stack, lines)
    lines += _mesh_lines(joined)
    if lines:
        raise PolicyError(list(dict.fromkeys(lines)))
    if not joined.rules:
        none = Problem((), "no rules: give at least one under 'rules', or extend a preset")
        raise PolicyError(document.lines([none]))
    content: dict[str, Any] = {"version": 1}
    if joined.name is not None:
        content["name"] = joined.name
    if joined.mesh:
        content["mesh"] = joined.mesh
    if joined.defaults:
        content["defaults"] = joined.defaults
    content["rules"] = [rule for rule, _, _ in joined.rules]
    policy = Policy.model_validate(content)
    for rule, (_, source, index) in zip(policy.rules, joined.rules, strict=True):
        rule._cited, rule._extended = source.cite(index), source is not document
    return policy


def _join(document: Document, folder: FilePath, stack: tuple[FilePath, ...], lines: list[str]) -> _Joined:
    """The document over everything that it extends; problems go to ``lines``."""
    policy, problems = _validate(document)
    bases: list[tuple[FilePath, str]] = []
    for entry, name in _extends(document.data):
        found, reason = _find(name, folder)
        if found is None:
            problems.append(Problem(entry, f"{name!r}: {reason}"))
        elif found.resolve() in stack:
            circle = [file.name for file in (*stack[stack.index(found.resolve()) :], found)]
            problems.append(Problem(entry, f"extends itself: {' -> '.join(circle)}"))
        else:
            bases.append((found, f"preset {name}" if name in PRESETS else _beside(document, name)))
    lines += document.lines(problems)
    joined = _Joined(complete=isinstance(document.data, dict) and len(bases) == len(list(_extends(document.data))))
    if policy is not None:
        plain = policy.plain()
        joined.name, joined.mesh = policy.name, plain.get("mesh", {})
        joined.defaults = plain.get("defaults", {})
        joined.rules = [(rule, document, index) for index, rule in enumerate(plain.get("rules", []))]
    elif isinstance(document.data, dict):
        # Not a policy, but what it says of meshes can be checked all the same.
        joined.mesh = {str(axis): size for axis, size in _mapping(document.data.get("mesh")).items()}
        rules = document.data.get("rules")
        entries = enumerate(rules if isinstance(rules, (list, tuple)) else ())
        joined.rules = [({"shard": rule.get("shard")}, document, index) for index, rule in entries if isinstance(rule, dict)]
    for path, name in bases:
        try:
            base = _read(path, name)
        except PolicyError as error:
            lines += error.problems
            joined.complete = False
            continue
        joined.under(_join(base, path.parent, (*stack, path.resolve()), lines))
    return joined


def _beside(document: Document, name: str) -> str:
    if document.name.startswith("<") or FilePath(name).is_absolute():
        return name
    return str(FilePath(document.name).parent / name)


def _validate(document: Document) -> tuple[Policy | None, list[Problem]]:
    """The document's own content, or every problem that it has."""
    if document.found and document.data is None:
        return None, []
    if not isinstance(document.data, dict):
        return None, [Problem((), f"a policy is a mapping with 'rules', got {shown(document.data)}")]
    problems = list(_duplicate_names(document.data))
    try:
        return Policy.model_validate(document.data), problems
    except ValidationError as error:
        problems += [problem for entry in error.errors(include_url=False) for problem in _problems(entry)]
        return None, list(dict.fromkeys([*problems, *_hidden(document.data)]))


def _hidden(data: dict[str, Any]) -> Iterator[Problem]:
    """What is wrong with the options of forms beside those of a wrong type, at which pydantic stops."""
    rules = data.get("rules")
    for index, rule in enumerate(rules if isinstance(rules, (list, tuple)) else ()):
        apply = rule.get("apply") if isinstance(rule, dict) else None
        for misfit in also_unfit(apply):
            assert isinstance(apply, dict)
            yield Problem(("rules", index, "apply", *misfit.path), str(misfit), suffix="" if misfit.path else apply["form"])


def _problems(entry: Any) -> list[Problem]:
    """One of pydantic's errors in our words, at the path that the user sees."""
    path: Path = tuple(entry["loc"])
    form = ""
    if len(path) > 3 and path[0] == "rules" and path[2] == "apply":
        # pydantic puts the chosen form between `apply` and the option.
        form, path = str(path[3]), (*path[:3], *path[4:])
    match entry["type"]:
        case "extra_forbidden":
            return [Problem(path, f"unknown key{key_hint(path, form)}", on_key=True)]
        case "missing":
            return [Problem(path[:-1], f"key {path[-1]!r} is missing", suffix=form if len(path) == 4 else "")]
        case "value_error":
            reason = entry["ctx"]["error"]
            found = reason.parts if isinstance(reason, Misfit) else (Misfit(str(reason)),)
            whole = form if len(path) == 3 else ""
            return [Problem((*path, *one.path), str(one), suffix="" if one.path else whole) for one in found]
        case "model_type" | "model_attributes_type" | "dict_type":
            return [Problem(path, f"expected a mapping, got {shown(entry['input'])}")]
        case "invalid_key" | "string_type":
            return [Problem(path[:-1], f"expected text as a key, got {shown(path[-1])}")]
        case _:
            return [Problem(path, str(entry["msg"]))]


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _extends(data: object) -> Iterator[tuple[Path, str]]:
    held = data.get("extends") if isinstance(data, dict) else None
    if isinstance(held, str) and held:
        yield ("extends",), held
    elif isinstance(held, (list, tuple)):
        for index, name in enumerate(held):
            if isinstance(name, str) and name:
                yield ("extends", index), name


def _duplicate_names(data: dict[str, Any]) -> Iterator[Problem]:
    rules = data.get("rules")
    first: dict[str, int] = {}
    for index, rule in enumerate(rules if isinstance(rules, (list, tuple)) else ()):
        name = rule.get("name") if isinstance(rule, dict) else None
        if not isinstance(name, str):
            continue
        if name in first:
            message = f"duplicate rule name {name!r} (first at rules[{first[name]}])"
            yield Problem(("rules", index, "name"), message)
        first.setdefault(name, index)


def _mesh_lines(joined: _Joined) -> list[str]:
    """Rules that name a mesh axis which the policy doesn't have."""
    lines: list[str] = []
    for rule, document, index in joined.rules if joined.complete else ():
        named = _mapping(rule.get("shard")).get("mesh")
        for name in named if isinstance(named, (list, tuple)) else (named,):
            if isinstance(name, str) and name and name not in joined.mesh:
                axes = f"mesh has {', '.join(joined.mesh)}" if joined.mesh else "the policy has no mesh"
                message = f"unknown mesh axis {name!r}: {axes}{hint(name, joined.mesh)}"
                lines += document.lines([Problem(("rules", index, "shard", "mesh"), message)])
    return lines
