"""Parts of the docs that are made from the code, so that they cannot fall behind it."""

from __future__ import annotations

from typing import Any

from fullrank.catalogue import METHODS, VERBS

MARK = "<!-- methods -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the catalogue where a page asks for it."""
    return markdown.replace(MARK, _methods()) if MARK in markdown else markdown


def _methods() -> str:
    lines = []
    for verb in VERBS:
        lines += [f"## {verb}", "", "| method | purpose | start from | |", "|---|---|---|---|"]
        for m in METHODS:
            if m.verb == verb:
                state = "there" if m.available else "planned"
                entry = f"`{m.entry}`"
                lines.append(f"| [{m.title}]({m.url}) | {m.purpose} | {entry} | {state} |")
        lines.append("")
    return "\n".join(lines)
