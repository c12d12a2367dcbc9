"""What was measured, to be read: tables, curves and pictures of models on sets, as a page and as Markdown.

    runs.write_text(path, page(title, sets, entries, found, results, models, made))        # HTML, one file
    brief, full = markdown(sets, entries, results, columns, made)                        # for documents

`results` is {name of set: {name of model: measure.Result}}, `entries` the rows: (model, its note). A model
without a result on a set is "not run" there. The ceiling is the row of the encoding: measure.encodings.
"""
from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

import measure
import report
from measure import CEILING, ENOUGH, READ, DataSet, Result, headline, intervals
from report import shown

RIGHT, WRONG = (0, 160, 255), (255, 130, 0)          # colours of outlines
BRIEF = ("AP@0.5", "AP@0.75", "AP@0.9")              # of the short table

Entries = Sequence[tuple[str, str]]                  # model, note
Results = dict[str, dict[str, Result]]               # set, model


def score_cell(result: Result | None, name: str, best: float | None = None) -> report.Cell:
    """A score with its interval, strong where it is the best."""
    if result is None:
        return report.Cell("-")
    value, between = headline(result.scores)[name], intervals(result.scores).get(name, ())
    return report.Cell(shown(value, 3), "–".join(shown(end, 3) for end in between), value == best)


def count(result: Result | None) -> str:
    return str(len(result.names)) if result else "not run"


def noted(name: str, *notes: str) -> str:
    said = "; ".join(filter(None, notes))
    return f"{name} ({said})" if said else name


# -------------------------------------------------------------------------------------------------- as a page

def page(title: str, sets: Sequence[DataSet], entries: Entries, found: dict[str, list], results: Results,
         models: int, made: str) -> str:
    """An overview, then each set with its table, curves, and pictures of the first `models` models."""
    looks = report.looks([name for name, _ in entries], CEILING)
    rows = [[report.Cell(place.name, place.note), str(len(found[place.name])),
             *(score_cell(results[place.name].get(name), "AP@0.5") for name, _ in entries)]
            for place in sets]
    table = report.table(["set", "images", *(name for name, _ in entries)], rows)
    sections = [report.section("AP@0.5", "Mean over the images of each set.", table)]
    for place in sets:
        there = results[place.name]
        first = [there[name] for name, _ in entries if name in there and name != CEILING][:models]
        strips = [report.strip(text, [report.picture(*panel) for panel in panels])
                  for text, panels in pictures(found[place.name], first)]
        sections.append(report.section(place.name, place.note, page_table(entries, there),
                                       charts(there, looks), *strips))
    note = ("AP, PQ and AJI are means over images; F1, SEG, DET and OP_CSB count the cells of all images "
            f"together. Small: 95 % bootstrap intervals over images, from {ENOUGH} images on. Bold: the best "
            "model. The ceiling is what true labels score that went through distance map and watershed.")
    return report.page(title, note, sections, made)


def page_table(entries: Entries, there: dict[str, Result]) -> str:
    rows, models = [], [headline(result.scores) for name, result in there.items() if name != CEILING]
    best = {name: max((model[name] for model in models), default=None) for name in READ}
    for name, note in entries:
        result = there.get(name)
        cells = (score_cell(result, score, None if name == CEILING else best[score]) for score in READ)
        about = "; ".join(filter(None, (note, result.note if result else "")))
        rows.append([report.Cell(name, about), count(result), *cells, shown(result and result.seconds, 1)])
    return report.table(["model", "images", *READ, "seconds"], rows)


def charts(there: dict[str, Result], looks: dict[str, report.Look]) -> str:
    import metrics
    curves = {model: [(t, result.scores.mean[f"AP@{t:g}"]) for t in metrics.THRESHOLDS]
              for model, result in there.items()}
    return report.legend({name: looks[name] for name in there}) + report.side_by_side(
        report.titled("AP over the threshold", report.chart(curves, looks, "IoU threshold", "mean AP")),
        report.titled("Cells found over their size", report.chart(
            found_by_size(there), looks, "equivalent diameter (px)", "share found at IoU 0.5", log=True)))


def found_by_size(there: dict[str, Result]) -> dict[str, list[tuple[float, float]]]:
    """Share of true cells found at IoU 0.5, in up to eight classes of size with equally many cells."""
    import metrics
    sizes = {model: np.concatenate([2 * np.sqrt(table.truth_areas / np.pi) for table in r.tables])
             for model, r in there.items()}                                  # px
    every = max(sizes.values(), key=len, default=np.empty(0))
    if not len(every):
        return {}
    edges = np.unique(np.quantile(every, np.linspace(0, 1, 1 + min(8, max(1, len(every) // 10)))))
    curves = {}
    for model, r in there.items():
        hit = np.concatenate([np.isin(t.truth_ids, metrics.match(t).pairs[:, 0]) for t in r.tables])
        group = np.searchsorted(edges[1:-1], sizes[model], side="right")
        curves[model] = [(float(np.median(sizes[model][group == k])), float(hit[group == k].mean()))
                         for k in np.unique(group)]
    return curves


# ---------------------------------------------------------------------------------------------- its pictures

def pictures(found: list, results: list[Result]) -> Iterator[tuple[str, list]]:
    """Title and panels of the first model's best, median and worst image: the truth, then what each finds."""
    import data
    import metrics
    if not results:
        return
    first = results[0]
    order = sorted(range(len(first.names)), key=lambda i: -first.scores.images[i]["DSB"])
    for i, which in {order[0]: "best", order[len(order) // 2]: "median", order[-1]: "worst"}.items():
        name = first.names[i]
        example = next(e for e in found if measure.plain(e.name) == name)
        pixels, truth = example.image().pixels, example.labels()
        part = worth_showing(truth)
        panels = [(outlined(pixels, truth, metrics.match(first.tables[i]).pairs[:, 0], part),
                   f"true cells: {len(first.tables[i].truth_ids)}; orange: missed by {first.model}")]
        for r in results:
            if name in r.names:
                at = r.names.index(name)
                labels, score = data.read_labels(r.folder / f"{name}_pred.tif"), r.scores.images[at]
                panels.append((outlined(pixels, labels, metrics.match(r.tables[at]).pairs[:, 1], part),
                               f"{r.model}: AP@0.5 {score['AP@0.5']:.2f}; {score['TP']} found, {score['FP']} "
                               f"false (orange), {score['FN']} missed"))
        H, W = truth.shape
        cut = f", {min(part.px, H)} × {min(part.px, W)} of {H} × {W} px" if part.px < max(H, W) else ""
        yield f"{which} of {first.model}: {name}{cut}", panels


class Part(NamedTuple):
    """Of an image, to be shown."""
    top: int
    left: int
    px: int                                 # its side
    step: int                               # its sides are divided by this
    thick: int                              # px, of outlines then


def worth_showing(truth: np.ndarray, side: int = 512, least: int = 14) -> Part:
    """The square with most cells in it: reduced while cells stay `least` px wide, then cut to `side` px."""
    areas = np.unique(truth[truth > 0], return_counts=True)[1]
    wide = 2 * math.sqrt(np.median(areas) / math.pi) if len(areas) else side
    step = max(1, min(-(-max(truth.shape) // side), int(wide / least)))
    px = side * step
    tops, lefts = ([*range(0, max(1, n - px), px // 4), max(0, n - px)] for n in truth.shape)

    def content(at: tuple[int, int]) -> int:
        return np.count_nonzero(truth[at[0]:at[0] + px, at[1]:at[1] + px])
    zoom = max(1, side // max(truth.shape))
    return Part(*max(product(tops, lefts), key=content), px, step, thick=1 if wide * zoom / step < 24 else 2)


def outlined(pixels: np.ndarray, labels: np.ndarray, right: np.ndarray, part: Part) -> np.ndarray:
    """(h, w, 3) uint8: a part of the image, cells in `right` outlined in blue, all others in orange."""
    import cells
    from PIL import Image
    top, left, px, step, thick = part
    rgb = cells.displayed(pixels)[top:top + px, left:left + px]
    ids, numbers = np.unique(np.append(0, labels[top:top + px, left:left + px]), return_inverse=True)
    numbers = numbers[1:].reshape(rgb.shape[:2]).astype(np.int32)            # 0..n without gaps
    small, numbers = cells.reduced(np.moveaxis(rgb, 2, 0), numbers, step)
    rgb, (h, w) = np.ascontiguousarray(np.moveaxis(small, 0, 2)), numbers.shape
    if (zoom := 512 // max(h, w)) > 1:
        rgb = np.asarray(Image.fromarray(rgb).resize((zoom * w, zoom * h), Image.BICUBIC))
        numbers = cells.enlarged(numbers, zoom)
    colours = np.where(np.isin(ids[1:], right)[:, None], RIGHT, WRONG).astype(np.uint8)
    return cells.drawn(rgb, numbers, colours, thick)


# ------------------------------------------------------------------------------------------------ as Markdown

def markdown(sets: Sequence[DataSet], entries: Entries, results: Results, columns: Sequence[str], made: str,
             compared: Sequence[dict] = ()) -> tuple[str, str]:
    """One short table of all sets; and that with a table of each set, below ENOUGH images also one by one.

    compared : rows of measure.differences, for a table of them behind the short one.
    """
    ran = [name for name, _ in entries if any(name in there for there in results.values())]
    rows = []
    for place in sets:
        there = [results[place.name].get(name) for name in ran]
        n = max((len(result.names) for result in there if result), default=0)
        rows.append((noted(place.name, place.note), str(n), *(short(result) for result in there)))
    brief = (f"{' / '.join(BRIEF).replace('/ AP@', '/ ')}, mean over the images of each set.\n\n"
             + report.markdown(("set", "images", *ran), rows))
    if missing := [name for name, _ in entries if name not in ran]:
        brief += f"\nNot run: {', '.join(missing)}.\n"
    parts = [made + "\n", brief, *([changes(compared)] if compared else [])]
    for place in sets:
        there = results[place.name]
        parts.append(f"**{place.name}**" + (f": {place.note}" if place.note else "") + "\n")
        rows = [(noted(name, note, there[name].note if name in there else ""), count(there.get(name)),
                 *(bracketed(score_cell(there.get(name), score)) for score in columns))
                for name, note in entries]
        parts.append(report.markdown(("model", "images", *columns), rows))
        if rows := [(image, result.model, *(shown(scores[score], 3) for score in columns))
                    for result in there.values() if len(result.names) < ENOUGH
                    for image, scores in zip(result.names, result.scores.images)]:
            rows.sort(key=lambda line: line[0])
            table = report.markdown(("image", "model", *columns), rows, words=2)
            parts.append(f"<details><summary>{place.name}, image by image</summary>\n\n{table}\n</details>\n")
    return brief, "\n".join(parts)


def changes(compared: Sequence[dict]) -> str:
    """A row for each set and model, a column for each that it was compared with."""
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in compared:
        if (row["score"], row["image"]) == (BRIEF[0], "mean") and row["difference"] is not None and row["model"] != CEILING:
            ends = f" [{row['low']:+.3f} to {row['high']:+.3f}]" if row["low"] is not None else ""
            cells.setdefault((row["set"], row["model"]), {})[row["against"]] = f"{row['difference']:+.3f}{ends}"
    firsts = list(dict.fromkeys(name for there in cells.values() for name in there))
    rows = [(*key, *(there.get(first, "-") for first in firsts)) for key, there in cells.items()]
    return (f"Difference in {BRIEF[0]}, image by image.\n\n"
            + report.markdown(("set", "model", *(f"against {first}" for first in firsts)), rows, words=2))


def short(result: Result | None) -> str:
    return " / ".join(shown(result.scores.mean[name], 3) for name in BRIEF) if result else "not run"


def bracketed(cell: report.Cell) -> str:
    return f"{cell.text} [{cell.small}]" if cell.small else cell.text
