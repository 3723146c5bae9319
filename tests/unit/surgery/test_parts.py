"""Models whose post-processing depends on values: the parts that can be traced are cut, and the rest goes on as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import edgeprune
from edgeprune.errors import PlanError, SurgeryError, TraceError
from edgeprune.parts import Part
from edgeprune.surgery.plan import make_plan


class Backbone(nn.Module):
    """Two levels of features, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, 2, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(12, 20, 3, 2, 1), nn.BatchNorm2d(20), nn.ReLU())
        self.laterals = nn.ModuleList([nn.Conv2d(12, 8, 1), nn.Conv2d(20, 8, 1)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        shallow = self.stem(x)
        return {"0": self.laterals[0](shallow), "1": self.laterals[1](self.deep(shallow))}


class Head(nn.Module):
    """Shared by the levels, called once with all of them."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.boxes, self.scores = nn.Conv2d(8, 10, 3, 1, 1), nn.Conv2d(10, 4, 1), nn.Conv2d(10, 1, 1)
        self.norm = nn.GroupNorm(5, 10)

    def forward(self, levels: list[Tensor]) -> tuple[Tensor, Tensor]:
        towers = [torch.relu(self.norm(self.tower(level))) for level in levels]
        flat = [torch.cat([layer(tower).flatten(2) for tower in towers], 2).mT for layer in (self.boxes, self.scores)]
        return flat[0], flat[1]


class Detector(nn.Module):
    """Boxes whose score is above the mean, one list per image, and a second stage that looks at each of them again."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), Head()
        self.second = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        features = self.backbone(torch.stack(images))
        boxes, scores = self.head(list(features.values()))
        found = []
        for image in range(len(images)):
            kept = scores[image, :, 0] > scores.mean().item()
            if kept.sum() == 0:
                continue
            found.append({"boxes": boxes[image][kept], "classes": self.second(boxes[image][kept])})
        return found


IMAGES = ([torch.randn(3, 16, 16), torch.randn(3, 16, 16)],)


@pytest.fixture(scope="module")
def detector() -> Detector:
    torch.manual_seed(3)
    return Detector().eval()


@pytest.fixture(scope="module")
def graph(detector: Detector) -> Any:
    return edgeprune.trace(detector, IMAGES)


def test_what_can_be_traced_is_and_its_doors_keep_their_size(graph: Any) -> None:
    paths = [part.path for part in graph.parts]
    # The second stage runs once per image.
    assert paths == ["backbone", "head", "second", "second"]
    assert {group.name: group.size for group in graph.groups} == {
        "backbone.stem.0": 12,
        "backbone.deep.0": 20,
        "head.tower": 5,  # norm groups of two
        "second.0": 16,
    }
    frozen = {axis.name for axis in graph.frozen}
    assert {"backbone.laterals.0", "head.boxes", "second.2"} <= frozen | {name.split(" (+")[0] for name in frozen}
    told = graph.explain()
    assert "traced in parts: backbone, head, second; what is between and behind them stays as it is" in told
    assert "test_parts.py" in told, "the line that cannot be traced is named"
    # The head takes what the backbone gives: one image tensor, and the boxes of the second stage, are all that goes in.
    assert [tuple(tensor.shape[1:]) for tensor in graph.example_inputs] == [(3, 16, 16), (4,), (4,)]


def test_a_cut_detector_is_the_same_class_and_equals_the_masked_one(detector: Detector, graph: Any) -> None:
    plan = edgeprune.uniform_plan(graph, 0.5)
    pruned: Any = edgeprune.apply(detector, plan)
    assert type(pruned) is Detector
    assert (pruned.backbone.stem[0].out_channels, pruned.second[0].out_features) == (6, 8)
    assert detector.backbone.stem[0].out_channels == 12
    found = pruned(*IMAGES)
    assert found[0]["boxes"].shape[1] == 4
    # From end to end on others than it was traced with: more images, another number of boxes in each.
    for count in (1, 3):
        images = [torch.rand(3, 16, 16) + place for place in range(count)]
        for one in pruned(images):
            assert one["classes"].shape == (len(one["boxes"]), 3)
            assert torch.equal(one["classes"], pruned.second(one["boxes"]))
    assert edgeprune.check(detector, plan, IMAGES) < 1e-9


@pytest.mark.parametrize("name", ["backbone.deep.0.weight", "head.scores.bias", "second.0.bias"])
def test_a_wrong_number_in_any_part_is_caught(detector: Detector, graph: Any, name: str) -> None:
    plan = edgeprune.uniform_plan(graph, 0.5)

    def cut(model: nn.Module, chosen: Any) -> nn.Module:
        pruned = edgeprune.apply(model, chosen)
        with torch.no_grad():
            pruned.get_parameter(name).view(-1)[0] += 1e-3
        return pruned

    with pytest.raises(SurgeryError, match="must equal the masked one"):
        edgeprune.check(detector, plan, IMAGES, tolerance=1e-9, cut=cut)


def test_the_plan_survives_its_file_and_the_parts_run_without_the_class(
    detector: Detector, graph: Any, tmp_path: Path
) -> None:
    plan = edgeprune.uniform_plan(graph, 0.5)
    pruned = edgeprune.apply(detector, plan)
    edgeprune.save(pruned, tmp_path / "saved", plan)
    again = edgeprune.load(tmp_path / "saved", Detector())
    torch.testing.assert_close(again.eval()(*IMAGES), pruned(*IMAGES))

    parts = edgeprune.load(tmp_path / "saved")
    inputs = graph.example_inputs
    expected = plan.traced(pruned, None)[0](*inputs)
    torch.testing.assert_close(tuple(parts(*inputs)), tuple(expected))


def test_a_damaged_part_of_a_plan_is_refused(graph: Any, tmp_path: Path) -> None:
    part = graph.parts[1].to_json()
    assert Part.from_json(part, 1, 3) == graph.parts[1]
    others = part["leaves"][1:]
    leaves = [["part", [1, 0]], ["part", [0, -1]], ["input", 3], ["input", True], ["value", [1]], ["else", 0]]
    damaged = [{**part, "leaves": [leaf, *others]} for leaf in leaves]
    damaged += [{**part, "leaves": []}, {**part, "arguments": "ls"}, {**part, "path": ""}, {"path": "backbone"}]
    for values in (*damaged, 7):
        with pytest.raises(PlanError):
            Part.from_json(json.loads(json.dumps(values)), 1, 3)
    with pytest.raises(PlanError, match="no submodule 'backbone'"):
        edgeprune.uniform_plan(graph, 0.5).traced(nn.Linear(2, 2), None)


def test_the_parts_compile(detector: Detector, graph: Any, tmp_path: Path) -> None:
    plan = edgeprune.uniform_plan(graph, 0.5)
    pruned = edgeprune.apply(detector, plan)
    artifact = edgeprune.compile(pruned, IMAGES, tmp_path / "artifact", plan=plan)
    assert artifact.manifest.name == "Detector"
    session = onnxruntime.InferenceSession(str(artifact.engine))
    names = [spec.name for spec in session.get_inputs()]
    inputs = dict(zip(names, (tensor.numpy() for tensor in graph.example_inputs), strict=True))
    expected = plan.traced(pruned, None)[0](*graph.example_inputs)
    for wanted, found in zip(expected, session.run(None, inputs), strict=True):
        np.testing.assert_allclose(found, wanted.detach().numpy(), atol=1e-4)


class Peeking(nn.Module):
    """Looks into what would be parts, in one of several ways."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.block = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.other = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.extra = nn.Linear(8, 16)
        if way == "tied":
            self.extra.weight = self.block[0].weight
        if way == "hook":
            self.block[1].register_forward_hook(lambda module, args, output: setattr(module, "seen", output))
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        y = self.other(x)
        if self.way == "in place":
            y += 3 * x
        z = self.block(y)
        if self.way == "submodule":
            z = z * self.block[0](y).mean()
        if self.way == "weight":
            z = z * self.block[0].weight.norm(dim=1).mean()
        if self.way == "hook":
            z = z * self.block[1].seen.mean()
        return z * 2 if z.sum() > 100 else z


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("not", {"block.0": 16, "other.0": 12}),
        ("in place", {"block.0": 16, "other.0": 12}),
        ("submodule", {"other.0": 12}),
        ("weight", {"other.0": 12}),
        ("hook", {"other.0": 12}),
        ("tied", {"other.0": 12}),
    ],
)
def test_a_part_whose_inside_is_used_from_outside_is_opened(way: str, expected: dict[str, int]) -> None:
    torch.manual_seed(5)
    model = Peeking(way).eval()
    x = torch.randn(4, 8)
    given = x.clone()
    graph = edgeprune.trace(model, {"x": x})
    assert {group.name: group.size for group in graph.groups} == expected
    assert model.runs == 0, "tracing runs a copy"
    assert torch.equal(x, given)
    plan = edgeprune.uniform_plan(graph, 0.5)
    assert edgeprune.check(model, plan, {"x": x}) < 1e-9
    # Units that do nothing may go: then the whole computes what it did.
    with torch.no_grad():
        for name in expected:
            layer = model.get_submodule(name)
            layer.weight[::2] = 0  # type: ignore[operator, index]
            layer.bias[::2] = 0  # type: ignore[operator, index]
    idle = edgeprune.apply(model, make_plan(graph, {name: range(1, size, 2) for name, size in expected.items()}))
    torch.testing.assert_close(idle(x), model(x))
    if way in ("not", "in place"):
        mine = [tensor.shape == x.shape and torch.equal(tensor, x) for tensor in graph.example_inputs]
        assert mine == ([True] if way == "not" else [True, False]), "what was changed in place is another input"


class SpelledOut(nn.Module):
    """A part whose forward spells out a width that can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), Reshaped())

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 2 if y.sum() > 100 else y


class Reshaped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.last = nn.Conv2d(8, 6, 1), nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return self.last(y.reshape(1, 6, *x.shape[2:]))


def test_a_part_that_spells_out_its_sizes_is_refused_with_the_line() -> None:
    model = SpelledOut().eval()
    x = torch.randn(1, 3, 12, 12)
    plan = edgeprune.uniform_plan(edgeprune.trace(model, x), 0.5)
    with pytest.raises(SurgeryError, match=r"must run at the new sizes as it is written.*reshape.*test_parts\.py"):
        edgeprune.apply(model, plan)


class Choosing(nn.Module):
    """Every layer is behind a decision: nothing but single layers can be traced, and those have nothing to cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if x.sum() > 0 else self.other(x)


def test_control_flow_without_anything_to_cut_is_the_error_that_it_was() -> None:
    with pytest.raises(TraceError, match=r"must be exportable with torch\.export, found at .*test_parts\.py"):
        edgeprune.trace(Choosing(), torch.randn(2, 4))
