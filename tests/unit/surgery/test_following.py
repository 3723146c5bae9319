"""The user's own class comes back where its attributes can follow, and only where it then computes the same."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import edgeprune
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.program_module import ProgramModule

Tensor = torch.Tensor
WIDTH, TOKENS = 24, 9


class Attention(nn.Module):
    """Sizes are integers of the module; the scale is what fused attention takes by itself."""

    def __init__(self, heads: int = 4, dimension: int = 6) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = heads, dimension, heads * dimension
        self.layer_index = heads
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * self.attn_dim), nn.Linear(self.attn_dim, WIDTH)
        self.q_norm: nn.Module = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        x = F.scaled_dot_product_attention(self.q_norm(q), k, v).transpose(1, 2)
        return self.proj(x.reshape(b, n, self.attn_dim))


class NormedQueries(Attention):
    def __init__(self, heads: int = 4, dimension: int = 6) -> None:
        super().__init__(heads, dimension)
        self.q_norm = nn.LayerNorm(dimension)


class Windowed(Attention):
    """A size that stays has the value of one that goes, and forward reads both."""

    def __init__(self, heads: int = 3, dimension: int = 6) -> None:
        super().__init__(heads, dimension)
        self.window = heads

    def forward(self, x: Tensor) -> Tensor:
        b, n, c = x.shape
        # [b, n, c] in windows of so many tokens
        x = x.reshape(b * n // self.window, self.window, c)
        return super().forward(x).reshape(b, n, -1)


class Split(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.split_size = 4, 6, 24
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        parts = self.qkv(x).split(self.split_size, dim=2)
        q, k, v = (part.view(b, n, -1, self.head_dim).transpose(1, 2) for part in parts)
        return self.proj(F.scaled_dot_product_attention(q, k, v, scale=0.3).transpose(1, 2).flatten(2))


class PlacesOfQueries(Attention):
    """Queries also make a bias of the scores, so a scale can be folded into keys alone."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(TOKENS, self.head_dim))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bias = torch.einsum("bhnd,md->bhnm", q, self.places)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
        return self.proj(x.reshape(b, n, self.attn_dim))


class GroupedQueries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head_dim, self.num_groups = 6, 3
        self.q, self.proj = nn.Linear(WIDTH, 36), nn.Linear(36, WIDTH)
        self.k, self.v = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = (layer(x).view(b, n, -1, self.head_dim).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (t[:, :, None].expand(b, t.shape[1], self.num_groups, n, self.head_dim).flatten(1, 2) for t in (k, v))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Configured(Attention):
    """Sizes stand in an object that several modules may share: it is not touched."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(heads=self.num_heads, dimension=self.head_dim)
        del self.num_heads, self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.config.heads, self.config.dimension).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, self.attn_dim))


class HandScaled(Attention):
    """Written by hand, with a scale from the attribute that the reshape needs, and weights at which no scale matters."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.qkv.weight.mul_(1e-4)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
        return self.proj((scores.softmax(-1) @ v).transpose(1, 2).reshape(b, n, self.attn_dim))


class MaskedInTraining(nn.Module):
    """Train form uses a parameter that the traced form does not, so that it is not cut."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.next, self.head = nn.Linear(5, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.masked = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        if self.training:
            x = torch.where(torch.rand(x.shape[:-1])[..., None] < 0.1, self.masked, x)
        return self.head(self.next(x).relu().mean(1))


class Encoder(nn.Module):
    def __init__(self, kind: type[nn.Module], **sizes: int) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(5, WIDTH), nn.LayerNorm(WIDTH)
        self.layers = nn.ModuleList(kind(**sizes) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = x + layer(self.norm(x))
        return self.head(x.mean(1))


def encoder(kind: type[nn.Module], **sizes: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder(kind, **sizes).eval()


def cut(model: nn.Module, ratio: float = 0.34) -> tuple[nn.Module, edgeprune.PruningPlan]:
    plan = edgeprune.uniform_plan(edgeprune.trace(model, torch.randn(2, TOKENS, 5)), ratio=ratio)
    return edgeprune.apply(model, plan), plan


@pytest.mark.parametrize(
    ("kind", "sizes", "follow"),
    [
        (Attention, {}, {"num_heads": 3, "head_dim": 4, "attn_dim": 12}),
        (Attention, {"heads": 6, "dimension": 6}, {"num_heads": 4, "head_dim": 4, "attn_dim": 16}),
        (Attention, {"heads": 3, "dimension": 8}, {"num_heads": 2, "head_dim": 5, "attn_dim": 10}),
        (PlacesOfQueries, {}, {"num_heads": 3, "head_dim": 4, "attn_dim": 12}),
        (NormedQueries, {}, {"num_heads": 3, "head_dim": 4, "attn_dim": 12}),
        (Windowed, {}, {"num_heads": 2, "head_dim": 4, "attn_dim": 8, "window": 3}),
        (Split, {}, {"head_dim": 4, "split_size": 12, "num_heads": 4}),
        (GroupedQueries, {}, {"head_dim": 4, "num_groups": 2}),
    ],
)
def test_attributes_that_forward_reads_follow(
    kind: type[nn.Module], sizes: dict[str, int], follow: dict[str, int]
) -> None:
    model = encoder(kind, **sizes)
    pruned, plan = cut(model)
    assert type(pruned) is Encoder
    for layer in pruned.layers:
        assert {name: getattr(layer, name) for name in follow} == follow
    assert edgeprune.check(model, plan, torch.randn(2, TOKENS, 5)) < 1e-9


def test_an_attribute_that_forward_does_not_read_stays() -> None:
    pruned, _ = cut(encoder(Attention))
    assert [layer.layer_index for layer in pruned.layers] == [4, 4]  # type: ignore[union-attr]


def test_the_model_itself_keeps_weights_and_attributes() -> None:
    model = encoder(Attention)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut(model)
    assert [layer.num_heads for layer in model.layers] == [4, 4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_layers_may_be_cut_to_different_sizes() -> None:
    model = encoder(Attention)
    graph = edgeprune.trace(model, torch.randn(2, TOKENS, 5))
    heads = [group.name for group in graph.groups if group.unit == "head"]
    assert len(heads) == 2
    plan = make_plan(graph, {heads[0]: [0, 3], heads[1]: [1]})
    pruned = edgeprune.apply(model, plan)
    assert type(pruned) is Encoder
    assert sorted(layer.num_heads for layer in pruned.layers) == [1, 2]  # type: ignore[union-attr]


def test_sizes_of_a_shared_object_give_the_program() -> None:
    model = encoder(Configured)
    pruned, _ = cut(model)
    assert isinstance(pruned, ProgramModule)
    assert [layer.config.heads for layer in model.layers] == [4, 4]


def test_a_scale_that_these_weights_do_not_show_is_found_out() -> None:
    model = encoder(HandScaled)
    pruned, plan = cut(model)
    assert isinstance(pruned, ProgramModule)
    assert edgeprune.check(model, plan, torch.randn(2, TOKENS, 5)) < 1e-9


def test_a_model_that_could_not_be_trained_any_more_gives_the_program() -> None:
    model = MaskedInTraining().eval()
    pruned, _ = cut(model)
    assert isinstance(pruned, ProgramModule)
    pruned.train()(torch.randn(4, TOKENS, 5)).sum().backward()


def test_it_trains_copies_and_loads(tmp_path: Path) -> None:
    model = encoder(Attention)
    pruned, plan = cut(model)
    x = torch.randn(6, TOKENS, 5)
    optimizer, losses = torch.optim.SGD(pruned.parameters(), lr=0.05), []
    for _ in range(10):
        loss = (pruned.train()(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    edgeprune.save(pruned.eval(), tmp_path, plan)
    for other in (model, encoder(Attention)):
        loaded = edgeprune.load(tmp_path, model=other)
        assert type(loaded) is Encoder
        assert torch.equal(loaded(x), pruned(x))


def test_a_saved_plan_follows_too(tmp_path: Path) -> None:
    model = encoder(Attention)
    pruned, plan = cut(model)
    plan.save(tmp_path / "plan.json")
    again: Any = edgeprune.apply(model, edgeprune.PruningPlan.load(tmp_path / "plan.json"))
    assert type(again) is Encoder
    x = torch.randn(2, TOKENS, 5)
    assert torch.equal(again(x), pruned(x))
