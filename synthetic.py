"""Synthetic Cell Painting fields with labels: the same cells in 5 stains, 3 brightfield planes.

    drawn = synthetic.field(seed=0, size=512, cells=60)       # .pixels (8, H, W), .labels, .nuclei
    drawn = synthetic.movie(seed=0, frames=30, cells=60)      # nuclei that move, divide and leave
    python synthetic.py out=DIR [n=10] [size=512] [cells=60] [diameter=56] [seed=0] [frames=0]

The command writes the fields seed, seed + 1, ... as DIR/field_SEED.tif (ImageJ TIFF, CYX, channels
named), with labels in DIR/field_SEED_cells.tif; with frames=20 movies as DIR/movie_SEED.tif (TYX),
labels and DIR/movie_SEED_tracks.txt: label, first frame, last frame, parent, counted from 0.

A population of cells is drawn first: outline, nucleus, polarity, grain, uptake of each stain. Cells
are placed in clumps and grow until they touch; then every channel stains these *same* cells.
Texture, blur, light, gain, haze, debris and noise of each channel have a random stream of their
own: nothing but the cells ties channels together. The same arguments give the same field, in any
order of calls, up to the last digit of the platform's exp and cos.

Letters: n cells, M pixels inside cells, A directions. Lengths are in px.
"""
from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import tifffile
from numpy import ndarray as Array
from numpy.random import Generator
from scipy import fft, ndimage
from scipy.spatial import cKDTree
from skimage.measure import label
from skimage.segmentation import find_boundaries, watershed

import runs

CHANNELS = ("Mito", "AGP", "RNA", "ER", "DNA", "HighZBF", "LowZBF", "Brightfield")  # as in JUMP
FOCUS = (3.0, -3.0, 1.0)      # px off the cells, of the last three
PIXEL_SIZE = 0.598            # µm, as in JUMP
A = 360                       # directions of a tabulated outline
TAU = 2 * np.pi


class Field(NamedTuple):
    pixels: Array                 # (8, H, W) uint16
    labels: Array                 # (H, W) int32, whole cells: 0 background, 1..n
    nuclei: Array                 # (H, W) int32, with the ids of their cells
    channels: tuple[str, ...]
    pixel_size: float             # µm


def field(seed: int, size: int | tuple[int, int] = 512, cells: int = 60,
          diameter: float = 56) -> Field:
    """Draw one field.

    size : H = W or (H, W), at least 32 px.
    cells : at most so many; 0 draws background alone. Centres fall on the field and a margin of a
        quarter diameter: the edge cuts cells, some lose their nucleus. A cell without room, or
        with fewer than (diameter / 6)² px in the field, is left out.
    diameter : of a disc as large as the average cell that has room, 8 to 1000 px.
    """
    H, W = size if isinstance(size, (tuple, list)) else (size, size)
    check_synthetic(("size", min(H, W), 32, 10 ** 5), ("cells", cells, 0, 10 ** 6),
                    ("diameter", diameter, 8, 1000), ("seed", seed, 0, 2 ** 64))
    streams = np.random.SeedSequence(seed).spawn(1 + len(CHANNELS))
    born, *rngs = map(np.random.default_rng, streams)         # of the cells, of each channel
    population = populate_field(born, cells, diameter)
    centre = place_synthetic_cells(born, (H, W), population, margin=diameter / 4)
    labels, owner, edge = grow_synthetic_cells((H, W), population, centre, int(diameter / 2),
                                               (diameter / 6) ** 2)
    inside = synthetic_inside(born, population, centre, labels, owner, edge)
    nuclei = np.where(spread_out(inside.deep, inside, (H, W)) > 0, labels, 0)
    pixels = np.empty((len(CHANNELS), H, W), np.uint16)
    for k, rng in enumerate(rngs):
        pixels[k] = draw_fluorescence(rng, population, inside, (H, W), k) if k < len(STAINS) else \
            draw_brightfield(rng, population, inside, (H, W), FOCUS[k - len(STAINS)])
    return Field(pixels, labels, nuclei, CHANNELS, PIXEL_SIZE)


def check_synthetic(*bounds: tuple[str, float, float, float]) -> None:
    for name, value, least, most in bounds:
        if not least <= value <= most:
            raise ValueError(f"{name}={value}: expected {least} to {most}")


class Movie(NamedTuple):
    pixels: Array                 # (T, H, W) uint16
    labels: Array                 # (T, H, W) int32, the number of each cell's track
    tracks: Array                 # (N, 4) number, first frame, last frame, parent (0: none)


def movie(seed: int, frames: int = 30, size: int = 256, cells: int = 60, diameter: float = 20,
          speed: float = 0.15, cycle: float = 60) -> Movie:
    """Draw a movie of nuclei, as masks and as a camera sees them.

    cells : in the field and half of it around, at the beginning.
    speed : diameters that a cell wants to go in a frame; it goes on in about its direction, and
        neighbours push it away.
    cycle : frames from one division to the next, on average.
    A cell that has left does not come back.
    """
    check_synthetic(("frames", frames, 1, 10 ** 5), ("size", size, 32, 10 ** 5),
                    ("cells", cells, 0, 10 ** 5), ("diameter", diameter, 6, 1000),
                    ("speed", speed, 0, 10), ("cycle", cycle, 2, 10 ** 9))
    rng = np.random.default_rng(seed)
    low, high = -size / 4, 1.25 * size
    alive = Swarm(rng.uniform(low, high, (cells, 2)), rng.normal(0, 1, (cells, 2)),
                  rng.uniform(0, 1, cells), np.exp(rng.normal(0, 0.15, cells)) * cycle,
                  np.exp(rng.normal(0, 0.2, cells)), np.arange(1, cells + 1))
    for _ in range(30):                                                # make room
        alive = pushed_synthetic_cells(alive, diameter)
    pixels = np.empty((frames, size, size), np.uint16)
    labels = np.empty(pixels.shape, np.int32)
    parent: dict[int, int] = {}
    seen, count = np.zeros(1, np.int64), cells
    for t in range(frames):
        labels[t], image = synthetic_nuclei(alive, diameter, size)
        light = 1 + 0.1 * draw_uneven_light(rng, image.shape, 2)
        image = ndimage.gaussian_filter(image, 0.8) * light
        pixels[t] = draw_camera_noise(rng, 200 + 3000 * image, gain=1.0)
        seen = np.union1d(seen, labels[t])
        gone = np.setdiff1d(seen, labels[t])
        alive = alive.of(~np.isin(alive.number, gone))
        alive, born = moved_synthetic_cells(rng, alive, diameter, speed, cycle, count)
        alive = alive.of(np.all((alive.place > low) & (alive.place < high), axis=1))
        parent |= born
        count += len(born)
    rows = [(k, box[0].start, box[0].stop - 1, parent.get(k, 0))
            for k, box in enumerate(ndimage.find_objects(labels), 1) if box]
    ends = {k: last for k, _, last, _ in rows}                         # none behind the edge
    tracks = [(k, first, last, mother if ends.get(mother) == first - 1 else 0)
              for k, first, last, mother in rows]
    return Movie(pixels, labels, np.array(tracks, np.int64).reshape(-1, 4))


class Swarm(NamedTuple):
    """Cells of a movie that are alive."""
    place: Array                  # (n, 2) y, x
    heading: Array                # (n, 2) of variance 1
    age: Array                    # (n,) 0 after a division, 1 before the next
    cycle: Array                  # (n,) frames from one to the other
    load: Array                   # (n,) brightness
    number: Array                 # (n,) of the track

    def of(self, which: Array) -> Swarm:
        return Swarm(*(part[which] for part in self))

    def radius(self, diameter: float) -> Array:
        """(n,) half a diameter in the middle of the cycle; the area doubles from end to end."""
        return diameter / 2 * np.sqrt((1 + self.age) / 1.5)


def moved_synthetic_cells(rng: Generator, alive: Swarm, diameter: float, speed: float, cycle: float,
                          count: int) -> tuple[Swarm, dict[int, int]]:
    """The swarm a frame later, and the mother of each new number; numbers above count are free."""
    heading = 0.6 * alive.heading + 0.8 * rng.normal(0, 1, alive.heading.shape)
    place = alive.place + heading * (speed * diameter / np.sqrt(np.pi / 2))    # mean length: speed
    alive = alive._replace(place=place, heading=heading, age=alive.age + 1 / alive.cycle)
    old = alive.age >= 1
    mothers, others, n = alive.of(old), alive.of(~old), old.sum()
    angle = rng.uniform(0, TAU, n)
    apart = 0.3 * diameter * np.stack([np.sin(angle), np.cos(angle)], 1)
    daughters = [Swarm(mothers.place + side * apart, rng.normal(0, 1, (n, 2)), np.zeros(n),
                       cycle * np.exp(rng.normal(0, 0.15, n)), mothers.load,
                       count + 1 + np.arange(n) * 2 + k) for k, side in enumerate((-1, 1))]
    born = {int(number): int(mother) for side in daughters
            for number, mother in zip(side.number, mothers.number)}
    alive = Swarm(*(np.concatenate(parts) for parts in zip(others, *daughters)))
    return pushed_synthetic_cells(alive, diameter), born


def pushed_synthetic_cells(alive: Swarm, diameter: float) -> Swarm:
    """Move cells that overlap apart, half the overlap each."""
    place, radius = alive.place, alive.radius(diameter)
    if len(place) < 2:
        return alive
    shift = np.zeros_like(place)
    a, b = cKDTree(place).query_pairs(2 * radius.max(), output_type="ndarray").T
    line = place[a] - place[b]
    length = np.maximum(np.hypot(*line.T), 1e-6)
    push = np.maximum(radius[a] + radius[b] - length, 0)[:, None] / 2 * line / length[:, None]
    np.add.at(shift, a, push)
    np.add.at(shift, b, -push)
    return alive._replace(place=place + shift)


def synthetic_nuclei(alive: Swarm, diameter: float, size: int) -> tuple[Array, Array]:
    """Labels (H, W) and light (H, W) of round nuclei; where two overlap, a pixel goes to the one
    whose centre is nearer in units of its radius."""
    level = np.ones((size, size))
    labels, image = np.zeros((size, size), np.int32), np.full((size, size), 0.05)
    for at, r, load, number in zip(alive.place, alive.radius(diameter), alive.load, alive.number):
        if not (-r < at).all() or not (at < size + r).all():
            continue
        window, y, x = synthetic_window(at, r + 1, level.shape)
        rho = np.hypot(y[:, None], x[None]) / r
        inside = rho < level[window]
        level[window][inside] = rho[inside]
        labels[window][inside] = number
        image[window][inside] = (load * (1 - 0.5 * rho ** 2))[inside]
    return labels, image


# ---------------------------------------------------------------------------------------- the cells

class Population(NamedTuple):
    """Properties that a cell has in every channel."""
    unit: float                   # diameter / 56: organelles scale with the cells
    radius: Array                 # (n,) of a disc of the cell's area, if it has room
    outline: Array                # (n, A) centre to edge, if it has room
    nucleus: Array                # (n, A) centre to nuclear envelope
    axis: Array                   # (n,) rad, direction of the long axis and of the fibres
    grain: Array                  # (n,) coarseness of all textures
    load: Array                   # (n,) brightness in every channel
    amount: Array                 # (n, 5) of each stain, times the load
    spread: Array                 # (n,) nuclear radii over which the cytoplasm thins out
    ramp: Array                   # (n,) px over which it rises at the edge
    mitotic: Array                # (n,) 1: round, chromosomes condensed, no envelope or nucleoli
    nucleoli: Array               # (n, 4, 3) y and x from the centre, radius; radius 0: none
    golgi: Array                  # (n, 9, 3) the same, stacks on one side of the nucleus


class Inside(NamedTuple):
    """Pixels inside cells, as vectors (M,)."""
    where: Array                  # flat index into the field
    cell: Array                   # row of the population
    y: Array                      # from the cell's centre
    x: Array
    edge: Array                   # px to the cell's edge
    deep: Array                   # px below the nuclear envelope, negative outside the nucleus
    nucleus: Array                # 1 inside, 0 outside, soft by a pixel; 0 in mitosis
    far: Array                    # nuclear radii away from the envelope, 0 inside
    thick: Array                  # height of the cell over the glass, 1 around the nucleus
    nucleoli: Array = np.zeros(0)     # 1 inside, 0 outside; these two are drawn from the rest
    vesicles: Array = np.zeros(0)     # droplets, 0 to 1: no stain enters them, light shows them


def populate_field(rng: Generator, n: int, diameter: float) -> Population:
    """Draw cells: most spread and cornered, a few rounded up in mitosis."""
    mitotic = (rng.random(n) < 0.05).astype(float)
    calm = 1 - 0.85 * mitotic[:, None]               # a mitotic cell is nearly round
    unit = diameter / 56
    radius = diameter / 2 * np.exp(rng.normal(-0.02, 0.28, n)) * (1 - 0.42 * mitotic)
    axis = rng.uniform(0, TAU, n)
    turn = np.arange(A) * (TAU / A) - axis[:, None]  # (n, A) rad from the long axis

    outline = synthetic_ellipse(turn, 1 + calm * rng.gamma(1.6, 0.38, (n, 1)))
    outline *= 1 + calm * rng.uniform(0, 0.3, (n, 1)) * np.cos(turn)       # nucleus off the middle
    for _ in range(5):                               # corners, blunt or drawn out to a tail
        height = calm * rng.uniform(0, 0.7, (n, 1)) * (rng.random((n, 1)) < 0.5)
        sharp = np.exp(rng.uniform(np.log(5), np.log(60), (n, 1)))
        outline *= 1 + height * np.exp(sharp * (np.cos(turn - rng.uniform(0, TAU, (n, 1))) - 1))
    outline *= np.exp(calm * 0.07 * wobble_outline(rng, turn, range(3, 16)))
    outline *= radius[:, None] / np.sqrt((outline ** 2).mean(1, keepdims=True))

    # Nuclei vary less than cells; the plate of a mitotic cell is a bar.
    size = 0.46 * diameter / 2 * (2 * radius / diameter) ** 0.45 * np.exp(rng.normal(0, 0.09, n))
    ratio = np.where(mitotic[:, None], 2.4, 1 + rng.gamma(2.5, 0.12, (n, 1)))
    nucleus = synthetic_ellipse(turn - rng.normal(0, 0.35, (n, 1)), ratio)
    nucleus *= np.exp(0.05 * wobble_outline(rng, turn, range(2, 6))) * size[:, None]

    size = size[:, None]
    shown = (np.arange(4) < rng.integers(1, 5, (n, 1))) & (mitotic[:, None] == 0)
    nucleoli = synthetic_spots(rng.uniform(0, TAU, (n, 4)), size * rng.uniform(0.1, 0.6, (n, 4)),
                               size * rng.uniform(0.13, 0.27, (n, 4)) * shown)
    pole = (axis + rng.normal(0, 0.8, n))[:, None]
    golgi = synthetic_spots(pole + rng.normal(0, 0.4, (n, 9)),
                            size * rng.uniform(1.05, 1.7, (n, 9)),
                            unit * rng.uniform(1, 3.2, (n, 9)))
    return Population(unit, radius, outline, nucleus, axis, nucleoli=nucleoli, golgi=golgi,
                      mitotic=mitotic, grain=np.exp(rng.normal(0, 0.22, n)),
                      load=np.exp(rng.normal(0, 0.3, n) + 0.55 * mitotic),
                      amount=np.exp(rng.normal(0, 0.22, (n, len(STAINS)))),
                      spread=rng.uniform(0.6, 1.5, n) + mitotic,
                      ramp=unit * rng.uniform(1.5, 5, n) * (1 + mitotic))


def synthetic_spots(angle: Array, distance: Array, radius: Array) -> Array:
    """(n, K, 3): y, x, radius."""
    return np.stack([distance * np.sin(angle), distance * np.cos(angle), radius], -1)


def synthetic_ellipse(turn: Array, ratio: Array) -> Array:
    """Radius of an ellipse of area pi, at the angle `turn` from its long axis."""
    return 1 / np.sqrt(np.cos(turn) ** 2 / ratio + np.sin(turn) ** 2 * ratio)


def wobble_outline(rng: Generator, turn: Array, waves: range) -> Array:
    """Random waves around the circle, the finer the smaller."""
    each = (len(waves), len(turn), 1)
    height, phase = rng.standard_normal(each), rng.uniform(0, TAU, each)
    return sum((waves[0] / k) ** 1.5 * h * np.cos(k * turn + at)
               for k, h, at in zip(waves, height, phase))


def place_synthetic_cells(rng: Generator, shape: tuple[int, int], cells: Population,
                          margin: float) -> Array:
    """Centres (n, 2), many beside an earlier cell; NaN without room."""
    centre = np.full((len(cells.radius), 2), np.nan)
    reach = cells.nucleus.max(1)
    clumped = rng.uniform(0.3, 0.9)
    low, high = -margin, np.add(shape, margin)
    for i, r in enumerate(cells.radius):
        room = np.maximum(reach[:i] + reach[i] + 2, 0.45 * (cells.radius[:i] + r))  # no overlap
        for _ in range(30):
            spot = rng.uniform(low, high)
            if i and rng.random() < clumped:
                j, angle = rng.integers(i), rng.uniform(0, TAU)
                apart = rng.uniform(0.6, 1.15) * (cells.radius[j] + r)
                spot = centre[j] + apart * np.array([np.sin(angle), np.cos(angle)])
            within = ((low <= spot) & (spot <= high)).all()      # false beside a NaN
            if within and not (np.hypot(*(centre[:i] - spot).T) < room).any():
                centre[i] = spot
                break
    return centre


def grow_synthetic_cells(shape: tuple[int, int], cells: Population, centre: Array, pad: int,
                         smallest: float) -> tuple[Array, Array, Array]:
    """Spread cells from their nuclei to their outlines or a neighbour, on a field padded by `pad`.

    Returns labels (H, W), the row of the population behind each label (the first is unused), px to
    the cell's edge (H, W).
    """
    level = np.ones([side + 2 * pad for side in shape], np.float32)    # 0 at nuclei, 1 at outlines
    seeds = np.zeros(level.shape, np.int32)
    for i in np.flatnonzero(~np.isnan(centre[:, 0])):
        window, y, x = synthetic_window(centre[i] + pad, cells.outline[i].max() + 1, level.shape)
        rho, angle = polar(y[:, None], x[None])
        np.minimum(level[window], rho / cells.outline[i][angle], out=level[window])
        seeds[window][rho < cells.nucleus[i][angle]] = i + 1
    level[seeds > 0] = 0
    grown = watershed(level, seeds, mask=level < 1)                    # 4-connected cells
    inner = (grown > 0) & ~find_boundaries(grown, connectivity=1)
    edge = ndimage.distance_transform_edt(inner) + 0.5
    crop = tuple(slice(pad, pad + side) for side in shape)
    labels, number = synthetic_largest_pieces(grown[crop], smallest)
    return labels, number - 1, edge[crop]


def synthetic_window(at: Array, reach: float,
                     shape: tuple[int, int]) -> tuple[tuple[slice, slice], Array, Array]:
    """Window of an image within reach of a point; y and x of its pixels from there."""
    first = [max(int(v - reach), 0) for v in at]
    last = [min(max(int(v + reach) + 2, 0), side) for v, side in zip(at, shape)]
    y, x = (np.arange(a, b) - v for a, b, v in zip(first, last, at))
    return np.s_[first[0]:last[0], first[1]:last[1]], y, x


def polar(y: Array, x: Array) -> tuple[Array, Array]:
    """Distance, and direction as an index into the A of an outline."""
    return np.hypot(y, x), (np.arctan2(y, x) * (A / TAU)).astype(np.int32) % A


def synthetic_largest_pieces(grown: Array, smallest: float) -> tuple[Array, Array]:
    """The largest piece of each cell that the edge cut up, as 1..n; and their old numbers."""
    piece = label(grown, connectivity=1)
    area = np.bincount(piece.ravel())
    old = np.zeros(len(area), np.int32)
    old[piece] = grown
    by_area = np.argsort(area, kind="stable").tolist()
    largest = dict(zip(old[by_area].tolist(), by_area))                # of each cell the last stays
    kept = sorted(k for cell, k in largest.items() if cell and area[k] >= smallest)
    new = np.zeros(len(area), np.int32)
    new[kept] = np.arange(1, len(kept) + 1)
    return new[piece], np.append(0, old[kept])


def synthetic_inside(rng: Generator, cells: Population, centre: Array, labels: Array, owner: Array,
                     edge: Array) -> Inside:
    """Position of every pixel in its cell, and the structures that all channels show there."""
    where = np.flatnonzero(labels)
    cell, edge = owner[labels.flat[where]], edge.flat[where].astype(np.float32)
    y, x = (np.unravel_index(where, labels.shape) - centre[cell].T).astype(np.float32)
    rho, angle = polar(y, x)
    deep = (cells.nucleus[cell, angle] - rho).astype(np.float32)
    far = np.maximum(-deep, 0) / cells.nucleus.mean(1)[cell]
    thick = 0.22 + 0.78 * np.exp(-(far / cells.spread[cell]) ** 1.4)
    thick *= 1 - np.exp(-edge / cells.ramp[cell])
    nucleus = np.clip(deep + 0.5, 0, 1) * (1 - cells.mitotic[cell])
    p = Inside(where, cell, y, x, edge, deep, nucleus, far, thick)
    crowd = rng.uniform(-2.7, -0.8, len(cells.radius))[cell] - 0.9 * far    # some cells are full
    droplets = np.clip((texture(rng, cells, p, 1.3) + crowd) * 2, 0, 1)
    return p._replace(nucleoli=synthetic_blobs(cells.nucleoli, p, 2),
                      vesicles=droplets * (1 - nucleus))


# ------------------------------------------------------------------------------ textures and stains

def texture(rng: Generator, cells: Population, p: Inside, size: float, stretch: float = 1) -> Array:
    """Smooth noise (M,) of mean 0 and variance 1 in each cell's frame.

    Its grain is `size` px times the cell's, and `stretch` times longer along the cell's axis. Cells
    take it from different places of a tile that wraps around.
    """
    side, sigma = 256, 4
    tile = rng.standard_normal((side, side), np.float32)
    tile = ndimage.gaussian_filter(tile, sigma, mode="wrap", truncate=3)
    tile /= tile.std()
    step = sigma / (size * cells.unit * cells.grain)                   # (n,) px of the tile per px
    start = rng.uniform(0, side, (2, len(step))) + 64 * side           # positive, for & to wrap it
    c, s, k = np.cos(cells.axis) * step, np.sin(cells.axis) * step, p.cell
    along = p.x * (c / stretch)[k] + p.y * (s / stretch)[k] + start[0][k]
    across = p.y * c[k] - p.x * s[k] + start[1][k]
    return tile[across.astype(np.int32) & side - 1, along.astype(np.int32) & side - 1]


def synthetic_threads(noise: Array, width: float) -> Array:
    """Winding lines, 0 to 1: where noise crosses zero."""
    return np.exp(-(noise / width) ** 2)


def synthetic_blobs(spots: Array, p: Inside, sharp: float) -> Array:
    """Round spots (n, K, 3) as pixels (M,), 0 to 1; sharp 1 is a Gaussian, more has a rim."""
    value = np.zeros(len(p.cell), np.float32)
    for y, x, r in spots.astype(np.float32).transpose(1, 2, 0):
        near = ((p.y - y[p.cell]) ** 2 + (p.x - x[p.cell]) ** 2) / np.maximum(r, 0.1)[p.cell] ** 2
        value = np.maximum(value, np.exp(-near ** sharp) * (r > 0)[p.cell])
    return value


def draw_mitochondria(rng: Generator, cells: Population, p: Inside) -> Array:
    """Worm-like threads in patches, dense by the nucleus, absent from it."""
    patches = np.clip(0.8 + 0.7 * texture(rng, cells, p, 3.5), 0, 2)
    worms = synthetic_threads(texture(rng, cells, p, 1.6, 1.7), 0.5) * patches
    reach = np.exp(-(p.far / (1.4 * cells.spread[p.cell])) ** 1.5)
    absent = (1 - 0.85 * p.nucleus) * (1 - p.vesicles)
    return p.thick * (0.05 + 0.2 * reach + worms * reach) * absent


def actin_golgi_membrane(rng: Generator, cells: Population, p: Inside) -> Array:
    """Stress fibres along the axis, a bright ruffled rim, specks, the Golgi beside the nucleus."""
    bundles = np.clip(0.4 + 0.6 * texture(rng, cells, p, 7), 0, 1.5)
    fibres = synthetic_threads(texture(rng, cells, p, 1.7, 9), 0.4) * bundles
    ruffles = np.clip(0.45 + 0.45 * texture(rng, cells, p, 5), 0.05, 2)
    rim = np.exp(-p.edge / (1.6 * cells.unit)) * ruffles
    specks = np.clip(texture(rng, cells, p, 1) - 1.6, 0, 2)
    golgi = synthetic_blobs(cells.golgi, p, 1)
    golgi = golgi * np.clip(0.8 + 0.6 * texture(rng, cells, p, 1.2), 0, 3)
    golgi *= (1 - 0.8 * p.nucleus) * (1 - cells.mitotic[p.cell])
    flat = 0.16 + 0.26 * p.thick + 0.12 * p.nucleus
    return (flat + 0.14 * fibres + 0.5 * rim + 0.25 * specks + 0.8 * golgi) * (1 - 0.4 * p.vesicles)


def draw_rna(rng: Generator, cells: Population, p: Inside) -> Array:
    """Bright nucleoli in a dimmer nucleus; a grainy cytoplasm, brightest around it."""
    cytoplasm = p.thick * (1 + 0.1 * texture(rng, cells, p, 2.5) + 0.08 * texture(rng, cells, p, 8))
    cytoplasm *= 1 - 0.45 * p.nucleus
    return cytoplasm * (1 - 0.6 * p.vesicles) + 0.75 * p.nucleoli * p.nucleus


def endoplasmic_reticulum(rng: Generator, cells: Population, p: Inside) -> Array:
    """A net that thins out from the nucleus to the edge, and the nuclear envelope."""
    net = synthetic_threads(texture(rng, cells, p, 2), 0.7) * (1 + 0.3 * texture(rng, cells, p, 6))
    reach = np.exp(-p.far / (1.5 * cells.spread[p.cell]))
    envelope = np.exp(-((p.deep + 0.5) / (1.2 * cells.unit)) ** 2) * (1 - cells.mitotic[p.cell])
    cytoplasm = p.thick * (0.12 + 0.55 * reach + 0.5 * net * reach)
    return cytoplasm * (1 - 0.7 * p.nucleus) * (1 - 0.7 * p.vesicles) + 0.12 * envelope


def draw_dna(rng: Generator, cells: Population, p: Inside) -> Array:
    """Chromatin with dark nucleoli, condensed in mitosis; a trace of the dye in the cytoplasm."""
    chromatin = 1 + 0.12 * texture(rng, cells, p, 2.6) + 0.1 * texture(rng, cells, p, 1.1)
    lens = 0.55 + 0.45 * np.clip(p.deep / (2.5 * cells.unit), 0, 1) ** 0.5     # thin at its rim
    chromatin *= lens * (1 + 0.9 * cells.mitotic[p.cell]) * (1 - 0.5 * p.nucleoli)
    return np.clip(p.deep + 0.5, 0, 1) * chromatin + 0.035 * p.thick


STAINS = (draw_mitochondria, actin_golgi_membrane, draw_rna, endoplasmic_reticulum, draw_dna)


# ---------------------------------------------------------------------------- microscope and camera

def draw_fluorescence(rng: Generator, cells: Population, p: Inside, shape: tuple[int, int],
                      stain: int) -> Array:
    """A stain through optics of its own: blur, haze, uneven light, gain and offset."""
    value = STAINS[stain](rng, cells, p) * cells.load[p.cell] * cells.amount[p.cell, stain]
    image = spread_out(value, p, shape) + 0.6 * draw_debris(rng, shape)
    image = ndimage.gaussian_filter(image, rng.uniform(0.6, 1.3))
    medium = rng.uniform(0.01, 0.06)                                   # dye in it
    image += medium * (1 + 0.5 * draw_uneven_light(rng, shape, 6))
    image *= 1 + rng.uniform(0.05, 0.3) * draw_uneven_light(rng, shape, 2)
    counts = rng.uniform(100, 400) + np.exp(rng.uniform(np.log(2000), np.log(6000))) * image
    return draw_camera_noise(rng, counts, gain=rng.uniform(0.3, 2))


def draw_brightfield(rng: Generator, cells: Population, p: Inside, shape: tuple[int, int],
                     focus: float) -> Array:
    """Light through the cells, `focus` px off their plane.

    Cells absorb a little, and bend light: off focus the intensity follows the curvature of the
    optical path (transport of intensity); halos flip with the sign of the focus.
    """
    load = np.sqrt(cells.load[p.cell])
    path = p.thick * (1 + 0.08 * texture(rng, cells, p, 1.8)) + 0.12 * np.clip(p.deep, 0, 3)
    path = load * (path + 0.25 * p.nucleoli + 0.5 * p.vesicles)
    focus += rng.uniform(-0.5, 0.5)
    blur = rng.uniform(0.7, 1) + 0.35 * abs(focus)
    dark = load * (0.2 + 0.8 * p.thick) + p.vesicles
    dark = ndimage.gaussian_filter(spread_out(dark, p, shape), blur)
    path = spread_out(path, p, shape) + 0.8 * draw_debris(rng, shape)
    bent = ndimage.gaussian_laplace(path, blur) * focus * blur
    image = np.clip(1 - rng.uniform(0.035, 0.065) * dark + rng.uniform(0.12, 0.2) * bent, 0.05, 3)
    image *= (1 + rng.uniform(0.01, 0.05) * draw_uneven_light(rng, shape, 2)
              + 0.006 * draw_uneven_light(rng, shape, 12))
    image += 0.001 * rng.standard_normal((1, shape[1]), np.float32)  # the sensor's columns differ
    counts = np.exp(rng.uniform(np.log(8000), np.log(20000))) * image
    return draw_camera_noise(rng, counts, gain=rng.uniform(0.05, 0.4))


def spread_out(values: Array, p: Inside, shape: tuple[int, int]) -> Array:
    """(M,) -> (H, W), 0 outside cells."""
    image = np.zeros(shape, np.float32)
    image.flat[p.where] = values
    return image


def draw_uneven_light(rng: Generator, shape: tuple[int, int], waves: int) -> Array:
    """Smooth surface (H, W) in -1..1: cosines of up to `waves` half periods, finer ones smaller."""
    order = np.add.outer(np.arange(waves + 1), np.arange(waves + 1)).astype(np.float32)
    height = rng.standard_normal(order.shape, np.float32) * (order > 0) / np.maximum(order, 1)
    surface = fft.idctn(height, s=shape)                               # zeros for the finer waves
    return surface / np.abs(surface).max()


def draw_debris(rng: Generator, shape: tuple[int, int]) -> Array:
    """Specks in a channel's light, some far out of focus, now and then a clump of grains."""
    image = np.zeros(shape, np.float32)
    grains = []                                                        # (y, x), radius, height
    for _ in range(rng.poisson(3e-5 * image.size)):
        r = rng.uniform(0.7, 2) if rng.random() < 0.7 else rng.uniform(3, 9)
        grains.append((rng.uniform(0, shape), r, rng.uniform(0.2, 1.2) / max(r - 1, 1)))
    for _ in range(rng.poisson(1.2e-6 * image.size)):
        at = rng.uniform(0, shape)
        for _ in range(rng.integers(5, 25)):
            at = at + rng.normal(0, 3, 2)
            grains.append((at, rng.uniform(1, 4), rng.uniform(0.1, 0.8)))
    for at, r, height in grains:
        window, y, x = synthetic_window(at, 3 * r, shape)
        image[window] += height * np.outer(np.exp(-(y / r) ** 2), np.exp(-(x / r) ** 2))
    return image


def draw_camera_noise(rng: Generator, counts: Array, gain: float) -> Array:
    """Counts as uint16 with noise and hot pixels; gain in counts per electron.

    Shot noise is Gaussian: close to Poisson at these counts, and faster.
    """
    spread = np.sqrt(gain * np.maximum(counts, 0) + rng.uniform(3, 15) ** 2)
    counts = counts + spread * rng.standard_normal(counts.shape, np.float32)
    hot = rng.integers(counts.size, size=rng.poisson(2e-5 * counts.size))
    counts.flat[hot] += rng.uniform(500, 15000, len(hot))
    return np.clip(np.rint(counts), 0, 65535).astype(np.uint16)


# -------------------------------------------------------------------------------------- the command

@dataclass(frozen=True)
class Config:
    out: str                                # folder for fields and labels
    n: runs.Count = 10                      # how many
    size: str = "512"                       # px, one number or HEIGHTxWIDTH
    cells: Annotated[int, runs.within(0, 65535)] = 60    # at most, in each field
    diameter: float = 56                    # px, of the average cell
    seed: runs.Whole = 0                    # of the first field; the next has the next number
    frames: runs.Whole = 0                  # of movies; 0: fields


def main(config: Config, files: list[str]) -> int:
    """Write fields and their labels, each file whole or not at all."""
    if files:
        raise ValueError(f"{files[0]}: synthetic.py takes key=value alone, such as out={files[0]}")
    sides = re.fullmatch(r"(\d+)(?:x(\d+))?", config.size)
    if not sides:
        raise ValueError(f"size={config.size}: expected whole numbers, size=512 or size=480x640")
    if config.frames and sides[2]:
        raise ValueError(f"size={config.size}: movies are square, expected one number")
    folder = Path(config.out)
    record = folder / "synthetic.txt"
    told = "".join(f"{key}={getattr(config, key)}\n" for key in ("size", "cells", "diameter",
                                                                 "frames"))
    if record.exists() and record.read_text(encoding="utf-8") != told:
        raise ValueError(f"{record}: these fields were drawn otherwise; choose another out=")
    folder.mkdir(parents=True, exist_ok=True)
    H, W = int(sides[1]), int(sides[2] or sides[1])
    kind = "movie" if config.frames else "field"
    for k in range(config.seed, config.seed + config.n):
        path = folder / f"{kind}_{k}.tif"
        if config.frames:
            drawn: Any = movie(k, config.frames, H, config.cells, config.diameter)
            about = named = {"axes": "TYX"}
            scale = None
            if (most := drawn.labels.max()) > 65535:
                raise ValueError(f"cells={config.cells}: {most} tracks, expected at most 65535, "
                                 "which the 16 bits of ImageJ number; give fewer cells or frames")
        else:
            drawn = field(k, (H, W), config.cells, config.diameter)
            about, scale = {"unit": "um"}, (1 / PIXEL_SIZE,) * 2
            named = about | {"axes": "CYX", "Labels": list(CHANNELS), "mode": "grayscale"}
        runs.write_text(record, told)                          # not before a field could be drawn
        if config.frames:
            runs.write_text(path.with_name(f"{path.stem}_tracks.txt"), "".join(
                f"{' '.join(map(str, row))}\n" for row in drawn.tracks.tolist()))
        labels = drawn.labels.astype(np.uint16)
        for file, image, metadata in ((path.with_stem(f"{path.stem}_cells"), labels, about),
                                      (path, drawn.pixels, named)):
            with runs.replacing(file) as temporary:
                tifffile.imwrite(temporary, image, photometric="minisblack", imagej=True,
                                 metadata=metadata, resolution=scale)
    print(f"{config.n} {kind}s -> {folder}")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
