"""A cut program takes its inputs as the model's own forward does: by place and by name, in any order."""

import pytest
import torch
from torch import nn

from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import cut_program
from edgeprune.surgery.plan import make_plan


class Two(nn.Module):
    """Two inputs of one shape: mistaking one for the other raises nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.head = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.one(left).relu(), self.other(right).relu()], 1))


@pytest.mark.parametrize(
    "names", [(), ("left", "right"), ("right", "left")], ids=["by place", "by name", "by name, turned"]
)
def test_inputs_are_not_mistaken_for_each_other(names):
    torch.manual_seed(0)
    model, given = Two().eval(), {"left": torch.randn(5, 4), "right": torch.randn(5, 4)}
    graph = trace(model, {name: given[name] for name in names} if names else tuple(given.values()))
    program = cut_program(model, make_plan(graph, {}, allow_empty=True)).eval()
    left, right = given.values()
    with torch.no_grad():
        wanted = model(left, right)
        assert not torch.allclose(model(right, left), wanted)
        for found in (
            program(left, right),
            program(left, right=right),
            program(left=left, right=right),
            program(right=right, left=left),
        ):
            torch.testing.assert_close(found, wanted)
