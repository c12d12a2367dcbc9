"""Is a backbone good? Told without labels, from the channels of fields that it never saw.

    look = look_at_field(vit, field)                    # field (C, H, W) in [0, 1]
    compare_backbones(features, maps)                   # of all fields: consistency, retrieval, ...
    write_probe_pictures(folder, names, fields, looks, channels)

    windows = cut_probe_windows(fields, window=224, count=256, channels)
    numbers, looks = measure_backbone(vit, windows, size=224)
    metadata_leaks(vit, windows, size=224)              # retrieval from the background alone
    train_probe(vit, train, validation, steps=200)      # AP of a decoder on the frozen backbone

    python probe.py runs/a runs/b ...                   table of what runs logged, first and last
    python evaluate.py channels configs/channels.yaml   one backbone on a folder of fields

Retrieval: of all windows, is the one whose feature in channel j is nearest to this window's in
channel i the same window? Chance is 1 / windows. It means little if anything but cells ties the
channels of a field together (light, dirt, exposure), so that the background alone, cells masked
out, is measured beside it. The backbone is shown at rest, uncompiled, and left as it was.

Letters: F fields or windows, C channels, D width, N patch tokens in a grid h x w, S side in px.
"""
from __future__ import annotations

import contextlib
import copy
import itertools
import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

import runs
from runs import Count, Whole

with runs.lazy():
    import scipy
    import skimage
    import torch

    import augment
    import cells
    import data
    import fields
    import images
    import metrics
    import model
    import optim
    import report
    import segment
    import ssl_
    import synthetic
    import watershed


AtLeastTwo = Annotated[int, runs.at_least(2)]


# ---------------------------------------------------------------------------------------- one field

class Look(NamedTuple):
    """Features of each channel of a field, shown by itself."""
    cls: np.ndarray                     # (C, D) class tokens
    patches: np.ndarray                 # (C, N, D)
    attention: np.ndarray               # (C, heads, h, w), see backbone_attention


def look_at_field(vit, field) -> Look:
    """Show a field (C, H, W) in [0, 1], array or tensor, channel by channel."""
    with torch.inference_mode():
        x = torch.as_tensor(field, dtype=torch.float32, device=vit.cls_token.device)[:, None]
        tokens, attention = backbone_attention(vit, ssl_.standardise_views(x))
        parts = (tokens.cls, tokens.patches, attention)
        return Look(*(part.float().cpu().numpy() for part in parts))


def backbone_attention(vit, x):
    """Tokens, and the attention of the last class token to patches: (B, heads, h, w).

    The share of class and register tokens is left out: a map sums to less than 1.
    """
    inputs, attention, training = [], vit.blocks[-1].attn, vit.training
    hook = attention.register_forward_pre_hook(lambda module, given: inputs.append(given))
    vit.eval()
    # Compiled code skips the hook; without dynamo, seconds to import, nothing is compiled.
    compiled = "torch._dynamo" in sys.modules
    plainly = torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()
    try:
        with plainly:
            tokens = vit(x)
    finally:
        hook.remove()
        vit.train(training)
    (y, rope, _), = inputs                                              # (B, T, D)
    B, T, D = y.shape
    q, k = ((y @ part.mT).view(B, T, attention.heads, -1)               # (B, T, heads, head)
            for part in attention.qkv.weight[:2 * D].split(D))
    q = q + attention.q_bias.view(attention.heads, -1)                  # keys have no bias
    q, k = (model.rotate_by_rope(part, *rope).transpose(1, 2) for part in (q, k))
    logits = q[:, :, :1] @ k.mT / math.sqrt(q.shape[3])
    share = logits.float().softmax(3)[:, :, 0, 1 + vit.registers:]      # (B, heads, N)
    return tokens, share.unflatten(2, (x.shape[2] // vit.patch, -1))


def token_colours(patches: np.ndarray, h: int) -> np.ndarray:
    """Patch tokens (C, N, D) as colours (C, h, w, 3) uint8: their first three principal components.

    All channels share one basis: the same colour in two of them is the same feature.
    """
    x = patches.reshape(-1, patches.shape[2]).astype(float)
    x = x - x.mean(0)
    basis = np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :3]                  # (D, 3)
    basis *= np.sign(basis[abs(basis).argmax(0), np.arange(basis.shape[1])])    # a sign, fixed
    y = x @ basis                                                       # (C N, 3)
    low, high = np.percentile(y, (1, 99), axis=0)
    y = ((y - low) / np.maximum(high - low, 1e-12)).clip(0, 1)
    return (255 * y).astype(np.uint8).reshape(len(patches), h, -1, 3)


# -------------------------------------------------------------------------- channels of many fields

class ChannelConsistency(NamedTuple):
    consistency: float                  # mean cosine between two channels of the same field
    control: float                      # mean cosine between two channels of different fields
    margin: float                       # consistency - control
    retrieval: float                    # share of channel i's that find their field's channel j
    retrieval_matrix: np.ndarray        # (C, C) the same for query channel i, searched channel j
    cosine_matrix: np.ndarray           # (C, C) mean cosine of channels i and j of a field


def channel_consistency(features) -> ChannelConsistency:
    """Compare features (F, C, D) of F fields in C channels each: are those of a field alike?

    Means over the pairs of different channels. A collapsed network has consistency 1, but control
    1, too. A tie with another field is no hit.
    """
    x = np.asarray(features, float)
    if x.ndim != 3 or min(x.shape[:2]) < 2:
        raise ValueError(f"features have shape {x.shape}, expected (fields, channels, width) with "
                         "2 or more fields and channels")
    norm = np.linalg.norm(x, axis=2, keepdims=True)
    if not (np.isfinite(norm).all() and norm.all()):
        raise ValueError("features hold a vector that is zero or not finite: it has no direction")
    x = x / norm
    F, C, _ = x.shape
    same = (x @ x.transpose(0, 2, 1)).sum(0)                            # (C, C) over the fields
    across = x.sum(0) @ x.sum(0).T - same                               # over pairs of fields
    retrieval = np.zeros((C, C))
    for i, j in np.ndindex(C, C):
        cosine = x[:, i] @ x[:, j].T                                    # (F, F) query, searched
        own = cosine.diagonal().copy()
        np.fill_diagonal(cosine, -2)                                    # below any cosine
        retrieval[i, j] = (own > cosine.max(1) + 1e-12).mean()          # rounding is no hit
    pairs = ~np.eye(C, dtype=bool)
    consistency, control = same[pairs].mean() / F, across[pairs].mean() / (F * (F - 1))
    return ChannelConsistency(float(consistency), float(control), float(consistency - control),
                              float(retrieval[pairs].mean()), retrieval, same / F)


def compare_backbones(features: Sequence[np.ndarray], maps: Sequence[np.ndarray]
                      ) -> tuple[dict[str, float], ChannelConsistency, ChannelConsistency]:
    """Compare F fields by features (C, D) and attention maps (C, h, w): numbers, details of both.

    Maps are compared by Pearson's correlation, whatever their brightness.
    """
    flat = np.reshape(maps, (*np.shape(maps)[:2], -1)).astype(float)    # (F, C, N)
    found = channel_consistency(features)
    seen = channel_consistency(flat - flat.mean(2, keepdims=True))
    return {"consistency": found.consistency, "control": found.control, "margin": found.margin,
            "retrieval": found.retrieval, "attention": seen.consistency,
            "attention_control": seen.control, "attention_margin": seen.margin}, found, seen


def stain_agreement(maps: np.ndarray) -> float:
    """Mean correlation between the attention maps (C, h, w) of a field, over pairs of channels."""
    correlations = np.corrcoef(np.reshape(maps, (len(maps), -1)))       # (C, C)
    return float(correlations[np.triu_indices(len(maps), 1)].mean()) if len(maps) > 1 else 1.0


def attention_entropy(maps: np.ndarray) -> float:
    """Entropy of attention maps (..., h, w), as a share of the largest: 1 looks everywhere."""
    p = maps.reshape(-1, maps.shape[-2] * maps.shape[-1])
    p = p / p.sum(1, keepdims=True)
    return float(scipy.special.entr(p).sum(1).mean() / math.log(p.shape[1]))


def write_probe_pictures(folder: Path, names: Sequence[str], fields: Sequence[np.ndarray],
                         looks: Sequence[Look], channels: Sequence[str]) -> list[Path]:
    """Draw a few fields (C, H, W): attention.png and pca.png of all, heads.png of the first."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in ("attention", "pca", "heads")]
    shots = [[cells.overlay_background(channel[None]) for channel in field] for field in fields]
    maps, colours, titles = [], [], []
    for name, shot, look in zip(names, shots, looks, strict=True):
        mean = look.attention.mean(1)                                   # (C, h, w)
        r = round(stain_agreement(mean), 2) + 0.0                             # never -0.00
        maps += [shot, list(map(report.heat_colours, mean))]
        colours += [shot, list(token_colours(look.patches, mean.shape[1]))]
        titles += [name, f"attention, r {r:.2f}"]
    report.mosaic(paths[0], maps, titles, channels)
    report.mosaic(paths[1], colours, [title for name in names for title in (name, "components")],
                  channels)
    heads = [[shot, *map(report.heat_colours, one)]
             for shot, one in zip(shots[0], looks[0].attention, strict=True)]
    titles = [names[0], *(f"head {k}" for k in range(1, len(heads[0])))]
    report.mosaic(paths[2], heads, channels, titles)
    return paths


# ---------------------------------------------------------------------- python evaluate.py channels

@dataclass(frozen=True)
class Channels:
    fields: str | None = None               # folder of images with channels; null: synthetic fields
    synthetic: AtLeastTwo = 16              # how many of those
    channels: tuple[str, ...] | None = None  # names or numbers from 1, two or more; null: all
    weights: str | None = None              # a backbone or a whole network; null: random, a control
    dim: Count = 384                        # width of random weights
    depth: Count = 12                       # their blocks
    heads: Count = 6                        # their attention heads
    patch: Count = 8                        # px
    experiment: runs.Name = "channels"      # name of the run
    output_base_dir: str = "."              # where runs/ is made
    feature: Literal["cls", "patches"] = "cls"  # the class token, or the mean of the patch tokens
    size: Count = 256                       # px, side of the square in the middle that is seen
    limit: AtLeastTwo | None = None         # only the first so many fields
    shown: Count = 4                        # fields in the pictures
    seed: Whole = 0                         # of synthetic fields and random weights
    device: runs.Device = "auto"            # auto: the GPU if there is one

    def __post_init__(self):
        if self.size % self.patch:
            raise ValueError(f"size={self.size}: expected a multiple of the patch, {self.patch} px")
        if self.channels is not None and len(self.channels) < 2:
            raise ValueError(f"channels={', '.join(self.channels)}: expected two or more")


def compare_channels(config: Channels) -> None:
    """Does a backbone see the same field in each of its channels? Features, and where it looks."""
    vit, features, maps = probe_backbone(config), [], []
    shown: list[tuple[str, np.ndarray, Look]] = []
    read = probe_synthetic_fields if config.fields is None else probe_field_files
    for name, known, pixels in read(config):
        channels = known                                                # of all fields
        look = look_at_field(vit, data.normalise(pixels, data.percentiles(pixels)))
        features.append(look.cls if config.feature == "cls" else look.patches.mean(1))   # (C, D)
        maps.append(look.attention.mean(1))                             # (C, h, w)
        if len(shown) < config.shown:
            shown.append((name, pixels, look))
    folder, (names, pictured, looks) = runs.run_folder(config), zip(*shown, strict=True)
    numbers, found, seen = compare_backbones(features, maps)
    chance = 1 / len(features)
    content = {"weights": config.weights or "random", "feature": config.feature,
               "fields": len(features), **numbers, "chance": chance}
    pictures = write_probe_pictures(folder, names, pictured, looks, channels)
    runs.write_text(folder / "channels.json",
                    json.dumps({**content, "channels": channels}, indent=1) + "\n")
    matrices = {
        "cosine": ("cosine of features", found.cosine_matrix),
        "retrieval": (f"retrieval of column by row (chance {chance:.2f})", found.retrieval_matrix),
        "attention": ("correlation of attention", seen.cosine_matrix)}
    for name, (_, matrix) in matrices.items():
        runs.write_table(folder / f"{name}.tsv", [
            {"channel": channel, **dict(zip(channels, map(float, line), strict=True))}
            for channel, line in zip(channels, matrix, strict=True)])
    report.matrix_chart(folder / "channels.png", dict(matrices.values()), channels)
    report.print_report_table([content], content)
    print(f"-> {', '.join(map(str, (folder / 'channels.png', *pictures)))}")


def probe_backbone(config: Channels):
    """The ViT of a file, or a random one."""
    if config.weights is not None:
        vit = model.load_backbone(config.weights, config.patch)
    else:
        torch.manual_seed(config.seed)
        shape = config.dim, config.depth, config.heads, config.patch
        vit = model.ViT(*shape, layerscale=1.0)                         # 1e-5: all blocks alike
    return vit.eval().to(runs.pick_device(config.device))


def probe_field_files(config) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Name, channels and the square in the middle of each image below the folder `fields`.

    Too few images, other channels than before or an empty channel are an error.
    """
    folder, size, channels = Path(config.fields), config.size, config.channels
    files = data.list_files(folder, data.TIFF + data.NPY) if folder.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{folder}: no such folder, or no TIFF or .npy in it")
    if len(files) == 1:
        raise ValueError("1 field with several channels, expected two or more to compare")
    before: list[str] | None = None
    for path in files[:config.limit]:
        pixels, known, _ = data.read_image(path, channels)
        C, H, W = pixels.shape
        if C < 2 or min(H, W) < size:
            raise ValueError(f"{path}: {C} x {H} x {W} (channels, rows, columns); expected two "
                             f"channels or more of at least size={size} px")
        top, left = (H - size) // 2, (W - size) // 2
        pixels = pixels[:, top:top + size, left:left + size]
        names = list(known or map(str, channels or range(1, C + 1)))
        name = path.relative_to(folder).with_suffix("").as_posix()
        if before not in (None, names):
            raise ValueError(f"{name}: channels {', '.join(names)}, the fields before have "
                             f"{', '.join(before or ())}; choose the same of all by channels=")
        for channel, image in zip(names, pixels, strict=True):
            if images.is_flat(images.percentiles(image[None])):
                raise ValueError(f"{name}: channel {channel} has no contrast in the pixels seen; "
                                 "leave it or the field out")
        before = names
        yield name, names, pixels


def probe_synthetic_fields(config: Channels) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Fields of synthetic.py, with all of its channels or some."""
    rows, size = fields.synthetic_channels(config.channels or ()), config.size
    for number in range(config.synthetic)[:config.limit]:
        drawn = synthetic.field(config.seed + number, size, max(2, size**2 // 4000))
        yield f"field {number}", [synthetic.CHANNELS[i] for i in rows], drawn.pixels[rows]


# --------------------------------------------------------------------------------- windows held out

@dataclass(frozen=True)
class Measure:
    """A section of train_ssl.py's configuration."""
    every: Count = 2000                     # steps between measurements; the first at step 0
    window: Count = 224                     # px of the field, shown at the size of global views
    windows: AtLeastTwo = 256               # of them; chance of retrieval is 1 / windows
    probe_every: Whole = 0                  # steps between decoders on the frozen backbone; 0: none
    probe_steps: Count = 200                # of such a training
    probe_images: AtLeastTwo = 16           # drawn fields for it, where there is no probe_data
    # labelled images for it, of which a share is held out in whole groups
    probe_data: data.TrainingData | None = None

    def __post_init__(self):
        if self.probe_every % self.every:
            raise ValueError(f"measure.probe_every={self.probe_every}: expected a multiple of "
                             f"measure.every={self.every}, since probes are part of a measurement")


class Windows(NamedTuple):
    """Parts of fields that no training sees."""
    names: list[str]
    pixels: np.ndarray                  # (F, C, w, w) uint16
    limits: np.ndarray                  # (F, C, 2) percentiles of the whole field
    labels: np.ndarray | None           # (F, w, w), where the truth is known
    channels: tuple[str, ...]


def probe_held_windows(config) -> Windows:
    """The windows held out by a configuration of train_ssl.py."""
    channels, held = fields.held_out_fields(config.data, config.seed)
    return cut_probe_windows(held, config.measure.window, config.measure.windows, channels)


def cut_probe_windows(fields: Iterable[tuple[str, np.ndarray, np.ndarray | None]], window: int,
                      count: int, channels: tuple[str, ...]) -> Windows:
    """Cut windows side by side: the first of each field, then the second, up to `count`."""
    by_field = []                                   # (name, pixels, limits, labels) of the windows
    for name, field, truth in fields:
        H, W = field.shape[1:]
        if min(H, W) < window:
            raise ValueError(f"{name}: {H} x {W} px, expected {window} px or more (measure.window)")
        limits, corners = data.percentiles(field), itertools.product(
            range(0, H - window + 1, window), range(0, W - window + 1, window))
        by_field.append([
            (f"{name} {y},{x}", field[:, y:y + window, x:x + window], limits,
             None if truth is None else truth[y:y + window, x:x + window]) for y, x in corners])
    turns = itertools.zip_longest(*by_field)
    chosen = [window for turn in turns for window in turn if window is not None][:count]
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} window of held-out fields, expected two or more; raise "
                         "data.held")
    names, pixels, limits, labels = zip(*chosen, strict=True)
    return Windows(list(names), np.stack(pixels), np.stack(limits).astype(np.float32),
                   None if labels[0] is None else np.stack(labels), channels)


def resampled_pairs(windows: Windows, size: int) -> np.ndarray:
    """Channels of windows as the network sees them: (F, C, S, S) in [0, 1]."""
    F, C, w, _ = windows.pixels.shape
    pixels = torch.from_numpy(windows.pixels.view(np.int16))
    limits, slots, one = torch.from_numpy(windows.limits), torch.arange(F), np.eye(C)
    middle, matrix = np.full((F, 2), w / 2), np.broadcast_to(np.eye(2) * w / size, (F, 2, 2))
    return torch.cat([ssl_.cut_view_crops(pixels, limits, slots, one[[c] * F], middle, matrix, size)
                      for c in range(C)], 1).numpy()


def tiles_without_cells(windows: Windows, size: int) -> np.ndarray:
    """resampled_pairs() without the cells and some px around them: (F, C, S, S) in [0, 1].

    The blurred background fills the gaps; a window without any becomes its mean.
    """
    assert windows.labels is not None
    w, blur = windows.pixels.shape[-1], dict(sigma=size / 16, truncate=20)
    at = ((np.arange(size) + 0.5) * w / size).astype(int)
    shown = resampled_pairs(windows, size)
    for field, truth in zip(shown, windows.labels, strict=True):
        distance = scipy.ndimage.distance_transform_edt(truth == 0)
        away = distance[np.ix_(at, at)] > 6                             # px: beyond the blur
        share = scipy.ndimage.gaussian_filter(away.astype(np.float32), **blur)
        for image in field:
            sums = scipy.ndimage.gaussian_filter(np.where(away, image, 0), **blur)
            level = image[away].mean() if away.any() else image.mean()
            image[:] = (sums + 1e-3 * level) / (share + 1e-3)
    return shown


def look_at_fields(vit, shown: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[Look]]:
    """Class tokens (F, C, D), attention maps (F, C, heads, h, w), and the first two looks."""
    vectors, maps, looks = [], [], []
    for number, field in enumerate(shown):
        look = look_at_field(vit, field)
        vectors.append(look.cls)
        maps.append(look.attention)
        if number < 2:                                                  # all would fill the memory
            looks.append(look)
    return np.stack(vectors), np.stack(maps), looks


def measure_backbone(vit, windows: Windows, size: int) -> tuple[dict[str, float], list[Look]]:
    """All numbers that need no labels, and looks of the first two windows."""
    vectors, maps, looks = look_at_fields(vit, resampled_pairs(windows, size))
    flat = torch.from_numpy(vectors).flatten(0, 1)                      # (F C, D)
    several = vectors.shape[1] > 1                                      # channels to compare
    return {**(compare_backbones(list(vectors), list(maps.mean(2)))[0] if several else {}),
            "feature_std": ssl_.student_feature_std(flat),
            "effective_rank": ssl_.student_effective_rank(flat),
            "attention_entropy": attention_entropy(maps)}, looks


def metadata_leaks(vit, windows: Windows, size: int) -> dict[str, float]:
    """Retrieval from the background alone, by the network and by pixels, where cells are known."""
    if windows.labels is None or len(windows.channels) < 2:
        return {}
    shown = tiles_without_cells(windows, size)
    pixels = shown[:, :, ::8, ::8].reshape(*shown.shape[:2], -1)
    pixels = pixels - pixels.mean(2, keepdims=True) + 1e-9              # a flat one has a direction
    return {"background_retrieval": channel_consistency(look_at_fields(vit, shown)[0]).retrieval,
            "background_pixels": channel_consistency(pixels).retrieval}


def train_probe(vit, train, validation: list, steps: int = 200, crop: int = 96, batch: int = 8,
                seed: int = 0) -> dict[str, float]:
    """AP and OP_CSB on validation images (data.Labelled) of a small decoder, trained for a minute.

    The backbone and the random state stay as they are. train : augment.Resident.
    """
    device, stages = vit.cls_token.device, int(math.log2(vit.patch))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = model.DINOCell(copy.deepcopy(vit).eval(), tuple(64 >> i for i in range(stages)), 16,
                             model.Settings(tile=crop)).to(device)
    net.backbone.requires_grad_(False)
    net.train()
    net.backbone.eval()
    optimiser = torch.optim.AdamW(net.decoder.parameters(), lr=2e-3, weight_decay=0.01)
    changes = augment.Augment(scale=(0.8, 1.25), elastic=0.0, negative=0.0)
    for step in range(steps):
        rate = optim.cosine(step, steps, 2e-3, 0.0, min(20, steps - 1))
        optimiser.param_groups[0]["lr"] = rate
        numbers = np.arange(batch) + step * batch
        images = train.draw(seed, numbers)
        x, target, _ = augment.sample(train, images, numbers, changes, size=crop, seed=seed)
        (net(x) - target).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    net.eval()
    tables = []
    for image in validation:
        distance = segment.distances(image.pixels, net, limits=segment.UNIT, zoom=image.zoom)
        tables.append(metrics.overlap(image.labels, watershed.watershed(distance, 0.47, 0.2)))
    scores = metrics.set_scores(tables)
    return {**{f"probe_{name}": scores.mean[name] for name in ("AP@0.5", "AP@0.75")},
            "probe_OP_CSB": scores.pooled["OP_CSB"]}


class Looker:
    """Measures the teacher within train_ssl.py, writes its weights and pictures."""

    def __init__(self, config, run: runs.Run, export: Path):
        self.config, self.run, self.export = config, run, export
        self.licence = model.licence_of(config.init)    # now: it may be gone later
        if run.rank == 0:
            self.windows = probe_held_windows(config)
        self.labelled: Any = None           # images for the decoder, read or drawn when needed

    def look(self, vit, step: int) -> None:
        """Log numbers, write weights and pictures; leaks at the first and the last step."""
        if self.run.rank:
            return
        settings, size, end = self.config.measure, self.config.views.size, self.config.steps
        numbers, looks = measure_backbone(vit, self.windows, size)
        if step in (0, end):
            numbers |= metadata_leaks(vit, self.windows, size)
        if settings.probe_every and (step % settings.probe_every == 0 or step == end):
            self.labelled = self.labelled or self.labelled_images(str(vit.cls_token.device))
            train, validation = self.labelled
            numbers |= train_probe(vit, train, validation, settings.probe_steps, size,
                                   seed=self.config.seed)
        self.run.log(step, windows=len(self.windows.names), **numbers)
        if step:
            told = runs.provenance(self.config, step, scores=numbers)
            model.save(vit, self.export, provenance=told, licence=self.licence)
        self.draw(step, looks)

    def labelled_images(self, device: str):
        """Images to train the decoder on and to score it on; drawn ones have cells as in views."""
        diameter = self.config.data.field_diameter * self.config.views.zoom
        given = self.config.measure.probe_data or data.TrainingData(
            fields=self.config.measure.probe_images, field_size=256, field_diameter=diameter,
            field_cells=round((256 / diameter) ** 2))
        images, validation, _ = augment.load_resident(given, self.config.seed, device, 4.0)
        return images, [image for image in validation if image.held]

    def draw(self, step: int, looks: list[Look]) -> None:
        """Draw the curves, and attention and components of the first windows."""
        folder, windows, n = self.run.folder / "images", self.windows, len(looks)
        few = windows._replace(pixels=windows.pixels[:n], limits=windows.limits[:n])
        shown = list(resampled_pairs(few, self.config.views.size))
        pictures = write_probe_pictures(folder / f"{step:08d}", windows.names[:n], shown, looks,
                                        windows.channels)
        for path in pictures:
            if self.run.wandb:
                self.run.log_picture(step, path.stem, skimage.io.imread(path))
        curves: dict[str, Any] = {name: [] for name in (
            "loss", "retrieval", "margin", "kl", "usage", "effective_rank", "attention_entropy",
            "probe_AP@0.5")}
        for line in self.run.history():
            for name, points in curves.items():     # the rank of windows, not that of batches
                batches = name in ("loss", "kl", "usage")
                if isinstance(line.get(name), float) and ("loss" in line) == batches:
                    points.append((line["step"], line[name]))
        report.write_curves(folder / "curves.svg", curves)


# ------------------------------------------------------------------------------------- the command

LOGGED = ("retrieval", "margin", "consistency", "control", "background_retrieval",
          "background_pixels", "effective_rank", "probe_AP@0.5", "probe_OP_CSB")


def probe_run_rows(folder: Path) -> list[list[str]]:
    """Rows of the table: numbers of a run before its first step and at its end."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"no {log}; expected the folder of a run of train_ssl.py")
    found: dict[int, dict] = {}
    for line in runs.log_history(log):
        if {"retrieval", "attention_entropy", "probe_AP@0.5"} & line.keys():
            found.setdefault(line["step"], {}).update(line)
    if not found:
        raise ValueError(f"{log}: no evaluation in it yet")
    settings = runs.read_yaml(folder / "config.yaml")
    about = [folder.name, settings["views"]["strategy"], str(settings["seed"])]
    return [[*about, str(step), *(report.shown_value(found[step].get(name)) for name in LOGGED)]
            for step in sorted({min(found), max(found)})]


def main(folders: list[str]) -> int:
    if not folders:
        raise ValueError("no folders of runs; see python probe.py --help")
    rows = [row for folder in folders for row in probe_run_rows(Path(folder))]
    print(report.markdown(["run", "strategy", "seed", "step", *LOGGED], rows), end="")
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__.strip()))
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
