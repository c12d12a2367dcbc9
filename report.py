"""Numbers to look at: curves, matrices, mosaics as PNG, tables as TSV and Markdown, a page of it all as HTML.

    report.curves("curves.png", {"loss": [(step, value), ...], "score": [...]})
    report.matrices("pairs.png", {"cosine": (K, K) array}, names)
    report.mosaic("maps.png", rows of (h, w, 3) uint8 pictures, row names, column names)

    looks = report.looks(["ceiling", "a", "b"], reference="ceiling")
    chart = report.chart({"a": [(0.5, 0.9), (0.75, 0.6)], ...}, looks, "IoU", "AP")          # inline SVG
    runs.write_text(path, report.page("Title", "what this is", [report.section("Set", "note", chart, ...)]))

The page is one file without a script. It holds every picture itself, and its own Content-Security-Policy
forbids it to fetch anything: what it shows today it shows in ten years, offline.
"""
from __future__ import annotations

import base64
import io
import math
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import runs

INK, GRID, LINE = (40, 40, 40), (225, 225, 225), (31, 119, 180)
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#8c6d1f", "#56a3d9", "#e69f00")
MARKERS = ("circle", "square", "triangle", "diamond")                 # lines differ in black and white too


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high, about `count` of them."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * min((1, 2, 5, 10), key=lambda m: abs(m * unit - rough))
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 3, 5, 10, 20, 30, 50 ... from low to high."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [m * 10.0**e for e in decades for m in (1, 2, 3, 5) if low <= m * 10.0**e <= high]


# --------------------------------------------------------------------------------------------------- as PNG

def curves(path: str | Path, series: dict[str, list[tuple[float, float]]], width: int = 560, height: int = 300
           ) -> None:
    """One small diagram per series, two in a row; without points it is left out. The file appears whole."""
    from PIL import Image, ImageDraw                          # comes with scikit-image
    drawn = {name: np.array(points, float) for name, points in series.items() if points}
    columns = min(2, len(drawn)) or 1
    page = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height or height), "white")
    pen = ImageDraw.Draw(page)
    for number, (name, points) in enumerate(drawn.items()):
        left, top = number % columns * width + 64, number // columns * height + 30
        right, bottom = left + width - 90, top + height - 70
        points = points[np.isfinite(points).all(1)]
        pen.text((left, top - 22), f"{name}   last {points[-1, 1]:.4g}" if len(points) else name, INK)
        if not len(points):
            continue
        (x0, y0), (x1, y1) = points.min(0), points.max(0)
        x1, y1 = x1 + (x1 == x0), y1 + (y1 == y0) * max(abs(y0), 1) * 0.1

        def place(x: float, y: float) -> tuple[float, float]:
            return (left + (x - x0) / (x1 - x0) * (right - left),
                    bottom - (y - y0) / (y1 - y0) * (bottom - top))
        for value in ticks(y0, y1):
            pen.line([(left, place(x0, value)[1]), (right, place(x0, value)[1])], GRID)
            pen.text((left - 6, place(x0, value)[1]), f"{value:.4g}", INK, anchor="rm")
        for value in ticks(x0, x1):
            pen.line([(place(value, y0)[0], top), (place(value, y0)[0], bottom)], GRID)
            pen.text((place(value, y0)[0], bottom + 6), f"{value:.6g}", INK, anchor="mt")
        pen.line([place(*p) for p in points], LINE, 2)
        for p in points if len(points) < 60 else ():
            x, y = place(*p)
            pen.ellipse([x - 2, y - 2, x + 2, y + 2], LINE)
    write_png(path, page)


def spread(path: str | Path, points: dict[str, list[tuple[float, float]]], x_name: str, y_name: str,
           width: int = 640, height: int = 420) -> None:
    """Values in [0, 1] over a logarithmic axis: a dot for each point, a line through the means at each x."""
    from PIL import Image, ImageDraw
    page = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(page)
    left, top, right, bottom = 64, 24, width - 24, height - 56
    low, high = (f(x for of in points.values() for x, _ in of) for f in (min, max))
    low, high = low / 1.2, high * 1.2

    def place(x: float, y: float) -> tuple[float, float]:
        return left + math.log(x / low) / math.log(high / low) * (right - left), bottom - y * (bottom - top)
    for value in ticks(0, 1):
        pen.line([place(low, value), place(high, value)], GRID)
        pen.text((left - 6, place(low, value)[1]), f"{value:.1f}", INK, anchor="rm")
    for value in sorted({x for of in points.values() for x, _ in of}):
        pen.text((place(value, 0)[0], bottom + 6), f"{value:g}", INK, anchor="mt")
    pen.text(((left + right) / 2, height - 18), x_name, INK, anchor="mm")
    pen.text((left, 8), y_name, INK, anchor="lt")
    for number, (name, of) in enumerate(points.items()):
        colour = COLOURS[number % len(COLOURS)]
        means = [(x, float(np.mean([y for at, y in of if at == x]))) for x in sorted({x for x, _ in of})]
        pen.line([place(*p) for p in means], colour, 2)
        for x, y in (place(*p) for p in of):
            pen.ellipse([x - 3, y - 3, x + 3, y + 3], outline=colour)
        pen.text((right - 8, bottom - 16 * (len(points) - number)), name, colour, anchor="rm")
    write_png(path, page)


def matrices(path: str | Path, named: dict[str, np.ndarray], names: Sequence[str], cell: int = 72) -> None:
    """Square matrices (K, K) with values in [-1, 1] side by side; names are those of rows and columns."""
    from PIL import Image, ImageDraw
    left, top = 24 + 7 * max(map(len, names)), 56
    width, height = left + cell * len(names) + 24, top + cell * len(names) + 24
    page = Image.new("RGB", (width * len(named), height), "white")
    pen = ImageDraw.Draw(page)
    for number, (title, matrix) in enumerate(named.items()):
        x0 = number * width + left
        pen.text((x0, 10), title, INK)
        for i, name in enumerate(names):
            pen.text((x0 - 8, top + (i + 0.5) * cell), name, INK, anchor="rm")
            pen.text((x0 + (i + 0.5) * cell, top - 8), name[:cell // 6], INK, anchor="ms")
        for (i, j), value in np.ndenumerate(matrix):
            x, y, share = x0 + j * cell, top + i * cell, min(abs(value), 1.0)
            far = (31, 90, 160) if value >= 0 else (170, 60, 20)
            shade = tuple(round(255 + (f - 255) * share) for f in far)
            pen.rectangle([x, y, x + cell - 2, y + cell - 2], shade)
            ink = "white" if share > 0.55 else INK
            pen.text((x + cell / 2, y + cell / 2), shown(round(value, 2) + 0.0, 2), ink, anchor="mm")
    write_png(path, page)


def mosaic(path: str | Path, rows: Sequence[Sequence[np.ndarray]], row_names: Sequence[str],
           column_names: Sequence[str], side: int = 160) -> None:
    """Pictures (h, w, 3) uint8 in rows and columns, each fitted into side x side px."""
    from PIL import Image, ImageDraw
    left, top, step = 16 + 7 * max(map(len, row_names)), 24, side + 6
    page = Image.new("RGB", (left + step * len(column_names), top + step * len(rows)), "white")
    pen = ImageDraw.Draw(page)
    for j, name in enumerate(column_names):
        pen.text((left + j * step + side / 2, 6), name[:side // 6], INK, anchor="mt")
    for i, (name, row) in enumerate(zip(row_names, rows)):
        pen.text((left - 8, top + i * step + side / 2), name, INK, anchor="rm")
        for j, picture in enumerate(row):
            h, w = picture.shape[:2]
            fit = (max(1, round(side * w / max(h, w))), max(1, round(side * h / max(h, w))))
            fitted = Image.fromarray(picture).resize(fit, Image.BILINEAR)
            page.paste(fitted, (left + j * step, top + i * step))
    write_png(path, page)


def heat(values: np.ndarray) -> np.ndarray:
    """(h, w) -> (h, w, 3) uint8: black, red, yellow, white; the highest hundredth is all white."""
    low, high = values.min(), np.percentile(values, 99)
    share = (values - low) / ((high - low) or np.ptp(values) or 1)
    return (255 * np.stack([3 * share, 3 * share - 1, 3 * share - 2], -1).clip(0, 1)).astype(np.uint8)


def write_png(path: str | Path, picture) -> None:
    """A PIL image as PNG; whole or not at all."""
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    picture.save(beside, "PNG")
    os.replace(beside, path)


# ---------------------------------------------------------------------------------------------- as Markdown

def markdown(columns: Iterable[str], rows: Iterable[Iterable[str]], words: int = 1) -> str:
    """A table; its first `words` columns are text, the others numbers."""
    columns = list(columns)
    rule = ["---"] * words + ["--:"] * (len(columns) - words)
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n"
                   for line in [columns, rule, *rows])


def between(path: Path, name: str) -> tuple[str, str]:
    """What a document has up to the line `<!-- begin NAME -->`, and from `<!-- end NAME -->` on."""
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    whole = path.read_text(encoding="utf-8") if path.exists() else begin + end + "\n"
    before, found, rest = whole.partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path}: expected the lines {begin.strip()} and {end} where tables belong")
    return before + begin, end + after


def put_between(path: Path, name: str, text: str) -> None:
    """Replace what the document has there; a new one is made of it."""
    before, after = between(path, name)
    runs.write_text(path, before + text + after)


# -------------------------------------------------------------------------------------- on the screen, as TSV

def shown(value: Any, digits: int = 4) -> str:
    """A number for people, '-' where there is none."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def write_tsv(path: Path, rows: list[dict], first: Iterable[str] = ()) -> None:
    """Rows with all columns that any of them has: `first`, then the others in the order they come up."""
    columns = list(dict.fromkeys((*first, *(name for line in rows for name in line))))
    cells = [columns, *([" ".join(shown(line.get(name)).split()) for name in columns] for line in rows)]
    runs.write_text(path, "".join("\t".join(line) + "\n" for line in cells))


def print_table(rows: list[dict], columns: Iterable[str]) -> None:
    columns = list(columns)
    cells = [columns, *([shown(line.get(name), 3) for name in columns] for line in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# -------------------------------------------------------------------------------------------- charts as SVG

class Look(NamedTuple):
    colour: str
    marker: str                 # one of MARKERS, or "" for a dashed line without


def looks(names: Iterable[str], reference: str | None = None) -> dict[str, Look]:
    """A colour and a marker for each name, the same in every chart; the reference is a grey dashed line."""
    found, number = {}, 0
    for name in names:
        if name == reference:
            found[name] = Look("#777777", "")
        else:
            found[name] = Look(COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)])
            number += 1
    return found


def mark(look: Look, x: float, y: float, r: float = 3.6) -> str:
    """Its marker, with the centre at x, y."""
    if look.marker == "circle":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"/>'
    corners = {"square": [(-1, -1), (1, -1), (1, 1), (-1, 1)], "": [],
               "triangle": [(0, -1.2), (1.15, 0.8), (-1.15, 0.8)],
               "diamond": [(0, -1.3), (1.3, 0), (0, 1.3), (-1.3, 0)]}[look.marker]
    points = " ".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners)
    return f'<polygon points="{points}"/>' if corners else ""


def chart(series: dict[str, list[tuple[float, float]]], looks: dict[str, Look], x_label: str, y_label: str,
          log: bool = False, width: int = 520, height: int = 320) -> str:
    """Lines over x with y from 0 to 1, as inline SVG; log: x on a logarithmic axis. NaN interrupts a line."""
    left, right, top, bottom = 52, width - 16, 14, height - 46
    xs = [x for points in series.values() for x, y in points if math.isfinite(y)] or [1.0]
    low, high = min(xs), max(xs)
    if low == high:
        low, high = low * 0.9, high * 1.1
    scale = math.log if log else float

    def across(x: float) -> float:
        return round(left + (scale(x) - scale(low)) / (scale(high) - scale(low)) * (right - left), 1)

    def up(y: float) -> float:
        return round(bottom - y * (bottom - top), 1)

    def text(x: float, y: float, anchor: str, content: str, more: str = "") -> str:
        return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{more}>{escape(content)}</text>'

    parts = []
    for y in ticks(0, 1):
        parts += [f'<line x1="{left}" x2="{right}" y1="{up(y)}" y2="{up(y)}" class="grid"/>',
                  text(left - 8, up(y) + 4, "end", f"{y:.1f}")]
    for x in (log_ticks(low, high) or [low, high]) if log else ticks(low, high):
        parts += [f'<line x1="{across(x)}" x2="{across(x)}" y1="{bottom}" y2="{bottom + 5}" class="axis"/>',
                  text(across(x), bottom + 18, "middle", f"{x:.3g}")]
    middle = (top + bottom) / 2
    parts += [f'<line x1="{left}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>',
              text((left + right) / 2, height - 8, "middle", x_label, ' class="label"'),
              text(14, middle, "middle", y_label, f' class="label" transform="rotate(-90 14 {middle})"')]
    for name, points in series.items():
        look, stretches = looks[name], [[]]
        for x, y in points:
            if math.isfinite(y):
                stretches[-1].append((x, y))
            elif stretches[-1]:
                stretches.append([])
        for stretch in stretches:
            line = " ".join(f"{across(x)},{up(y)}" for x, y in stretch)
            parts.append(f'<polyline points="{line}" {stroke(look)}/>' if len(stretch) > 1 else "")
            parts += [f'<g fill="{look.colour}"><title>{escape(name)}: {y:.3f} at {x:.3g}</title>'
                      f'{mark(look, across(x), up(y))}</g>' for x, y in stretch]
    return (f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(y_label)} over {escape(x_label)}">{"".join(parts)}</svg>')


def stroke(look: Look) -> str:
    dashed = "" if look.marker else ' stroke-dasharray="6 4"'
    return f'fill="none" stroke="{look.colour}" stroke-width="2" stroke-linejoin="round"{dashed}'


def legend(looks: dict[str, Look]) -> str:
    keys = [f'<span><svg width="30" height="12" aria-hidden="true"><path d="M1 6h28" {stroke(look)}/>'
            f'<g fill="{look.colour}">{mark(look, 15, 6)}</g></svg> {escape(name)}</span>'
            for name, look in looks.items()]
    return f'<p class="legend">{"".join(keys)}</p>'


# ---------------------------------------------------------------------------------------------- page as HTML

class Cell(NamedTuple):
    text: str
    small: str = ""             # below it: an interval
    strong: bool = False        # the best of its column


def table(columns: Sequence[str], rows: Iterable[Sequence[Cell | str]], words: int = 1) -> str:
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
    """(h, w, 3) uint8 as a figure that carries its own PNG: in 256 colours it takes a third of the bytes."""
    from PIL import Image
    file = io.BytesIO()
    Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    content, (h, w) = base64.b64encode(file.getvalue()).decode("ascii"), pixels.shape[:2]
    return (f'<figure><img width="{w}" height="{h}" alt="{escape(caption)}" '
            f'src="data:image/png;base64,{content}"><figcaption>{escape(caption)}</figcaption></figure>')


def strip(title: str, figures: Iterable[str]) -> str:
    """Pictures side by side under a line of text."""
    return f'<div class="strip"><h3>{escape(title)}</h3><div class="row">{"".join(figures)}</div></div>'


def side_by_side(*blocks: str) -> str:
    return f'<div class="charts">{"".join(f"<div>{block}</div>" for block in blocks)}</div>'


def titled(title: str, block: str) -> str:
    return f"<h3>{escape(title)}</h3>{block}"


def section(title: str, note: str, *blocks: str) -> str:
    head = f"<h2>{escape(title)}</h2>\n<p>{escape(note)}</p>"
    return "\n".join(["<section>", head, *blocks, "</section>"])


def page(title: str, note: str, sections: Iterable[str], foot: str = "") -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title><link rel="icon" href="data:,">
<style>{STYLE}</style></head><body>
<header><h1>{escape(title)}</h1><p>{escape(note)}</p></header>
{chr(10).join(sections)}
<footer><p>{escape(foot)}</p></footer>
</body></html>
"""


STYLE = """
:root { --ink: #1d2530; --soft: #5b6675; --rule: #d9dee5; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; color: var(--ink);
       background: #fff; max-width: 1180px; margin: 0 auto; padding: 32px 28px 60px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 20px; margin: 0 0 2px; }
h3 { font-size: 14px; margin: 18px 0 6px; }
p { margin: 0 0 12px; color: var(--soft); max-width: 78ch; white-space: pre-line; }
section { border-top: 2px solid var(--ink); padding-top: 14px; margin-top: 40px; }
.wide { overflow-x: auto; margin: 10px 0 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 14px; }
th { font-weight: 600; font-size: 12.5px; color: var(--soft); text-align: right; vertical-align: bottom;
     border-bottom: 1px solid var(--ink); padding: 4px 8px; white-space: nowrap; }
td { text-align: right; vertical-align: top; border-bottom: 1px solid var(--rule); padding: 6px 8px;
     white-space: nowrap; }
.word { text-align: left; min-width: 16ch; white-space: normal; }
th:first-child, td:first-child { padding-left: 0; } th:last-child, td:last-child { padding-right: 0; }
small { display: block; font-size: 10.5px; line-height: 1.35; color: var(--soft); }
.charts { display: flex; flex-wrap: wrap; gap: 28px; } .charts > div { flex: 1 1 400px; min-width: 0; }
svg { max-width: 100%; height: auto; } .charts svg { width: 100%; }
svg text { font: 12px system-ui, "Segoe UI", Roboto, Arial, sans-serif; fill: var(--soft); }
svg .label { fill: var(--ink); } .grid { stroke: var(--rule); } .axis { stroke: var(--ink); }
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
