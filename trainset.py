"""What a network is trained and validated on: labelled sets and drawn fields, read, held out, put on the device.

    train, validation, hashes = trainset.load(config.data, seed, device, cap)

`Data` is a section of train_seg.py's configuration; `data: folder` is short for `data: {sets: [folder]}`.
"""
from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np

import runs


@dataclass(frozen=True)
class Set:
    path: str                               # folder or COCO .json in data.root; `- folder` alone will do
    channels: tuple[str, ...] | None = None # of its images, numbers from 1 or names; null: as data.to_rgb takes them
    match: str | None = None                # regular expression: only images with it in their names
    labels: str | None = None               # which, where an image has several: cells, nuclei
    weight: runs.Positive = 1.0             # how often its images are drawn, relative to other sets

    @property
    def name(self) -> str:
        """Its path, with what tells it from another set at the same place."""
        return " ".join([self.path, *(self.channels or ()), *filter(None, (self.match, self.labels))])


@dataclass(frozen=True)
class Data:
    sets: tuple[Set, ...] = ()              # labelled sets (data.examples), drawn equally often but for their weights
    root: str = "."                         # folder that they are in; may change when a run goes on elsewhere
    validation: tuple[Set, ...] = ()        # sets to validate on; empty: a share of each set is held out
    share: Annotated[float, runs.from_to_below(0, 1)] = 0.1                     # of each set that is held out then, in whole groups (data.group_of)
    channels: tuple[str, ...] | None = None # of the images of sets that do not choose themselves
    limit: runs.Count | None = None         # images used of each set, by lot: those of 10 are among those of 20
    diameter: runs.Positive | None = None   # px, images are scaled so that median cells come out as wide; null: as is
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


FEW = 8         # images of a set: with fewer held out the watershed's setting is chosen on some that were trained on as well


class Entry(NamedTuple):
    """One labelled image as the network is given it."""
    name: str
    pixels: np.ndarray                      # (3, H, W) in [0, 1]
    labels: np.ndarray                      # (H, W)
    set: str                                # the set that it is of
    zoom: float = 1.0                       # px of the network for each of its px
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
        train += [read(example, chosen.name) for example in kept]
        validation += [read(example, chosen.name) for example in held]
        if held:
            lot = np.random.default_rng(0).permutation(len(kept))[:max(0, FEW - len(held))]
            validation += [train[i - len(kept)]._replace(held=False) for i in lot]
    for chosen in config.validation:
        validation += [read(example, chosen.name) for example in examples(config, chosen)]
    drawn = max(1, round(0.1 * config.fields)) if not config.validation else 0       # fields to validate on
    for number in range(config.fields):
        (validation if number < drawn else train).extend(synthetic_entries(config, seed, number))
    if config.diameter:
        validation = [e._replace(zoom=config.diameter / wide) if (wide := width(e.labels)) else e for e in validation]
    if not validation:
        raise ValueError("no validation images; give data.validation, or data.share so large that some are held out")
    hashes = {part: {e.name: hashlib.sha256(e.pixels.tobytes() + e.labels.tobytes()).hexdigest()[:16] for e in entries if e.held}
              for part, entries in (("train", train), ("validation", validation))}
    groups = [e.set for e in train]
    train.reverse()                                           # each image goes as soon as it is packed: they are large together
    resident = augment.Resident((train.pop()[:3] for _ in groups), groups, device, cap, config.diameter,
                                {s.name: s.weight for s in config.sets})
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


def read(example, set_name: str) -> Entry:
    import data
    return Entry(f"{set_name}/{example.name}", data.seen(example), example.labels(), set_name)


def width(labels: np.ndarray) -> float:
    """px, of a disc of the median cell's area; 0 without cells."""
    import augment
    return augment.width(np.unique(labels[labels > 0], return_counts=True)[1])


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
