"""The HTML page, made of synthetic figures: nothing here was measured anywhere."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeprune.report import charts
from edgeprune.report.data import (
    Candidate,
    Card,
    FrozenGroup,
    GroupChoice,
    Layer,
    Prediction,
    ReportData,
    ServedGroup,
    Staircase,
    TaskRow,
    TaskTable,
)
from edgeprune.report.page import render, write

SYNTHETIC = "synthetic figures, not a measurement"
HOSTILE = "</script><script>alert('x')</script> & <b>"


def synthetic_report() -> ReportData:
    widths = tuple(range(4, 65, 4))
    return ReportData(
        title="Synthetic network at 50 % of its latency",
        provenance=SYNTHETIC,
        created="2026-01-02 03:04 UTC",
        cards=(
            Card("latency", "2.40 ms → 1.19 ms", "49.6 % of dense, budget 1.20 ms", "good"),
            Card("predicted", "1.17 ms", "1.7 % below measured"),
            Card("top-1", "0.9861 → 0.9833", "held-out images"),
            Card("parameters", "175,258 → 61,204"),
            Card("parity on the board", "2.1e-06", "largest absolute difference", "good"),
        ),
        board={"board": "synthetic", "cpu": "none", "runtime": "onnxruntime 0.0"},
        conditions={"load before": "0.10", "rounds repeated": "0"},
        disturbances=("The CPU frequency governor is not readable on this board.",),
        candidates=(
            Candidate("dense", 2.4, 1.0, 0.9861, 175258),
            Candidate("uniform", 1.2, 0.5, 0.9722, 70011),
            Candidate("pruned", 1.19, 0.496, 0.9833, 61204),
        ),
        metric="top-1",
        staircases=tuple(
            Staircase(
                f"layer{number}.conv1 · 3x3 conv, {16 * number} channels in",
                "output channels",
                widths,
                tuple(0.02 * number * (1 + (width - 1) // 16) for width in widths),
                tuple((width, 0.02 * number * (1 + (width - 1) // 16) * 1.03) for width in range(4, 65)),
                64,
                16 * number,
                (17, 33, 49),
            )
            for number in (1, 2, 3, 4)
        ),
        tasks=TaskTable(
            ("dense", "round 1", "tuned"),
            (
                TaskRow("seg", ("0.9000", "80 %", "0.8900"), "at least 0.882 (2%)", "good"),
                TaskRow("depth", ("0.0700", "130 %", "0.0800"), "at most 0.0721 (3%)", "bad"),
            ),
            "Made-up figures per task.",
        ),
        served=(ServedGroup("trunk", 32, 24, ("seg", "depth")), ServedGroup("head", 16, 4, ("depth",))),
        task_latency=(("all tasks", 0.7), ("only depth", 0.3)),
        layers=(
            *(Layer(f"stage{index // 6}.block{index % 6 // 2}.conv{index % 2 + 1}", 0.2, 0.1) for index in range(18)),
            Layer("classifier", 0.01, 0.01),
            Layer("reorder", None, 0.02),
        ),
        layer_source="Predicted from the latency table, kernel by kernel.",
        kernel_predictions=tuple(
            Prediction(f"conv {index}", 0.01 * 1.2**index, 0.01 * 1.2**index * (1.05 if index % 2 else 0.97))
            for index in range(30)
        ),
        network_predictions=tuple(
            Prediction(f"network {index}", 1 + 0.1 * index, 1.02 + 0.1 * index, 0.95 + 0.1 * index, 1.1 + 0.1 * index)
            for index in range(10)
        ),
        sentinels_ms=(2.40, 2.41, 2.39, 2.62, 2.40),
        noise="A second measurement of the same kernels agreed within 10 % in 94 % of cases.",
        errors={"conv": {"kernels": "210", "mean error": "4.1 %"}, "gemm": {"kernels": "12", "mean error": "2.0 %"}},
        groups=tuple(
            GroupChoice(f"stage{index // 3}.block{index % 3}.conv1", 64, 64 - 5 * index) for index in range(9)
        ),
        frozen=(FrozenGroup("classifier", 10, "It is an output of the model."),),
        hashes={"table": "ab" * 32, "plan": "cd" * 32},
        notes=("Every number on this page is made up.",),
    )


class _Loads(HTMLParser):
    """Everything that a browser would fetch, and how often each script element stands there."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.scripts = 0
        self.csp = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.fetched += [f"{tag} {key}" for key in ("src", "href", "data", "poster", "srcset") if key in attributes]
        self.scripts += tag == "script"
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.csp = attributes["content"] or ""


def _without_scripts(page: str) -> str:
    return re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_loads_nothing() -> None:
    page = render(synthetic_report())
    loads = _Loads()
    loads.feed(page)
    assert loads.fetched == []
    assert "default-src 'none'" in loads.csp, "the browser itself must refuse what slipped through"
    assert "http" not in loads.csp
    outside = _without_scripts(page).replace("http-equiv", "")
    assert not re.search(r"https?:|@import|url\(", outside)


def test_plotly_is_there_exactly_once_and_only_when_something_is_drawn() -> None:
    page = render(synthetic_report())
    assert page.count("plotly.js v") == 1
    empty = render(ReportData(title="nothing yet"))
    assert "plotly" not in empty
    assert len(empty) < 12_000
    assert "nothing yet" in empty


def test_every_figure_has_its_place_and_every_place_its_figure() -> None:
    page = render(synthetic_report())
    match = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    figures = json.loads(match[1])
    places = re.findall(r'class="figure" id="figure-([\w-]+)"', page)
    assert sorted(places) == sorted(figures)
    assert len(places) == 11


@pytest.mark.parametrize(
    ("part", "text"),
    [
        ("cards", "2.40 ms → 1.19 ms"),
        ("candidates", "Dense, uniform, pruned"),
        ("tasks", "Made-up figures per task."),
        ("served", "Which channels serve which task"),
        ("staircases", "Staircases"),
        ("layers", "Milliseconds per layer"),
        ("groups", "Widths chosen"),
        ("frozen", "Left alone, and why"),
        ("hashes", "What this page rests on"),
        ("notes", "Every number on this page is made up."),
        ("board", "onnxruntime 0.0"),
        ("noise", "agreed within 10 %"),
        ("sentinels_ms", "Drift over the profiling run"),
    ],
)
def test_a_missing_part_is_left_out_and_the_others_stay(part: str, text: str) -> None:
    from dataclasses import fields, replace

    full = synthetic_report()
    assert text in _without_scripts(render(full))
    empty = next(field for field in fields(ReportData) if field.name == part)
    value = empty.default_factory() if callable(empty.default_factory) else empty.default
    page = _without_scripts(render(replace(full, **{part: value})))
    assert text not in page
    assert SYNTHETIC in page


def test_names_from_models_cannot_become_markup_or_end_the_script() -> None:
    page = render(
        ReportData(
            title=HOSTILE,
            layers=(Layer(HOSTILE, 1.0, 0.5),),
            groups=(GroupChoice(HOSTILE, 8, 4),),
            frozen=(FrozenGroup(HOSTILE, None, HOSTILE),),
        )
    )
    assert "alert('x')</script>" not in page
    match = re.search(r'<script id="figures" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    assert json.loads(match[1])["layers"]["data"][0]["customdata"] == [HOSTILE]


def test_edges_of_the_stairs_stand_on_them() -> None:
    marks = next(
        trace for trace in charts.staircase(synthetic_report().staircases[0])["data"] if trace["name"] == "edge found"
    )
    assert marks["x"] == [17, 33, 49]
    assert marks["y"] == pytest.approx([0.02 * step * 1.03 for step in (2, 3, 4)])
    plain = charts.staircase(Staircase("kernel", "channels", (8, 16), (0.1, 0.2)))
    assert [trace["name"] for trace in plain["data"]] == ["measured"]


def test_residuals_are_errors_with_their_sign() -> None:
    figure = charts.residuals([Prediction("conv", 2.0, 2.1)], [Prediction("network", 10.0, 9.0)])
    assert [(trace["name"], trace["x"]) for trace in figure["data"]] == [("kernels", [2.0]), ("networks", [10.0])]
    assert [trace["y"][0] for trace in figure["data"]] == pytest.approx([5.0, -10.0])
    assert [trace["name"] for trace in charts.residuals([], [Prediction("network", 1.0, 1.0)])["data"]] == ["networks"]


def test_drift_is_told_against_the_median_in_the_order_of_measuring() -> None:
    (trace,) = charts.drift((2.0, 2.2, 2.0, 1.9, 2.0))["data"]
    assert trace["x"] == [1, 2, 3, 4, 5]
    assert trace["y"] == pytest.approx([0.0, 10.0, 0.0, -5.0, 0.0])


def test_many_layers_are_summed_not_dropped() -> None:
    rows = [Layer(f"layer {index}", 1.0 + index, 0.5) for index in range(100)]
    figure = charts.layers(rows)
    before = next(trace for trace in figure["data"] if trace["name"] == "before")
    assert len(before["x"]) == 40
    assert sum(before["x"]) == pytest.approx(sum(row.before_ms or 0 for row in rows))
    assert before["customdata"][-1] == "61 smaller layers"
    assert before["customdata"][:-1] == [f"layer {index}" for index in range(61, 100)], "order of execution stays"


def test_layers_of_equal_shortened_name_stay_apart() -> None:
    rows = [Layer(f"a{index}.{'x' * 60}", 1.0, 1.0) for index in range(3)]
    labels = charts.layers(rows)["data"][0]["y"]
    assert len(set(labels)) == 3


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "report.html"
    assert write(synthetic_report(), path) == path
    assert SYNTHETIC in path.read_text(encoding="utf-8")
    path.write_text("former")
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(ReportData(layers=(Layer("x", float("nan"), 1.0),)), path)
    assert path.read_text() == "former"
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_a_row_per_task_and_a_square_per_task_that_a_group_serves() -> None:
    page = _without_scripts(render(synthetic_report()))
    row = next(part for part in page.split("<tr>") if part.startswith("<td>depth</td>"))
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == [
        "depth",
        "0.0700",
        "130 %",
        "0.0800",
        "at most 0.0721 (3%)",
        "no",
    ]
    assert "70 % serve all tasks, 30 % serve only depth." in page
    (trace,) = charts.served(synthetic_report().served)["data"]
    assert list(zip(trace["y"], trace["x"], trace["text"], strict=True)) == [
        ("trunk", "seg", "24 of 32"),
        ("trunk", "depth", "24 of 32"),
        ("head", "depth", "4 of 16"),
    ]
    assert trace["marker"]["opacity"][0] > trace["marker"]["opacity"][2]
