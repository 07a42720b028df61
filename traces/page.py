"""One HTML page without anything from elsewhere: typography, tables, pictures as data, for screen and paper.

Everything that goes through these functions is escaped; `Html` marks what already is.
"""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence


class Html(str):
    """Text that is markup already."""


def escape(value: object) -> Html:
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[str]) -> Html:
    return Html("\n".join(parts))


def tag(name: str, *content: object, **attributes: str) -> Html:
    """An element; a trailing underscore keeps an attribute's name from being Python's (class_)."""
    written = "".join(f' {key.rstrip("_")}="{html.escape(value)}"' for key, value in attributes.items())
    return Html(f"<{name}{written}>{''.join(escape(part) for part in content)}</{name}>")


def section(heading: str, *content: str, intro: str = "") -> Html:
    """A part of the page with an anchor; nothing at all when it has no content."""
    kept = [part for part in content if part]
    if not kept:
        return Html("")
    head = tag("h2", heading)
    lead = [tag("p", intro, class_="lead")] if intro else []
    return tag("section", join([head, *lead, *kept]), id=anchor(heading))


def anchor(heading: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in heading.lower()).split())


def table(head: Sequence[str], rows: Iterable[Sequence[object]], *, numbers: Iterable[int] = ()) -> Html:
    """A table; the columns in `numbers` are aligned on the right in figures of one width."""
    numeric = set(numbers)

    def cells(kind: str, row: Sequence[object]) -> Html:
        made = (tag(kind, cell, **({"class_": "n"} if i in numeric else {})) for i, cell in enumerate(row))
        return tag("tr", Html("".join(made)))

    body = [cells("td", row) for row in rows]
    if not body:
        return Html("")
    inner = join([tag("thead", cells("th", head)), tag("tbody", join(body))])
    # The wrapper lets a wide table scroll on a phone without moving the page.
    return tag("div", tag("table", inner), class_="wide")


def cards(facts: Iterable[tuple[str, object]]) -> Html:
    """The page's figures at a glance."""
    made = [tag("div", tag("dt", label), tag("dd", value)) for label, value in facts]
    return tag("dl", join(made), class_="cards") if made else Html("")


def picture(png: bytes, alt: str) -> Html:
    """A PNG inside the page. It keeps its white ground in dark mode, since its colours are chosen for it."""
    data = base64.b64encode(png).decode("ascii")
    return Html(f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(alt)}"></figure>')


def bar(share: float) -> Html:
    """A small bar for a table, `share` of its cell wide."""
    width = 100 * min(max(share, 0.0), 1.0)
    return Html(f'<span class="bar"><i style="width:{width:.1f}%"></i></span>')


def page(title: str, subtitle: str, content: Iterable[str], footer: str) -> str:
    header = tag("header", tag("h1", title), *([tag("p", subtitle, class_="lead")] if subtitle else []))
    body = join([header, *(part for part in content if part), tag("footer", footer)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>\n</head>\n<body>\n"
        f"<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


_CSS = """
:root { color-scheme: light dark; --ground: #fff; --ink: #1f2328; --faint: #646b73; --line: #e1e4e8;
  --card: #f6f7f9; --accent: #0f7a6c; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15181c; --ink: #e4e7ea; --faint: #9aa3ad; --line: #30363d; --card: #1e2329;
    --accent: #55c2b0; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; letter-spacing: -0.015em; margin: 0; }
h2 { font-size: 1.3rem; letter-spacing: -0.01em; margin: 3rem 0 0.4rem; padding-top: 1rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.6rem 0 0.3rem; }
p { margin: 0.5rem 0; max-width: 46rem; }
.lead { color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(11.5rem, 1fr)); gap: 0.75rem;
  margin: 1.5rem 0 0; }
.cards div { background: var(--card); border-radius: 8px; padding: 0.7rem 0.9rem; }
.cards dt { color: var(--faint); font-size: 0.8rem; }
.cards dd { margin: 0.1rem 0 0; font-size: 1.15rem; font-weight: 600; line-height: 1.3;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.wide { overflow-x: auto; margin: 0.9rem 0; }
table { border-collapse: collapse; width: 100%; font-size: 0.9rem; }
th { text-align: left; font-weight: 600; color: var(--faint); font-size: 0.8rem; vertical-align: bottom; }
th, td { padding: 0.4rem 1.1rem 0.4rem 0; border-bottom: 1px solid var(--line); }
td { vertical-align: top; }
tr > :last-child { padding-right: 0; }
.n { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
code { font: 0.88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; white-space: nowrap; }
.note { color: var(--faint); }
figure { margin: 1rem 0; padding: 0.75rem; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; }
figure img { display: block; width: 100%; height: auto; }
.bar { display: block; min-width: 6rem; height: 0.6rem; margin-top: 0.45rem; background: var(--card);
  border-radius: 3px; overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--accent); }
details { margin: 0.9rem 0; }
summary { cursor: pointer; color: var(--faint); }
footer { margin-top: 3rem; color: var(--faint); font-size: 0.85rem; }
@media print {
  :root { --ground: #fff; --ink: #000; --faint: #444; --line: #ccc; --card: #f4f4f4; --accent: #0f7a6c; }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  .wide { overflow: visible; }
  figure, tr, .cards div { break-inside: avoid; }
  figure { border: 0; padding: 0; }
  h2 { break-after: avoid; }
}
"""
