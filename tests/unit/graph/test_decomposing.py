"""Operations without a rule that torch writes in terms of others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.plan import make_plan, uniform_plan
from edgeprune.surgery.program_module import ProgramModule

X = torch.randn(2, 3, 6, 6)
Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Net(nn.Module):
    """Two convolutions, an operation, and a sum that any number of channels has."""

    def __init__(self, op: Op) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.op = op

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.op(self.a(x), self.b(x)).flatten(1).sum(1)


OPERATIONS: dict[str, tuple[Op, dict[str, int]]] = {
    "hstack": (lambda a, b: torch.hstack([a, b]), {"a": 8, "b": 8}),
    "concatenate": (lambda a, b: torch.concatenate([a, b], 1), {"a": 8, "b": 8}),
    "tensor_split": (
        lambda a, b: torch.cat([*a.tensor_split(3, 1)[::-1], b], 1),
        {"a[0:3]": 3, "a[3:6]": 3, "a[6:8]": 2, "b": 8},
    ),
    "multiply": (torch.multiply, {"a (+1 layer)": 8}),
    "subtract": (torch.subtract, {"a (+1 layer)": 8}),
    "tile": (lambda a, b: a.tile(1, 2, 1, 1) + torch.cat([b, b], 1), {"a (+1 layer)": 8}),
    "clip": (lambda a, b: (a + b).clip(0, 1), {"a (+1 layer)": 8}),
    "vecdot": (lambda a, b: torch.linalg.vecdot(a, b), {"a (+1 layer)": 8}),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_taken_apart_where_its_parts_have_rules(name: str) -> None:
    op, widths = OPERATIONS[name]
    model = Net(op)
    graph = trace(model, X)
    assert graph.widths() == widths
    assert graph.dynamic_batch
    plan = uniform_plan(graph, 0.5)
    assert check(model, plan, X) < 1e-9
    assert plan.program is not None
    alone = ProgramModule(plan.program, apply(model, plan).state_dict())
    for batch in (1, 5):
        assert alone(torch.randn(batch, 3, 6, 6)).shape == (batch,)


def test_what_consists_of_operations_without_rules_keeps_its_own_name() -> None:
    graph = trace(Net(lambda a, b: torch.cdist(a, b)), X)
    assert graph.widths() == {}
    reasons = {axis.reason for axis in graph.frozen if axis.op not in ("input", "output")}
    assert reasons == {"aten.cdist.default has no rule"}


def test_the_parts_have_the_line_and_the_module_of_the_whole() -> None:
    graph = trace(nn.Sequential(Net(lambda a, b: torch.hstack([a, b.roll(1, 1)]))), X)
    nodes = [node for node in graph.program.graph.nodes if str(node.target) == "aten.cat.default"]
    assert [__file__ in str(node.meta["stack_trace"]) for node in nodes] == [True]
    assert make_plan(graph, {"0.a": range(4)}).kept.keys() == {"0.a.weight", "0.a.bias"}
