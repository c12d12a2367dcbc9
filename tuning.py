"""Settings and what they change: of the encoding, of the watershed, of what is kept of a prediction.

    best = encodings(place, found, Encoding(), "DSB", folder)[0]  # true labels -> distance map -> watershed
    rows = swept(item, place, network, settings)                  # the network runs once per tile and scale
    result, removed = gated(images, "set", 20, (2, 98), "drop")   # of saved predictions, cells left out
"""
from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from measure import (CEILING, COMPARED, DataSet, Item, Network, Result, columns_of, digest, kept,
                     progress, same_size, segmented, without_nan)


# -------------------------------------------------------------------------------- the encoding, the watershed

@dataclass(frozen=True)
class Encoding:
    cap: tuple[float | None, ...] = (None, 2.0, 4.0, 8.0)  # px, of watershed.distance_map; null: none; []: no row
    peak: tuple[float, ...] = (0.47, 0.6)   # of the watershed
    fill: tuple[float, ...] = (0.09, 0.2, 0.3)  # of the watershed

    def __post_init__(self):
        thresholds(self.peak, self.fill)
        if wrong := [cap for cap in self.cap if cap is not None and not cap > 0]:
            raise ValueError(f"cap={wrong[0]:g}: expected more than 0 px, or null for none")


def thresholds(peaks: Iterable[float], fills: Iterable[float]) -> list[tuple[float, float]]:
    pairs = [(peak, fill) for peak, fill in product(peaks, fills) if 0 <= fill <= peak < 1]
    if not pairs:
        raise ValueError(f"peak={list(peaks)}, fill={list(fills)}: no pair with 0 <= fill <= peak < 1")
    return pairs


def encodings(place: DataSet, found: list, grid: Encoding, score: str, folder: Path) -> list[dict]:
    """What true labels score that went through distance map and watershed: a row per setting, best first."""
    import metrics
    from watershed import distance_map, watershed
    settings = [(cap, *pair) for cap, pair in product(grid.cap, thresholds(grid.peak, grid.fill))]

    def measure() -> list[dict]:
        tables = [[] for _ in settings]
        for example in progress(found, f"{CEILING} of {place.name}"):
            truth = example.labels()
            maps = {cap: distance_map(truth, cap) for cap in grid.cap}
            for own, (cap, peak, fill) in zip(tables, settings):
                own.append(metrics.overlap(truth, watershed(maps[cap], peak, fill)))
        rows = [{"set": place.name, "cap": cap, "peak": peak, "fill": fill, "n": len(own),
                 **columns_of(metrics.set_scores(own))} for (cap, peak, fill), own in zip(settings, tables)]
        return without_nan(sorted(rows, key=lambda line: -line[score]))

    key = dict(settings=settings, score=score, truths=[digest(example.labels()) for example in found])
    rows = kept(folder / CEILING / place.name / "encodings.json", key, measure)
    return [{**line, "set": place.name} for line in rows]       # the content counts, not the name it had


# ------------------------------------------------------------------------------------- the network's view

def swept(item: Item, place: DataSet, network: Network, settings: list[dict]) -> list[dict]:
    """Scores of one image with each setting."""
    import metrics
    views: dict[tuple, Recorded] = {}
    rows = []
    for setting in settings:
        net = views.setdefault((setting["tile"], setting["overlap"], setting["scale"]), Recorded(network.net))
        net.at = 0
        scores = metrics.scores(item.truth, segmented(item, place, net, batch=network.batch, **setting))
        rows.append({name: scores[name] for name in COMPARED})
    return rows


class Recorded:
    """A network that is asked for the same tiles in the same order again and again, and runs only once."""

    def __init__(self, net):
        self.net, self.tiles, self.at = net, [], 0

    def __getattr__(self, name: str):                           # in all else it is the network
        return getattr(self.net, name)

    def __call__(self, x):                                      # (B, 3, tile, tile) -> (B, 1, tile, tile)
        import torch
        if self.at == len(self.tiles):
            self.tiles += self.net(x)
        self.at += len(x)
        return torch.stack(self.tiles[self.at - len(x):self.at])


def best_setting(rows: list[dict], settings: list[dict], score: str) -> dict:
    """The setting with the highest score, mean over the sets in rows; of equal ones the first."""
    def mean(setting: dict) -> float:
        value = mean_defined(line[score] for line in rows if setting.items() <= line.items())
        return -math.inf if math.isnan(value) else value
    return max(settings, key=mean)


def mean_defined(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return sum(defined) / len(defined) if defined else math.nan


# ---------------------------------------------------------------------------------- post-processing

class Gateable(NamedTuple):
    name: str
    table: Any                              # metrics.Overlap: R true cells, S predicted ones
    marker: np.ndarray                      # (S,) mean intensity
    cut: np.ndarray                         # (S,) bool, by the edge of the image
    cut_true: np.ndarray                    # (R,) bool


def gateable(item: Item, folder: Path) -> Gateable:
    import data
    import metrics
    path = folder / f"{item.name}_pred.tif"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such prediction; run evaluate.py bench on this set, and give "
                                "predictions=runs/EXPERIMENT/MODEL")
    labels = same_size(data.read_labels(path), item, str(path))
    table = metrics.overlap(item.truth, labels)
    ids, cell = np.unique(labels, return_inverse=True)
    cell = cell.ravel()
    marker = (np.bincount(cell, item.pixels[0].ravel()) / np.bincount(cell))[ids > 0]
    return Gateable(item.name, table, marker, np.isin(table.pred_ids, at_edge(labels)),
                    np.isin(table.truth_ids, at_edge(item.truth)))


def at_edge(labels: np.ndarray) -> np.ndarray:
    """Ids that the edge of the image cuts."""
    return np.unique(np.concatenate([labels[0], labels[-1], labels[:, 0], labels[:, -1]]))


def gated(seen: list[Gateable], over: str, least: int, window: tuple[float, ...], border: str
          ) -> tuple[Result, int]:
    """The scores with one setting, and how many predicted cells it removes."""
    import metrics
    every, tables, removed = np.concatenate([image.marker for image in seen]), [], 0
    for image in seen:
        among = image.marker if over == "image" else every
        low, high = np.percentile(among, window) if len(among) else (0, 0)
        keep = (image.table.pred_areas >= least) & (image.marker >= low) & (image.marker <= high)
        keep &= (border == "keep") | ~image.cut
        removed += np.count_nonzero(~keep)
        tables.append(without(image.table, keep, (border != "both") | ~image.cut_true))
    names = [image.name for image in seen]
    return Result("gated", "", Path(), names, tables, metrics.set_scores(tables), [], None), removed


def without(table, keep: np.ndarray, keep_true: np.ndarray):
    """The overlap table as if cells had been erased, but for keep (S,) and keep_true (R,) or one for all."""
    keep_true = np.broadcast_to(keep_true, table.truth_ids.shape)
    pairs = keep_true[table.rows] & keep[table.cols]
    return table._replace(truth_ids=table.truth_ids[keep_true], truth_areas=table.truth_areas[keep_true],
                          pred_ids=table.pred_ids[keep], pred_areas=table.pred_areas[keep],
                          rows=(np.cumsum(keep_true) - 1)[table.rows[pairs]],
                          cols=(np.cumsum(keep) - 1)[table.cols[pairs]], counts=table.counts[pairs])
