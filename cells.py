"""Labels -> cell table, exact outlines, GeoJSON for QuPath, ROIs for ImageJ. Pictures: overlay.py.

    columns = cells.table(labels, image, channels=["DNA", "actin"], pixel_size=0.65)    # one row per cell
    cells.write_csv("NAME_cells.csv", columns)
    cells.write_geojson("NAME.geojson", labels, columns)                                # drag it into QuPath
    cells.write_rois("NAME_rois.zip", labels)                                           # ImageJ's ROI manager

Coordinates. Tables count as scikit-image does: the centre of the first pixel is (0, 0), boxes are half open.
GeoJSON and ROIs run along pixel edges: the corner of the first pixel is (0, 0), points are (x, y), y down.
`origin` is the (y, x) of the first pixel in the whole image, for callers that go block by block.

How. Nearly everything is a sum over runs, the stretches of one cell in one row: a few dozen to a cell instead
of hundreds of pixels. n cells, R runs; arrays of runs are sorted by cell, then row, then column.
"""
from __future__ import annotations

import csv
import json
import math
import struct
import uuid
import zipfile
from pathlib import Path
from typing import Iterable, Iterator, NamedTuple

import numpy as np
from skimage.measure import label

from runs import replacing
from overlay import overlay, write_png  # noqa: F401  cells.overlay, cells.write_png

Polygons = list[list[np.ndarray]]        # of a cell: [[outer ring, hole, ...], ...]; ring (K, 2) x y, closed
Edges = tuple[bool, bool, bool, bool]    # whether top, left, bottom, right of an array end the image


# ---------------------------------------------------------------------------------------------- runs

class Runs(NamedTuple):
    """Stretches of cells in rows, sorted by cell; `right` is one past the last pixel."""
    ids: np.ndarray                      # (n,) the labels' own numbers, ascending
    cell: np.ndarray                     # (R,) index into ids
    y: np.ndarray                        # (R,)
    left: np.ndarray                     # (R,)
    right: np.ndarray                    # (R,)
    first: np.ndarray                    # (n,) where each cell's runs begin


def runs(labels: np.ndarray) -> tuple[Runs, np.ndarray]:
    """The runs of a label image, and (H + 2, W + 2) int32 with cells counted 1..n in a frame of ground."""
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels of shape {labels.shape}, {labels.dtype}: expected (H, W) integers")
    H, W = labels.shape
    starts = np.ones((H, W), bool)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=starts[:, 1:])
    start = np.flatnonzero(starts)
    length = np.diff(start, append=labels.size)
    ids, cell = np.unique(labels[starts], return_inverse=True)
    if len(ids) and ids[0] < 0:
        raise ValueError(f"labels hold {ids[0]}: expected 0 for the ground and positive numbers for cells")
    ground = int(len(ids) > 0 and ids[0] == 0)
    framed = np.zeros((H + 2, W + 2), np.int32)
    framed[1:-1, 1:-1] = np.repeat((cell + 1 - ground).astype(np.int32), length).reshape(H, W)
    order = np.argsort(cell, kind="stable")[np.count_nonzero(cell < ground):]
    start, length, cell = start[order], length[order], cell[order] - ground
    y, left = np.divmod(start, max(W, 1))
    return Runs(ids[ground:], cell, y, left, left + length, np.flatnonzero(np.diff(cell, prepend=-1))), framed


def ranges(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All pairs (i, j) with low[i] <= j < high[i]."""
    count = np.maximum(high - low, 0)
    i = np.repeat(np.arange(len(low)), count)
    return i, np.arange(len(i)) - np.repeat(np.cumsum(count) - count - low, count)


def boxes(r: Runs) -> np.ndarray:
    """(4, n): top, left, bottom, right; half open."""
    return np.stack((np.minimum.reduceat(r.y, r.first), np.minimum.reduceat(r.left, r.first),
                     np.maximum.reduceat(r.y, r.first) + 1, np.maximum.reduceat(r.right, r.first)))


# ---------------------------------------------------------------------------------------------- neighbours

def borders(framed: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """How often lines enter each cell, (4, n): along rows, columns and both diagonals; and who touches whom.

    Touching pairs (T, 2), counted from 0, each once: cells that share a pixel's edge or corner.
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


def near_boxes(box: np.ndarray, distance: float) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs of cells whose boxes come as near as distance, each once, about a million candidates at a time.

    Cells are shelved in bands of rows by their top and sorted by their left side within a band; a cell looks
    at the bands from its own top to its bottom. A huge cell widens only its own search and those in its band.
    """
    top, left, bottom, right = box
    tall = int(np.median(bottom - top) + distance) + 1 if len(top) else 1
    band, S = top // tall, int(right.max(initial=0) + distance) + 2
    widest = np.zeros(band.max(initial=0) + 1, np.int64)
    np.maximum.at(widest, band, right - left)
    shelf = np.lexsort((left, band))
    key = (band * S + left)[shelf]
    cell, look = ranges(band, np.minimum((bottom + int(distance)) // tall + 1, len(widest)))
    low = np.searchsorted(key, look * S + np.maximum(left[cell] - int(distance) - widest[look], 0))
    high = np.searchsorted(key, look * S + right[cell] + int(distance), side="right")
    room = np.cumsum(high - low)
    begin = 0
    while begin < len(cell):
        stop = max(begin + 1, np.searchsorted(room, 1_000_000 + (room[begin - 1] if begin else 0)))
        i, j = ranges(low[begin:stop], high[begin:stop])
        a, b = cell[begin:stop][i], shelf[j]
        gap_y = np.maximum(top[b] - bottom[a], 0)
        gap_x = np.maximum(left[b] - right[a], left[a] - right[b]).clip(0)
        near = (top[a] < top[b]) | (top[a] == top[b]) & (a < b)
        near &= gap_y ** 2 + gap_x ** 2 <= distance ** 2
        yield a[near], b[near]
        begin = stop


def near_pairs(r: Runs, distance: float) -> np.ndarray:
    """Pairs of cells (P, 2), counted from 0, each once, whose outlines come as near as `distance` px.

    The gap is measured between pixel edges: 0 for cells that touch, 1 with one pixel of ground between them.
    How far cells reach in 16 directions, and which corners do, settles nearly every pair; runs do the rest.
    """
    n = len(r.ids)
    reach = np.empty((16, n))                                      # of each cell in each direction
    corner = np.empty((16, n, 2))                                  # a corner of the cell that reaches so far
    for k in range(16):
        dy, dx = math.sin(k * math.pi / 8), math.cos(k * math.pi / 8)
        y, x = r.y + (dy > 0), r.right if dx > 0 else r.left
        reached = y * dy + x * dx
        reach[k] = np.maximum.reduceat(reached, r.first)
        there = np.flatnonzero(reached == reach[k][r.cell])
        corner[k, r.cell[there]] = np.stack((y[there], x[there]), 1)
    found = [np.empty((0, 2), np.int64)]
    for a, b in near_boxes(boxes(r), distance):
        at_least, at_most = np.full(len(a), -np.inf), np.full(len(a), np.inf)
        for k in range(16):
            back = (k + 8) % 16
            at_least = np.maximum(at_least, -reach[k, a] - reach[back, b])     # px between two parallel lines
            at_most = np.minimum(at_most, ((corner[k, a] - corner[back, b]) ** 2).sum(1))      # px squared
        near = at_most <= distance ** 2
        unclear = np.flatnonzero(~near & (at_least <= distance + 1e-6))        # 1e-6: sines are rounded
        near[unclear] = measured_near(r, a[unclear], b[unclear], distance)
        found.append(np.stack((a[near], b[near]), 1))
    return np.concatenate(found)


def measured_near(r: Runs, a: np.ndarray, b: np.ndarray, distance: float) -> np.ndarray:
    """Whether the runs of a[i] and b[i] come as near as distance; (P,) bool."""
    near = np.zeros(len(a), bool)
    size = np.diff(r.first, append=len(r.cell))
    a, b = np.where(size[a] < size[b], (a, b), (b, a))             # look from the smaller cell
    pair, run = ranges(r.first[a], r.first[a] + size[a])
    H, W = int(r.y.max(initial=0)) + 1, int(r.right.max(initial=0)) + 1
    key = (r.cell * H + r.y) * W + r.right                         # ascending, as runs are sorted
    limit = int(distance ** 2)                                     # gaps are whole numbers
    reach = math.isqrt(limit) + 1                                  # rows next to each other have no gap
    for dy in sorted(range(-reach, reach + 1), key=abs):
        gap = math.isqrt(limit - max(abs(dy) - 1, 0) ** 2)         # widest gap along the row
        y = r.y[run] + dy
        row = (b[pair] * H + y) * W
        want = row + np.maximum(r.left[run] - gap, 0)
        facing = np.searchsorted(key, want).clip(max=len(key) - 1)           # the last where none ends so far right
        hit = ((y >= 0) & (y < H) & (key[facing] >= want) & (key[facing] // W == row // W)
               & (r.left[facing] <= r.right[run] + gap))
        near[pair[hit]] = True
        run, pair = run[~near[pair]], pair[~near[pair]]
    return near


# ---------------------------------------------------------------------------------------------- table

def convex_area(r: Runs) -> np.ndarray:
    """Pixels (n,) whose centre lies in the convex hull of the midpoints of the cell's pixel edges.

    That is scikit-image's convex_image, counted exactly and without drawing it. The left side of the hull and
    the mirrored right side are chains of (y, x) from top to bottom, 2n in all; points inside the hull leave
    until none is left. The midpoints put a diamond of half a pixel around every centre, which moves a side
    of the hull that runs w columns over h rows outwards by max(1, |w| / h) / 2 in every row.
    """
    n, H = len(r.ids), r.y.max(initial=0) + 1
    begin = np.flatnonzero(np.diff(r.cell * H + r.y, prepend=-1))  # a cell's first run in each of its rows
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
    last = np.diff(chain, append=-1) != 0                          # a chain's last point stands for itself
    h, w = np.where(last, 1, dy), np.where(last, 0, dx)
    side, row = ranges(np.zeros_like(h), np.where(last, 1, h + 1))
    h, w, x, y, chain = h[side], w[side], x[side], y[side] + row, chain[side]
    outwards = np.maximum(h, np.where(row == 0, -w, np.where(row == h, w, np.abs(w))))
    leftmost = -((outwards - 2 * (x * h + row * w)) // (2 * h))    # rounded up
    begin = np.flatnonzero(np.diff(chain * H + y, prepend=-1))     # sides share the row in which they meet
    leftmost = np.minimum.reduceat(leftmost, begin)
    return np.bincount(chain[begin] % n, 0.5 - leftmost, n)        # width = 1 - left - mirrored left


def intensities(r: Runs, image: np.ndarray, channels: list[str] | None) -> dict[str, np.ndarray]:
    """Columns intensity_{mean,min,max,sd}_CHANNEL."""
    names = [str(c) for c in channels or range(1, len(image) + 1)]
    if len(names) != len(image):
        raise ValueError(f"{len(names)} channel names, {len(image)} channels in the image: expected as many")
    if len(set(names)) < len(names):                               # two channels of one name are two columns
        names = [f"{name}_{i}" for i, name in enumerate(names, 1)]
    run, pixel = ranges(r.y * image.shape[2] + r.left, r.y * image.shape[2] + r.right)     # sorted by cell
    begin = np.searchsorted(r.cell[run], np.arange(len(r.ids)))
    size = np.diff(begin, append=len(pixel))
    columns = {}
    for name, channel in zip(names, image):
        values = channel.ravel()[pixel]
        low, high = np.minimum.reduceat(values, begin), np.maximum.reduceat(values, begin)
        values = values.astype(np.float64)
        mean = np.add.reduceat(values, begin) / size
        sd = np.sqrt(np.add.reduceat((values - np.repeat(mean, size)) ** 2, begin) / size)
        columns |= {f"intensity_{what}_{name}": value
                    for what, value in (("mean", mean), ("min", low), ("max", high), ("sd", sd))}
    return columns


def table(labels: np.ndarray, image: np.ndarray | None = None, *, channels: list[str] | None = None,
          pixel_size: float | None = None, near: float | None = None, ids: np.ndarray | None = None,
          origin: tuple[int, int] = (0, 0), edges: Edges = (True, True, True, True)) -> dict[str, np.ndarray]:
    """Measurements, one row per cell, ascending id; columns in the order in which they are written.

    labels : (H, W) integers, 0 = ground; ids may have gaps.
    image : (C, H, W); mean, min, max and sd (of the population) are in its own units.
    channels : C names for the columns; 1, 2, ... without.
    pixel_size : µm per px; adds the lengths and areas in µm.
    near : px, for neighbours_near; by default the median equivalent diameter of the cells in `labels`: one
        more cell would fit in between. Give a number where images or blocks are compared.
    ids : rows wanted; the other cells still count as neighbours.
    origin : (y, x) of the first pixel, added to centroids and boxes.
    edges : which sides of `labels` are sides of the image, for touches_border.

    Area, centroid, box, axes, eccentricity, orientation_rad (of the major axis against a column, in
    [-pi/2, pi/2], counter-clockwise), extent, equivalent diameter: as skimage.measure.regionprops.
    perimeter_px: Crofton's formula with four directions, as skimage.measure.perimeter_crofton: right for
    discs, for long straight sides between -5 % (along rows, columns, diagonals) and +3 %; holes count.
    circularity: 4 pi area / perimeter^2, 1 for a disc; not clipped, cells below some 30 px can exceed 1.
    solidity: area / pixels of the convex hull, as regionprops; 1 for a convex cell.
    neighbours_touching: cells that share a pixel's edge or corner; neighbours_near: cells whose outline comes
    as near as near_px to this one's, edge to edge, those that touch included.
    """
    r, framed = runs(labels)
    n = len(r.ids)
    if image is not None and (image.ndim != 3 or image.shape[1:] != labels.shape):
        raise ValueError(f"image {image.shape}, labels {labels.shape}: expected (C, H, W) and (H, W)")
    if near is not None and not 0 <= near < math.inf:
        raise ValueError(f"near={near}: expected a distance in px, 0 or more")
    if pixel_size is not None and not 0 < pixel_size < math.inf:
        raise ValueError(f"pixel_size={pixel_size}: expected micrometres per pixel, more than 0")
    row = np.arange(n)
    if ids is not None:
        missing = np.setdiff1d(ids, r.ids)
        if len(missing):
            raise ValueError(f"ids: {missing[0]} is not in the labels; expected ids of cells")
        row = np.searchsorted(r.ids, np.unique(ids))

    def total(values: np.ndarray) -> np.ndarray:                   # (R,) -> (n,)
        return np.bincount(r.cell, values, n)

    top, left, bottom, right = boxes(r)
    y, a, b = r.y - top[r.cell], r.left - left[r.cell], r.right - left[r.cell]     # in the box: small sums
    area = total(b - a)
    sum_x = (b * (b - 1) - a * (a - 1)) / 2                        # over a run
    sum_xx = (b * (b - 1) * (2 * b - 1) - a * (a - 1) * (2 * a - 1)) / 6
    mean_y, mean_x = total(y * (b - a)) / area, total(sum_x) / area
    yy = total(y * y * (b - a)) / area - mean_y ** 2
    xy = total(y * sum_x) / area - mean_y * mean_x
    xx = total(sum_xx) / area - mean_x ** 2
    half, swing = (xx + yy) / 2, np.hypot((xx - yy) / 2, xy)
    long, short = half + swing, np.maximum(half - swing, 0)        # variances along the axes
    entries, touching = borders(framed, n)
    perimeter = np.pi / 4 * (np.array([1, 1, 0.5 ** 0.5, 0.5 ** 0.5]) @ entries)
    diameter = np.sqrt(4 / np.pi * area)
    near = float(near if near is not None else np.median(diameter) if n else 0)
    columns = {
        "id": r.ids,
        "area_px": area.astype(np.int64),
        "perimeter_px": perimeter,
        "centroid_y_px": top + mean_y + origin[0],
        "centroid_x_px": left + mean_x + origin[1],
        "bbox_top_px": top + origin[0],
        "bbox_left_px": left + origin[1],
        "bbox_bottom_px": bottom + origin[0],
        "bbox_right_px": right + origin[1],
        "major_axis_px": 4 * np.sqrt(long),
        "minor_axis_px": 4 * np.sqrt(short),
        "eccentricity": np.sqrt(1 - short / np.where(long > 0, long, 1)) * (long > 0),
        "orientation_rad": np.arctan2(2 * xy, yy - xx) / 2,
        "solidity": area / convex_area(r),
        "extent": area / ((bottom - top) * (right - left)),
        "circularity": 4 * np.pi * area / perimeter ** 2,
        "equivalent_diameter_px": diameter,
    }
    if pixel_size is not None:
        columns["area_um2"] = area * pixel_size ** 2
        for name in ("perimeter_", "centroid_y_", "centroid_x_", "major_axis_", "minor_axis_",
                     "equivalent_diameter_"):
            columns[name + "um"] = columns[name + "px"] * pixel_size
    if image is not None:
        columns |= intensities(r, image, channels)
    columns["neighbours_touching"] = np.bincount(touching.ravel(), minlength=n)
    columns["neighbours_near"] = np.bincount(near_pairs(r, near).ravel(), minlength=n)
    columns["near_px"] = np.full(n, near)
    sides = np.stack((top == 0, left == 0, bottom == labels.shape[0], right == labels.shape[1]))
    columns["touches_border"] = sides[np.array(edges, bool)].any(0)
    return {name: values[row] for name, values in columns.items()}


def write_csv(path: str | Path, columns: dict[str, np.ndarray]) -> None:
    """Columns of equal length as CSV: whole numbers as they are, flags as 0 and 1, others with 7 digits."""
    def printed(values: np.ndarray) -> list:
        if values.dtype.kind == "f":
            return [f"{value:.7g}" for value in values.tolist()]
        return (values.astype(int) if values.dtype.kind == "b" else values).tolist()

    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(columns)
        rows.writerows(zip(*(printed(np.asarray(values)) for values in columns.values()), strict=True))


# ---------------------------------------------------------------------------------------------- polygons

def polygons(labels: np.ndarray, origin: tuple[int, int] = (0, 0)) -> dict[int, Polygons]:
    """The exact outline of every cell along pixel edges: {id: [[outer ring, hole, ...], ...]}, ascending ids.

    A ring is (K, 2) int64, x y, first point = last point, corners only; outer rings turn clockwise on the
    screen, holes the other way. Parts of a cell that hang together only by a pixel's corner are polygons of
    their own. No ring meets itself, so that the polygons are valid in GEOS and JTS too.
    """
    piece = label(labels, connectivity=1)                          # (H, W) 4-connected parts, 1..P
    H, W = piece.shape
    S = W + 2
    flat = np.pad(piece, 1).ravel()
    rim = np.zeros(len(flat), bool)
    for step in (1, S, S + 1, S - 1):
        change = flat[step:] != flat[:-step]
        rim[step:] |= change
        rim[:-step] |= change
    p = np.flatnonzero(rim & (flat > 0))
    own, y, x = flat[p], p // S - 1, p % S - 1
    same = {step: flat[p + step] == own for step in (-1, 1, -S, S, -S - 1, -S + 1, S - 1, S + 1)}
    kinds = []                                                     # every corner belongs to one pixel
    for sy, sx in ((-1, -1), (-1, 1), (1, 1), (1, -1)):
        kinds.append((np.flatnonzero(~same[sy * S] & ~same[sx]), sy, sx, 1))                   # convex
        kinds.append((np.flatnonzero(same[sy * S] & same[sx] & ~same[sy * S + sx]), sy, sx, -1))
    at = np.concatenate([kind[0] for kind in kinds])
    sy, sx, turn = np.repeat([kind[1:] for kind in kinds], [len(kind[0]) for kind in kinds], axis=0).T
    own, ids = own[at].astype(np.int64), labels[y[at], x[at]]
    y, x = y[at] + (sy > 0), x[at] + (sx > 0)

    # Corners in a row pair up, left with right, to horizontal sides, corners in a column to vertical ones. Of
    # two corners in one place the one whose side lies to the left, or above, comes first.
    row = (own * (H + 1) + y) * (W + 1) + x
    along = partners(row * 2 + (sx * turn < 0))
    down = partners(((own * (W + 1) + x) * (H + 1) + y) * 2 + (sy * turn < 0))
    onward = np.where(sy * sx * turn > 0, along, down)             # clockwise: the cell is on the right hand
    ring, _ = cycles(onward)
    order = np.argsort(row, kind="stable")
    twice = np.flatnonzero((np.diff(row[order]) == 0) & (np.diff(ring[order]) == 0))
    a, b = order[twice], order[twice + 1]                          # a ring that meets itself becomes two
    onward[a], onward[b] = onward[b], onward[a]

    ring, order = cycles(onward)
    begin = np.flatnonzero(np.diff(ring[order], prepend=-1))
    area = np.add.reduceat(((x[onward] - x) * (y[onward] + y))[order], begin)          # < 0: an outer ring
    rings = np.split(np.stack((x + origin[1], y + origin[0]), 1)[order], begin[1:])
    first = order[begin]
    found: dict[int, Polygons] = {}
    for k in np.lexsort((area, own[first], ids[first])):           # holes right after their outer ring
        closed = np.concatenate((rings[k], rings[k][:1]))
        parts = found.setdefault(int(ids[first[k]]), [])
        if area[k] < 0:
            parts.append([closed])
        else:
            parts[-1].append(closed)
    return found


def partners(key: np.ndarray) -> np.ndarray:
    """Sorted by key, the first belongs to the second, the third to the fourth ...: whom each belongs to."""
    order = np.argsort(key, kind="stable")
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def cycles(onward: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cycles of a permutation: each element's, named by its least member; an order that walks them."""
    themselves = np.arange(len(onward))
    cycle, jump = themselves, onward
    while True:                                                    # pointer doubling
        least = np.minimum(cycle, cycle[jump])
        if np.array_equal(least, cycle):
            break
        cycle, jump = least, jump[jump]
    steps = (cycle != themselves).astype(np.int64)                 # from each element to the least
    jump = np.where(steps > 0, onward, themselves)
    while not np.array_equal(jump, cycle):
        steps, jump = steps + steps[jump], jump[jump]
    return cycle, np.lexsort((-steps, cycle))


def outlined(cells: np.ndarray | Iterable[tuple[int, Polygons]], origin: tuple[int, int]
             ) -> Iterable[tuple[int, Polygons]]:
    """(id, polygons) of labels; what is outlined already goes through."""
    return polygons(cells, origin).items() if isinstance(cells, np.ndarray) else cells


def write_geojson(path: str | Path, cells: np.ndarray | Iterable[tuple[int, Polygons]],
                  columns: dict[str, np.ndarray] | None = None, origin: tuple[int, int] = (0, 0)) -> None:
    """A GeoJSON FeatureCollection that QuPath opens: one detection per cell, coordinates in px, y down.

    QuPath takes UUIDs only as ids, so the cell's own number is the detection's name.
    cells : labels, or (id, polygons) one after the other; the file is written as they come.
    columns : of `table`; they become QuPath's measurements, those that are no finite numbers left out.
    """
    names = [name for name in columns or {} if name != "id"]
    row = dict(zip(columns["id"].tolist(), zip(*(columns[key].tolist() for key in names)))) if names else {}
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write('{"type":"FeatureCollection","features":[')
        for count, (identity, parts) in enumerate(outlined(cells, origin)):
            coordinates = [[ring.tolist() for ring in part] for part in parts]
            several = len(parts) > 1
            feature = {
                "type": "Feature",
                "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"{Path(path).name}/{identity}")),
                "geometry": {"type": "MultiPolygon" if several else "Polygon",
                             "coordinates": coordinates if several else coordinates[0]},
                "properties": {"objectType": "detection", "name": str(identity), "measurements": {
                    name: float(f"{value:.7g}") for name, value in zip(names, row.get(identity, ()))
                    if math.isfinite(value)}},
            }
            file.write((",\n" if count else "\n") + json.dumps(feature, separators=(",", ":")))
        file.write("\n]}\n")


def write_rois(path: str | Path, cells: np.ndarray | Iterable[tuple[int, Polygons]],
               origin: tuple[int, int] = (0, 0)) -> None:
    """A zip of ImageJ ROIs, one per cell, named by its id (0001, 0002, ...).

    cells : labels, or (id, polygons) one after the other.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for identity, parts in outlined(cells, origin):
            name = f"{identity:04d}"
            archive.writestr(zipfile.ZipInfo(f"{name}.roi"), roi(name, parts))


def roi(name: str, parts: Polygons) -> bytes:
    """One ImageJ ROI, exact in every case.

    A cell of one ring is a traced ROI, whose coordinates have 16 bit. With holes, with several parts, or
    beyond pixel 32,767 it is a composite ROI: a path in float32, exact for whole numbers up to 16 million.
    Layout: ImageJ's ij.io.RoiDecoder; everything is big-endian.
    """
    rings = [ring[:-1] for part in parts for ring in part]         # ImageJ closes them itself
    points = np.concatenate(rings)
    (left, top), (right, bottom) = points.min(0), points.max(0)
    if len(rings) == 1 and min(left, top) >= 0 and max(right, bottom) < 2 ** 15 and len(points) < 2 ** 16:
        kind, count, floats = 8, len(points), 0
        path = (points - (left, top)).T.astype(">i2")              # all x, then all y
    else:                                                          # 0 x y: move, 1 x y: line, 4: close
        path = np.concatenate([np.append(np.insert(ring, 0, np.arange(len(ring)) > 0, axis=1).ravel(), 4)
                               for ring in rings]).astype(">f4")
        kind, count, floats = 1, 0, len(path)
    box = np.clip((top, left, bottom, right), -2 ** 15, 2 ** 15 - 1)           # composites: from their path
    end = 64 + path.nbytes
    header = struct.pack(">4shBx4hH16xHi20xi", b"Iout", 227, kind, *box, count, 0, floats, end)
    header2 = struct.pack(">16x2i40x", end + 64, len(name))        # where the name is
    return header + path.tobytes() + header2 + name.encode("utf-16-be")
