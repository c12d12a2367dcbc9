"""Instructed segmentation end to end, on drawn tissue and with a bag of words in the place of MiniLM."""
import collections
import json
import math
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import skimage.io
import torch

import answer
import data
import histology
import instruct
import instructions
import language
from histology import Source
from test_answer import Bag
from test_histology import tissue


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


def test_demo_tile_may_be_asked_about():
    """What `python instruct.py` alone shows exists, and passes for H&E."""
    pixels = data.read_image(Path(instruct.__file__).parent / "demo" / "he_tile.png").pixels
    assert pixels.shape[0] == 3 and answer.stain(pixels)[0] > 0.5
