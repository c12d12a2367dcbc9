"""How well a network does on a set that it never saw, and what each part of training brings there:
leave one set out.

    python bench/travel.py configs/travel.yaml [shard=1/2] [key=value ...]

For each variant, each group of sets and each seed, the small network is trained on all other sets,
its watershed is set on their held-out images, and it is scored on the group that was left out.
Images are scaled by their true median diameter: this is about looks, not about size. Only images to
train on are read: `test` has no say. Each result is a line of runs/<experiment>/results.jsonl; what
is there is not done again, and several processes may share the work by shard=. Beside it lie the
networks, VARIANT_GROUP_SEED.pt, for bench/fewshot.py to begin with. At the end it prints the table:
mean over seeds, and the difference to the first variant.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import runs  # noqa: E402  (the folder above)
import train_seg  # noqa: E402


@dataclass(frozen=True)
class Config:
    groups: dict                            # {name: [paths of sets that are left out together]}
    variants: dict  # {name: changes to train}; the first is what the others are compared with
    train: dict                             # of train_seg.py: network, data, augment, steps ...
    experiment: str = "travel"              # folder of the results
    output_base_dir: str = "."              # where runs/ is
    seeds: tuple[int, ...] = (0, 1, 2)      # of the network and the crops
    images: int = 8                         # of each set, to set the watershed and to score, by lot
    shard: str = "1/1"                      # which part of the work


def main(config: Config, files: list[str]) -> int:
    out = Path(config.output_base_dir) / "runs" / config.experiment / "results.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    part, parts = runs.shard_of(config.shard)
    jobs = [(seed, variant, group) for seed in config.seeds for variant in config.variants
            for group in config.groups]
    done = {(line["seed"], line["variant"], line["group"]) for line in lines(out)}
    for job in [job for job in jobs if job not in done][part - 1::parts]:
        begin = time.perf_counter()
        scores = left_out(config, *job, out.parent)
        line = dict(zip(("seed", "variant", "group"), job), **scores,
                    minutes=round((time.perf_counter() - begin) / 60, 2))
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
    print(table(config, lines(out)))
    return 0


def lines(path: Path) -> list[dict]:
    return [json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def left_out(config: Config, seed: int, variant: str, group: str, out: Path) -> dict[str, float]:
    """Train without a group, and keep the network in the folder `out`; AP@0.5 of the group and of
    the other sets' held-out images, and the last loss."""
    import torch

    import augment
    import model
    one = changed(config, variant, seed)
    away = [chosen.name for chosen in one.data.sets if chosen.path in config.groups[group]]
    if len(away) < len(config.groups[group]):
        raise ValueError(f"groups.{group}: expected paths of data.sets, got {config.groups[group]}")
    images, held, strangers = loaded(json.dumps(dataclasses.asdict(one.data)), one.cap,
                                     config.images)
    images.weigh({chosen.name: 0.0 if chosen.name in away else chosen.weight
                  for chosen in one.data.sets})
    torch.manual_seed(seed)
    net = train_seg.build_segmentation_net(one)
    net.settings = dataclasses.replace(net.settings, diameter=images.diameter)
    trainer = train_seg.Trainer(one, net, "cpu")
    changes = runs.from_dict(augment.Augment, one.augment, "augment")
    losses = []
    for step in range(one.steps):
        sample = np.arange(one.batch) + step * one.batch
        chosen = images.draw(seed, sample)
        batch = augment.sample(images, chosen, sample, changes, one.crop, seed, one.cap)
        factor = train_seg.segmentation_rate(one, step)
        losses.append(trainer.step(batch, factor, chosen)[0].item())
    average: Any = trainer.average.module
    scores, setting = scored(average.ready("cpu"),
                             [entry for entry in held if entry.set not in away],
                             [entry for entry in strangers if entry.set in away])
    average.settings = dataclasses.replace(net.settings, **setting._asdict())
    model.save(average, out / f"{variant}_{group}_{seed}.pt")
    return dict(scores, loss=float(np.mean(losses[-50:])))


def changed(config: Config, variant: str, seed: int = 0) -> train_seg.Config:
    values = runs.flat_config(config.train) | runs.flat_config(config.variants[variant] or {})
    return runs.from_dict(train_seg.Config, nested({**values, "seed": seed}), variant)


@functools.cache
def loaded(text: str, cap: float | None, count: int) -> tuple:
    """(all sets for training, their held-out images, images of theirs to score when they are left
    out), once a process; of data.TrainingData as JSON, which can be compared."""
    import augment
    import data
    wanted = runs.from_dict(data.TrainingData, json.loads(text), "data")
    if wanted.diameter is None:
        raise ValueError("train.data.diameter: expected px that cells are scaled to")
    images, held, _ = augment.load_resident(wanted, 0, "cpu", cap)
    strangers = [data.read_labelled(example, chosen.name, {}) for chosen in wanted.sets
                 for example in lot(data.training_examples(wanted, chosen), count)]
    held = [entry for entry in held if entry.held]
    return images, *(few(some, count, wanted.diameter) for some in (held, strangers))


def lot(items: list, count: int) -> list:
    """Up to `count` of them, always the same ones."""
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))[:count]]


def few(entries: list, count: int, diameter: float, side: int = 448) -> list:
    """Up to `count` of each set with cells, scaled so that median cells are `diameter` wide, and no
    more than their middle."""
    from skimage.transform import resize

    import data
    kept = []
    for name in dict.fromkeys(entry.set for entry in entries):
        for entry in lot([entry for entry in entries if entry.set == name], count):
            if not (wide := data.median_diameter(entry.labels)):
                continue
            size = [max(8, round(n * diameter / wide)) for n in entry.labels.shape]
            pixels = resize(entry.pixels, (3, *size), order=1,
                            anti_aliasing=diameter < wide).astype(np.float32)
            labels = resize(entry.labels, size, order=0, anti_aliasing=False,
                            preserve_range=True).astype(np.int32)
            y, x = (slice(max(0, (n - side) // 2), max(0, (n - side) // 2) + side) for n in size)
            kept.append(entry._replace(pixels=np.ascontiguousarray(pixels[:, y, x]),
                                       labels=labels[y, x]))
    return [entry for entry in kept if entry.labels.any()]


def nested(flat: dict) -> dict:
    """{'data.root': x} -> {'data': {'root': x}}"""
    whole: dict = {}
    for key, value in flat.items():
        *sections, last = key.split(".")
        inner = whole
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[last] = value
    return whole


def scored(net, home: list, strangers: list) -> tuple[dict[str, float], Any]:
    """AP@0.5 of both, a mean over images of a set and then over sets, with the one setting that
    serves home best; and the setting."""
    import metrics
    import segment
    from watershed import flood, tune
    maps = {id(entry): segment.distances(entry.pixels, net, limits=segment.UNIT, zoom=1.0)
            for entry in home + strangers}

    def by_set(entries: list, setting, *ious: list) -> dict[str, float]:
        values: dict[str, list[float]] = {}
        for entry in entries:
            found = flood(maps[id(entry)], setting)
            values.setdefault(entry.set,
                              []).append(float(metrics.average_precision(entry.labels, found,
                                                                         *ious).mean()))
        return {name: float(np.mean(some)) for name, some in values.items()}

    best = tune(lambda setting: float(np.mean(list(by_set(home, setting).values()))),
                depth=(0.0, 0.05, 0.1, 0.2),
                smooth=(0.0, 1.0), shape=(0.0,), min_area=(0,))
    scores: dict[str, float] = {}
    for side, entries in (("home", home), ("abroad", strangers)):
        found = by_set(entries, best, [0.5])
        scores |= {side: float(np.mean(list(found.values()))),
                   **{f"{side} {name}": value for name, value in found.items()}}
    return scores, best


def table(config: Config, found: list[dict]) -> str:
    """Markdown: a row for each variant, a column for each group that was left out, means over the
    seeds."""
    names = list(config.groups)
    rows = [["variant", *names, "mean abroad", "against the first", "home", "runs"]]
    first = None
    for variant in config.variants:
        mine = [line for line in found if line["variant"] == variant]
        means = [np.mean([line["abroad"] for line in mine if line["group"] == name] or [np.nan])
                 for name in names]
        shared = {(line["seed"], line["group"]): line["abroad"] for line in mine}
        first = first or shared
        gains = [shared[job] - first[job] for job in shared if job in first]
        home = np.mean([line["home"] for line in mine] or [np.nan])
        rows.append([variant,
                     *(f"{value:.3f}" for value in [*means, np.nanmean(means) if mine else np.nan]),
                     f"{np.mean(gains or [np.nan]):+.3f} ± "
                     f"{np.std(gains or [np.nan]) / max(1, len(gains)) ** .5:.3f}", f"{home:.3f}",
                     str(len(mine))])
    return "\n".join("| " + " | ".join(row) + " |" for row in [rows[0], ["---"] * len(rows[0]),
                                                               *rows[1:]])


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
