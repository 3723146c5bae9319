"""The small networks, as modules."""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.surgery.checking import difference
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.masking import randomize
from edgeprune.surgery.plan import PruningPlan

Compare = Callable[..., float]


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def nets() -> ModuleType:
    return _module("small_nets", Path(__file__).parents[1] / "graph" / "nets.py")


@pytest.fixture(scope="session")
def attention_nets() -> ModuleType:
    return _module("attention_nets", Path(__file__).parent / "attention_nets.py")


@pytest.fixture(scope="session")
def vision_transformers() -> ModuleType:
    return _module("vision_transformers", Path(__file__).parent / "vision_transformers.py")


@pytest.fixture(scope="session")
def part_nets() -> ModuleType:
    return _module("part_nets", Path(__file__).parent / "part_nets.py")


@pytest.fixture(scope="session")
def random_nets() -> ModuleType:
    for part in ("random_images", "random_tokens"):
        _module(part, Path(__file__).parent / f"{part}.py")
    return _module("random_nets", Path(__file__).parent / "random_nets.py")


@pytest.fixture(scope="session")
def planted_bugs() -> ModuleType:
    return _module("planted_bugs", Path(__file__).parent / "planted_bugs.py")


@pytest.fixture(scope="session")
def compare() -> Compare:
    """`check` on random weights, on the program that the trace of a model in float64 already holds.

    To capture a program is most of the time that `check` takes.
    """

    def worst(
        graph: ChannelGraph, plan: PruningPlan, cut: Callable[[nn.Module, PruningPlan], nn.Module] = apply
    ) -> float:
        model = copy.deepcopy(graph.model)
        randomize(model)
        pruned = cut(model, plan)
        generator = torch.Generator().manual_seed(0)
        inputs = tuple(
            torch.randn((3, *tensor.shape[1:]), generator=generator, dtype=torch.float64) * 3 + 1
            for tensor in graph.example_inputs
        )
        norms = any(isinstance(module, nn.modules.batchnorm._NormBase) for module in model.modules())
        forms = (False, True) if norms else (False,)
        return max(difference(graph.program, model, pruned, plan, (inputs, {}), training=form) for form in forms)

    return worst


@pytest.fixture(autouse=True)
def _repeatable() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
