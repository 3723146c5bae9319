"""What is left of tiled layers runs in ONNX Runtime as standard operations, and as few of them as the layout says."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from edgeprune.backends.onnxruntime.exporting import export
from edgeprune.graph.tracing import trace
from edgeprune.surgery.cutting import apply
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.masking import MaskedProgram
from edgeprune.surgery.plan import make_plan
from edgeprune.surgery.program_module import ProgramModule
from edgeprune.surgery.tile_folds import tiled_layers
from edgeprune.surgery.tiles import TileGrid, tile_grids


def operations(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(("net", "program", "density"), [("VisionTransformer", False, 0.35), ("SpelledOut", True, 0.5)])
def test_exported_equals_masked_with_the_operations_of_the_layout(
    vision_transformers: ModuleType, tmp_path: Path, net: str, program: bool, density: float
) -> None:
    images = vision_transformers.IMAGES
    model = getattr(vision_transformers, net)(blocks=1).eval()
    graph = trace(model, images)
    tiles = vision_transformers.random_tiles(tile_grids(model, graph, (8, 8)), 4, density)
    plan = make_plan(graph, {"patches (+2 layers)": range(1, 24)} if program else {}, kept_tiles=tiles)
    cut = apply(model, plan)
    assert isinstance(cut, ProgramModule) is program
    export(model, (images,), tmp_path / "dense.onnx")
    export(cut, (images,), tmp_path / "cut.onnx")

    x = torch.randn_like(images)
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    (masked,) = MaskedProgram(graph.program, plan, dict(model.named_parameters()), training=False).outputs([x])
    assert np.abs(found - masked.numpy()).max() < 1e-4

    dense, cut_operations = operations(tmp_path / "dense.onnx"), operations(tmp_path / "cut.onnx")
    more = {op: cut_operations[op] - dense[op] for op in cut_operations.keys() | dense.keys()}
    layouts = [layer.layout for layer in tiled_layers(plan).values()]
    assert more.pop("MatMul") == sum(len(layout.products) - 1 for layout in layouts)
    assert more.pop("Split", 0) <= sum(
        layout.is_split + sum(len(product.rows) > 1 for product in layout.products) for layout in layouts
    )
    assert more.pop("Concat") <= sum(
        1 + sum(len(product.pieces) > 1 for product in layout.products) for layout in layouts
    )
    assert more.pop("Slice", 0) <= sum(len(layout.pieces) for layout in layouts if not layout.is_split)
    assert all(count <= 0 for count in more.values()), more


def test_a_layer_as_large_as_that_of_a_small_vision_transformer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384)).eval()
    x = torch.randn(1, 197, 384)
    graph = trace(model, x)
    dice = np.random.default_rng(0)
    tiles = {
        name: KeptTiles.of(grid, dice.random(grid.shape) < 0.5)
        for name, grid in tile_grids(model, graph, classifiers=True).items()
    }
    assert {name: tile.grid.shape for name, tile in tiles.items()} == {"0.weight": (24, 3), "2.weight": (6, 12)}
    cut = apply(model, make_plan(graph, {}, kept_tiles=tiles))
    export(model, (x,), tmp_path / "dense.onnx")
    export(cut, (x,), tmp_path / "cut.onnx")
    kept = sum(tile.weights for tile in tiles.values())
    assert (tmp_path / "cut.onnx").stat().st_size < 4 * kept + 20_000
    # At most one product for each set of three block columns, and one for each of the second layer's six block rows.
    found = operations(tmp_path / "cut.onnx")
    assert found["MatMul"] <= 7 + 6
    assert sum(found.values()) <= sum(operations(tmp_path / "dense.onnx").values()) + 12 + 7 + 6 + 4
    session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"))
    (have,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        for name, tile in tiles.items():
            rows, columns = (np.diff(edges) for edges in (tile.grid.row_edges, tile.grid.column_edges))
            mask = tile.array().repeat(rows, 0).repeat(columns, 1)
            model.get_parameter(name).mul_(torch.tensor(mask))
        assert np.abs(have - model(x).numpy()).max() < 1e-4


def test_a_layer_that_reads_nothing_is_exported(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 12), nn.Softmax(-1), nn.Linear(12, 4)).eval()
    x = torch.randn(2, 8)
    graph = trace(model, x)
    grid = TileGrid("0.weight", (0, 4, 12), (0, 8))
    for kept in ([[False], [False]], [[True], [False]]):
        plan = make_plan(graph, {}, kept_tiles={"0.weight": KeptTiles.of(grid, np.array(kept))})
        cut = apply(model, plan)
        export(cut, (x,), tmp_path / "cut.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "cut.onnx"))
        (have,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        assert np.abs(have - cut(x).detach().numpy()).max() < 1e-6
