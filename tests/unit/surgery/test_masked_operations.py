"""Operations that run over an axis, pad it or read it by an equation: the cut model equals the masked one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.surgery import masked_math
from edgeprune.surgery.checking import check
from edgeprune.surgery.plan import uniform_plan

C, H = 8, 6
Middle = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Around(nn.Module):
    """A convolution, something in the middle, and a layer that reads all of the result's last axis."""

    def __init__(self, middle: Middle, layer: nn.Module, width: int) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Conv2d(3, C, 1), layer, nn.Linear(width, 2)
        self.middle = middle

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.middle(self.layer, self.first(x)))


def _outlook(layer: Any, a: torch.Tensor) -> torch.Tensor:
    """Attention inside of windows that reach over the border: [n, heads, places, window, head dimension]."""
    weights = layer(a.movedim(1, -1)).reshape(a.size(0), H * H, 2, 9, 9).movedim(2, 1).softmax(-1)
    values = F.unfold(a, 3, padding=1).reshape(a.size(0), 2, C // 2, 9, H * H).permute(0, 1, 4, 3, 2)
    found = (weights @ values).permute(0, 1, 4, 3, 2).reshape(a.size(0), C * 9, H * H)
    return F.fold(found, (H, H), 3, padding=1).movedim(1, -1)


def _sampled(layer: Any, a: torch.Tensor) -> torch.Tensor:
    grid = torch.linspace(-1.8, 1.8, 50).reshape(1, 5, 5, 2).repeat(a.size(0), 1, 1, 1).type_as(a)
    return layer(F.grid_sample(a, grid, align_corners=False).movedim(1, -1))


def _standard_weight(layer: Any, a: torch.Tensor) -> torch.Tensor:
    variance, mean = torch.var_mean(layer.weight, (1, 2, 3), correction=0, keepdim=True)
    return F.conv2d(a, (layer.weight - mean) * (variance + 1e-3).rsqrt(), layer.bias).movedim(1, -1)


def _weight_in_a_norm(layer: Any, a: torch.Tensor) -> torch.Tensor:
    weight = F.batch_norm(layer.weight.reshape(1, C, -1), None, None, training=True).reshape_as(layer.weight)
    return F.conv2d(a, weight, layer.bias).movedim(1, -1)


def _einsum_attention(layer: Any, a: torch.Tensor) -> torch.Tensor:
    query, key, value = layer(a.flatten(2).transpose(1, 2)).reshape(a.size(0), -1, 3, 2, 4).unbind(2)
    scores = torch.einsum("bnhd,bmhd->bhnm", query, key)
    weights = scores.masked_fill(torch.ones(H * H, H * H).tril() == 0, -torch.inf).softmax(-1)
    return torch.einsum("...hnm,...mhd->...nhd", weights, value).flatten(2)


def _beside_the_batch(layer: Any, a: torch.Tensor) -> torch.Tensor:
    """Heads, and then their dimensions too, lie beside the batch."""
    rows = [part.reshape(len(a), -1, 2, 4).movedim(2, 1) for part in layer(a.flatten(2).movedim(1, 2)).chunk(3, -1)]
    query, key, value = (part.reshape(len(a) * 2, H * H, 4) for part in rows)
    scores = query @ key.transpose(1, 2)
    scores = scores - scores.amax(-1, keepdim=True).expand(scores.shape[0], H * H, H * H)
    found = (scores.softmax(-1) @ value).transpose(1, 2).reshape(-1, H, H)
    return found.reshape(len(a), C, H * H).transpose(1, 2)


def _unpooled(layer: Any, a: torch.Tensor) -> torch.Tensor:
    return layer(F.max_unpool2d(*F.max_pool2d(a, 2, return_indices=True), 2).movedim(1, -1))


def _zeroed_below(layer: Any, a: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[a < 0.1] = 0.5
    return layer(a.movedim(1, -1))


def _filled_in_place(layer: Any, a: torch.Tensor) -> torch.Tensor:
    return layer(a.clone().masked_fill_(torch.ones(H, H).tril() == 0, 0.5).movedim(1, -1))


def _seen_by_mean_and_maximum(layer: Any, a: torch.Tensor) -> torch.Tensor:
    """Spatial attention of CBAM: Woo et al., ECCV 2018, equation 3."""
    seen = torch.cat([a.mean(1, keepdim=True), torch.max(a, dim=1, keepdim=True)[0]], 1)
    return (a * layer(seen).sigmoid()).movedim(1, -1)


def _bounded_scores(layer: Any, a: torch.Tensor) -> torch.Tensor:
    query, key = (layer(a).flatten(2).unflatten(1, (2, C // 2)) for _ in range(2))
    return (query.transpose(2, 3) @ key).tril().mean(1)


def _normalized(layer: Any, a: torch.Tensor) -> torch.Tensor:
    return layer(F.normalize(a, dim=1).movedim(1, -1))


NETS: dict[str, tuple[Middle, Callable[[], nn.Module], int]] = {
    "windows with attention": (_outlook, lambda: nn.Linear(C, 2 * 81), C),
    "sampled outside of the input": (_sampled, lambda: nn.LayerNorm(C), C),
    "padded, then normalized": (
        lambda layer, a: layer(F.pad(a, (1, 1, 2, 0)).movedim(1, -1)), lambda: nn.LayerNorm(C), C,
    ),
    "weight of variance one": (_standard_weight, lambda: nn.Conv2d(C, C, 1), C),
    "weight in a norm": (_weight_in_a_norm, lambda: nn.Conv2d(C, C, 1), C),
    "weight norm": (
        lambda layer, a: layer(a).movedim(1, -1),
        lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(C, C, 3), dim=2), C,
    ),
    "einsum attention": (_einsum_attention, lambda: nn.Linear(C, 3 * C), C),
    "heads and dimensions beside the batch": (_beside_the_batch, lambda: nn.Linear(C, 3 * C), C),
    "einsum with a weight": (
        lambda layer, a: torch.einsum("bchw,dc->bhwd", a, layer.weight), lambda: nn.Linear(C, C), C,
    ),
    "lower triangle of scores": (_bounded_scores, lambda: nn.Conv2d(C, C, 1), H * H),
    "normalized channels": (_normalized, lambda: nn.PReLU(), C),
    "gated halves": (lambda layer, a: F.glu(layer(a), 1).movedim(1, -1), lambda: nn.Conv2d(C, 2 * C, 1), C),
    "steps": (lambda layer, a: layer(a[:, ::2] * a[:, 1::2]).movedim(1, -1), lambda: nn.Conv2d(C // 2, C, 1), C),
    "bilinear": (
        lambda layer, a: layer(a.mean(2).transpose(1, 2), a.mean(3).transpose(1, 2)), lambda: nn.Bilinear(C, C, C), C,
    ),
    "logsumexp": (lambda layer, a: layer(a).logsumexp(1), lambda: nn.Conv2d(C, C, 1), H),
    "deviation": (lambda layer, a: torch.std_mean(layer(a), 1)[0], lambda: nn.Conv2d(C, C, 1), H),
    "product": (lambda layer, a: layer(a).prod(1), lambda: nn.Conv2d(C, C, 1), H),
    "mean and maximum": (_seen_by_mean_and_maximum, lambda: nn.Conv2d(2, 1, 3, padding=1), C),
    "one map for all channels, expanded": (
        lambda layer, a: (a * layer(a).sigmoid().expand(-1, C, -1, -1)).movedim(1, -1), lambda: nn.Conv2d(C, 1, 1), C,
    ),
    "one map for all channels, repeated": (
        lambda layer, a: (a * layer(a).sigmoid().repeat(1, C, 1, 1)).movedim(1, -1), lambda: nn.Conv2d(C, 1, 1), C,
    ),
    "minimum": (lambda layer, a: layer(a).min(1).values, lambda: nn.Conv2d(C, C, 1), H),
    "scaled by the largest": (lambda layer, a: (a / layer(a).abs().max()).movedim(1, -1), lambda: nn.Conv2d(C, C, 1), C),
    "put back where a pooling found it": (_unpooled, lambda: nn.LayerNorm(C), C),
    "written where a mask is, then normalized": (_zeroed_below, lambda: nn.LayerNorm(C), C),
    "filled in place, then normalized": (_filled_in_place, lambda: nn.LayerNorm(C), C),
    "spectral norm": (
        lambda layer, a: layer(a).movedim(1, -1),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(C, C, 3)), C,
    ),
    "norm": (lambda layer, a: torch.ops.aten.norm.ScalarOpt_dim(layer(a), 2, [1]), lambda: nn.Conv2d(C, C, 1), H),
    "convolution along channels": (
        lambda layer, a: layer(torch.stack([a.mean((2, 3)), a.amax((2, 3))], 1)),
        lambda: nn.Conv1d(2, 1, 1),
        C,
    ),
    "written into a slice": (
        lambda layer, a: _written(layer(a)).movedim(1, -1), lambda: nn.Conv2d(C, C, 1), C,
    ),
    "sorted places": (
        lambda layer, a: a.gather(2, layer(a).mean((1, 3), keepdim=True).argsort(2).expand_as(a)).movedim(1, -1),
        lambda: nn.Conv2d(C, C, 1), C,
    ),
}  # fmt: skip


def _written(a: torch.Tensor) -> torch.Tensor:
    a = a.clone()
    a[:, : C // 2].copy_(a[:, C // 2 :])
    return a


def test_dimensions_of_heads_beside_the_batch_are_units() -> None:
    graph = trace(Around(_beside_the_batch, nn.Linear(C, 3 * C), C).eval(), torch.randn(1, 3, H, H))
    units = sorted((group.unit, group.size) for group in graph.groups)
    assert units == [("channel", C), ("head", 2), ("head dimension", 4), ("head dimension", 4)]


@pytest.mark.parametrize("causal", [True, False])
def test_attention_of_some_rows_at_a_time_is_that_of_all(monkeypatch: pytest.MonkeyPatch, causal: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 4, dtype=torch.float64) for _ in range(3))
    for gone in (query[..., 1], key[..., 1], value[:, 2], query[:, 0], key[:, 0]):
        gone.fill_(torch.nan)
    mask = None if causal else torch.randn(1, 3, 1, 7, dtype=torch.float64)
    whole = masked_math.attention(query, key, value, mask, causal=causal, scale=None)
    monkeypatch.setattr(masked_math, "_AT_ONCE", 100)
    rows = masked_math.attention(query, key, value, mask, causal=causal, scale=None)
    assert torch.allclose(whole, rows, equal_nan=True)
    assert whole.isfinite().any()


@pytest.mark.parametrize("name", NETS)
def test_a_cut_of_half_equals_the_mask(name: str) -> None:
    middle, make, width = NETS[name]
    torch.manual_seed(0)
    model = Around(middle, make(), width).eval()
    example = torch.randn(1, 3, H, H)
    graph = trace(model, example)
    plan = uniform_plan(graph, ratio=0.5)
    assert len(plan.kept["first.weight"][0]) < C
    assert check(model, plan, example) < 1e-9
