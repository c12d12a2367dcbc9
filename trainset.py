"""What a network is trained and validated on: labelled sets and drawn fields, read, held out, put on the device.

    train, validation, hashes = trainset.load(config.data, seed, device, cap)
    trainset.error(predicted, target, labels, 3, 10).backward()          # of its distances

`Data` is a section of train_seg.py's configuration; `data: folder` is short for `data: {sets: [folder]}`.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Set:
    path: str                               # folder or COCO .json in data.root; `- folder` alone will do
    channels: tuple[str, ...] | None = None # of its images, numbers from 1 or names; null: as data.to_rgb takes them
    match: str | None = None                # regular expression: only images with it in their names
    labels: str | None = None               # which, where an image has several: cells, nuclei
    weight: float = 1.0                     # how often its images are drawn, relative to other sets
    zoom: float = 1.0                       # px that the network sees per px of its images; below 1 where cells are large
    decoder: str | None = None              # name of its kind's own decoder (decoders.py); null: the one for all

    def __post_init__(self):
        if not self.weight > 0:
            raise ValueError(f"{self.path}: weight={self.weight:g}, expected more than 0; leave the set out instead")
        if not 0.1 <= self.zoom <= 1:
            raise ValueError(f"{self.path}: zoom={self.zoom:g}, expected 0.1 to 1")
        if self.decoder is not None and not self.decoder.isidentifier():
            raise ValueError(f"{self.path}: decoder={self.decoder!r}, expected a name of letters, digits and _")

    @property
    def name(self) -> str:
        """Its path, with what tells it from another set at the same place."""
        return " ".join([self.path, *(self.channels or ()), *filter(None, (self.match, self.labels))])


@dataclass(frozen=True)
class Data:
    sets: tuple[Set, ...] = ()              # labelled sets (data.examples), drawn equally often but for their weights
    root: str = "."                         # folder that they are in; may change when a run goes on elsewhere
    validation: tuple[Set, ...] = ()        # sets to validate on; empty: a share of each set is held out
    share: float = 0.1                      # of each set that is held out then, in whole groups (data.group_of)
    channels: tuple[str, ...] | None = None # of the images of sets that do not choose themselves
    limit: int | None = None                # images used of each set, by lot: those of 10 are among those of 20
    diameter: float | None = None           # px, images are scaled so that median cells come out as wide; null: as is
    fields: int = 0                         # synthetic fields to draw in addition (synthetic.py), a tenth to validate on
    field_channels: tuple[str, ...] = ("AGP", "ER", "RNA", "Brightfield", "HighZBF", "LowZBF")   # two of them a field
    field_size: int = 384                   # px, their side
    field_cells: int = 40                   # cells in the fullest; each field draws its own number, down to a tenth
    field_diameter: float = 56.0            # px, how wide these are

    def __post_init__(self):
        if not self.sets and not self.fields:
            raise ValueError("no data: give data.sets (folders of images and labels) or data.fields (synthetic fields)")
        if len({s.name for s in self.sets}) < len(self.sets):
            raise ValueError("data.sets names a set twice; give it once, with a weight")
        import synthetic
        if len(set(self.field_channels) & set(synthetic.CHANNELS)) < max(2, len(self.field_channels)):
            raise ValueError(f"data.field_channels={list(self.field_channels)}: expected two or more of "
                             f"{', '.join(synthetic.CHANNELS)}")
        if self.diameter is not None and not self.diameter > 0:
            raise ValueError(f"data.diameter={self.diameter:g}: expected more than 0 px")
        if self.diameter is not None and any(s.zoom != 1 for s in (*self.sets, *self.validation)):
            raise ValueError("data.diameter scales images, and so does the zoom of a set; leave one out")
        if not 0 <= self.share < 1 or (self.limit is not None and self.limit < 1):
            raise ValueError(f"data.share={self.share:g}, data.limit={self.limit}: expected 0 to below 1, and 1 or more")


FEW = 8         # images of a set: with fewer held out the watershed's setting is chosen on some that were trained on as well


class Entry(NamedTuple):
    """One labelled image as the network is given it."""
    name: str
    pixels: np.ndarray                      # (3, H, W) in [0, 1]
    labels: np.ndarray                      # (H, W)
    set: str                                # the set that it is of
    zoom: float = 1.0                       # of that set
    held: bool = True                       # of an image to validate on: held out, or trained on and there for settings alone


def load(config: Data, seed: int, device: str, cap: float | None):
    """Resident training images; validation entries; content hashes {train, validation: {name: hash}}.

    Sets of which few images are held out are filled up with training images, `held` false: they choose settings, but count in
    no score. A setting found on two images suits these two.
    """
    import augment
    train, validation = [], []
    for chosen in config.sets:
        kept, held = divide(examples(config, chosen), config, seed)
        train += [read(example, chosen.name, chosen.zoom) for example in kept]
        validation += [read(example, chosen.name, chosen.zoom) for example in held]
        if held:
            lot = np.random.default_rng(0).permutation(len(kept))[:max(0, FEW - len(held))]
            validation += [train[i - len(kept)]._replace(held=False) for i in lot]
    for chosen in config.validation:
        validation += [read(example, chosen.name, chosen.zoom) for example in examples(config, chosen)]
    drawn = max(1, round(0.1 * config.fields)) if not config.validation else 0       # fields to validate on
    for number in range(config.fields):
        (validation if number < drawn else train).extend(synthetic_entries(config, seed, number))
    if config.diameter:
        validation = [e._replace(zoom=config.diameter / wide) if (wide := width(e.labels)) else e for e in validation]
    if not validation:
        raise ValueError("no validation images; give data.validation, or data.share so large that some are held out")
    hashes = {part: {e.name: hashlib.sha256(e.pixels.tobytes() + e.labels.tobytes()).hexdigest()[:16] for e in entries if e.held}
              for part, entries in (("train", train), ("validation", validation))}
    groups, zooms = [e.set for e in train], [e.zoom for e in train]
    train.reverse()                                           # each image goes as soon as it is packed: they are large together
    resident = augment.Resident((train.pop()[:3] for _ in groups), groups, device, cap, config.diameter,
                                {s.name: s.weight for s in config.sets}, zooms)
    return resident, validation, hashes


def examples(config: Data, chosen: Set) -> list:
    """The labelled images of a set, as data.Example."""
    import data
    return data.examples(Path(config.root) / chosen.path, chosen.channels or config.channels, chosen.match, chosen.labels)


def divide(found: list, config: Data, seed: int) -> tuple[list, list]:
    """(to train on, held out). What is held out is the same for every limit and seed; the lot is the seed's."""
    import data
    held = [] if config.validation else data.hold_out(found, config.share, 0)
    names = {example.name for example in held}
    kept = [example for example in found if example.name not in names]
    if config.limit is not None:
        lot = sorted(kept, key=lambda e: hashlib.sha256(f"{seed}/{e.name}".encode()).digest())[:config.limit]
        kept = [example for example in kept if example in lot]
    return kept, held


def read(example, set_name: str, zoom: float = 1.0) -> Entry:
    import data
    return Entry(f"{set_name}/{example.name}", data.seen(example), example.labels(), set_name, zoom)


def width(labels: np.ndarray) -> float:
    """px, of a disc of the median cell's area; 0 without cells."""
    import augment
    return augment.width(np.unique(labels[labels > 0], return_counts=True)[1])


def common_zoom(config: Data) -> float:
    """Of all sets, where it is the same; else 1, and the kinds of images have their own."""
    zooms = {chosen.zoom for chosen in config.sets}
    return zooms.pop() if len(zooms) == 1 and not config.fields else 1.0


class Look(NamedTuple):
    """Of a set, by some of its training images."""
    tiles: list                             # of each image (n, 3, tile, tile), those of segment.glimpses()
    diameter: float | None                  # px, of a median cell as the network sees it; None: there are no cells


def glimpsed(config: Data, seed: int, tile: int, count: int = 256) -> dict[str, Look]:
    """What tells sets apart, of each of them; where it has more than `count` images, the lot decides which."""
    import segment
    found = {}
    for chosen in config.sets:
        kept, _ = divide(examples(config, chosen), config, seed)
        lot = np.random.default_rng(seed).permutation(len(kept))[:count]
        tiles, widths = [], []
        for entry in (read(kept[i], chosen.name) for i in lot):
            tiles.append(segment.glimpses(segment.as_source(entry.pixels), segment.UNIT, entry.pixels.shape[1:], tile))
            widths += [wide] if (wide := width(entry.labels)) else []
        found[chosen.name] = Look(tiles, (config.diameter or chosen.zoom * float(np.median(widths))) if widths else None)
    return found


def synthetic_entries(config: Data, seed: int, number: int) -> list[Entry]:
    """Two channels of one drawn field: the network must not lean on one stain.

    By default neither DNA, which shows nuclei, nor Mito, parts of the body: the edge of the cell is not to be seen there.
    """
    import data
    import synthetic
    count = round(config.field_cells * np.random.default_rng(seed * 100003 + number).uniform(0.1, 1))
    drawn = synthetic.field(seed * 100003 + number, config.field_size, count, config.field_diameter)
    entries = []
    for name in np.random.default_rng((seed, number)).choice(config.field_channels, 2, False):
        pixels = drawn.pixels[drawn.channels.index(name)][None]
        pixels = data.to_rgb(data.normalise(pixels, data.percentiles(pixels)))
        entries.append(Entry(f"synthetic {number} {name}", pixels, drawn.labels, "synthetic"))
    return entries


def augmented(config: Data) -> bool:
    """Whether the sets were written by augment.py, which then has moved, turned and scaled their cells already.

    A mixture is refused: what one part needs would be done to the other twice.
    """
    made = [(Path(config.root) / s.path / "augmented.yaml").is_file() for s in config.sets]
    if any(made) and (not all(made) or config.fields):
        raise ValueError("data.sets: some were written by augment.py and some were not; train on one kind, "
                         "or write all of them with augment.py")
    return any(made)


BESIDE = 2          # px from a cell that are near it


def error(predicted, target, labels, edge_weight: float = 0.0, seam_weight: float = 0.0):
    """Mean squared error of distances (B, 1, S, S), each pixel weighed; labels (B, S, S), 0 is ground.

    Near an edge, on both sides of it, by 1 + edge_weight (1 - distance): with the cell's side alone the network would
    rather draw cells too large than too small. And seam_weight more where two cells are near: what parts touching cells
    is a valley of few pixels that else hardly shows in the mean.
    """
    import torch
    square = (predicted - target).square()
    if not edge_weight and not seam_weight:
        return square.mean()
    number = labels[:, None].to(target.dtype)                                # (B, 1, S, S)
    highest, lowest = (torch.nn.functional.max_pool2d(v, 2 * BESIDE + 1, 1, BESIDE)
                       for v in (number, -number.masked_fill(number == 0, torch.inf)))
    near, seam = highest > 0, (highest > 0) & (highest != -lowest)           # of one cell or more, of two or more
    return (square * (1 + edge_weight * (1 - target) * near + seam_weight * seam)).mean()
