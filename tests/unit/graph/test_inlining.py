"""Regions with their own gradient or autocast state are part of the program like everything else."""

from __future__ import annotations

import torch
from torch import nn

from edgeprune.graph.capture import capture
from edgeprune.graph.tracing import trace
from edgeprune.surgery.checking import check
from edgeprune.surgery.plan import uniform_plan


class Regions(nn.Module):
    """A region without autocast that ends in two tensors, and one inside of another that turns gradients on."""

    def __init__(self, enabled: bool) -> None:
        super().__init__()
        self.first, self.scale, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)
        self.enabled = enabled

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            y = self.scale(x.relu())
            with torch.enable_grad():
                z = y * 2
        return self.last(x + y + z)


def test_a_region_without_autocast_is_put_in_line() -> None:
    model, x = Regions(enabled=False).eval(), torch.randn(1, 3, 4, 4)
    program = capture(model, x).program
    assert not [node for node in program.graph.nodes if "wrap_with" in str(node.target) or node.op == "get_attr"]
    wide = torch.randn(5, 3, 4, 4)
    (found,) = torch.fx.Interpreter(program.graph_module).run(*program.state_dict.values(), wide)
    torch.testing.assert_close(found, model(wide))


def test_channels_are_cut_inside_of_a_region() -> None:
    model, x = Regions(enabled=False).eval(), torch.randn(1, 3, 4, 4)
    graph = trace(model, x)
    assert {m.parameter for group in graph.groups for m in group.members} >= {"scale.weight", "last.weight"}
    plan = uniform_plan(graph, ratio=0.5)
    assert check(model, plan, x) < 1e-9


def test_a_region_with_autocast_stays_as_it_is() -> None:
    graph = trace(Regions(enabled=True).eval(), torch.randn(1, 3, 4, 4))
    assert any("wrap_with_autocast" in axis.op for axis in graph.frozen)
    assert not graph.groups
