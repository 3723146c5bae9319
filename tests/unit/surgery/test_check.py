"""What `check` compares, and what it says."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.errors import SurgeryError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import PrecisionError, check
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import PruningPlan, make_plan, uniform_plan
from edgeprune.surgery.program_module import ProgramModule

X = torch.randn(1, 3, 16, 16)


def _damages() -> dict[str, Callable[[nn.Module], None]]:
    def add(name: str, value: float) -> Callable[[nn.Module], None]:
        def change(module: nn.Module) -> None:
            with torch.no_grad():
                tensors = dict(module.named_parameters()) | dict(module.named_buffers())
                tensors[name].view(-1)[-1] += value

        return change

    names = ["stem.0.weight", "layer2.0.downsample.1.bias", "layer2.1.bn1.running_var", "fc.weight"]
    return {name: add(name, 1e-3) for name in names}


@pytest.mark.parametrize("name", _damages())
def test_a_single_wrong_number_is_caught_by_the_whole_check(nets: ModuleType, name: str) -> None:
    model = nets.ResNet()
    plan = uniform_plan(trace(model, X), 0.5)

    def cut(original: nn.Module, chosen: PruningPlan) -> nn.Module:
        pruned = apply(original, chosen)
        _damages()[name](pruned)
        return pruned

    with pytest.raises(SurgeryError, match=r"the cut model must equal the masked one within 1e-09, found a difference"):
        check(model, plan, X, tolerance=1e-9, cut=cut)


def test_a_forgotten_consumer_is_named(nets: ModuleType, planted_bugs: ModuleType) -> None:
    model = nets.VGG()
    plan = make_plan(trace(model, X), {"features.0": [0, 1, 2]})
    wrong = planted_bugs.with_kept(plan, "features.3.weight", 1, [0, 1, 3])
    with pytest.raises(SurgeryError, match=r"features\.3\.weight must not read units that the plan removes"):
        check(model, wrong, X)
    missing = replace(plan, kept={"features.0.weight": {0: (0, 1, 2)}, "features.0.bias": {0: (0, 1, 2)}})
    with pytest.raises(SurgeryError, match=r"features\.3\.weight must not read units.* found input channel 3"):
        check(model, missing, X, cut=lambda original, _: apply(original, plan))


def test_the_statistics_of_train_form_are_compared(nets: ModuleType) -> None:
    model = nets.ResNet()
    plan = uniform_plan(trace(model, X), 0.5)

    def cut(original: nn.Module, chosen: PruningPlan) -> nn.Module:
        pruned: Any = apply(original, chosen)
        pruned.layer1[0].bn1.momentum = 0.2
        return pruned

    assert check(model, plan, X) < 1e-9
    assert check(model, plan, X, cut=cut) > 1e-3


class AlongSpace(nn.Module):
    """A linear layer that contracts the positions, not the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mix, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(256, 6), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.mix(self.stem(x).flatten(2)).relu().mean(2))


def test_channels_pass_through_a_layer_that_contracts_another_axis() -> None:
    model = AlongSpace()
    plan = make_plan(trace(model, X), {"stem": [0, 2, 3, 7]})
    assert plan.kept["head.weight"] == {1: (0, 2, 3, 7)}
    assert check(model, plan, X) < 1e-9
    wrong = replace(plan, kept={name: axes for name, axes in plan.kept.items() if name != "head.weight"})
    with pytest.raises(SurgeryError, match=r"head\.weight must not read units.* found input channel 1"):
        check(model, wrong, X, cut=lambda original, _: apply(original, plan))


def test_statistics_of_every_kind_of_norm_are_compared() -> None:
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Conv2d(6, 2, 3)
            self.cumulative = nn.BatchNorm2d(8, momentum=None)
            self.instance = nn.InstanceNorm2d(6, affine=True, track_running_stats=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(self.instance(self.b(self.cumulative(self.a(x)).relu())).relu()).mean((2, 3))

    model = Normed()
    model(torch.randn(4, 3, 16, 16))
    plan = uniform_plan(trace(model, X), 0.5)
    assert check(model, plan, X) < 1e-9

    def program(original: nn.Module, chosen: PruningPlan) -> nn.Module:
        assert chosen.program is not None
        return ProgramModule.of(apply(original, chosen), chosen.program)

    assert check(model, plan, X, cut=program) < 1e-9
    for name in ("cumulative", "instance"):

        def cut(original: nn.Module, chosen: PruningPlan, name: str = name) -> nn.Module:
            pruned = apply(original, chosen)
            setattr(pruned.get_submodule(name), "momentum", 0.9)  # noqa: B010
            return pruned

        assert check(model, plan, X, cut=cut) > 1e-3


def test_check_leaves_the_model_alone_and_takes_float32(nets: ModuleType) -> None:
    model = nets.Inverted()
    state = copy.deepcopy(model.state_dict())
    plan = uniform_plan(trace(model, X), 0.5)
    assert check(model, plan, X, dtype=torch.float32) < 1e-4
    assert model.training
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class InFloat32(nn.Module):
    """A norm, a softmax and a state that forward wants in float32, as language models do, and the type of the input again."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.scale, self.head = nn.Linear(6, 16), nn.Parameter(torch.ones(16)), nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        wide = y.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6) + torch.zeros(1, dtype=y.dtype)
        y = self.scale * wide.to(y.dtype)
        return self.head(y).softmax(-1, dtype=torch.float32).to(y.dtype)


def test_what_forward_casts_to_float32_is_compared_in_float64_too() -> None:
    model, x = InFloat32(), torch.randn(2, 5, 6)
    plan = uniform_plan(trace(model, x), 0.5)
    assert check(model, plan, x) < 1e-14

    def program(original: nn.Module, chosen: PruningPlan) -> nn.Module:
        assert chosen.program is not None
        return ProgramModule.of(apply(original, chosen), chosen.program)

    assert check(model, plan, x, cut=program) < 1e-14


class Generated(nn.Module):
    """A convolution whose weights a layer makes of a vector; its submodules have names that a `ProgramModule` uses, too."""

    def __init__(self) -> None:
        super().__init__()
        self.seen, self.weights, self.biases = nn.Parameter(torch.randn(5)), nn.Linear(5, 8 * 27), nn.Linear(5, 8)
        self.head = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weights(self.seen).view(8, 3, 3, 3)
        return self.head(nn.functional.conv2d(x, weight, self.biases(self.seen)).relu())


def test_layers_may_read_a_single_vector() -> None:
    model = Generated()
    plan = uniform_plan(trace(model, X), 0.5)
    assert set(plan.widths().values()) == {4, 2}
    assert check(model, plan, X) < 1e-9
    pruned = apply(model, plan)
    assert isinstance(pruned, ProgramModule)
    assert pruned.state_dict().keys() == model.state_dict().keys()
    assert pruned.get_submodule("weights").weight.shape == (4 * 27, 2)
    assert copy.deepcopy(pruned)(X).shape == (1, 2, 14, 14)


class Drawing(nn.Module):
    """Draws noise in eval form, too."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.b(self.a(x).relu())
        return self.c(y + torch.randn_like(y))


def test_a_model_that_draws_is_compared_with_the_same_draws() -> None:
    model, x = Drawing(), torch.randn(2, 6)
    graph = trace(model, x)
    assert graph.widths() == {"a": 8}
    assert check(model, uniform_plan(graph, 0.5), x) < 1e-12


class Casting(nn.Module):
    """Takes bytes, and computes in float32 whatever its weights are."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 100 * self.head(self.norm(self.stem(x.float() / 255)).relu()).mean((2, 3))


def test_a_model_that_casts_is_compared_in_float32() -> None:
    model, x = Casting(), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)
    plan = uniform_plan(trace(model, x), 0.5)
    with pytest.raises(PrecisionError, match=r"must run in float64 to be compared in it, found.* Try: check\("):
        check(model, plan, x)
    assert check(model, plan, x, dtype=torch.float32, relative=True, tolerance=1e-3) < 1e-3
    graph = trace(model, x)
    other = make_plan(graph, {name: sorted({*range(8)} - {*plan.groups[name]["kept"]}) for name in graph.widths()})
    with pytest.raises(SurgeryError, match=r"the cut model must equal the masked one within 0\.001"):
        check(model, plan, x, dtype=torch.float32, relative=True, tolerance=1e-3, cut=lambda m, _: apply(m, other))
