"""instruct.py: losses, thresholds, judging; and all of it end to end, on drawn tissue.

A bag of words takes the place of MiniLM.
"""
import collections
import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.io
import torch
from conftest import ROOT
from test_instruct_data import tissue
from test_instruct_net import Bag, known_net, reading, small_net, view

import data
import instruct
import instruct_data
import instruct_net
import metrics
import model
import runs
import watershed


def base_network(**settings) -> model.DINOCell:
    torch.manual_seed(1)
    return model.DINOCell(model.ViT(32, 4, 1, 8, 2), (16, 8, 8), 8, model.Settings(**settings))


# ------------------------------------------------------------------------------ losses, thresholds

def test_even_loss_closed_form():
    """Logits 0 cost log 2 on either side, however many stand there; unknown ones cost nothing."""
    member = torch.tensor([[1, -1, -1, -1, 0]], dtype=torch.int8)
    even = instruct.instruct_member_loss(torch.zeros(1, 5), member).item()
    assert math.isclose(even, math.log(2), rel_tol=1e-6)
    sure = torch.tensor([[0.0, 30, 30, 30, 99]])                         # all negatives wrong by 30
    wrong = instruct.instruct_member_loss(sure, member).item()
    assert math.isclose(wrong, (math.log(2) + 30) / 2, rel_tol=1e-5)
    empty = torch.full((1, 5), -1, dtype=torch.int8)                  # absent: only negatives count
    absent = instruct.instruct_member_loss(torch.zeros(1, 5), empty).item()
    assert math.isclose(absent, math.log(2), rel_tol=1e-6)


def test_best_line():
    values, truth = np.array([0.1, 0.2, 0.3, 0.7, 0.9, 0.4]), np.array([0, 0, 0, 1, 1, 1], bool)
    line, score = instruct.best_instruct_threshold(values, truth)
    assert math.isclose(line, 0.35) and score == 1
    for kind, count in (("balanced", lambda hit, false: 0.5 * (hit / 3 + 1 - false / 3)),
                        ("F1", lambda hit, false: 2 * hit / (hit + false + 3))):
        values, truth = np.array([0.1, 0.8, 0.3, 0.7, 0.9, 0.2]), np.array([0, 0, 0, 1, 1, 1], bool)
        every = [count((truth & (values >= t)).sum(), (~truth & (values >= t)).sum())
                 for t in np.arange(0.15, 0.9, 0.1)]
        line, score = instruct.best_instruct_threshold(values, truth, kind)
        assert math.isclose(score, max(every)) and math.isclose(
            count((truth & (values >= line)).sum(), (~truth & (values >= line)).sum()), score)


@pytest.mark.parametrize("backbone", [model.ViT(32, 4, 1, 8, 2), model.ConvNet(32, 4)])
def test_init_takes_a_network_over(tmp_path, backbone):
    """Whatever its shape: before any training the new network finds the same cells."""
    torch.manual_seed(1)
    settings = model.Settings(tile=96, peak=0.6, depth=0.15, low=2.0, diameter=15.0, cap=5.0)
    base = model.DINOCell(backbone, (16, 8, 8), 8, settings, stem=3).eval()
    model.save(base, tmp_path / "base.pt")
    cells = {"nuclei": 3, "inflammatory": 2}
    record = dict(trained=["nuclei"], cells=cells, tissues=[], licence=[])
    config = instruct.Config(init=str(tmp_path / "base.pt"), crop=64)
    net = instruct.build_instruct_network(config, record, Bag.dim).eval()
    assert net.words.classes == ()
    x = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert torch.allclose(net(x), base(x), atol=1e-5)
    assert net.settings == dataclasses.replace(settings, tile=64)
    instruct_net.save_instructed(net, tmp_path / "new.pt")
    read = instruct_net.load_instructed(tmp_path / "new.pt")
    assert read.architecture["stem"] == 3 and type(read.backbone) is type(backbone)
    with torch.inference_mode():
        assert torch.allclose(read(x), net(x), atol=2e-2)
    fixed = instruct.build_instruct_network(dataclasses.replace(config, head="fixed"), record,
                                            Bag.dim)
    assert fixed.words.classes == ("inflammatory",)            # nuclei are what all of them are


def test_judged_is_the_check_that_should_have_told():
    """Nonsense that only the stain check stopped was not recognised; an untrained thing beside a
    trained one counts apart."""
    line = dict(kind="nonsense", targets=[], status="question", task="", tissue="")
    net = known_net()

    def exam() -> instruct.Exam:
        return instruct.Exam(net, [dict(line, instruction="x", image="a", box=[0])], Bag(), 0)

    def rates(made: instruct.Exam) -> dict:
        return {what: (rate["right"], rate["of"]) for what, rate in made.rates.items()}
    stopped = instruct_net.guardrail_reply(view(stain=0.1, looks="a gray image"), "x",
                                           reading(kind="nonsense"), net)
    told = instruct_net.guardrail_reply(view(), "x", reading(kind="nonsense"), net)
    made = exam()
    made.judge(line, stopped)
    made.judge(line, told)
    assert rates(made) == {"asked back: nonsense": (1, 2)} and not made.counted
    made = exam()
    made.judge(line | dict(kind="untrained", targets=["necrosis", "nuclei"]), told)
    assert rates(made) == {"asked back: untrained beside a trained concept": (1, 1)}
    made = exam()
    known = dict(kind="known", targets=["inflammatory"], status="answer", task="presence", count=2)
    for reply in (instruct_net.guardrail_reply(view(), "x", reading(task="presence"), net), told):
        made.judge(known, reply)
    found = rates(made)
    assert found["presence: yes or no"] == (1, 2) and made.counted == [(2, 2)]
    assert found["false alarm of the text check"] == (1, 2)
    assert found["false alarm of the stain check"] == (0, 2)


def test_scores_of_a_class_are_pooled_over_tiles():
    true = np.array([[1, 1, 2, 2], [1, 1, 2, 2]])
    pairs = (true, true), (true, true * (true == 1)), (true, true * 0), (true * 0, true)
    tables = [metrics.overlap(*pair) for pair in pairs]
    scores = instruct.instruct_class_scores(tables)
    assert scores == {"AP@0.5": 3 / 8, "Dice": 2 * 12 / (24 + 20), "true": 6, "found": 5}


# -------------------------------------------------------------------------------------- end to end

TOY = ["crop=64", "batch=4", "steps=80", "warmup=2", "pairs=12", "least=10", "texts=16",
       "log_every=20", "save_every=60", "lr=3e-3", "device=cpu"]
SMALL_GRID = {name: values[:1] for name, values in watershed.GRID.items()} | {"peak": (0.3, 0.5)}


@pytest.fixture(scope="module", autouse=True)
def small():
    """Small parts, few steps, a few settings of the watershed, and a bag of words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(instruct_data, "PART", 64)
        patch.setattr(instruct, "TEXT_STEPS", 200)
        patch.setattr(instruct, "MEMORY", 0.9)
        patch.setattr(watershed, "GRID", SMALL_GRID)
        patch.setattr(instruct_net, "load_encoder", lambda folder=None: Bag())
        yield


def start(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        instruct.start_instruct(list(arguments))
    return stop.value.code


@pytest.mark.parametrize("verb", ["make", "train", "evaluate"])
def test_a_verb_refuses_what_it_does_not_take(verb, capsys):
    assert start(verb, "x.png") == 1
    assert f"error: x.png: instruct.py {verb} takes a configuration" in capsys.readouterr().err


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """Made and trained once; returns (folder, run(verb, *arguments))."""
    folder = tmp_path_factory.mktemp("toy")
    model.save(base_network(), folder / "base.pt")
    for name, seeds in (("train", (10, 11, 12)), ("test", (13,)), ("bare", (14,))):
        for seed in seeds:
            instruct_data.write_class_tile(folder / "source" / name, tissue(seed))
    for table in (folder / "source" / "bare").glob("*_classes.csv"):
        table.unlink()
    more = "tissue: colon, licence: none"
    lines = "".join(f"- {{path: {folder}/source/{name}, split: {name}, {more}}}\n"
                    for name in ("train", "test"))
    (folder / "toy.yaml").write_text(
        f"experiment: toy\ndata: {folder}/set\noutput_base_dir: {folder}\ninit: {folder}/base.pt\n"
        f"sources:\n{lines}- {{path: {folder}/source/bare, every: nuclei}}\n")

    def run(verb: str, *arguments: str) -> int:
        return start(verb, *([str(folder / "toy.yaml"), *TOY] if verb != "ask" else []), *arguments)
    assert run("make") == 0
    assert run("train") == 0
    return folder, run


def pairs_and_tiles(folder: Path, split: str) -> tuple[list[dict], dict]:
    tiles = instruct_data.read_class_tiles(folder / "set", split)
    return instruct_data.read_pairs(folder / "set", split), {tile.name: tile for tile in tiles}


def test_make_writes_whole_pairs(toy):
    folder, _ = toy
    record = json.loads((folder / "set" / "set.json").read_text())
    assert record["trained"] == ["nuclei", "inflammatory", "epithelial", "malignant epithelial"]
    texts = {}
    for split, lot in (("train", "train"), ("validation", "calibration"), ("test", "held-out")):
        lines, tiles = pairs_and_tiles(folder, split)
        assert lines and {line["wording"] for line in lines} == {lot}
        texts[split] = {line["instruction"] for line in lines}
        known = [line for line in lines if line["kind"] == "known"]
        assert {line["task"] for line in known} == set(instruct_data.TASKS)
        assert {line["kind"] for line in lines} == set(instruct_data.KINDS)
        for line in known:
            if line["status"] == "question":
                assert line["tissue"] and line["count"] is None and not line["ids"]
                continue
            tile = tiles[line["image"]]
            names = [tile.classes[i] for i in line["ids"]]
            belongs = instruct_data.class_membership(names, line["targets"],
                                                     line["task"] == "exclude")
            assert (belongs > 0).all() and len(names) == line["count"] == len(line["boxes"])
            y0, x0, _, _ = line["box"]
            for i, (left, top, right, bottom) in zip(line["ids"], line["boxes"]):
                assert (tile.labels[y0 + top:y0 + bottom, x0 + left:x0 + right] == i).any()
        counts = collections.Counter(line["task"] for line in known if line["image"] != "tissue_14")
        assert max(counts.values()) <= 3 * min(counts.values())              # balanced over tasks
    assert not texts["train"] & texts["test"]


def test_nuclei_without_classes_are_asked_about_as_nuclei_alone(toy):
    folder, _ = toy
    lines, tiles = pairs_and_tiles(folder, "train")
    bare = [line for line in lines if line["image"] == "tissue_14" and line["kind"] == "known"]
    assert set(tiles["tissue_14"].classes.values()) == {"nuclei"}
    assert {tuple(line["targets"]) for line in bare} == {("nuclei",)}


def test_training_lowers_every_loss_and_resumes(toy):
    folder, run = toy
    log = [json.loads(line) for line in (folder / "runs/toy/log.jsonl").read_text().splitlines()]
    losses = [line for line in log if "loss" in line]
    for name in ("loss_distance", "loss_cells", "loss_pixels"):
        assert losses[-1][name] < losses[0][name], name
    net = instruct_net.load_instructed(folder / "final_models" / "toy.pt")
    assert list(net.words.licence) == ["none"] and list(net.words.tissues) == ["colon"]
    assert 0 < net.words.belongs <= net.words.present < 1 and math.isfinite(net.words.tissue)
    assert torch.allclose(net.prototypes.norm(dim=1), torch.ones(4), atol=1e-2)
    last = folder / "runs/toy/checkpoints/instruct/step_00000080.pt"
    before = torch.load(last, weights_only=True)["net"]
    last.unlink()
    assert run("train") == 0                                  # from step 60 on, to the same weights
    after = torch.load(last, weights_only=True)["net"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_does_not_go_on_with_other_images(toy, tmp_path, capsys):
    folder, run = toy
    pairs = folder / "set/pairs_train.jsonl"
    before = pairs.read_text()
    pairs.write_text("".join(before.splitlines(True)[:-1]))
    assert run("train") == 1
    assert "was begun with other images or instructions" in capsys.readouterr().err
    pairs.write_text(before)
    image = next(folder.glob("set/train/tissue_10.png"))
    before = image.read_bytes()
    skimage.io.imsave(image, 255 - skimage.io.imread(image), check_contrast=False)
    assert run("train") == 1
    image.write_bytes(before)
    assert run("train") == 0


def test_texts_are_learned_before_the_images():
    """Wordings of one class end near each other and away from those of another."""
    grammar = instruct_data.Grammar(("nuclei", "inflammatory", "epithelial"), 0)
    asked = [grammar.ask("train", "segment", (name,)) for name in 40 * grammar.trained]
    lines = [dict(said._asdict(), instruction=said.text) for said in asked]
    net = small_net(names=grammar.trained, trained=grammar.trained)
    classes = ["inflammatory", "epithelial"]
    lessons = instruct.Lessons(lines, net.words, classes, Bag(), "cpu")
    assert lessons.member[lessons.names[:, 1] > 0].unique(dim=0).tolist() == [[-1, 1, -1]]
    before = instruct.instruct_text_loss(net.eval(), lessons, torch.arange(len(lessons.lines)))
    instruct.teach_texts(net.train(), lessons, 3e-3, 0)
    after = instruct.instruct_text_loss(net.eval(), lessons, torch.arange(len(lessons.lines)))
    assert after < 0.2 * before
    vectors = net.read(lessons.vectors).vectors
    like, own = vectors @ vectors.T, lessons.names @ lessons.names.T > 0
    assert like[own].mean() > 0.7 and like[~own].mean() < 0.3


def test_the_text_decides_which_cells_belong(toy):
    """On an image never seen a class's name is nearer to its own cells than to the others."""
    folder, _ = toy
    net = instruct_net.load_instructed(folder / "final_models" / "toy.pt")
    tile = tissue(13)
    seen = instruct_net.answer_view(tile.pixels, net, tile.labels)
    kinds = np.array([tile.classes[i] for i in sorted(tile.classes)])
    for name in ("inflammatory", "malignant epithelial"):
        row = net.words.trained.index(name)
        near = net.similarity(net.prototypes, seen.cells)[row].detach().numpy()
        own, other = near[kinds == name], near[kinds != name]
        assert len(own) > 3 and (own[:, None] > other).mean() > 0.9, (name, own, other)


def test_fixed_head_and_evaluate(toy):
    folder, run = toy
    assert run("train", "head=fixed", "experiment=toy_fixed", "steps=10") == 0
    fixed = instruct_net.load_instructed(folder / "final_models" / "toy_fixed.pt")
    assert list(fixed.words.classes) == ["inflammatory", "malignant epithelial"]
    gray = folder / "gray"
    gray.mkdir()
    data.write_labels(gray / "a_labels.tif", np.eye(64, dtype=np.int32))
    skimage.io.imsave(gray / "a.png", skimage.data.camera()[:64, :64], check_contrast=False)
    assert run("evaluate", f"reference={folder}/final_models/toy_fixed.pt", f"foreign={gray}") == 0
    result = json.loads((folder / "runs" / "toy" / "evaluate.json").read_text())
    parts = [part for tile in instruct_data.read_class_tiles(folder / "set", "test")
             for part, _ in instruct_data.class_tile_parts(tile)]
    true = sum(name == "inflammatory" for part in parts for name in part.classes.values())
    ways = result["classes"]["inflammatory"]
    assert set(ways) == {"text", "except", "shuffled", "fixed"} and ways["text"]["true"] == true
    assert all(0 <= ways[way]["Dice"] <= 1 for way in ways)
    assert result["rates"]["asked back: nonsense"]["of"] > 0 and result["paraphrases"]["pairs"] > 0
    assert ways["except"]["true"] + true == sum(len(part.classes) for part in parts)
    agree = [rate for name, rate in result["rates"].items() if " are all nuclei" in name]
    assert agree and agree[0]["right"] == agree[0]["of"] > 0
    assert result["rates"][f"{gray}: no H&E"] == {"right": 1, "of": 1}
    assert "| inflammatory |" in (folder / "runs" / "toy" / "evaluate.md").read_text()


def test_ask_writes_its_answer(toy, tmp_path, capsys):
    folder, run = toy
    image = tmp_path / "roi.png"
    skimage.io.imsave(image, tissue(14).pixels.transpose(1, 2, 0), check_contrast=False)
    text = "count the inflammatory cells"
    net = instruct_net.load_instructed(folder / "final_models" / "toy.pt")
    net.words.known = net.words.stain = 0.0                # so short a training is sure of nothing
    instruct_net.save_instructed(net, tmp_path / "sure.pt")
    code = run("ask", str(image), text, f"out={tmp_path}/out", f"weights={tmp_path}/sure.pt",
               "device=cpu")
    said = capsys.readouterr().out.strip()
    record = json.loads((tmp_path / "out" / "roi_answer.json").read_text())
    labels = data.read_labels(tmp_path / "out" / "roi_answer_labels.tif")
    assert code == 0 and record["status"] == "answer"
    assert record["answer"] == said and record["instruction"] == text
    assert set(record["understood"]) == {*instruct_net.Reading._fields}
    assert record["count"] == len(record["boxes"]) == len(np.unique(labels)) - 1
    assert math.isclose(record["area_fraction"], (labels > 0).mean(), abs_tol=1e-6)
    height, width, _ = skimage.io.imread(tmp_path / "out" / "roi_answer.png").shape
    assert labels.shape == (192, 192) and height == width >= 192             # small: enlarged


def test_ask_about_a_gray_image_is_a_question(toy, tmp_path, capsys):
    folder, run = toy
    image = tmp_path / "camera.png"
    skimage.io.imsave(image, skimage.data.camera()[:120, :90], check_contrast=False)
    code = run("ask", str(image), "count the nuclei", f"out={tmp_path}", "device=cpu",
               f"weights={folder}/final_models/toy.pt")
    record = json.loads((tmp_path / "camera_answer.json").read_text())
    assert code == 3 and record["status"] == "question"
    assert record["count"] is None and record["boxes"] == []
    assert not data.read_labels(tmp_path / "camera_answer_labels.tif").any()
    assert "1 channel" in capsys.readouterr().out


def test_mistakes_are_one_line(toy, tmp_path, capsys):
    _, run = toy
    image = tmp_path / "roi.png"
    skimage.io.imsave(image, tissue(15, size=64).pixels.transpose(1, 2, 0), check_contrast=False)
    for arguments, words in (((str(image),), "an image and an instruction"),
                             ((str(tmp_path / "no.png"), "count"), "no.png"),
                             ((str(image), "count", "weights=no.pt"), "instruct.py train"),
                             ((str(image), "count", "wieghts=x"), "did you mean 'weights'")):
        assert run("ask", *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
    for verb, argument, words in (("make", "least=100000", "smaller least="),
                                  ("train", f"data={tmp_path}/empty", "instruct.py make"),
                                  ("train", "crop=60", "multiple of the patch"),
                                  ("train", "warmup=200", "fewer than steps=80")):
        more = [f"data={tmp_path}/x"] if verb == "make" else []
        assert run(verb, argument, *more) == 1 and words in capsys.readouterr().err


def test_sources_that_share_names_and_sets_that_cannot_validate(tmp_path, capsys, monkeypatch):
    for folder in ("a", "b"):
        for seed in (30, 31, 32):
            instruct_data.write_class_tile(tmp_path / folder, tissue(seed, size=200))
    sources = [f"{{path: {tmp_path}/{folder}, tissue: colon}}" for folder in ("a", "b")]

    def make(folder: str, sources=sources) -> tuple[int, str]:
        config = tmp_path / "c.yaml"
        config.write_text(f"data: {tmp_path}/{folder}\nsources: [{', '.join(sources)}]\n")
        return start("make", str(config), "least=5", "pairs=2"), capsys.readouterr().err
    assert make("set")[0] == 0
    assert {tile.name for tile in instruct_data.read_class_tiles(tmp_path / "set", "train")} == {
        f"{number}tissue_{seed}" for number in ("", "2_") for seed in (30, 31, 32)}
    code, error = make("set", sources[:1])
    assert code == 1 and "12 tiles lie there, 6 were written" in error
    monkeypatch.setattr(instruct_data, "PART", 150)            # small images go to one side whole
    monkeypatch.setattr(instruct_data, "HELD_OUT", 0.01)
    code, error = make("other")
    assert code == 1 and "no image is left for validation" in error


def test_the_configuration_that_ships_is_valid():
    config = runs.load_config(instruct.Config, ROOT / "configs" / "instruct.yaml")
    assert len(config.sources) == 3 and (ROOT / config.init).is_file()


def test_demo_tile_may_be_asked_about():
    """What `python instruct.py` alone shows exists, and passes for H&E."""
    pixels = data.read_image(ROOT / "demo" / "he_tile.png").pixels
    assert pixels.shape[0] == 3 and instruct_net.guardrail_stain_share(pixels)[0] > 0.5
