"""Networks with attention, as people write them: their groups, and what their cut models can do."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, make_plan, uniform_plan
from edgeprune.surgery.program_module import ProgramModule

Groups = list[tuple[str, int, str]]
"""Unit, size, and the layers that make the channels."""

_FUSED: Groups = [("head", 4, "qkv"), ("head dimension", 6, "qkv")]
_FUSED_VALUES_APART: Groups = [*_FUSED, ("head dimension", 6, "qkv")]
_SEPARATE: Groups = [("head", 4, "q k v"), ("head dimension", 6, "q k"), ("head dimension", 6, "v")]
_SHARED: Groups = [("head", 2, "q k v"), ("head", 2, "q"), ("head dimension", 6, "q k"), ("head dimension", 6, "v")]
_ROTATED: Groups = [("head", 4, "q k v"), ("head dimension", 3, "q k"), ("head dimension", 6, "v")]
_TORCH: Groups = [("head", 4, "inner.in_proj_weight"), ("head dimension", 6, "inner.in_proj_weight")]

SPELLINGS: dict[str, Groups] = {
    "Fused": _FUSED,
    "FusedIndexed": _FUSED,
    "FusedHeadsFirst": _FUSED_VALUES_APART,
    "FusedChunk": _FUSED_VALUES_APART,
    "Separate": _SEPARATE,
    "HandWritten": _SEPARATE,
    "Relying": _SEPARATE,
    "Additive": _SEPARATE,
    "AdditiveHandWritten": _SEPARATE,
    "Causal": _SEPARATE,
    "CausalHandWritten": _SEPARATE,
    "MultiQuery": [("head", 4, "q"), ("head dimension", 6, "q k"), ("head dimension", 6, "v")],
    "GroupedExpand": _SHARED,
    "GroupedRepeat": _SHARED,
    "GroupedNative": _SHARED,
    "Cross": [("head", 4, "q kv"), ("head dimension", 6, "q kv")],
    "Rotary": _ROTATED,
    "RotaryInterleaved": _ROTATED,
    "RelativeBias": _SEPARATE,
    "TalkingHeads": [
        ("head", 4, "q k"), ("head", 4, "v after"), ("head dimension", 6, "q k"), ("head dimension", 6, "v"),
        ("channel", 4, "before"),
    ],
    "BesideBatch": _SEPARATE,
    "QueryNorm": _SEPARATE,
    "TorchBatchFirst": _TORCH,
    "TorchSequenceFirst": _TORCH,
}  # fmt: skip
PARTS: dict[str, Groups] = {
    "Windowed": [("channel", 24, "embed proj"), ("channel", 48, "reduction"), *_FUSED],
    "SwiGlu": [("channel", 24, "embed down"), ("channel", 32, "gate up")],
    "FusedGlu": [("channel", 24, "embed"), ("channel", 20, "wide"), ("channel", 16, "down"), ("channel", 10, "gated")],
    "ConvParts": [("channel", 4, "stem excite"), ("channel", 4, "squeeze"), ("channel", 12, "next")],
    "TorchLayer": [
        ("head", 4, "layer.self_attn.in_proj_weight"), ("head dimension", 6, "layer.self_attn.in_proj_weight"),
        ("channel", 24, "embed layer.self_attn.out_proj layer.linear2"), ("channel", 32, "layer.linear1"),
    ],
}  # fmt: skip
NAMES = [*SPELLINGS, *PARTS]


@dataclass(frozen=True)
class Cut:
    """A network and its half."""

    model: nn.Module
    inputs: tuple[torch.Tensor, ...]
    graph: ChannelGraph
    plan: PruningPlan
    pruned: nn.Module


@pytest.fixture(scope="module")
def made(attention_nets: ModuleType, part_nets: ModuleType) -> Any:
    """Each network is traced once."""
    found: dict[str, Cut] = {}

    def make(name: str) -> Cut:
        if name not in found:
            torch.manual_seed(0)
            model, inputs = (part_nets if name in part_nets.NAMES else attention_nets).build(name)
            model, inputs = model.double(), tuple(tensor.double() for tensor in inputs)
            graph = trace(model, inputs)
            plan = uniform_plan(graph, 0.5)
            found[name] = Cut(model, inputs, graph, plan, apply(model, plan))
        return found[name]

    return make


@pytest.mark.parametrize("name", NAMES)
def test_heads_and_head_dimensions_are_groups_of_their_own(made: Any, name: str) -> None:
    graph, plan = made(name).graph, made(name).plan
    groups = []
    for group in graph.groups:
        makers = [member.parameter.removesuffix(".weight") for member in group.members if member.role == "output"]
        layers = " ".join(dict.fromkeys(maker.removeprefix("attention.") for maker in makers))
        groups.append((group.unit, group.size, layers))
        assert abs(plan.widths()[group.name] - group.size / 2) < 1
    attention = "inner.out_proj" if name.startswith("Torch") else "proj"
    around = ("channel", 24, f"embed {attention}")
    assert sorted(groups) == sorted(PARTS[name] if name in PARTS else [*SPELLINGS[name], around])
    assert graph.dynamic_batch
    assert [axis.name for axis in graph.frozen if axis.op not in ("input", "output")] == []


@pytest.mark.parametrize("name", NAMES)
def test_cut_attention_equals_masked_attention(made: Any, compare: Any, name: str) -> None:
    cut = made(name)
    assert compare(cut.graph, cut.plan) < 1e-9
    shapes = cut.graph.shapes(cut.plan.widths())
    for key, tensor in [*cut.pruned.named_parameters(), *cut.pruned.named_buffers()]:
        assert shapes[key] == tuple(tensor.shape), key


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_whole_check_finds_no_difference(made: Any, name: str) -> None:
    cut = made(name)
    assert check(cut.model, cut.plan, cut.inputs) < 1e-9


@pytest.mark.parametrize("name", NAMES)
def test_cut_attention_runs_trains_and_copies(made: Any, name: str) -> None:
    cut = made(name)
    kinds = [cut.pruned] if isinstance(cut.pruned, ProgramModule) else [cut.pruned, _program(cut.pruned, cut.plan)]
    for pruned in (copy.deepcopy(kind) for kind in kinds):
        pruned.eval()
        for batch in (1, 3, 8):
            inputs = _batch(cut.inputs, batch)
            assert pruned(*inputs).shape == cut.model(*inputs).shape
            assert torch.equal(pruned(*inputs), pruned(*inputs))
        twin = copy.deepcopy(pruned)
        pruned.train()
        if any(isinstance(module, nn.Dropout) for module in cut.model.modules()):
            assert not torch.equal(pruned(*inputs), pruned(*inputs)), "dropout must be on in train form"
        before, after = _trained(pruned, inputs)
        assert after < before
        pruned.eval()
        assert not torch.equal(pruned(*inputs), twin(*inputs))
        twin.load_state_dict(pruned.state_dict())
        assert torch.equal(pruned(*inputs), twin(*inputs))


def _program(pruned: nn.Module, plan: PruningPlan) -> nn.Module:
    assert plan.program is not None
    return ProgramModule.of(pruned, plan.program)


def _batch(inputs: tuple[torch.Tensor, ...], size: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(size)
    return tuple(torch.randn(size, *tensor.shape[1:], generator=generator, dtype=tensor.dtype) for tensor in inputs)


def _trained(pruned: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[float, float]:
    """Loss before and after 20 steps."""
    target = torch.randn_like(pruned(*inputs)).detach()
    optimizer, losses = torch.optim.SGD(pruned.parameters(), lr=0.05), []
    for _ in range(20):
        loss = (pruned(*inputs) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses[0], min(losses[-3:])


def _halved(graph: ChannelGraph, unit: str) -> PruningPlan:
    return make_plan(graph, {group.name: range(group.size // 2) for group in graph.groups if group.unit == unit})


def test_forward_that_follows_its_layers_stays_the_users_own(made: Any) -> None:
    cut = made("Relying")
    heads = _halved(cut.graph, "head")
    assert type(apply(cut.model, heads)) is type(cut.model)
    assert heads.kept["attention.q.weight"][0] == tuple(range(12))
    assert check(cut.model, heads, cut.inputs) < 1e-9
    dimensions = _halved(cut.graph, "head dimension")
    assert isinstance(apply(cut.model, dimensions), ProgramModule)
    assert dimensions.kept["attention.q.weight"][0] == tuple(6 * head + i for head in range(4) for i in range(3))
    assert check(cut.model, dimensions, cut.inputs) < 1e-9


class Dropping(nn.Module):
    """Fused attention that drops in train form alone, in a forward that spells out sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.p = nn.Linear(5, 72), nn.Linear(24, 3), 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).view(-1, 9, 3, 4, 6).permute(2, 0, 3, 1, 4)
        dropped = self.p if self.training else 0.0
        return self.proj(
            nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropped).transpose(1, 2).flatten(2)
        )


def test_a_program_drops_in_its_attention_in_train_form(tmp_path: Path) -> None:
    model, x = Dropping().eval(), torch.randn(2, 9, 5)
    graph = trace(model, x)
    assert list(graph.attention_dropout.values()) == [0.5]
    plan = uniform_plan(graph, 0.5)
    assert check(model, plan, x) < 1e-9
    pruned = apply(model, plan)
    assert isinstance(pruned, ProgramModule)
    edgeprune.save(pruned, tmp_path, plan)
    for program in (pruned, edgeprune.load(tmp_path)):
        assert torch.equal(program.eval()(x), program(x))
        program.train()
        assert not torch.equal(program(x), program(x))
    model.p = 0.0
    assert trace(model, x).attention_dropout == {}


class Turning(nn.Module):
    """Queries and keys are turned as complex numbers, by a buffer."""

    turn: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.proj, self.head = (
            nn.Linear(5, 24), nn.Linear(24, 72), nn.Linear(24, 24), nn.Linear(24, 3),
        )  # fmt: skip
        angles = torch.arange(9.0)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        self.register_buffer("turn", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 6)).unbind(2)
        pairs = (torch.view_as_complex(part.unflatten(-1, (3, 2))) for part in (q, k))
        q, k = (torch.view_as_real(pair * self.turn[:, None]).flatten(3) for pair in pairs)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(x + self.proj(found))


def test_pairs_that_are_turned_as_complex_numbers_are_units(tmp_path: Path) -> None:
    model, x = Turning().eval(), torch.randn(2, 9, 5)
    graph = trace(model, x)
    assert sorted((group.unit, group.size) for group in graph.groups) == [
        ("channel", 24), ("head", 4), ("head dimension", 3),
    ]  # fmt: skip
    plan = uniform_plan(graph, 0.5)
    assert len(plan.kept["turn"][1]) == 2
    assert check(model, plan, x) < 1e-9
    pruned = apply(model, plan).eval()
    edgeprune.save(pruned, tmp_path, plan)
    assert torch.allclose(edgeprune.load(tmp_path)(x), pruned(x), atol=1e-6)


@pytest.mark.parametrize("name", ["Separate", "HandWritten"])
def test_the_scale_stays_that_of_the_original_head_dimension(made: Any, name: str) -> None:
    """All that is cut of the queries is zero, so a cut model with the original scale computes the same."""
    model = copy.deepcopy(made(name).model).eval()
    with torch.no_grad():
        for layer in (model.attention.q, model.attention.v):
            layer.weight.view(4, 6, 24)[:, 3:] = 0
            layer.bias.view(4, 6)[:, 3:] = 0
        model.attention.proj.weight.view(24, 4, 6)[..., 3:] = 0
    pruned = apply(model, _halved(made(name).graph, "head dimension")).eval()
    assert pruned.get_parameter("attention.k.weight").shape == (12, 24)
    (x,) = made(name).inputs
    assert torch.allclose(pruned(x), model(x), atol=1e-9)


_SLOW_EXPORTS = ["Fused", "RotaryInterleaved", "BesideBatch", "TorchBatchFirst", "FusedGlu", "ConvParts"]


@pytest.mark.parametrize(
    "name", ["GroupedExpand", "Windowed", *(pytest.param(name, marks=pytest.mark.slow) for name in _SLOW_EXPORTS)]
)
def test_cut_attention_exports_to_onnx_with_a_free_batch(made: Any, name: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    cut = made(name)
    pruned, path = copy.deepcopy(cut.pruned).float().eval(), tmp_path / "model.onnx"
    free = ({0: torch.export.Dim("batch")},)
    shapes = (free,) if isinstance(pruned, ProgramModule) or name not in PARTS else free
    (x,) = _batch(cut.inputs, 2)
    torch.onnx.export(pruned, (x.float(),), path, dynamo=True, dynamic_shapes=shapes, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    for size in (1, 5):
        (x,) = (tensor.float() for tensor in _batch(cut.inputs, size))
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert torch.allclose(torch.from_numpy(found), pruned(x), atol=1e-4)
