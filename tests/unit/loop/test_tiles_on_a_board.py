"""The board has the last word on tiles: dense and tiled engine interleaved, and a board that is lost."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.loop.tile_sizes import sizes_in
from edgeprune.profiling import selecting
from edgeprune.profiling.tiled_draws import TiledDraw, TiledPlans
from edgeprune.report.tiled import from_tiles


@pytest.fixture
def board(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(tmp_path / "board"))
    with Board.open("local") as opened:
        yield opened


def tiled(board):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 4)).eval()
    data = [(torch.randn(8, 256), torch.randint(0, 4, (8,))) for _ in range(3)]
    task = edgeprune.Task.single(
        train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, _: float(outputs.mean()), name="mean"
    )
    budget = edgeprune.Budget.of(macs="40%")
    return edgeprune.prune_tiles(
        model, torch.zeros(64, 256), budget, task, board, tile=(64, 64), measuring_rounds=3, refit=False
    )


def test_the_ratio_to_the_dense_engine_is_measured(board):
    found = tiled(board)
    assert found.measured.board == board.name
    assert found.measured.ratio_low <= found.measured.ratio <= found.measured.ratio_high
    assert 0 < found.measured.ratio < 1, "three fifths of the work are gone, whoever else computes"
    assert not any("unverified" in note for note in found.notes)


def test_a_lost_board_does_not_take_the_model_along(board, lost_board_of):
    found = tiled(lost_board_of(board))
    assert found.measured is None
    assert found.notes[-1] == (
        "The latency is unverified: it is not known, local could not measure it: the board must answer, found no route to it."
    )


@pytest.mark.usefixtures("roughly")
def test_what_the_board_says_corrects_the_next_plan(board):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256), nn.GELU(), nn.Linear(256, 4)).eval()
    data = [(torch.randn(8, 256), torch.randint(0, 4, (8,))) for _ in range(3)]
    task = edgeprune.Task.single(
        train=data, validation=data, loss=F.cross_entropy, metric=lambda outputs, _: float(outputs.mean()), name="mean"
    )
    example = torch.zeros(64, 256)
    graph = edgeprune.trace(model, example)
    lowered = edgeprune.lower(graph, model=model)
    table = edgeprune.profile(model, example, board, minutes=0.03, graph=graph, kernel_graph=lowered)
    found = edgeprune.prune_tiles(
        model,
        example,
        "60%",
        task,
        board,
        edgeprune.fit(table),
        tile=(64, 64),
        kernel_graph=lowered,
        refit=False,
        most_rounds=2,
        measuring_rounds=3,
    )
    assert 1 <= len(found.rounds) <= 2
    assert all(turn.measured.board == board.name for turn in found.rounds)
    taken = found.rounds[found.chosen]
    kept = {name: layer.kept for name, layer in found.layers.items()}
    assert kept == {name: taken.widths[name] for name in kept}
    if len(found.rounds) == 2:
        # Too slow there: aimed lower next; not used up: aimed higher.
        first, second = found.rounds
        assert first.widths != second.widths
        assert (second.aim_ms < first.aim_ms) == (first.measured.ratio > 0.6)
        assert any("2 plans were tried on the board" in note for note in found.notes)
    assert found.measured is not None
    page = from_tiles(found, title="tiles", table_hash=table.hash, parameters=(2, 1))
    assert [row.taken for row in page.rounds] == [place == found.chosen for place in range(len(found.rounds))]
    for row, turn in zip(page.rounds, found.rounds, strict=True):
        assert row.of_budget == pytest.approx(turn.measured.ratio / 0.6)
        assert row.predicted_ms == turn.predicted_ms
    assert [row.name for row in page.candidates] == ["dense", "pruned"]
    assert page.candidates[1].ratio == found.measured.ratio


def test_a_table_that_was_profiled_with_tiles_prices_them_and_says_their_sizes(board, monkeypatch):
    # However little fits into so short a time on a busy machine: a few kernels of each operation.
    monkeypatch.setattr(selecting, "_LEAST_KERNELS", 28)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers = (nn.Linear(256, 512), nn.Softmax(-1), nn.Linear(512, 256), nn.Softmax(-1), nn.Linear(256, 4))
    model = nn.Sequential(*layers).eval()
    example, tiles = torch.zeros(64, 256), ((64, 64),)
    graph = edgeprune.trace(model, example)
    lowered = edgeprune.lower(graph, model=model)
    table = edgeprune.profile(model, example, board, minutes=0.03, tiles=tiles, graph=graph, kernel_graph=lowered)
    assert {"Split", "Concat"} <= {kernel.op for kernel in table.kernels}
    assert {"tiles-00", "tiles-01"} <= {network.name for network in table.networks}
    assert table.header["models"][0]["tiles"] == [[64, 64]]
    tiled = next(network for network in table.networks if network.name == "tiles-00")
    assert tiled.widths == graph.widths()
    assert any('"Concat"' in key for key in tiled.kernels)
    assert sizes_in(table.header, graph.signature) == tiles
    # No operation of another plan is one that its predictor would have to guess, as by the table of a dense model.
    other = TiledPlans(lowered).of(TiledDraw((64, 64), 0.5, seed=9))
    assert {kernel.op for kernel in lowered.of_plan(other)} <= {kernel.op for kernel in table.kernels}
