"""The latency of int8 engines: from the table of a board to a plan that is measured there."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import edgeprune
from edgeprune.boards.board import Board
from edgeprune.budget import Budget
from edgeprune.errors import ConfigError, TableMismatchError
from edgeprune.latency.table import LatencyTable

X = torch.zeros(1, 3, 16, 16)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


@pytest.fixture(scope="module")
def graph(model):
    return edgeprune.trace(model, X)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("board")


@pytest.fixture(scope="module")
def kernel_graph(graph):
    return edgeprune.lower(graph, precision="int8")


@pytest.fixture(scope="module")
def table(model, graph, kernel_graph, root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEPRUNE_ROOT", str(root))
        return edgeprune.profile(model, X, minutes=0.05, precision="int8", graph=graph, kernel_graph=kernel_graph)


def test_a_table_of_int8_holds_the_kernels_and_networks_of_int8_engines(table, kernel_graph):
    assert table.header["precision"] == "int8"
    assert not table.header["unsupported"]
    rows = {row["key"]: row["precision"] for row in table.rows if row["kind"] == "network"}
    assert set(rows.values()) == {"int8"}
    operations = {kernel.op for kernel in table.kernels}
    assert {"microsoft.QLinearConv", "QuantizeLinear", "QGemm"} <= operations
    dense = next(network for network in table.networks if network.name == "dense")
    predictor = edgeprune.fit(table)
    kernels = kernel_graph.at({})
    assert {kernel.key for kernel in kernels} == set(dense.kernels)
    ms, low, high = predictor.network(kernels)
    assert 0.5 < ms / dense.measurement.median_ms < 2
    assert low < ms < high


def test_precisions_are_not_mixed(table, model, graph, root, monkeypatch):
    floating = LatencyTable({**table.header, "precision": "fp32"}, table.rows)
    with pytest.raises(TableMismatchError, match="must agree in precision, found 'int8' and 'fp32'"):
        table.merge(floating)
    # Its kernels that stay in float are no table of fp32 engines.
    with pytest.raises(TableMismatchError, match="must hold fp32 kernels for --precision fp32, it holds int8"):
        table.chosen(precision="fp32")
    assert table.chosen(precision="int8") is table
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(root))
    with pytest.raises(TableMismatchError, match="precision is int8 in the table and fp32 asked for"):
        edgeprune.profile(model, X, minutes=0.05, table=table, graph=graph)
    with pytest.raises(ConfigError, match="one of fp32, int8, found 'fp16'"):
        edgeprune.profile(model, X, minutes=0.05, precision="fp16", graph=graph)


@pytest.mark.slow
def test_a_budget_is_kept_by_the_engine_in_int8(table, model, graph, root, monkeypatch):
    monkeypatch.setenv("EDGEPRUNE_ROOT", str(root))
    predictor = edgeprune.fit(table)
    with Board.open("local") as board:
        result = edgeprune.prune(
            model, X, Budget(latency_ratio=0.7, macs_ratio=0.9), board, predictor, graph=graph, measuring_rounds=3
        )
    assert result.measured is not None
    assert result.measured.ratio < 0.95
    assert 0 < sum(result.plan.widths().values()) < sum(graph.widths().values())
    assert any("every layer in int8" in note for note in result.notes)


def test_what_is_only_known_of_fp32_is_refused(table, model, graph, kernel_graph):
    predictor = edgeprune.fit(table)
    with pytest.raises(
        TableMismatchError, match="must be of engines as onnxruntime compiles them, in fp32, found int8"
    ):
        edgeprune.prune(model, X, "70%", predictor=predictor, kernel_graph=edgeprune.lower(graph))
    with pytest.raises(ConfigError, match="memory is counted for fp32 engines, found int8"):
        edgeprune.prune(model, X, Budget(memory_ratio=0.5), predictor=predictor, kernel_graph=kernel_graph)
    with pytest.raises(ConfigError, match="removing whole blocks saves is known of fp32 engines, found int8"):
        edgeprune.prune(model, X, "70%", predictor=predictor, kernel_graph=kernel_graph, blocks=True)
