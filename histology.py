"""Tissue with a class for each nucleus: sets of any layout, tiles, and pairs of an instruction and its true answer.

    for tile in source_tiles(Source(kind="consep", path="../shared/data/he_consep/train")):
        ...                                        .pixels (3, H, W) uint8, .labels, .classes {id: class}
    write_tile(folder / "train", tile, regions)    one layout for all, which tiles_of(folder, "train") reads
    write_pairs(path, tiles, record, "train", ...) instructions about parts of the tiles, with what is true
"""
from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import runs
from instructions import (CONCEPTS, UNTRAINED, TASKS, TISSUES, Found, Grammar, Instruction, LLM, ancestors,
                          boxes, centres, membership, place_of, refusal, rewrite, sentence)

LEAST = 20                              # px, what a tile's edge leaves of a nucleus counts from here on


# ----------------------------------------------------------------------------------------------- sources

@dataclass(frozen=True)
class Source:
    path: str                                   # folder
    kind: Literal["consep", "pannuke", "lizard", "labels"] = "labels"    # its layout, see source_tiles()
    split: Literal["train", "test"] = "train"   # what it serves
    tissue: str = ""                            # where all images are of one: colon
    licence: str = ""                           # as its authors state it; written into the weights
    classes: dict = field(default_factory=dict)  # its class: ours; empty: the layout's own
    every: str = ""                             # class of all cells, where a source has none: nuclei, a coarse one
    regions: dict = field(default_factory=dict)  # value in NAME_regions.png: concept
    limit: int | None = None                    # images

    def __post_init__(self):
        for name in [*self.classes.values(), *self.regions.values(), *filter(None, [self.every])]:
            if name not in CONCEPTS and name not in UNTRAINED["train"]:
                raise ValueError(f"{self.path}: class '{name}' is none of {', '.join(CONCEPTS)}")
        if self.tissue and self.tissue not in TISSUES:
            raise ValueError(f"{self.path}: tissue '{self.tissue}' is none of {', '.join(TISSUES)}; leave it out if "
                             "none fits")


CLASSES = {
    "consep": {1: "other", 2: "inflammatory", 3: "healthy epithelial", 4: "malignant epithelial",
               5: "fibroblast", 6: "muscle", 7: "endothelial"},
    "pannuke": {0: "malignant epithelial", 1: "inflammatory", 2: "connective", 3: "dead",
                4: "healthy epithelial"},
    "lizard": {1: "neutrophil", 2: "epithelial", 3: "lymphocyte", 4: "plasma", 5: "eosinophil",
               6: "connective"},
    "labels": {name: name for name in CONCEPTS},
}
ORGANS = {"adrenal_gland": "adrenal gland", "bile-duct": "bile duct", "esophagus": "oesophagus",       # PanNuke: ours
          "headneck": "head and neck", "ovarian": "ovary", "pancreatic": "pancreas"}


class Tile(NamedTuple):
    name: str
    pixels: np.ndarray                  # (3, H, W) uint8
    labels: np.ndarray                  # (H, W) int32
    classes: dict[int, str]             # of every id in labels
    regions: dict[str, np.ndarray]      # (H, W) bool per region concept
    tissue: str


def source_tiles(source: Source) -> Iterator[Tile]:
    """The images of a source, whatever its layout.

    consep : X.png, X_nuclei.png (instances), X_types.png (class per pixel)
    pannuke : images.npy (N, H, W, 3), masks.npy (N, H, W, 6: instances of five classes, ground), types.npy
        (tissues), below the folder, as fold1/images/fold1/ and fold1/masks/fold1/ or side by side
    lizard : X.mat with inst_map, id, class, and X.png, anywhere below the folder
    labels : what data.py reads, with X_classes.csv (columns id, class) or X_types.png, and X_regions.png;
        without classes if all its cells are of one, `every`
    """
    if not Path(source.path).is_dir():
        raise FileNotFoundError(f"{source.path}: no such folder; expected a source of kind {source.kind}")
    known = source.classes or CLASSES[source.kind]
    read = {"pannuke": _pannuke, "lizard": _lizard}.get(source.kind, _labelled)
    for number, (name, pixels, labels, classes, regions, tissue) in enumerate(read(source)):
        if number == source.limit:
            return
        if source.every and pixels.shape[0] == 1:              # a gray one teaches where nuclei end, too
            pixels = np.repeat(pixels, 3, 0)
        if pixels.shape[0] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"{name}: {pixels.dtype} of {pixels.shape[0]} channels, expected RGB of 8 bits")
        if strange := {c for c in classes.values() if c not in known}:
            raise ValueError(f"{name}: class {min(strange, key=str)!r}, expected one of "
                             f"{', '.join(map(str, known))}; give the source's classes: {{its class: ours}}")
        there = set(np.unique(labels).tolist()) - {0}             # a table may name cells that others cover
        if bare := there - classes.keys():
            raise ValueError(f"{name}: {len(bare)} cells without a class, such as {min(bare)}")
        named = {number: known[classes[number]] for number in sorted(there)}
        yield Tile(name, pixels, labels, named, regions, tissue or source.tissue)


def _labelled(source: Source):
    import data
    for example in data.examples(source.path):
        image, labels = example.files[0], example.labels()
        stem = image.with_suffix("")
        table, types, areas = (stem.with_name(stem.name + end)
                               for end in ("_classes.csv", "_types.png", "_regions.png"))
        if source.every:
            classes = dict.fromkeys(np.unique(labels[labels > 0]).tolist(), source.every)
        elif table.is_file():
            lines = table.read_text(encoding="utf-8").splitlines()[1:]
            rows = [line.split(",", 1) for line in lines if line.strip()]
            if any(len(row) != 2 or not row[0].strip().isdigit() for row in rows):
                raise ValueError(f"{table}: expected lines `id,class` below a heading")
            classes = {int(row[0]): _number(row[1].strip()) for row in rows}
        elif types.is_file():
            classes = _majority(labels, data.read_labels(types), types)
        else:
            raise FileNotFoundError(f"{image}: no {table.name} (id,class) or {types.name} beside it; if its classes are "
                                    "not known, every: nuclei says so")
        regions = {}
        if source.regions and areas.is_file():
            value = data.read_labels(areas)
            for number, concept in source.regions.items():
                regions[concept] = regions.get(concept, False) | (value == int(number))
        yield example.name.replace("/", "_"), example.image().pixels, labels, classes, regions, ""


def _number(text: str) -> int | str:
    return int(text) if text.isdigit() else text


def _majority(labels: np.ndarray, types: np.ndarray, where: Path) -> dict[int, int]:
    """The class that most pixels of each cell have."""
    if labels.shape != types.shape:
        raise ValueError(f"{where}: {types.shape} px, but the labels have {labels.shape}")
    ids, index = np.unique(labels, return_inverse=True)
    votes = np.zeros((len(ids), int(types.max()) + 1), np.int64)
    np.add.at(votes, (index.ravel(), types.ravel()), 1)
    votes[:, 0] = 0                                               # ground is no class
    return {int(i): int(v.argmax()) for i, v in zip(ids, votes) if i}


def _pannuke(source: Source):
    found = sorted(Path(source.path).rglob("images.npy"))
    if not found:
        raise FileNotFoundError(f"{source.path}: no images.npy below it, expected PanNuke's images.npy and "
                                "masks.npy")
    for path in found:
        fold = path.relative_to(source.path)
        above = ("masks" if part == "images" else part for part in fold.parts[:-1])
        masks = Path(source.path, *above, "masks.npy")
        if not masks.is_file():
            raise FileNotFoundError(f"{path}: its {masks} is missing")
        pixels, truth = (np.load(file, mmap_mode="r") for file in (path, masks))     # refuses pickled objects
        if pixels.ndim != 4 or truth.shape != (*pixels.shape[:3], 6):
            raise ValueError(f"{masks}: {truth.shape} beside images of {pixels.shape}; expected (N, H, W, 6) "
                             "and (N, H, W, 3)")
        tissues = path.with_name("types.npy")
        tissue = np.load(tissues) if tissues.is_file() else np.full(len(pixels), "")
        prefix = "_".join(fold.parts[:1] if len(fold.parts) > 1 else ("pannuke",))
        for i in range(len(pixels)):
            labels, classes = np.zeros(truth.shape[1:3], np.int32), {}
            for c in range(5):
                ids, index = np.unique(truth[i, :, :, c].astype(np.int64), return_inverse=True)
                numbers = np.where(ids > 0, len(classes) + np.cumsum(ids > 0), 0)
                labels = np.where(labels == 0, numbers[index.reshape(labels.shape)], labels).astype(np.int32)
                classes |= {int(n): c for n in numbers[ids > 0]}
            organ = ORGANS.get(str(tissue[i]).lower(), str(tissue[i]).lower())
            if organ and organ not in TISSUES:
                raise ValueError(f"{tissues}: tissue '{tissue[i]}', expected one of {', '.join([*TISSUES, *ORGANS])}")
            rgb = np.asarray(pixels[i]).transpose(2, 0, 1).round().clip(0, 255).astype(np.uint8)
            yield f"{prefix}_{i:04d}", rgb, labels, classes, {}, organ


def _lizard(source: Source):
    import data
    import scipy.io
    images = {path.stem: path for path in sorted(Path(source.path).rglob("*.png"))}
    found = sorted(Path(source.path).rglob("*.mat"))
    if not found:
        raise FileNotFoundError(f"{source.path}: no .mat below it, expected Lizard's Labels/NAME.mat and "
                                "NAME.png")
    for path in found:
        content = scipy.io.loadmat(path)
        if missing := {"inst_map", "id", "class"} - content.keys():
            raise ValueError(f"{path}: no {', '.join(sorted(missing))} in it, expected labels of Lizard")
        if path.stem not in images:
            raise FileNotFoundError(f"{path}: its image {path.stem}.png is missing below {source.path}")
        labels = content["inst_map"].astype(np.int32)
        ids, kinds = (content[key].ravel().astype(int).tolist() for key in ("id", "class"))
        yield path.stem, data.read_image(images[path.stem]).pixels, labels, dict(zip(ids, kinds)), {}, ""


# ----------------------------------------------------------------------------------------------- tiles, pairs

def is_taught(concept: str, counts: Counter, least: int) -> bool:
    """Enough cells for it and, except for the root, against it."""
    side = Counter()
    for name, number in counts.items():
        side[int(membership([name], [concept])[0])] += number
    return side[1] >= least and (side[-1] >= least or CONCEPTS[concept].parent is None)


def divided(tile: Tile, split: str, side: int, share: float, seed: int) -> Iterator[tuple[str, Tile]]:
    """A training image for train and validation: large ones lose their lowest rows to validation, of small
    ones some go there whole. With few images a class would else be on one side only."""
    if split == "test":
        yield "test", tile
        return
    H = tile.labels.shape[0]
    last = H - round(H * share)
    if H < 3 * side:
        luck = int.from_bytes(hashlib.sha256(f"{seed}/{tile.name}".encode()).digest()[:4], "big") / 2**32
        yield ("validation" if luck < share else "train"), tile
        return
    for name, rows in (("train", slice(0, last)), ("validation", slice(last, H))):
        labels = tile.labels[rows]
        ids = set(np.unique(labels).tolist()) - {0}
        yield name, tile._replace(pixels=tile.pixels[:, rows], labels=labels,
                                  classes={i: tile.classes[i] for i in ids},
                                  regions={key: area[rows] for key, area in tile.regions.items()})


def write_tile(folder: Path, tile: Tile, concepts: list[str]) -> None:
    import cells
    import data
    folder.mkdir(parents=True, exist_ok=True)
    rows = "".join(f"{i},{name}\n" for i, name in sorted(tile.classes.items()))
    runs.write_text(folder / f"{tile.name}_classes.csv", "id,class\n" + rows)
    if tile.tissue:
        runs.write_text(folder / f"{tile.name}_tissue.txt", tile.tissue + "\n")
    if concepts:
        value = np.zeros(tile.labels.shape, np.uint8)
        for number, concept in enumerate(concepts, 1):
            value[tile.regions.get(concept, np.zeros_like(value, bool))] = number
        cells.write_picture(folder / f"{tile.name}_regions.png", value)
    cells.write_picture(folder / f"{tile.name}.png", np.ascontiguousarray(tile.pixels.transpose(1, 2, 0)))
    data.write_labels(folder / f"{tile.name}_labels.tif", tile.labels)


MAKE_FIRST = "no such file; make the set first: python instruct.py make configs/instruct.yaml"


def set_of(folder: str | Path) -> dict:
    path = Path(folder) / "set.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {MAKE_FIRST}")
    return json.loads(path.read_text(encoding="utf-8"))


def tiles_of(folder: Path, split: str) -> list[Tile]:
    if not (folder / split).is_dir():
        return []
    regions = {str(number): name for name, number in set_of(folder)["regions"].items()}
    found = []
    for tile in source_tiles(Source(str(folder / split), regions=regions)):
        note = folder / split / f"{tile.name}_tissue.txt"
        found.append(tile._replace(tissue=note.read_text(encoding="utf-8").strip() if note.is_file() else ""))
    return found


def boxes_of(shape: tuple[int, int], side: int) -> list[tuple[int, int, int, int]]:
    """(y0, x0, y1, x1) of tiles of about this side that fill an image."""
    ys, xs = (np.linspace(0, n, max(1, round(n / side)) + 1).round().astype(int).tolist() for n in shape)
    return [(y0, x0, y1, x1) for y0, y1 in zip(ys, ys[1:]) for x0, x1 in zip(xs, xs[1:])]


def cut(tile: Tile, box: tuple[int, int, int, int]) -> Tile:
    """A part of a tile, without what its edge leaves of a nucleus below LEAST px."""
    y0, x0, y1, x1 = box
    labels = tile.labels[y0:y1, x0:x1]
    area = np.bincount(labels.ravel())
    labels = labels * (area >= LEAST)[labels]
    ids = np.unique(labels)[0 if labels.min() else 1:]
    return tile._replace(pixels=tile.pixels[:, y0:y1, x0:x1], labels=labels,
                         classes={int(i): tile.classes[int(i)] for i in ids},
                         regions={name: area[y0:y1, x0:x1] for name, area in tile.regions.items()})


def truth(tile: Tile, task: str, targets: tuple[str, ...]) -> tuple[Found, np.ndarray] | None:
    """The true answer and the label image of what it is about; None where classes are too coarse to say."""
    from skimage.measure import label
    areas = [name for name in targets if name in tile.regions]
    if areas:
        inside = np.any([tile.regions[name] for name in areas], axis=0)
        labels = label(inside, connectivity=1).astype(np.int32)
        ids, counts = np.arange(1, labels.max() + 1), (int(labels.max()),)
    else:
        every, names = np.array(list(tile.classes), np.int64), list(tile.classes.values())
        belongs = membership(names, targets, task == "exclude")
        if (belongs == 0).any():
            return None
        ids = every[belongs > 0]
        counts = tuple(int((membership(names, [target]) > 0).sum()) for target in targets)
        labels = tile.labels * np.isin(tile.labels, ids)
    area = np.bincount(labels.ravel(), minlength=2)[1:]
    return Found(task, targets, counts, len(ids), float(area.sum() / labels.size),
                              float(np.median(area[area > 0])) if area.any() else 0.0,
                              place_of(centres(labels, np.sort(ids)), labels.shape)), labels


def write_pairs(path: Path, tiles: list[Tile], record: dict, lot: str, side: int, count: int, vain: float,
                llm: LLM, rng: np.random.Generator) -> int:
    """`count` pairs of every tile of `side` px: of the (task, targets, there or not) it allows, the rarest.

    record : what set.json holds; vain : share of instructions that call for a question back.
    """
    trained, areas = record["trained"], set(record["regions"])
    grammar = Grammar(trained, int(rng.integers(2**31)))
    foreign = [name for name in TISSUES if name not in record["tissues"]]
    apart = [pair for pair in itertools.permutations(trained, 2) if not areas & set(pair)
             and not {pair[0]} & set(ancestors(pair[1])) and not {pair[1]} & set(ancestors(pair[0]))]
    asked = [(task, targets) for task in TASKS
             for targets in (apart if task == "compare" else [(name,) for name in trained] + apart[::7])
             if task != "exclude" or not (areas | {"nuclei"}) & set(targets)]
    lines, used = [], Counter()
    for tile in tiles:
        for box in boxes_of(tile.labels.shape, side):
            part = cut(tile, box)
            there = {targets: truth_known(part, targets) for targets in {targets for _, targets in asked}}
            options = [(task, targets) for task, targets in asked if there[targets] is not None]
            for _ in range(count):
                tissue, answered = "", None
                if rng.random() < vain or not options:
                    said = grammar.ask_in_vain(lot, grammar.pick(("untrained", "invisible", "nonsense")))
                else:
                    keys = [(task, targets[0], len(targets), there[targets]) for task, targets in options]
                    least = min(used[key] for key in keys)
                    at = grammar.pick([i for i, key in enumerate(keys) if used[key] == least])
                    used[keys[at]] += 1
                    if rng.random() < 0.15:
                        tissue = grammar.pick(foreign if rng.random() < 0.5 else record["tissues"] or [""])
                    said, answered = grammar.ask(lot, *options[at], tissue), truth(part, *options[at])
                if llm.url and rng.random() < llm.share:
                    said = said._replace(text=rewrite(said.text, llm))
                lines.append(json.dumps(pair(tile.name, box, said, answered, record)))
    runs.write_text(path, "\n".join(lines) + "\n" * bool(lines))
    return len(lines)


def pair(image: str, box: tuple[int, int, int, int], said: Instruction,
         answered: tuple[Found, np.ndarray] | None, record: dict) -> dict:
    """A line of pairs_*.jsonl; boxes [x0, y0, x1, y1] in px of the tile, ids as in the image's labels."""
    line = dict(image=image, box=box, instruction=said.text, kind=said.kind, task=said.task,
                targets=said.targets, tissue=said.tissue, wording=said.lot, status="question", response="",
                count=None, ids=[], boxes=[], area_fraction=None)
    if answered is None:
        target = said.targets[0] if said.targets else None
        return line | dict(response=refusal(said.kind, said.text, target, record["trained"]))
    if said.tissue and record["tissues"] and said.tissue not in record["tissues"]:
        home = ", ".join(record["tissues"])
        return line | dict(response=f"You speak of {said.tissue}, but I was trained on {home}.")
    found, labels = answered
    return line | dict(status="answer", response=sentence(found), count=found.count, boxes=boxes(labels),
                       ids=np.unique(labels[labels > 0]).tolist(), area_fraction=round(found.area, 6))


def truth_known(tile: Tile, targets: tuple[str, ...]) -> bool | None:
    """Whether there is something of the targets; None where nobody can say."""
    areas = [tile.regions[name].any() for name in targets if name in tile.regions]
    if areas:
        return bool(np.any(areas))
    belongs = membership(list(tile.classes.values()), targets)
    return None if (belongs == 0).any() else bool((belongs > 0).any())


def pairs_of(folder: str | Path, split: str) -> list[dict]:
    path = Path(folder) / f"pairs_{split}.jsonl"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: {MAKE_FIRST}")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def relabelled(tiles: list[Tile]) -> list[Tile]:
    """The same with ids 1..n."""
    found = []
    for tile in tiles:
        ids = np.array(sorted(tile.classes), np.int64)
        labels = np.where(tile.labels > 0, np.searchsorted(ids, tile.labels) + 1, 0).astype(np.int32)
        classes = {i: tile.classes[int(old)] for i, old in enumerate(ids, 1)}
        found.append(tile._replace(labels=labels, classes=classes))
    return found


def parts_of(folder: Path, split: str, side: int) -> list[tuple[Tile, tuple]]:
    """The regions of a split that pairs are about, with their boxes."""
    return [(cut(tile, box), box) for tile in tiles_of(folder, split)
            for box in boxes_of(tile.labels.shape, side)]


def normalised(pixels: np.ndarray) -> np.ndarray:
    import data
    return data.normalise(pixels, data.percentiles(pixels))
