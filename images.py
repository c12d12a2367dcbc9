"""Image and label files <-> arrays, and intensities for the network.

    image = read_image("well_A1.tif", channels=["DAPI", "actin"])  # .pixels, .channels, .pixel_size
    with open_image("slide.tif") as source:                         # memory of the region asked for
        limits = percentiles(source)                                 # (C, 2), over the whole image
        block = to_rgb(normalise(source.region(0, 512, 0, 512), limits))

    write_labels("well_A1_labels.tif", labels)
    labels = read_labels("well_A1_labels.tif")                      # (H, W) int32, 0 = background
    writer = LabelWriter("slide_labels.tif", (H, W))                # part by part: add(), close()

Reads TIFF (ImageJ, OME, BigTIFF, tiled, 1 to 64 bits, float), PNG, JPEG and .npy, in the file's own
dtype and native byte order. Channels, planes and time points are counted from 1, as ImageJ does.

Axes are read from the file and never guessed. C and samples (RGB) are channels. Z and T longer than
1 must be chosen. Pages without metadata are an error, unless plane= says that they are a stack or
channels= that they are channels. A 3-D .npy is (C, H, W), or (H, W, C) if only its last axis is 4
or less. Alpha is dropped with a notice. A palette becomes RGB, unless ImageJ wrote it, whose lookup
tables only colour the screen. MinIsWhite and EXIF's orientation are said, not applied. Sizes are
compared with the bytes there are and the free memory before pixels are decoded, and no decoder
gives more than its file claims.
"""
from __future__ import annotations

import difflib
import functools
import importlib.util
import io
import itertools
import json
import logging
import lzma
import math
import os
import re
import struct
import tempfile
import tokenize
import uuid
import warnings
import zlib
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import numpy as np
import PIL.Image
import tifffile

import runs

TIFF = (".tif", ".tiff", ".btf", ".svs", ".ndpi", ".scn")              # the last three of slides
NPY, PNG_JPEG = (".npy",), (".png", ".jpg", ".jpeg")
IMAGE_SUFFIXES = TIFF + PNG_JPEG + NPY
# how names of labels of an image end, by rank, and of what programs write beside it
LABEL_ENDS = ("_masks", "_mask", "_cp_masks", "_seg", "_labels", "_label", "_cells", "_nuclei")
BYPRODUCTS = ("_types", "_overlay", "_distance", "_flows", "_cp_output", "_outlines", "dist_maps")
CACHE = 256 << 20                       # bytes of decoded tiles or strips that an open image keeps
SAMPLED = 1 << 16       # pixels of a channel, up to four times as many, that sampled_limits() sees
RECORD = 1 << 14                        # bytes
LABEL_TILE = 512                        # px, side of the tiles of a label file that comes in parts
CLASSIC = 1 << 31                       # bytes; beyond, a TIFF must be a BigTIFF
OVERVIEW = 1 << 24      # pixels of the size of a slide that says how bright it is and where tissue
STEPS = 4                               # of whole numbers: the least contrast that is looked at
BLEED = 0.1                             # of the contrast of one colour, in others of a JPEG
HOT = 0.9999                            # share of pixels as bright or less; the rest may be hot
FLAT = (f"has no contrast, or less than {STEPS} grey levels, in which no cell is told from noise; "
        "a mask of 0 and 1 is seen when saved as 0 and 255")
COUNTED = 1 << 22                       # pixels of a channel that percentiles() counts together
DENSEST = {"PNG": 1032, "JPEG": 64 * 8}    # pixels of a channel that a byte can hold, at most
SMALL = 64 << 20                    # bytes that are asked for without a look at the memory
LIBTIFF = (5, 32773, 50000)             # LZW, PackBits, zstd
JPEG = 7                                # in TIFF
ORIENTATION = 274                       # the tag of EXIF
SMALLEST = 1e-5             # µm; no microscope has smaller pixels
CALIBRATED = 20.0           # µm; a larger pixel in resolution tags is a printer's (1200 dpi: 21)
UNITS = {**dict.fromkeys(("µm", "μm", "\\u00b5m", "um", "micron", "microns"), 1.0),     # in µm
         "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25400.0, "in": 25400.0,
         **dict.fromkeys(("s", "sec", "second", "seconds"), 1.0), "ms": 1e-3, "msec": 1e-3,  # in s
         "min": 60.0, "minute": 60.0, "minutes": 60.0, "h": 3600.0, "hour": 3600.0, "hours": 3600.0}
# errors of decoders when bytes are wrong or missing
DAMAGE = (MemoryError, tokenize.TokenError, ValueError, LookupError, TypeError, ArithmeticError,
          RuntimeError, AssertionError, AttributeError, OSError, SyntaxError, ImportError,
          struct.error, zlib.error, lzma.LZMAError, tifffile.TiffFileError)

TOLD: Counter[str] = Counter()          # files of this run with each notice

logging.getLogger("tifffile").setLevel(logging.CRITICAL)           # we say damage in one line
PIL.Image.MAX_IMAGE_PIXELS = None                                 # a slide is no decompression bomb

HUGE = 1e30                                                        # of a pixel
Channels = Sequence[int | str] | None                           # numbers from 1 or names; None: all
Read = Callable[[Sequence[int], slice, slice], np.ndarray]         # channels from 0, rows, columns
Sizes = list[tuple[int, int, float | None]]                 # of a slide: H, W, µm of a pixel
Level = int | Callable[[Sizes], int]                       # of them, from 1; or what chooses one
Region = tuple[slice, slice]                               # rows and columns
Selector = Callable[[str, Sequence[int]], tuple[str, tuple[int | slice, ...]]]   # see _select


class Image(NamedTuple):
    pixels: np.ndarray                                             # (C, H, W) in the file's dtype
    channels: tuple[str, ...] | None                               # names
    pixel_size: float | None                                       # µm


def is_measurable(pixels: np.ndarray) -> np.ndarray:
    """Where floats are neither NaN nor so large that their squares have no sum."""
    return np.isfinite(pixels) if pixels.dtype.itemsize == 2 else np.abs(pixels) <= HUGE


def region_around(regions: Iterable[Region]) -> Region:
    """The smallest region that holds all of these."""
    rows, columns = (slice(min(part.start for part in parts), max(part.stop for part in parts))
                     for parts in zip(*regions))
    return rows, columns


class Damaged(ValueError):
    """Bytes that are no whole image; fetched again they may be."""


# ---------------------------------------------------------------------------------------- folders

def image_files(folder: str | Path, pattern: str = "*",
                unreadable: list[OSError] | None = None) -> list[Path]:
    """Image files in a folder and below it, in natural order (2 before 10); nothing hidden.

    pattern : of file names, such as *_w1.tif; unreadable : takes the errors of folders below that
    cannot be opened, which are raised without it.
    """
    found = list_files(folder, IMAGE_SUFFIXES, pattern, unreadable)
    return sorted(found, key=lambda path: natural_order(path.as_posix()))


def list_files(folder: str | Path, suffixes: tuple[str, ...], pattern: str = "*",
               unreadable: list[OSError] | None = None) -> list[Path]:
    """Files in a folder and below it, sorted, but for hidden ones; see image_files()."""
    return sorted(path for _, files in layout_folders(folder, unreadable) for path in files
                  if path.name.lower().endswith(suffixes) and fnmatch(path.name, pattern))


def is_challenge_mask(name: str) -> bool:
    """Whether a path is that of a mask of a movie, as infer.py writes them."""
    return re.search(r"_ctc[/\\]01_RES[/\\]", name) is not None


def without_labels(stems: Iterable[str]) -> set[str]:
    """Names of images, without suffix, less what is beside another: a_cp_masks of a, a.ome, a_img.
    """
    stems, ends = set(stems), (*LABEL_ENDS, *BYPRODUCTS)
    there = {re.sub(r"(?i)(\.ome|_img)$", "", stem) for stem in stems if not stem.endswith(ends)}

    def is_alone(stem: str) -> bool:
        words = stem.split("_")
        return not (stem.endswith(ends) and any("_".join(words[:n]) in there
                                                for n in range(1, len(words))))
    return set(filter(is_alone, stems))


def layout_folders(root: str | Path, unreadable: list[OSError] | None = None
                   ) -> Iterator[tuple[Path, list[Path]]]:
    """Every folder from root down, and its files; nothing hidden."""
    def note(error: OSError) -> None:
        if unreadable is None or error.filename == str(root):
            raise error
        unreadable.append(error)

    for parent, below, names in os.walk(root, onerror=note):
        below[:] = sorted(name for name in below if not name.startswith("."))
        yield Path(parent), [Path(parent, name) for name in sorted(names)
                             if not name.startswith(".")]


def natural_order(name: str) -> tuple[list[str | int], str]:
    """Key for sorted(): numbers by their value."""
    parts: list[str | int] = re.split("([0-9]+)", name)
    parts[1::2] = map(int, parts[1::2])
    return parts, name


# -------------------------------------------------------------------------------------------- open

def read_image(path: str | Path, channels: Channels = None, plane: int | None = None,
               time: int | None = None) -> Image:
    """A whole image; arguments as for open_image, whose notices become warnings here."""
    with open_image(path, channels, plane, time) as source:
        image = source.whole()
    for notice in source.notices:
        if said := image_notice(path, notice):
            warnings.warn(said, stacklevel=2)
    return image


def image_notice(path: str | Path, notice: str) -> str | None:
    """The text of a notice for the 1st, 10th, 100th ... file with it, else None."""
    TOLD[notice] += 1
    count = TOLD[notice]
    if count != 10 ** (len(str(count)) - 1):
        return None
    return f"{path}: {notice}" + (f", now in {count} files" if count > 1 else "")


def open_image(path: str | Path, channels: Channels = None, plane: int | None = None,
               time: int | None = None, colours: bool = True, level: Level = 1) -> Source:
    """Open an image without decoding it (PNG and JPEG are decoded now and kept).

    channels : numbers from 1 or names in any case, in the order wanted; None for all.
    plane, time : of a stack, from 1; colours : False keeps the numbers of a palette.
    level : of a slide that is stored in several sizes, from 1, the largest; or what chooses one.
    """
    path = Path(path)
    with open(path, "rb") as file:                       # the system says if missing, a folder, ...
        if not file.read(1):
            raise ValueError(f"{path}: an empty file, 0 bytes; copy or export it again")
    suffix, select = path.suffix.lower(), partial(_select, path, plane, time, channels is not None)
    if suffix not in IMAGE_SUFFIXES:
        raise ValueError(f"{path}: unknown suffix '{path.suffix}', expected "
                         f"{' '.join(IMAGE_SUFFIXES)}; save the image as TIFF")
    with ExitStack() as files:
        if suffix in TIFF:
            parts = _open_tiff(path, select, files, colours, level)
        elif level != 1 and not callable(level):
            raise ValueError(f"{path}: level={level}, but the image is stored in one size; leave "
                             "level= out")
        else:
            parts = _open_npy(path, select) if suffix in NPY else \
                _open_png_jpeg(path, select, colours)
            if callable(level):                                    # it may ask how large a pixel is
                level([(*parts["shape"][1:], None)])
        source = Source(path, channels, **parts)
        source.close = files.pop_all().close
        return source


class Stack(NamedTuple):
    """What a file says of its planes and frames."""
    planes: int             # along the axis asked for
    axes: str               # as they stand in the file
    step: float | None      # µm from one plane to the next
    interval: float | None  # seconds from one frame to the next


def stack_of(path: str | Path, letter: str) -> Stack:
    """The planes (letter Z) or frames (T) of a file; pages without a name are taken for them."""
    path = Path(path)
    if path.suffix.lower() not in TIFF:
        return Stack(1, "YX", None, None)
    with image_decoding(path), tifffile.TiffFile(path, _multifile=False) as tif:
        series, imagej, pixels = tif.series[0], tif.imagej_metadata or {}, _ome_pixels(tif)
    lengths = dict(zip(series.axes, series.shape))
    unknown = [n for a, n in lengths.items() if a not in "CSYXZT" and n > 1]
    count = lengths.get(letter, unknown[0] if len(unknown) == 1 else 1)
    if pixels is None:
        step = _in_unit(imagej.get("spacing"), imagej.get("zunit", imagej.get("unit")))
        interval = _in_unit(imagej.get("finterval"), imagej.get("tunit", "s"))
    else:
        step, interval = _ome_size(pixels, "PhysicalSizeZ"), _ome_size(pixels, "TimeIncrement", "s")
    known = [abs(size) if 0 < abs(size) < math.inf else None for size in (step, interval)]
    return Stack(int(count), series.axes, *known)


def plane_name(name: str, axis: str, place: int, count: int) -> str:
    """Name of a plane (axis Z) or frame (T) of a stack, from 1: embryo_z03, movie_t007."""
    return f"{name}_{axis.lower()}{place:0{len(str(count))}d}"


def _ome_pixels(tif: tifffile.TiffFile) -> ElementTree.Element | None:
    """What OME's metadata say of the first image."""
    with suppress(ElementTree.ParseError):
        return ElementTree.fromstring(tif.ome_metadata or "").find(".//{*}Pixels")
    return None


def _ome_size(pixels: ElementTree.Element, key: str, unit: str = "µm") -> float:
    return _in_unit(pixels.get(key), pixels.get(f"{key}Unit", unit))


def _in_unit(value: Any, unit: Any) -> float:
    """A number of metadata in µm or s; 0 if it or its unit is not known, NaN if it is none."""
    try:
        return float(value or 0) * UNITS.get(str(unit).lower(), 0)
    except (TypeError, ValueError):
        return math.nan


class Source:
    """An open image: path, shape (C, H, W), dtype, channels, pixel_size (µm) and notices.

    Not thread-safe.
    """

    close: Callable[[], None]

    def __init__(self, path: Path, channels: Channels, read: Read,
                 shape: tuple[int, int, int], dtype: np.dtype, names: Sequence[str] | None = None,
                 pixel_size: float | None = None, notices: Sequence[str] = (), alpha: bool = False,
                 levels: int = 1, reduced: tuple[float, float] = (1.0, 1.0), lossy: bool = False):
        """shape : with all channels of read(), of which the last may be alpha; levels : sizes that
        are stored; reduced : px of the largest for each of this, down and across; lossy : colours
        of a JPEG, which are mixed up a little."""
        if 0 in shape or dtype.kind not in "buif" or dtype.itemsize > 8:
            raise ValueError(f"{path}: pixels of {dtype}, (C, H, W) = {shape}; expected at least "
                             "one pixel, integers or floats of at most 64 bits")
        names = tuple(names) if names and len(names) == shape[0] else None
        self._picked = pick_channels(path, channels, names or (), shape[0] - alpha)
        self._read = read
        self._alpha = [shape[0] - 1] if alpha else []
        self.numbers = tuple(i + 1 for i in self._picked)          # of the file's channels, from 1
        self.path, self.shape = path, (len(self._picked), *shape[1:])
        self.dtype = np.dtype(np.uint8) if dtype.kind == "b" else dtype.newbyteorder("=")
        self.channels = names and tuple(names[i] for i in self._picked)
        self.pixel_size, self.levels, self.reduced = pixel_size, levels, reduced
        self.lossy = lossy
        self.notices = (*notices, "alpha channel dropped") if alpha else tuple(notices)

    def region(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        """(C, y1 - y0, x1 - x0), a copy in native byte order; decodes only what overlaps."""
        _, H, W = self.shape
        if not (0 <= y0 < y1 <= H and 0 <= x0 < x1 <= W):
            raise ValueError(f"{self.path}: no region {y0}:{y1}, {x0}:{x1} in {H} x {W} px")
        wanted = self._picked + self._alpha
        check_image_memory(self.path, len(wanted) * (y1 - y0) * (x1 - x0) * self.dtype.itemsize)
        pixels = self._read(wanted, slice(y0, y1), slice(x0, x1))
        pixels = pixels.astype(self.dtype, copy=False)
        if self._alpha:
            opaque = 1 if self.dtype.kind == "f" else np.iinfo(self.dtype).max
            if (pixels[-1] != opaque).any():
                notice = "alpha channel dropped, though it was not opaque"
                self.notices = (*self.notices[:-1], notice)
            pixels = pixels[:-1]
        if self.dtype.kind == "f" and not (known := is_measurable(pixels)).all():
            raise ValueError(f"{self.path}: {known.size - known.sum()} of {known.size} "
                             f"values in rows {y0}..{y1 - 1} are NaN, infinite or beyond {HUGE:g}; "
                             "replace them (numpy.nan_to_num), save it")
        return pixels

    def whole(self) -> Image:
        _, H, W = self.shape
        return Image(self.region(0, H, 0, W), self.channels, self.pixel_size)

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def pick_channels(path: str | Path, channels: Channels, names: Sequence[str],
                  count: int | None = None) -> list[int]:
    """Channel numbers from 0; path : what has them; count : of them, where some have no name."""
    count = len(names) if count is None else count
    if channels is None:
        return list(range(count))
    known, picked = [name.lower() for name in names], []
    if isinstance(channels, str):
        channels = channels.split(",")
    alone = isinstance(channels, int)                   # a number; in a list it may be a name
    for wanted in [channels] if isinstance(channels, int) else channels:
        text = str(wanted).strip().lower()
        if text in known and not alone:
            picked.append(known.index(text))
        elif text.isdigit() and 1 <= int(text) <= count:
            picked.append(int(text) - 1)
        else:
            near = difflib.get_close_matches(text, known, 1)
            hint = f", did you mean '{names[known.index(near[0])]}'" if near else ""
            raise ValueError(f"{path}: no channel '{wanted}'{hint}; expected 1..{count}, counted "
                             "from 1" + (f", or {', '.join(names)}" if names else ""))
    if not picked:
        raise ValueError(f"{path}: channels= is empty, expected numbers in 1..{count}")
    return picked


def _select(path: Path, plane: int | None, time: int | None, by_channel: bool,
           axes: str, shape: Sequence[int]) -> tuple[str, tuple[int | slice, ...]]:
    """The axes C, S(amples), Y, X of an array, and the index that selects the plane wanted."""
    letters, index, missing = list(axes), [], []
    unknown = [i for i, a in enumerate(axes) if a not in "CSYXZT" and shape[i] > 1]
    asked = {"Z": plane is not None, "T": time is not None, "C": by_channel and "S" not in axes}
    free = [letter for letter, wanted in asked.items() if wanted and letter not in axes]
    if len(unknown) == 1 and free:
        letters[unknown.pop()] = free[0]
    if unknown:
        n = " x ".join(str(shape[i]) for i in unknown)
        raise ValueError(f"{path}: {n} pages and no word on what they are (axes {axes}); " + (
            f"plane=1..{n} takes one, channels=1,2 takes them as channels, and infer.py links all "
            "with z=all or time=all" if len(unknown) == 1
            else "save it with named axes, as ImageJ or OME-TIFF"))
    for letter, n in zip(letters, shape, strict=True):
        key, given = {"Z": ("plane", plane), "T": ("time", time)}.get(letter, ("", None))
        if given is not None and not 1 <= given <= n:
            raise ValueError(f"{path}: {key}={given}, expected 1..{n} (axis {letter})")
        if key and given is None and n > 1:
            missing.append((f"axis {letter} of {n}", f"{key}=1..{n}"))
        index.append(slice(None) if letter in "CSYX" else (given or 1) - 1)
    if missing:
        found, keys = (" and ".join(texts) for texts in zip(*missing, strict=True))
        linked = "; infer.py links all with " + ("z=all" if "Z" in found else "time=all")
        alone = plane is time is None           # else the other axis is linked, or chosen from
        raise ValueError(f"{path}: a stack with {found}; choose with {keys}{linked * alone}")
    for letter, key, given in (("Z", "plane", plane), ("T", "time", time)):
        if letter not in letters and given not in (None, 1):
            raise ValueError(f"{path}: {key}={given}, but the image has no axis {letter}; leave "
                             f"{key}= out")
    return "".join(a for a in letters if a in "CSYX"), tuple(index)


def check_image_memory(path: Path, size: float) -> None:
    """Refuse pixels that do not fit; they are held three times while they are decoded."""
    if size > SMALL and 3 * size > (free := runs.free_memory()):
        raise ValueError(f"{path}: too large for memory, {size / 1e9:.3g} GB of pixels at once and "
                         f"{free / 1e9:.3g} GB free, of which a third may be used; save it as a "
                         "tiled TIFF, which is read in parts")


@contextmanager
def image_decoding(path: Path, codec: str = "") -> Iterator[None]:
    """Report damage and missing codecs in one line."""
    try:
        yield
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if "imagecodecs" in reason or isinstance(error, ImportError):
            raise ValueError(f"{path}: {codec or reason}; to read it pip install imagecodecs, or "
                             "save the image again with deflate") from None
        raise ValueError(f"{path}: damaged, truncated or no {path.suffix} ({reason}); copy or "
                         "export it again") from None


def source_of_arrays(arrays: Iterable[np.ndarray], axes: str, **more: Any) -> dict[str, Any]:
    """Arguments of Source for arrays, mapped or not, with axes of C, S, Y, X in any order."""
    order = [axes.index(a) for a in "CSYX" if a in axes]
    arrays = [array.transpose(order) for array in arrays]
    planes = [array[i] for array in arrays for i in np.ndindex(array.shape[:-2])]    # (H, W) views

    def read(channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        return np.stack([planes[i][rows, columns] for i in channels])
    shape = len(planes), *arrays[0].shape[-2:]
    return dict(read=read, shape=shape, dtype=arrays[0].dtype, **more)


# --------------------------------------------------------------------------------- .npy, PNG, JPEG

def _open_npy(path: Path, select: Selector) -> dict[str, Any]:
    with image_decoding(path):
        array = np.lib.format.open_memmap(path, mode="r")          # refuses pickled objects
    if array.ndim not in (2, 3):
        raise ValueError(f"{path}: shape {array.shape}, expected (H, W), (C, H, W) or (H, W, C)")
    axes = "YX" if array.ndim == 2 else "YXC" if array.shape[2] <= 4 < array.shape[0] else "CYX"
    select(axes, array.shape)
    return source_of_arrays([array], axes)


def _open_png_jpeg(path: Path, select: Selector, colours: bool) -> dict[str, Any]:
    with image_decoding(path), PIL.Image.open(path, formats=("PNG", "JPEG")) as image:
        pixels, size = math.prod(image.size), path.stat().st_size
        bits = 1 if image.mode == "1" else 8                       # of a pixel in a channel
        if pixels > size * DENSEST[str(image.format)] * 8 / bits:
            raise Damaged(f"{image.height} x {image.width} px cannot lie in {size} bytes")
        check_image_memory(path, pixels * len(image.getbands()) * (4 if image.mode == "I" else 1))
        raw = str(image.tile[0][3])
        few = {"L;2": 85, "L;4": 17}.get(raw, 1)                   # Pillow stretches few bits to 8
        if image.mode == "P" and colours:
            image = image.convert("RGBA" if "transparency" in image.info else "RGB")
        array = _sixteen_bits(path, image) if raw.endswith(";16B") else np.asarray(image)
        array = array // np.uint8(few) if few > 1 else array
        turned = image.getexif().get(ORIENTATION, 1)
        lossy = image.format == "JPEG" and image.mode == "RGB"
    if image.mode not in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA"):
        raise ValueError(f"{path}: colours are {image.mode}, expected gray or RGB; save it as RGB")
    select("YX", array.shape[:2])
    notices = [f"EXIF says that the camera was turned (orientation {turned}); pixels and results "
               "are as stored"] * (turned in range(2, 9))
    return source_of_arrays([array], "YXC"[:array.ndim], alpha=array.shape[2:] in ((2,), (4,)),
                            notices=notices, lossy=lossy)


def _sixteen_bits(path: Path, image: Any) -> np.ndarray:
    """(H, W) or (H, W, C) uint16 of a 16-bit PNG; of colours Pillow keeps the high byte only.

    Decoded again as little-endian, which is wrong, it keeps the low byte. Gray with alpha is
    unpacked as four samples of 8 bits.
    """
    def unpacked(raw: str) -> np.ndarray:
        with PIL.Image.open(path) as again:
            again.tile = [tile._replace(args=raw) for tile in again.tile]
            return np.asarray(again).astype(np.uint16)

    if image.mode.startswith("I"):
        return np.asarray(image).astype(np.uint16)
    if image.tile[0][3] == "LA;16B":
        octets = unpacked("RGBA")                                  # (H, W, 4)
        return octets[..., ::2] << 8 | octets[..., 1::2]           # (H, W, 2)
    return unpacked(f"{image.mode};16B") << 8 | unpacked(f"{image.mode};16L")


# -------------------------------------------------------------------------------------------- TIFF

def _open_tiff(path: Path, select: Selector, files: ExitStack, colours: bool, level: Level
               ) -> dict[str, Any]:
    with image_decoding(path):
        tif = files.enter_context(tifffile.TiffFile(path, _multifile=False))   # opens no other file
        _check_page_chain(path, tif)
        levels = tif.series[0].levels
        about = _tiff_metadata(tif, levels[0].keyframe)
    number, about["pixel_size"] = _level(path, levels, about["pixel_size"], level)
    with image_decoding(path):
        series = levels[number - 1]
        axes, shape, dtype, offset = series.axes, series.shape, series.dtype, series.dataoffset
        page: Any = series.keyframe
        pages: Any = series.pages
        inner = page.axes
    lead = shape[:-len(inner)]
    if "S" in inner and "S" not in axes and axes[-3:].replace("C", "S") == inner:
        axes = axes[:-3] + inner                 # samples of a page that its metadata call channels
    paged = inner in ("YX", "YXS", "SYX") and axes.endswith(inner)
    listed = offset is not None or math.prod(lead) == len(pages)
    if dtype is None or 0 in shape or not paged or not listed:
        raise ValueError(f"{path}: {dtype} pixels, axes {axes} of {shape} in {len(pages)} pages of "
                         f"{inner}; expected 8 to 64 bits, rows and columns in a page; save it as "
                         "ImageJ or OME-TIFF")
    if (there := math.prod(shape)) < (promised := _promised_pixels(tif, page)):
        raise ValueError(f"{path}: truncated TIFF, its metadata promise {promised} pixels and "
                         f"{there} are there; copy or export it again")
    kept, where = select(axes, shape)
    stored_as = dtype.newbyteorder(tif.byteorder)
    if offset is not None:                                 # one run of bytes; pages may be unlisted
        _check_extent(path, offset + math.prod(shape) * dtype.itemsize)
        stored: Any = source_of_arrays([np.memmap(path, stored_as, "r", offset, shape)[where]],
                                       kept)
    else:
        chosen = np.arange(len(pages)).reshape(lead)[where[:len(lead)]]
        with image_decoding(path):
            pages = [pages[int(i)] for i in chosen.flat]
            mapped = all(page.is_memmappable for page in pages)
            offsets = [page.dataoffsets[0] for page in pages]
        if page.bitspersample in (2, 4) or page.bitspersample == 1 != page.compression:
            check_image_memory(path, len(pages) * page.imagelength * page.imagewidth)
            with image_decoding(path):
                stored = source_of_arrays(_read_by_pillow(path, pages), "YX")
        elif mapped:
            _check_extent(path, max(offsets) + math.prod(page.shape) * dtype.itemsize)
            maps = [np.memmap(path, stored_as, "r", start, page.shape) for start in offsets]
            stored = source_of_arrays(maps, inner)
        else:
            shape = len(pages) * page.samplesperpixel, page.imagelength, page.imagewidth
            stored = dict(read=_Segments(path, pages), dtype=dtype, shape=shape)
    if page.photometric == tifffile.PHOTOMETRIC.PALETTE and not tif.is_imagej and colours:
        table = page.colormap                                      # (3, 2 ** bits) uint16
        if not (table % 257).any() or not (table % 256).any():
            table = (table >> 8).astype(np.uint8)          # colours of 8 bits, as nearly everywhere
        _, H, W = stored["shape"]
        check_image_memory(path, 3 * H * W * table.itemsize)
        stored = source_of_arrays([table[:, stored["read"]([0], slice(0, H), slice(0, W))[0]]],
                                  "CYX")
    alpha = stored["shape"][0] == page.samplesperpixel and page.extrasamples[-1:] in ((1,), (2,))
    full, own = (one.keyframe for one in (levels[0], series))
    reduced = full.imagelength / own.imagelength, full.imagewidth / own.imagewidth
    return dict(stored, alpha=alpha, levels=len(levels), reduced=reduced, **about)


def _level(path: Path, levels: Sequence[Any], pixel_size: float | None, wanted: Level
           ) -> tuple[int, float | None]:
    """The number of the size wanted of a slide, and its pixel size; others have one size."""
    shapes = [(one.keyframe.imagelength, one.keyframe.imagewidth) for one in levels]
    sizes = [(h, w, pixel_size and pixel_size * shapes[0][1] / w) for h, w in shapes]
    number = wanted(sizes) if callable(wanted) else wanted
    if not 1 <= number <= len(levels):
        raise ValueError(f"{path}: level={number}, expected 1..{len(levels)} ("
                         + ", ".join(f"{h} x {w}" for h, w in shapes) + " px)")
    return number, sizes[number - 1][2]


def level_of(pixel_size: float) -> Level:
    """The coarsest size of a slide whose pixels (µm) are no larger."""
    def choose(sizes: Sizes) -> int:
        if sizes[0][2] is None:
            advice = f"give level=1..{len(sizes)}" if len(sizes) > 1 else (
                "pixel_size= chooses among the sizes of a slide, and here is one; leave it out, "
                "and give diameter= in px")
            raise ValueError(f"pixel_size={pixel_size:g}: the file does not say how large a pixel "
                             f"is; {advice}")
        return max((number for number, (_, _, size) in enumerate(sizes, 1)
                    if size and size <= 1.05 * pixel_size), default=1)
    return choose


def overview_level(sizes: Sizes) -> int:
    """The smallest size of a slide that has OVERVIEW pixels, or the largest there is."""
    return max((number for number, (h, w, _) in enumerate(sizes, 1) if h * w >= OVERVIEW),
               default=1)


def _tiff_metadata(tif: tifffile.TiffFile, page: Any) -> dict[str, Any]:
    """Channel names, pixel size and notices, from OME, else ImageJ, else resolution tags."""
    sizes, largest, notices = [], math.inf, []
    if (pixels := _ome_pixels(tif)) is not None:
        names = [channel.get("Name") for channel in pixels.iterfind("{*}Channel")]
        if tif.series[0].kind != "ome":        # one file of a set: its channels are not known
            names = None
        sizes = [_ome_size(pixels, key) for key in ("PhysicalSizeX", "PhysicalSizeY")]
    else:
        imagej = tif.imagej_metadata or {}
        names = imagej.get("Labels")
        if names and any(re.match(r"[czt]:\d+/\d+|.*\n", str(name)) for name in names):
            names = None                                         # titles of slices, each file's own
        if "unit" in imagej:
            unit = _in_unit(1, imagej["unit"])
            down = _in_unit(1, imagej.get("yunit", imagej["unit"]))
            largest = CALIBRATED if unit >= 1e4 else math.inf     # cm and inch are a printer's, too
        else:
            unit = down = {2: 25400.0, 3: 1e4}.get(int(page.tags.valueof(296, 2)), 0)
            largest = CALIBRATED
        for tag, each in ((282, unit), (283, down)):          # XResolution, YResolution: a fraction
            across, units = page.tags.valueof(tag, (0, 1))
            sizes.append(each * units / across if across else 0)
        if aperio := re.search(r"\bMPP = ([0-9.]+)", page.description if tif.is_svs else ""):
            sizes = [float(aperio[1])] * 2
    x, y = sizes
    if not (x == 0 or SMALLEST <= x < math.inf and y == y):
        x, notices = 0, [f"a pixel size of {x:.4g} µm cannot be; pixel size left out"]
    if 0 < x < largest and y and not 0.99 < x / y < 1.01:
        x, notices = 0, [f"pixels of {x:.4g} x {y:.4g} µm are not square; pixel size left out"]
    if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE and page.bitspersample > 1:
        notices.append("stored with white as 0; values are taken as stored")
    if len(tif.series) > 1 and not (tif.is_svs or tif.is_ndpi or tif.is_scn):    # label, macro
        notices.append(f"{len(tif.series) - 1} further image series in the file left out")
    return dict(names=names if names and all(names) else None, notices=notices,
                pixel_size=x if 0 < x < largest else None)


def _check_page_chain(path: Path, tif: tifffile.TiffFile) -> None:
    """Follow the pages to their end, which lies behind that of a file that was cut, as may the
    texts of the first page."""
    form, file = tif.tiff, tif.filehandle
    visited: set[int] = set()
    offset = tif.pages.first.offset
    while offset:
        if offset in visited:
            raise Damaged("the pages come back to an earlier one")
        file.seek(offset)
        count = file.read(form.tagnosize).ljust(form.tagnosize, b"\xff")
        length = struct.unpack(form.tagnoformat, count)[0] * form.tagsize
        if offset + length + form.tagnosize + form.offsetsize > file.size:
            raise Damaged(f"{file.size} bytes, and page {len(visited) + 1} ends behind them")
        entries = file.read(length)
        for _, kind, items, value in [] if visited else struct.iter_unpack(
                tif.byteorder + ("HHQQ" if tif.is_bigtiff else "HHII"), entries):
            size = items * struct.calcsize("=" + tifffile.TIFF.DATA_FORMATS.get(kind, "x"))
            if form.tagoffsetthreshold < size and file.size < value + size and not tif.is_ndpi:
                raise Damaged(f"{file.size} bytes, and a tag ends behind them")
        visited.add(offset)
        offset = struct.unpack(form.offsetformat, file.read(form.offsetsize))[0]


def _promised_pixels(tif: tifffile.TiffFile, page: Any) -> int:
    """Pixels of the first image that ImageJ's or OME's metadata announce in this file."""
    plane = page.imagelength * page.imagewidth
    if tif.is_ome:
        pixels = _ome_pixels(tif)
        # several files of one set name each other
        if pixels is not None and pixels.find("{*}TiffData/{*}UUID[@FileName]") is None:
            with suppress(ValueError):
                return plane * math.prod([int(pixels.get(f"Size{axis}", "1")) for axis in "CZT"])
    elif tif.is_imagej:
        count = (tif.imagej_metadata or {}).get("images", 1)
        return plane * page.samplesperpixel * (count if isinstance(count, int) else 1)
    return 0


def _check_extent(path: Path, end: int) -> None:
    if end > (size := path.stat().st_size):
        raise ValueError(f"{path}: truncated TIFF, {size} bytes of at least {end}; copy or export "
                         "it again")


class _Segments:
    """Reader of the tiles or strips of TIFF pages, with a cache of the last ones."""

    def __init__(self, path: Path, pages: list[Any]):
        self.path, self.pages = path, pages
        with image_decoding(path):
            self.key = key = pages[0].keyframe
            self.codec = repr(key.compression)
            self.h, self.w = min(key.rowsperstrip, key.imagelength), key.imagewidth
            if key.is_tiled:
                self.h, self.w = key.tilelength, key.tilewidth     # px, of a strip or tile
            self.down = math.ceil(key.imagelength / self.h)
            self.across = math.ceil(key.imagewidth / self.w)
            self.separate = key.planarconfig == tifffile.PLANARCONFIG.SEPARATE
            check_image_memory(path, self.h * self.w * key.samplesperpixel * key.dtype.itemsize)
            self.decode = key.decode
            if key.compression == JPEG and key.bitspersample == 8 and isinstance(
                    tifffile.TIFF.DECOMPRESSORS, _Codecs):
                self.decode = partial(_decode_jpeg, key)
            self.decode(None, 0)                              # raises here where a codec is missing
            places = [list(zip(page.dataoffsets, page.databytecounts, strict=True))
                      for page in pages]
        count = self.down * self.across * (key.samplesperpixel if self.separate else 1)
        if any(len(place) != count for place in places):
            raise ValueError(f"{path}: damaged TIFF, a page lacks some of its {count} tiles or "
                             "strips; copy or export it again")
        _check_extent(path, max(offset + size for place in places for offset, size in place))
        self.cache: OrderedDict[tuple[int, int], tuple[np.ndarray, int, int, int]] = OrderedDict()
        self.bytes = 0                                             # held by cache

    def __call__(self, channels: Sequence[int], rows: slice, columns: slice) -> np.ndarray:
        S = self.key.samplesperpixel
        h, w = rows.stop - rows.start, columns.stop - columns.start
        out = np.empty((len(channels), h, w), self.key.dtype)
        # two bands of a walk share a row of tiles, which must fit
        limit = max(CACHE, len(channels) * self.h * self.key.imagewidth * out.itemsize)
        for page in dict.fromkeys(i // S for i in channels):
            samples = {k: i % S for k, i in enumerate(channels) if i // S == page}
            layers = sorted(set(samples.values())) if self.separate else [0]
            down = range(rows.start // self.h, math.ceil(rows.stop / self.h))
            across = range(columns.start // self.w, math.ceil(columns.stop / self.w))
            for layer, i, j in itertools.product(layers, down, across):
                index = (layer * self.down + i) * self.across + j
                part, first, top, left = self.decoded(page, index, limit)
                y0, y1 = max(rows.start, top), min(rows.stop, top + part.shape[0])
                x0, x1 = max(columns.start, left), min(columns.stop, left + part.shape[1])
                target = out[:, y0 - rows.start:y1 - rows.start,
                             x0 - columns.start:x1 - columns.start]
                for k, sample in samples.items():                  # k: row of out
                    if first <= sample < first + part.shape[2]:
                        target[k] = part[y0 - top:y1 - top, x0 - left:x1 - left, sample - first]
        return out

    def decoded(self, page: int, index: int, limit: int) -> tuple[np.ndarray, int, int, int]:
        """A tile or strip (h, w, samples) with its first sample, row and column."""
        place = page, index
        if place not in self.cache:
            frame = self.pages[page]
            with image_decoding(self.path, self.codec):
                handle = frame.parent.filehandle
                handle.seek(frame.dataoffsets[index])
                data = handle.read(frame.databytecounts[index]) or None          # None: sparse file
                part, (first, _, top, left, _), shape = self.decode(
                    data, index, jpegtables=frame.jpegtables, jpegheader=self.key.jpegheader)
                if part is None:
                    part = np.full(shape, self.key.nodata, self.key.dtype)      # (1, h, w, samples)
            self.cache[place] = part[0], first, top, left
            self.bytes += part.nbytes
            while self.bytes > limit and len(self.cache) > 1:
                self.bytes -= self.cache.popitem(last=False)[1][0].nbytes
        self.cache.move_to_end(place)
        return self.cache[place]


# -------------------------------------------------------------------------------- decoders of TIFF

class _Codecs(dict):
    """Decoders by TIFF's number, bounded by what a strip or tile claims; where tifffile has none,
    Pillow's libtiff. With imagecodecs installed its own are used, which are bounded and quicker."""

    def __init__(self, known):
        self.known = known
        super().__init__({8: _inflate, 32946: _inflate, 34925: _decode_lzma, JPEG: _decode_jpeg})

    def __missing__(self, number: int) -> Callable[..., Any]:
        return partial(_decode_by_libtiff, number) if number in LIBTIFF else self.known[number]


def _inflate(data: bytes, out: int, **_: Any) -> bytes:
    stream = zlib.decompressobj()
    plain = stream.decompress(data, out)
    if len(plain) < out and not stream.eof:
        raise zlib.error("incomplete stream")
    return plain


def _decode_lzma(data: bytes, out: int, **_: Any) -> bytes:
    return lzma.LZMADecompressor().decompress(data, out)


def _decode_by_libtiff(number: int, data: bytes, out: int, **_: Any) -> bytes:
    """Plain bytes of a strip, which is read as the one row of a gray image."""
    tags = {256: out, 257: 1, 258: 8, 259: number, 262: 1, 273: 8 + 2 + 9 * 12 + 4, 277: 1, 278: 1,
            279: len(data)}
    head = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    head += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    with PIL.Image.open(io.BytesIO(head + b"\0" * 4 + data), formats=("TIFF",)) as image:
        return image.tobytes()


def _decode_jpeg(key: Any, data: bytes | None, index: int, jpegtables: bytes | None = None,
                 **_: Any) -> tuple[np.ndarray | None, Any, Any]:
    """As the decode() of a page of tifffile; colours as the page says, not as Pillow guesses."""
    empty, place, shape = key.decode(None, index)
    if data is None:
        return empty, place, shape
    rgb = key.photometric == tifffile.PHOTOMETRIC.RGB and not key.is_jfif
    marker = b"\xff\xee\x00\x0eAdobe\x00\x64\0\0\0\0" + (b"\0" if rgb else b"\1")
    tables = (jpegtables or b"")[2:-2]
    with PIL.Image.open(io.BytesIO(data[:2] + marker * (shape[3] == 3) + tables + data[2:]),
                        formats=("JPEG",)) as image:
        if image.width * image.height > math.prod(shape[1:3]) or len(image.getbands()) != shape[3]:
            raise Damaged(f"a tile of {image.height} x {image.width} px {image.mode}, expected at "
                          f"most {shape[1]} x {shape[2]} with {shape[3]} samples")
        part = np.asarray(image).reshape(1, image.height, image.width, shape[3])
    return part, place, part.shape


def _read_by_pillow(path: Path, pages: list[Any]) -> list[np.ndarray]:
    """Whole pages (H, W) of few bits, which tifffile cannot decode, as stored."""
    planes = []
    with PIL.Image.open(path, formats=("TIFF",)) as image:
        for page in pages:
            image.seek(page.index)
            plane = np.asarray(image)
            if plane.shape != (page.imagelength, page.imagewidth):
                raise ValueError(f"{page.bitspersample} bits and {page.samplesperpixel} samples a "
                                 "pixel need imagecodecs")
            if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
                plane = ~plane
            if image.mode == "L":                                  # stretched to 8 bits
                plane = plane // np.uint8(255 // (2 ** page.bitspersample - 1))
            planes.append(plane.astype(np.uint8))
    return planes


if importlib.util.find_spec("imagecodecs") is None:
    tifffile.TIFF.DECOMPRESSORS = _Codecs(tifffile.TIFF.DECOMPRESSORS)


# ------------------------------------------------------------------------- TIFFs as bytes in memory

def decode_tiff(body: bytes, out: np.ndarray) -> None:
    """Decode a TIFF of one page into out (H, W) uint16; ValueError if it is another image."""
    with _tiff_of(body) as tif:
        page, pages = tif.pages.first, len(tif.pages)
        if max(map(sum, zip(page.dataoffsets, page.databytecounts, strict=True))) > len(body):
            raise Damaged("truncated TIFF")
        if page.shape == out.shape and page.dtype == out.dtype and pages == 1:
            page.asarray(out=out, maxworkers=1)
            return
        found, expected = (" x ".join(map(str, shape)) for shape in (page.shape, out.shape))
        found = f"{found} px of {page.dtype}, {pages} page"
    raise ValueError(f"wrong size, {found}; expected {expected} px of {out.dtype}, 1 page")


def tiff_size(body: bytes) -> tuple[int, int]:
    """(H, W) of a TIFF of one plane."""
    with _tiff_of(body) as tif:
        H, W = tif.pages.first.shape
    return H, W


@contextmanager
def _tiff_of(body: bytes) -> Iterator[tifffile.TiffFile]:
    try:
        with tifffile.TiffFile(io.BytesIO(body)) as tif:
            yield tif
    except Damaged:
        raise
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise Damaged(f"damaged or no TIFF ({reason})") from None


# ------------------------------------------------------------------------------------- intensities

def to_rgb(pixels: np.ndarray) -> np.ndarray:
    """(3, H, W), as the network sees it: one channel three times, two as [a, b, 0], three."""
    if len(pixels) not in (1, 2, 3):
        raise ValueError(f"{len(pixels)} channels, expected 1 to 3; choose with channels=1,2 "
                         "(counted from 1; in training data.channels=1,2) or by name")
    if len(pixels) == 2:
        return np.concatenate([pixels, np.zeros_like(pixels[:1])])
    return pixels if len(pixels) == 3 else np.repeat(pixels, 3, axis=0)


def percentiles(image: Source | np.ndarray, low: float = 1.0, high: float = 99.8) -> np.ndarray:
    """The low and high percentile of each channel over the whole image, (C, 2) float64.

    As numpy.percentile, but integers of 8 and 16 bits are counted band by band. Where the two are
    equal, as in a black image with few cells, the high one is the channel's largest value. Whole
    numbers need STEPS between them: smooth noise of a few grey levels is islands with sharp
    edges, like cells. A channel that has less is flat, and both are the low one.
    """
    pixels = math.prod(image.shape[1:])
    at = np.array([low, high]) / 100 * (pixels - 1)                # ranks, between two values
    below = at.astype(np.int64)
    ranks = [*below, *np.minimum(below + 1, pixels - 1), int(HOT * (pixels - 1)), pixels - 1]
    small = image.dtype.kind in "ui" and image.dtype.itemsize <= 2
    values = _ranked_by_counting(image, ranks) if small else _ranked_by_sorting(image, ranks)
    a, b, t = values[:, :2], values[:, 2:4], at - below            # values: (C, 6) float64
    limits = np.where(t < 0.5, a + (b - a) * t, b - (b - a) * (1 - t))       # rounded as NumPy does
    low, high, bright, most = limits[:, 0], limits[:, 1], values[:, 4], values[:, 5]
    high[:] = np.where(low < high, high, most)
    if image.dtype.kind in "ui":
        high[:] = np.maximum(high, np.minimum(bright, low + STEPS))
        high[:] = np.where(high - low < STEPS, low, high)
    if isinstance(image, Source) and image.lossy:      # what JPEG puts into channels that are dark
        high[:] = np.where(high - low < BLEED * (high - low).max(), low, high)
    return limits


def is_flat(limits: np.ndarray) -> bool:
    """Whether no channel has contrast; limits (C, 2)."""
    low, high = np.asarray(limits).T
    return bool((low == high).all())


def _ranked_by_counting(image: Source | np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    least = np.iinfo(image.dtype).min
    counts = [np.zeros(1, np.int64)] * image.shape[0]           # pixels of each value from least on
    for band in _bands(image):
        for c, channel in enumerate(band):
            keys = channel.astype(np.int64) - least if least else channel
            count = np.bincount(keys.ravel(), minlength=len(counts[c]))
            count[:len(counts[c])] += counts[c]
            counts[c] = count
    return np.array([np.searchsorted(np.cumsum(count), ranks, side="right") for count in counts],
                    np.float64) + least


def _ranked_by_sorting(image: Source | np.ndarray, ranks: Sequence[int]) -> np.ndarray:
    pixels = np.concatenate(list(_bands(image)), 1) if isinstance(image, Source) else image
    return np.array([np.partition(channel, ranks, None)[ranks] for channel in pixels], np.float64)


def _bands(image: Source | np.ndarray) -> Iterator[np.ndarray]:
    """Bands of rows, (C, h, W)."""
    _, H, W = image.shape
    rows = max(1, COUNTED // W)
    for y in range(0, H, rows):
        end = min(y + rows, H)
        yield image.region(y, end, 0, W) if isinstance(image, Source) else image[:, y:end]


def sampled_limits(pixels: np.ndarray) -> np.ndarray:
    """Percentiles 1 and 99.8 of each channel, (C, 2) float32, for a stream of images.

    Exact up to 512 x 512 px; of larger images from every k-th row and column, which puts ranks off
    by about 0.04 %: all would take longer than decoding.
    """
    step = max(1, math.isqrt((pixels[0].size - 1) // SAMPLED))
    return percentiles(pixels[:, ::step, ::step]).astype(np.float32)


def normalise(pixels: np.ndarray, limits: np.ndarray) -> np.ndarray:
    """(x - low) / (high - low) per channel, clipped to [0, 1], float32; 0 where low = high.

    Clipped, since a hot pixel or a speck of dirt would rule what the network sees around it.
    pixels : (C, H, W); limits : (C, 2).
    """
    low, high = np.asarray(limits, np.float64).T[..., None, None]  # (C, 1, 1) each
    scale = np.divide(1, high - low, out=np.zeros_like(low), where=high > low)
    enough = np.float32 if pixels.dtype.itemsize <= 2 else np.float64       # holds pixels unrounded
    x = np.subtract(pixels, low, dtype=enough, casting="same_kind")
    x *= scale.astype(enough)
    return x.clip(0, 1, out=x).astype(np.float32, copy=False)


# --------------------------------------------------------------------------------- writing, labels

def write_tiff(path: str | Path, pixels: Any, **options: Any) -> None:
    """Write a compressed TIFF of gray channels; options : as of tifffile.imwrite."""
    with runs.replacing(path) as temporary:
        tifffile.imwrite(temporary, pixels, photometric="minisblack", compression="zlib", **options)


def write_image(path: Path, image: Image) -> None:
    """Write a TIFF, the same bytes always; an OME one if OME knows the type."""
    ome: dict[str, Any] = {"UUID": uuid.uuid5(uuid.NAMESPACE_URL, path.name).urn}
    if image.channels:
        ome["Channel"] = {"Name": list(image.channels)}
    if image.pixel_size:
        ome |= {"PhysicalSizeX": image.pixel_size, "PhysicalSizeY": image.pixel_size}
    known = image.pixels.dtype.str[1:] in ("u1", "u2", "u4", "i1", "i2", "i4", "f4", "f8")
    write_tiff(path, image.pixels, ome=known, metadata={"axes": "CYX", **(ome if known else {})})


def read_labels(path: str | Path, plane: int | None = None, time: int | None = None
                ) -> np.ndarray:
    """(H, W) int32 labels from TIFF, PNG or .npy."""
    with open_image(path, None, plane, time, colours=False) as source:
        if source.shape[0] != 1 or source.dtype.kind == "f":
            raise ValueError(f"{path}: {source.shape[0]} channels of {source.dtype}, expected "
                             "labels: one channel of integers; give each cell a whole number and "
                             "save it as uint16")
        labels = source.whole().pixels[0]
    check_label_image(labels, path, np.iinfo(np.int32).max)
    return labels.astype(np.int32)


def write_labels(path: str | Path, labels: np.ndarray, pixel_size: float | None = None,
                 record: dict | None = None) -> None:
    """Write a TIFF of uint16, or uint32 if ids pass 65,535.

    pixel_size : µm; record : how they were made, which label_record() gives back.
    """
    check_label_image(labels, path, np.iinfo(np.uint32).max)
    dtype = np.uint16 if labels.max(initial=0) < 1 << 16 else np.uint32
    write_tiff(path, labels.astype(dtype), **_label_options(pixel_size, record))


def label_record(file: str | Path | bytes) -> dict | None:
    """The record inside a label image, of which the first RECORD bytes are enough; {} if there is
    none, None if the file is damaged."""
    with suppress(*DAMAGE), tifffile.TiffFile(
            io.BytesIO(file) if isinstance(file, bytes) else file) as tif:
        for tag in ("Software", "ImageDescription"):             # of a stack, of a single image
            with suppress(ValueError, AttributeError):
                record = json.loads(tif.pages.first.tags.valueof(tag, ""))
                if isinstance(record, dict) and "source" in record:
                    return record
        return {}
    return None


class LabelWriter:
    """A label image (H, W) written while its parts come, left to right and top to bottom.

    A single part becomes a plain TIFF, several a tiled one of uint32. A band of parts lies in
    memory. The file appears when it is closed.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], pixel_size: float | None = None):
        self.path, self.size, self.pixel_size = Path(path), size, pixel_size
        self.whole: np.ndarray | None = None                       # the only part
        self.band = np.zeros((0, size[1]), np.uint32)              # rows not compressed yet
        self.spool = tempfile.TemporaryFile(dir=self.path.parent)  # noqa: SIM115  # of tiles
        self.lengths: list[int] = []                               # their bytes

    def add(self, core: tuple[slice, slice], labels: np.ndarray) -> None:
        """Take the labels of these rows and columns."""
        (H, W), (rows, columns) = self.size, core
        if labels.shape == self.size:
            self.whole = labels
            return
        if columns.start == 0:
            self.band = np.pad(self.band, ((0, rows.stop - rows.start), (0, 0)))
        self.band[len(self.band) - (rows.stop - rows.start):, columns] = labels
        if columns.stop == W:
            while len(self.band) >= LABEL_TILE or (len(self.band) and rows.stop == H):
                for x in range(0, W, LABEL_TILE):
                    part = self.band[:LABEL_TILE, x:x + LABEL_TILE]
                    padded = np.pad(part, [(0, LABEL_TILE - n) for n in part.shape])
                    tile = _label_tile(padded) if padded.any() else _empty_tile()
                    self.lengths.append(self.spool.write(tile))
                self.band = self.band[LABEL_TILE:]

    def close(self, record: dict | None = None) -> None:
        if self.whole is not None:
            self.spool.close()
            return write_labels(self.path, self.whole, self.pixel_size, record)
        H, W = self.size
        expected = math.ceil(H / LABEL_TILE) * math.ceil(W / LABEL_TILE)
        if len(self.lengths) != expected:
            raise ValueError(f"{self.path}: {len(self.lengths)} tiles of labels, expected "
                             f"{expected} for {H} x {W} px")
        self.spool.seek(0)
        with self.spool:
            write_tiff(self.path, (self.spool.read(length) for length in self.lengths),
                       shape=self.size, dtype=np.uint32, tile=(LABEL_TILE, LABEL_TILE),
                       bigtiff=4 * H * W > CLASSIC, byteorder="<",
                       **_label_options(self.pixel_size, record))


def write_label_stack(path: str | Path, planes: Iterable[np.ndarray], shape: tuple[int, int, int],
                      axes: str, largest: int, pixel_size: float | None = None,
                      step: float | None = None, record: dict | None = None) -> None:
    """Write labels (Z or T, H, W), one plane in memory, as an OME-TIFF.

    axes : ZYX or TYX; largest : the largest label; pixel_size, step : µm in a plane and to the
    next one, or seconds for frames; record : as of write_labels.
    """
    dtype = np.uint16 if largest < 1 << 16 else np.uint32
    words: dict[str, Any] = {"axes": axes}
    if pixel_size:
        words |= {"PhysicalSizeX": pixel_size, "PhysicalSizeXUnit": "µm",
                  "PhysicalSizeY": pixel_size, "PhysicalSizeYUnit": "µm"}
    if step:
        words |= {"PhysicalSizeZ": step, "PhysicalSizeZUnit": "µm"} if axes[0] == "Z" else \
            {"TimeIncrement": step, "TimeIncrementUnit": "s"}
    # OME's words, which have the description, come last in the file: a head would not show them
    options = _label_options() | ({"software": json.dumps(record)} if record else {})
    words["UUID"] = uuid.uuid5(uuid.NAMESPACE_URL, Path(path).name).urn
    write_tiff(path, (plane.astype(dtype) for plane in planes), shape=shape, dtype=dtype, ome=True,
               metadata=words, bigtiff=math.prod(shape) * dtype().itemsize > CLASSIC, **options)


def _label_tile(labels: np.ndarray) -> bytes:
    return zlib.compress(labels.astype("<u4").tobytes(), 3)


@functools.cache
def _empty_tile() -> bytes:
    """Most of a slide is glass."""
    return _label_tile(np.zeros((LABEL_TILE, LABEL_TILE)))


def _label_options(pixel_size: float | None = None, record: dict | None = None) -> dict[str, Any]:
    # level 3: a third less would take three times as long
    options: dict[str, Any] = dict(compressionargs={"level": 3})
    if record:
        options |= dict(description=json.dumps(record), metadata=None)
    if pixel_size:
        options |= dict(resolution=(1e4 / pixel_size,) * 2, resolutionunit="CENTIMETER")
    return options


def check_label_image(labels: np.ndarray, where: str | Path, largest: int) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels of {labels.dtype}, {labels.shape}; expected integers "
                         "(H, W)")
    if labels.min(initial=0) < 0 or labels.max(initial=0) > largest:
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}, expected 0 to "
                         f"{largest}")
