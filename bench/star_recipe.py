"""StarDist's recipe beside this project's: the same images, crops, minutes, scale and thread.

    pip install --no-deps -r tests/requirements-peers.txt
    python bench/star_recipe.py configs/travel.yaml configs/results.yaml [minutes=25] [root=DIR]

Both networks learn from scratch on `train` of the first configuration: the small network as
train_seg.py trains it, and StarDist as its authors do (Schmidt et al., MICCAI 2018; 2D, 32 rays,
grid 2, U-Net of depth 3), written here in PyTorch; rays, suppression and polygons are the
package's. `minutes` are of the processor, augmentation included. Thresholds are set on held-out
images of those sets. The sets of the second configuration are then scored at their true median
diameter, for this is about networks, not about size: tables and a page in runs/stardist/. What has
labels there is not taught again.
"""
from __future__ import annotations

import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import travel  # noqa: E402

import augment  # noqa: E402  (the folder above)
import data  # noqa: E402
import evaluate  # noqa: E402
import measure  # noqa: E402
import metrics  # noqa: E402
import runs  # noqa: E402
import segment  # noqa: E402
import train_seg  # noqa: E402

RAYS, GRID, DEPTH, BASE = 32, 2, 3, 32


# ---------------------------------------------------------------------------------------- StarDist

def convolutions(*widths: int) -> nn.Sequential:
    """3 x 3 and ReLU from width to width."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers)


class Star(nn.Module):
    """x (B, 3, H, W) -> logit of a centre (B, 1, H/2, W/2), px along rays (B, 32, H/2, W/2)."""

    def __init__(self) -> None:
        super().__init__()
        width = [BASE * 2 ** n for n in range(DEPTH + 1)]
        self.stem = convolutions(3, BASE, BASE)
        self.down = nn.ModuleList(convolutions(BASE if n == 0 else width[n - 1], width[n], width[n])
                                  for n in range(DEPTH))
        self.middle = convolutions(width[-2], width[-1], width[-2])
        self.up = nn.ModuleList(convolutions(2 * width[n], width[n], width[max(0, n - 1)])
                                for n in reversed(range(DEPTH)))
        self.features = convolutions(BASE, 128)
        self.centre, self.rays = nn.Conv2d(128, 1, 1), nn.Conv2d(128, RAYS, 1)
        for values in self.parameters():                     # as Keras begins
            if values.ndim == 1:
                nn.init.zeros_(values)
            else:
                nn.init.xavier_uniform_(values)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, kept = F.max_pool2d(self.stem(x), GRID), []
        for block in self.down:
            kept.append(block(x))
            x = F.max_pool2d(kept[-1], 2)
        x = self.middle(x)
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2), kept.pop()], 1))
        x = self.features(x)
        return self.centre(x), self.rays(x)


class StarTrainer:
    """The network and the step of its authors: Adam, cross-entropy of the centre, and lengths of
    rays weighed by it."""

    def __init__(self, net: Any) -> None:
        self.net = net.to(memory_format=torch.channels_last)
        self.optimiser = torch.optim.Adam(net.parameters(), 3e-4, eps=1e-7)

    def step(self, batch: tuple[Tensor, Tensor, Tensor], factor: float, chosen: np.ndarray) -> None:
        from stardist.geometry import star_dist
        from stardist.utils import edt_prob
        self.optimiser.param_groups[0]["lr"] = 3e-4 * factor
        x, _, labels = batch
        crops = [crop.astype(np.int32) for crop in labels.numpy()]
        every = slice(None, None, GRID)
        centre = torch.from_numpy(np.stack([edt_prob(crop)[every, every] for crop in crops]))
        rays = torch.from_numpy(np.stack([star_dist(crop, RAYS, grid=(GRID, GRID))
                                          for crop in crops])).permute(0, 3, 1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            logit, found = self.net(x.contiguous(memory_format=torch.channels_last))
        centre, logit, found = centre[:, None].float(), logit.float(), found.float()
        off = (found - rays).abs().mean(1, keepdim=True)                     # (B, 1, h, w)
        length = (centre * off).mean() / (centre.mean() + 1e-7)
        outside = 1e-4 * ((1 - centre) * found.abs().mean(1, keepdim=True)).mean()
        loss = F.binary_cross_entropy_with_logits(logit, centre) + 0.2 * (length + outside)
        loss.backward()
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)


class Stars(NamedTuple):
    """What the network says of an image, at every second px."""
    centre: np.ndarray                      # (h, w)
    rays: np.ndarray                        # (h, w, 32) px


@torch.inference_mode()
def stars(net: nn.Module, x: Tensor) -> Stars:
    """Of x (3, H, W)."""
    H, W = x.shape[1:]
    step = GRID * 2 ** DEPTH
    padded = F.pad(x[None], (0, -W % step, 0, -H % step), mode="replicate")
    with torch.autocast("cpu", torch.bfloat16):
        logit, rays = net(padded.contiguous(memory_format=torch.channels_last))
    h, w = -(-H // GRID), -(-W // GRID)
    return Stars(logit[0, 0, :h, :w].float().sigmoid().numpy(),
                 rays[0, :, :h, :w].float().clamp(min=1e-3).permute(1, 2, 0).contiguous().numpy())


def star_cells(found: Stars, size: tuple[int, int], zoom: tuple[float, float], threshold: float,
               overlap: float) -> np.ndarray:
    """Labels of `size` px from stars of an image enlarged by `zoom`."""
    from stardist.geometry import polygons_to_label
    from stardist.nms import non_maximum_suppression
    points, scores, rays = non_maximum_suppression(
        found.rays, found.centre, grid=(GRID, GRID), prob_thresh=threshold, nms_thresh=overlap)
    back = 1 / np.array(zoom)
    return polygons_to_label(rays, points * back, size, prob=scores,
                             scale_dist=tuple(back)).astype(np.int32)


# --------------------------------------------------------------------------------------- the bench

def learn(step: Callable, config: train_seg.Config, images, minutes: float) -> int:
    """Steps done in so many minutes of the processor, at a rate that falls to nothing."""
    changes = runs.from_dict(augment.Augment, config.augment, "augment")
    begin, done = time.process_time(), 0
    while (share := (time.process_time() - begin) / (60 * minutes)) < 1:
        chosen, batch = train_seg.training_crops(config, images, changes,
                                                 np.arange(config.batch) + done * config.batch)
        factor = min(1, (done + 1) / config.warmup) * (1 + math.cos(math.pi * share)) / 2
        step(batch, factor, chosen)
        done += 1
        if done % 50 == 0:
            print(f"  step {done}, {100 * share:.0f} %", flush=True)
    return done


def star_thresholds(net: nn.Module, held: list) -> tuple[float, float]:
    """(of a centre, of the overlap that suppresses), best on held-out images."""
    found = [stars(net, torch.from_numpy(entry.pixels)) for entry in held]

    def score(pair: tuple[float, float]) -> float:
        cells = [star_cells(seen, entry.labels.shape, (1, 1), *pair)
                 for seen, entry in zip(found, held)]
        return float(np.mean([*train_seg.mean_by_set(held, [
            float(metrics.average_precision(entry.labels, labels).mean())
            for entry, labels in zip(held, cells)]).values()]))

    return max(((float(threshold), overlap) for threshold in np.arange(0.2, 0.85, 0.05)
                for overlap in (0.3, 0.4, 0.5)), key=score)


def label(sets: list[measure.LabelledSet], folder: Path, cells: Callable) -> None:
    """Write the labels of all images of sets, found at their true diameter."""
    for dataset in sets:
        for item in dataset.items(folder.name):
            path = folder / dataset.name / f"{item.name}_labels.tif"
            path.parent.mkdir(parents=True, exist_ok=True)
            found = cells(item.pixels, data.median_diameter(item.truth) or None)
            data.write_labels(path, found)


def taught_star(config: train_seg.Config, images, held: list, minutes: float
                ) -> tuple[int, Callable]:
    """(steps, what labels (C, H, W) of a diameter) of StarDist's recipe."""
    star = StarTrainer(Star())
    steps = learn(star.step, config, images, minutes)
    net = star.net.eval()
    thresholds = star_thresholds(net, held)
    print(f"  centre above {thresholds[0]:.2f}, overlap {thresholds[1]}")
    scale = train_seg.build_train_seg_net(config, images.diameter)   # as for ours

    def cells(pixels: np.ndarray, diameter: float | None) -> np.ndarray:
        source = segment.as_source(pixels)
        plan = segment.plan_for(source, scale, diameter=diameter)
        size = segment.scaled_size(pixels.shape[1:], plan.zoom)
        x = segment.scaled_rows(source, plan.limits, size, slice(0, size[0]))   # (3, h, w)
        zoom = (size[0] / pixels.shape[1], size[1] / pixels.shape[2])
        return star_cells(stars(net, x), pixels.shape[1:], zoom, *thresholds)

    return steps, cells


def taught_own(config: train_seg.Config, images, held: list, minutes: float
               ) -> tuple[int, Callable]:
    """The same of this project's small network."""
    net = train_seg.build_train_seg_net(config, images.diameter)
    trainer = train_seg.Trainer(config, net, "cpu")
    steps = learn(trainer.step, config, images, minutes)
    average: Any = trainer.average.module
    ready = average.ready("cpu")
    *_, setting = travel.scored(ready, held, [])
    ready.settings = dataclasses.replace(ready.settings, **setting._asdict())
    print(f"  {ready.settings.setting}")
    return steps, lambda pixels, diameter: segment.segment(pixels, ready, diameter=diameter)


def main(words: list[str]) -> int:
    keys = dict(word.split("=", 1) for word in words if "=" in word)
    paths = [word for word in words if "=" not in word]
    if len(paths) != 2 or set(keys) - {"minutes", "root"}:
        raise SystemExit(__doc__)
    minutes, root = float(keys.get("minutes", 25)), keys.get("root")
    torch.set_num_threads(1)
    training, results = (runs.read_yaml(Path(path)) for path in paths)
    if root:
        training["train"]["data"]["root"] = results["root"] = root
    config = travel.changed(runs.from_dict(travel.Config, training, paths[0]))
    out, models = Path("runs/stardist"), []
    wanted = {key: value for key, value in results.items() if key not in ("markdown", "summary")}
    sets = [measure.LabelledSet(runs.from_dict(measure.DataSet, each, paths[1]),
                                results.get("root", ".")) for each in results["sets"]]
    for name, teach in (("stardist", taught_star), ("dinocell", taught_own)):
        done = out / f"{name}.json"
        if not done.exists():
            print(name, flush=True)
            images, held, _ = travel.loaded(json.dumps(dataclasses.asdict(config.data)),
                                            config.cap, 8)
            torch.manual_seed(0)
            steps, cells = teach(config, images, held, minutes)
            label(sets, out / "labels" / name, cells)
            runs.write_text(done, json.dumps({"steps": steps, "minutes": minutes}))
        told = json.loads(done.read_text(encoding="utf-8"))
        models.append({"name": name, "labels": str(out / "labels" / name), "optional": True,
                       "note": f"{told['steps']} steps in {told['minutes']:g} minutes of a core"})
    evaluate.bench(runs.from_dict(evaluate.Bench, wanted | {
        "models": models, "experiment": out.name, "against": ["stardist"]}, paths[1]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
