"""Labels of single planes -> one number for each cell through the slices of a stack or the frames
of a movie.

    volume = stitch(planes)                       (Z, H, W): one number a cell
    movie, tracks = track(planes)                 (T, H, W): one number a track; a division ends the
                                                  mother's and begins two, whose parent it is

A stack larger than memory is linked in the memory of three planes and a table of its cells:

    seen = Seen(planes)                           (H, W) integers each, 0 is background
    linked = link_slices(seen)                    or link_frames(Seen(planes, skip=False))
    for i, labels in enumerate(planes): linked.renumber(i, labels)

*Slices*: the sections of a cell overlap. Pairs of sections in neighbouring slices are taken one to
one for the largest summed IoU, where they share SHARE of the smaller one. A slice without its
section is bridged if the cell is cut above and below. A chain with a waist is two cells, one on the
other. A section that comes out of a cell and goes back into it is a part of it.

*Frames*: two linear assignments, as Jaqaman et al. (Nature Methods 2008). First cells of
neighbouring frames, gaining by overlap, nearness and like areas; then the ends of these tracks with
the beginnings of others, over gaps or as divisions. How far a cell goes is taken from the movie.

Letters: n cells, P pairs, R runs, the stretches of one cell in one row of a plane.
"""
from __future__ import annotations

import csv
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple
from xml.sax.saxutils import quoteattr

import numpy as np
import tifffile
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import cKDTree

import cells
import metrics
import report
import runs
from images import check_label_image

SHARE = 0.7             # of the smaller section: two that share less are two cells
WHOLE = 0.5             # of a cell's median section: one so large is cut, not its cap
THIN = 0.4              # of the sections around it: one so thin is a waist on its own
WAIST = 0.65            # of a cell's largest section on either side: two cells
FAR = 4.0               # times the median displacement: further no cell goes
AGAIN = 2               # times that links are made anew, knowing where cells come from
LEAST = 0.1             # gain of a link: with less, one cell has left and one has come
SHRUNK = 0.9            # of its mother a daughter has at most
LIKELY = 0.25           # of 1: from here on a division
NEAREST = 6             # cells that a cell may become
GAP = 2                 # frames that a track may miss
MOST = 300              # tracks in a lineage picture
MARGIN = 4              # px between the planes of a strip


# ---------------------------------------------------------------------------------- what was seen

class Plane(NamedTuple):
    """The cells of a plane, and their runs in the order of the pixels."""
    ids: NDArray        # (n,) labels, ascending
    area: NDArray       # (n,) px
    centre: NDArray     # (n, 2) y, x in px
    edge: NDArray       # (n,) bool: touches the border of the plane
    cell: NDArray       # (R,) index into ids
    start: NDArray      # (R,) flat index of the first pixel
    end: NDArray        # (R,) one past the last


def linked_plane(labels: NDArray) -> Plane:
    """Measure the cells of a label image (H, W)."""
    H, W = labels.shape
    flat = labels.ravel()
    starts = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=starts[1:])
    starts[::W] = True
    start = np.flatnonzero(starts)
    value, length = flat[start], np.diff(start, append=flat.size)
    start, value, length = (part[value > 0] for part in (start, value, length))
    ids, cell = np.unique(value.astype(np.int64), return_inverse=True)
    y, x = np.divmod(start, W)
    area = np.bincount(cell, length, len(ids)).astype(np.int64)
    centre = np.stack([np.bincount(cell, length * y, len(ids)),
                       np.bincount(cell, length * (x + (length - 1) / 2), len(ids))], 1)
    edge = np.zeros(len(ids), bool)
    edge[cell[(y == 0) | (y == H - 1) | (x == 0) | (x + length == W)]] = True
    return Plane(ids, area, centre / np.maximum(area, 1)[:, None], edge, cell, start,
                 start + length)


def linked_overlaps(a: Plane, b: Plane) -> tuple[NDArray, NDArray, NDArray]:
    """Pairs of cells (P,) of two planes that overlap, and the pixels they share."""
    run, other = cells.cell_index_pairs(np.searchsorted(b.end, a.start, side="right"),
                                        np.searchsorted(b.start, a.end))
    px = np.minimum(a.end[run], b.end[other]) - np.maximum(a.start[run], b.start[other])
    width = max(len(b.ids), 1)
    pair, where = np.unique(a.cell[run] * width + b.cell[other], return_inverse=True)
    return pair // width, pair % width, np.bincount(where, px, len(pair)).astype(np.int64)


class Seen:
    """The cells of all planes, and which overlap in neighbouring planes and in the next but one."""

    def __init__(self, planes: Iterable[NDArray] = (), skip: bool = True):
        """skip: also look at the next plane but one, which slices need."""
        self.planes: list[Plane] = []  # runs only of the last two
        self.pairs: tuple[list, list] = ([], [])  # (first, second, px) one and two planes on
        self.begin = [0]  # number of each plane's first cell
        self.shape: tuple[int, ...] | None = None
        self.skip = skip
        for labels in planes:
            self.add(labels)

    def add(self, labels: NDArray) -> None:
        """Take the next plane."""
        labels, name = np.asarray(labels), f"plane {len(self.planes) + 1}"
        check_label_image(labels, name, np.iinfo(np.int64).max)
        if self.shape not in (None, labels.shape):
            raise ValueError(f"{name}: {labels.shape} px, those before have {self.shape}; expected "
                             "planes of one size")
        self.shape = labels.shape
        plane = linked_plane(labels)
        for step in range(1, min(1 + self.skip, len(self.planes)) + 1):
            first, second, px = linked_overlaps(self.planes[-step], plane)
            self.pairs[step - 1].append((first + self.begin[-1 - step], second + self.begin[-1],
                                         px))
        self.begin.append(self.begin[-1] + len(plane.ids))
        self.planes.append(plane)
        if len(self.planes) > 2:
            nothing = np.zeros(0, np.int64)
            self.planes[-3] = self.planes[-3]._replace(cell=nothing, start=nothing, end=nothing)

    def cells(self) -> Sections:
        """All cells of all planes as one table."""
        if not self.planes:
            raise ValueError("no planes to link; expected at least one")
        counts = np.diff(self.begin)
        return Sections(np.repeat(np.arange(len(counts)), counts),
                        *(np.concatenate([getattr(plane, name) for plane in self.planes])
                          for name in ("area", "centre", "edge")))

    def overlaps(self, step: int) -> tuple[NDArray, NDArray, NDArray]:
        """Pairs of cells (P,), `step` planes apart, and the pixels they share."""
        parts = self.pairs[step - 1] or [(np.zeros(0, np.int64),) * 3]
        first, second, px = (np.concatenate(column) for column in zip(*parts))
        return first, second, px


class Sections(NamedTuple):
    """Cells of all planes, in the order of the planes."""
    plane: NDArray      # (n,) from 0
    area: NDArray       # (n,) px
    centre: NDArray     # (n, 2) y, x in px
    edge: NDArray       # (n,) bool


class Linked(NamedTuple):
    """The number of each cell of each plane, and what is known of the numbers."""
    ids: list[NDArray]          # of each plane: its labels, ascending
    numbers: list[NDArray]      # of each plane: the numbers of these
    parent: NDArray             # (N + 1,) number of the mother; 0: none

    @property
    def track(self) -> NDArray:
        """(n,) the numbers of all planes, in the order of Sections."""
        return np.concatenate(self.numbers)

    def renumber(self, plane: int, labels: NDArray, out: NDArray | None = None) -> NDArray:
        """Labels (H, W) int32 of a plane with the numbers of the whole."""
        ids, numbers = self.ids[plane], self.numbers[plane]
        if not len(ids):
            return np.zeros(labels.shape, np.int32)
        if ids[-1] <= labels.size:  # a table of all labels fits
            table = np.zeros(int(ids[-1]) + 1, np.int32)
            table[ids] = numbers
            return table.take(labels, out=out, mode="clip")  # in range all; twice as fast
        return np.append(0, numbers)[np.searchsorted(np.append(0, ids), labels)].astype(np.int32)

    def volume(self, planes: list[NDArray]) -> NDArray:
        """All planes with the numbers of the whole: (Z or T, H, W) int32."""
        volume = np.empty((len(planes), *planes[0].shape), np.int32)
        for i, labels in enumerate(planes):
            volume[i] = self.renumber(i, labels, volume[i])
        return volume

    @property
    def tracks(self) -> NDArray:
        """(N, 4) number, first plane, last plane, parent, as res_track.txt has them."""
        N, planes = len(self.parent) - 1, len(self.numbers)
        first, last = np.full(N + 1, planes), np.full(N + 1, -1)
        for plane, numbers in enumerate(self.numbers):
            first[numbers] = np.minimum(first[numbers], plane)
            last[numbers] = plane
        return np.stack([np.arange(N + 1), first, last, self.parent], 1)[1:]


def numbered_tracks(seen: Seen, root: NDArray, parent_of: NDArray | None = None) -> Linked:
    """Numbers 1..N in the order of appearance for cells (n,) that share a root; parent_of (n,):
    the cell that the first cell of a track came from, or -1."""
    _, first, group = np.unique(root, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(1, len(first) + 1)
    number = rank[group]
    parent = np.zeros(len(first) + 1, np.int64)
    if parent_of is not None:
        born = np.flatnonzero(parent_of >= 0)
        parent[number[born]] = number[parent_of[born]]
    return Linked([plane.ids for plane in seen.planes], np.split(number, seen.begin[1:-1]), parent)


def slice_chains(n: int, links: NDArray) -> NDArray:
    """The number (n,) of the group that each of n cells belongs to, which links (2, P) join."""
    graph = coo_array((np.ones(links.shape[1], bool), tuple(links)), (n, n))
    return connected_components(graph, directed=False)[1]


def best_links(first: NDArray, second: NDArray, gain: NDArray, fits: NDArray) -> NDArray:
    """Links (2, P), one to one, of the largest summed gain among those that fit (bool)."""
    fits = np.flatnonzero(fits)
    kept = fits[metrics.match_one_to_one(first[fits], second[fits], gain[fits])]
    return np.stack([first[kept], second[kept]])


# ------------------------------------------------------------------------------------------- slices

def stitch(planes: Iterable[NDArray], spacing: float = 1.0) -> NDArray:
    """Link the labels of slices: (Z, H, W) int32; spacing: px from one slice to the next."""
    planes = list(planes)
    return link_slices(Seen(planes), spacing).volume(planes)


def link_slices(seen: Seen, spacing: float = 1.0) -> Linked:
    """One number for the sections of a cell.

    spacing : px from one slice to the next; cells thinner than two steps are not bridged.
    """
    table = seen.cells()
    n, area = len(table.area), table.area
    first, second, px = seen.overlaps(1)
    iou = px / (area[first] + area[second] - px)
    links = best_links(first, second, iou, px >= SHARE * np.minimum(area[first], area[second]))
    parts = rejoined_slices(seen, slice_chains(n, links))
    chain = slice_chains(n, np.hstack([links, parts]))
    _, index = np.unique(chain * len(seen.planes) + table.plane, return_inverse=True)
    size = np.bincount(index, area)[index]  # px of all sections of the cell in the slice
    links = links[:, ~slice_waists(size, links)]
    bridges = slice_bridges(seen, links, spacing)
    return numbered_tracks(seen, slice_chains(n, np.hstack([links, parts, bridges])))


def slice_bridges(seen: Seen, links: NDArray, spacing: float) -> NDArray:
    """Links (2, P) over a missing slice, in a cell that is cut there, not at its cap."""
    area = seen.cells().area
    a, b, px = seen.overlaps(2)
    chain, (first, second) = slice_chains(len(area), links), links
    whole = area >= WHOLE * linked_median(area, chain)[chain]
    thick = linked_diameters(area) >= 2 * spacing
    fits = ~np.isin(a, first) & ~np.isin(b, second) & (whole & thick)[a] & (whole & thick)[b]
    iou = px / (area[a] + area[b] - px)
    return best_links(a, b, iou, fits & (iou >= 0.5))


def slice_waists(area: NDArray, links: NDArray) -> NDArray:
    """(P,) bool: links (2, P) where one cell ends and the next begins, for the sections between are
    less than WAIST of the largest on either side."""
    first, second = links
    link_of = np.full(len(area), -1)
    link_of[first] = np.arange(len(first))
    cut = np.zeros(len(first), bool)
    for section in np.setdiff1d(first, second):  # the first of each chain
        chain, sections = [], [section]
        while (link := link_of[section]) >= 0:
            section = second[link]
            chain.append(link)
            sections.append(section)
        size = area[sections]
        smooth = size.copy()  # one odd section is no waist ...
        smooth[1:-1] = np.median([size[:-2], size[1:-1], size[2:]], axis=0)
        smooth = np.where(size < THIN * smooth, size, smooth)  # ... but a very thin one
        peak = low = smooth[0]
        since = 0
        for i, here in enumerate(smooth):
            if here <= low:
                low = here
            if here >= peak and low > WAIST * peak:
                peak = low = here
                since = i
            elif low <= WAIST * min(peak, here):
                sums = size[since:i] + size[since + 1:i + 1]  # of the two sides of a link
                cut[chain[since + int(np.argmin(sums))]] = True
                peak = low = here
                since = i
    return cut


def linked_median(values: NDArray, group: NDArray) -> NDArray:
    """Median of the values of each group."""
    order = np.lexsort((values, group))
    begin = np.searchsorted(group[order], np.arange(group.max(initial=-1) + 2))
    return values[order[(begin[:-1] + begin[1:] - 1) // 2]]


def rejoined_slices(seen: Seen, chain: NDArray) -> NDArray:
    """Links (2, P) of chains that come out of another and go back into it, with that one."""
    area = seen.cells().area
    first, second, px = seen.overlaps(1)
    count = int(chain.max(initial=-1)) + 1
    heads, tails = np.full((2, count), -1)
    heads[chain[::-1]] = np.arange(len(chain))[::-1]  # its first and its last section
    tails[chain] = np.arange(len(chain))
    other = chain[first] != chain[second]
    out = np.flatnonzero(other & (heads[chain[second]] == second) & (px >= SHARE * area[second]))
    into = np.flatnonzero(other & (tails[chain[first]] == first) & (px >= SHARE * area[first]))
    leaves = chain[second[out]] * count + chain[first[out]]  # (a part, the chain it was in)
    returns = chain[first[into]] * count + chain[second[into]]
    found = out[np.isin(leaves, returns)]
    return np.stack([first[found], second[found]])


# ------------------------------------------------------------------------------------------- frames

class Near(NamedTuple):
    """Pairs of cells (P,) in neighbouring frames, of which one may become the other."""
    first: NDArray
    second: NDArray
    shift: NDArray          # (P,) px between their centres
    iou: NDArray            # (P,)


def track(planes: Iterable[NDArray], max_distance: float | None = None, gap: int = GAP
          ) -> tuple[NDArray, NDArray]:
    """Link the labels of frames: (T, H, W) int32, and tracks (N, 4) as Linked.tracks has them."""
    planes = list(planes)
    linked = link_frames(Seen(planes, skip=False), max_distance, gap)
    return linked.volume(planes), linked.tracks


def link_frames(seen: Seen, max_distance: float | None = None, gap: int = GAP) -> Linked:
    """One number for the cells of a track.

    max_distance : px, a cell goes no further in a frame; None: from the median displacement.
    gap : frames that a track may miss.
    """
    table, near = seen.cells(), track_neighbours(seen)
    if max_distance is None:
        max_distance = usual_reach(table, near)
    else:
        near = Near(*(column[near.shift <= max_distance] for column in near))
    n = len(table.area)
    steps = likely_steps(table, near, max_distance)
    for _ in range(AGAIN):
        near = near._replace(shift=track_surprise(table, near, *steps))
        steps = likely_steps(table, near, max_distance)
    onward, back = np.full((2, n), -1)  # the next and the last cell
    onward[steps[0]], back[steps[1]] = steps[1], steps[0]

    mother, one, other, worth = track_divisions(table, onward, back)
    a, b, gain = track_gaps(table, onward, back, max_distance, gap)
    chosen = metrics.match_one_to_one(np.append(mother, a), np.append(other, b),
                                      np.append(worth, gain))
    born = chosen[chosen < len(mother)]
    closed = chosen[chosen >= len(mother)] - len(mother)
    steps = np.hstack([steps, [a[closed], b[closed]]])
    taken = np.isin(one[born], other[born]) | np.isin(one[born], b[closed])
    born = born[~taken]
    parent_of = np.full(n, -1)
    parent_of[one[born]] = parent_of[other[born]] = mother[born]
    steps = steps[:, parent_of[steps[1]] < 0]  # a daughter begins a track
    return numbered_tracks(seen, slice_chains(n, steps), parent_of)


def track_neighbours(seen: Seen) -> Near:
    """Cells that overlap, and for each the NEAREST in the frame after."""
    table = seen.cells()
    first, second, px = seen.overlaps(1)
    n = max(len(table.area), 1)
    over = first * n + second
    found = [over]
    for begin, middle, end in zip(seen.begin, seen.begin[1:], seen.begin[2:]):
        if begin < middle < end:
            tree, number = cKDTree(table.centre[middle:end]), np.arange(begin, middle)
            _, close = tree.query(table.centre[number], np.arange(1, min(NEAREST, tree.n) + 1))
            found.append((number[:, None] * n + middle + close).ravel())
    every = np.unique(np.concatenate(found))
    shared = np.zeros(len(every), np.int64)  # px
    shared[np.searchsorted(every, over)] = px
    first, second = np.divmod(every, n)
    return Near(first, second, np.hypot(*(table.centre[second] - table.centre[first]).T),
                shared / (table.area[first] + table.area[second] - shared))


def linked_diameters(area: NDArray) -> NDArray:
    """px, of discs."""
    return 2 * np.sqrt(area / math.pi)


def usual_reach(table: Sections, near: Near) -> float:
    """How far a cell goes in a frame, px: FAR times the median displacement of cells that are each
    other's nearest, and half a cell's diameter at least."""
    if not len(near.first):
        return 1.0
    n = len(table.area)
    ahead, behind = np.full((2, n), np.inf)
    np.minimum.at(ahead, near.first, near.shift)
    np.minimum.at(behind, near.second, near.shift)
    mutual = (near.shift == ahead[near.first]) & (near.shift == behind[near.second])
    return max(FAR * float(np.median(near.shift[mutual])),
               float(np.median(linked_diameters(table.area))) / 2)


def likely_steps(table: Sections, near: Near, max_distance: float) -> NDArray:
    """Links (2, P) to the next frame, one to one, by overlap, nearness and like areas."""
    gain = track_likeness(table, near.first, near.second, near.shift / max_distance) + near.iou / 2
    return best_links(near.first, near.second, gain, gain > LEAST)


def track_surprise(table: Sections, near: Near, first: NDArray, second: NDArray) -> NDArray:
    """(P,) px from where cells would be that go on as they came, as far as cells here do."""
    came = np.zeros_like(table.centre)  # (n, 2) of the step that led here
    came[second] = table.centre[second] - table.centre[first]
    before, after = came[first], came[second]
    moving = before.any(1)
    size = np.square(before[moving]).sum()
    keeps = np.clip((before[moving] * after[moving]).sum() / size, 0, 1) if size else 0.0
    way = table.centre[near.second] - table.centre[near.first] - keeps * came[near.first]
    return np.hypot(*way.T)


def track_likeness(table: Sections, first: NDArray, second: NDArray, far: NDArray) -> NDArray:
    """1 for cells of one area in one place, 0 where far, the way in units of the longest, is 1."""
    a, b = table.area[first], table.area[second]
    return np.maximum(1 - far ** 2, 0) * np.sqrt(np.minimum(a, b) / np.maximum(a, b))


def track_gaps(table: Sections, onward: NDArray, back: NDArray, max_distance: float, gap: int
               ) -> tuple[NDArray, NDArray, NDArray]:
    """Ends of tracks and beginnings after up to `gap` frames without, and what they gain."""
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0))]
    ends, starts = np.flatnonzero(onward < 0), np.flatnonzero(back < 0)
    for step in range(2, gap + 2) if len(ends) and len(starts) else ():
        reach = max_distance * math.sqrt(step)  # of a random walk
        place = [np.column_stack([table.centre[side], (table.plane[side] + shift) * 4 * reach])
                 for side, shift in ((ends, step), (starts, 0))]
        pairs = cKDTree(place[0]).sparse_distance_matrix(cKDTree(place[1]), reach,
                                                         output_type="ndarray")
        a, b = ends[pairs["i"]], starts[pairs["j"]]
        found.append((a, b, track_likeness(table, a, b, pairs["v"] / reach) / step))
    a, b, gain = (np.concatenate(column) for column in zip(*found))
    return a[gain > 0], b[gain > 0], gain[gain > 0]


def track_divisions(table: Sections, onward: NDArray, back: NDArray
                    ) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """Mothers, the daughters that continue them, the daughters that begin, and how likely this is.

    The daughters lie on either side of the mother, are alike, and together about as large as she
    was. What the border of the picture cuts need not be alike.
    """
    plane, area, centre = table.plane, table.area, table.centre
    starts = np.flatnonzero((back < 0) & (plane > 0))
    reach = linked_diameters(area)
    found = [np.zeros((0, 3), np.int64)]
    begin = np.searchsorted(plane, np.arange(plane.max(initial=0) + 2))
    for frame in np.unique(plane[starts]):
        born = starts[plane[starts] == frame]
        mothers = np.arange(begin[frame - 1], begin[frame])
        if not len(mothers):
            continue
        shift = np.hypot(*(centre[born][:, None] - centre[mothers]).transpose(2, 0, 1))
        i, j = np.nonzero(shift < reach[mothers])
        new, mother = born[i], mothers[j]
        goes_on = onward[mother] >= 0
        found.append(np.stack([mother, onward[mother], new], 1)[goes_on])
        for m in np.unique(mother[~goes_on]):  # both daughters are new
            beside = new[mother == m]
            found.append(np.array([(m, a, b) for a in beside for b in beside if a != b],
                                  np.int64).reshape(-1, 3))
    mother, one, other = np.concatenate(found).T
    smaller, larger = (f(area[one], area[other]) for f in (np.minimum, np.maximum))
    cut = table.edge[one] | table.edge[other]
    alike = np.where(cut, 1, smaller / larger)
    whole = (smaller + larger) / area[mother]
    whole = np.where(cut & (whole < 1), 1, np.minimum(whole, 1 / whole))
    middle = np.hypot(*((centre[one] + centre[other]) / 2 - centre[mother]).T)
    apart = np.hypot(*(centre[one] - centre[other]).T)
    between = np.clip(1 - middle / (reach[mother] / 2), 0, 1)
    worth = alike * whole * between * (apart > reach[mother] / 4)
    # a piece that is gone a frame later was torn from a cell by its segmentation
    lives = (onward >= 0) | ~np.isin(plane + 1, plane)      # or no cell at all is there
    kept = (worth > LIKELY) & lives[one] & lives[other] & (larger < SHRUNK * area[mother])
    return mother[kept], one[kept], other[kept], worth[kept]


# ------------------------------------------------------------------------------------------ results

SOLID = ("id", "z", "centroid_y_px", "centroid_x_px", "volume_px")         # first columns of tables
TRACK = ("track", "parent", "daughters", "first", "last", "frames")


def write_track_cells(path: Path, linked: Linked, tables: Iterable[list[dict]],
                      columns: Sequence[str]) -> None:
    """Write a row for each cell of each frame, from the tables of the frames, which have `columns`
    and whose `id` is the label there; t counts from 1, age from 0."""
    tracks, columns = linked.tracks, [name for name in columns if name != "id"]
    with runs.replacing(path) as temporary, open(temporary, "w", newline="",
                                                 encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["t", "track", "parent", "age", *columns])
        for t, rows in enumerate(numbered_rows(linked, tables)):
            for number, row in sorted(rows, key=itemgetter(0)):
                _, first, _, parent = tracks[number - 1].tolist()
                writer.writerow([t + 1, number, parent, t - first,
                                 *(row[name] for name in columns)])


def numbered_rows(linked: Linked, tables: Iterable[list[dict]]) -> Iterator[list[tuple[int, dict]]]:
    """The rows of each plane's table, whose `id` is the label there, with their numbers."""
    for ids, numbers, rows in zip(linked.ids, linked.numbers, tables, strict=True):
        number = dict(zip(ids.tolist(), numbers.tolist()))
        yield [(number[int(row["id"])], row) for row in rows]


def linked_solid_rows(linked: Linked, tables: Iterable[list[dict]], pixel_size: float | None,
                      step: float | None) -> list[dict]:
    """A row for each cell of a stack, from the table of each slice.

    Means are over voxels, and so is the probability of a type, that of most voxels. Volumes are in
    µm³ and z in µm where pixel_size and step (µm) are known.
    """
    solids: dict[int, dict[str, Any]] = {}
    for z, rows in enumerate(numbered_rows(linked, tables), 1):
        for number, row in rows:
            cell = solids.setdefault(number, {"areas": Counter(),
                                              "sums": Counter(), "low": {}, "high": {},
                                              "border": False, "types": Counter(),
                                              "sure": Counter()})
            area = float(row["area_px"])
            cell["areas"][z] += area
            cell["sums"]["z"] += area * z
            for name, text in row.items():
                if name.startswith(("intensity_mean_", "centroid_")):
                    cell["sums"][name] += area * float(text)
                elif name.startswith("intensity_min_"):
                    cell["low"][name] = min(cell["low"].get(name, math.inf), float(text))
                elif name.startswith("intensity_max_"):
                    cell["high"][name] = max(cell["high"].get(name, -math.inf), float(text))
            cell["border"] |= bool(int(row["touches_border"]))
            if "type" in row:
                cell["types"][row["type"]] += area
                cell["sure"][row["type"]] += area * float(row["type_probability"])
    return [_solid_row(number, cell, len(linked.ids), pixel_size, step)
            for number, cell in sorted(solids.items())]


def _solid_row(number: int, cell: dict[str, Any], planes: int, pixel_size: float | None,
               step: float | None) -> dict:
    areas = cell["areas"]                               # {plane: px of its sections there}
    volume, first, last = areas.total(), min(areas), max(areas)
    mean = {name: total / volume for name, total in cell["sums"].items()}
    row = {"id": number, "z": mean["z"], "centroid_y_px": mean["centroid_y_px"],
           "centroid_x_px": mean["centroid_x_px"], "first_z": first, "last_z": last,
           "planes": len(areas), "volume_px": int(volume),
           "largest_area_px": int(max(areas.values()))}
    if pixel_size:
        row |= {"centroid_y_um": row["centroid_y_px"] * pixel_size,
                "centroid_x_um": row["centroid_x_px"] * pixel_size}
    if pixel_size and step:
        cubic = volume * pixel_size ** 2 * step
        row |= {"z_um": (row["z"] - 1) * step, "volume_um3": cubic,
                "equivalent_diameter_um": (6 * cubic / math.pi) ** (1 / 3)}
    row |= {name: mean[name] for name in mean if name.startswith("intensity_")}
    row |= {**cell["low"], **cell["high"],
            "touches_border": int(cell["border"] or first == 1 or last == planes)}
    if cell["types"]:
        (kind, _), = cell["types"].most_common(1)
        row |= {"type": kind, "type_probability": cell["sure"][kind] / volume}
    return row


def track_rows(linked: Linked, table: Sections, pixel_size: float | None = None) -> list[dict]:
    """A row for each track: its family, its frames (counted from 1) and how far it went."""
    order = np.argsort(linked.track, kind="stable")
    parts = np.split(order, np.cumsum(np.bincount(linked.track, minlength=1)[1:])[:-1])
    daughters = np.bincount(linked.parent, minlength=len(linked.parent))
    rows = []
    for (k, first, last, parent), part in zip(linked.tracks.tolist(), parts):
        way = np.hypot(*np.diff(table.centre[part], axis=0).T)
        net = float(np.hypot(*(table.centre[part[-1]] - table.centre[part[0]])))
        row = {"track": k, "parent": parent, "daughters": int(daughters[k]), "first": first + 1,
               "last": last + 1, "frames": len(part), "missed": last - first + 1 - len(part),
               "mean_area_px": float(table.area[part].mean()), "path_px": float(way.sum()),
               "displacement_px": net, "straightness": net / way.sum() if way.sum() else None,
               "speed_px": float(way.sum()) / (last - first) if last > first else None}
        if pixel_size:
            row |= {f"{name}_um": row[f"{name}_px"] and row[f"{name}_px"] * pixel_size
                    for name in ("path", "displacement", "speed")}
        rows.append(row)
    return rows


def remove_challenge(folder: Path) -> None:
    """Remove what write_challenge() wrote."""
    for old in (*folder.glob("mask*.tif"), folder / "res_track.txt"):
        old.unlink(missing_ok=True)


def write_challenge(folder: Path, linked: Linked, planes: Iterable[NDArray]) -> None:
    """Write a folder as the Cell Tracking Challenge wants it: maskNNN.tif, then res_track.txt.

    There a track has no gap: what comes after one is a new track, the child of the one before.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_challenge(folder)                            # of a longer movie
    frames_of: dict[int, list[int]] = defaultdict(list)
    for t, numbers in enumerate(linked.numbers):
        for k in np.unique(numbers).tolist():
            frames_of[k].append(t)
    free, rows = len(linked.parent), []
    renamed: list[dict[int, int]] = [{} for _ in linked.numbers]
    last_name: dict[int, int] = {}  # of a track, for its daughters
    for k, at in sorted(frames_of.items()):
        stretches = np.split(at, np.flatnonzero(np.diff(at) > 1) + 1)
        name, parent = k, last_name.get(int(linked.parent[k]), 0)
        for i, stretch in enumerate(stretches):
            if i:  # after a gap
                parent, name, free = name, free, free + 1
            rows.append((name, int(stretch[0]), int(stretch[-1]), parent))
            for t in stretch.tolist():
                renamed[t][k] = name
        last_name[k] = name
    digits = max(3, len(str(len(renamed) - 1)))
    dtype = np.uint16 if free <= 1 << 16 else np.uint32
    for t, (labels, names) in enumerate(zip(planes, renamed, strict=True)):
        table = np.arange(free, dtype=dtype)
        table[list(names)] = list(names.values())
        with runs.replacing(folder / f"mask{t:0{digits}d}.tif") as temporary:
            tifffile.imwrite(temporary, table[labels], compression="zlib")
    text = "".join(f"{' '.join(map(str, row))}\n" for row in sorted(rows))
    runs.write_text(folder / "res_track.txt", text)


def family_links(linked: Linked) -> NDArray:
    """(2, L) cells, earlier and later: each to the next of its track, mothers to daughters."""
    order = np.argsort(linked.track, kind="stable")
    track = linked.track[order]
    first = order[np.flatnonzero(np.diff(track, prepend=-1))]  # of tracks 1..N
    last = order[np.flatnonzero(np.diff(track, append=-1))]
    onward = track[1:] == track[:-1]
    born = np.flatnonzero(linked.parent[1:])
    return np.hstack([[order[:-1][onward], order[1:][onward]],
                      [last[linked.parent[1:][born] - 1], first[born]]])


TRACKMATE = {"SpotFeatures": {"QUALITY": "QUALITY", "POSITION_X": "POSITION",
                              "POSITION_Y": "POSITION", "POSITION_Z": "POSITION",
                              "POSITION_T": "TIME", "FRAME": "NONE", "RADIUS": "LENGTH",
                              "VISIBILITY": "NONE"},
             "EdgeFeatures": {"SPOT_SOURCE_ID": "NONE", "SPOT_TARGET_ID": "NONE"},
             "TrackFeatures": {"TRACK_ID": "NONE", "NUMBER_SPOTS": "NONE"}}


def write_trackmate(path: Path, linked: Linked, table: Sections, image: Path,
                    size: tuple[int, int], pixel_size: float | None, interval: float | None
                    ) -> None:
    """Write cells and links as XML of TrackMate (Fiji: Plugins > Tracking > Load a TrackMate file).

    A track there is a whole family. Lengths are in µm and times in s where they are known.
    """
    links, track, frames = family_links(linked), linked.track, len(linked.numbers)
    family = slice_chains(len(track), links)
    unit, second = pixel_size or 1.0, interval or 1.0
    declared = "".join(f"<{kind}>" + "".join(
        f'<Feature feature="{name}" name="{name}" shortname="{name}" dimension="{dimension}" '
        f'isint="{str(dimension == "NONE").lower()}"/>' for name, dimension in names.items())
        + f"</{kind}>" for kind, names in TRACKMATE.items())
    radius = linked_diameters(table.area) / 2
    begin = np.searchsorted(table.plane, np.arange(frames + 1))
    by_family = np.argsort(family[links[0]], kind="stable")
    starts = np.flatnonzero(np.diff(family[links[0]][by_family], prepend=-1))
    whole = np.bincount(family)
    with runs.replacing(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(f'<?xml version="1.0" encoding="UTF-8"?>\n<TrackMate version="7.11.1">\n'
                   f'<Model spatialunits="{"micron" if pixel_size else "pixel"}" '
                   f'timeunits="{"sec" if interval else "frame"}">\n<FeatureDeclarations>{declared}'
                   f'</FeatureDeclarations>\n<AllSpots nspots="{len(family)}">\n')
        for t in range(frames):
            file.write(f'<SpotsInFrame frame="{t}">\n')
            for i in range(begin[t], begin[t + 1]):
                y, x = (table.centre[i] * unit).tolist()
                file.write(f'<Spot ID="{i}" name="{track[i]}" QUALITY="1.0" '
                           f'POSITION_X="{x:.7g}" POSITION_Y="{y:.7g}" POSITION_Z="0.0" '
                           f'POSITION_T="{t * second:.7g}" FRAME="{t}" '
                           f'RADIUS="{radius[i] * unit:.7g}" VISIBILITY="1"/>\n')
            file.write("</SpotsInFrame>\n")
        file.write("</AllSpots>\n<AllTracks>\n")
        for edges in np.split(by_family, starts[1:]) if len(starts) else ():
            k = family[links[0][edges[0]]]
            file.write(f'<Track name="Track_{k}" TRACK_ID="{k}" NUMBER_SPOTS="{whole[k]}">\n')
            file.writelines(f'<Edge SPOT_SOURCE_ID="{a}" SPOT_TARGET_ID="{b}"/>\n'
                            for a, b in links[:, edges].T.tolist())
            file.write("</Track>\n")
        shown = "".join(f'<TrackID TRACK_ID="{k}"/>' for k in np.unique(family[links[0]]))
        name, folder = (quoteattr(text) for text in (image.name, str(image.resolve().parent)))
        file.write(
            f'</AllTracks>\n<FilteredTracks>{shown}</FilteredTracks>\n</Model>\n<Settings>'
            f'<ImageData filename={name} folder={folder} width="{size[1]}" height="{size[0]}" '
            f'nslices="1" nframes="{frames}" pixelwidth="{unit:.7g}" pixelheight="{unit:.7g}" '
            f'voxeldepth="1.0" timeinterval="{second:.7g}"/>'
            f'<BasicSettings xstart="0" xend="{size[1] - 1}" ystart="0" yend="{size[0] - 1}" '
            f'zstart="0" zend="0" tstart="0" tend="{frames - 1}"/>'
            '<InitialSpotFilter feature="QUALITY" value="0.0" isabove="true"/>'
            '<SpotFilterCollection/><TrackFilterCollection/></Settings>\n</TrackMate>\n')


def write_lineage(path: Path, linked: Linked) -> None:
    """Write an SVG: a line for each track over the frames, mothers joined to their daughters.

    Families are sorted by their first frame and have a colour each; the longest lives come first
    where there are more than MOST tracks.
    """
    tracks = {k: (first, last, parent) for k, first, last, parent in linked.tracks.tolist()}
    daughters: dict[int, list[int]] = defaultdict(list)
    for k, (_, _, parent) in tracks.items():
        daughters[parent].append(k)

    def family(k: int) -> list[int]:
        """Daughters on either side of their mother, in the order of the lanes."""
        below = [family(daughter) for daughter in daughters.get(k, [])]
        half = len(below) // 2
        return sum([*below[:half], [k], *below[half:]], [])

    def span(members: list[int]) -> int:
        return max(tracks[k][1] for k in members) - min(tracks[k][0] for k in members)

    families = sorted((family(k) for k in daughters.get(0, [])), key=span, reverse=True)
    lanes = np.cumsum([len(members) for members in families])
    kept = families[:max(1, int(np.searchsorted(lanes, MOST, side="right")))]
    kept.sort(key=lambda members: (len(members) == 1, min(tracks[k][0] for k in members)))
    frames, shown = len(linked.numbers), sum(map(len, kept))
    more = "" if len(kept) == len(families) else f", the longest {shown} of {len(tracks)} tracks"
    lane = {k: i for i, k in enumerate(k for members in kept for k in members)}
    picture = report.Frame([1, max(frames, 2)], [], "frame" + more,
                           rows=[str(k) for k in lane] or ["no cell"], width=900,
                           height=70 + 14 * max(shown, 6))
    for number, members in enumerate(kept):
        colour = report.COLOURS[number % len(report.COLOURS)]
        look = f'fill="none" stroke="{colour}" stroke-linecap="round" stroke-width='
        for k in members:
            first, last, parent = tracks[k]
            if parent in lane:
                picture.line([(tracks[parent][1] + 1, lane[parent]), (first + 1, lane[k])],
                             look + '"1.5"')
            picture.line([(first + 1, lane[k]), (last + 1.01, lane[k])], look + '"4"')
    report.write_svg(path, picture.svg(), picture.width, picture.height)


def linked_strip(planes: Iterable[tuple[NDArray, NDArray]], count: int, size: tuple[int, int],
                 side: int) -> NDArray:
    """`count` planes (C, H, W) of a size (H, W) with their labels side by side, (h, w, 3) uint8, at
    most `side` px; a cell has one colour in all."""
    step = max(1, -(-max(size[0], count * (size[1] + MARGIN)) // side))
    small = [cells.reduced_overlay(image, labels, step) for image, labels in planes]
    C, h, _ = small[0][0].shape
    edge = np.zeros((C, h, MARGIN), small[0][0].dtype), np.zeros((h, MARGIN), small[0][1].dtype)
    parts = [part for plane in small for part in (plane, edge)][:-1]
    image, labels = (np.concatenate(side_by_side, -1) for side_by_side in zip(*parts))
    return cells.overlay(image, labels, side)
