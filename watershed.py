"""Labels -> distance map -> labels, and which thresholds serve best.

    target = distance_map(labels, cap=4)                          what the network learns
    labels = watershed(distance, peak=0.47, fill=0.09)            what becomes of its answer
    labels = flood(distance, setting, zoom)                       the same, of an image that the
                                                                  network saw reduced
    setting = tune(score)                                         the Setting with the highest score

The watershed works in whole-array passes, the same on NumPy, CPU and CUDA tensors.

What is flooded. Markers are the 4-connected components of distance > peak; from them labels flood
down the map inside distance > fill. Every region is 4-connected and holds exactly one marker; every
pixel above fill that is connected to a marker is labelled; and no pixel could be reached from
another marker over a higher lowest point than from its own. That is
skimage.segmentation.watershed(-distance, ndimage.label(distance > peak)[0], mask=distance > fill)
up to ties.

With a depth, a marker is a summit above peak that stands out: every path to a higher one goes down
by `depth` or more, so that the valley between touching nuclei parts them, however high it lies.
These are the h-maxima of the map inside distance > fill. Where the network is unsure, which the
ground between cells tells (outline_level), two things are left out before: that ground; and hills
below peak that stand out by a fifth of their height, with what drains to them. They are perhaps
cells, and no part of the cell beside them, while on flat ground they are its arms.

With a shape, a path through a neck goes down too. A capped map is flat inside cells, and where the
network saw no valley only the outline tells: each pixel above peak gets more, the deeper it lies.

How, without a queue. Between fill and peak every pixel points to its highest neighbour if that is
higher (steepest ascent), on flat parts to the nearest pixel that does, and pointer doubling finds
where the climb ends: in a marker, nearly always. Climbs that end on a lower summit are basins
without a marker; these join the neighbour across their highest saddle, again and again, which is
Boruvka's maximum spanning forest with the markers as roots. Since a climb never goes down and the
forest takes the highest saddles, the highest lowest point is kept exactly. With a depth everything
above fill climbs, and the joining goes on until what is left stands out.

Flat index: pixels are numbered in a map padded by one column and two rows of background, so that
the neighbours of pixel p are p - S, p - 1, p + 1, p + S without a test for the border. L its
length, P pixels between fill and peak.
"""
from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

HILL = 0.2          # of its height: a hill that stands out less is always part of its neighbour
REACH = 16          # px, how deep inside `shape` looks in an image that is not scaled


# ------------------------------------------------------------------------------------- distance map

def distance_map(labels: np.ndarray, cap: float | None = None) -> np.ndarray:
    """Per cell min(d, cap) / min(max d, cap), 0 on background: (H, W) float32 in [0, 1]; cap in px.

    d is the distance from a pixel's centre to the nearest pixel centre outside its cell: 1 along a
    cell's edge, also where another cell touches. The border of the image is no edge, for what lies
    behind it is unknown: a crop keeps the target of the whole image but for cells that it cuts. A
    cell without any edge is 1.
    """
    if labels.ndim != 2 or labels.dtype.kind not in "iu" or labels.min(initial=0) < 0:
        raise ValueError(f"labels of shape {labels.shape}, {labels.dtype}: expected (H, W) "
                         f"integers, 0 or more")
    if cap is not None and not 0 < cap < math.inf:
        raise ValueError(f"cap={cap}, expected a distance in px above 0, or None")
    target = np.zeros(labels.shape, np.float32)
    ids, cells = np.unique(labels, return_inverse=True)            # 0..n without gaps
    cells = cells.reshape(labels.shape)
    for i, box in enumerate(ndimage.find_objects(cells + 1) if labels.size else ()):
        if ids[i] == 0:
            continue
        box = tuple(slice(max(side.start - 1, 0), side.stop + 1) for side in box)
        inside = cells[box] == i
        d = np.ones(inside.shape) if inside.all() else ndimage.distance_transform_edt(inside)
        d = np.minimum(d[inside], np.inf if cap is None else cap)
        target[box][inside] = d / d.max()
    return target


# ----------------------------------------------------------------------------------------- settings

class Setting(NamedTuple):
    """Thresholds of the watershed, in the order of its arguments; lengths in px of the network."""
    peak: float = 0.47                      # a cell's marker lies above this distance
    fill: float = 0.09                      # a cell reaches down to this distance
    min_area: float = 0                     # px, smaller cells are dropped
    depth: float = 0.0      # a valley so deep parts two summits; 0: one that goes down to peak
    smooth: float = 0.0                     # px, Gaussian over the map before the watershed
    shape: float = 0.0      # per px, what lying inside adds to the distance, so that necks part

    def changed(self, **given: float | None) -> Setting:
        """This setting with the values given; None keeps what is there."""
        new = self._replace(**{name: value for name, value in given.items() if value is not None})
        if not 0 <= new.fill <= new.peak < 1:
            raise ValueError(f"peak={new.peak:g}, fill={new.fill:g}: expected 0 <= fill <= peak "
                             f"< 1")
        return new


def flood(distance: Tensor | np.ndarray, setting: Setting, zoom: float = 1.0, ground: bool = True):
    """Cells of a map with 1 / zoom px for each px of the network, in which the setting's lengths
    are; `ground`: see watershed()."""
    return watershed(distance, setting.peak, setting.fill, round(setting.min_area / zoom**2),
                     setting.depth, setting.smooth / zoom, setting.shape * zoom,
                     max(1, round(REACH / zoom)), ground)


GRID = {"peak": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), "fill": (0.1, 0.15, 0.2, 0.25, 0.3, 0.4),
        "depth": (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4), "smooth": (0.0, 0.7, 1.0, 1.5, 2.5),
        "shape": (0.0, 0.05, 0.1), "min_area": (0, 10, 20, 40, 80, 160, 320)}


def tune(score: Callable[[Setting], float], **grid: Sequence[float]) -> Setting:
    """The setting with the highest score, by coordinate ascent over GRID or the values given; of
    equal ones the first.

    One threshold (or a pair that acts together) changes at a time, until no step improves, from the
    first values and from the middle ones, which may lead to different settings.
    """
    values = {**GRID, **grid}
    steps = [[dict(zip(names, chosen)) for chosen in product(*(values[name] for name in names))]
             for names in
             (["peak"], ["fill"], ["depth", "smooth"], ["depth", "shape"], ["min_area"])]
    score = functools.cache(score)

    def ascend(best: Setting) -> Setting:
        before = None
        while best != before:
            before = best
            for changes in steps:
                tried = [best, *(best._replace(**change) for change in changes)]
                best = max((some for some in tried if some.fill <= some.peak), key=score)
        return best

    if min(values["fill"]) > max(values["peak"]):
        raise ValueError(f"peak={list(values['peak'])}, fill={list(values['fill'])}: no pair with "
                         f"fill <= peak")
    begins = [Setting(**{name: some[0] for name, some in values.items()}),
              Setting(**{name: some[(len(some) - 1) // 2] for name, some in values.items()})]
    begins = [begin if begin.fill <= begin.peak
              else begin._replace(peak=max(values["peak"]), fill=min(values["fill"]))
              for begin in begins]
    return max(map(ascend, begins), key=score)


# ---------------------------------------------------------------------------------------- watershed

def watershed(distance: Tensor | np.ndarray, peak: float = 0.47, fill: float = 0.09,
              min_area: int = 0, depth: float = 0.0, smooth: float = 0.0, shape: float = 0.0,
              reach: int = REACH, ground: bool = True):
    """Cells of a distance map.

    distance : (H, W) floats; array or tensor. Compared in float32.
    peak, fill, min_area, depth, smooth, shape : see Setting, with lengths in px of the map;
        0 <= fill <= peak. shape needs a depth, and looks up to `reach` px deep.
    ground : leave out ground and hills where the network is unsure; with a depth alone.
    Where a pixel is itself the pass between two cells (all its higher neighbours lie in different
    ones), or on flat ground, scikit-image's queue may give it to the other cell.
    Returns labels (H, W) int32 of the same kind and on the same device; 1..n in raster order of the
    markers.
    """
    rest = peak, fill, min_area, depth, smooth, shape, reach, ground
    if isinstance(distance, np.ndarray):
        plain = np.array(distance, distance.dtype.newbyteorder("="), order="C")  # torch reads these
        return watershed(torch.from_numpy(plain), *rest).numpy()
    if distance.device.type == "mps":                # lacks the scatters below for 64 bit
        return watershed(distance.cpu(), *rest).to("mps")
    if distance.ndim != 2 or not distance.is_floating_point():
        raise ValueError(f"distance map of shape {tuple(distance.shape)}, {distance.dtype}: "
                         "expected (H, W) floats")
    if not 0 <= fill <= peak:
        raise ValueError(f"fill={fill}, peak={peak}: expected 0 <= fill <= peak")
    if not (depth >= 0 and smooth >= 0 and shape >= 0):
        raise ValueError(f"depth={depth}, smooth={smooth}, shape={shape}: expected 0 or more")
    if reach < 1:
        raise ValueError(f"reach={reach}: expected 1 px or more")
    distance = distance.float()
    if smooth and distance.numel():
        distance = gaussian_map(distance, smooth)
    if depth and distance.numel():
        level = torch.full_like(distance, fill)
        if ground:
            level = outline_level(distance, peak, fill, reach)
            distance = distance.masked_fill(distance <= level, 0)
        unsure = F.pad(level > fill, (0, 1, 1, 1)).view(-1)                  # (L,)
        if shape:
            distance = distance + shape * push_inwards(distance > peak, reach)
    H, W = distance.shape
    S = W + 1
    d = distance.new_full((H + 2, S), -1.0)
    d[1:-1, :W] = distance
    d = d.view(-1)                                                           # (L,)
    if torch.isnan(d.sum()) and torch.isnan(d).any():
        raise ValueError("the distance map holds NaN; the network or its input is broken")

    high = d > peak
    node = torch.zeros_like(d, dtype=torch.int32)    # (L,) 0: background; 1..markers; see climb
    if depth and high.any():
        slope = (d > fill).nonzero().squeeze(1)
        markers = merge_basins(d, node, climb_to_summits(d, node, 0, slope, S), slope, peak, depth,
                               unsure, S)
    else:
        marker, label, markers = basin_components(high, S)
        if not markers:
            return node.view(H + 2, S)[1:-1, :W].contiguous()
        node.scatter_(0, marker, label)
        slope = ((d > fill) ^ high).nonzero().squeeze(1)                     # (P,)
        regions = climb_to_summits(d, node, markers, slope, S)
        if regions > markers:
            join_basins(d, node, markers, regions, slope, S)
    label = node.view(H + 2, S)[1:-1, :W]
    return drop_small(label, min_area, markers) if min_area > 1 else label.contiguous()


def gaussian_map(distance: Tensor, sigma: float) -> Tensor:
    """(H, W) filtered by a Gaussian cut off at 3 sigma; the border goes on outside."""
    reach = max(1, math.ceil(3 * sigma))
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / sigma) ** 2)
    x = F.pad(distance[None, None], (reach,) * 4, mode="replicate")[0, 0]
    for axis in (0, 1):  # on a CPU 5 to 19 times as fast as conv2d
        total = torch.zeros_like(x.narrow(axis, 0, x.shape[axis] - 2 * reach))
        for k, weight in enumerate((weights / weights.sum()).tolist()):
            total.add_(x.narrow(axis, k, total.shape[axis]), alpha=weight)
        x = total
    return x


def outline_level(distance: Tensor, peak: float, fill: float, reach: int) -> Tensor:
    """(H, W) height of the map at which cells end: `fill`, and more where the ground between cells
    rises, for there the network is unsure. The ground is the mean of the pixels up to `reach` px
    away that are far from all that rises above twice `fill`.
    """
    apart = (window_sum((distance > 2 * fill).float(), max(1, reach // 4)) == 0).float()
    ground = window_sum(distance * apart, reach) / window_sum(apart, reach).clamp(min=1)
    return (fill + (ground - fill / 2).clamp(min=0)).clamp(max=peak)


def window_sum(x: Tensor, reach: int) -> Tensor:
    """(H, W) sum over the window of 2 reach + 1 px around each pixel, with 0 beyond the border;
    always in the same order, so that a part of an image gives what the whole one does."""
    width = 2 * reach + 1
    for axis in (0, 1):
        length, begin, total = x.shape[axis], 0, torch.zeros_like(x)
        part = F.pad(x, (0, 0, reach, reach) if axis == 0 else (reach, reach))
        for size in (1 << k for k in range(width.bit_length())):     # px that `part` has summed
            if size > 1:
                rest = part.shape[axis] - size // 2
                part = part.narrow(axis, 0, rest) + part.narrow(axis, size // 2, rest)
            if width & size:
                total = total + part.narrow(axis, begin, length)
                begin += size
        x = total
    return x


def push_inwards(high: Tensor, reach: int) -> Tensor:
    """(H, W) bool -> px to the nearest pixel in the image that is not set, `reach` at most."""
    x = torch.arange(high.shape[1], dtype=torch.float32, device=high.device)
    before = torch.where(high, -reach, x).cummax(1).values
    after = torch.where(high, len(x) + reach, x).flip(1).cummin(1).values.flip(1)
    across = torch.minimum(x - before, after - x).clamp(max=reach).square()  # along the row
    rows = F.pad(across, (0, 0, reach, reach), value=reach**2)
    for k in range(1, reach):  # from k rows above and below
        beside = torch.minimum(*(rows.narrow(0, reach + step, len(across)) for step in (-k, k)))
        across = torch.minimum(across, beside.add_(k * k))
    return across.sqrt()


def climb_to_summits(d: Tensor, node: Tensor, markers: int, slope: Tensor, S: int) -> int:
    """Write into node where every slope pixel climbs to, and return the highest number: a marker,
    or a summit without one, numbered above markers.

    On the way node k is marker k, slope pixel i is node markers + 1 + i, and the summits without
    marker come after these.
    """
    here = slope.int()  # index_select in int32 is the fastest gather
    height = d.index_select(0, here)
    best, parent = height, here
    for step in (-S, -1, 1, S):
        beside = here + step
        value = d.index_select(0, beside)
        parent = torch.where(value > best, beside, parent)
        best = torch.maximum(best, value)

    first, last = markers + 1, markers + 1 + len(slope)
    node.scatter_(0, slope, torch.arange(first, last, dtype=torch.int32, device=d.device))
    flat = slope[best == height]  # (F,) nothing higher beside them
    basins = 0
    if len(flat):
        summit, basin, basins = basin_components(drain_basins(d, parent, node, first, flat, S), S)
        node[summit] = basin + (last - 1)
    # markers and summits point to themselves
    up = torch.arange(last + basins, dtype=torch.int32, device=d.device)
    up[first:last] = node.index_select(0, parent)
    end = basin_roots(up)[first:last]
    node.scatter_(0, slope, torch.where(end < first, end, end - len(slope)))
    return markers + basins


def drain_basins(d: Tensor, parent: Tensor, node: Tensor, first: int, flat: Tensor,
                 S: int) -> Tensor:
    """On flat parts, point to the nearest pixel of the same height that climbs, ring by ring;
    changes parent. Returns (L,) bool: the flat summits, from which nothing climbs.
    """
    closed = torch.zeros_like(d, dtype=torch.bool)
    closed[flat] = True
    ring = flat
    exits = torch.zeros_like(ring)
    for step in (-S, -1, 1, S):                      # first ring: pixels beside an exit
        beside = ring + step
        exits = torch.where((d[beside] == d[ring]) & ~closed[beside], beside, exits)
    found = exits > 0
    ring, exits = ring[found], exits[found]
    parent[node[ring].long() - first] = exits.int()
    closed[ring] = False
    while len(ring):  # then every ring takes the next one
        outer = []
        for step in (-S, -1, 1, S):
            beside = ring + step
            free = closed[beside] & (d[beside] == d[ring])
            beside = beside[free]
            parent[node[beside].long() - first] = ring[free].int()
            closed[beside] = False
            outer.append(beside)
        ring = torch.cat(outer)
    return closed


def basin_borders(d: Tensor, label: Tensor, pixels: Tensor, markers: int,
                  S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of neighbours in two regions, each once; one at least is in `pixels`, whose regions are
    above markers.

    Returns regions a, b (E,) and a total order (E,) of the saddles between them, so that there are
    no cycles of equals: the bits of the lower height, which sort as positive floats do, above the
    bits of E - number.
    """
    mine, edges = label.index_select(0, pixels), []
    for step in (-S, -1, 1, S):
        other = label.index_select(0, pixels + step)
        across = (other > 0) & (other != mine)
        across = (across if step > 0 else across & (other <= markers)).nonzero().squeeze(1)
        p, a, b = (x.index_select(0, across) for x in (pixels, mine, other))
        saddle = torch.minimum(d.index_select(0, p), d.index_select(0, p + step))
        edges.append(torch.stack((a, b, saddle.view(torch.int32))).long())
    a, b, saddle = torch.cat(edges, 1)
    return a, b, (saddle << 32) | (len(a) - torch.arange(len(a), device=d.device))


def join_basins(d: Tensor, label: Tensor, markers: int, regions: int, slope: Tensor,
                S: int) -> None:
    """Give regions above markers to the neighbour across their highest saddle; 0 without one."""
    bare = slope[label.index_select(0, slope) > markers].int()               # their pixels
    a, b, order = basin_borders(d, label, bare, markers, S)                        # (E,)
    root = torch.arange(regions + 1, device=d.device)
    first, second = a, b
    while True:
        live = ((first != second) & ((first > markers) | (second > markers))).nonzero().squeeze(1)
        if not len(live):
            break
        first, second, order = (x.index_select(0, live) for x in (first, second, order))
        best = highest_saddles(root, first, second, order)
        best[:markers + 1] = 0                           # markers are roots: they wait
        chooser = best.nonzero().squeeze(1)
        edge = len(a) - (best[chooser] & 0xFFFFFFFF)
        parent = torch.arange(regions + 1, device=d.device)
        parent[chooser] = root[a[edge]] + root[b[edge]] - chooser            # the other end
        pair = chooser[(parent[parent[chooser]] == chooser) & (chooser < parent[chooser])]
        parent[pair] = pair                              # two that chose each other: one stays
        root = basin_roots(parent)[root]
        first, second = root[first], root[second]
    root = torch.where(root <= markers, root, 0).int()
    label.scatter_(0, bare.long(), root[label.index_select(0, bare)])


def merge_basins(d: Tensor, label: Tensor, regions: int, slope: Tensor, peak: float, depth: float,
                 unsure: Tensor, S: int) -> int:
    """Join regions, one to each summit, until all stand out; number them in raster order of their
    summits; return how many.

    A region joins the higher one across its highest saddle if it is hardly above that: hills that
    are not above peak first, where the network is `unsure` (L,) by less than HILL of their height,
    elsewhere always; then the others, by less than depth. Hills that are left belong to nothing.
    """
    pixels = slope.int()
    mine = label.index_select(0, slope)
    a, b, order = basin_borders(d, label, pixels, 0, S)                            # (E,)
    alone = torch.arange(regions + 1, device=d.device)
    top = torch.zeros(regions + 1, device=d.device)
    top.scatter_reduce_(0, mine.long(), d.index_select(0, pixels), "amax")
    # of equal summits the first is higher
    rank = (top.view(torch.int32).long() << 32) | (regions - alone)
    least_hill = torch.full_like(top, math.inf)
    least_hill[mine[unsure.index_select(0, pixels)].long()] = HILL           # of its height
    root, first, second = alone, a, b
    for hills in (True, False):
        while True:
            live = first != second
            if not hills:                                # neither is one that was left
                live &= pass_height(torch.minimum(rank[first], rank[second])) > peak
            live = live.nonzero().squeeze(1)
            first, second, order = (x.index_select(0, live) for x in (first, second, order))
            best = highest_saddles(root, first, second, order)
            chooser = best.nonzero().squeeze(1)
            best, top = best[chooser], pass_height(rank[chooser])
            edge = len(a) - (best & 0xFFFFFFFF)
            other = root[a[edge]] + root[b[edge]] - chooser
            least = torch.where(top > peak, 0, least_hill[chooser] * top) if hills else depth
            joins = (top - pass_height(best) < least) & (rank[other] > rank[chooser])
            if not joins.any():
                break
            chooser, other = chooser[joins], other[joins]
            parent = alone.clone()
            parent[chooser] = other
            parent = basin_roots(parent)
            rank = torch.zeros_like(rank).scatter_reduce_(0, parent, rank, "amax")
            root, first, second = parent[root], parent[first], parent[second]
    cell = ((root == alone) & (pass_height(rank) > peak)).nonzero().squeeze(1)
    number = torch.zeros(regions + 1, dtype=torch.int32, device=d.device)
    number[cell[torch.argsort(rank[cell] & 0xFFFFFFFF, descending=True)]] = torch.arange(
        1, len(cell) + 1, dtype=torch.int32, device=d.device)
    label.scatter_(0, slope, number[root].index_select(0, mine))
    return len(cell)


def highest_saddles(root: Tensor, first: Tensor, second: Tensor, order: Tensor) -> Tensor:
    """The order of each region's highest saddle; 0 without any."""
    best = torch.zeros_like(root).scatter_reduce_(0, first, order, "amax")
    return best.scatter_reduce_(0, second, order, "amax")


def pass_height(order: Tensor) -> Tensor:
    """The float in the upper half of the order of basin_borders() and of merge_basins()'s rank."""
    return (order >> 32).int().view(torch.float32)


def basin_components(mask: Tensor, S: int) -> tuple[Tensor, Tensor, int]:
    """4-connected components of a flat (L,) mask: pixels (K,), labels (K,) int32, their number.

    Labels count from 1 in raster order of the components' first pixels. The nodes are the runs of
    set pixels in a row, a few dozen to a cell, so the union costs next to nothing.
    """
    pixels = mask.nonzero().squeeze(1)                                       # (K,)
    start = flood_edge(mask).nonzero().squeeze(1)                # (R,) first pixel of each run
    touch = flood_edge(mask[:-S] & mask[S:]).nonzero().squeeze(1)  # first pixel that two runs share
    above = torch.searchsorted(start, touch, right=True) - 1
    below = torch.searchsorted(start, touch + S, right=True) - 1
    themselves = root = torch.arange(len(start), device=mask.device)
    while len(above):  # hook the later root to the earlier
        a, b = root[above], root[below]
        root = basin_roots(root.scatter_reduce(0, torch.maximum(a, b), torch.minimum(a, b), "amin"))
        apart = root[above] != root[below]
        above, below = above[apart], below[apart]
    number = (root == themselves).cumsum(0)                                  # (R,) counts the roots
    place = torch.searchsorted(pixels, start)  # where each run begins among the pixels
    length = torch.diff(place, append=place.new_tensor([len(pixels)]))
    count = int(number[-1]) if len(number) else 0
    return pixels, number[root].int().repeat_interleave(length), count


def flood_edge(mask: Tensor) -> Tensor:
    """Set pixels whose predecessor is not set."""
    edge = mask.clone()
    edge[1:] &= ~mask[:-1]
    return edge


def basin_roots(parent: Tensor) -> Tensor:
    """Pointer doubling until every node points to its root."""
    while True:
        grand = parent.index_select(0, parent)
        if torch.equal(grand, parent):
            return parent
        parent = grand


def without_holes(label: Tensor) -> Tensor:
    """Labels (H, W) int32 with the background that one cell encloses given to it: cells have no
    holes. What two cells enclose, or a cell and the edge of the image, stays background.
    """
    if label.device.type == "mps":
        return without_holes(label.cpu()).to("mps")
    H, W = label.shape
    S = W + 1
    node = F.pad(label, (0, 1, 1, 1)).view(-1)  # (L,) all background that is outside hangs together
    pixels, part, parts = basin_components(node == 0,
                                           S)                           # outside is part 1
    inside = (part > 1).nonzero().squeeze(1)
    if not len(inside):
        return label
    pixels, part = pixels[inside], part[inside].long()
    beside = node[torch.stack([pixels + step for step in (-S, -1, 1, S)], 1)]            # (K, 4)
    highest = node.new_zeros(parts + 1).scatter_reduce_(0, part, beside.amax(1), "amax")
    lowest = node.new_full((parts + 1,), 2**31 - 1).scatter_reduce_(
        0, part, beside.masked_fill(beside == 0, 2**31 - 1).amin(1), "amin")
    node[pixels] = torch.where(lowest == highest, highest, 0)[part]
    return node.view(H + 2, S)[1:-1, :W].contiguous()


def drop_small(label: Tensor, min_area: int, count: int) -> Tensor:
    """Drop cells of fewer than min_area px and number the others 1..n."""
    keep = torch.bincount(label.flatten(), minlength=count + 1) >= min_area
    keep[0] = False
    return (keep.cumsum(0) * keep).int()[label]
