"""Diagrams as inline SVG, for report.page: forest plot, dots, histogram.

    looks = report.looks(["baseline", "tuned"])
    forest([Interval("nft", "tuned", 0.31, 0.18, 0.43, True), ...], looks, "Spearman's rho")
    dots({"tuned": [(x, y), ...], ...}, looks, "nft", "positive fraction")
    histogram({"tuned": [0.30, 0.32, ...], ...}, {"tuned": 0.31}, looks, "rho", "redraws")

Colours and markers are those of report.looks, one for each series. NaN is left out.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

import numpy as np

import report
from report import Look


class Frame:
    """Axes of a diagram; `across` and `up` turn values into px, `parts` is what will be drawn."""

    def __init__(self, x: Iterable[float], y: Iterable[float], x_label: str, y_label: str = "",
                 width: int = 520, height: int = 300, rows: Sequence[str] = ()):
        """x, y : values that must find room; rows : names at y = 0, 1, ... from the top, instead of y."""
        self.x0, self.x1 = spanned(x)
        self.y0, self.y1 = (len(rows) - 0.5, -0.5) if rows else spanned(y)
        self.left, self.right = 20 + 7 * max(map(len, rows)) if rows else 58, width - 14
        self.top, self.bottom = 10, height - 42
        self.width, self.height, self.title, self.parts = width, height, f"{y_label} {x_label}".strip(), []
        for value in report.ticks(self.x0, self.x1):
            self.line(value, self.y0, value, self.y1, 'class="grid"')
            self.text(self.across(value), self.bottom + 16, "middle", f"{value:.3g}")
        numbers = [] if rows else report.ticks(self.y0, self.y1)
        for value, name in (*enumerate(rows), *((value, f"{value:.3g}") for value in numbers)):
            self.text(self.left - 8, self.up(value) + 4, "end", name)
        self.line(self.x0, self.y0, self.x1, self.y0, 'class="axis"')
        middle = (self.top + self.bottom) / 2
        self.text((self.left + self.right) / 2, height - 6, "middle", x_label, 'class="label"')
        self.text(13, middle, "middle", y_label, f'class="label" transform="rotate(-90 13 {middle})"')

    def across(self, x: float) -> float:
        return round(self.left + (x - self.x0) / (self.x1 - self.x0) * (self.right - self.left), 1)

    def up(self, y: float) -> float:
        return round(self.bottom - (y - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top), 1)

    def line(self, x0: float, y0: float, x1: float, y1: float, look: str) -> None:
        self.parts.append(f'<line x1="{self.across(x0)}" y1="{self.up(y0)}" x2="{self.across(x1)}" '
                          f'y2="{self.up(y1)}" {look}/>')

    def text(self, x: float, y: float, anchor: str, content: str, more: str = "") -> None:
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(content)}</text>')

    def svg(self) -> str:
        return (f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" height="{self.height}" '
                f'role="img" aria-label="{escape(self.title)}">{"".join(self.parts)}</svg>')


def spanned(values: Iterable[float]) -> tuple[float, float]:
    """The least and the greatest with a little room around them."""
    found = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    room = 0.04 * (max(found) - min(found)) or 0.5
    return min(found) - room, max(found) + room


class Interval(NamedTuple):
    row: str
    series: str
    value: float
    low: float
    high: float
    full: bool                   # its marker is filled
    note: str = ""               # stands there if there is no value


def forest(intervals: Sequence[Interval], looks: dict[str, Look], label: str, width: int = 1120) -> str:
    """Values with their intervals, a row for each name and a line of it for each series; 0 is marked."""
    rows, series = list(dict.fromkeys(each.row for each in intervals)), list(looks)
    ends = [end for each in intervals for end in (each.low, each.value, each.high)]
    height = 60 + len(rows) * (16 + 14 * len(series))
    frame = Frame([0, *ends], (), label, width=width, height=height, rows=rows)
    frame.line(0, frame.y0, 0, frame.y1, 'class="axis"')
    for each in intervals:
        look = looks[each.series]
        y = rows.index(each.row) + (series.index(each.series) - (len(series) - 1) / 2) * 0.7 / len(series)
        if math.isnan(each.value):
            frame.text(frame.across(0) + 8, frame.up(y) + 4, "start", f"{each.series}: {each.note}")
            continue
        if not math.isnan(each.low):
            frame.line(each.low, y, each.high, y, f'stroke="{look.colour}" stroke-width="2"')
        fill, name = look.colour if each.full else "#fff", escape(f"{each.series}, {each.row}")
        frame.parts.append(f'<g fill="{fill}" stroke="{look.colour}" stroke-width="1.6"><title>{name}: '
                           f'{each.value:.3f}</title>'
                           f'{report.mark(look, frame.across(each.value), frame.up(y), 4.5)}</g>')
    return frame.svg()


def dots(series: dict[str, Sequence[tuple[float, float]]], looks: dict[str, Look], x_label: str, y_label: str
         ) -> str:
    """Points (x, y) of each series."""
    points = [point for each in series.values() for point in each]
    frame = Frame([x for x, _ in points], [y for _, y in points], x_label, y_label)
    for name, each in series.items():                         # lines of no length with round ends: few bytes
        path = "".join(f"M{frame.across(x)} {frame.up(y)}h.01" for x, y in each if math.isfinite(x + y))
        frame.parts.append(f'<path d="{path}" stroke="{looks[name].colour}" stroke-width="6" fill="none" '
                           f'stroke-linecap="round" stroke-opacity=".5"><title>{escape(name)}</title></path>')
    return frame.svg()


def histogram(series: dict[str, Sequence[float]], marked: dict[str, float], looks: dict[str, Look],
              x_label: str, y_label: str, bins: int = 40) -> str:
    """How values are distributed, in the same bins for all series; a dashed line at what is marked of one."""
    values = {name: [value for value in each if math.isfinite(value)] for name, each in series.items()}
    pooled = [*(value for each in values.values() for value in each), *marked.values()]
    edges = np.linspace(*spanned(pooled), bins + 1)
    counts = {name: np.histogram(each, edges)[0] for name, each in values.items()}
    frame = Frame(pooled, [0, *(count.max() for count in counts.values())], x_label, y_label)
    for name, count in counts.items():
        colour = looks[name].colour
        steps = "".join(f"L{frame.across(left)} {frame.up(height)}H{frame.across(right)}"
                        for left, right, height in zip(edges, edges[1:], count))
        outline = f"M{frame.across(edges[0])} {frame.up(0)}{steps}V{frame.up(0)}Z"
        frame.parts.append(f'<path d="{outline}" fill="{colour}" fill-opacity=".25" stroke="{colour}">'
                           f'<title>{escape(name)}</title></path>')
        if math.isfinite(marked[name]):
            frame.line(marked[name], frame.y0, marked[name], frame.y1,
                       f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="5 3"')
    return frame.svg()
