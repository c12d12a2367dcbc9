"""Image of any size -> labels, with a model: scale, tiles, blending, blocks.

    labels = segment(image, model)                 image (H, W), (C, H, W) or an open data.Source; labels (H, W) int32
    for block in blocks(source, model): ...        the same piece by piece, in memory bounded by the block

The way of the data, for an image of H x W px:

    source (C, H, W) -> normalised by percentiles of the whole image -> (3, h, w), scaled so that cells have the size
    the model knows -> overlapping tiles -> network -> tiles blended into rows of distances (h, w), top to bottom
    -> per block, with a margin around it: watershed at the finer of the two resolutions -> labels (H, W)

Tiles lie on one grid over the whole image, so distances do not depend on blocks. A block runs the watershed on its
own square and a margin (`halo`), keeps what lies inside, and takes the ids of cells that reach in from blocks before.
"""
from __future__ import annotations

import contextlib
import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

import data
import kinds
from watershed import drop_small, lengths, watershed, without_holes


GROWN = 1.6             # tiles are at most so much larger than the crops of training
UNIT = np.array([[0.0, 1.0]] * 3)      # limits of an image (3, H, W) that is normalised already


@dataclass(frozen=True)
class Block:
    """One part of the answer. Cells that are new in a block lie whole within its view, if they fit the halo."""
    core: tuple[slice, slice]      # rows and columns of the image that this block answers for
    view: tuple[slice, slice]      # the same with the margin
    local: np.ndarray              # (view) int32: every cell in view, numbered 1..n here
    ids: np.ndarray                # (n + 1,) int32: local number -> id in the whole image; 0: does not reach the core
    new: np.ndarray                # local numbers of the cells first met here
    labels: np.ndarray             # (core) int32, ids of the whole image
    distance: np.ndarray           # (core) float32 in [0, 1]

    @property
    def inner(self) -> tuple[slice, slice]:
        """The core within the view."""
        return tuple(slice(c.start - v.start, c.stop - v.start) for c, v in zip(self.core, self.view))


def segment(image, model, **options) -> np.ndarray:
    """Cells of an image: (H, W) int32, 0 background, 1..n. `options` are those of blocks()."""
    return _whole("labels", image, model, options)


def distance_map(image, model, **options) -> np.ndarray:
    """What the network predicts, before the watershed: (H, W) float32 in [0, 1]."""
    return _whole("distance", image, model, options)


def kind_of(image, model, *, kind: str | None = None, diameter: float | None = None, scale: float = 1.0,
            limits: np.ndarray | None = None) -> str:
    """Whose decoder and setting of the watershed an image gets (kinds.py): the given ones, or those that suit it. The arguments
    are those of blocks().

    Where the diameter of its cells is known, each kind looks at it with cells as wide as they are in its training images;
    kinds whose cells are never as small or as large are not asked.
    """
    if kind:
        return kinds.named(model, kind)
    if not model.settings.kinds:
        return kinds.SHARED
    source = as_source(image)
    if limits is None:
        limits = data.percentiles(getattr(source, "pixels", source), model.settings.low, model.settings.high)
    scales = {}
    for name in kinds.sets(model):
        with contextlib.suppress(ValueError):
            scales[name] = scale * scale_for(diameter, model, name) / kinds.settings_of(model, name).zoom
    looks = {at: kinds.token(model, glimpses(source, limits, scaled(source.shape[1:], at), model.settings.tile))
             for at in set(scales.values())}
    return kinds.nearest(model, {name: looks[at] for name, at in scales.items()}) if scales else kinds.SHARED


def scaled(size: tuple[int, int], scale: float) -> tuple[int, int]:
    H, W = size
    return max(1, round(H * scale)), max(1, round(W * scale))


def _side(model, tile: int | None, overlap: int | None, diameter: float | None, size: tuple[int, int]) -> tuple[int, int]:
    """Side of the tiles and what neighbours share, px. The side is the given one; or, from the training crops' to GROWN times
    that, the one whose tiles cover an image of that size with the fewest pixels. The overlap is the given one, or `diameter`."""
    patch, least = model.backbone.patch, tile or model.settings.tile
    if least % patch:
        raise ValueError(f"tile={tile}: expected a multiple of the patch, {patch} px")
    shared = min(max(least // 8, round(diameter or 0)), least // 2) if overlap is None else overlap
    if not 0 <= shared <= least // 2:
        raise ValueError(f"overlap={overlap}: expected 0 to half the tile, {least // 2} px")
    sides = [least] if tile else range(least, int(GROWN * least) + 1, patch)
    return min(sides, key=lambda side: len(starts(size[0], side, shared)) * len(starts(size[1], side, shared)) * side**2), shared


def _whole(what: str, image, model, options: dict) -> np.ndarray:
    """`labels` or `distance` of all blocks in one array."""
    source, whole = as_source(image), None
    for block in blocks(source, model, **options):
        part = getattr(block, what)
        if part.shape == source.shape[1:]:
            return part
        whole = np.zeros(source.shape[1:], part.dtype) if whole is None else whole
        whole[block.core] = part
    return whole


def blocks(image, model, *, diameter: float | None = None, scale: float = 1.0, limits: np.ndarray | None = None,
           peak: float | None = None, fill: float | None = None, depth: float | None = None, smooth: float | None = None,
           shape: float | None = None, min_area: int | None = None, kind: str | None = None, border: str = "keep",
           tile: int | None = None, overlap: int | None = None, batch: int | None = None, block: int = 2048,
           halo: int | None = None, clock: Counter | None = None, progress=None) -> Iterator[Block]:
    """Segment block by block, left to right and top to bottom.

    diameter : px, how wide cells are in the image, which is scaled so that they are as wide as this kind's were in training;
        None: as the size head sees it, or without one as images of this kind were (scale_for). scale : network px per image px, on top of that.
    limits : (C, 2), what becomes 0 and 1 (data.percentiles).
    peak, fill, depth, smooth (network px), shape, min_area (image px) : None takes what the weights have for this kind
        of image; kind : None asks kind_of(). border="drop" leaves out cells cut by the image's edge.
    tile : px, None takes the training size or somewhat more, as fits the image. overlap : px shared by neighbouring tiles; None: a cell's width, so that
        every cell lies whole in some tile, from an eighth to half of the tile.
    block : px, side of a block; images that are not much larger are one block. halo : px, None: 256 or 4 cells.
    clock : seconds are added under read, network, watershed; progress : called with the share of the image done.
    """
    source = as_source(image)
    clock = Counter() if clock is None else clock
    C, H, W = source.shape
    if limits is None:
        with timed(clock, "read"):
            limits = data.percentiles(getattr(source, "pixels", source), model.settings.low, model.settings.high)
    with timed(clock, "network"):
        if diameter is None and model.size is not None:
            diameter = look(source, model, limits)
        kind = kind_of(source, model, kind=kind, diameter=diameter, scale=scale, limits=limits)
    scale *= scale_for(diameter, model, kind)
    model, settings = kinds.suited(model, kind)
    halo = halo or max(256, math.ceil(4 * (settings.diameter or 0) / scale))
    if max(H, W) <= block + 2 * halo:
        block = max(H, W)
    h, w = scaled((H, W), scale)
    tile, overlap = _side(model, tile, overlap, settings.diameter, (h, w))
    peak = settings.peak if peak is None else peak
    fill = settings.fill if fill is None else fill
    if not 0 <= fill <= peak < 1:
        raise ValueError(f"peak={peak:g}, fill={fill:g}: expected 0 <= fill <= peak < 1")
    depth = settings.depth if depth is None else depth
    smooth = settings.smooth if smooth is None else smooth
    shape = settings.shape if shape is None else shape
    min_area = round(settings.min_area / scale**2) if min_area is None else min_area
    rows = _distances(source, limits, (h, w), model, tile, overlap, batch, clock, progress)
    held, first = [], 0                                       # rows of distances at hand, and the number of the first
    known = np.zeros((0, W), np.int32)                        # final labels of the last `halo` rows above the block
    count = 0
    for top in range(0, H, block):
        bottom = min(top + block, H)
        view_y = slice(max(0, top - halo), min(H, bottom + halo))
        net_y = _span(view_y, h / H, h)
        while first + sum(map(len, held)) < net_y.stop:
            held.append(next(rows))
        held = [torch.cat(held)[net_y.start - first:]]
        first = net_y.start
        known = np.concatenate((known[len(known) - (top - view_y.start):], np.zeros((bottom - top, W), np.int32)))
        for left in range(0, W, block):
            right = min(left + block, W)
            view_x = slice(max(0, left - halo), min(W, right + halo))
            net_x = _span(view_x, w / W, w)
            distance = held[0][:net_y.stop - first, net_x]
            with timed(clock, "watershed"):
                inner = (slice(top - view_y.start, bottom - view_y.start), slice(left - view_x.start, right - view_x.start))
                finer = h > H or w > W                        # the network sees more pixels than the image has
                whole = _enlarge(distance, (net_y, net_x), (view_y, view_x), (h / H, w / W))
                local = watershed(distance if finer else whole, peak, fill,
                                  min_area if not finer else round(min_area * h * w / (H * W)), depth,
                                  *lengths(smooth, shape, 1.0 if finer else scale))
                local = without_holes(local)
                if finer:
                    local = _nearest(local, (net_y, net_x), (view_y, view_x), (h / H, w / W))
                    local = drop_small(local, 1, int(local.max()))       # cells smaller than a pixel of the image are none
                local, whole = local.cpu().numpy(), whole[inner].cpu().numpy()
                if border == "drop":
                    local = _drop_cut(local, (view_y, view_x), (H, W))
                ids, new = _identify(local, inner, known[:, view_x], count)
                count += len(new)
                alone = local[inner].shape == local.shape     # one block: its numbers are the ids
                labels = local if alone else ids[local[inner]]
                known[top - view_y.start:, left:right] = labels
            yield Block((slice(top, bottom), slice(left, right)), (view_y, view_x), local, ids, new, labels, whole)


def _identify(local: np.ndarray, inner: tuple[slice, slice], known: np.ndarray, count: int):
    """Ids for the cells of a view: the id that most of the cell already has in blocks before, else the next free one.

    known (rows above the core and of it, columns of the view): final labels, 0 where not yet known.
    """
    n = int(local.max(initial=0))
    if local[inner].shape == local.shape:
        return np.arange(n + 1, dtype=np.int32), np.arange(1, n + 1)
    ids = np.zeros(n + 1, np.int32)
    reaching = np.zeros(n + 1, bool)
    reaching[local[inner]] = True
    reaching[0] = False
    rows, columns = inner
    decided = (slice(0, rows.start), slice(None)), (rows, slice(0, columns.start))     # above the core, and left of it
    before, mine = (np.concatenate([labels[part].ravel() for part in decided]) for labels in (known, local))
    total = np.bincount(mine, minlength=n + 1)                # px of each cell on ground already decided
    both = (before > 0) & (mine > 0)
    if both.any():
        pairs, px = np.unique(mine[both].astype(np.int64) << 32 | before[both], return_counts=True)
        cell, old = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
        most = np.argsort(px, kind="stable")                  # the largest overlap is written last
        most = most[2 * px[most] > total[cell[most]]]
        ids[cell[most]] = old[most]
    new = np.flatnonzero(reaching & (ids == 0))
    ids[new] = count + 1 + np.arange(len(new), dtype=np.int32)
    ids[~reaching] = 0
    return ids, new


def _drop_cut(local: np.ndarray, view: tuple[slice, slice], size: tuple[int, int]) -> np.ndarray:
    """Without the cells that touch the edge of the image; the rest is numbered 1..n again."""
    keep = np.ones(int(local.max(initial=0)) + 1, bool)
    for axis, (part, length) in enumerate(zip(view, size)):
        if part.start == 0:
            keep[local.take(0, axis)] = False
        if part.stop == length:
            keep[local.take(-1, axis)] = False
    keep[0] = False
    return (np.cumsum(keep) * keep).astype(np.int32)[local]


# ---------------------------------------------------------------------------------------- tiles and network

def _distances(source, limits, size, model, tile, overlap, batch, clock, progress) -> Iterator[Tensor]:
    """Blended distances (rows, w), top to bottom, on the model's device; each row once."""
    h, w = size
    device = next(model.parameters()).device
    run = _Runner(model, batch or (32 if device.type == "cuda" else 4), clock)
    ys, xs = starts(h, tile, overlap), starts(w, tile, overlap)
    window = _window(tile, overlap).to(device)                               # (tile,)
    square = window[:, None] * window                                        # (tile, tile)
    wide = max(w, tile)
    across = torch.zeros(wide, device=device)                                # sum of the windows over a column
    for x in xs:
        across[x:x + tile] += window
    sums, weights = torch.zeros(tile, wide, device=device), torch.zeros(tile, device=device)
    for i, y in enumerate(ys):
        with timed(clock, "read"):
            strip = _read(source, limits, size, slice(y, min(y + tile, h))).to(device)         # (3, rows, w)
            if strip.shape[1:] != (tile, wide):
                strip = strip[:, _reflect(strip.shape[1], tile)][:, :, _reflect(w, wide)]      # (3, tile, wide)
        tiles = run(strip, xs, tile)                                         # one (tile, tile) per x
        for x, distance in zip(xs, tiles):
            sums[:, x:x + tile].addcmul_(square, distance)
        weights += window
        done = (ys[i + 1] if i + 1 < len(ys) else h) - y
        if progress:
            progress((i + 1) / len(ys))
        yield (sums[:done] / (weights[:done, None] * across))[:, :w]
        sums = torch.cat((sums[done:], torch.zeros(done, wide, device=device)))[:tile]
        weights = torch.cat((weights[done:], torch.zeros(done, device=device)))[:tile]


class _Runner:
    """The network on the tiles of a strip, in batches; out of GPU memory, it halves the batch and goes on."""

    def __init__(self, model, batch: int, clock: Counter):
        self.model, self.batch, self.clock = model, batch, clock

    def __call__(self, strip: Tensor, xs: list[int], tile: int) -> list[Tensor]:
        tiles = [strip[:, :, x:x + tile] for x in xs]
        spread = torch.stack([t.amax() - t.amin() for t in tiles]).tolist()  # 0: nothing to see, no cells, no work
        todo = [t for t, seen in zip(tiles, spread) if seen]
        with timed(self.clock, "network"):
            found, at = [], 0
            while at < len(todo):
                try:
                    found += self._forward(torch.stack(todo[at:at + self.batch]))
                    at += self.batch
                except torch.cuda.OutOfMemoryError:
                    if self.batch == 1:
                        raise ValueError(f"out of GPU memory with one tile of {tile} px; use device=cpu or a "
                                         "smaller tile=") from None
                    self.batch //= 2
                    torch.cuda.empty_cache()
        found = iter(found)
        return [next(found) if seen else torch.zeros(tile, tile, device=strip.device) for seen in spread]

    @torch.inference_mode()
    def _forward(self, x: Tensor) -> list[Tensor]:
        with self.model.autocast():
            return list(self.model(x)[:, 0])                                 # B times (tile, tile)


def glimpses(source, limits: np.ndarray, size: tuple[int, int], tile: int) -> Tensor:
    """What an image shows, from a few places: tiles (1 to 5, 3, tile, tile) from its corners and its middle."""
    (h, w), found = size, []
    bottom, right = max(0, h - tile), max(0, w - tile)
    places = sorted({(0, 0), (0, right), (bottom // 2, right // 2), (bottom, 0), (bottom, right)})
    for y, row in groupby(places, key=itemgetter(0)):
        strip = _read(source, limits, size, slice(y, min(y + tile, h)))
        for part in (strip[:, :, x:x + tile] for _, x in row):
            found.append(part[:, _reflect(part.shape[1], tile)][:, :, _reflect(part.shape[2], tile)])
    return torch.stack(found)


def starts(length: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin along an axis: evenly spread, sharing at least `overlap` px; the last ends with the image."""
    if length <= tile:
        return [0]
    n = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (n - 1)) for i in range(n)]


def _window(tile: int, overlap: int) -> Tensor:
    """Weight of a tile's pixels along an axis: 1 in the middle, a smooth slope over the overlap, never 0."""
    edge = torch.arange(tile).minimum(torch.arange(tile).flip(0)) + 0.5
    return (0.5 - 0.5 * torch.cos(math.pi * (edge / max(overlap, 1)).clamp(max=1))).clamp(min=1e-4)


def _reflect(length: int, wanted: int) -> Tensor:
    """Indices that continue an axis by reflection to `wanted` px: 0 1 2 1 0 1 ... for a length of 3."""
    i = torch.arange(wanted)
    if length == 1:
        return torch.zeros_like(i)
    i = i % (2 * length - 2)
    return torch.where(i < length, i, 2 * length - 2 - i)


# ---------------------------------------------------------------------------------------------------- scale

def scale_for(diameter: float | None, model, kind: str = kinds.SHARED) -> float:
    """Network px per image px, so that cells `diameter` px wide look as wide as the training cells of that kind; None: as for
    its training images."""
    settings = kinds.settings_of(model, kind)
    if diameter is None:
        return settings.zoom
    typical = settings.diameter
    if typical is None:
        raise ValueError("diameter: these weights do not say how large their training cells were; leave it out")
    if not diameter > 0:
        raise ValueError(f"diameter={diameter:g}: expected more than 0 px")
    scale = typical / diameter
    if scale > 10:
        raise ValueError(f"diameter={diameter:g}: the image would be enlarged {scale:.0f} times, for these weights know "
                         f"cells of {typical:.3g} px; expected {typical / 10:.2g} px or more")
    if scale < 1 / 32:
        raise ValueError(f"diameter={diameter:g}: the image would be reduced {1 / scale:.0f} times, for these weights know "
                         f"cells of {typical:.3g} px; expected {32 * typical:.3g} px or less")
    return 1.0 if abs(math.log(scale)) < 0.05 else scale       # under 5 %: resampling would cost more than it brings


def find_diameter(image, model, limits: np.ndarray, *, kind: str | None = None, **options) -> float | None:
    """Median diameter (px) of the cells of an image, from a few passes over parts of it; None where it finds no cells.

    A part is segmented at each of four scales an octave apart: the liveliest of nine, at most 1024 px wide, and 640 px
    for the network, so that all passes together take as long as some 1.5 megapixels. The network finds cells best when
    they are as large as it knows them of their kind, so the scale counts at which they come out closest to that; a last
    pass refines it.
    """
    source = as_source(image)
    if model.size is not None:
        return look(source, model, limits)
    if model.settings.diameter is None:
        raise ValueError("diameter=auto: these weights do not say how large their training cells were; give diameter in px")
    _, H, W = source.shape

    def measure(scale: float) -> tuple[float, float] | None:
        """Diameter in the image, and as it is in training images of this kind."""
        seen = kind_of(source, model, kind=kind, scale=scale, limits=limits)
        settings = kinds.settings_of(model, seen)
        side = min(1024, round(640 / scale))
        corners = [(y, x) for y in sorted({0, max(0, (H - side) // 2), max(0, H - side)})
                   for x in sorted({0, max(0, (W - side) // 2), max(0, W - side)})]
        parts = (source.region(y, min(H, y + side), x, min(W, x + side)) for y, x in corners)
        part = max(parts, key=lambda pixels: data.normalise(pixels, limits).std())
        labels = segment(part, model, scale=scale, limits=limits, kind=seen, **options)
        area = np.bincount(labels.ravel())[1:].astype(float)
        if len(area) < 3:
            return None
        whole = area[area >= 0.2 * (area @ area) / area.sum()]               # crumbs at a wrong scale say nothing
        return 2 * math.sqrt(np.median(whole) / math.pi), settings.diameter / settings.zoom

    found = {scale: d for scale in (0.25, 0.5, 1.0, 2.0) if min(H, W, 1024) * scale >= 32
             and (d := measure(scale)) is not None}
    if not found:
        return None
    best = min(found, key=lambda scale: abs(math.log(found[scale][0] * scale / found[scale][1])))
    width, typical = found[best]
    return (measure(min(max(typical / width, 0.1), 4.0)) or found[best])[0]


@torch.inference_mode()
def look(source, model, limits: np.ndarray, looks: int = 2) -> float:
    """Median diameter (px) of the cells of an image, as the size head sees it: first in a few tiles as they are, then in tiles at the
    scale that this asks for. Tiles count by how sure it is of them."""
    typical, zoom = model.settings.diameter, 1.0
    for _ in range(looks):
        size = scaled(source.shape[1:], zoom)
        guess, spread = model.widths(glimpses(source, limits, size, model.settings.tile).to(model.mean.device))
        weight = torch.exp(-2 * spread)
        width = math.exp(float((guess * weight).sum() / weight.sum())) / zoom
        zoom = min(max(typical / width, 1 / 32), 8.0)
    return width


def _read(source, limits, size, rows: slice) -> Tensor:
    """Rows of the scaled image: (3, rows, w) in [0, 1]."""
    C, H, W = source.shape
    h, w = size
    if (h, w) == (H, W):
        return torch.from_numpy(data.to_rgb(data.normalise(source.region(rows.start, rows.stop, 0, W), limits)))
    y, weight_y = _taps(rows.start, rows.stop, h / H, H)
    x, weight_x = _taps(0, w, w / W, W)
    top = int(y.min())
    pixels = torch.from_numpy(data.normalise(source.region(top, int(y.max()) + 1, 0, W), limits))
    pixels = _resample(_resample(pixels, 1, y - top, weight_y), 2, x, weight_x)
    return torch.from_numpy(data.to_rgb(pixels.numpy()))


def _taps(start: int, stop: int, scale: float, length: int) -> tuple[Tensor, Tensor]:
    """Pixels start..stop of an axis scaled from `length` px: which old pixels each looks at, and with what weight.

    A triangle of the width of the coarser grid: bilinear when enlarging, an average without aliasing when reducing.
    """
    radius = max(1.0, 1 / scale)
    centre = (torch.arange(start, stop, dtype=torch.float64) + 0.5) / scale - 0.5
    index = (centre - radius).floor().long()[:, None] + 1 + torch.arange(math.ceil(2 * radius))   # (n, K)
    weight = (1 - (index - centre[:, None]).abs() / radius).clamp(min=0)
    return index.clamp(0, length - 1), (weight / weight.sum(1, keepdim=True)).float()


def _resample(x: Tensor, axis: int, index: Tensor, weight: Tensor) -> Tensor:
    shape = [1] * x.ndim
    shape[axis] = -1
    return sum(x.index_select(axis, index[:, k].to(x.device)) * weight[:, k].to(x.device).view(shape)
               for k in range(index.shape[1]))


def _span(part: slice, scale: float, length: int) -> slice:
    """Rows of the network's grid that a part of the image's grid needs."""
    if scale == 1:
        return part
    return slice(max(0, math.floor((part.start + 0.5) * scale - 0.5) - 1),
                 min(length, math.ceil((part.stop - 0.5) * scale - 0.5) + 2))


def _enlarge(distance: Tensor, net, view, scales) -> Tensor:
    """Distances on the network's grid -> on the image's."""
    for axis in (0, 1):
        if scales[axis] != 1:
            index, weight = _taps(view[axis].start, view[axis].stop, 1 / scales[axis], 1 << 62)
            index = (index - net[axis].start).clamp(0, distance.shape[axis] - 1)
            distance = _resample(distance, axis, index, weight)
    return distance


def _nearest(labels: Tensor, net, view, scales) -> Tensor:
    for axis in (0, 1):
        centre = (torch.arange(view[axis].start, view[axis].stop, dtype=torch.float64) + 0.5) * scales[axis]
        index = (centre.floor().long() - net[axis].start).clamp(0, labels.shape[axis] - 1)
        labels = labels.index_select(axis, index.to(labels.device))
    return labels


# ---------------------------------------------------------------------------------------------------- small

def as_source(image):
    """An open data.Source as it is; an array (H, W) or (C, H, W) in its clothes."""
    return image if hasattr(image, "region") else _Array(np.asarray(image))


class _Array:
    """An array that answers as data.Source does."""

    def __init__(self, pixels: np.ndarray):
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype.kind not in "buif":
            raise ValueError(f"image of shape {pixels.shape}, {pixels.dtype}: expected (H, W) or (C, H, W) numbers")
        if pixels.dtype.kind == "f" and not np.isfinite(pixels).all():
            raise ValueError("the image holds NaN or infinite values; replace them first")
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype

    def region(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return self.pixels[:, y0:y1, x0:x1]


class timed:
    """Adds the seconds of a with block to clock[name]; waits for the GPU, so that its work is counted where it belongs."""

    def __init__(self, clock: Counter, name: str):
        self.clock, self.name = clock, name

    def __enter__(self):
        self.start = time.perf_counter()

    def __exit__(self, *_):
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.clock[self.name] += time.perf_counter() - self.start
