"""Labels and image -> a picture: the image with coloured outlines.

    overlay.write_png("NAME_overlay.png", overlay.overlay(image, labels))

How. Steps are passes over whole arrays of flags: outlines are where neighbours differ, and thick lines are
outlines grown by shifting flags. Ids are looked up only where a line is drawn.
"""
from __future__ import annotations

import colorsys
import functools
import math
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from runs import replacing
from labels import check_labels

# Hues that stay apart from each other and from what is under them: light ones on dark images; on bright ones,
# H&E above all, none of the reds and violets of the stains.
ON_DARK = ("ffd93b", "35d7ff", "ff6ec7", "7dff5a", "ff9a3d", "9aa5ff", "ff6b62", "3dffc0")
ON_BRIGHT = ("ffeb00", "00dcff", "5aff1e", "1450ff", "ff8200", "00aa3c", "ff00aa", "00b4a0")
SMALL = 1000                     # px; smaller images are enlarged to about this
BAND = 1 << 20                   # bytes of a PNG that are deflated together, on one core


def overlay(image: np.ndarray, labels: np.ndarray, max_side: int = 4096) -> np.ndarray:
    """The image with outlined cells, (h, w, 3) uint8, for a screen or a paper.

    image : (C, H, W). Bright 8-bit RGB stays as it is; otherwise each channel is stretched between its
        percentiles 1 and 99.8: one is gray, two are green and magenta, more spread over the hues from red.
    labels : (H, W)
    max_side : px; larger images are reduced by a whole number.

    Images of 1000 px and less are enlarged by a whole number, up to 8, and lines are smoothed. A line
    runs inside its cell, with a thin shadow on the ground outside. Cells near each other differ in colour.
    """
    check_labels(labels, "overlay", np.iinfo(np.int64).max)
    step = -(-max(image.shape[1:]) // max_side)
    if step > 1:
        image, labels = reduced(image, labels, step)
    if labels.max(initial=0) > labels.size:                        # ids with wide gaps: counted anew
        ids = np.unique(labels[labels > 0])
        labels = np.where(labels > 0, np.searchsorted(ids, labels) + 1, 0)
    rgb, count = displayed(image), int(labels.max(initial=0))
    hexes = ON_BRIGHT if np.median(rgb[::4, ::4]) >= 128 else ON_DARK
    rim = np.count_nonzero(outlines(labels))
    width = 2 * np.count_nonzero(labels) / max(rim, 1)             # px, about half of a round cell's
    colours = np.array([list(bytes.fromhex(colour)) for colour in hexes], np.uint8)
    pairs = close(labels, max(round(width / 2), 2))
    colours = colours[different(pairs, count, len(hexes))]         # (n, 3)
    side = max(labels.shape)
    zoom = 1 if side > SMALL else min(2 * round(SMALL / side), 16)
    if zoom > 1:                                                   # labels twice as fine as the picture
        H, W = labels.shape
        rgb = np.asarray(Image.fromarray(rgb).resize((zoom * W // 2, zoom * H // 2), Image.BICUBIC))
        labels = enlarged(labels, zoom)
    thick = max(1, min(round(zoom * side / 600), round(zoom * width / 6)))
    return drawn(rgb, labels, colours, thick)


def reduced(image: np.ndarray, labels: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Image and labels at 1 / step of their size, rounded up: area means and nearest pixels.

    Blocks whose sides are multiples of step give what the whole image gives.
    """
    if step == 1:
        return image, labels
    H, W = labels.shape
    h, w = -(-H // step), -(-W // step)
    small = np.stack([np.pad(channel, ((0, h * step - H), (0, w * step - W)), mode="edge")
                      .reshape(h, step, w, step).mean((1, 3)) for channel in image])
    y, x = (np.minimum(np.arange(n) * step + step // 2, size - 1) for n, size in ((h, H), (w, W)))
    return small.round().astype(image.dtype) if image.dtype.kind in "iu" else small, labels[np.ix_(y, x)]


def displayed(image: np.ndarray) -> np.ndarray:
    """(C, H, W) of any type -> (H, W, 3) uint8 to look at."""
    C, H, W = image.shape
    thin = image[:, ::-(-H // 512), ::-(-W // 512)]                # enough for percentiles
    if C == 3 and image.dtype == np.uint8 and np.median(thin) >= 85:
        return np.ascontiguousarray(np.moveaxis(image, 0, -1))
    spread = [colorsys.hsv_to_rgb(c / C, 1, 1) for c in range(C)]
    hues = {1: [(1, 1, 1)], 2: [(0, 1, 0), (1, 0, 1)]}.get(C, spread)
    rgb = np.zeros((H, W, 3), np.uint8)
    for channel, sample, hue in zip(image, thin, hues):
        low, high = np.percentile(sample, (1, 99.8))
        high = high if high > low else max(float(channel.max()), low + 1)      # a few bright spots on nothing
        value = np.subtract(channel, low, dtype=np.float32, casting="unsafe")
        value *= 255 / (high - low)
        value += 0.5
        value = value.clip(0, 255, out=value).astype(np.uint8)
        for k, share in enumerate(hue):
            if share:
                part = value if share == 1 else (value * np.float32(share)).astype(np.uint8)
                rgb[..., k] = part if C == 1 else np.maximum(rgb[..., k], part)
    return rgb


# ---------------------------------------------------------------------------------------------- colours

def close(labels: np.ndarray, reach: int) -> np.ndarray:
    """Pairs of cells (P, 2), counted from 0, that touch or, roughly, come within `reach` px of each other."""
    step = max(1, reach // 2)
    thin, count, found = labels[::step, ::step], int(labels.max(initial=0)), []
    around = (0, 1), (0, 2), (1, -1), (1, 0), (1, 1), (2, 0)
    for view, steps in ((labels, ((0, 1), (1, 0))), (thin, around)):
        (h, w), cell = view.shape, view > 0
        for dy, dx in steps:
            here = slice(0, h - dy), slice(max(-dx, 0), w - max(dx, 0))
            there = slice(dy, h), slice(max(dx, 0), w + min(dx, 0))
            both = (view[here] != view[there]) & cell[here] & cell[there]
            found.append((view[here][both].astype(np.int64) - 1) * count + view[there][both] - 1)
    return np.stack(np.divmod(np.unique(np.concatenate(found)), max(count, 1)), 1)


def different(pairs: np.ndarray, n: int, colours: int) -> np.ndarray:
    """A colour (n,) for each cell such that the two of a pair differ, as far as the colours reach."""
    rng = np.random.default_rng(0)
    chosen = np.arange(n) % colours
    a, b = pairs.T
    for _ in range(50):
        clash = chosen[a] == chosen[b]
        if not clash.any():
            break
        beside = np.concatenate((a * colours + chosen[b], b * colours + chosen[a]))
        taken = np.bincount(beside, minlength=n * colours).reshape(n, colours)
        again = np.unique(b[clash])
        chosen[again] = (taken[again] + rng.random((len(again), colours))).argmin(1)
    return chosen


# ---------------------------------------------------------------------------------------------- lines

def outlines(labels: np.ndarray) -> np.ndarray:
    """(H, W) bool: pixels of a cell that share an edge with another label; the image's sides are none."""
    rim = np.zeros(labels.shape, bool)
    below, beside = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    rim[1:] |= below
    rim[:-1] |= below
    rim[:, 1:] |= beside
    rim[:, :-1] |= beside
    return rim & (labels > 0)


def grown(mask: np.ndarray, radius: float) -> np.ndarray:
    """(H, W) bool: pixels within `radius` px of the mask; a disc row by row, from the narrow to the wide."""
    disc, wide = np.zeros_like(mask), mask.copy()
    H = len(mask)
    for dx in range(int(radius) + 1):
        if dx:
            wide[:, dx:] |= mask[:, :-dx]
            wide[:, :-dx] |= mask[:, dx:]
        for dy in range(min(int(radius) + 1, H)):
            if int(math.sqrt(radius ** 2 - dy ** 2)) == dx:
                disc[dy:] |= wide[:H - dy]
                disc[:H - dy] |= wide[dy:]
    return disc


def drawn(rgb: np.ndarray, labels: np.ndarray, colours: np.ndarray, thick: int) -> np.ndarray:
    """A copy of rgb (H, W, 3) with a line `thick` px wide inside each cell 1..n and a shadow around.

    labels : (H, W), or k times finer for smooth lines; thick is in their px.
    """
    H, W, _ = rgb.shape
    k = len(labels) // H
    rim, cell = outlines(labels), labels > 0
    line, dark = grown(rim, thick - 0.5) & cell, grown(rim, (thick + 1) // 2 + 0.5) & ~cell
    marked, fine = line | dark, [np.s_[i::k, j::k] for i in range(k) for j in range(k)]
    touched = np.flatnonzero(functools.reduce(np.logical_or, [marked[part] for part in fine]))
    picture = rgb.copy()
    pixels = picture.reshape(-1, 3)
    old, new = pixels.take(touched, 0), np.zeros((len(touched), 3), np.uint16)
    for part in fine:
        colour = old >> dark[part].ravel().take(touched)[:, None]
        on = np.flatnonzero(line[part].ravel().take(touched))
        colour[on] = colours.take(labels[part].ravel().take(touched[on]) - 1, 0)
        new += colour
    pixels[touched] = new // (k * k)
    return picture


def enlarged(labels: np.ndarray, zoom: int) -> np.ndarray:
    """Labels zoom times as large, with smooth borders.

    Every new pixel takes the label that weighs most among the 3 x 3 old ones, weighted by the quadratic
    B-spline: as if every cell's mask were interpolated by itself.
    """
    H, W = labels.shape
    large = np.repeat(np.repeat(labels, zoom, 0), zoom, 1)         # (H zoom, W zoom)
    t = (np.arange(zoom) + 0.5) / zoom - 0.5
    spline = np.stack(((0.5 - t) ** 2 / 2, 0.75 - t ** 2, (0.5 + t) ** 2 / 2)).astype(np.float32)
    weight = np.einsum("iy,jx->ijyx", spline, spline).reshape(9, zoom ** 2)
    window = np.lib.stride_tricks.sliding_window_view(np.pad(labels, 1, mode="edge"), (3, 3))
    mixed = np.zeros((H, W), bool)
    for dy in range(3):
        for dx in range(3):
            mixed |= window[:, :, dy, dx] != labels
    y, x = np.nonzero(mixed)
    block = large.reshape(H, zoom, W, zoom)
    for at in range(0, len(y), 4096):                              # as much as stays in the cache
        i, j = y[at:at + 4096], x[at:at + 4096]
        old = window[i, j].reshape(-1, 9)                          # (P, 9)
        most, winner = np.zeros((len(old), zoom ** 2), np.float32), np.zeros((len(old), zoom ** 2), labels.dtype)
        for one in old.T[..., None]:                               # (P, 1)
            votes = (old == one).astype(np.float32) @ weight       # (P, zoom^2)
            np.copyto(winner, one, where=votes > most)
            np.maximum(most, votes, out=most)
        block[i, :, j] = winner.reshape(-1, zoom, zoom)
    return large


# ---------------------------------------------------------------------------------------------- file

def write_png(path: str | Path, rgb: np.ndarray) -> None:
    """(H, W, 3) or (H, W) uint8 as PNG, deflated in bands on all cores; bytes do not depend on their number.

    Unfiltered at level 1: here filters save nothing, and the search for them takes Pillow half its time.
    """
    if rgb.dtype != np.uint8 or rgb.shape[2:] not in ((), (3,)) or 0 in rgb.shape:
        raise ValueError(f"{path}: {rgb.dtype} of shape {rgb.shape}, expected (H, W, 3) or (H, W) uint8")
    H, W = rgb.shape[:2]
    rows = np.zeros((H, 1 + rgb[0].size), np.uint8)                # each row begins with its filter: 0, none
    rows[:, 1:] = rgb.reshape(H, -1)
    many = max(1, BAND // rows.shape[1])
    bands = [rows[y:y + many] for y in range(0, H, many)]

    def deflated(k: int) -> bytes:
        squeeze = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS)
        end = zlib.Z_FINISH if k + 1 == len(bands) else zlib.Z_FULL_FLUSH
        return squeeze.compress(bands[k]) + squeeze.flush(end)

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))
        return struct.pack(">I", len(content)) + kind + content + check

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        body = b"".join(pool.map(deflated, range(len(bands))))
    stream = b"\x78\x01" + body + struct.pack(">I", zlib.adler32(rows))        # zlib's frame around deflate
    header = struct.pack(">2I5B", W, H, 8, 2 if rgb.ndim == 3 else 0, 0, 0, 0)
    with replacing(path) as temporary:
        temporary.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream)
                              + chunk(b"IEND", b""))
