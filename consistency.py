"""Does a backbone see the same field in each of its channels? Features, where it looks, and pictures of both.

    seen = look(vit, field)                       # field (C, H, W) in [0, 1], each channel shown by itself
    seen.cls, seen.attention                      # (C, D), (C, heads, h, w)
    found = compare(features, maps)               # of all fields: seen.feature("cls"), seen.attention.mean(1)
    found.numbers()  # consistency, control, margin, retrieval; the same of attention
    write_pictures(folder, names, fields, attentions, colours, channels)  # attention.png, pca.png, heads.png

Fields come from alike(field_files(folder, size)) or synthetic_fields(16, size), or from anywhere.
It leaves the network as it was, compiled or in training: what it shows is the network at rest, run plainly.
"""
from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import data
import measure
import metrics
import model
import cells
import report
import synthetic

STACKS = (".tif", ".tiff", ".npy")                    # files with several channels
Feature = Literal["cls", "patches"]                   # the class token, or the mean of the patch tokens


class Look(NamedTuple):
    """What the backbone makes of each channel of a field."""
    cls: np.ndarray                                   # (C, D)
    patches: np.ndarray                               # (C, N, D)
    attention: np.ndarray                             # (C, heads, h, w), see with_attention

    def feature(self, which: Feature) -> np.ndarray:  # (C, D)
        return self.cls if which == "cls" else self.patches.mean(1)

    def colours(self) -> np.ndarray:                  # (C, h, w, 3) uint8
        return components(self.patches, self.attention.shape[2])


@torch.inference_mode()
def look(vit: model.ViT, field: np.ndarray | Tensor) -> Look:
    """Each channel of a field (C, H, W) in [0, 1] by itself, thrice as red, green and blue."""
    device, given = vit.cls_token.device, model.Settings()
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (given.mean, given.std))
    x = torch.as_tensor(field, dtype=torch.float32, device=device)[:, None].expand(-1, 3, -1, -1)
    tokens, attention = with_attention(vit, (x - mean) / std)                        # (C, 3, H, W)
    return Look(*(part.float().cpu().numpy() for part in (tokens.cls, tokens.patches, attention)))


def with_attention(vit: model.ViT, x: Tensor) -> tuple[model.Tokens, Tensor]:
    """The backbone's tokens, and how the last class token shares its attention among patches
    (B, heads, h, w).

    What goes to the class and register tokens themselves is left out, so that a map sums to less than 1.
    """
    inputs, attention, training = [], vit.blocks[-1].attn, vit.training
    hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given))
    vit.eval()
    try:
        # Compiled code would pass the hook by. Dynamo takes seconds to import; who has not, compiled nothing.
        compiled = "torch._dynamo" in sys.modules
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            tokens = vit(x)
    finally:
        hook.remove()
        vit.train(training)
    (y, rope, _), = inputs                                             # (B, T, D)
    B, T, D = y.shape
    q, k = ((y @ part.mT).view(B, T, attention.heads, -1)
            for part in attention.qkv.weight[:2 * D].split(D))      # (B, T, heads, head)
    q = q + attention.q_bias.view(attention.heads, -1)              # keys have no bias
    q, k = (model.rotate(part, *rope).transpose(1, 2) for part in (q, k))
    logits = q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])
    share = logits.float().softmax(3)[:, :, 0, 1 + vit.registers:]  # (B, heads, N)
    return tokens, share.unflatten(2, (x.shape[2] // vit.patch, -1))


# ------------------------------------------------------------------------------------------------- comparison

class Comparison(NamedTuple):
    features: metrics.ChannelConsistency
    attention: metrics.ChannelConsistency             # its cosines are Pearson's correlations of maps

    def numbers(self) -> dict[str, float]:
        one, other = self.features, self.attention
        return {"consistency": one.consistency, "control": one.control, "margin": one.margin,
                "retrieval": one.retrieval, "attention": other.consistency,
                "attention_control": other.control, "attention_margin": other.margin}


def compare(features: Sequence[np.ndarray], maps: Sequence[np.ndarray]) -> Comparison:
    """Of F fields: features (C, D) and attention maps (C, h, w) of each, in the same channels."""
    flat = np.reshape(maps, (*np.shape(maps)[:2], -1)).astype(float)                 # (F, C, N)
    return Comparison(metrics.channel_consistency(features),
                      metrics.channel_consistency(flat - flat.mean(2, keepdims=True)))


def agreement(maps: np.ndarray) -> float:
    """Mean correlation between the attention maps (C, h, w) of a field, over pairs of channels."""
    correlations = np.corrcoef(np.reshape(maps, (len(maps), -1)))                    # (C, C)
    return float(correlations[np.triu_indices(len(maps), 1)].mean())


# --------------------------------------------------------------------------------------------------- pictures

def components(patches: np.ndarray, h: int) -> np.ndarray:
    """Patch tokens (C, N, D) as colours (C, h, w, 3) uint8: their first three principal components.

    One basis for all channels of a field, so that the same colour in two of them is the same feature.
    """
    C, N, D = patches.shape
    x = patches.reshape(-1, D).astype(float)
    x = x - x.mean(0)
    basis = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :3]                               # (D, 3)
    basis *= np.sign(basis[abs(basis).argmax(0), np.arange(basis.shape[1])])        # an arbitrary sign, fixed
    y = x @ basis                                                                    # (C N, 3)
    low, high = np.percentile(y, (1, 99), axis=0)
    y = ((y - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return (255 * y).astype(np.uint8).reshape(C, h, -1, 3)


def write_pictures(folder: Path, names: Sequence[str], fields: Sequence[np.ndarray],
                   attentions: Sequence[np.ndarray], colours: Sequence[np.ndarray], channels: Sequence[str]
                   ) -> list[Path]:
    """Of a few fields (C, H, W): attention.png and pca.png of all, heads.png of the first.

    attentions, colours : Look.attention and Look.colours() of each.
    """
    shots = [[cells.displayed(channel[None]) for channel in field] for field in fields]
    seen, painted, titles, titled = [], [], [], []
    for name, shot, heads, pixels in zip(names, shots, attentions, colours):
        maps = heads.mean(1)                                                         # (C, h, w)
        seen += [shot, [report.heat(one) for one in maps]]
        titles += [name, f"attention, r {round(agreement(maps), 2) + 0.0:.2f}"]
        painted += [shot, list(pixels.astype(np.uint8))]
        titled += [name, "components"]
    report.mosaic(folder / "attention.png", seen, titles, channels)
    report.mosaic(folder / "pca.png", painted, titled, channels)
    heads = [[shot, *map(report.heat, one)] for shot, one in zip(shots[0], attentions[0])]
    report.mosaic(folder / "heads.png", heads, channels,
                  [names[0], *(f"head {k + 1}" for k in range(len(heads[0]) - 1))])
    return [folder / f"{name}.png" for name in ("attention", "pca", "heads")]


# ----------------------------------------------------------------------------------------------------- fields

Field = tuple[str, list[str], np.ndarray]             # name, names of its channels, pixels (C, H, W)


def alike(fields: Iterable[Field]) -> Iterator[Field]:
    """The same fields, while all have the same channels and each channel shows something."""
    first, count = None, 0
    for count, (name, channels, pixels) in enumerate(fields, 1):
        first = first or channels
        if channels != first:
            raise ValueError(f"{name}: channels {', '.join(channels)}, the fields before have "
                             f"{', '.join(first)}; choose the same of all with channels=")
        flat = np.ptp(pixels, axis=(1, 2)) == 0
        if flat.any():
            raise ValueError(f"{name}: channel {channels[flat.argmax()]} is {pixels[flat.argmax()][0, 0]} in "
                             "every pixel seen, which nothing can be told from; leave it or the field out")
        yield name, channels, pixels
    if count < 2:
        raise ValueError(f"{count} field with several channels, expected two or more to compare")


def field_files(folder: Path, size: int, channels: Sequence[str] | None = None, limit: int | None = None
                ) -> Iterator[Field]:
    """The square of size x size px in the middle of each image below a folder."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in STACKS)
    if not files:
        raise FileNotFoundError(f"{folder}: no such folder, or no TIFF or .npy in it; expected images with "
                                "several channels")
    for path in measure.progress(files[:limit], folder.name):
        pixels, names, _ = data.read_image(path, channels)
        C, H, W = pixels.shape
        if C < 2 or min(H, W) < size:
            raise ValueError(f"{path}: {C} x {H} x {W} (channels, rows, columns); expected two channels or "
                             f"more of at least size={size} px")
        top, left = (H - size) // 2, (W - size) // 2
        names = list(names or map(str, channels or range(1, C + 1)))
        name = path.relative_to(folder).with_suffix("").as_posix()
        yield name, names, pixels[:, top:top + size, left:left + size]


def synthetic_fields(count: int, size: int, channels: Sequence[str] | None = None, seed: int = 0
                     ) -> Iterator[Field]:
    """Fields of synthetic.py, with all of its channels or some."""
    known = [name.lower() for name in synthetic.CHANNELS]
    wanted = [name.lower() for name in channels or known]
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"channels: '{unknown[0]}', expected some of {', '.join(synthetic.CHANNELS)}")
    indices = [known.index(name) for name in wanted]
    for number in measure.progress(range(count), "synthetic fields"):
        drawn = synthetic.field(seed + number, size, max(2, size**2 // 4000))
        yield f"field {number}", [synthetic.CHANNELS[i] for i in indices], drawn.pixels[indices]
