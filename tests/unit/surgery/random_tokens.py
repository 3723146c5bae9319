"""Steps on tokens for random networks: attention in many spellings, and what lies around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from random_images import Dice, Scale, Step, Tensor, activation
from torch import nn

Made = tuple[Step, int, int]
"""A step, the width and the number of tokens after it."""


# Ways to attend: from queries [b, heads, n, d], keys and values [b, key heads, n, d] to [b, heads, n, d]


def _native(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=k.shape[1] != q.shape[1])


def _repeated(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return torch.softmax(torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)), dim=-1) @ v


def _expanded(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, n, d = k.shape
    k, v = (t[:, :, None].expand(b, heads, q.shape[1] // heads, n, d).reshape(b, -1, n, d) for t in (k, v))
    return (q @ k.mT * 0.4).softmax(-1) @ v


def _beside_batch(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, heads, n, d = q.shape
    k, v = (t.repeat_interleave(heads // t.shape[1], dim=1) for t in (k, v))
    q, k, v = (t.reshape(b * heads, n, d) for t in (q, k, v))
    return torch.bmm((torch.bmm(q, k.transpose(1, 2)) * 0.3).softmax(-1), v).view(b, heads, n, d)


def _talking(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    weights = s.talk((q @ k.transpose(-1, -2) * 0.4).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return weights.softmax(-1) @ v


def _biased(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    n = q.shape[2]
    index = torch.arange(n)[:, None] - torch.arange(n) + n - 1
    bias = s.table.weight[index.view(-1)].view(n, n, -1).permute(2, 0, 1)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None])


def _rotated(s: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    def rotate(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * 0.8 + torch.cat([-x[..., half:], x[..., :half]], dim=-1) * 0.6

    return _native(s, rotate(q), rotate(k), v)


def _attention(dice: Dice, w: int, n: int) -> Made:
    shared = dice.choice([1, 1, 2])
    key_heads = dice.choice([1, 2, 3])
    heads, d = shared * key_heads, dice.choice([2, 4])
    attend = dice.choice([_native, _repeated, _expanded, _beside_batch, _talking, _biased, _rotated])
    residual = dice.random() < 0.6
    outputs = w if residual else dice.choice([6, 8])

    def separate(s: Any, x: Tensor) -> Tensor:
        b = x.shape[0]
        q = s.q(x).view(b, n, heads, d).transpose(1, 2)
        k, v = (layer(x).view(b, n, key_heads, d).transpose(1, 2) for layer in (s.k, s.v))
        return finished(s, x, q, k, v)

    def fused(s: Any, x: Tensor) -> Tensor:
        q, k, v = s.qkv(x).reshape(x.shape[0], n, 3, heads, d).permute(2, 0, 3, 1, 4).unbind(0)
        return finished(s, x, q, k, v)

    def pieces(s: Any, x: Tensor) -> Tensor:
        parts = s.qkv(x).split([heads * d, key_heads * d, key_heads * d], dim=-1)
        q, k, v = (part.unflatten(-1, (-1, d)).transpose(1, 2) for part in parts)
        return finished(s, x, q, k, v)

    def finished(s: Any, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y = s.proj(attend(s, q, k, v).transpose(1, 2).reshape(x.shape[0], n, heads * d))
        return x + y if residual else y

    layers: dict[str, nn.Module] = {"proj": nn.Linear(heads * d, outputs)}
    if attend is _talking:
        layers["talk"] = nn.Linear(heads, heads)
    if attend is _biased:
        layers["table"] = nn.Embedding(2 * n - 1, heads)
    spelling = dice.choice([separate, pieces, *([fused] if shared == 1 else [])])
    if spelling is separate:
        layers |= {"q": nn.Linear(w, heads * d), "k": nn.Linear(w, key_heads * d), "v": nn.Linear(w, key_heads * d)}
    else:
        layers["qkv"] = nn.Linear(w, (heads + 2 * key_heads) * d, bias=dice.random() < 0.7)
    return Step(spelling, **layers), outputs, n


# Other steps


def _mlp(dice: Dice, w: int, n: int) -> Made:
    act = dice.choice([F.gelu, F.relu, F.silu])
    return Step(lambda s, x: x + s.b(act(s.a(x))), a=nn.Linear(w, 10), b=nn.Linear(10, w)), w, n


def _gated(dice: Dice, w: int, n: int) -> Made:
    def halves(s: Any, x: Tensor) -> Tensor:
        a, b = s.wide(x).chunk(2, dim=-1)
        return s.down(a * F.gelu(b))

    if dice.random() < 0.5:
        return Step(halves, wide=nn.Linear(w, 20), down=nn.Linear(10, w)), w, n
    layers = {"a": nn.Linear(w, 10), "b": nn.Linear(w, 10), "down": nn.Linear(10, w)}
    return Step(lambda s, x: x + s.down(F.silu(s.a(x)) * s.b(x)), **layers), w, n


def _norm(dice: Dice, w: int, n: int) -> Made:
    def hand_written(s: Any, x: Tensor) -> Tensor:
        return s.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def of_batch(s: Any, x: Tensor) -> Tensor:
        return s.a(x.transpose(1, 2)).transpose(1, 2)

    if (kind := dice.randrange(4)) == 0:
        return Step(hand_written, a=Scale(w)), w, n
    if kind == 1:
        return Step(of_batch, a=nn.BatchNorm1d(w)), w, n
    return Step(lambda s, x: s.a(x), a=nn.LayerNorm(w) if kind == 2 else nn.RMSNorm(w)), w, n


def _mix(dice: Dice, w: int, n: int) -> Made:
    """Channels pass through layers that run over the tokens."""
    layers = {"a": nn.Linear(n, 6), "b": nn.Linear(6, n)}
    return Step(lambda s, x: x + s.b(s.a(x.transpose(1, 2)).relu()).transpose(1, 2), **layers), w, n


def _slide(dice: Dice, w: int, n: int) -> Made:
    layer = nn.Conv1d(w, w, 3, padding=1, groups=dice.choice([1, w]))
    return Step(lambda s, x: s.a(x.transpose(1, 2)).transpose(1, 2), a=layer), w, n


def _class_token(dice: Dice, w: int, n: int) -> Made:
    token = nn.Embedding(1, w)
    return Step(lambda s, x: torch.cat([s.a.weight[None].expand(x.shape[0], -1, -1), x], 1), a=token), w, n + 1


def _positions(dice: Dice, w: int, n: int) -> Made:
    return Step(lambda s, x: x + s.a.weight, a=nn.Embedding(n, w)), w, n


def _merge(dice: Dice, w: int, n: int) -> Made:
    if n % 2:
        return Step(lambda s, x: x[:, 1:]), w, n - 1
    return Step(lambda s, x: s.a(x.reshape(x.shape[0], n // 2, 2 * w)), a=nn.Linear(2 * w, 8)), 8, n // 2


def _regroup(dice: Dice, w: int, n: int) -> Made:
    parts = dice.choice([size for size in (1, 2, 3, 4) if w % size == 0])
    return Step(lambda s, x: x.view(x.shape[0], n, parts, w // parts).transpose(2, 3).flatten(2)), w, n


def _softmax(dice: Dice, w: int, n: int) -> Made:
    axis = dice.choice([1, 2])
    return Step(lambda s, x: x * s.a(x).softmax(axis), a=nn.Linear(w, w)), w, n


def _pooled_gate(dice: Dice, w: int, n: int) -> Made:
    return Step(lambda s, x: x * s.a(x.mean(1, keepdim=True)).sigmoid(), a=nn.Linear(w, w)), w, n


def _shared(dice: Dice, w: int, n: int) -> Made:
    return Step(lambda s, x: s.a(s.b(s.a(x))), a=nn.Linear(w, w), b=activation(dice, 1)), w, n


def _concat(dice: Dice, w: int, n: int) -> Made:
    return Step(lambda s, x: torch.cat([s.a(x), x, x], -1), a=nn.Linear(w, 4)), 2 * w + 4, n


TOKEN: dict[str, Callable[[Dice, int, int], Made]] = {
    function.__name__.strip("_"): function
    for function in (
        _attention, _mlp, _gated, _norm, _mix, _slide, _class_token, _positions, _merge, _regroup, _softmax,
        _pooled_gate, _shared, _concat,
    )
}  # fmt: skip
