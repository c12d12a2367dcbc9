"""Does a backbone get better without labels? Windows of held-out fields, what must not explain it, a small
decoder.

    windows = cut(fields, window=224, count=256, channels)      # fields: (name, (C, H, W) uint16, labels or None)
    numbers, looks = measured(vit, windows, size=224)           # consistency, control, margin, retrieval, ...
    leaks(vit, windows, size=224)                               # retrieval from the background, cells masked out
    segmentation(vit, train, validation, steps=200)             # AP of a decoder on the frozen backbone
    with Looker(config, run, path) as looker: ...               # all of it from within train_ssl.py

    python probe.py runs/a runs/b ...                           table of what runs logged, first and last

Retrieval: of all windows, is the one whose feature in channel j is nearest to this window's in channel i the
same window? Chance is 1 / windows. It means little if anything but cells ties the channels of a field
together (light, dirt, exposure), so that the background alone, cells masked out, is measured beside it.

Letters: F windows, C channels, S side of what the network sees in px.
"""
from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import yaml

import runs


@dataclass(frozen=True)
class Measure:
    """A section of train_ssl.py's configuration."""
    every: runs.Count = 2000                       # steps between measurements on the held-out fields; the first at step 0
    window: runs.Count = 224                       # px of the field, which the network sees at the size of its global views
    windows: Annotated[int, runs.at_least(2)] = 256                      # of them; chance of retrieval is 1 / windows
    probe_every: int = 0                    # steps between decoders trained on the frozen backbone; 0: none
    probe_steps: int = 200                  # of such a training
    probe_sets: tuple[str, ...] = ()        # labelled sets for it (data.examples); empty: synthetic fields
    probe_images: int = 16                  # of each set to train on, or synthetic fields

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


def cut(fields: Iterable[tuple[str, np.ndarray, np.ndarray | None]], window: int, count: int,
        channels: tuple[str, ...]) -> Windows:
    """Windows of `window` px that lie side by side: the first of each field, then the second, up to `count`."""
    import data
    found = []                                                # of each field (name, pixels, limits, labels) of its windows
    for name, field, truth in fields:
        H, W = field.shape[1:]
        if min(H, W) < window:
            raise ValueError(f"{name}: {H} x {W} px, expected {window} px or more, to measure on (measure.window)")
        own = data.percentiles(field)
        places = [np.s_[y:y + window, x:x + window] for y in range(0, H - window + 1, window)
                  for x in range(0, W - window + 1, window)]
        found.append([(f"{name} {at[0].start},{at[1].start}", field[:, at[0], at[1]], own,
                       None if truth is None else truth[at]) for at in places])
    chosen = [one for turn in itertools.zip_longest(*found) for one in turn if one is not None][:count]
    if len(chosen) < 2:
        raise ValueError(f"{len(chosen)} windows of held-out fields, expected two or more; give a larger data.held")
    names, pixels, limits, labels = zip(*chosen)
    return Windows(list(names), np.stack(pixels), np.stack(limits).astype(np.float32),
                   None if labels[0] is None else np.stack(labels), channels)


def windows_of(config) -> Windows:
    """The windows that a configuration of train_ssl.py holds out."""
    import fieldset
    channels, fields = fieldset.held(config.data, config.seed)
    return cut(fields, config.measure.window, config.measure.windows, channels)


def seen(windows: Windows, size: int) -> np.ndarray:
    """What the network is shown, (F, C, S, S) in [0, 1]: each channel of each window, resampled as views
    are."""
    import torch
    import ssl_
    F, C, w, _ = windows.pixels.shape
    pixels, limits = torch.from_numpy(windows.pixels.view(np.int16)), torch.from_numpy(windows.limits)
    middle, matrix = np.full((F, 2), w / 2), np.broadcast_to(np.eye(2) * w / size, (F, 2, 2))
    slots, one = torch.arange(F), np.eye(C)
    shown = [ssl_.cut_crops(pixels, limits, slots, one[[c] * F], middle, matrix, size) for c in range(C)]
    return torch.cat(shown, 1).numpy()                                       # (F, C, S, S)


def background(windows: Windows, size: int, spread: float = 1 / 16) -> np.ndarray:
    """seen() with the cells masked out, and some px around them: what is left, blurred by `spread` of the
    side, spreads into the gaps. (F, C, S, S) in [0, 1]; a window without any background is its mean."""
    from scipy import ndimage
    if windows.labels is None:
        raise ValueError("the background alone needs the outlines of cells, which these fields do not have")
    F, C, w, _ = windows.pixels.shape
    at = ((np.arange(size) + 0.5) * w / size).astype(int)
    shown = seen(windows, size)
    for field, truth in zip(shown, windows.labels):
        away = ndimage.distance_transform_edt(truth == 0)[np.ix_(at, at)] > 6        # px: beyond the blur
        share = ndimage.gaussian_filter(away.astype(np.float32), spread * size, truncate=20)
        for image in field:
            sums = ndimage.gaussian_filter(np.where(away, image, 0), spread * size, truncate=20)
            level = image[away].mean() if away.any() else image.mean()
            image[:] = (sums + 1e-3 * level) / (share + 1e-3)
    return shown


def features(vit, shown: np.ndarray, keep: int = 0) -> tuple[np.ndarray, np.ndarray, list]:
    """Class tokens (F, C, D), attention maps (F, C, heads, h, w), and the first `keep` whole looks."""
    import consistency
    vectors, maps, looks = [], [], []
    for number, field in enumerate(shown):
        look = consistency.look(vit, field)
        vectors.append(look.cls)
        maps.append(look.attention)
        if number < keep:
            looks.append(look)
    return np.stack(vectors), np.stack(maps), looks


def measured(vit, windows: Windows, size: int, keep: int = 2) -> tuple[dict[str, float], list]:
    """Everything that says without labels whether the backbone is any good, and looks of the first
    windows."""
    import torch
    import consistency
    import ssl_
    vectors, maps, looks = features(vit, seen(windows, size), keep)
    flat = torch.from_numpy(vectors).flatten(0, 1)                           # (F C, D)
    return {**consistency.compare(vectors, maps.mean(2)).numbers(), "feature_std": ssl_.feature_std(flat),
            "effective_rank": ssl_.effective_rank(flat), "attention_entropy": entropy(maps)}, looks


def entropy(maps: np.ndarray) -> float:
    """Of attention maps (..., h, w), as a share of the largest there can be: 1 looks everywhere alike."""
    p = maps.reshape(-1, maps.shape[-2] * maps.shape[-1])
    p = p / p.sum(1, keepdims=True)
    return float(-(p * np.log(np.maximum(p, 1e-30))).sum(1).mean() / math.log(p.shape[1]))


def leaks(vit, windows: Windows, size: int) -> dict[str, float]:
    """Retrieval from the background alone, as the network sees it and by the pixels themselves: the
    control."""
    import metrics
    shown = background(windows, size)
    F, C = shown.shape[:2]
    pixels = shown[:, :, ::8, ::8].reshape(F, C, -1)
    pixels = pixels - pixels.mean(2, keepdims=True) + 1e-9           # + : a flat one has a direction too
    return {"background_retrieval": metrics.channel_consistency(features(vit, shown)[0]).retrieval,
            "background_pixels": metrics.channel_consistency(pixels).retrieval}


def segmentation(vit, train, validation: list, steps: int = 200, crop: int = 96, batch: int = 8, seed: int = 0
                 ) -> dict[str, float]:
    """A small decoder learns on the frozen backbone for a minute: AP on the validation images, at one fixed
    setting.

    train : augment.Resident; validation : data.Labelled list. The backbone and the random state stay as they
    are.
    """
    import torch
    import augment
    import metrics
    import model
    import optim
    import segment
    import watershed
    device = vit.cls_token.device
    stages = int(math.log2(vit.patch))
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
        optimiser.param_groups[0]["lr"] = optim.cosine(step, steps, 2e-3, 0.0, min(20, steps - 1))
        numbers = np.arange(batch) + step * batch
        images = train.draw(seed, numbers)
        x, target, _ = augment.sample(train, images, numbers, changes, size=crop, seed=seed)
        (net(x) - target).square().mean().backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
    net.eval()
    aps = []
    for entry in filter(lambda entry: entry.held, validation):
        distance = segment.distances(entry.pixels, net, limits=segment.UNIT)
        labels = watershed.watershed(distance, 0.47, 0.2)
        aps.append(metrics.average_precision(entry.labels, labels, (0.5, 0.75)))
    return {"probe_AP@0.5": float(np.mean([ap[0] for ap in aps])),
            "probe_AP@0.75": float(np.mean([ap[1] for ap in aps]))}


# ------------------------------------------------------------------------------------- from within a training

class Looker:
    """Measures the teacher, keeps its weights, and has pictures drawn behind the loop's back."""

    def __init__(self, config, run: runs.Run, export: Path):
        self.config, self.run, self.export = config, run, export
        self.windows = windows_of(config) if run.rank == 0 else None
        self.painter = ThreadPoolExecutor(1)
        self.pending: list[Future] = []
        self.labelled = None                                  # of the decoder, read or drawn when first needed
        self.reached = 0                                      # the last step that anything was logged under

    def look(self, vit, step: int) -> None:
        """Numbers at once, into the log; pictures later. The first and the last look also say what leaks."""
        import model
        if self.run.rank:
            return
        self.reached = step
        settings, size, end = self.config.measure, self.config.views.size, self.config.steps
        numbers, looks = measured(vit, self.windows, size)
        if self.windows.labels is not None and step in (0, end):
            numbers |= leaks(vit, self.windows, size)
        if settings.probe_every and (step % settings.probe_every == 0 or step == end):
            self.labelled = self.labelled or self.labelled_images(str(vit.cls_token.device))
            numbers |= segmentation(vit, *self.labelled, settings.probe_steps, size, seed=self.config.seed)
        self.run.log(step, windows=len(self.windows.names), **numbers)
        if step:
            model.save(vit, self.export, provenance=runs.provenance(self.config, step, scores=numbers))
        self.pending.append(self.painter.submit(self.paint, step, looks))

    def labelled_images(self, device: str):
        """Labelled images to train the decoder on and to score it on; synthetic ones at the size cells have in views."""
        import augment
        import data
        settings, shown = self.config.measure, self.config.data
        diameter = shown.field_diameter * self.config.views.zoom
        given = dict(fields=settings.probe_images, field_size=256, field_diameter=diameter,
                     field_cells=round((256 / diameter) ** 2))
        if settings.probe_sets:
            given = dict(sets=tuple(map(data.TrainingSet, settings.probe_sets)), limit=settings.probe_images)
        return augment.load_resident(data.TrainingData(**given), self.config.seed, device, 4.0)[:2]

    def paint(self, step: int, looks: list) -> list[Path]:
        """In the background: where each head looks and what patches are made of, of one field in every channel."""
        import consistency
        import report
        folder = self.run.folder / "images" / f"{step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        few = self.windows._replace(names=self.windows.names[:len(looks)], pixels=self.windows.pixels[:len(looks)],
                                    limits=self.windows.limits[:len(looks)])
        paths = consistency.write_pictures(folder, few.names, seen(few, self.config.views.size),
                                           [look.attention for look in looks], [look.colours() for look in looks],
                                           few.channels)
        history = self.run.history()
        report.write_curves(self.run.folder / "images" / "curves.svg", {
            name: [(line["step"], line[name]) for line in history if isinstance(line.get(name), float)
                   and ("loss" in line) == (name in ("loss", "kl", "usage"))]        # rank: of held-out windows, not batches
            for name in ("loss", "retrieval", "margin", "kl", "usage", "effective_rank", "attention_entropy",
                         "probe_AP@0.5")})
        return paths

    def publish(self, step: int) -> None:
        """Pictures that are done go to wandb, under the present step: wandb takes none for steps gone by."""
        self.reached = step
        while self.pending and self.pending[0].done():
            for path in self.pending.pop(0).result():         # what went wrong in the background is raised here
                if self.run.wandb:
                    from skimage.io import imread
                    self.run.log_picture(step, path.stem, imread(path))

    def __enter__(self) -> Looker:
        return self

    def __exit__(self, kind, *_) -> None:
        self.painter.shutdown(wait=True)
        if kind is None:
            self.publish(self.reached)


# ----------------------------------------------------------------------------------------------- the command

COLUMNS = ("retrieval", "margin", "consistency", "control", "background_retrieval", "background_pixels",
           "effective_rank", "probe_AP@0.5")


def rows(folder: Path) -> list[list[str]]:
    """What a run measured before its first step, which is the random network, and at its end."""
    log = folder / "log.jsonl"
    if not log.is_file():
        raise FileNotFoundError(f"no {log}; expected the folder of a run of train_ssl.py")
    found: dict[int, dict] = {}
    for line in runs.history(log):
        if "retrieval" in line or "probe_AP@0.5" in line:
            found.setdefault(line["step"], {}).update(line)
    if not found:
        raise ValueError(f"{log}: no evaluation in it yet")
    settings = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    return [[folder.name, settings["views"]["strategy"], str(settings["seed"]), str(step),
             *(f"{line[name]:.3f}" if name in line else "-" for name in COLUMNS)]
            for step, line in ((step, found[step]) for step in sorted({min(found), max(found)}))]


def main(folders: list[str]) -> int:
    import report
    if not folders:
        raise ValueError("no folders of runs; see python probe.py --help")
    head = ["run", "strategy", "seed", "step", *COLUMNS]
    print(report.markdown(head, [row for folder in folders for row in rows(Path(folder))]), end="")
    return 0


if __name__ == "__main__":
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__.strip()))
    sys.exit(runs.guarded(lambda: main(sys.argv[1:])))
