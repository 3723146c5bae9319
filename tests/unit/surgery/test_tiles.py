"""Where the tiles of linear layers begin and end, and what a set of kept tiles must obey."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

from edgeprune.errors import ConfigError, PlanError
from edgeprune.graph.tracing import trace
from edgeprune.surgery.kept_tiles import KeptTiles
from edgeprune.surgery.tiles import TileGrid, tile_grids, untiled


def grids_of(model: nn.Module, inputs: tuple[torch.Tensor, ...], tile: tuple[int, int]) -> dict[str, TileGrid]:
    return tile_grids(model, trace(model, inputs), tile)


@pytest.mark.parametrize("name", ["Fused", "FusedIndexed", "FusedChunk"])
def test_tiles_of_a_fused_projection_are_whole_heads_and_stay_within_queries_keys_and_values(
    attention_nets: ModuleType, name: str
) -> None:
    # 72 rows: 3 x 4 heads of 6. Two heads fit into 14 rows, and 18 would cross no border either.
    found = grids_of(*attention_nets.build(name), tile=(14, 10))
    assert found["attention.qkv.weight"].row_edges == (0, 12, 24, 36, 48, 60, 72)
    assert found["attention.qkv.weight"].column_edges == (0, 10, 20, 24)
    assert found["attention.proj.weight"] == TileGrid("attention.proj.weight", (0, 14, 24), (0, 6, 12, 18, 24))
    assert found["attention.proj.weight"].shape == (2, 4)
    found = grids_of(*attention_nets.build(name), tile=(18, 24))
    assert found["attention.qkv.weight"].row_edges == (0, 18, 24, 42, 48, 66, 72)


def test_a_tile_smaller_than_a_head_divides_it(attention_nets: ModuleType) -> None:
    found = grids_of(*attention_nets.build("Fused"), tile=(4, 5))
    assert found["attention.qkv.weight"].row_edges == tuple(range(0, 73, 3))
    assert found["attention.proj.weight"].column_edges == tuple(range(0, 25, 3))


def test_queries_and_keys_of_one_head_beside_each_other(attention_nets: ModuleType) -> None:
    found = grids_of(*attention_nets.build("FusedHeadsFirst"), tile=(12, 12))
    assert found["attention.qkv.weight"].row_edges == tuple(range(0, 73, 6))
    assert found["attention.proj.weight"].column_edges == (0, 12, 24)


def test_weights_that_forward_reads_without_calling_the_layer_are_left_alone(attention_nets: ModuleType) -> None:
    model, inputs = attention_nets.build("TorchLayer")
    graph = trace(model, inputs)
    assert list(tile_grids(model, graph, (8, 8))) == ["embed.weight", "layer.linear1.weight", "layer.linear2.weight"]
    assert untiled(model, graph) == {
        "layer.self_attn.out_proj.weight": "forward reads its weight without calling the layer",
        "head.weight": "its output is an output of the model",
    }
    assert "head.weight" in tile_grids(model, graph, (8, 8), classifiers=True)


def test_what_can_be_cut_into_tiles_is_explained(attention_nets: ModuleType, nets: ModuleType) -> None:
    told = trace(*attention_nets.build("TorchLayer")).explain()
    assert (
        "linear layers that can be cut into tiles: 3\n  embed.weight, layer.linear1.weight, layer.linear2.weight"
        in told
    )
    assert "  not layer.self_attn.out_proj.weight: forward reads its weight without calling the layer" in told
    assert "tiles" not in trace(nets.Grouped(), torch.randn(1, 3, 16, 16)).explain()


def test_tied_hooked_and_unused_layers_are_left_alone() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.unused = (nn.Linear(6, 6) for _ in range(4))
            self.d, self.head = nn.Linear(6, 6), nn.Linear(6, 2)
            self.b.weight = self.a.weight
            self.c.register_forward_pre_hook(lambda module, args: (args[0] * 2,))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.d(self.c(self.b(self.a(x)).relu()).relu()).relu())

    model = Odd()
    graph = trace(model, torch.randn(2, 6))
    assert list(tile_grids(model, graph)) == ["d.weight"]
    assert untiled(model, graph) == {
        "a.weight": "its weight is also 'b.weight'",
        "b.weight": "its weight is also 'a.weight'",
        "c.weight": "its class or a hook changes what it computes",
        "unused.weight": "forward does not read its weight, or not as a parameter of the traced program",
        "head.weight": "its output is an output of the model",
    }


def test_sizes_that_do_not_divide_and_layers_narrower_than_a_tile(attention_nets: ModuleType) -> None:
    model, inputs = attention_nets.build("TorchLayer")
    found = tile_grids(model, trace(model, inputs), (64, 7), sizes={"layer.linear1.weight": (5, 100)})
    assert found["layer.linear1.weight"].row_edges == (0, 5, 10, 15, 20, 25, 30, 32)
    assert found["layer.linear1.weight"].column_edges == (0, 24)
    assert found["layer.linear2.weight"].row_edges == (0, 24)
    assert found["layer.linear2.weight"].column_edges == (0, 7, 14, 21, 28, 32)
    assert found["layer.linear2.weight"].weights().tolist() == [[168, 168, 168, 168, 96]]


def test_a_model_without_linear_layers(nets: ModuleType) -> None:
    model = nets.Grouped()
    graph = trace(model, torch.randn(1, 3, 16, 16))
    with pytest.raises(
        ConfigError, match="must have a linear layer besides its classifier to be cut into tiles, found"
    ):
        tile_grids(model, graph)


def test_bad_sizes(attention_nets: ModuleType) -> None:
    model, inputs = attention_nets.build("Fused")
    graph = trace(model, inputs)
    with pytest.raises(ConfigError, match="at least one row and one column, found 0 x 8"):
        tile_grids(model, graph, (0, 8))
    with pytest.raises(ConfigError, match=r"found 'head\.weight': it is a classifier"):
        tile_grids(model, graph, sizes={"head.weight": (8, 8)})
    with pytest.raises(ConfigError, match=r"found 'nowhere\.weight'"):
        tile_grids(model, graph, sizes={"nowhere.weight": (8, 8)})


@pytest.mark.parametrize("edges", [(), (0,), (1, 4), (0, 4, 4), (0, 4, 2)])
def test_edges_that_cannot_be(edges: tuple[int, ...]) -> None:
    with pytest.raises(PlanError, match="edges of the tiles of 'a' must ascend from 0"):
        TileGrid("a", edges, (0, 4))
    with pytest.raises(PlanError, match="edges of the tiles of 'a' must ascend from 0"):
        TileGrid("a", (0, 4), edges)


GRID = TileGrid("a", (0, 4, 6), (0, 3, 6, 7))


def test_kept_tiles_and_arrays() -> None:
    kept = np.array([[True, False, True], [False, False, False]])
    found = KeptTiles.of(GRID, kept)
    assert found.kept == ((0, 2), ())
    assert (found.array() == kept).all()
    assert found.weights == 4 * 3 + 4 * 1


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        (((0,),), "must be given for its 2 block rows, found 1"),
        (((0, 3), ()), r"must lie in its 2 x 3 grid, found \(0, 3\)"),
        (((0,), (-1,)), r"must lie in its 2 x 3 grid, found \(1, -1\)"),
        (((1, 1), ()), "of block row 0 of 'a' must be ascending and named once"),
    ],
)
def test_kept_tiles_that_cannot_be(kept: tuple[tuple[int, ...], ...], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        KeptTiles(GRID, kept)


def test_arrays_that_cannot_be() -> None:
    with pytest.raises(PlanError, match=r"boolean array of shape \(2, 3\), found bool of shape \(3, 2\)"):
        KeptTiles.of(GRID, np.ones((3, 2), bool))
    with pytest.raises(PlanError, match="found int64 of shape"):
        KeptTiles.of(GRID, np.ones((2, 3), np.int64))
