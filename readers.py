"""Readers of labelled images: what people have -> names, images, labels.

    for example in examples("livecell"):       # .name, .image() -> Image, .labels() -> (H, W) int32, .files

A folder and all below it, except hidden and linked ones, are read by what lies in them:

    pairs      X.tif or X_img.tif with labels, the first there is of X_masks, X_mask, X_cp_masks, X_seg,
               X_labels, X_label, X_cells, X_nuclei (.tif .png .npy; X_seg.npy as Cellpose writes it) and
               X.geojson (QuPath); labels=nuclei takes others. And images/X.tif with labels/X.tif or masks/.
    tiles      pairs named alike but for ..b0c0.. and ..b0c1..: one image of channels DAPI and marker; labels
               have either name. Tiles that lack a channel which others in the folder have are left out.
    nuclei     ID/images with one image, ID/masks with a mask for each nucleus (Data Science Bowl 2018)
    arrays     imgs.npy (N, H, W[, C]) and anns.npy (N, H, W), memory-mapped
    COCO       NAME.json with polygons or RLE (LIVECell). Images are sought by file name: below the folder
               given; for a .json below its own, or the one that has annotations/. Listed again: X_copy2.
    tracking   01/t000.tif with 01_GT/SEG/man_seg000.tif (Cell Tracking Challenge): frames with labels alone;
               01_ST where there is no 01_GT, or with labels=ST

A name is the path below the folder given, without suffix, images/ and _img. On overlaps: formats.py.
"""
from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from formats import LARGEST, Listed, coco_labels, read_coco, read_geojson, read_masks, read_seg
from images import NPY, PNG_JPEG, TIFF, Image, Source, decoding, open_image, read_image
from labels import check_labels, read_labels

Channels = Sequence[int | str] | None                              # numbers from 1 or names, see read_image

ENDS = ("_masks", "_mask", "_cp_masks", "_seg", "_labels", "_label", "_cells", "_nuclei", "")    # first wins
BYPRODUCTS = ("_types", "_overlay", "_distance", "_flows", "_cp_output", "_outlines", "dist_maps")
IMAGES, LABELS = TIFF + PNG_JPEG + NPY, (*TIFF, ".png", *NPY, ".geojson")        # .jpg would blur ids
TILE = re.compile(r"(?i)(?<![0-9a-f])((?:s\d+)?b\d+)c(\d+)(?![0-9a-f])")         # not in a hash


@dataclass(frozen=True)
class Example:
    name: str                                                      # unique in its set
    files: tuple[Path, ...]                                        # all that it is made from
    image: Callable[[], Image]
    labels: Callable[[], np.ndarray]                               # (H, W) int32


class Choice(NamedTuple):
    channels: Channels                                             # of the images
    labels: str | None                                             # such as nuclei or st; None: the first


def examples(path: str | Path, channels: Channels = None, match: str | None = None, labels: str | None = None
             ) -> list[Example]:
    """The labelled images of a folder or of a COCO .json, in natural order of their names.

    match : regular expression, only names in which it is found; labels : which, where an image has several.
    """
    path, choice = Path(path), Choice(channels, labels and labels.lower())
    if path.is_dir():
        found = [example for folder, files in walk(path) for read in (_pairs, _arrays, _tracking)
                 for example in read(folder, files, choice)]
        listed = [file for _, files in walk(path) for file in files if file.suffix.lower() == ".json"]
        root = images = path
    elif path.is_file() and path.suffix.lower() == ".json":
        found, listed, root = [], [path], path.with_suffix("")
        above = [parent for parent in path.resolve().parents if parent.name == "annotations"]
        images = above[0].parent if above else path.parent
    else:
        raise FileNotFoundError(f"{path}: no such folder; expected one with labelled images, or a COCO .json")
    if listed:
        places = defaultdict(list)                                 # images by file name
        for _, files in walk(images):
            for file in kept(files, IMAGES):
                places[file.name].append(file)
        found += [example for file in listed for example in _coco(file, places, choice)]

    found = [replace(example, name=_below(Path(example.name), root)) for example in found]
    for name, count in Counter(example.name for example in found).items():
        if count > 1:
            files = ", ".join(str(example.files[-1]) for example in found if example.name == name)
            raise ValueError(f"{path}: {count} images with labels are called {name} ({files}); keep one")
    if match is not None:
        found = [example for example in found if regex("match", match).search(example.name)]
    if not found:
        raise ValueError(f"{path}: no labelled images" + (f" with '{match}' in their names" if match else "")
                         + "; `python data.py --help` lists the layouts that are read")
    return sorted(found, key=lambda example: _natural(example.name))


def walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from root down, and its files."""
    def stop(error: OSError) -> None:
        raise error
    for parent, below, files in os.walk(root, onerror=stop):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(parent), [Path(parent, name) for name in sorted(files) if not name.startswith(".")]


def _files(folder: Path, suffixes: Sequence[str]) -> list[Path]:
    return kept(next(walk(folder))[1], suffixes) if folder.is_dir() else []


def kept(files: list[Path], suffixes: Sequence[str]) -> list[Path]:
    return [file for file in files if file.suffix.lower() in suffixes]


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else root.resolve().name


def stem_of(path: Path) -> str:
    return re.sub(r"(?i)\.ome$", "", path.stem)


def key_of(stem: str) -> str:
    """What an image, its labels and the other channels of its tile have in common."""
    return TILE.sub(r"\1", stem.removesuffix("_img"))


def _natural(name: str) -> tuple[list[Any], str]:
    parts: list[Any] = re.split("([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


def regex(key: str, text: str) -> re.Pattern:
    try:
        return re.compile(text)
    except re.error as error:
        raise ValueError(f"{key}={text}: not a regular expression, {error}") from None


# ---------------------------------------------------------------------------------------------------- layouts
# Each is asked about every folder, _coco about every .json. Names here are paths; examples() shortens them.

def _pairs(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    yield from _matched(folder, kept(files, IMAGES), kept(files, LABELS), choice, apart=False)
    images = _files(folder / "images", IMAGES)
    for name in ("labels", "masks") if images else ():
        labels = _files(folder / name, LABELS)
        pairs = list(_matched(folder, images, labels, choice, apart=True))
        if name == "masks" and labels and len(images) == 1 and not pairs:        # a mask for each nucleus
            yield Example(str(folder), (*images, *labels), partial(read_image, images[0], choice.channels),
                          partial(read_masks, labels))
        yield from pairs


def _matched(folder: Path, images: list[Path], labels: list[Path], choice: Choice, apart: bool
             ) -> Iterator[Example]:
    """Images with their labels; apart: in another folder, where they may be named just as the image."""
    shots, truths = defaultdict(list), defaultdict(lambda: defaultdict(list))
    for file in images:
        shots[key_of(stem_of(file))].append(file)
    for file in labels:
        for rank, end in enumerate(ENDS):
            key = key_of(stem_of(file).removesuffix(end))
            if stem_of(file).endswith(end) and (end or apart or file.suffix.lower() == ".geojson") \
                    and key in shots and file not in shots[key] and choice.labels in (None, end[1:]):
                truths[key][rank].append(file)
                break
    labelled = {file for key in truths for file in shots[key]}     # a_cells beside a_cells_masks is an image, not labels of a
    truths = {key: {rank: rest for rank, found in ranked.items() if (rest := [file for file in found if file not in labelled])}
              for key, ranked in truths.items()}
    number = {file: int(found[2]) for file in images if (found := TILE.search(stem_of(file)))}
    for key, ranked in ((key, ranked) for key, ranked in truths.items() if ranked):
        shot, truth = sorted(shots[key], key=lambda file: number.get(file, 0)), ranked[min(ranked)]
        numbers = sorted({number[file] for file in shot if file in number})
        if len(truth) > 1 or len(shot) != max(1, len(numbers)):
            names = ", ".join(file.name for file in (*shot, *truth))
            raise ValueError(f"{folder}: which belong together of {names}? Keep one image and its labels")
        if numbers and len(numbers) < len(set(number.values())):
            continue                                               # a tile without its marker: see `check`
        image = partial(read_image, shot[0], choice.channels)
        if len(shot) > 1:
            image = partial(_joined, shot, numbers, choice.channels)
        yield Example(str(folder / stem_of(shot[0]).removesuffix("_img")), (*shot, *truth), image,
                      partial(_labels, truth[0], shot[0], choice.channels))


def _labels(path: Path, image: Path, channels: Channels) -> np.ndarray:
    """(H, W) int32 from a label file of any kind."""
    if path.suffix.lower() == ".geojson":
        return read_geojson(path, _shape(image, channels))
    return read_seg(path) if path.name.lower().endswith("_seg.npy") else read_labels(path)


def _shape(image: Path, channels: Channels) -> tuple[int, int]:
    with open_image(image, channels) as source:
        return source.shape[1:]


def _joined(paths: list[Path], numbers: list[int], channels: Channels) -> Image:
    """One image of channels in files of their own."""
    parts = [read_image(path) for path in paths]
    first = parts[0].pixels
    for path, part in zip(paths, parts):
        if part.pixels.shape != (1, *first.shape[1:]) or part.pixels.dtype != first.dtype:
            raise ValueError(f"{path}: {part.pixels.dtype} of {part.pixels.shape}, but {paths[0].name} has "
                             f"{first.dtype} of {first.shape}; expected one channel of the same size in each")
    names = [{0: "DAPI", 1: "marker"}.get(number, f"c{number}") for number in numbers]
    pixels = np.concatenate([part.pixels for part in parts])
    return _chosen(paths[0], pixels, channels, names, parts[0].pixel_size)


def _chosen(path: Path, pixels: np.ndarray, channels: Channels, names: Sequence[str] | None = None,
            pixel_size: float | None = None) -> Image:
    """Channels of an array (C, H, W), with the checks that images in files pass."""
    source = Source(path, channels, lambda picked, rows, columns: pixels[picked, rows, columns], pixels.shape,
                    pixels.dtype, names, pixel_size)
    return Image(source.region(0, pixels.shape[1], 0, pixels.shape[2]), source.channels, source.pixel_size)


def _arrays(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    paths = folder / "imgs.npy", folder / "anns.npy"
    if set(paths) <= set(files):
        images, labels = (_array(path).shape for path in paths)
        if len(labels) != 3 or len(images) not in (3, 4) or images[:3] != labels:
            raise ValueError(f"{folder}: imgs.npy of {images}, anns.npy of {labels}, expected (N, H, W[, C]) "
                             f"and (N, H, W)")
        for i in range(labels[0]):
            image = partial(_array_image, paths[0], i, choice.channels)
            yield Example(str(folder / f"{i:04d}"), paths, image, partial(_array_labels, paths[1], i))


def _array(path: Path) -> np.ndarray:
    with decoding(path):
        return np.load(path, mmap_mode="r")                        # refuses pickled objects


def _array_image(path: Path, i: int, channels: Channels) -> Image:
    pixels = _array(path)[i]
    return _chosen(path, pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1), channels)


def _array_labels(path: Path, i: int) -> np.ndarray:
    labels = _array(path)[i]
    check_labels(labels, f"{path}, number {i}", LARGEST)
    return labels.astype(np.int32)


def _tracking(folder: Path, files: list[Path], choice: Choice) -> Iterator[Example]:
    kinds = {None: ("GT", "ST"), "gt": ("GT",), "st": ("ST",)}.get(choice.labels, ())
    for sequence in sorted(below for below in folder.glob("[0-9][0-9]") if below.is_dir()):
        truths = [_files(folder / f"{sequence.name}_{kind}" / "SEG", TIFF) for kind in kinds]
        for path in next(filter(None, truths), []):
            frame = re.fullmatch(r"man_seg_?(\d+)", path.stem)
            if not frame:
                raise ValueError(f"{path}: expected man_segT.tif, T a frame; 3-D slices are not read")
            image = sequence / f"t{frame[1]}{path.suffix}"
            if not image.is_file():
                raise FileNotFoundError(f"{path}: its frame {sequence.name}/{image.name} is missing")
            yield Example(str(sequence / image.stem), (image, path),
                          partial(read_image, image, choice.channels), partial(read_labels, path))


def _coco(path: Path, places: dict[str, list[Path]], choice: Choice) -> Iterator[Example]:
    """What the JSON says is only looked up among the names of files that are there: it leads nowhere else."""
    listed = read_coco(path) or []
    names = [PurePosixPath(entry.file_name.replace("\\", "/")) for entry in listed]
    if missing := sorted({name.name for name in names} - places.keys()):
        raise FileNotFoundError(f"{path}: {len(missing)} of its images are missing, such as "
                                f"{', '.join(missing[:3])}; put them below the folder given")
    seen = Counter()
    for entry, name in zip(listed, names):
        alike = places[name.name]
        images = [file for file in alike if file.parts[-len(name.parts):] == name.parts] or alike
        if len(images) > 1:
            raise ValueError(f"{path}: {name} may be {images[0]} or {images[1]}; keep one")
        seen[images[0]] += 1
        again = f"_copy{seen[images[0]]}" if seen[images[0]] > 1 else ""
        yield Example(str(path.with_suffix("") / (stem_of(images[0]) + again)), (images[0], path),
                      partial(read_image, images[0], choice.channels),
                      partial(_coco_labels, entry, images[0], choice.channels))


def _coco_labels(entry: Listed, image: Path, channels: Channels) -> np.ndarray:
    return coco_labels(entry, _shape(image, channels))


def unread(root: Path, found: list[Example]) -> list[str]:
    """Images and labels below root without a partner; in tracking most frames have none, and may."""
    used = {file for example in found for file in example.files}
    keys = {file.with_name(key_of(stem_of(file))) for file in used}
    lonely = []
    for folder, files in walk(root):
        if any(re.fullmatch(r"\d\d(_.*)?", at.name) and any(at.parent.glob(f"{at.name[:2]}_[GS]T/SEG"))
               for at in (folder, *folder.parents)):
            continue
        for file in kept(files, {*IMAGES, ".geojson"}):
            ends = [end for end in ENDS if end and stem_of(file).endswith(end)]
            other = any(folder / key_of(stem_of(file).removesuffix(end)) in keys for end in ends)
            if file not in used and not other and not stem_of(file).endswith(BYPRODUCTS):
                kind = "a tile that lacks a channel or labels" if TILE.search(file.stem) else \
                    "labels without image" if ends or file.suffix == ".geojson" else "an image without labels"
                lonely.append(f"{file}: {kind}")
    return lonely
