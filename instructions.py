"""Instructions in words and their answers: an ontology, a grammar, sentences.

    grammar = Grammar(trained, seed)
    grammar.ask("held-out", "count", ("inflammatory",)).text       "what number of leucocytes are there here?"
    sentence("count", found)                                       "I count 12 inflammatory cells."

Wordings are of three lots that share no template: `train`, `calibration` (thresholds are chosen on it) and
`held-out` (scores are reported on it), which also has nouns and unknown things of its own. A class counts for
all its ancestors in the tree: a fibroblast is a connective cell. A coarse class says nothing of a finer one,
either way: an `inflammatory` cell of PanNuke may be a lymphocyte or not.
"""
from __future__ import annotations

import json
import os
import re
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

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
TISSUES = ("colon", "liver", "breast", "lung", "kidney", "brain", "skin", "prostate", "stomach", "heart",
           "pancreas", "bladder", "thyroid", "ovary", "bone", "adrenal gland", "bile duct", "cervix", "oesophagus",
           "head and neck", "testis", "uterus")


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
BESIDE = 0.3            # share of instructions about something unknown that name a trained concept as well
ARTICLES = ("the ", "the ", "all ", "all the ", "", "any ")


class Instruction(NamedTuple):
    text: str
    kind: str                           # known, untrained, invisible, nonsense
    task: str                           # one of TASKS; "" for nonsense
    targets: tuple[str, ...]            # concepts; or what is unknown, and perhaps a concept beside it
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
        target = self.pick(list(INVISIBLE[lot]) if kind == "invisible" else self.untrained(lot))
        if self.rng.random() >= BESIDE:
            return self.ask(lot, self.pick([task for task in TASKS if task != "compare"]), (target,), kind=kind)
        known = self.pick(self.trained)
        both = (known, target) if self.rng.random() < 0.5 else (target, known)
        said = self.ask(lot, self.pick([task for task in TASKS if task != "exclude"]), both, kind=kind)
        return said._replace(targets=(target, known))

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


SINGULAR = {"nuclei": "nucleus", "glomeruli": "glomerulus", "alveoli": "alveolus", "thrombi": "thrombus",
            "abscesses": "abscess"}
MASS = ("necrosis", "mucin", "oedema", "haemorrhage")


def amount(count: int, name: str) -> str:
    """no fibroblasts, 1 fibroblast, 2 fibroblasts; 2 areas of necrosis."""
    if name in MASS:
        name = f"areas of {name}" if count != 1 else f"area of {name}"
    elif count == 1:
        *before, last = name.split(" ")
        name = " ".join((*before, SINGULAR.get(last, last.removesuffix("s"))))
    return f"{count or 'no'} {name}"


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
    for pause in (1, 4, None):
        try:
            with urllib.request.urlopen(request, timeout=llm.timeout) as reply:
                raw = reply.read(1 << 20)
            break
        except OSError as error:                               # HTTPError, URLError and timeouts are some
            refused = getattr(error, "code", 500)
            if pause is None or (refused < 500 and refused != 429):
                raise OSError(f"llm.url={llm.url}, model {llm.model}: {error}; is it running, and its key in "
                              "DINOCELL_LLM_KEY? Leave llm out to keep the grammar's own wordings") from None
            time.sleep(pause)
    try:
        said = json.loads(raw)["choices"][0]["message"]["content"].strip().strip('"')
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{llm.url}: no chat completion in the answer {raw[:80]!r}; is it "
                         "OpenAI-compatible?") from None
    return said if 0 < len(said) <= 200 and "\n" not in said else text
