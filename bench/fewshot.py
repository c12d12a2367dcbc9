"""A new kind of cell from a few labelled images: what helps most in the same time?

    python bench/fewshot.py configs/fewshot.yaml [key=value ...]

Each way starts from the same network and learns from the same `shots` images for the same seconds
of processor time, which does not count what else the machine does. Images are split by file, never
by tile; the images asked (query) are the same for all numbers of shots. All are scaled so that the
support's median cell is as large as the network knows, and scored at that scale, with the peak of
the watershed that is best on the support.

    none           the network as it is
    new_decoder    a decoder from scratch on the frozen backbone
    decoder        the trained decoder goes on, the backbone stays
    whole          all parameters
    adapters       the trained decoder, and matrices of rank 4 added to q and v of each block (LoRA,
                   Hu et al., 2022)
    reptile        the trained decoder, moved before towards what learns fast on the training sets
                   (Reptile, Nichol et al., 2018)
    prototypes     no training: tokens of background, edge and inside, the nearest says how deep

runs/<experiment>/ gets fewshot.tsv and fewshot.svg; ways that are done are read from their files.
"""
from __future__ import annotations

import copy
import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data  # noqa: E402  (the folder above)
import evaluate  # noqa: E402
import measure  # noqa: E402
import report  # noqa: E402
import runs  # noqa: E402

with runs.lazy():
    import torch

    import augment
    import metrics
    import model
    import segment
    import vectors
    import watershed

RANK = 4                # of the matrices added to q and v
PEAKS = (0.3, 0.45, 0.6, 0.75)      # the best on the support is taken
AREA = 20               # px, smaller ones are no cells
Way = Literal["none", "new_decoder", "decoder", "whole", "adapters", "reptile", "prototypes"]


@dataclass(frozen=True)
class NewSet:
    name: str                               # its columns
    set: data.TrainingSet                   # images that the network has not seen, within root
    shots: tuple[runs.Count, ...] = (1, 2)  # numbers of support images
    query: runs.Count = 2                   # images to score on, never among the support


@dataclass(frozen=True)
class Start:
    name: str                               # its rows
    weights: str | None = None              # a whole network; null: random, of the first's shape
    ways: tuple[Way, ...] = ("none", "new_decoder", "decoder", "whole", "adapters", "reptile",
                             "prototypes")


@dataclass(frozen=True)
class Config:
    starts: tuple[Start, ...]               # networks to start from
    sets: tuple[NewSet, ...]                # kinds of cells that they have not seen
    known: tuple[data.TrainingSet, ...] = ()   # sets of the training, for reptile
    experiment: runs.Name = "fewshot"       # name of the run
    output_base_dir: str = "."              # where runs/ is made
    root: str = "."                         # folder that the sets are in
    seeds: tuple[int, ...] = (0, 1, 2)      # each draws support and query, and all that is random
    seconds: runs.Positive = 60.0           # of processor time that each way learns
    lr: runs.Positive = 1e-3                # at its highest; it falls to 0
    backbone_lr: runs.Positive = 1e-4       # of the backbone, where all of it learns
    batch: runs.Count = 4                   # crops a step
    crop: runs.Count = 128                  # px
    rounds: runs.Count = 20                 # of reptile, with `inner` steps each
    inner: runs.Count = 5
    augment: dict = field(default_factory=dict)   # changes to augment.Augment

    def __post_init__(self):
        if not (self.starts and self.sets and self.seeds):
            raise ValueError("starts, sets and seeds need one value or more each")
        if any("reptile" in start.ways for start in self.starts) and not self.known:
            raise ValueError("known is empty, but reptile learns on the training sets; give some "
                             "or leave reptile out of ways")


# ------------------------------------------------------------------------------- what of it learns

def let_learn(net, way: Way) -> list[dict]:
    """Let the parameters learn that a way trains; groups of them for the optimiser."""
    for name, parameter in net.named_parameters():
        inside = name.startswith("backbone.")
        unused = name in ("backbone.norm.weight", "backbone.norm.bias", "backbone.mask_token")
        parameter.requires_grad_(not unused and (way == "whole" or not inside)
                                 and not name.startswith(("size.", "types.")))
    if way == "new_decoder":
        net.decoder = copy.deepcopy(net.decoder)
        for module in net.decoder.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
    if way == "adapters":
        for block in net.backbone.blocks:
            add_low_rank(block.attn.qkv)
    learning = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
    return [dict(params=[p for name, p in learning
                         if (name.startswith("backbone.") and way == "whole") == inside],
                 inside=inside) for inside in (False, True)]


def add_low_rank(linear, rank: int = RANK) -> None:
    """Add up @ down to the parts q and v of a frozen weight (3 D, D); nothing at first."""
    D = linear.weight.shape[1]

    class LowRank(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down = torch.nn.Parameter(torch.randn(2, rank, D) / math.sqrt(D))
            self.up = torch.nn.Parameter(torch.zeros(2, D, rank))

        def forward(self, weight):
            q, k, v = weight.chunk(3)
            more = self.up @ self.down                                       # (2, D, D)
            return torch.cat((q + more[0], k, v + more[1]))

    torch.nn.utils.parametrize.register_parametrization(linear, "weight", LowRank())


def fold_adapters(net) -> None:
    """Make the added matrices part of the weights."""
    for module in list(net.modules()):
        if torch.nn.utils.parametrize.is_parametrized(module):
            torch.nn.utils.parametrize.remove_parametrizations(module, "weight")


# ----------------------------------------------------------------------------------------- learning

def learn(net, images: Sequence[data.Labelled], way: Way, config: Config, seed: int) -> int:
    """Train for config.seconds of processor time; returns the steps that were made."""
    groups = let_learn(net, way)
    for group in groups:
        group["top"] = config.backbone_lr if group["inside"] else config.lr
    optimiser = torch.optim.AdamW(groups, config.lr, weight_decay=0.01)
    batch = Batches(images, config, seed, net.settings.cap)
    begun, step, share = time.process_time(), 0, 0.0
    while share < 1:
        for group in optimiser.param_groups:
            group["lr"] = group["top"] * min(1.0, (step + 1) / 10) * (1 - share)
        batch.loss(net, step).backward()
        optimiser.step()
        optimiser.zero_grad()
        step, share = step + 1, (time.process_time() - begun) / config.seconds
    fold_adapters(net)
    net.eval().requires_grad_(False)
    return step


class Batches:
    """Augmented crops of a few images, by the number of the step."""

    def __init__(self, images: Sequence[data.Labelled], config: Config, seed: int,
                 cap: float | None):
        self.resident = augment.Resident(images, cap=cap)
        self.config, self.seed, self.cap = config, seed, cap
        self.changes = runs.from_dict(augment.Augment, config.augment, "augment")

    def loss(self, net, step: int):
        """The loss of a step's crops."""
        config = self.config
        numbers = np.arange(config.batch) + step * config.batch
        x, target, labels = augment.sample(
            self.resident, self.resident.draw(self.seed, numbers), numbers, self.changes,
            config.crop, self.seed, self.cap)
        with net.autocast():
            distance = net(x)
        return model.distance_loss(distance.float(), target, labels, 3.0, 10.0)


def meta_learned(start: Start, first: str, config: Config, seed: int):
    """A starting network whose decoder is moved towards where `inner` steps on each known set
    lead: first-order, by hand."""
    net = starting_network(start, first, seed)
    known = [[scaled(data.read_labelled(example, chosen.name, {}), net.settings.diameter)
              for example in evaluate.embed_examples([chosen], config.root)[:8]]
             for chosen in config.known]
    batches = [Batches(images, config, seed, net.settings.cap) for images in known]
    decoder = net.decoder
    let_learn(net, "decoder")
    for turn in range(config.rounds):
        before = {name: p.detach().clone() for name, p in decoder.named_parameters()}
        optimiser = torch.optim.Adam(decoder.parameters(), config.lr)
        for step in range(config.inner):
            batches[turn % len(batches)].loss(net, turn * config.inner + step).backward()
            optimiser.step()
            optimiser.zero_grad()
        pace = 0.5 * (1 - turn / config.rounds)
        with torch.no_grad():
            for name, p in decoder.named_parameters():
                p.copy_(before[name] + pace * (p - before[name]))
    return net.eval().requires_grad_(False)


DEPTHS = (0.0, 0.35, 0.9)    # distance of a background, an edge and an inner token


def put_prototypes(net, images: Sequence[data.Labelled]) -> None:
    """Put the mean tokens of background, edge and inside in the place of the decoder."""
    patch, tokens_of, kinds = net.backbone.patch, [], []
    for image in images:
        H, W = (length // patch * patch for length in image.labels.shape)
        target = torch.from_numpy(watershed.distance_map(image.labels, net.settings.cap))[:H, :W]
        depth = torch.nn.functional.avg_pool2d(target[None, None], patch).flatten()     # (N,)
        with torch.inference_mode(), net.autocast():
            x = net.standardised(torch.from_numpy(image.pixels[None, :, :H, :W]))
            tokens, = net.backbone.features(x, net.taps[-1:])
        tokens_of.append(vectors.even_vector_lengths(tokens[0]))
        kinds.append((depth > 0.05).long() + (depth > 0.5))  # background, edge, inside
    seen, kind = torch.cat(tokens_of), torch.cat(kinds)
    centre = seen.mean(0)                                    # all tokens have much in common
    sums = torch.zeros(3, net.backbone.dim).index_add(
        0, kind, torch.nn.functional.normalize(seen - centre, dim=1))
    net.decoder = nearest_prototype(torch.nn.functional.normalize(sums, dim=1), centre)


def nearest_prototype(prototypes, centre):
    """A decoder without weights: tokens like a prototype (3, D) are as deep as it."""
    class Nearest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = torch.nn.Linear(prototypes.shape[1], 3, bias=False)
            self.head.weight.data.copy_(prototypes)

        def forward(self, image, taps, h, w):
            tokens = torch.nn.functional.normalize(vectors.even_vector_lengths(taps[-1]) - centre,
                                                   dim=-1)
            share = (10 * self.head(tokens.to(taps[-1].dtype)).float()).softmax(2)       # (B, N, 3)
            depth = (share @ torch.tensor(DEPTHS)).unflatten(1, (h, w))[:, None]
            depth = torch.nn.functional.interpolate(depth, size=image.shape[2:], mode="bilinear")
            return torch.logit(depth, 1e-4)                                  # (B, 1, H, W)

    return Nearest()


# ---------------------------------------------------------------------------------------- episodes

def scaled(image: data.Labelled, diameter: float | None, own: float | None = None
           ) -> data.Labelled:
    """An image scaled so that cells of `own` px (its median) have the diameter."""
    own = own or data.median_diameter(image.labels)
    if not (diameter and own):
        return image
    size = [max(8, round(length * diameter / own)) for length in image.labels.shape]
    grid = torch.from_numpy(image.labels.astype(np.float64))[None, None]
    labels = torch.nn.functional.interpolate(grid, size, mode="nearest-exact")[0, 0].numpy()
    pixels = torch.nn.functional.interpolate(torch.from_numpy(image.pixels)[None], size,
                                             mode="bilinear", antialias=True)[0].numpy()
    return image._replace(pixels=np.clip(pixels, 0, 1), labels=labels.astype(np.int32))


class Episode(NamedTuple):
    support: list[data.Labelled]            # the most shots; fewer are the first of them
    query: list[data.Labelled]


def episode_of(new: NewSet, root: str, diameter: float | None, seed: int) -> Episode:
    """Support and query of a set, drawn by file."""
    found = evaluate.embed_examples([new.set], root)
    if len(found) < max(new.shots) + new.query:
        raise ValueError(f"set '{new.name}': {len(found)} images, expected {max(new.shots)} shots "
                         f"and {new.query} to ask; give smaller shots or query")
    found = sorted(found, key=lambda example: runs.digest(f"{seed}/{example.name}"))
    query, support = found[:new.query], found[new.query:new.query + max(new.shots)]
    own = float(np.median([d for e in support if (d := data.median_diameter(e.labels()))]))
    return Episode(*([scaled(data.read_labelled(e, new.name, {}), diameter, own) for e in part]
                     for part in (support, query)))


def main(config: Config, files: list[str]) -> int:
    """Write a table and a figure: AP of each way after each number of shots."""
    if files:
        raise ValueError(f"{files[0]}: fewshot.py takes a configuration and key=value")
    folder = runs.run_folder(config)
    first = next(start.weights for start in config.starts if start.weights)
    rows: list[dict[str, Any]] = []
    for start in config.starts:
        for seed in config.seeds:
            moved = cache(partial(meta_learned, start, first, config, seed))
            for new in config.sets:
                episode = episode_of(new, config.root, model.load(first).settings.diameter, seed)
                for shots in new.shots:
                    for way in start.ways:
                        where = folder / start.name / f"{new.name}_{shots}_{way}_{seed}.json"
                        key = {"weights": runs.digest(Path(start.weights or first)), "config":
                               runs.to_yaml(dataclasses.replace(
                                   config, sets=(dataclasses.replace(new, shots=(shots,)),),
                                   seeds=(seed,), starts=(dataclasses.replace(start, ways=()),)))}
                        begin = moved if way == "reptile" else partial(starting_network, start,
                                                                       first, seed)
                        rows.append(measure.cached_bench_map(where, key, partial(
                            one_way, begin, start, episode, new, shots, way, config, seed)))
                        print(*(f"{k} {report.shown_value(v, 4)}" for k, v in rows[-1].items()),
                              flush=True)
    runs.write_table(folder / "fewshot.tsv", rows)
    table = summary(rows)
    report.print_report_table(table, table[0])
    runs.write_text(folder / "fewshot.svg", figure(rows))
    print(f"-> {folder}")
    return 0


def starting_network(start: Start, first: str, seed: int):
    """A fresh copy of the network that a row starts from."""
    torch.manual_seed(seed)
    net = model.load(start.weights or first)
    if start.weights is None:
        net = model.untrained(net, 0.1, net.settings)
    return net.eval()


def one_way(begin: Callable[[], Any], start: Start, episode: Episode, new: NewSet, shots: int,
            way: Way, config: Config, seed: int) -> dict[str, Any]:
    """Row of the table: adapt to the first `shots` images of the support, ask the query."""
    net = copy.deepcopy(begin())
    support, steps, begun = episode.support[:shots], 0, time.process_time()
    if way == "prototypes":
        put_prototypes(net, support)
    elif way != "none":
        steps = learn(net, support, "decoder" if way == "reptile" else way, config, seed)
    seconds = time.process_time() - begun
    maps = [segment.distances(image.pixels, net, limits=segment.UNIT, zoom=1.0)
            for image in support]
    settings = [watershed.Setting(peak, 0.15, AREA) for peak in PEAKS]
    best = max(settings, key=lambda setting: np.mean([
        metrics.average_precision(image.labels, watershed.flood(distance, setting)).mean()
        for image, distance in zip(support, maps)]))
    scores = [metrics.scores(image.labels, watershed.flood(segment.distances(
        image.pixels, net, limits=segment.UNIT, zoom=1.0), best)) for image in episode.query]
    return {"start": start.name, "way": way, "set": new.name, "shots": shots, "seed": seed,
            "AP@0.5": float(np.mean([s["AP@0.5"] for s in scores])),
            "AP": float(np.mean([s["DSB"] for s in scores])), "peak": best.peak, "steps": steps,
            "seconds": round(seconds, 1)}


def summary(rows: list[dict]) -> list[dict[str, Any]]:
    """A row for each start and way: mean AP@0.5 over seeds for each set and number of shots."""
    table = []
    for start, way in dict.fromkeys((row["start"], row["way"]) for row in rows):
        own = [row for row in rows if (row["start"], row["way"]) == (start, way)]
        line: dict[str, Any] = {"start": start, "way": way}
        for name, shots in sorted({(row["set"], row["shots"]) for row in rows}):
            line[f"{name} {shots}"] = report.chart_mean(
                row["AP@0.5"] for row in own if (row["set"], row["shots"]) == (name, shots))
        table.append({**line, "mean": report.chart_mean(
            value for name, value in line.items() if name not in ("start", "way"))})
    return table


def figure(rows: list[dict]) -> str:
    """AP@0.5 over shots, a line for each start and way: mean over sets and seeds."""
    series: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        at = series.setdefault(f"{row['start']}: {row['way']}", {})
        at.setdefault(row["shots"], []).append(row["AP@0.5"])
    points = {name: [(float(shots), float(np.mean(values)))
                     for shots, values in sorted(at.items())] for name, at in series.items()}
    looks = report.page_styles(points)
    return report.line_chart(points, looks, "support images", "AP@0.5", log=True)


if __name__ == "__main__":
    runs.script(__doc__, Config, main)
