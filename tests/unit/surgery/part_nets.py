"""Parts around attention as people write them: windows, merged patches, gated layers, norms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

HEADS, DIMENSION, WIDTH, SIDE, WINDOW = 4, 6, 24, 4, 2

Tensor = torch.Tensor


def partition(x: Tensor) -> Tensor:
    """[b, side, side, c] to [b * windows, window * window, c]."""
    b, h, w, c = x.shape
    x = x.view(b, h // WINDOW, WINDOW, w // WINDOW, WINDOW, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, WINDOW * WINDOW, c)


def reverse(windows: Tensor, side: int) -> Tensor:
    b = windows.shape[0] // (side // WINDOW) ** 2
    x = windows.view(b, side // WINDOW, side // WINDOW, WINDOW, WINDOW, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, side, side, -1)


class WindowAttention(nn.Module):
    """Attention in windows with a bias from a table, and a mask that keeps shifted windows apart, as in Swin."""

    def __init__(self) -> None:
        super().__init__()
        tokens = WINDOW * WINDOW
        self.table = nn.Parameter(torch.randn((2 * WINDOW - 1) ** 2, HEADS))
        places = torch.stack(torch.meshgrid(torch.arange(WINDOW), torch.arange(WINDOW), indexing="ij")).flatten(1)
        apart = (places[:, :, None] - places[:, None]).permute(1, 2, 0) + WINDOW - 1
        self.register_buffer("index", apart[..., 0] * (2 * WINDOW - 1) + apart[..., 1])
        self.register_buffer("mask", torch.randint(0, 2, ((SIDE // WINDOW) ** 2, tokens, tokens)) * -100.0)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q * DIMENSION**-0.5) @ k.transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        scores = scores + bias.unsqueeze(0)
        windows = self.mask.shape[0]
        scores = scores.view(b // windows, windows, HEADS, n, n) + self.mask[None, :, None]
        weights = scores.view(-1, HEADS, n, n).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, c))


class Windowed(nn.Module):
    """A cyclic shift around attention in windows, then merged patches."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, WIDTH, 2, 2)
        self.norm1, self.attention = nn.LayerNorm(WIDTH), WindowAttention()
        self.norm2 = nn.LayerNorm(4 * WIDTH)
        self.reduction = nn.Linear(4 * WIDTH, 2 * WIDTH, bias=False)
        self.head = nn.Linear(2 * WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x).permute(0, 2, 3, 1)
        y = torch.roll(self.norm1(x), shifts=(-1, -1), dims=(1, 2))
        y = reverse(self.attention(partition(y)), SIDE)
        x = x + torch.roll(y, shifts=(1, 1), dims=(1, 2))
        x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        return self.head(self.reduction(self.norm2(x)).mean((1, 2)))


class HandWrittenRms(nn.Module):
    """The mean runs over channels that a cut removes."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class SwiGlu(nn.Module):
    """Two layers whose results multiply, between norms without a mean, as in Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, WIDTH)
        self.norm, self.last = HandWrittenRms(WIDTH), nn.RMSNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, 32, bias=False), nn.Linear(WIDTH, 32, bias=False)
        self.down = nn.Linear(32, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y = self.norm(x)
        x = x + self.down(F.silu(self.gate(y)) * self.up(y))
        return self.head(self.last(x).mean(1))


class FusedGlu(nn.Module):
    """Both halves of a gated layer come from one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide = nn.Linear(5, WIDTH), nn.Linear(WIDTH, 2 * 20)
        self.down, self.gated = nn.Linear(20, 16), nn.Linear(16, 2 * 10)
        self.head = nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.wide(self.embed(x).tanh()).chunk(2, dim=-1)
        return self.head(F.glu(self.gated(self.down(a * F.gelu(b))), dim=-1).mean(1))


class ConvParts(nn.Module):
    """Group norm, one slope per channel, squeeze and excitation, a layer norm over channels that come second."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.act = nn.PReLU(16)
        self.squeeze, self.excite = nn.Conv2d(16, 4, 1), nn.Conv2d(4, 16, 1)
        self.next, self.single = nn.Conv2d(16, 12, 1), nn.GroupNorm(1, 12)
        self.channels = nn.LayerNorm(12)
        self.head = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.stem(x)))
        x = x * self.excite(self.squeeze(F.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        x = self.single(self.next(x)).relu()
        return self.head(self.channels(x.permute(0, 2, 3, 1)).mean((1, 2)))


NAMES = ["Windowed", "SwiGlu", "FusedGlu", "ConvParts"]


def build(name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """A network and example inputs for it."""
    found: dict[str, type[nn.Module]] = {
        "Windowed": Windowed, "SwiGlu": SwiGlu, "FusedGlu": FusedGlu, "ConvParts": ConvParts,
    }  # fmt: skip
    image = name in ("Windowed", "ConvParts")
    return found[name](), (torch.randn(2, 3, 8, 8) if image else torch.randn(2, 6, 5),)
