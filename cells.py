"""Labels -> cell table, exact outlines, GeoJSON for QuPath, ROIs for ImageJ, a picture.

    columns = cell_table(labels, image, channels=["DNA"], pixel_size=0.65)        # one row per cell
    write_cell_table("NAME_cells.csv", columns)
    shapes = polygons(labels).items()
    writer = GeoWriter("NAME.geojson")                                            # open in QuPath
    writer.add(shapes, columns)
    writer.close()
    write_rois("NAME_rois.zip", shapes)                                           # open in ImageJ
    write_picture("NAME_overlay.png", overlay(image, labels))

Tables count as scikit-image does: the centre of the first pixel is (0, 0), boxes are half open.
GeoJSON and ROIs run along pixel edges: the corner of the first pixel is (0, 0), points are (x, y).
`origin` is the (y, x) of the first pixel in the whole image, for callers that go block by block.

Nearly every measurement is a sum over runs, the stretches of one cell in one row: a few dozen to a
cell instead of hundreds of pixels. n cells, R runs, sorted by cell, then row, then column.
"""
from __future__ import annotations

import colorsys
import csv
import functools
import json
import math
import os
import shutil
import struct
import tempfile
import uuid
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import maximum
from skimage.measure import label

from images import check_label_image
from runs import replacing

Polygons = list[list[np.ndarray]]        # [[outer ring, hole, ...], ...] of a cell; ring (K, 2) x y
Shapes = Iterable[tuple[int, Polygons]]  # with the id of each cell
Edges = tuple[bool, bool, bool, bool]    # whether top, left, bottom, right end the image

# Hues that stay apart from each other and from what is under them: light ones on dark images; on
# bright ones, H&E above all, none of the reds and violets of the stains.
ON_DARK = ("ffd93b", "35d7ff", "ff6ec7", "7dff5a", "ff9a3d", "9aa5ff", "ff6b62", "3dffc0")
ON_BRIGHT = ("ffeb00", "00dcff", "5aff1e", "1450ff", "ff8200", "00aa3c", "ff00aa", "00b4a0")
SMALL = 1000                     # px; smaller images are enlarged to about this
PAIRS = 1 << 20                  # of runs or boxes that are compared together
BAND = 1 << 20                   # bytes of a PNG that are deflated together, on one core


# --------------------------------------------------------------------------------------------- runs

class Runs(NamedTuple):
    ids: np.ndarray                      # (n,) labels, ascending
    cell: np.ndarray                     # (R,) index into ids
    y: np.ndarray                        # (R,)
    left: np.ndarray                     # (R,)
    right: np.ndarray                    # (R,) one past the last pixel
    first: np.ndarray                    # (n,) where each cell's runs begin


def row_runs(labels: np.ndarray) -> tuple[Runs, np.ndarray]:
    """Runs of a label image, and (H + 2, W + 2) int32 with cells 1..n in a frame of background."""
    check_label_image(labels, "cells", np.iinfo(np.int64).max)
    H, W = labels.shape
    starts = np.ones((H, W), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    start = np.flatnonzero(starts)
    length = np.diff(start, append=labels.size)
    ids, cell = np.unique(labels[starts], return_inverse=True)
    zero = int(len(ids) > 0 and ids[0] == 0)  # ids[:zero] is the background
    framed = np.zeros((H + 2, W + 2), np.int32)
    framed[1:-1, 1:-1] = np.repeat((cell + 1 - zero).astype(np.int32), length).reshape(H, W)
    order = np.argsort(cell, kind="stable")[np.count_nonzero(cell < zero):]
    start, length, cell = start[order], length[order], cell[order] - zero
    y, left = np.divmod(start, max(W, 1))
    first = np.flatnonzero(np.diff(cell, prepend=-1))
    return Runs(ids[zero:], cell, y, left, left + length, first), framed


def cell_index_pairs(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with low[i] <= j < high[i]."""
    count = np.maximum(high - low, 0)
    i = np.repeat(np.arange(len(low)), count)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(count) - count - low, count)


def cell_pairs_in_blocks(low: np.ndarray, high: np.ndarray
                         ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The same, about PAIRS at a time."""
    total, begin = np.append(0, np.cumsum(np.maximum(high - low, 0))), 0
    while begin < len(low):
        end = max(begin + 1, np.searchsorted(total, total[begin] + PAIRS, side="right") - 1)
        i, j = cell_index_pairs(low[begin:end], high[begin:end])
        yield i + begin, j
        begin = end


def cell_boxes(r: Runs) -> np.ndarray:
    """(4, n): top, left, bottom, right; half open."""
    return np.stack((np.minimum.reduceat(r.y, r.first), np.minimum.reduceat(r.left, r.first),
                     np.maximum.reduceat(r.y, r.first) + 1, np.maximum.reduceat(r.right, r.first)))


# --------------------------------------------------------------------------------------- neighbours

def cell_borders(framed: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Count border crossings in four directions (4, n); list touching pairs (T, 2).

    Cells are counted from 0; they touch if they share a pixel's edge or corner.
    """
    flat, S = framed.ravel(), framed.shape[1]
    entries, touching = [], []
    for step in (1, S, S + 1, S - 1):
        at = np.flatnonzero(flat[step:] != flat[:-step])
        a, b = flat[at], flat[at + step]
        entries.append(np.bincount(b, minlength=n + 1)[1:])
        both = (a > 0) & (b > 0)
        a, b = a[both].astype(np.int64), b[both]
        touching.append(np.minimum(a, b) * (n + 1) + np.maximum(a, b))
    pairs = np.unique(np.concatenate(touching))
    return np.stack(entries), np.stack(np.divmod(pairs, n + 1), 1) - 1


def near_cell_boxes(box: np.ndarray, distance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of cells whose boxes (4, n) come as near as `distance`, each once, in blocks."""
    order = np.argsort(box[0], kind="stable")  # by their tops
    top, left, bottom, right = box[:, order]
    end = np.searchsorted(top, bottom + distance, side="right")
    for a, b in cell_pairs_in_blocks(np.arange(1, len(top) + 1), end):
        gap_y = np.maximum(top[b] - bottom[a], 0)
        gap_x = np.maximum(left[b] - right[a], left[a] - right[b]).clip(0)
        near = gap_y ** 2 + gap_x ** 2 <= distance ** 2
        yield order[a[near]], order[b[near]]


def near_runs(r: Runs, a: np.ndarray, b: np.ndarray, distance: float) -> np.ndarray:
    """(P,) bool: runs of a[i] and b[i] come as near as `distance`."""
    near, size = np.zeros(len(a), bool), np.diff(r.first, append=len(r.cell))
    a, b = np.where(size[a] < size[b], (a, b), (b, a))  # look from the smaller cell
    pair, run = cell_index_pairs(r.first[a], r.first[a] + size[a])
    H, reach = r.y.max(initial=0) + 1, int(distance) + 1
    row, y = r.cell * H + r.y, r.y[run]  # row: ascending
    low = np.searchsorted(row, b[pair] * H + np.maximum(y - reach, 0))
    high = np.searchsorted(row, b[pair] * H + np.minimum(y + reach, H - 1), side="right")
    for i, other in cell_pairs_in_blocks(low, high):
        one = run[i]
        gap_y = np.maximum(np.abs(r.y[one] - r.y[other]) - 1, 0)
        gap_x = np.maximum(r.left[other] - r.right[one], r.left[one] - r.right[other]).clip(0)
        near[pair[i[gap_y ** 2 + gap_x ** 2 <= distance ** 2]]] = True
    return near


def near_cell_pairs(r: Runs, distance: float) -> np.ndarray:
    """Pairs of cells (P, 2), counted from 0, at most `distance` px apart, edge to edge.

    How far cells reach in 16 directions, and which corners do, settles most pairs.
    """
    n = len(r.ids)
    reach = np.empty((16, n))  # of each cell in each direction
    corner = np.empty((16, n, 2))  # of the cell that reaches so far
    for k in range(16):
        dy, dx = math.sin(k * math.pi / 8), math.cos(k * math.pi / 8)
        y, x = r.y + (dy > 0), r.right if dx > 0 else r.left
        reached = y * dy + x * dx
        reach[k] = np.maximum.reduceat(reached, r.first)
        there = np.flatnonzero(reached == reach[k][r.cell])
        corner[k, r.cell[there]] = np.stack((y[there], x[there]), 1)
    found = [np.empty((0, 2), np.int64)]
    for a, b in near_cell_boxes(cell_boxes(r), distance):
        at_least, at_most = np.full(len(a), -np.inf), np.full(len(a), np.inf)
        for k in range(16):
            back = (k + 8) % 16
            at_least = np.maximum(at_least, -reach[k, a] - reach[back, b])  # px, of parallel lines
            at_most = np.minimum(at_most, ((corner[k, a] - corner[back, b]) ** 2).sum(1))  # px²
        near = at_most <= distance ** 2
        unclear = np.flatnonzero(~near & (at_least <= distance + 1e-6))  # 1e-6: sines are rounded
        near[unclear] = near_runs(r, a[unclear], b[unclear], distance)
        found.append(np.stack((a[near], b[near]), 1))
    return np.concatenate(found)


# -------------------------------------------------------------------------------------------- table

def convex_area(r: Runs) -> np.ndarray:
    """Pixels (n,) whose centre lies in the convex hull of the midpoints of the cell's pixel edges.

    scikit-image's convex_image, counted without drawing. The left side of the hull and the mirrored
    right side are chains of (y, x) from top to bottom, 2n in all, without the points inside. The
    midpoints put a diamond of half a pixel around every centre, which moves a side of w columns
    over h rows outwards by max(1, |w| / h) / 2 in every row.
    """
    n, H = len(r.ids), r.y.max(initial=0) + 1
    begin = np.flatnonzero(np.diff(r.cell * H + r.y, prepend=-1))  # a cell's first run in each row
    end = np.append(begin[1:] - 1, len(r.cell) - 1)[:len(begin)]
    chain = np.concatenate((r.cell[begin], r.cell[begin] + n))
    y = np.tile(r.y[begin], 2)
    x = np.concatenate((r.left[begin], 1 - r.right[end]))
    while True:
        dy, dx = np.diff(y, append=y[-1:]), np.diff(x, append=x[-1:])
        on_hull = np.ones(len(y), bool)
        on_hull[1:-1] = (chain[2:] != chain[:-2]) | (dx[:-2] * dy[1:-1] < dx[1:-1] * dy[:-2])
        if on_hull.all():
            break
        chain, y, x = chain[on_hull], y[on_hull], x[on_hull]
    last = np.diff(chain, append=-1) != 0  # a chain's last point stands for itself
    h, w = np.where(last, 1, dy), np.where(last, 0, dx)
    side, row = cell_index_pairs(np.zeros_like(h), np.where(last, 1, h + 1))
    h, w, x, y, chain = h[side], w[side], x[side], y[side] + row, chain[side]
    outwards = np.maximum(h, np.where(row == 0, -w, np.where(row == h, w, np.abs(w))))
    leftmost = -((outwards - 2 * (x * h + row * w)) // (2 * h))  # rounded up
    begin = np.flatnonzero(np.diff(chain * H + y, prepend=-1))  # sides meet in a row
    leftmost = np.minimum.reduceat(leftmost, begin)
    return np.bincount(chain[begin] % n, 0.5 - leftmost, n)  # width = 1 - left - mirrored left


def cell_intensities(r: Runs, image: np.ndarray, channels: list[str] | None
                     ) -> dict[str, np.ndarray]:
    """Columns intensity_{mean,min,max,sd}_CHANNEL."""
    names = [str(c).strip() for c in channels or range(1, len(image) + 1)]
    if len(names) != len(image):
        raise ValueError(f"{len(names)} channel names, expected {len(image)} as in the image")
    if len(set(names)) < len(names):  # two channels of one name are two columns
        names = [f"{name}_{i}" for i, name in enumerate(names, 1)]
    row = r.y * image.shape[2]
    run, pixel = cell_index_pairs(row + r.left, row + r.right)  # sorted by cell
    begin = np.searchsorted(r.cell[run], np.arange(len(r.ids)))
    size = np.diff(begin, append=len(pixel))
    columns: dict[str, np.ndarray] = {}
    for name, channel in zip(names, image):
        values = channel.ravel()[pixel]
        low, high = np.minimum.reduceat(values, begin), np.maximum.reduceat(values, begin)
        values = values.astype(np.float64)
        mean = np.add.reduceat(values, begin) / size
        sd = np.sqrt(np.add.reduceat((values - np.repeat(mean, size)) ** 2, begin) / size)
        columns |= {f"intensity_{what}_{name}": value
                    for what, value in (("mean", mean), ("min", low), ("max", high), ("sd", sd))}
    return columns


def cell_table(labels: np.ndarray, image: np.ndarray | None = None, *,
               channels: list[str] | None = None, pixel_size: float | None = None,
               near: float | None = None, ids: np.ndarray | None = None,
               origin: tuple[int, int] = (0, 0), edges: Edges = (True, True, True, True)
               ) -> dict[str, np.ndarray]:
    """Measurements, one row per cell, ascending id; columns in the order of the file.

    labels : (H, W) integers, 0 is background; ids may have gaps.
    image : (C, H, W); mean, min, max and sd (of the population) are in its own units.
    channels : C names for the columns; 1, 2, ... without.
    pixel_size : µm per px; adds lengths and areas in µm.
    near : px, for neighbours_near; by default the median equivalent diameter of the cells in
        `labels`. Give a number where images or blocks are compared.
    ids : rows wanted; the other cells still count as neighbours.
    origin : added to centroids and boxes.
    edges : sides of `labels` that are sides of the image, for touches_border.

    Area, centroid, box, axes, eccentricity, orientation_rad (of the major axis against a column, in
    [-pi/2, pi/2], counter-clockwise), extent, solidity, equivalent diameter are those of
    skimage.measure.regionprops.
    perimeter_px: Crofton's formula with four directions, as skimage.measure.perimeter_crofton:
    right for discs, for long straight sides from -5 % (rows, columns, diagonals) to +3 %.
    circularity: 4 pi area / perimeter², 1 for a disc; cells below some 30 px can exceed 1.
    neighbours_touching: cells that share a pixel's edge or corner; neighbours_near: cells whose
    outline comes as near as near_px to this one's, those that touch included.
    """
    r, framed = row_runs(labels)
    n = len(r.ids)
    if image is not None and (image.ndim != 3 or image.shape[1:] != labels.shape):
        raise ValueError(f"image {image.shape}, labels {labels.shape}: expected (C, H, W), (H, W)")
    if near is not None and not 0 <= near < math.inf:
        raise ValueError(f"near={near}: expected a distance in px, 0 or more")
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size={pixel_size}: expected micrometres per pixel, more than 0")
    row = np.arange(n)
    if ids is not None:
        if len(missing := np.setdiff1d(ids, r.ids)):
            raise ValueError(f"ids: {missing[0]} is not in the labels; expected ids of cells")
        row = np.searchsorted(r.ids, np.unique(ids))

    def total(values: np.ndarray) -> np.ndarray:  # (R,) -> (n,)
        return np.bincount(r.cell, values, n)

    top, left, bottom, right = cell_boxes(r)
    y, a, b = r.y - top[r.cell], r.left - left[r.cell], r.right - left[r.cell]  # in its box
    area = total(b - a)
    sum_x = (b * (b - 1) - a * (a - 1)) / 2  # over a run
    sum_xx = (b * (b - 1) * (2 * b - 1) - a * (a - 1) * (2 * a - 1)) / 6
    mean_y, mean_x = total(y * (b - a)) / area, total(sum_x) / area
    yy = total(y * y * (b - a)) / area - mean_y ** 2
    xy = total(y * sum_x) / area - mean_y * mean_x
    xx = total(sum_xx) / area - mean_x ** 2
    half, swing = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    long, short = half + swing, np.maximum(half - swing, 0)  # variances along the axes
    entries, touching = cell_borders(framed, n)
    perimeter = np.pi / 4 * (np.array([1, 1, 0.5 ** 0.5, 0.5 ** 0.5]) @ entries)
    diameter = np.sqrt(4 / np.pi * area)
    near = float(near if near is not None else np.median(diameter) if n else 0)
    columns = {
        "id": r.ids,
        "area_px": area.astype(np.int64),
        "perimeter_px": perimeter,
        "centroid_y_px": top + mean_y + origin[0],
        "centroid_x_px": left + mean_x + origin[1],
        "bbox_top_px": top + origin[0], "bbox_left_px": left + origin[1],
        "bbox_bottom_px": bottom + origin[0], "bbox_right_px": right + origin[1],
        "major_axis_px": 4 * np.sqrt(long), "minor_axis_px": 4 * np.sqrt(short),
        "eccentricity": np.sqrt(1 - short / np.where(long > 0, long, 1)) * (long > 0),
        "orientation_rad": np.arctan2(2 * xy, yy - xx) / 2,
        "solidity": area / convex_area(r),
        "extent": area / ((bottom - top) * (right - left)),
        "circularity": 4 * np.pi * area / perimeter ** 2,
        "equivalent_diameter_px": diameter,
    }
    if pixel_size is not None:
        columns["area_um2"] = area * pixel_size ** 2
        for name in ("perimeter", "centroid_y", "centroid_x", "major_axis", "minor_axis",
                     "equivalent_diameter"):
            columns[f"{name}_um"] = columns[f"{name}_px"] * pixel_size
    if image is not None:
        columns |= cell_intensities(r, image, channels)
    columns["neighbours_touching"] = np.bincount(touching.ravel(), minlength=n)
    columns["neighbours_near"] = np.bincount(near_cell_pairs(r, near).ravel(), minlength=n)
    columns["near_px"] = np.full(n, near)
    sides = np.stack((top == 0, left == 0, bottom == labels.shape[0], right == labels.shape[1]))
    columns["touches_border"] = sides[np.array(edges, bool)].any(0)
    return {name: values[row] for name, values in columns.items()}


class Nesting:
    """Which small cells lie in which large ones, such as nuclei in cells; fed piece by piece."""

    def __init__(self) -> None:
        self.pairs: Counter[tuple[int, int]] = Counter()  # (small, large) -> px; 0: background

    def add(self, small: np.ndarray, large: np.ndarray) -> None:
        """Count a piece of two label images of the same pixels."""
        keys, px = np.unique(small.astype(np.int64) << 32 | large.astype(np.int64),
                             return_counts=True)
        for key, count in zip(keys.tolist(), px.tolist()):
            self.pairs[key >> 32, key & 0xFFFFFFFF] += count

    def tables(self) -> tuple[dict[int, int], dict[str, np.ndarray]]:
        """The large cell {small: large} that has most pixels of a small one, 0 where that is the
        background; and columns of the large ones: id, area, number of the small, their area, the
        share of the large one that they take, their ids."""
        most: dict[int, int] = {}
        owner: dict[int, int] = {}
        area: Counter[int] = Counter()
        small_area: Counter[int] = Counter()
        for (small, large), px in sorted(self.pairs.items()):
            area[large] += px
            small_area[small] += px
            if small and px > most.get(small, 0):
                most[small], owner[small] = px, large
        ids = sorted(area.keys() - {0})
        held: dict[int, list[int]] = {large: [] for large in (0, *ids)}
        for small, large in owner.items():
            held[large].append(small)
        inside = np.array([sum(small_area[small] for small in held[large]) for large in ids],
                          np.int64)
        whole = np.array([area[large] for large in ids], np.int64)
        # a nucleus may reach out of its cell
        shared = np.array([sum(most[small] for small in held[large]) for large in ids], np.int64)
        return owner, {
            "id": np.array(ids, np.int64), "area_px": whole,
            "nuclei": np.array([len(held[large]) for large in ids], np.int64),
            "nuclei_area_px": inside, "nuclei_share": shared / np.maximum(whole, 1),
            "nuclei_ids": np.array([" ".join(map(str, held[large])) for large in ids], str)}


def cell_map_features(labels: np.ndarray, distance: np.ndarray, diameter: float,
                      ids: np.ndarray) -> dict[str, np.ndarray]:
    """What a distance map (H, W) says of cells: how likely each is right depends on it.

    diameter : px, of a typical cell; ids : of the cells wanted, in the labels (H, W).
    summit, mean, spread : highest, mean and standard deviation of the map in the cell; valley : the
    highest where it touches another cell, 0 where none; touching : share of its rim that does;
    slope : mean gradient along the rim; size : logarithm of its area over a typical one's;
    raggedness : logarithm of rim² / area.
    """
    n = int(labels.max(initial=0)) + 1
    flat, area = labels.ravel(), np.bincount(labels.ravel(), minlength=n)[ids]

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(flat, values.ravel(), n)[ids]

    def highest(values: np.ndarray) -> np.ndarray:
        return maximum(values, labels, ids) if len(ids) else np.zeros(0)

    rim, touching = outlines(labels), outlines(labels, between=True)
    length = np.maximum(total(rim), 1)
    mean = total(distance) / area
    spread = np.sqrt(np.maximum(total(distance.astype(np.float64) ** 2) / area - mean ** 2, 0))
    dy, dx = np.gradient(distance) if min(distance.shape) > 1 else np.zeros((2, *distance.shape))
    return {"summit": highest(distance), "mean": mean, "spread": spread,
            "valley": highest(np.where(touching, distance, 0)),
            "touching": total(touching) / length,
            "slope": total(np.hypot(dy, dx) * rim) / length,
            "size": np.log(area / (math.pi / 4 * diameter ** 2)),
            "raggedness": np.log(length ** 2 / area)}


def cell_probability(features: dict[str, np.ndarray], score: dict[str, float]) -> np.ndarray:
    """Probability that a cell overlaps a true one by half (IoU >= .5): logistic in the features.

    score : the weight of each feature, and "constant"; fitted by `evaluate.py calibrate`.
    """
    sums = score["constant"] + sum(weight * features[name] for name, weight in score.items()
                                   if name != "constant")
    return 1 / (1 + np.exp(-sums))


def write_cell_table(path: str | Path, columns: dict[str, np.ndarray]) -> None:
    """Write columns of equal length as CSV: flags as 0 and 1, floats with 7 digits."""
    texts = []
    for values in map(np.asarray, columns.values()):
        values = values.astype(int) if values.dtype.kind == "b" else values
        texts.append([f"{value:.7g}" if isinstance(value, float) else value
                      for value in values.tolist()])
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*texts, strict=True))


# ----------------------------------------------------------------------------------------- polygons

def polygons(labels: np.ndarray, origin: tuple[int, int] = (0, 0)) -> dict[int, Polygons]:
    """Exact outlines along pixel edges by ascending id: {id: [[outer ring, hole, ...], ...]}.

    A ring is (K, 2) int64, x y, corners only, first point = last point; outer rings turn clockwise
    on the screen, holes the other way. Parts that share only a pixel's corner are two polygons. No
    ring meets itself, as GEOS and JTS demand.
    """
    piece = label(labels, connectivity=1)  # (H, W) 4-connected parts, 1..P
    H, W = piece.shape
    S = W + 2
    flat = np.pad(piece, 1).ravel()
    rim = np.zeros(len(flat), bool)
    for step in (1, S, S + 1, S - 1):
        change = flat[step:] != flat[:-step]
        rim[step:] |= change
        rim[:-step] |= change
    p = np.flatnonzero(rim & (flat > 0))
    part, y, x = flat[p], p // S - 1, p % S - 1
    same = {step: flat[p + step] == part for step in (-1, 1, -S, S, -S - 1, -S + 1, S - 1, S + 1)}
    places, signs = [], []  # every corner belongs to one pixel
    for sy, sx in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        places.append(np.flatnonzero(~same[sy * S] & ~same[sx]))  # convex
        places.append(np.flatnonzero(same[sy * S] & same[sx] & ~same[sy * S + sx]))  # concave
        signs += [(sy, sx, 1), (sy, sx, -1)]
    at = np.concatenate(places)
    sy, sx, turn = np.repeat(signs, list(map(len, places)), axis=0).T
    part, ids = part[at].astype(np.int64), labels[y[at], x[at]]
    y, x = y[at] + (sy > 0), x[at] + (sx > 0)

    # Corners in a row pair up to horizontal sides, corners in a column to vertical ones. Of two
    # corners in one place the one whose side lies to the left, or above, comes first.
    row = (part * (H + 1) + y) * (W + 1) + x
    along = contour_partners(row * 2 + (sx * turn < 0))
    down = contour_partners(((part * (W + 1) + x) * (H + 1) + y) * 2 + (sy * turn < 0))
    onward = np.where(sy * sx * turn > 0, along, down)  # clockwise: the cell is on the right
    ring, _ = contour_cycles(onward)
    order = np.argsort(row, kind="stable")
    twice = np.flatnonzero((np.diff(row[order]) == 0) & (np.diff(ring[order]) == 0))
    a, b = order[twice], order[twice + 1]  # a ring that meets itself becomes two
    onward[a], onward[b] = onward[b], onward[a]

    ring, order = contour_cycles(onward)
    begin = np.flatnonzero(np.diff(ring[order], prepend=-1))
    area = np.add.reduceat(((x[onward] - x) * (y[onward] + y))[order], begin)  # < 0: an outer ring
    rings = np.split(np.stack((x + origin[1], y + origin[0]), 1)[order], begin[1:])
    first = order[begin]
    found: dict[int, Polygons] = {}
    for k in np.lexsort((area, part[first], ids[first])):  # holes right after their outer ring
        parts = found.setdefault(int(ids[first[k]]), [])
        if area[k] < 0:
            parts.append([])
        parts[-1].append(np.concatenate((rings[k], rings[k][:1])))
    return found


def contour_partners(key: np.ndarray) -> np.ndarray:
    """Partner of each element: by key the first has the second, the third the fourth ..."""
    order = np.argsort(key, kind="stable")
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def contour_cycles(onward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cycles of a permutation: each element's, by its least member; an order that walks them."""
    themselves = np.arange(len(onward))
    cycle, jump = themselves, onward
    while True:  # pointer doubling
        least = np.minimum(cycle, cycle[jump])
        if np.array_equal(least, cycle):
            break
        cycle, jump = least, jump[jump]
    steps = (cycle != themselves).astype(np.int64)  # from each element to the least
    jump = np.where(steps > 0, onward, themselves)
    while not np.array_equal(jump, cycle):
        steps, jump = steps + steps[jump], jump[jump]
    return cycle, np.lexsort((-steps, cycle))


def cell_type_colours(names: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """A colour (red, green, blue) for each type, the same in overlay and GeoJSON."""
    return {name: tuple(bytes.fromhex(colour)) for name, colour in zip(names, cycle(ON_BRIGHT))}


class GeoWriter:
    """A GeoJSON FeatureCollection that QuPath opens: one detection per cell, in px, y down; written
    while its cells come: add(), close().

    QuPath takes UUIDs only as ids, so the cell's number is the detection's name.
    names : of all types, in the order of their colours; scale : px of the slide at full size for
    each of the cells', down and across; plane : z and t from 0, of a stack.
    """

    def __init__(self, path: str | Path, names: Sequence[str] = (),
                 scale: tuple[float, float] = (1.0, 1.0), plane: tuple[int, int] | None = None):
        self.path, self.count, self.colours = Path(path), 0, cell_type_colours(names)
        self.scale, self.plane = np.array(scale[::-1]), plane      # x, y
        self.spool = tempfile.TemporaryFile(  # noqa: SIM115  # until close()
            "w+", encoding="utf-8", dir=self.path.parent)

    def add(self, shapes: Shapes, columns: dict[str, np.ndarray]) -> None:
        """Take cells and columns of cell_table(): finite numbers become QuPath's measurements,
        `type` its class."""
        values = zip(*(column.tolist() for column in columns.values()))
        rows = {row["id"]: row for row in (dict(zip(columns, value)) for value in values)}
        for identity, parts in shapes:
            coordinates = [[(ring if (self.scale == 1).all() else ring * self.scale).tolist()
                            for ring in part] for part in parts]
            several, row = len(parts) > 1, rows.get(identity, {})
            feature: dict[str, Any] = {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{self.path.name}/{identity}")),
                "geometry": {"type": "MultiPolygon" if several else "Polygon",
                             "coordinates": coordinates if several else coordinates[0]},
                "properties": {"objectType": "detection", "name": str(identity), "measurements": {
                    name: float(f"{value:.7g}") for name, value in row.items()
                    if name not in ("id", "type") and math.isfinite(value)}},
            }
            if self.plane is not None:
                feature["geometry"]["plane"] = {"c": -1, **dict(zip("zt", self.plane))}
            if "type" in row:
                feature["properties"]["classification"] = {
                    "name": row["type"], "color": self.colours[row["type"]]}
            text = json.dumps(feature, separators=(",", ":"))
            self.spool.write((",\n" if self.count else "\n") + text)
            self.count += 1

    def close(self) -> None:
        """Write the file."""
        self.spool.seek(0)
        with self.spool, replacing(self.path) as temporary, open(temporary, "w",
                                                                 encoding="utf-8") as file:
            file.write('{"type":"FeatureCollection","features":[')
            shutil.copyfileobj(self.spool, file)
            file.write("\n]}\n")


def write_rois(path: str | Path, shapes: Shapes) -> None:
    """Write a zip of ImageJ ROIs, one per cell, named by its id (0001, 0002, ...)."""
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for identity, parts in shapes:
            name = f"{identity:04d}"
            archive.writestr(zipfile.ZipInfo(f"{name}.roi"), imagej_roi(name, parts))


def imagej_roi(name: str, parts: Polygons) -> bytes:
    """One ImageJ ROI, big-endian as in ij.io.RoiDecoder.

    A cell of one ring is a traced ROI, whose coordinates have 16 bit. With holes, several parts, or
    beyond pixel 32,767 it is a composite ROI: a path in float32, exact up to 16 million.
    """
    rings = [ring[:-1] for part in parts for ring in part]  # ImageJ closes them itself
    points = np.concatenate(rings)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    inside = min(left, top) >= 0 and max(right, bottom) < 2 ** 15 and len(points) < 2 ** 16
    if len(rings) == 1 and inside:
        kind, count, floats = 8, len(points), 0
        path = (points - (left, top)).T.astype(">i2")  # all x, then all y
    else:  # 0 x y: move, 1 x y: line, 4: close
        moves = [np.insert(ring, 0, np.arange(len(ring)) > 0, axis=1).ravel() for ring in rings]
        path = np.concatenate([np.append(move, 4) for move in moves]).astype(">f4")
        kind, count, floats = 1, 0, len(path)
    box = np.clip((top, left, bottom, right), -2 ** 15, 2 ** 15 - 1)  # composites: from their path
    end = 64 + path.nbytes
    header = struct.pack(">4shBx4hH16xHi20xi", b"Iout", 227, kind, *box, count, 0, floats, end)
    header2 = struct.pack(">16x2i40x", end + 64, len(name))  # where the name is
    return header + path.tobytes() + header2 + name.encode("utf-16-be")


# ----------------------------------------------------------------------------------------- pictures

def overlay(image: np.ndarray, labels: np.ndarray, max_side: int = 4096,
            types: dict[int, str] | None = None, names: Sequence[str] = ()) -> np.ndarray:
    """The image (C, H, W) with outlined cells, (h, w, 3) uint8, for a screen or a paper.

    Bright 8-bit RGB stays as it is; otherwise each channel is stretched between its percentiles 1
    and 99.8: one is gray, two are green and magenta, more have other hues. Images larger than
    max_side px are reduced by a whole number; those of 1000 px and less are enlarged, up to 8
    times, with smooth lines. A line runs inside its cell, with a thin shadow outside. Cells near
    each other differ in colour.

    types : the type of each cell, by its id; cells then have the colours of `names`, with a legend.
    """
    check_label_image(labels, "overlay", np.iinfo(np.int64).max)
    image, labels = reduced_overlay(image, labels, -(-max(image.shape[1:]) // max_side))
    highest = int(labels.max(initial=0))
    if highest > labels.size:  # ids with wide gaps
        ids = np.unique(labels[labels > 0])
        labels = np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0)
    else:
        ids = np.arange(1, highest + 1)
    rgb, count = overlay_background(image), len(ids)
    hexes = ON_BRIGHT if np.median(rgb[::4, ::4]) >= 128 else ON_DARK
    rim = max(int(np.count_nonzero(outlines(labels))), 1)
    radius = 2 * np.count_nonzero(labels) / rim  # px, about that of a round cell
    colours = np.array([list(bytes.fromhex(colour)) for colour in hexes], np.uint8)
    if types is None:
        pairs = close_cell_pairs(labels, max(round(radius / 2), 2))
        colours = colours[colour_numbers(pairs, count, len(hexes))]  # (n, 3)
    else:
        known = {i: cell_type_colours(names)[name] for i, name in types.items()}
        colours = np.array([known.get(i, (0, 0, 0)) for i in ids.tolist()],  # (n, 3); 0: no cell
                           np.uint8).reshape(-1, 3)
    side = int(max(labels.shape))
    zoom = 1 if side > SMALL else min(2 * round(SMALL / side), 16)
    if zoom > 1:  # labels twice as fine as the picture
        H, W = labels.shape
        size = zoom * W // 2, zoom * H // 2
        rgb = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
        labels = enlarged_outlines(labels, zoom)
    thick = max(1, min(round(zoom * side / 600), round(zoom * radius / 6)))
    picture = draw_outlines(rgb, labels, colours, thick)
    return picture if types is None else overlay_with_legend(picture, cell_type_colours(names))


def overlay_with_legend(rgb: np.ndarray, colours: dict[str, tuple[int, ...]]) -> np.ndarray:
    """The picture, and below it names in their colours."""
    height = max(12, rgb.shape[0] // 40)
    strip = Image.new("RGB", (rgb.shape[1], math.ceil((1.5 * len(colours) + 0.5) * height)))
    pen, font = ImageDraw.Draw(strip), ImageFont.load_default(height)
    for i, (name, colour) in enumerate(colours.items()):
        pen.text((height / 2, (1.5 * i + 0.25) * height), name, colour, font)
    return np.concatenate((rgb, np.asarray(strip)))


def reduced_overlay(image: np.ndarray, labels: np.ndarray, step: int
                    ) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels at 1 / step of their size, rounded up: area means and nearest pixels."""
    if step == 1:
        return image, labels
    H, W = labels.shape
    h, w = -(-H // step), -(-W // step)
    small = np.stack([np.pad(channel, ((0, h * step - H), (0, w * step - W)), mode="edge")
                      .reshape(h, step, w, step).mean((1, 3)) for channel in image])
    y, x = (np.minimum(np.arange(n) * step + step // 2, size - 1) for n, size in ((h, H), (w, W)))
    small = small.round().astype(image.dtype) if image.dtype.kind in "iu" else small
    return small, labels[np.ix_(y, x)]


def overlay_background(image: np.ndarray) -> np.ndarray:
    """(C, H, W) of any type -> (H, W, 3) uint8 to look at."""
    C, H, W = image.shape
    thin = image[:, ::-(-H // 512), ::-(-W // 512)]  # enough for percentiles
    if C == 3 and image.dtype == np.uint8 and np.median(thin) >= 85:
        return np.ascontiguousarray(np.moveaxis(image, 0, -1))
    spread = [colorsys.hsv_to_rgb(c / C, 1, 1) for c in range(C)]
    hues = {1: [(1, 1, 1)], 2: [(0, 1, 0), (1, 0, 1)]}.get(C, spread)
    rgb = np.zeros((H, W, 3), np.uint8)
    for channel, sample, hue in zip(image, thin, hues):
        low, high = np.percentile(sample, (1, 99.8))
        high = high if high > low else max(float(channel.max()), low + 1)  # spots on nothing
        value = np.subtract(channel, low, dtype=np.float32, casting="unsafe")
        value *= 255 / (high - low)
        value += 0.5
        value = value.clip(0, 255, out=value).astype(np.uint8)
        for k, share in enumerate(hue):
            if share:
                part = value if share == 1 else (value * np.float32(share)).astype(np.uint8)
                rgb[..., k] = part if C == 1 else np.maximum(rgb[..., k], part)
    return rgb


def close_cell_pairs(labels: np.ndarray, reach: int) -> np.ndarray:
    """Pairs of cells (P, 2), counted from 0, that touch or roughly come within `reach` px."""
    step = max(1, reach // 2)
    thin, count, found = labels[::step, ::step], int(labels.max(initial=0)), []
    around = (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0)
    for view, steps in ((labels, ((0, 1), (1, 0))), (thin, around)):
        (h, w), cell = view.shape, view > 0
        for dy, dx in steps:
            here = slice(0, h - dy), slice(max(-dx, 0), w - max(dx, 0))
            there = slice(dy, h), slice(max(dx, 0), w + min(dx, 0))
            both = (view[here] != view[there]) & cell[here] & cell[there]
            found.append((view[here][both].astype(np.int64) - 1) * count + view[there][both] - 1)
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(count, 1)), 1)


def colour_numbers(pairs: np.ndarray, n: int, colours: int) -> np.ndarray:
    """A colour (n,) for each cell, other than its neighbours' as far as colours suffice."""
    rng = np.random.default_rng(0)
    chosen = np.arange(n) % colours
    a, b = pairs.T
    for _ in range(50):
        clash = chosen[a] == chosen[b]
        if not clash.any():
            break
        beside = np.concatenate((a * colours + chosen[b], b * colours + chosen[a]))
        taken = np.bincount(beside, minlength=n * colours).reshape(n, colours)
        again = np.unique(b[clash])
        chosen[again] = (taken[again] + rng.random((len(again), colours))).argmin(1)
    return chosen


def outlines(labels: np.ndarray, between: bool = False) -> np.ndarray:
    """(H, W) bool: pixels of a cell that share an edge with another label, or with another cell."""
    rim, cell = np.zeros(labels.shape, bool), labels > 0
    for a, b in ((np.s_[1:], np.s_[:-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        meet = labels[a] != labels[b]
        if between:
            meet &= cell[a] & cell[b]
        rim[a] |= meet
        rim[b] |= meet
    return rim & cell


def grown_outlines(mask: np.ndarray, radius: float) -> np.ndarray:
    """(H, W) bool: pixels within `radius` px of the mask, by a disc row by row."""
    disc, row = np.zeros_like(mask), mask.copy()
    H = len(mask)
    for dx in range(int(radius) + 1):
        if dx:
            row[:, dx:] |= mask[:, :-dx]
            row[:, :-dx] |= mask[:, dx:]
        for dy in range(min(int(radius) + 1, H)):
            if int(math.sqrt(radius ** 2 - dy ** 2)) == dx:
                disc[dy:] |= row[:H - dy]
                disc[:H - dy] |= row[dy:]
    return disc


def draw_outlines(rgb: np.ndarray, labels: np.ndarray, colours: np.ndarray, thick: int
                  ) -> np.ndarray:
    """Copy of rgb (H, W, 3) with a line `thick` px wide inside each cell 1..n and a shadow.

    labels : (H, W), or k times finer for smooth lines; thick is in their px.
    """
    H, W, _ = rgb.shape
    k = len(labels) // H
    rim, cell = outlines(labels), labels > 0
    line = grown_outlines(rim, thick - 0.5) & cell
    dark = grown_outlines(rim, (thick + 1) // 2 + 0.5) & ~cell
    marked, fine = line | dark, [np.s_[i::k, j::k] for i in range(k) for j in range(k)]
    touched = np.flatnonzero(functools.reduce(np.logical_or, [marked[part] for part in fine]))
    picture = rgb.copy()
    pixels = picture.reshape(-1, 3)
    old, new = pixels.take(touched, 0), np.zeros((len(touched), 3), np.uint16)
    for part in fine:
        colour = old >> dark[part].ravel().take(touched)[:, None]
        on = np.flatnonzero(line[part].ravel().take(touched))
        colour[on] = colours.take(labels[part].ravel().take(touched[on]) - 1, 0)
        new += colour
    pixels[touched] = new // (k * k)
    return picture


def enlarged_outlines(labels: np.ndarray, zoom: int) -> np.ndarray:
    """Labels zoom times as large, with smooth borders.

    Every new pixel takes the label of most weight among the 3 x 3 old ones, by the quadratic
    B-spline: as if every cell's mask were interpolated by itself.
    """
    H, W = labels.shape
    large = np.repeat(np.repeat(labels, zoom, 0), zoom, 1)  # (H zoom, W zoom)
    t = (np.arange(zoom) + 0.5) / zoom - 0.5
    spline = np.stack(((0.5 - t) ** 2 / 2, 0.75 - t ** 2, (0.5 + t) ** 2 / 2)).astype(np.float32)
    weight = np.einsum("iy,jx->ijyx", spline, spline).reshape(9, zoom ** 2)
    window = np.lib.stride_tricks.sliding_window_view(np.pad(labels, 1, mode="edge"), (3, 3))
    y, x = np.nonzero((window != labels[..., None, None]).any((2, 3)))
    block = large.reshape(H, zoom, W, zoom)
    for at in range(0, len(y), 4096):  # as much as stays in the cache
        i, j = y[at:at + 4096], x[at:at + 4096]
        old = window[i, j].reshape(-1, 9)  # (P, 9)
        most = np.zeros((len(old), zoom ** 2), np.float32)
        winner = np.zeros(most.shape, labels.dtype)
        for candidate in old.T[..., None]:  # (P, 1)
            votes = (old == candidate).astype(np.float32) @ weight  # (P, zoom^2)
            np.copyto(winner, candidate, where=votes > most)
            np.maximum(most, votes, out=most)
        block[i, :, j] = winner.reshape(-1, zoom, zoom)
    return large


def write_picture(path: str | Path, rgb: np.ndarray) -> None:
    """Write (H, W, 3) or (H, W) uint8 as PNG, deflated in bands on all cores.

    Unfiltered at level 1: filters save nothing here, and take Pillow half its time. The bytes do
    not depend on the number of cores.
    """
    if rgb.dtype != np.uint8 or rgb.shape[2:] not in ((), (3,)) or 0 in rgb.shape:
        raise ValueError(f"{path}: {rgb.shape} {rgb.dtype}, expected (H, W, 3) or (H, W) uint8")
    H, W = rgb.shape[:2]
    rows = np.zeros((H, 1 + rgb[0].size), np.uint8)  # each row begins with its filter: 0, none
    rows[:, 1:] = rgb.reshape(H, -1)
    many = max(1, BAND // rows.shape[1])
    bands = [rows[y:y + many] for y in range(0, H, many)]

    def deflate(k: int) -> bytes:
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        end = zlib.Z_FINISH if k + 1 == len(bands) else zlib.Z_FULL_FLUSH
        return squeeze.compress(bands[k].data) + squeeze.flush(end)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
        return struct.pack(">I", len(content)) + kind + content + check

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        body = b"".join(pool.map(deflate, range(len(bands))))
    stream = b"\x78\x01" + body + struct.pack(">I", zlib.adler32(rows.data))  # zlib's frame
    header = struct.pack(">2I5B", W, H, 8, 2 if rgb.ndim == 3 else 0, 0, 0, 0)
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream)
                              + chunk(b"IEND", b""))
