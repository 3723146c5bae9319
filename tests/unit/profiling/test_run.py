"""`profile`: from a model to a table, on this machine."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.errors import BoardBusyError, ConfigError, PowerUnavailableError
from edgeprune.graph.channel_graph import ChannelGraph
from edgeprune.graph.tracing import trace
from edgeprune.latency.table import LatencyTable
from edgeprune.profiling import afterwards
from edgeprune.profiling.energy import measure_energy
from edgeprune.profiling.energy_windows import EnergyMeasurement
from edgeprune.profiling.run import DENSE, profile

INPUT = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


@pytest.fixture(scope="module")
def graph(model: nn.Module) -> ChannelGraph:
    return trace(model, INPUT)


def test_table_holds_kernels_and_networks_of_the_same_rounds(
    board: Board, model: nn.Module, graph: ChannelGraph, tmp_path: Path
) -> None:
    told: list[tuple[int, int, float, str]] = []
    out = tmp_path / "tables" / "table.parquet"
    table = profile(
        model, INPUT, board, minutes=0.05, seed=4, out=out, graph=graph, progress=lambda *state: told.append(state)
    )
    assert LatencyTable.load(out).hash == table.hash
    assert [path.name for path in out.parent.iterdir()] == ["table.parquet"]
    assert len(table.kernels) >= 8
    networks = {network.name: network for network in table.networks}
    assert len(networks) >= 4
    dense = networks[DENSE]
    assert dense.widths == graph.widths()
    measured = {kernel.key for kernel in table.kernels}
    assert set(dense.kernels) <= measured
    assert min(network.measurement.median_ms for network in networks.values()) < dense.measurement.median_ms
    # Those that were disturbed do not count.
    assert all(1 <= len(value) <= 3 for value in table.frame["rounds_ms"])
    header = table.header
    assert header["identity"] == board.probe().identity("onnxruntime")
    assert header["model"]["signature"] == graph.signature
    assert header["reference"]["median_ms"] == dense.measurement.median_ms
    several = [len(row) for row in table.frame.loc[table.frame["kind"] == "kernel", "rounds_ms"] if len(row) > 1]
    assert header["repeatability"]["rounds"] == sum(several)
    assert not several or 0 < header["repeatability"]["median_error"] < 0.5
    assert header["drift"]["drifted_rows"] == len(header["flags"].get("drifted", ()))
    assert (header["protocol"]["seed"], header["threads"], header["label"]) == (4, 1, "measured")
    assert header["conditions"]["before"]["cores"]
    assert told[-1][0] == told[-1][1] > 0
    assert any(state[3].startswith("round 2") for state in told)
    assert {"probing local", "lowering the model", "choosing kernels and networks"} <= {state[3] for state in told}


def test_profile_that_was_interrupted_goes_on_where_it_was(
    board: Board, model: nn.Module, graph: ChannelGraph, tmp_path: Path
) -> None:
    out = tmp_path / "table.parquet"
    journal, selection = (tmp_path / f"table.parquet.{what}.jsonl" for what in ("journal", "selection"))
    settings: dict[str, Any] = {"minutes": 0.05, "out": out, "graph": graph}

    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, INPUT, board, progress=interrupt, **settings)
    assert not out.exists()
    before = journal.read_text().splitlines()
    assert sum('"kind":"sample"' in line for line in before) >= 20
    chosen = selection.read_text()
    seen: list[int] = []

    def watch(done: int, total: int, left_s: float, message: str) -> None:
        if total:
            seen.append(done)
            assert journal.read_text().splitlines()[: len(before)] == before
            assert selection.read_text() == chosen

    said: list[str] = []
    table = profile(model, INPUT, board, progress=watch, told=said.append, **settings)
    assert seen[0] >= 20
    kept = sum('"kind":"sample"' in line for line in before)
    (sentence,) = said
    assert sentence.startswith(f"going on: {kept} measurements of the interrupted run are kept")
    assert table.hash == LatencyTable.load(out).hash
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["table.parquet"]


@pytest.mark.slow
def test_a_run_whose_table_has_no_place_goes_on_too(
    board: Board, model: nn.Module, graph: ChannelGraph, tmp_path: Path
) -> None:
    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        if done == 20:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, INPUT, board, minutes=0.1, graph=graph, progress=interrupt)
    (journal,) = (tmp_path / "state" / "profiles").glob("*/*.journal.jsonl")
    kept = journal.read_text().count('"kind":"sample"')
    said: list[str] = []
    profile(model, INPUT, board, minutes=0.1, graph=graph, told=said.append)
    assert said[0].startswith(f"going on: {kept} measurements of the interrupted run are kept")
    assert list((tmp_path / "state" / "profiles").iterdir()) == []


def test_board_is_held_while_it_is_measured(board: Board, model: nn.Module, graph: ChannelGraph) -> None:
    refused: list[BoardBusyError] = []

    def intrude(done: int, total: int, left_s: float, message: str) -> None:
        if message == "timing the dense network":
            with Board.open("local") as other, pytest.raises(BoardBusyError) as caught, other.hold("deploy"):
                pass
            refused.append(caught.value)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(model, INPUT, board, minutes=0.1, graph=graph, progress=intrude)
    assert "profile" in refused[0].message
    with board.hold("deploy"):
        pass


def test_energy_of_the_whole_networks_is_kept_in_the_table(
    board: Board, model: nn.Module, graph: ChannelGraph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The meter prints a constant, so what is above idle is nothing, and that is what must be said. Windows are cut short.
    short = {"replay_s": 0.2, "idle_s": 0.2, "settle_s": 0.02, "least_s": 0.1, "least_updates": 5}
    monkeypatch.setattr(afterwards, "measure_energy", partial(measure_energy, **short))
    out = tmp_path / "table.parquet"
    meter = "while echo 3.25; do sleep 0.01; done"
    asked: dict[str, Any] = {"energy": True, "meter": meter, "rails": ["meter"], "percentiles": True}
    profile(model, INPUT, board, minutes=0.02, graph=graph, out=out, **asked)
    table = LatencyTable.load(out)
    tails = table.chosen(percentile=95)
    assert {network.name for network in tails.networks} == {network.name for network in table.networks}
    before = {network.name: network.measurement.median_ms for network in table.networks}
    assert all(network.measurement.median_ms >= before[network.name] for network in tails.networks)
    assert set(table.energy) == {network.name for network in table.networks}
    for record in table.energy.values():
        found = EnergyMeasurement.from_record(record)
        assert found.gross_mj == pytest.approx(3.25 * found.run_ms)
        assert found.energy_mj == pytest.approx(0, abs=1e-6)
        assert (found.rails, found.covers) == (("meter",), "meter, as asked for")
        assert "is not more than twice its uncertainty" in found.doubts[0]


def test_energy_on_a_board_that_does_not_tell_its_power_is_refused_before_anything_is_measured(
    board: Board, model: nn.Module, tmp_path: Path
) -> None:
    if board.power().sensors:
        pytest.skip("this machine tells its power")
    with pytest.raises(PowerUnavailableError, match="the board's power must be readable"):
        profile(model, INPUT, board, out=tmp_path / "table.parquet", energy=True)
    with pytest.raises(PowerUnavailableError, match="rails must be among those that can be read"):
        profile(model, INPUT, board, out=tmp_path / "table.parquet", energy=True, rails=["VDD_IN"])
    assert list(tmp_path.iterdir()) == [tmp_path / "board"]


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan")])
def test_time_must_be_positive(model: nn.Module, minutes: float) -> None:
    with pytest.raises(ConfigError, match="minutes must be greater than 0, found"):
        profile(model, INPUT, minutes=minutes)
