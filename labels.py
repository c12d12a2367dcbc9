"""Label images <-> files.

    write_labels("well_A1_labels.tif", labels)
    labels = read_labels("well_A1_labels.tif")                       # (H, W) int32, 0 = background
    writer = LabelWriter("slide_labels.tif", (H, W))                 # part by part: add(core, labels) ..., close()
"""
from __future__ import annotations

import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from images import open_image
from runs import replacing

TILE = 512                              # px, side of the tiles of a file that comes in parts
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


class LabelWriter:
    """A label image (H, W) written while its parts come, left to right and top to bottom.

    One part that is the whole image becomes a plain TIFF, several a tiled one of uint32, a BigTIFF where it is large.
    In memory lies a band of parts. The file appears when it is closed.
    """

    def __init__(self, path: str | Path, size: tuple[int, int], pixel_size: float | None = None):
        self.path, self.size, self.pixel_size = Path(path), size, pixel_size
        self.whole: np.ndarray | None = None                       # the only part
        self.band = np.zeros((0, size[1]), np.uint32)              # rows that are not compressed yet
        self.spool = tempfile.TemporaryFile(dir=self.path.parent)  # compressed tiles, one after the other
        self.lengths: list[int] = []                               # their bytes

    def add(self, core: tuple[slice, slice], labels: np.ndarray) -> None:
        """Take the labels of these rows and columns."""
        (H, W), (rows, columns) = self.size, core
        if labels.shape == self.size:
            self.whole = labels
            return
        if columns.start == 0:
            self.band = np.concatenate((self.band, np.zeros((rows.stop - rows.start, W), np.uint32)))
        self.band[len(self.band) - (rows.stop - rows.start):, columns] = labels
        if columns.stop == W:
            while len(self.band) >= TILE or (len(self.band) and rows.stop == H):
                for x in range(0, W, TILE):
                    part = self.band[:TILE, x:x + TILE]
                    padded = np.pad(part, [(0, TILE - n) for n in part.shape])
                    self.lengths.append(self.spool.write(zlib.compress(padded.astype("<u4").tobytes(), 3)))
                self.band = self.band[TILE:]

    def close(self) -> None:
        """Write the file."""
        if self.whole is not None:
            self.spool.close()
            return write_labels(self.path, self.whole, self.pixel_size)
        (H, W), expected = self.size, -(-self.size[0] // TILE) * -(-self.size[1] // TILE)
        if len(self.lengths) != expected:
            raise ValueError(f"{self.path}: {len(self.lengths)} tiles of labels, expected {expected} for {H} x {W} px")
        self.spool.seek(0)
        with self.spool, replacing(self.path) as temporary:
            tifffile.imwrite(temporary, (self.spool.read(length) for length in self.lengths), shape=self.size, dtype=np.uint32,
                             tile=(TILE, TILE), bigtiff=4 * H * W > CLASSIC, byteorder="<", **_label_options(self.pixel_size))


def _label_options(pixel_size: float | None) -> dict[str, Any]:
    calibration = dict(resolution=(1e4 / pixel_size,) * 2, resolutionunit="CENTIMETER") if pixel_size else {}
    fast = {"level": 3}                                            # a third less would take three times as long
    return dict(compression="zlib", compressionargs=fast, photometric="minisblack", **calibration)


def check_labels(labels: np.ndarray, where: str | Path, largest: int) -> None:
    if labels.ndim != 2 or labels.dtype.kind not in "iu":
        raise ValueError(f"{where}: labels of shape {labels.shape}, {labels.dtype}; expected (H, W) integers")
    if labels.min(initial=0) < 0 or labels.max(initial=0) > largest:
        raise ValueError(f"{where}: labels from {labels.min()} to {labels.max()}, expected 0 to {largest}")
