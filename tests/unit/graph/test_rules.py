"""Every rule row against a brute force: perturb a unit, see which positions of the output change."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.rules.table import FAMILIES
from edgeprune.graph.tracing import trace


def _module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


_FIRST, _REST = _module("rule_rows"), _module("rule_rows_rest")
C, H = _FIRST.C, _FIRST.H
ROWS: dict[str, tuple[Any, ...]] = _FIRST.ROWS | _REST.ROWS


class Probe(nn.Module):
    """Two convolutions, the operation, and a sum over everything (which pins nothing)."""

    def __init__(self, op: Callable[..., Any], layer: nn.Module | None) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, C, 1), nn.Conv2d(3, C, 1)
        self.op, self.layer = op, layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.result(self.a(x), self.b(x))
        return y.double().sum()

    def result(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.op(a, b) if self.layer is None else self.op(self.layer, a, b)


@pytest.mark.parametrize("name", ROWS)
def test_a_unit_is_exactly_what_a_perturbation_reaches(name: str) -> None:
    probe, graph = _traced(name)
    units = ROWS[name][1]
    input_codes = {"a": graph.unit_of["conv2d"][1], "b": graph.unit_of["conv2d_1"][1]}
    free = sorted(set(input_codes["a"].ravel().tolist()) - {-1})
    assert len(free) == units
    total = next(n for n in graph.program.graph.nodes if n.op == "output").args[0][0]
    result = total.args[0].args[0]
    output_codes = graph.unit_of[result.name]
    for unit in free:
        changed = _changed(probe, {k: (codes == unit).any(axis=0) for k, codes in input_codes.items()})
        expected = torch.zeros(changed.shape, dtype=torch.bool)
        for axis, codes in enumerate(output_codes):
            view = [1] * changed.ndim
            view[axis] = -1
            expected |= torch.from_numpy((codes == unit).any(axis=0)).reshape(view)
        if name in _REST.COARSE:
            assert not (changed & ~expected).any(), f"unit {unit}"
        elif name not in _REST.MIXING and (name not in ("attention", "einsum of heads") or expected.any()):
            # A head dimension of the queries reaches every result of its head, and none is labeled with it.
            assert torch.equal(changed, expected), f"unit {unit}"


@cache
def _traced(name: str) -> tuple[Probe, ChannelGraph]:
    op, _, make_layer = ROWS[name]
    probe = Probe(op, make_layer() if make_layer else None).eval()
    return probe, trace(probe, torch.randn(2, 3, H, H))


def _changed(probe: Probe, perturbed: dict[str, Any]) -> torch.Tensor:
    """Positions of the result that change for any of several large perturbations of some channels."""
    changed = None
    for seed in range(6):
        generator = torch.Generator().manual_seed(seed)
        values = {k: torch.randn(2, C, H, H, generator=generator, dtype=torch.float64) for k in "ab"}
        moved = {}
        for key, value in values.items():
            noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            mask = torch.from_numpy(perturbed[key]).reshape(1, C, 1, 1)
            moved[key] = value + mask * (noise + 0.7)
        with torch.no_grad():
            before = probe.double().result(**values)
            after = probe.double().result(**moved)
        probe.float()
        now = before != after
        changed = now if changed is None else changed | now
    assert changed is not None
    return changed


def test_every_rule_has_a_row() -> None:
    graphs = [_traced(name)[1] for name in ROWS]
    seen = {str(node.target) for graph in graphs for node in graph.program.graph.nodes if node.op == "call_function"}
    assert {name for family in FAMILIES for name in family.TABLE} - seen == set()


def test_every_rule_is_found_by_the_name_that_torch_prints() -> None:
    names = [name for family in FAMILIES for name in family.TABLE]
    assert len(names) == len(set(names))
    for name in names:
        space, packet, overload = name.split(".")
        assert hasattr(getattr(getattr(torch.ops, space), packet), overload), name
