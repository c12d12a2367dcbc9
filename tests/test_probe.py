"""probe.py and `evaluate.py channels`: against the attention kernel, numpy, loops, and toys."""
import itertools
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from test_evaluate import fails, run, table, write_image

import augment
import data
import model
import probe
import runs
import ssl_
import synthetic
import train_ssl


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    return model.ViT(16, 2, 2, 8, 1, layerscale=0.5).eval()


def test_attention_is_the_softmax_of_the_last_block(monkeypatch):
    """Against the queries and keys that the forward pass itself hands to the attention kernel."""
    seen = []
    kernel = model.F.scaled_dot_product_attention
    monkeypatch.setattr(model.F, "scaled_dot_product_attention",
                        lambda q, k, v: seen.append((q, k)) or kernel(q, k, v))
    vit, x = tiny_vit(), torch.rand(2, 3, 24, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        tokens, attended = probe.backbone_attention(vit, x)
        q, k = seen[-1]
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)                    # (B, heads, T, T)
        torch.testing.assert_close(attended, weights[:, :, 0, 2:].view(2, 2, 3, 4))
        torch.testing.assert_close(tokens.cls, vit(x).cls)
    assert not vit.blocks[-1].attn._forward_pre_hooks


@pytest.mark.parametrize("feature", ["cls", "patches"])
def test_channels(tmp_path, feature):
    """Two equal channels agree wholly; the numbers are those of features computed here."""
    fields = tmp_path / "fields"
    fields.mkdir()
    rng = np.random.default_rng(0)
    stacks = []
    for number in range(4):
        a, b = rng.integers(0, 60000, (2, 48, 56)).astype(np.uint16)
        stacks.append(np.stack([a, b, a]))
        write_image(fields / f"f{number}.tif", stacks[-1], ["DNA", "ER", "copy"])
    model.save(tiny_vit(3), tmp_path / "vit.pt")
    config = dict(
        fields=str(fields), weights=str(tmp_path / "vit.pt"), size=32, feature=feature, shown=2
    )
    assert run("channels", tmp_path, **config) == 0
    folder = tmp_path / "runs/channels"
    vectors = []
    for stack in stacks:
        pixels = stack[:, 8:40, 12:44]
        x = torch.from_numpy(data.normalise(pixels, data.percentiles(pixels)))[:, None].repeat(
            1, 3, 1, 1
        )
        mean, std = (
            torch.tensor(v).view(3, 1, 1) for v in (model.Settings().mean, model.Settings().std)
        )
        with torch.inference_mode():
            tokens = tiny_vit(3)((x - mean) / std)
        vectors.append((tokens.cls if feature == "cls" else tokens.patches.mean(1)).numpy())
    expected = probe.channel_consistency(np.stack(vectors))
    content = json.loads((folder / "channels.json").read_text())
    assert content["channels"] == ["DNA", "ER", "copy"] and content["fields"] == 4
    for name in ("consistency", "control", "margin", "retrieval"):
        assert content[name] == pytest.approx(getattr(expected, name), abs=1e-5)
    assert content["margin"] == pytest.approx(content["consistency"] - content["control"])
    cosine, attention = table(folder / "cosine.tsv"), table(folder / "attention.tsv")
    assert [row["channel"] for row in cosine] == ["DNA", "ER", "copy"]
    assert cosine[0]["copy"] == attention[0]["copy"] == "1" and float(attention[0]["ER"]) < 0.9
    assert table(folder / "retrieval.tsv")[2]["DNA"] == "1"
    for name in ("channels", "attention", "heads", "pca"):
        pixels = data.read_image(folder / f"{name}.png").pixels
        assert pixels.shape[0] == 3 and len(np.unique(pixels)) > 20


def test_channels_of_synthetic_fields(tmp_path, capsys):
    config = dict(
        synthetic=2, size=64, dim=16, depth=1, heads=2, channels=["DNA", "er"], device="cpu"
    )
    content = []
    for seed in (0, 0, 1):
        assert run("channels", tmp_path, **config, seed=seed) == 0
        content.append(json.loads((tmp_path / "runs/channels/channels.json").read_text()))
    assert content[0]["channels"] == ["DNA", "ER"] and content[0] == content[1] != content[2]
    assert "Actin" not in synthetic.CHANNELS
    config["experiment"] = "refused"
    unknown = {**config, "channels": ["DNA", "Actin"]}
    assert "channels: no channel 'Actin'" in fails(capsys, "channels", tmp_path, **unknown)
    assert "expected a multiple of the patch" in fails(
        capsys, "channels", tmp_path, **{**config, "size": 60}
    )
    assert "no such folder" in fails(
        capsys, "channels", tmp_path, **{**config, "fields": "nowhere"}
    )
    assert "2 or more" in fails(capsys, "channels", tmp_path, **{**config, "limit": 1})
    assert "expected two or more" in fails(
        capsys, "channels", tmp_path, **{**config, "channels": ["DNA"]}
    )
    assert not (tmp_path / "runs/refused").exists()


def test_a_look_leaves_the_network_as_it_was():
    """Compiled or in training, it is seen at rest and plainly: the same tokens and attention."""
    vit, field = tiny_vit(), np.random.default_rng(0).random((3, 32, 24), np.float32)
    plain = probe.look_at_field(vit, field)
    assert plain.cls.shape == (3, 16) and plain.attention.shape == (3, 2, 4, 3)
    assert plain.attention.sum((2, 3)).max() < 1  # the rest goes to class and register tokens
    vit.train()
    vit.compile(backend="eager")
    vit(torch.rand(3, 3, 32, 24))  # compiled before the hook is there
    again = probe.look_at_field(vit, torch.from_numpy(field))
    assert vit.training and not vit.blocks[-1].attn._forward_pre_hooks
    for one, other in zip(plain, again, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


@pytest.mark.smoke
def test_attention_is_compared_as_correlation():
    """Pearson's correlation, so that a brighter map of the same shape is the same map."""
    rng = np.random.default_rng(0)
    maps = rng.random((5, 3, 4, 6))
    maps[:, 2] = 3 * maps[:, 0] + 1
    numbers, _, attention = probe.compare_backbones(rng.normal(size=(5, 3, 8)), maps)
    assert attention.cosine_matrix[0, 2] == pytest.approx(1)
    expected = np.mean([np.corrcoef(field.reshape(3, -1)) for field in maps], axis=0)
    np.testing.assert_allclose(attention.cosine_matrix, expected, atol=1e-12)
    pairs = [
        np.corrcoef(maps[0, i].ravel(), maps[0, j].ravel())[0, 1]
        for i, j in ((0, 1), (0, 2), (1, 2))
    ]
    assert probe.stain_agreement(maps[0]) == pytest.approx(np.mean(pairs))
    assert numbers["margin"] == pytest.approx(numbers["consistency"] - numbers["control"])


@pytest.mark.smoke
def test_components_are_principal_and_shared():
    """Red is the first component over all channels, as SVD has it; equal tokens, equal colours."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 12, 6)) * [9, 5, 3, 1, 1, 1]
    patches[1] = patches[0][::-1]
    colours = probe.token_colours(patches, 3)
    assert colours.shape == (2, 3, 4, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[1].reshape(12, 3), colours[0].reshape(12, 3)[::-1])
    x = patches.reshape(-1, 6) - patches.reshape(-1, 6).mean(0)
    axes = np.linalg.svd(x, full_matrices=False)[2][:3]
    for k in range(3):
        r = np.corrcoef(x @ axes[k], colours[..., k].ravel())[0, 1]
        assert abs(r) > 0.98
    assert not probe.token_colours(np.ones((2, 12, 6)), 3).any()


def test_fields_that_tell_nothing(tmp_path, capsys):
    """A channel without content, other channels than before, a single field: each says which."""
    fields = tmp_path / "fields"
    fields.mkdir()
    rng = np.random.default_rng(0)
    for number in range(2):
        pixels = rng.integers(0, 255, (2, 40, 40)).astype(np.uint8)
        write_image(fields / f"f{number}.tif", pixels, ["DNA", "ER"])
    config = dict(fields=str(fields), size=32, dim=16, depth=1, heads=2)
    flat = rng.integers(0, 255, (2, 40, 40)).astype(np.uint8)
    flat[1] = 7
    write_image(fields / "g.tif", flat, ["DNA", "ER"])
    assert "g: channel ER has no contrast in the pixels seen" in fails(
        capsys, "channels", tmp_path, **config)
    write_image(
        fields / "g.tif", rng.integers(0, 255, (2, 40, 40)).astype(np.uint8), ["DNA", "RNA"]
    )
    said = fails(capsys, "channels", tmp_path, **config)
    assert "g: channels DNA, RNA, the fields before have DNA, ER" in said
    write_image(fields / "g.tif", rng.integers(0, 255, (2, 30, 40)).astype(np.uint8), ["DNA", "ER"])
    assert "2 x 30 x 40 (channels, rows, columns)" in fails(capsys, "channels", tmp_path, **config)
    assert run("channels", tmp_path, **config, limit=2) == 0
    for name in ("f1", "g"):
        (fields / f"{name}.tif").unlink()
    assert "1 field with several channels" in fails(capsys, "channels", tmp_path, **config)


# ------------------------------------------------------------------------------ channel consistency

def test_channels_of_a_collapsed_network():
    """One feature for everything: consistent, and worth nothing."""
    result = probe.channel_consistency(np.random.default_rng(0).normal(size=7) * np.ones((4, 3, 7)))
    assert (result.consistency, result.control, result.margin) == pytest.approx((1, 1, 0))
    assert result.retrieval == 0


@pytest.mark.smoke
def test_channels_against_loops():
    rng = np.random.default_rng(1)
    # noise + what the channels share
    features = rng.normal(size=(6, 3, 5)) + rng.normal(size=(6, 1, 5))

    def cosine(f, i, g, j):
        a, b = features[f, i], features[g, j]
        return a @ b / math.sqrt((a @ a) * (b @ b))

    pairs, fields = list(itertools.permutations(range(3), 2)), range(6)
    within = [cosine(f, i, f, j) for f in fields for i, j in pairs]
    between = [cosine(f, i, g, j) for f, g in itertools.permutations(fields, 2) for i, j in pairs]
    found = {(i, j): np.mean([f == max(fields, key=lambda g: cosine(f, i, g, j)) for f in fields])
             for i, j in pairs}
    result = probe.channel_consistency(features)
    assert result.consistency == pytest.approx(np.mean(within))
    assert result.control == pytest.approx(np.mean(between))
    assert result.margin == pytest.approx(np.mean(within) - np.mean(between))
    assert result.retrieval == pytest.approx(np.mean(list(found.values())))
    for (i, j), share in found.items():
        assert result.retrieval_matrix[i, j] == pytest.approx(share)
        assert result.cosine_matrix[i, j] == pytest.approx(
            np.mean([cosine(f, i, f, j) for f in fields])
        )
    scaled = probe.channel_consistency(features * np.arange(1, 19).reshape(6, 3, 1))
    assert scaled.margin == pytest.approx(result.margin) and scaled.retrieval == result.retrieval


def test_channels_found_from_one_side_only():
    """Channel 0 tells the fields apart, channel 1 does not: neither finds the other."""
    features = np.stack([np.eye(4), np.ones((4, 4))], axis=1)  # (4, 2, 4)
    result = probe.channel_consistency(features)
    assert result.consistency == pytest.approx(0.5) == result.control and result.retrieval == 0
    # a channel finds itself where fields differ
    assert np.diag(result.retrieval_matrix).tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(1, 3, 4), (3, 1, 4), (3, 4)])
def test_channels_need_fields_and_channels(shape):
    with pytest.raises(ValueError, match="expected"):
        probe.channel_consistency(np.ones(shape))
    with pytest.raises(ValueError, match="zero or not finite"):
        probe.channel_consistency(np.zeros((2, 2, 2)))


# --------------------------------------------------------------------------------- windows held out

def test_windows_lie_side_by_side():
    field = np.arange(2 * 50 * 70, dtype=np.uint16).reshape(2, 50, 70)
    truth = np.arange(50 * 70).reshape(50, 70)
    windows = probe.cut_probe_windows([("a", field, truth), ("b", field + 1, truth)], 25, 9,
                                      ("x", "y"))
    assert len(windows.names) == 8 and windows.pixels.shape == (8, 2, 25, 25)
    # so that few windows show all fields
    assert windows.names[:4] == ["a 0,0", "b 0,0", "a 0,25", "b 0,25"]
    assert np.array_equal(windows.pixels[6], field[:, 25:, 25:50]) and np.array_equal(
        windows.labels[6], truth[25:, 25:50]
    )
    assert (
        probe.cut_probe_windows([("a", field, truth), ("b", field, truth)], 25, 3, ("x", "y")).names
        == windows.names[:3]
    )
    shown = probe.resampled_pairs(windows, 25)
    low, high = windows.limits[6, 0]
    assert np.allclose(
        shown[6, 0], ((field[0, 25:, 25:50] - low) / (high - low)).clip(0, 1), atol=1e-5
    )
    assert probe.resampled_pairs(windows, 10).shape == (8, 2, 10, 10)


def test_a_log_that_a_crash_cut_is_read_all_the_same(tmp_path):
    (tmp_path / "config.yaml").write_text("views: {strategy: single}\nseed: 3\n")
    (tmp_path / "log.jsonl").write_text(
        '{"step": 0, "retrieval": 0.25}\n{"step": 5, "retr\n{"step": 9, "retrieval": 0.5}\n'
    )
    assert [row[1:5] for row in probe.probe_run_rows(tmp_path)] == [
        ["single", "3", "0", "0.250"],
        ["single", "3", "9", "0.500"],
    ]


def test_background_knows_nothing_of_the_cells():
    """Bright cells on a slope: what is left is the slope, wherever the cells lay."""
    y, x = np.mgrid[:64, :64]
    truth = ((y - 30) ** 2 + (x - 34) ** 2 < 150).astype(int)
    slope = 10000 + 100 * x
    field = np.stack([slope, slope]).astype(np.uint16)
    bright = np.where(truth > 0, 60000, field).astype(np.uint16)
    limits = np.tile(np.array([0, 65535], np.float32), (2, 2, 1))
    windows = probe.Windows(
        ["a", "b"], np.stack([bright, field]), limits, np.stack([truth, truth]), ("x", "y")
    )
    left = probe.tiles_without_cells(windows, 64)
    assert np.allclose(left[0], left[1], atol=1e-6)
    assert np.abs(left[0, 0] - slope / 65535).max() < 0.02


def test_leaks_are_found_where_there_are_some():
    """Eight windows, each lit from another side in both channels; then even light alone."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:64, :64] / 64 - 0.5
    truth = np.zeros((8, 64, 64), int)
    for window in truth:
        top, left = rng.integers(8, 44, 2)
        window[top:top + 12, left:left + 12] = 1
    limits = np.tile(np.array([0, 65535], np.float32), (8, 2, 1))

    def pixels(angles, slope) -> float:
        light = np.stack([30000 + slope * (np.cos(a) * x + np.sin(a) * y) for a in angles])
        field = np.stack([light, light], 1) + rng.normal(0, 30, (8, 2, 64, 64))
        field[np.broadcast_to(truth[:, None] > 0, field.shape)] = 60000
        windows = probe.Windows(
            [str(i) for i in range(8)], field.astype(np.uint16), limits, truth, ("a", "b")
        )
        found = probe.metadata_leaks(model.ViT(24, 2, 2, 8, 1, layerscale=1.0), windows, 64)
        assert (
            found.keys() == {"background_retrieval", "background_pixels"}
            and 0 <= found["background_retrieval"] <= 1
        )
        return found["background_pixels"]
    torch.manual_seed(0)
    assert pixels(np.arange(8) * np.pi / 4, 20000) == 1.0
    assert pixels(np.zeros(8), 0) < 0.6


def test_attention_entropy():
    assert probe.attention_entropy(np.full((2, 3, 4, 5), 0.01)) == pytest.approx(1)
    one = np.zeros((1, 1, 4, 4))
    one[..., 0, 0] = 1
    assert probe.attention_entropy(one) == pytest.approx(0, abs=1e-6)


def test_windows_are_measured_as_fields_are():
    torch.manual_seed(0)
    vit = model.ViT(24, 2, 2, 8, 1, layerscale=1.0)
    rng = np.random.default_rng(0)
    windows = probe.cut_probe_windows(
        [(str(i), rng.integers(0, 9999, (3, 32, 32)).astype(np.uint16), None) for i in range(5)],
        32,
        5,
        ("a", "b", "c"),
    )
    alone = windows._replace(pixels=windows.pixels[:, :1].copy(), limits=windows.limits[:, :1],
                             channels=("a",))
    numbers, _ = probe.measure_backbone(vit, alone, 32)                 # nothing to compare
    assert "retrieval" not in numbers and numbers["effective_rank"] >= 1
    numbers, looks = probe.measure_backbone(vit, windows, 32)
    seen = [probe.look_at_field(vit, field) for field in probe.resampled_pairs(windows, 32)]
    expected, *_ = probe.compare_backbones(
        [look.cls for look in seen], [look.attention.mean(1) for look in seen]
    )
    assert {name: numbers[name] for name in expected} == pytest.approx(expected)
    flat = torch.from_numpy(np.concatenate([look.cls for look in seen]))
    assert (
        numbers["effective_rank"] == pytest.approx(ssl_.student_effective_rank(flat))
        and len(looks) == 2
    )
    assert probe.metadata_leaks(vit, windows, 32) == {}                      # no cells are known


def test_a_decoder_on_the_frozen_backbone_learns():
    torch.manual_seed(0)
    vit = model.ViT(24, 4, 2, 8, 1, layerscale=1.0)
    given = data.TrainingData(fields=6, field_size=96, field_cells=8, field_diameter=24)
    loaded = augment.load_resident(given, 0, "cpu", 4.0)[:2]
    few, more = (probe.train_probe(vit, *loaded, steps=steps, crop=48, batch=4)
                 for steps in (2, 80))
    assert more["probe_AP@0.5"] > few["probe_AP@0.5"] + 0.2
    assert more["probe_OP_CSB"] > few["probe_OP_CSB"] + 0.2


def test_the_probe_is_scored_on_labelled_images_that_it_did_not_see(tmp_path):
    """Whole groups of real images; cells are scaled to the width asked for."""
    for group in "abcde":
        for number in range(2):
            truth = np.zeros((64, 64), np.uint16)
            truth[8:24, 8:24], truth[40:56, 30:46] = 1, 2
            name = tmp_path / "set" / f"{group}_t{number}"
            name.parent.mkdir(exist_ok=True)
            tifffile.imwrite(f"{name}.tif", (200 * (truth > 0)).astype(np.uint8))
            tifffile.imwrite(f"{name}_masks.tif", truth)
    config = runs.from_dict(train_ssl.Config, {
        "data": {"fields": 4}, "output_base_dir": str(tmp_path), "measure": {
            "every": 1, "probe_every": 1, "probe_data": {
                "root": str(tmp_path), "sets": [{"path": "set"}], "share": 0.2,
                "diameter": 36}}}, "x")
    looker = probe.Looker(config, SimpleNamespace(rank=1), tmp_path / "x.pt")
    train, held = looker.labelled_images("cpu")
    assert len(train) == 8 and len({image.name.split("_t")[0] for image in held}) == 1
    assert held[0].zoom == pytest.approx(36 / data.median_diameter(truth), rel=0.1)
    vit = model.ViT(24, 4, 2, 8, 1, layerscale=1.0)
    assert set(probe.train_probe(vit, train, held, steps=2, crop=32, batch=2)) == {
        "probe_AP@0.5", "probe_AP@0.75", "probe_OP_CSB"}


def test_the_probe_leaves_the_backbone_and_the_random_state_alone(tmp_path):
    torch.manual_seed(0)
    vit = model.ViT(24, 4, 2, 8, 1, layerscale=1.0)
    before, state = {k: v.clone() for k, v in vit.state_dict().items()}, torch.get_rng_state()
    given = data.TrainingData(fields=3, field_size=64, field_cells=6, field_diameter=20)
    loaded = augment.load_resident(given, 0, "cpu", 4.0)[:2]
    found = probe.train_probe(vit, *loaded, steps=3, crop=32, batch=2)
    assert found == probe.train_probe(vit, *loaded, steps=3, crop=32, batch=2)
    assert (
        set(found) == {"probe_AP@0.5", "probe_AP@0.75", "probe_OP_CSB"}
        and 0 <= found["probe_AP@0.75"] <= found["probe_AP@0.5"] <= 1
    )
    assert all(torch.equal(v, before[k]) for k, v in vit.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state) and all(
        p.requires_grad for p in vit.parameters()
    )
