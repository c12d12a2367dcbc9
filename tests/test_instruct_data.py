"""instruct_data.py: the ontology, the grammar, layouts of annotated sets, truth of tiles.

On tissue drawn here: small dark and large pale nuclei.
"""
import collections
import http.server
import json
import math
import re
import threading

import numpy as np
import pytest
import skimage.io

import instruct_data
from instruct_data import (
    CONCEPTS,
    LEAST,
    LLM,
    LOTS,
    TASKS,
    WORDS,
    AnnotatedSet,
    Found,
    Grammar,
    TissueTile,
    amount_in_words,
    answer_in_words,
    class_membership,
    class_tile_parts,
    class_tiles,
    class_truth,
    crop_class_tile,
    refusal_in_words,
    rewrite_instruction,
    split_class_tile,
    words_of_place,
    write_class_tile,
)

KINDS = {"inflammatory": (5, (70, 35, 115)),                   # radius px, colour
         "malignant epithelial": (9, (150, 100, 175))}


def tissue(seed: int, kinds=tuple(KINDS), size: int = 192, count: int = 40) -> TissueTile:
    """A pink background with discs; they do not touch."""
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
    return TissueTile(f"tissue_{seed}", pixels.clip(0, 255).astype(np.uint8), labels, classes, "")


# ---------------------------------------------------------------------------------------- ontology

def test_a_class_counts_for_its_ancestors_and_says_nothing_of_finer_ones():
    classes = ["fibroblast", "connective", "inflammatory", "nuclei", "other"]
    assert class_membership(classes, ["connective"]).tolist() == [1, 1, -1, 0, -1]
    assert class_membership(classes, ["fibroblast"]).tolist() == [1, 0, -1, 0, -1]
    assert class_membership(classes, ["nuclei"]).tolist() == [1] * 5
    assert class_membership(classes, ["connective"], exclude=True).tolist() == [-1, -1, 1, 0, 1]
    assert class_membership(classes, ["fibroblast", "inflammatory"]).tolist() == [1, 0, 1, 0, -1]


def test_every_parent_exists_and_every_class_of_a_source_is_known():
    concepts = CONCEPTS
    assert {c.parent for c in concepts.values()} - {None} <= concepts.keys()
    assert [name for name, c in concepts.items() if c.parent is None] == ["nuclei"]
    assert all(name in concepts for table in WORDS.classes.values() for name in table.values())
    assert all(c.keys() <= {"words", "held-out", "parent"} for c in WORDS.concepts.values())


def test_lots_share_no_template_and_held_out_words_are_not_trained():
    assert WORDS.templates.keys() == set(TASKS)
    for lots in (*WORDS.templates.values(), WORDS.untrained, WORDS.invisible, WORDS.chatter):
        assert tuple(lots) == LOTS
    for lots in WORDS.templates.values():
        assert len(set().union(*lots.values())) == sum(map(len, lots.values()))
    words = [set(c.words) | set(c.held_out) for c in CONCEPTS.values()]
    assert sum(map(len, words)) == len(set().union(*words))               # no word means two things
    for table in (WORDS.untrained, WORDS.invisible, WORDS.chatter):
        assert len(set().union(*table.values())) == sum(map(len, table.values()))
    grammar = Grammar(["inflammatory"], seed=1, typos=0)
    texts = [grammar.ask("train", "count", ["inflammatory"]).text.lower() for _ in range(300)]
    assert not [t for t in texts if any(h in t for h in CONCEPTS["inflammatory"].held_out)]
    assert len(set(texts)) > 100


def test_grammar_repeats_itself_and_typos_change_words():
    plain, rough = (Grammar(["epithelial"], 3, typos) for typos in (0, 1))
    again = Grammar(["epithelial"], 3, 0)
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
    assert answer_in_words(one) == "I count 1 inflammatory cell."
    none = one._replace(count=0, counts=(0,))
    assert answer_in_words(none) == "I see no inflammatory cells in this region."
    assert answer_in_words(one._replace(task="presence", count=3, counts=(3,),
                                              targets=("nuclei",))) == \
        "Yes, I see 3 nuclei in this region."
    two = Found("compare", ("epithelial", "connective"), (4, 9), 13, 0.1, 80.0, "")
    assert answer_in_words(two) == "There are more stromal cells (9) than epithelial cells (4)."
    assert answer_in_words(two._replace(counts=(2, 2))).startswith("Neither")
    assert refusal_in_words("untrained", "x", "mitotic figures", ["inflammatory"]).startswith(
        "I was not trained to recognise mitotic figures; I can show inflammatory cells.")


def test_place():
    assert words_of_place(np.array([[1, 1], [2, 2], [99, 99]]), (100, 100)) == "upper left"
    assert words_of_place(np.array([[50.0, 50.0]]), (100, 100)) == "centre"
    assert words_of_place(np.argwhere(np.ones((9, 9))) * 11, (100, 100)) == ""


# --------------------------------------------------------------------------------------------- llm

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
    yield LLM(url=f"http://127.0.0.1:{server.server_port}/v1/", model="stub")
    server.shutdown()
    server.server_close()


def test_llm_rewrites(stub, monkeypatch):
    monkeypatch.setenv("DINOCELL_LLM_KEY", "secret")
    Stub.said = '"Kindly mark each lymphoid cell"'
    assert rewrite_instruction("highlight the lymphocytes",
                               stub) == "Kindly mark each lymphoid cell"
    (path, key, body), = Stub.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret" and body["model"] == "stub"
    assert body["messages"][-1] == {"role": "user", "content": "highlight the lymphocytes"}
    Stub.said = "Sure! Here are some:\n1. ..."
    assert rewrite_instruction("highlight the lymphocytes", stub) == "highlight the lymphocytes"
    Stub.said = None
    with pytest.raises(ValueError, match="no chat completion"):
        rewrite_instruction("highlight the lymphocytes", stub)


def test_llm_needs_a_model_and_a_web_address():
    with pytest.raises(ValueError, match="expected http"):
        LLM(url="file:///etc/passwd", model="m")
    with pytest.raises(ValueError, match="name of a model"):
        LLM(url="http://localhost/v1")


@pytest.mark.parametrize("count, name, words", [
    (1, "cell nuclei", "1 cell nucleus"), (1, "glomeruli", "1 glomerulus"),
    (2, "glomeruli", "2 glomeruli"), (1, "necrosis", "1 area of necrosis"),
    (3, "necrosis", "3 areas of necrosis"), (0, "plasma cells", "no plasma cells"),
    (1, "plasma cells", "1 plasma cell")])
def test_amounts_in_words(count, name, words):
    assert amount_in_words(count, name) == words


def test_untrained_beside_trained():
    grammar = Grammar(("nuclei", "inflammatory"), 0, typos=0)
    drawn = [grammar.ask_in_vain("held-out", "untrained") for _ in range(200)]
    both = [said for said in drawn if len(said.targets) == 2]
    assert 30 < len(both) < 90 and {said.task for said in both} == set(TASKS) - {"exclude"}
    for said in both:
        unknown, known = said.targets
        assert unknown not in grammar.trained and known in grammar.trained
        assert unknown.lower() in said.text.lower()


# -------------------------------------------------------------------------------------- converters

def test_pannuke(tmp_path):
    """The published layout: instances of five classes in channels, each numbered for itself."""
    masks = np.zeros((2, 16, 16, 6))
    masks[0, 1:4, 1:4, 1], masks[0, 8:12, 8:12, 1], masks[0, 5:8, 1:4, 4] = 3, 7, 3
    masks[0, 3, 1:9, 0] = 2                                 # the first channel keeps what is on top
    for kind, content in (("images", np.full((2, 16, 16, 3), 200.4)), ("masks", masks)):
        folder = tmp_path / "fold1" / kind / "fold1"
        folder.mkdir(parents=True)
        np.save(folder / f"{kind}.npy", content)
    np.save(tmp_path / "fold1" / "images" / "fold1" / "types.npy", np.array(["Breast", "Colon"]))
    first, second = class_tiles(AnnotatedSet(str(tmp_path), "pannuke"))
    names = {i: name for i, name in first.classes.items()}
    assert collections.Counter(names.values()) == {"inflammatory": 2, "healthy epithelial": 1,
                                                   "malignant epithelial": 1}
    assert names[first.labels[9, 9]] == "inflammatory"
    assert names[first.labels[6, 2]] == "healthy epithelial"
    assert names[first.labels[3, 2]] == "malignant epithelial" and first.labels[0, 0] == 0
    assert first.tissue == "breast" and second.tissue == "colon"
    assert not second.labels.any() and not second.classes
    assert first.pixels.shape == (3, 16, 16) and (first.pixels == 200).all()
    assert first.name != second.name


def test_lizard(tmp_path):
    import scipy.io
    labels = np.zeros((12, 20), np.int32)
    labels[1:4, 1:4], labels[6:9, 10:15] = 5, 2
    (tmp_path / "Labels").mkdir()
    (tmp_path / "Images").mkdir()
    content = {"inst_map": labels, "id": np.array([[2], [5]]), "class": np.array([[3], [6]]),
               "bbox": np.zeros((2, 4))}
    scipy.io.savemat(tmp_path / "Labels" / "dpath_1.mat", content)
    skimage.io.imsave(tmp_path / "Images" / "dpath_1.png", np.full((12, 20, 3), 90, np.uint8),
                      check_contrast=False)
    tile, = class_tiles(AnnotatedSet(str(tmp_path), "lizard", tissue="colon"))
    assert tile.classes == {2: "lymphocyte", 5: "connective"}
    assert (tile.labels == labels).all() and tile.tissue == "colon"
    (tmp_path / "Images" / "dpath_1.png").unlink()
    with pytest.raises(FileNotFoundError, match="dpath_1.png"):
        list(class_tiles(AnnotatedSet(str(tmp_path), "lizard")))


def test_consep_layout_takes_the_class_of_most_pixels(tmp_path):
    labels, types = np.zeros((8, 8), np.uint16), np.zeros((8, 8), np.uint8)
    labels[:3, :3], labels[5:, 5:] = 4, 9
    types[:3, :3], types[5:, 5:], types[0, 0] = 2, 5, 3
    images = {"a": np.zeros((8, 8, 3), np.uint8), "a_nuclei": labels, "a_types": types}
    for name, content in images.items():
        skimage.io.imsave(tmp_path / f"{name}.png", content, check_contrast=False)
    tile, = class_tiles(AnnotatedSet(str(tmp_path), "consep"))
    assert tile.classes == {4: "inflammatory", 9: "fibroblast"}


def test_real_consep(shared):
    folder = str(shared / "data" / "he_consep" / "train")
    tiles = list(class_tiles(AnnotatedSet(folder, "consep", limit=2)))
    assert len(tiles) == 2 and collections.Counter(tiles[0].classes.values()) == {
        "other": 9, "inflammatory": 94, "malignant epithelial": 289, "fibroblast": 449}


def test_a_tissue_that_was_withdrawn_is_forgotten(tmp_path):
    for tissue_ in ("colon", ""):
        write_class_tile(tmp_path / "train", tissue(1, size=64, count=9)._replace(tissue=tissue_))
        tile, = instruct_data.read_class_tiles(tmp_path, "train")
        assert tile.tissue == tissue_


def test_own_labels_round_trip_and_mistakes(tmp_path):
    tile = tissue(1, size=64, count=9)
    write_class_tile(tmp_path, tile)
    source = AnnotatedSet(str(tmp_path))
    back, = class_tiles(source)
    assert (back.pixels == tile.pixels).all() and (back.labels == tile.labels).all()
    assert back.classes == tile.classes
    table = tmp_path / "tissue_1_classes.csv"
    table.write_text("id,class\n1,lemon\n")
    with pytest.raises(ValueError, match="class 'lemon', expected one of nuclei"):
        list(class_tiles(source))
    table.write_text("id,class\n1,inflammatory\n")
    with pytest.raises(ValueError, match="cells without a class, such as 2"):
        list(class_tiles(source))
    table.write_text("id,class\none,inflammatory\n")
    with pytest.raises(ValueError, match="whole numbers in the column id"):
        list(class_tiles(source))
    table.unlink()
    with pytest.raises(FileNotFoundError, match="every: nuclei"):
        list(class_tiles(source))
    with pytest.raises(ValueError, match="class 'lemon' is none of"):
        AnnotatedSet("x", classes={1: "lemon"})
    with pytest.raises(ValueError, match="tissue 'spleen' is none of colon, liver"):
        AnnotatedSet("x", tissue="spleen")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        list(class_tiles(AnnotatedSet(str(tmp_path / "nowhere"))))


def test_truth_of_a_cut_tile():
    tile = tissue(2)
    part = crop_class_tile(tile, np.s_[:96, :96])
    assert set(part.classes) == set(np.unique(part.labels)) - {0}
    assert np.bincount(part.labels.ravel())[list(part.classes)].min() >= LEAST
    found, labels = class_truth(part, "count", ("inflammatory",))
    assert found.count == sum(name == "inflammatory" for name in part.classes.values()) > 0
    rest, others = class_truth(part, "exclude", ("inflammatory",))
    assert rest.count + found.count == len(part.classes) and not ((labels > 0) & (others > 0)).any()
    assert math.isclose(found.area + rest.area, (part.labels > 0).mean())
    assert class_truth(part._replace(classes={i: "inflammatory" for i in part.classes}), "count",
                                    ("plasma",)) is None


def test_a_table_may_name_cells_without_pixels(tmp_path):
    """They would shift the classes of all cells after them."""
    tile = tissue(33)
    covered = sorted(tile.classes)[2]
    tile.labels[tile.labels == covered] = 0
    write_class_tile(tmp_path, tile)
    read, = class_tiles(AnnotatedSet(str(tmp_path)))
    assert covered not in read.classes and read.classes.keys() == set(np.unique(read.labels)) - {0}
    assert all(read.classes[i] == tile.classes[i] for i in read.classes)


def test_parts_fill_a_tile_and_large_images_are_divided_by_rows(monkeypatch):
    monkeypatch.setattr(instruct_data, "PART", 64)
    tile = tissue(5, size=200)
    seen = np.zeros(tile.labels.shape, int)
    for part, (y0, x0, y1, x1) in class_tile_parts(tile):
        seen[y0:y1, x0:x1] += 1
        assert part.labels.shape == (y1 - y0, x1 - x0) and abs(y1 - y0 - 64) < 16
    assert (seen == 1).all()
    (first, upper), (second, lower) = split_class_tile(tile, "train", 0)
    assert (first, second) == ("train", "validation") and len(lower.labels) == 40
    assert (np.concatenate((upper.labels, lower.labels)) == tile.labels).all()
    assert set(upper.classes) | set(lower.classes) == set(tile.classes)
    small = [next(split_class_tile(tissue(seed, size=32, count=0), "train", 0))[0]
             for seed in range(100)]
    assert 8 < small.count("validation") < 35 and set(small) == {"train", "validation"}
    assert [split for split, _ in split_class_tile(tile, "test", 0)] == ["test"]
