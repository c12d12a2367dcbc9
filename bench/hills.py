"""What it brings to leave out ground and hills (watershed.py), at true diameters.

    python bench/hills.py configs/dinocell_s8_research.yaml WEIGHTS.pt ... [data.root=DIR]

AP@0.5 and 0.75 by set, mean over images: cells as they were, where a hill belongs to the cell
beside it and cells reach down to `fill`; without ground; and without hills as well. Sets of the
configuration that may only be used for research are those that the networks under MIT never saw:
all their images are asked; of others up to 12 that were held out. `test` has no say.
"""
from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import travel  # noqa: E402
from size import held_out  # noqa: E402

import data  # noqa: E402  (the folder above)
import metrics  # noqa: E402
import model  # noqa: E402
import runs  # noqa: E402
import segment  # noqa: E402
import train_seg  # noqa: E402
import watershed  # noqa: E402
from bench import table  # noqa: E402

UNSEEN = ("he_monuseg/", "he_consep/", "fluo_cyto_cellpose_scellseg/")


def asked(config: train_seg.Config) -> dict[str, list[data.Labelled]]:
    """{set: images}, those of unseen sets first."""
    found = {}
    for chosen in config.data.sets:
        if chosen.path.startswith(UNSEEN):
            found[f"unseen: {chosen.name}"] = [data.read_labelled(example, chosen.name, {})
                                               for example in data.training_examples(config.data,
                                                                                     chosen)]
    return found | {name: some for name, some in held_out(config, 12).items()
                    if not name.startswith(UNSEEN)}


def cells(distance: np.ndarray, setting: watershed.Setting) -> list[np.ndarray]:
    """Labels as they were, without ground, and without hills as well."""
    hill = watershed.HILL
    try:
        watershed.HILL = math.inf
        without_ground = watershed.flood(distance, setting)
    finally:
        watershed.HILL = hill
    return [watershed.flood(distance, setting, ground=False), without_ground,
            watershed.flood(distance, setting)]


def scores(net, some: list[data.Labelled]) -> np.ndarray:
    """(3, 2) AP@0.5 and 0.75 of the three ways, mean over images with cells."""
    rows = []
    for image in travel.few(some, len(some), net.settings.diameter, side=10**6):
        distance = segment.distances(image.pixels, net, limits=segment.UNIT, zoom=1.0)
        rows.append([metrics.average_precision(image.labels, found, (0.5, 0.75))
                     for found in cells(distance, net.settings.setting)])
    return np.mean(rows, 0)


def main(config: train_seg.Config, weights: list[str]) -> None:
    if not weights:
        raise ValueError("no weights; give files, such as final_models/dinocell_s8.pt")
    sets = {name: some for name, some in asked(config).items()
            if any(image.labels.any() for image in some)}
    for file in weights:
        net = model.load(file).ready("cpu")
        rows = [[name, str(len(some)), *(f"{a:.3f} / {b:.3f}" for a, b in scores(net, some))]
                for name, some in sets.items()]
        table(Path(file).stem, ["set", "images", "as they were", "without ground",
                                "and without hills"], rows)


if __name__ == "__main__":
    runs.script(__doc__, train_seg.Config, main)
