"""Which fields a backbone is pretrained on and which it is measured on: streamed, from files, or drawn.

    pool = fieldset.pool(config.data, batch, seed, device, rank, world)      # stream.FieldPool
    channels, fields = fieldset.held(config.data, seed)                      # never in the pool

`Data` is a section of train_ssl.py's configuration. A field is (name, pixels (C, H, W) uint16, labels or None).
"""
from __future__ import annotations

import functools
import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import data

NO_IMAGES = tuple(filter(None, data.ENDS)) + data.BYPRODUCTS          # ends of names
Field = tuple[str, np.ndarray, np.ndarray | None]


@dataclass(frozen=True)
class Data:
    index: str | None = None                # fields in S3 or on a disk, listed by `stream.py index`; streamed
    root: str | None = None                 # folder that `folders` are in, or where the files of the index lie instead
    pool: int = 512                         # fields of it that lie on the device at a time
    least: int = 1                          # crops that one gives before it may be replaced; more spares the net
    threads: int = 32                       # that download
    endpoint: str | None = None             # URL of another S3 server than Amazon's, for the index
    signed: bool = False                    # read it with your AWS credentials; public buckets need none
    cache: str | None = None                # folder for what was downloaded
    cache_gb: float = 100.0                 # 10^9 bytes, its limit
    held_plates: tuple[str, ...] = ()       # of the index, never trained on; empty: held_share of it, by lot
    held_share: float = 0.01                # of the fields of the index, about, in whole plates
    folders: tuple[str, ...] = ()           # or folders of images, a field of several channels each; all resident
    match: str | None = None                # regular expression: only files with it in their path below the folder
    square: int | None = None               # px: folders of unlike images, cut to this; the first is measured on (mixed)
    fields: int = 0                         # or synthetic fields to draw (synthetic.py); with square, besides
    field_size: int = 512                   # px, their side
    field_cells: int = 80                   # cells in the fullest; each field draws its own number, from a third on
    field_diameter: float = 56.0            # px, how wide these are
    channels: tuple[str, ...] = ()          # of the fields to use, names or numbers from 1; empty: all
    brightfield: tuple[str, ...] = ("HighZBF", "LowZBF", "Brightfield")   # which are no fluorescence
    held: int = 16                          # fields to measure on, by lot; of an index: from the plates held out

    def __post_init__(self):
        given = [name for name in ("index", "folders", "fields") if getattr(self, name)]
        if len(given) != 1 and not (self.square and given == ["folders", "fields"]):
            raise ValueError(f"data: {' and '.join(given) or 'nothing'} given, expected one of data.index (stream.py "
                             "index), data.folders (TIFF) and data.fields (synthetic)")
        if self.square is not None and (self.square < 1 or not self.folders):
            raise ValueError(f"data.square={self.square}: expected 1 px or more, and data.folders")
        if self.held < 1:
            raise ValueError(f"data.held={self.held}: expected 1 or more")


def pool(config: Data, batch: int, seed: int, device: str, rank: int = 0, world: int = 1,
         bad_fields: Path | None = None):
    """The fields to train on, as stream.FieldPool."""
    import stream
    given = dict(rank=rank, world=world, seed=seed)
    if config.index:
        train, _ = plates(config, seed)
        return stream.FieldPool(train, config.pool, chosen(config, train), device, least=config.least,
                                threads=config.threads, cache=config.cache, cache_gb=config.cache_gb,
                                endpoint=config.endpoint, signed=config.signed, bad_fields=bad_fields, **given)
    names, channels, read = resident(config, seed)
    train = names[config.held:]
    if len(train) < batch:
        raise ValueError(f"batch={batch}: {len(train)} fields to train on beside data.held={config.held}; a batch "
                         "takes no field twice, so give more fields or a smaller batch")
    return stream.FieldPool.resident((read(name)[:2] for name in train), channels, device, **given)


def held(config: Data, seed: int) -> tuple[tuple[str, ...], Iterator[Field]]:
    """Names of the channels, and the fields held out."""
    if config.index:
        _, out = plates(config, seed)
        return chosen(config, out), fetched(config, out, seed)
    names, channels, read = resident(config, seed)
    return channels, map(read, names[:config.held])


def size(config: Data, seed: int) -> tuple[int, tuple[str, ...], tuple[int, int]]:
    """For --check, without a look at what is in S3: fields to train on, channels, px of a field (JUMP's for an index)."""
    if config.index:
        train, _ = plates(config, seed)
        return len(train), chosen(config, train), (1080, 1080)
    names, channels, read = resident(config, seed)
    return len(names) - config.held, channels, read(names[config.held])[1].shape[1:]


# -------------------------------------------------------------------------------------------------- streamed

def plates(config: Data, seed: int):
    """The index to train on and the one held out: whole plates, since the cells of a plate are the same."""
    import stream
    index = stream.Index.load(config.index, config.root)
    return stream.hold_out(index, config.held_plates or config.held_share, seed)


def chosen(config: Data, index) -> tuple[str, ...]:
    import stream
    return stream.known_channels(index, config.channels or index.channels)


def fetched(config: Data, index, seed: int) -> Iterator[Field]:
    """The first data.held fields of an index, in the order of a lot, that can be had."""
    import planes
    import stream
    store, found, extent = stream.open_store(index.root, endpoint=config.endpoint, signed=config.signed), 0, None
    count, channels = config.held, chosen(config, index)
    try:
        for row in np.random.default_rng((seed, 1)).permutation(len(index)):
            field = index[row]
            try:
                bodies = [store.read(field.files[channel]) for channel in channels]
                extent = extent or planes.size_of(bodies[0])
                pixels = np.empty((len(channels), *extent), np.uint16)
                for body, plane in zip(bodies, pixels):
                    planes.decode(body, plane)
            except (KeyError, stream.Absent, ValueError) as reason:
                print(f"{field.name} is not measured on: {reason}", file=sys.stderr)
                continue
            yield field.name, pixels, None
            found += 1
            if found == count:
                return
    finally:
        store.stop()
        store.close()


# -------------------------------------------------------------------------------------------------- resident

def resident(config: Data, seed: int) -> tuple[list, tuple[str, ...], Callable[..., Field]]:
    """Names of all fields, those held out first, names of their channels, and how one is read."""
    return mixed(config, seed) if config.square else drawn(config, seed) if config.fields else files(config, seed)


def drawn(config: Data, seed: int):
    import synthetic
    known = [name.lower() for name in synthetic.CHANNELS]
    wanted = config.channels or synthetic.CHANNELS
    if unknown := [name for name in wanted if name.lower() not in known]:
        raise ValueError(f"data.channels: '{unknown[0]}', expected some of {', '.join(synthetic.CHANNELS)}")
    rows = [known.index(name.lower()) for name in wanted]

    def draw(number: int) -> Field:
        field = drawing(config, seed, number, config.field_size)
        return f"synthetic {number}", np.ascontiguousarray(field.pixels[rows]), field.labels
    return list(range(config.held + config.fields)), tuple(synthetic.CHANNELS[i] for i in rows), draw


def drawing(config: Data, seed: int, number: int, size: int):
    import synthetic
    own = seed * 100003 + number
    count = round(config.field_cells * np.random.default_rng(own).uniform(1 / 3, 1) * (size / config.field_size) ** 2)
    return synthetic.field(own, size, max(1, count), config.field_diameter)


def files(config: Data, seed: int):
    found = [path for folder in config.folders for path in images_of(Path(config.root or "", folder), config.match)]
    order, channels, shape = lot_of(found, config, seed)

    def read(path: Path) -> Field:
        pixels = pixels_of(path, config.channels)
        if pixels.shape != shape:
            raise ValueError(f"{path}: {pixels.shape}, expected {shape} as in {found[0].name}; data.square cuts images "
                             "of many sizes to one")
        return path.stem, pixels, None
    return order, channels, read


def mixed(config: Data, seed: int):
    """Unlike images as fields of one size, with as many channels as those of the first folder have.

    They are cut into squares that cover them; a smaller image goes on mirrored. Of more channels some are taken, by
    lot; of fewer each is taken again: with views across channels such a field then teaches what DINO teaches without.
    Whole images of the first folder, by lot, are held out.
    """
    from segment import starts
    home, *others = [images_of(Path(config.root or "", folder), config.match) for folder in config.folders]
    order, channels, (C, *_) = lot_of(home, config, seed)
    side = config.square

    def whole(path: Path) -> Field:
        pixels = pixels_of(path, config.channels)
        if len(pixels) != C:
            raise ValueError(f"{path}: {len(pixels)} channels, expected {C} as in {home[0].name}; images of the first of "
                             "data.folders are measured on, and need the same stains")
        return path.stem, pixels, None

    def fitted(name: str, pixels: np.ndarray) -> Field:                      # (c, h, w) -> (C, side, side)
        c, h, w = pixels.shape
        key = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big")
        rows = np.resize(np.random.default_rng(key).permutation(c) if c > C else np.arange(c), C)
        return name, np.pad(pixels[rows], ((0, 0), (0, side - h), (0, side - w)), "symmetric"), None

    def square(path: Path, y: int, x: int) -> Field:
        pixels = last(path) if path not in home else last(path, config.channels)
        return fitted(f"{path.stem} {y},{x}", pixels[:, y:y + side, x:x + side])

    def synthetic(number: int) -> Field:
        return fitted(f"synthetic {number}", drawing(config, seed, number, side).pixels)

    last = functools.lru_cache(maxsize=1)(pixels_of)                         # squares of an image follow each other
    fields = [functools.partial(whole, path) for path in order[:config.held]]
    for path in [*order[config.held:], *(path for found in others for path in found)]:
        with data.open_image(path) as source:
            _, H, W = source.shape
        fields += [functools.partial(square, path, y, x) for y in starts(H, side, 0) for x in starts(W, side, 0)]
    fields += [functools.partial(synthetic, number) for number in range(config.fields)]
    return fields, channels, lambda make: make()


def images_of(folder: Path, match: str | None) -> list[Path]:
    """Image files below a folder, but for labels and what programs write beside them."""
    found = [path for parent, below in data.walk(folder) for path in data.kept(below, data.IMAGES)
             if not data.stem_of(path).endswith(NO_IMAGES)]
    if match is not None:
        found = [path for path in found if data.regex("data.match", match).search(path.relative_to(folder).as_posix())]
    if not found:
        raise ValueError(f"data.folders: {folder}: no images" + (f" with '{match}' in their path" if match else ""))
    return found


def lot_of(found: list[Path], config: Data, seed: int) -> tuple[list[Path], tuple[str, ...], tuple[int, ...]]:
    """Images in the order of a lot, names of their channels and their shape, both of the first file."""
    if len(found) <= config.held:
        raise ValueError(f"data.folders={', '.join(config.folders)}: {len(found)} images, expected more than "
                         f"data.held={config.held}")
    with data.open_image(found[0], config.channels or None) as first:
        channels = tuple(first.channels or config.channels or map(str, range(1, first.shape[0] + 1)))
        return [found[i] for i in np.random.default_rng((seed, 1)).permutation(len(found))], channels, first.shape


def pixels_of(path: Path, channels: tuple[str, ...] = ()) -> np.ndarray:
    """(C, H, W) uint16."""
    pixels = data.read_image(path, channels or None).pixels
    if pixels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"{path}: {pixels.dtype}, expected 8 or 16 bits")
    return pixels.astype(np.uint16)
