"""Pretraining without labels, the whole method: views, masks, losses, student and teacher.

    kinds = view_stains(pool.channels, ("HighZBF", "LowZBF", "Brightfield"))
    large, small = draw_views(pool, slots, numbers, step, seed, config.views, light, kinds)
    masks = block_masks(seed, numbers, h, w)                  # patches hidden from the student
    student = Learner(vit, prototypes=8192)
    teacher = copy.deepcopy(student).requires_grad_(False)
    found = student(teacher, Batch(large, small, ...), temperature, config.loss)
    found["loss"].backward()                                  # and a step of the optimiser, then
    update_teacher(teacher, student, momentum)

A network that sees the same cells in two stains, and has to say the same of both, learns what cells
are rather than what a stain looks like. Written from the papers: DINO (Caron et al., 2021), iBOT
(Zhou et al., 2022), Sinkhorn-Knopp as in SwAV (Caron et al., 2020), KoLeo (Sablayrolles et al.,
2019); DINOv2 and v3 say how they go together.

The file is not called ssl.py: a module of that name would hide Python's TLS module from every
script in this folder, and `import torch` and `import boto3` would fail.

Letters: B fields of a step, L local views of a field, V = 2 + L views, n crops of S x S px, h w the
grid of N patch tokens, M masked patches, D width of tokens, b bottleneck, K prototypes, C channels.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.checkpoint import checkpoint

import runs
from augment import (
    Augment,
    Draws,
    crop_grid,
    crop_on_one_thread,
    expose_crops,
    mirrored_coordinates,
    send_crop_values,
)
from model import Settings, Tokens, ViT, rope_table

# ------------------------------------------------------------------------------------------- views
#
# The crops of a field lie in one neighbourhood: two random windows of 224 px in a field of 1080 px
# mostly show different cells, and agreement on these would teach nothing. They are placed in a
# frame that is turned and mirrored as a whole, so that their overlap is known exactly. Scale, turn
# and mirror are one bilinear resampling of the raw 16-bit pixels, on the device where fields lie.
# Every random value is keyed by (seed, number of the sample), as in augment.py.

LOCAL_MEAN = 0.3            # share of the local views that show the mean (strategy average_single)
USUAL = 0.2                 # intensity that contrast keeps: about the mean of fluorescence
LIGHT = dict(invert=0.0, dim=0.05, light=0.2, blur=0.2, noise=0.2, shot=0.2, negative=0.0)
GEOMETRY = ("scale", "on_cell", "flip", "quarter", "rotate", "elastic", "elastic_px", "negative",
            "shuffle", "mix", "gray", "drop")


def view_light(changes: dict | None = None) -> Augment:
    """Changes of intensity of crops, from the section `augment` of a configuration.

    Keys of geometry, colour and empty fields are an error here.
    """
    if wrong := [key for key in changes or {} if key in GEOMETRY]:
        known = [f.name for f in fields(Augment) if f.name not in GEOMETRY]
        raise ValueError(f"augment.{wrong[0]}: views are cut by the section `views`; expected some "
                         f"of {', '.join(known)}")
    return runs.from_dict(Augment, {**LIGHT, **(changes or {})}, "augment")


class Stains(NamedTuple):
    """The number of channels of a pool, and those of each kind."""
    number: int
    fluorescence: tuple[int, ...]
    brightfield: tuple[int, ...]


def view_stains(channels: Sequence[str], brightfield: Sequence[str]) -> Stains:
    """Sort channels by name, in any case; all others are fluorescence."""
    names = {name.lower() for name in brightfield}
    bright = tuple(i for i, name in enumerate(channels) if name.lower() in names)
    fluorescence = tuple(i for i in range(len(channels)) if i not in bright)
    if not fluorescence:
        raise ValueError(f"channels {', '.join(channels)}: all are brightfield, expected "
                         "fluorescence, too")
    return Stains(len(channels), fluorescence, bright)


def view_channel_weights(config, stain: Draws, crop: Draws, kinds: Stains) -> np.ndarray:
    """The share of each channel in each view: (V, B, C), rows sum to 1.

    stain : draws of the B samples for their global views. In a training all are equal, so that
        Sinkhorn-Knopp and KoLeo cannot tell the fields of a step by their stain.
    crop : draws of the V B crops.
    """
    B, V, C = len(stain.key), 2 + config.locals, kinds.number
    eye, mean = np.eye(C), np.zeros(C)
    mean[list(kinds.fluorescence)] = 1 / len(kinds.fluorescence)

    def pick(u: np.ndarray, choices: Sequence[int]) -> np.ndarray:
        return eye[np.asarray(choices)[(u * len(choices)).astype(int)]]      # (..., C)

    def draw(name: str, *shape: int) -> np.ndarray:                          # (V, B, *shape)
        values = crop.uniform(name, *shape).reshape(V, B, *shape)
        values[:2] = stain.uniform(name, 2, *shape).swapaxes(0, 1)
        return values

    u = draw("channel")
    if config.strategy in ("average", "single"):                             # single: as others do
        same = mean if config.strategy == "average" else pick(u[0], range(C))
        return np.broadcast_to(same, (V, B, C)).copy()
    if config.strategy == "pairs":
        first = (u[0] * C).astype(int)
        second = (first + 1 + (u[1] * (C - 1)).astype(int)) % C
        which = np.where(u < 0.5, first, second)                             # local views: either
        which[0], which[1] = first, second
        return eye[which]
    if config.strategy == "average_single":
        average = crop.uniform("average").reshape(V, B) < LOCAL_MEAN
        average[0], average[1] = True, False
        return np.where(average[:, :, None], mean, pick(u, range(C)))
    kind = np.floor(draw("kind") * (4 if kinds.brightfield else 3))[:, :, None]
    mixed = np.zeros((V, B, C))
    mixed[:, :, list(kinds.fluorescence)] = -np.log(draw("mixture", len(kinds.fluorescence)))
    mixed /= mixed.sum(2, keepdims=True)                                     # all mixtures alike
    single = pick(u, kinds.fluorescence)
    bright = pick(u, kinds.brightfield) if kinds.brightfield else single
    return np.select([kind == 0, kind == 1, kind == 2], [mean, single, mixed], bright)


def place_views(config, field: Draws, crop: Draws, extent: tuple[int, int]
                ) -> tuple[np.ndarray, np.ndarray]:
    """Lay the views of each sample into one neighbourhood, and that into a field of `extent` px.

    The second global view shares at least `overlap` with the first; every local view lies within
    one of the two. What exceeds the field hangs over on both sides alike, where pixels are
    mirrored. Returns centre (V, B, 2), y and x in px of the field, and matrix (V, B, 2, 2):
    field px = matrix @ (px of the view from its middle) + centre.
    """
    B, V = len(field.key), 2 + config.locals
    scale = crop.within("scale", config.scale).reshape(V, B) * config.zoom
    size = np.array([config.size] * 2 + [config.local_size] * config.locals)
    side = size[:, None] / scale                                     # (V, B) px of the field
    least = np.minimum(side[0], side[1])
    shared = config.overlap + (1 - config.overlap) * field.uniform("overlap")
    along = field.uniform("along")
    share = shared[:, None] ** np.stack((along, 1 - along), 1)               # (B, 2) of y and of x
    step = (side[0] + side[1])[:, None] / 2 - share * least[:, None]
    offset = np.zeros((V, B, 2))                                             # in the frame
    offset[1] = step * np.where(field.uniform("sign", 2) < 0.5, -1, 1)
    host = (crop.uniform("host").reshape(V, B) * 2).astype(int)[2:]          # (L, B) global view
    rows = np.arange(B)
    room = np.maximum(side[host, rows] - side[2:], 0)[:, :, None]
    offset[2:] = offset[host, rows] + (crop.uniform("within", 2).reshape(V, B, 2)[2:] - 0.5) * room

    frame = view_frames(field, config.rotate)
    corner = np.array([(y, x) for y in (-0.5, 0.5) for x in (-0.5, 0.5)])
    corners = offset[:2, :, None] + corner * side[:2, :, None, None]         # (2, B, 4, 2)
    corners = np.einsum("bij,vbkj->bvki", frame, corners).reshape(B, 8, 2)
    low, high = corners.min(1), corners.max(1)                               # (B, 2)
    spare = np.array(extent) - (high - low)
    first = np.where(spare > 0, field.uniform("centre", 2), 0.5) * spare - low
    centre = first + np.einsum("bij,vbj->vbi", frame, offset)
    return centre, frame / scale[:, :, None, None]


def view_frames(draws: Draws, rotate: float) -> np.ndarray:
    """Turns by any angle with probability `rotate`, else by quarters; half mirrored: (B, 2, 2)."""
    quarters = np.floor(4 * draws.uniform("quarter")) / 4
    turn = 2 * np.pi * np.where(draws.uniform("rotate") < rotate, draws.uniform("angle"), quarters)
    mirror = np.where(draws.uniform("mirror") < 0.5, -1, 1)
    cos, sin = np.round(np.cos(turn), 12), np.round(np.sin(turn), 12)
    return np.stack((cos, -sin * mirror, sin, cos * mirror), 1).reshape(-1, 2, 2)


def cut_view_crops(pixels: Tensor, limits: Tensor, slots: Tensor, weights: np.ndarray,
                   centre: np.ndarray, matrix: np.ndarray, size: int) -> Tensor:
    """Crops (n, 1, S, S) in [0, 1]: weighted means of normalised channels, bilinear.

    pixels : (fields, C, H, W) int16 that hold the bits of uint16; mirrored beyond the border.
    limits : (fields, C, 2), what becomes 0 and 1.
    slots : (n,) on the device, numbers of fields; weights : (n, C).
    centre, matrix : (n, 2), (n, 2, 2), see place_views.
    """
    C, H, W = pixels.shape[1:]
    yx = crop_grid(matrix, centre - 0.5, size, pixels.device)                # pixel i: middle at i
    y, x = (mirrored_coordinates(v, torch.full((), float(e), device=v.device))
            for v, e in zip(yx, (H, W), strict=True))
    top, left = y.floor().clamp(max=max(H - 2, 0)), x.floor().clamp(max=max(W - 2, 0))
    down, right = y - top, x - left
    corner = top.long() * W + left.long()                            # (n, S, S) within a plane
    beside, below = int(W > 1), W * int(H > 1)
    flat, out = pixels.view(-1), torch.zeros_like(y)

    def look(where: Tensor) -> Tensor:
        return (flat.take(where).int() & 0xFFFF).float()

    for c in range(C):
        rows = np.flatnonzero(weights[:, c])
        if len(rows) == 0:
            continue
        index = send_crop_values(rows, pixels.device)
        slot, r = slots[index], right[index]
        first = corner[index] + ((slot * C + c) * (H * W))[:, None, None]
        upper = torch.lerp(look(first), look(first + beside), r)
        lower = torch.lerp(look(first + below), look(first + below + beside), r)
        value = torch.lerp(upper, lower, down[index])
        low, high = limits[slot, c].unbind(1)
        share = torch.where(high > low, 1 / (high - low), 0)
        value = ((value - low[:, None, None]) * share[:, None, None]).clamp_(0, 1)
        weight = send_crop_values(weights[rows, c], pixels.device)
        out.index_add_(0, index, value * weight[:, None, None])
    return out[:, None]


@crop_on_one_thread()
def draw_views(pool, slots: Tensor, numbers: np.ndarray, step: int, seed: int, config,
               light: Augment, kinds: Stains) -> tuple[Tensor, Tensor]:
    """Global (2 B, 3, S, S) and local (L B, 3, s, s) views of the fields in `slots` (B,).

    pool : has `pixels` and `limits` (stream.FieldPool).
    numbers : (B,) of samples, each of which the run has once; config : train_ssl.Views.
    """
    B, V = len(numbers), 2 + config.locals
    field = Draws.of(seed, numbers)
    crop = Draws.of(seed, (np.asarray(numbers) * V + np.arange(V)[:, None]).ravel(), light)  # (V B)
    stain = Draws.of(seed, np.full(B, -1 - step))                            # no sample's number
    weights = view_channel_weights(config, stain, crop, kinds)
    centre, matrix = place_views(config, field, crop, tuple(pool.pixels.shape[2:]))

    def cut(first: int, last: int, size: int) -> Tensor:
        rows, part = np.arange(first * B, last * B), slice(first, last)
        if len(rows) == 0:
            return pool.limits.new_zeros(0, 3, size, size)
        x = cut_view_crops(pool.pixels, pool.limits, slots.repeat(last - first),
                           weights[part].reshape(len(rows), -1), centre[part].reshape(-1, 2),
                           matrix[part].reshape(-1, 2, 2), size)
        return standardise_views(expose_crops(x, crop.at(rows), np.full(len(rows), USUAL)))

    return cut(0, 2, config.size), cut(2, V, config.local_size)


def standardise_views(x: Tensor) -> Tensor:
    """(n, 1, S, S) in [0, 1] -> (n, 3, S, S): three equal channels, mean and deviation removed."""
    mean, std = (send_crop_values(np.reshape(v, (1, 3, 1, 1)), x.device)
                 for v in (Settings.mean, Settings.std))
    return (x - mean) / std


# ------------------------------------------------------------------------------------------- masks

def block_masks(seed: int, numbers: np.ndarray, h: int, w: int,
                ratio: tuple[float, ...] = (0.1, 0.5)) -> np.ndarray:
    """Patches to hide from the student: (2, B, h w) bool, for both global views of the samples.

    One of the two, by chance, is not masked. In the other a share of patches, drawn evenly from
    `ratio`, is hidden in blocks, exactly. A sample's mask depends on (seed, its number) alone.
    """
    masks = np.zeros((2, len(numbers), h, w), bool)
    for b, number in enumerate(numbers):
        rng = np.random.default_rng((seed, int(number)))
        mask = masks[rng.integers(2), b]
        left = max(1, round(rng.uniform(ratio[0], ratio[1]) * h * w))        # still to be hidden
        for _ in range(100):
            if left < 1:
                break
            area = rng.uniform(min(4, left), left)
            shape = math.exp(rng.uniform(math.log(0.3), math.log(3.3)))      # height / width
            height = min(h, round(math.sqrt(area * shape)))
            width = min(w, round(math.sqrt(area / shape)))
            y, x = rng.integers(h - height + 1), rng.integers(w - width + 1)
            block = mask[y:y + height, x:x + width]
            new = block.size - block.sum()
            if 0 < new <= left:
                block[:] = True
                left -= int(new)
        free = np.flatnonzero(~mask)
        mask.flat[rng.choice(free, left, replace=False)] = True              # no block fitted
    return masks.reshape(2, len(numbers), h * w)


# ------------------------------------------------------------------------------------------ losses
#
# Each is a mean over this process's share of the batch, in float32. Sinkhorn-Knopp and KoLeo look
# across all processes of the group, so that n processes learn what one with the whole batch learns.

def of_all_ranks(x: Tensor) -> Tensor:
    """(B, ...) of this process -> (all B, ...); gradients go back to the process of their rows."""
    return torch.cat(all_gather(x.contiguous())) if runs.in_group() else x


@torch.no_grad()
def sinkhorn(parts: Callable[[], Iterable[Tensor]], iterations: int = 3) -> Tensor:
    """The summand of logits with which softmax uses all prototypes equally: (K,) float32.

    parts : called once per iteration, gives the logits / temperature (m, K) of all samples of this
        process, part by part. Sums run over the samples of all processes.

    Scaling exp(logits) alternately, the columns (prototypes) to equal sums and the rows (samples)
    to 1, leaves a_k exp(l_ik) b_i; the last rows' step makes that softmax_k(l_ik + log a_k), so
    that log a is enough. The numbers of samples and prototypes, by which the textbook divides, are
    common to all a_k and cancel.
    """
    log_a: Any = None
    for _ in range(iterations):
        sums = []
        for logits in parts():
            logits = logits.float()
            if log_a is not None:
                logits = logits - (logits + log_a).logsumexp(1, keepdim=True)    # (m, K) times b_i
            sums.append(logits.logsumexp(0))                                     # (K,)
        own = torch.stack(sums).logsumexp(0, keepdim=True)                       # (1, K)
        log_a = -of_all_ranks(own).logsumexp(0)
    return log_a


def balanced_targets(logits: Tensor, iterations: int = 3) -> Tensor:
    """Targets (B, K), which use the prototypes equally, from logits / temperature (B, K)."""
    logits = logits.float()
    return (logits + sinkhorn(lambda: [logits], iterations)).softmax(1)


def dino_loss(student: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of every view of the student against the teacher's two, none against itself.

    student : (V, B, K) logits, the two global views first; targets : (2, B, K). The mean is over
    all 2 + 2 (V - 2) pairs: eight local views have 16 terms, the global ones 2.
    """
    log_p = (student.float() / temperature).log_softmax(-1)
    crossed = (targets.flip(0) * log_p[:2]).sum()
    local = (targets.sum(0) * log_p[2:]).sum()
    pairs = 2 + 2 * (len(student) - 2)
    return -(crossed + local) / (pairs * student.shape[1])


def ibot_loss(student: Tensor, teacher: Tensor, weight: Tensor, crops: int,
              student_prototypes: nn.Module, teacher_prototypes: nn.Module, temperature: float,
              teacher_temperature: float, chunk: int) -> Tensor:
    """Cross-entropy on the masked patches, as the teacher sees them unmasked.

    student, teacher : (M, b) outputs of the heads for the masked patches.
    weight : (M,) 1 / masked patches in the crop.
    crops : global crops of this process, masked or not.
    chunk : rows of the logits (M, K) that exist at a time; the backward pass computes them again.
        15,000 patches at batch 64 times 8,192 prototypes would be 0.5 GB, 4 GB at 65,536.
    """
    def cross_entropy(z: Tensor, target: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            target = (teacher_prototypes(target).float() / teacher_temperature + log_a).softmax(1)
        log_p = (student_prototypes(z).float() / temperature).log_softmax(1)
        return -((target * log_p).sum(1) * w).sum()

    def logits() -> Iterable[Tensor]:
        return (teacher_prototypes(z).float() / teacher_temperature for z in teacher.split(chunk))

    log_a = sinkhorn(logits)
    parts = zip(student.split(chunk), teacher.split(chunk), weight.split(chunk), strict=True)
    return sum(checkpoint(cross_entropy, *part, use_reentrant=False) for part in parts) / crops


def koleo_loss(x: Tensor) -> Tensor:
    """Push every embedding from its nearest neighbour on any process (Sablayrolles 2019, eq. 2).

    x : (B, D), at least 2 over all processes; rows are normalised here.
    """
    with torch.autocast(x.device.type, enabled=False):     # else the product were of bfloat16
        x = F.normalize(x.float(), dim=-1)
        everyone = of_all_ranks(x)                         # (all B, D)
        row = torch.arange(len(x), device=x.device)
        itself = row + (distributed.get_rank() * len(x) if runs.in_group() else 0)
        with torch.no_grad():                              # the choice of neighbour has no gradient
            cosines = x @ everyone.T
            cosines[row, itself] = -2                      # below any cosine
            nearest = cosines.argmax(1)                    # (B,)
        return -((x - everyone[nearest]).norm(dim=-1) + 1e-8).log().mean()


# ----------------------------------------------------------------------------- student and teacher

class Prototypes(nn.Linear):
    """K logits of unit vectors; no bias. They begin at length 1: the first logits are cosines.

    unit : keep them at length 1. A head that may shrink its prototypes can make all its answers
        alike, as happens with small batches and short training from scratch.
    """

    def __init__(self, bottleneck: int, count: int, unit: bool = False):
        super().__init__(bottleneck, count, bias=False)
        self.unit = unit
        nn.init.normal_(self.weight, std=bottleneck ** -0.5)

    def forward(self, z: Tensor) -> Tensor:
        weight = F.normalize(self.weight, dim=1) if self.unit else self.weight
        with torch.autocast(z.device.type, enabled=False):     # bfloat16 errs by 0.4 at a
            return F.linear(z.float(), weight)                 # temperature of 0.01: (..., K)


class Head(nn.Module):
    """Token -> unit vector of `bottleneck` numbers; `prototypes` makes logits of it."""

    def __init__(self, dim: int, prototypes: int, hidden: int, bottleneck: int, unit: bool):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden),
                                 nn.GELU(), nn.Linear(hidden, bottleneck))
        self.prototypes = Prototypes(bottleneck, prototypes, unit)
        linear: list[Any] = list(self.mlp)[::2]
        for layer in linear:
            nn.init.trunc_normal_(layer.weight, std=layer.in_features ** -0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.mlp(x).float(), dim=-1, eps=1e-6)             # (..., b)


class PackedViT(nn.Module):
    """A backbone that takes crops of several sizes in one pass, without padding.

    Norms and MLPs, which see one token at a time, run over the tokens of all crops at once;
    attention, which must not look from crop to crop, goes size by size.
    """

    def __init__(self, vit: ViT):
        super().__init__()
        self.vit = vit

    def forward(self, crops: list[Tensor], mask: Tensor | None = None, jitter: Tensor | None = None
                ) -> list[Tokens]:
        """crops : (B_i, 3, H_i, W_i); mask : (B_0, N_0), of the first; jitter : (depth, sizes)."""
        vit: Any = self.vit
        plain = 1 + vit.registers
        grids = [(x.shape[2] // vit.patch, x.shape[3] // vit.patch) for x in crops]
        tokens = [vit.embed(x, mask if i == 0 else None) for i, x in enumerate(crops)]
        shapes = [t.shape for t in tokens]                                   # (B_i, T_i, D) each
        lengths = [B * T for B, T, _ in shapes]
        x = torch.cat([t.flatten(0, 1) for t in tokens])                     # (all tokens, D)
        ropes = [rope_table(vit.periods, *grid, plain) for grid in grids]
        for depth, block in enumerate(vit.blocks):
            if jitter is not None:
                ropes = [rope_table(vit.periods, *grid, plain, jitter[depth, i])
                         for i, grid in enumerate(grids)]
            parts = zip(block.norm1(x).split(lengths), shapes, ropes, strict=True)
            x = x + torch.cat([block.attn(part.view(shape), rope, block.scale1).flatten(0, 1)
                               for part, shape, rope in parts])
            x = x + block.mlp(x)
        parts = zip(vit.norm(x).split(lengths), shapes, strict=True)
        whole = [part.view(shape) for part, shape in parts]
        return [Tokens(t[:, 0], t[:, 1:plain], t[:, plain:]) for t in whole]


class Batch(NamedTuple):
    """Input of one step, on one device."""
    large: Tensor                       # (2 B, 3, S, S), first views, then second ones
    small: Tensor                       # (L B, 3, s, s)
    mask: Tensor                        # (2 B, N) bool, hidden from the student
    masked: Tensor                      # (M,) flat, where the mask is true; made on the host
    weight: Tensor                      # (M,) 1 / masked patches of the same crop
    jitter: Tensor                      # (depth, 2) factors on the coordinates of both sizes


class Learner(nn.Module):
    """A backbone with a head for class tokens and one for patches.

    forward computes a whole step's loss, the teacher's part included, so that
    DistributedDataParallel sees one call.
    """

    temperature = 0.1                   # of the student
    chunk = 4096                        # masked patches whose logits are in memory at a time

    def __init__(self, vit: ViT, prototypes: int = 8192, hidden: int = 2048, bottleneck: int = 256,
                 unit: bool = False):
        super().__init__()
        self.encoder = PackedViT(vit)
        self.dino = Head(vit.dim, prototypes, hidden, bottleneck, unit)
        self.ibot = Head(vit.dim, prototypes, hidden, bottleneck, unit)

    def forward(self, teacher: Learner, batch: Batch, temperature: float, weights
                ) -> dict[str, Tensor]:
        """Losses of this process's fields and signs of collapse.

        temperature : of the teacher; weights : those of `ibot` and `koleo`, DINO's is 1,
        and `together`.
        """
        B = len(batch.large) // 2
        with torch.no_grad():
            seen, = teacher.encoder([batch.large])
            logits = teacher.dino.prototypes(teacher.dino(seen.cls)).float()         # (2 B, K)
            logits = logits / temperature
            hidden = teacher.ibot(seen.patches.flatten(0, 1)[batch.masked])           # (M, b)
        # View by view, unlike DINOv2: together, each could keep to its own prototypes.
        views = [logits] if weights.together else logits.chunk(2)
        targets = torch.cat([balanced_targets(part) for part in views])
        crops = [batch.large] + [batch.small] * (len(batch.small) > 0)
        large, *small = self.encoder(crops, batch.mask, batch.jitter)
        cls = torch.cat([large.cls] + [tokens.cls for tokens in small])              # (V B, D)
        student = self.dino.prototypes(self.dino(cls)).unflatten(0, (-1, B))         # (V, B, K)
        dino = dino_loss(student, targets.unflatten(0, (2, B)), self.temperature)
        guessed = self.ibot(large.patches.flatten(0, 1)[batch.masked])                # (M, b)
        ibot = ibot_loss(guessed, hidden, batch.weight, 2 * B, self.ibot.prototypes,
                         teacher.ibot.prototypes, self.temperature, temperature, self.chunk)
        koleo = sum(koleo_loss(part) for part in large.cls.chunk(2))
        entropy = -(targets * targets.clamp(min=1e-30).log()).sum(1).mean()
        chosen = targets.new_zeros(targets.shape[1]).index_add_(
            0, targets.argmax(1), targets.new_ones(2 * B))
        return dict(loss=dino + weights.ibot * ibot + weights.koleo * koleo, dino=dino, ibot=ibot,
                    koleo=koleo, teacher_entropy=entropy, kl=dino.detach() - entropy,
                    chosen=chosen, cls=seen.cls.float())


@torch.no_grad()
def update_teacher(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, parameter by parameter."""
    before, new = ([p.detach() for p in net.parameters()] for net in (teacher, student))
    torch._foreach_lerp_(before, new, 1 - momentum)


def student_step_flops(learner: Learner, size: int, local_size: int, local_views: int) -> float:
    """Operations of one field's step: student forward and backward, teacher forward.

    A multiplication and an addition are two; a backward pass is two forward ones. Heads on class
    tokens are counted, iBOT's, a hundredth of the whole, are not.
    """
    vit = learner.encoder.vit
    D, P = vit.dim, vit.patch

    def forward(side: int) -> float:
        N = (side // P) ** 2
        T = 1 + vit.registers + N
        return vit.depth * (24 * T * D * D + 4 * T * T * D) + 2 * N * D * 3 * P * P

    head = 2 * sum(p.numel() for p in learner.dino.parameters())
    large, small = 2 * (forward(size) + head), local_views * (forward(local_size) + head)
    return 3 * (large + small) + large


# ---------------------------------------------------------------------------- is it still learning

def perplexity(counts: Tensor) -> float:
    """exp of the entropy, (K,) -> 1 to K: of how often each was chosen, the prototypes in use."""
    p = counts.cpu().double()                                  # mps has no doubles
    p = p / p.sum().clamp(min=1e-12)
    return math.exp(torch.special.entr(p).sum().item())


def student_effective_rank(x: Tensor) -> float:
    """Perplexity of the singular values of the centred rows (Roy & Vetterli, 2007).

    (B, D) -> 1 to min(B - 1, D).
    """
    return perplexity(torch.linalg.svdvals((x - x.mean(0)).cpu().double()))


def student_feature_std(x: Tensor) -> float:
    """Deviation of normalised rows times sqrt(D): 1 for directions spread evenly, 0 for one."""
    x = F.normalize(x.cpu().double(), dim=-1)
    return (x.std(0).mean() * math.sqrt(x.shape[1])).item()
