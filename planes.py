"""TIFFs of one plane, as microscopes write them to S3: decoded into memory that is there, and their limits.

    planes.decode(body, out)                    bytes -> out (H, W) uint16; Absent if it is another image
    planes.limits_of(pixels)                    (C, H, W) uint16 -> (C, 2) float32, percentiles 1 and 99.8
"""
from __future__ import annotations

import io
import math

import numpy as np

from images import DAMAGE
from store import Absent

GRID = 1 << 16               # pixels of a channel that its limits are taken from, or up to four times as many


def decode(body: bytes, out: np.ndarray) -> None:
    """A TIFF of one page into out (H, W) uint16; Absent if it is another image, ValueError if damaged."""
    import tifffile
    try:
        with tifffile.TiffFile(io.BytesIO(body)) as tif:
            page = tif.pages.first
            pages, end = len(tif.pages), max(map(sum, zip(page.dataoffsets, page.databytecounts)))
            if page.shape == out.shape and page.dtype == np.uint16 and pages == 1 and end <= len(body):
                page.asarray(out=out, maxworkers=1)
                return
    except DAMAGE as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(f"damaged or no TIFF ({reason})") from None
    if end > len(body):
        raise ValueError("truncated TIFF")
    found, expected = (" x ".join(map(str, shape)) for shape in (page.shape, out.shape))
    raise Absent(f"wrong size, {found} px of {page.dtype}, {pages} page; expected {expected} px of uint16, 1 "
                 "page")


def size_of(body: bytes) -> tuple[int, int]:
    """(H, W) of a TIFF of one plane."""
    import tifffile
    try:
        with tifffile.TiffFile(io.BytesIO(body)) as tif:
            H, W = tif.pages.first.shape
    except DAMAGE as error:
        raise Absent(f"damaged, no TIFF or no single plane ({error})") from None
    return H, W


def limits_of(pixels: np.ndarray) -> np.ndarray:
    """Percentiles 1 and 99.8 of each channel, (C, 2) float32; pixels (C, H, W) uint16.

    As data.percentiles for fields up to 512 x 512 px; of larger ones every k-th row and column is looked
    at, since all pixels would take longer than to decode them. Ranks are off by about 0.04 % then.
    """
    step = max(1, math.isqrt((pixels[0].size - 1) // GRID))
    limits = np.empty((len(pixels), 2), np.float32)
    for plane, pair in zip(pixels[:, ::step, ::step], limits):
        total = np.cumsum(np.bincount(plane.ravel()))              # pixels of this value or below
        at = np.array([0.01, 0.998]) * (plane.size - 1)            # ranks, between two values
        ranks = np.floor(at), np.ceil(at)
        below, above = (np.searchsorted(total, rank.astype(int), side="right") for rank in ranks)
        pair[:] = below + (above - below) * (at % 1)
        if pair[0] == pair[1]:                                     # a black image with few cells
            pair[1] = len(total) - 1
    return limits
