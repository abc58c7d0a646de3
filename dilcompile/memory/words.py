"""The memory of graphs in words: a table, a line for each of the largest buffers, and a coarse picture of letters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dilcompile.memory.account import GraphMemory
from dilcompile.memory.buffer import Buffer
from dilcompile.memory.packing import most_live
from dilcompile.memory.timeline import buffer_text, size_text

HEADINGS = (
    "graph",
    "steps",
    "buffers",
    "planned",
    "live at once",
    "ratio",
    "without reuse",
    "caching allocator",
    "size classes",
    "over saved",
    "elsewhere",
    "given",
    "kept",
)
READING = (
    "planned: the peak of all arenas; live at once: the most bytes that a step needs, which no plan can beat; ratio: of the two",
    "without reuse: each buffer in a place of its own; caching allocator: what torch's would reserve, replayed",
    "size classes: what is asked for, an arena each; over saved: live at once of what lies in dead saved tensors, in no arena",
    "elsewhere: live at once of what operators without a place to write to make",
    "given: inputs, with parameters and saved tensors; kept: outputs, with what is saved; both outlive the graph: never planned",
)
_WIDE, _TALL = 64, 6
_EIGHTHS = " ▁▂▃▄▅▆▇█"


def cells(memory: GraphMemory) -> tuple[str, ...]:
    """One row, in the order of ``HEADINGS``."""
    plan = memory.plan
    counted = memory.planner == "inductor"
    return (
        memory.name,
        f"{memory.steps:,}",
        f"{memory.num_buffers:,}",
        "by Inductor" if counted else size_text(plan.peak),
        size_text(plan.most_live),
        "" if counted else f"{memory.ratio:.3f}",
        size_text(plan.without_reuse),
        size_text(memory.by_caching),
        "" if counted else " + ".join(map(size_text, memory.classes)),
        f"{size_text(most_live(memory.donated))} ({len(memory.donated)})" if memory.donated else size_text(0),
        f"{size_text(memory.elsewhere_bytes)} ({len(memory.elsewhere)})" if memory.elsewhere else "",
        size_text(memory.given),
        size_text(memory.kept_bytes),
    )


def text(graphs: Sequence[GraphMemory], largest: int = 5) -> str:
    """The table, the largest buffers of each graph, and what is live in each step."""
    lines = [*table(graphs), "", *READING]
    for memory in graphs:
        if memory.buffers:
            lines += ["", f"{memory.name}: what is live in each step", *drawn(memory)]
            lines += [f"{memory.name}: the largest buffers", *(f"  {line}" for line in largest_lines(memory, largest))]
    return "\n".join(lines)


def table(graphs: Sequence[GraphMemory]) -> list[str]:
    """A row a graph, and below it what its calls came to."""
    lines = _columns([HEADINGS, *map(cells, graphs)])
    return [*lines, *(f"{graph.name}: {ran(graph)}" for graph in graphs if graph.runs is not None)]


def ran(memory: GraphMemory) -> str:
    """What was measured beside what was predicted, and what the calls came to; empty where it has not run."""
    if memory.runs is None:
        return ""
    measured = "not measured"
    if memory.runs.measured is not None:
        measured = f"measured {size_text(memory.runs.measured)} ({memory.runs.measured / max(1, memory.predicted):.4f})"
    return f"predicted {size_text(memory.predicted)}, {measured}; {memory.runs}"


def largest_lines(memory: GraphMemory, number: int) -> list[str]:
    """The largest buffers; those that differ in name, module and steps alone share a line."""
    alike: dict[tuple[int, str, str], list[tuple[Buffer, int]]] = {}
    for _, buffer, offset in memory.largest(len(memory.buffers)):
        if not buffer.hint:
            break
        alike.setdefault((buffer.hint, buffer.role, buffer.device), []).append((buffer, offset))
    lines = []
    for held in list(alike.values())[:number]:
        more = f", and {len(held) - 1} more of this size" if len(held) > 1 else ""
        lines.append(buffer_text(*held[0]) + more)
    return lines


def drawn(memory: GraphMemory) -> Iterator[str]:
    """Bytes upwards, steps to the right: a column shows the most that is live in its steps."""
    live, top = memory.live(_WIDE), max(1, memory.plan.most_live)
    scale = [size_text(top), *[""] * (_TALL - 2), "0"]
    for row in range(_TALL):
        least = _TALL - 1 - row
        marks = (_EIGHTHS[max(0, min(8, round(8 * (_TALL * held / top - least))))] for held in live)
        yield f"  {scale[row]:>9} |{''.join(marks).rstrip()}"
    yield f"  {'':>9} +{'-' * len(live)} {memory.steps} steps"


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows with their columns one below another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
