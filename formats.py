"""What other programs write about cells -> label images: COCO, QuPath's GeoJSON, Cellpose's _seg.npy, masks.

    labels = read_geojson("slide.geojson", shape=(2048, 2048))       # (H, W) int32
    labels = read_seg("well_A1_seg.npy")                             # no pickled code is run
    for listed in read_coco("livecell_coco_test.json"):
        labels = coco_labels(listed, shape=(520, 704))

Ids are 1, 2, ... in the order of the file. Where cells overlap the smaller lies on top. A pixel belongs to a
polygon if its centre lies inside by the even-odd rule: what cells.polygons outlines comes back exactly.
"""
from __future__ import annotations

import json
import math
import pickle
import re
import tokenize
import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from images import read_image
from labels import check_labels, read_labels

LARGEST = np.iinfo(np.int32).max
OBJECTS = {"PathCellObject": "cell", "PathDetectionObject": "detection"}                # as QuPath 0.2 says it


# -------------------------------------------------------------------------------------- cells as flat indices

def painted(shape: tuple[int, int], cells: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W) int32 of cells given as flat indices."""
    labels = np.zeros(math.prod(shape), np.int32)
    for i in sorted(range(len(cells)), key=lambda i: -len(cells[i])):
        labels[cells[i]] = i + 1
    if lost := len(cells) - len(np.unique(labels[labels > 0])):
        warnings.warn(f"{lost} of {len(cells)} cells have no pixel of their own: smaller than one, or covered by others", stacklevel=2)
    return labels.reshape(shape)


def ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... of length[0], then start[1], ..."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())


def polygon_pixels(rings: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Flat indices of the pixels whose centre lies inside an odd number of rings, (K, 2) x y in px."""
    H, W = shape
    a = np.concatenate(rings)                                      # (E, 2), each side leads from a to b
    b = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    down = (a[:, 1] < b[:, 1])[:, None]                            # all from the top: neighbours round alike
    (x0, y0), (x1, y1) = np.where(down, a, b).T, np.where(down, b, a).T
    first, last = (np.ceil(y - 0.5).clip(0, H).astype(np.int64) for y in (y0, y1))
    side = np.repeat(np.arange(len(a)), last - first)              # once for each row of centres it crosses
    row = ranges(first, last - first)
    x = x0[side] + (row + 0.5 - y0[side]) * ((x1 - x0)[side] / (y1 - y0)[side])
    column = np.ceil(x - 0.5).clip(0, W).astype(np.int64)          # the first with its centre on the right
    order = np.lexsort((column, row))                              # sides pair up in each row: in, out, in
    start, end = (row * W + column)[order].reshape(-1, 2).T
    return ranges(start, end - start)


def cell_pixels(parts: Sequence[Sequence[np.ndarray]], shape: tuple[int, int], where: str) -> np.ndarray:
    """Flat indices of a cell of one or more polygons, each an outer ring and its holes."""
    points = np.concatenate([np.zeros((0, 2)), *(ring for part in parts for ring in part)])
    if not (np.abs(points) < LARGEST).all():                       # NaN too
        raise ValueError(f"{where}: a coordinate that is no pixel, NaN or beyond {LARGEST}")
    if len(points) and ((points.min(0) >= shape[::-1]).any() or (points.max(0) <= 0).any()):
        raise ValueError(f"{where}: at x {points[0, 0]:g}, y {points[0, 1]:g}, outside of the image of "
                         f"{shape[0]} x {shape[1]} px; was it drawn at another scale?")
    pixels = [polygon_pixels(part, shape) for part in parts if part]
    return pixels[0] if len(pixels) == 1 else np.unique(np.concatenate([np.zeros(0, np.int64), *pixels]))


def rle_pixels(rle: dict, shape: tuple[int, int], where: str) -> np.ndarray:
    """Flat indices of a COCO mask: runs down the columns, background first, as a list or packed text."""
    counts, (H, W) = rle.get("counts"), shape
    counts = unpacked(counts, where) if isinstance(counts, str) else counts
    if rle.get("size") != [H, W] or not isinstance(counts, list) \
            or not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != H * W:
        raise ValueError(f"{where}: an RLE of size {rle.get('size')} whose runs do not fill {H} x {W} px")
    lengths = np.array(counts, np.int64)
    below = ranges((np.cumsum(lengths) - lengths)[1::2], lengths[1::2])
    return below % H * W + below // H


def unpacked(text: str, where: str) -> list[int]:
    """Numbers from COCO's packed RLE: groups of 5 bits, the lowest first, a character from "0" for each.

    Bit 6 says that more groups follow, bit 5 of the last group is the sign. From the fourth on, numbers are
    differences to the last but one.
    """
    numbers, number, shift = [], 0, 0
    for group in (ord(character) - 48 for character in text):
        if not 0 <= group < 64 or shift > 60:
            raise ValueError(f"{where}: not an RLE as COCO packs it, {text[:20]!r}...")
        number, shift = number | (group & 31) << shift, shift + 5
        if not group & 32:
            number -= 1 << shift if group & 16 else 0
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number = shift = 0
    return numbers


# ------------------------------------------------------------------------------------------------------- COCO

class Listed(NamedTuple):
    """An image of a COCO file."""
    file_name: str                                                 # as written there: not to be trusted
    shape: tuple[int | None, int | None]                           # (H, W)
    cells: list[Any]                                               # each a list of polygons or RLE
    where: str                                                     # file and image, for errors


def read_coco(path: Path) -> list[Listed] | None:
    """The images of a COCO file with their annotations, or None for JSON of another kind.

    Every annotation is a cell, iscrowd too, which exporters set on all RLE. Some files of LIVECell have their
    annotations in a dictionary, and some images twice under two ids, for they were annotated twice.
    """
    parsed = _json(path, _annotation)
    if not isinstance(parsed, dict) or not {"images", "annotations"} <= parsed.keys():
        return None
    images, annotations = parsed["images"], parsed["annotations"]
    annotations = list(annotations.values()) if isinstance(annotations, dict) else annotations
    if not isinstance(images, list) or not isinstance(annotations, list) or not all(
            isinstance(e, dict) and isinstance(e.get("file_name"), str) and "id" in e for e in images):
        raise ValueError(f"{path}: expected COCO's lists of images (id, file_name) and annotations")
    cells = defaultdict(list)
    for entry in annotations:
        if not isinstance(entry, tuple):
            raise ValueError(f"{path}: an annotation without image_id or segmentation: {str(entry)[:60]}")
        cells[entry[0]].append(entry[1])
    if strangers := cells.keys() - {str(entry["id"]) for entry in images}:
        raise ValueError(f"{path}: annotations of image_id {min(strangers)}, which is not among its images")
    return [Listed(entry["file_name"], (entry.get("height"), entry.get("width")), cells[str(entry["id"])],
                   f"{path}: {entry['file_name']}") for entry in images]


def coco_labels(listed: Listed, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 for an image of this shape."""
    if listed.shape not in ((None, None), shape):
        raise ValueError(f"{listed.where} is {listed.shape} px there, but the image has {shape}")
    pixels = []
    for i, cell in enumerate(listed.cells, 1):
        where = f"{listed.where}, cell {i}"
        if isinstance(cell, dict):
            pixels.append(rle_pixels(cell, shape, where))
        elif isinstance(cell, list) and all(ring.ndim == 1 and ring.size % 2 == 0 for ring in cell):
            pixels.append(cell_pixels([[ring.reshape(-1, 2)] for ring in cell], shape, where))
        else:
            raise ValueError(f"{where}: expected polygons [x, y, x, y, ...] or RLE with counts and size")
    return painted(shape, pixels)


def _annotation(entry: dict) -> Any:
    """An annotation as (image id, segmentation), at once as arrays: lists would fill the memory."""
    if not {"image_id", "segmentation"} <= entry.keys():
        return entry
    cell = entry["segmentation"]
    cell = [np.array(ring, np.float64) for ring in cell] if isinstance(cell, list) else cell
    return str(entry["image_id"]), cell


def _json(path: Path, hook: Callable[[dict], Any] | None = None) -> Any:
    try:
        return json.loads(path.read_bytes(), object_hook=hook)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: no JSON that can be read ({error}); truncated? export it again") from None


# ------------------------------------------------------------------------------------ GeoJSON, masks in files

def read_geojson(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 of QuPath's objects; beside cells or detections its annotations are only regions."""
    parsed = _json(path)
    features = parsed.get("features", [parsed]) if isinstance(parsed, dict) else parsed
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        raise ValueError(f"{path}: expected GeoJSON features, as QuPath exports them")
    kinds = [(feature.get("properties") or {}).get("objectType") or OBJECTS.get(str(feature.get("id"))) for feature in features]
    cells = [feature for feature, kind in zip(features, kinds) if kind in ("cell", "detection")] or features
    pixels = []
    for i, feature in enumerate(cells, 1):
        where, geometry = f"{path}: object {i}", feature.get("geometry") or {}
        kind, parts = geometry.get("type"), geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            raise ValueError(f"{where} is a {kind}, expected Polygon or MultiPolygon; delete it in QuPath")
        try:
            parts = [[np.array(ring, np.float64)[:, :2] for ring in part]          # a third number is a height
                     for part in (parts if kind == "MultiPolygon" else [parts])]
        except (TypeError, ValueError, IndexError):
            raise ValueError(f"{where} has coordinates that are no rings of [x, y]") from None
        pixels.append(cell_pixels(parts, shape, where))
    return painted(shape, pixels)


def read_masks(paths: Sequence[Path]) -> np.ndarray:
    """(H, W) int32 of masks in a file for each cell: what is not 0."""
    cells, shape = [], None
    for path in paths:
        pixels = read_image(path).pixels                           # (C, H, W)
        if len(paths) == 1 and (several := len(np.unique(pixels[0][pixels[0] > 0]))) > 1:
            raise ValueError(f"{path}: {several} values, expected a mask of one cell; labels of many are named as their image")
        mask = pixels.any(axis=0)                                  # (H, W)
        if shape not in (None, mask.shape):
            raise ValueError(f"{path}: a mask of {mask.shape} px, but {paths[0].name} has {shape}")
        shape = mask.shape
        cells.append(np.flatnonzero(mask))
    return painted(shape, cells)


# --------------------------------------------------------------------------------------------------- Cellpose

def read_seg(path: Path) -> np.ndarray:
    """(H, W) int32 of the masks in Cellpose's _seg.npy, a pickled dictionary, of which nothing is run."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            pickled = headers[np.lib.format.read_magic(file)](file)[2] == object
            if pickled:
                item = _Unpickler(file).load().state[4][0]["masks"]              # an array of one dictionary
                _, shape, kind, fortran, content = item.state
                kind = kind.state[1].replace("|", "") + kind.given[0]            # such as <u2
                if isinstance(content, _Inert):                    # protocol 2 writes bytes as latin-1 text
                    content = content.given[0].encode("latin-1")
                if not re.fullmatch("[<>]?[iuf][1248]", kind):
                    raise ValueError(f"masks of {kind}")
                labels = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")
    except (pickle.UnpicklingError, EOFError, MemoryError, ValueError, TypeError, AttributeError, LookupError,
            OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: no _seg.npy with masks as Cellpose writes it ({error}); nothing in it was "
                         f"run; save the masks as TIFF") from None
    if not pickled:
        return read_labels(path)
    check_labels(labels, path, LARGEST)
    return labels.astype(np.int32)


class _Inert:
    """Stands for whatever a pickle would build: keeps what it is given and does nothing."""

    def __init__(self, *given: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Runs nothing: the few names that Cellpose's files hold become _Inert, any other name is refused."""

    names = {"_reconstruct", "scalar", "ndarray", "dtype", "encode", "PosixPath", "WindowsPath"}
    modules = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs", "pathlib",
               "pathlib._local"}

    def find_class(self, module: str, name: str) -> type:
        if module in self.modules and name in self.names:
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
