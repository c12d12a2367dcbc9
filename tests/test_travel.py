"""bench/travel.py: one command from drawn sets to a table."""
import sys

import pytest
from conftest import ROOT
from test_fewshot import write_set

import model
import runs

sys.path.insert(0, str(ROOT / "bench"))
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
