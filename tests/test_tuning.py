"""tuning.py against every setting tried by hand."""
import subprocess
import sys

import numpy as np
import pytest
import torch

import data
import metrics
import tuning
import watershed
from conftest import ROOT
from test_evaluate import discs


def test_tuned_finds_the_best_setting():
    """Against every setting tried by hand: a set of two images counts as much as one of three."""
    rng = np.random.default_rng(0)
    truths = [discs(seed)[1] for seed in range(5)]
    distances = [np.clip(data.distance_map(t, 4) + rng.normal(0, 0.15, t.shape), 0, 1).astype(np.float32)
                 for t in truths]
    sets = ["a", "b", "a", "b", "b"]

    def score(name, *setting):
        return np.mean([metrics.dsb_score(t, watershed.watershed(d, *setting))
                        for d, t, s in zip(distances, truths, sets) if s == name])
    pairs = [(peak, fill) for peak in (0.4, 0.6, 0.8) for fill in (0.2, 0.5, 0.7) if fill <= peak]
    shared = {pair: (score("a", *pair) + score("b", *pair)) / 2 for pair in pairs}
    best = max(shared.values())
    found = tuning.tuned(distances, truths, sets, (0.4, 0.6, 0.8), (0.2, 0.5, 0.7))
    one = found.setting
    assert len(set(shared.values())) > 3 and not any(one[2:])
    assert found.score == pytest.approx(best) == pytest.approx(shared[one.peak, one.fill])
    for name, own in found.sets.items():
        assert own.own_score == pytest.approx(max(score(name, *pair) for pair in pairs))
        assert own.own_score == pytest.approx(score(name, *own.setting)) and not any(own.setting[2:])
        assert own.score == pytest.approx(score(name, one.peak, one.fill)) and own.images == sets.count(name)
    np.testing.assert_array_equal(found.labels[3], watershed.watershed(distances[3], one.peak, one.fill))
    for heavy in "ab":                                        # of which one counts ten times as much: its own best, nearly
        weighed = {pair: (score("a", *pair) * (10 if heavy == "a" else 1) + score("b", *pair) * (10 if heavy == "b" else 1)) / 11
                   for pair in pairs}
        got = tuning.tuned(distances, truths, sets, (0.4, 0.6, 0.8), (0.2, 0.5, 0.7), weights={heavy: 10.0})
        assert got.score == pytest.approx(max(weighed.values())) == pytest.approx(weighed[got.setting[:2]])
    clean = tuning.tuned(distances, truths, sets, [one.peak], [one.fill], min_areas=(0, 12, 2000))
    assert clean.setting.min_area == 12 and clean.score > found.score         # noise makes crumbs; 2000 px too much
    with pytest.raises(ValueError, match="no pair"):
        tuning.tuned(distances, truths, None, [0.1], [0.2])
    soft = [np.maximum(d, 0.75 * (t > 0)).astype(np.float32) for d, t in zip((data.distance_map(t, 4) for t in truths), truths)]
    deep = tuning.tuned(soft, truths, sets, (0.4, 0.6), (0.2, 0.3), depths=(0.0, 0.1))       # valleys that end above every peak
    assert deep.setting.depth == 0.1 and deep.score > tuning.tuned(soft, truths, sets, (0.4, 0.6), (0.2, 0.3)).score + 0.05


def test_tuned_finds_the_shape():
    """Pairs of discs that the map does not part at all."""
    y, x = np.mgrid[:40, :70]
    truths, distances = [], []
    for at in (42, 43, 44):
        discs = [np.hypot(y - 20, x - centre) < 14 for centre in (20, at)]
        truths.append(np.where(discs[0] & (x < (20 + at) / 2), 1, np.where(discs[1], 2, 0)).astype(np.int32))
        distances.append(np.where(truths[-1] > 0, 0.9, 0).astype(np.float32))
    options = dict(peaks=[0.5], fills=[0.2], depths=(0, 0.1, 0.2))
    found = tuning.tuned(distances, truths, shapes=(0, 0.1), **options)
    assert found.setting.shape == 0.1 and found.score > 0.8 and tuning.tuned(distances, truths, **options).score < 0.2


def test_each_set_gets_what_suits_it_best():
    """One set is noisy and wants smoothing, which costs the other its small cells."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    small = ((rows % 8 < 5) & (columns % 8 < 5)) * (1 + rows // 8 * 8 + columns // 8).astype(np.int32)
    large = ((rows % 32 < 28) & (columns % 32 < 28)) * (1 + rows // 32 * 2 + columns // 32).astype(np.int32)
    clean = data.distance_map(small, 4).astype(np.float32)
    noisy = (data.distance_map(large, 4) + rng.normal(0, 0.2, large.shape)).clip(0, 1).astype(np.float32)
    found = tuning.tuned([clean, noisy], [small, large], ["small", "noisy"], (0.3, 0.5), (0.1, 0.2), depths=(0, 0.1, 0.3),
                         smooths=(0, 2))
    assert found.sets["noisy"].setting.smooth == 2 and found.sets["small"].setting.smooth == 0
    for own in found.sets.values():
        assert own.own_score >= own.score
    assert max(own.own_score - own.score for own in found.sets.values()) > 0.05


def test_images_that_do_not_count_choose_all_the_same():
    """One held-out image that wants a high peak among four that want a low one: theirs is taken, and its score told with that."""
    rows, columns = np.mgrid[:48, :48]
    truth = ((rows % 16 < 12) & (columns % 16 < 12)) * (1 + rows // 16 * 3 + columns // 16).astype(np.int32)
    dim = np.where(truth > 0, 0.5, 0).astype(np.float32)                     # found with a low peak alone
    bright = np.maximum(np.where(truth > 0, 0.9, 0), 0.5 * ((rows + columns) % 5 == 0)).astype(np.float32)     # merged with a low one
    distances, options = [bright, dim, dim, dim, dim], dict(peaks=(0.3, 0.7), fills=(0.2,))

    def score(peak: float) -> float:
        return metrics.average_precision(truth, watershed.watershed(bright, peak, 0.2)).mean()
    alone = tuning.tuned(distances[:1], [truth], ["a"], **options)
    found = tuning.tuned(distances, [truth] * 5, ["a"] * 5, counted=[True] + [False] * 4, **options)
    assert alone.setting.peak == 0.7 and found.setting.peak == 0.3 and score(0.3) < 0.9 < score(0.7) == alone.score
    assert found.score == found.sets["a"].score == pytest.approx(score(0.3)) and found.sets["a"].images == 1
    assert tuning.tuned(distances, [truth] * 5, ["a"] * 5, **options).score > 0.7


def test_processes_share_the_search(tmp_path):
    """Three processes that divide it find the same as one alone, each having scored its part; all of them know it all."""
    script = tmp_path / "share.py"
    script.write_text(f"""import functools, json, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import numpy as np, torch, data, runs, tuning, test_evaluate, watershed
rank, world = int(sys.argv[1]), 3
torch.distributed.init_process_group("gloo", init_method="file://{tmp_path}/meet", rank=rank, world_size=world)
noise = np.random.default_rng(0)
truths = [test_evaluate.discs(seed)[1] for seed in range(3)]
maps = [np.clip(data.distance_map(t, 4) + noise.normal(0, 0.15, t.shape), 0, 1).astype(np.float32) for t in truths]
calls, plain = [], watershed.watershed
watershed.watershed = lambda *given: calls.append(1) or plain(*given)
options = dict(sets=["a", "b", "a"], peaks=(0.4, 0.6, 0.8), fills=(0.2, 0.5), min_areas=(0, 12), depths=(0, 0.1))
best = tuning.tuned(maps, truths, each=functools.partial(runs.shared_out, rank=rank, world=world), **options)
shared = len(calls)
alone = tuning.tuned(maps, truths, **options)
assert best[:2] == alone[:2] and best.sets == alone.sets and shared < 0.7 * (len(calls) - shared), (shared, len(calls))
assert runs.shared_out(lambda n: (n, rank), list(range(5)), rank, world) == [(0, 0), (1, 1), (2, 2), (3, 0), (4, 1)]
torch.distributed.barrier()
print("alike")
runs.leave(0)
""")
    group = [subprocess.Popen([sys.executable, str(script), str(rank)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for rank in range(3)]
    said = [process.communicate(timeout=120)[0] for process in group]
    assert [text.endswith("alike\n") for text in said] == [True] * 3, said


@pytest.mark.parametrize("height,expected", [(0.6, (0.4, 0.2, 20, 0.2, 1.0, 0.05)), (0.4, (0.3, 0.1, 0, 0.0, 0.0, 0.0))])
def test_the_higher_of_two_hills_is_found_from_either_start(monkeypatch, height, expected):
    """One hill at the first values and one at the middle ones: on every way between them it goes down first."""
    hills = {(0.3, 0.1, 0, 0.0, 0.0, 0.0): 0.5, (0.4, 0.2, 20, 0.2, 1.0, 0.05): height}

    def score(truth, setting):
        return np.array([max(top - 0.05 * sum(a != b for a, b in zip(setting, hill)) for hill, top in hills.items())])
    monkeypatch.setattr(watershed, "watershed", lambda distance, *setting: torch.tensor(setting, dtype=torch.float64))
    monkeypatch.setattr(metrics, "average_precision", score)
    best = tuning.tuned([np.zeros((2, 2))], [np.zeros((2, 2))], None, (0.3, 0.4, 0.5), (0.1, 0.2, 0.3), (0, 20, 40),
                        (0.0, 0.2, 0.4), (0.0, 1.0, 2.0), (0.0, 0.05, 0.1))
    assert best.setting == expected and best.score == max(hills.values())
