"""Instructions in words and their true answers: classes of cells, a grammar, images, pairs.

    grammar = Grammar(trained, seed)
    grammar.ask("train", "count", ("inflammatory",)).text   # "how many leukocytes do you see?"
    answer_in_words(found)                                  # "I count 12 inflammatory cells."

    for tile in class_tiles(AnnotatedSet(path="../shared/data/he_consep/train", kind="consep")):
        ...                                 # .pixels (3, H, W) uint8, .labels, .classes {id: class}
    write_class_tile(folder / "train", tile)    # one layout for all; read_class_tiles() reads it
    write_pairs(path, tiles, ...)           # instructions about parts of the tiles, and the truth

The words are in configs/instruct_words.yaml. A cell counts for its class and all classes above it:
a fibroblast is a connective cell. A coarse class says nothing of a finer one, either way: an
`inflammatory` cell of PanNuke may be a lymphocyte or not.
"""
from __future__ import annotations

import itertools
import json
import os
import re
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

import runs

with runs.lazy():
    import scipy

    import cells
    import data
    import images

LEAST = 20               # px, what a tile's edge leaves of a nucleus counts from here on
PART = 250               # px, about the side of the regions that pairs are about
HELD_OUT = 0.2           # share of each image, or of small images, to validate on
IN_VAIN = 0.2            # share of instructions that call for a question back
BESIDE = 0.3             # share of those about something unknown that name a trained class as well
ELSEWHERE = 0.15         # share of the others that speak of a tissue

CLASS_MARK = "\0"        # stands for the words of a class where a text is searched for denials

# Outputs of the network, in this order.
TASKS = ("segment", "count", "locate", "describe", "compare", "exclude", "presence")
KINDS = ("known", "untrained", "invisible", "nonsense")
TISSUES = ("colon", "liver", "breast", "lung", "kidney", "brain", "skin", "prostate", "stomach",
           "heart", "pancreas", "bladder", "thyroid", "ovary", "bone", "adrenal gland", "bile duct",
           "cervix", "oesophagus", "head and neck", "testis", "uterus")


# ------------------------------------------------------------------------------------------- words

LOTS = ("train", "calibration", "held-out")
LOT_OF = dict(zip(("train", "validation", "test"), LOTS))


class Concept(NamedTuple):
    """A class of cells."""
    words: tuple[str, ...]              # in the plural; the first is what answers say
    held_out: tuple[str, ...]           # words that no training instruction has
    parent: str | None


@dataclass(frozen=True)
class Vocabulary:
    """configs/instruct_words.yaml, which says what each entry is."""
    concepts: dict
    untrained: dict
    invisible: dict
    chatter: dict
    salad: tuple[str, ...]
    templates: dict
    polite: tuple[str, ...]
    places: tuple[str, ...]
    articles: tuple[str, ...]
    denials: tuple[str, ...]
    singular: dict
    mass: tuple[str, ...]
    classes: dict
    organs: dict
    prompt: str


WORDS = runs.load_config(Vocabulary, Path(__file__).with_name("configs") / "instruct_words.yaml")
CONCEPTS = {name: Concept(tuple(concept["words"]), tuple(concept.get("held-out", ())),
                          concept.get("parent")) for name, concept in WORDS.concepts.items()}
WHOLE = next(name for name, concept in CONCEPTS.items() if concept.parent is None)   # every nucleus


def class_ancestors(name: str) -> tuple[str, ...]:
    """A class and all classes above it."""
    parent = CONCEPTS[name].parent
    return (name, *class_ancestors(parent)) if parent else (name,)


def class_membership(classes: Sequence[str], targets: Sequence[str], exclude: bool = False
                     ) -> np.ndarray:
    """(n,) int8: 1 where a cell of this class belongs to the targets, -1 where not, 0: unknown."""
    above = {name for target in targets for name in class_ancestors(target)}
    known = {name: 1 if set(class_ancestors(name)) & set(targets) else 0 if name in above else -1
             for name in set(classes)}
    return np.array([known[name] for name in classes], np.int8) * np.int8(-1 if exclude else 1)


def classes_apart(a: str, b: str) -> bool:
    """Neither concept contains the other."""
    return a not in class_ancestors(b) and b not in class_ancestors(a)


def words_deny(text: str) -> bool:
    """The text speaks of what is not something, in plain words; others the network has to read."""
    return bool(_denial_before(text))


def words_contrast(text: str) -> bool:
    """A class stands before the denial, as in "fibroblasts, not muscle": all but muscle is wrong.

    Behind the class it is a denial of that class: "all nuclei, fibroblasts excepted".
    """
    said = _denial_before(text)
    return CLASS_MARK in said and not said.endswith("ed")


def _denial_before(text: str) -> str:
    """The text up to its first denial, each class but the whole as CLASS_MARK; "" without one."""
    text = " ".join(text.lower().split())
    names = {word.lower().removesuffix("s") for name, concept in CONCEPTS.items() if name != WHOLE
             for word in (*concept.words, *concept.held_out)}
    longest = "|".join(sorted(names, key=len, reverse=True))   # non-neoplastic cells are a class
    text = re.sub(rf"\b({longest})s?\b", CLASS_MARK, text)
    found = re.search(rf"\b({'|'.join(WORDS.denials)})\b", text)
    return text[:found.end()] if found else ""


def class_is_taught(concept: str, counts: dict[str, int], least: int) -> bool:
    """Enough cells for it and, except for the root, against it."""
    side: Counter[int] = Counter()
    for name, number in counts.items():
        side[int(class_membership([name], [concept])[0])] += number
    return side[1] >= least and (side[-1] >= least or CONCEPTS[concept].parent is None)


# ----------------------------------------------------------------------------------------- grammar

class Instruction(NamedTuple):
    text: str
    kind: str                           # one of KINDS
    task: str                           # one of TASKS; "" for nonsense
    targets: tuple[str, ...]            # concepts; or an unknown thing, and perhaps a concept
    tissue: str = ""                    # that the text speaks of


class Grammar:
    """Draws instructions. `trained`: the concepts that the data teaches."""

    def __init__(self, trained: Sequence[str], seed: int, typos: float = 0.2):
        self.trained, self.typos = tuple(trained), typos
        self.rng = np.random.default_rng(seed)

    def pick(self, options: Sequence):
        return options[int(self.rng.integers(len(options)))]

    def ask(self, lot: str, task: str, targets: Sequence[str], tissue: str = "",
            kind: str = "known") -> Instruction:
        """An instruction of this lot. The two targets of a comparison are its sides."""
        nouns = [self.noun(target, lot) for target in targets]
        sides = nouns if task == "compare" else [" and ".join(nouns)]
        template = self.pick(WORDS.templates[task][lot])
        article = self.pick(WORDS.articles if task != "exclude" else ("", "the "))
        core = template.lstrip("!").format(x=article + sides[0], n=sides[0], y=sides[-1])
        end = core[-1] if core[-1] == "?" else self.pick(("", "", "."))
        place = self.pick(WORDS.places)
        if tissue:
            place = (f" {self.pick(('in this', 'in the', 'on this piece of'))} {tissue}"
                     + self.pick(("", " section", " biopsy", " sample")))
        before = self.pick(WORDS.polite) if template[0] == "!" else ""
        text = self.typed(before + core.rstrip("?") + place + end)
        return Instruction(text, kind, task, tuple(targets), tissue)

    def noun(self, target: str, lot: str) -> str:
        if target not in CONCEPTS:
            return target.removeprefix("the ")
        concept = CONCEPTS[target]
        return self.pick(concept.words + (concept.held_out if lot == "held-out" else ()))

    def ask_in_vain(self, lot: str, kind: str) -> Instruction:
        """An instruction that calls for a question back: untrained, invisible, or nonsense."""
        if kind == "nonsense":
            return Instruction(self.nonsense(lot), kind, "", ())
        target = self.pick(WORDS.invisible[lot] if kind == "invisible" else self.untrained(lot))
        if self.rng.random() >= BESIDE:
            task = self.pick([task for task in TASKS if task != "compare"])
            return self.ask(lot, task, (target,), kind=kind)
        known = self.pick(self.trained)
        both = (known, target) if self.rng.random() < 0.5 else (target, known)
        task = self.pick([task for task in TASKS if task != "exclude"])
        return self.ask(lot, task, both, kind=kind)._replace(targets=(target, known))

    def untrained(self, lot: str) -> list[str]:
        """Things one may ask for and, in training, concepts without data."""
        dry = [name for name, concept in CONCEPTS.items()
               if concept.words and name not in self.trained]
        return [*WORDS.untrained[lot], *(dry if lot == "train" else ())]

    def nonsense(self, lot: str) -> str:
        what = self.pick(("letters", "salad", "chatter", "chatter"))
        if what == "letters":
            alphabet = list("abcdefghijklmnopqrstuvwxyz")
            return " ".join("".join(self.rng.choice(alphabet, self.rng.integers(2, 9)))
                            for _ in range(self.rng.integers(1, 5)))
        if what == "salad":
            words = WORDS.salad[LOTS.index(lot)::3]
            return " ".join(self.rng.choice(words, self.rng.integers(2, 6)))
        return self.typed(self.pick(WORDS.chatter[lot]))

    def typed(self, text: str) -> str:
        """Capitals and typos as people leave them: letters swapped, lost or doubled."""
        words = text.split(" ")
        if self.rng.random() < self.typos:
            for at in self.rng.permutation(len(words))[:self.rng.integers(1, 3)]:
                word = words[at]
                if len(word) >= 5:
                    i = int(self.rng.integers(1, len(word) - 2))
                    head, a, tail = word[:i], word[i], word[i + 1:]
                    words[at] = self.pick((head + tail[0] + a + tail[1:], head + tail,
                                           head + a + word[i:]))
        text, style = " ".join(words), self.rng.random()
        if style < 0.03:
            return text.upper()
        return text[0].upper() + text[1:] if style < 0.5 else text


# ----------------------------------------------------------------------------------------- answers

class Found(NamedTuple):
    """What an answer is made of; the same for true cells and for the network's."""
    task: str
    targets: tuple[str, ...]
    counts: tuple[int, ...]             # of each target
    # of the answered cells: of all targets, or of all but them
    count: int  # type: ignore[assignment]  # nobody counts values in this tuple
    area: float                         # share of the region that these cover
    size: float                         # px, their median area
    place: str                          # where most of them are; "" when they are spread


def found_classes(labels: np.ndarray, task: str, targets: tuple[str, ...], counts: tuple[int, ...]
                  ) -> Found:
    """The answer to a task whose cells are those of a label image."""
    area = np.bincount(labels.ravel())[1:]
    ids = np.flatnonzero(area) + 1
    if not len(ids):
        return Found(task, targets, counts, 0, 0.0, 0.0, "")
    centres = np.array(scipy.ndimage.center_of_mass(labels > 0, labels, ids))            # (n, 2)
    return Found(task, targets, counts, len(ids), float(area.sum() / labels.size),
                 float(np.median(area[ids - 1])), words_of_place(centres, labels.shape))


def words_of_place(centres: np.ndarray, shape: tuple[int, int]) -> str:
    """The part of a 3 x 3 grid that holds at least a third of the centres (n, 2), if one does."""
    grid = np.minimum((centres * 3 / np.array(shape)).astype(int), 2)
    number = np.bincount(grid[:, 0] * 3 + grid[:, 1], minlength=9)
    if 3 * number.max() < len(centres):
        return ""
    row, column = divmod(int(number.argmax()), 3)
    words = ("upper", "", "lower")[row], ("left", "", "right")[column]
    return " ".join(filter(None, words)) or "centre"


def class_label_boxes(labels: np.ndarray) -> list[list[int]]:
    """[x0, y0, x1, y1] px of each label, ascending; x1 and y1 lie outside."""
    return [[x.start, y.start, x.stop, y.stop]
            for y, x in filter(None, scipy.ndimage.find_objects(labels))]


def class_plural(target: str) -> str:
    return CONCEPTS[target].words[0] if target in CONCEPTS else target


def amount_in_words(count: int, name: str) -> str:
    """no fibroblasts, 1 fibroblast, 2 fibroblasts; 2 areas of necrosis."""
    if name in WORDS.mass:
        name = f"areas of {name}" if count != 1 else f"area of {name}"
    elif count == 1:
        *before, last = name.split(" ")
        name = " ".join((*before, WORDS.singular.get(last, last.removesuffix("s"))))
    return f"{count or 'no'} {name}"


def answer_in_words(found: Found) -> str:
    names = [class_plural(target) for target in found.targets]
    share = f"{found.area:.1%} of the region"
    if found.task == "compare":
        (x, a), (y, b) = sorted(zip(found.counts, names), reverse=True)
        if x == y:
            return f"Neither: I see {amount_in_words(x, a)} and {amount_in_words(y, b)}."
        return f"There are more {a} ({x}) than {b} ({y})."
    if found.task == "exclude":
        if not sum(found.counts):
            rest = f"I outlined {amount_in_words(found.count, class_plural(WHOLE))}, {share}"
            return f"I see no {' or '.join(names)} in this region; {rest}."
        but = " and ".join(map(amount_in_words, found.counts, names))
        others = amount_in_words(found.count, f"other {class_plural(WHOLE)}")
        return f"Apart from {but} I see {others}{f', {share}' * (found.count > 0)}."
    if not found.count:
        return f"I see no {' or '.join(names)} in this region."
    spread = not found.place or found.count <= 2
    where = "spread over the region" if spread else f"most of them in the {found.place}"
    those = " and ".join(map(amount_in_words, found.counts, names))
    return {"segment": f"I outlined {those}, {share}.",
            "count": f"I count {those}.",
            "locate": f"I see {those}, {where}.",
            "describe": f"I see {those}, {where}; their median area is {found.size:.0f} px, "
                        f"together they cover {share}.",
            "presence": f"Yes, I see {those} in this region."}[found.task]


def refusal_in_words(kind: str, text: str, target: str | None, trained: Sequence[str]) -> str:
    """The question back to an instruction that cannot be followed."""
    shows = ", ".join(class_plural(name) for name in trained)
    said = f'"{" ".join(text.split())[:80]}"'
    what = class_plural(target) if target else f"what {said} asks for"
    offer = f"I can show {shows}. Which of them shall I show?"
    if kind == "untrained":
        return f"I was not trained to recognise {what}; {offer}"
    if kind == "invisible":
        return f"I do not know {what} in H&E sections, where I see nuclei only; {offer}"
    return f"I do not understand {said} as an instruction about this region; {offer}"


# ------------------------------------------------------------------- sentences of a language model

@dataclass(frozen=True)
class LLM:
    url: str = ""                       # OpenAI-compatible, as http://localhost:8000/v1; "": off
    model: str = ""                     # its name there; its key is read from DINOCELL_LLM_KEY
    share: runs.Share = 0.5             # of the instructions that it rewrites

    def __post_init__(self):
        if self.url and (not re.match("https?://", self.url) or not self.model):
            raise ValueError(f"llm: url={self.url}, model={self.model}; expected http(s)://... and "
                             "the name of a model")


def rewrite_instruction(text: str, llm: LLM) -> str:
    """The instruction in other words; where the answer is no single short line, in the old ones."""
    body = {"model": llm.model, "temperature": 1.0,
            "messages": [{"role": "system", "content": WORDS.prompt},
                         {"role": "user", "content": text}]}
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("DINOCELL_LLM_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    url = llm.url.rstrip("/") + "/chat/completions"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    for pause in (1, 4, None):                                 # seconds
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                raw = reply.read(1 << 20)
            break
        except OSError as error:                               # HTTPError, URLError, timeouts
            refused = getattr(error, "code", 500)
            if pause is None or (refused < 500 and refused != 429):
                raise OSError(f"llm.url={llm.url}, model {llm.model}: {error}; is it running, and "
                              "its key in DINOCELL_LLM_KEY?") from None
            time.sleep(pause)
    try:
        said = json.loads(raw)["choices"][0]["message"]["content"].strip().strip('"')
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{llm.url}: no chat completion in the answer {raw[:80]!r}; is it "
                         "OpenAI-compatible?") from None
    return said if 0 < len(said) <= 200 and "\n" not in said else text


# ----------------------------------------------------------------------------- images with classes

@dataclass(frozen=True)
class AnnotatedSet:
    path: str                                   # folder
    kind: Literal["consep", "pannuke", "lizard", "labels"] = "labels"   # layout, see class_tiles
    split: Literal["train", "test"] = "train"   # what it serves
    tissue: str = ""                            # where all images are of one: colon
    licence: str = ""                           # as its authors state it; the weights keep it
    classes: dict = field(default_factory=dict)  # its class: ours; empty: the layout's own
    every: str = ""                             # class of all cells, where there are no others
    limit: runs.Count | None = None             # images

    def __post_init__(self):
        for name in filter(None, (*self.classes.values(), self.every)):
            if name not in CONCEPTS:
                raise ValueError(f"{self.path}: class '{name}' is none of {', '.join(CONCEPTS)}")
        if self.tissue and self.tissue not in TISSUES:
            raise ValueError(f"{self.path}: tissue '{self.tissue}' is none of "
                             f"{', '.join(TISSUES)}; leave it out if none fits")


class TissueTile(NamedTuple):
    name: str
    pixels: np.ndarray                  # (3, H, W) uint8
    labels: np.ndarray                  # (H, W) int32
    classes: dict                       # of every id in labels
    tissue: str

    def normalised(self) -> np.ndarray:
        """(3, H, W) as the network sees it."""
        return images.normalise(self.pixels, images.percentiles(self.pixels))


def class_tiles(source: AnnotatedSet) -> Iterator[TissueTile]:
    """The images of a source, whatever its layout.

    consep : X.png, X_nuclei.png (instances), X_types.png (class per pixel)
    pannuke : images.npy (N, H, W, 3), masks.npy (N, H, W, 6: instances of five classes,
        background), types.npy (tissues), below the folder, as fold1/images/fold1/ and
        fold1/masks/fold1/ or side by side
    lizard : X.mat with inst_map, id, class, and X.png, anywhere below the folder
    labels : a labelled set of any layout (data.py), with X_classes.csv (columns id, class) or
        X_types.png; without classes if all its cells are of one, `every`
    """
    if not Path(source.path).is_dir():
        raise FileNotFoundError(f"{source.path}: no such folder; expected a source of kind "
                                f"{source.kind}")
    known = source.classes or WORDS.classes.get(source.kind, {name: name for name in CONCEPTS})
    layouts = {"pannuke": _pannuke_tiles, "lizard": _lizard_tiles}
    read = layouts.get(source.kind, _labelled_class_tiles)
    for name, pixels, labels, classes, tissue in itertools.islice(read(source), source.limit):
        if source.every and len(pixels) == 1:          # a gray one teaches where nuclei end, too
            pixels = np.repeat(pixels, 3, 0)
        if len(pixels) != 3 or pixels.dtype != np.uint8:
            raise ValueError(f"{name}: {pixels.dtype} of {len(pixels)} channels, expected RGB of "
                             "8 bits")
        if strange := {c for c in classes.values() if c not in known}:
            raise ValueError(f"{name}: class {min(strange, key=str)!r}, expected one of "
                             f"{', '.join(map(str, known))}; give the source's classes: "
                             "{its class: ours}")
        there = set(np.unique(labels).tolist()) - {0}  # a table may name cells that others cover
        if bare := there - classes.keys():
            raise ValueError(f"{name}: {len(bare)} cells without a class, such as {min(bare)}")
        named = {number: known[classes[number]] for number in sorted(there)}
        yield TissueTile(name, pixels, labels, named, tissue or source.tissue)


def _labelled_class_tiles(source: AnnotatedSet):
    for example in data.examples(source.path):
        image, labels = example.files[0], example.labels()
        table, types = (image.with_name(image.stem + end) for end in ("_classes.csv", "_types.png"))
        if source.every:
            classes = dict.fromkeys(np.unique(labels[labels > 0]).tolist(), source.every)
        elif table.is_file():
            rows = runs.read_table(table, ("id", "class"))
            if any(not row["id"].isdigit() for row in rows):
                raise ValueError(f"{table}: expected whole numbers in the column id")
            classes = {int(row["id"]): int(row["class"]) if row["class"].isdigit() else row["class"]
                       for row in rows}
        elif types.is_file():
            classes = data.majority_class(labels, data.read_labels(types), types)
        else:
            raise FileNotFoundError(f"{image}: no {table.name} (id,class) or {types.name} beside "
                                    "it; if its classes are not known, every: nuclei says so")
        yield example.name.replace("/", "_"), example.image().pixels, labels, classes, ""


def _class_set_files(source: AnnotatedSet, pattern: str, what: str) -> list[Path]:
    found = data.list_files(source.path, ("",), pattern)
    if not found:
        raise FileNotFoundError(f"{source.path}: no {pattern} below it, expected {what}")
    return found


def _pannuke_tiles(source: AnnotatedSet):
    for path in _class_set_files(source, "images.npy", "PanNuke's images.npy and masks.npy"):
        fold = path.relative_to(source.path)
        above = ("masks" if part == "images" else part for part in fold.parts[:-1])
        masks = Path(source.path, *above, "masks.npy")
        if not masks.is_file():
            raise FileNotFoundError(f"{path}: its {masks} is missing")
        pixels, instances = (np.load(file, mmap_mode="r") for file in (path, masks))
        if pixels.ndim != 4 or instances.shape != (*pixels.shape[:3], 6):
            raise ValueError(f"{masks}: {instances.shape} beside images of {pixels.shape}; "
                             "expected (N, H, W, 6) and (N, H, W, 3)")
        tissues = path.with_name("types.npy")
        tissue = np.load(tissues) if tissues.is_file() else np.full(len(pixels), "")
        prefix = fold.parts[0] if len(fold.parts) > 1 else "pannuke"
        for i in range(len(pixels)):
            organ = WORDS.organs.get(str(tissue[i]).lower(), str(tissue[i]).lower())
            if organ and organ not in TISSUES:
                raise ValueError(f"{tissues}: tissue '{tissue[i]}', expected one of "
                                 f"{', '.join([*TISSUES, *WORDS.organs])}")
            labels = np.zeros(instances.shape[1:3], np.int32)
            classes: dict[int, Any] = {}
            for c in range(5):
                ids, at = np.unique(instances[i, :, :, c].astype(np.int64), return_inverse=True)
                numbers = np.where(ids > 0, len(classes) + np.cumsum(ids > 0), 0).astype(np.int32)
                labels = np.where(labels == 0, numbers[at.reshape(labels.shape)], labels)
                classes |= {int(n): c for n in numbers[ids > 0]}
            rgb = np.asarray(pixels[i]).transpose(2, 0, 1).round().clip(0, 255).astype(np.uint8)
            yield f"{prefix}_{i:04d}", rgb, labels, classes, organ


def _lizard_tiles(source: AnnotatedSet):
    pictures = {path.stem: path for path in data.list_files(source.path, (".png",))}
    for path in _class_set_files(source, "*.mat", "Lizard's Labels/NAME.mat and NAME.png"):
        content = scipy.io.loadmat(path)
        if missing := {"inst_map", "id", "class"} - content.keys():
            raise ValueError(f"{path}: no {', '.join(sorted(missing))}, expected labels of Lizard")
        if path.stem not in pictures:
            raise FileNotFoundError(f"{path}: no {path.stem}.png below {source.path}")
        ids, kinds = (content[key].ravel().astype(int).tolist() for key in ("id", "class"))
        pixels, labels = images.read_image(pictures[path.stem]).pixels, content["inst_map"]
        yield path.stem, pixels, labels.astype(np.int32), dict(zip(ids, kinds)), ""


# ----------------------------------------------------------------------------------------- the set

def split_class_tile(tile: TissueTile, split: str, seed: int) -> Iterator[tuple[str, TissueTile]]:
    """An image for train and validation: large ones lose their lowest rows to validation, of small
    ones some go there whole. With few images a class would else be on one side only."""
    H = len(tile.labels)
    last = H - round(H * HELD_OUT)
    if split == "test":
        yield split, tile
    elif H < 3 * PART:
        lot = int(runs.digest(f"{seed}/{tile.name}")[:8], 16) / 2**32
        yield ("validation" if lot < HELD_OUT else "train"), tile
    else:
        yield "train", crop_class_tile(tile, (slice(0, last), slice(None)), 1)
        yield "validation", crop_class_tile(tile, (slice(last, H), slice(None)), 1)


def crop_class_tile(tile: TissueTile, part: tuple[slice, slice], least: int = LEAST) -> TissueTile:
    """A part of a tile, without what its edge leaves of a nucleus below `least` px."""
    labels = tile.labels[part]
    labels = labels * (np.bincount(labels.ravel()) >= least)[labels]
    return tile._replace(pixels=tile.pixels[(slice(None), *part)], labels=labels,
                         classes={i: tile.classes[i] for i in np.unique(labels).tolist() if i})


def class_tile_parts(tile: TissueTile) -> list[tuple[TissueTile, tuple[int, int, int, int]]]:
    """Parts of about PART px that fill an image, and their boxes (y0, x0, y1, x1)."""
    ys, xs = (np.linspace(0, n, max(1, round(n / PART)) + 1).round().astype(int).tolist()
              for n in tile.labels.shape)
    return [(crop_class_tile(tile, (slice(y0, y1), slice(x0, x1))), (y0, x0, y1, x1))
            for y0, y1 in itertools.pairwise(ys) for x0, x1 in itertools.pairwise(xs)]


def write_class_tile(folder: Path, tile: TissueTile) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"id": number, "class": name} for number, name in sorted(tile.classes.items())]
    runs.write_table(folder / f"{tile.name}_classes.csv", rows, ("id", "class"))
    (folder / f"{tile.name}_tissue.txt").unlink(missing_ok=True)
    if tile.tissue:
        runs.write_text(folder / f"{tile.name}_tissue.txt", tile.tissue + "\n")
    rgb = np.ascontiguousarray(tile.pixels.transpose(1, 2, 0))
    cells.write_picture(folder / f"{tile.name}.png", rgb)
    data.write_labels(folder / f"{tile.name}_labels.tif", tile.labels)


def read_class_tiles(folder: str | Path, split: str) -> list[TissueTile]:
    """Tiles that write_class_tile wrote; none where there is no such split."""
    folder = Path(folder, split)
    notes = {note.name: note.read_text(encoding="utf-8").strip()
             for note in folder.glob("*_tissue.txt")}
    tiles = class_tiles(AnnotatedSet(str(folder))) if folder.is_dir() else ()
    return [tile._replace(tissue=notes.get(f"{tile.name}_tissue.txt", "")) for tile in tiles]


def _instruct_set_file(path: Path) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; make the set first: python instruct.py "
                                "make configs/instruct.yaml")
    return path.read_text(encoding="utf-8")


def read_instruct_record(folder: str | Path) -> dict:
    """set.json, which make writes: trained concepts, cells, tissues, licences."""
    return json.loads(_instruct_set_file(Path(folder, "set.json")))


def read_pairs(folder: str | Path, split: str) -> list[dict]:
    return [json.loads(line)
            for line in _instruct_set_file(Path(folder, f"pairs_{split}.jsonl")).splitlines()]


# ------------------------------------------------------------------------------------------- pairs

def class_truth(tile: TissueTile, task: str, targets: tuple[str, ...]
                ) -> tuple[Found, np.ndarray] | None:
    """The true answer and the labels of its cells; None where classes are too coarse to say."""
    names = list(tile.classes.values())
    belongs = class_membership(names, targets, task == "exclude")
    if (belongs == 0).any():
        return None
    ids = np.array(list(tile.classes), np.int64)[belongs > 0]
    labels = tile.labels * np.isin(tile.labels, ids)
    counts = tuple(int((class_membership(names, [target]) > 0).sum()) for target in targets)
    return found_classes(labels, task, targets, counts), labels


def class_is_in_tile(tile: TissueTile, targets: tuple[str, ...]) -> bool | None:
    """Some cell belongs to the targets; None where nobody can say."""
    belongs = class_membership(list(tile.classes.values()), targets)
    return None if (belongs == 0).any() else bool((belongs > 0).any())


def write_pairs(path: Path, tiles: list[TissueTile], record: dict, lot: str, count: int, llm: LLM,
                rng: np.random.Generator) -> int:
    """Write `count` pairs of each part of the tiles; returns how many.

    Of all that may be asked (task, targets, there or not) a part gets what was asked least so far.
    """
    trained, own = record["trained"], record["tissues"] or [""]
    grammar = Grammar(trained, int(rng.integers(2**31)))
    foreign = [name for name in TISSUES if name not in own]
    pairs = [pair for pair in itertools.permutations(trained, 2) if classes_apart(*pair)]
    some = [*((name,) for name in trained), *pairs[::7]]
    asked = [(task, targets) for task in TASKS for targets in (pairs if task == "compare" else some)
             if task != "exclude" or "nuclei" not in targets]
    lines: list[str] = []
    used: Counter[tuple] = Counter()
    for tile in tiles:
        for part, box in class_tile_parts(tile):
            there = {targets: class_is_in_tile(part, targets) for _, targets in asked}
            options = [(task, targets) for task, targets in asked if there[targets] is not None]
            keys = [(task, targets[0], len(targets), there[targets]) for task, targets in options]
            for _ in range(count):
                tissue, answered = "", None
                if rng.random() < IN_VAIN or not options:
                    said = grammar.ask_in_vain(lot, grammar.pick(KINDS[1:]))
                else:
                    least = min(used[key] for key in keys)
                    at = grammar.pick([i for i, key in enumerate(keys) if used[key] == least])
                    used[keys[at]] += 1
                    if rng.random() < ELSEWHERE:
                        tissue = grammar.pick(foreign if rng.random() < 0.5 else own)
                    task, targets = options[at]
                    said = grammar.ask(lot, task, targets, tissue)
                    answered = class_truth(part, task, targets)
                if llm.url and rng.random() < llm.share:
                    said = said._replace(text=rewrite_instruction(said.text, llm))
                line = dict(image=tile.name, box=box, instruction=said.text, kind=said.kind,
                            task=said.task, targets=said.targets, tissue=said.tissue, wording=lot)
                lines.append(json.dumps(line | true_answer(said, answered, record)))
    runs.write_text(path, "\n".join(lines) + "\n" * bool(lines))
    return len(lines)


def true_answer(said: Instruction, answered: tuple[Found, np.ndarray] | None, record: dict) -> dict:
    """The answer of a line of pairs_*.jsonl, or the question back.

    Boxes are [x0, y0, x1, y1] in px of the part, ids those of the image's labels.
    """
    line: dict[str, Any] = dict(status="question", count=None, ids=[], boxes=[], area_fraction=None)
    own = record["tissues"]
    if answered is None:
        target = said.targets[0] if said.targets else None
        back = refusal_in_words(said.kind, said.text, target, record["trained"])
        return line | dict(response=back)
    if said.tissue and own and said.tissue not in own:
        back = f"You speak of {said.tissue}, but I was trained on {', '.join(own)}."
        return line | dict(response=back)
    found, labels = answered
    return dict(status="answer", response=answer_in_words(found), count=found.count,
                ids=np.unique(labels[labels > 0]).tolist(), boxes=class_label_boxes(labels),
                area_fraction=round(found.area, 6))
