"""The demo's report: one self-contained page."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fullrank._version import __version__
from fullrank.core.files import atomic_write
from fullrank.core.table import Table


@dataclass(frozen=True)
class Hit:
    """One result of one system: what is shown of it, and whether it was judged relevant."""

    title: str
    relevant: bool


@dataclass(frozen=True)
class Example:
    """A query and the first results of each system, side by side."""

    query: str
    wanted: Sequence[str]
    results: dict[str, Sequence[Hit]]


@dataclass
class Section:
    """A heading, and what stands under it: paragraphs, tables, pictures, in order.

    Text is escaped; SVG and ``raw`` HTML come from this package only.
    """

    title: str
    anchor: str
    parts: list[str] = field(default_factory=list)

    def text(self, paragraph: str) -> Section:
        """Add a paragraph."""
        self.parts.append(f"<p>{html.escape(paragraph)}</p>")
        return self

    def table(self, table: Table) -> Section:
        """Add a table."""
        self.parts.append(f'<div class="wide">{table.html()}</div>')
        return self

    def picture(self, svg: str, caption: str) -> Section:
        """Add a picture and what it shows."""
        text = html.escape(caption)
        self.parts.append(f"<figure>{svg}<figcaption>{text}</figcaption></figure>")
        return self

    def raw(self, markup: str) -> Section:
        """Add HTML that was made, and escaped, elsewhere in this package."""
        self.parts.append(markup)
        return self

    def examples(self, examples: Sequence[Example]) -> Section:
        """Add queries with each system's results in columns."""
        for example in examples:
            columns = "".join(
                f"<div><h4>{html.escape(system)}</h4><ol>{''.join(map(_item, hits))}</ol></div>"
                for system, hits in example.results.items()
            )
            wanted = ", ".join(example.wanted)
            self.parts.append(
                f"<h3>{html.escape(example.query)}</h3>"
                f'<p class="dim">See also: {html.escape(wanted)}</p>'
                f'<div class="columns">{columns}</div>'
            )
        return self

    def html(self) -> str:
        """Return the section as HTML."""
        return (
            f'<section id="{self.anchor}"><h2>{html.escape(self.title)}</h2>'
            f"{''.join(self.parts)}</section>"
        )


def _item(hit: Hit) -> str:
    mark = ' class="hit"' if hit.relevant else ""
    label = '<span class="sr"> (judged relevant)</span>' if hit.relevant else ""
    # Long dotted names break at their dots rather than anywhere.
    title = html.escape(hit.title).replace(".", ".<wbr>").replace("_", "_<wbr>")
    return f"<li{mark}>{title}{label}</li>"


def write_page(path: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a page that needs nothing from elsewhere and runs no script."""
    links = "".join(f'<a href="#{s.anchor}">{html.escape(s.title)}</a>' for s in sections)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">"
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p><nav>{links}</nav></header>"
        f"<main>{''.join(s.html() for s in sections)}</main>"
        f"<footer>fullrank {__version__}</footer></body></html>"
    )
    return atomic_write(path, page.encode())


_STYLE = """
:root{color-scheme:light dark;--ink:#1c2128;--dim:#5d6670;--page:#fff;--line:#dde2e7;
--soft:#f5f7f9;--mark:#1a7f37;--link:#0a58ca}
@media(prefers-color-scheme:dark){:root{--ink:#e3e7eb;--dim:#98a2ad;--page:#15191e;
--line:#313840;--soft:#1d2228;--mark:#4cc38a;--link:#7db4ff}}
*{box-sizing:border-box}
body{margin:0;font:16px/1.55 system-ui,sans-serif;color:var(--ink);background:var(--page)}
header,main,footer{max-width:72rem;margin:auto;padding:0 1.25rem}
header{padding-top:2.5rem}h1{font-size:1.9rem;line-height:1.2;margin:0 0 .5rem}
h2{margin:3rem 0 .75rem;padding-top:.75rem;border-top:1px solid var(--line);font-size:1.35rem}
h3{margin:2rem 0 .25rem;font-size:1.05rem}h4{margin:.25rem 0;font-size:.85rem;color:var(--dim)}
p{max-width:46rem}.dim,footer,figcaption,caption{color:var(--dim);font-size:.875rem}
nav{display:flex;flex-wrap:wrap;gap:.35rem 1.25rem;margin-top:1rem}a{color:var(--link)}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.875rem;margin:1rem 0}
caption{text-align:left;padding-bottom:.35rem}
th,td{padding:.35rem .8rem;text-align:left;border-bottom:1px solid var(--line);
white-space:nowrap}thead th{color:var(--dim);font-weight:600}
.num{text-align:right;font-variant-numeric:tabular-nums}
figure{display:inline-block;vertical-align:top;width:34rem;max-width:100%;
margin:1.25rem .5rem 0 0;overflow-x:auto}figure svg{max-width:100%;height:auto}
.columns{display:grid;grid-template-columns:repeat(auto-fit,minmax(12rem,1fr));gap:.75rem}
.columns>div{background:var(--soft);border-radius:.5rem;padding:.6rem .9rem;min-width:0}
ol{margin:.25rem 0;padding-left:1.4rem;font-size:.875rem}
li{overflow-wrap:anywhere}li.hit{color:var(--mark);font-weight:600}
.sr{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
footer{padding-top:3rem;padding-bottom:2rem}
"""
