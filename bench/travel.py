"""What each part of training brings on sets that a network never saw: leave sets out.

    python bench/travel.py configs/travel.yaml [shard=1/2] [key=value ...]

For each fold and each seed the small network is trained on all other sets, its watershed is set on
their held-out images, and it is scored on the groups that were left out. Each such run has about
half of the parts, by the rows of a Hadamard matrix: the first has all, every part is in half of
them, and no two go together, so that every run tells about every part. From fold to fold the parts
change columns, and with them the pairs whose common effect a column cannot tell from its own.

`home`, where the watershed was set, flatters; groups left out do not. Images are scaled by their
true median diameter: this is about looks, not about size. Only images to
train on are read: `test` has no say. Each result is a line of runs/<experiment>/results.jsonl; what
is there is not done again, and several processes may share the work by shard=. Beside it lie the
networks, FOLD_ROW_SEED.pt, for bench/fewshot.py to begin with. At the end it prints the table: what
a part brings to AP@0.5, with minus without it, by least squares over all runs.
"""
from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402  (the folder above)
import runs  # noqa: E402
import train_seg  # noqa: E402


@dataclass(frozen=True)
class Config:
    groups: dict                            # {name: paths of sets that are of one kind}
    folds: tuple[tuple[str, ...], ...]      # names of the groups that are left out together
    parts: dict                             # {name: changes to train that take the part out}
    train: dict                             # of train_seg.py: network, data, augment, steps ...
    experiment: runs.Name = "travel"        # folder of the results
    output_base_dir: str = "."              # where runs/ is
    seeds: tuple[int, ...] = (0, 1, 2)      # of the network and the crops
    images: int = 8                         # of each set, to set the watershed and to score, by lot
    shard: str = "1/1"                      # which part of the work

    def __post_init__(self):
        for name in (name for fold in self.folds for name in fold):
            if name not in self.groups:
                raise ValueError(f"folds: {name!r} is none of groups, {list(self.groups)}")


class Run(NamedTuple):
    fold: int                               # number in config.folds
    row: int                                # of the design: which parts it has
    seed: int


def main(config: Config, files: list[str]) -> int:
    out = Path(config.output_base_dir) / "runs" / config.experiment / "results.jsonl"
    out.parent.mkdir(parents=True, exist_ok=True)
    part, parts = runs.shard_of(config.shard)
    key = runs.digest(dataclasses.replace(config, shard="1/1", seeds=(0,), output_base_dir=""))[:16]
    if any(line.get("config", key) != key for line in lines(out)):
        raise ValueError(f"{out}: has runs of another configuration; give another experiment=")
    done = {Run(line["fold"], line["row"], line["seed"]) for line in lines(out)}
    for run in [run for run in planned(config)[part - 1::parts] if run not in done]:
        begin = time.perf_counter()
        line: dict = dict(run._asdict(), without=missing(config, run), config=key)
        line |= left_out(config, run, out.parent)
        line["minutes"] = round((time.perf_counter() - begin) / 60, 2)
        with open(out, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(line, flush=True)
    print(table(config, lines(out)))
    return 0


def planned(config: Config) -> list[Run]:
    """All runs; the first third, or whatever share, has every fold and all seeds."""
    rows, seeds = range(len(design(len(config.parts)))), config.seeds
    return [Run(fold, row, seeds[(fold + turn) % len(seeds)]) for turn in range(len(seeds))
            for fold in range(len(config.folds)) for row in rows]


def design(n: int) -> np.ndarray:
    """(rows, n) bool, which of n parts a run has: all in the first row, each in half of the rows,
    any two together in a quarter."""
    from scipy.linalg import hadamard
    return hadamard(1 << n.bit_length())[:, 1:n + 1] > 0


def missing(config: Config, run: Run) -> list[str]:
    """The parts that a run goes without."""
    present = np.roll(design(len(config.parts))[run.row], run.fold)
    return [name for name, there in zip(config.parts, present) if not there]


def lines(path: Path) -> list[dict]:
    return [json.loads(line)
            for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def left_out(config: Config, run: Run, out: Path) -> dict[str, Any]:
    """Train without the groups of a fold, and keep the network in the folder `out`; AP@0.5 of each
    group and of the other sets' held-out images, and the last loss."""
    import torch

    import augment
    import model
    one = changed(config, missing(config, run), run.seed)
    away = {group: [chosen.name for chosen in one.data.sets if chosen.path in config.groups[group]]
            for group in config.folds[run.fold]}
    for group, names in away.items():
        if len(names) < len(config.groups[group]):
            raise ValueError(f"groups.{group}: expected paths of data.sets, got "
                             f"{config.groups[group]}")
    strange = {name for names in away.values() for name in names}
    images, held, strangers = loaded(json.dumps(dataclasses.asdict(one.data)), one.cap,
                                     config.images)
    images.weigh({chosen.name: 0.0 if chosen.name in strange else chosen.weight
                  for chosen in one.data.sets})
    torch.manual_seed(run.seed)
    net = train_seg.build_train_seg_net(one, images.diameter)
    trainer = train_seg.Trainer(one, net, "cpu")
    changes = runs.from_dict(augment.Augment, one.augment, "augment")
    losses = []
    for step in range(one.steps):
        sample = np.arange(one.batch) + step * one.batch
        chosen, batch = train_seg.training_crops(one, images, changes, sample)
        factor = train_seg.train_seg_rate(one, step)
        losses.append(trainer.step(batch, factor, chosen)[0].item())
    average: Any = trainer.average.module
    home, abroad, setting = scored(average.ready("cpu"),
                                   [entry for entry in held if entry.set not in strange],
                                   [entry for entry in strangers if entry.set in strange])
    average.settings = dataclasses.replace(net.settings, **setting._asdict())
    model.save(average, out / f"{'-'.join(away)}_{run.row}_{run.seed}.pt")
    return {"home": float(np.mean(list(home.values()))),
            "abroad": {group: float(np.mean([abroad[name] for name in names]))
                       for group, names in away.items()},
            "loss": float(np.mean(losses[-50:]))}


def changed(config: Config, without: Iterable[str] = (), seed: int = 0) -> train_seg.Config:
    values = {**config.train, "seed": seed}
    for name in without:
        values = merged(values, config.parts[name])
    return runs.from_dict(train_seg.Config, values, "train")


def merged(old: dict, new: dict) -> dict:
    """Values of a configuration, with some keys of some sections changed."""
    return old | {key: merged(old.get(key, {}), value) if isinstance(value, dict) else value
                  for key, value in new.items()}


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


def scored(net, home: list, strangers: list) -> tuple[dict[str, float], dict[str, float], Any]:
    """AP@0.5 of each set of both, a mean over its images, with the one setting that serves the mean
    over the sets at home best; and the setting."""
    import metrics
    import segment
    from watershed import flood, tune
    maps = {id(entry): segment.distances(entry.pixels, net, limits=segment.UNIT, zoom=1.0)
            for entry in home + strangers}

    def by_set(entries: list, setting, *ious: list) -> dict[str, float]:
        return train_seg.mean_by_set(entries, [float(metrics.average_precision(
            entry.labels, flood(maps[id(entry)], setting), *ious).mean()) for entry in entries])

    best = tune(lambda setting: float(np.mean(list(by_set(home, setting).values()))),
                depth=(0.0, 0.05, 0.1, 0.2), smooth=(0.0, 1.0), shape=(0.0,), min_area=(0,))
    return by_set(home, best, [0.5]), by_set(strangers, best, [0.5]), best


def effects(config: Config, found: list[dict], score: str) -> list[tuple[float, float]]:
    """(gain, standard error) of each part in line[score], or in its mean over groups: least squares
    over all runs, with a constant for each fold and seed. No error where nothing is left over."""
    values = np.array([np.mean(list(line[score].values())) if isinstance(line[score], dict)
                       else line[score] for line in found])
    blocks = [(line["fold"], line["seed"]) for line in found]
    columns = np.array([[*(block == mine for block in dict.fromkeys(blocks)),
                         *(name not in line["without"] for name in config.parts)]
                        for mine, line in zip(blocks, found)], float)
    inverse = np.linalg.pinv(columns)
    gains = inverse @ values
    spare = len(values) - np.linalg.matrix_rank(columns)
    spread = np.sum((values - columns @ gains) ** 2) / spare if spare else np.nan
    errors = np.sqrt(spread * np.diag(inverse @ inverse.T))
    return list(zip(gains.tolist(), errors.tolist()))[-len(config.parts):]


def table(config: Config, found: list[dict]) -> str:
    """Markdown: what each part brings to each group that was left out, to their mean with its
    standard error, and at home; below, the scores themselves."""
    where = {name: [line for line in found if name in line["abroad"]] for name in config.groups}
    rows = [["part", *config.groups, "mean abroad", "home"]]
    single = {name: effects(config, [{**line, "abroad": line["abroad"][name]} for line in some],
                            "abroad")
              for name, some in where.items() if some}
    abroad, home = (effects(config, found, score) for score in ("abroad", "home"))
    for i, part in enumerate(config.parts):
        rows.append([part, *(f"{single[name][i][0]:+.3f}" if name in single else "-"
                             for name in config.groups),
                     *(f"{gain:+.3f} ± {error:.3f}" for gain, error in (abroad[i], home[i]))])
    means = [float(np.mean([line["abroad"][name] for line in some] or [np.nan]))
             for name, some in where.items()]
    rows.append([f"mean of {len(found)} runs", *(f"{value:.3f}" for value in means),
                 f"{np.nanmean(means):.3f}", f"{np.mean([line['home'] for line in found]):.3f}"])
    return report.markdown(rows[0], rows[1:], words=len(rows[0]))


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
