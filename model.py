"""The network: a ViT with 2-D RoPE and registers (DINOv3's architecture), a U-Net decoder, weights
in and out.

    python model.py [size=224] [weights=FILE]     parameters and FLOPs per part, one timed pass

    vit = ViT()                                   S/8: 384 wide, 12 blocks, 6 heads, patch 8
    vit = load_backbone("dinov3_vits16.pth")      DINOv3 (official or Hugging Face), patch 16 -> 8
    net = DINOCell(vit)                           (B, 3, H, W) in [0, 1] -> (B, 1, H, W) distance to
                                                  the cell's edge
    save(net, "final_models/x.pt"); net = load("final_models/x.pt")

Letters: B images, H W pixels, P patch, h w the token grid (H/P, W/P), N = h*w patch tokens, R
registers, T = 1 + R + N all tokens, D width.
"""
from __future__ import annotations

import contextlib
import copy
import importlib.util
import json
import logging
import math
import re
import struct
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
from vectors import OUTLINE, pooled, type_probabilities
from watershed import Setting

FORMAT = "dinocell-2"      # first entry of every file that save() writes
OLD_FORMAT = "dinocell-1"  # still read


class Tokens(NamedTuple):
    """The backbone's tokens of an image, after the final norm."""
    cls: Tensor            # (B, D)
    registers: Tensor      # (B, R, D)
    patches: Tensor        # (B, N, D), row-major


# ----------------------------------------------------------------------------------------- backbone

def rope_periods(head: int, theta: float = 100.0) -> Tensor:
    """Wavelengths of the rotations, from 1 to nearly theta half-images: (head / 4,)."""
    i = torch.arange(head // 4, dtype=torch.float32)
    return theta ** (2 * i / (head / 2))


def rope_table(periods: Tensor, h: int, w: int, plain: int,
               scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
    """cos and sin per token, (T, head), float32; the `plain` first tokens have no place.

    Coordinates are the centres of the patches in [-1, 1], each axis by its own extent, so that the
    patch size and the crop size may change.
    """
    y = (torch.arange(h, device=periods.device) + 0.5) / h * 2 - 1
    x = (torch.arange(w, device=periods.device) + 0.5) / w * 2 - 1
    yx = torch.cartesian_prod(y, x) * scale                                  # (N, 2)
    angle = 2 * math.pi * yx[:, :, None] / periods.float()                   # (N, 2, head/4)
    angle = angle.flatten(1).repeat(1, 2)                    # (N, head): rows, columns, again
    angle = F.pad(angle, (0, 0, plain, 0))                   # (T, head): angle 0 turns nothing
    return angle.cos(), angle.sin()


def rotate_by_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin: x (B, T, heads, head); cos, sin (T, head), float32."""
    half = x.shape[-1] // 2
    sin = torch.cat((-sin[:, :half], sin[:, half:]), -1).to(x.dtype)[:, None]  # (T, 1, head)
    swapped = torch.cat((x[..., half:], x[..., :half]), -1)
    return torch.addcmul(x * cos.to(x.dtype)[:, None], swapped, sin)


PIECE = 2**22               # bytes of attention's scores at a time: they stay in the cache of a CPU
ROUND = 32                  # tokens that a CPU's matrix units take at a time


class AttentionOnCPU(torch.autograd.Function):
    """Rotation and attention of qkv (B, T, 3, heads, head) -> (B, T, heads, head), in bfloat16.

    Tokens are filled up to a multiple of ROUND, with which a CPU is up to twice as fast; nobody
    attends to the filling. Plain matrix products of a few heads at a time take half the time of
    scaled_dot_product_attention and of its gradient; with AMX torch's is faster, but for gradients.

    With P = softmax(Q K') and dO the gradient of the output: dV = P' dO, dS = P * (dO V' -
    rowsum(dO * O)), dQ = dS K, dK = dS' Q (Dao et al., 2022, appendix B.4). The gradient of a
    rotation is the rotation back.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _, heads, head = qkv.shape
        scale = cos.new_tensor([head ** -0.5, 1]).view(2, 1, 1, 1, 1)
        turn = (cos * scale).to(qkv.dtype), (sin * scale).to(qkv.dtype)      # (2, 1, 1, T, head)
        filled = qkv.new_empty(3, B, heads, -(-T // ROUND) * ROUND, head)
        filled[..., T:, :] = 0
        # (3, B, heads, T, head)
        given, inside = qkv.permute(2, 0, 3, 1, 4), filled[..., :T, :]
        _rotate(given[:2], *turn, out=inside[:2])
        inside[2] = given[2]
        q, k, v = filled
        if has_amx():
            hidden = q.new_zeros(q.shape[2])
            hidden[T:] = -torch.inf
            out = F.scaled_dot_product_attention(q, k, v, hidden.expand(1, 1, 1, -1), scale=1.0)
        else:
            out = torch.empty_like(q)
            flat = [t.flatten(0, 1) for t in (*filled, out)]
            for a, b, c, o in _pieces(*flat):
                torch.bmm(_shares(a, b, T), c, out=o)
        ctx.save_for_backward(filled, out, *turn)
        return out[:, :, :T].transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        filled, out, cos, sin = ctx.saved_tensors
        T = gradient.shape[1]
        below = torch.zeros_like(filled[0])
        below[:, :, :T] = gradient.transpose(1, 2)
        changes = torch.empty_like(filled)
        flat = [t.flatten(0, 1) for t in (*filled, out, below, *changes)]
        for q, k, v, o, g, dq, dk, dv in _pieces(*flat):
            p = _shares(q, k, T)
            ds = torch.baddbmm((g * o).sum(-1, keepdim=True), g, v.mT, beta=-1).mul_(p)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.mT, q, out=dk)
            torch.bmm(p.mT, g, out=dv)
        dqkv = gradient.new_empty(*gradient.shape[:2], 3, *gradient.shape[2:])
        inside, wanted = changes[..., :T, :], dqkv.permute(2, 0, 3, 1, 4)
        _rotate(inside[:2], cos, -sin, out=wanted[:2])
        wanted[2] = inside[2]
        return dqkv, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """As rotate_by_rope, where tokens are the last axis but one."""
    torch.mul(x, cos, out=out)
    (first, last), (low, high), (left, right) = (t.chunk(2, -1) for t in (x, out, sin))
    low.addcmul_(last, left, value=-1)
    high.addcmul_(first, right)


def _shares(q: Tensor, k: Tensor, T: int) -> Tensor:
    """What every token takes of the T real ones: (some heads, tokens, tokens)."""
    scores = torch.bmm(q, k.mT)
    scores[:, :, T:] = -torch.inf
    return scores.softmax(-1)


def _pieces(*tensors: Tensor) -> Iterator[list[Tensor]]:
    """Cut tensors (B heads, tokens, head) along the first axis, by even numbers: two threads share
    the work."""
    tokens = tensors[0].shape[1]
    step = PIECE // (tokens ** 2 * tensors[0].element_size()) // 2 * 2 or 1
    yield from zip(*(t.split(step) for t in tensors))


class Attention(nn.Module):
    """Self-attention with RoPE. Keys have no bias: DINOv3 masks it."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor], scale: Tensor) -> Tensor:
        """scale (D,), LayerScale: it multiplies the last matrix, which is smaller than x."""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        # (B, T, 3, heads, head)
        qkv = F.linear(x, self.qkv.weight, bias).unflatten(2, (3, self.heads, -1))
        if qkv.device.type == "cpu" and qkv.dtype == torch.bfloat16:
            x = AttentionOnCPU.apply(qkv, *rope)
        else:
            qk, v = qkv.flatten(2, 3).split((2 * self.heads, self.heads), 2)
            q, k, v = (t.transpose(1, 2) for t in (*rotate_by_rope(qk, *rope).chunk(2, 2), v))
            x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)      # (B, T, heads, head)
        x = x.flatten(2)                                                     # (B, T, D)
        return F.linear(x, scale[:, None] * self.proj.weight, scale * self.proj.bias)


class TransformerBlock(nn.Module):
    """Pre-norm transformer block; LayerScale on both branches."""

    def __init__(self, dim: int, heads: int, layerscale: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-5)
        self.attn = Attention(dim, heads)
        self.scale1 = nn.Parameter(torch.full((dim,), layerscale))
        self.norm2 = nn.LayerNorm(dim, eps=1e-5)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.scale2 = nn.Parameter(torch.full((dim,), layerscale))

    def mlp(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.fc1(self.norm2(x)))                             # (..., 4 D)
        return F.linear(hidden, self.scale2[:, None] * self.fc2.weight, self.scale2 * self.fc2.bias)

    def forward(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.norm1(x), rope, self.scale1)
        return x + self.mlp(x)                                               # (B, T, D)


class ViT(nn.Module):
    """Vision transformer as DINOv3 builds it; every size is free.

    layerscale : start of LayerScale; DINOv3's 1e-5 is for long training, short training from
        scratch starts faster near 0.1.
    """

    periods: Tensor

    def __init__(self, dim: int = 384, depth: int = 12, heads: int = 6, patch: int = 8,
                 registers: int = 4, layerscale: float = 1e-5):
        super().__init__()
        if heads < 1 or dim % heads or (dim // heads) % 4:
            raise ValueError(f"dim={dim}, heads={heads}: the head width dim / heads must be a "
                             "multiple of 4 for RoPE")
        self.architecture = dict(dim=dim, depth=depth, heads=heads, patch=patch,
                                 registers=registers)
        self.dim, self.depth, self.patch, self.registers = dim, depth, patch, registers
        self.patch_embed = nn.Conv2d(3, dim, patch, patch)
        self.cls_token = nn.Parameter(torch.randn(dim) * 0.02)
        self.register_tokens = nn.Parameter(torch.randn(registers, dim) * 0.02)
        self.mask_token = nn.Parameter(torch.zeros(dim))
        self.register_buffer("periods", rope_periods(dim // heads))
        self.blocks = nn.ModuleList(TransformerBlock(dim, heads, layerscale) for _ in range(depth))
        self.norm = nn.LayerNorm(dim, eps=1e-5)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def embed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        B, _, H, W = x.shape
        if H % self.patch or W % self.patch:
            raise ValueError(f"image of {H} x {W} px: both sides must be multiples of the patch "
                             f"({self.patch} px); segment.segment pads for you")
        x = self.patch_embed(x).flatten(2).mT                                # (B, N, D)
        if mask is not None:                             # (B, N), True: hidden
            x = torch.where(mask[:, :, None], self.mask_token.to(x.dtype), x)
        first = torch.cat((self.cls_token[None], self.register_tokens)).to(x.dtype)
        return torch.cat((first.expand(B, -1, -1), x), 1)                    # (B, T, D)

    def _run(self, x: Tensor, mask: Tensor | None = None,
             taps: tuple[int, ...] = ()) -> tuple[Tensor, list[Tensor]]:
        """All tokens before the final norm, and the patch tokens after the blocks in taps."""
        h, w = x.shape[2] // self.patch, x.shape[3] // self.patch
        plain = 1 + self.registers
        x, seen = self.embed(x, mask), []
        rope = rope_table(self.periods, h, w, plain)
        for i, block in enumerate(self.blocks):
            x = block(x, rope)
            if i in taps:
                seen.append(x[:, plain:])                                    # (B, N, D)
        return x, seen

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tokens:
        x = self.norm(self._run(x, mask)[0])
        return Tokens(x[:, 0], x[:, 1:1 + self.registers], x[:, 1 + self.registers:])

    def features(self, x: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens (B, N, D) after the blocks whose numbers are in taps, before any norm."""
        return self._run(x, taps=taps)[1]


# ------------------------------------------------------------------------------------- convolutions

def convolutions(width: int, inputs: int | None = None) -> nn.Sequential:
    """Twice 3 x 3 convolution, GroupNorm, ReLU: no image depends on its batch."""
    layers: list[nn.Module] = []
    for c in (inputs or width, width):
        layers += [nn.Conv2d(c, width, 3, padding=1, bias=False),
                   nn.GroupNorm(math.gcd(8, width), width), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)


class ConvNet(nn.Module):
    """Convolutions in place of the transformer: a plain U-Net, to compare with."""

    def __init__(self, dim: int, depth: int, patch: int = 8):
        super().__init__()
        self.architecture = dict(kind="ConvNet", dim=dim, depth=depth, patch=patch)
        self.dim, self.depth, self.patch = dim, depth, patch
        widths = [dim * 2 ** (k + 1) // patch               # patch 8: dim/4, dim/2, dim
                  for k in range(patch.bit_length() - 1)]
        self.patch_embed = nn.Sequential(*(nn.Sequential(nn.AvgPool2d(2), convolutions(b, a))
                                           for a, b in zip([3, *widths], widths)))
        self.blocks = nn.ModuleList(convolutions(dim) for _ in range(depth))

    def features(self, x: Tensor, taps: tuple[int, ...]) -> list[Tensor]:
        """(B, N, D) after the blocks whose numbers are in taps, as ViT.features."""
        x, seen = self.patch_embed(x), []                                    # (B, D, h, w)
        for i, block in enumerate(self.blocks):
            x = x + block(x)
            if i in taps:
                seen.append(x.flatten(2).mT)
        return seen


# ------------------------------------------------------------------------------------------ decoder

class Decoder(nn.Module):
    """U-Net decoder on the token grids of equally spaced blocks, down to one distance per pixel.

    Each stage doubles the grid by a transposed convolution and adds the next shallower block as
    skip, projected to the stage's width while it is a token grid: at full size a 384-wide skip
    would cost more than the backbone. A stem sees the pixels themselves, in `stem` sizes from the
    last stage's down by halves, and joins where the decoder has the same size: tokens alone cannot
    say where inside its 8 px an edge lies.

    last = 0: the stages end at half the size of the image, the stem sees 2 x 2 px as twelve
    channels, and the head answers for 2 x 2 px at once; convolutions at full size took three
    quarters of the decoder's time. Otherwise one more stage, `last` wide, stays at full size.
    """

    def __init__(self, dim: int, patch: int, widths: tuple[int, ...], last: int, stem: int):
        super().__init__()
        self.grain = 1 if last else 2                # px, side of what the head answers for
        if 2 ** len(widths) * self.grain != patch:
            raise ValueError(f"decoder widths {widths}: {len(widths)} stages enlarge "
                             f"{2 ** len(widths)} times, the patch is {patch} px; give "
                             f"{(patch // self.grain).bit_length() - 1} widths with last={last}")
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(len(widths) + 1))
        self.skips = nn.ModuleList(nn.Linear(dim, width) for width in widths)
        self.ups = nn.ModuleList(nn.ConvTranspose2d(c, width, 2, 2)
                                 for c, width in zip((dim, *widths), widths))
        self.stages = nn.ModuleList(convolutions(width) for width in widths)
        if not 0 <= stem <= len(widths):
            raise ValueError(f"stem={stem}: expected 0 to {len(widths)} levels, one for each size "
                             "that the decoder has")
        # as wide as what they join
        across = (*([last] if last else []), *reversed(widths[:-1] if last else widths))[:stem]
        self.stem = nn.ModuleList(convolutions(b, a)
                                  for a, b in zip((3 * self.grain ** 2, *across), across))
        if last:
            self.narrow = nn.Conv2d(widths[-1], last, 1)
            self.refine = convolutions(last)
        self.head = nn.Conv2d(last or widths[-1], self.grain ** 2, 1)

    def forward(self, image: Tensor, taps: list[Tensor], h: int, w: int) -> Tensor:
        """Logits (B, 1, H, W) of an image (B, 3, H, W) and taps (B, N, D), shallow to deep."""
        def grid(tokens: Tensor) -> Tensor:
            return tokens.mT.unflatten(2, (h, w))                            # (B, c, h, w)

        seen: list[Tensor] = []
        x = F.pixel_unshuffle(image, self.grain)         # (B, 3 grain^2, H / grain, W / grain)
        for level in self.stem:
            x = level(F.avg_pool2d(x, 2) if seen else x)
            seen.append(x)                               # (B, width, H / 2^k, W / 2^k)
        *shallow, deepest = [norm(tap) for norm, tap in zip(self.norms, taps)]
        x = grid(deepest)                                                    # (B, D, h, w)
        for i, (up, project, stage) in enumerate(zip(self.ups, self.skips, self.stages)):
            skip = grid(project(shallow[-1 - i]))
            skip = F.interpolate(skip, scale_factor=2 ** (i + 1), mode="bilinear")
            x = up(x) + skip                             # (B, width, 2^(i+1) h, 2^(i+1) w)
            k = len(self.stages) - 1 - i                 # halvings from the last size to this one
            x = stage(x + seen[k] if (k or self.grain > 1) and k < len(seen) else x)
        if self.grain == 1:
            x = self.narrow(x)                                               # (B, last, H, W)
            x = self.refine(x + seen[0] if seen else x)
        return F.pixel_shuffle(self.head(x), self.grain)                     # (B, 1, H, W)


SIZE_ZOOMS = (0.25, 0.5, 1.0, 2.0, 4.0)     # at which the size head sees an image
SIZE_STEP = math.log(SIZE_ZOOMS[1] / SIZE_ZOOMS[0])


class SizeHead(nn.Module):
    """Diameter of the cells of an image, from the cells that the network finds at SIZE_ZOOMS.

    From what a zoom shows, and those beside it, one small map judges how far that zoom is from the
    right one, and how much its word counts; it is the same for each zoom, so that an image is many
    examples. The tokens tell less: they are trained not to mind size.
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, features: int = 8, hidden: int = 32):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.fc1, self.fc2 = nn.Linear(3 * features, hidden), nn.Linear(hidden, 2)

    def forward(self, seen: Tensor) -> Tensor:
        """Descriptions (B, zooms, features) -> (B,) log of the diameter, in those of training."""
        far, counts = self.votes(seen)
        steps = torch.arange(seen.shape[1]) - seen.shape[1] // 2
        return ((far - SIZE_STEP * steps) * counts).sum(1)

    def votes(self, seen: Tensor) -> tuple[Tensor, Tensor]:
        """(B, zooms) each: log of the diameter at that zoom, and how much the zoom counts."""
        x = F.pad(((seen - self.mean) / self.spread).clamp(-4, 4), (0, 0, 1, 1))
        x = torch.cat((x[:, 1:-1], x[:, :-2], x[:, 2:]), 2)
        hidden = F.dropout(F.gelu(self.fc1(x)), 0.3, self.training)
        far, counts = self.fc2(hidden).unbind(2)
        return far, counts.softmax(1)


# ------------------------------------------------------------------------------------ whole network

@dataclass
class Settings:
    """What inference needs beside the tensors; kept in the weights file."""
    tile: int = 256                   # px, side of the training crops and so of the tiles
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)   # subtracted from inputs in [0, 1]; DINOv3's
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    low: float = 1.0                  # percentile of the image that becomes 0
    high: float = 99.8                # percentile that becomes 1
    cap: float | None = None          # px, watershed.distance_map(cap=) of the training targets
    peak: float = 0.47                # these six are watershed.Setting, which says what they mean
    fill: float = 0.09
    min_area: float = 0
    depth: float = 0.0
    smooth: float = 0.0
    shape: float = 0.0
    diameter: float | None = None     # network px, median equivalent diameter of the training cells
    score: dict = field(default_factory=dict)   # cells.cell_probability's weights; none: no score
    licence: str = "MIT"              # of the weights, as SPDX names it
    provenance: dict = field(default_factory=dict)  # what it was trained on, how, with which scores

    @property
    def setting(self) -> Setting:
        """The thresholds of the watershed."""
        return Setting(*(getattr(self, name) for name in Setting._fields))


class DINOCell(nn.Module):
    """Image in [0, 1] -> distance to the cell's edge, 0 on background, 1 deep inside a cell."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: ViT | ConvNet | None = None,
                 widths: tuple[int, ...] = (256, 128, 64), last: int = 32,
                 settings: Settings | None = None, stem: int = 1):
        super().__init__()
        self.backbone = backbone or ViT()
        self.settings = settings or Settings()
        vit = self.backbone
        quarters = len(widths) + 1
        if vit.depth < quarters:
            raise ValueError(f"depth={vit.depth}: the decoder needs a backbone of {quarters} "
                             f"blocks or more")
        # 12 blocks: 2, 5, 8, 11
        self.taps = tuple(vit.depth * (i + 1) // quarters - 1 for i in range(quarters))
        self.architecture: dict[str, Any] = dict(backbone=vit.architecture, widths=tuple(widths),
                                                 last=last, stem=stem)
        self.decoder = Decoder(vit.dim, vit.patch, tuple(widths), last, stem)
        self.size: SizeHead | None = None                # add_size_head() makes one
        self.types: nn.Linear | None = None              # set_types() gives one
        self.origin: Path | None = None                  # the file that load() read
        for name in ("mean", "std"):           # on the CPU also where load() builds on "meta"
            value = torch.tensor(getattr(self.settings, name), device="cpu").view(1, 3, 1, 1)
            self.register_buffer(name, value, persistent=False)
        for name, parameter in vit.named_parameters():
            if name in ("norm.weight", "norm.bias", "mask_token"):  # no part in supervised training
                parameter.requires_grad_(False)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        """Distances (B, 1, H, W); with labels (B, H, W) also logits (n, K) of the types of their
        cells, and the place of each, (n, 2): crop and label."""
        distance, tokens = self.with_tokens(x)
        if labels is None:
            return distance
        assert self.types is not None
        rows, place = pooled(tokens, labels, self.backbone.patch)
        return distance, F.linear(rows, self.types.weight.float(), self.types.bias.float()), place

    def with_tokens(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Distances (B, 1, H, W), and the tokens of the last block (B, N, D)."""
        x = self.standardised(x)
        taps = self.backbone.features(x, self.taps)
        h, w = x.shape[2] // self.backbone.patch, x.shape[3] // self.backbone.patch
        return self.decoder(x, taps, h, w).float().sigmoid(), taps[-1]

    def set_types(self, head: nn.Linear, names: Sequence[str]) -> None:
        """Tell types of cells from now on, by a linear map of vectors.type_rows()."""
        self.types = head.to(self.decoder.head.weight.device)
        self.architecture["types"] = list(names)

    def remove_types(self) -> None:
        self.types = None
        self.architecture.pop("types", None)

    @property
    def type_names(self) -> tuple[str, ...]:
        return tuple(self.architecture.get("types", ()))

    def type_probabilities(self, rows: np.ndarray) -> np.ndarray:
        """(n, K) of vectors.type_rows() (n, D + 8); heads of the version before read (n, D)."""
        assert self.types is not None
        width = self.backbone.dim + len(OUTLINE)
        if rows.shape[1] != width:
            raise ValueError(f"rows of {rows.shape[1]} numbers, expected {width}: vectors and "
                             "outlines of cells, see vectors.type_rows()")
        return type_probabilities(self.types, rows[:, :self.types.in_features])

    def add_size_head(self) -> None:
        self.size = SizeHead().train(self.training)
        self.architecture["size"] = "cells"

    def remove_size_head(self) -> None:
        self.size = None
        self.architecture.pop("size", None)

    def standardised(self, x: Tensor) -> Tensor:
        """The backbone's input, of an image (B, 3, H, W) in [0, 1]."""
        return ((x - self.mean) / self.std).to(self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights: float32, or bfloat16 after ready()."""
        return self.decoder.head.weight.dtype

    def autocast(self) -> torch.autocast:
        """bfloat16 inside a with block, where this network's device computes in it."""
        device = self.mean.device.type
        return torch.autocast(device, torch.bfloat16, enabled=has_bf16(device)
                              and self.dtype == torch.float32)

    def ready(self, device: str) -> DINOCell:
        """Make this network ready for inference on a device, no longer to be trained or saved.

        Where the device computes in bfloat16 the weights are bfloat16, which spares autocast's
        conversions, and convolutions see channels last.
        """
        self.to(device).eval().requires_grad_(False)
        if self.size is not None:
            self.size.cpu()                                   # it is small, and stays in float32
        if has_bf16(device):
            for name, parameter in self.named_parameters():
                if not name.startswith("size."):
                    parameter.data = parameter.data.bfloat16()
            # torch documents this form, its stub lacks it
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self


def untrained(like: DINOCell, layerscale: float, settings: Settings | None = None) -> DINOCell:
    """A random network of another's shape, with a ViT."""
    shape = like.architecture
    vit = {name: value for name, value in shape["backbone"].items() if name != "kind"}
    return DINOCell(ViT(**vit, layerscale=layerscale), shape["widths"], shape["last"], settings,
                    shape["stem"])


# --------------------------------------------------------------------------------------------- loss

NEAR_EDGE = 2       # px around a cell that count as its edge


def distance_loss(predicted: Tensor, target: Tensor, labels: Tensor, edge_weight: float = 0.0,
                  seam_weight: float = 0.0) -> Tensor:
    """Mean squared error of distances (B, 1, S, S), weighed; labels (B, S, S), 0 is background.

    Pixels near an edge, on both sides, count 1 + edge_weight (1 - distance): with the cell's side
    alone the network would rather draw cells too large. Pixels near two cells count seam_weight
    more: the valley between touching cells is so narrow that it hardly shows in the mean.
    """
    square = (predicted - target).square()
    if not edge_weight and not seam_weight:
        return square.mean()
    number = labels[:, None].to(target.dtype)                                # (B, 1, S, S)
    highest, lowest = (F.max_pool2d(v, 2 * NEAR_EDGE + 1, 1, NEAR_EDGE)
                       for v in (number, -number.masked_fill(number == 0, torch.inf)))
    near = highest > 0                                       # of one cell or more
    seam = near & (highest != -lowest)                       # of two or more
    return (square * (1 + edge_weight * (1 - target) * near + seam_weight * seam)).mean()


# --------------------------------------------------------------------------------- weights: writing

def save(model: DINOCell | ViT, path: str | Path, half: bool = False,
         provenance: dict | None = None, licence: str = "MIT") -> None:
    """Write architecture, settings and tensors, whole or not at all; half=True stores float16.

    A backbone has no settings: what it was trained on and its licence are given.
    """
    tensors = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    if half:  # periods stay exact: angles multiply their error by the image's extent
        tensors = {k: v.half() if v.is_floating_point() and not k.endswith("periods") else v
                   for k, v in tensors.items()}
    content = dict(format=FORMAT, kind=type(model).__name__, architecture=model.architecture,
                   settings=asdict(model.settings) if isinstance(model, DINOCell)
                   else {"provenance": provenance or {}, "licence": licence},
                   state_dict=tensors)
    runs.save_torch(content, path)


def change_weights_settings(path: str | Path, out: str | Path, **changes: Any) -> None:
    """Write a copy of a weights file with some settings changed; its tensors stay as they are."""
    load(path)                                                # says what is wrong with it
    content = _read_weights(path)
    content["settings"] = {**content["settings"], **changes}
    runs.save_torch(content, out)


# --------------------------------------------------------------------------------- weights: reading

def load(path: str | Path) -> DINOCell:
    """A network written by save(), in float32, on the CPU, ready for inference."""
    content = _read_weights(path)
    if not _is_our_weights_file(content) or content["kind"] != "DINOCell":
        what = {"ViT": "a backbone without decoder (model.load_backbone reads it)",
                "Instructed": "weights that answer instructions (instruct.py ask reads them)"}
        raise ValueError(f"{path}: {what.get(str(content.get('kind')), 'no DINOCell file')}; "
                         f"expected weights exported by train_seg.py")
    shape, settings = content["architecture"], weights_settings(content, path)
    with building_network(path), torch.device("meta"):
        net = DINOCell(built_backbone(shape["backbone"], content["state_dict"]),
                       tuple(shape["widths"]), shape["last"], settings, shape["stem"])
        if shape.get("size") == "cells":
            net.add_size_head()
        if names := shape.get("types"):
            width = content["state_dict"]["types.weight"].shape[1]
            if width not in (net.backbone.dim, net.backbone.dim + len(OUTLINE)):
                raise ValueError(f"a type head that reads {width} numbers")
            net.set_types(nn.Linear(width, len(names)), names)
    fill_network(net, content["state_dict"], path)
    net.origin = Path(path)
    return net.eval()


def _is_our_weights_file(content: dict) -> bool:
    return content.get("format") in (FORMAT, OLD_FORMAT)


def weights_settings(content: dict, path: str | Path) -> Settings:
    """Settings of a weights file; one that OLD_FORMAT alone had is passed over."""
    given = dict(content["settings"])
    if content["format"] == OLD_FORMAT:
        given.pop("pixel_size", None)
    if surplus := given.keys() - {f.name for f in fields(Settings)}:
        raise ValueError(f"{path}: unknown settings {sorted(surplus, key=str)}; the file is newer "
                         "than this code: update it")
    return runs.from_dict(Settings, given, str(path))


@contextlib.contextmanager
def building_network(path: str | Path) -> Iterator[None]:
    """Report an architecture that cannot be built."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError,
            AssertionError, MemoryError) as error:
        raise ValueError(f"{path}: damaged weights, their architecture cannot be built "
                         f"({type(error).__name__}: {error})") from None


def built_backbone(shape: dict, tensors: dict) -> ViT | ConvNet:
    """An untrained backbone of a file's architecture; tensors : the file's, which bound it."""
    shape = dict(shape)
    if shape["depth"] > len(tensors):
        raise ValueError(f"{shape['depth']} blocks and {len(tensors)} tensors")
    return {"ViT": ViT, "ConvNet": ConvNet}[shape.pop("kind", "ViT")](**shape)


def load_backbone(path: str | Path, patch: int = 8) -> ViT:
    """Backbone of DINOv3's official file, its training checkpoint, the Hugging Face file, or ours.

    A kernel of larger patches goes through shrink_patch. Hugging Face's file says nothing of heads
    and wavelengths: config.json beside it does.
    """
    content = _read_weights(path)
    if _is_our_weights_file(content):
        tensors = content["state_dict"]
        if content["kind"] == "DINOCell":
            tensors = {k[9:]: v for k, v in tensors.items() if k.startswith("backbone.")}
    else:
        tensors = _from_dinov3(content, path)
    kernel = tensors.get("patch_embed.weight")
    depth = 1 + max((int(k.split(".")[1]) for k in tensors if k.startswith("blocks.")), default=-1)
    if kernel is None or depth == 0 or "register_tokens" not in tensors:
        raise ValueError(f"{path}: no vision transformer with registers in it (its first keys: "
                         f"{runs.listed(sorted(map(str, content)))}); expected a DINOv3 "
                         "checkpoint or a file of this project")
    dim = kernel.shape[0]
    if "periods" not in tensors:
        tensors["periods"] = _periods_beside(Path(path), dim)
    vit = ViT(dim, depth, dim // (4 * len(tensors["periods"])), patch,
              len(tensors["register_tokens"]))
    if kernel.shape[-1] != patch:
        tensors["patch_embed.weight"] = shrink_patch(kernel.float(), patch)
    fill_network(vit, tensors, path)
    return vit


def _periods_beside(path: Path, dim: int) -> Tensor:
    """Wavelengths by the config.json beside a Hugging Face file; what ViT cannot be is an error."""
    beside = path.with_name("config.json")
    if not beside.is_file():
        print(f"{path}: no config.json beside it; heads of 64 and rope_theta=100 are assumed, as "
              "published DINOv3 files have them", file=sys.stderr)
        return rope_periods(64)
    try:
        config = json.loads(beside.read_text(encoding="utf-8"))
        heads = int(config["num_attention_heads"])
        theta = float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{beside}: not the configuration of a vision transformer ({error}); "
                         "expected the one that was published with the weights") from None
    wanted = dict(hidden_size=dim, hidden_act="gelu", layer_norm_eps=1e-5, use_gated_mlp=False)
    wrong = [f"{name}={config[name]} instead of {value}" for name, value in wanted.items()
             if config.get(name, value) != value]
    if wrong or heads < 1 or dim % heads:
        wrong = wrong or [f"num_attention_heads={heads} for hidden_size={dim}"]
        raise ValueError(f"{beside}: {', '.join(wrong)}; expected a network as DINOv3's ViT-S to "
                         "ViT-L, for another one would load with wrong features")
    return rope_periods(dim // heads, theta)


def shrink_patch(kernel: Tensor, patch: int) -> Tensor:
    """Kernel (D, 3, P, P) -> (D, 3, p, p), p < P: it answers as the old one on enlarged patches.

    With U the matrix of the (bicubic) enlargement of one patch, <x, U'w> = <Ux, w>: the transpose
    does it exactly. Resizing the kernel instead is off by a factor of about four in gain.
    """
    old = kernel.shape[-1]
    if patch > old:
        raise ValueError(f"patch={patch}: the checkpoint has patches of {old} px and can only be "
                         f"turned into smaller ones")
    unit = torch.eye(patch * patch).view(-1, 1, patch, patch)
    # (p*p, P*P), row i: pixel i enlarged
    U = F.interpolate(unit, size=(old, old), mode="bicubic").flatten(1)
    return (kernel.flatten(2) @ U.T).unflatten(2, (patch, patch))


def read_safetensors(path: str | Path) -> dict[str, Tensor]:
    """Tensors of a file: 8 bytes of length, a JSON header, raw little-endian numbers."""
    raw = Path(path).read_bytes()
    try:
        size = struct.unpack("<Q", raw[:8])[0]
        header = json.loads(raw[8:8 + size])
        body = memoryview(bytearray(raw[8 + size:]))
        return {name: _tensor_of(body, tensor) for name, tensor in header.items()
                if name != "__metadata__"}
    except (struct.error, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a whole .safetensors file ({error}); download it again"
                         ) from None


SAFETENSORS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
               "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
               "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
               "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
               "BOOL": torch.bool}


def _tensor_of(body: memoryview, entry: dict) -> Tensor:
    """A tensor of a .safetensors file by its entry in the header."""
    if entry["dtype"] not in SAFETENSORS:
        raise ValueError(f"numbers of type {entry['dtype']}, which is none of "
                         f"{', '.join(SAFETENSORS)}")
    start, end = entry["data_offsets"]
    dtype, shape = SAFETENSORS[entry["dtype"]], entry["shape"]
    if end - start != dtype.itemsize * math.prod(shape) or not 0 <= start <= end <= len(body):
        raise ValueError(f"{shape} {entry['dtype']} in bytes {start} to {end} of {len(body)}")
    if start == end:                                           # frombuffer takes no empty buffer
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(body[start:end], dtype=dtype).view(shape)


def _read_weights(path: str | Path) -> dict:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no weights at {path}; train with train_seg.py or pass "
                                "weights=FILE")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    content = runs.load_torch(path)
    parts = {"kind": str, "architecture": dict, "settings": dict, "state_dict": dict}
    if _is_our_weights_file(content) and (wrong := [name for name, kind in parts.items()
                                                    if not isinstance(content.get(name), kind)]):
        raise ValueError(f"{path}: damaged weights, no {' and no '.join(wrong)} in them; export "
                         "them again")
    return content


def find_weights(name: str) -> Path:
    """A file of weights by its path, or by its name in final_models/: tiny, dinocell_tiny; default:
    the best that is there."""
    folder = Path(__file__).resolve().parent / "final_models"
    if name == "default":
        choices = [folder / f"{f}.pt" for f in ("dinocell_s8", "dinocell_tiny", "demo_synthetic")]
    elif name.endswith(".pt") or "/" in name or Path(name).is_file():
        choices = [Path(name)]
    else:
        choices = [folder / f"{name}.pt", folder / f"dinocell_{name}.pt"]
    for path in choices:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no weights at {choices[0]}; train with train_seg.py or pass "
                            "weights=FILE")


def licence_of(path: str | Path | None) -> str:
    """Licence of a file of weights, as SPDX names it, and of what begins with it; None: from
    scratch."""
    if path is None:
        return "MIT"
    content = _read_weights(path)
    ours = _is_our_weights_file(content)
    return content["settings"].get("licence", "MIT") if ours else "LicenseRef-DINOv3"


def kind(path: str | Path) -> str:
    """Kind of network in a file of weights: "DINOCell" (with decoder), "ViT" or "Instructed"."""
    content = _read_weights(path)
    return content["kind"] if _is_our_weights_file(content) else "ViT"


def has_bf16(device: str) -> bool:
    """Tell whether the hardware computes in bfloat16 itself; elsewhere it is only slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device == "cpu" and getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()


def has_amx() -> bool:
    """Tell whether this processor has units for products of matrices."""
    return getattr(torch.cpu, "_is_amx_tile_supported", bool)()


DINOV3_NAMES = [                    # official or Hugging Face's name -> ours, in this order
    (r"^(model\.)?layer\.", "blocks."),
    (r"(embeddings\.patch_embeddings|patch_embed\.proj)\.", "patch_embed."),
    (r"embeddings\.", ""),
    (r"storage_tokens", "register_tokens"),
    (r"rope_embed\.periods", "periods"),
    (r"(layer_scale|ls)([12])\.(lambda1|gamma)", r"scale\2"),
    (r"mlp\.up_proj", "fc1"),
    (r"mlp\.down_proj", "fc2"),
    (r"mlp\.", ""),
    (r"attention\.o_proj", "attn.proj"),
    (r"attention\.([qv])_proj\.bias", r"attn.\1_bias"),
]


def _from_dinov3(content: dict, path: str | Path) -> dict[str, Tensor]:
    """Rename official or Hugging Face tensors; fill_network() names others."""
    if isinstance(content.get("teacher"), dict):     # a training checkpoint: heads are not ours
        content = {str(k).removeprefix("backbone."): v for k, v in content["teacher"].items()
                   if str(k).startswith("backbone.")}
    ours = {}
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            continue                             # then something is missing, and that is said
        for old, new in DINOV3_NAMES:
            name = re.sub(old, new, name)
        ours[name] = tensor
    for name in ("cls_token", "mask_token", "register_tokens"):  # (1, 1, D), (1, D), (1, R, D)
        if name in ours:
            dim = ours[name].shape[-1]
            ours[name] = ours[name].reshape((-1, dim) if name == "register_tokens" else dim)
    for name in [n for n in ours if n.endswith("attn.qkv.bias")]:
        stem = name.removesuffix("qkv.bias")
        ours[stem + "q_bias"], key, ours[stem + "v_bias"] = ours.pop(name).chunk(3)
        mask = ours.pop(name + "_mask", None)   # 1 for q and v, 0 for k; NaN where never filled
        if mask is None or (mask.chunk(3)[1] > 0).any():
            _refuse_key_bias(key, name, path)
    for name in [n for n in ours if n.endswith("attention.k_proj.bias")]:
        _refuse_key_bias(ours.pop(name), name, path)
    for name in [n for n in ours if n.endswith("attention.q_proj.weight")]:
        stem = name.removesuffix("q_proj.weight")
        parts = [stem + f"{letter}_proj.weight" for letter in "qkv"]
        if any(part not in ours for part in parts):
            raise ValueError(f"{path}: {stem}k_proj.weight or v_proj.weight is missing beside "
                             f"{name}")
        ours[stem.replace("attention.", "attn.qkv.weight")] = torch.cat(list(map(ours.pop, parts)))
    return ours


def _refuse_key_bias(bias: Tensor, name: str, path: str | Path) -> None:
    if bias.any():                                   # with RoPE softmax does see it
        raise ValueError(f"{path}: {name} has a bias on keys, which DINOv3 masks and this network "
                         "has not; its features would be wrong: give a checkpoint of DINOv3")


def fill_network(module: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put copies of a file's tensors into a network, float16 ones as float32, if they fit."""
    if strange := [k for k, v in tensors.items() if not (
            isinstance(v, Tensor) and v.dtype in SAFETENSORS.values()      # not complex, not packed
            and v.layout == torch.strided and v.device.type != "meta")]:
        raise ValueError(f"{path}: damaged weights, {runs.listed(sorted(map(str, strange)))} no "
                         "tensors of plain numbers")
    wanted = module.state_dict()
    missing, surplus = wanted.keys() - tensors.keys(), tensors.keys() - wanted.keys()
    wrong = [f"{k} {tuple(tensors[k].shape)} instead of {tuple(v.shape)}" for k, v in wanted.items()
             if k in tensors and tensors[k].shape != v.shape]
    problems = [f"{what}: {runs.listed(sorted(map(str, names)))}" for what, names in
                (("missing", missing), ("surplus", surplus), ("wrong shape", wrong)) if names]
    if problems:
        raise ValueError(f"{path}: does not fit the network; " + "; ".join(problems))
    layout = torch.contiguous_format
    module.load_state_dict({k: v.to(torch.float32, copy=True, memory_format=layout)
                            for k, v in tensors.items()}, assign=True)


# --------------------------------------------------------------------------------------------- ONNX

EXACT, HALF = 1e-4, 1e-2  # largest difference from PyTorch that passes, of distances in [0, 1]


def to_onnx(net: DINOCell, path: str | Path, tile: int | None = None, opset: int = 18,
            half: bool = False) -> float | None:
    """Write the network as one ONNX file; the largest difference from PyTorch, or None without
    onnxruntime.

    image     (batch, 3, tile, tile) float32 in [0, 1], of images.normalise and images.to_rgb
    distance  (batch, 1, tile, tile) float32 in [0, 1], for watershed.watershed

    Subtracting the mean is part of the network; tiling, blending and the watershed are not
    (segment.py). Their settings are JSON in the file's metadata under "dinocell".
    """
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{path}: export needs {' and '.join(missing)}; pip install onnx "
                         f"onnxscript onnxruntime")
    import onnx
    net = copy.deepcopy(net).cpu().float().eval()
    tile, patch = tile or net.settings.tile, net.backbone.patch
    if tile < 1 or tile % patch:
        raise ValueError(f"tile={tile}: expected a multiple of the patch, {patch} px")
    whole = copy.deepcopy(net)
    if half:
        whole.half()
        if isinstance(net.backbone, ViT):                      # angles multiply errors
            whole.backbone.periods = net.backbone.periods.clone()
    images = torch.rand(3, 3, tile, tile, generator=torch.Generator().manual_seed(0))
    with runs.replacing(path) as temporary, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch's, about its own insides
        logging.getLogger("torch.onnx").setLevel(logging.ERROR)
        program = torch.onnx.export(whole, (images,), None, input_names=["image"],
                                    output_names=["distance"], opset_version=opset, dynamo=True,
                                    dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False)
        assert program is not None
        proto = program.model_proto
        onnx.helper.set_model_props(proto,
                                    {"dinocell": json.dumps(asdict(net.settings) | {"tile": tile})})
        onnx.checker.check_model(proto)
        temporary.write_bytes(proto.SerializeToString())
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        import onnxruntime
        session = onnxruntime.InferenceSession(temporary, providers=["CPUExecutionProvider"])
        with torch.inference_mode():
            expected = net(images).numpy()
        error = max(abs(session.run(None, {"image": images[:n].numpy()})[0] - expected[:n]).max()
                    for n in (1, 3))
        limit = HALF if half else EXACT
        if not error <= limit:
            raise ValueError(f"{path}: differs from PyTorch by {error:.1e}, expected {limit:.0e} "
                             f"at most; not written, try another opset= or half=false")
        return float(error)


# -------------------------------------------------------------------------------------------- table

def cost(net: DINOCell, size: int) -> list[tuple[str, int, float]]:
    """Rows (part, parameters, FLOPs of an image of size²); a multiply-add is two FLOPs."""
    from torch.utils.flop_counter import FlopCounterMode
    backbone, decoder = net.backbone, net.decoder
    last = [decoder.narrow, decoder.refine] if decoder.grain == 1 else []
    parts: dict[str, Iterable[nn.Module]] = {
        "backbone: patch embedding": [backbone.patch_embed],
        f"backbone: {backbone.depth} blocks": backbone.blocks,
        "decoder: skips": [*decoder.norms, *decoder.skips],
        "decoder: transposed convolutions": decoder.ups,
        "decoder: stages": decoder.stages,
        "decoder: last stage, stem, head": [*last, *decoder.stem, decoder.head]}
    ghost = copy.deepcopy(net).to("meta")  # shapes only: any size in no time
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        ghost(torch.empty(1, 3, size, size, device="meta"))
    flops = counter.get_flop_counts()
    work = {module: float(sum(flops.get(f"DINOCell.{name}", {}).values()))
            for name, module in net.named_modules()}
    rows = [(label, sum(p.numel() for m in modules for p in m.parameters()),
             sum((work[m] for m in modules), 0.0)) for label, modules in parts.items()]
    total = sum(p.numel() for p in net.parameters())
    heads = sum(p.numel() for head in (net.size, net.types) if head for p in head.parameters())
    rows.insert(2, ("backbone: class, register tokens, norm",
                    total - heads - sum(row[1] for row in rows), 0.0))
    if heads:
        rows.append(("heads: size, types", heads, 0.0))
    return rows


@dataclass(frozen=True)
class Config:
    size: runs.Count = 224          # px, side of the image
    weights: str | None = None      # file; null: the default network, untrained


def main(config: Config, files: list[str]) -> None:
    if files:
        raise ValueError(f"{files[0]}: model.py takes key=value alone; --help lists the keys")
    net = load(config.weights) if config.weights else DINOCell().eval()
    size, patch = config.size, net.backbone.patch
    if size % patch:
        raise ValueError(f"size={size}: expected a multiple of the patch, {patch} px")
    rows = cost(net, size)
    parameters, flops = sum(row[1] for row in rows), sum(row[2] for row in rows)
    print(f"{'part':40}{'parameters':>12}{f'GFLOPs at {size} px':>20}{'share':>8}")
    for label, count, work in [*rows, ("total", parameters, flops)]:
        print(f"{label:40}{count:12,d}{work / 1e9:20.2f}{work / flops:8.1%}")
    x = torch.rand(1, 3, size, size)
    with torch.inference_mode():
        net(x)
        start = time.perf_counter()
        y = net(x)
    print(f"forward {tuple(x.shape)} -> {tuple(y.shape)} in {time.perf_counter() - start:.3f} s on "
          f"the CPU, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
