"""`check` catches planted surgery bugs."""

from __future__ import annotations

import random
from collections import Counter
from types import ModuleType
from typing import Any

import torch

from edgeprune.errors import PlanError, SurgeryError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.surgery.plan import make_plan

CONVOLUTIONAL = [
    "ResNet", "OptionA", "VGG", "DenseNet", "Inverted", "Shuffle", "Grouped", "UNet", "Gated", "Attended", "Tied",
]  # fmt: skip
ATTENDING = [
    "Fused", "FusedChunk", "Separate", "HandWritten", "GroupedExpand", "Rotary", "RelativeBias", "TalkingHeads",
    "BesideBatch", "QueryNorm", "TorchBatchFirst",
]  # fmt: skip
PARTS = ["Windowed", "SwiGlu", "FusedGlu", "ConvParts"]
TOTAL, EACH = 200, 8


def test_planted_surgery_bugs_are_caught(
    nets: ModuleType, attention_nets: ModuleType, part_nets: ModuleType, planted_bugs: ModuleType, compare: Any
) -> None:
    dice = random.Random(7)
    x = torch.randn(1, 3, 16, 16)
    makers = {name: lambda name=name: (getattr(nets, name)(), (x,)) for name in CONVOLUTIONAL}
    makers |= {name: lambda name=name: attention_nets.build(name) for name in ATTENDING}
    makers |= {name: lambda name=name: part_nets.build(name) for name in PARTS}
    found: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    survivors = []
    for name, make in makers.items():
        model, inputs = make()
        graph = trace(model.double(), tuple(tensor.double() for tensor in inputs))
        plan = make_plan(graph, {g.name: sorted(dice.sample(range(g.size), max(1, g.size // 2))) for g in graph.groups})
        assert compare(graph, plan) < 1e-9
        bugs = planted_bugs.planted(graph, plan, dice)
        dice.shuffle(bugs)
        # Rare kinds first, so that all are tried.
        bugs.sort(key=lambda bug: kinds[bug.kind])
        assert len(bugs) >= EACH, name
        for bug in bugs[:EACH]:
            kinds[bug.kind] += 1
            outcome = _outcome(compare, graph, bug)
            found[outcome] += 1
            if outcome == "survived":
                survivors.append(f"{name}: {bug.kind} at {bug.where}")
    assert found.total() >= TOTAL
    assert len(survivors) <= 0.01 * found.total(), survivors
    assert found["wrong values"] > found["did not run"], "most bugs must be of the kind that runs"
    assert len(kinds) >= 16


def _outcome(compare: Any, graph: ChannelGraph, bug: Any) -> str:
    try:
        return "wrong values" if not compare(graph, bug.believed, bug.cut) < 1e-9 else "survived"
    except SurgeryError as error:
        return "did not run" if "must run" in error.message or "must have shape" in error.message else "wrong values"
    except (PlanError, IndexError):
        return "did not run"
