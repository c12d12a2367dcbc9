"""Views of fields, cut on the device from a resident pool: which channels, which crops, in what light.

    kinds = stains(pool.channels, ("HighZBF", "LowZBF", "Brightfield"))
    slots = pool.sample(B, step)                             fields of this step
    large, small = draw(pool, slots, numbers, step, seed, Views(), light(), kinds)    (2 B, 3, S, S), (L B, 3, s, s)

A network that is shown the same cells in two stains, and has to say the same of both, learns what cells are
rather than what a stain looks like. The crops of a field lie in one neighbourhood: two random 224 px windows
of a field of 1080 px mostly show different cells, and agreement on these would teach nothing. Views are
placed in a frame that is turned and mirrored as a whole, so that their overlap is known exactly; scale, turn
and mirror are one bilinear resampling of the raw 16-bit pixels, straight from the pool. Nothing is decoded or
resized per sample on the CPU.

Every random value is keyed by (seed, number of the sample), as in augment.py, whose light, optics and camera
follow.

Letters: N fields in the pool, C channels, B samples, V = 2 + L views of a sample, n crops, S s their sides in
px.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

import runs

if TYPE_CHECKING:                       # train_ssl.py --help must not wait for torch
    from torch import Tensor
    from augment import Augment
    from augment import Draws

Range = tuple[float, ...]               # low, high


@dataclass(frozen=True)
class Views:
    """Which channels and which part of a field the views of it show."""
    strategy: Literal["average", "single", "pairs", "average_single", "all"] = "average_single"   # of channels
    local_average: float = 0.3          # share of the local views that show the mean (average_single)
    size: int = 224                     # px, side of the two global views
    local_size: int = 96                # px, side of the local views
    locals: int = 8                     # local views of a field
    zoom: float = 1.0                   # px of the view per px of the field, nominal
    scale: Range = (0.7, 1.4)           # random factor on that, each view its own
    overlap: float = 0.5                # of the smaller global view, at least so much lies in the other
    rotate: float = 0.5                 # probability of a turn by any angle, of all views alike; else by quarters
    turns: bool = False                 # each view is turned by quarters and mirrored on its own besides
    alike: bool = True                  # the global views of all fields of a step show the same channels

    def __post_init__(self):
        for name in ("overlap", "rotate", "local_average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name):g}: expected a share from 0 to 1")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={list(self.scale)}: expected two numbers above 0, low and high")
        if self.zoom * self.scale[0] < 0.33:
            raise ValueError(f"zoom={self.zoom:g}, scale from {self.scale[0]:g}: expected a product of 0.33 or "
                             "more, below it bilinear sampling skips pixels of the field")
        if self.locals < 0 or min(self.size, self.local_size) < 1:
            raise ValueError(f"locals={self.locals}, size={self.size}, local_size={self.local_size}: expected 0 or "
                             "more views of 1 px or more")


def light(changes: dict | None = None) -> Augment:
    """What happens to the intensities of crops, from the `augment` section of a configuration.

    Geometry, colour and empty fields of augment.py have no part here: naming them is an error.
    """
    from augment import Augment
    apart = ("scale", "on_cell", "flip", "quarter", "rotate", "elastic", "elastic_px", "negative",
             "shuffle", "mix", "gray", "drop")
    known = [f.name for f in fields(Augment) if f.name not in apart]
    if wrong := [key for key in changes or {} if key in apart]:
        raise ValueError(f"augment.{wrong[0]}: views are cut by the section `views`; here expected some of "
                         f"{', '.join(known)}")
    quiet = dict(invert=0.0, dim=0.05, light=0.2, blur=0.2, noise=0.2, shot=0.2, negative=0.0)
    return runs.from_dict(Augment, {**quiet, **(changes or {})}, "augment")


# --------------------------------------------------------------------------------------------------- channels

class Stains(NamedTuple):
    """Which of a pool's channels are what, by number."""
    count: int
    fluorescence: tuple[int, ...]
    brightfield: tuple[int, ...]


def stains(channels: Sequence[str], brightfield: Sequence[str]) -> Stains:
    """Sort channels by name, upper or lower case; whatever is not brightfield is fluorescence."""
    names = {name.lower() for name in brightfield}
    bright = tuple(i for i, name in enumerate(channels) if name.lower() in names)
    fluorescence = tuple(i for i in range(len(channels)) if i not in bright)
    if not fluorescence:
        raise ValueError(f"channels {', '.join(channels)}: all are brightfield, expected one of fluorescence or more")
    return Stains(len(channels), fluorescence, bright)


def mixtures(config: Views, stain: Draws, crop: Draws, kinds: Stains) -> np.ndarray:
    """How much of each channel each view shows: (V, B, C), rows sum to 1.

    stain : draws of the B samples for their global views, all equal if those are to be alike: Sinkhorn-Knopp and
    KoLeo, which compare the fields of a step, then cannot tell them apart by their stain. crop : of the V B crops.
    """
    B, V, C = len(stain.key), 2 + config.locals, kinds.count
    eye, mean = np.eye(C), np.zeros(C)
    mean[list(kinds.fluorescence)] = 1 / len(kinds.fluorescence)

    def pick(u: np.ndarray, choices: Sequence[int]) -> np.ndarray:
        return eye[np.asarray(choices)[(u * len(choices)).astype(int)]]      # (..., C)

    def draw(name: str, *shape: int) -> np.ndarray:                          # (V, B, *shape)
        values = crop.uniform(name, *shape).reshape(V, B, *shape)
        values[:2] = stain.uniform(name, 2, *shape).swapaxes(0, 1)
        return values

    u = draw("channel")
    every = range(C)
    if config.strategy == "average":
        return np.broadcast_to(mean, (V, B, C)).copy()
    if config.strategy == "single":                                          # the usual way: a channel, an image
        return np.broadcast_to(pick(u[0], every), (V, B, C)).copy()
    if config.strategy == "pairs":
        first = (u[0] * C).astype(int)
        second = (first + 1 + (u[1] * (C - 1)).astype(int)) % C
        which = np.where(u < 0.5, first, second)                             # (V, B) local views show either
        which[0], which[1] = first, second
        return eye[which]
    if config.strategy == "average_single":
        average = crop.uniform("average").reshape(V, B) < config.local_average
        average[0], average[1] = True, False
        return np.where(average[:, :, None], mean, pick(u, every))
    kind = np.floor(draw("kind") * (4 if kinds.brightfield else 3))[:, :, None]
    free = np.zeros((V, B, C))
    free[:, :, list(kinds.fluorescence)] = -np.log(draw("mixture", len(kinds.fluorescence)))
    free /= free.sum(2, keepdims=True)                                       # even over all convex mixtures
    single = pick(u, kinds.fluorescence)
    bright = pick(u, kinds.brightfield) if kinds.brightfield else single
    return np.select([kind == 0, kind == 1, kind == 2], [mean, single, free], bright)


# --------------------------------------------------------------------------------------------------- geometry

class Places(NamedTuple):
    """Where V views of B samples look: field px = matrix @ (px of the view from its middle) + centre."""
    centre: np.ndarray                  # (V, B, 2) y, x px of the field
    matrix: np.ndarray                  # (V, B, 2, 2)
    offset: np.ndarray                  # (V, B, 2) px of the field, from the first view, before turning
    side: np.ndarray                    # (V, B) px of the field


def place(config: Views, field: Draws, crop: Draws, extent: tuple[int, int]) -> Places:
    """Lay the views of each sample into one neighbourhood, and that into a field of `extent` (H, W) px.

    The second global view shares at least `overlap` with the first; every local view lies within one of the
    two. What does not fit into the field hangs over on both sides alike, where pixels are mirrored.
    """
    B, V = len(field.key), 2 + config.locals
    scale = crop.within("scale", config.scale).reshape(V, B) * config.zoom
    size = np.array([config.size] * 2 + [config.local_size] * config.locals)
    side = size[:, None] / scale                                             # (V, B)
    least = np.minimum(side[0], side[1])
    shared = config.overlap + (1 - config.overlap) * field.uniform("overlap")
    along = field.uniform("along")
    share = shared[:, None] ** np.stack((along, 1 - along), 1)               # (B, 2) of y and of x
    step = (side[0] + side[1])[:, None] / 2 - share * least[:, None]
    step = step * np.where(field.uniform("sign", 2) < 0.5, -1, 1)
    offset = np.zeros((V, B, 2))
    offset[1] = step
    host = (crop.uniform("host").reshape(V, B) * 2).astype(int)[2:]          # (L, B) global view it lies in
    rows = np.arange(B)
    room = np.maximum(side[host, rows] - side[2:], 0)[:, :, None]
    offset[2:] = offset[host, rows] + (crop.uniform("within", 2).reshape(V, B, 2)[2:] - 0.5) * room

    frame = turned(field, np.where(field.uniform("rotate") < config.rotate, field.uniform("angle"), -1))
    matrix = np.broadcast_to(frame, (V, B, 2, 2))
    if config.turns:
        matrix = matrix @ turned(crop, np.full(V * B, -1.0)).reshape(V, B, 2, 2)
    corner = np.array([(y, x) for y in (-0.5, 0.5) for x in (-0.5, 0.5)])
    corners = offset[:2, :, None] + corner * side[:2, :, None, None]         # (2, B, 4, 2)
    corners = np.einsum("bij,vbkj->bvki", frame, corners).reshape(B, 8, 2)
    low, high = corners.min(1), corners.max(1)                               # (B, 2)
    spare = np.array(extent) - (high - low)
    first = np.where(spare > 0, field.uniform("centre", 2), 0.5) * spare - low
    centre = first + np.einsum("bij,vbj->vbi", frame, offset)
    return Places(centre, matrix / scale[:, :, None, None], offset, side)


def turned(draws: Draws, angle: np.ndarray) -> np.ndarray:
    """(k, 2, 2) rotations by `angle` (k,) whole turns, or where that is negative by quarters; mirrored or
    not."""
    turn = 2 * np.pi * np.where(angle < 0, np.floor(4 * draws.uniform("quarter")) / 4, angle)
    mirror = np.where(draws.uniform("mirror") < 0.5, -1, 1)
    cos, sin = np.round(np.cos(turn), 12), np.round(np.sin(turn), 12)
    return np.stack((cos, -sin * mirror, sin, cos * mirror), 1).reshape(-1, 2, 2)


def overlap(offset: np.ndarray, side: np.ndarray) -> np.ndarray:
    """Share of the smaller of two squares of a frame that lies in the other: offset (2, B, 2), side (2, B) ->
    (B,)."""
    least = side.min(0)[:, None]
    along = side.sum(0)[:, None] / 2 - np.abs(offset[1] - offset[0])         # (B, 2) px that are shared
    return (np.clip(along, 0, least) / least).prod(1)


# --------------------------------------------------------------------------------------------------- sampling

def gather(pixels: Tensor, limits: Tensor, slots: Tensor, weights: np.ndarray, centre: np.ndarray,
           matrix: np.ndarray, size: int) -> Tensor:
    """Crops (n, 1, S, S) in [0, 1]: weighted means of normalised channels, bilinear, mirrored beyond the
    field.

    pixels : (N, C, H, W) int16 that hold the bits of uint16; limits : (N, C, 2), what becomes 0 and 1; slots
    : (n,) on the device; weights : (n, C); centre, matrix : (n, 2), (n, 2, 2), as in Places.
    """
    import torch
    from augment import mirrored, send
    N, C, H, W = pixels.shape
    at = send(np.arange(size) - (size - 1) / 2, pixels.device)               # (S,)
    down, right = (send(matrix[:, :, i], pixels.device)[:, :, None] * at for i in (0, 1))    # (n, 2, S)
    down = down + send(centre - 0.5, pixels.device)[:, :, None]              # a pixel's middle has its number
    yx = [down[:, i, :, None] + right[:, i, None, :] for i in (0, 1)]        # (n, S, S) each
    y, x = (mirrored(v, torch.full((), float(e), device=v.device)) for v, e in zip(yx, (H, W)))
    top, left = y.floor().clamp(max=max(H - 2, 0)), x.floor().clamp(max=max(W - 2, 0))
    down, right = y - top, x - left
    corner = top.long() * W + left.long()                                    # (n, S, S) within a plane
    flat, out = pixels.view(-1), torch.zeros_like(y)
    for c in range(C):
        rows = np.flatnonzero(weights[:, c])
        if len(rows) == 0:
            continue
        index = send(rows, pixels.device)
        slot = slots[index]
        first = corner[index] + ((slot * C + c) * (H * W))[:, None, None]

        def look(where: Tensor) -> Tensor:
            return (flat.take(where).int() & 0xFFFF).float()

        beside, below = int(W > 1), W * int(H > 1)
        r = right[index]
        upper = torch.lerp(look(first), look(first + beside), r)
        lower = torch.lerp(look(first + below), look(first + below + beside), r)
        value = torch.lerp(upper, lower, down[index])
        low, high = limits[slot, c].unbind(1)
        share = torch.where(high > low, 1 / (high - low), 0)
        value = ((value - low[:, None, None]) * share[:, None, None]).clamp_(0, 1)
        out.index_add_(0, index, value * send(weights[rows, c], pixels.device)[:, None, None])
    return out[:, None]


def draw(pool, slots: Tensor, numbers: np.ndarray, step: int, seed: int, config: Views, light: Augment,
         kinds: Stains) -> tuple[Tensor, Tensor]:
    """Global (2 B, 3, S, S) and local (L B, 3, s, s) views of the fields in `slots` (B,), view by view.

    pool : has `pixels` and `limits` (stream.FieldPool); numbers : (B,) of samples, each of which the run has
    once.
    """
    import augment
    from augment import Draws
    B, V = len(numbers), 2 + config.locals
    field = Draws.of(seed, numbers)
    crop = Draws.of(seed, (np.asarray(numbers) * V + np.arange(V)[:, None]).ravel(), light)   # (V B)
    stain = Draws.of(seed, np.full(B, -1 - step)) if config.alike else field                 # -1: no sample's number
    weights = mixtures(config, stain, crop, kinds)
    places = place(config, field, crop, tuple(pool.pixels.shape[2:]))

    def cut(first: int, last: int, size: int) -> Tensor:
        rows, part = np.arange(first * B, last * B), slice(first, last)
        if len(rows) == 0:
            return pool.limits.new_zeros(0, 3, size, size)
        x = gather(pool.pixels, pool.limits, slots.repeat(last - first), weights[part].reshape(len(rows), -1),
                   places.centre[part].reshape(-1, 2), places.matrix[part].reshape(-1, 2, 2), size)
        return dressed(augment.expose(x, crop.at(rows), np.full(len(rows), GROUND)))

    with augment.one_thread():
        return cut(0, 2, config.size), cut(2, V, config.local_size)


GROUND = 0.2            # intensity that contrast keeps: normalised fluorescence is about as bright on average


def dressed(x: Tensor) -> Tensor:
    """(n, 1, S, S) in [0, 1] -> (n, 3, S, S) as backbones take it: three times the same, mean and deviation
    removed."""
    from augment import send
    from model import Settings
    mean, std = (send(np.reshape(v, (1, 3, 1, 1)), x.device) for v in (Settings.mean, Settings.std))
    return (x - mean) / std
