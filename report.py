"""Charts as SVG, mosaics as PNG, tables as Markdown, and all of it on one HTML page.

    styles = report.page_styles(["ceiling", "a", "b"], reference="ceiling")
    chart = report.line_chart({"a": [(0.5, 0.9), (0.75, 0.6)], ...}, styles, "IoU", "AP")
    section = report.report_section("Set", "a note", report.legend(styles), chart)
    runs.write_text("report.html", report.page("Title", "a note", [section]))

    report.write_curves("curves.svg", {"loss": [(step, value), ...], "score": [...]})
    report.mosaic("maps.png", rows of (h, w, 3) uint8 pictures, row names, column names)

A chart is a string `<svg ...>`; each series has one colour and one marker in every chart. The page
is one file that holds its pictures; its Content-Security-Policy forbids scripts and fetching.
"""
from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import cycle, groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runs

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#56a3d9", "#e69f00")
MARKERS = ("circle", "square", "triangle", "diamond")   # lines differ in black and white too
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "triangle": [(0, -1.2), (1.15, 0.8), (-1.15, 0.8)],
    "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)], "": []}
WIDTH, HEIGHT = 520, 300                # px, of a chart
MANY = 60                               # points of a line; from here on they have no markers

Points = Sequence[tuple[float, float]]  # (x, y)


# -------------------------------------------------------------------------------- styles of series

class Style(NamedTuple):
    colour: str
    marker: str                         # one of MARKERS, or "" for a dashed line without


def page_styles(names: Iterable[str], reference: str | None = None) -> dict[str, Style]:
    """A colour and a marker for each name; the reference is a dashed grey line."""
    plain = map(Style, cycle(COLOURS), cycle(MARKERS))
    return {name: Style("#777777", "") if name == reference else next(plain) for name in names}


def chart_marker(style: Style, x: float, y: float, r: float = 3.6) -> str:
    """The marker of a style, centred at x, y."""
    if style.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in CORNERS[style.marker])
    return f'<polygon points="{points}"/>' if points else ""


def chart_stroke(style: Style) -> str:
    dashes = "" if style.marker else ' stroke-dasharray="6 4"'
    return f'fill="none" stroke="{style.colour}" stroke-width="2" stroke-linejoin="round"{dashes}'


def legend(styles: dict[str, Style]) -> str:
    keys = [f'<span><svg width="30" height="12" aria-hidden="true">'
            f'<path d="M1 6h28" {chart_stroke(style)}/>'
            f'<g fill="{style.colour}">{chart_marker(style, 15, 6)}</g></svg> {escape(name)}</span>'
            for name, style in styles.items()]
    return f'<p class="legend">{"".join(keys)}</p>'


# ---------------------------------------------------------------------------------- charts as SVG

class Frame:
    """Axes of a chart: `across` and `up` turn values into px, `parts` holds what is drawn."""

    def __init__(self, x: Iterable[float], y: Iterable[float], x_label: str, y_label: str = "", *,
                 rows: Sequence[str] = (), log: bool = False, width: int = WIDTH,
                 height: int = HEIGHT):
        """Make room for the values x and y.

        rows : names at y = 0, 1, ... from the top, in place of numbers. log : x is logarithmic.
        """
        self.scale = math.log10 if log else float
        self.x0, self.x1 = chart_range(self.scale(value) for value in x if math.isfinite(value))
        self.y0, self.y1 = (len(rows) - 0.5, -0.5) if rows else chart_range(y)
        self.left, self.right = 20 + 7 * max(map(len, rows)) if rows else 58, width - 14
        self.top, self.bottom = 10, height - 42
        self.width, self.height = width, height
        self.title, self.parts = f"{y_label} over {x_label}" if y_label else x_label, []
        for value in log_ticks(10**self.x0, 10**self.x1) if log else axis_ticks(self.x0, self.x1):
            px = self.across(value)
            self.parts.append(f'<path class="grid" d="M{px} {self.top}V{self.bottom}"/>')
            self.text(px, self.bottom + 16, f"{value:.6g}")
        for value, name in enumerate(rows):
            self.text(self.left - 8, self.up(value) + 4, name, "end")
        for value in [] if rows else axis_ticks(self.y0, self.y1):
            px = self.up(value)
            self.parts.append(f'<path class="grid" d="M{self.left} {px}H{self.right}"/>')
            self.text(self.left - 8, px + 4, f"{value:.6g}", "end")
        self.parts.append(f'<path class="axis" d="M{self.left} {self.bottom}H{self.right}"/>')
        middle = (self.top + self.bottom) / 2
        self.text((self.left + self.right) / 2, height - 6, x_label, more='class="label"')
        self.text(13, middle, y_label, more=f'class="label" transform="rotate(-90 13 {middle})"')

    def across(self, x: float) -> float:
        share = (self.scale(x) - self.x0) / (self.x1 - self.x0)
        return round(self.left + share * (self.right - self.left), 1)

    def up(self, y: float) -> float:
        share = (y - self.y0) / (self.y1 - self.y0)
        return round(self.bottom - share * (self.bottom - self.top), 1)

    def line(self, points: Points, look: str) -> None:
        corners = " ".join(f"{self.across(x)},{self.up(y)}" for x, y in points)
        self.parts.append(f'<polyline points="{corners}" {look}/>')

    def text(self, x: float, y: float, content: str, anchor: str = "middle",
             more: str = "") -> None:
        """Text at px."""
        self.parts.append(f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>'
                          f'{escape(content)}</text>')

    def svg(self) -> str:
        return (f'<svg viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
                f'height="{self.height}" role="img" aria-label="{escape(self.title)}">'
                f'{"".join(self.parts)}</svg>')


def chart_range(values: Iterable[float]) -> tuple[float, float]:
    """The smallest and the largest finite value, with room around them."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    room = 0.04 * (max(finite) - min(finite)) or 0.5
    return min(finite) - room, max(finite) + room


def axis_ticks(low: float, high: float) -> list[float]:
    """About five round numbers from low to high."""
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda m: abs(m * unit - rough))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 3, 5, 10, 20, 30, 50 ... from low to high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e in decades for m in (1, 2, 3, 5) if low <= m * 10.0**e <= high]


def line_chart(series: Mapping[str, Points], styles: dict[str, Style], x_label: str, y_label: str,
               log: bool = False, share: bool = True) -> str:
    """Lines over x; NaN interrupts a line. share: y goes from 0 to 1, whatever the values."""
    points = [point for each in series.values() for point in each if math.isfinite(point[1])]
    frame = Frame([x for x, _ in points] or [1.0], (0, 1) if share else [y for _, y in points],
                  x_label, y_label, log=log)
    for name, each in series.items():
        style = styles[name]
        for defined, some in groupby(each, key=lambda point: math.isfinite(point[1])):
            stretch = list(some) if defined else []
            if len(each) < MANY:
                frame.parts += [
                    f'<g fill="{style.colour}"><title>{escape(name)}: {y:.3f} at {x:.3g}</title>'
                    f'{chart_marker(style, frame.across(x), frame.up(y))}</g>' for x, y in stretch]
            if len(stretch) > 1:
                frame.line(stretch, chart_stroke(style))
    return frame.svg()


def dot_chart(series: Mapping[str, Points], styles: dict[str, Style], x_label: str, y_label: str,
              log: bool = False, means: bool = False) -> str:
    """Points of each series; means: a line through their mean at each x."""
    points = [point for each in series.values() for point in each]
    frame = Frame([x for x, _ in points], [y for _, y in points], x_label, y_label, log=log)
    for name, each in series.items():       # lines without length, with round ends: few bytes
        path = "".join(f"M{frame.across(x)} {frame.up(y)}h.01"
                       for x, y in each if math.isfinite(x + y))
        frame.parts.append(
            f'<path d="{path}" stroke="{styles[name].colour}" stroke-width="6" fill="none" '
            f'stroke-linecap="round" stroke-opacity=".5"><title>{escape(name)}</title></path>')
        if means:
            frame.line([(x, float(np.mean([y for at, y in each if at == x])))
                        for x in sorted({x for x, _ in each})], chart_stroke(styles[name]))
    return frame.svg()


class Interval(NamedTuple):
    row: str
    series: str
    value: float
    low: float
    high: float
    full: bool                          # its marker is filled
    note: str = ""                      # stands there if there is no value


def forest_chart(intervals: Sequence[Interval], styles: dict[str, Style], label: str) -> str:
    """Values with intervals: a row for each name, a line for each series; 0 is marked."""
    rows, series = list(dict.fromkeys(each.row for each in intervals)), list(styles)
    ends = [end for each in intervals for end in (each.low, each.value, each.high)]
    frame = Frame([0, *ends], (), label, rows=rows, width=1120,
                  height=60 + len(rows) * (16 + 14 * len(series)))
    frame.line([(0, frame.y0), (0, frame.y1)], 'class="axis"')
    for each in intervals:
        style, line = styles[each.series], series.index(each.series) - (len(series) - 1) / 2
        y = rows.index(each.row) + 0.7 * line / len(series)
        if math.isnan(each.value):
            frame.text(frame.across(0) + 8, frame.up(y) + 4, f"{each.series}: {each.note}", "start")
            continue
        if not math.isnan(each.low):
            frame.line([(each.low, y), (each.high, y)], f'stroke="{style.colour}" stroke-width="2"')
        fill, name = style.colour if each.full else "#fff", escape(f"{each.series}, {each.row}")
        frame.parts.append(f'<g fill="{fill}" stroke="{style.colour}" stroke-width="1.6">'
                           f'<title>{name}: {each.value:.3f}</title>'
                           f'{chart_marker(style, frame.across(each.value), frame.up(y), 4.5)}</g>')
    return frame.svg()


def histogram_chart(series: Mapping[str, Sequence[float]], marked: dict[str, float],
                    styles: dict[str, Style], x_label: str, y_label: str) -> str:
    """Counts of values, in the same 40 bins for all series; dashed: the marked value of each."""
    values = {name: [value for value in each if math.isfinite(value)]
              for name, each in series.items()}
    pooled = [*(value for each in values.values() for value in each), *marked.values()]
    edges = np.linspace(*chart_range(pooled), 41)
    counts = {name: np.histogram(each, edges)[0] for name, each in values.items()}
    frame = Frame(pooled, [0, *(count.max() for count in counts.values())], x_label, y_label)
    for name, count in counts.items():
        colour = styles[name].colour
        steps = "".join(f"L{frame.across(left)} {frame.up(height)}H{frame.across(right)}"
                        for left, right, height in zip(edges, edges[1:], count))
        outline = f"M{frame.across(edges[0])} {frame.up(0)}{steps}V{frame.up(0)}Z"
        frame.parts.append(f'<path d="{outline}" fill="{colour}" fill-opacity=".25" '
                           f'stroke="{colour}"><title>{escape(name)}</title></path>')
        if math.isfinite(marked[name]):
            frame.line([(marked[name], frame.y0), (marked[name], frame.y1)],
                       f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="5 3"')
    return frame.svg()


def write_curves(path: str | Path, series: Mapping[str, Points]) -> None:
    """Write an SVG file with a chart for each series that has points, two in a row."""
    charts = [line_chart({name: points}, page_styles([name]), f"step; last {points[-1][1]:.4g}",
                         name, share=False) for name, points in series.items() if points]
    placed = "".join(f'<g transform="translate({i % 2 * WIDTH} {i // 2 * HEIGHT})">{chart}</g>'
                     for i, chart in enumerate(charts))
    write_svg(path, placed, WIDTH * min(2, len(charts) or 1),
              HEIGHT * max(1, math.ceil(len(charts) / 2)))


def write_svg(path: str | Path, content: str, width: int, height: int) -> None:
    """Write charts as a picture of its own."""
    runs.write_text(path, f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" '
                          f'height="{height}"><style>svg {{ background: #fff; }}{SVG_STYLE}</style>'
                          f'{content}</svg>\n')


# -------------------------------------------------------------------------------- pictures as PNG

INK = (40, 40, 40)


def matrix_chart(path: str | Path, named: dict[str, np.ndarray], names: Sequence[str],
                 cell: int = 72) -> None:
    """Write square matrices (K, K) of values in [-1, 1] side by side; names: rows and columns."""
    from PIL import Image, ImageDraw  # comes with scikit-image
    left, top = 24 + 7 * max(map(len, names)), 56
    width, height = left + cell * len(names) + 24, top + cell * len(names) + 24
    canvas = Image.new("RGB", (width * len(named), height), "white")
    pen = ImageDraw.Draw(canvas)
    for number, (title, matrix) in enumerate(named.items()):
        x0 = number * width + left
        pen.text((x0, 10), title, INK)
        for i, name in enumerate(names):
            pen.text((x0 - 8, top + (i + 0.5) * cell), name, INK, anchor="rm")
            pen.text((x0 + (i + 0.5) * cell, top - 8), name[:cell // 6], INK, anchor="ms")
        for (i, j), value in np.ndenumerate(matrix):
            x, y, share = x0 + j * cell, top + i * cell, min(abs(value), 1.0)
            full = np.array((31, 90, 160) if value >= 0 else (170, 60, 20))
            shade = tuple(np.rint(255 + (full - 255) * share).astype(int).tolist())
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], shade)
            pen.text((x + cell / 2, y + cell / 2), f"{round(value, 2) + 0.0:.2f}",
                     "white" if share > 0.55 else INK, anchor="mm")
    with runs.replacing(path) as temporary:
        canvas.save(temporary, "PNG")


def mosaic(path: str | Path, rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str],
           column_names: Sequence[str], side: int = 160) -> None:
    """Write pictures (h, w, 3) uint8 in rows and columns, each fitted into side x side px."""
    from PIL import Image, ImageDraw
    left, top, step = 16 + 7 * max(map(len, row_names)), 24, side + 6
    canvas = Image.new("RGB", (left + step * len(column_names), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    for j, name in enumerate(column_names):
        pen.text((left + j * step + side / 2, 6), name[:side // 6], INK, anchor="mt")
    for i, (name, row) in enumerate(zip(row_names, rows)):
        pen.text((left - 8, top + i * step + side / 2), name, INK, anchor="rm")
        for j, pixels in enumerate(row):
            h, w = pixels.shape[:2]
            size = [max(1, round(side * length / max(h, w))) for length in (w, h)]
            fitted = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR)
            canvas.paste(fitted, (left + j * step, top + i * step))
    with runs.replacing(path) as temporary:
        canvas.save(temporary, "PNG")


def heat_colours(values: np.ndarray) -> np.ndarray:
    """Values (h, w) as colours (h, w, 3) uint8: black, red, yellow; the top hundredth is white."""
    low, high = values.min(), np.percentile(values, 99)
    share = (values - low) / ((high - low) or np.ptp(values) or 1)
    stops = np.stack([3 * share, 3 * share - 1, 3 * share - 2], -1)
    return (255 * stops.clip(0, 1)).astype(np.uint8)


# ------------------------------------------------------------------------------ tables, documents

def shown_value(value: Any, digits: int = 3) -> str:
    """A number for people, '-' where there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def chart_mean(values: Iterable[float]) -> float:
    """Mean of values that are not NaN."""
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


def print_report_table(rows: Sequence[dict], columns: Iterable[str]) -> None:
    columns = list(columns)
    cells = [columns, *([shown_value(row.get(name)) for name in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table in Markdown; its first `words` columns are text, the others numbers."""
    columns = list(columns)
    rule = ["---"] * words + ["--:"] * (len(columns) - words)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n"
                   for line in [columns, rule, *rows])


def text_between(path: Path, name: str) -> tuple[str, str]:
    """A document up to `<!-- begin NAME -->`, and from `<!-- end NAME -->` on."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else begin + end + "\n"
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path}: expected the lines {begin.strip()} and {end} where tables go")
    return before + begin, end + after


def put_report_between(path: Path, name: str, text: str) -> None:
    """Replace the text between these lines; a missing document is made."""
    before, after = text_between(path, name)
    runs.write_text(path, before + text + after)


# ------------------------------------------------------------------------------------ page as HTML

class Cell(NamedTuple):
    text: str
    small: str = ""                     # below it: an interval
    strong: bool = False                # the best of its column


def html_table(columns: Sequence[str], rows: Iterable[Sequence[Cell | str]], words: int = 1) -> str:
    """The first `words` columns are text and stand on the left, the others numbers."""
    def cell(tag: str, number: int, value: Cell | str) -> str:
        value = value if isinstance(value, Cell) else Cell(value)
        inner = f"<b>{escape(value.text)}</b>" if value.strong else escape(value.text)
        small = f"<small>{escape(value.small)}</small>" if value.small else ""
        return f'<{tag}{" class=word" if number < words else ""}>{inner}{small}</{tag}>'

    head = "".join(cell("th", i, name) for i, name in enumerate(columns))
    lines = ("".join(cell("td", i, value) for i, value in enumerate(row)) for row in rows)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
            "</table></div>")


def picture(pixels: np.ndarray, caption: str) -> str:
    """A figure that holds its PNG, in 256 colours (a third of the bytes); (h, w, 3) uint8."""
    from PIL import Image
    file = io.BytesIO()
    image = Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)
    image.save(file, "PNG", optimize=True)
    content, (h, w) = base64.b64encode(file.getvalue()).decode("ascii"), pixels.shape[:2]
    return (f'<figure><img width="{w}" height="{h}" alt="{escape(caption)}" '
            f'src="data:image/png;base64,{content}"><figcaption>{escape(caption)}</figcaption>'
            "</figure>")


def picture_strip(title: str, figures: Iterable[str]) -> str:
    return (f'<div class="strip"><h3>{escape(title)}</h3><div class="row">{"".join(figures)}</div>'
            "</div>")


def side_by_side(charts: Mapping[str, str]) -> str:
    """Charts by their titles."""
    blocks = (f"<div><h3>{escape(title)}</h3>{chart}</div>" for title, chart in charts.items())
    return f'<div class="charts">{"".join(blocks)}</div>'


def report_section(title: str, note: str, *blocks: str) -> str:
    head = f"<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>"
    return "\n".join(["<section>", head, *blocks, "</section>"])


def page(title: str, note: str, sections: Iterable[str], foot: str = "") -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{PAGE_STYLE}{SVG_STYLE}</style></head><body>
<header><h1>{escape(title)}</h1><p>{escape(note)}</p></header>
{chr(10).join(sections)}
<footer><p>{escape(foot)}</p></footer>
</body></html>
"""


SVG_STYLE = """
:root { --ink: #1d2530; --soft: #5b6675; --rule: #d9dee5; }
svg text { font: 12px system-ui, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
svg .label { fill: var(--ink); } .grid { stroke: var(--rule); } .axis { stroke: var(--ink); }
"""

PAGE_STYLE = """
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, Arial, sans-serif; color: var(--ink);
       background: #fff; max-width: 1180px; margin: 0 auto; padding: 32px 28px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 2px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 78ch; white-space: pre-line; }
section { border-top: 2px solid var(--ink); padding-top: 14px; margin-top: 40px; }
.wide { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; width: 100%; font-size: 14px;
        font-variant-numeric: tabular-nums; }
th { font-weight: 600; font-size: 12.5px; color: var(--soft); text-align: right;
     vertical-align: bottom; border-bottom: 1px solid var(--ink); padding: 4px 8px;
     white-space: nowrap; }
td { text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); padding: 6px 8px;
     white-space: nowrap; }
.word { text-align: left; min-width: 16ch; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; }
th:last-child, td:last-child { padding-right: 0; }
small { display: block; font-size: 10.5px; line-height: 1.35; color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 28px; }
.charts > div { flex: 1 1 400px; min-width: 0; }
svg { max-width: 100%; height: auto; } .charts svg { width: 100%; }
.legend { margin: 8px 0; color: var(--ink); max-width: none; }
.legend span { display: inline-block; margin-right: 22px; }
.legend svg { vertical-align: middle; }
.row { display: flex; flex-wrap: wrap; gap: 14px; align-items: flex-start; }
figure { margin: 0; flex: 1 1 240px; max-width: 360px; }
figure img { display: block; width: 100%; height: auto; }
figcaption { font-size: 12.5px; color: var(--soft); margin-top: 4px; }
footer { border-top: 1px solid var(--rule); margin-top: 48px; padding-top: 12px; font-size: 13px; }
@media print {
  body { padding: 0; max-width: none; font-size: 11pt; }
  .strip, .charts, .legend, tr { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""
