"""Numbers in README and documents, read against the logs that they name (docs/logs/).

A number is right when it is the log's, rounded to the digits that are printed.
"""
import csv
import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

import runs

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import travel  # noqa: E402

README, DOCS = ROOT / "README.md", ROOT / "docs"
LOGS = DOCS / "logs"
APS = ("AP@0.5", "AP@0.75", "AP@0.9")


def rows(document, after, first=""):
    """Cells of the rows of the first table below the text `after` whose head begins so."""
    text = document.read_text(encoding="utf-8")
    assert after in text, f"{document.name}: {after}"
    inside = False
    for line in text[text.index(after):].splitlines():
        if line.startswith("|"):
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            if not inside:
                inside = line.startswith(f"| {first}")
            elif not set(line) <= set("|-: "):
                yield cells
        elif inside:
            return


def table(name):
    with open(LOGS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def lines(name):
    return [json.loads(line) for line in (LOGS / name).read_text(encoding="utf-8").splitlines()]


def printed(text):
    """Numbers of a cell, without intervals and the numbers of notes: '0.87 [0.8-0.9] (1)'."""
    text = re.sub(r"\[[^\]]*\]|\(\d+\)|`[^`]*`", "", text).replace(",", "")
    return re.findall(r"[-+]?\d*\.?\d+", text)


def is_rounded(text, value):
    """Whether `text` is the value with as many digits; a half may have gone either way."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5 * 10.0**-digits + 1e-9


def check(where, cells, values):
    """Each cell's numbers are those of the log, one by one."""
    found = [number for cell in cells for number in printed(cell)]
    assert len(found) == len(values), (where, cells, values)
    for number, value in zip(found, values, strict=True):
        assert is_rounded(number, value), (where, number, value)


def plain(cell):
    return re.sub(r" \(\d+\)$", "", cell)


def image_means(bench):
    """{(set, model): means of AP over images} of images.tsv."""
    found = {}
    for row in table("images.tsv"):
        if row["table"] == bench:
            found.setdefault((row["set"], row["model"]), []).append([float(row[a]) for a in APS])
    return {key: np.mean(values, 0) for key, values in found.items()}


@pytest.mark.smoke
@pytest.mark.parametrize("document, bench, models", [
    (README, "results", ["ceiling", "dinocell_s8", "s8_research", "dinocell_tiny"]),
    (DOCS / "results.md", "results", ["ceiling", "dinocell_s8", "s8_research", "dinocell_tiny"]),
    (DOCS / "results.md", "results_ablation",
     ["ceiling", "scratch", "pretrained", "uncapped", "no_stem", "unet"])])
def test_scores_of_sets_are_means_of_their_images(document, bench, models):
    means, seen = image_means(bench), 0
    for name, _, *cells in rows(document, f"<!-- begin bench {bench}", "set | images"):
        for model, cell in zip(models, cells, strict=True):
            if (key := (plain(name), model)) in means:
                # images.tsv has three digits, so that a mean may be off by half of the last
                found = np.array(printed(cell), float)
                assert np.abs(found - means[key]).max() <= 1.01e-3, (key, found, means[key])
                seen += 1
    assert seen >= 12


def test_ablation_is_the_mean_of_its_seeds():
    logged, seen = {}, 0
    for row in table("ablation.tsv"):
        model = re.sub(r"_\d$", "", row["model"])
        logged.setdefault((row["set"], model), []).append([float(row[name]) for name in APS])
    models = ("ceiling", "scratch", "pretrained", "uncapped", "no_stem", "unet")
    for name, _, *cells in rows(DOCS / "results.md", "<!-- begin bench results_ablation",
                                "set | images"):
        for model, cell in zip(models, cells, strict=True):
            check("ablation", [cell], np.mean(logged[name, model], 0))
            seen += 1
    assert seen == len(logged)
    text = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    with_it, without = re.search(r"on fluorescence: ([\d., ]+) with it, ([\d., ]+) without",
                                 text).groups()
    for cell, model in ((with_it, "pretrained"), (without, "scratch")):
        check("seeds", [cell.replace(",", " ")],
              [scores[0] for scores in logged["nuclei_fluo_dsb2018", model]])


def test_label_efficiency_is_its_log():
    logged = {(row["variant"], row["budget"]): row for row in table("budget.tsv")}
    seen = list(rows(DOCS / "results.md", "## Label efficiency", "budget"))
    assert [budget for budget, *_ in seen] == ["2", "10", "100"]
    for budget, *cells in seen:
        for variant, cell in zip(("scratch", "pretrained"), cells, strict=True):
            row = logged[variant, budget]
            check(variant, [cell], [float(row[name]) for name in APS])


def test_what_the_encoding_allows_is_its_log():
    logged = {(row["set"], row["cap"]): row for row in table("ceiling.tsv")
              if row["cap"] in ("-", "4.0000") and float(row["peak"]) == 0.47
              and float(row["fill"]) == 0.09}
    seen = list(rows(DOCS / "architecture.md", "What the encoding itself allows", "set"))
    assert len(seen) == 5
    for name, count, *cells in seen:
        for cap, cell in zip(("-", "4.0000"), cells, strict=True):
            row = logged[name, cap]
            assert int(count) == int(row["n"])
            check(name, [cell], [float(row[score]) for score in APS])


def test_the_story_of_the_weights_is_their_logs():
    files = ("dinocell_tiny", "dinocell_tiny_pretrained", "dinocell_s8")
    sets = ("nuclei_fluo", "nuclei_stained", "phase", "bacteria")
    seen = list(rows(DOCS / "results.md", "## How the weights came about", "network for all"))
    assert len(seen) == 3
    for number, (_, steps, loss, *cells) in enumerate(seen):
        log, step = lines(f"{files[number]}.jsonl"), int(steps.replace(",", ""))
        scored = next(line for line in log if line["step"] == step and "score" in line)
        values = [next(value for name, value in scored.items() if name.startswith(f"AP@0.5 {set}"))
                  for set in sets]
        check(steps, cells, [*values, scored["score"]])
        near = np.mean([line["loss"] for line in log if "loss" in line
                        and step - 200 < line["step"] <= step])
        assert abs(float(loss) - near) < 2e-3, (steps, loss, near)


@pytest.mark.parametrize("name, after, scores", [
    ("ssl_laptop", "256 windows of 224 px of 64 held-out fields",
     ("retrieval", "margin", "consistency", "control", "background_retrieval")),
    ("ssl_fields_sbs", "No outlines, so no control by the background",
     ("retrieval", "margin", "consistency", "control"))])
def test_pretraining_is_its_log(name, after, scores):
    logged, seen = {}, 0
    for line in lines(f"{name}.jsonl"):
        strategy, seed = line["run"].removeprefix(f"{name}_").rsplit("_", 1)
        logged[strategy, seed, line["step"]] = line
    for seed, network, step, *cells in rows(DOCS / "pretraining.md", after, "seed | network"):
        strategy = "average" if network == "random" else network.strip("`")
        line = logged[strategy, seed, int(step.replace(",", ""))]
        check(name, cells, [line[score] for score in scores])
        seen += 1
    assert seen >= 6


def test_the_one_real_image_is_its_log():
    text = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    shown = re.search(r"three channels (\S+), DAPI alone (\S+), Lap2 (\S+), Ki67 (\S+), after 100 "
                      r"steps on Bladder1 ([.\d]+):", text).groups()
    check("Lung1", shown, [float(row["AP@0.5"]) for row in table("if_deepliif.tsv")[1:]])


def test_star_recipe_is_its_log():
    logged = {row["set"]: row for row in table("stardist.tsv")}
    names = [f"{network} {iou}" for network in ("stardist", "dinocell") for iou in (0.5, 0.75)]
    shown = list(rows(DOCS / "results.md", "## Beside StarDist's recipe", "test set"))
    for (_, *cells), name in zip(shown, ("nuclei_fluo_dsb2018", "nuclei_stained_dsb2018",
                                         "blood_nuclei")):
        row = logged[name]
        check(name, cells, [float(row[one]) for one in [*names, "difference"]])
        low, high = re.findall(r"[-+]\.\d+", cells[-1])[1:]
        assert is_rounded(low, float(row["low"])) and is_rounded(high, float(row["high"]))
    seen = {"nuclei_fluo_dsb2018", "nuclei_stained_dsb2018", "phase_usiigaci", "bacteria_phase",
            "microglia_fluo", "nuclei_timelapse_hela"}
    abroad = [row for name, row in logged.items() if name not in seen]
    assert len(abroad) == 11
    check("abroad", shown[-1][1:3], [np.mean([float(row[one]) for row in abroad])
                                     for one in names])


def test_sets_left_out_are_their_log():
    """What was taken out for it is a row still."""
    config = runs.load_config(travel.Config, ROOT / "configs" / "travel.yaml")
    shown = [row[0] for row in rows(DOCS / "results.md", "## Sets left out", "part")][:-1]
    assert len(shown) == 7 and set(config.parts) < set(shown)
    config = dataclasses.replace(config, parts=dict.fromkeys(shown))
    for line in travel.table(config, lines("travel.jsonl")).splitlines():
        assert line in (DOCS / "results.md").read_text(encoding="utf-8")


def test_types_are_their_log():
    names = {"Ki67": "deepliif", "CoNSeP": "consep"}
    logged = {(row["set"], row["source"]): row for row in table("types.tsv")}
    shown = list(rows(DOCS / "results.md", "## Types of cells", "set"))
    for name, source, *cells in shown:
        if source == "types_research":                       # of weights that do not ship
            continue
        row = logged.pop((names[name], source))
        check((name, source), cells, [float(row[one]) for one in (
            "knn_accuracy", "knn_F1", "linear_accuracy", "linear_F1", "F_d", "F_c") if row[one]])
    assert not logged and len(shown) > 10


def test_few_examples_of_sets_left_out_are_their_log():
    logged = [row for row in table("fewshot.tsv") if row["start"] == "without phase and stained"]
    text = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    shown = re.search(r"with 1, 2, 5, 10 in phase contrast (.*?) \(as it is (\S+)\), stained (.*?) "
                      r"\((\S+)\); the whole network is (\S+), rank 4 (\S+) behind", text).groups()

    def mean(way, *chosen):
        return np.mean([float(row["AP@0.5"]) for row in logged if row["way"] == way and all(
            row[key] == value for key, value in chosen)])

    values = []
    for name in ("phase", "stained"):
        values += [mean("decoder", ("set", name), ("shots", n)) for n in ("1", "2", "5", "10")]
        values.append(mean("none", ("set", name)))
    check("few", shown, [*values, *(mean("decoder") - mean(way) for way in ("whole", "adapters"))])


def test_the_research_file_is_its_log():
    scored = lines("dinocell_s8_research_more.jsonl")[-1]
    text = " ".join((DOCS / "results.md").read_text(encoding="utf-8").split())
    shown = re.search(r"held out, MoNuSeg (\S+), CoNSeP (\S+), whole cells (\S+) at", text).groups()
    check("research", shown, [scored[f"AP@0.5 {name}"] for name in (
        "he_monuseg/research", "he_consep/train nuclei", "fluo_cyto_cellpose_scellseg/research")])
    assert scored["step"] == 900


def test_hills_are_their_log():
    text = " ".join((DOCS / "architecture.md").read_text(encoding="utf-8").split())
    for words, name in (("H&E of many organs", "unseen: he_monuseg/research"),
                        ("of colon", "unseen: he_consep/train nuclei"),
                        ("whole cells", "unseen: fluo_cyto_cellpose_scellseg/research")):
        logged = next(cells for cells in rows(LOGS / "hills.txt", "**dinocell_tiny**", "set")
                      if cells[0] == name)
        shown = re.search(rf"{words} (\.\d+) → (\.\d+)", text).groups()
        check(name, shown, [float(logged[i].split(" / ")[0]) for i in (2, 4)])


def test_sinkhorn_of_one_view_or_both_is_its_log():
    logged = {(line["together"], line["step"]): line for line in lines("ssl_sinkhorn.jsonl")
              if "retrieval" in line}
    random, alone, together = logged[False, 0], logged[False, 400], logged[True, 400]
    text = " ".join((DOCS / "pretraining.md").read_text(encoding="utf-8").split())
    for shown, name in ((r"retrieval ([.\d]+) view by view, ([.\d]+) together, ([.\d]+) in",
                         "retrieval"), (r"margin ([.\d]+), ([.\d]+), ([.\d]+) \(\[ssl", "margin")):
        check(name, re.search(shown, text).groups(), [alone[name], together[name], random[name]])


def test_views_compared_by_segmentation_are_their_log():
    logged = {(line["strategy"], line["step"]): line for line in lines("ssl_probe.jsonl")}
    shown = list(rows(DOCS / "pretraining.md", "**By segmentation**", "network"))
    for (name, *cells), key in zip(shown, (("average", 0), ("average", 400),
                                           ("average_single", 400)), strict=True):
        line = logged[key]
        check(name, cells, [line["retrieval"], line["probe_AP@0.5"], line["probe_AP@0.75"],
                            line["probe_OP_CSB"]])


def test_learning_from_corrections_is_its_log():
    text = (LOGS / "learning.txt").read_text(encoding="utf-8")
    decoder, whole = ({count: [float(value) for value in values] for count, *values in re.findall(
        r"^(\d+) images: AP@0.5 on test ([\d.]+) -> ([\d.]+), AP ([\d.]+) -> ([\d.]+);.* ([\d.]+) "
        r"s of CPU", part, re.MULTILINE)} for part in text.split("The whole network"))
    (_, *before), *shown = rows(DOCS / "results.md", "## Learning from corrections", "halves")
    check("before", before, [decoder["5"][0], decoder["5"][2], whole["10"][0]])
    assert [count for count, *_ in shown] == sorted(whole, key=int) and set(decoder) < set(whole)
    for count, *cells in shown:
        values = decoder.get(count)
        check(count, cells, [*([values[1], values[3], values[4]] if values else []),
                             whole[count][1]])


def test_pretraining_on_many_channels_is_its_log():
    first, *_, last = lines("ssl_multichannel.jsonl")
    text = " ".join((DOCS / "pretraining.md").read_text(encoding="utf-8").split())
    number = r"([.\d]+)"
    found = re.search(f"retrieval goes from {number} to {number}, margin from {number} to "
                      f"{number};", text).groups()
    check("channels", found, [line[name] for name in ("retrieval", "margin")
                              for line in (first, last)])


def test_recipes_on_drawn_donors_are_their_log():
    logged = {}
    for row in table("if_drawn.tsv"):
        logged.setdefault(row["set"], []).append([float(row[name]) for name in APS])
    shown = list(rows(DOCS / "results.md", "## Fine-tuning, tried on drawn donors", "recipe"))
    assert len(shown) == len(logged["AT8"]) == 6
    for number, (_, *cells) in enumerate(shown):
        for name, cell in zip(("all_markers", "AT8"), cells, strict=True):
            check(name, [cell], logged[name][number])
    scores = {row["model"]: float(row["AP@0.5"]) for row in table("if_drawn.tsv")
              if row["set"] == "test"}
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    shown = re.search(r"2, 5, 10, 20 or 30 tiles: AP@0.5 ([.\d, ]+);", text)[1].split(", ")
    for number, cell in zip((2, 5, 10, 20, 30), shown, strict=True):
        check(str(number), [cell], [scores[f"tuned_{number}"]])
        each = [scores[f"tuned_{number}_{seed}"] for seed in range(3)]
        assert np.mean(each) == pytest.approx(scores[f"tuned_{number}"], abs=1e-3)


@pytest.mark.smoke
def test_questions_in_words_are_their_log():
    log = LOGS / "instruct_evaluate.txt"
    classes = {row[0]: row[1:] for row in rows(log, "| class |", "class")}
    rates = {row[0]: row[1:] for row in rows(log, "| what |", "what")}
    document = DOCS / "instruct.md"
    for name, *cells in rows(document, "<!-- measured -->", "class"):
        true, *scores = classes[name]
        logged = [score for i, score in enumerate(scores) if i not in (3, 7)]   # no fixed head
        assert cells == [true, *logged], name
    shown = {row[0]: row[1:] for row in rows(document, "<!-- measured -->", "what")}
    assert len(shown) >= 17 and all(rates[name] == cells for name, cells in shown.items())
    text, said = (" ".join(path.read_text(encoding="utf-8").split()) for path in (log, document))
    for pattern, digits in ((r"absolute error ([\d.]+)", 1), (r"true count of ([\d.]+)", 1)):
        value = float(re.search(pattern, text)[1])
        assert f"{value:.{digits}f}" == re.search(pattern, said)[1].rstrip(".")


def test_speed_is_its_log():
    bench = (LOGS / "bench.txt").read_text(encoding="utf-8")
    network = {row[0]: row[1:] for row in rows(LOGS / "bench.txt", "one image of 1024", "what")}
    shown = list(rows(README, "## How fast", "what"))
    for number, name in ((0, "dinocell_s8"), (1, "dinocell_tiny"),
                         (3, "train_seg.py, 8 crops of 160 px, muon")):
        _, took, beside = shown[number]
        seconds, _, products, *_ = network[name]
        assert is_rounded(printed(took)[0], float(printed(seconds)[0])), name
        assert printed(beside)[0] == products
    _, _, _, times, _ = next(rows(LOGS / "bench.txt", "**Watershed", "map"))
    assert is_rounded(printed(shown[2][2])[0], float(printed(times)[0]))
    for number in re.findall(r"peaks at ([\d.]+) GiB", (DOCS / "architecture.md").read_text()):
        assert f"{number} GiB" in bench


def test_downstream_is_its_log():
    """Every share that the section prints stands in the log."""
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    section = text[text.index("## Downstream"):].split("\n## ")[0]
    logged = (LOGS / "downstream.txt").read_text(encoding="utf-8")
    shares = re.findall(r"(\d+\.\d+)(?= ?\s?%)", section)
    assert len(shares) > 20
    for share in shares:
        assert re.search(rf"(?<![\d.]){re.escape(share)} ?%", logged), share


def test_logs_that_are_named_exist_and_none_is_forgotten():
    texts = "".join(path.read_text(encoding="utf-8") for path in
                    (README, *DOCS.glob("*.md"), ROOT / "final_models/README.md"))
    named = set(re.findall(r"logs/([\w.]+\.\w+)", texts))
    assert named == {path.name for path in LOGS.iterdir()}
