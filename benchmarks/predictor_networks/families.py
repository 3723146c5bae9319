"""Five families of networks, two of each: plain definitions with random weights, sized for some milliseconds on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, act: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU()) if act else nn.Sequential(*layers)


def _classifier(features: Sequence[nn.Module], channels: int) -> nn.Sequential:
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 100))


class _Residual(nn.Module):
    """He et al., "Deep Residual Learning", 2016, figure 5 left."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, act=False))
        plain = stride == 1 and inputs == outputs
        self.shortcut: nn.Module = nn.Identity() if plain else _conv(inputs, outputs, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def _resnet(blocks: Sequence[int], widths: Sequence[int]) -> nn.Module:
    features: list[nn.Module] = [_conv(3, widths[0], 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        for index in range(count):
            features.append(_Residual(channels, width, 2 if stage and not index else 1))
            channels = width
    return _classifier(features, channels)


class _Bottleneck(nn.Module):
    """He et al., 2016, figure 5 right."""

    def __init__(self, inputs: int, inner: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _conv(inputs, inner, 1), _conv(inner, inner, 3, stride), _conv(inner, 4 * inner, 1, act=False)
        )
        plain = stride == 1 and inputs == 4 * inner
        self.shortcut: nn.Module = nn.Identity() if plain else _conv(inputs, 4 * inner, 1, stride, act=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> tuple[nn.Module, Tensor]:
    """ResNet-50 in eval form and its example input at batch 1, shape (1, 3, 96, 96); He et al., 2016, table 1."""
    torch.manual_seed(0)
    features: list[nn.Module] = [_conv(3, 64, 7, 2), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for index in range(count):
            features.append(_Bottleneck(channels, 64 * 2**stage, 2 if stage and not index else 1))
            channels = 256 * 2**stage
    return _classifier(features, channels).eval(), torch.randn(1, 3, _SIZE, _SIZE)


def cifar_resnet56() -> tuple[nn.Module, Tensor]:
    """ResNet-56 for 32x32 images in eval form, and its example input, shape (1, 3, 32, 32); He et al., 2016, section 4.2."""
    return _cifar_resnet(9)


def cifar_resnet20() -> tuple[nn.Module, Tensor]:
    """ResNet-20, otherwise as `cifar_resnet56`."""
    return _cifar_resnet(3)


def _cifar_resnet(blocks: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    features: list[nn.Module] = [_conv(3, 16)]
    channels = 16
    for stage in range(3):
        for index in range(blocks):
            features.append(_Residual(channels, 16 * 2**stage, 2 if stage and not index else 1))
            channels = 16 * 2**stage
    return _classifier(features, channels).eval(), torch.randn(1, 3, 32, 32)


class _Squeezed(nn.Module):
    """Tan and Le, "EfficientNet", 2019: an inverted residual with squeeze and excitation."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        self.expand = nn.Sequential(nn.Conv2d(inputs, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.SiLU())
        self.depthwise = nn.Sequential(
            nn.Conv2d(inner, inner, kernel, stride, kernel // 2, groups=inner, bias=False),
            nn.BatchNorm2d(inner),
            nn.SiLU(),
        )
        self.squeeze, self.excite = nn.Conv2d(inner, max(1, inputs // 4), 1), nn.Conv2d(max(1, inputs // 4), inner, 1)
        self.project = _conv(inner, outputs, 1, act=False)
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.depthwise(self.expand(x))
        y = y * torch.sigmoid(self.excite(nn.functional.silu(self.squeeze(y.mean((2, 3), keepdim=True)))))
        projected: Tensor = self.project(y)
        return x + projected if self.adds else projected


def efficientnet() -> tuple[nn.Module, Tensor]:
    """A network like EfficientNet-B0 without its last stage, in eval form, and its input, shape (1, 3, 96, 96)."""
    torch.manual_seed(0)
    features: list[nn.Module] = [_conv(3, 32, 3, 2)]
    channels = 32
    plan = (
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 3, 2, 5),
    )
    for expand, outputs, count, stride, kernel in plan:
        for index in range(count):
            features.append(_Squeezed(channels, outputs, kernel, stride if not index else 1, expand))
            channels = outputs
    return _classifier([*features, _conv(channels, 640, 1)], 640).eval(), torch.randn(1, 3, _SIZE, _SIZE)


class _Inverted(nn.Module):
    """Sandler et al., "MobileNetV2", 2018, figure 4."""

    def __init__(self, inputs: int, outputs: int, stride: int, expand: int) -> None:
        super().__init__()
        inner = inputs * expand
        first = [] if expand == 1 else [_conv(inputs, inner, 1)]
        self.body = nn.Sequential(*first, _conv(inner, inner, 3, stride, inner), _conv(inner, outputs, 1, act=False))
        self.adds = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.body(x)
        return x + y if self.adds else y


def _mobilenet(scale: float, expand: int) -> nn.Module:
    def width(channels: int) -> int:
        return int(channels * scale / 8 + 0.5) * 8

    features: list[nn.Module] = [_conv(3, width(32), 3, 2), _Inverted(width(32), width(16), 1, 1)]
    channels = width(16)
    for outputs, count, stride in ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2)):
        for index in range(count):
            features.append(_Inverted(channels, width(outputs), stride if not index else 1, expand))
            channels = width(outputs)
    return _classifier([*features, _conv(channels, 640, 1)], 640)


def _vgg(plan: Sequence[Sequence[int]]) -> nn.Module:
    """Simonyan and Zisserman, 2015, with batch norm."""
    features: list[nn.Module] = []
    channels = 3
    for stage in plan:
        for width in stage:
            features.append(_conv(channels, width))
            channels = width
        features.append(nn.MaxPool2d(2))
    return _classifier(features, channels)


class _Dense(nn.Module):
    """Huang et al., "Densely Connected Convolutional Networks", 2017, section 3 (DenseNet-B)."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            _conv(inputs, 4 * growth, 1),
            nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.body(x)], 1)


def _densenet(blocks: Sequence[int], growth: int) -> nn.Module:
    channels = 2 * growth
    features: list[nn.Module] = [_conv(3, channels, 7, 2), nn.MaxPool2d(3, 2, 1)]
    for stage, count in enumerate(blocks):
        for _ in range(count):
            features.append(_Dense(channels, growth))
            channels += growth
        if stage < len(blocks) - 1:
            features += [_conv(channels, channels // 2, 1), nn.AvgPool2d(2)]
            channels //= 2
    return _classifier(features, channels)


class _Attention(nn.Module):
    """Vaswani et al., 2017, section 3.2.2, with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        projected: Tensor = self.proj(y.transpose(1, 2).flatten(2))
        return projected


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), _Attention(width, heads), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        y: Tensor = x + self.mlp(self.norm2(x))
        return y


class _Vit(nn.Module):
    """Dosovitskiy et al., 2021, with a mean in place of the class token."""

    def __init__(self, width: int, heads: int, depth: int, size: int) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.position = nn.Parameter(torch.randn(1, (size // 16) ** 2, width) * 0.02)
        self.layers = nn.Sequential(*(_Layer(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 100)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.layers(tokens)).mean(1))
        return logits


_SIZE = 96

FAMILIES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "resnet": (lambda: _resnet((2, 2, 2, 2), (64, 128, 256, 320)), lambda: _resnet((3, 4, 3), (48, 96, 192))),
    "mobilenetv2": (lambda: _mobilenet(1.0, 6), lambda: _mobilenet(0.75, 4)),
    "vgg": (
        lambda: _vgg(((48, 48), (96, 96), (160, 160), (256, 256))),
        lambda: _vgg(((32,), (64, 64), (128, 128, 128), (256, 256))),
    ),
    "densenet": (lambda: _densenet((4, 8, 12), 32), lambda: _densenet((6, 6, 8, 6), 24)),
    "vit": (lambda: _Vit(192, 6, 6, _SIZE), lambda: _Vit(256, 4, 4, _SIZE)),
}
"""Family to the network that is profiled from nothing, and a second one that shares its kinds of kernels."""


def build(family: str, second: bool = False) -> tuple[nn.Module, Tensor]:
    """A network in eval form and its example input at batch 1, shape (1, 3, 96, 96)."""
    torch.manual_seed(0)
    return FAMILIES[family][second]().eval(), torch.randn(1, 3, _SIZE, _SIZE)
