"""Which latency is meant: percentiles and the sustained state in place of the medians of networks, on measured kernels."""

from __future__ import annotations

from typing import Any

import pytest

from edgeprune.errors import ConfigError, TableMismatchError
from edgeprune.latency.chosen import Chosen
from edgeprune.latency.fitting import fit
from edgeprune.latency.table import LatencyTable
from edgeprune.latency.table_rows import network_key
from edgeprune.profiling.setting import checked
from edgeprune.profiling.sustaining import with_sustained
from edgeprune.spec import Kernel


@pytest.fixture(scope="module")
def told(measured: LatencyTable) -> LatencyTable:
    """The table as a run with --percentiles and --sustained would have left it: emulated, on really measured medians."""
    keys = {row["key"]: network_key(row["kernels"]) for row in measured.rows if row["kind"] == "network"}
    half = dict(sorted(keys.items())[::2])
    percentiles = {key: {"runs": 500, "rounds": 5, "ratio": {"95": 1.2, "99": 1.5}} for key in half.values()}
    networks = {key: {"burst_ms": 1.0, "sustained_ms": 1.3, "ratio": 1.3} for key in keys.values()}
    header = {**measured.header, "percentiles": percentiles, "sustained": {"networks": networks}}
    return LatencyTable(header, measured.rows)


def medians(table: LatencyTable) -> dict[str, float]:
    return {network.name: network.measurement.median_ms for network in table.networks}


def test_networks_take_what_was_chosen_and_kernels_stay(told: LatencyTable) -> None:
    tails = told.chosen(percentile=95)
    assert Chosen.of(tails.header) == Chosen(percentile=95)
    assert 0 < len(tails.networks) < len(told.networks), "those without it are left out"
    before = medians(told)
    assert all(ms == pytest.approx(1.2 * before[name]) for name, ms in medians(tails).items())
    assert tails.measurements == told.measurements
    hot = told.chosen(sustained=True)
    assert medians(hot) == {name: pytest.approx(1.3 * ms) for name, ms in before.items()}
    assert len({told.hash, tails.hash, hot.hash}) == 3


def test_the_median_is_the_table_itself(told: LatencyTable) -> None:
    assert told.chosen() is told
    assert told.chosen(precision="fp32") is told


def test_a_predictor_of_it_says_what_was_chosen(told: LatencyTable) -> None:
    network = told.networks[0]
    kernels = [Kernel.from_key(key) for key in network.kernels.elements()]
    convs = [kernel.key for kernel in told.kernels if kernel.family == "conv"][::8]
    others = [kernel.key for kernel in told.kernels if kernel.family != "conv"]
    few = told.filter(key={*convs, *others, *(one.name for one in told.networks)})
    plain, hot = fit(few), fit(few.chosen(sustained=True))
    # The calibration is drawn a little towards the plain sum, so not the whole of it.
    assert 1.2 < hot.network_ms(kernels) / plain.network_ms(kernels) < 1.31


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"percentile": 95}, r"must hold the 95th percentile of single inferences of whole networks, it holds medians"),
        ({"sustained": True}, "must hold the latency in thermal equilibrium of whole networks, it holds medians"),
        ({"precision": "int8"}, "must hold int8 kernels for --precision int8, it holds fp32"),
    ],
)
def test_what_a_table_lacks_is_refused_with_what_it_has(
    measured: LatencyTable, asked: dict[str, Any], words: str
) -> None:
    with pytest.raises(TableMismatchError, match=words):
        measured.chosen(**asked)


def test_a_refusal_says_the_command(measured: LatencyTable, told: LatencyTable) -> None:
    for asked, option in (({"percentile": 95}, "--percentiles"), ({"sustained": True}, "--sustained")):
        with pytest.raises(TableMismatchError) as caught:
            measured.chosen(**asked)  # type: ignore[arg-type]
        assert f"edgeprune profile MODEL {option} --board" in str(caught.value)
    with pytest.raises(
        TableMismatchError, match=r"it holds medians, percentiles 95, 99 and the sustained state.*--percentile 99"
    ):
        told.chosen(percentile=97)
    with pytest.raises(TableMismatchError, match="must not be asked of a latency table at once"):
        told.chosen(percentile=95, sustained=True)


def test_what_was_chosen_once_is_not_chosen_from_again_nor_merged(told: LatencyTable) -> None:
    tails = told.chosen(percentile=95)
    assert tails.chosen(percentile=95) is tails
    with pytest.raises(TableMismatchError, match="it holds the 95th percentile of single inferences"):
        tails.chosen(sustained=True)
    with pytest.raises(TableMismatchError, match="must agree in latency"):
        told.merge(tails)


@pytest.mark.parametrize("ratios", [(None, 1.3), (1.1, None), (1.1, 1.3)], ids=str)
def test_a_merged_table_has_the_sustained_latency_of_each_network(
    measured: LatencyTable, ratios: tuple[float | None, float | None]
) -> None:
    """Tables of single models all call their networks alike; which are hot by how much is emulated."""
    rows = [row for row in measured.rows if row["kind"] == "network"][:2]
    tables, expected = [], {}
    for row, ratio in zip(rows, ratios, strict=True):
        table = LatencyTable(measured.header, [{**row, "key": "dense"}])
        if ratio is not None:
            found = {"settled": True, "curve": [[1.0, None]], "networks": {"dense": {"ratio": ratio}}}
            table = with_sustained(table, found)
            expected[row["kernels"]] = pytest.approx(ratio * row["median_ms"])
        tables.append(table)
    both = tables[0].merge(tables[1])
    assert len(both.networks) == 2
    assert {row["kernels"]: row["median_ms"] for row in both.chosen(sustained=True).rows} == expected


@pytest.mark.parametrize("percentile", [0, 49, 100])
def test_a_percentile_is_from_50_to_99(told: LatencyTable, percentile: int) -> None:
    with pytest.raises(ConfigError, match=f"must be from 50 to 99, found {percentile}"):
        told.chosen(percentile=percentile)


def test_a_table_of_another_latency_is_not_extended_by_medians(told: LatencyTable) -> None:
    with pytest.raises(TableMismatchError, match="a table that is extended must hold medians, found one of the 95th"):
        checked(1.0, told.chosen(percentile=95))
    assert checked(1.0, told) is told
