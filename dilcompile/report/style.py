"""How the pages look: one style sheet inside each, light and dark."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #667079; --line: #e3e6ea; --back: #f6f7f9; --card: #fff;
  --exact: #1a7f4b; --approximate: #b35900; --unchanged: #667079; --refused: #b3261e; --bar: #3b6fd4; --track: #e8ebf0; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #98a2ac; --line: #2c3238; --back: #14171a; --card: #1c2024;
  --exact: #5fd39a; --approximate: #f0a95a; --unchanged: #98a2ac; --refused: #ff8a80; --bar: #7aa5ff; --track: #2c3238; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 2rem clamp(1rem, 3vw, 3rem); background: var(--back); color: var(--ink);
  font: 14px/1.5 system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; } .soft, small { color: var(--soft); }
code, .mono { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .92em; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem 1.1rem; min-width: 9rem; }
.card b { display: block; font-size: 1.4rem; font-weight: 600; font-variant-numeric: tabular-nums; white-space: nowrap; }
.frame { background: var(--card); border: 1px solid var(--line); border-radius: 10px; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; }
th, td { text-align: left; vertical-align: top; padding: .55rem .8rem; border-top: 1px solid var(--line); }
thead th { border-top: 0; color: var(--soft); font-weight: 500; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; } td.nowrap, td.nowrap small { white-space: nowrap; }
td small { display: block; }
td.form { min-width: 14rem; max-width: 24rem; } td.mask { min-width: 8rem; } td.attention { min-width: 12rem; }
.memory thead th { white-space: normal; vertical-align: bottom; } .memory th, .memory td { padding-inline: .5rem; }
.tag { border: 1px solid currentColor; border-radius: 99px; padding: 0 .55rem; font-size: .85em; white-space: nowrap; }
.exact { color: var(--exact); } .approximate { color: var(--approximate); } .unchanged { color: var(--unchanged); }
.refused { color: var(--refused); }
.bar { height: 6px; min-width: 7rem; background: var(--track); border-radius: 3px; overflow: hidden; margin: .35rem 0 .15rem; }
.bar i { display: block; height: 100%; background: var(--bar); }
ul { list-style: none; margin: 0; padding: 0; } li { padding: .5rem .8rem; border-top: 1px solid var(--line); }
li:first-child { border-top: 0; } .cure::before { content: "→ "; }
details { margin-top: 1rem; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; padding: .8rem; margin: .5rem 0 0; }
.patterns { display: flex; flex-wrap: wrap; gap: .8rem; align-items: flex-start; margin: .8rem 0; }
.patterns > details { flex-basis: 100%; min-width: 0; margin: 0; }
figure { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .7rem; margin: 0; max-width: 100%;
  overflow-x: auto; }
figure svg { display: block; } figure .pictures { display: flex; flex-wrap: wrap; gap: .6rem; }
figcaption { max-width: 30rem; padding: .3rem .4rem 0; overflow-wrap: anywhere; }
""".strip()


def whole(title: str, body: Iterable[str], *styles: str) -> str:
    """A page that needs nothing else: no scripts, no fonts, no files from elsewhere.

    Args:
        styles: beside the pages' own.
    """
    held = "\n".join([STYLE, *styles])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>dilcompile: {escape(title)}</title>\n<style>\n{held}\n</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )
