"""Drawn immunofluorescence of many donors, to try configs/if_*.yaml end to end without data.

    python bench/draw_donors.py out=dat/drawn_if [donors=10] [tiles=2] [size=192] [seed=0]

Writes DONOR_MARKER_TILE_b0c0.tif (nuclei), .._b0c1.tif (marker) and .._b0c0_masks.tif, 16 bit, for
the markers AT8 and GFAP. Both are stains of synthetic.py (AGP and ER): what they teach about real
markers is nothing, but every step runs.
"""
from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tifffile

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import runs  # noqa: E402
import synthetic  # noqa: E402

STAINS = {"AT8": "AGP", "GFAP": "ER"}


@dataclass(frozen=True)
class Config:
    out: str = "dat/drawn_if"               # folder
    donors: runs.Count = 10
    tiles: runs.Count = 2                   # of each donor and marker
    size: runs.Count = 192                  # px, side of a tile
    cells: runs.Count = 20                  # in a tile
    diameter: runs.Positive = 28.0          # px
    seed: int = 0                           # the first field's


def main(config: Config, files: list[str]) -> int:
    folder, number = Path(config.out), config.seed
    folder.mkdir(parents=True, exist_ok=True)
    for donor in range(1, config.donors + 1):
        for marker, stain in STAINS.items():
            for tile in range(1, config.tiles + 1):
                field = synthetic.field(number, config.size, config.cells, config.diameter)
                stem = folder / f"donor{donor:02d}_{marker}_{tile}_b0c"
                for channel, name in enumerate(("DNA", stain)):
                    tifffile.imwrite(f"{stem}{channel}.tif",
                                     field.pixels[field.channels.index(name)])
                data.write_labels(Path(f"{stem}0_masks.tif"), field.labels)
                number += 1
    print(f"{number - config.seed} tiles of {config.donors} donors -> {folder}")
    return 0


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
