"""A small vision transformer, written as timm and as torchvision write theirs, and random tiles for it."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.tiles import TileGrid

Tensor = torch.Tensor
WIDTH, HEADS = 24, 3


class Attention(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH, bias=bias), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.35).transpose(1, 2).reshape(b, n, -1))


class Mlp(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(WIDTH, 40), nn.GELU(), nn.Linear(40, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.dropout(self.act(self.fc1(x)), 0.1, self.training))


class Block(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = Attention(bias), Mlp(bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    def __init__(self, *, blocks: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.position = nn.Parameter(torch.randn(1, 5, WIDTH) * 0.1)
        self.blocks = nn.Sequential(*[Block(bias) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class SpelledOut(VisionTransformer):
    """Its forward has a size in it that a cut changes, so that what is cut is a program."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).reshape(x.shape[0], WIDTH, 4).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


IMAGES = torch.randn(2, 3, 8, 8)


def random_tiles(grids: dict[str, TileGrid], seed: int, density: float = 0.5) -> dict[str, KeptTiles]:
    """Each tile stays with one probability."""
    dice = np.random.default_rng(seed)
    return {name: KeptTiles.of(grid, dice.random(grid.shape) < density) for name, grid in grids.items()}
