"""A heat map over a model: projections down, layers across, as one SVG element."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Mapping

from fullrank.spectra.matrices import grid

# From dark blue through green to yellow: lightness rises all the way, so that the order can be
# seen without colour vision, in print, and on light and dark pages alike.
_RAMP = (
    (29, 43, 83),
    (32, 80, 138),
    (31, 122, 140),
    (63, 163, 122),
    (156, 195, 90),
    (242, 214, 75),
)

# Of values that are not finite, which have no place on the ramp.
_UNKNOWN = (150, 150, 150)

_CELL_WIDTH, _CELL_HEIGHT = 46, 26
_CHARACTER = 7.2  # width of one character of the labels, at their size


def colour(share: float) -> tuple[int, int, int]:
    """RGB on the ramp, for a share in [0, 1]; what is outside takes the nearest end.

    >>> colour(0.0), colour(1.0)
    ((29, 43, 83), (242, 214, 75))
    """
    position = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    index = min(int(position), len(_RAMP) - 2)
    part = position - index
    a, b = _RAMP[index], _RAMP[index + 1]
    r, g, blue = (round(x + part * (y - x)) for x, y in zip(a, b, strict=True))
    return r, g, blue


def _hex(rgb: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*rgb)


def _ink(rgb: tuple[int, int, int]) -> str:
    """Black or white, whichever is read more easily on a colour."""
    r, g, b = ((c / 255) ** 2.2 for c in rgb)
    return "#000" if 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.18 else "#fff"


def heatmap_svg(
    values: Mapping[str, float],
    *,
    title: str,
    show: Callable[[float], str] = "{:.0%}".format,
    describe: Callable[[str], str] | None = None,
    link: Callable[[str], str] | None = None,
    span: tuple[float, float] | None = None,
) -> str:
    """Draw one cell for every matrix, coloured and labelled by its value.

    Parameters
    ----------
    values
        Canonical module name -> value. The colours span the values in layers.
    title
        What the values are, for readers who do not see the picture.
    show
        From value to the text in the cell.
    describe
        From name to what a pointer over the cell shows; the name and the value by default.
    link
        From name to what the cell leads to, such as ``"#m3"``; None for cells that lead nowhere.
    span
        Values at the two ends of the colours, so that two maps compare; found by default.

    Returns
    -------
    str
        An ``<svg>`` element without scripts, styles or references. Texts outside cells take the
        colour of the text around it.
    """
    rows, rest = grid(values)
    layers = sorted({layer for cells in rows.values() for layer in cells})
    # What stands outside the layers (a position table, say) is often of another kind: it takes the
    # nearest colour rather than the contrast from the others.
    ranged = _finite(values[name] for cells in rows.values() for name in cells.values())
    ranged = ranged or _finite(values.values()) or [0.0]
    low, high = span or (min(ranged), max(ranged))
    width_of_range = (high - low) or 1.0
    say = describe or (lambda name: f"{name}: {show(values[name])}")
    left = 16 + (_CHARACTER * max(len(label) for label in [*rows, "layer"]) if rows else 0)
    # Labels of what stands outside the layers are right of the cells, where there is room.
    beside = _CELL_WIDTH + 6 + _CHARACTER * max(map(len, rest), default=0)
    width = left + max(_CELL_WIDTH * max(len(layers), 5), beside) + 8

    def cell(name: str, x: float, y: float) -> str:
        share = (values[name] - low) / width_of_range
        rgb = colour(share) if math.isfinite(share) else _UNKNOWN
        opening, closing = "<g>", "</g>"
        if link is not None:
            opening, closing = f'<a href="{html.escape(link(name))}">', "</a>"
        return (
            f'{opening}<title>{html.escape(say(name))}</title><rect x="{x:.0f}" y="{y:.0f}" '
            f'width="{_CELL_WIDTH - 2}" height="{_CELL_HEIGHT - 2}" rx="3" fill="{_hex(rgb)}"/>'
            f'<text x="{x + _CELL_WIDTH / 2 - 1:.0f}" y="{y + 16:.0f}" text-anchor="middle" '
            f'fill="{_ink(rgb)}">{html.escape(show(values[name]))}</text>{closing}'
        )

    def label(text: str, x: float, y: float, anchor: str = "end") -> str:
        return (
            f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}" fill="currentColor">'
            f"{html.escape(text)}</text>"
        )

    parts = []
    y = 8.0
    if rows:
        parts.append(label("layer", left - 8, y + 12))
        for column, layer in enumerate(layers):
            middle = left + column * _CELL_WIDTH + _CELL_WIDTH / 2 - 1
            parts.append(label(str(layer), middle, y + 12, "middle"))
        y += 20
        for text, cells in rows.items():
            parts.append(label(text, left - 8, y + 16))
            parts += [cell(cells[k], left + c * _CELL_WIDTH, y) for c, k in _columns(cells, layers)]
            y += _CELL_HEIGHT
        y += 10
    for name in rest:
        parts += [cell(name, left, y), label(name, left + _CELL_WIDTH + 6, y + 16, "start")]
        y += _CELL_HEIGHT
    y += 12
    parts.append(_legend(left, y, show(low), show(high)))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {y + 34:.0f}" '
        f'width="{width:.0f}" height="{y + 34:.0f}" role="img" font-size="12" '
        f'font-family="system-ui, sans-serif" aria-label="{html.escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if math.isfinite(value)]


def _columns(cells: Mapping[int, str], layers: list[int]) -> list[tuple[int, int]]:
    return [(column, layer) for column, layer in enumerate(layers) if layer in cells]


def _legend(x: float, y: float, low: str, high: str) -> str:
    steps = 40
    width = 4 * _CELL_WIDTH / steps
    bar = "".join(
        f'<rect x="{x + i * width:.2f}" y="{y:.0f}" width="{width + 0.3:.2f}" height="8" '
        f'fill="{_hex(colour(i / (steps - 1)))}"/>'
        for i in range(steps)
    )
    ends = (
        f'<text x="{x:.0f}" y="{y + 22:.0f}" fill="currentColor">{html.escape(low)}</text>'
        f'<text x="{x + 4 * _CELL_WIDTH:.0f}" y="{y + 22:.0f}" text-anchor="end" '
        f'fill="currentColor">{html.escape(high)}</text>'
    )
    return bar + ends
