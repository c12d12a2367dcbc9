"""A series of training runs in one command: label efficiency over budgets, channels, ablations.

    code = series.run_all(config, train, rank, world, device)      train(config, rank, world, device) -> exit code

Called by train_seg.py when the configuration has series.budgets, series.channels or series.variants
(configs/budget.yaml, channel.yaml, ablation.yaml). In runs/<experiment>/, weights and a folder for each run, and

    records.tsv     a row for each run and test set: variant, channel, budget, seed, images and scores
    summary.json    mean, spread and number of seeds for each set, variant, channel and budget
    budget.png      AP@0.5 over labelled images, a dot for each seed, a line through their means
"""
from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import runs
import trainset


@dataclass(frozen=True)
class Series:
    budgets: tuple[int, ...] = ()           # images of each set to train on; those of 10 are among those of 20
    channels: tuple[str, ...] = ()          # of the images, numbers from 1 or names: a network for each
    variants: dict = field(default_factory=dict)    # {name: {key: value}}, what each changes in the configuration
    seeds: tuple[int, ...] = (0, 1, 2)      # of lot, network and crops
    test: tuple[trainset.Set, ...] = ()     # sets in data.root that the weights are scored on

    def __post_init__(self):
        if self and not (self.seeds and self.test):
            raise ValueError("series: expected series.seeds and series.test (sets to score on) as well")
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(f"series.budgets={list(self.budgets)}: expected 1 image or more")

    def __bool__(self) -> bool:
        return bool(self.budgets or self.channels or self.variants)


SCORES = ("AP@0.5", "AP@0.75", "AP@0.9", "F1", "SEG")
KEYS = ("variant", "channel", "budget", "seed")               # of a run


def run_all(config, train: Callable[..., int], rank: int, world: int, device: str) -> int:
    """Every run that has no row in records.tsv yet; an interrupted one goes on from its checkpoint."""
    folder = Path(config.output_base_dir) / "runs" / config.experiment
    jobs = [(key, one, fingerprint(one)) for key, one in plan(config, folder)]        # all is checked before any starts
    for key, one, mark in jobs:
        if known(folder / "records.tsv", key, mark):
            continue
        if code := train(one, rank, world, device):
            return code
        if rank == 0:
            rows = [dict(**key, set=s.name, **score(one, s, device), config=mark) for s in config.series.test]
            write(folder / "records.tsv", records(folder / "records.tsv") + rows)
            summarise(folder)
    return 0


def plan(config, folder: Path):
    """(key, configuration) of every run."""
    asked = config.series
    for variant, channel, budget, seed in itertools.product(
            asked.variants or (None,), asked.channels or (None,), sorted(asked.budgets) or (None,), asked.seeds):
        name = "_".join([*([variant] if variant else []), *([f"channel_{channel}"] if channel else []),
                         *([f"budget_{budget:03d}"] if budget else []), f"seed_{seed}"])
        one = changed(config, asked.variants[variant], f"series.variants.{variant}") if variant else config
        chosen = dataclasses.replace(one.data, limit=budget or one.data.limit,
                                     channels=(channel,) if channel else one.data.channels)
        yield (dict(zip(KEYS, (variant or "-", channel or "all", budget or "all", seed))),
               dataclasses.replace(one, experiment=f"{config.experiment}/{name}", seed=seed, data=chosen,
                                   export_path=str(folder / f"{name}.pt"), series=Series()))


def changed(config, changes: dict, origin: str):
    """The configuration with {key: value} put in, sections merged; unknown keys are an error."""
    import yaml

    def merge(values: dict, new: dict) -> dict:
        return {**values, **{k: merge(values[k], v) if isinstance(v, dict) and isinstance(values.get(k), dict) else v
                             for k, v in new.items()}}
    return runs.from_dict(type(config), merge(yaml.safe_load(runs.to_yaml(config)), changes), origin)


def fingerprint(config) -> str:
    """Of all in a configuration that may change a result."""
    import yaml
    values = runs.flatten(yaml.safe_load(runs.to_yaml(config)))
    kept = {k: v for k, v in values.items() if k not in (*runs.FREE, "export_path")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def known(path: Path, key: dict, config: str) -> bool:
    found = {row["config"] for row in records(path) if all(row[k] == str(v) for k, v in key.items())}
    if found - {config}:
        raise ValueError(f"{path}: its rows were made with another configuration; give a new experiment=, "
                         "or remove the folder to begin anew")
    return bool(found)


def records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write(path: Path, rows: list[dict]) -> None:
    head = list(rows[0])
    runs.write_text(path, "".join("\t".join(map(str, line)) + "\n" for line in
                                  [head, *([row[key] for key in head] for row in rows)]))


def score(config, chosen: trainset.Set, device: str) -> dict:
    """Means over the images of a test set, at the thresholds that are stored with the weights."""
    import metrics
    import model
    import segment
    net = model.load(config.export_path).to(device)
    entries = [trainset.read(e, chosen.name) for e in trainset.examples(config.data, chosen)]
    tables = [metrics.overlap(e.labels, segment.segment(e.pixels, net, limits=segment.UNIT)) for e in entries]
    mean = metrics.set_scores(tables, n=1).mean
    return dict(images=len(entries), **{name: round(float(mean[name]), 5) for name in SCORES})


def summarise(folder: Path) -> None:
    """summary.json and budget.png from records.tsv."""
    import report
    rows = records(folder / "records.tsv")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["set"], *(row[key] for key in KEYS[:-1])), []).append(row)
    summary = [dict(zip(("set", *KEYS), of), seeds=len(found), **{s: spread(found, s) for s in SCORES})
               for of, found in groups.items()]
    runs.write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    points: dict[str, list] = {}
    for row in rows:
        line = " ".join([row["set"], *(row[key] for key in ("variant", "channel") if row[key] not in ("-", "all"))])
        if row["budget"] != "all":
            points.setdefault(line, []).append((int(row["budget"]), float(row["AP@0.5"])))
    if points:
        report.spread(folder / "budget.png", points, "labelled images", "AP@0.5")


def spread(rows: list[dict], name: str) -> dict[str, float | None]:
    values = [float(row[name]) for row in rows]
    return dict(mean=float(np.mean(values)), min=min(values), max=max(values),
                sd=float(np.std(values, ddof=1)) if len(values) > 1 else None)
