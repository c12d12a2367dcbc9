"""A region and an instruction -> cells, boxes and a sentence, or a question back.

    net = answer.load("final_models/instruct_tiny.pt")
    view = look(pixels, net)                             once per region: nuclei and what each is like
    reply = respond(view, "count the inflammatory cells", net, language.load())
    reply.sentence, reply.status, reply.labels           "I count 12 ...", "answer" or "question", (H, W)

The decoder of model.DINOCell gets more outputs: beside the distance, an embedding of length 1 for each pixel.
A text lands in the same space; cosine times a learned temperature, plus a bias, is the logit that a pixel or
a cell (its mean embedding) belongs to the answer. Other outputs of the text say how it was understood, for
words and guardrails only: which cells are answered is decided by the similarity.

Letters: B images, T texts, M cells, E width of the common space, K names, H W pixels.
"""
from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import data
import instructions
import model
import segment
from instructions import TASKS, TISSUES, Found

KINDS = ("known", "untrained", "invisible", "nonsense")
TEXT = 384                              # width of MiniLM's vectors


@dataclass
class Words:
    """What the text side knows, and where it draws its lines; kept in the weights."""
    names: tuple[str, ...] = ()         # of concepts and of unknown things that it tells apart
    trained: tuple[str, ...] = ()       # concepts with data
    regions: tuple[str, ...] = ()       # those of them that are areas, not cells
    tissues: tuple[str, ...] = ()       # of the training images
    text: int = TEXT                    # width of the sentence encoder
    hidden: int = 256
    width: int = 32                     # E
    classes: tuple[str, ...] = ()       # the control with a fixed-class head: its classes; else none
    belongs: float = 0.5                # a cell belongs to the answer above this probability
    present: float = 0.5                # of a class there is something only if a cell reaches this
    pixel: float = 0.5                  # an area: a pixel belongs above this
    known: float = 0.5                  # an instruction is followed above this probability that it can be
    stain: float = 0.5                  # H&E: share of absorbing pixels that are pink to violet, at least
    tissue: float = math.inf            # distance from the training tissue (strangeness) at most
    licence: tuple[str, ...] = field(default=())    # of the training data


class Understood(NamedTuple):
    """T instructions as the network reads them."""
    vectors: Tensor                     # (T, E), length 1
    task: Tensor                        # (T, tasks) logits
    kind: Tensor                        # (T, kinds) logits
    names: Tensor                       # (T, K) logits, several may hold
    tissue: Tensor                      # (T, 1 + tissues) logits, 0 none


class Instructed(model.DINOCell):
    """DINOCell with an embedding per pixel and a text side. forward() is still the distance alone."""

    def __init__(self, backbone: model.ViT, widths: tuple[int, ...], last: int, settings: model.Settings,
                 words: Words, stem: int = 1):
        super().__init__(backbone, widths, last, settings, stem)
        self.words, hidden = words, words.hidden
        self.decoder.head = nn.Conv2d(last, 1 + words.width, 1)
        self.context = nn.Linear(backbone.dim, words.width)                  # of a patch: what lies around
        self.reader = nn.Sequential(nn.LayerNorm(words.text, elementwise_affine=False),  # of length 1 before
                                    nn.Linear(words.text, hidden), nn.GELU(), nn.Dropout(0.1),
                                    nn.Linear(hidden, hidden), nn.GELU())
        self.to_space = nn.Linear(hidden, words.width)
        self.to_task, self.to_kind = nn.Linear(hidden, len(TASKS)), nn.Linear(hidden, len(KINDS))
        self.to_names = nn.Linear(hidden, len(words.names))
        self.to_tissue = nn.Linear(hidden, 1 + len(TISSUES))
        self.temperature = nn.Parameter(torch.tensor(math.log(10.0)))        # of the cosine, as a logarithm
        self.offset = nn.Parameter(torch.tensor(-2.0))                       # most cells do not belong
        self.fixed = nn.Parameter(torch.randn(len(words.classes), words.width))
        self.register_buffer("prototypes", torch.zeros(len(words.trained), words.width))  # concepts' texts
        self.register_buffer("centre", torch.zeros(backbone.dim))            # of the training tissue's tokens
        self.register_buffer("whiten", torch.eye(backbone.dim))

    @torch.no_grad()
    def take_decoder(self, other: model.Decoder) -> None:
        """Begin with a decoder that finds cells already; its head becomes the distance's row of ours."""
        for name, tensor in other.state_dict().items():
            own = self.decoder.get_parameter(name)
            (own[:1] if name.startswith("head.") else own).copy_(tensor)

    def forward(self, x: Tensor) -> Tensor:
        return self.maps(x)[0]

    def maps(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, 1, H, W) distances, (B, E, H, W) embeddings of length 1, (B, D) mean token."""
        x = (x - self.mean) / self.std
        taps = self.backbone.features(x, self.taps)
        h, w = x.shape[2] // self.backbone.patch, x.shape[3] // self.backbone.patch
        out = self.decoder(x, taps, h, w).float()                            # (B, 1 + E, H, W)
        around = self.context(self.decoder.norms[-1](taps[-1])).mT.unflatten(2, (h, w)).float()
        around = F.interpolate(around, scale_factor=self.backbone.patch, mode="bilinear")    # (B, E, H, W)
        return out[:, :1].sigmoid(), F.normalize(out[:, 1:] + around, dim=1), taps[-1].float().mean(1)

    def read(self, text: Tensor) -> Understood:
        """Sentence vectors (T, 384) -> what is asked for."""
        x = self.reader(text)
        return Understood(F.normalize(self.to_space(x), dim=-1), self.to_task(x), self.to_kind(x),
                          self.to_names(x), self.to_tissue(x))

    def similarity(self, vectors: Tensor, embeddings: Tensor) -> Tensor:
        """(T, E), (M, E) -> (T, M) logits."""
        return vectors @ embeddings.T * self.temperature.exp() + self.offset

    def classify(self, embeddings: Tensor) -> Tensor:
        """(M, E) -> (M, classes) logits of the fixed-class control."""
        return embeddings @ F.normalize(self.fixed, dim=-1).T * self.temperature.exp()

    def strangeness(self, tokens: Tensor) -> float:
        """How far a mean token (D,) lies from the training tissue: its Mahalanobis distance over sqrt(D)."""
        tokens = tokens.to(self.centre.device)
        return float((self.whiten @ (tokens - self.centre)).norm() / math.sqrt(len(tokens)))


def save(net: Instructed, path: str | Path) -> None:
    """As model.save writes a network, with float16 tensors, and the words beside."""
    net.architecture = {**net.architecture, "words": asdict(net.words)}
    model.save(net, path, half=True)


def load(path: str | Path) -> Instructed:
    """A network written by save(), in float32 on the CPU, ready to be asked."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no weights at {path}; train them: python instruct.py make "
                                "configs/instruct.yaml && python instruct.py train configs/instruct.yaml, or "
                                "give weights=FILE")
    if model.kind(path) != "Instructed":
        raise ValueError(f"{path}: weights of another kind, expected those that instruct.py train exports")
    content = torch.load(path, map_location="cpu", weights_only=True)
    shape = content["architecture"]
    if strange := set(shape["words"]) ^ {f.name for f in fields(Words)}:
        raise ValueError(f"{path}: written by another version of this code ({', '.join(sorted(strange))}); "
                         "train it anew")
    net = Instructed(model.built(shape["backbone"]), tuple(shape["widths"]), shape["last"],
                     model.settings_of(content, path), Words(**shape["words"]), shape["stem"])
    net.load_state_dict({name: tensor.float() for name, tensor in content["state_dict"].items()})
    return net.eval()


# --------------------------------------------------------------------------------------------- looking

class View(NamedTuple):
    """A region as the network sees it, before any instruction."""
    pixels: np.ndarray                  # (C, H, W) as given
    labels: np.ndarray                  # (H, W) int32, 1..n: every nucleus
    cells: Tensor                       # (n, E) mean embedding of each, length 1
    plane: Tensor | None                # (E, H, W), where the network knows areas
    stain: float                        # see stain()
    strange: float                      # see Instructed.strangeness()
    what: str                           # in words, where it is no H&E: "a gray image"


def stain(pixels: np.ndarray) -> tuple[float, str]:
    """(share, what it looks like): of the light-absorbing pixels, those that look like H&E.

    Haematoxylin and eosin absorb green most: in optical density OD = -log10(I) green is above red and blue.
    Brown (DAB), gray, blue or green pictures fail that, and dark grounds too. Almost empty images have 0.
    """
    if len(pixels) != 3:
        return 0.0, f"an image of {len(pixels)} channel{'s' * (len(pixels) != 1)}, not in colour"
    top = np.iinfo(pixels.dtype).max if pixels.dtype.kind in "iu" else max(1.0, float(pixels.max()))
    od = -np.log10((pixels.reshape(3, -1)[:, ::7].astype(np.float32) / top).clip(1 / 255, 1))
    red, green, blue = od
    absorbs = green > 0.1
    if absorbs.mean() < 0.05 and od.max(0).mean() < 0.1:
        return 0.0, "an almost empty field"
    if np.ptp(od, axis=0).mean() < 0.02:
        return 0.0, "a gray image"
    pink = absorbs & (green > 1.1 * red) & (green > 1.05 * blue) & (green < 1.5)     # above 1.5: black
    share = float(pink.sum() / max((od.max(0) > 0.1).sum(), 1))
    return share, "colours unlike those of haematoxylin and eosin"


@torch.inference_mode()
def look(pixels: np.ndarray, net: Instructed, labels: np.ndarray | None = None, scale: float = 1.0) -> View:
    """Nuclei and their embeddings.

    labels : given nuclei instead of those that the network finds, for measurements.
    scale : network px per px of the region, see segment.zoom_for.
    """
    share, what = stain(pixels)
    shown = pixels[:3]                   # more channels are no H&E; the stain says so
    rgb = data.to_rgb(data.normalise(shown, data.percentiles(shown, net.settings.low, net.settings.high)))
    if labels is None:
        labels = segment.segment(rgb, net, limits=segment.UNIT, zoom=scale)
    size = rgb.shape[1:]
    seen_at = [max(1, round(n * scale)) for n in size]
    plane, tokens = embeddings(resized(torch.from_numpy(rgb), seen_at), net)
    plane = resized(plane, size)
    cells = pooled(plane[None], torch.from_numpy(labels)[None].long(), int(labels.max()) + 1)[0][0, 1:]
    kept = plane if net.words.regions else None
    return View(pixels, labels, cells, kept, share, net.strangeness(tokens), what)


def resized(planes: Tensor, size: Sequence[int]) -> Tensor:
    """(C, h, w) -> (C, *size)."""
    if planes.shape[1:] == tuple(size):
        return planes
    return F.interpolate(planes[None], size=tuple(size), mode="bilinear", antialias=True)[0]


def embeddings(rgb: Tensor, net: Instructed) -> tuple[Tensor, Tensor]:
    """(3, H, W) -> (E, H, W) of length 1 and the mean token (D,), by tiles that share a quarter, averaged."""
    _, H, W = rgb.shape
    tile = net.settings.tile
    y, x = (torch.arange(max(n, tile)) % (2 * n) for n in (H, W))            # mirrored to a tile at least
    y, x = torch.minimum(y, 2 * H - 1 - y), torch.minimum(x, 2 * W - 1 - x)
    wide = rgb[:, y][:, :, x].to(net.mean.device)
    total, tokens = torch.zeros(net.words.width, len(y), len(x)), []
    tops, lefts = (torch.linspace(0, n - tile, 1 + math.ceil((n - tile) / (0.75 * tile))).long().tolist()
                   for n in (len(y), len(x)))
    for top, left in itertools.product(tops, lefts):
        with net.autocast():
            _, plane, token = net.maps(wide[None, :, top:top + tile, left:left + tile])
        total[:, top:top + tile, left:left + tile] += plane[0].cpu()
        tokens.append(token[0].cpu())
    return F.normalize(total[:, :H, :W], dim=0), torch.stack(tokens).mean(0)


def pooled(plane: Tensor, labels: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """(B, E, H, W), (B, H, W) of 0..n-1 -> mean embedding of each, of length 1, (B, n, E), and px (B, n)."""
    B, E = plane.shape[:2]
    index = (labels + n * torch.arange(B, device=labels.device)[:, None, None]).flatten()    # (B H W,)
    sums = plane.new_zeros(B * n, E).index_add_(0, index, plane.permute(0, 2, 3, 1).reshape(-1, E))
    area = torch.bincount(index, minlength=B * n)
    return F.normalize(sums, dim=-1).view(B, n, E), area.view(B, n)


# ------------------------------------------------------------------------------------------- answering

class Reply(NamedTuple):
    status: str                         # answer or question
    sentence: str
    task: str
    targets: tuple[str, ...]
    unknown: str | None                 # what it asks for that the network was not trained on, where it knows a name
    kind: str                           # known, or why a question: see KINDS; image; tissue
    confidence: float                   # that it can be followed, 0 to 1
    labels: np.ndarray                  # (H, W) int32: answered cells, ids as in the view; or areas 1..n
    found: Found | None                 # None: a question
    tissue: str                         # like or unlike the training tissue; "" where nobody can say


class Reading(NamedTuple):
    """One instruction in words."""
    task: str                           # "" for nonsense
    targets: tuple[str, ...]            # trained concepts, as many as the task needs; of a question those it names
    kind: str                           # the likeliest reason not to follow it, or known
    unknown: str | None                 # what it asks for instead, where the network knows a name
    tissue: str                         # that it speaks of, or ""
    confidence: float


def interpret(said: Understood, words: Words) -> list[Reading]:
    """T readings: heads as probabilities, an instruction followed only above words.known."""
    readings = []
    heads = said.task.softmax(1), said.kind.softmax(1), said.names.sigmoid(), said.tissue.softmax(1)
    trained = torch.tensor([name in words.trained for name in words.names])
    for task, kind, names, tissue in zip(*heads):
        mine = names * trained                                               # (K,)
        order = mine.argsort(descending=True).tolist()
        job, named = TASKS[int(task.argmax())], min(2, int((mine > 0.5).sum()))
        confidence = float(kind[0] * mine.max())               # which task is often open, and no reason to ask back
        if confidence >= words.known:
            reason, unknown, wanted = "known", None, 2 if job == "compare" else max(1, named)
        else:
            reason, other = KINDS[1 + int(kind[1:].argmax())], int((names * ~trained).argmax())
            unknown = words.names[other] if names[other] > 0.5 and not trained[other] else None
            job, wanted = ("", 0) if reason == "nonsense" else (job, named)
        targets = tuple(words.names[i] for i in order[:wanted])
        region = TISSUES[int(tissue.argmax()) - 1] if tissue.argmax() and tissue.max() > 0.5 else ""
        readings.append(Reading(job, targets, reason, unknown, region, confidence))
    return readings


@torch.inference_mode()
def respond(view: View, text: str, net: Instructed, encoder) -> Reply:
    """The answer to one instruction about a region."""
    said = net.read(encoder([text]))
    return reply(view, text, said.vectors[0], interpret(said, net.words)[0], net)


@torch.inference_mode()
def reply(view: View, text: str, vector: Tensor, reading: Reading, net: Instructed) -> Reply:
    """The guardrails in order - the image, the text, the tissue - and then the answer."""
    words, empty = net.words, np.zeros_like(view.labels)
    tissue = "" if math.isinf(words.tissue) else "like" if view.strange <= words.tissue else "unlike"
    home = ", ".join(words.tissues)
    looks = f"this region looks {tissue} my training tissue ({home})" if tissue and home else ""

    def question(kind: str, sentence: str) -> Reply:
        return Reply("question", sentence, reading.task, reading.targets, reading.unknown, kind, reading.confidence,
                     empty, None, tissue)

    if view.stain < words.stain:
        return question("image", f"This does not look like an H&E section: I see {view.what}. "
                                 "I was trained on H&E alone; is there an H&E image of this region?")
    if reading.kind != "known":
        said = instructions.refusal(reading.kind, text, reading.unknown, words.trained)
        organ = instructions.UNTRAINED["train"].get(reading.unknown or "", "")
        if organ and organ not in words.tissues and looks:
            said += f" ({reading.unknown.capitalize()} belong to {organ}; {looks}.)"
        return question(reading.kind, f"{said} {seen(view, net)}")
    own = reading.tissue in words.tissues
    if reading.tissue and words.tissues and (tissue == "unlike" or not own):
        doubt = f"but {looks or 'I was trained on ' + home}"
        if tissue == "unlike" and not own:                                   # which may well be: nobody here can say
            doubt = f"and {looks}, so that I cannot tell whether it is {reading.tissue}"
        return question("tissue", f"You speak of {reading.tissue}, {doubt}. {seen(view, net)} Shall I look for "
                                  f"{instructions.plural(reading.targets[0])} all the same?")
    found, labels = gather(view, vector, reading, net)
    sentence = instructions.sentence(found)
    if tissue == "unlike":
        sentence += f" Take this with care: {looks}."
    return Reply("answer", sentence, reading.task, reading.targets, None, "known", reading.confidence, labels,
                 found, tissue)


@torch.inference_mode()
def chosen(view: View, vectors: Tensor, words: Words, net: Instructed) -> np.ndarray:
    """(T, n) bool: the cells that belong to texts (T, E). None, unless one of them is sure enough."""
    p = net.similarity(vectors, view.cells).sigmoid().numpy()                # (T, n)
    sure = p.max(axis=1, initial=0) >= words.present
    return (p >= words.belongs) & sure[:, None]


@torch.inference_mode()
def areas(view: View, vector: Tensor, net: Instructed) -> np.ndarray:
    """(H, W) int32: the areas, 1..n, whose pixels belong to the text."""
    from skimage.measure import label
    p = net.similarity(vector[None], view.plane.flatten(1).T)[0].sigmoid()
    return label((p >= net.words.pixel).view(view.labels.shape).numpy(), connectivity=1).astype(np.int32)


@torch.inference_mode()
def gather(view: View, vector: Tensor, reading: Reading, net: Instructed) -> tuple[Found, np.ndarray]:
    """The cells or areas that belong to the text, what they amount to, and their label image."""
    words = net.words
    sides = net.prototypes[[words.trained.index(name) for name in reading.targets]]          # (1 or 2, E)
    if not set(reading.targets) & set(words.regions):
        # A comparison is about both sides, each by the mean of its wordings; else the text itself decides.
        mine = chosen(view, sides if reading.task == "compare" else vector[None], words, net).any(0)     # (n,)
        labels = view.labels * np.append(False, mine)[view.labels]
        nearest = net.similarity(sides, view.cells).numpy().argmax(0)
        counts = tuple(int((mine & (nearest == side)).sum()) for side in range(len(sides)))
    else:                                                     # areas, or areas and cells: each by itself, cells above
        labels, counts = np.zeros(view.labels.shape, np.int32), ()
        for name, side in sorted(zip(reading.targets, sides), key=lambda one: one[0] not in words.regions):
            mine = (areas(view, vector if len(sides) == 1 else side, net) if name in words.regions else
                    view.labels * np.append(False, chosen(view, side[None], words, net)[0])[view.labels])
            counts += (len(np.unique(mine[mine > 0])),)
            labels = np.where(mine > 0, mine + labels.max(), labels)
        if reading.targets[0] not in words.regions:
            counts = counts[::-1]
    area = np.bincount(labels.ravel(), minlength=2)[1:]
    ids = np.flatnonzero(area) + 1
    return Found(reading.task, reading.targets, counts, sum(counts), float(area.sum() / labels.size),
                 float(np.median(area[ids - 1])) if len(ids) else 0.0,
                 instructions.place_of(instructions.centres(labels, ids), labels.shape)), labels


@torch.inference_mode()
def seen(view: View, net: Instructed) -> str:
    """What there is, in a sentence: each cell under the trained concept that it is nearest to, if it belongs there."""
    names = [name for name in net.words.trained if name not in net.words.regions and name != "nuclei"]
    parts = []
    if names and len(view.cells):
        sides = net.prototypes[[net.words.trained.index(name) for name in names]]            # (K, E)
        nearest = net.similarity(sides, view.cells).numpy().argmax(0)                        # (n,)
        mine = chosen(view, sides, net.words, net)[nearest, np.arange(len(nearest))]
        counts = np.bincount(nearest[mine], minlength=len(names))
        parts = [instructions.amount(count, instructions.plural(name)) for name, count in zip(names, counts) if count]
    number = instructions.amount(len(view.cells), "nuclei")
    return f"I see {number} here" + (f", among them {', '.join(parts)}." if parts else ".")
