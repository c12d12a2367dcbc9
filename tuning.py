"""Settings and what they change: of the encoding, of the watershed, of what is kept of a prediction.

    best = encodings(place, found, Encoding(), "DSB", folder)[0]  # true labels -> distance map -> watershed
    best = tuned(distances, truths, sets)                         # what the watershed should be set to: while one trains
    rows = swept(item, place, network, settings)                  # the network runs once per tile and scale
    result, removed = gated(images, "set", 20, (2, 98), "drop")   # of saved predictions, cells left out
"""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from measure import (CEILING, COMPARED, DataSet, Item, Network, Result, columns_of, digest, kept,
                     progress, same_size, segmented, without_nan)

PEAKS, FILLS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8), (0.1, 0.15, 0.2, 0.25, 0.3, 0.4)   # of the watershed
DEPTHS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4)   # of the valley between two cells
SMOOTHS = (0.0, 0.7, 1.0, 1.5, 2.5)             # px
SHAPES = (0.0, 0.05, 0.1)                       # per px
AREAS = (0, 10, 20, 40, 80, 160, 320)           # px, smallest cells


# -------------------------------------------------------------------------------- the encoding, the watershed

@dataclass(frozen=True)
class Encoding:
    cap: tuple[float | None, ...] = (None, 2.0, 4.0, 8.0)  # px, of data.distance_map; null: none; []: no row
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
    import data
    import metrics
    from watershed import watershed
    settings = [(cap, *pair) for cap, pair in product(grid.cap, thresholds(grid.peak, grid.fill))]

    def measure() -> list[dict]:
        tables = [[] for _ in settings]
        for example in progress(found, f"{CEILING} of {place.name}"):
            truth = example.labels()
            maps = {cap: data.distance_map(truth, cap) for cap in grid.cap}
            for own, (cap, peak, fill) in zip(tables, settings):
                own.append(metrics.overlap(truth, watershed(maps[cap], peak, fill)))
        rows = [{"set": place.name, "cap": cap, "peak": peak, "fill": fill, "n": len(own),
                 **columns_of(metrics.set_scores(own))} for (cap, peak, fill), own in zip(settings, tables)]
        return without_nan(sorted(rows, key=lambda line: -line[score]))

    key = dict(settings=settings, score=score, truths=[digest(example.labels()) for example in found])
    rows = kept(folder / CEILING / place.name / "encodings.json", key, measure)
    return [{**line, "set": place.name} for line in rows]       # the content counts, not the name it had


class Setting(NamedTuple):
    """Of the watershed, in the order of its arguments."""
    peak: float
    fill: float
    min_area: int = 0                       # px
    depth: float = 0.0
    smooth: float = 0.0                     # px
    shape: float = 0.0                      # per px


class Tuned(NamedTuple):
    """Of all sets together."""
    setting: Setting
    score: float                            # AP over IoU 0.5 to 0.95: mean over images of a set, then over sets by weight
    labels: list[np.ndarray]                # (H, W) of each image, with this setting
    sets: dict[str, OwnBest]


class OwnBest(NamedTuple):
    """Of one set: what it reaches with the setting of all, and with the one that suits it best."""
    images: int
    score: float
    own_score: float
    setting: Setting


def tuned(distances: Sequence[np.ndarray], truths: Sequence[np.ndarray], sets: Sequence[str] | None = None,
          peaks: Sequence[float] = PEAKS, fills: Sequence[float] = FILLS, min_areas: Sequence[int] = (0,),
          depths: Sequence[float] = (0.0,), smooths: Sequence[float] = (0.0,), shapes: Sequence[float] = (0.0,),
          weights: Mapping[str, float] | None = None, zooms: Sequence[float] | None = None,
          counted: Sequence[bool] | None = None, device: str = "cpu",
          each: Callable[[Callable, list], list] = lambda function, items: [function(item) for item in items]) -> Tuned:
    """The setting that serves all sets best, and from there what is best for each; of equal ones the first.

    Every peak, every fill, every pair of depth and smoothing, of depth and shape, every smallest area, each with the best
    of the others so far, and again until nothing is gained: from the first of all and from their middle, which may end at
    different ones. A set of many images counts as much as one of few, or as `weights` says by its name.
    distances, truths : (H, W) of each image; sets : the name of its set; zooms : px of the network for each px of
    theirs, 1 or less: lengths are of the network's; counted : whether the scores are of it too, while all choose the setting;
    device : where the maps are flooded; each(function, items) : where processes share the work, Run.each.
    """
    import torch
    import metrics
    from watershed import lengths, watershed
    maps = [torch.from_numpy(np.ascontiguousarray(distance)).to(device) for distance in distances]
    members: dict[str, list[int]] = {}
    for number, name in enumerate(sets or [""] * len(truths)):
        members.setdefault(name, []).append(number)

    def found(i: int, setting: Setting) -> np.ndarray:
        (peak, fill, area, depth, smooth, shape), zoom = setting, zooms[i] if zooms else 1.0
        return watershed(maps[i], peak, fill, round(area / zoom**2), depth, *lengths(smooth, shape, zoom)).cpu().numpy()

    def scores(job: tuple[str, Setting]) -> list[float]:
        return [float(metrics.average_precision(truths[i], found(i, job[1])).mean()) for i in members[job[0]]]
    known: dict[tuple[str, Setting], list[float]] = {}
    share = {name: (weights or {}).get(name, 1.0) for name in members}

    def total(names: Iterable[str], setting: Setting) -> float:
        return sum(share[name] * float(np.mean(known[name, setting])) for name in names)

    def reached(name: str, setting: Setting) -> float:
        return float(np.mean([value for i, value in zip(members[name], known[name, setting]) if not counted or counted[i]]))

    def search(names: list[str], best: Setting) -> Setting:
        axes = ([dict(peak=peak) for peak in peaks], [dict(fill=fill) for fill in fills],
                [dict(depth=depth, smooth=smooth) for depth, smooth in product(depths, smooths)],
                [dict(depth=depth, shape=shape) for depth, shape in product(depths, shapes)],
                [dict(min_area=area) for area in min_areas])
        before = None
        while best != before:
            before = best
            for axis in axes:
                tried = dict.fromkeys([best, *(best._replace(**change) for change in axis)])
                tried = [setting for setting in tried if setting.fill <= setting.peak]
                jobs = [job for job in product(names, tried) if job not in known]
                known.update(zip(jobs, each(scores, jobs)))
                best = max(tried, key=lambda setting: total(names, setting))
        return best

    def start(which: Callable[[Sequence], Any]) -> Setting:
        pairs, pair = thresholds(peaks, fills), (which(peaks), which(fills))
        return Setting(*(pair if pair in pairs else pairs[0]), *map(which, (min_areas, depths, smooths, shapes)))

    shared = max((search(list(members), begin) for begin in dict.fromkeys((start(first), start(middle)))),
                 key=lambda setting: total(members, setting))
    own = {name: search([name], shared) for name in members}
    return Tuned(shared, sum(share[name] * reached(name, shared) for name in members) / sum(share.values()),
                 [found(i, shared) for i in range(len(distances))],
                 {name: OwnBest(sum(not counted or counted[i] for i in members[name]), reached(name, shared),
                                reached(name, best), best) for name, best in own.items()})


def first(values: Sequence):
    return values[0]


def middle(values: Sequence):
    return values[(len(values) - 1) // 2]


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

    def with_decoder(self, name: str | None) -> Recorded:       # an image is of one kind, however often it is asked for
        self.net = self.net.with_decoder(name)
        return self

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
