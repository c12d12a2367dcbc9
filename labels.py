"""Label images <-> files, and the distance map that the network learns from them.

    write_labels("well_A1_labels.tif", labels)
    labels = read_labels("well_A1_labels.tif")                       # (H, W) int32, 0 = background
    write_label_tiles("slide_labels.tif", (H, W), tiles)             # piece by piece
    target = distance_map(labels, cap=4)                             # (H, W) float32 in [0, 1]
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from images import open_image
from runs import replacing

DEEP = 64                               # px, see distance_map; sums of two squares must fit int16
CLASSIC = 1 << 31                       # bytes of pixels; beyond, a TIFF needs the 64-bit places of BigTIFF, which fewer programs read


# ------------------------------------------------------------------------------------------------------ files

def read_labels(path: str | Path) -> np.ndarray:
    """(H, W) int32 label image from TIFF, PNG or .npy."""
    with open_image(path) as source:
        if source.shape[0] != 1 or source.dtype.kind == "f":
            raise ValueError(f"{path}: {source.shape[0]} channels of {source.dtype}, expected labels: one "
                             f"channel of integers; give each cell a whole number and save it as uint16")
        labels = source.region(0, source.shape[1], 0, source.shape[2])[0]
    check_labels(labels, path, np.iinfo(np.int32).max)
    return labels.astype(np.int32)


def write_labels(path: str | Path, labels: np.ndarray, pixel_size: float | None = None) -> None:
    """Compressed TIFF, uint16, uint32 if ids pass 65,535; pixel_size in µm."""
    check_labels(labels, path, np.iinfo(np.uint32).max)
    dtype = np.uint16 if labels.max(initial=0) < 1 << 16 else np.uint32
    with replacing(path) as temporary:
        tifffile.imwrite(temporary, labels.astype(dtype), **_label_options(pixel_size))


def write_label_tiles(path: str | Path, shape: tuple[int, int], tiles: Iterable[np.ndarray],
                      tile: tuple[int, int] = (512, 512), pixel_size: float | None = None) -> None:
    """Compressed, tiled uint32 TIFF of shape (H, W), a BigTIFF where it is large, written while its tiles come, row-major.

    tiles : (h, w) integers, at the right and lower rim cut to the image; tile : px, multiples of 16.
    """
    (H, W), (h, w) = shape, tile
    if h % 16 or w % 16 or min(h, w, H, W) < 1:
        raise ValueError(f"{path}: {H} x {W} px in tiles of {h} x {w}, expected at least 1 px and tiles in "
                         f"multiples of 16")
    given = iter(tiles)

    def padded() -> Iterator[np.ndarray]:
        for y, x in itertools.product(range(0, H, h), range(0, W, w)):
            part, expected = next(given, None), (min(h, H - y), min(w, W - x))
            if part is None or part.shape != expected:
                got = "no tile" if part is None else f"a tile of {part.shape}"
                raise ValueError(f"{path}: {got} at row {y}, column {x}, expected one of {expected}")
            yield np.pad(part.astype(np.uint32), [(0, h - expected[0]), (0, w - expected[1])])

    with replacing(path) as temporary:
        tifffile.imwrite(temporary, padded(), shape=shape, dtype=np.uint32, tile=tile, bigtiff=4 * H * W > CLASSIC,
                         **_label_options(pixel_size))
        if next(given, None) is not None:
            raise ValueError(f"{path}: more tiles than {H} x {W} px hold")


def _label_options(pixel_size: float | None) -> dict[str, Any]:
    calibration = dict(resolution=(1e4 / pixel_size,) * 2, resolutionunit="CENTIMETER") if pixel_size else {}
    fast = {"level": 3}                                            # a third less would take three times as long
    return dict(compression="zlib", compressionargs=fast, photometric="minisblack", **calibration)


def check_labels(labels: np.ndarray, where: str | Path, largest: int) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels of shape {labels.shape}, {labels.dtype}; expected (H, W) integers")
    if labels.min(initial=0) < 0 or labels.max(initial=0) > largest:
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}, expected 0 to {largest}")


# ----------------------------------------------------------------------------------------------- distance map

def distance_map(labels: np.ndarray, cap: float | None = None) -> np.ndarray:
    """Per cell min(d, cap) / min(max d, cap), 0 on background: (H, W) float32 in [0, 1]; cap in px.

    d is the distance from a pixel's centre to the nearest pixel centre that is not of the same cell: 1 along
    a cell's edge, also where another cell touches. The border of the image is no edge, for what lies behind
    it is unknown: a crop keeps the target of the whole image but for cells that it cuts. A cell without any
    edge is 1.

    d² separates into rows and columns (Meijster et al., 2000), also with many labels. With g the distance to
    another label in the same row and v that in the same column, d² = min(v², min over k of k² + g² of the
    pixel k rows away). Pixels of other cells take part without harm: the edge lies nearer than they, and v²
    counts it. This takes a pass for each k up to the largest d; cells with d > DEEP, few since they are
    large, are transformed each in its own box.
    """
    check_labels(labels, "distance_map", np.iinfo(np.int64).max)
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"cap={cap}, expected a distance in px above 0, or None")
    if labels.size == 0:
        return np.zeros(labels.shape, np.float32)
    flat = labels.ravel()
    starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))     # of runs of one label
    ids, run = np.unique(flat[starts], return_inverse=True)
    lengths = np.diff(starts, append=flat.size)
    cells = np.repeat(run.astype(np.int32), lengths).reshape(labels.shape)       # 0..n without gaps
    background = np.repeat(ids[run] == 0, lengths).reshape(labels.shape)

    reach = DEEP if cap is None else min(DEEP, math.ceil(cap))                   # px; exact as far as this
    v, g = _to_other(cells, reach + 1), _to_other(cells.T, reach + 1).T          # (H, W) int16
    v[background] = 0
    g *= g
    square = np.minimum(v * v, g)
    away = v                                                                     # its memory is free
    for k in range(1, reach):
        if square.max() <= k * k:
            break
        np.add(g, np.int16(k * k), out=away)
        np.minimum(square[k:], away[:-k], out=square[k:])
        np.minimum(square[:-k], away[k:], out=square[:-k])
    d = np.sqrt(square, dtype=np.float32)

    deep = np.unique(run[np.maximum.reduceat(square.ravel(), starts) > reach * reach])
    if len(deep) and (cap is None or cap > reach):
        from scipy import ndimage                                  # slow to import, seldom needed
        boxes = ndimage.find_objects(cells + 1)
        for i in deep:
            box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in boxes[i])
            own = cells[box] == i
            d[box][own] = 1 if own.all() else ndimage.distance_transform_edt(own)[own]
    d = d if cap is None else np.minimum(d, np.float32(cap))
    peak = np.zeros(len(ids), np.float32)
    np.maximum.at(peak, run, np.maximum.reduceat(d.ravel(), starts))
    return d / np.repeat(np.where(ids == 0, 1, peak)[run], lengths).reshape(labels.shape)


def _to_other(labels: np.ndarray, far: int) -> np.ndarray:
    """Distance in px to the nearest other label in the same column, at most far: (H, W) int16."""
    y = np.arange(len(labels), dtype=np.int32)[:, None]
    change = labels[1:] != labels[:-1]
    above, below = np.full_like(labels, -far), np.full_like(labels, len(labels) + far)   # (H, W) their rows
    np.copyto(above[1:], y[:-1], where=change)
    np.copyto(below[:-1], y[1:], where=change)
    np.maximum.accumulate(above, axis=0, out=above)
    np.minimum.accumulate(below[::-1], axis=0, out=below[::-1])
    return np.minimum(np.minimum(y - above, below - y), far).astype(np.int16)
