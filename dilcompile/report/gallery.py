"""The gallery of patterns, from the code that computes them: ``python -m dilcompile.report.gallery docs/patterns.md``."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dilcompile.blocks.cells import cells_of
from dilcompile.blocks.picture import svg
from dilcompile.blocks.spec import KINDS, SETS
from dilcompile.errors import DilcompileError
from dilcompile.forms import BlockSparse
from dilcompile.relation import Problem
from dilcompile.report import units
from dilcompile.report.block_counts import blocks_of, count_of, listed

LENGTH = 768
BLOCK = 16
HEAD = f"""# Patterns

Every pattern of `form: block_sparse` with the policy that draws it, at {LENGTH} positions and blocks of {BLOCK}: small enough to
see each block (64 and more are fast). Rows are queries, columns are keys. In a full block every pair counts; a partial one needs
a mask inside, here the causal one. The options are those of [block-sparse attention](block_sparse.md). For the sites of a model,
at their own lengths, `dilcompile inspect --html report.html` draws the same pictures; `--pictures` draws them on the terminal.

This page and its pictures are made by `python -m dilcompile.report.gallery docs/patterns.md`."""


@dataclass(frozen=True)
class Entry:
    """One pattern of the gallery.

    Args:
        words: what it is for, one sentence.
        pattern: an example.
        causal: whether the site that is drawn is causal.
        block: positions in a block, one number or two.
        grid: the options of a grid of tokens.
        in_policy: whether a rule may ask for it; else what is shown is the form for ``dilcompile.functional.attention``.
        choice: what is drawn where the data of each call chooses the blocks: a choice that it may make.
    """

    words: str
    pattern: dict[str, Any]
    causal: bool = True
    block: int | list[int] = BLOCK
    choice: dict[str, Any] | None = None
    grid: dict[str, Any] = field(default_factory=dict)
    in_policy: bool = True


_LOCAL: dict[str, Any] = {"local": {"before": 2}}

# One for each name in KINDS and SETS.
GALLERY: dict[str, Entry] = {
    "local": Entry("Each query and what came just before it.", {"local": {"before": 4}}),
    "global": Entry(
        "The first keys for everyone, and everything for the first queries, beside a local band.",
        {"any": [{"local": {"before": 1, "behind": 1}}, {"global": {"columns": 2, "rows": 2}}]},
        causal=False,
    ),
    "strided": Entry("Every fourth column, counted back from the query's own.", {"strided": {"stride": 4}}),
    "dilated_sliding": Entry(
        "A window with gaps, on both sides.", {"dilated_sliding": {"dilation": 3, "blocks": 4}}, causal=False
    ),
    "fixed": Entry(
        "Columns that summarise what stands before them, for everyone behind. Alone it shows the first queries nothing.",
        {"any": [{"local": {"before": 3}}, {"fixed": {"stride": 4, "offset": 3}}]},
    ),
    "vertical_slash": Entry(
        "A few columns and a few distances, as pretrained models often attend.",
        {"vertical_slash": {"verticals": [0, 1, 17], "slashes": [0, 1, 2, 12]}},
    ),
    "hierarchical": Entry(
        "The neighbours, the heads of the neighbouring groups, and the heads of all the wider ones.",
        {"hierarchical": {"spans": [4, 16], "heads": [1, 1]}},
        causal=False,
    ),
    "random": Entry(
        "Columns drawn anew for each row, the same on every device; a short way between any two positions.",
        {"any": [{"local": {}}, {"random": {"blocks": 3, "seed": 0}}]},
    ),
    "document": Entry("Documents one after the other, known by their lengths.", {"document": {"lengths": [160, 320, 96]}}),
    "near": Entry(
        "Tokens of a grid and what is around them in it, here 24 x 32 tokens along a Hilbert curve.",
        {"near": {"radius": 4}},
        causal=False,
        grid={"order": "hilbert", "grid": [24, 32]},
    ),
    "explicit": Entry(
        "A list of blocks by rows, here for the first four rows; a BlockMask becomes one of these.",
        {"any": [{"local": {}}, {"explicit": {"starts": [0, 2, 5, 6, 9], "columns": [3, 9, 1, 12, 20, 30, 5, 6, 7]}}]},
        causal=False,
    ),
    "bigbird": Entry("Local on both sides, global, and random.", {"bigbird": {}}, causal=False),
    "longformer": Entry("Local on both sides, and global.", {"longformer": {"local": 3, "columns": 1, "rows": 1}}, causal=False),
    "topk": Entry(
        "The blocks of each row that an estimate of the scores puts first, in each call and for each head; drawn is one choice.",
        {"topk": {"estimator": "antidiagonal", "blocks": 6}},
        choice={"any": [{"local": {}}, {"random": {"blocks": 5, "seed": 1}}]},
    ),
    "mass": Entry(
        "As few of the best blocks as hold so much of the estimated weight; drawn is one choice.",
        {"any": [{"global": {"columns": 1}}, {"mass": {"estimator": "vertical_slash", "mass": 0.9, "most": 8}}]},
        choice={"any": [{"global": {"columns": 1}}, {"local": {"before": 1}}, {"random": {"blocks": 3, "seed": 2}}]},
    ),
    "given": Entry(
        "Blocks that come with a call of `dilcompile.functional.attention`, as a trained gate gives them; drawn is one choice.",
        {"any": [{"local": {}}, {"given": {"most": 4}}]},
        choice={"any": [{"local": {}}, {"random": {"blocks": 4, "seed": 3}}]},
        in_policy=False,
    ),
    "heads": Entry(
        "A pattern for each query head; drawn is that of the first.",
        {"heads": [{"local": {"before": 3}}, {"any": [{"local": {}}, {"strided": {"stride": 6}}]}]},
    ),
    "groups": Entry(
        "A pattern for each group of neighbouring query heads, whatever their number; drawn is that of the first group.",
        {"groups": [{"any": [_LOCAL, {"global": {"columns": 2}}]}, {"local": {"before": 12}}]},
    ),
    "any": Entry(
        "The blocks of any of the patterns, each once, here under blocks of 16 queries and 32 keys.",
        {"any": [_LOCAL, {"global": {"columns": 1}}, {"strided": {"stride": 6}}]},
        block=[16, 32],
    ),
    "all": Entry(
        "The blocks that all of the patterns have: here a wide band thinned out.",
        {"any": [_LOCAL, {"all": [{"local": {"before": 24}}, {"fixed": {"stride": 3}}]}]},
    ),
}


def policy(entry: Entry) -> str:
    """The policy of an entry, as YAML; or its form, where no rule may ask for it."""
    form = {"form": "block_sparse", "block": entry.block, "pattern": entry.pattern, **entry.grid}
    whole = {"version": 1, "rules": [{"match": {"causal": entry.causal}, "apply": form}]}
    text: str = yaml.safe_dump(whole if entry.in_policy else form, sort_keys=False, default_flow_style=None, width=120)
    return text


def picture(name: str, entry: Entry) -> tuple[str, str]:
    """What the picture shows, in words, and the picture as an SVG file."""
    heads = 2 if {"heads", "groups"} & set(entry.pattern) else 1
    size = Problem(1, heads, heads, LENGTH, LENGTH, 1, 1, is_causal=entry.causal)
    block = tuple(entry.block) if isinstance(entry.block, list) else entry.block
    relation = BlockSparse(block, entry.choice or entry.pattern, **entry.grid).relation(size)
    blocks = blocks_of(relation)
    assert blocks is not None, name
    title = f"{name}{', causal' if entry.causal else ''}: {units.percent(relation.density())} of all pairs"
    lines = (str(count_of(relation)),)
    cells = cells_of(listed(blocks, 0), blocks.grid)
    return f"{title}; {lines[0]}", svg(cells, title, lines, name.replace("_", "-"), alone=True) + "\n"


def files(page: Path) -> dict[Path, str]:
    """The page and its pictures, which lie in a folder of its name.

    Raises:
        DilcompileError: if a pattern has no entry, or an entry no pattern.
    """
    names = [*KINDS, *SETS]
    missing, unknown = [name for name in names if name not in GALLERY], [name for name in GALLERY if name not in names]
    if missing or unknown:
        raise DilcompileError(
            f"the gallery has no entry for the patterns {missing} and entries for unknown ones {unknown}: give each pattern an "
            "Entry(words, pattern) in GALLERY of dilcompile/report/gallery.py, then run "
            "python -m dilcompile.report.gallery docs/patterns.md"
        )
    found, parts = {}, [HEAD]
    for name in names:
        entry = GALLERY[name]
        words, drawn = picture(name, entry)
        found[page.parent / page.stem / f"{name}.svg"] = drawn
        parts.append(f"## {name}\n\n{entry.words}\n\n![{words}]({page.stem}/{name}.svg)\n\n```yaml\n{policy(entry)}```")
    return {page: "\n\n".join(parts) + "\n", **found}


if __name__ == "__main__":
    for target in sys.argv[1:]:
        for path, content in files(Path(target)).items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content, encoding="utf-8")
