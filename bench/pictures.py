"""Twelve pictures of how well it goes, docs/examples.jpg: python bench/pictures.py [root=DIR]

After `python evaluate.py bench configs/results.yaml`: of three sets whose images may be shown, the
best image of the default network, those at a third and two thirds of the way, and the worst, by
AP@0.5. Cells found are outlined in blue, false ones in orange. The page that evaluate.py writes,
runs/results/report.html, has the best, median and worst image of every set, with the true cells.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import measure  # noqa: E402
import metrics  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402

SETS = ("nuclei_fluo_dsb2018", "nuclei_stained_dsb2018", "phase_usiigaci")
SIDE = 300                                                       # px, of a picture


@dataclass(frozen=True)
class Config:
    root: str = "../shared/data"            # folder of the data sets
    results: str = "runs/results"           # what evaluate.py wrote
    model: str = "dinocell_s8"
    out: str = "docs/examples.jpg"


def main(config: Config, files: list[str]) -> None:
    canvas = Image.new("RGB", (4 * (SIDE + 6) - 6, len(SETS) * (SIDE + 24)), "white")
    pen = ImageDraw.Draw(canvas)
    for row, name in enumerate(SETS):
        folder = Path(config.results, config.model, name)
        scored = []
        for example in data.examples(Path(config.root, name, "test")):
            found = data.read_labels(folder / f"{measure.bench_image_name(example.name)}_pred.tif")
            match = metrics.match(metrics.overlap(example.labels(), found))
            scored.append((float(match.rates.average_precision), example, found, match.pairs[:, 1]))
        scored.sort(key=lambda one: -one[0])
        for column, at in enumerate(np.linspace(0, len(scored) - 1, 4).round().astype(int)):
            score, example, found, right = scored[at]
            square = measure.bench_crowded_square(example.labels())
            picture = Image.fromarray(measure.bench_outlined_square(
                example.image().pixels, found, right, square))
            picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
            x, y = column * (SIDE + 6), row * (SIDE + 24)
            canvas.paste(picture, (x, y))
            pen.text((x + 2, y + SIDE + 6), f"{name}, {at + 1} of {len(scored)}: AP@0.5 "
                     f"{score:.2f}", report.INK)
    with runs.replacing(config.out) as beside:
        canvas.save(beside, "JPEG", quality=85)


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
