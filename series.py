"""A series of training runs in one command: label efficiency over budgets, channels, ablations.

    code = series.run_all(config, train, rank, world, device)      train(config, rank, world, device) -> exit code

Called by train_seg.py when the configuration has series.budgets, series.channels or series.variants
(configs/budget.yaml, channel.yaml, ablation.yaml). In runs/<experiment>/, weights and a folder for each run, and

    records.tsv     a row for each run and test set: variant, channel, budget, seed, images and scores
    summary.json    mean, spread and number of seeds for each set, variant, channel and budget
    table.md        the same to be read; with series.markdown in that document too, between two lines of comment
    budget.png      AP@0.5 over labelled images, a dot for each seed, a line through their means

The same command, started once for each core or GPU, shares the work: each process takes a run that no other is at.
"""
from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import runs
import data


@dataclass(frozen=True)
class Series:
    budgets: tuple[int, ...] = ()           # images of each set to train on; those of 10 are among those of 20
    channels: tuple[str, ...] = ()          # of the images, numbers from 1 or names: a network for each
    variants: dict = field(default_factory=dict)    # {name: {key: value}}, what each changes in the configuration
    seeds: tuple[int, ...] = (0, 1, 2)      # of lot, network and crops
    test: tuple[data.TrainingSet, ...] = ()     # sets in data.root that the weights are scored on
    markdown: str | None = None             # document to put table.md into

    def __post_init__(self):
        if not self and (self.test or self.markdown):
            raise ValueError("series.test and series.markdown: expected series.budgets, series.channels or series.variants as well")
        if self and not (self.seeds and self.test):
            raise ValueError("series: expected series.seeds and series.test (sets to score on) as well")
        if any(budget < 1 for budget in self.budgets):
            raise ValueError(f"series.budgets={list(self.budgets)}: expected 1 image or more")
        if zoomed := [test.name for test in self.test if test.zoom != 1]:
            raise ValueError(f"series.test: {zoomed[0]} has a zoom; that is for sets to learn from, and the weights keep it. Leave it out")

    def __bool__(self) -> bool:
        return bool(self.budgets or self.channels or self.variants)


SCORES = ("AP@0.5", "AP@0.75", "AP@0.9", "F1", "SEG")
KEYS = ("variant", "channel", "budget", "seed")               # of a run


def run_all(config, train: Callable[..., int], rank: int, world: int, device: str) -> int:
    """Every run that lacks a row in records.tsv; an interrupted one goes on from its checkpoint, and one that is scored on
    sets that were not asked for then is not trained anew."""
    folder, others = Path(config.output_base_dir) / "runs" / config.experiment, 0
    table = folder / "records.tsv"
    jobs = [(key, one, fingerprint(one)) for key, one in plan(config, folder)]
    order = {tuple(map(str, key.values())): number for number, (key, *_) in enumerate(jobs)}
    check(config, [one for _, one, _ in jobs])
    for key, one, mark in jobs:
        with runs.stop_signals() as stopped, turn(Path(one.export_path).with_suffix(".lock"), rank, wait=False) as mine:
            # As the first of a group finds it: a group moves as one.
            mine, scored = runs.shared_out(lambda _: (mine, known(table, key, mark)), [0], rank, world)[0]
            missing = [test for test in config.series.test if test.name not in scored]
            others += not (mine or not missing)
            if not (missing and mine):
                continue
            if not scored and (code := train(one, rank, world, device)):
                return code
            if rank == 0:
                rows = [dict(**key, set=s.name, **score(one, s, device), config=mark) for s in missing]
                with turn(folder / "records.lock", rank):
                    rows = [*records(table), *rows]
                    write(table, sorted(rows, key=lambda row: order.get(tuple(str(row[k]) for k in KEYS), -1)))
                    summarise(folder, config)
        if any(runs.shared_out(lambda _: bool(stopped), range(world), rank, world)):
            return runs.REQUEUE
    if others:
        print(f"{others} of {len(jobs)} runs are left to other processes that are at them")
    elif rank == 0:                                                              # all done: the document may be new
        summarise(folder, config)
    return 0


def check(config, jobs: list) -> None:
    """What could only be missed after hours: the document, the sets to score on, what each run changes and begins from."""
    import augment
    import model
    import report
    if document := config.series.markdown:
        if not Path(document).parent.is_dir():
            raise ValueError(f"series.markdown={document}: no such folder; start in the repository's, or give another document")
        report.between(Path(document), f"series {config.experiment}")
    for test in config.series.test:
        data.examples_of(config.data, test)
    for one in (*config.data.sets, *config.data.validation, *config.series.test) if config.series.channels else ():
        if one.channels:
            raise ValueError(f"series.channels: {one.path} has channels of its own, which every run would take; leave them out")
    for one in jobs:
        runs.from_dict(augment.Augment, one.augment, "augment")
        for chosen in one.data.sets if config.series.budgets else ():
            whole = dataclasses.replace(one.data, limit=None)
            kept, _ = data.divide(data.examples_of(whole, chosen), whole, one.seed)
            if len(kept) < one.data.limit:
                raise ValueError(f"series.budgets: {one.data.limit} images of {chosen.name}, which has {len(kept)} to train on")
    for init in {one.init for one in jobs if one.init}:
        model.kind(init)


@contextmanager
def turn(path: Path, rank: int = 0, wait: bool = True) -> Iterator[bool]:
    """True while no other process has this lock, which ends with the process; for the first of a group to ask."""
    if rank:
        yield False
        return
    import fcntl                                              # not on Windows, where the rest trains
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
        except OSError as error:
            raise ValueError(f"{path}: this file system knows no locks ({error.strerror}); "
                             "put output_base_dir on another") from None
        else:
            yield True


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
    if not isinstance(changes, dict):
        raise ValueError(f"{origin}={changes}: expected what it changes, {{key: value}}")

    def merge(values: dict, new: dict) -> dict:
        return {**values, **{k: merge(values[k], v) if isinstance(v, dict) and isinstance(values.get(k), dict) else v
                             for k, v in new.items()}}
    return runs.from_dict(type(config), merge(yaml.safe_load(runs.to_yaml(config)), changes), origin)


def fingerprint(config) -> str:
    """Of all in a configuration that may change a result."""
    import yaml
    values = runs.lasting(runs.flatten(yaml.safe_load(runs.to_yaml(config))))
    kept = {k: v for k, v in values.items() if k not in (*runs.FREE, "export_path") and not k.startswith("series.")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:12]


def known(path: Path, key: dict, config: str) -> set[str]:
    """The sets that this run was scored on."""
    found = [row for row in records(path) if all(row[k] == str(v) for k, v in key.items())]
    if {row["config"] for row in found} - {config}:
        raise ValueError(f"{path}: its rows were made with another configuration; give a new experiment=, "
                         "or remove the folder to begin anew")
    return {row["set"] for row in found}


def records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def write(path: Path, rows: list[dict]) -> None:
    head = list(rows[0])
    runs.write_text(path, "".join("\t".join(map(str, line)) + "\n" for line in
                                  [head, *([row[key] for key in head] for row in rows)]))


def score(config, chosen: data.TrainingSet, device: str) -> dict:
    """Of a test set, at the thresholds that are stored with the weights; with data.diameter at that size, as in training."""
    import measure
    import metrics
    import model
    import segment
    net = model.load(config.export_path).to(device)
    entries = [data.read_labelled(e, chosen.name) for e in data.examples_of(config.data, chosen)]
    wide = [data.median_diameter(entry.labels) or None if config.data.diameter else None for entry in entries]
    tables = [metrics.overlap(e.labels, segment.segment(e.pixels, net, limits=segment.UNIT, diameter=diameter))
              for e, diameter in zip(entries, wide)]
    found = measure.headline(metrics.set_scores(tables, n=1))
    return dict(images=len(entries), **{name: round(float(found[name]), 5) for name in SCORES})


def summarise(folder: Path, config) -> None:
    """summary.json, table.md and budget.png from records.tsv."""
    import report
    rows = records(folder / "records.tsv")
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["set"], *(row[key] for key in KEYS[:-1])), []).append(row)
    summary = [dict(zip(("set", *KEYS), of), seeds=len(found), **{s: spread(found, s) for s in SCORES})
               for of, found in groups.items()]
    runs.write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    varied = [name for name in KEYS[:-1] if len({row[name] for row in rows}) > 1]
    text = ("Mean over seeds, and from the least to the largest. AP is a mean over images, F1 and SEG count the cells of all "
            "images together.\n\n") + report.markdown(
        ("set", *varied, "seeds", *SCORES),
        [(row["set"], *(row[name] for name in varied), str(row["seeds"]), *(ranged(row[name]) for name in SCORES))
         for row in summary], words=1 + len(varied))
    runs.write_text(folder / "table.md", text)
    if config.series.markdown:
        report.put_between(Path(config.series.markdown), f"series {config.experiment}", text)
    points: dict[str, list] = {}
    for row in rows:
        line = " ".join([row["set"], *(row[key] for key in ("variant", "channel") if row[key] not in ("-", "all"))])
        if row["budget"] != "all":
            points.setdefault(line, []).append((int(row["budget"]), float(row["AP@0.5"])))
    if points:
        report.spread(folder / "budget.png", points, "labelled images", "AP@0.5")


def ranged(score: dict) -> str:
    several = f" ({score['min']:.3f}–{score['max']:.3f})" if score["max"] > score["min"] else ""
    return f"{score['mean']:.3f}{several}"


def spread(rows: list[dict], name: str) -> dict[str, float | None]:
    values = [float(row[name]) for row in rows]
    return dict(mean=float(np.mean(values)), min=min(values), max=max(values),
                sd=float(np.std(values, ddof=1)) if len(values) > 1 else None)
