"""`check` catches planted surgery bugs, and random networks pass it."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from edgeprune.errors import SurgeryError
from edgeprune.graph.capture import capture
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import PrecisionError, check, difference
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.masking import randomize
from edgeprune.surgery.plan import PruningPlan, make_plan, uniform_plan
from edgeprune.surgery.program_module import ProgramModule

X = torch.randn(1, 3, 16, 16)


# Planted bugs: each takes the plan and returns a plan (or a change of the cut model) that is wrong in one place.


def _with_kept(plan: PruningPlan, name: str, axis: int, indices: list[int] | None) -> PruningPlan:
    kept = {key: dict(axes) for key, axes in plan.kept.items()}
    if indices is None:
        del kept[name][axis]
    else:
        kept[name][axis] = tuple(indices)
    return replace(plan, kept=kept)


def _off_by_one(plan: PruningPlan, name: str, axis: int, dice: random.Random) -> PruningPlan | None:
    indices, size = list(plan.kept[name][axis]), plan.shapes[name][axis]
    moves = [(i, i + 1) for i in indices if i + 1 < size and i + 1 not in indices]
    if not moves:
        return None
    old, new = dice.choice(moves)
    return _with_kept(plan, name, axis, sorted(new if i == old else i for i in indices))


def _permuted(plan: PruningPlan, name: str, axis: int, dice: random.Random) -> PruningPlan | None:
    indices = list(plan.kept[name][axis])
    if len(indices) < 2:
        return None
    a, b = dice.sample(range(len(indices)), 2)
    indices[a], indices[b] = indices[b], indices[a]
    return _with_kept(plan, name, axis, indices)


def _shifted(plan: PruningPlan, name: str, axis: int, dice: random.Random) -> PruningPlan | None:
    """The first channels instead of the chosen ones."""
    indices = list(plan.kept[name][axis])
    first = list(range(len(indices)))
    return None if first == indices else _with_kept(plan, name, axis, first)


def _forgotten(plan: PruningPlan, name: str, axis: int, dice: random.Random) -> PruningPlan | None:
    return _with_kept(plan, name, axis, None)


def _wrong_axis(plan: PruningPlan, name: str, axis: int, dice: random.Random) -> PruningPlan | None:
    shape = plan.shapes[name]
    if len(shape) < 2 or max(plan.kept[name][axis]) >= shape[1 - axis]:
        return None
    kept = {key: dict(axes) for key, axes in plan.kept.items()}
    first, second = kept[name].get(0), kept[name].get(1)
    kept[name] = {a: ids for a, ids in ((0, second), (1, first)) if ids is not None and max(ids) < shape[a]}
    return None if kept[name] == dict(plan.kept[name]) else replace(plan, kept=kept)


BUGS: dict[str, Callable[[PruningPlan, str, int, random.Random], PruningPlan | None]] = {
    "off by one": _off_by_one,
    "permuted": _permuted,
    "first instead of chosen": _shifted,
    "forgotten": _forgotten,
    "wrong axis": _wrong_axis,
}


def _planted(plan: PruningPlan, dice: random.Random) -> Iterator[tuple[str, PruningPlan]]:
    for name, axes in plan.kept.items():
        for axis in axes:
            for kind, plant in BUGS.items():
                wrong = plant(plan, name, axis, dice)
                if wrong is not None:
                    yield f"{kind}: {name} axis {axis}", wrong


NETS = ["ResNet", "OptionA", "VGG", "DenseNet", "Inverted", "Shuffle", "Grouped", "UNet", "Gated", "Attended", "Tied"]


@pytest.mark.parametrize("name", NETS)
def test_planted_surgery_bugs_are_caught(nets: ModuleType, name: str) -> None:
    dice = random.Random(7)
    model = getattr(nets, name)()
    graph = trace(model, X)
    kept = {g.name: sorted(dice.sample(range(g.size), max(1, g.size // 2))) for g in graph.groups}
    plan = make_plan(graph, kept)
    twin = copy.deepcopy(model).double()
    randomize(twin)
    program = capture(twin, X.double()).program
    inputs = ((3 * torch.randn(3, 3, 16, 16, dtype=torch.float64) + 1,), {})
    assert not _caught(program, twin, plan, plan, inputs)
    bugs = list(_planted(plan, dice))
    dice.shuffle(bugs)
    assert len(bugs) >= 7
    escaped = [bug for bug, wrong in bugs[:14] if not _caught(program, twin, wrong, plan, inputs)]
    # A plan that is wrong in one place but believed by both sides must be caught as well, unless it only renames
    # which of its own weights a unit keeps.
    believed = [(bug, wrong) for bug, wrong in bugs[:14] if bug.startswith(("forgotten", "wrong axis"))]
    escaped += [f"believed {bug}" for bug, wrong in believed if not _caught(program, twin, wrong, wrong, inputs)]
    assert escaped == []


def _caught(program: Any, twin: nn.Module, wrong: PruningPlan, plan: PruningPlan, inputs: Any) -> bool:
    """Whether a model cut by the wrong plan is told from the original masked by the other."""
    try:
        pruned = apply(twin, wrong)
        forms = (difference(program, twin, pruned, plan, inputs, training=training) for training in (False, True))
        return any(not value < 1e-9 for value in forms)
    except (SurgeryError, IndexError):
        return True


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


def test_a_forgotten_consumer_is_named(nets: ModuleType) -> None:
    model = nets.VGG()
    plan = make_plan(trace(model, X), {"features.0": [0, 1, 2]})
    wrong = _with_kept(plan, "features.3.weight", 1, [0, 1, 3])
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


# Random networks


class RandomNet(nn.Module):
    """A chain of random steps; every step is a function of the running tensor and the layers that it owns."""

    def __init__(self, steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.steps = steps
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.ModuleList()
        width = 8
        for kind, number in steps:
            width = self._add(kind, number, width)
        self.head = nn.Linear(width, 3)

    def _add(self, kind: str, number: int, width: int) -> int:
        def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups, bias=bool(number % 2))

        outputs = 4 + 4 * (number % 3)
        layers: dict[str, Callable[[], tuple[nn.Module, int]]] = {
            "conv": lambda: (conv(width, outputs), outputs),
            "residual": lambda: (nn.Sequential(conv(width, outputs), nn.ReLU(), conv(outputs, width)), width),
            "concat": lambda: (conv(width, 4), width + 4),
            "depthwise": lambda: (conv(width, width, width), width),
            "multiplied": lambda: (conv(width, 2 * width, width), 2 * width),
            "grouped": lambda: (conv(width, outputs, 4 if width % 4 == 0 else 1), outputs),
            "norm": lambda: (nn.BatchNorm2d(width), width),
            "gate": lambda: (conv(width, 2 * width), width),
            "split": lambda: (conv(width // 2, 4), 4 + width - width // 2),
            "shuffle": lambda: (nn.Identity(), width),
            "squeeze": lambda: (nn.Sequential(conv(width, 4), nn.ReLU(), conv(4, width)), width),
            "pad": lambda: (nn.Identity(), width + 2),
            "act": lambda: (nn.PReLU(width) if number % 2 else nn.Hardswish(), width),
            "rotate": lambda: (nn.Identity(), width),
        }
        layer, width = layers[kind]()
        self.layers.append(layer)
        return width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for (kind, number), layer in zip(self.steps, self.layers, strict=True):
            x = self._step(kind, number, layer, x)
        return self.head(x.mean((2, 3)))

    def _step(self, kind: str, number: int, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if kind == "residual":
            return x + layer(x)
        if kind == "concat":
            return torch.cat([x, layer(x)] if number % 2 else [layer(x), x], 1)
        if kind == "gate":
            a, b = layer(x).chunk(2, 1)
            return a * torch.sigmoid(b)
        if kind == "split":
            a, b = x.split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
            return torch.cat([b, layer(a)], 1)
        if kind == "shuffle":
            n, c, h, w = x.shape
            groups = 2 if c % 2 == 0 else 1
            return x.reshape(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        if kind == "squeeze":
            return x * layer(x.mean((2, 3), keepdim=True)).sigmoid()
        if kind == "pad":
            return nn.functional.pad(x, (0, 0, 0, 0, 1, 1))
        if kind == "rotate":
            cut = 1 + number % (x.shape[1] - 1)
            return torch.cat([x[:, cut:], x[:, :cut]], 1)
        return layer(x)


KINDS = [
    "conv", "residual", "concat", "depthwise", "multiplied", "grouped", "norm", "gate", "split", "shuffle", "squeeze",
    "pad", "act", "rotate",
]  # fmt: skip


def test_random_networks_cut_equals_masked() -> None:
    removing: list[bool] = []

    @settings(max_examples=50, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 5)), min_size=1, max_size=6),
        st.integers(0, 1 << 16),
    )
    def compare(steps: list[tuple[str, int]], seed: int) -> None:
        removing.append(_cut_equals_masked(steps, seed))

    compare()
    assert sum(removing) > 0.8 * len(removing)


def _cut_equals_masked(steps: list[tuple[str, int]], seed: int) -> bool:
    """Compare one random net cut at random; whether the cut removed anything."""
    torch.manual_seed(seed)
    dice = random.Random(seed)
    model = RandomNet(steps)
    x = torch.randn(1, 3, 6, 6)
    graph = trace(model, x)
    kept = {g.name: sorted(dice.sample(range(g.size), dice.randint(1, g.size))) for g in graph.groups}
    plan = make_plan(graph, kept, allow_empty=True)
    assert check(model, plan, x) < 1e-9
    shapes = graph.shapes(plan.widths())
    pruned = apply(model, plan)
    assert all(shapes[name] == tuple(tensor.shape) for name, tensor in pruned.named_parameters())
    return bool(plan.kept)
