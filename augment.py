"""Augmentation of labelled images in batches, on the device that they lie on.

    python augment.py configs/augment.yaml [key=value ...]

writes `copies` augmented crops of each image in `data` to output/images and output/labels (16-bit
and label TIFF of the same name), with the configuration beside them. Existing crops are kept: the
same command goes on where it stopped, and makes anew what an image that changed had.

In training nothing is decoded, resized or drawn per pixel on the CPU:

    resident = Resident(images, device)          # of data.Labelled
    numbers = np.arange(B) + step * B            # each sample of a run has a number of its own
    chosen = resident.draw(seed, numbers)
    x, target, labels = sample(resident, chosen, numbers, Augment(), 256, seed, cap=4)

Every random value is a hash of (seed, number of the sample, name of the value): a sample depends
on no batch, rank or worker. The few values per sample are drawn on the host, which never waits for
a GPU; noise is drawn on the device.

Letters: N images, B samples, k some of them, S side of a crop, C channels worked on: 1 for gray
images, whose three channels are equal, noise included.
"""
from __future__ import annotations

import functools
import glob
import hashlib
import math
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import runs

with runs.lazy():
    import numpy as np
    import scipy
    import skimage
    import torch
    import tqdm

    import data
    import images
    import watershed

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from torch import Tensor

Range = tuple[float, ...]                   # low, high


@dataclass(frozen=True)
class Augment:
    """Probabilities, each with the range of its strength, even in the logarithm (brightness: even).
    """
    scale: Range = (0.6, 1.67)              # factor on the image's nominal scale
    on_cell: float = 0.7                    # that a crop lies around a cell, not anywhere
    flip: float = 0.5                       # of a mirror image
    quarter: float = 1.0                    # of a turn by 0, 90, 180 or 270 degrees
    rotate: float = 0.5                     # of a turn by any angle instead
    elastic: float = 0.3                    # of elastic jitter
    elastic_px: Range = (0.5, 3.0)          # px of the crop, standard deviation of the displacement
    negative: float = 0.04                  # of noise, texture or even background without cells
    light: float = 0.3                      # of uneven light, a smooth field that multiplies
    light_range: Range = (0.05, 0.35)       # standard deviation of the field's logarithm
    paste: float = 0.0                      # of cells of another image of the set, laid over
    halo: float = 0.0                       # of bright or dark rims, as in phase contrast
    halo_px: Range = (2.0, 8.0)             # px of the crop, width of the rim
    halo_range: Range = (0.3, 1.5)          # strength, in contrasts of what it surrounds
    coarse: float = 0.0                     # of fewer pixels: reduced, and enlarged again
    coarse_range: Range = (0.4, 1.0)        # factor
    blocks: float = 0.0                     # of JPEG compression
    blocks_range: Range = (0.5, 6.0)        # multiples of the standard's tables (quality 50: 1)
    stain: float = 0.0                      # of optical densities mixed anew (colour images)
    stain_range: Range = (0.05, 0.3)        # distance of the mixture from none
    blur: float = 0.2                       # of a Gaussian blur
    blur_px: Range = (0.4, 2.0)             # px of the crop, sigma
    noise: float = 0.3                      # of Gaussian noise
    noise_range: Range = (0.005, 0.1)       # sigma; the image is in [0, 1]
    shot: float = 0.3                       # of shot noise
    shot_photons: Range = (20.0, 1000.0)    # photons at intensity 1
    dim: float = 0.15                       # of a short exposure, photons counted, normalised again
    dim_photons: Range = (1.5, 60.0)        # photons at intensity 1
    invert: float = 0.2                     # of inverted polarity: dark on light, light on dark
    contrast: float = 0.4                   # of a stretch around the image's mean
    contrast_range: Range = (0.5, 1.6)      # factor
    brightness: float = 0.4                 # of an offset
    brightness_range: Range = (-0.15, 0.15)  # in intensity
    gamma: float = 0.3                      # of x ** gamma
    gamma_range: Range = (0.6, 1.67)        # exponent
    shuffle: float = 0.2                    # of another order of the channels (colour images)
    mix: float = 0.1                        # of weighted means of all channels (colour images)
    gray: float = 0.2                       # of one such mean in all channels (colour images)
    drop: float = 0.05                      # of one or two black channels

    def __post_init__(self):
        for f in fields(self):
            value = getattr(self, f.name)
            if f.type == "float" and not 0 <= value <= 1:
                raise ValueError(f"{f.name}={value:g}: expected a probability from 0 to 1")
            if f.type == "Range" and not (len(value) == 2 and value[0] <= value[1]):
                raise ValueError(f"{f.name}={list(value)}: expected two numbers, low and high")
            if f.type == "Range" and f.name != "brightness_range" and value[0] <= 0:
                raise ValueError(f"{f.name}={list(value)}: expected numbers above 0")

    def still(self) -> Augment:
        """The same without moves, for sets that this script has written."""
        return replace(self, scale=(1.0, 1.0), on_cell=0.0, flip=0.0, quarter=0.0, rotate=0.0,
                       elastic=0.0)


@dataclass(frozen=True)
class Config:
    data: tuple[str, ...]                   # folders in any layout that data.py reads
    output: str = "dat/augmented_training_data"    # folder for images/ and labels/
    copies: runs.Count = 4                  # crops of each image
    size: Annotated[int, runs.within(8, 8192)] = 256       # px, side of a crop
    seed: runs.Whole = 0                    # of everything random
    channels: tuple[str, ...] | None = None  # numbers from 1 or names, up to three; null: all
    diameter: runs.Positive | None = None   # px, of an image's median cell; null: as it is
    overwrite: bool = False                 # make existing crops anew
    augment: Augment = field(default_factory=lambda: Augment(invert=0.0, negative=0.0))

    def __post_init__(self):
        if not self.data or Path(self.output) in map(Path, self.data):
            raise ValueError(f"data={list(self.data)}: expected folders other than "
                             f"output={self.output}")


# ------------------------------------------------------------------------------------ random values

GOLDEN, FIRST, SECOND = (
    c - (1 << 64) for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def scramble_draws(z: Any) -> Any:
    """splitmix64 (Steele et al., 2014) of an int64 array or tensor; masks make shifts logical."""
    z = z + GOLDEN
    z = (z ^ (z >> 30 & (1 << 34) - 1)) * FIRST
    z = (z ^ (z >> 27 & (1 << 37) - 1)) * SECOND
    return z ^ (z >> 31 & (1 << 33) - 1)


def hash_for_draws(text: str) -> int:
    """64 bits, signed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little",
                          signed=True)


class Draws:
    """Random values of B samples, on the host; config: their probabilities and ranges."""

    def __init__(self, key: np.ndarray, config: Any = None):
        self.key, self.config = key, config                                  # (B,) int64

    @classmethod
    def of(cls, seed: int, numbers: ArrayLike, config: Any = None) -> Draws:
        run = scramble_draws(np.array([seed], np.int64))
        return cls(scramble_draws(run ^ np.asarray(numbers, np.int64)), config)

    def at(self, rows: np.ndarray) -> Draws:
        return Draws(self.key[rows], self.config)

    def streams(self, name: str, channels: int, length: int) -> np.ndarray:
        """(B, channels) int64, starts of sequences: hash i is scramble(start + i GOLDEN)."""
        first = scramble_draws(self.key ^ hash_for_draws(name))[:, None]
        return first + GOLDEN * (length * np.arange(channels))

    def uniform(self, name: str, *shape: int) -> np.ndarray:
        """(B, *shape) in (0, 1)."""
        bits = scramble_draws(self.streams(name, math.prod(shape), 1))
        return (((bits >> 12 & (1 << 52) - 1) + 0.5) * 2.0 ** -52).reshape(-1, *shape)

    def happens(self, name: str) -> np.ndarray:
        return self.uniform(f"{name} happens") < getattr(self.config, name)  # (B,) bool

    def within(self, name: str, limits: tuple[float, ...] | None = None) -> np.ndarray:
        """(B,) in a range; what is positive lies in (1, 2) as often as in (2, 4)."""
        (low, high), u = limits or getattr(self.config, name), self.uniform(name)
        return low * (high / low) ** u if low > 0 else low + (high - low) * u

    def knots(self, name: str, strength: str, channels: int, n: int) -> np.ndarray:
        """(B, channels, n, n) normal values for smoothed_knots(), their deviation drawn for each
        sample."""
        values = scipy.special.ndtri(self.uniform(name, channels, n, n))
        return values * self.within(strength)[:, None, None, None]


@functools.lru_cache
def crop_noise_quantiles(device: torch.device) -> Tensor:
    """65,536 equally likely values of the normal distribution."""
    values = scipy.special.ndtri((np.arange(65536) + 0.5) / 65536)
    return torch.from_numpy(values).float().to(device)


def crop_noise(name: str, draws: Draws, like: Tensor) -> Tensor:
    """Standard normal noise (k, C, S, S); each value takes 16 bits of a hash."""
    (_, C, size, _), device = like.shape, like.device
    streams = send_crop_values(draws.streams(name, C, size ** 2), device)[:, :, None]
    steps = GOLDEN * torch.arange(-(-size ** 2 // 4), device=device)
    bits = scramble_draws(streams + steps).view(torch.int16)[..., :size ** 2]
    values = crop_noise_quantiles(device).index_select(0, bits.flatten().int() + 32768)
    return values.view(like.shape)


# ----------------------------------------------------------------------------------------- resident

LEVELS = 4              # the image; a half, a quarter, an eighth of its side


class Resident:
    """N images of any size and their labels, on one device.

    cap : px; None keeps the uncapped distance maps, which sample(cap=None) needs.
    diameter : px, of an image's median cell before the random factor. None: as it is.
    limit : bytes of the words, and of the labels, that are held in memory; more lie in a file.

    A pixel is one 64-bit word: three channels and the uncapped distance, 16 bits each; one gather
    brings all. Images lie end to end, each with its reductions by 2, 4 and 8: a crop that shrinks
    samples the nearest of these, for bilinear sampling of the full image would skip pixels and turn
    fine texture into grain. 14.6 bytes a pixel in all.
    """

    def __init__(self, images: Iterable[data.Labelled], device: str | torch.device = "cpu",
                 cap: float | None = 4.0, diameter: float | None = None, limit: float = math.inf):
        words, labels = Pile(np.int64, limit), Pile(np.int32, limit)
        depths, centres, rows, groups, types = [], [], [], [], []
        for image in images:
            pixels, truth = image.pixels, image.labels
            if pixels.shape != (3, *truth.shape) or truth.dtype.kind not in "iu" or truth.size == 0:
                raise ValueError(f"{image.name}: pixels {pixels.shape}, labels {truth.shape} "
                                 f"{truth.dtype}; expected (3, H, W) and integers (H, W)")
            low, high = pixels.min(), pixels.max()
            if not (low >= 0 and high <= 1):
                raise ValueError(f"{image.name}: values {low:g} to {high:g}; expected 0 to 1")
            truth = skimage.segmentation.relabel_sequential(truth)[0].astype(np.int32)   # 0..n
            cells = int(truth.max())
            median, centre, depth = measure_for_crops(truth, cells + 1)
            far = np.zeros(truth.shape, np.float32) if cap is not None else \
                watershed.distance_map(truth)
            levels = crop_pyramid(np.concatenate((pixels, far[None])))
            rows.append((median, pixels.mean(), (pixels == pixels[0]).all(), pixels.any((1, 2)),
                         cells, [level.shape[:2] for level in levels]))
            for level in levels:
                words.add(np.round(level * 65535 - 32768).astype(np.int16).view(np.int64).ravel())
            labels.add(truth.ravel())
            centres.append(centre)
            depths.append(depth)
            groups.append(image.set)
            if image.types is not None:
                types.append(np.append(0, image.types))
        if not rows:
            raise ValueError("no images to augment")
        # (N,) px, (N,) intensity, (N,) channels are equal, (N, 3) channel is not black, (N,) cells,
        # (N, LEVELS, 2) px
        diameters, self.mean, self.gray, self.alive, self.cells, self.shape = (
            np.array(column) for column in zip(*rows))
        self.word, self.label = words.offsets().reshape(-1, LEVELS), labels.offsets()
        self.cell = np.cumsum([0, *map(len, depths[:-1])])
        self.centre = np.concatenate(centres)                    # (cells, 2) px, background first
        self.scale = np.ones(len(rows))                                      # (N,) nominal
        seen = diameters > 0
        if diameter is not None:
            self.scale[seen] = diameter / diameters[seen]
        diameters *= self.scale
        self.diameter = float(np.median(diameters[seen])) if seen.any() else None   # px, of all
        self.words, self.labels = words.tensor(device), labels.tensor(device)
        self.depth = torch.from_numpy(np.concatenate(depths)).to(device)
        self.device = self.depth.device
        # (cells,) background first
        self.types = torch.from_numpy(np.concatenate(types)).to(device) if types else None
        # (groups,), (N,)
        self.groups, self.group = np.unique(groups, return_inverse=True)
        self.weigh({})
        self.cap = cap

    def weigh(self, weights: dict[str, float]) -> None:
        """Set how often draw() takes images of each set: {name: weight}, 1 without, 0: never."""
        share = np.cumsum([weights.get(str(name), 1.0) for name in self.groups])
        self.share = share / share[-1]                                       # (groups,) cumulative

    def __len__(self) -> int:
        return len(self.scale)

    def draw(self, seed: int, numbers: np.ndarray) -> np.ndarray:
        """(B,) image of each sample: a group by its weight, every image of it equally often."""
        draws = Draws.of(seed, numbers)
        return self.member(np.searchsorted(self.share, draws.uniform("group")),
                           draws.uniform("image"))

    def member(self, group: np.ndarray, share: np.ndarray) -> np.ndarray:
        """(B,) the image of each group (B,) that lies at this share (B,), 0 to 1, of its images."""
        count = np.bincount(self.group)
        place = (np.cumsum(count) - count)[group] + (share * count[group]).astype(int)
        return np.argsort(self.group, kind="stable")[place]


def load_resident(config: data.TrainingData, seed: int, device: str, cap: float | None):
    """Resident training images; validation images; {train, validation: {name: content hash}}.

    One image after the other is read and packed, so that all of them may be more than the memory.
    """
    pending, validation = data.training_images(config, seed)
    held = [image for image in validation if image.held]
    hashes = {"train": {}, "validation": {image.name: content_hash(image) for image in held}}
    of_type = {image.name: image.types for image in held}
    cells: dict[str, int] = {}
    trained: dict[str, str] = {}                # hash of pixels or labels -> name of the image

    def read() -> Iterator[data.Labelled]:
        for part in pending:
            for image in part():
                hashes["train"][image.name] = content_hash(image)
                cells[image.name], of_type[image.name] = int(image.labels.max()), image.types
                trained.update(dict.fromkeys(data.contents(image.pixels, image.labels), image.name))
                yield image

    limit = config.memory_gb * 1e9 if config.memory_gb else runs.free_memory() / 2
    resident = Resident(read(), device, cap, config.diameter, limit / 2)
    resident.weigh({chosen.name: chosen.weight for chosen in config.sets})
    data.check_cells("data.sets", cells)
    data.check_training_types(of_type, data.training_types(config.types), cells)
    check_trained_apart(held, trained, bool(config.validation), len(cells) == len(held) == 1)
    return resident, validation, hashes


def content_hash(image: data.Labelled) -> str:
    """Hash of pixels, labels and, where there are some, types."""
    types = b"" if image.types is None else image.types.tobytes()
    return hashlib.sha256(image.pixels.tobytes() + image.labels.tobytes() + types).hexdigest()[:16]


def check_trained_apart(held: Sequence[data.Labelled], trained: dict[str, str], chosen: bool,
                        alone: bool) -> None:
    """Refuse held-out images with cells that are trained on, too, under whatever name; warn of
    copies that data.share parted. The only image there is may choose thresholds.

    trained : {data.contents(): name}. chosen : the images to validate on were given. alone : there
    is one image on each side.
    """
    twins = [(trained[content], image.name) for image in held if image.labels.any()
             for content in data.contents(image.pixels, image.labels) if content in trained]
    if not twins:
        return
    one, other = twins[0]
    if alone:
        print(f"{other}: the only image chooses thresholds, too; its scores are too good",
              file=sys.stderr)
    elif chosen:
        raise ValueError(f"{one}: trained on, and validated on as {other}; expected other images "
                         "to validate on: give them, or leave data.validation out, so that "
                         "data.share holds some out")
    else:
        count = len({name for _, name in twins})
        print(f"warning: {one}: trained on, and held out as {other}, {count} such copies in all; "
              "scores are too good, remove the copies", file=sys.stderr)


class Pile:
    """Arrays laid end to end: in memory, or all in a file without a name once they pass a limit of
    bytes. The system keeps in memory what is used of it as long as there is room."""

    def __init__(self, dtype: type, limit: float):
        self.dtype, self.limit = np.dtype(dtype), limit
        self.parts: list[np.ndarray] = []
        self.lengths: list[int] = []
        self.bytes = 0
        self.file: Any = None

    def add(self, part: np.ndarray) -> None:
        self.lengths.append(len(part))
        self.parts.append(part)
        self.bytes += part.nbytes
        if self.file is None and self.bytes > self.limit:
            self.file = tempfile.TemporaryFile(prefix="dinocell-")  # noqa: SIM115  # kept
        if self.file is not None:
            try:
                while self.parts:
                    self.parts.pop(0).tofile(self.file)
            except OSError:                     # NumPy counts bytes instead
                raise OSError(f"{tempfile.gettempdir()}: no space for images beyond the memory; "
                              "set TMPDIR to a larger disk") from None

    def offsets(self) -> np.ndarray:
        """Starts of the parts."""
        return np.cumsum([0, *self.lengths[:-1]])

    def tensor(self, device: str | torch.device) -> Tensor:
        """All parts, on the device; those in a file on the CPU."""
        if self.file is None:
            return torch.from_numpy(np.concatenate(self.parts)).to(device)
        self.file.flush()
        return torch.from_numpy(np.memmap(self.file, self.dtype, "c"))


def take(table: Tensor, index: Tensor) -> Tensor:
    """Values of a table, on the device of the index; the table may lie in a file."""
    return table.index_select(0, index.flatten().to(table.device)).to(index.device)


def measure_for_crops(labels: np.ndarray, n: int) -> tuple[float, np.ndarray, np.ndarray]:
    """Of labels 0..n-1: median diameter (px, 0 without cells), centres (n, 2) and depths (n,):
    largest distances to the own edge, to half a px."""
    flat = labels.ravel()
    area = np.bincount(flat, minlength=n)
    sums = [np.bincount(flat, at.ravel(), minlength=n) for at in np.indices(labels.shape)]
    edge = skimage.segmentation.find_boundaries(labels, connectivity=1)
    away = (scipy.ndimage.distance_transform_edt(~edge) if edge.any()
            else np.full(edge.shape, math.hypot(*edge.shape)))
    depth = np.zeros(n, np.float32)
    np.maximum.at(depth, flat, 1 + away.ravel().astype(np.float32))
    return data.disc_diameter(area[1:]), np.stack(sums, 1) / np.maximum(area, 1)[:, None], depth


def crop_pyramid(planes: np.ndarray) -> list[np.ndarray]:
    """(4, H, W) -> (H, W, 4), (H/2, W/2, 4), ...: means of 2 x 2 px, edges repeated."""
    levels: list[np.ndarray] = [np.ascontiguousarray(planes.transpose(1, 2, 0), np.float32)]
    while len(levels) < LEVELS:
        v = np.pad(levels[-1], [(0, n % 2) for n in levels[-1].shape], "edge")
        levels.append((v[::2, ::2] + v[1::2, ::2] + v[::2, 1::2] + v[1::2, 1::2]) / 4)
    return levels


# ------------------------------------------------------------------------------------------- sample

@contextmanager
def crop_on_one_thread():
    """Run many small operations on one thread: several would wait for each other at each."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@crop_on_one_thread()
def sample(resident: Resident, images: ArrayLike, numbers: ArrayLike, config: Augment, size: int,
           seed: int, cap: float | None = 4.0) -> tuple[Tensor, Tensor, Tensor]:
    """Augmented crops of `images` (B,), as the samples `numbers` (B,) of the run.

    Returns x (B, 3, S, S) in [0, 1], target (B, 1, S, S) distances in [0, 1], labels (B, S, S)
    int32, 1..n of each image. Images and labels are mirrored beyond their borders.
    """
    if cap is None and resident.cap is not None:
        raise ValueError("cap=null needs the uncapped distances: make Resident(..., cap=None)")
    images, draws = np.asarray(images), Draws.of(seed, numbers, config)
    device = resident.device
    scale, y, x = crop_coordinates(resident, images, draws, size)
    negative = draws.happens("negative")
    out = y.new_empty(len(images), 3, size, size)
    far = y.new_empty(len(images), 1, size, size)
    labels = crop_labels(resident, images, y, x)
    labels = labels * send_crop_values(~negative, device)[:, None, None]
    depth = crop_cell_depths(resident, images, scale)            # (B, K)
    over = None
    if cap is not None and config.paste:
        over = paste_cells(resident, images, draws, size, negative, labels, depth)
    if over:
        labels, depth = over.labels, over.depth
    for C in (1, 3):
        rows = np.flatnonzero(resident.gray[images] == (C == 1))
        if len(rows):
            here, some, index = images[rows], draws.at(rows), send_crop_values(rows, device)
            wanted = [*range(C)] + [3] * (cap is None)
            planes = crop_pixels(resident, here, scale[rows], y[index], x[index], wanted)
            crop = touch_crops(planes[:, :C], some, negative[rows], augment_background)
            if over:
                crop = crop.lerp(over.pixels[index, :C], over.alpha[index])
            crop = touch_crops(crop, some, some.happens("stain") & (C == 3), augment_stain)
            crop = expose_crops(crop, some, np.where(negative[rows], 0.5, resident.mean[here]))
            crop = recolour_crops(crop, some, resident.alive[here, :C])  # (k, C -> 3, S, S)
            out.index_copy_(0, index, crop)
            far.index_copy_(0, index, planes[:, -1:])

    if cap is None:
        far, depth = far * (labels > 0)[:, None], torch.ones_like(depth)
    else:
        far, depth = capped_crop_distance(labels, cap), depth.clamp(max=cap)
    return out, crop_distance_per_cell(far, labels, depth), labels


def crop_cell_depths(resident: Resident, images: np.ndarray, scale: np.ndarray) -> Tensor:
    """(B, K) px of the crop: the depth of each cell of the images, background first."""
    device = resident.device
    numbers = torch.arange(int(resident.cells[images].max()) + 1, device=device)
    cell = (send_crop_values(resident.cell[images], device)[:, None] + numbers).clamp(
        max=len(resident.depth) - 1)
    return resident.depth.take(cell) * send_crop_values(scale, device)[:, None]


def crop_cell_types(resident: Resident, images: np.ndarray, place: Tensor) -> Tensor:
    """(n,) type of cells, each of a crop and a label (n, 2), in crops of `images` (B,); 0: unknown,
    as are those that were pasted in."""
    assert resident.types is not None
    crop, label = place.unbind(1)
    first, count = (send_crop_values(values[images], place.device)[crop]
                    for values in (resident.cell, resident.cells))
    return resident.types.take(first + label * (label <= count))


def send_crop_values(array: np.ndarray, device: torch.device) -> Tensor:
    """A few values per sample to the device; floats as float32."""
    array = np.ascontiguousarray(array, np.float32 if array.dtype.kind == "f" else None)
    return torch.from_numpy(array).to(device, non_blocking=True)


def crop_values(values: np.ndarray, like: Tensor) -> Tensor:
    """(k,) or (k, C) to the device as (k, 1 or C, 1, 1)."""
    return send_crop_values(np.reshape(values, (len(values), -1, 1, 1)).astype(float), like.device)


def touch_crops(x: Tensor, draws: Draws, which: np.ndarray,
                change: Callable[[Tensor, Draws], Tensor]) -> Tensor:
    """x, with change(x[rows], draws.at(rows)) written over the rows where `which` (B,) is true."""
    rows = np.flatnonzero(which)
    if len(rows):
        index = send_crop_values(rows, x.device)
        x.index_copy_(0, index, change(x[index], draws.at(rows)))
    return x


# --------------------------------------------------------------------------------------- more cells

class Pasted(NamedTuple):
    """Cells of other images over those of B crops."""
    pixels: Tensor                      # (B, 3, S, S) of the other images
    alpha: Tensor                       # (B, 1, S, S) how far they cover
    labels: Tensor                      # (B, S, S) of both, the pasted ones behind
    depth: Tensor                       # (B, K) of both


def paste_cells(resident: Resident, images: np.ndarray, draws: Draws, size: int,
                negative: np.ndarray, labels: Tensor, depth: Tensor) -> Pasted | None:
    """About half of the cells of another image of the same set over crops; None without any.

    They bring their surroundings along over two pixels; cells under them lose what is covered.
    """
    device = resident.device
    other = resident.member(resident.group[images], draws.uniform("paste image"))
    rows = np.flatnonzero(draws.happens("paste") & ~negative
                          & (resident.gray[other] == resident.gray[images]))
    if not len(rows):
        return None
    other, index = other[rows], send_crop_values(rows, device)
    second = Draws(scramble_draws(draws.key[rows]), draws.config)                  # place and turn
    scale, y, x = crop_coordinates(resident, other, second, size)
    theirs = crop_labels(resident, other, y, x)                                  # (k, S, S)
    whole = crop_cell_depths(resident, other, scale)                                   # (k, K')
    taken = second.uniform("taken", whole.shape[1]) < 0.5
    taken[:, 0] = False
    keep = send_crop_values(taken, device).gather(1, theirs.flatten(1).long())
    theirs = theirs * keep.view(theirs.shape)
    mask = (theirs > 0)[:, None].float()
    F = torch.nn.functional
    soft = F.avg_pool2d(F.max_pool2d(mask, 3, 1, 1), 3, 1, 1, count_include_pad=False)
    pixels = y.new_zeros(len(images), 3, size, size)
    alpha = y.new_zeros(len(images), 1, size, size)
    pixels.index_copy_(0, index, crop_pixels(resident, other, scale, y, x, [0, 1, 2]))
    alpha.index_copy_(0, index, torch.maximum(mask, soft))
    count = send_crop_values(resident.cells[images[rows]], device)[:, None]  # (k, 1) cells below
    both = torch.where(theirs > 0, theirs + count[:, :, None], labels[index]).to(labels.dtype)
    depth = F.pad(depth, (0, whole.shape[1]))                                # theirs follow
    places = count + torch.arange(1, whole.shape[1], device=device)
    return Pasted(pixels, alpha, labels.index_copy(0, index, both),
                  depth.index_copy(0, index, depth[index].scatter(1, places, whole[:, 1:])))


# ----------------------------------------------------------------------------------------- geometry

def crop_coordinates(resident: Resident, images: np.ndarray, draws: Draws, size: int
                     ) -> tuple[np.ndarray, Tensor, Tensor]:
    """scale (B,), px of crop per px of image; y, x (B, S, S), px of each crop pixel in the image.
    """
    device, extent = resident.device, resident.shape[images, 0].astype(float)  # (B, 2) px
    nominal = resident.scale[images]
    least = 0.8 * size / (nominal * extent.min(1))       # less would mirror most of the crop
    scale = nominal * np.maximum(draws.within("scale"), np.minimum(1, least))  # (B,)
    quarter = np.floor(4 * draws.uniform("quarter")) / 4 * draws.happens("quarter")
    turn = 2 * np.pi * np.where(draws.happens("rotate"), draws.uniform("angle"), quarter)
    mirror = np.where(draws.happens("flip"), -1, 1)
    cos, sin = (np.round(f(turn), 12) / scale for f in (np.cos, np.sin))     # quarters: exact
    matrix = np.stack((cos, -sin * mirror, sin, cos * mirror), 1).reshape(-1, 2, 2)  # (B, 2, 2)

    half = np.minimum(size / scale[:, None], extent) / 2                     # stay within
    centre = half + draws.uniform("centre", 2) * (extent - 2 * half)
    cell = resident.cell[images] + 1 + (draws.uniform("cell") * resident.cells[images]).astype(int)
    beside = (draws.uniform("beside", 2) - 0.5) * 0.8 * size / scale[:, None]
    beside += resident.centre[np.minimum(cell, len(resident.centre) - 1)] + 0.5
    on_cell = draws.happens("on_cell") & (resident.cells[images] > 0)
    centre = np.where(on_cell[:, None], np.clip(beside, half, extent - half), centre)  # (B, 2) px
    centre = np.round(centre - size / 2) + (size - 1) / 2                    # on the grid

    yx = crop_grid(matrix, centre, size, device)
    rows = np.flatnonzero(draws.happens("elastic"))
    if len(rows):
        knots = draws.at(rows).knots("elastic", "elastic_px", 2, 2 + size // 32)
        knots = np.einsum("kij,kjyx->kiyx", matrix[rows], knots)
        shift = smoothed_knots(send_crop_values(knots, device), size)
        for i in (0, 1):
            yx[i].index_add_(0, send_crop_values(rows, device), shift[:, i])
    y, x = (mirrored_coordinates(yx[i], send_crop_values(extent[:, i], device)[:, None, None])
            for i in (0, 1))
    return scale, y, x


def crop_grid(matrix: np.ndarray, centre: np.ndarray, size: int, device: torch.device
              ) -> list[Tensor]:
    """y, x (B, S, S): matrix (B, 2, 2) @ (px of the crop from its middle) + centre (B, 2)."""
    at = send_crop_values(np.arange(size) - (size - 1) / 2, device)                      # (S,)
    down, right = (send_crop_values(matrix[:, :, i], device)[:, :, None] * at for i in (0, 1))
    down = down + send_crop_values(centre, device)[:, :, None]
    return [down[:, i, :, None] + right[:, i, None, :] for i in (0, 1)]


def mirrored_coordinates(c: Tensor, extent: Tensor) -> Tensor:
    """Coordinates folded into 0..extent-1: ... 1 0 1 2 1 0 ... for an extent of 3."""
    c = torch.remainder(c, 2 * (extent - 1).clamp(min=1))
    return torch.minimum(c, (2 * (extent - 1) - c).clamp(min=0)).minimum(extent - 1)


def smoothed_knots(knots: Tensor, size: int) -> Tensor:
    """(k, C, n, n) -> (k, C, S, S): cubic, which is slow, up to a quarter of S, then linear."""
    knots = interpolated_crops(knots, max(knots.shape[-1], -(-size // 4)), "bicubic")
    return interpolated_crops(knots, size, "bilinear")


def interpolated_crops(x: Tensor, side: int, mode: str, **more: Any) -> Tensor:
    return torch.nn.functional.interpolate(x, size=(side, side), mode=mode, **more)


def crop_labels(resident: Resident, images: np.ndarray, y: Tensor, x: Tensor) -> Tensor:
    """Labels (B, S, S) int32 at y, x."""
    start, width = (send_crop_values(v, y.device)[:, None, None]
                    for v in (resident.label[images], resident.shape[images, 0, 1]))
    index = start + y.round().long() * width + x.round().long()
    return take(resident.labels, index).view(index.shape)


def crop_pixels(resident: Resident, images: np.ndarray, scale: np.ndarray, y: Tensor, x: Tensor,
                planes: list[int]) -> Tensor:
    """Planes of the words (k, C, S, S) in [0, 1] at y, x of the full images; scale of crops (k,).
    """
    level = np.clip(np.round(-np.log2(scale)), 0, LEVELS - 1).astype(int)
    start, height, width, factor = (send_crop_values(v, y.device)[:, None, None] for v in (
        resident.word[images, level], *resident.shape[images, level].T, 0.5 ** level))
    y = ((y + 0.5) * factor - 0.5).clamp(min=0).minimum(height - 1)
    x = ((x + 0.5) * factor - 0.5).clamp(min=0).minimum(width - 1)
    top, left = y.floor(), x.floor()
    corner = start + top.long() * width + left.long()
    below, beside = (top < height - 1) * width, (left < width - 1).long()    # 0 at the border

    def look(index: Tensor) -> Tensor:
        words = take(resident.words, index)
        bits = words.view(torch.int16).view(*index.shape, 4)
        return torch.stack([bits[..., plane].float() for plane in planes], 1)  # (k, C, S, S)

    down, right = (y - top)[:, None], (x - left)[:, None]
    upper, lower = look(corner), look(corner + below)
    upper = upper + right * (look(corner + beside) - upper)
    lower = lower + right * (look(corner + below + beside) - lower)
    return (upper + down * (lower - upper) + 32768) / 65535


# ---------------------------------------------------------------------------------------- intensity

def expose_crops(x: Tensor, draws: Draws, mean: np.ndarray) -> Tensor:
    """x (k, C, S, S) in [0, 1], in place, through light, optics, camera, display; mean (k,)."""
    for name, change in (("halo", augment_halo), ("light", augment_light), ("blur", augment_blur),
                         ("coarse", augment_resolution)):
        x = touch_crops(x, draws, draws.happens(name), change)
    x = touch_crops(x, draws, draws.happens("noise") | draws.happens("shot"), augment_noise)
    x = touch_crops(x.clamp_(0, 1), draws, draws.happens("dim"), augment_exposure)
    invert = draws.happens("invert")                                         # then the contrast
    factor = np.where(draws.happens("contrast"), draws.within("contrast_range"), 1)
    offset = draws.within("brightness_range") * draws.happens("brightness")
    offset += invert * factor + np.where(invert, 1 - mean, mean) * (1 - factor)
    x = x.mul_(crop_values(np.where(invert, -factor, factor), x)).add_(crop_values(offset, x))
    x = touch_crops(x.clamp_(0, 1), draws, draws.happens("gamma"), augment_gamma)
    return touch_crops(x, draws, draws.happens("blocks"), augment_jpeg_blocks)


def augment_halo(x: Tensor, draws: Draws) -> Tensor:
    """Sharpen with a large radius: darker beside bright places, brighter beside dark ones."""
    radii = draws.within("halo_px").astype(int)
    around = torch.cat([crop_box_blur(crop, r) for crop, r in zip(x.split(1), radii)])
    return stretched_crops(x + crop_values(draws.within("halo_range"), x) * (x - around), least=0.1)


def crop_box_blur(x: Tensor, radius: int) -> Tensor:
    """(1, C, S, S) averaged twice over squares, edges repeated."""
    F, radius = torch.nn.functional, min(radius, x.shape[-1] - 1)
    for _ in range(2):
        x = F.avg_pool2d(F.pad(x, (radius,) * 4, mode="replicate"), 2 * radius + 1, 1)
    return x


def augment_resolution(x: Tensor, draws: Draws) -> Tensor:
    size = x.shape[-1]
    sides = [max(8, round(size * factor)) for factor in draws.within("coarse_range")]
    small = [interpolated_crops(crop, side, "bilinear", antialias=True)
             for crop, side in zip(x.split(1), sides)]
    return torch.cat([interpolated_crops(crop, size, "bilinear") for crop in small])


DARKEST = 0.05              # of the light passes at least: an optical density of 3


def augment_stain(x: Tensor, draws: Draws) -> Tensor:
    """(k, 3, S, S) in colour: densities -log(x) mixed anew, so that dyes change their hue."""
    strength = draws.within("stain_range")[:, None, None]
    matrix = np.eye(3) + strength * scipy.special.ndtri(draws.uniform("dyes", 3, 3))  # (k, 3, 3)
    density = -(x * (1 - DARKEST) + DARKEST).log()
    density = torch.einsum("kij,kjyx->kiyx", send_crop_values(matrix, x.device), density)
    return stretched_crops((-density.clamp(min=-1, max=4)).exp(), least=0.05)


# ISO/IEC 10918-1, annex K: steps of the cosine coefficients of brightness and of colour
BRIGHTNESS = ((16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55),
              (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
              (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92),
              (49, 64, 78, 87, 103, 121, 120, 101), (72, 92, 95, 98, 112, 100, 103, 99))
COLOUR = ((17, 18, 24, 47), (18, 21, 26, 66), (24, 26, 56, 99), (47, 66, 99, 99))  # then 99
YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))  # T.871


@functools.lru_cache
def jpeg_tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Cosine transform of 8 px, steps of three planes in [0, 1], colour transform and its inverse.
    """
    cosines = scipy.fft.dct(np.eye(8), axis=0, norm="ortho")
    colour = np.pad(COLOUR, ((0, 4), (0, 4)), constant_values=99)
    steps = np.stack((BRIGHTNESS, colour, colour)) / 255
    cosines, steps, into, back = (send_crop_values(table, device) for table in (
        cosines, steps, np.array(YCBCR), np.linalg.inv(YCBCR)))
    return cosines, steps, into, back


def augment_jpeg_blocks(x: Tensor, draws: Draws) -> Tensor:
    """(k, C, S, S) with the cosine coefficients of squares of 8 px rounded, as in JPEG."""
    cosines, steps, into, back = jpeg_tables(x.device)
    (C, size), pad = x.shape[1:3], -x.shape[-1] % 8
    planes = torch.nn.functional.pad(x, (0, pad, 0, pad), mode="replicate")
    if C == 3:
        planes = torch.einsum("ij,kjyx->kiyx", into, planes)
    squares = planes.unfold(2, 8, 8).unfold(3, 8, 8)  # (k, C, S/8, S/8, 8, 8)
    strength = send_crop_values(draws.within("blocks_range"), x.device)
    step = steps[:C, None, None] * strength.view(-1, 1, 1, 1, 1, 1)
    squares = cosines.T @ ((cosines @ squares @ cosines.T / step).round() * step) @ cosines
    planes = squares.transpose(3, 4).reshape(planes.shape)[..., :size, :size]
    return (torch.einsum("ij,kjyx->kiyx", back, planes) if C == 3 else planes).clamp(0, 1)


def augment_light(x: Tensor, draws: Draws) -> Tensor:
    knots = draws.knots("light", "light_range", 1, 4)
    knots = np.exp(knots - knots.max((2, 3), keepdims=True))     # up to 1: no overexposure
    return (x * smoothed_knots(send_crop_values(knots, x.device), x.shape[-1])).clamp(0, 1)


def augment_blur(x: Tensor, draws: Draws) -> Tensor:
    """Separable Gaussian, edges repeated, cut at 3 of the largest sigmas for all alike."""
    radius = math.ceil(3 * draws.config.blur_px[1])
    at = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (at / draws.within("blur_px")[:, None]) ** 2)
    weights /= weights.sum(1, keepdims=True)                                 # (k, 2 radius + 1)
    for axis, pad in ((2, (0, 0, radius, radius)), (3, (radius, radius, 0, 0))):
        padded, size = torch.nn.functional.pad(x, pad, mode="replicate"), x.shape[axis]
        terms = (crop_values(weights[:, i], x) * padded.narrow(axis, i, size)
                 for i in range(2 * radius + 1))
        x = functools.reduce(torch.add, terms)
    return x


def augment_noise(x: Tensor, draws: Draws) -> Tensor:
    """Gaussian and shot noise: of variance sigma^2 + x / photons."""
    even = draws.within("noise_range") ** 2 * draws.happens("noise")
    shot = draws.happens("shot") / draws.within("shot_photons")
    sigma = (x * crop_values(shot, x) + crop_values(even, x)).sqrt()
    return x + sigma * crop_noise("noise", draws, x)


def augment_exposure(x: Tensor, draws: Draws) -> Tensor:
    counts = x * crop_values(draws.within("dim_photons"), x)
    counts = counts + counts.sqrt() * crop_noise("dim", draws, x)
    return stretched_crops(counts.round().clamp(min=0), least=1)


def augment_gamma(x: Tensor, draws: Draws) -> Tensor:
    """x ** gamma as exp(gamma log x): pow() rounds differently at the end of a batch."""
    return (x.clamp(min=1e-6).log() * crop_values(draws.within("gamma_range"), x)).exp()


def stretched_crops(x: Tensor, least: float) -> Tensor:
    """Percentiles 1 and 99.8 of each channel (k, C, S, S), of every 16th pixel, become 0 and 1.

    least : smallest span between them, so that noise on an even image stays small.
    """
    few = x[:, :, ::4, ::4].flatten(2).sort(-1).values
    low, high = (few[..., round(q * (few.shape[-1] - 1)), None, None] for q in (0.01, 0.998))
    return ((x - low) / (high - low).clamp(min=least)).clamp(0, 1)


SPREAD = (0.003, 0.3)       # standard deviation of texture


def augment_background(x: Tensor, draws: Draws) -> Tensor:
    """Fields without cells like x (k, C, S, S): noise and smooth structure on some gray.

    Half of them are the same in all channels, for gray noise has no cells in tissue either.
    """
    weights = draws.uniform("octaves", 6) ** 4                   # one or two stand out
    weights /= np.sqrt((weights ** 2).sum(1, keepdims=True))
    x = torch.zeros_like(x)
    size, spread = x.shape[-1], draws.within("spread", SPREAD)
    for octave in range(6):                                      # knots every 1, 2, 4 ... 32 px
        knots = crop_noise(f"octave {octave}", draws, x[..., ::2 ** octave, ::2 ** octave])
        if octave:
            knots = interpolated_crops(knots, size, "bicubic")
        x += crop_values(weights[:, octave] * spread, x) * knots
    x = touch_crops(x, draws, draws.uniform("one channel") < 0.5,
                    lambda v, _: v[:, :1].expand_as(v))
    x = (x + crop_values(draws.uniform("level"), x)).clamp(0, 1)
    x = touch_crops(x, draws, draws.uniform("counted") < 0.3, counted_photons)
    return touch_crops(x, draws, draws.uniform("stretch") < 0.6,
                       lambda v, _: stretched_crops(v, least=1e-3))


def counted_photons(x: Tensor, draws: Draws) -> Tensor:
    """Texture rounded to a few levels, as a camera in little light shows it."""
    step = crop_values(draws.within("spread", SPREAD) * draws.within("steps", (0.3, 4.0)), x)
    return ((x / step).round() * step).clamp(0, 1)


def recolour_crops(x: Tensor, draws: Draws, alive: np.ndarray) -> Tensor:
    """(k, C, S, S) -> (k, 3, S, S), every new channel a weighted mean of the old ones.

    alive : (k, C), false for black channels, which stay black and count in no mean.
    """
    weights = draws.uniform("weights", 3, 3)[..., :x.shape[1]] * alive[:, None]
    weights /= np.maximum(weights.sum(2, keepdims=True), 1e-9)   # (k, 3, C)
    order = np.argsort(draws.uniform("order", 3), 1)
    order = np.where(draws.happens("shuffle")[:, None], order, np.arange(3))
    matrix = np.eye(3)[order] * alive[:, None] if x.shape[1] == 3 else weights
    matrix = np.where(draws.happens("mix")[:, None, None], weights, matrix)
    matrix = np.where(draws.happens("gray")[:, None, None], weights[:, :1], matrix)
    luck = draws.uniform("drop", 3) * matrix.any(2)              # the luckiest is never dropped
    lucky = (luck > 0.5) & (luck > luck.min(1, keepdims=True))
    lucky |= luck == luck.max(1, keepdims=True)
    matrix = matrix * (lucky | ~draws.happens("drop")[:, None])[:, :, None]
    return functools.reduce(torch.add, (crop_values(matrix[:, :, c], x) * x[:, c:c + 1]
                                        for c in range(x.shape[1])))


# ---------------------------------------------------------------------------------------- distances

def capped_crop_distance(labels: Tensor, cap: float) -> Tensor:
    """min(d, cap), (B, 1, S, S) px, d from a pixel of a cell (B, S, S) to the nearest outside.

    Exact, in two passes over the distances k below the cap: in each column, to the nearest other
    label; then along the row, k^2, plus the value k columns away if it is of the same cell. The
    border of the crop is no edge.
    """
    reach = math.ceil(cap)                                                   # kind holds 2 reach^2
    kind = torch.uint8 if reach <= 11 else torch.int16 if reach <= 127 else torch.int32
    column = torch.full_like(labels, reach ** 2, dtype=kind)
    for k in range(reach - 1, 0, -1):                                        # nearer ones overwrite
        other = labels[:, k:] != labels[:, :-k]
        column[:, k:].masked_fill_(other, k * k)
        column[:, :-k].masked_fill_(other, k * k)
    square = column.clone()
    for k in range(1, reach):
        same = (labels[:, :, k:] == labels[:, :, :-k]).to(kind)
        for here, there in ((square[:, :, :-k], column[:, :, k:]),
                            (square[:, :, k:], column[:, :, :-k])):
            torch.minimum(here, same * there + k * k, out=here)
    return (square.float().sqrt().clamp(max=cap) * (labels > 0))[:, None]


def crop_distance_per_cell(d: Tensor, labels: Tensor, whole: Tensor) -> Tensor:
    """d (B, 1, S, S) over its maximum in each cell: of capped_crop_distance(), distance_map().

    A cell that the crop cuts is divided by no less than its maximum in the whole image, whole
    (B, K): else what is left of the rim of a large cell would look like the middle of a small one.
    """
    B, K = whole.shape
    cell = labels + K * torch.arange(B, device=labels.device)[:, None, None]  # (B, S, S)
    highest = d.new_zeros(B * K).scatter_reduce_(0, cell.flatten(), d.flatten(), "amax")
    cut = torch.zeros_like(highest, dtype=torch.bool)
    for rim in (cell[:, 0], cell[:, -1], cell[:, :, 0], cell[:, :, -1]):
        cut.index_fill_(0, rim.flatten(), True)
    highest = torch.where(cut, torch.maximum(highest, whole.flatten()), highest).clamp(min=1e-6)
    return d / highest.index_select(0, cell.flatten()).view(d.shape)


# ----------------------------------------------------------------------------------- augmented sets

PIECE = 5               # px, smaller pieces of cells that were cut or turned are dropped


def main(config: Config, files: list[str]) -> None:
    if files:
        raise ValueError(f"{files[0]}: augment.py takes a configuration and key=value; give data="
                         f"{files[0]}")
    found = examples_to_augment(config.data, config.channels)
    output = Path(config.output)
    record = output / "augmented.yaml"  # data.training_was_augmented looks for it
    same: dict[str, Any] = dict(data=("any",), output="", copies=1, overwrite=False)  # change none
    if record.exists() and not config.overwrite and (
            replace(runs.load_config(type(config), record), **same) != replace(config, **same)):
        raise ValueError(f"{record}: its crops were made otherwise; give another output or "
                         "overwrite=true")
    for name in ("images", "labels"):
        (output / name).mkdir(parents=True, exist_ok=True)
    runs.write_text(record, runs.to_yaml(config))
    made, stamps = 0, data.read_data_stamps(output / "augmented.tsv", "give overwrite=true")
    now = {stem: data.data_stamp_of(example) for stem, example in found.items()}
    for stem in stamps.keys() - now.keys() if config.overwrite else ():
        remove_augmented_crops(output, stem)                     # its image is gone
        del stamps[stem]
    for stem in now.keys() & stamps.keys():
        if now[stem] != stamps[stem]:                            # its image is another one
            remove_augmented_crops(output, stem)
    data.write_data_stamps(output / "augmented.tsv", stamps | now)
    for stem, example in tqdm.tqdm(found.items(), unit="image"):
        names = [f"{stem}_crop{copy:03d}" for copy in range(config.copies)]
        names = [name for name in names if config.overwrite
                 or not (output / "images" / f"{name}.tif").exists()]
        if not names:
            continue
        image = data.Labelled(str(example.files[0]), data.network_input(example), example.labels())
        resident = Resident([image], diameter=config.diameter)
        for name in names:                                       # hashed, so that sets may grow
            x, _, labels = sample(resident, [0], [hash_for_draws(name)], config.augment,
                                  config.size, config.seed)
            pieces = skimage.measure.label(labels[0].numpy(), connectivity=1)    # of cut cells
            keep = (np.bincount(pieces.ravel()) >= PIECE) & (np.arange(pieces.max() + 1) > 0)
            data.write_labels(output / "labels" / f"{name}.tif", (keep * keep.cumsum())[pieces])
            # last: both are there
            write_augmented_crop(output / "images" / f"{name}.tif", x[0].numpy())
        made += len(names)
    print(f"{output}: {made} crops made, {config.copies * len(found) - made} were there")


def remove_augmented_crops(output: Path, stem: str) -> None:
    """Remove the crops of an image."""
    for folder in ("images", "labels"):
        for file in (output / folder).glob(f"{glob.escape(stem)}_crop*.tif"):
            if re.fullmatch(r"_crop\d{3,}", file.stem.removeprefix(stem)):
                file.unlink()


def examples_to_augment(folders: Iterable[str], channels: Sequence[str] | None = None
                        ) -> dict[str, data.Example]:
    """{name of the crops: labelled image} of all folders, every layout of data.examples."""
    found: dict[str, data.Example] = {}
    for folder in folders:
        for example in data.examples(folder, channels):
            name = example.name.replace("/", "_")
            if name in found:
                raise ValueError(f"{example.files[0]}: a second image named {name}, beside "
                                 f"{found[name].files[0]}; names must differ")
            found[name] = example
    return found


def write_augmented_crop(path: Path, pixels: np.ndarray) -> None:
    """(3, H, W) in [0, 1] as 16-bit TIFF, whole or not at all; one channel where all are equal."""
    pixels = np.round(pixels * 65535).astype(np.uint16)
    gray = (pixels == pixels[0]).all()
    images.write_tiff(path, pixels[0] if gray else pixels,
                      metadata={"axes": "YX" if gray else "CYX"})


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
