"""Small SVG plots of spectra and of the energy that leading singular values hold."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from fullrank.spectra.spectrum import Spectrum, Vector

# Told apart from each other, and from a white and a near-black page.
_COLOURS = (
    "#3b82f6",
    "#e8833a",
    "#2da44e",
    "#a371f7",
    "#e5534b",
    "#1ba3a3",
    "#d6679b",
    "#a9783c",
    "#8f9a1f",
    "#7d8590",
)
_POINTS = 72  # a line; more cannot be seen at this size
_DECADES = 6.0  # of a singular value below the largest that are drawn
_WIDTH, _HEIGHT = 280, 170
_LEFT, _RIGHT, _TOP, _BOTTOM = 36, 8, 8, 28
_COURSE_LEFT = 62  # room for numbers of any size
_MARKED = 24  # values up to which each is drawn as a dot


def _svg(parts: Iterable[str], title: str, width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" font-size="11" '
        f'font-family="system-ui, sans-serif" aria-label="{html.escape(title)}">'
        f"<title>{html.escape(title)}</title>{''.join(parts)}</svg>"
    )


def _line(points: Iterable[tuple[float, float]], stroke: str, width: float = 1.6) -> str:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{stroke}" stroke-width="{width}" '
        'stroke-linejoin="round"/>'
    )


def _rule(x1: float, y1: float, x2: float, y2: float, opacity: float, dash: str = "") -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="currentColor" '
        f'stroke-opacity="{opacity}"{dashed}/>'
    )


def _text(text: str, x: float, y: float, anchor: str = "middle") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="currentColor" '
        f'fill-opacity="0.75">{html.escape(text)}</text>'
    )


def spectrum_svg(spectra: Mapping[str, Spectrum], *, mark: float | None = None) -> str:
    """Plot singular values relative to the largest, on two logarithmic axes.

    Parameters
    ----------
    spectra
        Name -> spectrum, one line each; two show before and after.
    mark
        Rank to mark by a dashed line, e.g. the effective rank.

    Returns
    -------
    str
        An ``<svg>`` element without scripts, styles or references.
    """
    longest = max(len(spectrum) for spectrum in spectra.values())
    decades_x = math.log10(longest) or 1.0
    depth = max(1.0, *(_depth(spectrum.relative) for spectrum in spectra.values()))
    inner = _WIDTH - _LEFT - _RIGHT
    tall = _HEIGHT - _TOP - _BOTTOM

    def x(rank: float) -> float:
        return _LEFT + inner * math.log10(rank) / decades_x

    def y(value: float) -> float:
        return _TOP + tall * min(-math.log10(max(value, 1e-300)) / depth, 1.0)

    parts = []
    for decade in range(math.floor(depth) + 1):
        parts.append(_rule(_LEFT, y(10.0**-decade), _WIDTH - _RIGHT, y(10.0**-decade), 0.18))
        parts.append(_text(_power(-decade), _LEFT - 5, y(10.0**-decade) + 4, "end"))
    for decade in range(math.floor(decades_x) + 1):
        parts.append(_rule(x(10.0**decade), _TOP, x(10.0**decade), _HEIGHT - _BOTTOM, 0.18))
        parts.append(_text(str(10**decade), x(10.0**decade), _HEIGHT - _BOTTOM + 14))
    if mark is not None and mark >= 1:
        parts.append(_rule(x(mark), _TOP, x(mark), _HEIGHT - _BOTTOM, 0.7, "3 3"))
    for (_, spectrum), tint in zip(spectra.items(), _tints(len(spectra)), strict=True):
        picked = _log_spaced(len(spectrum))
        relative = spectrum.relative
        parts.append(_line(((x(i + 1), y(relative[i])) for i in picked), tint))
    return _svg(parts, f"singular values of {', '.join(spectra)}", _WIDTH, _HEIGHT)


def angles_svg(sides: Mapping[str, Vector]) -> str:
    """Plot cosines of principal angles, one line a side (left, right), over their number.

    Parameters
    ----------
    sides
        Name -> cosines, descending.
    """
    inner, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    longest = max(len(cosines) for cosines in sides.values())
    parts = []
    for level in (0.0, 0.5, 1.0):
        at = _TOP + tall * (1 - level)
        parts += [_rule(_LEFT, at, _WIDTH - _RIGHT, at, 0.18)]
        parts += [_text(f"{level:g}", _LEFT - 5, at + 4, "end")]
    for number, anchor in ((1, "start"), (longest, "end")):
        at = _LEFT + inner * (number - 1) / max(longest - 1, 1)
        parts.append(_text(str(number), at, _HEIGHT - _BOTTOM + 14, anchor))
    for cosines, tint in zip(sides.values(), _tints(len(sides)), strict=True):
        points = [
            (_LEFT + inner * i / max(longest - 1, 1), _TOP + tall * (1 - float(cosines[i])))
            for i in _evenly_spaced(len(cosines))
        ]
        parts.append(_line(points if len(points) > 1 else points * 2, tint))
    return _svg(parts, f"cosines of principal angles, {' and '.join(sides)}", _WIDTH, _HEIGHT)


def course_svg(points: Mapping[int, float], name: str) -> str:
    """Plot a measure over the steps of a run, on linear axes.

    Parameters
    ----------
    points
        Step -> value; values that are not finite leave a gap in what is drawn.
    name
        Of the measure, for readers who do not see the picture.
    """
    inner, tall = _WIDTH - _COURSE_LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    finite = {step: value for step, value in points.items() if math.isfinite(value)}
    first, last = min(points), max(points)
    low, high = min(finite.values(), default=0.0), max(finite.values(), default=0.0)
    steps = (last - first) or 1
    # A constant is a line in the middle.
    floor, span = (low, high - low) if high > low else (low - 0.5, 1.0)
    # Ends that hardly differ need more digits to be told apart.
    digits = 3 if high - low > 0.01 * max(abs(low), abs(high)) else 5
    parts = []
    for value in sorted({low, (low + high) / 2, high}):
        at = _TOP + tall * (1 - (value - floor) / span)
        parts.append(_rule(_COURSE_LEFT, at, _WIDTH - _RIGHT, at, 0.18))
        parts.append(_text(f"{value:.{digits}g}", _COURSE_LEFT - 5, at + 4, "end"))
    for step, anchor in {first: "start", last: "end"}.items():
        at = _COURSE_LEFT + inner * (step - first) / steps
        parts.append(_text(str(step), at, _HEIGHT - _BOTTOM + 14, anchor))
    places = [
        (_COURSE_LEFT + inner * (s - first) / steps, _TOP + tall * (1 - (v - floor) / span))
        for s, v in sorted(finite.items())
    ]
    if len(places) > 1:
        # One point a pixel is as much as can be seen.
        stride = max(1, len(places) // inner)
        parts.append(_line([*places[::stride], places[-1]], _COLOURS[0]))
    parts += [
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{_COLOURS[0]}"/>'
        for x, y in places
        if len(places) <= _MARKED
    ]
    return _svg(parts, f"{name} over the steps", _WIDTH, _HEIGHT)


def violin_svg(samples: Mapping[str, Sequence[float]], title: str) -> str:
    """Draw how the values of a few samples spread: a violin each, with its mean and quartiles.

    Parameters
    ----------
    samples
        Name -> values.
    title
        For readers who do not see the picture.
    """
    inner, tall = _WIDTH - _COURSE_LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    low = min(min(values) for values in samples.values())
    high = max(max(values) for values in samples.values())
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    span = high - low

    def y(value: float) -> float:
        return _TOP + tall * (1 - (value - low) / span)

    parts = []
    for value in (low, (low + high) / 2, high):
        parts.append(_rule(_COURSE_LEFT, y(value), _WIDTH - _RIGHT, y(value), 0.18))
        parts.append(_text(f"{value:.3g}", _COURSE_LEFT - 5, y(value) + 4, "end"))
    room = inner / len(samples)
    for number, (name, values) in enumerate(samples.items()):
        centre = _COURSE_LEFT + room * (number + 0.5)
        at, width = _density(np.asarray(values, dtype=np.float64), low, high)
        half = 0.42 * room * width / (width.max() or 1.0)
        right = [(centre + h, y(v)) for h, v in zip(half, at, strict=True)]
        left = [(centre - h, y(v)) for h, v in zip(half[::-1], at[::-1], strict=True)]
        outline = " ".join(f"{a:.1f},{b:.1f}" for a, b in (*right, *left))
        colour = _COLOURS[number % len(_COLOURS)]
        parts.append(
            f'<polygon points="{outline}" fill="{colour}" fill-opacity="0.35" stroke="{colour}"/>'
        )
        quarter, three = np.quantile(values, [0.25, 0.75])
        parts.append(_line([(centre, y(quarter)), (centre, y(three))], colour, 4.0))
        parts.append(
            f'<circle cx="{centre:.1f}" cy="{y(float(np.mean(values))):.1f}" r="3" '
            'fill="currentColor"/>'
        )
        parts.append(_text(name[:18], centre, _HEIGHT - _BOTTOM + 16))
    return _svg(parts, title, _WIDTH, _HEIGHT)


def _density(values: Vector, low: float, high: float) -> tuple[Vector, Vector]:
    """Gaussian kernel density between the sample's ends, by Scott's rule."""
    at = np.linspace(values.min(), values.max(), 48)
    width = max(float(values.std()) * len(values) ** -0.2, (high - low) / 200)
    gaps = (at[:, None] - values[None, :]) / width
    return at, np.exp(-0.5 * np.square(gaps)).sum(1)


def energy_svg(groups: Mapping[str, Sequence[Spectrum]]) -> str:
    """Plot the share of energy that a share of the rank holds; one line a matrix.

    Parameters
    ----------
    groups
        Name of a group (such as a projection) -> its spectra. A group has one colour.
    """
    width, height = 560, 300
    inner, tall = width - _LEFT - _RIGHT, height - _TOP - _BOTTOM
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        level = _TOP + tall * (1 - share)
        parts.append(_rule(_LEFT, level, width - _RIGHT, level, 0.18))
        parts.append(_text(f"{share:.0%}", _LEFT - 5, level + 4, "end"))
        at = _LEFT + inner * share
        parts.append(_text(f"{share:.0%}", at, height - 12, "end" if share == 1 else "middle"))
    for share in (0.9, 0.95, 0.99):
        parts.append(
            _rule(
                _LEFT,
                _TOP + tall * (1 - share),
                width - _RIGHT,
                _TOP + tall * (1 - share),
                0.35,
                "2 4",
            )
        )
    for (name, spectra), tint in zip(groups.items(), _tints(len(groups)), strict=True):
        lines = [
            _line(
                (
                    (_LEFT + inner * (i + 1) / len(s), _TOP + tall * (1 - energy[i]))
                    for i in _evenly_spaced(len(s))
                ),
                tint,
                1.1,
            )
            for s in spectra
            if (energy := s.energy) is not None
        ]
        parts.append(f"<g><title>{html.escape(name)}</title>{''.join(lines)}</g>")
    return _svg(parts, "share of energy held by a share of the rank", width, height)


class QualityPoint(NamedTuple):
    """One shrunk model: share of its size that is left, its quality, and how sure that is."""

    size: float
    quality: float
    lower: float
    holds: bool


def quality_svg(
    curves: Mapping[str, Sequence[QualityPoint]], *, floor: float | None = None, title: str = ""
) -> str:
    """Plot size against quality: a line a method, a dot a model, a bar down to its lower end.

    Parameters
    ----------
    curves
        Name of a method -> its points. A full dot holds the floor, a hollow one does not.
    floor
        Quality to mark by a dashed line.
    title
        What is shown, for readers who do not see the picture.
    """
    width, height = 460, 290
    left, inner, tall = 46, width - 46 - _RIGHT, height - _TOP - _BOTTOM
    points = [p for found in curves.values() for p in found]
    ends = [v for p in points for v in (p.quality, p.lower) if math.isfinite(v)]
    ends += [] if floor is None else [floor]
    low, high = min(ends, default=0.0), max(ends, default=1.0)
    margin = 0.06 * (high - low) or 0.05
    low, high = low - margin, high + margin
    smallest = min((p.size for p in points), default=0.0)
    start = math.floor(max(smallest - 0.05, 0.0) * 10) / 10

    def place(size: float, quality: float) -> tuple[float, float]:
        across = left + inner * (size - start) / (1 - start or 1.0)
        value = max(quality, low) if math.isfinite(quality) else low
        return across, _TOP + tall * (high - value) / (high - low)

    parts = []
    for level in _round_values(low, high):
        _, y = place(1.0, level)
        parts.append(_rule(left, y, width - _RIGHT, y, 0.18))
        parts.append(_text(f"{level:.6g}", left - 5, y + 4, "end"))
    for size in _round_values(start, 1.0):
        x, _ = place(size, low)
        anchor = "end" if size > 0.99 else "middle"
        parts.append(_text(f"{size:.0%}", x, height - 10, anchor))
    if floor is not None:
        _, y = place(1.0, floor)
        parts.append(_rule(left, y, width - _RIGHT, y, 0.8, "5 4"))
    for (name, found), tint in zip(curves.items(), _tints(len(curves)), strict=True):
        ordered = sorted(found)
        drawn = [_line((place(p.size, p.quality) for p in ordered), tint)] if ordered else []
        for p in ordered:
            (x, y), (_, end) = place(p.size, p.quality), place(p.size, p.lower)
            drawn.append(
                f'<line x1="{x:.1f}" y1="{y:.1f}" x2="{x:.1f}" y2="{end:.1f}" stroke="{tint}" '
                f'stroke-opacity="0.6"/><circle cx="{x:.1f}" cy="{y:.1f}" r="4" stroke="{tint}" '
                f'stroke-width="2" fill="{tint if p.holds else "none"}"><title>'
                f"{html.escape(name)}: {p.size:.1%} kept, {p.quality:.4f} (lower end {p.lower:.4f})"
                "</title></circle>"
            )
        parts.append(f"<g>{''.join(drawn)}</g>")
    return _svg(parts, title or "size against quality", width, height)


def legend(names: Iterable[str]) -> str:
    """HTML list of the colours that :func:`energy_svg` gives its groups."""
    listed = list(names)
    items = "".join(
        f'<li><svg width="14" height="10" aria-hidden="true"><rect width="14" height="10" rx="2" '
        f'fill="{tint}"/></svg> {html.escape(name)}</li>'
        for name, tint in zip(listed, _tints(len(listed)), strict=True)
    )
    return f'<ul class="legend">{items}</ul>'


def _round_values(low: float, high: float) -> list[float]:
    """Three to eight round numbers in a range, to mark an axis with.

    >>> _round_values(0.913, 1.004)
    [0.92, 0.94, 0.96, 0.98, 1.0]
    """
    rough = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = min((unit * k for k in (1, 2, 5, 10)), key=lambda size: abs(size - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _tints(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _depth(relative: Vector) -> float:
    """Decades from the largest to the smallest value drawn."""
    smallest = float(relative[relative > 0].min(initial=1.0))
    return min(-math.log10(smallest), _DECADES)


def _log_spaced(count: int) -> list[int]:
    return sorted({round(i) - 1 for i in np.geomspace(1, count, min(count, _POINTS)).tolist()})


def _evenly_spaced(count: int) -> list[int]:
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, _POINTS)).tolist()})


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def _power(exponent: int) -> str:
    return "1" if exponent == 0 else f"10{str(exponent).translate(_SUPERSCRIPTS)}"
