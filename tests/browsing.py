"""Pages in a real browser: what a person would see of them, and what is wrong with it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = 1280, 600

# One string for each thing that is wrong with the page as it is laid out now.
LOOK = """
() => {
  const wrong = [];
  const said = element => (element.textContent || '').trim().replace(/\\s+/g, ' ').slice(0, 60);
  const box = element => element.getBoundingClientRect();
  const inside = (a, b, slack = 1) => a.left >= b.left - slack && a.right <= b.right + slack
    && a.top >= b.top - slack && a.bottom <= b.bottom + slack;
  const scrolls = element => ['auto', 'scroll'].includes(getComputedStyle(element).overflowX);
  const root = document.documentElement;
  if (root.scrollWidth > innerWidth) wrong.push(`the page is ${root.scrollWidth} px wide in a window of ${innerWidth} px`);

  for (const element of document.querySelectorAll('body, body :not(svg, svg *)')) {
    if (!element.checkVisibility() || element.scrollWidth <= element.clientWidth + 1 || !element.clientWidth) continue;
    const style = getComputedStyle(element);
    if (['hidden', 'clip'].includes(style.overflowX)) wrong.push(`cut off: ${said(element)}`);
    else if (!scrolls(element) && style.display !== 'inline' && !element.parentElement.closest('.frame, figure'))
      wrong.push(`runs out of its box: ${element.tagName} ${said(element)}`);
  }
  for (const table of document.querySelectorAll('table')) {
    const frame = table.parentElement;
    if (!table.rows.length || !box(table).width || !box(table).height) { wrong.push('a table of no size'); continue; }
    if (box(table).width > box(frame).width + 1 && !scrolls(frame)) wrong.push('a table is wider than its box');
    frame.scrollLeft = frame.scrollWidth;
    const last = box(table.rows[0].cells[table.rows[0].cells.length - 1]);
    if (last.right > Math.min(box(frame).right, innerWidth) + 1) wrong.push('the last column is out of reach');
    frame.scrollLeft = 0;
  }

  for (const picture of document.querySelectorAll('svg')) {
    const outer = box(picture), name = said(picture.querySelector('title') || picture);
    if (outer.width < 40 || outer.height < 40) { wrong.push(`a picture of no size: ${name}`); continue; }
    const holder = picture.closest('figure') || picture.parentElement, held = box(holder);
    const across = outer.left >= held.left - 1 && (outer.right <= held.right + 1 || scrolls(holder));
    if (!across || outer.top < held.top - 1 || outer.bottom > held.bottom + 1) wrong.push(`a picture out of its box: ${name}`);
    for (const shape of picture.querySelectorAll('rect, path, text'))
      if (!inside(box(shape), outer)) wrong.push(`outside of its picture: ${shape.tagName} ${said(shape)} in ${name}`);
    const texts = [...picture.querySelectorAll('text')].map(text => [said(text), box(text)]);
    texts.forEach(([one, a], index) => texts.slice(index + 1).forEach(([other, b]) => {
      const over = Math.min(a.right, b.right) - Math.max(a.left, b.left), down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      if (over > 1 && down > 2) wrong.push(`one over the other: ${one} and ${other}`);
    }));
  }

  const numbers = color => (color.match(/[\\d.]+/g) || []).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map(x => x / 255)
    .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
    .reduce((sum, x, index) => sum + x * [0.2126, 0.7152, 0.0722][index], 0);
  const ground = element => {
    for (let at = element; at; at = at.parentElement) {
      const color = numbers(getComputedStyle(at).backgroundColor);
      if (color.length === 3 || color[3] > 0) return color;
    }
    return [255, 255, 255];
  };
  const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; node = walk.nextNode();) {
    const holder = node.parentElement;
    if (!node.textContent.trim() || !holder.checkVisibility() || ['title', 'desc', 'STYLE'].includes(holder.tagName)) continue;
    const style = getComputedStyle(holder), color = numbers(holder.namespaceURI.endsWith('svg') ? style.fill : style.color);
    const [light, dark] = [luminance(color), luminance(ground(holder))].sort((a, b) => b - a);
    const contrast = (light + 0.05) / (dark + 0.05);
    if (contrast < 4.5) wrong.push(`hard to read, contrast ${contrast.toFixed(1)}: ${said(holder)}`);
    if (parseFloat(style.fontSize) < 10) wrong.push(`too small: ${said(holder)}`);
  }

  for (const picture of document.querySelectorAll('svg.arena')) {
    const fills = selector => new Set([...picture.querySelectorAll(selector)].map(shape => getComputedStyle(shape).fill));
    const roles = new Set([...picture.querySelectorAll('rect.buffer')].map(shape => shape.classList[1]));
    const legend = fills('rect:not(.buffer, .edge, .back)');
    if (legend.size !== roles.size) wrong.push(`${roles.size} roles and ${legend.size} colours in a legend`);
    for (const color of fills('rect.buffer')) if (!legend.has(color)) wrong.push(`the legend lacks ${color}`);
  }
  return wrong;
}
"""

# What the pointer meets over each buffer, beside the tooltip that the buffer has.
HOVER = """
picture => {
  picture.scrollIntoView();
  return [...picture.querySelectorAll('rect.buffer')].filter(shape => shape.getBoundingClientRect().width >= 3
    && shape.getBoundingClientRect().height >= 3).map(shape => {
    const at = shape.getBoundingClientRect();
    const met = document.elementFromPoint((at.left + at.right) / 2, (at.top + at.bottom) / 2);
    return [shape.querySelector('title').textContent, met && met.querySelector('title') ? met.querySelector('title').textContent : ''];
  });
}
"""


@dataclass
class Shown:
    """An open page, and what came up while it was opened."""

    page: Any
    problems: list[str]

    def wrong(self) -> list[str]:
        """All that is wrong with the page, first as it is opened, then with everything unfolded."""
        found = [*self.problems, *self.page.evaluate(LOOK)]
        for number, fold in enumerate(self.page.locator("details").all()):
            content, summary = fold.locator(":scope > :not(summary)").first, fold.locator(":scope > summary")
            if content.is_visible():
                found.append(f"fold {number} is open")
                continue
            summary.click()
            if not content.is_visible():
                found.append(f"fold {number} stays closed")
        return list(dict.fromkeys([*found, *self.problems, *self.page.evaluate(LOOK)]))

    def table(self, selector: str) -> list[dict[str, str]]:
        """The rows of a table as they are shown, by heading."""
        rows: list[list[str]] = self.page.eval_on_selector(
            selector, "table => [...table.rows].map(row => [...row.cells].map(cell => cell.innerText.trim()))"
        )
        return [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]


@contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window. Where there is none, tests are skipped; with CI=true they fail."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        _missing("playwright is not installed: `make venv` installs it")
    found = next((path for path in map(shutil.which, NAMES) if path), None)
    if found is None:
        _missing(f"no browser found under the names {', '.join(NAMES)}: apt-get install chromium")
    with sync_playwright() as driver:
        # Root has no sandbox of Chromium's to run in.
        opened = driver.chromium.launch(executable_path=found, args=["--no-sandbox"] if os.geteuid() == 0 else [])
        yield opened
        opened.close()


def _missing(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(reason)


@contextmanager
def shown(browser: Any, path: Path, width: int = WIDE, scheme: str = "light") -> Iterator[Shown]:
    """The file, opened in a window of this width with nothing else in the browser."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    held = Shown(page, [])
    page.on("console", lambda message: held.problems.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: held.problems.append(f"error: {error}"))
    page.on("request", lambda asked: asked.url == path.as_uri() or held.problems.append(f"asked for {asked.url}"))
    page.goto(path.as_uri())
    yield held
    context.close()
