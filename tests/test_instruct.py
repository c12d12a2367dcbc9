"""Instructed segmentation: the ontology and its truths, converters, guardrails, and all verbs end to end.

Drawn tissue (small dark and large pale nuclei on pink) and a bag-of-words encoder stand in for H&E and
MiniLM, so that next to nothing here needs data or weights from elsewhere.
"""
import collections
import dataclasses
import http.server
import json
import math
import re
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.io
import torch

import answer
import calibration
import data
import examine
import histology
import instruct
import instructions
import language
import lessons
import model
from histology import Source, Tile
from instructions import Found

KINDS = {"inflammatory": (5, (70, 35, 115)), "malignant epithelial": (9,
                                                                      (150, 100,
                                                                       175))}     # radius px, colour


class Bag:
    """Sentences -> sums of one fixed vector per word: what a text side can learn from, in no time."""
    dim = 48

    def __call__(self, sentences):
        rows = []
        for sentence in sentences:
            row = np.zeros(self.dim)
            for word in re.findall(r"\w+", sentence.lower()):
                row += np.random.default_rng(zlib.crc32(word.encode())).normal(size=self.dim)
            rows.append(row / max(np.linalg.norm(row), 1e-9))
        return torch.tensor(np.array(rows), dtype=torch.float32).reshape(-1, self.dim)


def tissue(seed: int, kinds=tuple(KINDS), size: int = 192, count: int = 40) -> Tile:
    """Pink ground with discs; they do not touch."""
    rng = np.random.default_rng(seed)
    pixels = np.array([225, 165, 200])[:, None, None] + rng.normal(0, 6, (3, size, size))
    labels, classes = np.zeros((size, size), np.int32), {}
    y, x = np.indices((size, size))
    for _ in range(count):
        kind = kinds[rng.integers(len(kinds))]
        radius, colour = KINDS[kind]
        at = rng.integers(radius, size - radius, 2)
        away = np.hypot(y - at[0], x - at[1])
        if labels[away < radius + 2].any():
            continue
        disc = away < radius
        labels[disc] = len(classes) + 1
        classes[len(classes) + 1] = kind
        pixels[:, disc] = np.array(colour)[:, None] + rng.normal(0, 6, (3, disc.sum()))
    return Tile(f"tissue_{seed}", pixels.clip(0, 255).astype(np.uint8), labels, classes, {}, "")


# ------------------------------------------------------------------------------------------------- ontology

def test_a_class_counts_for_its_ancestors_and_says_nothing_of_finer_ones():
    classes = ["fibroblast", "connective", "inflammatory", "nuclei", "other"]
    assert instructions.membership(classes, ["connective"]).tolist() == [1, 1, -1, 0, -1]
    assert instructions.membership(classes, ["fibroblast"]).tolist() == [1, 0, -1, 0, -1]
    assert instructions.membership(classes, ["nuclei"]).tolist() == [1] * 5
    assert instructions.membership(classes, ["connective"], exclude=True).tolist() == [-1, -1, 1, 0, 1]
    assert instructions.membership(classes, ["fibroblast", "inflammatory"]).tolist() == [1, 0, 1, 0, -1]


def test_every_parent_exists_and_every_class_of_a_source_is_known():
    assert {c.parent for c in instructions.CONCEPTS.values()} - {None} <= instructions.CONCEPTS.keys()
    assert all(name in instructions.CONCEPTS for table in histology.CLASSES.values()
               for name in table.values())


def test_lots_share_no_template_and_held_out_words_are_not_trained():
    for task, lots in instructions.TEMPLATES.items():
        assert task in instructions.TASKS and len(set().union(*lots.values())) == sum(map(len, lots.values()))
    words = [set(c.words) | set(c.held) for c in instructions.CONCEPTS.values()]
    assert sum(map(len, words)) == len(set().union(*words))                  # no word means two things
    for table in (instructions.UNTRAINED, instructions.INVISIBLE, instructions.CHATTER):
        assert len(set().union(*table.values())) == sum(map(len, table.values()))
    grammar = instructions.Grammar(["inflammatory"], seed=1, typos=0)
    texts = [grammar.ask("train", "count", ["inflammatory"]).text.lower() for _ in range(300)]
    assert not [t for t in texts if any(h in t for h in instructions.CONCEPTS["inflammatory"].held)]
    assert len(set(texts)) > 100


def test_grammar_repeats_itself_and_typos_change_words():
    plain, rough = (instructions.Grammar(["epithelial"], 3, typos) for typos in (0, 1))
    again = instructions.Grammar(["epithelial"], 3, 0)
    first = [plain.ask("train", "exclude", ["epithelial"], "liver") for _ in range(50)]
    assert first == [again.ask("train", "exclude", ["epithelial"], "liver") for _ in range(50)]
    assert all("liver" in i.text.lower() and i.targets == ("epithelial",) for i in first)
    known = set(re.findall(r"\w+", " ".join(i.text.lower() for i in first)))
    typed = set(re.findall(r"\w+", " ".join(rough.ask("train", "exclude", ["epithelial"],
                                                      "liver").text.lower()
                                           for _ in range(50))))
    assert len(typed - known) > 10


def test_sentences():
    one = Found("count", ("inflammatory",), (1,), 1, 0.01, 80.0, "")
    assert instructions.sentence(one) == "I count 1 inflammatory cell."
    assert instructions.sentence(one._replace(count=0,
                                              counts=(0,))) == "I see no inflammatory cells in this region."
    assert instructions.sentence(one._replace(task="presence", count=3, counts=(3,),
                                              targets=("nuclei",))) == \
        "Yes, I see 3 nuclei in this region."
    two = Found("compare", ("epithelial", "connective"), (4, 9), 13, 0.1, 80.0, "")
    assert instructions.sentence(two) == "There are more stromal cells (9) than epithelial cells (4)."
    assert instructions.sentence(two._replace(counts=(2, 2))).startswith("Neither")
    assert instructions.refusal("untrained", "x", "mitotic figures", ["inflammatory"]).startswith(
        "I was not trained to recognise mitotic figures; I can show inflammatory cells.")


def test_place():
    assert instructions.place_of(np.array([[1, 1], [2, 2], [99, 99]]), (100, 100)) == "upper left"
    assert instructions.place_of(np.array([[50.0, 50.0]]), (100, 100)) == "centre"
    assert instructions.place_of(np.argwhere(np.ones((9, 9))) * 11, (100, 100)) == ""


# ------------------------------------------------------------------------------------------------ converters

def test_pannuke(tmp_path):
    """The published layout: instances of five classes in channels, each numbered for itself, and tissues."""
    masks = np.zeros((2, 16, 16, 6))
    masks[0, 1:4, 1:4, 1], masks[0, 8:12, 8:12, 1], masks[0, 5:8, 1:4, 4] = 3, 7, 3
    masks[0, 3, 1:9,
          0] = 2                                                  # on top of both: the first channel keeps it
    for kind, content in (("images", np.full((2, 16, 16, 3), 200.4)), ("masks", masks)):
        folder = tmp_path / "fold1" / kind / "fold1"
        folder.mkdir(parents=True)
        np.save(folder / f"{kind}.npy", content)
    np.save(tmp_path / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast", "Colon"]))
    first, second = histology.source_tiles(Source(str(tmp_path), "pannuke"))
    names = {i: name for i, name in first.classes.items()}
    assert collections.Counter(names.values()) == {"inflammatory": 2, "healthy epithelial": 1,
                                                   "malignant epithelial": 1}
    assert names[first.labels[9, 9]] == "inflammatory" and names[first.labels[6, 2]] == "healthy epithelial"
    assert names[first.labels[3, 2]] == "malignant epithelial" and first.labels[0, 0] == 0
    assert first.tissue == "breast" and second.tissue == "colon"
    assert not second.labels.any() and not second.classes
    assert first.pixels.shape == (3, 16, 16) and (first.pixels == 200).all() and first.name != second.name


def test_lizard(tmp_path):
    import scipy.io
    labels = np.zeros((12, 20), np.int32)
    labels[1:4, 1:4], labels[6:9, 10:15] = 5, 2
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Images").mkdir()
    scipy.io.savemat(tmp_path / "Labels" / "dpath_1.mat", {"inst_map": labels, "id": np.array([[2], [5]]),
                                                           "class": np.array([[3], [6]]),
                                                           "bbox": np.zeros((2, 4))})
    skimage.io.imsave(tmp_path / "Images" / "dpath_1.png", np.full((12, 20, 3), 90, np.uint8),
                      check_contrast=False)
    tile, = histology.source_tiles(Source(str(tmp_path), "lizard", tissue="colon"))
    assert tile.classes == {2: "lymphocyte",
                            5: "connective"} and (tile.labels == labels).all() and tile.tissue == "colon"
    (tmp_path / "Images" / "dpath_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="dpath_1.png"):
        list(histology.source_tiles(Source(str(tmp_path), "lizard")))


def test_consep_layout_takes_the_class_of_most_pixels(tmp_path):
    labels, types = np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint8)
    labels[:3, :3], labels[5:, 5:] = 4, 9
    types[:3, :3], types[5:, 5:], types[0, 0] = 2, 5, 3
    for name, content in (("a", np.zeros((8, 8, 3), np.uint8)), ("a_nuclei", labels), ("a_types", types)):
        skimage.io.imsave(tmp_path / f"{name}.png", content, check_contrast=False)
    tile, = histology.source_tiles(Source(str(tmp_path), "consep"))
    assert tile.classes == {4: "inflammatory", 9: "fibroblast"}


def test_real_consep(shared):
    tiles = list(histology.source_tiles(Source(str(shared / "data" / "he_consep" / "train"), "consep",
                                                  limit=2)))
    counts = collections.Counter(tiles[0].classes.values())
    assert len(tiles) == 2 and counts == {"other": 9, "inflammatory": 94, "malignant epithelial": 289,
                                          "fibroblast": 449}


def test_own_labels_round_trip_with_regions_and_mistakes(tmp_path):
    tile = tissue(1, size=64, count=9)
    area = np.zeros((64, 64), bool)
    area[10:30, 5:40] = True
    histology.write_tile(tmp_path, tile._replace(regions={"necrosis": area}, tissue="liver"),
                            ["mucin", "necrosis"])
    source = Source(str(tmp_path), regions={"1": "mucin", "2": "necrosis"})
    back, = histology.source_tiles(source)
    assert (back.pixels == tile.pixels).all() and (back.labels == tile.labels).all()
    assert back.classes == tile.classes
    assert (back.regions["necrosis"] == area).all() and not back.regions["mucin"].any()
    table = tmp_path / "tissue_1_classes.csv"
    table.write_text("id,class\n1,lemon\n")
    with pytest.raises(ValueError, match="class 'lemon', expected one of nuclei"):
        list(histology.source_tiles(source))
    table.write_text("id,class\n1,inflammatory\n")
    with pytest.raises(ValueError, match="cells without a class, such as 2"):
        list(histology.source_tiles(source))
    with pytest.raises(ValueError, match="class 'lemon' is none of"):
        Source("x", classes={1: "lemon"})
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(histology.source_tiles(Source(str(tmp_path / "nowhere"))))


def test_truth_of_a_cut_tile():
    tile = tissue(2)
    part = histology.cut(tile, (0, 0, 96, 96))
    assert set(part.classes) == set(np.unique(part.labels)) - {0}
    assert np.bincount(part.labels.ravel())[list(part.classes)].min() >= histology.LEAST
    found, labels = histology.truth(part, "count", ("inflammatory",))
    assert found.count == sum(name == "inflammatory" for name in part.classes.values()) > 0
    rest, others = histology.truth(part, "exclude", ("inflammatory",))
    assert rest.count + found.count == len(part.classes) and not ((labels > 0) & (others > 0)).any()
    assert math.isclose(found.area + rest.area, (part.labels > 0).mean())
    assert histology.truth(part._replace(classes={i: "inflammatory" for i in part.classes}), "count",
                              ("plasma",)) is None


# ------------------------------------------------------------------------------------------------------- llm

class Stub(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that answers with what `said` holds."""
    said, asked = "", []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = json.dumps({"choices": [{"message": {"content": self.said}}]}
                           if self.said is not None else {"error": "no"})
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply.encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def stub():
    server = http.server.HTTPServer(("127.0.0.1", 0), Stub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    Stub.asked = []
    yield instructions.LLM(url=f"http://127.0.0.1:{server.server_port}/v1/", model="stub")
    server.shutdown()
    server.server_close()


def test_llm_rewrites(stub, monkeypatch):
    monkeypatch.setenv("DINOCELL_LLM_KEY", "secret")
    Stub.said = '"Kindly mark each lymphoid cell"'
    assert instructions.rewrite("highlight the lymphocytes", stub) == "Kindly mark each lymphoid cell"
    (path, key, body), = Stub.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "stub"
    assert body["messages"][-1] == {"role": "user", "content": "highlight the lymphocytes"}
    Stub.said = "Sure! Here are some:\n1. ..."
    assert instructions.rewrite("highlight the lymphocytes", stub) == "highlight the lymphocytes"
    Stub.said = None
    with pytest.raises(ValueError, match="no chat completion"):
        instructions.rewrite("highlight the lymphocytes", stub)


def test_llm_needs_a_model_and_a_web_address():
    with pytest.raises(ValueError, match="expected http"):
        instructions.LLM(url="file:///etc/passwd", model="m")
    with pytest.raises(ValueError, match="name of a model"):
        instructions.LLM(url="http://localhost/v1")


# --------------------------------------------------------------------------------------------------- learning

def test_even_loss_closed_form():
    """Logits 0 cost log 2 on either side, however many stand there; unknown ones cost nothing."""
    member = torch.tensor([[1, -1, -1, -1, 0]], dtype=torch.int8)
    assert math.isclose(lessons.even_loss(torch.zeros(1, 5), member).item(), math.log(2), rel_tol=1e-6)
    sure = torch.tensor([[0.0, 30, 30, 30, 99]])                             # all negatives wrong by 30
    assert math.isclose(lessons.even_loss(sure, member).item(), (math.log(2) + 30) / 2, rel_tol=1e-5)
    empty = torch.full((1, 5), -1, dtype=torch.int8)                         # absent: only negatives count
    assert math.isclose(lessons.even_loss(torch.zeros(1, 5), empty).item(), math.log(2), rel_tol=1e-6)


def test_best_line():
    values, truth = np.array([0.1, 0.2, 0.3, 0.7, 0.9, 0.4]), np.array([0, 0, 0, 1, 1, 1], bool)
    line, score = calibration.best_line(values, truth)
    assert math.isclose(line, 0.35) and score == 1
    for kind, count in (("balanced", lambda hit, false: 0.5 * (hit / 3 + 1 - false / 3)),
                        ("F1", lambda hit, false: 2 * hit / (hit + false + 3))):
        values, truth = np.array([0.1, 0.8, 0.3, 0.7, 0.9, 0.2]), np.array([0, 0, 0, 1, 1, 1], bool)
        every = [count((truth & (values >= t)).sum(), (~truth & (values >= t)).sum())
                 for t in np.arange(0.15, 0.9, 0.1)]
        line, score = calibration.best_line(values, truth, kind)
        assert math.isclose(score, max(every)) and math.isclose(
            count((truth & (values >= line)).sum(), (~truth & (values >= line)).sum()), score)


def test_pooled_is_the_mean_of_each_label():
    generator = torch.Generator().manual_seed(0)
    plane = torch.randn(2, 5, 8, 8, generator=generator)
    labels = torch.randint(0, 4, (2, 8, 8), generator=generator)
    mean, area = answer.pooled(plane, labels, 4)
    for b in range(2):
        for i in range(4):
            direct = plane[b][:, labels[b] == i].mean(1)
            assert torch.allclose(mean[b, i], direct / direct.norm(), atol=1e-5)
            assert area[b, i] == (labels[b] == i).sum()


def test_embeddings_of_tiles_cover_any_size():
    """Whatever the tiling, every pixel has an embedding of length 1; small images are mirrored to a tile."""
    net = small_net().eval()
    for size in ((64, 64), (50, 130), (7, 9)):
        with torch.inference_mode():
            plane, tokens = answer.embeddings(torch.rand(3, *size,
                                                         generator=torch.Generator().manual_seed(1)), net)
        assert plane.shape == (net.words.width, *size) and tokens.shape == (32,)
        assert torch.allclose(plane.norm(dim=0), torch.ones(size), atol=1e-4)


def small_net(**words) -> answer.Instructed:
    torch.manual_seed(0)
    words = dict(names=("nuclei", "inflammatory", "mitotic figures"), trained=("nuclei", "inflammatory"),
                 text=Bag.dim, hidden=32,
                 width=8, tissues=("colon",)) | words
    return answer.Instructed(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8, model.Settings(tile=64),
                             answer.Words(**words))


def test_weights_round_trip(tmp_path):
    net = small_net(licence=("research only",), belongs=0.25).eval()
    answer.save(net, tmp_path / "x.pt")
    back = answer.load(tmp_path / "x.pt")
    assert back.words.belongs == 0.25 and tuple(back.words.licence) == ("research only",)
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for a, b in zip(net.maps(x), back.maps(x)):
            assert torch.allclose(a, b, atol=2e-2)                           # float16
    with pytest.raises(ValueError, match="not a file of PyTorch weights"):
        (tmp_path / "y.pt").write_bytes(b"no weights")
        answer.load(tmp_path / "y.pt")
    model.save(model.DINOCell(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8), tmp_path / "z.pt")
    with pytest.raises(ValueError, match="another kind"):
        answer.load(tmp_path / "z.pt")


def test_init_takes_a_whole_network_over(tmp_path):
    """Whatever its shape: before any training the new network finds the same cells."""
    torch.manual_seed(1)
    settings = model.Settings(tile=96, peak=0.6, depth=0.15, low=2.0)
    base = model.DINOCell(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8, settings, stem=3).eval()
    model.save(base, tmp_path / "base.pt")
    record = dict(trained=["nuclei"], regions={}, tissues=[], licence=[])
    config = instruct.Config(init=str(tmp_path / "base.pt"), crop=64)
    net = instruct.build(config, record, ["nuclei"], Bag.dim).eval()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(net(x), base(x), atol=1e-5)
    assert net.settings == dataclasses.replace(settings, tile=64, cap=config.cap)
    answer.save(net, tmp_path / "new.pt")
    assert answer.load(tmp_path / "new.pt").architecture["stem"] == 3


# ------------------------------------------------------------------------------------------------ guardrails

def test_stain_tells_he_from_what_is_none():
    he = answer.stain(tissue(3).pixels)[0]
    gray = skimage.data.camera()[None]
    brown = np.broadcast_to(np.array([150, 110, 60], np.uint8)[:, None, None], (3, 50, 50))
    others = {"gray": gray, "gray in colour": np.repeat(gray, 3, 0), "negative": 255 - tissue(3).pixels,
              "brown": brown,
              "blank": np.full((3, 60, 60), 244, np.uint8), "black": np.zeros((3, 60, 60), np.uint8),
              "photograph": skimage.data.chelsea().transpose(2, 0, 1),
              "DAPI": np.stack([np.zeros_like(gray[0]), np.zeros_like(gray[0]), gray[0]])}
    shares = {name: answer.stain(pixels)[0] for name, pixels in others.items()}
    assert he > 0.9 and max(shares.values()) < 0.5, shares
    assert answer.stain(others["blank"])[1] == "an almost empty field"
    assert answer.stain(gray)[1] == "an image of 1 channel, not in colour"
    assert answer.stain(others["gray in colour"])[1] == "a gray image"


def reading(**changes) -> answer.Reading:
    return answer.Reading("count", ("inflammatory",), "known", None, "", 0.9)._replace(**changes)


def view(**changes) -> answer.View:
    """Four cells, two of them along the first axis of the common space."""
    labels = np.zeros((40, 40), np.int32)
    for i, at in enumerate((2, 12, 22, 32), 1):
        labels[at:at + 6, 5:11] = i
    cells = torch.zeros(4, 8)
    cells[:2, 0] = cells[2:, 1] = 1
    return answer.View(tissue(4, size=40, count=0).pixels, labels, cells, None, 0.9, 1.0,
                       "")._replace(**changes)


AXIS = torch.eye(8)[0]


def test_reply_counts_by_similarity():
    net = small_net().eval()
    said = answer.reply(view(), "count the immune cells", AXIS, reading(), net)
    assert said.status == "answer" and said.sentence == "I count 2 inflammatory cells."
    assert set(np.unique(said.labels)) == {0, 1, 2}
    assert said.found.area == 72 / 1600 and instructions.boxes(said.labels) == [[5, 2, 11, 8],
                                                                                [5, 12, 11, 18]]
    none = answer.reply(view(), "count the immune cells", torch.eye(8)[5], reading(), net)
    assert none.status == "answer" and none.sentence == "I see no inflammatory cells in this region."
    assert none.found.count == 0 and not none.labels.any()


def test_presence_asks_for_one_sure_cell():
    """Cells above `belongs` are no answer while none is above `present`."""
    net = small_net(belongs=0.4, present=0.9).eval()
    net.temperature.data, net.offset.data = torch.tensor(0.0), torch.tensor(0.0)      # cosine 1 is .73
    assert not answer.chosen(view(), AXIS[None], net.words, net).any()
    net.words.present = 0.7
    assert answer.chosen(view(), AXIS[None], net.words, net).sum() == 4      # cosine 0 is .5, above .4


@pytest.mark.parametrize("seen, said, kind, words", [
    (dict(stain=0.1, what="a gray image"), {}, "image", "not look like an H&E section: I see a gray image"),
    ({}, dict(kind="untrained", unknown="mitotic figures"), "untrained",
     "not trained to recognise mitotic figures; I can show"),
    ({}, dict(kind="untrained"), "untrained", 'not trained to recognise what "the words" asks for'),
    ({}, dict(kind="invisible", unknown="mitochondria"), "invisible", "I do not know mitochondria in H&E"),
    ({}, dict(kind="nonsense"), "nonsense", 'do not understand "the words"'),
    ({}, dict(tissue="liver"), "tissue",
     "You speak of liver, but this region looks like my training tissue (colon)"),
    (dict(strange=9.0), dict(tissue="liver"), "tissue",
     "and this region looks unlike my training tissue (colon), so that I cannot tell whether it is liver."),
    (dict(strange=9.0), dict(tissue="colon"), "tissue", "You speak of colon, but this region looks unlike"),
    ({}, dict(kind="untrained", unknown="hepatocytes"), "untrained",
     "Hepatocytes belong to liver; this region looks like"),
])
def test_guardrails_ask_back_with_an_empty_mask(seen, said, kind, words):
    net = small_net(tissue=2.0).eval()
    net.prototypes[:] = torch.eye(8)[:2]
    found = answer.reply(view(**seen), "the words", AXIS, reading(**said), net)
    assert found.status == "question" and found.kind == kind
    assert words in found.sentence and "?" in found.sentence
    assert not found.labels.any() and found.found is None
    assert "there are none" not in found.sentence and " no " not in found.sentence
    if kind != "image":
        assert "I see 4 nuclei here" in found.sentence


def test_a_tissue_of_the_training_is_no_contradiction_and_strange_regions_are_named():
    net = small_net(tissue=2.0).eval()
    assert answer.reply(view(), "x", AXIS, reading(tissue="colon"), net).status == "answer"
    strange = answer.reply(view(strange=9.0), "x", AXIS, reading(), net)
    assert strange.status == "answer" and strange.tissue == "unlike" and "with care" in strange.sentence


def test_both_sides_of_a_comparison_are_counted_boxed_and_outlined():
    """Whatever the comparison's own vector is near to."""
    net = small_net().eval()
    net.prototypes[:] = torch.eye(8)[:2]
    said = answer.reply(view(), "more x or y?", torch.eye(8)[5],
                        reading(task="compare", targets=("inflammatory", "nuclei")), net)
    assert said.found.counts == (2, 2) and said.found.count == 4 and set(np.unique(said.labels)) == {0, 1, 2, 3, 4}
    assert said.sentence == "Neither: I see 2 nuclei and 2 inflammatory cells."


def test_what_is_seen_adds_up():
    """Four nuclei, two of them inflammatory, however near the others come to more than one class."""
    net = small_net(trained=("nuclei", "inflammatory", "epithelial"), names=("nuclei", "inflammatory", "epithelial")).eval()
    net.prototypes[:] = torch.eye(8)[:3]
    assert answer.seen(view(), net) == "I see 4 nuclei here, among them 2 inflammatory cells."
    near = view(cells=torch.nn.functional.normalize(torch.tensor([[0, 1, 0.9] + [0] * 5] * 4, dtype=torch.float32)))
    net.words.belongs = net.words.present = 0.01
    assert answer.seen(near, net) == "I see 4 nuclei here, among them 4 inflammatory cells."
    assert answer.seen(view(cells=torch.zeros(0, 8)), net) == "I see no nuclei here."


def test_more_than_three_channels_are_a_question():
    net = small_net().eval()
    stack = np.random.default_rng(0).integers(0, 60000, (5, 64, 64)).astype(np.uint16)
    seen = answer.look(stack, net)
    said = answer.reply(seen, "count the nuclei", AXIS, reading(), net)
    assert said.status == "question" and "I see an image of 5 channels" in said.sentence


def test_confidence_below_the_line_is_never_followed():
    """Heads that say known but are unsure of the rest: interpret() names the next best reason."""
    net = small_net(known=0.5)
    sure = torch.full((1, 7), -9.0).index_fill_(1, torch.tensor([1]), 9.0)
    names = torch.tensor([[-9.0, 9.0, -9.0]])
    none = torch.tensor([[9.0] + [0.0] * len(instructions.TISSUES)])

    def read(kind, names=names):
        return answer.interpret(answer.Understood(AXIS[None], sure, torch.tensor([kind]), names, none),
                                net.words)[0]
    assert read([9.0, 0, 0, 0]).kind == "known" and read([9.0, 0, 0, 0]).targets == ("inflammatory",)
    assert read([0.2, 0, 0.1, 0]).kind == "invisible"
    assert read([0.0, 9.0, 0, 0]).kind == "untrained"
    unnamed = read([9.0, 0, 0, 1.0], torch.tensor([[-9.0, -9.0, 9.0]]))
    assert unnamed.kind != "known" and unnamed.unknown == "mitotic figures" and unnamed.targets == ()
    both = read([0.0, 9.0, 0, 0], torch.tensor([[-9.0, 9.0, 9.0]]))
    assert (both.kind, both.targets, both.unknown) == ("untrained", ("inflammatory",), "mitotic figures")
    hello = read([0.0, 0, 0, 9.0], torch.full((1, 3), -9.0))
    assert (hello.kind, hello.task, hello.targets, hello.unknown) == ("nonsense", "", (), None)


# ------------------------------------------------------------------------------------------------- end to end

TOY = ["network.dim=32", "network.depth=4", "network.heads=1", "network.registers=2", "network.widths=16,8,8",
       "network.last=8",
       "network.hidden=48", "network.width=8", "crop=64", "batch=4", "steps=30", "text_steps=20", "warmup=2",
       "tile=64", "pairs=12", "least=10",
       "texts=16", "log_every=10", "save_every=20", "lr=3e-3", "device=cpu", "ema=0.9"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Made, trained (with a stop in between) and evaluated once; returns (folder, run(verb, *arguments))."""
    folder = tmp_path_factory.mktemp("toy")
    for split, seeds in (("train", (10, 11, 12)), ("test", (13,))):
        for seed in seeds:
            histology.write_tile(folder / "source" / split, tissue(seed), [])
    lines = "".join(f"- {{path: {folder}/source/{s}, split: {s}, tissue: colon, licence: none}}\n"
                    for s in ("train", "test"))
    (folder / "toy.yaml").write_text(f"experiment: toy\ndata: {folder}/set\noutput_base_dir: {folder}\n"
                                     f"sources:\n{lines}")

    def run(verb: str, *arguments: str) -> int:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(language, "load", lambda folder=None: Bag())
            with pytest.raises(SystemExit) as stop:
                config = [str(folder / "toy.yaml"), *TOY] if verb != "ask" else []
                instruct.start([verb, *config, *arguments])
        return stop.value.code
    assert run("make") == 0
    assert run("train") == 0
    return folder, run


def test_make_writes_whole_pairs(toy):
    folder, _ = toy
    record = json.loads((folder / "set" / "set.json").read_text())
    assert record["trained"] == ["nuclei", "inflammatory", "epithelial", "malignant epithelial"]
    texts = {}
    for split, lot in (("train", "train"), ("validation", "calibration"), ("test", "held-out")):
        lines = histology.pairs_of(folder / "set", split)
        tiles = {tile.name: tile for tile in histology.tiles_of(folder / "set", split)}
        assert lines and {line["wording"] for line in lines} == {lot}
        texts[split] = {line["instruction"] for line in lines}
        known = [line for line in lines if line["kind"] == "known"]
        assert {line["task"] for line in known} == set(instructions.TASKS)
        assert {line["kind"] for line in lines} == set(answer.KINDS)
        for line in known:
            if line["status"] == "question":
                assert line["tissue"] and line["count"] is None and not line["ids"]
                continue
            tile = tiles[line["image"]]
            names = [tile.classes[i] for i in line["ids"]]
            belongs = instructions.membership(names, line["targets"], line["task"] == "exclude")
            assert (belongs > 0).all() and len(names) == line["count"] == len(line["boxes"])
            y0, x0, _, _ = line["box"]
            for i, (left, top, right, bottom) in zip(line["ids"], line["boxes"]):
                assert (tile.labels[y0 + top:y0 + bottom, x0 + left:x0 + right] == i).any()
        counts = collections.Counter(line["task"] for line in known)
        assert max(counts.values()) <= 3 * min(counts.values())              # balanced over tasks
    assert not texts["train"] & texts["test"]


def test_training_lowers_every_loss_and_resumes(toy):
    folder, run = toy
    log = [json.loads(line) for line in (folder / "runs" / "toy" / "log.jsonl").read_text().splitlines()]
    losses = [line for line in log if "loss" in line]
    for name in ("loss_distance", "loss_text", "loss_cells", "loss_pixels"):
        assert losses[-1][name] < losses[0][name], name
    net = answer.load(folder / "final_models" / "toy.pt")
    assert net.words.licence == ("none",) or list(net.words.licence) == ["none"]
    assert 0 < net.words.belongs <= net.words.present < 1 and math.isfinite(net.words.tissue)
    assert torch.allclose(net.prototypes.norm(dim=1), torch.ones(4), atol=1e-2)
    last = folder / "runs" / "toy" / "checkpoints" / "instruct" / "step_00000030.pt"
    before = torch.load(last, weights_only=True)["net"]
    last.unlink()
    assert run("train") == 0                               # from step 20 on, to the same weights
    after = torch.load(last, weights_only=True)["net"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_text_decides_which_cells_belong(toy):
    """After a longer training, on an image never seen: what a class is called is nearer to its own cells than to the others."""
    folder, run = toy
    assert run("train", "experiment=longer", "steps=150", "text_steps=600", "log_every=50", "save_every=150") == 0
    net, tile = answer.load(folder / "final_models" / "longer.pt"), tissue(13)
    seen = answer.look(tile.pixels, net, tile.labels)
    kinds = np.array([tile.classes[i] for i in sorted(tile.classes)])
    for name in ("inflammatory", "malignant epithelial"):
        wordings = net.prototypes[[net.words.trained.index(name)]]
        near = net.similarity(wordings, seen.cells)[0].detach().numpy()
        own, other = near[kinds == name], near[kinds != name]
        assert len(own) > 3 and (own[:, None] > other).mean() > 0.9, (name, own, other)


def test_fixed_head_and_evaluate(toy):
    folder, run = toy
    assert run("train", "head=fixed", "experiment=toy_fixed", "steps=20") == 0
    assert run("evaluate", f"reference={folder}/final_models/toy_fixed.pt") == 0
    result = json.loads((folder / "runs" / "toy" / "evaluate.json").read_text())
    true = sum(name == "inflammatory" for tile, _ in histology.parts_of(folder / "set", "test", 64)
               for name in tile.classes.values())
    ways = result["classes"]["inflammatory"]
    assert set(ways) == {"text", "shuffled", "fixed"} and ways["text"]["true"] == true
    assert all(0 <= ways[way]["Dice"] <= 1 for way in ways)
    assert result["rates"]["asked back: nonsense"]["of"] > 0 and result["paraphrases"]["pairs"] > 0
    assert "| inflammatory |" in (folder / "runs" / "toy" / "evaluate.md").read_text()


def test_ask_writes_its_answer(toy, tmp_path, capsys):
    folder, run = toy
    image = tmp_path / "roi.png"
    skimage.io.imsave(image, tissue(14).pixels.transpose(1, 2, 0), check_contrast=False)
    text = "count the inflammatory cells"
    net = answer.load(folder / "final_models" / "toy.pt")
    net.words.known = net.words.stain = 0.0                # so short a training is sure of nothing
    answer.save(net, tmp_path / "sure.pt")
    code = run("ask", str(image), text, f"out={tmp_path}/out", f"weights={tmp_path}/sure.pt", "device=cpu")
    said = capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "out" / "roi_answer.json").read_text())
    labels = data.read_labels(tmp_path / "out" / "roi_answer_labels.tif")
    assert code == 0 and record["status"] == "answer"
    assert record["answer"] == said and record["instruction"] == text
    assert record["understood"].keys() == {"task", "targets", "unknown", "kind", "confidence"}
    assert record["count"] == len(record["boxes"]) == len(np.unique(labels)) - 1
    assert math.isclose(record["area_fraction"], (labels > 0).mean(), abs_tol=1e-6)
    height, width, _ = skimage.io.imread(tmp_path / "out" / "roi_answer.png").shape  # small: enlarged
    assert labels.shape == (192, 192) and height == width >= 192


def test_ask_about_a_gray_image_is_a_question(toy, tmp_path, capsys):
    folder, run = toy
    image = tmp_path / "camera.png"
    skimage.io.imsave(image, skimage.data.camera()[:120, :90], check_contrast=False)
    code = run("ask", str(image), "count the nuclei", f"out={tmp_path}",
               f"weights={folder}/final_models/toy.pt", "device=cpu")
    record = json.loads((tmp_path / "camera_answer.json").read_text())
    assert code == 3 and record["status"] == "question" and record["count"] is None and record["boxes"] == []
    assert not data.read_labels(tmp_path / "camera_answer_labels.tif").any()
    assert "1 channel" in capsys.readouterr().out


def test_mistakes_are_one_line(toy, tmp_path, capsys):
    folder, run = toy
    image = tmp_path / "roi.png"
    skimage.io.imsave(image, tissue(15, size=64).pixels.transpose(1, 2, 0), check_contrast=False)
    for arguments, words in (((str(image),), "an image and an instruction"),
                             ((str(tmp_path / "no.png"), "count"), "no.png"),
                             ((str(image), "count", f"weights={tmp_path}/no.pt"), "python instruct.py train"),
                             ((str(image), "count", "wieghts=x"), "did you mean 'weights'")):
        assert run("ask", *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    assert run("make", f"data={tmp_path}/x",
               "least=100000") == 1 and "smaller least=" in capsys.readouterr().err
    assert run("train", f"data={tmp_path}/empty") == 1 and "instruct.py make" in capsys.readouterr().err
    assert run("train", "crop=60") == 1 and "multiple of the patch" in capsys.readouterr().err


def test_regions_become_areas(tmp_path):
    """A source with region labels: the concept is taught, its pairs and answers are areas."""
    for seed in (20, 21):
        tile = tissue(seed, count=25)
        area = np.zeros(tile.labels.shape, bool)
        area[:, 100:] = True
        tile.pixels[:, area] = (tile.pixels[:, area] * 0.75).astype(np.uint8)
        histology.write_tile(tmp_path / "source", tile._replace(regions={"necrosis": area}), ["necrosis"])
    config = tmp_path / "c.yaml"
    config.write_text(f"experiment: areas\ndata: {tmp_path}/set\noutput_base_dir: {tmp_path}\n"
                      f"sources: [{{path: {tmp_path}/source, regions: {{1: necrosis}}}}]\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "load", lambda folder=None: Bag())
        for verb in ("make", "train"):
            with pytest.raises(SystemExit) as stop:
                instruct.start([verb, str(config), *TOY, "steps=12"])
            assert stop.value.code == 0
    line = next(line for line in histology.pairs_of(tmp_path / "set", "train")
                if line["targets"] == ["necrosis"] and line["count"])
    assert line["area_fraction"] > 0.3 and not line["task"] == "exclude"
    net = answer.load(tmp_path / "final_models" / "areas.pt")
    assert net.words.regions == ("necrosis",) or list(net.words.regions) == ["necrosis"]
    seen = answer.look(tissue(22).pixels, net)
    said = answer.reply(seen, "show the necrosis", net.prototypes[net.words.trained.index("necrosis")],
                        answer.Reading("segment", ("necrosis",), "known", None, "", 1.0), net)
    assert said.labels.shape == (192, 192) and said.found.count == said.labels.max()
    inside = net.similarity(net.prototypes[[net.words.trained.index("necrosis")]],
                            seen.plane.flatten(1).T).sigmoid() >= net.words.pixel
    assert ((said.labels > 0) == inside.view(192, 192).numpy()).all()


def test_sources_that_share_names_and_sets_that_cannot_validate(tmp_path, capsys):
    for folder in ("a", "b"):
        for seed in (30, 31, 32):
            histology.write_tile(tmp_path / folder, tissue(seed, size=200), [])
    sources = [f"{{path: {tmp_path}/{folder}, tissue: colon}}" for folder in ("a", "b")]

    def make(folder: str, *more: str, sources=sources) -> tuple[int, str]:
        (tmp_path / "c.yaml").write_text(f"data: {tmp_path}/{folder}\nsources: [{', '.join(sources)}]\n")
        with pytest.raises(SystemExit) as stop:
            instruct.start(["make", str(tmp_path / "c.yaml"), "least=5", "tile=64", "pairs=2", *more])
        return stop.value.code, capsys.readouterr().err
    assert make("set")[0] == 0
    assert {tile.name for tile in histology.tiles_of(tmp_path / "set", "train")} == {
        f"{number}tissue_{seed}" for number in ("", "2_") for seed in (30, 31, 32)}
    code, error = make("other", "tile=150", "hold_out=0.01")               # small images go to one side whole
    assert code == 1 and "no image is left for validation" in error
    code, error = make("third", sources=[sources[0].replace("colon", "spleen")])
    assert code == 1 and "tissue 'spleen' is none of colon, liver" in error


def test_a_table_may_name_cells_without_pixels(tmp_path):
    """They would shift the classes of all cells after them."""
    tile = tissue(33)
    covered = sorted(tile.classes)[2]
    tile.labels[tile.labels == covered] = 0
    histology.write_tile(tmp_path, tile, [])
    read, = histology.source_tiles(Source(str(tmp_path)))
    assert covered not in read.classes and read.classes.keys() == set(np.unique(read.labels)) - {0}
    assert all(read.classes[i] == tile.classes[i] for i in read.classes)


def test_nuclei_without_classes_teach_distances_and_nothing_else(tmp_path):
    """A source of `every: nuclei` is asked about for nuclei alone, and is no class of the fixed head."""
    for folder, seeds in (("classed", (40, 41, 42)), ("bare", (43, 44))):
        for seed in seeds:
            histology.write_tile(tmp_path / folder, tissue(seed), [])
    for table in (tmp_path / "bare").glob("*_classes.csv"):
        table.unlink()
    text = (f"experiment: mixed\ndata: {tmp_path}/set\noutput_base_dir: {tmp_path}\nsources:\n"
            f"- {{path: {tmp_path}/classed, tissue: colon}}\n- {{path: {tmp_path}/bare, every: nuclei}}\n")
    (tmp_path / "c.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language, "load", lambda folder=None: Bag())
        for arguments in (("make",), ("train",), ("train", "head=fixed", "experiment=fixed")):
            with pytest.raises(SystemExit) as stop:
                instruct.start([arguments[0], str(tmp_path / "c.yaml"), *TOY, "steps=6", *arguments[1:]])
            assert stop.value.code == 0
    bare = [line for line in histology.pairs_of(tmp_path / "set", "train") if line["image"] in ("tissue_43", "tissue_44")]
    assert {tuple(line["targets"]) for line in bare if line["kind"] == "known"} == {("nuclei",)}
    assert "nuclei" not in answer.load(tmp_path / "final_models/fixed.pt").words.classes
    with pytest.raises(FileNotFoundError, match="every: nuclei"):
        list(histology.source_tiles(Source(str(tmp_path / "bare"))))


def test_judged_is_the_check_that_should_have_told():
    """Nonsense that only the stain check stopped was not recognised; an untrained thing beside a trained one counts apart."""
    line = dict(kind="nonsense", targets=[], status="question", task="", tissue="")
    right, counted = collections.Counter(), []
    stopped = answer.reply(view(stain=0.1, what="a gray image"), "x", AXIS, reading(kind="nonsense"), small_net().eval())
    told = answer.reply(view(), "x", AXIS, reading(kind="nonsense"), small_net().eval())
    for reply in (stopped, told):
        examine.judge(line, reply, set(), right, counted)
    assert right == {("asked back: nonsense", False): 1, ("asked back: nonsense", True): 1} and not counted
    right.clear()
    examine.judge(line | dict(kind="untrained", targets=["necrosis", "nuclei"]), told, set(), right, counted)
    assert list(right) == [("asked back: untrained beside a trained concept", True)]
    right.clear()
    known = dict(kind="known", targets=["inflammatory"], status="answer", task="presence", count=2)
    for reply in (answer.reply(view(), "x", AXIS, reading(task="presence"), small_net().eval()), told):
        examine.judge(known, reply, set(), right, counted)
    assert right["presence: yes or no", True] == right["presence: yes or no", False] == 1
    assert right["false alarm of the text check", True] == 1 and right["false alarm of the stain check", True] == 0
    assert counted == [(2, 2)]


def test_amounts_in_words():
    said = [instructions.amount(*pair) for pair in ((1, "cell nuclei"), (1, "glomeruli"), (2, "glomeruli"), (1, "necrosis"),
                                                    (3, "necrosis"), (0, "plasma cells"), (1, "plasma cells"))]
    assert said == ["1 cell nucleus", "1 glomerulus", "2 glomeruli", "1 area of necrosis", "3 areas of necrosis",
                    "no plasma cells", "1 plasma cell"]


def test_untrained_beside_trained():
    grammar = instructions.Grammar(("nuclei", "inflammatory"), 0, typos=0)
    drawn = [grammar.ask_in_vain("held-out", "untrained") for _ in range(200)]
    both = [said for said in drawn if len(said.targets) == 2]
    assert 30 < len(both) < 90 and {said.task for said in both} == set(instructions.TASKS) - {"exclude"}
    for said in both:
        unknown, known = said.targets
        assert unknown not in grammar.trained and known in grammar.trained and unknown.lower() in said.text.lower()


def test_demo_tile_may_be_asked_about():
    """What `python instruct.py` alone shows exists, and passes for H&E."""
    pixels = data.read_image(Path(instruct.__file__).parent / "demo" / "he_tile.png").pixels
    assert pixels.shape[0] == 3 and answer.stain(pixels)[0] > 0.5
