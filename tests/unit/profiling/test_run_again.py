"""A further model, or several at once: the table that is there grows by what it lacks, on this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from edgeprune.boards.board import Board
from edgeprune.errors import ConfigError, TableMismatchError
from edgeprune.graph.tracing import trace
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.loop.dense import dense_latency
from edgeprune.lowering.kernel_graph import lower
from edgeprune.profiling import extending, quick_look
from edgeprune.profiling.run import DENSE, preview, profile

INPUT = torch.zeros(1, 3, 16, 16)
MINUTES = 0.04


def network(*widths: int) -> nn.Module:
    """A stack of convolutions and a classifier."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for before, after in zip((3, *widths), widths, strict=False):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return network(32, 48)


@pytest.fixture(scope="module")
def wide() -> nn.Module:
    return network(32, 64, 48, 64)


@pytest.fixture(scope="module")
def large() -> nn.Module:
    return network(32, 48, 48, 48, 48, 48)


@pytest.fixture(scope="module")
def first(small: nn.Module, wide: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> LatencyTable:
    """The table of two models at once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_ROOT", str(tmp_path_factory.mktemp("board")))
        return profile({"small": small, "wide": wide}, {"small": INPUT, "wide": INPUT}, minutes=MINUTES)


@pytest.fixture
def tolerant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of two seconds on a machine that runs tests: how far they agree is not what is tested here."""
    monkeypatch.setattr(extending, "AGREE", 5.0)
    monkeypatch.setattr(extending, "MOST", 50.0)


@pytest.mark.usefixtures("tolerant")
def test_further_model_adds_only_what_the_table_lacks(
    board: Board, first: LatencyTable, small: nn.Module, large: nn.Module, tmp_path: Path
) -> None:
    out = first.save(tmp_path / "known.parquet")
    seen = preview({"large": large}, {"large": INPUT}, board, minutes=MINUTES, table=out)
    assert 0 < seen.known < seen.wanted == seen.known + seen.to_measure
    assert f"{seen.known} of {seen.wanted} known, {seen.to_measure} to measure, " in str(seen)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["known.parquet"]

    said: list[str] = []
    table = profile({"large": large}, {"large": INPUT}, board, minutes=MINUTES, table=out, out=out, told=said.append)
    assert said[0] == str(seen), "what was announced is what is done"
    assert "than when the table was made, by 8 kernels measured again" in said[1]
    assert LatencyTable.load(out).hash == table.hash
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["known.parquet"]
    rows = {(row["kind"], row["key"]): row for row in table.rows}
    assert all(rows[row["kind"], row["key"]] == row for row in first.rows), "older rows stay as they were"
    assert len(table) == len(first) + seen.to_measure

    models = {entry["name"]: entry for entry in table.header["models"]}
    assert list(models) == ["small", "wide", "large"]
    assert (models["small"]["dense"], models["large"]["dense"]) == (DENSE, "large/dense")
    named = {network.name for network in table.networks}
    assert {name for entry in models.values() for name in entry["networks"]} == named
    assert len(models["large"]["networks"]) >= 4
    run = table.header["runs"][-1]
    assert isinstance(run["fingerprint"]["disturbances"], list), "of the board as it was then"
    assert table.header["fingerprint"] == first.header["fingerprint"]
    assert run["protocol"]["spent_s"] > run["protocol"]["earlier_s"] == 0.0
    assert len(run["link"]["ratios"]) == 8
    assert set(run["link"]["ratios"]) <= {kernel.key for kernel in first.kernels}

    # Old and new models are calibrated by networks of their own, and the dense latency of each is a measured one.
    predictor = fit(table)
    for model in (small, large):
        lowered = lower(trace(model, INPUT), model=model)
        assert dense_latency(predictor, lowered).measured
        assert predictor.calibration_of(lowered.at({})) != predictor.calibration

    # Once more there is next to nothing left to do, and what is known is not measured again.
    again = preview({"large": large}, {"large": INPUT}, board, minutes=MINUTES, table=table)
    assert again.networks == 0
    assert again.known >= seen.known + seen.networks


@pytest.mark.usefixtures("tolerant")
def test_table_stays_whole_until_the_new_one_is(
    board: Board, first: LatencyTable, large: nn.Module, tmp_path: Path
) -> None:
    out = first.save(tmp_path / "known.parquet")
    settings: dict[str, Any] = {"minutes": MINUTES, "table": out, "out": out}

    def interrupt(done: int, total: int, left_s: float, message: str) -> None:
        if done == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        profile(large, INPUT, board, progress=interrupt, **settings)
    assert LatencyTable.load(out).hash == first.hash
    journal = tmp_path / "known.parquet.journal.jsonl"
    kept = [json.loads(line) for line in journal.read_text().splitlines()]
    samples = sum(record.get("kind") == "sample" for record in kept)
    assert samples >= 15
    said: list[str] = []
    table = profile(large, INPUT, board, told=said.append, **settings)
    going_on = f"going on: {samples} measurements of the interrupted run are kept"
    assert any(sentence.startswith(going_on) for sentence in said)
    assert LatencyTable.load(out).hash == table.hash != first.hash
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["known.parquet"]


def test_board_that_changed_is_refused_before_it_is_measured(
    board: Board, first: LatencyTable, large: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extending, "AGREE", 5.0)
    monkeypatch.setattr(quick_look, "AGAIN_AFTER_S", (0.0,))
    # The table says that everything took a third of what it takes.
    quick = [
        {**row, **{name: row[name] / 3 for name in ("median_ms", "p90_ms", "min_ms")}}
        | {"rounds_ms": [value / 3 for value in row["rounds_ms"]]}
        for row in first.rows
    ]
    out = LatencyTable.from_rows(first.header, quick).save(tmp_path / "quick.parquet")
    content = out.read_bytes()
    with pytest.raises(TableMismatchError, match="must be as quick as when the table was made"):
        profile(large, INPUT, board, minutes=MINUTES, table=out, out=out)
    assert out.read_bytes() == content
    assert not (tmp_path / "quick.parquet.journal.jsonl").exists()


def test_another_runtime_version_is_refused(board: Board, first: LatencyTable, large: nn.Module) -> None:
    header = {**first.header, "identity": {**first.header["identity"], "runtime_version": "1.0.0"}}
    other = LatencyTable.from_rows(header, first.rows)
    for call in (profile, preview):
        with pytest.raises(TableMismatchError, match=r"runtime_version is 1.0.0 in the table"):
            call(large, INPUT, board, minutes=MINUTES, table=other)


def test_several_models_at_once_share_kernels_and_rounds(first: LatencyTable) -> None:
    assert [entry["name"] for entry in first.header["models"]] == ["small", "wide"]
    dense = {network.name: network.measurement.median_ms for network in first.networks}
    assert dense[DENSE] < dense["wide/dense"]
    named = {network.name for network in first.networks}
    assert {name for entry in first.header["models"] for name in entry["networks"]} == named
    assert all(len(entry["networks"]) >= 4 for entry in first.header["models"])
    assert all(network.measurement.rounds_ms for network in first.networks)


def test_models_and_inputs_must_have_the_same_names(board: Board, small: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"same names \['small'\], found \['other'\]"):
        profile({"small": small}, {"other": INPUT}, board)
    with pytest.raises(ConfigError, match="found Tensor"):
        profile({"small": small}, INPUT, board)
