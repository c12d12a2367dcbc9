"""bench/travel.py and bench/star_recipe.py: one command each, from drawn sets to a table."""
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
        groups={"b": ["b/train"]}, variants={"all": {}, "no halo": {"augment": {"halo": 0}}},
        train=dict(network=dict(dim=32, depth=3, heads=1, widths=[8, 8], last=0, stem=0), crop=64,
                   data=dict(root=str(tmp_path), diameter=12.0, share=0.3,
                             sets=["a/train", "b/train"]),
                   augment=dict(halo=0.2), steps=2, batch=2, warmup=1, cap=4))


def test_a_group_is_left_out_once_for_each_variant(training, tmp_path, capsys):
    config = runs.from_dict(travel.Config, {**training, "seeds": [0], "images": 2,
                                            "output_base_dir": str(tmp_path)}, "toy")
    assert travel.main(config, []) == 0
    found = travel.lines(tmp_path / "runs/travel/results.jsonl")
    assert [(line["variant"], line["group"]) for line in found] == [("all", "b"), ("no halo", "b")]
    for line in found:          # what was left out is no part of home
        assert {"home a/train", "abroad b/train"} <= set(line) and "home b/train" not in line
    kept = model.load(tmp_path / "runs/travel/no halo_b_0.pt").settings
    assert kept.diameter == pytest.approx(12) and kept.peak >= kept.fill > 0
    before = (tmp_path / "runs/travel/results.jsonl").read_bytes()
    assert travel.main(config, []) == 0                              # nothing is done again
    assert (tmp_path / "runs/travel/results.jsonl").read_bytes() == before
    assert "| no halo |" in capsys.readouterr().out


def test_a_variant_changes_training_alone(training):
    config = runs.from_dict(travel.Config, training, "toy")
    one, other = (travel.changed(config, name, 3) for name in config.variants)
    assert (one.augment["halo"], other.augment["halo"]) == (0.2, 0) and one.seed == other.seed == 3
    assert one.data == other.data


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
