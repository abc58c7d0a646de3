"""Read YAML into plain values and remember the line and column of every key and value."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

import yaml

from dilcompile.policy.problems import Path, Problem

Mark = tuple[int, int]

# YAML 1.2's core types. PyYAML's own (1.1) read `off` as False, `1e-3` as text and `1:30` as 90.
CORE_TYPES = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    ("merge", r"<<", "<"),
)
TAG = "tag:yaml.org,2002:"


class CoreLoader(yaml.SafeLoader):
    """PyYAML's parser with the core types."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class CoreDumper(yaml.SafeDumper):
    """Writes what CoreLoader reads; quotes also what other YAML readers take for a number or a bool."""


for _name, _pattern, _first in CORE_TYPES:
    for _kind in (CoreLoader, CoreDumper):
        _kind.add_implicit_resolver(TAG + _name, re.compile(f"(?:{_pattern})$"), ["" if c == "\0" else c for c in _first])


@dataclass
class Document:
    """One source of a policy.

    Args:
        name: what errors call it: the file as the user wrote it, ``<text>`` or ``<dict>``.
        data: dicts, lists, text, numbers, bools and None.
        keys: place of each key; values: place of each value. Lines and columns from 1; empty for a dict.
        found: problems already placed (syntax, duplicate keys).
        kind: how its rules are cited: by line or by index.
    """

    name: str
    data: object = None
    keys: dict[Path, Mark] = field(default_factory=dict)
    values: dict[Path, Mark] = field(default_factory=dict)
    found: list[tuple[Mark, str]] = field(default_factory=list)
    kind: Literal["text", "dict"] = "text"

    def mark(self, problem: Problem) -> Mark:
        """Where the problem is: its key or value, or what encloses it."""
        if problem.on_key and problem.path in self.keys:
            return self.keys[problem.path]
        for end in range(len(problem.path), -1, -1):
            if problem.path[:end] in self.values:
                return self.values[problem.path[:end]]
        return (1, 1)

    def lines(self, problems: list[Problem]) -> list[str]:
        """All problems of this document in the order of the file, as users see them."""
        if self.kind == "dict":
            return [f"{self.name}: {problem.text}" for problem in problems]
        known = {mark for mark, _ in self.found}
        # Where the YAML itself is wrong, what the schema says about the stand-in value is noise.
        placed = self.found + [(self.mark(p), p.text) for p in problems if self.mark(p) not in known]
        return [f"{self.name}:{line}:{column}: {text}" for (line, column), text in sorted(placed)]

    def cite(self, index: int) -> str:
        """How reports cite rule ``index``: ``policy.yaml:8``, or ``<dict>`` for a dict."""
        if self.kind == "dict":
            return f"{self.name} rules[{index}]"
        return f"{self.name}:{self.mark(Problem(('rules', index), ''))[0]}"


def read_yaml(text: str, name: str) -> Document:
    """Parse ``text``. Never raises for bad YAML: the document's ``found`` says what is wrong."""
    document = Document(name)
    try:
        loader = CoreLoader(text)
        node = loader.get_single_node()
        if node is None:
            document.found.append(((1, 1), "the file is empty"))
            return document
        document.data = _construct(node, (), document, loader, ())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        words = ", ".join(part for part in (error.context, error.problem) if part)
        document.found.append((place, f"not YAML: {words}"))
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        document.found.append((place, f"not YAML: character {error.character!r} is not allowed"))
    except RecursionError:
        document.found.append(((1, 1), "nested too deeply"))
    return document


def write_yaml(data: object) -> str:
    """Plain values as YAML: keys in the given order, innermost lists and mappings on one line."""
    return yaml.dump(data, Dumper=CoreDumper, sort_keys=False, width=100, allow_unicode=True, default_flow_style=None)


def _place(node: yaml.Node) -> Mark:
    return (node.start_mark.line + 1, node.start_mark.column + 1)


def _construct(node: yaml.Node, path: Path, document: Document, loader: CoreLoader, above: tuple[yaml.Node, ...]) -> object:
    """The value of ``node``; notes the place of everything in it."""
    document.values.setdefault(path, _place(node))
    if node in above:
        document.found.append((_place(node), "an alias may not contain itself"))
        return None
    if isinstance(node, yaml.MappingNode):
        return _construct_mapping(node, path, document, loader, (*above, node))
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, (*path, index), document, loader, (*above, node)) for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode), "YAML has three kinds of node"
    return _scalar(node, document)


def _construct_mapping(
    node: yaml.MappingNode, path: Path, document: Document, loader: CoreLoader, above: tuple[yaml.Node, ...]
) -> dict[str, object]:
    found: dict[str, object] = {}
    merged: list[yaml.MappingNode] = []
    for key, value in node.value:
        if key.tag == TAG + "merge":
            merged += _merge_sources(value, document)
            continue
        if not isinstance(key, yaml.ScalarNode):
            document.found.append((_place(key), "a key must be text"))
            continue
        name = str(key.value)
        inner: Path = (*path, name)
        if name in found:
            first = document.keys[inner][0]
            document.found.append((_place(key), f"duplicate key {name!r} (first at line {first})"))
            continue
        document.keys.setdefault(inner, _place(key))
        found[name] = _construct(value, inner, document, loader, above)
    for source in merged:
        if source in above:
            document.found.append((_place(source), "an alias may not contain itself"))
            continue
        for name, held in _construct_mapping(source, path, document, loader, (*above, source)).items():
            found.setdefault(name, held)
    return found


def _merge_sources(value: yaml.Node, document: Document) -> Iterator[yaml.MappingNode]:
    """What ``<<:`` names: one mapping or a list of them."""
    sources = value.value if isinstance(value, yaml.SequenceNode) else [value]
    for source in sources:
        if isinstance(source, yaml.MappingNode):
            yield source
        else:
            document.found.append((_place(source), "'<<' takes a mapping or a list of mappings"))


def _scalar(node: yaml.ScalarNode, document: Document) -> object:
    text: str = node.value
    match node.tag.removeprefix(TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            try:
                return int(text, base)
            except ValueError:
                document.found.append((_place(node), "the number is too long, or is no number"))
                return 0
        case "float":
            try:
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
            except ValueError:
                document.found.append((_place(node), f"{text!r} is no number"))
                return 0.0
        case "str" | "merge":
            return text
        case other:
            document.found.append((_place(node), f"the tag {other!r} is not allowed"))
            return None
