"""Report data from a real traced model, real measured kernels, and a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import edgeprune
from edgeprune.errors import ConfigError
from edgeprune.latency.predictor import Predictor
from edgeprune.loop.result import LatencyCheck
from edgeprune.lowering.kernel_graph import KernelGraph
from edgeprune.report import collecting, fitted, stored
from edgeprune.report.data import Card, ReportData
from edgeprune.report.page import render
from edgeprune.report.pruning import from_result, with_deployment
from edgeprune.spec import Kernel

TABLE = Path(__file__).parents[2] / "data" / "onnxruntime_avx512_kernels.parquet"


class _Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = torch.nn.BatchNorm2d(width)
        self.conv2 = torch.nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = torch.nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = torch.nn.Conv2d(3, 32, 3, padding=1)
        self.block = _Block(32)
        self.head = torch.nn.Linear(32, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        hidden: torch.Tensor = self.block(torch.relu(self.stem(image)))
        return self.head(hidden.mean((2, 3)))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    table = edgeprune.LatencyTable.load(TABLE)
    header = {name: value for name, value in table.header.items() if name != "schema"}
    edge = {"model": "", "group": "block.conv1", "width": 17, "below_ms": 0.1, "at_ms": 0.2}
    drift = {**header.get("drift", {}), "sentinels_ms": [2.0, 2.1, 2.0]}
    told = {**header, "board": "bench", "edges": [edge], "drift": drift}
    return edgeprune.fit(edgeprune.LatencyTable.from_rows(told, table.rows))


@pytest.fixture(scope="module")
def kernel_graph(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> KernelGraph:
    torch.manual_seed(0)
    model = _Net().eval()
    return edgeprune.lower(
        edgeprune.trace(model, torch.randn(1, 3, 32, 32)),
        model=model,
        device=predictor.table.header["identity"],
        workdir=tmp_path_factory.mktemp("lowered"),
    )


def test_latency_shares_are_those_of_the_layers_and_told_with_what_was_left_alone(
    kernel_graph: KernelGraph, predictor: Predictor
) -> None:
    shares = collecting.latency_shares(kernel_graph, predictor)
    rows = {row.name: row.before_ms for row in collecting.layers(kernel_graph, predictor, {}, {})}
    whole = sum(ms for ms in rows.values() if ms is not None)
    graph = kernel_graph.graph
    inner = graph.group("block.conv1")
    assert rows["block.conv1"] is not None
    share = sum(shares[node] for node in inner.nodes)
    assert share == pytest.approx(rows["block.conv1"] / whole)
    assert sum(shares.values()) <= 1 + 1e-9
    head = next(axis for axis in graph.frozen if axis.name == "head")
    assert rows["head"] is not None
    told = graph.explain(shares)
    assert f"block.conv1: 32 channels, {share:.1%} of the latency" in told
    assert f"head: 10 wide, {rows['head'] / whole:.1%} of the latency: an output of the model keeps its size" in told
    assert head.nodes == ("linear",)


def test_layers_carry_the_names_of_their_modules_in_order(kernel_graph: KernelGraph, predictor: Predictor) -> None:
    rows = collecting.layers(kernel_graph, predictor, {}, {"block.conv1": 16})
    names = [row.name for row in rows]
    assert [name for name in names if "(" not in name and "layout" not in name] == [
        "stem",
        "block.conv1",
        "block.conv2",
        "head",
    ]
    by_name = {row.name: row for row in rows}
    narrowed = by_name["block.conv1"]
    assert narrowed.before_ms is not None
    assert narrowed.after_ms is not None
    assert narrowed.after_ms < narrowed.before_ms
    assert by_name["stem"].before_ms == by_name["stem"].after_ms


def test_the_sentinel_s_times_come_from_the_table_and_older_tables_have_none(predictor: Predictor) -> None:
    assert collecting.sentinels(predictor.table.header) == (2.0, 2.1, 2.0)
    assert collecting.sentinels({"drift": {"largest": 0.01}}) == collecting.sentinels({}) == ()


def test_layers_add_up_to_the_kernels(kernel_graph: KernelGraph, predictor: Predictor) -> None:
    widths = {"block.conv1": 7}  # not a multiple of the vector width: layout changes appear
    rows = collecting.layers(kernel_graph, predictor, {}, widths)
    for attribute, chosen in (("before_ms", {}), ("after_ms", widths)):
        total = sum(getattr(row, attribute) or 0.0 for row in rows)
        assert total == pytest.approx(float(predictor.kernel_ms(kernel_graph.at(chosen)).sum()))


def test_staircases_show_each_kernel_at_most_once_and_mark_the_widths(
    kernel_graph: KernelGraph, predictor: Predictor
) -> None:
    found = collecting.staircases(kernel_graph, predictor, {"block.conv1": 16})
    assert {staircase.title.split(" · ")[0] for staircase in found} == {
        group.name for group in kernel_graph.graph.groups
    }
    measured = {measurement.median_ms for measurement in predictor.table.measurements.values()}
    for staircase in found:
        assert [width for width, _ in staircase.predicted] == list(range(1, 33))
        assert staircase.dense == 32
        assert list(staircase.widths) == sorted(set(staircase.widths))
        assert set(staircase.measured_ms) <= measured
        steps = [ms for _, ms in staircase.predicted]
        assert staircase.predicted[-1][1] == pytest.approx(max(steps), rel=0.5)
    chosen = {staircase.title.split(" · ")[0]: staircase.chosen for staircase in found}
    assert chosen["block.conv1"] == 16
    edges = {staircase.title.split(" · ")[0]: staircase.edges for staircase in found}
    assert edges == {name: (17,) if name == "block.conv1" else () for name in edges}
    dense_ms = [staircase.predicted[-1][1] for staircase in found]
    assert dense_ms == sorted(dense_ms, reverse=True)
    assert [one.title for one in collecting.staircases(kernel_graph, predictor, {}, most=1)] == [found[0].title]


def test_held_out_predictions_are_those_of_the_error_table(predictor: Predictor) -> None:
    kernels, networks = collecting.held_out_predictions(predictor)
    rows = {row["family"]: row for row in predictor.report().rows()}
    errors = sorted(abs(row.predicted_ms / row.measured_ms - 1) for row in networks)
    middle = (
        errors[len(errors) // 2] if len(errors) % 2 else sum(errors[len(errors) // 2 - 1 : len(errors) // 2 + 1]) / 2
    )
    assert 100 * middle == pytest.approx(rows["end to end"]["median_error_percent"])
    assert len(kernels) == sum(row["n"] for name, row in rows.items() if name != "end to end" and row["n"] > 1)
    assert collecting.error_table(predictor.report())["end to end"]["measured"] == str(len(networks))


def test_conditions_become_flat_text_with_before_first() -> None:
    told = {
        "after": {"load": 1.23456, "cores": [0, 1]},
        "before": {"governor": None, "context": {"wall_s": 15712.3}},
        "clock": "steady",
    }
    assert list(collecting.flat_conditions(told).items()) == [
        ("before: governor", "not told"),
        ("after: load", "1.235"),
        ("after: cores", "0, 1"),
        ("clock", "steady"),
    ]


def test_report_data_survives_its_file_and_damage_is_told(
    tmp_path: Path, kernel_graph: KernelGraph, predictor: Predictor
) -> None:
    data = ReportData(
        title="kept",
        cards=(Card("a", "1 ms", verdict="good"),),
        staircases=collecting.staircases(kernel_graph, predictor, {}),
        layers=collecting.layers(kernel_graph, predictor, {}, {}),
        frozen=collecting.frozen_groups(kernel_graph.graph),
    )
    path = stored.save(data, tmp_path / "report.json")
    assert stored.load(path) == data
    assert "block.conv2" in render(stored.load(path))
    path.write_text(path.read_text()[:-40])
    with pytest.raises(ConfigError, match="must hold report data"):
        stored.load(path)
    path.write_text('{"schema": 99, "report": {}}')
    with pytest.raises(ConfigError, match="must have schema 1, found 99"):
        stored.load(path)
    with pytest.raises(ConfigError, match="there is no"):
        stored.load(tmp_path / "missing.json")


def test_a_deployment_is_added_to_the_cards_and_hashes() -> None:
    data = replace(ReportData(), cards=(Card("latency", "2 ms"),), hashes={"plan": "aa"})
    deployment = {
        "board": "bench",
        "measured_ms": 1.2,
        "dense_ms": 2.4,
        "ratio": 0.5,
        "parity": {"max_abs": 2e-6},
        "artifact": "cc",
        "release": "dd",
    }
    more = with_deployment(data, deployment)
    assert [card.title for card in more.cards] == ["latency", "deployed to bench", "parity on bench"]
    assert (more.cards[1].value, more.cards[1].detail) == ("1.200 ms", "as timed; 50.0% of dense, interleaved")
    scaled = with_deployment(replace(data, dense_ms=2.0), deployment).cards[1]
    assert (scaled.value, scaled.detail) == (
        "1.000 ms",
        "50.0% of dense, interleaved; as timed there 2.400 → 1.200 ms",
    )
    assert more.hashes == {"plan": "aa", "artifact on bench": "cc", "release on bench": "dd"}
    gated = with_deployment(data, {**deployment, "budget": "1.2 ms", "tolerance": 0.05}).cards[1]
    assert gated.detail.endswith("; budget 1.2 ms, +5% tolerated")
    clause = "leaving out 3 of 23 rounds as disturbed"
    assert clause not in gated.detail
    assert with_deployment(data, {**deployment, "disturbance": clause}).cards[1].detail.endswith(f"; {clause}")
    both = with_deployment(more, {**deployment, "board": "other", "release": "ee"})
    assert {"deployed to bench", "deployed to other"} < {card.title for card in both.cards}
    assert (both.hashes["release on bench"], both.hashes["release on other"]) == ("dd", "ee")


def test_all_milliseconds_of_a_report_are_on_one_scale(kernel_graph: KernelGraph, predictor: Predictor) -> None:
    torch.manual_seed(0)
    model = _Net().eval()
    inputs = torch.randn(1, 3, 32, 32)
    result = edgeprune.prune(model, inputs, "70%", None, predictor, kernel_graph=kernel_graph)
    # The board was a tenth slower in the comparison than it was while profiling.
    slow = 1.1 * result.dense_ms
    check = LatencyCheck("bench", dense_ms=slow, pruned_ms=0.6 * slow, ratio=0.6, ratio_low=0.59, ratio_high=0.61)
    measured_ms = 0.6 * result.dense_ms
    result = replace(result, measured_ms=measured_ms, budget_met=True, measured=check)
    data = from_result(result, kernel_graph, predictor, title="t", budget="70%", parameters_before=1)
    latency, predicted = data.cards[:2]
    assert data.cards[-2].title == "parameters"
    assert latency.value == f"{result.dense_ms:.3f} → {measured_ms:.3f} ms"
    assert latency.detail.startswith("60.0% of dense, interleaved; budget 70%")
    assert f"as timed in the comparison {slow:.3f} → {0.6 * slow:.3f} ms" in latency.detail
    assert f"{result.predicted_ms / measured_ms - 1:+.1%} of measured" in predicted.detail
    assert [row.latency_ms for row in data.candidates] == [result.dense_ms, measured_ms]
    deployment = {"board": "bench", "measured_ms": 0.6 * slow, "dense_ms": slow, "ratio": 0.6, "release": "r"}
    deployed = with_deployment(data, {**deployment, "parity": {"max_abs": 0.0}, "artifact": "a"})
    assert deployed.cards[-2].value == f"{measured_ms:.3f} ms"
    assert f"{measured_ms:.3f}" in render(data)
    disturbed = replace(result, measured=replace(check, disturbance="leaving out 3 of 23 rounds as disturbed"))
    data = from_result(disturbed, kernel_graph, predictor, title="t", budget="70%", parameters_before=1)
    words = "60.0% of dense, interleaved, leaving out 3 of 23 rounds as disturbed; budget 70%"
    assert data.cards[0].detail.startswith(words)


def test_rounds_that_were_measured_are_told_where_the_board_was_lost_after_them(
    kernel_graph: KernelGraph, predictor: Predictor
) -> None:
    torch.manual_seed(0)
    result = edgeprune.prune(
        _Net().eval(), torch.randn(1, 3, 32, 32), "70%", None, predictor, kernel_graph=kernel_graph
    )
    (left,) = result.rounds
    dense_ms = result.dense_ms
    slow = LatencyCheck("bench", dense_ms, 0.77 * dense_ms, ratio=0.77, ratio_low=0.76, ratio_high=0.78)
    lost = replace(result, rounds=(replace(left, measured=slow), left), chosen=1)
    assert (lost.measured_ms, lost.budget_met) == (None, None)
    data = from_result(lost, kernel_graph, predictor, title="t", budget="70%", parameters_before=1)
    first, second = data.rounds
    assert first.of_budget == pytest.approx(1.1)
    assert (second.measured_ms, second.taken) == (None, True)
    assert "Rounds of the closed loop" in render(data)
    assert from_result(result, kernel_graph, predictor, title="t", budget="70%", parameters_before=1).rounds == ()


def test_disturbances_are_those_of_every_run_each_once() -> None:
    header = {
        "fingerprint": {"disturbances": ["a virtual machine."]},
        "disturbances": ["hot."],
        "runs": [{}, {"disturbances": ["hot.", "restarted."]}],
    }
    assert collecting.disturbances(header) == ("a virtual machine.", "hot.", "restarted.")
    assert collecting.disturbances({}) == ()


def test_a_fit_is_drawn_from_its_table_alone(predictor: Predictor) -> None:
    data = fitted.from_predictor(predictor)
    page = render(data)
    for title in ("Staircases", "Predicted and measured", "Error of each prediction", "Drift over the profiling run"):
        assert title in page
    assert "The widths were chosen" not in page, "nobody chose widths"
    assert "block.conv1 at 17 (0.1000 to 0.2000 ms)" in page
    timed = predictor.table.measurements
    by_time = {found.median_ms: Kernel.from_key(key) for key, found in timed.items()}
    assert len(data.staircases) == collecting.MOST_STAIRCASES
    for one in data.staircases:
        assert len(one.widths) >= 4
        assert list(one.widths) == sorted(set(one.widths))
        # The kernels on it differ in that count alone.
        kernels = [by_time[ms] for ms in one.measured_ms]
        channels = [(kernel.inputs[0][1], kernel.output[1]) for kernel in kernels]
        place = {"output channels": 1, "input channels": 0}[one.x_title]
        assert tuple(pair[place] for pair in channels) == one.widths
        assert len({pair[1 - place] for pair in channels}) == 1
        assert len({(kernel.op, kernel.attributes, kernel.output[2:]) for kernel in kernels}) == 1
        curve = dict(one.predicted)
        assert [curve[width] for width in one.widths] == pytest.approx(list(one.measured_ms))
        step = one.predicted[1][0] - one.predicted[0][0]
        at = dict(zip(one.widths, one.measured_ms, strict=True))
        for edge in one.edges:
            assert abs(at[edge] / at[edge - step] - 1) > 0.04
    assert any(one.edges for one in data.staircases)


def test_a_fit_to_somebody_else_s_table_is_drawn_without_what_that_does_not_tell() -> None:
    measured = edgeprune.LatencyTable.load(TABLE).filter(op="FusedConv")
    header = {
        "identity": {"device": "v100"},
        "runtime": "tensorrt",
        "threads": 1,
        "precision": "fp32",
        "label": "imported",
    }
    few = edgeprune.fit(edgeprune.LatencyTable.from_rows(header, measured.rows))
    data = fitted.from_predictor(few)
    assert data.title == "Latency predictor of v100"
    assert data.provenance == "imported on v100 (tensorrt, 1 thread)"
    assert (data.sentinels_ms, data.network_predictions, dict(data.board)) == ((), (), {"board": "v100"})
    assert "Drift over the profiling run" not in render(data)
