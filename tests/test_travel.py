"""bench/travel.py and bench/star_recipe.py: one command each, from drawn sets to a table."""
import itertools
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_fewshot import write_set

import metrics
import model
import runs

sys.path.insert(0, str(ROOT / "bench"))
import star_recipe  # noqa: E402
import travel  # noqa: E402


@pytest.fixture
def training(tmp_path):
    """Two sets of bright disks and what learns from them."""
    for name in ("a", "b"):
        write_set(tmp_path / name / "train", 6)
    return dict(
        groups={"b": ["b/train"]}, folds=[["b"]], parts={"halo": {"augment": {"halo": 0}}},
        train=dict(network=dict(dim=32, depth=3, heads=1, widths=[8, 8], last=0, stem=0), crop=64,
                   data=dict(root=str(tmp_path), diameter=12.0, share=0.3,
                             sets=["a/train", "b/train"]),
                   augment=dict(halo=0.2), steps=2, batch=2, warmup=1, cap=4))


def test_a_group_is_left_out_with_each_part_and_without(training, tmp_path, capsys):
    config = runs.from_dict(travel.Config, {**training, "seeds": [0], "images": 2,
                                            "output_base_dir": str(tmp_path)}, "toy")
    assert travel.main(config, []) == 0
    found = travel.lines(tmp_path / "runs/travel/results.jsonl")
    assert [(line["row"], line["without"]) for line in found] == [(0, []), (1, ["halo"])]
    assert all(set(line["abroad"]) == {"b"} for line in found)
    kept = model.load(tmp_path / "runs/travel/b_1_0.pt").settings
    assert kept.diameter == pytest.approx(12) and kept.peak >= kept.fill > 0
    before = (tmp_path / "runs/travel/results.jsonl").read_bytes()
    assert travel.main(config, []) == 0                              # nothing is done again
    assert (tmp_path / "runs/travel/results.jsonl").read_bytes() == before
    gain = found[0]["abroad"]["b"] - found[1]["abroad"]["b"]
    assert f"| halo | {gain:+.3f} |" in capsys.readouterr().out


def test_what_is_left_out_is_neither_learnt_nor_home(training, tmp_path, monkeypatch):
    config = runs.from_dict(travel.Config, {**training, "images": 2}, "toy")
    drawn, scored = set(), travel.scored
    draw = travel.train_seg.training_crops

    def watched(one, images, *rest):
        chosen, batch = draw(one, images, *rest)
        drawn.update(images.groups[images.group[chosen]])
        return chosen, batch

    def checked(net, home, strangers):
        assert {entry.set for entry in home} == {"a/train"}
        assert {entry.set for entry in strangers} == {"b/train"}
        return scored(net, home, strangers)

    monkeypatch.setattr(travel.train_seg, "training_crops", watched)
    monkeypatch.setattr(travel, "scored", checked)
    assert travel.left_out(config, travel.Run(0, 0, 5), tmp_path)["abroad"].keys() == {"b"}
    assert drawn == {"a/train"}


def test_a_part_changes_training_alone(training):
    config = runs.from_dict(travel.Config, training, "toy")
    one, other = (travel.changed(config, without, 3) for without in ([], ["halo"]))
    assert (one.augment["halo"], other.augment["halo"]) == (0.2, 0) and one.seed == other.seed == 3
    assert one.data == other.data


def test_a_fold_of_an_unknown_group_is_named(training):
    with pytest.raises(ValueError, match="folds: 'c' is none of groups"):
        runs.from_dict(travel.Config, {**training, "folds": [["b", "c"]]}, "toy")


@pytest.mark.parametrize("n", [1, 3, 7, 8])
def test_every_part_is_in_half_of_the_runs_and_any_two_in_a_quarter(n):
    has = travel.design(n)
    assert has[0].all() and (has.sum(0) * 2 == len(has)).all()
    for a, b in itertools.combinations(range(n), 2):
        assert (has[:, a] & has[:, b]).sum() * 4 == len(has)


def test_effects_are_those_that_made_the_scores():
    """Two folds with levels and seeds of their own; each part adds what it adds, with no noise."""
    config = travel.Config(groups={"a": [], "b": []}, folds=(("a",), ("b",)), train={},
                           parts={"x": {}, "y": {}, "z": {}})
    gains = {"x": 0.1, "y": -0.03, "z": 0.0}
    found = []
    for run in travel.planned(config):
        without = travel.missing(config, run)
        score = 0.4 + 0.2 * run.fold + 0.05 * run.seed + sum(
            gain for name, gain in gains.items() if name not in without)
        found.append(dict(run._asdict(), without=without, home=1 - score,
                          abroad={"ab"[run.fold]: score}))
    assert len(found) == 2 * 4 * 3
    for score, sign in (("abroad", 1), ("home", -1)):
        for (gain, error), true in zip(travel.effects(config, found, score), gains.values()):
            assert gain == pytest.approx(sign * true) and error == pytest.approx(0, abs=1e-9)
    first = [run.seed for run in travel.planned(config)[:8]]             # a third has all folds
    assert first == [0] * 4 + [1] * 4
    table = travel.table(config, found)
    assert "| x | +0.100 | +0.100 | +0.100 ± 0.000 | -0.100 ± 0.000 |" in table


def test_star_network_keeps_the_grid_at_odd_sizes():
    torch.manual_seed(0)
    net = star_recipe.Star().eval()
    found = star_recipe.stars(net, torch.rand(3, 45, 70))
    assert found.centre.shape == (23, 35) and found.rays.shape == (23, 35, 32)
    assert (found.rays > 0).all() and ((found.centre > 0) & (found.centre < 1)).all()


def test_true_rays_give_the_cells_back_at_another_scale():
    """Discs, described at twice the scale, drawn at the first."""
    pytest.importorskip("stardist")
    from stardist.geometry import star_dist
    from stardist.utils import edt_prob
    y, x = np.mgrid[:96, :128]
    labels = np.zeros((96, 128), np.int32)
    for i, (cy, cx) in enumerate([(24, 30), (60, 30), (40, 80), (70, 100)], 1):
        labels[(y - cy) ** 2 + (x - cx) ** 2 < 13 ** 2] = i
    large = labels.repeat(2, 0).repeat(2, 1)
    found = star_recipe.Stars(np.ascontiguousarray(edt_prob(large)[::2, ::2]),
                              star_dist(large, 32, grid=(2, 2)))
    again = star_recipe.star_cells(found, labels.shape, (2, 2), 0.5, 0.4)
    assert metrics.average_precision(labels, again, (0.8,))[0] == 1


def test_star_recipe_learns_within_its_minutes(training, tmp_path, monkeypatch):
    pytest.importorskip("stardist")
    monkeypatch.chdir(tmp_path)
    write_set(tmp_path / "a" / "test", 2)
    results = dict(models=[], root=str(tmp_path), sets=[dict(name="a", path="a/test")],
                   ceiling=dict(cap=[4.0]))
    for name, values in (("travel", training), ("results", results)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(values))       # JSON is YAML
    before = torch.get_num_threads()
    try:
        assert star_recipe.main(["travel.yaml", "results.yaml", "minutes=0.01"]) == 0
    finally:
        torch.set_num_threads(before)
    table = (tmp_path / "runs/stardist/table.md").read_text()
    assert "stardist" in table and "dinocell" in table
    assert "steps in 0.01 minutes" in table
    with pytest.raises(SystemExit):
        star_recipe.main(["travel.yaml"])
