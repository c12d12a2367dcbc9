"""bench/fewshot.py: adapters that fold in, what learns, episodes, prototypes, one table."""
import dataclasses
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

import cells
import data
import images
import model
import segment
import watershed

sys.path.insert(0, str(ROOT / "bench"))
import fewshot  # noqa: E402


def network():
    torch.manual_seed(0)
    return model.DINOCell(model.ViT(32, 3, 2, 8, layerscale=1.0), (8, 8), 0,
                          model.Settings(tile=64, cap=4, diameter=12.0), 1).eval()


def learning(net):
    return {name.split(".")[0] for name, p in net.named_parameters() if p.requires_grad}


@pytest.mark.smoke
def test_adapters_change_nothing_at_first_and_fold_in():
    net, x = network(), torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        before = net.backbone(x).patches
    fewshot.let_learn(net, "adapters")
    added = [p for name, p in net.named_parameters() if name.endswith((".up", ".down"))]
    assert len(added) == 2 * 3 and all(p.requires_grad for p in added)
    assert sum(p.numel() for p in added) == 3 * 2 * 2 * 4 * 32      # blocks, q and v, two of 4 x 32
    with torch.inference_mode():
        torch.testing.assert_close(net.backbone(x).patches, before)
        for p in added:
            p.add_(0.1)
        changed = net.backbone(x).patches
    assert not torch.allclose(changed, before)
    fewshot.fold_adapters(net)
    assert set(net.state_dict()) == set(network().state_dict())
    with torch.inference_mode():
        torch.testing.assert_close(net.backbone(x).patches, changed)


def test_low_rank_is_up_times_down_on_q_and_v_alone():
    linear = torch.nn.Linear(8, 24, bias=False)
    plain = linear.weight.detach().clone()
    fewshot.add_low_rank(linear, rank=2)
    low = linear.parametrizations.weight[0]
    torch.nn.init.normal_(low.up)
    q, k, v = (linear.weight - plain).detach().chunk(3)
    torch.testing.assert_close(q, (low.up[0] @ low.down[0]).detach())
    torch.testing.assert_close(v, (low.up[1] @ low.down[1]).detach())
    assert not k.any() and torch.linalg.matrix_rank(q) == 2


@pytest.mark.parametrize(("way", "parts"), [
    ("decoder", {"decoder"}), ("new_decoder", {"decoder"}), ("adapters", {"decoder", "backbone"}),
    ("whole", {"decoder", "backbone"})])
def test_what_learns(way, parts):
    net, old = network(), network()
    groups = fewshot.let_learn(net, way)
    assert learning(net) == parts
    assert sum(len(group["params"]) for group in groups) == sum(
        p.requires_grad for p in net.parameters())
    same = torch.equal(net.decoder.head.weight, old.decoder.head.weight)
    assert same == (way != "new_decoder")


def write_set(folder, count):
    """Images of disks, some 20 px wide."""
    folder.mkdir(parents=True)
    y, x = np.mgrid[:80, :80]
    for i in range(count):
        labels = np.zeros((80, 80), np.int32)
        for k, (cy, cx) in enumerate([(20, 20 + i), (20, 60), (60, 20), (60, 60 - i)], 1):
            labels[(y - cy) ** 2 + (x - cx) ** 2 <= 100] = k
        noise = np.random.default_rng(i).random(labels.shape) * 40
        cells.write_picture(folder / f"f{i}.png", ((labels > 0) * 150 + noise).astype(np.uint8))
        images.write_labels(folder / f"f{i}_masks.tif", labels)


def test_support_and_query_share_no_file(tmp_path):
    write_set(tmp_path / "s", 4)
    new = fewshot.NewSet("s", data.TrainingSet("s"), shots=(1, 2), query=2)
    seen = set()
    for seed in range(4):
        episode = fewshot.episode_of(new, str(tmp_path), 12.0, seed)
        names = [[image.name for image in part] for part in episode]
        assert len(names[0]) == 2 == len(names[1]) and not set(names[0]) & set(names[1])
        assert data.median_diameter(episode.support[0].labels) == pytest.approx(12, abs=0.7)
        seen.add(tuple(names[1]))
    assert len(seen) > 1
    with pytest.raises(ValueError, match="4 images, expected 3 shots and 2 to ask"):
        fewshot.episode_of(dataclasses.replace(new, shots=(3,)), str(tmp_path), 12.0, 0)


def test_prototypes_find_what_stands_out(tmp_path):
    """Tokens of a network without training tell bright disks from dark ground."""
    write_set(tmp_path / "s", 3)
    new = fewshot.NewSet("s", data.TrainingSet("s"), shots=(1,), query=1)
    episode, net = fewshot.episode_of(new, str(tmp_path), 30.0, 0), network()
    fewshot.put_prototypes(net, episode.support)
    image = episode.query[0]
    distance = segment.distances(image.pixels, net, limits=segment.UNIT, zoom=1.0)
    truth = watershed.distance_map(image.labels, 4)
    assert np.corrcoef(distance.ravel(), truth.ravel())[0, 1] > 0.5


def test_a_table_that_goes_on_where_it_stopped(tmp_path, capsys, monkeypatch):
    write_set(tmp_path / "s", 3)
    model.save(network(), tmp_path / "n.pt")
    config = fewshot.Config(
        starts=(fewshot.Start("n", str(tmp_path / "n.pt")),
                fewshot.Start("random", None, ("whole",))),
        sets=(fewshot.NewSet("s", data.TrainingSet("s"), shots=(1, 2), query=1),),
        known=(data.TrainingSet("s"),), root=str(tmp_path), output_base_dir=str(tmp_path),
        seeds=(0,), seconds=0.02, batch=2, crop=32, rounds=1, inner=1)
    fewshot.main(config, [])
    rows = (tmp_path / "runs" / "fewshot" / "fewshot.tsv").read_text().splitlines()
    assert len(rows) == 1 + 2 * 8
    assert (tmp_path / "runs" / "fewshot" / "fewshot.svg").read_text().startswith("<svg")
    monkeypatch.setattr(fewshot, "one_way", lambda *_: pytest.fail("made anew"))
    fewshot.main(config, [])
    assert (tmp_path / "runs" / "fewshot" / "fewshot.tsv").read_text().splitlines() == rows
    monkeypatch.undo()
    moved, learn = [], fewshot.meta_learned
    monkeypatch.setattr(fewshot, "meta_learned", lambda *given: moved.append(1) or learn(*given))
    fewshot.main(dataclasses.replace(config, lr=2e-3), [])   # made anew: reptile is reptile again
    assert moved == [1]
    with pytest.raises(ValueError, match="known is empty, but reptile"):
        dataclasses.replace(config, known=())
