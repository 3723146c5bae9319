"""What goes into a cut program and comes out of it: nested, and things that are no tensors."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError, InputError, PlanError, SurgeryError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import uniform_plan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.storage import load, save

X = torch.randn(1, 3, 16, 16)


class Nested(nn.Module):
    """Takes a dict and gives an ordered one, a list and a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, images: dict[str, torch.Tensor], scale: torch.Tensor) -> Any:
        x = self.b(self.a(images["left"] + images["right"]).reshape(-1, 8, 16, 16))
        return OrderedDict(out=x, other=[x * scale, (x.mean(),)])


def test_nested_inputs_and_outputs_survive_a_written_program() -> None:
    model = Nested()
    inputs = {"images": {"left": X, "right": X + 1}, "scale": torch.ones(1)}
    plan = uniform_plan(trace(model, inputs), 0.5)
    pruned = apply(model, plan).eval()
    assert isinstance(pruned, ProgramModule)
    found = pruned(**inputs)
    assert type(found) is OrderedDict
    assert list(found) == ["out", "other"]
    assert isinstance(found["other"], list)
    assert isinstance(found["other"][1], tuple)
    assert check(model, plan, inputs) < 1e-9


class Switched(nn.Module):
    """Takes things that are no tensors; one of them decides what is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor, twice: bool, *, names: Any = None, scale: float = 1.0) -> torch.Tensor:
        x = self.a(x).reshape(-1, 8, 16, 16) * scale
        return self.b(x + x if twice else x)


def test_arguments_that_are_no_tensors_are_those_of_the_trace(tmp_path: Path) -> None:
    model = Switched()
    inputs = {"x": X, "twice": True, "names": None, "scale": 0.5}
    plan = uniform_plan(trace(model, inputs), 0.5)
    pruned = apply(model, plan).eval()
    assert isinstance(pruned, ProgramModule)
    assert check(model, plan, inputs) < 1e-9
    save(pruned, tmp_path, plan)
    assert torch.equal(load(tmp_path)(**inputs), pruned(**inputs))
    with pytest.raises(SurgeryError, match="argument 'twice' must be True, as when the model was traced, found False"):
        pruned(**inputs | {"twice": False})


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((X, 1, X), r"arguments of forward\(images, scale\), found 3 by position \(too many positional arguments\)"),
        ({"images": {"left": X}}, r"forward\(images, scale\), found 'images' \(missing a required argument: 'scale'\)"),
    ],
)
def test_example_inputs_that_forward_does_not_take_are_named(inputs: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        trace(Nested(), inputs)


def test_what_is_no_model_plan_or_graph_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)).eval()
    graph: Any = trace(net, X)
    plan: Any = uniform_plan(graph, 0.5)
    other: Any = "plan.json"
    for use in (lambda: apply(net, other), lambda: check(net, other, X)):
        with pytest.raises(PlanError, match="a plan must be a PruningPlan, found str"):
            use()
    with pytest.raises(InputError, match=r"the model must be a torch\.nn\.Module, found PruningPlan"):
        apply(plan, plan)
    with pytest.raises(ConfigError, match="must be made for the graph of a model, found Sequential"):
        uniform_plan(net, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"the ratio must lie in \[0, 1\), found 'half'"):
        uniform_plan(graph, "half")  # type: ignore[arg-type]
    # Not that it does not run in float64: it runs in no precision on these.
    with pytest.raises(InputError, match=r"must run on its example inputs, .* to have 3 channels, but got 5"):
        check(net, plan, torch.randn(1, 5, 8, 8))
