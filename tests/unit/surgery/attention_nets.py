"""Attention as people write it: one small network per spelling, the rest of it always the same."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

HEADS, DIMENSION, WIDTH, TOKENS, INPUTS = 4, 6, 24, 9, 5

Tensor = torch.Tensor


class Encoder(nn.Module):
    """A residual attention between an embedding and a classifier."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(INPUTS, WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.dropout = attention, nn.Dropout(0.1)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.dropout(self.attention(self.norm(x), *more))
        return self.head(x.mean(1))


class Fused(nn.Module):
    """One layer for queries, keys and values, as in timm."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = DIMENSION**-0.5

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        weights = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class FusedIndexed(Fused):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, 3, HEADS, DIMENSION).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FusedHeadsFirst(Fused):
    """Channels are ordered by head, and query, key and value lie next to each other within one."""

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).view(b, n, HEADS, 3 * DIMENSION).transpose(1, 2)
        q, k, v = qkv.chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class FusedChunk(Fused):
    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (t.view(b, n, HEADS, -1).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, -1))


class Separate(nn.Module):
    """Three layers; what happens between them is up to `attend`."""

    key_heads = HEADS

    def __init__(self) -> None:
        super().__init__()
        self.q, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, self.key_heads * DIMENSION) for _ in range(2))

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).view(b, n, HEADS, DIMENSION).transpose(1, 2)
        k, v = (layer(x).view(b, n, self.key_heads, DIMENSION).transpose(1, 2) for layer in (self.k, self.v))
        return self.proj(self.attend(q, k, v, *more).transpose(1, 2).reshape(b, n, HEADS * DIMENSION))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class HandWritten(Separate):
    """The scale is computed from a size that a cut changes."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)), dim=-1) @ v


class Relying(Separate):
    """Nothing is spelled out: sizes follow from those of the layers."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, DIMENSION)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))


class Additive(Separate):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])


class AdditiveHandWritten(Separate):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        return (q @ k.transpose(-1, -2) * 0.4 + mask[:, None]).softmax(-1) @ v


class Causal(Separate):
    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)


class CausalHandWritten(Separate):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("later", torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(self.later, float("-inf"))
        return scores.softmax(-1) @ v


class MultiQuery(Separate):
    key_heads = 1

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v


class GroupedExpand(Separate):
    """As in Llama."""

    key_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, heads, n, d = k.shape
        k, v = (t[:, :, None].expand(b, heads, HEADS // heads, n, d).reshape(b, HEADS, n, d) for t in (k, v))
        return (q @ k.transpose(-1, -2) * 0.4).softmax(-1) @ v


class GroupedRepeat(Separate):
    key_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
        return F.scaled_dot_product_attention(q, k, v)


class GroupedNative(Separate):
    key_heads = 2

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


class Cross(nn.Module):
    """Keys and values come from another sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(WIDTH, WIDTH), nn.Linear(7, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(x).reshape(b, n, HEADS, DIMENSION).transpose(1, 2)
        k, v = self.kv(context).reshape(b, -1, 2, HEADS, DIMENSION).permute(2, 0, 3, 1, 4)
        return self.proj((torch.softmax(q @ k.mT * 0.4, -1) @ v).transpose(1, 2).reshape(b, n, WIDTH))


class Rotary(Separate):
    """The second half of a head is the imaginary part of the first, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.arange(TOKENS)[:, None] * torch.logspace(0, -2, DIMENSION // 2)
        self.register_buffer("cos", torch.cat([angles.cos(), angles.cos()], -1), persistent=False)
        self.register_buffer("sin", torch.cat([angles.sin(), angles.sin()], -1), persistent=False)

    def rotated(self, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * self.cos + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * self.sin

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.rotated(q), self.rotated(k), v)


class RotaryInterleaved(Rotary):
    """Real and imaginary parts alternate, as in GPT-J."""

    def rotated(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[:, : x.shape[-1] // 2], self.sin[:, : x.shape[-1] // 2]
        even, odd = x[..., ::2], x[..., 1::2]
        return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class RelativeBias(Separate):
    """A table of one number per distance and head, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * TOKENS - 1, HEADS))
        index = torch.arange(TOKENS)[:, None] - torch.arange(TOKENS) + TOKENS - 1
        self.register_buffer("index", index)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        bias = self.table[self.index.view(-1)].view(TOKENS, TOKENS, -1).permute(2, 0, 1).contiguous()
        return (q @ k.transpose(-2, -1) * 0.4 + bias.unsqueeze(0)).softmax(-1) @ v


class TalkingHeads(Separate):
    """Heads are mixed before and after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(HEADS, HEADS), nn.Linear(HEADS, HEADS)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.before((q @ k.transpose(-2, -1) * 0.4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        weights = self.after(scores.softmax(-1).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return weights @ v


class BesideBatch(Separate):
    """Heads lie beside the batch, as in torch's own and fairseq's attention."""

    def forward(self, x: Tensor, *more: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).view(b, n, HEADS, DIMENSION).transpose(1, 2).reshape(b * HEADS, n, DIMENSION)
            for layer in (self.q, self.k, self.v)
        )
        weights = torch.bmm(q * 0.4, k.transpose(1, 2)).softmax(-1)
        y = torch.bmm(weights, v).view(b, HEADS, n, DIMENSION).transpose(1, 2)
        return self.proj(y.reshape(b, n, WIDTH))


class QueryNorm(Separate):
    """Queries and keys are normalized over the head dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.q_norm, self.k_norm = nn.LayerNorm(DIMENSION), nn.RMSNorm(DIMENSION)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)


class TorchBatchFirst(nn.Module):
    """``torch.nn.MultiheadAttention``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, x, x, need_weights=False)[0]


class TorchSequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(WIDTH, HEADS)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return self.inner(x, x, x)[0].transpose(0, 1)


class TorchLayer(nn.Module):
    """``torch.nn.TransformerEncoderLayer``."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(INPUTS, WIDTH)
        self.layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 32, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(self.embed(x)).mean(1))


SPELLINGS = (
    Fused, FusedIndexed, FusedHeadsFirst, FusedChunk, Separate, HandWritten, Relying, Additive, AdditiveHandWritten,
    Causal, CausalHandWritten, MultiQuery, GroupedExpand, GroupedRepeat, GroupedNative, Cross, Rotary,
    RotaryInterleaved, RelativeBias, TalkingHeads, BesideBatch, QueryNorm, TorchBatchFirst, TorchSequenceFirst,
)  # fmt: skip


NAMES = [*(spelling.__name__ for spelling in SPELLINGS), "TorchLayer"]


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network and example inputs for it."""
    x = torch.randn(2, TOKENS, INPUTS)
    if name == "TorchLayer":
        return TorchLayer(), (x,)
    more = {
        "Cross": (torch.randn(2, 4, 7),),
        "Additive": (torch.randn(2, TOKENS, TOKENS),),
        "AdditiveHandWritten": (torch.randn(2, TOKENS, TOKENS),),
    }.get(name, ())
    found = {spelling.__name__: spelling for spelling in SPELLINGS}[name]
    return Encoder(found()), (x, *more)
