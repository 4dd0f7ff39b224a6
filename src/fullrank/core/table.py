"""One table, shown wherever a person looks: terminal, Markdown, HTML, data frame."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from fullrank.core.errors import InputError, require

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows of values under named columns, with a format for each column that needs one.

    Parameters
    ----------
    columns
        Column names, left to right.
    rows
        One sequence a row, as long as ``columns``. None is shown as an empty cell.
    title
        Shown above.
    formats
        Column name -> format spec (``".3f"``, ``",d"``) or a function from value to text.
        Numbers without one are shown with ``".4g"`` (floats) or as they are (integers).

    Examples
    --------
    >>> table = Table(["system", "nDCG@10"], [["BM25", 0.35349], ["Dense", 0.4335]],
    ...               formats={"nDCG@10": ".4f"})
    >>> print(table.markdown())
    | system | nDCG@10 |
    |:---|---:|
    | BM25 | 0.3535 |
    | Dense | 0.4335 |
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    formats: Mapping[str, str | Callable[[Any], str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise InputError(f"a row of {len(row)} cells under {len(self.columns)} columns")

    def _text(self, column: str, value: Cell) -> str:
        if value is None:
            return ""
        spec = self.formats.get(column)
        if callable(spec):
            return spec(value)
        if isinstance(value, str):
            return value
        return format(value, spec or (".4g" if isinstance(value, float) else ""))

    def _texts(self) -> list[list[str]]:
        return [
            [self._text(column, value) for column, value in zip(self.columns, row, strict=True)]
            for row in self.rows
        ]

    def _numeric(self) -> list[bool]:
        return [
            all(not isinstance(row[i], str) for row in self.rows) for i in range(len(self.columns))
        ]

    def __str__(self) -> str:
        return self.markdown()

    def __rich__(self) -> RichTable:
        from rich.markup import escape
        from rich.table import Table as RichTable

        table = RichTable(title=escape(self.title) or None, title_justify="left")
        for column, numeric in zip(self.columns, self._numeric(), strict=True):
            if numeric:
                table.add_column(escape(column), justify="right")
            else:  # a name that is cut off says nothing: layers differ at their ends
                table.add_column(escape(column), overflow="fold")
        for row in self._texts():
            table.add_row(*map(escape, row))
        return table

    def only(self, *columns: str) -> Table:
        """Return some of the columns, e.g. what fits a terminal.

        >>> Table(["a", "b"], [[1, 2]]).only("b").rows
        [[2]]
        """
        unknown = [column for column in columns if column not in self.columns]
        if unknown:
            raise InputError(f"no column {unknown[0]!r}; there are {', '.join(self.columns)}")
        places = [self.columns.index(column) for column in columns]
        return replace(self, columns=columns, rows=[[row[i] for i in places] for row in self.rows])

    def markdown(self) -> str:
        """Return a GitHub-flavoured Markdown table."""

        def line(cells: Sequence[str]) -> str:
            return (
                "| "
                + " | ".join(" ".join(c.replace("|", "\\|").splitlines()) for c in cells)
                + " |"
            )

        rule = "|" + "|".join("---:" if n else ":---" for n in self._numeric()) + "|"
        lines = [line(self.columns), rule, *map(line, self._texts())]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)

    def html(self) -> str:
        """Return an HTML ``<table>``; every cell is escaped, numbers get the class ``num``."""
        kinds = [' class="num"' if n else "" for n in self._numeric()]

        def cells(tag: str, values: Sequence[str]) -> str:
            return "".join(
                f"<{tag}{kind}>{html.escape(v)}</{tag}>"
                for kind, v in zip(kinds, values, strict=True)
            )

        caption = f"<caption>{html.escape(self.title)}</caption>" if self.title else ""
        body = "".join(f"<tr>{cells('td', row)}</tr>" for row in self._texts())
        head = f"<thead><tr>{cells('th', self.columns)}</tr></thead>"
        return f"<table>{caption}{head}<tbody>{body}</tbody></table>"

    def frame(self) -> Any:
        """Return a pandas data frame of the raw values."""
        pandas = require("pandas", extra="search")
        return pandas.DataFrame([list(row) for row in self.rows], columns=list(self.columns))


def wide_console() -> Console:
    """Return a console for tables: of the terminal's width, and wide where there is none.

    What goes into a file or a pipe is then one line a row. ``COLUMNS`` says otherwise.
    """
    from rich.console import Console

    narrow = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console(width=None if narrow else 200)
