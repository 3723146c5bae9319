"""Residual branches: found where they can go as a whole, and gone as if the model had never had them."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeprune.errors import PlanError, SurgeryError
from edgeprune.graph.tracing import trace
from edgeprune.recovery.reconstruction import reconstruct
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.masking import randomize
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.storage import load, save

X = torch.randn(2, 3, 16, 16)


@pytest.fixture(scope="module")
def nets() -> ModuleType:
    spec = importlib.util.spec_from_file_location("branch_nets", Path(__file__).parent / "branch_nets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lively(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    randomize(model)
    return model


@pytest.mark.parametrize("inplace", [False, True])
def test_a_branch_is_what_weights_add_to_what_no_weight_of_its_own_makes(nets: ModuleType, inplace: bool) -> None:
    graph = trace(nets.residual(inplace=inplace), X)
    found = {branch.name: branch for branch in graph.branches}
    assert list(found) == ["blocks.0", "blocks.1", "blocks.3"], "the one that projects has weights on both sides"
    for name, branch in found.items():
        assert branch.groups == (f"{name}.conv1",)
        assert {tensor.removeprefix(f"{name}.").partition(".")[0] for tensor in branch.tensors} == {
            *("conv1", "bn1", "conv2", "bn2")
        }
        assert f"{name}.bn2.num_batches_tracked" in branch.tensors
    assert "residual branches that can be removed as a whole: 3" in graph.explain()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("gone", [(0,), (1,), (3,), (0, 1, 3)])
def test_without_a_branch_the_model_computes_what_it_would_without_it(
    nets: ModuleType, inplace: bool, training: bool, gone: tuple[int, ...]
) -> None:
    model = lively(nets.residual(inplace=inplace).double()).train(training)
    graph = trace(model, X.double())
    plan = make_plan(graph, {f"blocks.{index}.conv1": [] for index in gone})
    pruned = apply(model, plan)
    assert isinstance(pruned, ProgramModule)
    for index in gone:
        model.blocks[index].present = False
    inputs = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    assert torch.allclose(pruned(inputs), copy.deepcopy(model)(inputs), atol=1e-10)
    assert not any(name.startswith(tuple(f"blocks.{index}." for index in gone)) for name in pruned.state_dict())


def test_a_rectifier_with_nothing_left_to_do_goes_too(nets: ModuleType) -> None:
    model = nets.residual()
    graph = trace(model, X)

    def rectifiers(plan: PruningPlan) -> int:
        assert plan.program is not None
        return sum(node["op"] == "aten.relu.default" for node in plan.program["nodes"])

    dense = rectifiers(make_plan(graph, {}, allow_empty=True))
    # One inside of the branch, and the one behind its sum, which reads what a rectifier made.
    assert rectifiers(make_plan(graph, {"blocks.0.conv1": []})) == dense - 2
    # Behind the block that projects, the sum of the next one reads a rectifier as well.
    assert rectifiers(make_plan(graph, {"blocks.3.conv1": []})) == dense - 2


class Signed(nn.Module):
    """What is left of the sum may be negative, so the rectifier behind it still has work."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.head = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(F.relu(x + self.two(self.one(x))))


def test_a_rectifier_that_reads_negative_values_stays() -> None:
    model = lively(Signed().double())
    graph = trace(model, X.double())
    plan = make_plan(graph, {"one": []})
    pruned = apply(model, plan)
    x = torch.randn(3, 3, 16, 16, dtype=torch.float64)
    assert (model.stem(x) < 0).any()
    assert torch.allclose(pruned(x), model.head(F.relu(model.stem(x))), atol=1e-10)


def test_branches_and_widths_go_together_and_the_masked_model_agrees(nets: ModuleType, tmp_path: Path) -> None:
    model = lively(nets.residual())
    graph = trace(model, X)
    kept = {group.name: range(0, group.size, 2) for group in graph.groups} | {"blocks.1.conv1": ()}
    plan = make_plan(graph, kept)
    assert plan.widths()["blocks.1.conv1"] == 0
    assert check(model, plan, X) < 1e-9
    plan.save(tmp_path / "plan.json")
    again = PruningPlan.load(tmp_path / "plan.json")
    assert again.hash == plan.hash
    assert plan.hash != make_plan(graph, kept | {"blocks.1.conv1": range(3)}).hash
    pruned = apply(model, plan).eval()
    save(pruned, tmp_path / "saved", plan)
    assert torch.equal(load(tmp_path / "saved")(X), pruned(X))
    assert torch.equal(load(tmp_path / "saved", lively(nets.residual()).eval())(X).detach(), pruned(X).detach())


def test_a_mask_that_leaves_the_branch_in_is_told(nets: ModuleType) -> None:
    """The check compares two things: one that forgets the removal does not pass."""
    model = lively(nets.residual())
    graph = trace(model, X)
    plan = make_plan(graph, {"blocks.0.conv1": ()})

    def forgetful(model: nn.Module, plan: PruningPlan) -> nn.Module:
        return copy.deepcopy(model)

    with pytest.raises(SurgeryError, match="must equal the masked one"):
        check(model, plan, X, tolerance=1e-6, cut=forgetful)


def test_of_a_branch_with_two_groups_both_go_or_none(nets: ModuleType) -> None:
    model = lively(nets.bottleneck())
    graph = trace(model, X)
    assert [branch.groups for branch in graph.branches] == [
        ("blocks.0.down", "blocks.0.mid"),
        ("blocks.1.down", "blocks.1.mid"),
    ]
    with pytest.raises(PlanError, match=r"'blocks.0.mid' must keep at least one unit"):
        make_plan(graph, {"blocks.0.mid": []})
    plan = make_plan(graph, {"blocks.0.down": [], "blocks.0.mid": [], "blocks.1.mid": [0, 3]})
    assert check(model, plan, X) < 1e-9


def test_a_group_in_no_branch_cannot_go(nets: ModuleType) -> None:
    graph = trace(nets.residual(), X)
    outer = next(group.name for group in graph.groups if "stem" in group.name)
    with pytest.raises(PlanError, match=r"must keep at least one unit, found none \(rule: emptied group\)"):
        make_plan(graph, {outer: []})


def test_a_branch_of_tokens_goes(nets: ModuleType) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nets.Mlp(), nets.Mlp(), nn.Linear(16, 3))
    lively(model)
    tokens = torch.randn(2, 5, 8)
    graph = trace(model, tokens)
    assert [branch.groups for branch in graph.branches] == [("1.up",), ("2.up",)]
    plan = make_plan(graph, {"1.up": []})
    assert check(model, plan, tokens) < 1e-9
    pruned = apply(model, plan)
    model[1].present = False
    assert torch.allclose(pruned(tokens), model(tokens), atol=1e-5)


class Shared(nn.Module):
    """Sums that look like those of residual branches, and are not."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.stem, self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)
        self.bias, self.head = nn.Parameter(torch.ones(8, 1, 1)), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.kind == "writes outside":
            return self.head(x + self.two(self.one(x.flatten(2).relu_().unflatten(2, (14, 14)))))
        inner = self.two(self.one(x))
        if self.kind == "read twice":
            return self.head(x + inner) + inner.mean()
        if self.kind == "read twice inside":
            return self.head(x + inner) + self.one(x).mean()
        if self.kind == "scaled":
            return self.head(torch.add(x, inner, alpha=2))
        if self.kind == "broadcast":
            return self.head(x + inner.mean((2, 3), keepdim=True))
        return self.head(x + self.bias)


@pytest.mark.parametrize(
    "kind", ["writes outside", "read twice", "read twice inside", "scaled", "broadcast", "no channels inside"]
)
def test_what_something_else_needs_is_no_branch(kind: str) -> None:
    assert trace(Shared(kind), X).branches == ()


def test_layers_around_a_removed_branch_are_refitted(nets: ModuleType) -> None:
    """What is left has to make up for the branch: the next layers see other inputs, and read the same targets."""
    model = lively(nets.residual()).eval()
    images = [(torch.randn(8, 3, 16, 16), None) for _ in range(8)]
    graph = trace(model, X)
    kept = {group.name: range(group.size // 2) for group in graph.groups if group.name != "blocks.1.conv1"}
    plan = make_plan(graph, {**kept, "blocks.1.conv1": ()})
    pruned = apply(model, plan).eval()
    wanted = [model(x) for x, _ in images]

    def distance() -> float:
        with torch.no_grad():
            return sum(float((pruned(x) - y).square().mean()) for (x, _), y in zip(images, wanted, strict=True))

    before = distance()
    record = reconstruct(pruned, graph, plan, X, images, samples=64)
    assert record.details["layers"] > 4
    assert record.details["after"] < record.details["before"]
    assert distance() < before
