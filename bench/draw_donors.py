"""Drawn immunofluorescence of many donors, to try configs/if_*.yaml end to end without data.

    python bench/draw_donors.py out=dat/drawn_if [donors=16] [tiles=2] [size=192] [seed=0]

Writes DONOR_MARKER_TILE_b0c0.tif (nuclei), .._b0c1.tif (marker) and .._b0c0_masks.tif, 16 bit, for
the markers AT8 and GFAP. Both are stains of synthetic.py (AGP and ER): what they teach about real
markers is nothing, but every step runs. A share of each donor's cells bears the marker, the others
a fifth of it; outcomes.tsv names that share as an outcome, beside one by lot.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import runs  # noqa: E402
import synthetic  # noqa: E402

STAINS = {"AT8": "AGP", "GFAP": "ER"}
FAINT = 0.2          # of the marker, in cells that do not bear it


@dataclass(frozen=True)
class Config:
    out: str = "dat/drawn_if"               # folder
    donors: runs.Count = 16
    tiles: runs.Count = 2                   # of each donor and marker
    size: runs.Count = 192                  # px, side of a tile
    cells: runs.Count = 20                  # in a tile
    diameter: runs.Positive = 28.0          # px
    seed: int = 0                           # the first field's


def main(config: Config, files: list[str]) -> int:
    folder, number = Path(config.out), config.seed
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(config.seed)
    shares = rng.permutation(np.linspace(0.1, 0.9, config.donors))
    for donor, share in enumerate(shares, 1):
        for marker, stain in STAINS.items():
            for tile in range(1, config.tiles + 1):
                field = synthetic.field(number, config.size, config.cells, config.diameter)
                stem = folder / f"donor{donor:02d}_{marker}_{tile}_b0c"
                nuclei, stained = (field.pixels[field.channels.index(name)]
                                   for name in ("DNA", stain))
                tifffile.imwrite(f"{stem}0.tif", nuclei)
                tifffile.imwrite(f"{stem}1.tif", faded(stained, field.labels, share, rng))
                data.write_labels(Path(f"{stem}0_masks.tif"), field.labels)
                number += 1
    rows = [f"{donor:02d}\t{share:.3f}\t{rng.random():.3f}\n"
            for donor, share in enumerate(shares, 1)]
    (folder / "outcomes.tsv").write_text("donor\tshare\tlot\n" + "".join(rows))
    print(f"{number - config.seed} tiles of {config.donors} donors -> {folder}")
    return 0


def faded(marker: np.ndarray, labels: np.ndarray, share: float, rng) -> np.ndarray:
    """(H, W) uint16: the marker, faint in all cells but a share of them."""
    ground = np.median(marker[labels == 0])
    gain = np.where(rng.random(labels.max() + 1) < share, 1, FAINT)
    gain[0] = 1
    return (ground + (marker - ground) * gain[labels]).clip(0, 65535).astype(np.uint16)


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
