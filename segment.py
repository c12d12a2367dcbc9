"""Image of any size -> labels: plan, tiles, blocks.

    labels = segment(image, net)                 image (H, W), (C, H, W) or an open images.Source
    plan = plan_for(source, net, diameter=30)    what the image gets, decided once
    for block in blocks(source, plan): ...       the same labels (H, W) int32 piece by piece, in
                                                 memory bounded by the block

What happens to an image of H x W px:

    source (C, H, W) -> normalised by percentiles of the whole image -> (3, h, w), scaled so that
    cells have the size the network knows -> overlapping tiles -> network -> tiles blended into rows
    of distances (h, w), top to bottom -> per block, with a margin around it: watershed at the finer
    of the two resolutions -> labels (H, W)

Tiles lie on one grid over the whole image, so distances do not depend on blocks. A block runs the
watershed on its own square and a margin (`halo`), keeps what lies inside, and takes the ids of
cells that reach in from blocks before.
"""
from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from typing import Literal, NamedTuple

import numpy as np
import torch
from scipy.ndimage import binary_dilation, find_objects, gaussian_filter
from skimage.filters import threshold_otsu
from skimage.morphology import disk, remove_small_objects
from torch import Tensor

import cells
import images
import vectors
from images import Region
from model import SIZE_ZOOMS, DINOCell
from watershed import Setting, drop_small, flood, without_holes

WIDEST = 4              # blocks that a given cell may reach over
GROWN = 1.6             # tiles are at most so much larger than the crops of training
GLASS = 0.03            # optical density that glass may have
HALO = 256              # px around a block, at least
UNKNOWN = 40.0          # px, taken as the diameter of cells by networks that do not know it
CLEAR = 0.6             # distance that the map of a clear cell reaches
UNIT = np.array([[0.0, 1.0]] * 3)      # limits of an image (3, H, W) that is normalised already


# --------------------------------------------------------------------------------------------- plan

class Plan(NamedTuple):
    """Network, thresholds, scale and tiles of an image."""
    net: DINOCell
    setting: Setting           # thresholds of the watershed, lengths in px of the network
    zoom: float                # px of the network for each px of the image
    limits: np.ndarray         # (C, 2) intensities that become 0 and 1
    diameter: float            # px of the image, of a typical cell
    near: float                # px of the image, cells nearer than this are neighbours
    tile: int                  # px of the network, side of the tiles
    overlap: int               # px of the network that neighbouring tiles share
    batch: int                 # tiles at once
    block: int                 # px of the image, side of the blocks
    halo: int                  # px of the image, margin around a block
    border: str                # keep, or drop: leave out cells cut by the edge of the image
    tissue: np.ndarray | None = None  # (h, w) bool, of any size; other tiles are not looked at
    embed: bool = False        # blocks bring a vector for each cell


def plan_for(image, net: DINOCell, *, diameter: float | None = None, zoom: float | None = None,
             limits: np.ndarray | None = None, tile: int | None = None, overlap: int | None = None,
             batch: int | None = None, block: int = 2048, halo: int | None = None,
             near: float | None = None, border: Literal["keep", "drop"] = "keep",
             tissue: np.ndarray | None = None, embed: bool = False,
             **thresholds: float | None) -> Plan:
    """Decide what an image gets, see Plan; None: chosen here.

    diameter : px, of the cells in the image, which is scaled so that they have the size the network
        knows. None: as the network's size head sees them; without one the image is not scaled.
    zoom : px of the network for each px of the image, in place of a diameter.
    limits : None: percentiles of the whole image.
    tile : None: the size of the training crops, or somewhat more if that fits the image better.
    overlap, near : None: a cell's diameter, so that each lies whole in some tile.
    embed : always so where the network tells types.
    thresholds : peak, fill, depth, smooth, shape of watershed.Setting, and min_area in px of the
        image; None: those in the weights.
    """
    source = as_source(image)
    if limits is None:
        limits = images.percentiles(getattr(source, "pixels", source), net.settings.low,
                                    net.settings.high)
    if zoom is None:
        if diameter is None and net.size is not None and not images.is_flat(limits):
            diameter = seen_diameter(source, net, limits)
        zoom = 1.0 if diameter is None else zoom_for(diameter, net)
    else:
        diameter = None
    if (min_area := thresholds.get("min_area")) is not None:
        thresholds["min_area"] = min_area * zoom**2
    seen = diameter or (net.settings.diameter or UNKNOWN) / zoom
    near = seen if near is None else near
    side, shared = tile_side(net, tile, overlap, scaled_size(source.shape[1:], zoom))
    return Plan(net, net.settings.setting.changed(**thresholds), zoom, limits, seen, near, side,
                shared, batch or (32 if net.mean.device.type == "cuda" else 6),
                max(1, int(block / max(zoom, 1))),
                halo or max(HALO, math.ceil(4 * max(near, seen))), border, tissue,
                embed or net.types is not None)


def zoom_for(diameter: float, net: DINOCell) -> float:
    """Zoom at which cells of that diameter (px) look as large as in training."""
    typical = net.settings.diameter
    if typical is None:
        raise ValueError("diameter: these weights do not say how large their training cells were; "
                         "leave it out")
    if not diameter > 0:
        raise ValueError(f"diameter={diameter:g}: expected more than 0 px")
    zoom = typical / diameter
    if not 1 / 32 <= zoom <= 10:
        change = f"enlarged {zoom:.0f}" if zoom > 1 else f"reduced {1 / zoom:.0f}"
        raise ValueError(f"diameter={diameter:g}: the image would be {change} times, for these "
                         f"weights know cells of {typical:.3g} px; expected {typical / 10:.2g} to "
                         f"{32 * typical:.3g} px")
    return 1.0 if abs(math.log(zoom)) < 0.05 else zoom  # resampling would cost more than it brings


def seen_diameter(source, net: DINOCell, limits: np.ndarray) -> float:
    """Median diameter (px) of the cells of an image, as the size head sees it: from a quarter to
    four times what the network knows.

    Noise looks like small cells when it is enlarged: where no cell is clear in the image as it is,
    it is not enlarged.
    """
    assert net.settings.diameter is not None and net.size is not None
    seen = described_cells(source, net, limits, SIZE_ZOOMS)
    with torch.inference_mode():
        log = float(net.size(seen[None])[0])
    furthest = math.log(SIZE_ZOOMS[-1])
    least = -furthest if seen[SIZE_ZOOMS.index(1.0), 0] > 0 else 0.0
    return net.settings.diameter * math.exp(min(max(log, least), furthest))


@torch.inference_mode()
def described_cells(source, net: DINOCell, limits: np.ndarray, zooms: Sequence[float]) -> Tensor:
    """(zooms, 8) of the cells that the network finds in a few tiles of an image."""
    rows = []
    for zoom in zooms:
        size = scaled_size(source.shape[1:], zoom)
        tiles = sampled_tiles(source, limits, size, net.settings.tile)
        with net.autocast():
            rows.append(_described(net(tiles.to(net.mean.device))[:, 0], net))
    return torch.tensor(np.stack(rows), dtype=torch.float32)


def _described(maps: Tensor, net: DINOCell) -> np.ndarray:
    """How many cells are clear in maps (B, S, S), how many there are, how clear and how wide.

    Ground and hills are left in: at a wrong zoom the network is always unsure. Widths are those of
    cells that no edge cuts, or of all if there are only two of them.
    """
    area, highest, mean, whole = [], [], [], []
    rim = np.ones(maps.shape[1:], bool)
    rim[1:-1, 1:-1] = False
    for distance in maps:
        labels = flood(distance, net.settings.setting, ground=False).flatten().cpu().numpy()
        level, n = distance.float().flatten().cpu().numpy(), labels.max()
        area.append(np.bincount(labels, minlength=n + 1)[1:])
        mean.append(np.bincount(labels, level, minlength=n + 1)[1:] / area[-1])
        highest.append(np.zeros(n + 1))
        np.maximum.at(highest[-1], labels, level)
        highest[-1] = highest[-1][1:]
        whole.append(np.isin(np.arange(1, n + 1), labels[rim.flatten()], invert=True))
    areas, summits, levels, inner = map(np.concatenate, (area, highest, mean, whole))
    if not len(areas):
        return np.array([0, 0, 0, 0, math.log(net.settings.diameter or UNKNOWN), 0, 0, 0])
    used = areas[inner] if inner.sum() > 2 else areas
    wide = np.sort(np.log(1 + np.sqrt(4 / math.pi * used)))
    mass = np.cumsum(np.exp(2 * wide))
    low, middle, high = np.quantile(wide, (0.25, 0.5, 0.75))
    clear, found = (summits > CLEAR).sum() / len(maps), len(areas) / len(maps)
    return np.array([np.log1p(clear), np.log1p(found), summits.mean(), levels.mean(), middle,
                     high - low, wide.std(), wide[np.searchsorted(mass, mass[-1] / 2)]])


def scaled_size(size: tuple[int, int], zoom: float) -> tuple[int, int]:
    """(h, w) of an image of (H, W) as the network sees it."""
    H, W = size
    return max(1, round(H * zoom)), max(1, round(W * zoom))


def tile_side(net: DINOCell, tile: int | None, overlap: int | None,
              size: tuple[int, int]) -> tuple[int, int]:
    """Side of the tiles and what neighbours share, px.

    The side is `tile`, or, from the training crops' to GROWN times that, the one whose tiles cover
    the image with the fewest pixels. They share `overlap`, or a cell's diameter, from an eighth to
    half the side.
    """
    patch, least = net.backbone.patch, tile or net.settings.tile
    if least % patch:
        raise ValueError(f"tile={tile}: expected a multiple of the patch, {patch} px")
    shared = overlap
    if shared is None:
        shared = min(max(least // 8, round(net.settings.diameter or 0)), least // 2)
    if not 0 <= shared <= least // 2:
        raise ValueError(f"overlap={overlap}: expected 0 to half the tile, {least // 2} px")
    sides = [least] if tile else range(least, int(GROWN * least) + 1, patch)
    covered = {side: math.prod(len(tile_starts(length, side, shared)) * side for length in size)
               for side in sides}
    return min(covered, key=covered.__getitem__), shared


# --------------------------------------------------------------------------- labels, block by block

@dataclass(frozen=True)
class Block:
    """Part of the labels; cells that are new here lie whole in its view, if the halo fits them."""

    core: Region              # rows and columns of the image that this block answers for
    view: Region              # the same with the margin
    local: np.ndarray         # (view) int32: every cell in view, numbered 1..n here
    ids: np.ndarray           # (n + 1,) int32: local number -> id; 0: does not reach the core
    new: np.ndarray           # local numbers of the cells first met here
    labels: np.ndarray        # (core) int32, ids of the whole image
    seen: np.ndarray          # (view) float32, distances in [0, 1]
    vectors: np.ndarray | None = None  # (len(new), D) float32, where the plan asks for them

    @property
    def distance(self) -> np.ndarray:
        """(core) distances."""
        return self.seen[self.inner]

    @property
    def inner(self) -> Region:
        """The core within the view."""
        return _within(self.core, self.view)


def _within(part: Region, whole: Region) -> Region:
    """Where a part of the image lies in a larger one."""
    rows, columns = (slice(a.start - b.start, a.stop - b.start) for a, b in zip(part, whole))
    return rows, columns


def segment(image, net: DINOCell, **wanted) -> np.ndarray:
    """Cells of an image: (H, W) int32, 0 background, 1..n; `wanted` are keywords of plan_for()."""
    source = as_source(image)
    labels = np.zeros(source.shape[1:], np.int32)
    for block in blocks(source, plan_for(source, net, **wanted)._replace(embed=False)):
        if block.labels.shape == labels.shape:
            return block.labels
        labels[block.core] = block.labels
    return labels


def distances(image, net: DINOCell, **wanted) -> np.ndarray:
    """The network's answer, before the watershed: (H, W) float32 in [0, 1]."""
    source = as_source(image)
    plan = plan_for(source, net, **wanted)._replace(embed=False)
    rows, _ = network_map(source, plan)                                      # (h, w)
    return _enlarge_tile_map(rows, *_whole_regions(rows.shape, source.shape[1:])).cpu().numpy()


def blocks(source, plan: Plan, clock: Counter | None = None,
           progress: Callable[[float], None] | None = None) -> Iterator[Block]:
    """Segment an open image block by block, left to right and top to bottom.

    clock : seconds are added under read, network, watershed; progress : called with the share of
        the image done.
    """
    clock = Counter() if clock is None else clock
    _, H, W = source.shape
    h, w = scaled_size((H, W), plan.zoom)
    scales = h / H, w / W
    pool = _token_pool(plan)
    rows = _tile_distances(source, plan, clock, progress, pool)
    held: list[Tensor] = []  # rows of distances at hand
    first = 0  # number of the first
    known = np.zeros((0, W), np.int32)  # final labels of the last `halo` rows above
    count = 0
    for core, view in _block_regions(plan, H, W):
        inner = _within(core, view)
        if core[1].start == 0:  # the next rows
            net_y = _block_span(view[0], scales[0], h)
            while first + sum(map(len, held)) < net_y.stop:
                held.append(next(rows))
            held = [torch.cat(held)[net_y.start - first:]]
            first = net_y.start
            if pool:
                pool.forget(first)
            above, new_rows = inner[0].start, core[0].stop - core[0].start
            known = np.concatenate((known[len(known) - above:], np.zeros((new_rows, W), np.int32)))
        net_x = _block_span(view[1], scales[1], w)
        distance = held[0][:net_y.stop - first, net_x]
        with timed(clock, "watershed"):
            local, whole = _block_labels(distance, (net_y, net_x), view, scales, (H, W), plan)
            ids, new = _block_ids(local, inner, known[:, view[1]], count)
            count += len(new)
            # one block: its numbers are the ids
            labels = local if core == view else ids[local[inner]]
            known[inner[0], core[1]] = labels
            corner = view[0].start, view[1].start
            found = pool.of(local, new, corner, scales) if pool else None
        yield Block(core, view, local, ids, new, labels, whole, found)


def cell_vectors(image, labels: np.ndarray, net: DINOCell, outlines: bool = False, **wanted
                 ) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of given cells (H, W), see pooled_vectors() and plan_for()."""
    source = as_source(image)
    plan = plan_for(source, net, embed=True, **wanted)
    return pooled_vectors(network_map(source, plan)[1], labels, plan, outlines)


def pooled_vectors(pool: vectors.TokenPool | None, labels: np.ndarray, plan: Plan,
                   outlines: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Ids (n,), ascending, and vectors (n, D) of the cells of labels (H, W) from the tokens of
    their image; with outlines what types are told from, see vectors.type_rows()."""
    assert pool is not None                                        # plan.embed was set
    ids = np.unique(labels[labels > 0])
    *_, scales = _whole_regions(scaled_size(labels.shape, plan.zoom), labels.shape)
    rows = pool.of(labels, ids, (0, 0), scales)
    if outlines:
        rows = vectors.type_rows(rows, cells.cell_table(labels, near=0), plan.zoom)
    return ids, rows


def _block_regions(plan: Plan, H: int, W: int) -> Iterator[tuple[Region, Region]]:
    """Core and view of each block; an image that is not much larger than a block is one."""
    side = plan.block if max(H, W) > plan.block + 2 * plan.halo else max(H, W)
    for top in range(0, H, side):
        for left in range(0, W, side):
            core = slice(top, min(top + side, H)), slice(left, min(left + side, W))
            rows, columns = (slice(max(0, part.start - plan.halo), min(n, part.stop + plan.halo))
                             for part, n in zip(core, (H, W)))
            yield core, (rows, columns)


def _token_pool(plan: Plan) -> vectors.TokenPool | None:
    if not plan.embed:
        return None
    backbone = plan.net.backbone
    return vectors.TokenPool(backbone.patch, backbone.dim, _window(plan.tile, plan.overlap))


def blocks_of(labels: np.ndarray, source, plan: Plan) -> Iterator[Block]:
    """Blocks of labels (H, W) that are known, as blocks() gives them; their map is empty. The
    network runs only where the plan asks for vectors."""
    given = None
    if plan.border == "drop":
        edge = np.concatenate((labels[0], labels[-1], labels[:, 0], labels[:, -1]))
        labels = np.where(np.isin(labels, edge), 0, labels)
    if plan.embed:
        numbers, given = pooled_vectors(network_map(source, plan)[1], labels, plan)
    regions, known = [*_block_regions(plan, *labels.shape)], {0}   # known: met in a block before
    boxes = _label_boxes(labels, regions) if len(regions) > 1 else {}
    for core, view in regions:
        met = [number for number in np.unique(labels[core]).tolist() if number not in known]
        known.update(met)
        for number in met if boxes else ():    # large ones, and those in parts, are seen whole
            view = images.region_around((view, boxes[number]))
            if (side := max(part.stop - part.start for part in view)) > WIDEST * plan.block:
                raise ValueError(f"label {number} reaches over {side} px, expected cells of at "
                                 f"most {WIDEST * plan.block}; is its number used twice? Give "
                                 f"block={side} if it is one cell")
        ids, local = _dense_labels(labels[view])
        new = np.searchsorted(ids, met)
        yield Block(core, view, local.astype(np.int32), ids.astype(np.int32), new, labels[core],
                    np.zeros(local.shape, np.float32),
                    None if given is None else given[np.searchsorted(numbers, ids[new])])


def _dense_labels(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ids, ascending from 0, and the place of each pixel's id among them."""
    ids, local = np.unique(np.append(labels.ravel(), 0), return_inverse=True)
    return ids, local[:-1].reshape(labels.shape)


def _label_boxes(labels: np.ndarray, regions: Sequence[tuple[Region, Region]]
                 ) -> dict[int, Region]:
    """The box of each cell; found block by block, for numbers may be large."""
    boxes: dict[int, Region] = {}
    for (rows, columns), _ in regions:
        ids, local = _dense_labels(labels[rows, columns])
        for number, box in zip(ids[1:].tolist(), find_objects(local)):
            y, x = (slice(part.start + side.start, part.stop + side.start)
                    for part, side in zip(box, (rows, columns)))
            boxes[number] = images.region_around((boxes.get(number, (y, x)), (y, x)))
    return boxes


def network_map(image, plan: Plan, progress: Callable[[float], None] | None = None
                ) -> tuple[Tensor, vectors.TokenPool | None]:
    """The network's answer at its own scale: (h, w) distances, and tokens where plan.embed."""
    pool, source = _token_pool(plan), as_source(image)
    return torch.cat(list(_tile_distances(source, plan, Counter(), progress, pool))), pool


def cells_in_map(rows: Tensor, plan: Plan, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances (H, W) of a network_map(): blocks() of an image that is one block,
    without the network."""
    net, whole, scales = _whole_regions(rows.shape, size)
    return _block_labels(rows, net, whole, scales, size, plan)


def _whole_regions(small: Sequence[int], size: Sequence[int]
                   ) -> tuple[Region, Region, tuple[float, float]]:
    """All of the map (h, w) and of the image (H, W), and px of the map for each px of the image."""
    return ((slice(0, small[0]), slice(0, small[1])), (slice(0, size[0]), slice(0, size[1])),
            (small[0] / size[0], small[1] / size[1]))


def _block_labels(distance: Tensor, net: Region, view: Region, scales: tuple[float, float],
                  size: tuple[int, int], plan: Plan) -> tuple[np.ndarray, np.ndarray]:
    """Labels and distances at the scale of the image (view) of a part of the map, at the finer of
    the two resolutions; size: (H, W) of the image."""
    whole = _enlarge_tile_map(distance, net, view, scales)
    if max(scales) <= 1:
        local = without_holes(flood(whole, plan.setting, plan.zoom))
    else:
        # small cells are dropped below, by their px of the image
        found = flood(distance, plan.setting._replace(min_area=0))
        local = _nearest(without_holes(found), net, view, scales)
        local = drop_small(local, max(1, round(plan.setting.min_area / plan.zoom**2)),
                           int(local.max()))
    labels = local.cpu().numpy()
    return (_drop_cut(labels, view, size) if plan.border == "drop" else labels,
            whole.cpu().numpy())


def _block_ids(local: np.ndarray, inner: Region, known: np.ndarray, count: int):
    """Ids for the cells of a view: what most of the cell has in blocks before, or a new one.

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
    # above the core, and left of it
    decided = (slice(0, rows.start), slice(None)), (rows, slice(0, columns.start))
    before, mine = (np.concatenate([labels[part].ravel() for part in decided])
                    for labels in (known, local))
    total = np.bincount(mine, minlength=n + 1)  # px of each cell that are decided
    both = (before > 0) & (mine > 0)
    if both.any():
        pairs, px = np.unique(mine[both].astype(np.int64) << 32 | before[both], return_counts=True)
        cell, old = pairs >> 32, (pairs & 0xFFFFFFFF).astype(np.int32)
        most = np.argsort(px, kind="stable")  # the largest overlap is written last
        most = most[2 * px[most] > total[cell[most]]]
        ids[cell[most]] = old[most]
    new = np.flatnonzero(reaching & (ids == 0))
    ids[new] = count + 1 + np.arange(len(new), dtype=np.int32)
    ids[~reaching] = 0
    return ids, new


def _drop_cut(local: np.ndarray, view: Region, size: tuple[int, int]) -> np.ndarray:
    """Drop cells that touch the edge of the image and number the others 1..n."""
    keep = np.ones(int(local.max(initial=0)) + 1, bool)
    for axis, (part, length) in enumerate(zip(view, size)):
        if part.start == 0:
            keep[local.take(0, axis)] = False
        if part.stop == length:
            keep[local.take(-1, axis)] = False
    keep[0] = False
    return (np.cumsum(keep) * keep).astype(np.int32)[local]


# -------------------------------------------------------------------------------- tiles and network

def _tile_distances(source, plan: Plan, clock: Counter, progress,
                    pool: vectors.TokenPool | None = None) -> Iterator[Tensor]:
    """Blended distances (rows, w), top to bottom, on the network's device; each row once. The pool
    takes the tokens of the tiles."""
    h, w = size = scaled_size(source.shape[1:], plan.zoom)
    device, tile, overlap = plan.net.mean.device, plan.tile, plan.overlap
    run = _Runner(plan.net, plan.batch, clock, pool is not None)
    ys, xs = tile_starts(h, tile, overlap), tile_starts(w, tile, overlap)
    window = _window(tile, overlap).to(device)  # (tile,)
    square = window[:, None] * window  # (tile, tile)
    full = max(w, tile)
    across = torch.zeros(full, device=device)  # sum of the windows over a column
    for x in xs:
        across[x:x + tile] += window
    sums, weights = torch.zeros(tile, full, device=device), torch.zeros(tile, device=device)
    for i, y in enumerate(ys):
        seen = [x for x in xs if _tile_has_tissue(plan.tissue, size, (y, x), tile)]
        tiles: list[Answer] = []
        if seen:
            with timed(clock, "read"):
                strip = scaled_rows(source, plan.limits, size, slice(y, min(y + tile, h)))
                strip = _reflected(strip, (tile, full)).to(device)
            tiles = run(strip, seen, tile)  # one (tile, tile) per x
        for x, (distance, tokens) in zip(seen, tiles):
            sums[:, x:x + tile].addcmul_(square, distance)
            if pool and tokens is not None:
                pool.add(y, x, tokens)
        weights += window
        done = (ys[i + 1] if i + 1 < len(ys) else h) - y
        if progress:
            progress((i + 1) / len(ys))
        yield (sums[:done] / (weights[:done, None] * across))[:, :w]
        sums = torch.cat((sums[done:], torch.zeros(done, full, device=device)))[:tile]
        weights = torch.cat((weights[done:], torch.zeros(done, device=device)))[:tile]


def tissue_map(pixels: np.ndarray) -> np.ndarray | None:
    """(H, W): where a small picture of a slide (3, H, W) uint8 in transmitted light shows more than
    glass, with a margin; None for other images."""
    if pixels.dtype != np.uint8 or len(pixels) != 3 or np.median(pixels) < 128:
        return None
    density = -np.log10((pixels.min(0).astype(np.float32) + 1) / 256)  # of the darkest channel
    density = gaussian_filter(density, 1.0)
    stained = density > max(GLASS, 0.5 * threshold_otsu(density))
    return binary_dilation(remove_small_objects(stained, max_size=4), disk(4))


def _tile_has_tissue(tissue: np.ndarray | None, size: tuple[int, int], corner: tuple[int, int],
                     tile: int) -> bool:
    """Whether a tile of an image scaled to `size` shows tissue."""
    if tissue is None:
        return True
    rows, columns = (slice(int(begin * n / length), math.ceil((begin + tile) * n / length))
                     for begin, n, length in zip(corner, tissue.shape, size))
    return bool(tissue[rows, columns].any())


Answer = tuple[Tensor, Tensor | None]    # distances (tile, tile), tokens (N, D)


class _Runner:
    """The network on the tiles of a strip, in batches that are halved when GPU memory is full."""

    def __init__(self, net: DINOCell, batch: int, clock: Counter, embed: bool):
        self.net, self.batch, self.clock, self.embed = net, batch, clock, embed

    def __call__(self, strip: Tensor, xs: list[int], tile: int) -> list[Answer]:
        """Distances (tile, tile) for each x, and tokens (N, D) where they are wanted."""
        tiles = [strip[:, :, x:x + tile] for x in xs]
        spread = torch.stack([t.amax() - t.amin() for t in tiles]).tolist()  # 0: nothing to see
        todo = [t for t, seen in zip(tiles, spread) if seen]
        with timed(self.clock, "network"):
            answers: list[Answer] = []
            while left := len(todo) - len(answers):
                even = math.ceil(left / math.ceil(left / self.batch))
                try:
                    answers += self._forward(torch.stack(todo[len(answers):][:even]))
                except torch.cuda.OutOfMemoryError:
                    if self.batch == 1:
                        raise ValueError(f"out of GPU memory with one tile of {tile} px; use "
                                         "device=cpu or a smaller tile=") from None
                    self.batch //= 2
                    torch.cuda.empty_cache()
        rest = iter(answers)
        return [next(rest) if seen else (torch.zeros(tile, tile, device=strip.device), None)
                for seen in spread]

    @torch.inference_mode()
    def _forward(self, x: Tensor) -> list[Answer]:
        with self.net.autocast():
            if self.embed:
                distance, tokens = self.net.with_tokens(x)
                return list(zip(distance[:, 0], tokens))
            return [(distance, None) for distance in self.net(x)[:, 0]]


def sampled_tiles(source, limits: np.ndarray, size: tuple[int, int], tile: int) -> Tensor:
    """Tiles (1 to 5, 3, tile, tile) from corners and middle of an image scaled to `size`."""
    (h, w), tiles = size, []
    bottom, right = max(0, h - tile), max(0, w - tile)
    places = sorted({(0, 0), (0, right), (bottom // 2, right // 2), (bottom, 0), (bottom, right)})
    for y, row in groupby(places, key=itemgetter(0)):
        strip = scaled_rows(source, limits, size, slice(y, min(y + tile, h)))
        tiles += [_reflected(strip[:, :, x:x + tile], (tile, tile)) for _, x in row]
    return torch.stack(tiles)


def tile_starts(length: int, tile: int, overlap: int) -> list[int]:
    """Begins of tiles along an axis, evenly spread, at least `overlap` px in common."""
    if length <= tile:
        return [0]
    n = math.ceil((length - overlap) / (tile - overlap))
    return [round(i * (length - tile) / (n - 1)) for i in range(n)]


def _window(tile: int, overlap: int) -> Tensor:
    """Weight of a tile's pixels along an axis: a smooth slope over the overlap, never 0."""
    edge = torch.arange(tile).minimum(torch.arange(tile).flip(0)) + 0.5
    return (0.5 - 0.5 * torch.cos(math.pi * (edge / max(overlap, 1)).clamp(max=1))).clamp(min=1e-4)


def _reflected(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size), continued by reflection."""
    for axis, wanted in enumerate(size, 1):
        if x.shape[axis] != wanted:
            more = (0, wanted - x.shape[axis])
            places = np.pad(np.arange(x.shape[axis]), more, mode="reflect")  # 0 1 2 1 0 1 ...
            x = x.index_select(axis, torch.from_numpy(places))
    return x


# ------------------------------------------------------------------------------------------ scaling

def scaled_rows(source, limits, size, rows: slice) -> Tensor:
    """Rows of the scaled image: (3, rows, w) in [0, 1]."""
    C, H, W = source.shape
    h, w = size
    if (h, w) == (H, W):
        pixels = images.normalise(source.region(rows.start, rows.stop, 0, W), limits)
        return torch.from_numpy(images.to_rgb(pixels))
    y, weight_y = _scale_taps(rows.start, rows.stop, h / H, H)
    x, weight_x = _scale_taps(0, w, w / W, W)
    top = int(y.min())
    pixels = torch.from_numpy(images.normalise(source.region(top, int(y.max()) + 1, 0, W), limits))
    pixels = _resample(_resample(pixels, 1, y - top, weight_y), 2, x, weight_x)
    return torch.from_numpy(images.to_rgb(pixels.numpy()))


def _scale_taps(start: int, stop: int, scale: float, length: int) -> tuple[Tensor, Tensor]:
    """Old pixels (n, K) that pixels start..stop of an axis scaled from `length` px are made of, and
    their weights.

    A triangle as broad as the coarser grid: bilinear when enlarging, an average when reducing.
    """
    radius = max(1.0, 1 / scale)
    centre = (torch.arange(start, stop, dtype=torch.float64) + 0.5) / scale - 0.5
    # (n, K)
    index = (centre - radius).floor().long()[:, None] + 1 + torch.arange(math.ceil(2 * radius))
    weight = (1 - (index - centre[:, None]).abs() / radius).clamp(min=0)
    return index.clamp(0, length - 1), (weight / weight.sum(1, keepdim=True)).float()


def _resample(x: Tensor, axis: int, index: Tensor, weight: Tensor) -> Tensor:
    shape = [1] * x.ndim
    shape[axis] = -1
    index, weight = index.to(x.device), weight.to(x.device)
    return sum((x.index_select(axis, index[:, k]) * weight[:, k].view(shape)
                for k in range(index.shape[1])), start=x.new_zeros(()))


def _block_span(part: slice, scale: float, length: int) -> slice:
    """Rows of the network's grid that a part of the image's grid needs."""
    if scale == 1:
        return part
    return slice(max(0, math.floor((part.start + 0.5) * scale - 0.5) - 1),
                 min(length, math.ceil((part.stop - 0.5) * scale - 0.5) + 2))


def _enlarge_tile_map(distance: Tensor, net, view, scales) -> Tensor:
    """Distances on the network's grid -> on the image's."""
    for axis in (0, 1):
        if scales[axis] != 1:
            part, scale = view[axis], 1 / scales[axis]
            index, weight = _scale_taps(part.start, part.stop, scale, 1 << 62)
            index = (index - net[axis].start).clamp(0, distance.shape[axis] - 1)
            distance = _resample(distance, axis, index, weight)
    return distance


def _nearest(labels: Tensor, net, view, scales) -> Tensor:
    for axis in (0, 1):
        centre = (torch.arange(view[axis].start, view[axis].stop, dtype=torch.float64)
                  + 0.5) * scales[axis]
        index = (centre.floor().long() - net[axis].start).clamp(0, labels.shape[axis] - 1)
        labels = labels.index_select(axis, index.to(labels.device))
    return labels


# -------------------------------------------------------------------------------------------- small

def as_source(image):
    """An open images.Source, or an array (H, W) or (C, H, W) that answers like one."""
    return image if hasattr(image, "region") else _Array(np.asarray(image))


class MeanOfChannels:
    """An open image (C, H, W) as one channel: the mean of its channels, each from 0 to 1 between
    its limits. In pretraining it is a view of the same cells as each channel alone."""

    def __init__(self, source, limits: np.ndarray):
        self.source, self.limits = source, limits
        self.path, self.shape = source.path, (1, *source.shape[1:])
        self.dtype, self.pixel_size = np.dtype(np.float32), source.pixel_size

    def region(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        pixels = images.normalise(self.source.region(y0, y1, x0, x1), self.limits)
        return pixels.mean(0, keepdims=True)


class _Array:
    """An array with the methods of images.Source that segment() asks for."""

    def __init__(self, pixels: np.ndarray):
        if pixels.ndim == 2:
            pixels = pixels[None]
        if pixels.ndim != 3 or 0 in pixels.shape or pixels.dtype.kind not in "buif":
            raise ValueError(f"image of shape {pixels.shape}, {pixels.dtype}: expected (H, W) or "
                             "(C, H, W) numbers")
        if pixels.dtype.kind == "f" and not images.is_measurable(pixels).all():
            raise ValueError("the image holds values that are NaN, infinite or beyond "
                             f"{images.HUGE:g}; replace them first")
        self.pixels, self.shape, self.dtype = pixels, pixels.shape, pixels.dtype

    def region(self, y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
        return self.pixels[:, y0:y1, x0:x1]


@contextmanager
def timed(clock: Counter, name: str) -> Iterator[None]:
    """Add the seconds of a with block to clock[name], the GPU's work included."""
    start = time.perf_counter()
    yield
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    clock[name] += time.perf_counter() - start  # type: ignore[assignment]  # any number will do
