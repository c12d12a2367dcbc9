"""Configurations of experiments, end to end on tiny sets in the layouts of the published ones."""
import csv
import json
import signal
import sys

import numpy as np
import pytest
import skimage.io
import torch
import yaml
from conftest import ROOT

import data
import evaluate
import model
import runs
import synthetic
import train_seg
import watershed

sys.path.insert(0, str(ROOT / "bench"))
import draw_donors  # noqa: E402

TINY = ["network={dim: 24, depth: 4, heads: 2, registers: 1, widths: [16, 8, 8], last: 8}",
        "init=null", "compile=false", "crop=64", "batch=2", "steps=2", "warmup=1", "val_every=2",
        "device=cpu", "precision=float32", "log_every=1"]
FEW = {name: values[:1] for name, values in watershed.GRID.items()}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """One thread, one setting of the watershed, and the handlers of signals as they were."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watershed, "GRID", FEW)
        torch.set_num_threads(1)
        yield
    torch.set_num_threads(threads)
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(name, *changes):
    with pytest.raises(SystemExit) as end:
        runs.script(train_seg.__doc__, train_seg.Config, train_seg.main,
                    [str(ROOT / "configs" / f"{name}.yaml"), *TINY, *changes])
    assert end.value.code == 0


def bench(folder, name, weights, **changes):
    """The configuration with another network in its rows; returns rows of the table."""
    config = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    for row in config["models"]:
        if "weights" in row:
            row["weights"] = weights.get(row["name"], str(folder / "gone.pt"))
            row["optional"] = True
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config | changes))
    with pytest.raises(SystemExit) as end:
        evaluate.main(["bench", str(folder / f"{name}.yaml"), "device=cpu",
                       "ceiling={cap: [4], peak: [0.47], fill: [0.09]}"])
    assert end.value.code == 0
    experiment = changes.get("experiment", config["experiment"])
    with open(folder / "runs" / experiment / "metrics_all_models.tsv", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file, delimiter="\t") if row["AP@0.5"]]  # that ran


def network(path, channels=3):
    """Random weights that find something: a bright pixel is a cell."""
    torch.manual_seed(0)
    net = model.DINOCell(model.ViT(24, 4, 2, 8, 1), (16, 8, 8), 8, model.Settings(tile=64))
    path.parent.mkdir(parents=True, exist_ok=True)
    model.save(net, path)
    return str(path)


def scores(rows, name, score):
    return {row["set"]: row[score] for row in rows if row["model"] == name}


# ------------------------------------------------------------------------- published sets, in small

def runs_of(mask):
    """COCO's uncompressed RLE: run lengths down the columns, background first."""
    flat = np.concatenate([[0], mask.T.ravel().astype(int), [2]])
    edges = np.flatnonzero(np.diff(flat))
    counts = np.diff(np.concatenate([[0], edges])).tolist()
    return {"size": list(mask.shape), "counts": counts}


def livecell(root, split, lines):
    """images/livecell_SPLIT_images and annotations/LIVECell/livecell_coco_SPLIT.json, as published:
    polygons, RLE and crowd, annotations in a dictionary."""
    images, annotations = [], {}
    for number, line in enumerate(lines):
        field = synthetic.field(number, 96, 6, 24)
        name = f"{line}_Phase_C7_1_{number:02d}d04h00m_1.tif"
        folder = root / "images" / f"livecell_{split}_images"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (field.pixels[field.channels.index("Brightfield")] >> 8).astype(np.uint8)
        skimage.io.imsave(folder / name, pixels, check_contrast=False)
        images.append(dict(id=number, file_name=name, height=96, width=96))
        for cell in range(1, field.labels.max() + 1):
            ys, xs = np.nonzero(field.labels == cell)
            entry = dict(id=len(annotations), image_id=number, category_id=1, iscrowd=cell % 2)
            if cell % 2:
                entry["segmentation"] = runs_of(field.labels == cell)
            else:
                box = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
                entry["segmentation"] = [[int(box[i]) for i in (0, 1, 2, 1, 2, 3, 0, 3)]]
            annotations[str(len(annotations))] = entry
    path = root / "annotations" / "LIVECell" / f"livecell_coco_{split}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(images=images, annotations=annotations)))
    return len(annotations)


def cellpose(folder, count):
    """NNN_img.png and NNN_masks.png, as Cellpose's sets have them."""
    folder.mkdir(parents=True)
    for number in range(count):
        field = synthetic.field(50 + number, 96, 6, 24)
        shown = np.stack([field.pixels[field.channels.index(name)] >> 8
                          for name in ("RNA", "AGP", "DNA")], -1).astype(np.uint8)
        skimage.io.imsave(folder / f"{number:03d}_img.png", shown, check_contrast=False)
        skimage.io.imsave(folder / f"{number:03d}_masks.png", field.labels.astype(np.uint16),
                          check_contrast=False)


def test_samcells_training_sets_are_read_as_published(here):
    """LIVECell with crowd and RLE, and Cellpose's cyto: one configuration trains on both."""
    name = "seg_s8_a100"
    shared, *others = (runs.load_config(train_seg.Config, ROOT / "configs" / f"{each}.yaml")
                       for each in (name, "seg_s8_a100_uncapped", "seg_s8_a40"))
    assert all(other.data == shared.data for other in others)
    livecell(here / "dat/LIVECell_dataset_2021", "train", ["A172", "BV2", "MCF7"])
    cellpose(here / "dat/cellpose_cyto/train", 3)
    train(name, "data.share=0.3")
    story = model.load(here / f"final_models/{name}.pt").settings.provenance
    trained = story["images"]["train"]
    assert sum("livecell" in image for image in trained) >= 1
    assert sum("cyto" in image for image in trained) >= 1
    log, = (here / "runs" / name / "logs").glob("*.log")           # also where there is no Slurm
    assert "torch" in log.read_text() and "loss" in log.read_text()


def test_livecells_and_pbls_tables_are_filled_by_one_command(here):
    """A row of scores for each set, and for each cell line, from files as published."""
    weights = {"dinocell_tiny": network(here / "final_models/dinocell_tiny.pt")}
    root = here / "dat/LIVECell_dataset_2021"
    cells = livecell(root, "test", ["A172", "BV2", "SkBr3"])
    rows = bench(here, "livecell", weights, root=str(root))
    assert {row["model"] for row in rows} == {"ceiling", "dinocell_tiny"}
    assert scores(rows, "dinocell_tiny", "n_true") == {"livecell_test": str(cells)}
    with open(here / "runs/livecell/groups.tsv", encoding="utf-8") as file:
        groups = {row["group"] for row in csv.DictReader(file, delimiter="\t")}
    assert groups == {"A172", "BV2", "SkBr3"}
    drawn = [synthetic.field(seed, 96, 6, 24) for seed in (70, 71)]
    for name in ("PBL-HEK", "PBL-N2a"):
        (here / "dat" / name).mkdir()
        np.save(here / "dat" / name / "imgs.npy", np.stack([f.pixels[0] for f in drawn]))
        np.save(here / "dat" / name / "anns.npy", np.stack([f.labels for f in drawn]))
    rows = bench(here, "pbl", weights, root=str(here / "dat"))
    assert set(scores(rows, "dinocell_tiny", "OP_CSB")) == {"pbl_hek", "pbl_n2a"}
    assert all(float(value) == 1 for value in scores(rows, "ceiling", "DET").values())


# ----------------------------------------------------------------------------- immunofluorescence

@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """dat/if and the folders of one marker and of the marker alone, as the recipes say."""
    folder = tmp_path_factory.mktemp("recipes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        draw_donors.main(draw_donors.Config("dat/drawn", donors=5, tiles=1, size=96, cells=6), [])
        configure = data.Config
        data.split(configure(by="donor", fractions=(0.6, 0.2, 0.2), out="dat/if"), "dat/drawn")
        for part in ("train", "validation"):
            data.convert(configure(match="AT8"), f"dat/if/{part}", f"dat/if_AT8/{part}")
            data.convert(configure(channels=("marker",)), f"dat/if/{part}",
                         f"dat/if_marker_only/{part}")
    return folder


@pytest.fixture
def donors(recipes, monkeypatch):
    monkeypatch.chdir(recipes)
    return recipes


def test_drawn_donors_bear_the_share_of_the_marker_that_outcomes_names(tmp_path):
    """Of the cells that the marker shows plainly in one donor, and of what is written for it."""
    draw_donors.main(draw_donors.Config(str(tmp_path), donors=2, tiles=3, size=192, cells=30), [])
    with open(tmp_path / "outcomes.tsv", encoding="utf-8") as file:
        told = {row["donor"]: float(row["share"]) for row in csv.DictReader(file, delimiter="\t")}
    assert sorted(told.values()) == [0.1, 0.9]
    for donor, share in told.items():
        bright = []
        for path in sorted(tmp_path.glob(f"donor{donor}_AT8_*_b0c1.tif")):
            marker, labels = data.read_image(path).pixels[0].astype(float), data.read_labels(
                path.with_name(path.name.replace("b0c1", "b0c0_masks")))
            ground = np.median(marker[labels == 0])
            mean = np.bincount(labels.ravel(), (marker - ground).ravel())[1:]
            bright += list(mean / np.bincount(labels.ravel())[1:])
        high = np.quantile(bright, 0.95)
        assert abs(np.mean(np.array(bright) > 0.35 * high) - share) < 0.25, (donor, share)


def test_five_recipes_stand_in_one_table(donors):
    """Each is trained by its configuration, but for the network; one bench has a row for each."""
    tiny = network(donors / "final_models/dinocell_s8.pt")
    for name, *more in (("if_generic",), ("if_marker",),
                        ("if_hybrid", "init=final_models/if_generic.pt"), ("if_marker_only",)):
        train(name, f"init={tiny}", *more)
    made = {"baseline": tiny, "generic": "final_models/if_generic.pt",
            "marker": "final_models/if_AT8.pt", "hybrid": "final_models/if_hybrid_AT8.pt",
            "marker_only": "final_models/if_marker_only.pt"}
    rows = bench(donors, "if_e1", made, root="dat/if")
    for score in ("AP@0.5", "F1", "SEG", "OP_CSB"):
        assert all(set(scores(rows, name, score)) == {"all_markers", "AT8"} for name in made)
    found = {row["set"]: int(row["n"]) for row in rows}
    assert found == {"all_markers": 2, "AT8": 1}
    with open(donors / "runs/if_e1/groups.tsv", encoding="utf-8") as file:
        assert all(row["group"].startswith("donor") for row in csv.DictReader(file, delimiter="\t"))


def test_a_model_may_be_shown_some_channels_of_the_set(donors):
    """The marker alone gives what the converted set of it gives; one too many is an error."""
    tiny = network(donors / "final_models/tiny.pt")
    row = dict(name="baseline", weights=tiny, channels=[2])
    rows = bench(donors, "if_e1", {}, root="dat/if", models=[row], experiment="some")
    data.convert(data.Config(channels=("marker",)), "dat/if/test", "dat/alone")
    alone = bench(donors, "if_e1", {}, root="dat", experiment="alone",
                  models=[dict(name="baseline", weights=tiny)],
                  sets=[dict(name="all_markers", path="alone")])
    for score in ("AP@0.5", "n_pred"):
        assert (scores(rows, "baseline", score)["all_markers"]
                == scores(alone, "baseline", score)["all_markers"])
    with pytest.raises(ValueError, match=r"2 channels, but a model has channels: \[3\]"):
        dataset = evaluate.LabelledSet(evaluate.DataSet("a", "test"), "dat/if")
        source = evaluate.measure.NetworkLabels(tiny, "cpu", channels=(3,))
        source.labels(next(dataset.items("x")), dataset)


def test_budgets_become_rows(donors):
    """Experiment 2: a row for each number of tiles, a mean over its draws."""
    tiny = network(donors / "final_models/dinocell_s8.pt")
    for count, seed in ((2, 0), (2, 1), (4, 0)):
        train("if_budget", f"init={tiny}", f"data.limit={count}", f"seed={seed}",
              f"experiment=if_budget/tuned_{count}_{seed}")
    rows = bench(donors, "if_e2", {"baseline": tiny,
                                   "tuned": "final_models/if_budget/tuned_*.pt"}, root="dat/if")
    assert {"ceiling", "baseline", "tuned_2", "tuned_4"} <= {row["model"] for row in rows}


def test_label_folders_of_other_programs_are_rows(donors):
    """Experiment 4: perfect labels score 1, with cells lost less, folders not there nothing."""
    for name, lost in (("sam_pps16", 2), ("sam_pps64", 0)):
        folder = donors / "dat/peers" / name
        folder.mkdir(parents=True)
        for example in data.examples("dat/if/test"):
            labels = example.labels()
            data.write_labels(folder / f"{example.name}_masks.tif", labels * (labels > lost))
    rows = bench(donors, "if_e4", {}, root="dat/if")
    assert scores(rows, "sam_pps64", "AP@0.5") == {"test": "1"}
    assert float(scores(rows, "sam_pps16", "AP@0.5")["test"]) < 1
    assert not scores(rows, "sam_pps32", "AP@0.5")
    assert "not run" in (donors / "runs/if_e4/table.md").read_text(encoding="utf-8")


@pytest.mark.smoke
@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_training_configurations_say_where_things_go(path):
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    if "lr" in text and "experiment" in text:
        assert {"checkpoint_name", "export_path", "output_base_dir"} <= text.keys()
