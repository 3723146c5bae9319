"""The law of lowering for layers with tiles: `of_plan` is what the runtime executes for the model that the plan leaves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.backends import registry
from edgeprune.errors import PlanError, UnsupportedKernelError
from edgeprune.graph.linear_layers import readers_of_parameters
from edgeprune.lowering.kernel_graph import KernelGraph
from edgeprune.lowering.tile_choice import worthwhile_tiles
from edgeprune.lowering.trained_form import in_trained_form
from edgeprune.spec import Kernel
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.plan import PruningPlan, make_plan
from edgeprune.surgery.tile_folds import tiled_layers
from edgeprune.surgery.tile_layout import TileLayout
from edgeprune.surgery.tiles import tile_grids


class Layer(nn.Module):
    """A layer of a transformer with separate or fused projections."""

    def __init__(self, width: int, *, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        names = ("qkv",) if fused else ("q", "k", "v")
        self.projections = nn.ModuleDict({name: nn.Linear(width, width * (3 if fused else 1)) for name in names})
        self.proj, self.fc1, self.fc2 = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm1(x)
        parts = [layer(y) for layer in self.projections.values()]
        q, k, v = (part.unflatten(-1, (-1, 8)).transpose(1, 2) for part in torch.cat(parts, -1).chunk(3, dim=-1))
        x = x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v, scale=0.35).transpose(1, 2).flatten(2))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 32)
        self.layers = Layer(32, fused=fused)
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.layers(self.embed(x)))[:, 0])


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "separate"])
def lowered(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> KernelGraph:
    torch.manual_seed(0)
    model = Transformer(fused=request.param).eval()
    return edgeprune.lower(edgeprune.trace(model, torch.randn(1, 5, 6)), workdir=tmp_path_factory.mktemp("lowered"))


def plan_of(
    lowered: KernelGraph, seed: int, density: float, units: Mapping[str, Sequence[int]] | None = None
) -> PruningPlan:
    graph, dice = lowered.graph, np.random.default_rng(seed)
    tiles = {
        name: KeptTiles.of(grid, dice.random(grid.shape) < density)
        for name, grid in tile_grids(graph.model, graph, (8, 8)).items()
    }
    return make_plan(graph, units or {}, kept_tiles=tiles)


@pytest.mark.parametrize(("seed", "density"), [(0, 0.5), (3, 0.3)])
def test_kernels_of_a_plan_are_those_of_the_model_that_it_leaves(
    lowered: KernelGraph, tmp_path: Path, seed: int, density: float
) -> None:
    plan = plan_of(lowered, seed, density, {"layers.fc1": range(5, 64)})
    engine = tmp_path / "cut.onnx"
    cut = in_trained_form(edgeprune.apply(lowered.graph.model, plan))
    lowered.backend.export(cut, lowered.graph.example_inputs, engine)
    executed = Counter(kernel.key for kernel in lowered.backend.parse_engine(engine))
    assert Counter(kernel.key for kernel in lowered.of_plan(plan)) == executed


def test_products_of_tiles_name_the_layer_that_they_compute(lowered: KernelGraph) -> None:
    plan = plan_of(lowered, 1, 0.5)
    readers = readers_of_parameters(lowered.graph)
    found = Counter(origin for kernel in lowered.of_plan(plan) if kernel.op == "MatMul" for origin in kernel.origin)
    for name, layer in tiled_layers(plan).items():
        assert found[readers[name][0].name] == len(layer.layout.products)


def test_a_plan_without_tiles_has_the_kernels_of_its_widths(lowered: KernelGraph) -> None:
    plan = make_plan(lowered.graph, {"layers.fc1": range(9)})
    assert lowered.of_plan(plan) == lowered.at({"layers.fc1": 9})


def test_tiles_that_only_cost_units_have_the_kernels_of_a_cut_of_channels(lowered: KernelGraph) -> None:
    grid = tile_grids(lowered.graph.model, lowered.graph, (8, 32))["layers.fc1.weight"]
    kept = np.array([[True], [False]] * 4)
    plan = make_plan(lowered.graph, {}, kept_tiles={grid.parameter: KeptTiles.of(grid, kept)})
    assert lowered.of_plan(plan) == lowered.at({"layers.fc1": 32})


def test_a_plan_of_another_model_is_refused(lowered: KernelGraph) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = edgeprune.uniform_plan(edgeprune.trace(model, torch.randn(1, 6)), 0.5)
    with pytest.raises(PlanError, match="must belong to the lowered model"):
        lowered.of_plan(plan)


def test_tiles_are_not_priced_where_their_kernels_are_not_known(lowered: KernelGraph) -> None:
    with pytest.raises(UnsupportedKernelError, match="those of tvm are not"):
        registry.BACKENDS.make("tvm").tiled(lowered.operators, {}, {})
    with pytest.raises(
        UnsupportedKernelError, match="must be a product of its own in the runtime, that of 'nothing' is fused"
    ):
        lowered.backend.tiled(lowered.operators, {}, {"nothing": TileLayout(1, 1, (), ())})


class Costs:
    """Milliseconds by products and kernels: what a kernel costs, however small it is, decides."""

    def __init__(self, kernel_ms: float) -> None:
        self.kernel_ms = kernel_ms

    def network_ms(self, kernels: Sequence[Kernel]) -> float:
        products = [kernel for kernel in kernels if kernel.op in ("MatMul", "Gemm") and len(kernel.inputs) == 1]
        work = sum(np.prod(kernel.output) * kernel.inputs[0][-1] for kernel in products)
        return 1e-5 * float(work) + self.kernel_ms * len(kernels)


def test_layers_stay_sparse_only_where_that_is_predicted_to_pay(lowered: KernelGraph, tmp_path: Path) -> None:
    plan = plan_of(lowered, 0, 0.5)
    every = worthwhile_tiles(lowered, Costs(0.0), plan)
    assert every.plan == plan
    assert all(gain > 0 for gain in every.gains_ms.values())
    none = worthwhile_tiles(lowered, Costs(100.0), plan)
    assert not none.plan.kept_tiles
    assert not none.plan.folds
    assert none.latency_ms == Costs(100.0).network_ms(lowered.at({}))
    some = worthwhile_tiles(lowered, Costs(0.002), plan)
    assert 0 < len(some.plan.kept_tiles) < len(plan.kept_tiles)
    costs = Costs(0.002)
    assert some.latency_ms < min(costs.network_ms(lowered.of_plan(one)) for one in (plan, none.plan))
    some.plan.save(tmp_path / "plan.json")
    assert PruningPlan.load(tmp_path / "plan.json") == some.plan
