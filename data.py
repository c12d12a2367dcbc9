"""Labelled images: layouts of data sets, groups, splits, images for training and validation.

    for example in examples("livecell"):       # .name, .files, .image(), .labels() (H, W) int32
    held = hold_out(examples("cells"), share=0.1, seed=0)
    train, validation = training_images(config.data, seed)

    python data.py convert SRC DST             any layout -> NAME.tif, NAME_masks.tif and, if cells
                                               have classes, NAME_types.csv; resumes
    python data.py split SRC by=donor fractions=0.6,0.2,0.2 [out=DIR]
                                               SRC/split.tsv; with out= DIR/split.tsv, and images
                                               converted in DIR/train, DIR/validation, DIR/test
    python data.py planes SRC DST [every=4]    stacks NAME.tif (Z, Y, X) with NAME_labels.tif ->
                                               every fourth plane with three cells or more
    python data.py check DIR [DIR ...]         counts and problems; exit code 1 with problems

Layouts. A folder and all below it, except hidden and linked ones, are read by their content:

    pairs      X.tif or X_img.tif with the first of X_masks, X_mask, X_cp_masks, X_seg, X_labels,
               X_label, X_cells, X_nuclei (.tif .png .npy; X_seg.npy as Cellpose writes it) and
               X.geojson (QuPath); labels=nuclei takes others. And images/X.tif with labels/X.tif
               or masks/.
    tiles      pairs named alike but for ..b0c0.. and ..b0c1..: one image of channels DAPI and
               marker; labels have either name. Tiles that lack a channel of others are left out.
    nuclei     ID/images with one image, ID/masks with a mask for each nucleus (DSB 2018)
    arrays     imgs.npy (N, H, W[, C]) and anns.npy (N, H, W), memory-mapped
    COCO       NAME.json with polygons or RLE (LIVECell). Images are found by file name: below the
               folder given; for a .json below its folder, or the one that has annotations/. An
               image listed again: X_copy2.
    tracking   01/t000.tif with 01_GT/SEG/man_seg000.tif (Cell Tracking Challenge): frames with
               labels; 01_ST where there is no 01_GT, or with labels=ST

Classes of cells, where there are some: X_types.csv, X_classes.csv or X_cells.csv (columns id, and
type or class), X_types.png (a number per pixel), QuPath's classification, COCO's categories.

A name is the path below the folder given, without suffix, images/ and _img. Where outlines overlap
the smaller cell lies on top. A polygon has the pixels whose centre lies inside by the even-odd
rule: outlines of cells.polygons come back exactly.
"""
from __future__ import annotations

import glob
import json
import math
import pickle
import re
import sys
import time
import tokenize
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal, NamedTuple

import numpy as np
import tifffile

import runs
from images import (
    BYPRODUCTS,
    LABEL_ENDS,
    NPY,
    PNG_JPEG,
    TIFF,
    Channels,
    Image,
    Source,
    check_label_image,
    image_decoding,
    layout_folders,
    list_files,
    natural_order,
    normalise,
    open_image,
    percentiles,
    read_image,
    read_labels,
    source_of_arrays,
    to_rgb,
    write_image,
    write_labels,
)

with runs.lazy():
    import tqdm

    import synthetic

# ---------------------------------------------------------------------------------- labelled images

IMAGES, LABELS = TIFF + PNG_JPEG + NPY, (*TIFF, ".png", *NPY, ".geojson")  # .jpg would blur ids
OME = re.compile(r"(?i)\.ome$")                                               # infer.py keeps it
TILE = re.compile(r"(?i)(?<![0-9a-f])((?:s\d+)?b\d+)c(\d+)(?![0-9a-f])")      # not in a hash


@dataclass(frozen=True)
class Example:
    name: str                                       # unique in its set
    files: tuple[Path, ...]                         # the image first
    image: Callable[[], Image]
    labels: Callable[[], np.ndarray]                # (H, W) int32
    types: Callable[[], dict[int, str]] = dict      # class of each cell that has one


class Choice(NamedTuple):
    channels: Channels                              # of the images
    labels: str | None                              # such as nuclei or st; None: the first


def examples(path: str | Path, channels: Channels = None, match: str | None = None,
             labels: str | None = None) -> list[Example]:
    """Labelled images of a folder or a COCO .json, in natural order of their names.

    match : regular expression that is found in names; labels : which, where an image has several.
    """
    path, choice = Path(path), Choice(channels, labels and labels.lower())
    if path.is_dir():
        found = [example for folder, files in layout_folders(path)
                 for read in (_pairs, _arrays, _tracking)
                 for example in read(folder, files, choice)]
        listed = list_files(path, (".json",))
        root = images = path
    elif path.is_file() and path.suffix.lower() == ".json":
        found, listed, root = [], [path], path.with_suffix("")
        above = [parent for parent in path.resolve().parents if parent.name == "annotations"]
        images = above[0].parent if above else path.parent
    else:
        raise FileNotFoundError(f"{path}: no such folder; expected one with labelled images, or a "
                                "COCO .json")
    if listed:
        by_name: dict[str, list[Path]] = defaultdict(list)         # images
        for file in list_files(images, IMAGES):
            by_name[file.name].append(file)
        found += [example for file in listed for example in _coco(file, by_name, choice)]

    found = [replace(example, name=_layout_name(Path(example.name), root)) for example in found]
    for name, count in Counter(example.name for example in found).items():
        if count > 1:
            alike = ", ".join(str(example.files[-1]) for example in found if example.name == name)
            raise ValueError(f"{path}: {count} images with labels are called {name} ({alike}); "
                             "keep one")
    if match is not None:
        pattern = labelled_name_pattern("match", match)
        found = [example for example in found if pattern.search(example.name)]
    if not found:
        named = f" with '{match}' in their names" if match else ""
        raise ValueError(f"{path}: no labelled images{named}; `python data.py --help` lists the "
                         "layouts that are read")
    return sorted(found, key=lambda example: natural_order(example.name))


def _layout_files_in(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return layout_files(next(layout_folders(folder))[1], suffixes) if folder.is_dir() else []


def layout_files(files: list[Path], suffixes: Collection[str]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in suffixes]


def _layout_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.resolve().name


def stem_of(path: Path) -> str:
    return OME.sub("", path.stem)


def file_pair_key(stem: str) -> str:
    """Key that an image shares with its labels and the other channels of its tile."""
    return TILE.sub(r"\1", stem.removesuffix("_img"))


def labelled_name_pattern(key: str, text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key}={text}: not a regular expression, {error}") from None


# ------------------------------------------------------------------------------------------ layouts
# Each reads every folder, _coco every .json. Names are paths here; examples() shortens them.

def _pairs(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    yield from _layout_of_matches(folder, layout_files(files, IMAGES), layout_files(files, LABELS),
                                  choice, apart=False)
    images = _layout_files_in(folder / "images", IMAGES)
    for name in ("labels", "masks") if images else ():
        labels = _layout_files_in(folder / name, LABELS)
        pairs = list(_layout_of_matches(folder, images, labels, choice, apart=True))
        if name == "masks" and labels and len(images) == 1 and not pairs:  # a mask for each nucleus
            yield Example(str(folder), (*images, *labels),
                          partial(read_image, images[0], choice.channels),
                          partial(read_masks, labels))
        yield from pairs


def _layout_of_matches(folder: Path, images: list[Path], labels: list[Path], choice: Choice,
                       apart: bool) -> Iterator[Example]:
    """Images with their labels; apart: in another folder, where names may be the same."""
    shots: dict[str, list[Path]] = defaultdict(list)
    ranked: dict[str, list[tuple[int, Path]]] = defaultdict(list)  # labels of each image
    for file in images:
        shots[file_pair_key(stem_of(file))].append(file)
    for file in labels:
        stem = stem_of(file)
        for rank, end in enumerate((*LABEL_ENDS, "")):
            key = file_pair_key(OME.sub("", stem.removesuffix(end)))
            if stem.endswith(end) and (end or apart or file.suffix.lower() == ".geojson") \
                    and file not in shots.get(key, [file]) and choice.labels in (None, end[1:]):
                ranked[key].append((rank, file))
                break
    # a_cells beside a_cells_masks is an image, not labels of a
    labelled = {file for key in ranked for file in shots[key]}
    number = {file: int(found[2]) for file in images if (found := TILE.search(stem_of(file)))}
    for key, candidates in ranked.items():
        left = [(rank, file) for rank, file in candidates if file not in labelled]
        truth = [file for rank, file in left if rank == min(left)[0]]
        if not truth:
            continue
        shot = sorted(shots[key], key=lambda file: number.get(file, 0))
        numbers = sorted({number[file] for file in shot if file in number})
        if len(truth) > 1 or len(shot) != max(1, len(numbers)):
            names = ", ".join(file.name for file in (*shot, *truth))
            raise ValueError(f"{folder}: which belong together of {names}? Keep one image and its "
                             "labels")
        if numbers and len(numbers) < len(set(number.values())):
            continue                                               # a tile without its marker
        image = partial(read_image, shot[0], choice.channels) if len(shot) == 1 else \
            partial(_layout_joined_image, shot, numbers, choice.channels)
        yield Example(str(folder / stem_of(shot[0]).removesuffix("_img")), (*shot, *truth), image,
                      partial(_labels, truth[0], shot[0], choice.channels),
                      partial(_labelled_types, truth[0], shot[0]))


def _labels(path: Path, image: Path, channels: Channels) -> np.ndarray:
    """(H, W) int32 from a label file of any kind."""
    if path.suffix.lower() == ".geojson":
        return read_geojson(path, _labelled_shape(image, channels))
    return read_seg(path) if path.name.lower().endswith("_seg.npy") else read_labels(path)


def _labelled_shape(image: Path, channels: Channels) -> tuple[int, int]:
    with open_image(image, channels) as source:
        return source.shape[1:]


def _layout_joined_image(paths: list[Path], numbers: list[int], channels: Channels) -> Image:
    """One image of channels in files of their own."""
    parts = [read_image(path) for path in paths]
    first = parts[0].pixels
    for path, part in zip(paths, parts):
        if part.pixels.shape != (1, *first.shape[1:]) or part.pixels.dtype != first.dtype:
            raise ValueError(f"{path}: {part.pixels.dtype} of {part.pixels.shape}, but "
                             f"{paths[0].name} has {first.dtype} of {first.shape}; expected one "
                             "channel of the same size in each")
    names = [{0: "DAPI", 1: "marker"}.get(number, f"c{number}") for number in numbers]
    joined = source_of_arrays([part.pixels for part in parts], "CYX", names=names,
                              pixel_size=parts[0].pixel_size)
    return Source(paths[0], channels, **joined).whole()


def _arrays(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    paths = folder / "imgs.npy", folder / "anns.npy"
    if set(paths) <= set(files):
        images, labels = (_layout_array(path).shape for path in paths)
        if len(labels) != 3 or len(images) not in (3, 4) or images[:3] != labels:
            raise ValueError(f"{folder}: imgs.npy of {images}, anns.npy of {labels}, expected "
                             "(N, H, W[, C]) and (N, H, W)")
        for i in range(labels[0]):
            yield Example(str(folder / f"{i:04d}"), paths,
                          partial(_array_image, paths[0], i, choice.channels),
                          partial(_array_labels, paths[1], i))


def _layout_array(path: Path) -> np.ndarray:
    with image_decoding(path):
        return np.load(path, mmap_mode="r")                        # refuses pickled objects


def _array_image(path: Path, i: int, channels: Channels) -> Image:
    pixels = _layout_array(path)[i]
    return Source(path, channels, **source_of_arrays([pixels], "YXC"[:pixels.ndim])).whole()


def _array_labels(path: Path, i: int) -> np.ndarray:
    labels = _layout_array(path)[i]
    check_label_image(labels, f"{path}, number {i}", LARGEST)
    return labels.astype(np.int32)


def _tracking(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    kinds = {None: ("GT", "ST"), "gt": ("GT",), "st": ("ST",)}.get(choice.labels, ())
    for sequence in sorted(below for below in folder.glob("[0-9][0-9]") if below.is_dir()):
        truths = [_layout_files_in(folder / f"{sequence.name}_{kind}" / "SEG", TIFF)
                  for kind in kinds]
        for path in next(filter(None, truths), []):
            frame = re.fullmatch(r"man_seg_?(\d+)", path.stem)
            if not frame:
                raise ValueError(f"{path}: expected man_segT.tif, T a frame; 3-D slices are not "
                                 "read")
            image = sequence / f"t{frame[1]}{path.suffix}"
            if not image.is_file():
                raise FileNotFoundError(f"{path}: its frame {sequence.name}/{image.name} is "
                                        "missing")
            yield Example(str(sequence / image.stem), (image, path),
                          partial(read_image, image, choice.channels), partial(read_labels, path))


def _coco(path: Path, by_name: dict[str, list[Path]], choice: Choice) -> Iterator[Example]:
    """Names in the JSON are only looked up among files below the folder: they lead nowhere else."""
    listed = read_coco(path)
    names = [PurePosixPath(item.file_name.replace("\\", "/")) for item in listed]
    if missing := sorted({name.name for name in names} - by_name.keys()):
        raise FileNotFoundError(f"{path}: {len(missing)} of its images are missing, such as "
                                f"{', '.join(missing[:3])}; put them below the folder given")
    seen: Counter[Path] = Counter()
    for item, name in zip(listed, names):
        alike = by_name[name.name]
        images = [file for file in alike if file.parts[-len(name.parts):] == name.parts] or alike
        if len(images) > 1:
            raise ValueError(f"{path}: {name} may be {images[0]} or {images[1]}; keep one")
        image, = images
        seen[image] += 1
        again = f"_copy{seen[image]}" if seen[image] > 1 else ""
        yield Example(str(path.with_suffix("") / (stem_of(image) + again)), (image, path),
                      partial(read_image, image, choice.channels),
                      partial(coco_labels, item, image, choice.channels),
                      partial(numbered_types, item.types))


def unread(root: Path, found: list[Example]) -> list[str]:
    """Problems: images and labels below root without a partner, but for frames of tracking and
    the masks of a movie that infer.py writes."""
    used = {file for example in found for file in example.files}
    keys = {file.with_name(file_pair_key(stem_of(file))) for file in used}
    lonely = []
    for folder, files in layout_folders(root):
        if any(re.fullmatch(r"\d\d(_.*)?", at.name)
               and any(at.parent.glob(f"{at.name[:2]}_[GS]T/SEG"))
               for at in (folder, *folder.parents)) or (
                   folder.name == "01_RES" and folder.parent.name.endswith("_ctc")):
            continue
        for file in layout_files(files, {*IMAGES, ".geojson"}):
            ends = [end for end in LABEL_ENDS if stem_of(file).endswith(end)]
            other = any(folder / file_pair_key(stem_of(file).removesuffix(end)) in keys
                        for end in ends or [""] * (file.suffix == ".geojson"))
            if file not in used and not other and not stem_of(file).endswith(BYPRODUCTS):
                kind = ("a tile that lacks a channel or labels" if TILE.search(file.stem)
                        else "labels without image" if ends or file.suffix == ".geojson"
                        else "an image without labels")
                lonely.append(f"{file}: {kind}")
    return lonely


# ------------------------------------------------------------------- label images of other programs

LARGEST = np.iinfo(np.int32).max
EXPORT_AGAIN = "truncated? export it again"
OBJECTS = {"PathCellObject": "cell", "PathDetectionObject": "detection"}      # of QuPath 0.2


def labels_from_pixels(shape: tuple[int, int], cells: Sequence[np.ndarray]) -> np.ndarray:
    """(H, W) int32 of cells given as flat indices."""
    labels = np.zeros(math.prod(shape), np.int32)
    for i in sorted(range(len(cells)), key=lambda i: -len(cells[i])):
        labels[cells[i]] = i + 1
    if lost := len(cells) - len(np.unique(labels[labels > 0])):
        warnings.warn(f"{lost} of {len(cells)} cells have no pixel of their own: smaller than one, "
                      "or covered by others", stacklevel=2)
    return labels.reshape(shape)


def coco_ranges(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0] + 1, ... of length[0], then start[1], ..."""
    return np.repeat(start - (np.cumsum(length) - length), length) + np.arange(length.sum())


def polygon_pixels(rings: Sequence[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Flat indices of pixels with their centre in an odd number of rings, (K, 2) x y in px."""
    H, W = shape
    a = np.concatenate(rings)                                      # (E, 2), sides from a to b
    b = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    down = (a[:, 1] < b[:, 1])[:, None]                            # so that neighbours round alike
    (x0, y0), (x1, y1) = np.where(down, a, b).T, np.where(down, b, a).T
    first, last = (np.ceil(y - 0.5).clip(0, H).astype(np.int64) for y in (y0, y1))
    side = np.repeat(np.arange(len(a)), last - first)              # once for each row it crosses
    row = coco_ranges(first, last - first)
    x = x0[side] + (row + 0.5 - y0[side]) * ((x1 - x0)[side] / (y1 - y0)[side])
    column = np.ceil(x - 0.5).clip(0, W).astype(np.int64)          # the first on the right
    order = np.lexsort((column, row))                              # in each row: in, out, in, out
    start, end = (row * W + column)[order].reshape(-1, 2).T
    return coco_ranges(start, end - start)


def polygon_cell_pixels(parts: Sequence[Sequence[np.ndarray]], shape: tuple[int, int],
                        where: str) -> np.ndarray:
    """Flat indices of a cell of polygons, each an outer ring and its holes."""
    points = np.concatenate([np.zeros((0, 2)), *(ring for part in parts for ring in part)])
    if not (np.abs(points) < LARGEST).all():                       # NaN too
        raise ValueError(f"{where}: a coordinate that is no pixel, NaN or beyond {LARGEST}")
    if len(points) and ((points.min(0) >= shape[::-1]).any() or (points.max(0) <= 0).any()):
        raise ValueError(f"{where}: at x {points[0, 0]:g}, y {points[0, 1]:g}, outside of the "
                         f"image of {shape[0]} x {shape[1]} px; was it drawn at another scale?")
    pixels = [np.zeros(0, np.int64), *(polygon_pixels(part, shape) for part in parts if part)]
    return pixels[1] if len(pixels) == 2 else np.unique(np.concatenate(pixels))


def rle_pixels(rle: dict, shape: tuple[int, int], where: str) -> np.ndarray:
    """Flat indices of a COCO mask: runs down the columns, background first; a list or text."""
    counts, (H, W) = rle.get("counts"), shape
    counts = unpacked(counts, where) if isinstance(counts, str) else counts
    if rle.get("size") != [H, W] or not isinstance(counts, list) \
            or not all(isinstance(n, int) and n >= 0 for n in counts) or sum(counts) != H * W:
        raise ValueError(f"{where}: an RLE of size {rle.get('size')} whose runs do not fill {H} x "
                         f"{W} px")
    lengths = np.array(counts, np.int64)
    below = coco_ranges((np.cumsum(lengths) - lengths)[1::2], lengths[1::2])
    return below % H * W + below // H


def unpacked(text: str, where: str) -> list[int]:
    """Numbers from COCO's packed RLE: groups of 5 bits, lowest first, characters from "0" on.

    Bit 6: more groups follow; bit 5 of the last group: the sign. From the fourth on, numbers are
    differences to the last but one.
    """
    numbers: list[int] = []
    number = shift = 0
    for group in (ord(character) - 48 for character in text):
        if not 0 <= group < 64 or shift > 60:
            raise ValueError(f"{where}: not an RLE as COCO packs it, {text[:20]!r}...")
        number, shift = number | (group & 31) << shift, shift + 5
        if not group & 32:
            number -= 1 << shift if group & 16 else 0
            numbers.append(number + (numbers[-2] if len(numbers) > 2 else 0))
            number = shift = 0
    return numbers


# --------------------------------------------------------------------------------------------- COCO

class Listed(NamedTuple):
    """An image of a COCO file."""
    file_name: str                                  # as written there: not to be trusted
    shape: tuple[int | None, int | None]            # (H, W)
    cells: list[Any]                                # each a list of polygons or RLE
    types: list[str]                                # category of each cell, or ""
    where: str                                      # file and image, for errors


def read_coco(path: Path) -> list[Listed]:
    """Images of a COCO file with their annotations; none for JSON of another kind.

    Every annotation is a cell, iscrowd too, which exporters set on all RLE. Some files of LIVECell
    have annotations in a dictionary, and images twice under two ids, for two annotators.
    """
    parsed = runs.read_json(path, EXPORT_AGAIN, _annotation)
    if not isinstance(parsed, dict) or not {"images", "annotations"} <= parsed.keys():
        return []
    images, annotations = parsed["images"], parsed["annotations"]
    annotations = list(annotations.values()) if isinstance(annotations, dict) else annotations
    if not isinstance(images, list) or not isinstance(annotations, list) or not all(
            isinstance(e, dict) and isinstance(e.get("file_name"), str) and "id" in e
            for e in images):
        raise ValueError(f"{path}: expected COCO's lists of images (id, file_name) and annotations")
    categories = parsed.get("categories")
    names = {coco_class(category.get("id")): str(category.get("name"))
             for category in (categories if isinstance(categories, list) else [])
             if isinstance(category, dict)}
    cells, types = defaultdict(list), defaultdict(list)
    for entry in annotations:
        if not isinstance(entry, tuple):
            raise ValueError(f"{path}: an annotation without image_id or segmentation: "
                             f"{str(entry)[:60]}")
        cells[entry[0]].append(entry[1])
        types[entry[0]].append(names.get(coco_class(entry[2]), ""))
    if strangers := cells.keys() - {str(image["id"]) for image in images}:
        raise ValueError(f"{path}: annotations of image_id {min(strangers)}, which is not among "
                         "its images")
    return [Listed(image["file_name"], (image.get("height"), image.get("width")),
                   cells[str(image["id"])], types[str(image["id"])],
                   f"{path}: {image['file_name']}") for image in images]


def coco_class(number: Any) -> str:
    """A category's id as text; pandas writes 1 as 1.0 where another is missing."""
    return str(int(number) if isinstance(number, float) and number.is_integer() else number)


def coco_labels(listed: Listed, image: Path, channels: Channels) -> np.ndarray:
    """(H, W) int32 of the cells of an image."""
    shape = _labelled_shape(image, channels)
    if listed.shape not in ((None, None), shape):
        raise ValueError(f"{listed.where} is {listed.shape} px there, but the image has {shape}")
    pixels = []
    for i, cell in enumerate(listed.cells, 1):
        where = f"{listed.where}, cell {i}"
        if isinstance(cell, dict):
            pixels.append(rle_pixels(cell, shape, where))
        elif isinstance(cell, list) and all(ring.ndim == 1 and ring.size % 2 == 0 for ring in cell):
            pixels.append(polygon_cell_pixels([[ring.reshape(-1, 2)] for ring in cell], shape,
                                              where))
        else:
            raise ValueError(f"{where}: expected polygons [x, y, x, y, ...] or RLE with counts and "
                             "size")
    return labels_from_pixels(shape, pixels)


def _annotation(entry: dict) -> Any:
    """(image id, segmentation, category) in arrays: lists would fill the memory."""
    if not {"image_id", "segmentation"} <= entry.keys():
        return entry
    cell = entry["segmentation"]
    cell = [np.array(ring, np.float64) for ring in cell] if isinstance(cell, list) else cell
    return str(entry["image_id"]), cell, entry.get("category_id")


# -------------------------------------------------------------------------- GeoJSON, masks in files

def read_geojson(path: Path, shape: tuple[int, int]) -> np.ndarray:
    """(H, W) int32 of QuPath's objects."""
    pixels = []
    for i, feature in enumerate(_geojson_cells(path), 1):
        where, geometry = f"{path}: object {i}", _geojson_part(feature, "geometry")
        kind = geometry.get("type")
        parts: Any = geometry.get("coordinates")
        if kind not in ("Polygon", "MultiPolygon"):
            raise ValueError(f"{where} is a {kind}, expected Polygon or MultiPolygon; delete it")
        try:                                                       # a third number is a height
            parts = [[np.array(ring, np.float64)[:, :2] for ring in part]
                     for part in (parts if kind == "MultiPolygon" else [parts])]
        except (TypeError, ValueError, IndexError):
            raise ValueError(f"{where} has coordinates that are no rings of [x, y]") from None
        pixels.append(polygon_cell_pixels(parts, shape, where))
    return labels_from_pixels(shape, pixels)


def _geojson_cells(path: Path) -> list[dict]:
    """QuPath's objects; with cells or detections, annotations are only regions."""
    parsed = runs.read_json(path, EXPORT_AGAIN)
    given = parsed.get("features", [parsed]) if isinstance(parsed, dict) else parsed
    features: list[dict] = []
    for feature in given if isinstance(given, list) else [None]:
        if not isinstance(feature, dict):
            raise ValueError(f"{path}: expected GeoJSON features, as QuPath exports them")
        features += [feature, *_geojson_below(feature)]
    kinds = [_geojson_part(feature, "properties").get("objectType")
             or OBJECTS.get(str(feature.get("id"))) for feature in features]
    return [feature for feature, kind in zip(features, kinds)
            if kind in ("cell", "detection")] or features


def _geojson_below(feature: dict) -> Iterator[dict]:
    """Objects inside an object, where they were not exported one by one; in a cell they are spots.
    """
    if _geojson_part(feature, "properties").get("objectType") == "cell":
        return
    below = _geojson_part(feature, "properties").get("childObjects")
    for child in below if isinstance(below, list) else ():
        if isinstance(child, dict):
            yield from (child, *_geojson_below(child))


def _geojson_class(feature: dict) -> str:
    """QuPath's class of an object: a name, or several as in Tumor: Positive."""
    given = _geojson_part(feature, "properties").get("classification")
    if not isinstance(given, dict):
        return str(given or "")
    names = given.get("names")
    return ": ".join(map(str, names)) if isinstance(names, list) else str(given.get("name") or "")


def _geojson_part(feature: dict, key: str) -> dict:
    """A part of a feature; {} where it is missing or something else."""
    part = feature.get(key)
    return part if isinstance(part, dict) else {}


def read_masks(paths: Sequence[Path]) -> np.ndarray:
    """(H, W) int32 of masks, not 0 in the cell, in a file for each cell."""
    cells: list[np.ndarray] = []
    shape: Any = None
    for path in paths:
        pixels = read_image(path).pixels                           # (C, H, W)
        if len(paths) == 1 and (several := len(np.unique(pixels[0][pixels[0] > 0]))) > 1:
            raise ValueError(f"{path}: {several} values, expected a mask of one cell; labels of "
                             "many are named as their image")
        mask = pixels.any(axis=0)                                  # (H, W)
        if shape not in (None, mask.shape):
            raise ValueError(f"{path}: a mask of {mask.shape} px, but {paths[0].name} has {shape}")
        shape = mask.shape
        cells.append(np.flatnonzero(mask))
    return labels_from_pixels(shape, cells)


# ------------------------------------------------------------------------------- classes of cells

def _labelled_types(labels: Path, image: Path) -> dict[int, str]:
    """Class of each cell that has one: of GeoJSON, a table or a picture beside labels or image."""
    if labels.suffix.lower() == ".geojson" and (
            types := numbered_types([*map(_geojson_class, _geojson_cells(labels))])):
        return types
    for path in type_files(labels, image):
        if path.suffix == ".png":
            return {i: str(number) for i, number in majority_class(
                _labels(labels, image, None), read_labels(path), path).items() if number}
        if types := read_types(path, labels, image):
            return types
    return {}


def type_files(labels: Path, image: Path) -> list[Path]:
    """What may tell classes beside the image and its labels, the first first."""
    name = stem_of(image).removesuffix("_img")
    files = [folder / (name + end) for folder in (image.parent, labels.parent)
             for end in ("_types.csv", "_classes.csv", "_cells.csv", "_types.png")]
    return [path for path in files if path.is_file()]


class OtherLabels(ValueError):
    """A table X_cells.csv is of other labels of X."""


def numbered_types(names: Sequence[Any]) -> dict[int, str]:
    """{number of the cell, from 1: its class}, without cells that have none."""
    return {i: str(name) for i, name in enumerate(names, 1) if name}


def read_types(path: Path, labels: Path, image: Path) -> dict[int, str]:
    """Classes of a CSV with the columns id, and type or class; empty: no type is known."""
    rows = runs.read_table(path, ["id"])
    column = next((name for name in ("type", "class") if rows and name in rows[0]), None)
    if column is None:
        return {}
    if wrong := [row["id"] for row in rows if not row["id"].isdigit()]:
        raise ValueError(f"{path}: id '{wrong[0]}', expected the whole numbers of {labels.name}")
    known = [(int(row["id"]), row[column]) for row in rows if row[column]]
    types = dict(known)
    if twice := [cell for cell, name in known if name != types[cell]]:
        raise ValueError(f"{path}: two types for cell {twice[0]}; expected one")
    ids = np.unique(_labels(labels, image, None))
    if strangers := sorted(types.keys() - set(ids.tolist())):
        kind = OtherLabels if path.name.endswith("_cells.csv") else ValueError
        raise kind(f"{path}: a type for cell {strangers[0]}, which is not in {labels.name}")
    return types


def majority_class(labels: np.ndarray, classes: np.ndarray, where: Path) -> dict[int, int]:
    """The class (H, W) that most pixels of each cell have; 0 where none has one."""
    if labels.shape != classes.shape:
        raise ValueError(f"{where}: {classes.shape} px, but the labels have {labels.shape}")
    ids, index = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(ids), int(classes.max()) + 1), np.int64)
    np.add.at(votes, (index.ravel(), classes.ravel()), 1)
    if classes.any() and not votes[ids > 0, 1:].any():
        raise ValueError(f"{where}: classes where there is no cell of the labels beside it")
    votes[:, 0] = 0                                            # background is no class
    return {int(i): int(v.argmax()) for i, v in zip(ids, votes) if i}


def training_type_numbers(example: Example, labels: np.ndarray,
                          wanted: dict[str, list[str]]) -> np.ndarray:
    """(n,) of the cells by ascending id: 1 + place of their type in `wanted`, 0 for others."""
    number = {name: i for i, names in enumerate(wanted.values(), 1) for name in names}
    types = example.types()
    return np.array([number.get(types.get(int(i), ""), 0) for i in np.unique(labels[labels > 0])],
                    np.int64)


def training_types(types: dict) -> dict[str, list[str]]:
    """{type: its classes in the sets} of a configuration, with texts for numbers."""
    wanted = {str(name): list(map(str, given if isinstance(given, (list, tuple)) else [given]))
              for name, given in types.items()}
    listed = [one for names in wanted.values() for one in names]
    if twice := [one for one in listed if listed.count(one) > 1]:
        raise ValueError(f"types: class '{twice[0]}' is listed twice; expected each once")
    if len(wanted) == 1:
        raise ValueError(f"types: {listed[0]} alone; expected two types or more")
    return wanted


def check_training_types(types: dict[str, np.ndarray | None], wanted: dict[str, list[str]],
                         trained: Collection[str]) -> None:
    """Refuse a type without cells, or with cells in one image alone, or in none that is trained on;
    types: those of each image."""
    for i, (name, classes) in enumerate(wanted.items(), 1):
        images = [image for image, numbers in types.items() if np.any(numbers == i)]
        if not images:
            raise ValueError(f"types: no cell is '{name}' ({', '.join(classes)}) in the "
                             f"{len(types)} images; check the class, or leave the type out")
        if len(images) == 1 and len(types) > 1:
            raise ValueError(f"types: all cells of '{name}' are in {images[0]}; to learn and "
                             "validate it takes two images: label another or leave the type out")
        if not set(images) & set(trained):
            raise ValueError(f"types: all cells of '{name}' are in images that are held out "
                             f"({runs.listed(images, 3)}); label another or leave the type out")


# ----------------------------------------------------------------------------------------- Cellpose

def read_seg(path: Path) -> np.ndarray:
    """(H, W) int32 of the masks in Cellpose's _seg.npy, a pickled dictionary; runs nothing."""
    headers = {(1, 0): np.lib.format.read_array_header_1_0,
               (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with open(path, "rb") as file:
            pickled = headers[np.lib.format.read_magic(file)](file)[2].hasobject
            if pickled:
                item = _Unpickler(file).load().state[4][0]["masks"]  # an array of one dictionary
                _, shape, kind, fortran, content = item.state
                kind = kind.state[1].replace("|", "") + kind.given[0]            # such as <u2
                if isinstance(content, _Inert):                    # latin-1 text of protocol 2
                    content = content.given[0].encode("latin-1")
                if not re.fullmatch("[<>]?[iuf][1248]", kind):
                    raise ValueError(f"masks of {kind}")
                labels = np.frombuffer(content, kind).reshape(shape, order="F" if fortran else "C")
    except (pickle.UnpicklingError, EOFError, MemoryError, ValueError, TypeError, AttributeError,
            LookupError, OverflowError, SyntaxError, tokenize.TokenError) as error:
        raise ValueError(f"{path}: no _seg.npy with masks as Cellpose writes it ({error}); nothing "
                         "in it was run; save the masks as TIFF") from None
    if not pickled:
        return read_labels(path)
    check_label_image(labels, path, LARGEST)
    return labels.astype(np.int32)


class _Inert:
    """Stands for every object of a pickle: keeps its arguments and does nothing."""

    def __init__(self, *given: Any):
        self.given = given

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Runs nothing: the names in Cellpose's files become _Inert, any other is refused."""

    names = {"_reconstruct", "scalar", "ndarray", "dtype", "encode", "PosixPath", "WindowsPath"}
    modules = {"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs", "pathlib",
               "pathlib._local"}

    def find_class(self, module: str, name: str) -> type:
        if module in self.modules and name in self.names:
            return _Inert
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


# -------------------------------------------------------------------------------- groups and splits

DONOR = r"(?i)(?<![^\W\d_])(?:donor|patient|subject|case)(?:[-_ ]|(?=\d))([^\W_]+)"
NO_DONOR = ("control", "controls", "data", "image", "images", "report", "series", "study")
MOMENT = re.compile(r"(?i)[-_. ]?\d+d\d+h\d+m.*")      # 01d04h00m_2 of LIVECell: time, quarter
FRAME = re.compile(r"(?i)(?<![a-z0-9])(?:t|tp|time|frame|copy|crop|z|slice|plane|w|ch|channel)"
                   r"[-_]?\d+(?=xy|[^a-z0-9]|$)")
FIELD = re.compile(r"(?i)(?<![a-z0-9])(r\d+c\d+|[a-p]\d\d?)"          # of a well
                   r"(?:[-_]?(?:s|f|site|field|pos)[-_]?|[-_])\d+(?:[pd]\d+)?(?![a-z0-9])")


def group_of(name: str) -> str:
    """Name of the time-lapse, stack, well, slide or image copied, which must stay on one side.

    trpL_t09 -> trpL, 01/t012 -> 01, A172_Phase_C7_1_00d04h00m_2 -> A172_Phase_C7, nf1_F7_2 ->
    nf1_F7, jump_r01c01f03 -> jump_r01c01, slide3_b0c0x0 -> slide3, hela_copy007 -> hela. Bare
    numbers and hashes stay: set46 and set47 of Usiigaci are unrelated.
    """
    tile = TILE.search(name)
    name = name[:tile.start()] if tile else name
    name = FIELD.sub(r"\1", FRAME.sub("", MOMENT.sub("", name)))
    return re.sub(r"([-_. ])[-_. ]+", r"\1", name).rstrip("-_. /")


def donor_of(name: str, pattern: str | None = None, key: str = "pattern") -> str:
    """Match of the group in `pattern`; by default what follows donor, patient, subject or case.

    key : how the script calls the pattern.
    """
    expression = labelled_name_pattern(key, pattern or DONOR)
    matches = [match[1] for match in expression.finditer(name)] if expression.groups == 1 else []
    found = set(filter(None, matches[:1] if pattern else matches))
    if len(found) > 1:                                          # case_control/donor_7
        found = {one for one in found if one.lower() not in NO_DONOR} or found
    if len(found) != 1:
        problem = f"donors {' and '.join(sorted(found))}" if found else "no donor"
        raise ValueError(f"{problem} in the name {name}; give {key}=REGEX with one group around "
                         "it, such as '^([^_]+)_' for 1234_tile7")
    return found.pop()


def hold_out(examples: list[Example], share: float, seed: int) -> list[Example]:
    """Whole groups (group_of) of about this share of the images, at least one, never all.

    Of a single group the last images are held out: neighbours in time meet only there.
    """
    if share <= 0 or len(examples) < 2:
        return []
    sizes = Counter(group_of(example.name) for example in examples)
    if len(sizes) == 1:
        return examples[-min(max(1, round(share * len(examples))), len(examples) - 1):]
    sides = _split_sides({group: ("", size) for group, size in sizes.items()}, (1 - share, share),
                         seed)
    return [example for example in examples if sides[group_of(example.name)] == 1]


def _split_sides(groups: dict[str, tuple[Any, int]], fractions: Sequence[float],
                 seed: int) -> dict[str, int]:
    """Side of each group {name: (stratum, images)}, none empty: large ones first, to that which
    lacks most."""
    totals: Counter[Any] = Counter()
    for stratum, size in groups.values():
        totals[stratum] += size
    sides: dict[str, int] = {}
    missing = np.zeros(len(fractions))                             # images
    order = {group: (stratum, -size, runs.digest(f"{seed}/{group}"))
             for group, (stratum, size) in groups.items()}
    for group in sorted(groups, key=order.__getitem__):
        stratum, size = groups[group]
        missing += np.multiply(fractions, totals.pop(stratum, 0))  # with its first group
        empty = [side for side in range(len(fractions)) if side not in sides.values()]
        free = empty if len(groups) - len(sides) <= len(empty) else range(len(fractions))
        sides[group] = max(free, key=lambda side: missing[side])
        missing[sides[group]] -= size
    return sides


# ----------------------------------------------------------------- what is trained and validated on

def network_input(example: Example) -> np.ndarray:
    """(3, H, W) float32, a labelled image as the network sees it in training."""
    pixels = example.image().pixels
    try:
        return to_rgb(normalise(pixels, percentiles(pixels)))
    except ValueError as error:                                    # too many channels
        raise ValueError(f"{example.files[0]}: {error}") from None


@dataclass(frozen=True)
class TrainingSet:
    path: str                               # folder or COCO .json in data.root; `- folder` will do
    channels: tuple[str, ...] | None = None  # numbers from 1 or names; null: as to_rgb takes them
    match: str | None = None                # regular expression that is found in names of images
    labels: str | None = None               # which, where an image has several: cells, nuclei
    weight: runs.Positive = 1.0             # how often images are drawn, relative to other sets

    @property
    def name(self) -> str:
        """Its path, with the keys that choose images of it."""
        return " ".join([self.path, *(self.channels or ()),
                         *filter(None, (self.match, self.labels))])


@dataclass(frozen=True)
class TrainingData:
    sets: tuple[TrainingSet, ...] = ()      # labelled sets, drawn equally often but for weights
    root: str = "."                         # folder of the sets; may change for a resumed run
    validation: tuple[TrainingSet, ...] = ()  # sets; empty: a share of each set is held out
    share: runs.Part = 0.1                  # held out, in whole groups
    channels: tuple[str, ...] | None = None  # of sets that choose none
    limit: runs.Count | None = None         # images of each set, by lot; 20 include those of 10
    diameter: runs.Positive | None = None   # px, scale median cells to it; null: as they are
    # of images in memory; those beyond are read from a file; null: half of what is free
    memory_gb: runs.Positive | None = None
    # types to tell: {name: [its classes in the sets]}, cells of others are of unknown type
    types: dict = field(default_factory=dict)
    fields: runs.Whole = 0                  # synthetic fields in addition, a tenth to validate on
    # two of them a field
    field_channels: tuple[str, ...] = ("AGP", "ER", "RNA", "Brightfield", "HighZBF", "LowZBF")
    field_size: int = 384                   # px, their side
    field_cells: int = 40                   # cells in the fullest field, a tenth in the emptiest
    field_diameter: float = 56.0            # px, of their cells

    def __post_init__(self):
        if not self.sets and not self.fields:
            raise ValueError("no data: give data.sets (folders of images and labels) or "
                             "data.fields (synthetic fields)")
        if len({s.name for s in self.sets}) < len(self.sets):
            raise ValueError("data.sets names a set twice; give it once, with a weight")
        known = set(self.field_channels) & set(synthetic.CHANNELS)
        if len(known) < max(2, len(self.field_channels)):
            raise ValueError(f"data.field_channels={list(self.field_channels)}: expected two or "
                             f"more of {', '.join(synthetic.CHANNELS)}")
        training_types(self.types)


FEW = 8         # images: sets with fewer held out choose thresholds on training images, too


class Labelled(NamedTuple):
    """A labelled image as the network sees it."""
    name: str
    pixels: np.ndarray                      # (3, H, W) in [0, 1]
    labels: np.ndarray                      # (H, W) integers
    set: str = ""                           # name of its set
    zoom: float = 1.0                       # px of the network for each px
    held: bool = True                       # false: trained on, validates settings alone
    # (n,) of the cells by ascending id: number of their type from 1, 0 unknown; None: no types
    types: np.ndarray | None = None


Pending = Callable[[], Sequence[Labelled]]   # reads or draws images


def training_images(config: TrainingData, seed: int) -> tuple[list[Pending], list[Labelled]]:
    """Images to train on, which may be more than fit into memory, and images to validate on.

    Two images are too few to tune on: sets with few held out are filled up with training images,
    `held` false, which choose thresholds but count in no score.
    """
    train: list[Pending] = []
    validation: list[Labelled] = []
    wanted = training_types(config.types)

    def read(found: list[Example], chosen: TrainingSet) -> list[Labelled]:
        return [read_labelled(example, chosen.name, wanted) for example in found]

    for chosen in config.sets:
        kept, held = split_training_examples(training_examples(config, chosen), config, seed)
        train += [partial(read, [example], chosen) for example in kept]
        validation += read(held, chosen)
        if held:
            lot = np.random.default_rng(0).permutation(len(kept))[:max(0, FEW - len(held))]
            validation += [image._replace(held=False)
                           for image in read([kept[i] for i in lot], chosen)]
    for chosen in config.validation:
        validation += read(training_examples(config, chosen), chosen)
    drawn = [partial(drawn_training_images, config, seed, i) for i in range(config.fields)]
    held_fields = 0 if config.validation else max(1, round(0.1 * config.fields))
    for draw in drawn[:held_fields]:
        validation += draw()
    train += drawn[held_fields:]
    if not validation and config.share and len(train) == 1:
        validation = list(train[0]())                              # augment.py says so
    if config.diameter:
        validation = [image._replace(zoom=config.diameter / diameter)
                      if (diameter := median_diameter(image.labels)) else image
                      for image in validation]
    counts = {image.name: int(image.labels.max()) for image in validation}
    check_cells("data.validation", counts)
    held = {image.name: counts[image.name] for image in validation if image.held}
    check_cells("data.validation, or what is held out of data to compare by", held)
    if not validation:
        raise ValueError("no validation images; give data.validation or a larger data.share")
    return train, validation


def check_cells(key: str, cells: dict[str, int]) -> None:
    """Refuse images (name: cells) without any."""
    if cells and not any(cells.values()):
        raise ValueError(f"{key}: no cell in {len(cells)} labelled images "
                         f"({runs.listed(list(cells), 3)}); are the labels all 0?")


def training_examples(config: TrainingData, chosen: TrainingSet) -> list[Example]:
    return examples(Path(config.root) / chosen.path, chosen.channels or config.channels,
                    chosen.match, chosen.labels)


def split_training_examples(found: list[Example], config: TrainingData, seed: int
                            ) -> tuple[list[Example], list[Example]]:
    """(to train on, held out); held out are the same for every limit and seed."""
    held = [] if config.validation else hold_out(found, config.share, 0)
    names = {example.name for example in held}
    kept = [example for example in found if example.name not in names]
    if config.limit is not None:
        lot = sorted(kept, key=lambda e: runs.digest(f"{seed}/{e.name}"))[:config.limit]
        kept = [example for example in kept if example in lot]
    return kept, held


def read_labelled(example: Example, set_name: str, wanted: dict[str, list[str]]) -> Labelled:
    labels, pixels = example.labels(), network_input(example)
    if labels.shape != pixels.shape[1:]:
        raise ValueError(f"{example.files[0]}: image of {pixels.shape[1:]} px, labels of "
                         f"{labels.shape}")
    return Labelled(f"{set_name}/{example.name}", pixels, labels, set_name,
                    types=training_type_numbers(example, labels, wanted) if wanted else None)


def contents(pixels: np.ndarray, labels: np.ndarray) -> list[str]:
    """Hashes of pixels and, from three cells on, of labels: the same cells in another channel, or
    the same pixels with other labels, are no other image."""
    return [runs.digest(pixels), *([runs.digest(labels)] if labels.max(initial=0) > 2 else [])]


def median_diameter(labels: np.ndarray) -> float:
    """px, of a disc of the median cell's area; 0 without cells."""
    return disc_diameter(np.unique(labels[labels > 0], return_counts=True)[1])


def disc_diameter(areas: np.ndarray) -> float:
    """px, of a disc of the median of these areas; 0 without any."""
    return math.sqrt(4 / math.pi * np.median(areas)) if len(areas) else 0.0


def drawn_training_images(config: TrainingData, seed: int, number: int) -> list[Labelled]:
    """Two channels of a synthetic field, by default of those that show the edges of cells."""
    key = seed * 100003 + number
    count = round(config.field_cells * np.random.default_rng(key).uniform(0.1, 1))
    drawn = synthetic.field(key, config.field_size, count, config.field_diameter)
    unknown = np.zeros(drawn.labels.max(), np.int64) if config.types else None
    found = []
    for name in np.random.default_rng((seed, number)).choice(config.field_channels, 2, False):
        pixels = drawn.pixels[drawn.channels.index(name)][None]
        pixels = to_rgb(normalise(pixels, percentiles(pixels)))
        found.append(Labelled(f"synthetic {number} {name}", pixels, drawn.labels, "synthetic",
                              types=unknown))
    return found


def training_was_augmented(config: TrainingData) -> bool:
    """True for sets of augment.py, whose cells have been moved, turned and scaled already."""
    made = [(Path(config.root) / s.path / "augmented.yaml").is_file() for s in config.sets]
    if any(made) and (not all(made) or config.fields):
        raise ValueError("data.sets: some were written by augment.py and some were not; train on "
                         "one kind")
    return any(made)


# ----------------------------------------------------------------------------------------- commands

@dataclass(frozen=True)
class Config:
    channels: tuple[str, ...] | None = None  # numbers from 1 or names; 2 of a tile: the marker
    match: str | None = None                # regular expression that is found in names of images
    labels: str | None = None               # which, of several: masks, cells, nuclei, GT, ST
    by: Literal["image", "group", "donor"] = "image"     # split: stays together
    fractions: tuple[float, ...] = (0.8, 0.2)            # split: of train, validation[, test]
    stratify: Literal["dataset"] | None = None           # split: each folder in these fractions
    pattern: str | None = None              # split: regular expression, its group the donor
    out: str | None = None                  # split: folder to convert the images to
    seed: runs.Whole = 0                    # split
    every: runs.Count = 4                   # planes: one of so many

    def __post_init__(self):
        total = round(sum(self.fractions), 6)
        if len(self.fractions) not in (2, 3) or min(self.fractions) <= 0 or total != 1:
            raise ValueError(f"fractions={self.fractions}: expected two or three above 0 that add "
                             "up to 1")
        if self.pattern is not None and self.by != "donor":
            raise ValueError(f"pattern={self.pattern}: it finds the donor in a name; give by=donor")


def main(config: Config, paths: list[str]) -> int:
    images = ("channels", "match", "labels")
    keys = {key.name for key in fields(Config)} - {"every"}
    commands: dict[str, tuple[Callable[..., int], str, Collection[str]]] = {
        "convert": (convert, "SRC DST", images), "split": (split, "SRC", keys),
        "planes": (planes, "SRC DST", ("every",)), "check": (check, "DIR ...", images)}
    command = paths.pop(0) if paths else "nothing"
    if command not in commands:
        raise ValueError(f"got {command}, expected {', '.join(commands)}; --help explains them")
    run, expected, used = commands[command]
    if not paths or "..." not in expected and len(paths) != len(expected.split()):
        raise ValueError(f"{command}: got {' '.join(paths) or 'no folder'}, expected {expected}")
    for key in fields(Config):
        if getattr(config, key.name) != key.default and key.name not in used:
            raise ValueError(f"{command} does not use {key.name}=; leave it out")
    return run(config, *paths)


def _examples_in(path: str, config: Config) -> list[Example]:
    return examples(path, config.channels, config.match, config.labels)


def convert(config: Config, source: str, target: str) -> int:
    found = _examples_in(source, config)
    made = _write_labelled(found, source, Path(target), config)
    print(f"{target}: {made} images written, {len(found) - made} were there")
    return 0


def _write_labelled(found: list[Example], source: str, target: Path, config: Config) -> int:
    """Write NAME.tif, NAME_masks.tif and the classes in NAME_types.csv; the image last, so that it
    stands for all."""
    chosen = {name: getattr(config, name) for name in ("channels", "match", "labels")}
    _claim_new_folder(target, source, f"from {Path(source).resolve()} with {chosen}\n")
    _check_written_names(source, found, "", "bytes that are no UTF-8")
    owner: dict[Path, str] = {}
    for example in found:
        for file in _labelled_files(target, example.name):
            if (other := owner.setdefault(file, example.name)) != example.name:
                raise ValueError(f"{source}: {other} and {example.name} would both be written as "
                                 f"{file.name}; rename one of them")
    record, made = target / "converted.tsv", 0
    stamps = read_data_stamps(record, "all images are written anew")
    for name in stamps.keys() - {example.name for example in found}:
        print(f"{target}: {name} removed, it left {source}", file=sys.stderr)
        for file in _labelled_files(target, name):
            file.unlink(missing_ok=True)
        del stamps[name]
    written = time.monotonic()
    try:
        for example in tqdm.tqdm(found, target.name, unit="image", delay=1, leave=False):
            stamp = data_stamp_of(example)
            path, masks, classes = _labelled_files(target, example.name)
            if path.exists() and stamps.get(example.name) == stamp:
                continue
            image, labels = example.image(), example.labels()
            if image.pixels.shape[1:] != labels.shape:
                raise ValueError(f"{example.files[0]}: {image.pixels.shape[1:]} px, labels "
                                 f"{labels.shape}")
            path.parent.mkdir(parents=True, exist_ok=True)
            write_labels(masks, labels, image.pixel_size)
            try:
                types = example.types()
            except OtherLabels as error:
                print(f"{example.name}: without classes of cells; {error}", file=sys.stderr)
                types = {}
            rows = [{"id": i, "type": types[i]} for i in np.unique(labels).tolist() if i in types]
            classes.unlink(missing_ok=True)
            if rows:
                runs.write_table(classes, rows)
            write_image(path, image)
            stamps[example.name] = stamp
            made += 1
            if time.monotonic() - written > NOTED:      # a kill lets nothing else be written
                write_data_stamps(record, stamps)
                written = time.monotonic()
    finally:                                            # of a stop: what is done stays done
        write_data_stamps(record, stamps)
    return made


def _check_written_names(source: str, found: list[Example], signs: str, what: str) -> None:
    """Refuse names that cannot be written: with these signs, or bytes of another encoding."""
    for example in found:
        if re.search(rf"[{signs}\ud800-\udfff]", example.name):
            raise ValueError(f"{source}: {example.name!r} has {what} in its name; rename the file")


NOTED = 5.0         # seconds of converting that a kill may cost


def data_stamp_of(example: Example) -> str:
    """Where the files of a labelled image lie, and their state."""
    files = *example.files, *type_files(example.files[-1], example.files[0])
    return runs.digest(*((file.resolve(), *runs.file_state(file)) for file in files))


def write_data_stamps(record: Path, stamps: dict[str, str]) -> None:
    """Write the stamp of each image; a name is a JSON string, for it may hold a tab or a blank at
    its end."""
    runs.write_table(record, [{"name": json.dumps(name), "stamp": stamp}
                              for name, stamp in stamps.items()], ("name", "stamp"))


def read_data_stamps(record: Path, then: str) -> dict[str, str]:
    """What write_data_stamps() wrote; {} without. then : what follows where it is damaged."""
    if not record.exists():
        return {}
    try:
        return {json.loads(row["name"]): row["stamp"]
                for row in runs.read_table(record, ("name", "stamp"))}
    except ValueError as error:
        raise ValueError(f"{record}: damaged ({error}); remove it, and {then}") from None


def _labelled_files(target: Path, name: str) -> tuple[Path, Path, Path]:
    """Image, labels and classes of its cells, as convert writes them."""
    return (target / f"{name}.tif", target / f"{name}_masks.tif", target / f"{name}_types.csv")


def _claim_new_folder(target: Path, source: str, text: str) -> None:
    """Record how the images of a folder outside of the source are made; it has no others yet."""
    record = target / "converted.txt"
    if target.resolve().is_relative_to(Path(source).resolve()):
        raise ValueError(f"{target}: would be read as data of {source}; choose a folder outside")
    if not record.exists() and target.is_dir() and (strange := list_files(target, IMAGES)):
        raise ValueError(f"{target}: has images of its own, such as {strange[0].name}; choose "
                         "another folder")
    _claim_labelled_folder(record, text)


def _claim_labelled_folder(record: Path, text: str) -> None:
    """Record how the files of a folder are made, so that no other files are mixed in."""
    if record.exists() and record.read_text(encoding="utf-8") != text:
        raise ValueError(f"{record}: written for something else before; choose another folder")
    record.parent.mkdir(parents=True, exist_ok=True)
    runs.write_text(record, text)


def split_unit(name: str, config: Config) -> str:
    if config.by == "image":
        return re.sub(r"_copy\d+$", "", name)
    return donor_of(name, config.pattern) if config.by == "donor" else group_of(name)


def split(config: Config, source: str) -> int:
    found = _examples_in(source, config)
    sides = ("train", "validation", "test")[:len(config.fractions)]
    names = [example.name for example in found]
    units = [split_unit(name, config) for name in names]
    datasets = [name.rpartition("/")[0].split("/")[0] for name in names]
    if config.stratify and "" in datasets:
        raise ValueError(f"{source}: stratify=dataset, but {names[datasets.index('')]} lies in no "
                         "folder of its own there")
    sizes, strata = Counter(units), defaultdict(set)
    if len(sizes) < len(sides):
        raise ValueError(f"{source}: {len(sizes)} {config.by}s for {len(sides)} sides; give fewer "
                         "fractions")
    for unit, dataset in zip(units, datasets):
        strata[unit].add(dataset if config.stratify else "")
    groups = {unit: (tuple(sorted(strata[unit])), size) for unit, size in sizes.items()}
    side_of = _split_sides(groups, config.fractions, config.seed)
    chosen = [sides[side_of[unit]] for unit in units]

    table = Path(config.out or source) / "split.tsv"
    rows = [("name", "split", "group", "dataset"), *zip(names, chosen, units, datasets)]
    _check_written_names(source, found, r"\t\r\n", "a tab, a line break or bytes that are no UTF-8")
    _claim_labelled_folder(table, "".join("\t".join(row) + "\n" for row in rows))
    for i, side in enumerate(sides):
        images = [example for example, own in zip(found, chosen) if own == side]
        if config.out:
            _write_labelled(images, source, table.parent / side, config)
        print(f"{side}: {len(images)} images, {list(side_of.values()).count(i)} {config.by}s")
    print(table)
    return 0


def planes(config: Config, source: str, target: str) -> int:
    if not Path(source).is_dir():
        raise FileNotFoundError(f"{source}: no such folder; expected one with stacks NAME.tif and "
                                "their NAME_labels.tif")
    made, found = 0, list_files(source, ("_labels.tif",))
    if not found:
        raise ValueError(f"{source}: no NAME_labels.tif in it or below, beside stacks NAME.tif")
    _claim_new_folder(Path(target), source,
                      f"planes of {Path(source).resolve()}, every={config.every}\n")
    for labelled in found:
        name = labelled.name.removesuffix("_labels.tif")
        stack, labels = map(_read_stack, (labelled.with_name(f"{name}.tif"), labelled))
        if stack.shape != labels.shape or stack.ndim != 3:
            raise ValueError(f"{labelled}: labels {labels.shape} for a stack {stack.shape}; "
                             "expected (Z, Y, X), the same of both")
        place = Path(target, labelled.relative_to(source).parent)    # two folders may have one name
        place.mkdir(parents=True, exist_ok=True)
        for old in place.glob(f"{glob.escape(name)}_z*.tif"):        # as the stack was before
            if re.fullmatch(r"_z\d{3,}(_masks)?", old.stem[len(name):]):
                old.unlink()
        for z in range(0, len(stack), config.every):
            check_label_image(labels[z], labelled, LARGEST)
            ids, plane = np.unique(np.append(labels[z], 0), return_inverse=True)  # background first
            if len(ids) > 3:
                path = place / f"{name}_z{z:03d}.tif"
                write_labels(path.with_name(f"{path.stem}_masks.tif"),
                             plane[:-1].reshape(labels[z].shape).astype(np.int32))
                write_image(path, Image(stack[z][None], None, None))
                made += 1
    print(f"{target}: {made} planes of {len(found)} stacks")
    return 0


def _read_stack(path: Path) -> np.ndarray:
    with open(path, "rb"), image_decoding(path):                   # open() says if it is missing
        return tifffile.imread(path)


def check(config: Config, *paths: str) -> int:
    problems: list[str] = []
    images = cells = 0
    seen = defaultdict(list)                                       # names of images, by content
    for path in paths:
        found = _examples_in(path, config)
        if Path(path).is_dir():
            problems += unread(Path(path), found) if config.match is None else []
            problems += _straddling(Path(path, "split.tsv"))
        for example in tqdm.tqdm(found, path, unit="image", delay=1, leave=False):
            where = f"{path}: {example.name}"
            try:
                pixels, labels = example.image().pixels, example.labels()
            except (ValueError, OSError) as error:
                problems.append(f"{where}: {error}")
                continue
            try:
                example.types()
            except OtherLabels:
                pass                                               # convert leaves it out as well
            except (ValueError, OSError) as error:
                problems.append(f"{where}: {error}")
            content = runs.digest(pixels)
            seen[content].append(where)
            if pixels.shape[1:] != labels.shape:
                problems.append(f"{where}: image of {pixels.shape[1:]} px, labels of "
                                f"{labels.shape}")
            count, several = _labelled_pieces(labels)
            if several:
                problems.append(f"{where}: {len(several)} of {count} cells in pieces, "
                                f"{several[:5]} ...")
            images, cells = images + 1, cells + count
    problems += [f"the same image: {', '.join(names)}" for names in seen.values() if len(names) > 1]
    for problem in problems:
        print(" ".join(problem.split()))
    print(f"{images} images, {cells} cells: {f'{len(problems)} problems' if problems else 'clean'}")
    return 1 if problems else 0


def _labelled_pieces(labels: np.ndarray) -> tuple[int, list[int]]:
    """The number of cells, and those of several 8-connected pieces."""
    from skimage.measure import label
    pieces, first = np.unique(label(labels, connectivity=2), return_index=True)
    ids, counts = np.unique(labels.ravel()[first[pieces > 0]], return_counts=True)
    return len(ids), ids[counts > 1].tolist()


def _straddling(table: Path) -> list[str]:
    """Groups of a split.tsv that are on two sides."""
    sides = defaultdict(set)
    for row in runs.read_table(table, ["split", "group"]) if table.is_file() else []:
        sides[row["group"]].add(row["split"])
    return [f"{table}: {group} is in {' and in '.join(sorted(parts))}"
            for group, parts in sides.items() if len(parts) > 1]


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
