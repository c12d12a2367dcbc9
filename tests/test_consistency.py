"""consistency.py and `evaluate.py channels`: against the attention kernel, numpy, and numbers made here."""
import json

import numpy as np
import pytest
import torch

import consistency
import data
import metrics
import model
from test_evaluate import fails, run, table, write_image


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
        tokens, attended = consistency.with_attention(vit, x)
        q, k = seen[-1]
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)                    # (B, heads, T, T)
        torch.testing.assert_close(attended, weights[:, :, 0, 2:].view(2, 2, 3, 4))
        torch.testing.assert_close(tokens.cls, vit(x).cls)
    assert not vit.blocks[-1].attn._forward_pre_hooks


@pytest.mark.parametrize("feature", ["cls", "patches"])
def test_channels(tmp_path, feature):
    """Two equal channels agree wholly; the numbers are those of metrics on features computed here."""
    fields = tmp_path / "fields"
    fields.mkdir()
    rng = np.random.default_rng(0)
    stacks = []
    for number in range(4):
        a, b = rng.integers(0, 60000, (2, 48, 56)).astype(np.uint16)
        stacks.append(np.stack([a, b, a]))
        write_image(fields / f"f{number}.tif", stacks[-1], ["DNA", "ER", "copy"])
    model.save(tiny_vit(3), tmp_path / "vit.pt")
    config = dict(fields=str(fields), weights=str(tmp_path / "vit.pt"), size=32, feature=feature, shown=2)
    assert run("channels", tmp_path, **config) == 0
    folder = tmp_path / "runs/channels"
    vectors = []
    for stack in stacks:
        pixels = stack[:, 8:40, 12:44]
        x = torch.from_numpy(data.normalise(pixels, data.percentiles(pixels)))[:, None].repeat(1, 3, 1, 1)
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (model.Settings().mean, model.Settings().std))
        with torch.inference_mode():
            tokens = tiny_vit(3)((x - mean) / std)
        vectors.append((tokens.cls if feature == "cls" else tokens.patches.mean(1)).numpy())
    expected = metrics.channel_consistency(np.stack(vectors))
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


def test_channels_of_synthetic_fields_are_kept(tmp_path, monkeypatch, capsys):
    import synthetic
    seen = []
    look = consistency.with_attention
    monkeypatch.setattr(consistency, "with_attention", lambda *a: seen.append(1) or look(*a))
    config = dict(synthetic=2, size=64, dim=16, depth=1, heads=2, channels=["DNA", "er"], device="cpu")
    for expected in (2, 0):
        seen.clear()
        assert run("channels", tmp_path, **config) == 0 and len(seen) == expected
    assert run("channels", tmp_path, **{**config, "seed": 1}) == 0 and len(seen) == 2
    assert json.loads((tmp_path / "runs/channels/channels.json").read_text())["channels"] == ["DNA", "ER"]
    assert "Actin" not in synthetic.CHANNELS
    unknown = {**config, "channels": ["DNA", "Actin"]}
    assert "channels: 'actin'" in fails(capsys, "channels", tmp_path, **unknown)
    assert "expected a multiple of the patch" in fails(capsys, "channels", tmp_path, **{**config, "size": 60})
    assert "no such folder" in fails(capsys, "channels", tmp_path, **{**config, "fields": "nowhere"})
    assert "two fields or more" in fails(capsys, "channels", tmp_path, **{**config, "limit": 1})
    assert "expected two or more" in fails(capsys, "channels", tmp_path, **{**config, "channels": ["DNA"]})


def test_a_look_leaves_the_network_as_it_was():
    """Compiled or in training, it is seen at rest and plainly: the same tokens, the same attention."""
    vit, field = tiny_vit(), np.random.default_rng(0).random((3, 32, 24), np.float32)
    plain = consistency.look(vit, field)
    assert plain.cls.shape == (3, 16) and plain.attention.shape == (3, 2, 4, 3)
    assert plain.attention.sum((2, 3)).max() < 1                # the rest goes to class and register tokens
    vit.rope_jitter = 2.0
    vit.train()
    vit.compile(backend="eager")
    vit(torch.rand(3, 3, 32, 24))                                    # compiled before the hook is there
    again = consistency.look(vit, torch.from_numpy(field))
    assert vit.training and not vit.blocks[-1].attn._forward_pre_hooks
    for one, other in zip(plain, again):
        np.testing.assert_allclose(one, other, atol=1e-6)
    np.testing.assert_allclose(plain.feature("patches"), plain.patches.mean(1))


def test_attention_is_compared_as_correlation():
    """Pearson's correlation, so that a brighter map of the same shape is the same map."""
    rng = np.random.default_rng(0)
    maps = rng.random((5, 3, 4, 6))
    maps[:, 2] = 3 * maps[:, 0] + 1
    found = consistency.compare(rng.normal(size=(5, 3, 8)), maps)
    assert found.attention.cosine_matrix[0, 2] == pytest.approx(1)
    expected = np.mean([np.corrcoef(field.reshape(3, -1)) for field in maps], axis=0)
    np.testing.assert_allclose(found.attention.cosine_matrix, expected, atol=1e-12)
    pairs = [np.corrcoef(maps[0, i].ravel(), maps[0, j].ravel())[0, 1] for i, j in ((0, 1), (0, 2), (1, 2))]
    assert consistency.agreement(maps[0]) == pytest.approx(np.mean(pairs))
    numbers = found.numbers()
    assert numbers["margin"] == pytest.approx(numbers["consistency"] - numbers["control"])


def test_components_are_principal_and_shared():
    """Red is the first component over all channels together, as SVD has it; equal tokens, equal colours."""
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(2, 12, 6)) * [9, 5, 3, 1, 1, 1]
    patches[1] = patches[0][::-1]
    colours = consistency.components(patches, 3)
    assert colours.shape == (2, 3, 4, 3) and colours.dtype == np.uint8
    np.testing.assert_array_equal(colours[1].reshape(12, 3), colours[0].reshape(12, 3)[::-1])
    x = patches.reshape(-1, 6) - patches.reshape(-1, 6).mean(0)
    axes = np.linalg.svd(x, full_matrices=False)[2][:3]
    for k in range(3):
        r = np.corrcoef(x @ axes[k], colours[..., k].ravel())[0, 1]
        assert abs(r) > 0.98
    assert not consistency.components(np.ones((2, 12, 6)), 3).any()


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
    assert "g: channel ER is 7 in every pixel seen" in fails(capsys, "channels", tmp_path, **config)
    write_image(fields / "g.tif", rng.integers(0, 255, (2, 40, 40)).astype(np.uint8), ["DNA", "RNA"])
    said = fails(capsys, "channels", tmp_path, **config)
    assert "g: channels DNA, RNA, the fields before have DNA, ER" in said
    write_image(fields / "g.tif", rng.integers(0, 255, (2, 30, 40)).astype(np.uint8), ["DNA", "ER"])
    assert "2 x 30 x 40 (channels, rows, columns)" in fails(capsys, "channels", tmp_path, **config)
    assert run("channels", tmp_path, **config, limit=2) == 0
    for name in ("f1", "g"):
        (fields / f"{name}.tif").unlink()
    assert "1 field with several channels" in fails(capsys, "channels", tmp_path, **config)
