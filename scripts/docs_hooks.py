"""Parts of the docs that are made from the code, so that they cannot fall behind it."""

from __future__ import annotations

from typing import Any

from fullrank.catalogue import METHODS, VERBS

MARK = "<!-- methods -->"
_HEAD = "| method | purpose | start from | status |"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the catalogue where a page asks for it."""
    return markdown.replace(MARK, _methods()) if MARK in markdown else markdown


def _methods() -> str:
    lines = []
    for verb in VERBS:
        lines += [f"## {verb}", "", _HEAD, "|---|---|---|---|"]
        for m in METHODS:
            if m.verb == verb:
                state = "there" if m.available else "planned"
                # On a narrow page a long name breaks at its dots and not within a word.
                entry = f"<code>{m.entry.replace('.', '.<wbr>')}</code>"
                lines.append(f"| [{m.title}]({m.url}) | {m.purpose} | {entry} | {state} |")
        lines.append("")
    return "\n".join(lines)
