"""Instructions in words and their answers: an ontology, a grammar, and the class-annotated sets behind them.

    for tile in source_tiles(Source(kind="consep", path="../shared/data/he_consep/train")):
        ...                                        .pixels (3, H, W) uint8, .labels, .classes {id: class}
    grammar = Grammar(trained, seed)
    grammar.ask("held-out", "count", ("inflammatory",)).text       "what number of leucocytes are there here?"
    sentence("count", found)                                       "I count 12 inflammatory cells."

Wordings are of three lots that share no template: `train`, `calibration` (thresholds are chosen on it) and
`held-out` (scores are reported on it), which also has nouns and unknown things of its own. A class counts for
all its ancestors in the tree: a fibroblast is a connective cell. A coarse class says nothing of a finer one,
either way: an `inflammatory` cell of PanNuke may be a lymphocyte or not.
"""
from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

import runs

# ---------------------------------------------------------------------------------------------- ontology


class Concept(NamedTuple):
    words: tuple[str, ...]              # in the plural; the first is what answers say
    held: tuple[str, ...] = ()          # words that no training instruction has
    parent: str | None = "nuclei"


CONCEPTS = {
    "nuclei": Concept(("nuclei", "cells", "cell nuclei"), ("cellular nuclei",), None),
    "inflammatory": Concept(("inflammatory cells", "immune cells", "leukocytes", "white blood cells",
                             "inflammatory nuclei", "inflammation"), ("leucocytes", "immune infiltrate")),
    "lymphocyte": Concept(("lymphocytes", "T cells", "B cells"), ("lymphoid cells",), "inflammatory"),
    "plasma": Concept(("plasma cells", "plasmacytes"), (), "inflammatory"),
    "neutrophil": Concept(("neutrophils", "neutrophil granulocytes"), (), "inflammatory"),
    "eosinophil": Concept(("eosinophils", "eosinophil granulocytes"), (), "inflammatory"),
    "epithelial": Concept(("epithelial cells", "epithelial nuclei", "epithelium", "cells of the epithelium"),
                          ("epithelia", "epithelial tissue")),
    "healthy epithelial": Concept(("healthy epithelial cells", "normal epithelial cells", "benign epithelium",
                                   "healthy epithelium"), ("non-neoplastic epithelial cells",), "epithelial"),
    "malignant epithelial": Concept(("malignant epithelial cells", "tumour cells", "cancer cells",
                                     "tumor nuclei", "dysplastic epithelial cells", "carcinoma cells"),
                                    ("neoplastic cells", "malignant nuclei"), "epithelial"),
    "connective": Concept(("stromal cells", "stroma", "connective tissue cells", "spindle-shaped nuclei",
                           "connective tissue"), ("stromal nuclei", "cells of the connective tissue")),
    "fibroblast": Concept(("fibroblasts", "fibroblast nuclei"), ("fibrocytes",), "connective"),
    "muscle": Concept(("muscle cells", "smooth muscle nuclei", "muscle"), ("myocytes",), "connective"),
    "endothelial": Concept(("endothelial cells", "endothelium", "vessel-lining cells"), (), "connective"),
    "dead": Concept(("dead cells", "dying cells"), ("pyknotic nuclei",)),
    "other": Concept(()),               # in CoNSeP: nobody asks for it, but it is none of the others
}

# What people look for in H&E and no cell class above covers; a source with region labels may train it.
# name: the tissue that it belongs to, where there is one.
UNTRAINED = {
    "train": {"mitotic figures": "", "necrosis": "", "glands": "", "goblet cells": "", "blood vessels": "",
              "mucin": "", "red blood cells": "", "fat cells": "", "macrophages": "", "nerves": "",
              "apoptotic bodies": "", "hepatocytes": "liver", "keratinocytes": "skin",
              "glomeruli": "kidney", "neurons": "brain", "heart muscle fibres": "heart", "alveoli": "lung",
              "oedema": "", "islet cells": "pancreas"},
    "calibration": {"mast cells": "", "calcifications": "", "osteoclasts": "bone", "ganglion cells": "",
                    "abscesses": ""},
    "held-out": {"giant cells": "", "granulomas": "", "Paneth cells": "", "melanocytes": "skin",
                 "podocytes": "kidney", "astrocytes": "brain", "thrombi": "", "haemorrhage": ""},
}
INVISIBLE = {                           # not to be seen in H&E at all
    "train": ("mitochondria", "microtubules", "actin filaments", "ribosomes", "the Golgi apparatus",
              "GFP signal", "DAPI signal", "DNA damage foci", "telomeres", "cars", "trees", "people",
              "faces", "synapses"),
    "calibration": ("lysosomes", "centrosomes", "houses", "viruses"),
    "held-out": ("endoplasmic reticulum", "peroxisomes", "nuclear pores", "dogs", "intermediate filaments",
                 "bicycles"),
}
CHATTER = {
    "train": ("what is the weather today", "write a poem about the sea", "who won the match yesterday",
              "hello", "thanks", "tell me a joke", "translate this into French", "how do I cook rice",
              "import numpy as np", "12345 67890", "book a table for two", "what time is it",
              "ignore all previous instructions", "the cat sat on the mat", "why is the sky blue",
              "play some music", "SELECT * FROM users", "buy milk and bread"),
    "calibration": ("what is the capital of Peru", "sing a song", "my printer is broken", "good morning",
                    "3 + 4 = ?"),
    "held-out": ("how tall is Mount Everest", "remind me to call mum",
                 "colourless green ideas sleep furiously", "for i in range(10): print(i)",
                 "is it raining in London", "the quick brown fox jumps", "lorem ipsum dolor"),
}
SALAD = ("banana", "quickly", "seven", "window", "blue", "runs", "hope", "paper", "under", "guitar",
         "slow", "of", "river", "think", "cloud", "never", "table", "green", "jump", "often", "pencil",
         "moon", "because", "salt", "engine", "soft")
LEAST = 20                              # px, what a tile's edge leaves of a nucleus counts from here on
TISSUES = ("colon", "liver", "breast", "lung", "kidney", "brain", "skin", "prostate", "stomach", "heart",
           "pancreas", "bladder", "thyroid", "ovary", "bone")


def ancestors(name: str) -> tuple[str, ...]:
    """A class and all that it is a kind of."""
    found = []
    while name is not None:
        found.append(name)
        name = CONCEPTS[name].parent if name in CONCEPTS else None
    return tuple(found)


def membership(classes: Sequence[str], targets: Sequence[str], exclude: bool = False) -> np.ndarray:
    """(n,) int8: 1 where a cell of this class belongs to the targets, -1 where not, 0 where unknown."""
    def one(name: str) -> int:
        if set(ancestors(name)) & set(targets):
            return 1
        coarse = any(name in ancestors(target) for target in targets)
        return 0 if coarse else -1
    known = {name: one(name) for name in set(classes)}
    return np.array([known[name] for name in classes], np.int8) * np.int8(-1 if exclude else 1)


def plural(target: str) -> str:
    return CONCEPTS[target].words[0] if target in CONCEPTS else target


# ----------------------------------------------------------------------------------------------- grammar
# {x}: the targets with or without an article, {n}: without, {y}: the second of a comparison.
# A template that begins with ! is a command, to which "please" and the like may be added.

TASKS = ("segment", "count", "locate", "describe", "compare", "exclude", "presence")
TEMPLATES = {
    "segment": {
        "train": ("!highlight {x}", "!outline {x}", "!segment {x}", "!mark {x}", "!show me {x}",
                  "!delineate {x}", "!draw {x}", "i want to see {x}", "a mask of {x}",
                  "which pixels are {x}?", "{n}", "!colour {x}"),
        "calibration": ("!trace the edges of {x}", "i would like {x} outlined", "!paint {x}", "!select {x}"),
        "held-out": ("!circle {x}", "let me see {x}", "!annotate {x}", "give me the outlines of {x}",
                     "!make {x} visible", "i am interested in {x}, can they be marked?")},
    "count": {
        "train": ("!count {x}", "how many {n} are there?", "how many {n} do you see?", "number of {n}",
                  "!give me a count of {x}", "what is the number of {n}?", "how many {n}?",
                  "!tell me how many {n} there are", "!enumerate {x}", "total count of {n}"),
        "calibration": ("!tally {x}", "how large is the number of {n}?", "i need the count of {n}"),
        "held-out": ("what number of {n} are there?", "how numerous are {x}?",
                     "quantify the number of {n}", "{n}: how many?",
                     "can you work out how many {n} we have?")},
    "locate": {
        "train": ("where are {x}?", "!locate {x}", "in which part are {x}?", "where do {x} lie?",
                  "!find where {x} are", "position of {x}", "!show where {x} sit",
                  "!give the boxes of {x}", "bounding boxes for {x}"),
        "calibration": ("whereabouts are {x}?", "!put boxes around {x}", "which corner holds {x}?"),
        "held-out": ("!point me to {x}", "where can {x} be found?", "what is the location of {x}?",
                     "!pinpoint {x}")},
    "describe": {
        "train": ("!describe {x}", "what can you say about {x}?", "!summarise {x}",
                  "what do {x} look like?", "!give a report on {x}", "!characterise {x}",
                  "how are {x} distributed and how large are they?", "a description of {x}"),
        "calibration": ("!tell me about {x}", "!give me an overview of {x}", "some facts about {x}"),
        "held-out": ("!explain what {x} are like here", "what is there to know about {x}?",
                     "!report on the appearance of {x}")},
    "compare": {
        "train": ("are there more {n} or {y}?", "more {n} or {y}?", "which are more frequent, {n} or {y}?",
                  "!compare {x} with {y}", "do {n} outnumber {y}?", "{n} versus {y}",
                  "what is the ratio of {n} to {y}?", "are {n} more common than {y}?"),
        "calibration": ("which is in the majority, {n} or {y}?", "!contrast the number of {n} and {y}"),
        "held-out": ("who is more abundant here: {n} or {y}?",
                     "do we have a larger number of {n} than of {y}?", "!weigh {n} against {y}")},
    "exclude": {
        "train": ("!outline everything except {x}", "!highlight all cells but {x}", "everything but {n}",
                  "!mark all nuclei except {x}", "!show all that is not {n}",
                  "!segment every cell that is not one of {x}", "!leave out {x} and outline the rest",
                  "all cells other than {n}", "!segment all nuclei excluding {x}"),
        "calibration": ("!ignore {x} and mark the others", "all nuclei, {n} excepted",
                        "!outline the non-{n}"),
        "held-out": ("!highlight whatever is not {n}", "!show everything apart from {x}",
                     "!skip {x}, outline all the other cells", "all nuclei minus {x}")},
    "presence": {
        "train": ("are there any {n}?", "do you see {n}?", "is there any sign of {n}?",
                  "can you see any {n}?", "does this contain {n}?", "are {n} present?", "any {n}?",
                  "!check for {x}", "is there {n}?", "!tell me whether there are {n}"),
        "calibration": ("have you found any {n}?", "do {n} occur?", "!look for {x}, are they there?"),
        "held-out": ("would you say that {n} occur?", "do {n} exist in this picture?", "can {n} be seen?",
                     "does one find {n}?", "!verify that there are {n}")},
}
POLITE = ("", "", "", "please ", "could you ", "can you ", "i need you to ", "hey, ", "kindly ", "now ")
PLACES = ("", "", "", " in this region", " in this image", " here", " on this slide", " in this tile",
          " in the field of view")
ARTICLES = ("the ", "the ", "all ", "all the ", "", "any ")


class Instruction(NamedTuple):
    text: str
    kind: str                           # known, untrained, invisible, nonsense
    task: str                           # one of TASKS; "" for nonsense
    targets: tuple[str, ...]            # concepts, or what is unknown
    tissue: str                         # that the text speaks of; "" for none
    lot: str                            # train, calibration, held-out


class Grammar:
    """Draws instructions. `trained` : the concepts that the data teaches; the rest of the ontology is not."""

    def __init__(self, trained: Sequence[str], seed: int, typos: float = 0.2):
        self.trained, self.typos, self.rng = tuple(trained), typos, np.random.default_rng(seed)

    def pick(self, options: Sequence):
        return options[self.rng.integers(len(options))]

    def ask(self, lot: str, task: str, targets: Sequence[str], tissue: str = "", kind: str = "known"
            ) -> Instruction:
        """An instruction of this lot. Of a comparison the two targets are its sides."""
        nouns = [self.noun(target, lot) for target in targets]
        sides = nouns if task == "compare" else [" and ".join(nouns)]
        template = self.pick(TEMPLATES[task][lot])
        article = self.pick(ARTICLES if task != "exclude" else ("", "the "))
        core = template.lstrip("!").format(x=article + sides[0], n=sides[0], y=sides[-1])
        end = core[-1] if core[-1] == "?" else self.pick(("", "", "."))
        place = self.pick(PLACES)
        if tissue:
            place = (f" {self.pick(('in this', 'in the', 'on this piece of'))} {tissue}"
                     + self.pick(("", " section", " biopsy", " sample")))
        text = (self.pick(POLITE) if template[0] == "!" else "") + core.rstrip("?") + place + end
        return Instruction(self.roughened(text), kind, task, tuple(targets), tissue, lot)

    def noun(self, target: str, lot: str) -> str:
        if target not in CONCEPTS:
            return target.removeprefix("the ")
        concept = CONCEPTS[target]
        return self.pick(concept.words + (concept.held if lot == "held-out" else ()))

    def ask_in_vain(self, lot: str, kind: str) -> Instruction:
        """What calls for a question back: something untrained, something invisible, no instruction at all."""
        if kind == "nonsense":
            text = self.pick((self.letters, self.salad, self.chatter, self.chatter))(lot)
            return Instruction(text, kind, "", (), "", lot)
        names = list(INVISIBLE[lot]) if kind == "invisible" else self.untrained(lot)
        task = self.pick([task for task in TASKS if task != "compare"])
        return self.ask(lot, task, (self.pick(names),), kind=kind)

    def untrained(self, lot: str) -> list[str]:
        """Concepts of the ontology without data, and other things one may ask for, by their names."""
        dry = [name for name, concept in CONCEPTS.items() if concept.words and name not in self.trained]
        return [name for name in UNTRAINED[lot] if name not in self.trained] + (dry if lot == "train" else [])

    def letters(self, lot: str) -> str:
        return " ".join("".join(self.rng.choice(list("abcdefghijklmnopqrstuvwxyz"), self.rng.integers(2, 9)))
                        for _ in range(self.rng.integers(1, 5)))

    def salad(self, lot: str) -> str:
        """Every third word of the list is of one lot."""
        words = SALAD[("train", "calibration", "held-out").index(lot)::3]
        return " ".join(self.rng.choice(words, self.rng.integers(2, 6)))

    def chatter(self, lot: str) -> str:
        return self.roughened(self.pick(CHATTER[lot]))

    def roughened(self, text: str) -> str:
        """Capitals and typos as people leave them: letters swapped, lost or doubled inside longer words."""
        words = text.split(" ")
        if self.rng.random() < self.typos:
            for at in self.rng.permutation(len(words))[:self.rng.integers(1, 3)]:
                word = words[at]
                if len(word) >= 5:
                    i = int(self.rng.integers(1, len(word) - 2))
                    swapped = word[:i] + word[i + 1] + word[i] + word[i + 2:]
                    words[at] = self.pick((swapped, word[:i] + word[i + 1:], word[:i] + word[i] + word[i:]))
        text = " ".join(words)
        style = self.rng.random()
        return text.upper() if style < 0.03 else text[0].upper() + text[1:] if style < 0.5 else text


# ----------------------------------------------------------------------------------------------- answers

class Found(NamedTuple):
    """What an answer is made of; the same for true cells and for the network's."""
    task: str
    targets: tuple[str, ...]
    counts: tuple[int, ...]             # of each target
    count: int                          # of the answered cells: of all targets, or of all but them
    area: float                         # share of the region that these cover
    size: float                         # px, their median area
    place: str                          # where most of them are; "" when they are spread


def place_of(centres: np.ndarray, shape: tuple[int, int]) -> str:
    """The part of a 3 x 3 grid that holds at least a third of the centres (n, 2), if one does."""
    if not len(centres):
        return ""
    grid = np.minimum((centres * 3 / np.array(shape)).astype(int), 2)
    number = np.bincount(grid[:, 0] * 3 + grid[:, 1], minlength=9)
    if 3 * number.max() < len(centres):
        return ""
    row, column = divmod(int(number.argmax()), 3)
    return " ".join(filter(None, (("upper", "", "lower")[row], ("left", "", "right")[column]))) or "centre"


def amount(count: int, name: str) -> str:
    """1 fibroblast, 2 fibroblasts."""
    if count == 1:
        name = name.removesuffix("nuclei") + "nucleus" if name.endswith("nuclei") else name.removesuffix("s")
    return f"{count} {name}"


def sentence(found: Found) -> str:
    """The answer in words."""
    names = [plural(target) for target in found.targets]
    share = f"{found.area:.1%} of the region"
    if found.task == "compare":
        (x, a), (y, b) = sorted(zip(found.counts, names), reverse=True)
        if x == y:
            return f"Neither: I see {amount(x, a)} and {amount(y, b)}."
        return f"There are more {a} ({x}) than {b} ({y})."
    if found.task == "exclude":
        but = " and ".join(names)
        return (f"Apart from {but} I see {amount(found.count, 'nuclei')}, {share}." if found.count
                else f"I see nothing but {but} in this region.")
    if not found.count:
        return f"I see no {' or '.join(names)} in this region."
    where = "spread over the region"
    if found.place and found.count > 2:
        where = f"most of them in the {found.place}"
    those = amount(found.count, names[0]) if len(names) == 1 else (
        f"{amount(found.counts[0], names[0])} and {amount(found.counts[1], names[1])}")
    return {"segment": f"I outlined {those}, {share}.",
            "count": f"I count {those}.",
            "locate": f"I see {those}, {where}.",
            "describe": f"I see {those}, {where}; their median area is {found.size:.0f} px, together they "
                        f"cover {share}.",
            "presence": f"Yes, I see {those} in this region."}[found.task]


def refusal(kind: str, text: str, target: str | None, trained: Sequence[str]) -> str:
    """The question back to an instruction that cannot be followed."""
    shows = ", ".join(plural(name) for name in trained)
    said = f'"{" ".join(text.split())[:80]}"'
    what = plural(target) if target else f"what {said} asks for"
    offer = f"I can show {shows}. Which of them shall I show?"
    if kind == "untrained":
        return f"I was not trained to recognise {what}; {offer}"
    if kind == "invisible":
        return f"I do not know {what} in H&E sections, where I see nuclei only; {offer}"
    return f"I do not understand {said} as an instruction about this region; {offer}"


# ----------------------------------------------------------------------------------------------- sources

@dataclass(frozen=True)
class Source:
    path: str                                   # folder
    kind: Literal["consep", "pannuke", "lizard", "labels"] = "labels"    # its layout, see source_tiles()
    split: Literal["train", "test"] = "train"   # what it serves
    tissue: str = ""                            # where all images are of one: colon
    licence: str = ""                           # as its authors state it; written into the weights
    classes: dict = field(default_factory=dict)  # its class: ours; empty: the layout's own
    regions: dict = field(default_factory=dict)  # value in NAME_regions.png: concept
    limit: int | None = None                    # images

    def __post_init__(self):
        for name in [*self.classes.values(), *self.regions.values()]:
            if name not in CONCEPTS and name not in UNTRAINED["train"]:
                raise ValueError(f"{self.path}: class '{name}' is none of {', '.join(CONCEPTS)}")


CLASSES = {
    "consep": {1: "other", 2: "inflammatory", 3: "healthy epithelial", 4: "malignant epithelial",
               5: "fibroblast", 6: "muscle", 7: "endothelial"},
    "pannuke": {0: "malignant epithelial", 1: "inflammatory", 2: "connective", 3: "dead",
                4: "healthy epithelial"},
    "lizard": {1: "neutrophil", 2: "epithelial", 3: "lymphocyte", 4: "plasma", 5: "eosinophil",
               6: "connective"},
    "labels": {name: name for name in CONCEPTS},
}


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
    labels : what readers.py reads, with X_classes.csv (columns id, class) or X_types.png, and X_regions.png
    """
    if not Path(source.path).is_dir():
        raise FileNotFoundError(f"{source.path}: no such folder; expected a source of kind {source.kind}")
    known = source.classes or CLASSES[source.kind]
    read = {"pannuke": _pannuke, "lizard": _lizard}.get(source.kind, _labelled)
    for number, (name, pixels, labels, classes, regions, tissue) in enumerate(read(source)):
        if number == source.limit:
            return
        if pixels.shape[0] != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"{name}: {pixels.dtype} of {pixels.shape[0]} channels, expected RGB of 8 bits")
        if strange := {c for c in classes.values() if c not in known}:
            raise ValueError(f"{name}: class {min(strange, key=str)!r}, expected one of "
                             f"{', '.join(map(str, known))}; give the source's classes: {{its class: ours}}")
        named = {number: known[c] for number, c in classes.items()}
        if bare := set(np.unique(labels).tolist()) - {0} - named.keys():
            raise ValueError(f"{name}: {len(bare)} cells without a class, such as {min(bare)}")
        yield Tile(name, pixels, labels, named, regions, tissue or source.tissue)


def _labelled(source: Source):
    import data
    for example in data.examples(source.path):
        image, labels = example.files[0], example.labels()
        stem = image.with_suffix("")
        table, types, areas = (stem.with_name(stem.name + end)
                               for end in ("_classes.csv", "_types.png", "_regions.png"))
        if table.is_file():
            lines = table.read_text(encoding="utf-8").splitlines()[1:]
            rows = [line.split(",", 1) for line in lines if line.strip()]
            if any(len(row) != 2 or not row[0].strip().isdigit() for row in rows):
                raise ValueError(f"{table}: expected lines `id,class` below a heading")
            classes = {int(row[0]): _number(row[1].strip()) for row in rows}
        elif types.is_file():
            classes = _majority(labels, data.read_labels(types), types)
        else:
            raise FileNotFoundError(f"{image}: no {table.name} (id,class) or {types.name} beside it")
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
            rgb = np.asarray(pixels[i]).transpose(2, 0, 1).round().clip(0, 255).astype(np.uint8)
            yield f"{prefix}_{i:04d}", rgb, labels, classes, {}, str(tissue[i]).lower()


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


# ---------------------------------------------------------------------------------- a language model's words

@dataclass(frozen=True)
class LLM:
    url: str = ""                               # OpenAI-compatible, such as http://localhost:8000/v1; "": off
    model: str = ""                             # its name there
    share: float = 0.5                          # of the instructions that it rewrites
    timeout: float = 60.0                       # seconds for an answer; the key is read from DINOCELL_LLM_KEY

    def __post_init__(self):
        if self.url and (not re.match("https?://", self.url) or not self.model):
            raise ValueError(f"llm: url={self.url}, model={self.model}; expected http(s)://... and the name "
                             "of a model")
        if not 0 <= self.share <= 1:
            raise ValueError(f"llm.share={self.share:g}: expected 0 to 1")


PROMPT = ("Reword this instruction to an image analysis program as a pathologist might say it. Keep the "
          "meaning, every cell type and every negation. Answer with the new instruction alone.")


def rewrite(text: str, llm: LLM) -> str:
    """The instruction in other words; where the answer is no single short line, in the old ones."""
    body = {"model": llm.model, "temperature": 1.0,
            "messages": [{"role": "system", "content": PROMPT}, {"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DINOCELL_LLM_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = llm.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=llm.timeout) as reply:
        raw = reply.read(1 << 20)
    try:
        said = json.loads(raw)["choices"][0]["message"]["content"].strip().strip('"')
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{llm.url}: no chat completion in the answer {raw[:80]!r}; is it "
                         "OpenAI-compatible?") from None
    return said if 0 < len(said) <= 200 and "\n" not in said else text


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
        cells.write_png(folder / f"{tile.name}_regions.png", value)
    cells.write_png(folder / f"{tile.name}.png", np.ascontiguousarray(tile.pixels.transpose(1, 2, 0)))
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


def centres(labels: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(n, 2) y, x px."""
    flat, n = labels.ravel(), int(labels.max(initial=0)) + 1
    area = np.maximum(np.bincount(flat, minlength=n), 1)
    sums = [np.bincount(flat, at.ravel(), minlength=n) for at in np.indices(labels.shape)]
    return np.stack(sums, 1)[ids] / area[ids, None]


def boxes(labels: np.ndarray) -> list[list[int]]:
    """[x0, y0, x1, y1] px of each label, ascending; x1 and y1 lie outside."""
    from scipy import ndimage
    return [[s[1].start, s[0].start, s[1].stop, s[0].stop] for s in ndimage.find_objects(labels) if s]
