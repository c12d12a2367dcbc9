"""What it brings to know how large the cells are, on the images held out of a training.

    python bench/size.py configs/dinocell_s8.yaml final_models/dinocell_s8.pt ... [data.root=DIR]

AP@0.5, mean over the images of a set (up to twelve by lot), then over sets: with the image as it
is, at the diameter that the size head sees, at the median of those that it sees in the set, and at
the true median diameter; and how far off both are. Only images to train on are read: `test` has no
say.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (the folder above)
import metrics  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import segment  # noqa: E402
import train_seg  # noqa: E402
from bench import table  # noqa: E402


def held_out(config: train_seg.Config, count: int) -> dict[str, list[data.Labelled]]:
    """{set: up to `count` real images with cells}, always the same ones."""
    _, images = data.training_images(config.data, config.seed)
    found: dict[str, list[data.Labelled]] = {}
    for image in images:
        if image.held and image.set != "synthetic" and image.labels.any():
            found.setdefault(image.set, []).append(image)
    return {name: [some[i] for i in np.random.default_rng(0).permutation(len(some))[:count]]
            for name, some in found.items()}


def scores(net, images: dict[str, list[data.Labelled]]) -> tuple[list[float], np.ndarray]:
    """AP@0.5 as they are, as seen, as the set is seen, at the true size; and (2, images) logs of
    the middle two over true diameters."""
    ways: list[list[float]] = []
    off: list[tuple[float, float]] = []
    for some in images.values():
        seen = [segment.seen_diameter(segment.as_source(image.pixels), net, segment.UNIT)
                for image in some]
        middle, each = float(np.median(seen)), []
        for image, own in zip(some, seen):
            true = data.median_diameter(image.labels)
            off.append((math.log(own / true), math.log(middle / true)))
            each.append([float(metrics.average_precision(image.labels, segment.segment(
                image.pixels, net, limits=segment.UNIT, **wanted), (0.5,))[0])
                for wanted in ({"zoom": 1.0}, {"diameter": own}, {"diameter": middle},
                               {"diameter": true})])
        ways.append(np.mean(each, 0).tolist())
    return np.mean(ways, 0).tolist(), np.array(off).T


def main(config: train_seg.Config, weights: list[str]) -> None:
    if not weights:
        raise ValueError("no weights; give files, such as final_models/dinocell_s8.pt")
    images, rows = held_out(config, 12), []
    for file in weights:
        net = model.load(file).ready("cpu")
        if net.size is None:
            raise ValueError(f"{file}: has no size head")
        each, off = scores(net, images)
        rows.append([Path(file).stem, *(f"{value:.3f}" for value in each),
                     *(f"{np.mean(np.abs(row) < np.log(factor)):.2f}" for row in off
                       for factor in (1.25, 1.5))])
    table(f"{sum(map(len, images.values()))} held-out images of {len(images)} sets",
          ["weights", "as they are", "as the size head sees", "one for the set", "true diameter",
           "within 1.25", "within 1.5", "set's within 1.25", "within 1.5"], rows)


if __name__ == "__main__":
    runs.script(__doc__, train_seg.Config, main)
